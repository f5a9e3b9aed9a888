"""Vision transformers of timm: alone (DINOv2 and its kin, which have no text tower), or as image tower of a CLIP (SigLIP, EVA, PE, MobileCLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .model import ClipModel, Residual, other_tower


class TimmModel(ClipModel):
    """As :class:`ClipModel`, of any transformer of timm that is an embedding, ``blocks``, ``norm`` and ``forward_head``, as one picture shows.

    Tokens between CLS and the patches (registers, a distillation token) travel as ``Residual.extra``.
    """

    _batch_first = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._watch()

    @staticmethod
    def _check(model: Any, name: str) -> None:
        trunk = _trunk(model)
        parts = ("blocks", "patch_embed", "norm", "num_prefix_tokens", "forward_features", "forward_head")
        if not all(hasattr(trunk, part) for part in parts) or not hasattr(trunk.patch_embed, "grid_size"):
            raise other_tower(name, type(trunk).__name__)

    @torch.no_grad()
    def _watch(self) -> None:
        """Note what blocks are given beside the tokens (rotary positions, a shared bias), and check that the parts are the whole."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        self._given: list[tuple[tuple, dict]] = []

        def note(_: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
            inputs.append(args[0])
            outputs.append(output)
            self._given.append((args[1:], kwargs))

        handles = [block.register_forward_hook(note, with_kwargs=True) for block in self.blocks]
        try:
            whole = self.visual(torch.rand(1, 3, *self.image_size, device=self.device))
        finally:
            for handle in handles:
                handle.remove()
        n_tokens = self.trunk.num_prefix_tokens + self.n_tokens - 1
        if (
            [x.shape for x in inputs] != self.n_layers * [(1, n_tokens, self.width)]
            or any(x is not before for x, before in zip(inputs[1:], outputs, strict=False))
            or not torch.allclose(self._features(outputs[-1]), whole, rtol=1e-4, atol=1e-5)
        ):
            raise other_tower(self.name, type(self.trunk).__name__)
        self.d_embed = whole.shape[-1]

    def _measure(self) -> None:
        trunk = self.trunk
        self.width, self.grid, self.image_size = trunk.embed_dim, tuple(trunk.patch_embed.grid_size), tuple(trunk.patch_embed.img_size)
        self.has_class_token = getattr(trunk, "cls_token", None) is not None

    def put_sequence_first(self) -> None:
        """timm's attention reads [B, T, d]."""

    @property
    def trunk(self) -> Any:
        return _trunk(self.model)

    @property
    def visual(self) -> Any:
        return self.model.visual if self.has_text else self.model

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        return self.trunk.blocks

    def _first_tokens(self, images: Tensor) -> Tensor:
        def stop(_: Any, args: tuple) -> None:
            raise _Reached(args[0])

        handle = self.blocks[0].register_forward_pre_hook(stop)
        try:
            self.trunk.forward_features(images)
        except _Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise RuntimeError(f"{self.name!r} did not reach its first block.")

    def _run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block, (args, kwargs) in list(zip(self.blocks, self._given, strict=True))[start:stop]:
            x = block(x, *args, **kwargs)
        return x

    def _split(self, x: Tensor) -> Residual:
        prefix, patches = x.tensor_split([self.trunk.num_prefix_tokens], dim=1)
        cls, extra = prefix.tensor_split([1], dim=1) if self.has_class_token else (patches.mean(1, keepdim=True), prefix)
        return Residual(torch.cat([cls, patches], dim=1), extra if extra.shape[1] else None)

    def _joined(self, residual: Residual) -> Tensor:
        tokens, extra = residual
        if (n_extra := self.trunk.num_prefix_tokens - self.has_class_token) and extra is None:
            remedy = "give finish() the Residual of run_to(), with its tokens replaced"
            raise ValueError(f"{self.name!r} has {n_extra} register tokens: {remedy}.")
        cls, patches = tokens.tensor_split([1], dim=1)
        return torch.cat([*([cls] if self.has_class_token else []), *([] if extra is None else [extra]), patches], dim=1)

    def _features(self, x: Tensor) -> Tensor:
        features = self.trunk.forward_head(self.trunk.norm(x))
        return self.visual.head(features) if self.has_text else features


def clip_of(model: Any, *arguments: Any, **options: Any) -> ClipModel:
    """A network, with or without text, as the :class:`ClipModel` that reads its image tower; further arguments are the latter's."""
    kind = TimmModel if hasattr(getattr(model, "visual", None), "trunk") or not hasattr(model, "visual") else ClipModel
    return kind(model, *arguments, **options)


class _Reached(Exception):
    """The first block was reached, with these tokens."""


def _trunk(model: Any) -> Any:
    return model.visual.trunk if hasattr(model, "encode_text") else model
