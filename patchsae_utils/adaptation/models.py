"""Adapted models: a base that stays as it is, something learned, and the interface of a ``ClipModel``. Here those that change weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from open_clip.transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from ..clip.model import ClipModel, check_template, hash_of

TEMPLATE = "a photo of a {}."


class AdaptedClip(ClipModel):
    """A frozen CLIP (``base``, whose weights are shared and never change) and what an adapter adds to it."""

    kind: ClassVar[str]  # its name in fit_adapter and on disk
    # Attributes that, given to the class, make an adapter of the same shape: saved beside the weights.
    OPTIONS: ClassVar[tuple[str, ...]] = ("seed", "template")
    learned: Any  # a module, whose state_dict is saved
    log: Sequence[dict[str, Any]] = ()  # an entry for each epoch of fitting: epoch, lr, loss, accuracy on the training images

    def __init__(self, clip: ClipModel, *, model: nn.Module | None = None, seed: int = 1, template: str = TEMPLATE):
        if isinstance(clip, AdaptedClip):  # what it does beside its weights would be lost
            raise ValueError(f"Adapters change a CLIP as it came, and {clip!r} is adapted already: give its base, .base.")
        if not isinstance(clip.visual, VisionTransformer):
            raise ValueError(f"Adapters change open_clip's own VisionTransformer, as 'ViT-B-16' has; {clip.name!r} has a tower of timm.")
        model = clip.model if model is None else model
        super().__init__(model, clip.preprocess, clip._tokenizer, clip.name, clip.pretrained, clip.device, clip.precision)
        check_template(template)
        self.base, self.seed, self.template = clip, seed, template

    @property
    def changes_images(self) -> bool:
        """Whether the image tower differs from the base's."""
        return True

    def head_to_fit(self, class_names: Sequence[str], templates: Sequence[str]) -> Callable[[], Tensor]:
        """A function that gives the text head [C, d_embed] in each step of fitting; by default a frozen one."""
        head = self.zero_shot_head(class_names, templates)
        return lambda: head

    def untrained_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The base's head [C, d_embed] over the texts of this adapter's head."""
        return self.base.zero_shot_head(class_names, templates)

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.learned.parameters())

    @property
    def fingerprint(self) -> str:
        """The base's, and a hash of what was learned."""
        return f"{self.base.fingerprint}+{self.kind}:{hash_of(self.learned.state_dict())}"

    @property
    def weights_hash(self) -> str:
        """Hash of base and what was learned."""
        return f"{self.base.weights_hash}+{hash_of(self.learned.state_dict())}"

    def __repr__(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in self.OPTIONS if name in ("n_ctx", "depth", "rank"))
        return f"{type(self).__name__}({self.base!r}{options}, {self.n_parameters:,} parameters)"

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """The base's head over ``templates`` (default: the adapter's own template): unit rows [C, d_embed]."""
        return super().zero_shot_head(class_names, templates or [self.template])


class LoRA(AdaptedClip):
    """Low-rank changes of the queries' and values' weights in every block of the image tower: W + B A, A [rank, d], and B [d, rank] from 0.

    Parameters
    ----------
    clip : ClipModel
    rank, seed : int, the seed of A
    template : str, the text head's prompt for callers that give none

    Source: Hu et al., ICLR 2022, section 4 (their factor alpha / rank is 1).
    """

    kind = "lora"
    OPTIONS = ("rank", "seed", "template")

    def __init__(self, clip: ClipModel, rank: int = 4, *, seed: int = 1, template: str = TEMPLATE):
        super().__init__(clip, model=_twin(clip.model), seed=seed, template=template)
        if not 1 <= rank <= clip.width:
            raise ValueError(f"rank must lie between 1 and the width {clip.width} of {clip.name!r}, got {rank}.")
        self.rank = rank
        generator = Generator().manual_seed(seed)
        self.learned = nn.ModuleList(_LowRank(clip.width, rank, generator) for _ in self.blocks).to(self.device).requires_grad_(False)
        for block, change in zip(self.blocks, self.learned, strict=True):
            parametrize.register_parametrization(block.get_submodule("attn"), "in_proj_weight", change)


class _LowRank(nn.Module):
    """W [3 d, d] of queries, keys, values -> W plus the low-rank changes of queries and values."""

    def __init__(self, width: int, rank: int, generator: Generator):
        super().__init__()
        self.A = nn.Parameter(torch.empty(2, rank, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator))
        self.B = nn.Parameter(torch.zeros(2, width, rank))

    def forward(self, weight: Tensor) -> Tensor:
        queries, values = self.B @ self.A
        return weight + torch.cat([queries, torch.zeros_like(queries), values])


class FineTuned(AdaptedClip):
    """All weights of the image tower, of which it holds a copy, are learned, starting from CLIP's; the text head stays as it is.

    Parameters
    ----------
    clip : ClipModel
    seed : int, unused: nothing is drawn
    template : str, the text head's prompt for callers that give none
    """

    kind = "finetune"

    def __init__(self, clip: ClipModel, *, seed: int = 1, template: str = TEMPLATE):
        super().__init__(clip, model=_twin(clip.model, but=clip.visual), seed=seed, template=template)
        self.learned = self.visual


class LinearHead(AdaptedClip):
    """A linear classifier on frozen, unit image features, starting from the text head; other classes keep their text features.

    Parameters
    ----------
    clip : ClipModel
    class_names : sequence of str, the classes that it has rows for
    templates, template : of the text head that it starts from; ``template`` where there are no ``templates``
    seed : int, unused: nothing is drawn

    Source: Radford et al., 2021, section 3.2 (linear probe); started from the text head as in Wortsman et al., CVPR 2022.
    """

    kind = "linear"
    OPTIONS = ("class_names", "seed", "template")

    def __init__(
        self, clip: ClipModel, class_names: Sequence[str], templates: Sequence[str] | None = None, *, seed: int = 1, template: str = TEMPLATE
    ):  # fmt: skip
        super().__init__(clip, seed=seed, template=template)
        self.class_names = list(class_names)
        head = clip.zero_shot_head(self.class_names, templates or [template])
        self.learned = nn.ParameterDict({"weight": nn.Parameter(head.clone(), requires_grad=False)})

    @property
    def changes_images(self) -> bool:
        return False

    def head_to_fit(self, class_names: Sequence[str], templates: Sequence[str]) -> Callable[[], Tensor]:
        return lambda: self.learned.weight

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """The learned rows of the classes that it was fitted to, the base's text features of others: [C, d_embed]."""
        learned = self.learned.weight.detach()
        if list(class_names) == self.class_names:  # two classes may have one name
            return learned.clone()
        head = super().zero_shot_head(class_names, templates)
        for i, name in enumerate(class_names):
            if name in self.class_names:
                head[i] = learned[self.class_names.index(name)]
        return head


def _twin(model: nn.Module, but: nn.Module | None = None) -> nn.Module:
    """A copy of a model's modules that shares its tensors, all but those of one of its parts."""
    own = {id(tensor) for tensor in [*but.parameters(), *but.buffers()]} if but is not None else set()
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in own}
    return copy.deepcopy(model, shared)
