"""Features read off the residual stream: an SAE's latents, and dictionaries they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .formats.weights import STATISTICS
from .model import SparseAutoencoder

_CHUNK_BYTES = 256 * 2**20
_CONTROL_PAIRS = 2**24  # (token, latent) pairs by which a random SAE's threshold is set


class Dictionary(NamedTuple):
    """Features read off the residual stream: an SAE's latents, or something to compare them with."""

    name: str
    n: int  # of features
    encode: Callable[[Tensor, np.ndarray | None], Tensor]  # (tokens [N, D], features [m] or None for all) -> activations [N, m]


def sae_dictionary(sae: SparseAutoencoder, name: str = "SAE") -> Dictionary:
    """An SAE's latents as a dictionary, in the units of its training: of tokens of unit size, where it was trained on those.

    Parameters
    ----------
    sae : SparseAutoencoder
    name : str, how tables and figures call it
    """

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        x = x.to(sae.W_enc.device)
        latents = sae.encode(x) if columns is None else select_latents(sae, x, torch.as_tensor(columns))
        return latents / sae.sizes(x) if sae.reads_unit_tokens else latents

    return Dictionary(name, sae.d_sae, encode)


def dimensions(d_in: int) -> Dictionary:
    """The residual stream's own dimensions, both signs of each: 2 d_in features."""

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        columns = np.arange(2 * d_in) if columns is None else np.asarray(columns)
        return x[:, columns % d_in] * torch.from_numpy(np.where(columns < d_in, 1.0, -1.0)).to(x)

    return Dictionary("single dimensions", 2 * d_in, encode)


@torch.no_grad()
def random_sae(sae: SparseAutoencoder, tokens: Tensor) -> SparseAutoencoder:
    """The random control of an SAE: same size, variant and centre ``b_dec``, tied random directions at unit norm.

    Parameters
    ----------
    sae : SparseAutoencoder
    tokens : Tensor [N, D]
        Of the residual stream: one threshold leaves as many latents active as the SAE has, one gain makes the reconstruction the best in
        least squares.
    """
    options = {name: getattr(sae, name) for name in sae.variant.options}
    control = SparseAutoencoder(sae.d_in, sae.d_sae, sae.activation, **options, metadata=sae.metadata)
    directions = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    control.W_dec.copy_(directions)
    control.W_enc.copy_(directions.T)
    control.token_norm = sae.token_norm
    for name in ("b_dec", *STATISTICS):
        getattr(control, name).copy_(getattr(sae, name))
    control = control.to(sae.W_enc.device).requires_grad_(False).eval()
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"Sparsity is measured on tokens [N, D], got {list(tokens.shape)}.")
    most = max(64, _CONTROL_PAIRS // sae.d_sae)
    some = tokens[:: -(-len(tokens) // most)].to(sae.W_enc.device)
    if sae.variant.control != "k":
        values, n_active = control.pre_activations(some).flatten(), sum(int((sae.encode(part) > 0).sum()) for part in some.split(512))
        # what so many of them exceed: between the last that is kept and the first that isn't
        ranks = {len(values) - n_active + 1, max(1, len(values) - n_active)}
        threshold = torch.stack([values.kthvalue(rank).values for rank in ranks]).mean() if n_active else values.max().clamp_min(0)
        if sae.variant.control == "bias":
            control.b_enc.fill_(-threshold)  # of ``gated``: the gate's; magnitudes stay the projections themselves
        else:
            control.threshold.fill_(threshold.clamp_min(0))
    guess = control.encode(some) @ control.W_dec
    gain = ((some - control.b_dec) * guess).sum() / guess.square().sum()
    for scaled in (control.W_enc, control.b_enc, control.threshold):
        if scaled is not None and gain.isfinite() and gain > 0:
            scaled.mul_(gain)
    return control


def numbers_of(sae: SparseAutoencoder, latents: Tensor | Sequence[int]) -> Tensor:
    """Latents as a LongTensor; refuses what is no latent."""
    given = torch.as_tensor(latents)
    if given.dtype == torch.bool:
        raise ValueError("Latents are given by their numbers, not by a mask: mask.nonzero().flatten().")
    numbers = given.long()
    if len(wrong := given[(numbers < 0) | (numbers >= sae.d_sae) | (numbers != given)]):
        raise ValueError(f"There is no latent {wrong[0].item()}: latents must lie in range({sae.d_sae}).")
    return numbers


def select_latents(sae: SparseAutoencoder, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
    """Activations of some latents alone, in chunks: [..., d_in] -> [..., n]; top-k must compute all of them."""
    latents = numbers_of(sae, latents).to(sae.W_enc.device)
    flat = x.to(sae.W_enc.device).reshape(-1, x.shape[-1])
    width = sae.d_sae if sae.variant.competes == "token" else max(len(latents), flat.shape[1])
    step = max(1, _CHUNK_BYTES // (4 * width))
    parts = [sae.encode(part, latents) for part in flat.split(step)] if len(flat) else [flat.new_zeros(0, len(latents))]
    return torch.cat(parts).view(*x.shape[:-1], len(latents))
