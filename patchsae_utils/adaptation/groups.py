"""Top latents of each class in two models: sorted by what adaptation did to them, and how far the two rankings agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..latents.classes import class_scores, top_latents

GROUPS = ("high", "high-to-low", "low-to-high")
OVERLAPS = ("jaccard", "rbo")
TOP_K = 10
LOW = 0.5  # a latent must fall below so much of its count to leave *high*; the paper states no threshold, this one is ours
PERSISTENCE = 0.9  # p: the chance that a reader who has seen one more place reads on


def ranked_latents(counts: Tensor, top_k: int = TOP_K, rank: str = "count") -> list[list[int]]:
    """Each class's top latents, best first, from class-level counts [C, S] per picture; ``rank`` as for :func:`class_scores`."""
    return top_latents(class_scores(counts, rank), top_k)


def top_of_either(base: Tensor, adapted: Tensor, top_k: int = TOP_K, rank: str = "count") -> Tensor:
    """Which latents are among a class's top ones in one of the models: bool [C, S]."""
    chosen = torch.zeros_like(base, dtype=torch.bool)
    for counts in (base, adapted):
        for row, latents in zip(chosen, ranked_latents(counts, top_k, rank), strict=True):
            row[latents] = True
    return chosen


def latent_groups(base: Tensor, adapted: Tensor, *, top_k: int = TOP_K, rank: str = "count", members: Tensor | None = None) -> pd.DataFrame:
    """Top latents of a class in either model (or ``members``, bool [C, S]) from counts [C, S]: class, latent, base, adapted, group.

    *high-to-low* where the adapted count is below ``LOW`` times CLIP's, *low-to-high* the reverse, else *high*. Source: Lim et al., Table
    1, Fig. 7.
    """
    members = top_of_either(base, adapted, top_k, rank) if members is None else members
    classes, latents = members.nonzero(as_tuple=True)
    before, after = base[members].numpy(), adapted[members].numpy()
    group = np.select([after < LOW * before, before < LOW * after], GROUPS[1:], GROUPS[0])
    return pd.DataFrame({"class": classes.numpy(), "latent": latents.numpy(), "base": before, "adapted": after, "group": group})


def count_groups(base: Tensor, adapted: Tensor, *, top_k: int = TOP_K, rank: str = "count", members: Tensor | None = None) -> pd.DataFrame:
    """:func:`latent_groups` counted, one row a class: class, ``GROUPS``; jaccard and rbo of the top latents (NaN: neither has any)."""
    table = latent_groups(base, adapted, top_k=top_k, rank=rank, members=members)
    counts = pd.crosstab(table["class"], table["group"]).reindex(index=range(len(base)), columns=list(GROUPS), fill_value=0)
    shared = overlaps(ranked_latents(base, top_k, rank), ranked_latents(adapted, top_k, rank))
    return pd.DataFrame({"class": range(len(base)), **{name: counts[name].to_numpy() for name in GROUPS}, **shared})


def overlaps(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> pd.DataFrame:
    """How far rankings agree, pair by pair: columns jaccard, rbo; NaN where both of a pair are empty."""
    records = []
    for a, b in zip(first, second, strict=True):
        union = len({*a, *b})
        records.append({"jaccard": len({*a} & {*b}) / union if union else float("nan"), "rbo": rank_biased_overlap(a, b)})
    return pd.DataFrame(records, columns=list(OVERLAPS))


def rank_biased_overlap(first: Sequence[Hashable], second: Sequence[Hashable], p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of two rankings without repeats, best first, of lengths s <= l; 0 if one is empty, NaN if both are.

    With X_d the number of items that both have among their first d (of the shorter one at most s)::

        RBO = (1-p)/p [ sum_{d=1..l} X_d/d p^d  +  sum_{d=s+1..l} X_s (d-s)/(s d) p^d ]  +  [ (X_l - X_s)/l + X_s/s ] p^l

    Source: Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, equation 32.
    """
    short, long = sorted((first, second), key=len)
    if not len(short):
        return 0.0 if len(long) else float("nan")
    s = len(short)
    seen: tuple[set, set] = (set(), set())
    common, at_short, total = 0, 0, 0.0
    for d, item in enumerate(long, 1):
        other = short[d - 1 : d]
        seen[0].update(other)
        seen[1].add(item)
        # New in common: the long list's item, the short one's, which may be the same.
        common += len({item, *other} & seen[0] & seen[1])
        at_short = common if d <= s else at_short
        total += (common + at_short * max(d - s, 0) / s) / d * p**d
    return (1 - p) / p * total + ((common - at_short) / len(long) + at_short / s) * p ** len(long)
