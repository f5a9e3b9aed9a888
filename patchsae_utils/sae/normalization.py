"""Statistics of an SAE's input: centring and scaling that no reader of the SAE notices, and the refusal of activations that don't fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sources import described

if TYPE_CHECKING:
    from .model import SparseAutoencoder

NORMALIZATIONS = ("none", "mean", "mean_and_norm")
_MISFIT = 2.0  # activations whose spread differs by more than this factor, or whose mean lies a whole spread away, don't fit


@torch.no_grad()
def set_normalization(sae: SparseAutoencoder, x: Tensor, kind: str = "mean_and_norm") -> None:
    """Train as if on (x - mean) / scale, with latents, weights and reconstructions still in the residual stream's own units.

    An autoencoder of the normalised input is an autoencoder of the input itself: with rows of unit norm, latents scale * h,
    b_dec = mean + scale * b_dec', b_enc = scale * b_enc', thresholds likewise, the same ``W_enc`` and ``W_dec``. That folded form is
    the one that is kept here, so nobody who encodes, decodes, edits or exports has to know. What changes is where training starts
    (``b_dec`` at the mean, if it was 0) and the units of the objective: losses divide by the scale, so that lambda and the bandwidth
    mean the same for every model and layer. (An optimiser's steps of ``b_enc`` and ``b_dec`` are in the residual stream's units, too.)

    Parameters
    ----------
    sae : SparseAutoencoder
        Fresh. Changed in place.
    x : Tensor [N, D]
        A few thousand tokens, of the types the SAE will read.
    kind : {"none", "mean", "mean_and_norm"}
        ``mean``: centring alone, scale 1. ``mean_and_norm``: the scale makes a centred token's mean square 1 per dimension.

    Raises
    ------
    ValueError
        If ``kind`` is unknown, or ``x`` holds fewer than two tokens, is not finite, or does not vary.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalization {kind!r}. Valid: {', '.join(NORMALIZATIONS)}.")
    if kind == "none":
        return
    sae.check_width(x)
    tokens = x.reshape(-1, sae.d_in).double()
    mean = tokens.mean(0)
    norm = (tokens - mean).square().sum(1).mean().sqrt()
    if len(tokens) < 2 or not norm.isfinite() or not norm > 0:
        raise ValueError(f"set_normalization needs at least two finite tokens that differ, got {len(tokens)} of spread {norm.item():g}.")
    before = sae.input_scale.clone()
    sae.input_mean.copy_(mean)
    sae.input_norm.copy_(norm)
    sae.input_scale.copy_(norm / sae.d_in**0.5 if kind == "mean_and_norm" else torch.ones(()))
    if sae.threshold is not None:
        sae.threshold.mul_(sae.input_scale / before)
    if not sae.b_dec.any():
        sae.b_dec.copy_(mean)


@torch.no_grad()
def check_statistics(sae: SparseAutoencoder, x: Tensor, source: str = "these activations") -> None:
    """Refuse activations that can't be of the kind :func:`set_normalization` saw; without it nothing is known, and all pass.

    Their root mean square distance from ``input_mean`` must be within a factor of 2 of what it was, and their mean within it.

    Parameters
    ----------
    sae : SparseAutoencoder
    x : Tensor [N, D]
        A few hundred tokens at least, of the types and in the proportion of training.
    source : str
        How the message calls them.

    Raises
    ------
    ValueError
        Naming both sides and what to do.
    """
    sae.check_width(x)
    if not sae.input_norm:
        return
    centred = x.reshape(-1, sae.d_in).double() - sae.input_mean.double()
    norm, shift = centred.square().sum(1).mean().sqrt().item(), centred.mean(0).norm().item()
    expected = sae.input_norm.item()
    if expected / _MISFIT <= norm <= expected * _MISFIT and shift <= expected:
        return
    own_name, own_layer = sae.metadata.get("model_name"), sae.metadata.get("layer")
    raise ValueError(
        f"The SAE was trained on activations {expected:.3g} away from their mean (root mean square){described(own_name, own_layer)}; "
        f"{source} are {norm:.3g} away from that mean, and their own mean {shift:.3g}. "
        f"Give residual activations of the model, layer and token types it was trained on, not scaled or centred, or train an SAE on these."
    )
