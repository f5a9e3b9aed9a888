"""Seven programs' settings, as ``*_defaults`` completes them, and tensors turned into our equations, and back.

Sources, all versions: github.com/dynamical-inference/patchsae, Prisma-Multimodal/ViT-Prisma, OSU-NLP-Group/saev, EleutherAI/sparsify,
saprmarks/dictionary_learning, decoderesearch/SAELens, vraj130/visaebench, KempnerInstitute/overcomplete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import __version__
from ...clip.model import preprocessing_fingerprint
from ...run.artifacts import as_json, file_sha256
from ..variants import VARIANTS
from .sources import layer_and_kind, place
from .weights import STATISTICS, Weights, centred, named, plain, renamed, shapes, unit_rows

_SAELENS_VERSION = "6.18.0"  # the form of the folder; older versions convert it and lose the metadata

_FOUR = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_THRESHOLD = _FOUR | {"threshold": "threshold"}
_GATED = {name: name for name in ("W_enc", "W_dec", "b_dec", "b_mag", "r_mag")} | {"b_gate": "b_enc"}
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}


def has_unit_rows(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder's rows have norm 1, as far as float32 can say it."""
    return bool(((tensors["W_dec"].double().norm(dim=1) - 1).abs() <= 1e-5).all())


def just_below(threshold: Tensor, sign: int = 1) -> Tensor:
    """From programs that keep what is at least the threshold to ours, which keeps what exceeds it; -1: back."""
    return torch.nextafter(threshold, threshold.new_tensor(-sign * torch.inf))


