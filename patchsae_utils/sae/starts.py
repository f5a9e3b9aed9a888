"""Where training starts from: biases and directions taken from the data."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import geometric_median
from .model import SparseAutoencoder


@torch.no_grad()
def start_bias(sae: SparseAutoencoder, x: Tensor, kind: str = "median") -> None:
    """Move a fresh ``b_dec``, one that is 0 still, to the middle of the data.

    Parameters
    ----------
    sae : SparseAutoencoder
        Changed in place.
    x : Tensor [N, D]
        A batch of tokens.
    kind : {"median", "mean", "zero"}
        The geometric median (the paper's), the mean, or no move at all.
    """
    if kind != "zero" and not sae.b_dec.any():
        sae.b_dec.copy_(geometric_median(x) if kind == "median" else x.double().mean(0))


@torch.no_grad()
def start_from_data(sae: SparseAutoencoder, x: Tensor, rate: float = 0.01) -> None:
    """Start every latent at a token, instead of at random: k-means is started from data points for the same reason (Forgy, 1965).

    ``b_dec`` is the geometric median of the tokens; decoder row i points from there to token i; encoder column i is parallel to it, with the
    bias at which the latent fires on the share ``rate`` of the tokens; one common gain, the least-squares one, fits the sizes. From random
    weights half of all latents fire on every token, the L1 term silences most before they have found anything to stand for, and
    what is rare (here: each single object) is left to a few.

    Parameters
    ----------
    sae : SparseAutoencoder
        Changed in place.
    x : Tensor [N, D]
        At least as many tokens as latents, of many images.
    rate : float
        Share of tokens on which a latent fires at first.

    Raises
    ------
    ValueError
        If there are fewer tokens than latents.
    """
    x = x.to(sae.W_dec)
    if len(x) < sae.d_sae:
        raise ValueError(
            f"start='data' needs a token for each of the {sae.d_sae} latents; got {len(x)}. Extract more images, or use start='random'."
        )
    sae.b_dec.copy_(geometric_median(x[:4096]))
    sae.W_dec.copy_(x[: sae.d_sae] - sae.b_dec)
    sae.normalize_decoder()
    centred = x[-4096:] - sae.b_dec
    projections = centred @ sae.W_dec.T
    thresholds = projections.kthvalue(max(1, int(len(projections) * (1 - rate))), dim=0).values
    guess = torch.relu(projections - thresholds) @ sae.W_dec
    gain = (centred * guess).sum() / guess.square().sum().clamp_min(torch.finfo(guess.dtype).tiny)
    sae.W_enc.copy_(gain * sae.W_dec.T)
    sae.b_enc.copy_(-gain * thresholds)
    if sae.activation == "gated":  # magnitudes start as the gate's pre-activations: what training starts from is then the ReLU's
        sae.b_mag.copy_(sae.b_enc)
