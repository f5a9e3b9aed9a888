"""SAEs of other programs: PatchSAE's own files, ViT-Prisma, saev, sparsify, dictionary_learning.

A reader turns a file into our equations, pre = (x - b_dec) W_enc + b_enc with latents as in :mod:`.sae`; a writer turns them back. The
latents stay what they were, to rounding. What our equations, or the other program's, can't say is refused by name.
``docs/formats.md`` describes every form. SAELens's is ours, and in :mod:`.checkpoints`.

Sources: the programs' own loaders: github.com/dynamical-inference/patchsae, Prisma-Multimodal/ViT-Prisma, OSU-NLP-Group/saev,
EleutherAI/sparsify, saprmarks/dictionary_learning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..run.artifacts import read_json
from ..run.pickles import Record, is_torch_archive, read_torch
from .model import SparseAutoencoder

FORMATS = ("saelens", "patchsae", "prisma", "saev", "sparsify", "dictionary_learning")

# open_clip's names of models as Hugging Face calls them, their weights, and their number of blocks.
_MODELS = {
    "openai/clip-vit-base-patch16": ("ViT-B-16-quickgelu", "openai", 12),
    "openai/clip-vit-base-patch32": ("ViT-B-32-quickgelu", "openai", 12),
    "openai/clip-vit-large-patch14": ("ViT-L-14-quickgelu", "openai", 24),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336-quickgelu", "openai", 24),
}


class Weights(NamedTuple):
    """An SAE as a file holds it, in our terms."""

    tensors: dict[str, Tensor]
    """``W_enc`` [D, S], ``b_enc`` [S], ``W_dec`` [S, D], ``b_dec`` [D], and the variant's own."""
    activation: str = "relu"
    k: int | None = None
    groups: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = {}


