"""SAEs on disk: a folder with ``cfg.json`` and ``sae_weights.safetensors``, the form of SAELens v6, which opens ours as it is.

What an SAE reads (model, layer, tokens) lies in the config's ``metadata``, together with a checksum of the weights, and under ``patchsae``
what SAELens has no key for: which variant was trained, and the statistics of its input. SAELens ignores those, and needs none of them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .artifacts import file_sha256, read_json, write_json
from .sae import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAELENS_VERSION = "6.18.0"  # the form of the folder; older versions convert it and lose the metadata
_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
# BatchTopK and Matryoshka are, once trained, JumpReLU with one threshold for all latents.
_ARCHITECTURES = {v: k for k, v in _ACTIVATIONS.items()} | {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}
_INPUT = ("input_mean", "input_scale", "input_norm")
_UNIT = 1e-5  # how far from 1 a float32 row's norm may be
_REFUSED = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}


def save_sae(sae: SparseAutoencoder, directory: str | Path) -> Path:
    """Write an SAE as ``cfg.json`` and ``sae_weights.safetensors``, each under a temporary name first.

    The decoder's rows are written at unit norm. Where they are (:func:`~patchsae_utils.training.train_sae` leaves them so), all weights are
    written as they are; else each norm goes into its latent's activation, which leaves the reconstruction what it was.

    Statistics of the input (:meth:`~patchsae_utils.sae.SparseAutoencoder.set_normalization`) need no folding: the weights belong to the
    residual stream's own units, so other programs give the same latents and reconstructions without knowing them.

    Parameters
    ----------
    sae : SparseAutoencoder
    directory : str or Path
        Made when missing.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the rows are not at unit norm and a latent's size decides which are kept (``topk``, ``batchtopk``, ``matryoshka``).
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in _unit_rows(sae).items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{WEIGHTS}-", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary)
        checksum = file_sha256(temporary)
        os.replace(temporary, directory / WEIGHTS)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    metadata = {"model_name": None, **sae.metadata, "sae_lens_version": _SAELENS_VERSION, "weights_sha256": checksum}
    if metadata.get("layer") is not None:
        metadata.setdefault("hook_name", f"visual.transformer.resblocks.{metadata['layer']}")
    if own := _own_entries(sae):
        metadata["patchsae"] = own
    config = {
        "architecture": _ARCHITECTURES[sae.activation],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if sae.activation == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_json(directory / CONFIG, config)
    return directory


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Open an SAE that :meth:`SparseAutoencoder.save` or SAELens v6 wrote.

    Parameters
    ----------
    path : str or Path
        Folder with ``cfg.json`` and ``sae_weights.safetensors``.
    device : str or torch.device

    Returns
    -------
    SparseAutoencoder
        In ``eval()`` mode: ``batchtopk`` and ``matryoshka`` apply their threshold.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a file is missing in it.
    ValueError
        If it is of another format or architecture, or damaged. Nothing is ever unpickled.
    """
    path = Path(path)
    if path.suffix in _REFUSED:
        raise ValueError(
            f"{path} is a pickle, which could run code when opened. SAEs are read from a folder with {CONFIG} and {WEIGHTS}; "
            f"convert its tensors W_enc, b_enc, W_dec, b_dec with a tool you trust, fill a SparseAutoencoder, and save that."
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"No SAE at {path}: expected a folder with {CONFIG} and {WEIGHTS}, as SparseAutoencoder.save or train_sae writes it."
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{path} holds no {' and no '.join(missing)}, so it is no SAE folder of ours or of SAELens v6 (found: {found})."
        )
    config = read_json(path / CONFIG)
    sae = _from_config(config, path)
    checksum = sae.metadata.pop("weights_sha256", None)
    if checksum is not None and checksum != file_sha256(path / WEIGHTS):
        raise ValueError(
            f"{path / WEIGHTS} is damaged, or belongs to another {CONFIG}: its SHA-256 is not the one written there. "
            f"Train or copy it again."
        )
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is no valid safetensors file ({error}). Train or copy it again.") from error
    _check_tensors(sae, tensors, path)
    tensors = {_IN_MEMORY.get(name, name): value.float() for name, value in tensors.items()}
    if sae.activation in ("batchtopk", "matryoshka"):
        tensors["threshold"] = tensors["threshold"][0]
    sae.load_state_dict(tensors, strict=False)  # the input's statistics are set already, the rest was checked
    return sae.eval().to(device)


_IN_MEMORY = {"b_gate": "b_enc"}


def _file_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The weights under SAELens's names."""
    tensors = {name: value for name, value in sae.state_dict().items() if name not in _INPUT}
    if sae.activation == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    if sae.activation in ("batchtopk", "matryoshka"):
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
    return tensors


def _unit_rows(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """:func:`_file_tensors` with each decoder row's norm moved into what its latent reads: the same reconstruction from unit rows."""
    tensors = _file_tensors(sae)
    norms = tensors["W_dec"].double().norm(dim=1)
    if ((norms - 1).abs() <= _UNIT).all():
        return tensors
    if sae.k is not None:
        raise ValueError(
            f"The decoder's rows have norms from {norms.min():.4g} to {norms.max():.4g}, and activation={sae.activation!r} keeps the largest "
            "latents: moving the norms into them would change which. Call sae.normalize_decoder() before saving."
        )
    # A row of zeros says nothing: its latent is silenced, and any direction will do.
    rows = tensors["W_dec"].double() / norms.where(norms > 0, 1.0)[:, None]
    rows[norms == 0, 0] = 1
    tensors["W_dec"] = rows
    if sae.activation == "gated":
        tensors["W_enc"] = tensors["W_enc"] * (norms > 0)
        tensors["b_gate"] = tensors["b_gate"] * (norms > 0)
        tensors["r_mag"] = tensors["r_mag"].double() + norms.where(norms > 0, 1.0).log()
        scaled = ["b_mag"]
    else:
        scaled = ["W_enc", "b_enc", *(["threshold"] if "threshold" in tensors else [])]
    return tensors | {name: tensors[name].double() * norms for name in scaled}


def _own_entries(sae: SparseAutoencoder) -> dict[str, Any]:
    """What the config's SAELens keys don't say, as plain values."""
    entries = {}
    if sae.activation in ("batchtopk", "matryoshka", "jumprelu"):
        options = {"activation": sae.activation, "k": sae.k, "groups": sae.groups and list(sae.groups), "bandwidth": sae.bandwidth}
        entries = {name: value for name, value in options.items() if value is not None}
    if sae.normalizes or bool(sae.input_norm):
        entries |= {name: getattr(sae, name).tolist() for name in _INPUT}
    return entries


def _from_config(config: Any, path: Path) -> SparseAutoencoder:
    """An SAE of the config's sizes; its weights are still to come."""
    keys = ("architecture", "d_in", "d_sae")
    if not isinstance(config, dict) or any(key not in config for key in keys):
        raise ValueError(f"{path / CONFIG} is no SAE config of SAELens v6: it needs the entries {', '.join(keys)}.")
    architecture = config["architecture"]
    if architecture not in _ACTIVATIONS:
        raise ValueError(f"{path} holds an SAE of architecture {architecture!r}. Valid: {', '.join(_ACTIVATIONS)}.")
    for key, only in {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}.items():
        if config.get(key, only) != only:
            raise ValueError(
                f"{path / CONFIG} says {key}={config[key]!r}; only {only!r} is read. Such an SAE would give wrong latents here."
            )
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        raise ValueError(
            f"{path / CONFIG} says rescale_acts_by_decoder_norm=true; fold the decoder's norms into the encoder before saving it."
        )
    sizes = (config["d_in"], config["d_sae"])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path / CONFIG} says d_in={sizes[0]!r}, d_sae={sizes[1]!r}; both must be positive integers.")
    metadata = dict(config.get("metadata") or {})
    own = metadata.pop("patchsae", {})
    options = {"activation": _ACTIVATIONS[architecture], "k": config.get("k") if architecture == "topk" else None}
    try:
        if not isinstance(own, dict):
            raise TypeError(f"the entry 'patchsae' of its metadata must be an object, got {own!r}")
        options |= {name: own[name] for name in ("activation", "k", "groups", "bandwidth") if name in own}
        if _ARCHITECTURES.get(options["activation"]) != architecture:
            raise ValueError(f"activation {options['activation']!r} is not saved as architecture {architecture!r}")
        sae = SparseAutoencoder(*sizes, **options, metadata=metadata)
        for name in _INPUT:
            if name in own:
                buffer = getattr(sae, name)
                buffer.copy_(torch.tensor(own[name], dtype=torch.float32).reshape(buffer.shape))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path / CONFIG} can't be read: {error}") from error
    return sae


def _check_tensors(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in _file_tensors(sae).items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        raise ValueError(f"{path / WEIGHTS} holds {found}; its {CONFIG} asks for {expected}. The two files don't belong together.")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path / WEIGHTS}: {name} holds NaN or infinite values. Train or copy it again.")
    if sae.activation in ("batchtopk", "matryoshka") and not (tensors["threshold"] == tensors["threshold"][0]).all():
        raise ValueError(
            f"{path / WEIGHTS} holds thresholds that differ between latents; {sae.activation!r}, which its {CONFIG} names, has one for all. "
            "The two files don't belong together."
        )
