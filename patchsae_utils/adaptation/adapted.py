"""What every adapted model has: a base that stays as it is, something learned, and the interface of :class:`~patchsae_utils.clip.ClipModel`.

The adapters themselves are in :mod:`patchsae_utils.adaptation.prompts` (MaPLe, CoOp, VPT) and :mod:`patchsae_utils.adaptation.weight_adapters` (LoRA, full fine-tuning,
a linear head); fitting and loading in :mod:`patchsae_utils.adaptation.adapters`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..clip.model import ClipModel
from ..config import AdapterConfig

TEMPLATE = "a photo of a {}."


class AdaptedClip(ClipModel):
    """A frozen CLIP and what an adapter adds to it.

    Parameters
    ----------
    clip : ClipModel
        The base. Its weights are shared where the adapter leaves them as they are, and never change.
    model : open_clip.CLIP, optional
        A model of the same shape to run instead of the base's own, for adapters that change weights.
    seed : int
        Of initial values.
    template : str
        Prompt of the text head, for callers that give none.

    Raises
    ------
    ValueError
        If the template has no ``{}``.
    """

    kind: ClassVar[str]
    """Its name in ``fit_adapter`` and on disk."""
    OPTIONS: ClassVar[tuple[str, ...]] = ("seed", "template")
    """Attributes that, given to the class, make an adapter of the same shape: saved beside the weights."""
    learned: Any
    """What is learned; ``learned.state_dict()`` is what is saved."""
    log: Sequence[dict[str, Any]] = ()
    """One entry an epoch of fitting: epoch, lr, loss, accuracy on the training images."""

    def __init__(self, clip: ClipModel, *, model: nn.Module | None = None, seed: int = 1, template: str = TEMPLATE):
        super().__init__(
            clip.model if model is None else model, clip.preprocess, clip._tokenizer, clip.name, clip.pretrained, clip.device, clip.precision
        )  # fmt: skip
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no '{{}}' where the class name goes.")
        self.base, self.seed, self.template = clip, seed, template

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @classmethod
    def for_fitting(
        cls, clip: ClipModel, config: AdapterConfig, class_names: Sequence[str], templates: Sequence[str], seed: int
    ) -> AdaptedClip:
        """An adapter before its first step, for a configuration and a task's classes."""
        return cls(clip, seed=seed, template=config.template)

    @property
    def changes_images(self) -> bool:
        """Whether the image tower differs from the base's; if not, its features are computed once."""
        return True

    def head_to_fit(self, class_names: Sequence[str], templates: Sequence[str]) -> Callable[[], Tensor]:
        """A function that gives the text head [C, d_embed] in each step of fitting; by default a frozen one, computed once."""
        head = self.zero_shot_head(class_names, templates)
        return lambda: head

    # -- what all have ------------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """What, with the base and the learned weights, makes this adapter again."""
        return {name: getattr(self, name) for name in self.OPTIONS}

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.learned.parameters())

    @property
    def fingerprint(self) -> str:
        """The base's, and a hash of what was learned."""
        return f"{self.base.fingerprint}+{self.kind}:{_hash(self.learned.state_dict())}"

    @property
    def weights_hash(self) -> str:
        """Hash of base and what was learned."""
        return f"{self.base.weights_hash}+{_hash(self.learned.state_dict())}"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in ("n_ctx", "depth", "rank") if hasattr(self, name))
        return f"{type(self).__name__}({self.base!r}, {shown + ', ' if shown else ''}{self.n_parameters:,} parameters)"

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """The base's head over ``templates`` (default: the adapter's own template): unit rows [C, d_embed]."""
        return super().zero_shot_head(class_names, templates or [self.template])


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