def build(weights: Weights, path: Path) -> SparseAutoencoder:
    """An SAE of these weights, checked.

    Raises
    ------
    ValueError
        If shapes don't fit each other, or a weight is NaN or infinite.
    """
    tensors = {name: value.detach().float().contiguous() for name, value in weights.tensors.items()}
    if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
        raise ValueError(f"{path} holds no matrix W_enc [d_in, d_sae]; it holds {_shapes(tensors)}.")
    d_in, d_sae = tensors["W_enc"].shape
    try:
        sae = SparseAutoencoder(d_in, d_sae, weights.activation, k=weights.k, groups=weights.groups, metadata=weights.metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    own = {name: value for name, value in sae.state_dict().items() if not name.startswith("input_")}
    if _shapes(own) != _shapes(tensors):
        raise ValueError(f"{path} holds {_shapes(tensors)}; an SAE of activation {weights.activation!r} has {_shapes(own)}.")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values. Train or copy it again.")
    sae.load_state_dict(tensors, strict=False)  # the input's statistics are not known
    return sae.eval()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


# -- which form a file has ------------------------------------------------------------------------------------------------


def find(path: Path) -> tuple[str, Path]:
    """The form of an SAE on disk, and the folder or file that its reader takes.

    Raises
    ------
    FileNotFoundError
        If nothing is there, or the folder holds no SAE.
    ValueError
        If a file is of none of the forms.
    """
    if path.is_dir():
        for form, names in _FOLDERS.items():
            if all((path / name).is_file() for name in names):
                return form, path
        if (path / "sae.pt").is_file():
            return find(path / "sae.pt")
        found = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
        missing = [name for name in _FOLDERS["saelens"] if not (path / name).is_file()]
        raise FileNotFoundError(
            f"{path} holds no {' and no '.join(missing)}, so it is no SAE folder of ours or of SAELens v6 (found: {found}). "
            f"Other forms that are read: {_FORMS}."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"No SAE at {path}: expected a folder with cfg.json and sae_weights.safetensors, as SparseAutoencoder.save or train_sae writes it, "
            f"or one of: {_FORMS}."
        )
    inside = {form for form, names in _FOLDERS.items() if path.name in names and all((path.parent / name).is_file() for name in names)}
    if inside:
        return inside.pop(), path.parent
    with open(path, "rb") as file:
        start = file.read(1)
    if start == b"{":
        return "saev", path
    if not is_torch_archive(path):
        raise ValueError(
            f"{path} is no SAE of a form that is read. If it is a pickle, it could run code when opened: write its weights anew with "
            f"torch.save (1.6 or later), or fill a SparseAutoencoder and save that. Forms that are read: {_FORMS}."
        )
    config = path.parent / "config.json"
    if config.is_file() and "activation_fn_str" in _object(config):
        return "prisma", path
    return _form_of(read_torch(path), path), path


def _form_of(content: Any, path: Path) -> str:
    """Whether ``{"cfg", "state_dict"}`` is PatchSAE's or that of early ViT-Prisma, which has more settings."""
    settings = _settings(content)
    if settings is None:
        what = _shapes_in(content)
        raise ValueError(
            f"{path} holds {what}, and nothing that says how to use it: the activation, the place of b_dec. Put the file config.json "
            f"(ViT-Prisma, dictionary_learning) beside it that was written with it. Forms that are read: {_FORMS}."
        )
    return "prisma" if "activation_fn_str" in settings else "patchsae"


def _settings(content: Any) -> dict[str, Any] | None:
    """The settings in ``{"cfg" or "config": a record or a dict, "state_dict"}``."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    settings = content.get("cfg", content.get("config"))
    settings = settings.state if isinstance(settings, Record) else settings
    return settings if isinstance(settings, dict) else None


def _shapes_in(content: Any) -> str:
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        return f"tensors {_shapes(tensors)}" if tensors else f"entries {sorted(map(str, content))[:12]}"
    return f"a {type(content).__name__}"


# -- equations that differ ----------------------------------------------------------------------------------------------------


def centred(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From encoders that don't subtract b_dec to ours, which do: b_enc + b_dec W_enc (``gated``: both biases).

    x W + b = (x - b_dec) W + (b + b_dec W), in double precision, rounded once.
    """
    return _moved(tensors, +1)


def uncentred(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`centred`: b_enc - b_dec W_enc."""
    return _moved(tensors, -1)


def _moved(tensors: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
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
        changed["W_enc"] = tensors["W_enc"].double() * (norms > 0)
        changed["b_enc"] = tensors["b_enc"].double() * (norms > 0)
        changed["r_mag"] = tensors["r_mag"].double() + norms.where(norms > 0, 1.0).log()
        scaled = ["b_mag"]
    else:
        scaled = ["W_enc", "b_enc", *(["threshold"] if "threshold" in tensors else [])]
    changed |= {name: tensors[name].double() * norms for name in scaled}
    return tensors | {name: value.float() for name, value in changed.items()}


# -- readers ----------------------------------------------------------------------------------------------------------------


def read_patchsae(path: Path) -> Weights:
    """PatchSAE's own file: ``{"cfg" or "config": ViTSAERunnerConfig, "state_dict"}`` by ``torch.save``."""
    content = read_torch(path)
    settings = _settings(content)
    if settings is None:
        _form_of(content, path)
    known = {"model_name": settings.get("model_name"), "layer": settings.get("block_layer")}
    metadata = settings.get("patchsae")
    if not isinstance(metadata, dict):
        metadata = _model(known["model_name"], known["layer"]) | _plain(
            settings, "dataset_path", "l1_coefficient", "lr", "seed", "image_width"
        )
    return Weights(_tensors(content["state_dict"], path, _FOUR), metadata=metadata)


def read_prisma(path: Path) -> Weights:
    """ViT-Prisma: ``weights.pt`` with ``config.json`` beside it, or the older ``{"cfg", "state_dict"}``."""
    file = path / "weights.pt" if path.is_dir() else path
    content = read_torch(file)
    settings = _settings(content)
    state = content["state_dict"] if settings is not None else content
    if settings is None:
        settings = _object(file.parent / "config.json")
    architecture, activation = settings.get("architecture", "standard"), settings.get("activation_fn_str")
    for name, valid in {"normalize_activations": ("none", None), "is_transcoder": (False, None)}.items():
        value = settings.get(name, "layer_norm" if name == "normalize_activations" else None)
        if value not in valid:
            raise ValueError(
                f"{file} says {name}={value!r}, which changes every token before the SAE reads it; only {valid[0]!r} is read. "
                "Such an SAE would give wrong latents here."
            )
    if architecture not in ("standard", "gated") or activation not in ("relu", "topk"):
        raise ValueError(f"{file} holds architecture {architecture!r} with {activation!r}. Valid: standard or gated, relu or topk.")
    layer, kind = settings.get("hook_point_layer"), settings.get("layer_subtype", "hook_resid_post")
    metadata = _model(settings.get("model_name"), layer if kind == "hook_resid_post" else None) | _plain(settings, "l1_coefficient", "seed")
    if kind != "hook_resid_post":
        metadata["hook_name"] = f"blocks.{layer}.{kind}"
    if architecture == "gated":
        tensors = _tensors(state, file, ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"))
        tensors["b_enc"] = tensors.pop("b_gate")
        return Weights(tensors, "gated", metadata=metadata)
    kwargs = settings.get("activation_fn_kwargs")
    k = kwargs.get("k") if activation == "topk" and isinstance(kwargs, dict) else None
    return Weights(_tensors(state, file, _FOUR), activation, k, metadata=metadata)


def read_saev(path: Path) -> Weights:
    """saev's ``sae.pt``: a line of JSON, then ``torch.save`` of the weights. Its encoder doesn't subtract b_dec."""
    with open(path, "rb") as file:
        line = file.readline(1 << 20)
    try:
        header = json.loads(line)
        activation = header["cfg"].get("activation", {"cls": "Relu"})
        kind, params = str(activation["cls"]), dict(activation.get("params") or {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} begins with no header of saev ({type(error).__name__}): a line of JSON with 'schema' and 'cfg'."
        ) from error
    state = read_torch(path)
    names = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batchtopk"}
    if kind not in names:
        raise ValueError(f"{path} holds an SAE of activation {kind!r}. Valid: {', '.join(names)}.")
    threshold = state.get("activation.threshold") if isinstance(state, dict) else None
    if kind == "BatchTopK" and threshold is None:
        kind = "TopK"  # before it had a threshold, saev took each token's largest
    keep = (*_FOUR, "activation.threshold") if kind == "BatchTopK" else _FOUR
    tensors = _tensors(state, path, keep)
    if kind == "BatchTopK":
        tensors["threshold"] = tensors.pop("activation.threshold").reshape(()).clamp_min(0)
    own = header.get("patchsae")
    return Weights(centred(tensors), names[kind], params.get("top_k"), metadata=own if isinstance(own, dict) else {})


def read_sparsify(path: Path) -> Weights:
    """sparsify: ``cfg.json`` and ``sae.safetensors``; TopK."""
    config, file = _object(path / "cfg.json"), path / "sae.safetensors"
    for name, only in {"activation": "topk", "transcode": False, "skip_connection": False}.items():
        if config.get(name, only) != only:
            raise ValueError(f"{path / 'cfg.json'} says {name}={config[name]!r}; only {only!r} is read.")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no valid safetensors file ({error}). Copy it again.") from error
    tensors = _tensors(state, file, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    own = config.get("patchsae")
    return Weights(_from_linear(tensors), "topk", config.get("k"), metadata=own if isinstance(own, dict) else {})


def read_dictionary_learning(path: Path) -> Weights:
    """dictionary_learning: ``ae.pt``, and ``config.json`` whose ``trainer.dict_class`` says what it is."""
    file, config = path / "ae.pt", _object(path / "config.json")
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = str(trainer.get("dict_class"))
    if kind not in _CLASSES:
        raise ValueError(f"{path / 'config.json'} says trainer.dict_class={kind!r}. Valid: {', '.join(_CLASSES)}.")
    activation, names = _CLASSES[kind]
    state = read_torch(file)
    tensors = _tensors(state, file, tuple(names))
    k = int(tensors["k"]) if "k" in tensors else None
    groups = tuple(tensors["group_sizes"].long().cumsum(0).tolist()) if "group_sizes" in tensors else None
    tensors = {new: tensors[old] for old, new in names.items() if new is not None}
    if "encoder.weight" in tensors:
        tensors = _from_linear(tensors)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        tensors = centred(tensors)
    if kind in ("JumpReluAutoEncoder", "GatedAutoEncoder"):  # their latents are times the rows' norms
        tensors = unit_rows(tensors)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].float().clamp_min(0)  # -1: not learned yet
    own = config.get("patchsae")
    metadata = (
        own if isinstance(own, dict) else _model(trainer.get("lm_name"), trainer.get("layer")) | _plain(trainer, "lr", "seed", "steps")
    )
    return Weights(tensors, activation, k, groups, metadata=metadata)


_FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
_LINEAR = {"encoder.weight": "encoder.weight", "encoder.bias": "encoder.bias", "decoder.weight": "decoder.weight"}
_PLAIN_NAMES = {name: name for name in _FOUR}
# dictionary_learning's classes: our activation, and their keys with the names that become of them (None: read apart).
_CLASSES: dict[str, tuple[str, dict[str, str | None]]] = {
    "AutoEncoder": ("relu", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", _LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {
            "encoder.weight": "encoder.weight", "gate_bias": "encoder.bias", "decoder.weight": "decoder.weight", "decoder_bias": "b_dec",
            "mag_bias": "b_mag", "r_mag": "r_mag",
        },
    ),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN_NAMES | {"threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec", "k": None}),
    "BatchTopKSAE": ("batchtopk", _LINEAR | {"b_dec": "b_dec", "k": None, "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _PLAIN_NAMES | {"k": None, "threshold": "threshold", "group_sizes": None}),
}  # fmt: skip


def _from_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From ``torch.nn.Linear`` (weights [out, in]) to ours."""
    tensors = dict(tensors)
    named = {"W_enc": tensors.pop("encoder.weight").T, "b_enc": tensors.pop("encoder.bias")}
    if "decoder.weight" in tensors:
        named["W_dec"] = tensors.pop("decoder.weight").T
    return tensors | named


def _tensors(state: Any, path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """These tensors of a state dict; others that a trainer leaves there are passed over."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the weights {', '.join(missing)}; it holds {_shapes(tensors)}.")
    return {name: tensors[name] for name in names}


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


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


_FOLDERS = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "prisma": ("config.json", "weights.pt"),
}
_FORMS = (
    "PatchSAE's .pt, ViT-Prisma's weights.pt with config.json, saev's sae.pt, sparsify's cfg.json with sae.safetensors, "
    "dictionary_learning's ae.pt with config.json"
)
READERS: dict[str, Callable[[Path], Weights]] = {
    "patchsae": read_patchsae,
    "prisma": read_prisma,
    "saev": read_saev,
    "sparsify": read_sparsify,
    "dictionary_learning": read_dictionary_learning,
}
