"""How far two rankings agree, where the first places matter most: rank-biased overlap beside Jaccard's.

Jaccard's index of two top-k sets counts the tenth place as much as the first, and a latent that falls from place 10 to 11 as if it had vanished. Rank-biased
overlap reads both lists from the top: at depth d the agreement is the share of the first d places that they have in common, and depths count
with weights (1 - p) p^(d - 1). With p = 0.9 the first ten places carry 86 % of the weight.

Source: Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, section 4.4.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pandas as pd

PERSISTENCE = 0.9
"""p: the chance that a reader who has seen one more place reads on."""


def rank_biased_overlap(first: Sequence[Hashable], second: Sequence[Hashable], p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of two rankings, which may differ in length.

    With s and l the lengths of the shorter and the longer list, and X_d the number of items that both have among their first d (all s of the shorter
    one, where d > s)::

        RBO = (1-p)/p [ sum_{d=1..l} X_d/d p^d  +  sum_{d=s+1..l} X_s (d-s)/(s d) p^d ]  +  [ (X_l - X_s)/l + X_s/s ] p^l

    It is the infinite sum of weighted agreements, if the agreement beyond the end of a list is what it was at the end. 1 for identical
    rankings, 0 for disjoint ones.

    Parameters
    ----------
    first, second : sequence
        Best first; no item twice.
    p : float
        Between 0 and 1: the higher, the deeper the lists are read.

    Returns
    -------
    float
        In [0, 1]; NaN if both are empty, 0 if one is.

    Raises
    ------
    ValueError
        If p is not between 0 and 1, or an item occurs twice in one ranking.

    Source: Webber et al. 2010, equation 32 (equation 30 for lists of one length).
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie between 0 and 1, got {p}.")
    for ranking in (first, second):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"A ranking names each item once, got {list(ranking)}.")
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


def overlaps(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], p: float = PERSISTENCE) -> pd.DataFrame:
    """How far rankings agree, pair by pair: columns jaccard, rbo; NaN where both of a pair are empty.

    Raises
    ------
    ValueError
        If there are not as many of one as of the other; else as :func:`rank_biased_overlap`.
    """
    if len(first) != len(second):
        raise ValueError(f"Rankings are compared pair by pair; got {len(first)} and {len(second)} of them.")
    records = []
    for a, b in zip(first, second, strict=True):
        union = len({*a, *b})
        jaccard = len({*a} & {*b}) / union if union else float("nan")
        records.append({"jaccard": jaccard, "rbo": rank_biased_overlap(a, b, p)})
    return pd.DataFrame(records, columns=["jaccard", "rbo"])
