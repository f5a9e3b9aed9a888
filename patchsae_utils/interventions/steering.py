"""Steering: change single latents, everywhere or on chosen patches, and let the network finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..activations.mixing import TOKENS
from ..clip.model import ClipModel, Residual
from ..sae.dictionary import select_latents
from ..sae.model import SparseAutoencoder
from .tail import Tail, network_tail

OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scale": lambda latent, value: latent * value,
    "set": lambda latent, value: torch.full_like(latent, value),
    "add": lambda latent, value: (latent + value).clamp_min(0),
}


@dataclass(frozen=True)
class Edit:
    """A change of one latent; ValueError for an unknown operation, or a value that no activation can have."""

    latent: int
    """Which, from 0 to S - 1."""
    op: str = "scale"
    """``scale`` (multiply), ``set`` (everywhere to one value) or ``add``; activations stay at or above 0."""
    value: float = 0.0
    """Factor, level or amount; by default 0, which turns the latent off."""
    patches: Sequence[int] | Tensor | str | None = None
    """Where: None for all tokens, ``"cls"``, ``"patches"`` (all), a list of patch indices (row by row, from 0), or a bool tensor [P]."""

    def __post_init__(self):
        if self.op not in OPERATIONS:
            raise ValueError(f"Unknown operation {self.op!r}. Valid: {', '.join(OPERATIONS)}.")
        if not np.isfinite(self.value) or (self.value < 0 and self.op != "add"):
            raise ValueError(f"{self.op!r} needs a finite value that is not negative (latents are activations), got {self.value}.")

    def apply(self, latent: Tensor) -> Tensor:
        """The latent's activations [B, T] after this edit."""
        return torch.where(self.tokens(latent.shape[1]).to(latent.device), OPERATIONS[self.op](latent, self.value), latent)

    def tokens(self, n_tokens: int) -> Tensor:
        """Where it acts: bool [T]."""
        chosen = torch.zeros(n_tokens, dtype=torch.bool)
        if self.patches is None or (isinstance(self.patches, str) and self.patches in ("cls", "patches")):
            chosen[TOKENS[self.patches or "all"]] = True
            return chosen
        if isinstance(self.patches, str):
            raise ValueError(f"Unknown place {self.patches!r}. Valid: None (all tokens), 'cls', 'patches', indices, a bool tensor.")
        places = torch.as_tensor(self.patches).cpu()
        if places.dtype == torch.bool:
            if places.shape != (n_tokens - 1,):
                raise ValueError(f"A bool tensor of patches must be [{n_tokens - 1}], got {list(places.shape)}.")
            places = places.nonzero()[:, 0]
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < n_tokens - 1:
            raise ValueError(f"Patch indices must lie between 0 and {n_tokens - 2}, got {places.tolist()}.")
        chosen[1 + places.long()] = True
        return chosen


class Steered(NamedTuple):
    """What the network says before and after edits of latents."""

    features: Tensor  # [B, d_embed] image features after the edits, not normalised
    logits: Tensor | None  # [B, C]; None without a head
    logits_before: Tensor | None
    residual: Residual  # the edited residual stream
    activations: Tensor  # [B, T, n] of the n latents that were edited, in the order of their first edits
    activations_before: Tensor

    @property
    def probabilities(self) -> Tensor:
        return _probabilities(self.logits)

    @property
    def probabilities_before(self) -> Tensor:
        return _probabilities(self.logits_before)

    def moved(self, class_names: Sequence[str], image: int = 0, n: int = 5) -> pd.DataFrame:
        """The classes whose probability changed most in one image: columns class, before, after, change."""
        before, after = self.probabilities_before[image].cpu().numpy(), self.probabilities[image].cpu().numpy()
        table = pd.DataFrame({"class": list(class_names), "before": before, "after": after, "change": after - before})
        return table.iloc[np.argsort(-np.abs(after - before), kind="stable")[:n]].reset_index(drop=True)


def _probabilities(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ValueError("There are no logits: give steer() a zero-shot head (head=clip.zero_shot_head(class_names, templates)).")
    return logits.softmax(1)


@torch.no_grad()
def steer(
    clip: ClipModel, sae: SparseAutoencoder, images: Tensor | Residual, edits: Sequence[Edit], layer: int = -2, head: Tensor | None = None, *,
    known: Tensor | None = None, tail: Tail | None = None,
) -> Steered:  # fmt: skip
    """Change single latents and let the network finish; the SAE's error stays, and no edit means no change, to the bit.

    Parameters
    ----------
    clip, sae, layer
    images : Tensor [B, 3, H, W] or Residual
        Preprocessed images, or their residual stream after ``layer`` (``clip.run_to``), which saves time when many edits are tried.
    edits : sequence of Edit
        Applied in turn, e.g. ``[Edit(7), Edit(3, "scale", 2.0, [90, 91])]``: 7 off, then 3 doubled on two patches.
    head : Tensor [C, d_embed], optional, for logits and probabilities
    known : Tensor [B, T, n], optional
        Activations of the n latents that are edited, in the order of their first edits, where they were read before.
    tail : callable, optional
        What ``network_tail`` gave, where it was asked before.
    """
    for tokens in {"cls" if isinstance(edit.patches, str) and edit.patches == "cls" else "all" for edit in edits} or {"all"}:
        sae.check_model(clip, layer, tokens)
    clip.check_class_token(*(edit.patches for edit in edits))
    latents = list(dict.fromkeys(edit.latent for edit in edits))
    before = images if isinstance(images, Residual) else clip.run_to(images, layer)
    old = before.tokens[..., :0] if known is None else known.to(before.tokens)
    if latents and known is None:
        old = select_latents(sae, before.tokens, latents)
    new = old.clone()
    for edit in edits:
        column = latents.index(edit.latent)
        new[..., column] = edit.apply(new[..., column])
    after = before._replace(tokens=before.tokens + (new - old) @ sae.W_dec[latents]) if edits else before
    tail = tail or network_tail(clip, layer, before)
    features_before = tail(before)
    features = tail(after) if edits else features_before
    logits, logits_before = (None if head is None else clip.logits(value, head) for value in (features, features_before))
    return Steered(features, logits, logits_before, after, new, old)
