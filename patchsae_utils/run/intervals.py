"""Percentile bootstraps: how far a number would move had other images been drawn; resampled is what is independent, named by ``unit``.

Source: Efron, Annals of Statistics 7 (1979); Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

_ENTRIES = 10_000_000  # of a piece of resamples [pieces, n]: bounds memory
N_RESAMPLES = 1000


class Interval(NamedTuple):
    """A number, its 95% interval, and what was resampled; prints as "1.23 [1.10, 1.36]". Numbers are floats, or arrays of one shape."""

    value: Any
    low: Any
    high: Any
    unit: str = "images"

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def percent(value: float, low: float, high: float, digits: int = 0) -> str:
    """A share with its interval in words: "85% [83, 88]"."""
    return f"{100 * value:.{digits}f}% [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def interval(statistic: Callable[[np.ndarray], np.ndarray], n: int, unit: str, *, seed: int = 0, centred: bool = False) -> Interval:
    """A statistic of n units (at least one) with its percentile interval; NaN where the statistic is.

    ``statistic`` takes weights [R, n], how often each unit counts in each of R resamples, and returns [R, ...]; weights of one give the value.
    Statistics with the same n and seed see the same resamples. ``centred`` moves the interval so that the resamples' mean lies at the value:
    average precision and IoU of concepts that few images show are lower in resamples, and percentiles may exclude the value itself. The
    difference is the bootstrap's estimate of that bias (Efron and Tibshirani, 1993, chapter 10).
    """
    if n == 0:
        raise ValueError(f"There is nothing to resample: no {unit}.")
    value = np.asarray(statistic(np.ones((1, n))), np.float64)[0]
    draws = np.concatenate([np.asarray(statistic(weights), np.float64) for weights in resamples(n, seed=seed)])
    return drawn_interval(value, draws, unit, centred=centred)


def drawn_interval(value: Any, draws: np.ndarray, unit: str, *, centred: bool = False) -> Interval:
    """The interval of a statistic of which the values [R, ...] in all :func:`resamples` are at hand; see :func:`interval`."""
    value, bare = np.asarray(value, np.float64), np.isnan(draws).all(0)
    draws = np.where(bare, 0.0, draws)
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    if centred:
        shift = value - np.nanmean(draws, axis=0)
        low, high = low + shift, high + shift
    low, high = (np.where(bare, np.nan, end) for end in (low, high))
    value, low, high = (float(one) if value.ndim == 0 else one for one in (value, low, high))
    return Interval(value, low, high, unit)


def mean_interval(values: Iterable[float] | np.ndarray | Tensor, unit: str = "images", *, groups: Any = None, seed: int = 0) -> Interval:
    """Mean over the last axis of values [..., n], with its interval; ``groups`` [n], such as images of tokens, are resampled as wholes."""
    values = np.asarray(values if hasattr(values, "__len__") else list(values), np.float64)
    sums, counts = values, np.ones(values.shape[-1])
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        sums = np.stack([np.bincount(group, row) for row in values.reshape(-1, values.shape[-1])]).reshape(*values.shape[:-1], -1)
        counts = np.bincount(group)
    sums, column = np.moveaxis(sums, -1, 0), (-1, *[1] * (values.ndim - 1))
    return interval(lambda w: np.tensordot(w, sums, 1) / (w @ counts).reshape(column), len(counts), unit, seed=seed)


def resamples(n: int, *, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n units is drawn in each of ``N_RESAMPLES`` resamples: float arrays [some, n], in pieces that fit the memory."""
    if n * N_RESAMPLES <= _ENTRIES:
        yield _resamples(n, seed)
        return
    rng, step = np.random.default_rng(seed), max(1, _ENTRIES // n)
    for start in range(0, N_RESAMPLES, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, N_RESAMPLES - start)).astype(np.float64)


@lru_cache(maxsize=8)  # statistics of the same pictures share their resamples
def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)
