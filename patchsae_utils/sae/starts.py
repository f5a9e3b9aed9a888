"""Where training starts, and in which units, and what the decoder may become. Letters: N tokens of any images, D d_in, S d_sae."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import SparseAutoencoder

_DATA_RATE = 0.01  # share of tokens on which a latent fires that starts at a direction of the data
_PASSES = (4,) * 6 + (1,) * 3  # of k-means: over every fourth of the directions first, then over all
_CHUNK = 1 << 25  # (token, centroid) pairs compared at once
SOFT_COSINE = 0.8  # how near a soft-frozen decoder's rows stay to their start: the sanity checks of arXiv 2602.14111
ARCHETYPE_RELAXATION = 0.1  # delta: how far an archetypal row may lie from the hull, before unit norm: arXiv 2502.12892, section 4


class Normalization(NamedTuple):
    """Units in which an SAE is trained: (x - mean) / scale, by data set or token by token; tokens then have mean square 1 per dimension."""

    kind: str  # none, mean, mean_and_norm or token_norm
    mean: Tensor  # [D]
    norm: Tensor  # [] root mean square of ||x - mean||

    @classmethod
    def of(cls, x: Tensor, kind: str) -> Normalization:
        """That of tokens [N, D]."""
        if kind == "none":
            return cls(kind, torch.zeros(x.shape[1], device=x.device), torch.zeros((), device=x.device))
        tokens = x.double()
        mean = tokens.mean(0)
        norm = (tokens - mean).square().sum(1).mean().sqrt()
        if len(tokens) < 2 or not norm.isfinite() or not norm > 0:
            spread = f"got {len(tokens)} of spread {norm.item():g}"
            raise ValueError(f"normalize={kind!r} needs at least two finite tokens that differ, {spread}.")
        return cls(kind, mean.float(), norm.float())

    @property
    def scale(self) -> Tensor | float:
        """What all tokens are divided by."""
        return self.norm / len(self.mean) ** 0.5 if self.kind == "mean_and_norm" else 1.0

    def apply(self, x: Tensor) -> Tensor:
        """Tokens [N, D] in these units."""
        if self.kind == "none":
            return x
        centred = x - self.mean
        if self.kind == "token_norm":
            return centred / centred.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) * len(self.mean) ** 0.5
        return centred / self.scale

    @torch.no_grad()
    def fold(self, sae: SparseAutoencoder) -> None:
        """From an SAE of normalised tokens to one of tokens as they are, in place: latents and reconstructions change their units alone."""
        self._rescale(sae, self.scale)
        sae.b_dec.add_(self.mean)
        # Where latents of a scaled token are the scaled latents, the weights say it.
        sae.token_norm = self.kind == "token_norm" and (sae.variant.competes != "token" or bool(sae.b_enc.any()))
        if self.kind != "none":
            sae.input_mean.copy_(self.mean)
            sae.input_norm.copy_(self.norm)

    @torch.no_grad()
    def unfold(self, sae: SparseAutoencoder) -> None:
        """The inverse of :meth:`fold`, for weights that were trained before."""
        sae.b_dec.sub_(self.mean)
        self._rescale(sae, 1 / self.scale)
        sae.token_norm = False

    @staticmethod
    def _rescale(sae: SparseAutoencoder, factor: Tensor | float) -> None:
        for name in ("b_dec", "b_enc", "b_mag", "threshold"):
            if isinstance(value := getattr(sae, name, None), Tensor):
                value.mul_(factor)


def geometric_median(x: Tensor) -> Tensor:
    """The point [D] with the least sum of distances to all tokens [N, D], by Weiszfeld's iteration (1937) in float64."""
    points = x.double()
    median = points.mean(0)
    for _ in range(200):
        distance = (points - median).norm(dim=1)
        weight = 1 / distance.clamp_min(1e-12)
        before, median = median, (weight @ points) / weight.sum()
        if (median - before).norm() <= 1e-6 * distance.mean():
            break
    return median.to(x.dtype)


