"""Steering: change single latents, everywhere or on chosen patches, and let the network finish.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .clip import ClipModel, Residual
from .interventions import PLACES, check_models

OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scale": lambda latent, value: latent * value,
    "set": lambda latent, value: torch.full_like(latent, value),
    "add": lambda latent, value: (latent + value).clamp_min(0),
}


@dataclass(frozen=True)
class Edit:
    """A change of one latent."""

    latent: int
    """Which, from 0 to S - 1."""
    op: str = "scale"
    """``scale`` (multiply), ``set`` (everywhere to one value) or ``add``; activations never fall below 0."""
    value: float = 0.0
    """Factor, level or amount. The default turns the latent off."""
    patches: Sequence[int] | Tensor | str | None = None
    """Where: None for all tokens, ``"cls"``, ``"patches"`` (all of them), a list of patch indices (row by row, from 0), or a bool tensor
    [P] or [B, P]. CLS is changed only by None and ``"cls"``."""

    def __post_init__(self):
        if self.op not in OPERATIONS:
            raise ValueError(f"Unknown operation {self.op!r}. Valid: {', '.join(OPERATIONS)}.")
        if not np.isfinite(self.value) or (self.value < 0 and self.op != "add"):
            raise ValueError(f"{self.op!r} needs a finite value that is not negative (latents are activations), got {self.value}.")

    def apply(self, latent: Tensor) -> Tensor:
        """The latent's activations [B, T] after this edit."""
        n_images, n_tokens = latent.shape
        return torch.where(self._tokens(n_images, n_tokens).to(latent.device), OPERATIONS[self.op](latent, self.value), latent)

    def _tokens(self, n_images: int, n_tokens: int) -> Tensor:
        chosen = torch.zeros(1, n_tokens, dtype=torch.bool)
        if self.patches is None:
            return ~chosen
        if isinstance(self.patches, str):
            if self.patches not in ("cls", "patches"):
                raise ValueError(
                    f"Unknown place {self.patches!r}. Valid: None (all tokens), 'cls', 'patches', a list of patch indices, a bool tensor."
                )
            chosen[:, PLACES[self.patches]] = True
            return chosen
        places = torch.as_tensor(self.patches).cpu()
        if places.dtype == torch.bool:
            if places.ndim > 2 or places.shape[-1] != n_tokens - 1 or (places.ndim == 2 and len(places) not in (1, n_images)):
                raise ValueError(
                    f"A bool tensor of patches must be [{n_tokens - 1}] or [{n_images}, {n_tokens - 1}], got {list(places.shape)}."
                )
            places = places.reshape(-1, n_tokens - 1)
            return torch.cat([torch.zeros(len(places), 1, dtype=torch.bool), places], 1)
        if places.numel() and not (0 <= int(places.min()) and int(places.max()) < n_tokens - 1):
            raise ValueError(f"Patch indices must lie between 0 and {n_tokens - 2}, got {places.tolist()}.")
        chosen[:, 1 + places.long()] = True
        return chosen


class Steered(NamedTuple):
    """What the network says before and after edits of latents."""

    features: Tensor
    """[B, d_embed] image features after the edits, not normalised."""
    features_before: Tensor
    """[B, d_embed] without them: of the raw residual stream, or of its reconstruction when the error term is dropped."""
    logits: Tensor | None
    """[B, C]; None without a head."""
    logits_before: Tensor | None
    residual: Residual
    """The edited residual stream."""

    @property
    def probabilities(self) -> Tensor:
        """[B, C] softmax of the logits after the edits."""
        return self._logits(self.logits).softmax(1)

    @property
    def probabilities_before(self) -> Tensor:
        """[B, C]"""
        return self._logits(self.logits_before).softmax(1)

    def moved(self, class_names: Sequence[str], image: int = 0, n: int = 5) -> pd.DataFrame:
        """The classes whose probability changed most in one image: columns class, before, after, change."""
        before, after = self.probabilities_before[image].cpu().numpy(), self.probabilities[image].cpu().numpy()
        order = np.argsort(-np.abs(after - before), kind="stable")[:n]
        return pd.DataFrame(
            {"class": [class_names[i] for i in order], "before": before[order], "after": after[order], "change": (after - before)[order]}
        )

    @staticmethod
    def _logits(logits: Tensor | None) -> Tensor:
        if logits is None:
            raise ValueError("There are no logits: give steer() a zero-shot head (head=clip.zero_shot_head(class_names, templates)).")
        return logits


@torch.no_grad()
def steer(
    clip: ClipModel,
    sae: nn.Module,
    images: Tensor | Residual,
    edits: Sequence[Edit],
    layer: int = -2,
    head: Tensor | None = None,
    keep_error: bool = True,
) -> Steered:
    """Change single latents and let the network finish.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its extra prompt tokens pass unchanged.
    sae : SparseAutoencoder
    images : Tensor [B, 3, H, W] or Residual
        Preprocessed images, or their residual stream after ``layer`` (``clip.run_to``), which saves the time when many edits are tried.
    edits : sequence of Edit
        Applied in turn; later ones see what earlier ones did.
    layer : int
        The block whose output the SAE reads.
    head : Tensor [C, d_embed], optional
        For logits and probabilities.
    keep_error : bool
        Add the change of the latents to the residual stream itself (then no edit means no change, to the bit), or to its reconstruction.

    Returns
    -------
    Steered

    Raises
    ------
    ValueError
        If a latent or patch doesn't exist.
    """
    check_models(clip, sae, layer)
    for edit in edits:
        if not 0 <= edit.latent < sae.d_sae:
            raise ValueError(f"There is no latent {edit.latent}; the SAE has latents 0 to {sae.d_sae - 1}.")
    before = images if isinstance(images, Residual) else clip.run_to(images, layer)
    z = before.tokens
    columns = {latent: i for i, latent in enumerate(dict.fromkeys(edit.latent for edit in edits))}
    h = sae.encode(z)
    if not keep_error:
        before = before._replace(tokens=sae.decode(h))
    old = h[..., list(columns)]
    new = old.clone()
    for edit in edits:
        new[..., columns[edit.latent]] = edit.apply(new[..., columns[edit.latent]])
    after = before._replace(tokens=before.tokens + (new - old) @ sae.W_dec[list(columns)]) if edits else before
    features, features_before = clip.finish(after, layer), clip.finish(before, layer)
    logits = [None if head is None else clip.logits(value, head) for value in (features, features_before)]
    return Steered(features, features_before, *logits, after)