def _own(settings: Mapping[str, Any], else_: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our metadata where we wrote the file, else what the program says."""
    return settings["patchsae"] if isinstance(settings.get("patchsae"), dict) else else_


def _k(settings: Any, name: str = "k") -> dict[str, Any]:
    k = settings.get(name) if isinstance(settings, Mapping) else None
    return {"k": int(k) if isinstance(k, float) and k.is_integer() else k}


_SAELENS_ARCHITECTURES = {variant.architecture: name for name, variant in reversed(VARIANTS.items()) if name != "batchtopk"}
_SAELENS_ARCHITECTURES["jumprelu"] = "jumprelu"
_SAELENS_NAMES = {"gated": _GATED, "jumprelu": _THRESHOLD}
_TOKEN_NORM = "_token_norm"  # makes an architecture one that SAELens refuses: it can't say that step


def saelens_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """As SAELens completes the settings of its versions before 6, which wrote no ``metadata.sae_lens_version``."""
    metadata = settings.get("metadata") or {}
    version = str(settings.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None) or "0")
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 6:
        return settings
    old = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
    settings = {old.get(name, name): value for name, value in settings.items()}
    normalize, kwargs = settings.get("normalize_activations"), settings.get("activation_fn_kwargs")
    if normalize is None or isinstance(normalize, bool):
        settings["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if "hook_z" in str(settings.get("hook_name")):
        settings.setdefault("reshape_activations", "hook_z")
    function = settings.pop("activation_fn", None)
    function = settings["activation_fn_str"] = settings.get("activation_fn_str") or function or "relu"
    settings["architecture"] = settings.get("architecture") or "standard"
    if "topk" in (function, settings["architecture"]) and settings["architecture"] in ("standard", "topk"):
        settings |= {"architecture": "topk", "activation_fn_str": "relu", "k": settings.get("k") or _k(kwargs)["k"]}
    if not isinstance(settings.get("metadata"), dict | str | list):
        names = ("model_name", "hook_name", "hook_layer", "hook_head_index", "dataset_path", "context_size", "neuronpedia_id")
        settings["metadata"] = plain(settings, *names)
    return settings


def read_saelens(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    config = file.parent / "cfg.json"
    if missing := [name for name in ("d_in", "d_sae") if name not in settings]:
        raise ValueError(f"{config} is no SAE config of SAELens: it lacks the entries {', '.join(['architecture', *missing])}.")
    named_so = str(settings.get("architecture"))
    architecture = named_so.removesuffix(_TOKEN_NORM)
    if architecture not in _SAELENS_ARCHITECTURES:
        what = f"{config} names the architecture {architecture!r}. Valid: standard, topk, jumprelu, gated."
        raise ValueError(f"{what} Others have another equation, or are states of training, which SAELens saves with save_inference_model.")
    if not isinstance(metadata := settings.get("metadata") or {}, dict):
        raise ValueError(f"{config}: metadata must be an object, got a {type(metadata).__name__}.")
    metadata = dict(metadata)
    checksum = metadata.pop("weights_sha256", None)
    rewritten = "sae_lens_training_version" in metadata  # by SAELens, which hands our checksum on whatever it changed
    if checksum is not None and not rewritten and checksum != file_sha256(file):
        raise ValueError(f"{file} is damaged, or another {config.name}'s: its SHA-256 is not the one there. Train or copy it again.")
    names, state = _SAELENS_NAMES.get(architecture, _FOUR), dict(state)
    factor = state.pop("scaling_factor", None)  # written for a while, whatever its use
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise ValueError(f"{file} holds a scaling_factor other than 1, which scales latents before they are decoded: it is not read.")
    if set(state) != set(names):
        raise ValueError(f"{file} holds {shapes(state)}, its {config.name} wants {', '.join(names)}. The two files don't belong together.")
    if not isinstance(own := metadata.pop("patchsae", {}), dict):
        raise ValueError(f"{config} can't be read: the entry 'patchsae' of its metadata must be an object, got {own!r}.")
    activation = own.get("activation", _SAELENS_ARCHITECTURES[architecture])
    if activation not in VARIANTS or VARIANTS[activation].architecture != architecture:
        raise ValueError(f"{config} can't be read: activation {activation!r} is not saved as architecture {architecture!r}.")
    tensors = renamed(state, names, file)
    if VARIANTS[activation].threshold == "one":
        if not (tensors["threshold"] == tensors["threshold"].flatten()[0]).all():
            raise ValueError(f"{file} holds thresholds that differ between latents; {activation!r}, of its {config.name}, has one.")
        tensors["threshold"] = tensors["threshold"].flatten()[0]
    if not settings.get("apply_b_dec_to_input", True):
        tensors = centred(tensors)
    if architecture == "topk" and settings.get("rescale_acts_by_decoder_norm"):  # latents are what they are times their rows' norms
        tensors = unit_rows(tensors)
    if metadata.get("hook_head_index") is None:
        metadata = place(None, *layer_and_kind(metadata.get("hook_name"))) | metadata
    options = {name: own[name] for name in ("k", "groups", "bandwidth") if name in own}
    options |= _k({"k": 100, **settings}) if architecture == "topk" else {}
    statistics = {name: own[name] for name in STATISTICS if name in own} | ({"token_norm": True} if architecture != named_so else {})
    return Weights(tensors, activation, options, metadata, statistics)


def write_saelens(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    statistics = dict(weights.statistics)
    suffix = _TOKEN_NORM if statistics.pop("token_norm", False) else ""
    if own := {**own, **statistics}:
        metadata["patchsae"] = own
    config = {
        "architecture": variant.architecture + suffix, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": metadata,
    }  # fmt: skip
    if variant.architecture == "topk":
        config |= {"k": weights.options["k"], "rescale_acts_by_decoder_norm": False}
    return config, named(tensors, _SAELENS_NAMES.get(variant.architecture, _FOUR))


def read_patchsae(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    model = place(settings.get("model_name"), settings.get("block_layer"))
    if "class_token" in settings:
        model["tokens"] = "cls" if settings["class_token"] else "all"
    model |= plain(settings, "dataset_path", "l1_coefficient", "lr", "seed", "image_width")
    return Weights(renamed(state, _FOUR, file), metadata=_own(settings, model))


def write_patchsae(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    settings = {
        "d_in": d_in, "d_sae": d_sae, "expansion_factor": d_sae // d_in, "model_name": weights.metadata.get("model_name"), "module_name": "resid",
        "block_layer": weights.metadata.get("layer"), "class_token": weights.metadata.get("tokens") == "cls", "gated_sae": False,
        "dtype": torch.float32, "device": "cpu", "patchsae": as_json(weights.metadata),
    }  # fmt: skip
    return settings, named(weights.tensors, _FOUR)


def read_prisma(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    architecture, activation = settings.get("architecture", "standard"), settings.get("activation_fn_str")
    if (architecture, activation) not in (("standard", "relu"), ("standard", "topk"), ("gated", "relu")):
        why = " TopK of a gated SAE keeps the largest magnitudes, which our equations can't say." if architecture == "gated" else ""
        raise ValueError(f"{file} holds architecture {architecture!r} with {activation!r}. Valid: standard or gated, relu or topk.{why}")
    kind = settings.get("layer_subtype", "")  # its default has changed between versions
    kind = kind if settings.get("hook_point_head_index") is None else f"{kind}.{settings['hook_point_head_index']}"
    metadata = place(settings.get("model_name"), settings.get("hook_point_layer"), str(kind)) | plain(settings, "l1_coefficient", "seed")
    said = [settings.get(name) for name in ("cls_token_only", "use_patches_only")]
    if any(isinstance(value, bool) for value in said):
        metadata["tokens"] = "cls" if said[0] else "patches" if said[1] else "all"
    if architecture == "gated":
        return Weights(renamed(state, _GATED, file, unused=["b_enc"]), "gated", metadata=metadata)
    options = _k(settings.get("activation_fn_kwargs")) if activation == "topk" else {}
    return Weights(renamed(state, _FOUR, file), activation, options, metadata)


def write_prisma(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gated, (d_in, d_sae), known = weights.activation == "gated", weights.tensors["W_enc"].shape, weights.metadata
    layer, kind = layer_and_kind(known.get("hook_name")) if known.get("layer") is None else (known["layer"], "")
    settings = {
        "architecture": "gated" if gated else "standard", "d_in": d_in, "expansion_factor": d_sae // d_in,
        "activation_fn_str": "topk" if weights.activation == "topk" else "relu", "activation_fn_kwargs": dict(weights.options),
        "normalize_activations": "none", "is_transcoder": False, "model_name": known.get("model_name"),
        "hook_point_layer": layer, "layer_subtype": kind or "hook_resid_post", "cls_token_only": known.get("tokens") == "cls",
        "use_patches_only": known.get("tokens") == "patches",
    }  # fmt: skip
    return settings, named(weights.tensors, _GATED if gated else _FOUR)


# Its encoder doesn't subtract b_dec.
_SAEV = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batchtopk"}


def saev_defaults(header: dict[str, Any]) -> dict[str, Any]:
    """A header of any schema in one form: what the cfg says, and ``activation`` and ``top_k`` from where its version wrote them."""
    schema, cfg = header.get("schema"), header.get("cfg")
    if "schema" not in header:
        return {**header, "activation": "Relu"}
    cfg = dict(cfg) if isinstance(cfg, dict) else {}
    kind = cfg.pop("activation", None)
    if schema == 1 and header.get("cls") in _SAEV:
        kind = {"cls": header["cls"], "params": {"top_k": cfg.pop("top_k", 32)}}
    kind = kind if isinstance(kind, dict) else {}
    params = kind["params"] if isinstance(kind.get("params"), dict) else {}
    cfg |= {name: value for name, value in params.items() if name not in ("sparsity", "aux", "kind")}
    cfg |= {"schema": schema, "activation": kind.get("cls", header.get("cls"))}
    return cfg | {"top_k": params.get("top_k", 32), "patchsae": header.get("patchsae")}


def read_saev(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    kind = settings["activation"]
    if kind not in _SAEV:
        raise ValueError(f"{file} holds an SAE of activation {kind!r}. Valid: {', '.join(_SAEV)}.")
    threshold = isinstance(state, dict) and "activation.threshold" in state
    if kind == "BatchTopK" and not threshold:
        kind = "TopK"  # before it had a threshold, saev took each token's largest
    tensors = renamed(state, _FOUR | ({"activation.threshold": "threshold"} if kind == "BatchTopK" else {}), file)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].reshape(()).clamp_min(0)
    return Weights(centred(tensors), _SAEV[kind], {} if kind == "Relu" else _k(settings, "top_k"), _own(settings, {}))


def write_saev(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    kind = {"relu": "Relu", "topk": "TopK"}.get(weights.activation, "BatchTopK")
    params = {"top_k": weights.options["k"]} if "k" in weights.options else {}
    cfg = {"d_model": d_in, "d_sae": d_sae, "activation": {"cls": kind, "params": params}}
    names = _FOUR | ({"activation.threshold": "threshold"} if kind == "BatchTopK" else {})
    header = {"schema": 5, "cfg": cfg, "commit": "unknown", "lib": "patchsae_utils", "patchsae": as_json(weights.metadata)}
    return header, named(centred(weights.tensors, -1), names)


_SPARSIFY = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def read_sparsify(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    model = place(None, *layer_and_kind(file.parent.name))  # it names a folder by its hookpoint
    return Weights(renamed(state, _SPARSIFY, file), "topk", _k(settings), _own(settings, model))


def write_sparsify(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.tensors["W_enc"].shape
    config = {
        "activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": d_sae, "k": weights.options["k"],
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in, "patchsae": as_json(weights.metadata),
    }  # fmt: skip
    return config, named(weights.tensors, _SPARSIFY)


class _Class(NamedTuple):
    """One of dictionary_learning's: our activation, names of weights, whether it subtracts b_dec, tensors that its equation doesn't use."""

    activation: str
    names: Mapping[str, str]
    centred: bool = True
    unused: tuple[str, ...] = ()


_MAGNITUDES = {"gate_bias": "b_enc", "decoder_bias": "b_dec", "mag_bias": "b_mag", "r_mag": "r_mag"}
_CLASSES = {  # to write, the first of an activation
    "AutoEncoder": _Class("relu", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": _Class("relu", _LINEAR | {"decoder.bias": "b_dec"}, centred=False),
    "GatedAutoEncoder": _Class("gated", {"encoder.weight": "W_enc", "decoder.weight": "W_dec"} | _MAGNITUDES),
    "JumpReluAutoEncoder": _Class("jumprelu", _THRESHOLD, centred=False),
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}, unused=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, unused=("k",)),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", _THRESHOLD, unused=("k", "group_sizes")),
    "MatroyshkaBatchTopKSAE": _Class("matryoshka", _THRESHOLD, unused=("k", "group_sizes")),  # so spelt before 17 January 2025
}


def _norms_count(kind: str, trainer: Mapping[str, Any]) -> bool:
    """Whether latents are times their decoder rows' norms: ``AutoEncoder`` as it is loaded since January 2025, others before."""
    # JumpReluTrainer says its bandwidth, and gated trainers the start of a decay, since the versions in which norms no longer count.
    late = trainer.get("trainer_class") == "JumpReluTrainer" and "submodule_name" in trainer and "bandwidth" not in trainer
    jump = late or trainer.get("trainer_class") == "TrainerJumpRelu"
    gated = "trainer_class" in trainer and "warmup_steps" in trainer and "decay_start" not in trainer
    return {"AutoEncoder": True, "JumpReluAutoEncoder": jump, "GatedAutoEncoder": gated}.get(kind, False)


def dictionary_learning_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The trainer's settings beside the others, and what of a submodule its data were."""
    parts = [part if isinstance(part := settings.get(name), dict) else {} for name in ("trainer", "buffer")]
    return {name: value for name, value in settings.items() if name not in ("trainer", "buffer")} | parts[0] | {"io": parts[1].get("io")}


def read_dictionary_learning(trainer: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    kind = str(trainer.get("dict_class"))
    if kind not in _CLASSES:
        raise ValueError(f"{file.parent / 'config.json'} says trainer.dict_class={kind!r}. Valid: {', '.join(_CLASSES)}.")
    activation, names, subtracts, unused = _CLASSES[kind]
    tensors = renamed(state, names, file, unused)
    options: dict[str, Any] = {}
    if "k" in unused:
        options = _k(trainer) if state.get("k") is None else {"k": int(state["k"])}  # before December 2024 it stood in the config alone
        if trainer.get("k") not in (None, options["k"]):
            raise ValueError(f"{file} keeps k={options['k']} latents, its config.json k={trainer['k']!r}: they don't belong together.")
    if "group_sizes" in unused:
        groups = renamed(state, {"group_sizes": "groups"}, file, unused=state)["groups"]
        options["groups"] = tuple(groups.long().cumsum(0).tolist())
    if not subtracts:
        tensors = centred(tensors)
    if _norms_count(kind, trainer) and not has_unit_rows(tensors):
        tensors = unit_rows(tensors)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].float().clamp_min(0)  # -1: not learned yet
    submodule = str(trainer.get("submodule_name") or "resid_post")
    kind = "hook_resid_post" if re.search("resid(?!.*pre)", submodule) else submodule
    model = place(trainer.get("lm_name"), trainer.get("layer"), kind) | plain(trainer, "lr", "seed", "steps")
    return Weights(tensors, activation, options, _own(trainer, model))


def write_dictionary_learning(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = next(kind for kind, each in _CLASSES.items() if each.activation == weights.activation)
    if kind == "AutoEncoder" and not has_unit_rows(weights.tensors):
        kind = "AutoEncoderNew"  # as it is; the other's loader would scale latents by the norms
    _, names, subtracts, unused = _CLASSES[kind]
    state = named(weights.tensors if subtracts else centred(weights.tensors, -1), names)
    k, (d_in, d_sae) = weights.options.get("k"), weights.tensors["W_enc"].shape
    trainer = {"dict_class": kind, "activation_dim": d_in, "dict_size": d_sae}
    trainer |= {"layer": weights.metadata.get("layer"), "lm_name": weights.metadata.get("model_name")}
    if k:
        trainer["k"] = k
        state = {"threshold": torch.tensor(-1.0)} | state | {"k": torch.tensor(k, dtype=torch.int32)}
    if groups := weights.options.get("groups"):
        state["group_sizes"] = torch.tensor([end - start for start, end in zip((0, *groups), groups, strict=False)])
    return {"trainer": trainer, "patchsae": as_json(weights.metadata)}, state


_OVERCOMPLETE = "encoder.final_block.0."
_BACKBONES = {"clip_vitb16": "openai/clip-vit-base-patch16"}  # of VISAEBench's, open_clip's; it reads patches alone


def visaebench_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    kind = next((settings[name] for name in ("activation", "sae_type", "architecture") if settings.get(name)), "topk")
    kind = str(kind).lower().replace("_", "").replace("-", "")
    rest = {name: value for name, value in settings.items() if name not in ("sae_type", "architecture")}
    return rest | {"activation": kind, "k": settings.get("k", settings.get("top_k"))}


def _decoder_rows(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """overcomplete's dictionary [S, D]: as it is, or RA-SAE's exp(m) (W C + Relax), W row-stochastic, Relax no longer than delta."""
    if "dictionary._weights" in state:
        rows = state["dictionary._weights"].double()
    else:
        mixture, shift = state["dictionary.W"].double().relu(), state["dictionary.Relax"].double()
        if settings.get("delta") is not None:
            shift = shift * (torch.as_tensor(settings["delta"]) / shift.norm(dim=1, keepdim=True)).clamp(max=1).nan_to_num(1.0)
        rows = mixture / (mixture.sum(1, keepdim=True) + 1e-8) @ state["dictionary.C"].double() + shift
    return (rows * state.get("dictionary.multiplier", torch.zeros(())).double().exp()).float()


def read_visaebench(settings: dict[str, Any], state: Mapping[str, Any], file: Path) -> Weights:
    kind, state = settings["activation"], dict(state) if isinstance(state, dict) else {}
    if kind not in ("topk", "batchtopk", "jumprelu"):
        raise ValueError(f"{file} holds an SAE of activation {kind!r}. Valid: topk, batchtopk, jumprelu.")
    encoder = _OVERCOMPLETE if _OVERCOMPLETE + "weight" in state else "encoder."
    names = {encoder + "weight": "W_enc", encoder + "bias": "b_enc"}
    parts = ("dictionary._weights",) if "dictionary._weights" in state else ("dictionary.W", "dictionary.C", "dictionary.Relax")
    if any(name.startswith("dictionary.") for name in state):
        names |= dict.fromkeys(parts, "W_dec")
        if encoder == "encoder.":
            state.setdefault("encoder.bias", torch.zeros(len(state.get(parts[0], ()))))  # its linear encoders may have none
    else:
        names["decoder.weight"] = "W_dec"
    thresholds = next((name for name in ("jump_thresholds", "thresholds") if name in state), None)
    extra = ("decoder.bias", "dictionary.multiplier", "_running_threshold", "bandwidth", "jump_thresholds", "thresholds")
    tensors = renamed(state, names, file, unused=extra, transposed=[encoder + "weight"])
    if "decoder.weight" not in names:
        tensors["W_dec"] = _decoder_rows(state, settings)
    d_sae, d_in = tensors["b_enc"].shape[0], tensors["W_dec"].shape[-1]
    tensors["b_dec"] = state.get("decoder.bias", torch.zeros(d_in))
    options: dict[str, Any] = {}
    if kind == "topk":
        options = _k(settings)
    elif kind == "batchtopk":
        threshold = settings["threshold"] if settings.get("threshold") is not None else state.get("_running_threshold", 0.0)
        tensors["threshold"] = just_below(torch.as_tensor(threshold).float().reshape(())).clamp_min(0)
        options = _k(settings)
        if not 0 < (options["k"] or 0) <= d_sae:  # none, or of a whole batch: then it is known by its threshold alone
            kind, options, tensors["threshold"] = "jumprelu", {}, tensors["threshold"].expand(d_sae)
    else:
        values = torch.full((d_sae,), 0.01) if thresholds is None else state[thresholds].float()
        logarithms = thresholds == "thresholds" and encoder == _OVERCOMPLETE and bool((values < 0).any())  # as overcomplete trains them
        tensors["threshold"] = values.exp() if logarithms else values.clamp_min(0)
    name = next((settings[name] for name in ("model_name", "backbone_name", "backbone") if settings.get(name)), None)
    model = place(_BACKBONES.get(str(name), name), settings.get("layer"), tokens="patches" if str(name) in _BACKBONES else None)
    return Weights(centred(tensors), kind, options, _own(settings, model))


def write_visaebench(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, (d_in, d_sae) = centred(weights.tensors, -1), weights.tensors["W_enc"].shape
    k = {"k": weights.options["k"]} if "k" in weights.options else {}
    settings = {"activation": weights.activation, "input_dim": d_in, "hidden_dim": d_sae} | k
    if weights.activation == "batchtopk":
        settings["threshold"] = float(just_below(tensors["threshold"], -1))
    state = named(tensors, {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}) | {"decoder.weight": tensors["W_dec"].contiguous()}
    state |= {"decoder.bias": tensors["b_dec"]} | ({"jump_thresholds": tensors["threshold"]} if weights.activation == "jumprelu" else {})
    return settings | {"patchsae": as_json(weights.metadata)}, state