@torch.no_grad()
def start_bias(sae: SparseAutoencoder, x: Tensor, kind: str = "median") -> None:
    """Move a ``b_dec`` that is 0 still to the geometric ``median`` of tokens [N, D] (the paper's) or their ``mean``; ``zero``: no move."""
    if kind != "zero" and not sae.b_dec.any():
        sae.b_dec.copy_(geometric_median(x) if kind == "median" else x.double().mean(0))


@torch.no_grad()
def centroids(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """Spherical k-means of directions [N, D]: n unit centroids, from as many of the directions; one that gets none moves to the worst fitted."""
    x = F.normalize(x, dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    rows = x[order[:n]].clone()
    for every in _PASSES:
        some = x[::every] if len(x) >= every * n else x
        found = [(part @ rows.T).max(1) for part in some.split(max(1, _CHUNK // n))]
        cosine, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        sums = torch.zeros_like(rows).index_add_(0, nearest, some)
        empty = torch.bincount(nearest, minlength=n) == 0
        sums[empty] = some[cosine.topk(int(empty.sum()), largest=False).indices]
        rows = F.normalize(sums, dim=1)
    return rows


@torch.no_grad()
def start_from(sae: SparseAutoencoder, directions: Tensor, x: Tensor) -> None:
    """Start latent i at direction i of [S, D], as seen from ``b_dec``: decoder row and encoder column are parallel to it.

    A latent fires on 1% of the tokens ``x`` [N, D], by its encoder bias or threshold; among ``k`` without a bias. One gain fits the sizes.
    """
    sae.W_dec.copy_(directions)
    sae.normalize_decoder()
    sae.W_enc.copy_(sae.W_dec.T)
    centred = x - sae.b_dec
    projections = centred @ sae.W_dec.T
    if sae.k is not None:
        latents = torch.relu(projections)
        latents = torch.where(latents >= latents.topk(sae.k, 1).values[:, -1:], latents, 0)
    else:
        levels = projections.kthvalue(max(1, int(len(projections) * (1 - _DATA_RATE))), dim=0).values
        if sae.variant.threshold == "each":
            sae.threshold.copy_(levels.clamp_min(sae.bandwidth))
            latents = torch.where(projections > sae.threshold, projections, 0)
        else:
            sae.b_enc.copy_(-levels)
            latents = torch.relu(projections - levels)
    guess = latents @ sae.W_dec
    gain = (centred * guess).sum() / guess.square().sum().clamp_min(torch.finfo(guess.dtype).tiny)
    for each in [sae.W_enc, sae.b_enc] + [sae.threshold] * (sae.variant.threshold == "each"):
        each.mul_(gain)
    if sae.variant.gate:  # magnitudes start as the gate's pre-activations, as a ReLU's
        sae.b_mag.copy_(sae.b_enc)


class Archetypes(nn.Module):
    """Decoder rows that stay near the data: unit(A C + Lambda), A row-stochastic over centroids C [n, D], each row of Lambda at most delta long.

    Row i starts at centroid i. Source: Fel et al., "Archetypal SAE", 2025 (arXiv 2502.12892), section 4, with unit norms for its scale.
    """

    points: Tensor

    def __init__(self, points: Tensor):
        super().__init__()
        self.register_buffer("points", points)
        # its own centroid gets 98% of a row's weight at first
        self.weights = nn.Parameter((math.log(len(points)) + 4) * torch.eye(len(points), dtype=points.dtype, device=points.device))
        self.relaxation = nn.Parameter(torch.zeros_like(points))

    def forward(self) -> Tensor:
        """[S, D] unit rows, differentiable."""
        size = self.relaxation.norm(dim=1, keepdim=True)
        bounded = self.relaxation * (ARCHETYPE_RELAXATION / size.clamp_min(ARCHETYPE_RELAXATION))
        return F.normalize(torch.softmax(self.weights, 1) @ self.points + bounded, dim=1)
