"""Intervals: they cover, they resample what is independent, and every statistic of the same units sees the same resamples."""

import numpy as np
import pytest

from patchsae_utils.run import intervals
from patchsae_utils.run.intervals import Interval, interval, mean_interval, resamples


def slow_means(values, seed=0, groups=None):
    """Means of explicit resamples: each unit's values are copied as often as it was drawn."""
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    units = np.unique(groups)
    drawn = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=intervals.N_RESAMPLES)
    return [
        np.concatenate([np.repeat(values[groups == unit], times) for unit, times in zip(units, row, strict=True)]).mean() for row in drawn
    ]


def test_a_mean_is_that_of_explicit_resamples():
    values = np.random.default_rng(0).normal(3, 2, 40)
    found = mean_interval(values, "scenes")
    np.testing.assert_allclose(found[:3], [values.mean(), *np.percentile(slow_means(values), [2.5, 97.5])], rtol=1e-12)
    assert found.unit == "scenes" and str(Interval(1.234, 1.1, 1.4)) == "1.23 [1.10, 1.40]"


def test_tokens_of_one_image_are_no_independent_evidence():
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(20), rng.integers(1, 9, 20))
    hits = (rng.random(20)[images] < 0.5).astype(float)
    found, naive = mean_interval(hits, groups=images), mean_interval(hits)
    np.testing.assert_allclose(found[:3], [hits.mean(), *np.percentile(slow_means(hits, groups=images), [2.5, 97.5])], rtol=1e-12)
    assert found.high - found.low > naive.high - naive.low


def test_intervals_cover():
    """95% intervals of the mean of 60 exponential draws hold the true mean in about 95 of 100 samples."""
    rng = np.random.default_rng(2)
    held = [found.low <= 1 <= found.high for found in (mean_interval(rng.exponential(size=60), seed=i) for i in range(300))]
    assert 0.88 <= np.mean(held) <= 0.98


def test_rows_share_their_resamples():
    """So the interval of a difference of paired values is narrow, and exactly that of the differences."""
    values = np.random.default_rng(3).normal(size=(2, 50)).cumsum(0)
    several = mean_interval(np.stack([values[0], values[1], values[0] - values[1]]))
    alone = mean_interval(values[0] - values[1])
    assert (several.value[2], several.low[2], several.high[2]) == pytest.approx(alone[:3], abs=1e-12)
    deep = mean_interval(np.stack([[values[0]], [values[0] - values[1]]]))
    assert deep.value.shape == (2, 1) and (deep.low[1, 0], deep.high[1, 0]) == pytest.approx(alone[1:3], abs=1e-12)


def test_a_ratio_is_of_sums_not_of_ratios():
    hits, asked = np.array([1.0, 0.0, 5.0]), np.array([1.0, 3.0, 6.0])
    found = interval(lambda weights: (weights @ hits) / (weights @ asked), 3, "images")
    assert found.value == 0.6 and 0 <= found.low <= 0.6 <= found.high <= 1


def test_centred_intervals_hold_their_value():
    """FAULTS D14: the maximum of a sample is larger than that of nearly every resample: percentiles alone lie below it."""
    values = np.random.default_rng(4).normal(size=30)
    largest = lambda weights: np.where(weights > 0, values, -np.inf).max(1)  # noqa: E731
    bare, centred = (interval(largest, 30, "images", centred=flag) for flag in (False, True))
    assert bare.high == bare.value and centred.low < centred.value < centred.high
    assert centred.high - centred.low == pytest.approx(bare.high - bare.low)


def test_memory_is_bounded_and_seeds_repeat(monkeypatch):
    whole = np.concatenate(list(resamples(50, seed=5)))
    monkeypatch.setattr(intervals, "_ENTRIES", 333)
    pieces = list(resamples(50, seed=5))
    assert max(piece.size for piece in pieces) <= 333 and np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(np.concatenate(list(resamples(50, seed=6))), whole)


def test_nothing_to_resample():
    assert mean_interval(np.ones(5))[:3] == (1, 1, 1)
    with pytest.raises(ValueError, match="nothing to resample: no scenes"):
        mean_interval([], "scenes")
    undefined = interval(lambda weights: np.full(len(weights), np.nan), 4, "images")
    assert np.isnan(undefined[:3]).all()
