"""Vision transformers without a text tower, through timm: DINOv2 and its kin, with the interface of :class:`~patchsae_utils.clip.ClipModel`.

What needs only images works on them: activations, SAEs, statistics, reference images, masks on the grid. What needs class names in words
(zero-shot heads, mask sweeps, prompts, names from a vocabulary) raises :class:`NoText`, which says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .model import ClipModel, Residual


class NoText(ValueError):
    """A stage needs a text tower, and the model has none."""


class TimmModel(ClipModel):
    """As :class:`ClipModel`, of timm's VisionTransformer with a class token. Register tokens travel as ``Residual.extra``, and are not read."""

    has_text = False

    def __init__(self, model: torch.nn.Module, preprocess: Callable, name: str, pretrained: str | None = None, **where: Any):
        super().__init__(model, preprocess, None, name, pretrained, **where)

    def _check(self, model: torch.nn.Module, name: str) -> None:
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer) or model.cls_token is None or model.pos_embed is None:
            raise ValueError(
                f"{name!r} is a {type(model).__name__} without what is read here: timm's VisionTransformer with a class token and learned "
                "positions, such as 'timm:vit_small_patch14_dinov2.lvd142m'."
            )

    def put_sequence_first(self) -> None:
        """timm's attention reads [B, T, d]."""

    _batch_first = True

    @property
    def visual(self) -> torch.nn.Module:
        return self.model

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        return self.model.blocks

    @property
    def width(self) -> int:
        return self.model.embed_dim

    @property
    def d_embed(self) -> int:
        return self.model.num_features

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.grid_size)

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.img_size)

    def _first_tokens(self, images: Tensor) -> Tensor:
        return self.model.norm_pre(self.model.patch_drop(self.model._pos_embed(self.model.patch_embed(images))))

    def _split(self, x: Tensor) -> Residual:
        n = self.model.num_prefix_tokens
        return Residual(torch.cat([x[:, :1], x[:, n:]], dim=1), x[:, 1:n] if n > 1 else None)

    def _joined(self, residual: Residual) -> Tensor:
        tokens, extra = residual
        n = self.model.num_prefix_tokens
        if n > 1 and extra is None:
            raise ValueError(
                f"{self.name!r} has {n - 1} register tokens: give finish() the Residual of run_to(), with its tokens replaced."
            )
        return tokens if extra is None else torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1)

    def _features(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(x), pre_logits=True)

    def _no_text(self, *_: Any, **__: Any) -> NoReturn:
        raise NoText(
            f"{self.name!r} has no text tower. Extraction, training, statistics and masks work without; zero-shot accuracy, mask sweeps and prompts "
            "need a CLIP."
        )

    tokenize = encode_text = zero_shot_head = _no_text
    logit_scale = property(_no_text)
