"""SAEs on disk: a folder with ``cfg.json`` and ``sae_weights.safetensors``, the form of SAELens v6, which opens ours as it is.

:func:`load_sae` and :func:`save_sae` also take the forms of other programs (:mod:`.formats`, :mod:`.exports`); the folder is what training
writes, since it alone keeps everything.

What an SAE reads (model, layer, tokens) lies in the config's ``metadata``, together with a checksum of the weights, and under ``patchsae``
what SAELens has no key for: which variant was trained, and the statistics of its input. SAELens ignores those, and needs none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..run.artifacts import atomic_file, file_sha256, read_json, write_json
from .formats import READERS, build, centred, find, unit_rows
from .model import SparseAutoencoder
from .sources import preprocessing_fingerprint

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAELENS_VERSION = "6.18.0"  # the form of the folder; older versions convert it and lose the metadata
_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
# BatchTopK and Matryoshka are, once trained, JumpReLU with one threshold for all latents.
_ARCHITECTURES = {v: k for k, v in _ACTIVATIONS.items()} | {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}
_INPUT = ("input_mean", "input_scale", "input_norm")
_UNIT = 1e-5  # how far from 1 a float32 row's norm may be


def save_sae(sae: SparseAutoencoder, directory: str | Path, format: str = "saelens", unit_norm: bool = True) -> Path:
    """Write an SAE as ``cfg.json`` and ``sae_weights.safetensors``, each under a temporary name first; or in another program's form.

    The decoder's rows are written at unit norm. Where they are (:func:`~patchsae_utils.training.train_sae` leaves them so), all weights are
    written as they are; else each norm goes into its latent's activation, which leaves the reconstruction what it was.

    Statistics of the input (:meth:`~patchsae_utils.sae.SparseAutoencoder.set_normalization`) need no folding: the weights belong to the
    residual stream's own units, so other programs give the same latents and reconstructions without knowing them.

    Parameters
    ----------
    sae : SparseAutoencoder
    directory : str or Path
        Made when missing. PatchSAE's and saev's forms are single files: a path that ends in ``.pt``, or ``sae.pt`` in this folder.
    format : {"saelens", "patchsae", "prisma", "saev", "sparsify", "dictionary_learning"}
        The others leave the rows as they are, and can't say every variant; see :func:`patchsae_utils.sae.exports.export_sae`.
    unit_norm : bool
        False writes the rows as they are in SAELens's form too, so that the latents keep their sizes.

    Returns
    -------
    Path
        The folder, or the file: what :func:`load_sae` opens.

    Raises
    ------
    ValueError
        If the rows are not at unit norm and a latent's size decides which are kept (``topk``, ``batchtopk``, ``matryoshka``); or the format
        is unknown, or can't say this SAE's activation.
    """
    if format != "saelens":
        from .exports import export_sae

        return export_sae(sae, directory, format)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in (_unit_rows if unit_norm else _file_tensors)(sae).items()}
    directory = Path(directory)
    with atomic_file(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary)
        checksum = file_sha256(temporary)
    own = {"sae_lens_version": _SAELENS_VERSION, "patchsae_version": __version__, "weights_sha256": checksum}
    metadata = {"model_name": None, **sae.metadata, **own}
    metadata.pop("sae_lens_training_version", None)
    if isinstance(metadata.get("preprocessing"), str):
        metadata["preprocessing_fingerprint"] = preprocessing_fingerprint(metadata["preprocessing"])
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
    """Open an SAE: ours, or one of SAELens, PatchSAE, ViT-Prisma, saev, sparsify or dictionary_learning; which, it finds out itself.

    Other programs' SAEs come out in our equations, with the same latents. Nothing is ever unpickled: files of ``torch.save`` are read by
    :mod:`patchsae_utils.run.pickles`, which knows tensors and plain values alone.

    Parameters
    ----------
    path : str or Path
        A folder, a file, or ``hf:<owner>/<repository>[/<folder>][@<revision>]`` for one on the Hugging Face hub.
    device : str or torch.device

    Returns
    -------
    SparseAutoencoder
        In ``eval()`` mode: ``batchtopk`` and ``matryoshka`` apply their threshold.

    Raises
    ------
    FileNotFoundError
        If nothing is there, or files are missing in the folder.
    ValueError
        If it is of another format or architecture, damaged, or holds code.
    """
    if str(path).startswith("hf:"):
        from .publishing import fetch

        path = fetch(str(path))
    form, path = find(Path(path))
    if form == "saelens":
        return _load_folder(path).to(device)
    weights = READERS[form](path)
    return build(weights._replace(metadata={**weights.metadata, "converted_from": form}), path).to(device)


def _load_folder(path: Path) -> SparseAutoencoder:
    """Our folder, or SAELens's."""
    config = read_json(path / CONFIG)
    sae = _from_config(config, path)
    checksum = sae.metadata.pop("weights_sha256", None)
    rewritten = "sae_lens_training_version" in sae.metadata  # by SAELens, which hands our checksum on whatever it changed
    if checksum is not None and not rewritten and checksum != file_sha256(path / WEIGHTS):
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
    if not config.get("apply_b_dec_to_input", True):
        tensors = centred(tensors)
    if config.get("rescale_acts_by_decoder_norm", False):  # latents are what they are times their rows' norms
        tensors = unit_rows(tensors)
    sae.load_state_dict(tensors, strict=False)  # the input's statistics are set already, the rest was checked
    return sae.eval()


_IN_MEMORY, _ON_DISK = {"b_gate": "b_enc"}, {"b_enc": "b_gate"}


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
    unit = unit_rows({_IN_MEMORY.get(name, name): value for name, value in tensors.items()})
    return {_ON_DISK.get(name, name) if sae.activation == "gated" else name: value for name, value in unit.items()}


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
    architecture = str(config["architecture"])
    legacy = config.get("activation_fn_str", config.get("activation_fn", "relu"))  # SAELens before v6
    if architecture == "standard" and legacy == "topk":
        kwargs = config.get("activation_fn_kwargs")
        architecture, config = "topk", {**(kwargs if isinstance(kwargs, dict) else {}), **config}
    elif legacy not in ("relu", "topk") or config.get("finetuning_scaling_factor", False):
        raise ValueError(f"{path / CONFIG} says activation_fn_str={legacy!r} or finetuning_scaling_factor; such an SAE is not read.")
    if architecture not in _ACTIVATIONS:
        raise ValueError(f"{path} holds an SAE of architecture {architecture!r}. Valid: {', '.join(_ACTIVATIONS)}.")
    for key, only in {"normalize_activations": "none", "reshape_activations": "none"}.items():
        if config.get(key, only) != only:
            raise ValueError(
                f"{path / CONFIG} says {key}={config[key]!r}; only {only!r} is read. Such an SAE would give wrong latents here."
            )
    sizes = (config["d_in"], config["d_sae"])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path / CONFIG} says d_in={sizes[0]!r}, d_sae={sizes[1]!r}; both must be positive integers.")
    n_bytes = (path / WEIGHTS).stat().st_size
    if sizes[0] * sizes[1] > n_bytes:  # before memory of that size is asked for
        raise ValueError(
            f"{path / CONFIG} says d_in={sizes[0]}, d_sae={sizes[1]}; {WEIGHTS} has {n_bytes:,} bytes, too few. The two files don't belong together."
        )
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{path / CONFIG}: metadata must be an object, got a {type(metadata).__name__}.")
    metadata = dict(metadata)
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
