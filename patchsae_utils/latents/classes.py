"""Which latents are characteristic of a class: the one definition, by counts of active tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .summary import LatentSummary

RANKS = ("count", "specific", "share")


def class_scores(counts: LatentSummary | Tensor, rank: str = "share") -> Tensor:
    """How high each latent stands for each class, [C, S]; positive where it may be called the class's own. Classes count as equally frequent.

    Parameters
    ----------
    counts : LatentSummary, or Tensor [C, S]
        Of the train split; or active tokens for each image of a class.
    rank : {"share", "specific", "count"}
        "share" multiplies the activation on the class by the class's share of all activation: a latent that answers to every class scores low
        however active it is, and so does one that is faint or rare on its own class. Of a summary its unit is activation: the mean of tokens
        above tau, summed over an image of the class, times a share in [0, 1]. "specific" is the class's count less the mean over classes,
        "count" the count itself (a_c of Lim et al., ICLR 2025, section 3, for each image).
    """
    if rank not in RANKS:
        raise ValueError(f"Unknown rank {rank!r}. Valid: {', '.join(RANKS)}.")
    if isinstance(counts, Tensor):
        rate, strength = counts, 1.0
    else:
        rate = counts.class_counts.double() / counts.class_images.double().clamp_min(1)[:, None]
        # Activation of the tokens above tau, averaged: what the summary knows of the latent's strength.
        strength = counts.mean_activation.double() * counts.frequency.double() / counts.dataset_counts.clamp_min(1)
    if rank == "count":
        return rate
    if rank == "specific":
        return rate - rate.mean(0)
    return rate * rate / rate.sum(0).clamp_min(torch.finfo(rate.dtype).tiny) * strength


def top_latents(scores: Tensor, k: int = 10) -> list[list[int]]:
    """The latents of highest score for each row, best first; equal scores keep the latents' order.

    Parameters
    ----------
    scores : Tensor [C, S]
        See :func:`class_scores`. Only positive ones count: a latent that is silent on a class is none of its own.
    k : int
        At most so many latents.
    """
    best = scores.sort(dim=1, descending=True, stable=True)
    positive = (best.values[:, :k] > 0).sum(1).tolist()
    return [order[:n].tolist() for order, n in zip(best.indices, positive, strict=True)]
