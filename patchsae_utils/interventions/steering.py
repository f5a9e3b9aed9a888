"""Steering: change single latents, everywhere or on chosen patches, and let the network finish.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..sae.dictionary import select_latents
from .tail import PLACES, check_models, decoder_of, network_tail

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scale": lambda latent, value: latent * value,
    "set": lambda latent, value: torch.full_like(latent, value),
    "add": lambda latent, value: (latent + value).clamp_min(0),
}
EXCHANGES = ("swap", "transplant")
"""Operations that bring activations in from elsewhere; ``value`` multiplies what arrives, by default 1."""


@dataclass(frozen=True)
class Edit:
    """A change of one latent, or of two that change places."""

    latent: int
    """Which, from 0 to S - 1."""
    op: str = "scale"
    """``scale`` (multiply), ``set`` (everywhere to one value), ``add``, ``swap`` (exchange activations with the latent ``other``) or
    ``transplant`` (take the activations that ``source`` has at the same tokens); activations never fall below 0."""
    value: float | None = None
    """Factor, level or amount; for ``swap`` and ``transplant`` a factor on what arrives. Default: 0, which turns the latent off, and 1 for
    these two."""
    patches: Sequence[int] | Tensor | str | None = None
    """Where: None for all tokens, ``"cls"``, ``"patches"`` (all of them), a list of patch indices (row by row, from 0), or a bool tensor
    [P] or [B, P]. CLS is changed only by None and ``"cls"``."""
    other: int | None = None
    """The latent that ``swap`` exchanges with."""
    source: int | Residual | Tensor | None = None
    """Where ``transplant`` takes from: an image of the same batch (its index), the residual stream of one image or of B images
    (``clip.run_to``), or activations of this latent [T] or [B, T]. They are those before any edit."""

    def __post_init__(self):
        if self.op not in (*OPERATIONS, *EXCHANGES):
            raise ValueError(f"Unknown operation {self.op!r}. Valid: {', '.join((*OPERATIONS, *EXCHANGES))}.")
        if self.value is None:
            object.__setattr__(self, "value", float(self.op in EXCHANGES))
        if not np.isfinite(self.value) or (self.value < 0 and self.op != "add"):
            raise ValueError(f"{self.op!r} needs a finite value that is not negative (latents are activations), got {self.value}.")
        for name, op, what in (("other", "swap", "the latent to exchange with"), ("source", "transplant", "where to take from")):
            if (getattr(self, name) is not None) != (self.op == op):
                raise ValueError(
                    f"{name}= ({what}) belongs to op={op!r} and is needed there; got {name}={getattr(self, name)} with {self.op!r}."
                )
        if self.op == "swap" and self.other == self.latent:
            raise ValueError(f"A swap needs two latents; got {self.latent} twice.")

    @property
    def latents(self) -> tuple[int, ...]:
        """The latents that change."""
        return (self.latent,) if self.other is None else (self.latent, self.other)

    def apply(self, latent: Tensor, arrives: Tensor | None = None) -> Tensor:
        """The latent's activations [B, T] after this edit; ``arrives`` [B, T] is what ``swap`` and ``transplant`` bring."""
        n_images, n_tokens = latent.shape
        changed = arrives * self.value if self.op in EXCHANGES else OPERATIONS[self.op](latent, self.value)
        return torch.where(self.tokens(n_images, n_tokens).to(latent.device), changed, latent)

    def tokens(self, n_images: int, n_tokens: int) -> Tensor:
        """Where it acts: bool [1 or B, T]."""
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

    def transplanted(self, sae: SparseAutoencoder, untouched: Tensor) -> Tensor:
        """What ``source`` brings, [B, T], given this latent's untouched activations [B, T] in the images at hand."""
        n_images, n_tokens = untouched.shape
        if isinstance(self.source, int):
            if not 0 <= self.source < n_images:
                raise ValueError(f"There is no image {self.source} to take from; the batch has images 0 to {n_images - 1}.")
            return untouched[self.source].expand(n_images, -1)
        taken = sae.encode(self.source.tokens)[..., self.latent] if isinstance(self.source, Residual) else torch.as_tensor(self.source)
        taken = taken.to(untouched)
        if taken.shape[-1:] != (n_tokens,) or taken.ndim > 2 or (taken.ndim == 2 and len(taken) not in (1, n_images)):
            raise ValueError(
                f"A transplant's source must hold [{n_tokens}] activations, or [{n_images}, {n_tokens}] of one image each; got {list(taken.shape)}."
            )
        if not bool((taken >= 0).all()):
            raise ValueError(
                "A transplant's source must hold activations: finite and not negative. Take them behind the SAE's nonlinearity."
            )
        return taken.expand(n_images, -1)


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
    latents: tuple[int, ...] = ()
    """[n] the latents that were edited."""
    activations_before: Tensor | None = None
    """[B, T, n] theirs before."""
    activations: Tensor | None = None
    """[B, T, n] and after the edits."""

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

    def edited(self, image: int = 0) -> pd.DataFrame:
        """What became of the edited latents in one image: columns latent, before, after (summed over tokens), tokens (how many changed)."""
        before, after = (part[image].cpu() for part in (self.activations_before, self.activations))
        return pd.DataFrame(
            {
                "latent": list(self.latents),
                "before": before.sum(0).tolist(),
                "after": after.sum(0).tolist(),
                "tokens": (before != after).sum(0).tolist(),
            }
        )

    @staticmethod
    def _logits(logits: Tensor | None) -> Tensor:
        if logits is None:
            raise ValueError("There are no logits: give steer() a zero-shot head (head=clip.zero_shot_head(class_names, templates)).")
        return logits


