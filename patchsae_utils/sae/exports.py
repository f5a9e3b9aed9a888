"""SAEs written as other programs read them; the reverse of :mod:`.formats`, and described with it in ``docs/formats.md``.

Each writer gets the weights in our terms and puts whole files into a folder, or one file under a path. Where a form has room for it, our
metadata goes along under the key ``patchsae``, and comes back when :func:`~patchsae_utils.load_sae` opens the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..run.artifacts import atomic_file, write_json
from .formats import FORMATS, uncentred, unit_rows
from .model import SparseAutoencoder

# What each form can say.
_HOLDS = {
    "patchsae": ("relu",),
    "prisma": ("relu", "topk", "gated"),
    "saev": ("relu", "topk", "batchtopk", "matryoshka"),
    "sparsify": ("topk",),
    "dictionary_learning": ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"),
}


def export_sae(sae: SparseAutoencoder, path: str | Path, form: str) -> Path:
    """Write an SAE in another program's form; :func:`patchsae_utils.load_sae` reads all of them.

    Parameters
    ----------
    sae : SparseAutoencoder
    path : str or Path
        A folder, made when missing. ``patchsae`` and ``saev`` are single files: a path that ends in ``.pt`` is that file, in a folder it is
        ``sae.pt``.
    form : {"patchsae", "prisma", "saev", "sparsify", "dictionary_learning"}

    Returns
    -------
    Path
        What :func:`~patchsae_utils.load_sae` opens: the folder, or the file.

    Raises
    ------
    ValueError
        If the form is unknown, or has no word for the SAE's activation.
    """
    if form not in _HOLDS:
        raise ValueError(f"Unknown format {form!r}. Valid: {', '.join(FORMATS)}.")
    if sae.activation not in _HOLDS[form]:
        fitting = [name for name in _HOLDS if sae.activation in _HOLDS[name]]
        raise ValueError(
            f"The format {form!r} can't say activation={sae.activation!r}; it knows {', '.join(_HOLDS[form])}. "
            f"For this SAE: saelens{''.join(f', {name}' for name in fitting)}."
        )
    path = Path(path)
    if form in ("patchsae", "saev") and path.suffix != ".pt":
        path = path / "sae.pt"
    folder = path.parent if path.suffix == ".pt" else path
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu() for name, value in sae.state_dict().items() if not name.startswith("input_")}
    _WRITERS[form](sae, tensors, path)
    return path


def _write_patchsae(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    metadata = sae.metadata
    settings = {
        "d_in": sae.d_in, "d_sae": sae.d_sae, "expansion_factor": sae.d_sae // sae.d_in, "model_name": metadata.get("model_name"),
        "module_name": "resid", "block_layer": metadata.get("layer"), "dtype": torch.float32, "device": "cpu", "patchsae": _json(metadata),
    }  # fmt: skip
    _save(path, {"cfg": settings, "state_dict": tensors})


def _write_prisma(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    gated = sae.activation == "gated"
    if gated:
        tensors["b_gate"] = tensors.pop("b_enc")
    settings = {
        "architecture": "gated" if gated else "standard", "d_in": sae.d_in, "expansion_factor": sae.d_sae // sae.d_in,
        "activation_fn_str": "topk" if sae.activation == "topk" else "relu",
        "activation_fn_kwargs": {"k": sae.k} if sae.k else {}, "normalize_activations": "none", "is_transcoder": False,
        "model_name": sae.metadata.get("model_name"), "hook_point_layer": sae.metadata.get("layer"), "layer_subtype": "hook_resid_post",
    }  # fmt: skip
    _save(path / "weights.pt", tensors)
    write_json(path / "config.json", settings)


def _write_saev(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    kinds = {"relu": "Relu", "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "BatchTopK"}
    tensors = uncentred(tensors)
    if "threshold" in tensors:
        tensors["activation.threshold"] = tensors.pop("threshold")
    config = {
        "d_model": sae.d_in, "d_sae": sae.d_sae,
        "activation": {"cls": kinds[sae.activation], "params": {"top_k": sae.k} if sae.k else {}},
    }  # fmt: skip
    header = {"schema": 5, "cfg": config, "commit": "unknown", "lib": "patchsae_utils", "patchsae": _json(sae.metadata)}
    _save(path, tensors, header=(json.dumps(header) + "\n").encode())


def _write_sparsify(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    config = {
        "activation": "topk", "expansion_factor": sae.d_sae // sae.d_in, "normalize_decoder": True, "num_latents": sae.d_sae, "k": sae.k,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": sae.d_in, "patchsae": _json(sae.metadata),
    }  # fmt: skip
    linear = _to_linear(tensors)
    linear["W_dec"] = linear.pop("decoder.weight").T.contiguous()
    with atomic_file(path / "sae.safetensors") as temporary:
        save_file(linear, temporary)
    write_json(path / "cfg.json", config)


def _write_dictionary_learning(sae: SparseAutoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    kind, write = _CLASSES[sae.activation]
    trainer = {
        "dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "layer": sae.metadata.get("layer"),
        "lm_name": sae.metadata.get("model_name"),
    } | ({"k": sae.k} if sae.k else {})  # fmt: skip
    state = write(sae, tensors)
    if sae.k:
        state["k"] = torch.tensor(sae.k, dtype=torch.int32)
    _save(path / "ae.pt", {name: value.contiguous() for name, value in state.items()})
    write_json(path / "config.json", {"trainer": trainer, "patchsae": _json(sae.metadata)})


def _auto_encoder(sae: SparseAutoencoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = _to_linear(tensors)
    state["bias"] = state.pop("b_dec")
    return state


def _gated(sae: SparseAutoencoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = _to_linear(unit_rows(tensors))
    names = {"encoder.bias": "gate_bias", "b_dec": "decoder_bias", "b_mag": "mag_bias"}
    return {names.get(name, name): value for name, value in state.items()}


def _jump_relu(sae: SparseAutoencoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return uncentred(unit_rows(tensors))


def _matryoshka(sae: SparseAutoencoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = torch.tensor(sae.groups)
    return tensors | {"group_sizes": ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))}


_CLASSES: dict[str, tuple[str, Callable[[SparseAutoencoder, dict[str, Tensor]], dict[str, Tensor]]]] = {
    "relu": ("AutoEncoder", _auto_encoder),
    "topk": ("AutoEncoderTopK", lambda sae, tensors: _to_linear(tensors) | {"threshold": torch.tensor(-1.0)}),
    "batchtopk": ("BatchTopKSAE", lambda sae, tensors: _to_linear(tensors)),
    "gated": ("GatedAutoEncoder", _gated),
    "jumprelu": ("JumpReluAutoEncoder", _jump_relu),
    "matryoshka": ("MatryoshkaBatchTopKSAE", _matryoshka),
}
_WRITERS: dict[str, Callable[[SparseAutoencoder, dict[str, Tensor], Path], None]] = {
    "patchsae": _write_patchsae,
    "prisma": _write_prisma,
    "saev": _write_saev,
    "sparsify": _write_sparsify,
    "dictionary_learning": _write_dictionary_learning,
}


def _to_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From ours to ``torch.nn.Linear``: weights [out, in]."""
    tensors = dict(tensors)
    W_enc, b_enc, W_dec = (tensors.pop(name) for name in ("W_enc", "b_enc", "W_dec"))
    return {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous(), **tensors}


def _json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as plain values that every reader takes."""
    return json.loads(json.dumps(dict(metadata)))


def _save(path: Path, content: Any, header: bytes = b"") -> None:
    """``torch.save`` behind a header."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        torch.save(content, file)
