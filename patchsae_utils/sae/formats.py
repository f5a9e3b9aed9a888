"""SAEs on disk, in the forms of six programs: one table, read both ways, on plain tensors.

A reader turns a program's settings and tensors into our equations, pre = (x - b_dec) W_enc + b_enc with latents as in :mod:`.variants`; the
writer beside it turns them back. The latents stay what they were, to rounding. What our equations, or the other program's, can't say is
refused by name. ``docs/formats.md`` describes every form. ``saelens`` is also ours: its folder alone keeps everything, SAELens v6 opens it as
it is, and what SAELens has no key for lies under ``metadata.patchsae``. Nothing is ever unpickled: see :mod:`patchsae_utils.run.pickles`.

Sources: the programs' own loaders: github.com/dynamical-inference/patchsae, Prisma-Multimodal/ViT-Prisma, OSU-NLP-Group/saev,
EleutherAI/sparsify, saprmarks/dictionary_learning, decoderesearch/SAELens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..run.artifacts import atomic_file, file_sha256, write_json
from .variants import VARIANTS

_SAELENS_VERSION = "6.18.0"  # the form of the folder; older versions convert it and lose the metadata
STATISTICS = ("input_mean", "input_scale", "input_norm")


class Weights(NamedTuple):
    """An SAE as plain tensors, in our equations and by our names."""

    tensors: dict[str, Tensor]
    """``W_enc`` [D, S], ``b_enc`` [S], ``W_dec`` [S, D], ``b_dec`` [D], and the variant's own."""
    activation: str = "relu"
    options: Mapping[str, Any] = {}
    """``k``, ``groups``, ``bandwidth``, as far as the variant has them."""
    metadata: Mapping[str, Any] = {}
    statistics: Mapping[str, Any] = {}
    """Of the input, as far as they are known: ``STATISTICS``."""


class Format(NamedTuple):
    """One program's files."""

    config: str | None
    """File with the settings; None where they lie with the weights in one file."""
    weights: str
    activations: tuple[str, ...]
    """What it has a word for."""
    only: Mapping[str, tuple[Any, ...]]
    """Settings that change the equation: values that are read; any other is refused by name."""
    read: Callable[[dict[str, Any], Mapping[str, Any], Path], Weights]
    """(settings, tensors by the program's names, file to name in errors)."""
    write: Callable[[Weights], tuple[dict[str, Any], dict[str, Tensor]]]
    defaults: Mapping[str, Any] = {}
    """What a missing setting means to the program, where that is not the first of ``only``."""


# -- names and equations that differ ------------------------------------------------------------------------------------------

_FOUR = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_THRESHOLD = _FOUR | {"threshold": "threshold"}
_GATED = {name: name for name in ("W_enc", "W_dec", "b_dec", "b_mag", "r_mag")} | {"b_gate": "b_enc"}
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}  # torch.nn.Linear's: [out, in]
_TRANSPOSED = ("encoder.weight", "decoder.weight")


