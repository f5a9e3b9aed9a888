"""Opening models: the embedded world's CLIP, open_clip's by name or from a folder, timm's; weights from files that people bring along."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.factory import load_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import model_entrypoint
from torch import Tensor

from ..run.artifacts import read_json, shortened
from ..run.pickles import read_torch
from ..run.processes import default_device
from .model import ClipModel, other_tower
from .timm_models import TimmModel, clip_of

EMBEDDED = Path(__file__).parent / "openmoji_clip"  # the small CLIP, in the form that open_clip reads as ``local-dir:<folder>``
_TIMM = "timm:"


def load_clip(
    model: str | Path = "openmoji", pretrained: str | Path | None = None, device: str | None = None, precision: str = "fp32"
) -> ClipModel:
    """Load a CLIP, or a vision transformer without text, with its preprocessing and tokenizer.

    Parameters
    ----------
    model : str or Path
        ``"openmoji"`` (the embedded world's small CLIP), a name that open_clip knows, a folder with ``open_clip_config.json`` and weights, or
        ``timm:<name>`` for a vision transformer without text. ``<name>@<pixels>``: another image size (positions are resampled).
    pretrained : str or Path, optional
        A tag that open_clip knows (``"openai"``; it opens the ``-quickgelu`` model where it needs one), a weight file (``.safetensors``, ``.pt``,
        ``.bin``), or ``"random"``. Default: the weights of the folder, or timm's own; a model of open_clip needs one of the three.
    device : str, optional; a GPU when there is one, else the CPU
    precision : {"fp32", "bf16"}, arithmetic of the image tower

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        For an unknown model, tag or precision, a model without a vision transformer, or weights that are damaged, of another model, or code; for
        weights that are missing or can't be fetched (says what to provide and where); for a package that the model needs.
    """
    where = {"device": device or default_device(), "precision": precision}
    model, pretrained = str(model), None if pretrained is None else str(pretrained)
    folder = EMBEDDED if model == "openmoji" else Path(model) if Path(model).is_dir() else None
    name, at, pixels = (model, "", "") if folder else model.partition("@")
    if at and not pixels.isdigit():
        raise ValueError(f"The image size of {model!r} is no whole number of pixels.")
    size = int(pixels) if pixels else None
    if name.startswith(_TIMM):
        network, preprocess = _load_timm(model, name.removeprefix(_TIMM), size, pretrained)
        return clip_of(network, preprocess, None, model, pretrained, **where)
    if folder is None and name not in open_clip.list_models():
        raise ValueError(
            f"Unknown model {model!r}. Valid: 'openmoji', a folder with open_clip_config.json, 'timm:<name>', or one of open_clip's: "
            f"{', '.join(open_clip.list_models())}."
        )
    file, tag = _choose_weights(name, folder, pretrained)
    if tag and (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu") and f"{name}-quickgelu" in open_clip.list_models():
        model, name = f"{name}-quickgelu{at}{pixels}", f"{name}-quickgelu"  # with plain GELU, features would be others than these weights'
    source = name if folder is None else f"local-dir:{folder}"
    options: dict[str, Any] = {"force_image_size": size} if size else {}
    if file is not None and folder is None:
        options |= _published_preprocessing(name)
    place = file or (folder if pretrained is None else None)
    try:
        with nullcontext() if place is None else _weights_from(place, model):
            with tempfile.TemporaryDirectory() as safe:
                weights = None if file is None else Path(safe) / "weights.safetensors"
                if file and weights:  # so that open_clip, which reads them and converts older forms, opens no pickle
                    save_file(
                        {key: value.clone(memory_format=torch.contiguous_format) for key, value in _state_dict(file).items()}, weights
                    )
                given = str(weights) if weights and folder is None else tag
                load = pretrained is None or given is not None
                network, _, preprocess = open_clip.create_model_and_transforms(source, pretrained=given, load_weights=load, **options)
                if weights and folder:
                    load_checkpoint(network, str(weights))
    except ImportError as error:
        raise ImportError(f"{model!r} needs a package that is not installed ({error}): pip install {error.name or 'it'}.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _not_fetched(f"The weights of {model!r}", error) from error
    return clip_of(network, preprocess, _Tokenizer(source), model, pretrained, **where)


class _Tokenizer:
    """A model's tokenizer, opened when it is first used: some are fetched from the hub, and activations need none."""

    def __init__(self, source: str):
        self.source = source

    @cached_property
    def own(self) -> Any:
        try:
            return open_clip.get_tokenizer(self.source)
        except (OSError, RuntimeError) as error:
            raise _not_fetched(f"The tokenizer of {self.source!r}", error) from error

    def __call__(self, texts: list[str]) -> Tensor:
        return self.own(texts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.own, name)


def _choose_weights(model: str, folder: Path | None, pretrained: str | None) -> tuple[Path | None, str | None]:
    """A weight file, or a tag of open_clip, or neither: random weights, or a folder's own."""
    if folder is not None:
        tags, own = [], "nothing (the folder's own weights)"
        _check_folder(folder, with_weights=pretrained is None)
    else:
        tags, own = open_clip.list_pretrained_tags_by_model(model), None
        vision = open_clip.get_model_config(model)["vision_cfg"]  # towers that are not read are refused before weights are fetched
        if "timm_model_name" in vision:
            _check_architecture(vision["timm_model_name"], model)
        elif not isinstance(vision.get("layers", 12), int):
            raise other_tower(model, "ModifiedResNet")
    if pretrained == "random" or (pretrained is None and own):
        return None, None
    if pretrained in tags:
        return None, pretrained
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained), None
    valid = f"{own or ', '.join(tags) or '(no tag is known)'}, a weight file, or 'random'"
    if pretrained is None:
        raise ValueError(f"{model!r} needs weights: pretrained= one of {valid}.")
    if Path(pretrained).suffix in (".safetensors", ".pt", ".bin", ".pth"):
        raise FileNotFoundError(f"No weight file {pretrained!r} for {model!r}. Valid: {valid}; tags are downloaded.")
    raise ValueError(f"Unknown weights {pretrained!r} of {model!r}. Valid: {valid}.")


