"""Learned prompts over any CLIP of ours: MaPLe, CoOp and VPT.

In the text they replace the first words' embeddings, in the image they travel behind the patches, handed over as ``Residual.extra``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..clip.model import ClipModel, Residual
from .models import TEMPLATE, AdaptedClip


class PromptedClip(AdaptedClip):
    """A frozen CLIP with learned prompts; subclasses say which.

    Parameters
    ----------
    clip : ClipModel
    n_ctx : int, learned context vectors in the text, prompt tokens in the image
    depth : int, optional
        Blocks, counted from the input, that get prompts of their own. Default: 9 (``CoOp``: 1), or all blocks of a smaller image tower.
    seed : int, of what is drawn at random
    template : str
        Prompt whose first ``n_ctx`` tokens are learned; where fewer stand before the class name, placeholders take their place.
    """

    OPTIONS = ("n_ctx", "depth", "seed", "template")
    default_depth: ClassVar[int] = 1

    def __init__(self, clip: ClipModel, n_ctx: int = 2, depth: int | None = None, *, seed: int = 1, template: str = TEMPLATE):
        super().__init__(clip, seed=seed, template=template)
        depth = min(self.default_depth, self.n_layers) if depth is None else depth
        if not 1 <= depth <= self.n_layers:
            raise ValueError(f"{clip.name!r} has {self.n_layers} image blocks, so depth must be 1 to {self.n_layers}; got {depth}.")
        if n_ctx < 1:
            raise ValueError(f"n_ctx must be 1 or more, got {n_ctx}.")
        self.n_ctx, self.depth = n_ctx, depth
        start, _, end = template.partition("{}")
        tokens = clip.tokenize(start.strip())[0]
        self._from_words = n_ctx <= int((tokens != 0).sum()) - 2  # without the tokens of start and end
        self.learned = self._make_prompts(Generator().manual_seed(seed)).to(self.device).requires_grad_(False)
        if self.text_prompts() and not self._from_words:
            self.template = " ".join(["X"] * n_ctx) + " {}" + end
            if n_ctx > len(tokens) - 3:
                raise ValueError(f"n_ctx={n_ctx} leaves no room for a class name: {clip.name!r} reads texts of {len(tokens)} tokens.")

    def _make_prompts(self, generator: Generator) -> nn.Module:
        """The module of what is learned."""
        raise NotImplementedError

    def text_prompts(self) -> list[Tensor]:
        """[n_ctx, d_text] for each text block, from the first on, that gets its own; empty: the text tower is the base's."""
        return []

    def visual_prompts(self) -> list[Tensor]:
        """[n_ctx, d] for each image block, from the first on, that gets its own; empty: the image tower is the base's."""
        return []

    @property
    def changes_images(self) -> bool:
        return bool(self.visual_prompts())

    def tail_inputs(self, layer: int) -> tuple[ClipModel, Tensor | None]:
        """Prompts of the last block are constants behind the base's tokens there."""
        prompts = self.visual_prompts()
        if self.layer_index(layer) != self.n_layers - 2 or len(prompts) < self.n_layers:
            return self, None
        return self.base, prompts[-1].detach()

    def finish(self, residual: Residual | Tensor, layer: int) -> Tensor:
        """As of the base; an error where image prompts are missing that the next blocks need."""
        residual = self._here(residual)
        start, expected = self.layer_index(layer) + 1, self.n_ctx if self.visual_prompts() else 0
        given = 0 if residual.extra is None else residual.extra.shape[1]
        # A block with prompts of its own, or the end of the tower, makes those of the blocks before it unnecessary.
        if given != expected and (given or len(self.visual_prompts()) <= start < self.n_layers):
            raise ValueError(
                f"{type(self).__name__} carries {expected} prompt tokens after layer {layer}; this residual has {given}. "
                f"Edit what run_to gave and hand it on: finish(run_to(images, {layer})._replace(tokens=...), {layer})."
            )
        x = residual.tokens if residual.extra is None else torch.cat([residual.tokens, residual.extra], 1)
        with self._arithmetic():
            x = self._run_blocks(x, start, self.n_layers)
            return self._features(x[:, : self.n_tokens]).float()

    def _run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        visual_prompts = self.visual_prompts()
        for i in range(start, stop):
            if i < len(visual_prompts):
                prompt = visual_prompts[i]
                # The first ones pass ln_pre, as the patches did; those of later blocks enter the stream as they are.
                prompt = self.visual.ln_pre(prompt) if i == 0 else prompt
                x = torch.cat([x[:, : self.n_tokens], prompt.to(x.dtype).expand(len(x), -1, -1)], 1)
            x = super()._run_blocks(x, i, i + 1)
        return x

    def head(self, tokens: Tensor) -> Tensor:
        """Text features of :meth:`class_tokens` through the learned prompts: unit rows [C, d_embed], differentiable."""
        prompts, text = self.text_prompts(), text_tower(self.model)

        def replace(x: Tensor, prompt: Tensor, dim: int) -> Tensor:
            start, here, stop = x.split([1, self.n_ctx, x.shape[dim] - 1 - self.n_ctx], dim)
            return torch.cat([start, prompt.to(x.dtype).unsqueeze(1 - dim).expand_as(here), stop], dim)

        with ExitStack() as hooks:  # they replace what stands at positions 1 to n_ctx
            hooks.enter_context(text.token_embedding.register_forward_hook(lambda module, args, out: replace(out, prompts[0], 1)))
            dim = 1 if text.transformer.batch_first else 0
            for block, prompt in zip(list(text.transformer.resblocks)[1:], prompts[1:], strict=False):  # towers may differ in depth
                change = lambda module, args, p=prompt: (replace(args[0], p, dim), *args[1:])  # noqa: E731
                hooks.enter_context(block.register_forward_pre_hook(change))
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def class_tokens(self, class_names: Sequence[str]) -> Tensor:
        """Token ids of the template, filled with each name: LongTensor [C, context]."""
        return self.tokenize([self.template.format(name.replace("_", " ")) for name in class_names])

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Unit rows [C, d_embed] from the learned text prompts, or, without any, the base's head over ``templates``."""
        if not self.text_prompts():
            return super().zero_shot_head(class_names, templates)
        with torch.no_grad():
            return torch.cat([self.head(self.class_tokens(class_names[i : i + 256])) for i in range(0, len(class_names), 256)])

    def untrained_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The base's head, over the one template whose words were learned where any were."""
        return super().untrained_head(class_names, [self.template] if self.text_prompts() else templates)

    def head_to_fit(self, class_names: Sequence[str], templates: Sequence[str]) -> Callable[[], Tensor]:
        if not self.text_prompts():
            return super().head_to_fit(class_names, templates)
        tokens = self.class_tokens(class_names)
        return lambda: self.head(tokens)

    def _initial_context(self, generator: Generator) -> Tensor:
        """[n_ctx, d_text]: embeddings of the template's first words, or random ones where it has too few."""
        text = text_tower(self.model)
        if self._from_words:
            return text.token_embedding(self.tokenize(self.template.format("X")))[0, 1 : 1 + self.n_ctx].detach().float().cpu().clone()
        return torch.randn(self.n_ctx, text.token_embedding.weight.shape[1], generator=generator) * 0.02


