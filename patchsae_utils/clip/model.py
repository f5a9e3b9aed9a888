"""Any open_clip vision transformer: its preprocessing, the residual stream read and replaced, the tail of the network, the zero-shot head."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from torch import Tensor

from ..run.artifacts import read_json, shortened
from ..run.processes import default_device
from .weights import weights_from

EMBEDDED = Path(__file__).parent / "openmoji_clip"
"""The small CLIP of the embedded world, in the form that open_clip reads as ``local-dir:<folder>``."""

PRECISIONS = ("fp32", "bf16")


class Residual(NamedTuple):
    """The residual stream after a block."""

    tokens: Tensor
    """[B, 1+P, d]: CLS, then the patches, row by row."""
    extra: Tensor | None = None
    """[B, E, d]: prompt tokens of an adapted model, which travel behind the patches; None where there are none."""


class ClipModel:
    """A frozen CLIP whose residual stream can be read after any block and replaced.

    Parameters
    ----------
    model : open_clip.CLIP
        With a ``VisionTransformer`` as image tower.
    preprocess : callable
        PIL image -> Tensor [3, H, W].
    tokenizer : callable
        List of str -> LongTensor [B, context].
    name : str
    pretrained : str, optional
    device : str or torch.device
    precision : {"fp32", "bf16"}
        Arithmetic of the image tower; results are float32 either way.

    Raises
    ------
    ValueError
        If the image tower is no vision transformer of open_clip, or the precision is unknown.
    """

    has_text = True
    """Whether there is a text tower: zero-shot heads, prompts."""

    def __init__(
        self,
        model: open_clip.CLIP,
        preprocess: Callable,
        tokenizer: Callable,
        name: str,
        pretrained: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ):
        if not isinstance(model.visual, VisionTransformer):
            raise _other_tower(name, type(model.visual).__name__)
        if precision not in PRECISIONS:
            raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.name = name
        self.pretrained = pretrained
        self.device = torch.device(device)
        self.precision = precision
        self._tokenizer = tokenizer
        if precision == "bf16":
            _put_sequence_first(self.visual.transformer)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def visual(self) -> VisionTransformer:
        """The image tower."""
        return self.model.visual

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The image tower's residual blocks."""
        return self.visual.transformer.resblocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Dimension d of the residual stream."""
        return self.visual.positional_embedding.shape[1]

    @property
    def d_embed(self) -> int:
        """Dimension of image and text features."""
        return self.visual.output_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(self.visual.grid_size)

    @property
    def n_tokens(self) -> int:
        """1 + P: CLS and the patches."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the picture that the tower sees, in pixels."""
        size = self.visual.image_size
        return tuple(size) if isinstance(size, tuple | list) else (size, size)

    @property
    def logit_scale(self) -> float:
        """Factor between cosine similarities and logits."""
        return float(self.model.logit_scale.exp())

    @cached_property
    def weights_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def fingerprint(self) -> str:
        """Names the model, its weights, its preprocessing and its arithmetic: equal strings give equal activations."""
        preprocessing = re.sub(r" at 0x[0-9a-f]+", "", repr(self.preprocess))  # a lambda's address differs in every process
        return f"{self.name}:{self.weights_hash}:{hashlib.sha256(preprocessing.encode()).hexdigest()[:8]}:{self.precision}"

    def layer_index(self, layer: int) -> int:
        """Turn a block's index, negative ones counted from the end, into a non-negative one.

        Raises
        ------
        ValueError
            If there is no such block.
        """
        if not -self.n_layers <= layer < self.n_layers:
            raise ValueError(
                f"{self.name!r} has no layer {layer}. Valid: 0 to {self.n_layers - 1}, or -{self.n_layers} to -1 (a layer is the block whose output is read)."
            )
        return layer % self.n_layers

    def __repr__(self) -> str:
        return f"ClipModel({self.name!r}, pretrained={self.pretrained!r}, {self.n_layers} layers, width {self.width}, grid {self.grid[0]}x{self.grid[1]})"

    # -- images -------------------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features [B, d_embed], not normalised."""
        return self.finish(self.run_to(images, -1), -1)

    def run_to(self, images: Tensor, layer: int) -> Residual:
        """The residual stream after block ``layer``.

        Parameters
        ----------
        images : Tensor [B, 3, H, W]
            As ``preprocess`` makes them.
        layer : int

        Raises
        ------
        ValueError
            If there is no such layer, or the images have another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"{self.name!r} reads images [B, 3, {self.image_size[0]}, {self.image_size[1]}], got {list(images.shape)}. Apply clip.preprocess."
            )
        with self._arithmetic():
            x = self.visual._embeds(images.to(self.device, non_blocking=True))
            x = self._run_blocks(x, 0, self.layer_index(layer) + 1)
        return Residual(x.float())

    def residual(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream after block ``layer`` at CLS and the patches: [B, 1+P, d]."""
        return self.run_to(images, layer).tokens

    def tail_inputs(self, layer: int) -> tuple[ClipModel, Tensor | None]:
        """The model whose blocks run behind ``layer``, and constant tokens [n, D] that stand behind the residual's there, if any."""
        return self, None

    def finish(self, residual: Residual | Tensor, layer: int) -> Tensor:
        """Run the blocks after ``layer`` on a residual stream, edited or not.

        Parameters
        ----------
        residual : Residual or Tensor [B, 1+P, d]
        layer : int
            The block after which it was read.

        Returns
        -------
        Tensor [B, d_embed]
            Image features, not normalised.
        """
        tokens = residual if isinstance(residual, Tensor) else residual.tokens
        with self._arithmetic():
            x = self._run_blocks(tokens, self.layer_index(layer) + 1, self.n_layers)
            return self._features(x).float()

    def _run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        batch_first = self.visual.transformer.batch_first
        x = x if batch_first else x.transpose(0, 1)
        for block in self.blocks[start:stop]:
            x = block(x)
        return x if batch_first else x.transpose(0, 1)

    def _features(self, x: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(x)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def _arithmetic(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    # -- text ---------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids: LongTensor [B, context]."""
        return self._tokenizer([texts] if isinstance(texts, str) else list(texts)).to(self.device)

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Text features [B, d_embed] of token ids or strings, not normalised."""
        return self.model.encode_text(texts if isinstance(texts, Tensor) else self.tokenize(texts)).float()

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One unit vector a class: the mean of its prompts' unit vectors, normalised again.

        Parameters
        ----------
        class_names : sequence of str
            In the order of the labels; equal names stay two classes.
        templates : sequence of str
            Each with one ``{}``.

        Returns
        -------
        Tensor [C, d_embed]

        Raises
        ------
        ValueError
            If a list is empty or a template has no ``{}``.

        Source: Radford et al., 2021, section 3.1.4 (prompt ensembling in embedding space).
        """
        if not class_names or not templates:
            raise ValueError(
                f"A zero-shot head needs class names and templates; got {len(class_names)} names and {len(templates)} templates."
            )
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"The template {template!r} has no '{{}}' where the class name goes.")
        rows = []
        with torch.no_grad():
            for start in range(0, len(class_names), 64):
                names = class_names[start : start + 64]
                features = self.encode_text([template.format(name) for name in names for template in templates])
                features = F.normalize(features, dim=-1).view(len(names), len(templates), -1).mean(1)
                rows.append(F.normalize(features, dim=-1))
        return torch.cat(rows)

    def logits(self, features: Tensor, head: Tensor) -> Tensor:
        """Class logits [B, C]: ``logit_scale`` times the cosine of image features [B, d_embed] and head rows [C, d_embed]."""
        return self.logit_scale * F.normalize(features, dim=-1) @ head.T


def _put_sequence_first(transformer: Any) -> None:
    """Let attention read [T, B, d], which it computes in anyway: the same numbers, on a CPU in bfloat16 six times as fast.

    Otherwise it transposes its input, and torch multiplies what is not contiguous token by token, each with a copy of the weights in bfloat16.
    """
    attention = [block.attn for block in transformer.resblocks]
    if transformer.batch_first and all(isinstance(module, torch.nn.MultiheadAttention) for module in attention):
        transformer.batch_first = False
        for module in attention:
            module.batch_first = False


def load_clip(model: str = "openmoji", pretrained: str | None = None, device: str | None = None, precision: str = "fp32") -> ClipModel:
    """Load a CLIP with its preprocessing and tokenizer.

    Parameters
    ----------
    model : str
        ``"openmoji"`` (the small CLIP of the embedded world), a name that open_clip knows, a folder with
        ``open_clip_config.json`` and weights, or ``timm:<name>`` for a vision transformer without text (:mod:`patchsae_utils.clip.timm_models`).
    pretrained : str, optional
        A tag that open_clip knows (``"openai"``), or a weight file (``.safetensors``, ``.pt``, ``.bin``).
        Without it, a named architecture keeps random weights only if ``pretrained="random"`` says so.
    device : str, optional
        A GPU when there is one, else the CPU.
    precision : {"fp32", "bf16"}

    Raises
    ------
    ValueError
        For an unknown model, tag or precision, naming the valid ones; a model without a vision transformer of open_clip; a weight file or folder
        that is damaged, of another model, or holds more than tensors.
    FileNotFoundError
        If a weight file or folder is missing, or weights can't be fetched; the message says what to provide and where.
    ImportError
        If the model needs a package that is not installed.
    """
    if model.startswith("timm:"):
        from .timm_models import load_timm

        return load_timm(model, pretrained, device, precision)
    device = device or default_device()
    if model == "openmoji" or Path(model).is_dir():
        folder = EMBEDDED if model == "openmoji" else Path(model)
        _check_folder(folder)
        source, weights, place = f"local-dir:{folder}", None, folder
    else:
        if model not in open_clip.list_models():
            raise ValueError(
                f"Unknown model {model!r}. Valid: 'openmoji', a folder with open_clip_config.json, or one of open_clip's: {', '.join(open_clip.list_models())}."
            )
        _check_tower(model)
        source, weights = model, _check_weights(model, pretrained)
        place = Path(weights) if weights is not None and Path(weights).is_file() else None
    try:
        with nullcontext() if place is None else weights_from(place, model):
            network, _, preprocess = open_clip.create_model_and_transforms(source, pretrained=weights, precision="fp32")
            tokenizer = open_clip.get_tokenizer(source)
    except ImportError as error:
        raise ImportError(f"{model!r} needs a package that is not installed ({error}): pip install {error.name or 'it'}.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FileNotFoundError(
            f"The weights {pretrained!r} of {model!r} could not be loaded ({type(error).__name__}: {shortened(error)}). With a network they are "
            f'fetched from the Hugging Face hub; without one, download the file elsewhere and give its path: model.pretrained = "/path/to/weights.safetensors" '
            f"in the profile, or pretrained=... here."
        ) from error
    return ClipModel(network, preprocess, tokenizer, name=model, pretrained=pretrained, device=device, precision=precision)


def _check_folder(folder: Path) -> None:
    config = folder / "open_clip_config.json"
    if not config.exists():
        raise FileNotFoundError(f"{folder} holds no open_clip_config.json: a model folder needs that file and open_clip_model.safetensors.")
    described = read_json(config)
    if not isinstance(described, dict) or "model_cfg" not in described:
        raise ValueError(f"{config} has no entry 'model_cfg'; see open_clip's push_to_hf_hub for the form.")
    if not any(folder.glob("open_clip_*model.*")):
        raise FileNotFoundError(
            f"{folder} holds no weights (open_clip_model.safetensors). Train them: python -m experiments.train_openmoji_clip."
        )


def _check_tower(model: str) -> None:
    """Refuse a model of open_clip's list before its weights are fetched."""
    vision = open_clip.get_model_config(model)["vision_cfg"]
    if "timm_model_name" in vision or not isinstance(vision.get("layers", 12), int):
        raise _other_tower(model, vision.get("timm_model_name", "ModifiedResNet"))


def _other_tower(name: str, tower: str) -> ValueError:
    return ValueError(
        f"{name!r} has a {tower} as image tower; PatchSAE reads the tokens of open_clip's VisionTransformer. "
        f"Choose a model such as 'ViT-B-16' (open_clip.list_models() lists all)."
    )


def _check_weights(model: str, pretrained: str | None) -> str | None:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained == "random":
        return None
    if pretrained is None:
        raise ValueError(f"{model!r} needs weights: pretrained= one of {', '.join(tags) or '(none known)'}, a weight file, or 'random'.")
    if pretrained in tags or Path(pretrained).is_file():
        return pretrained
    if Path(pretrained).suffix in (".safetensors", ".pt", ".bin", ".pth"):
        raise FileNotFoundError(f"No weight file {pretrained!r}. Valid tags of {model!r}, which are downloaded: {', '.join(tags)}.")
    raise ValueError(f"Unknown weights {pretrained!r} of {model!r}. Valid: {', '.join(tags)}, a weight file, or 'random'.")