def _check_architecture(name: str, model: str) -> None:
    """Refuse a tower of timm that is not read, without making its weights."""
    with torch.device("meta"):
        TimmModel._check(timm.create_model(name, num_classes=0), model)


def _check_folder(folder: Path, with_weights: bool) -> None:
    config = folder / "open_clip_config.json"
    if not config.exists():
        raise FileNotFoundError(f"{folder} holds no open_clip_config.json: a model folder needs that file and open_clip_model.safetensors.")
    described = read_json(config)
    if not isinstance(described, dict) or "model_cfg" not in described:
        raise ValueError(f"{config} has no entry 'model_cfg'; see open_clip's push_to_hf_hub for the form.")
    if with_weights and not any(folder.glob("open_clip_*model.*")):
        train = "python -m experiments.train_openmoji_clip"
        raise FileNotFoundError(f"{folder} holds no weights (open_clip_model.safetensors). Train them: {train}.")


def _published_preprocessing(model: str) -> dict[str, Any]:
    """How pictures are prepared for a weight file, which doesn't say it: as for the weights that open_clip publishes of the same model."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    kinds: dict[str, list[str]] = {}
    published = {tag: open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
    for tag, described in published.items():
        kinds.setdefault(repr([described.get(key) for key in keys]), []).append(tag)
    if not kinds:
        return {}
    chosen, *others = kinds.values()
    if others:
        warnings.warn(
            f"A weight file doesn't say how pictures are prepared. Taken is what {', '.join(chosen[:3])} of {model!r} want; if these are "
            f"{' or '.join(map(', '.join, others))}, give that tag instead.",
            stacklevel=3,
        )
    return {f"image_{key}": value for key in keys if (value := published[chosen[0]].get(key)) is not None}


def _load_timm(model: str, name: str, size: int | None, pretrained: str | None) -> tuple[torch.nn.Module, Any]:
    """A network of timm and its preprocessing, both for the image size asked for."""
    if name not in timm.list_models(pretrained=True) and name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:8] or timm.list_models("vit_*dinov2*"))
        raise ValueError(f"timm has no model {name!r}. Near it: {near} (timm.list_models() lists all).")
    file = None if pretrained in (None, "random") else Path(pretrained)
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"No weight file {pretrained!r} for {model!r}. Give a file, 'random', or nothing for timm's own weights.")
    try:
        _check_architecture(name, model)
        options: dict[str, Any] = {"img_size": size} if size else {}
        network: Any = timm.create_model(name, pretrained=pretrained is None, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(f"The weights of {model!r}", error) from error
    if file is not None:
        with _weights_from(file, model):
            _fill_timm(network, name, file)
    data = timm.data.resolve_model_data_config(network)
    if size:
        data["input_size"] = (3, *network.patch_embed.img_size)  # timm's data configuration knows only the weights' own size
    return network, timm.data.create_transform(**data, is_training=False)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors, or torch.save of a state dict or of a training checkpoint, read without running anything."""
    found: Any = load_file(file) if file.suffix == ".safetensors" else read_torch(file)
    content: dict[str, Any] = found if isinstance(found, dict) else {}
    for name in ("state_dict", "model"):
        content = content[name] if isinstance(content.get(name), dict) else content
    if not (state := {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}):
        raise ValueError(f"{file} holds no weights: wanted is a state dict, alone or as 'state_dict' of a training checkpoint")
    if any(key.startswith("vision_model.") for key in state):
        raise ValueError("it is in the form of transformers; wanted is open_clip's: give a tag, or open_clip's own file of these weights")
    wrapped = all(key.startswith("module.") for key in state)  # of DistributedDataParallel
    state = {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}  # halves can't be resampled


def _fill_timm(network: torch.nn.Module, name: str, file: Path) -> None:
    """Load every weight of the model, and nothing else but a classifier's; timm by itself leaves random what doesn't fit."""
    state = _state_dict(file)
    adapt = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)  # e.g. positions for another grid
    state = state if adapt is None else adapt(state, network)
    expected = network.state_dict().keys()
    network.load_state_dict({key: value for key, value in state.items() if key in expected or not key.startswith("head")})


@contextmanager
def _weights_from(place: Path, model: str) -> Iterator[None]:
    """Around the loading of a file or folder: whatever is wrong with it becomes a ``ValueError`` that names it and the model."""
    try:
        yield
    except (ImportError, MemoryError):
        raise  # nothing is wrong with the file
    except Exception as error:
        size = f" ({place.stat().st_size:,} bytes)" if place.is_file() else ""
        fits = " It must fit the folder's open_clip_config.json." if place.is_dir() else " Or name the model that it belongs to."
        raise ValueError(
            f"{place}{size} can't be loaded as weights of {model!r} ({type(error).__name__}: {shortened(error, 600)}). A weight file must be whole, "
            f"and hold the weights of this very architecture: copy or download it again.{fits}"
        ) from error


def _not_fetched(what: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what} could not be loaded ({type(error).__name__}: {shortened(error)}). With a network they are fetched from the Hugging Face hub; "
        'without one, download them elsewhere and give the file: model.pretrained = "/path/to/weights.safetensors" in the profile, or '
        "pretrained=... here."
    )