class MaPLe(PromptedClip):
    """Multi-modal prompt learning: text prompts, and image prompts that are linear functions of them, new in each block up to ``depth``.

    Source: Khattak et al., CVPR 2023, section 3.
    """

    kind = "maple"
    default_depth = 9

    def _make_prompts(self, generator: Generator) -> nn.Module:
        ctx = self._initial_context(generator)
        deep = [nn.Parameter(torch.randn(ctx.shape, generator=generator) * 0.02) for _ in range(self.depth - 1)]
        maps = [_linear(ctx.shape[1], self.width, generator) for _ in range(self.depth)]
        # The names are those of the official checkpoints.
        prompts = nn.Module()
        prompts.ctx = nn.Parameter(ctx)
        prompts.proj = maps[0]
        prompts.compound_prompts_text = nn.ParameterList(deep)
        prompts.compound_prompt_projections = nn.ModuleList(maps[1:])
        return prompts

    def text_prompts(self) -> list[Tensor]:
        return [self.learned.ctx, *self.learned.compound_prompts_text]

    def visual_prompts(self) -> list[Tensor]:
        maps = [self.learned.proj, *self.learned.compound_prompt_projections]
        return [linear(prompt) for linear, prompt in zip(maps, self.text_prompts(), strict=True)]


class CoOp(PromptedClip):
    """Context optimisation: the first ``n_ctx`` word embeddings are learned; the image tower stays as it is.

    Source: Zhou et al., IJCV 2022 (context shared by all classes, class name at the end).
    """

    kind = "coop"

    def _make_prompts(self, generator: Generator) -> nn.Module:
        return nn.ParameterDict({"ctx": nn.Parameter(self._initial_context(generator))})

    def text_prompts(self) -> list[Tensor]:
        return [self.learned.ctx]


class VisualPrompt(PromptedClip):
    """Visual prompt tuning, deep: image tokens learned for each block, behind the patches; the text head stays as it is.

    Source: Jia et al., ECCV 2022 (VPT-deep), with its uniform initial values.
    """

    kind = "vpt"
    default_depth = 9

    def _make_prompts(self, generator: Generator) -> nn.Module:
        patch = self.visual.conv1.weight[0].numel()
        bound = math.sqrt(6 / (patch + self.width))
        tokens = torch.empty(self.depth, self.n_ctx, self.width).uniform_(-bound, bound, generator=generator)
        return nn.ParameterDict({"tokens": nn.Parameter(tokens)})

    def visual_prompts(self) -> list[Tensor]:
        return list(self.learned.tokens)


def text_tower(model: nn.Module) -> Any:
    """The module that holds token_embedding and transformer: the model itself, or its ``text``."""
    text = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    if not (hasattr(text, "token_embedding") and hasattr(getattr(text, "transformer", None), "resblocks")):
        raise ValueError(f"Text prompts need open_clip's own text transformer; that of this {type(model).__name__} is another.")
    return text


def _linear(d_in: int, d_out: int, generator: Generator) -> nn.Linear:
    """A Linear with torch's usual initial values, from a generator."""
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    return layer
