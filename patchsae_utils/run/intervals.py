"""Percentile bootstraps: how far a number would move had other images been drawn.

What is resampled is what is independent: whole images (or scenes, concepts, latents), never single tokens of one image. Each function
takes a ``seed`` and resamples nothing but what it was given. The interval holds the middle ``level`` of the resampled statistics.

Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979); percentile intervals: Efron and
Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

_ENTRIES = 10_000_000  # of a piece of resamples [pieces, n]: bounds memory


class Interval(NamedTuple):
    """A mean with its 95 % interval; prints as "1.23 [1.10, 1.36]"."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float, float]]:
    """Estimates and percentile intervals of statistics that are functions of sums over images.

    Parameters
    ----------
    sums : float array [N, m]
        What each image adds.
    statistic : callable
        (totals [..., m], number of images [...]) -> mapping of name to array [...].
    n_resamples, seed : int
    level : float

    Returns
    -------
    dict
        Name -> (value, low, high).

    Raises
    ------
    ValueError
        If there are no images.
    """
    n = len(sums)
    if n == 0:
        raise ValueError("There is nothing to resample: sums holds no images.")
    value = statistic(sums.sum(0), np.array(n))
    draws = statistic(np.concatenate([drawn @ sums for drawn in _multiplicities(n, n_resamples, seed)]), np.full(n_resamples, n))
    tail = 100 * (1 - level) / 2
    ends = {name: np.percentile(draws[name], [tail, 100 - tail]) for name in value}
    return {name: (float(value[name]), float(ends[name][0]), float(ends[name][1])) for name in value}


def bootstrap_mean(values, n_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis with a percentile bootstrap interval; rows share the resamples.

    Parameters
    ----------
    values : array [..., N]
        One value an image (or scene, or concept): what is resampled.
    n_resamples : int
    seed : int
    level : float
        Coverage of the interval.

    Returns
    -------
    mean, low, high : arrays [...]

    Raises
    ------
    ValueError
        If there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.shape[-1]
    if n == 0:
        raise ValueError("There is nothing to resample: the last axis is empty.")
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    means = values @ weights.T
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return values.mean(-1), low, high


def bootstrap_share(
    hits: np.ndarray | Tensor,
    images: np.ndarray | Tensor | None = None,
    *,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Share of hits with a percentile bootstrap interval over images.

    Parameters
    ----------
    hits : bool array [n]
    images : int array [n], optional
        Image of each hit or miss. Tokens of one image are no independent evidence, so whole images are resampled; default: one each.
    n_bootstrap : int
    level : float
    seed : int

    Returns
    -------
    share, low, high : float
        NaN where there is nothing to count.
    """
    hits = np.asarray(hits, float)
    if not len(hits):
        return (float("nan"),) * 3
    _, groups = np.unique(np.arange(len(hits)) if images is None else np.asarray(images), return_inverse=True)
    sums, counts = np.bincount(groups, hits), np.bincount(groups)
    shares = np.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in _multiplicities(len(sums), n_bootstrap, seed)])
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(hits.mean()), float(low), float(high)


def resampled_means(values: np.ndarray, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Mean of some values in each resample of them: [n_resamples], for statistics of several such means."""
    return _counts(len(values), n_resamples, seed) @ values / len(values)


@lru_cache(maxsize=8)  # statistics of the same pictures share their resamples
def _counts(n: int, n_resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)


def mean_interval(values: Iterable[float], n_bootstrap: int = 1000, seed: int = 0) -> Interval:
    """Mean of some values, with a percentile bootstrap over them.

    Raises
    ------
    ValueError
        If there are none.
    """
    values = np.asarray(list(values), np.float64)
    if not len(values):
        raise ValueError("A mean needs at least one value, got none.")
    rng, n = np.random.default_rng(seed), len(values)
    draws = np.concatenate([values[rng.integers(n, size=(size, n))].mean(1) for size in _pieces(n_bootstrap, n)])
    return Interval(float(values.mean()), *(float(v) for v in np.percentile(draws, [2.5, 97.5])))


def centred_interval(draws: np.ndarray, value: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resamples, moved so that their mean lies at the value.

    Average precision and IoU of concepts that few images show are lower in the mean of their resamples, where fewer images carry the
    weight, than in the data; left as they are, percentiles may exclude the value itself. The difference is the bootstrap's estimate of that
    bias (Efron and Tibshirani, 1993, chapter 10).
    """
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [tail, 100 - tail]) + value - np.nanmean(draws)
    return float(low), float(high)


def _multiplicities(n: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n images is drawn in each resample, int [resamples, n]; some resamples at a time."""
    rng, even = np.random.default_rng(seed), np.full(n, 1 / n)
    for size in _pieces(n_resamples, n):
        yield rng.multinomial(n, even, size=size)


def _pieces(n_resamples: int, n: int) -> Iterator[int]:
    """Sizes that add up to the resamples, each of about ``_ENTRIES`` numbers."""
    step = max(1, _ENTRIES // n)
    for start in range(0, n_resamples, step):
        yield min(step, n_resamples - start)
