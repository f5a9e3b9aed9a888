"""Features read off the residual stream: an SAE's latents, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .model import SparseAutoencoder

_CHUNK_BYTES = 256 * 2**20


class Dictionary(NamedTuple):
    """Features read off the residual stream: an SAE's latents, or something to compare them with."""

    name: str
    n: int
    """Number of features."""
    encode: Callable[[Tensor, np.ndarray | None], Tensor]
    """(tokens [N, D], features [m] or None for all) -> activations [N, m]."""


def sae_dictionary(sae: SparseAutoencoder, name: str = "SAE") -> Dictionary:
    """An SAE's latents."""
    return Dictionary(
        name,
        sae.d_sae,
        lambda x, columns: sae.encode(x.to(sae.W_enc.device)) if columns is None else select_latents(sae, x, torch.as_tensor(columns)),
    )


def dimensions(d_in: int, name: str = "single dimensions") -> Dictionary:
    """The residual stream's own dimensions, both signs of each: 2 d_in features."""

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        columns = np.arange(2 * d_in) if columns is None else np.asarray(columns)
        return x[:, columns % d_in] * torch.from_numpy(np.where(columns < d_in, 1.0, -1.0)).to(x)

    return Dictionary(name, 2 * d_in, encode)


NEEDS_NO_THRESHOLD = ("relu", "topk")
"""Activations of which :func:`random_sae` makes a control without seeing tokens."""


def random_sae(sae: SparseAutoencoder, seed: int = 0, tokens: Tensor | None = None) -> SparseAutoencoder:
    """An SAE of the same size with random directions: normal, at unit norm, tied, around the same centre ``b_dec``.

    Parameters
    ----------
    sae : SparseAutoencoder
    seed : int
        Of the directions.
    tokens : Tensor [N, D], optional
        Some of the residual stream. With them the control is as sparse as the SAE: one threshold for all its latents leaves as many active
        on these tokens. ``topk`` is as sparse by itself. Without them ``relu`` has no encoder bias, so that half of its latents are active on
        a token: nothing of their ranking is lost.

    Raises
    ------
    ValueError
        If the SAE's activation has a threshold or a gate (``batchtopk``, ``matryoshka``, ``jumprelu``, ``gated``), which random directions
        can't inherit, and there are no tokens to set one by.
    """
    if tokens is None and sae.activation not in NEEDS_NO_THRESHOLD:
        raise ValueError(
            f"A random SAE of activation {sae.activation!r} needs a threshold of its own: give tokens [N, {sae.d_in}] of the residual stream, "
            f"on which it will be as sparse as the SAE."
        )
    control = SparseAutoencoder(
        sae.d_in, sae.d_sae, sae.activation, k=sae.k, groups=sae.groups, bandwidth=sae.bandwidth, seed=seed, metadata=sae.metadata
    )
    directions = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    with torch.no_grad():
        control.W_dec.copy_(directions)
        control.W_enc.copy_(directions.T)
        control.b_dec.copy_(sae.b_dec)
    control = control.to(sae.W_enc.device).requires_grad_(False)
    if tokens is not None and sae.activation != "topk":
        _as_sparse(control, sae, tokens)
    return control


@torch.no_grad()
def _as_sparse(control: SparseAutoencoder, sae: SparseAutoencoder, tokens: Tensor) -> None:
    """Set one threshold for all latents of a control, so that as many are active on some tokens [N, D] as are of the SAE's."""
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"Sparsity is measured on tokens [N, D], got {list(tokens.shape)}.")
    most = min(2048, max(64, 2**24 // sae.d_sae))
    some = tokens[:: -(-len(tokens) // most)].to(sae.W_enc.device)
    n_active = int((sae.encode(some) > 0).sum())
    values = control.pre_activations(some).flatten()
    # The threshold lies between the last value that is kept and the first that isn't; it never lets negative values through.
    kept = values.sort(descending=True).values[max(n_active - 1, 0) : n_active + 1]
    threshold = kept.mean().clamp_min(0) if n_active else values.max().clamp_min(0)
    if sae.activation in ("relu", "gated"):
        control.b_enc.fill_(-threshold)  # of ``gated``: the gate's; magnitudes stay the projections themselves
    else:
        control.threshold.fill_(threshold)


def select_latents(sae, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
    """Activations of some latents: [..., d_in] -> [..., n].

    The other columns of the encoder are not computed, except where an activation compares latents (top-k). Works in chunks.
    """
    latents = torch.as_tensor(latents, dtype=torch.long, device=sae.W_enc.device)
    flat = x.to(sae.W_enc.device).reshape(-1, x.shape[-1])
    width = sae.W_enc.shape[1] if sae.activation == "topk" else max(len(latents), flat.shape[1])
    step = max(1, _CHUNK_BYTES // (4 * width))
    parts = [sae.encode(part, latents) for part in flat.split(step)] if len(flat) else [flat.new_zeros(0, len(latents))]
    return torch.cat(parts).view(*x.shape[:-1], len(latents))
