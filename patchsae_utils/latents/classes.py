"""Which latents are characteristic of a class: the one definition, by counts of active tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .summary import LatentSummary

RANKS = ("count", "specific", "share")


def class_scores(counts: LatentSummary | Tensor, rank: str = "share") -> Tensor:
    """How high each latent stands for each class, [C, S]; positive where it may be called the class's own. Classes weigh alike.

    Parameters
    ----------
    counts : LatentSummary, or Tensor [C, S]
        Of the train split; or active tokens for each image of a class.
    rank : {"share", "specific", "count"}
        "share" multiplies the activation on the class (of a summary: of tokens above tau, summed over an image) by the class's share of all
        activation, so that a latent that answers to every class scores low. "specific" is the count less the mean over classes, "count" the
        count itself (a_c of Lim et al., ICLR 2025, section 3, for each image).
    """
    if rank not in RANKS:
        raise ValueError(f"Unknown rank {rank!r}. Valid: {', '.join(RANKS)}.")
    if isinstance(counts, Tensor):
        rate, strength = counts, 1.0
    else:
        rate = counts.class_counts.double() / counts.class_images.double().clamp_min(1)[:, None]
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
    scores, k : Tensor [C, S], see :func:`class_scores`, of which only positive ones count; and int
    """
    best = scores.sort(dim=1, descending=True, stable=True)
    return [order[:k][values[:k] > 0].tolist() for values, order in zip(*best, strict=True)]