@torch.no_grad()
def steer(
    clip: ClipModel,
    sae: SparseAutoencoder,
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
        If a latent, patch or image to take from doesn't exist.

    Examples
    --------
    Latent 7 off; 3 doubled on two patches; 5 and 9 exchanged on all patches; 4 as it is in image 1 of the batch:

    >>> edits = [Edit(7), Edit(3, "scale", 2.0, [90, 91]), Edit(5, "swap", other=9, patches="patches"), Edit(4, "transplant", source=1)]
    """
    check_models(clip, sae, layer)
    columns = {latent: i for i, latent in enumerate(dict.fromkeys(latent for edit in edits for latent in edit.latents))}
    for latent in columns:
        if not 0 <= latent < sae.d_sae:
            raise ValueError(f"There is no latent {latent}; the SAE has latents 0 to {sae.d_sae - 1}.")
    before = images if isinstance(images, Residual) else clip.run_to(images, layer)
    if keep_error:  # the other latents stay what they are, whatever that is
        old = select_latents(sae, before.tokens, list(columns)) if columns else before.tokens[..., :0]
    else:
        h = sae.encode(before.tokens)
        before, old = before._replace(tokens=sae.decode(h)), h[..., list(columns)]
    new = old.clone()
    for edit in edits:
        first = columns[edit.latent]
        if edit.op == "swap":
            second = columns[edit.other]
            here, there = new[..., first].clone(), new[..., second].clone()
            new[..., first], new[..., second] = edit.apply(here, there), edit.apply(there, here)
        else:
            arrives = edit.transplanted(sae, old[..., first]) if edit.op == "transplant" else None
            new[..., first] = edit.apply(new[..., first], arrives)
    after = before._replace(tokens=before.tokens + (new - old) @ decoder_of(sae).rows[list(columns)]) if edits else before
    tail = network_tail(clip, layer, before)
    features_before = tail(before)
    features = tail(after) if edits else features_before
    logits, logits_before = (None if head is None else clip.logits(value, head) for value in (features, features_before))
    return Steered(features, features_before, logits, logits_before, after, tuple(columns), old, new)
