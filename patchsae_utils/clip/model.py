"""A CLIP of open_clip: its preprocessing, the residual stream read and replaced, the rest of the network, the zero-shot head."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor

PRECISIONS = ("fp32", "bf16")


class NoText(ValueError):
    """A stage needs a text tower, and the model has none."""


class Residual(NamedTuple):
    """The residual stream after a block."""

    tokens: Tensor  # [B, 1+P, d]: CLS (without one the mean of the patches; what is written there is dropped), then the patches, row by row
    extra: Tensor | None = None  # [B, E, d]: tokens that are neither: prompts of an adapted model, registers of a timm model


class ClipModel:
    """A frozen CLIP whose residual stream can be read after any block and replaced.

    Parameters
    ----------
    model : open_clip.CLIP
        With a ``VisionTransformer`` as image tower (others are read by ``clip.timm_models.TimmModel``); one that can't be read is a ``ValueError``.
    preprocess : callable, PIL image -> Tensor [3, H, W]
    tokenizer : callable, list of str -> LongTensor [B, context]
    name, pretrained, device : str
    precision : {"fp32", "bf16"}, arithmetic of the image tower; results are float32 either way
    """

    n_layers: int
    width: int  # dimension d of the residual stream
    d_embed: int  # of image and text features
    grid: tuple[int, int]  # rows and columns of patches
    n_tokens: int  # 1 + P: CLS and the patches
    image_size: tuple[int, int]  # height and width of the picture that the tower sees, in pixels
    has_text: bool  # whether there is a text tower: zero-shot heads, prompts
    has_class_token = True  # of the image tower; if not, see ``Residual.tokens``

    def __init__(
        self, model: open_clip.CLIP, preprocess: Callable, tokenizer: Callable | None, name: str, pretrained: str | None = None,
        device: str | torch.device = "cpu", precision: str = "fp32",
    ):  # fmt: skip
        if precision not in PRECISIONS:
            raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
        self._check(model, name)
        self.model = model.to(device).float().eval().requires_grad_(False)
        self.preprocess, self.name, self.pretrained = preprocess, name, pretrained
        self.device, self.precision = torch.device(device), precision
        self._tokenizer: Any = tokenizer
        self.n_layers, self.has_text = len(self.blocks), hasattr(model, "encode_text")
        self._measure()
        self.n_tokens = 1 + self.grid[0] * self.grid[1]
        if precision == "bf16":
            self.put_sequence_first()

    @staticmethod
    def _check(model: Any, name: str) -> None:
        """Refuse a tower that is not read here."""
        if not isinstance(model.visual, VisionTransformer):
            raise other_tower(name, type(model.visual).__name__)

    def _measure(self) -> None:
        """Note the tower's sizes."""
        visual = self.visual
        self.width, self.d_embed = visual.positional_embedding.shape[1], visual.output_dim
        self.grid, self.image_size = tuple(visual.grid_size), tuple(visual.image_size)

    def put_sequence_first(self) -> None:
        """Let attention read [T, B, d], which it computes in anyway: the same numbers, on a CPU in bfloat16 six times as fast."""
        attention = [block.attn for block in self.blocks]
        if self._batch_first and all(isinstance(module, torch.nn.MultiheadAttention) for module in attention):
            for module in (self.visual.transformer, *attention):
                module.batch_first = False

    @property
    def visual(self) -> VisionTransformer:
        return self.model.visual

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The image tower's residual blocks."""
        return self.visual.transformer.resblocks

    @property
    def _batch_first(self) -> bool:
        return self.visual.transformer.batch_first

    @property
    def _both_towers(self) -> Any:
        if not self.has_text:
            works = "Extraction, training, statistics and masks work without"
            raise NoText(f"{self.name!r} has no text tower. {works}; zero-shot accuracy, mask sweeps and prompts need a CLIP.")
        return self.model

    @property
    def logit_scale(self) -> float:
        """Factor between cosine similarities and logits."""
        return float(self._both_towers.logit_scale.exp())

    @cached_property
    def weights_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all weights."""
        return hash_of(self.model.state_dict())

    @cached_property
    def fingerprint(self) -> str:
        """Names the model, its weights, its preprocessing and its arithmetic: equal strings give equal activations."""
        return f"{self.name}:{self.weights_hash}:{preprocessing_fingerprint(repr(self.preprocess))}:{self.precision}"

    def check_class_token(self, *places: Any) -> None:
        """Refuse to store, mask or edit ``"cls"`` alone where there is no class token."""
        if not self.has_class_token and any(isinstance(place, str) and place == "cls" for place in places):
            raise ValueError(f"{self.name!r} has no class token: its features are pooled from the patches. Choose 'patches' or 'all'.")

    def layer_index(self, layer: int) -> int:
        """A block's index, negative ones counted from the end, as a non-negative one."""
        if layer not in range(-self.n_layers, self.n_layers):
            valid = f"0 to {self.n_layers - 1}, or -{self.n_layers} to -1"
            raise ValueError(f"{self.name!r} has no layer {layer!r}. Valid: {valid} (a layer is the block whose output is read).")
        return int(layer) % self.n_layers

    def __repr__(self) -> str:
        return f"ClipModel({self.name!r}, pretrained={self.pretrained!r}, {self.n_layers} layers, width {self.width}, grid {self.grid[0]}x{self.grid[1]})"

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features [B, d_embed], not normalised."""
        return self.finish(self.run_to(images, -1), -1)

    def run_to(self, images: Tensor, layer: int) -> Residual:
        """The residual stream after block ``layer`` of images [B, 3, H, W] as ``preprocess`` makes them, with its extra tokens."""
        stop = self.layer_index(layer) + 1
        with self._arithmetic():
            return self._split(self._run_blocks(self._embed(images), 0, stop).float())

    def residual(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream after block ``layer`` at CLS and the patches: [B, 1+P, d]."""
        return self.run_to(images, layer).tokens

    def residuals(self, images: Tensor) -> Tensor:
        """The residual stream after every block, by one forward pass: [L, B, 1+P, d]."""
        found = []
        with self._arithmetic():
            x = self._embed(images)
            for i in range(self.n_layers):
                x = self._run_blocks(x, i, i + 1)
                found.append(self._split(x.float()).tokens)
        return torch.stack(found)

    def tail_inputs(self, layer: int) -> tuple[ClipModel, Tensor | None]:
        """The model whose blocks run behind ``layer``, and constant tokens [n, D] that stand behind the residual's there, if any."""
        return self, None

    def finish(self, residual: Residual | Tensor, layer: int) -> Tensor:
        """Run the blocks after ``layer`` on a residual stream that was read there, edited or not: image features [B, d_embed], not normalised."""
        x = self._joined(self._here(residual))
        with self._arithmetic():
            return self._features(self._run_blocks(x, self.layer_index(layer) + 1, self.n_layers)).float()

    def _here(self, residual: Residual | Tensor) -> Residual:
        parts = (residual,) if isinstance(residual, Tensor) else residual
        return Residual(*(None if part is None else part.to(self.device) for part in parts))

    def _embed(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            wanted = f"[B, 3, {self.image_size[0]}, {self.image_size[1]}]"
            raise ValueError(f"{self.name!r} reads images {wanted}, got {list(images.shape)}. Apply clip.preprocess.")
        return self._first_tokens(images.to(self.device, non_blocking=True))

    def _first_tokens(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def _split(self, x: Tensor) -> Residual:
        n = self.n_tokens
        return Residual(x) if x.shape[1] == n else Residual(x[:, :n], x[:, n:])

    def _joined(self, residual: Residual) -> Tensor:
        """What :meth:`_split` took apart."""
        return residual.tokens

    def _run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        x = x if self._batch_first else x.transpose(0, 1)
        for block in self.blocks[start:stop]:
            x = block(x)
        return x if self._batch_first else x.transpose(0, 1)

    def _features(self, x: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(x)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def _arithmetic(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids: LongTensor [B, context]."""
        assert self._both_towers
        return self._tokenizer([texts] if isinstance(texts, str) else list(texts)).to(self.device)

    def encode_text(self, texts: Tensor | str | Sequence[str], normalize: bool = False) -> Tensor:
        """Text features [B, d_embed] of token ids or strings."""
        features = self._both_towers.encode_text(texts if isinstance(texts, Tensor) else self.tokenize(texts)).float()
        return F.normalize(features, dim=-1) if normalize else features

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One unit vector per class, [C, d_embed]: the mean of its prompts' unit vectors, normalised again.

        Class names come in the order of the labels, and equal ones stay two classes; each template has one ``{}``.

        Source: Radford et al., 2021, section 3.1.4 (prompt ensembling in embedding space).
        """
        if not class_names or not templates:
            given = f"{len(class_names)} names and {len(templates)} templates"
            raise ValueError(f"A zero-shot head needs class names and templates; got {given}.")
        for template in templates:
            check_template(template)
        return open_clip.build_zero_shot_classifier(self, self.tokenize, [*class_names], [*templates], 64, self.device).T.contiguous()

    def logits(self, features: Tensor, head: Tensor) -> Tensor:
        """Class logits [B, C]: ``logit_scale`` times the cosine of image features [B, d_embed] and head rows [C, d_embed] (no bias of SigLIP's)."""
        if features.shape[-1] != head.shape[-1]:
            raise ValueError(
                f"Features have {features.shape[-1]} dimensions, rows of the head {head.shape[-1]}: take this model's own head."
            )
        return self.logit_scale * F.normalize(features, dim=-1) @ head.to(features.device).T


def check_template(template: str) -> None:
    """Refuse a prompt that doesn't say in one place where the class name goes."""
    if template.count("{}") != 1 or {*"{}"} & {*template.replace("{}", "")}:
        raise ValueError(f"A template has one '{{}}' where the class name goes, and no other brace; got {template!r}.")


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of a state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def preprocessing_fingerprint(preprocessing: str) -> str:
    """First 8 hex digits of the SHA-256 of a preprocessing's description, without what differs between two processes."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", preprocessing).encode()).hexdigest()[:8]


def other_tower(name: str, tower: str) -> ValueError:
    """The refusal of a model with another image tower than is read here."""
    return ValueError(
        f"{name!r} has a {tower} as image tower. Read are the patch tokens of vision transformers, which keep their number and width in all blocks. "
        "Choose a model such as 'ViT-B-16', 'ViT-B-16-SigLIP' (open_clip.list_models() lists all) or 'timm:vit_small_patch14_dinov2.lvd142m'."
    )