def _ours(state: Any, names: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """A state dict's tensors by our names; others that a trainer leaves there are passed over."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{path} lacks the weights {', '.join(missing)}; it holds {shapes(tensors)}.")
    return {ours: tensors[name].T if name in _TRANSPOSED else tensors[name] for name, ours in names.items()}


def _theirs(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {name: (tensors[ours].T if name in _TRANSPOSED else tensors[ours]).contiguous() for name, ours in names.items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, for messages and comparisons."""
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def _centred(tensors: dict[str, Tensor], sign: int = 1) -> dict[str, Tensor]:
    """From encoders that don't subtract b_dec to ours: x W + b = (x - b_dec) W + (b + b_dec W), rounded once; -1: back. Gated: both biases."""
    shift = sign * tensors["b_dec"].double() @ tensors["W_enc"].double()
    moved = {"b_enc": (tensors["b_enc"].double() + shift).float()}
    if "b_mag" in tensors:
        moved["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift).float()
    return tensors | moved


def unit_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows at unit norm, each norm moved into its latent: the same reconstruction, latents times the norms.

    Rows of zeros say nothing: their latents are silenced, and any direction will do.
    """
    norms = tensors["W_dec"].double().norm(dim=1)
    rows = tensors["W_dec"].double() / norms.where(norms > 0, 1.0)[:, None]
    rows[norms == 0, 0] = 1
    changed = {"W_dec": rows}
    if "r_mag" in tensors:
        changed |= {name: tensors[name].double() * (norms > 0) for name in ("W_enc", "b_enc")}
        changed |= {"r_mag": tensors["r_mag"].double() + norms.where(norms > 0, 1.0).log(), "b_mag": tensors["b_mag"].double() * norms}
    else:
        changed |= {name: tensors[name].double() * norms for name in ("W_enc", "b_enc", "threshold") if name in tensors}
    return tensors | {name: value.float() for name, value in changed.items()}


def preprocessing_fingerprint(preprocessing: str) -> str:
    """First 8 hex digits of the SHA-256 of a preprocessing's description, without what differs between two processes."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", preprocessing).encode()).hexdigest()[:8]


# -- SAELens v6, and our own ----------------------------------------------------------------------------------------------------


def _saelens_names(architecture: str) -> dict[str, str]:
    return {"gated": _GATED, "jumprelu": _THRESHOLD}.get(architecture, _FOUR)


def _read_saelens(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    config = file.parent / "cfg.json"
    if missing := [name for name in ("architecture", "d_in", "d_sae") if name not in settings]:
        raise ValueError(f"{config} is no SAE config of SAELens v6: it lacks the entries {', '.join(missing)}.")
    architecture, k = str(settings["architecture"]), settings.get("k")
    legacy = settings.get("activation_fn_str", settings.get("activation_fn", "relu"))  # before v6
    if architecture == "standard" and legacy == "topk":
        kwargs = settings.get("activation_fn_kwargs")
        architecture, k = "topk", k or (kwargs.get("k") if isinstance(kwargs, dict) else None)
    elif legacy not in ("relu", "topk"):
        raise ValueError(f"{config} says activation_fn_str={legacy!r}; such an SAE is not read.")
    known = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
    if architecture not in known:
        raise ValueError(f"{config} names the architecture {architecture!r}. Valid: {', '.join(known)}.")
    metadata = settings.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{config}: metadata must be an object, got a {type(metadata).__name__}.")
    metadata = dict(metadata)
    checksum = metadata.pop("weights_sha256", None)
    rewritten = "sae_lens_training_version" in metadata  # by SAELens, which hands our checksum on whatever it changed
    if checksum is not None and not rewritten and checksum != file_sha256(file):
        raise ValueError(
            f"{file} is damaged, or belongs to another {config.name}: its SHA-256 is not the one written there. Train or copy it again."
        )
    names = _saelens_names(architecture)
    if set(state) != set(names) or tuple(state["W_enc"].shape) != (settings["d_in"], settings["d_sae"]):
        raise ValueError(
            f"{file} holds {shapes(state)}; its {config.name} asks for {', '.join(names)} of an SAE {settings['d_in']!r} -> {settings['d_sae']!r}. "
            "The two files don't belong together."
        )
    own = metadata.pop("patchsae", {})
    if not isinstance(own, dict):
        raise ValueError(f"{config} can't be read: the entry 'patchsae' of its metadata must be an object, got {own!r}.")
    activation = own.get("activation", known[architecture])
    if activation not in VARIANTS or VARIANTS[activation].architecture != architecture:
        raise ValueError(f"{config} can't be read: activation {activation!r} is not saved as architecture {architecture!r}.")
    tensors = _ours(state, names, file)
    if VARIANTS[activation].threshold == "one":
        if not (tensors["threshold"] == tensors["threshold"].flatten()[0]).all():
            raise ValueError(
                f"{file} holds thresholds that differ between latents; {activation!r}, which its {config.name} names, has one for all. "
                "The two files don't belong together."
            )
        tensors["threshold"] = tensors["threshold"].flatten()[0]
    if not settings.get("apply_b_dec_to_input", True):
        tensors = _centred(tensors)
    if settings.get("rescale_acts_by_decoder_norm", False):  # latents are what they are times their rows' norms
        tensors = unit_rows(tensors)
    options = {name: own[name] for name in ("k", "groups", "bandwidth") if name in own} | ({"k": k} if architecture == "topk" else {})
    return Weights(tensors, activation, options, metadata, {name: own[name] for name in STATISTICS if name in own})


def _write_saelens(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    variant, tensors = VARIANTS[weights.activation], dict(weights.tensors)
    d_in, d_sae = tensors["W_enc"].shape
    if variant.threshold == "one":
        tensors["threshold"] = tensors["threshold"].expand(d_sae)
    metadata = {"model_name": None, **weights.metadata, "sae_lens_version": _SAELENS_VERSION, "patchsae_version": __version__}
    metadata.pop("sae_lens_training_version", None)
    if isinstance(metadata.get("preprocessing"), str):
        metadata["preprocessing_fingerprint"] = preprocessing_fingerprint(metadata["preprocessing"])
    if metadata.get("layer") is not None:
        metadata.setdefault("hook_name", f"visual.transformer.resblocks.{metadata['layer']}")
    own = {"activation": weights.activation, **weights.options} if variant.architecture == "jumprelu" else {}
    if own := {**own, **weights.statistics}:
        metadata["patchsae"] = own
    config = {
        "architecture": variant.architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": metadata,
    }  # fmt: skip
    if variant.architecture == "topk":
        config |= {"k": weights.options["k"], "rescale_acts_by_decoder_norm": False}
    return config, _theirs(tensors, _saelens_names(variant.architecture))


# -- PatchSAE -------------------------------------------------------------------------------------------------------------------


def _read_patchsae(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    metadata = settings.get("patchsae")
    if not isinstance(metadata, dict):
        metadata = _model(settings.get("model_name"), settings.get("block_layer"))
        metadata |= _plain(settings, "dataset_path", "l1_coefficient", "lr", "seed", "image_width")
    return Weights(_ours(state, _FOUR, file), metadata=metadata)


def _write_patchsae(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    settings = {
        "d_in": d_in, "d_sae": d_sae, "expansion_factor": d_sae // d_in, "model_name": weights.metadata.get("model_name"), "module_name": "resid",
        "block_layer": weights.metadata.get("layer"), "dtype": torch.float32, "device": "cpu", "patchsae": _json(weights.metadata),
    }  # fmt: skip
    return settings, _theirs(weights.tensors, _FOUR)


# -- ViT-Prisma ---------------------------------------------------------------------------------------------------------------------


def _read_prisma(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    architecture, activation = settings.get("architecture", "standard"), settings.get("activation_fn_str")
    if architecture not in ("standard", "gated") or activation not in ("relu", "topk"):
        raise ValueError(f"{file} holds architecture {architecture!r} with {activation!r}. Valid: standard or gated, relu or topk.")
    layer, kind = settings.get("hook_point_layer"), settings.get("layer_subtype", "hook_resid_post")
    metadata = _model(settings.get("model_name"), layer if kind == "hook_resid_post" else None) | _plain(settings, "l1_coefficient", "seed")
    if kind != "hook_resid_post":
        metadata["hook_name"] = f"blocks.{layer}.{kind}"
    if architecture == "gated":
        return Weights(_ours(state, _GATED, file), "gated", metadata=metadata)
    kwargs = settings.get("activation_fn_kwargs")
    options = {"k": kwargs.get("k") if isinstance(kwargs, dict) else None} if activation == "topk" else {}
    return Weights(_ours(state, _FOUR, file), activation, options, metadata)


def _write_prisma(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gated, (d_in, d_sae) = weights.activation == "gated", weights.tensors["W_enc"].shape
    settings = {
        "architecture": "gated" if gated else "standard", "d_in": d_in, "expansion_factor": d_sae // d_in,
        "activation_fn_str": "topk" if weights.activation == "topk" else "relu", "activation_fn_kwargs": dict(weights.options),
        "normalize_activations": "none", "is_transcoder": False, "model_name": weights.metadata.get("model_name"),
        "hook_point_layer": weights.metadata.get("layer"), "layer_subtype": "hook_resid_post",
    }  # fmt: skip
    return settings, _theirs(weights.tensors, _GATED if gated else _FOUR)


# -- saev: its encoder doesn't subtract b_dec ---------------------------------------------------------------------------------------------


def _read_saev(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    try:
        activation = settings["cfg"].get("activation", {"cls": "Relu"})
        kind, params = str(activation["cls"]), dict(activation.get("params") or {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} begins with no header of saev ({type(error).__name__}): a line of JSON with 'schema' and 'cfg'."
        ) from error
    known = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batchtopk"}
    if kind not in known:
        raise ValueError(f"{file} holds an SAE of activation {kind!r}. Valid: {', '.join(known)}.")
    if kind == "BatchTopK" and not (isinstance(state, dict) and "activation.threshold" in state):
        kind = "TopK"  # before it had a threshold, saev took each token's largest
    tensors = _ours(state, _FOUR | ({"activation.threshold": "threshold"} if kind == "BatchTopK" else {}), file)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].reshape(()).clamp_min(0)
    own = settings.get("patchsae")
    options = {} if kind == "Relu" else {"k": params.get("top_k")}
    return Weights(_centred(tensors), known[kind], options, own if isinstance(own, dict) else {})


def _write_saev(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    kind = {"relu": "Relu", "topk": "TopK"}.get(weights.activation, "BatchTopK")
    params = {"top_k": weights.options["k"]} if "k" in weights.options else {}
    cfg = {"d_model": d_in, "d_sae": d_sae, "activation": {"cls": kind, "params": params}}
    names = _FOUR | ({"activation.threshold": "threshold"} if kind == "BatchTopK" else {})
    header = {"schema": 5, "cfg": cfg, "commit": "unknown", "lib": "patchsae_utils", "patchsae": _json(weights.metadata)}
    return header, _theirs(_centred(weights.tensors, -1), names)


# -- sparsify -----------------------------------------------------------------------------------------------------------------------

_SPARSIFY = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def _read_sparsify(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    own = settings.get("patchsae")
    return Weights(_ours(state, _SPARSIFY, file), "topk", {"k": settings.get("k")}, own if isinstance(own, dict) else {})


def _write_sparsify(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    config = {
        "activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": d_sae, "k": weights.options["k"],
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in, "patchsae": _json(weights.metadata),
    }  # fmt: skip
    return config, _theirs(weights.tensors, _SPARSIFY)


# -- dictionary_learning: a class for each variant ----------------------------------------------------------------------------------------


class _Class(NamedTuple):
    """One of its classes: our activation, its names of the weights, whether it subtracts b_dec, whether latents count times their rows' norms."""

    activation: str
    names: Mapping[str, str]
    centred: bool = True
    norms: bool = False


_MAGNITUDES = {"gate_bias": "b_enc", "decoder_bias": "b_dec", "mag_bias": "b_mag", "r_mag": "r_mag"}
_CLASSES = {  # to write, the first of an activation
    "AutoEncoder": _Class("relu", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": _Class("relu", _LINEAR | {"decoder.bias": "b_dec"}, centred=False),
    "GatedAutoEncoder": _Class("gated", {"encoder.weight": "W_enc", "decoder.weight": "W_dec"} | _MAGNITUDES, norms=True),
    "JumpReluAutoEncoder": _Class("jumprelu", _THRESHOLD, centred=False, norms=True),
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": _Class("batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", _THRESHOLD),
}


def _read_dictionary_learning(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    trainer = settings.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = str(trainer.get("dict_class"))
    if kind not in _CLASSES:
        raise ValueError(f"{file.parent / 'config.json'} says trainer.dict_class={kind!r}. Valid: {', '.join(_CLASSES)}.")
    activation, names, subtracts, norms = _CLASSES[kind]
    apart = [name for name, option in (("k", "k"), ("group_sizes", "groups")) if option in VARIANTS[activation].options]
    tensors = _ours(state, names, file)
    numbers = _ours(state, {name: name for name in apart}, file)
    options: dict[str, Any] = {"k": int(numbers["k"])} if "k" in numbers else {}
    if "group_sizes" in numbers:
        options["groups"] = tuple(numbers["group_sizes"].long().cumsum(0).tolist())
    if not subtracts:
        tensors = _centred(tensors)
    if norms:
        tensors = unit_rows(tensors)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].float().clamp_min(0)  # -1: not learned yet
    own = settings.get("patchsae")
    model = _model(trainer.get("lm_name"), trainer.get("layer")) | _plain(trainer, "lr", "seed", "steps")
    return Weights(tensors, activation, options, own if isinstance(own, dict) else model)


def _write_dictionary_learning(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind, (_, names, subtracts, norms) = next(item for item in _CLASSES.items() if item[1].activation == weights.activation)
    tensors = unit_rows(weights.tensors) if norms else weights.tensors
    state = _theirs(tensors if subtracts else _centred(tensors, -1), names)
    k, (d_in, d_sae) = weights.options.get("k"), weights.tensors["W_enc"].shape
    trainer = {
        "dict_class": kind, "activation_dim": d_in, "dict_size": d_sae, "layer": weights.metadata.get("layer"),
        "lm_name": weights.metadata.get("model_name"),
    } | ({"k": k} if k else {})  # fmt: skip
    if k:
        state = {"threshold": torch.tensor(-1.0)} | state | {"k": torch.tensor(k, dtype=torch.int32)}
    if groups := weights.options.get("groups"):
        state["group_sizes"] = torch.tensor([end - start for start, end in zip((0, *groups), groups, strict=False)])
    return {"trainer": trainer, "patchsae": _json(weights.metadata)}, state


# open_clip's names of models as Hugging Face calls them, their weights, and their number of blocks.
_MODELS = {
    "openai/clip-vit-base-patch16": ("ViT-B-16-quickgelu", "openai", 12),
    "openai/clip-vit-base-patch32": ("ViT-B-32-quickgelu", "openai", 12),
    "openai/clip-vit-large-patch14": ("ViT-L-14-quickgelu", "openai", 24),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336-quickgelu", "openai", 24),
}


def _model(name: Any, layer: Any) -> dict[str, Any]:
    """Model and layer as our metadata says them; Hugging Face's names of OpenAI's CLIPs as open_clip's."""
    name = name if isinstance(name, str) else None
    layer = layer if isinstance(layer, int) and not isinstance(layer, bool) else None
    open_clip_name, pretrained, depth = _MODELS.get((name or "").removeprefix("open-clip:"), (name, None, None))
    if depth is not None and layer is not None:
        layer %= depth
    known = {"model_name": open_clip_name, "pretrained": pretrained, "layer": layer if layer is None or layer >= 0 else None}
    return {key: value for key, value in known.items() if value is not None}


def _plain(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if isinstance(settings.get(name), str | int | float)}


def _json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as plain values that every reader takes."""
    return json.loads(json.dumps(dict(metadata)))


# -- the table ------------------------------------------------------------------------------------------------------------------

FORMATS = {
    "saelens": Format(
        "cfg.json", "sae_weights.safetensors", tuple(VARIANTS),
        {"normalize_activations": ("none",), "reshape_activations": ("none",), "finetuning_scaling_factor": (False,)},
        _read_saelens, _write_saelens,
    ),
    "patchsae": Format(None, "sae.pt", ("relu",), {}, _read_patchsae, _write_patchsae),
    "prisma": Format(
        "config.json", "weights.pt", ("relu", "topk", "gated"),
        {"normalize_activations": ("none", None), "is_transcoder": (False, None)}, _read_prisma, _write_prisma,
        {"normalize_activations": "layer_norm"},
    ),
    "saev": Format(None, "sae.pt", ("relu", "topk", "batchtopk", "matryoshka"), {}, _read_saev, _write_saev),
    "sparsify": Format(
        "cfg.json", "sae.safetensors", ("topk",), {"activation": ("topk",), "transcode": (False,), "skip_connection": (False,)},
        _read_sparsify, _write_sparsify,
    ),
    "dictionary_learning": Format("config.json", "ae.pt", tuple(VARIANTS), {}, _read_dictionary_learning, _write_dictionary_learning),
}  # fmt: skip


def write(weights: Weights, path: Path, form: str) -> Path:
    """Write an SAE's files under temporary names first; returns what :func:`read` opens, the folder or the file."""
    if form not in FORMATS:
        raise ValueError(f"Unknown format {form!r}. Valid: {', '.join(FORMATS)}.")
    this = FORMATS[form]
    if weights.activation not in this.activations:
        fitting = [name for name, each in FORMATS.items() if weights.activation in each.activations]
        raise ValueError(
            f"The format {form!r} can't say activation={weights.activation!r}; it knows {', '.join(this.activations)}. "
            f"For this SAE: {', '.join(fitting)}."
        )
    settings, tensors = this.write(weights)
    file = path if this.config is None and path.suffix == ".pt" else path / this.weights
    with atomic_file(file) as temporary:
        if file.suffix == ".safetensors":
            save_file(tensors, temporary)
        else:
            with temporary.open("wb") as opened:
                opened.write((json.dumps(settings) + "\n").encode() if form == "saev" else b"")
                torch.save({"cfg": settings, "state_dict": tensors} if form == "patchsae" else tensors, opened)
        if form == "saelens":
            settings["metadata"]["weights_sha256"] = file_sha256(temporary)
    if this.config is None:
        return file
    write_json(path / this.config, settings)
    return path
