"""Intervals: they cover what they should, resample images and not tokens, and keep the digits of what was published with them."""

import numpy as np
import pytest

from patchsae_utils.clip import zero_shot as zeroshot
from patchsae_utils.latents import measures as statistics
from patchsae_utils.run import intervals as module
from patchsae_utils.run.intervals import bootstrap, bootstrap_mean, bootstrap_share, mean_interval
from patchsae_utils.sae import quality as evaluation

PUBLISHED = {
    "sums": (0.0032650410839194, -0.17907833404485926, 0.1963194152395995),
    "mean": (0.0032650410839194, -0.1790783340448593, 0.19631941523959948),
    "share": (0.5, 0.3958333333333333, 0.6081470588235295),
    "interval": (0.0032650410839194, -0.15539576002606162, 0.17787869891432734),
}


def share(total, n):
    return {"share": total[..., 0] / n}


def test_one_module_serves_all():
    assert evaluation.bootstrap is bootstrap
    assert zeroshot.bootstrap_share is bootstrap_share and statistics.mean_interval is mean_interval


def test_all_agree_with_the_normal_approximation():
    hits = np.random.default_rng(0).random(2000) < 0.3
    value = hits.mean()
    half = 1.96 * (value * (1 - value) / 2000) ** 0.5
    found = {
        "sums": bootstrap(hits[:, None].astype(float), share, 2000)["share"],
        "mean": tuple(float(v) for v in bootstrap_mean(hits, 2000)),
        "share": bootstrap_share(hits, n_bootstrap=2000),
        "interval": tuple(mean_interval(hits, 2000)),
    }
    for name, (mean, low, high) in found.items():
        assert mean == pytest.approx(value), name
        assert (low, high) == (pytest.approx(value - half, abs=0.004), pytest.approx(value + half, abs=0.004)), name
    # the first three draw the same resamples, and must agree to rounding
    for name in ("mean", "share"):
        np.testing.assert_allclose(found[name], found["sums"], rtol=1e-12)


def test_coverage():
    """Of 300 samples of 60 from a skewed distribution, about 95 % of the intervals hold its mean."""
    rng = np.random.default_rng(1)
    held = []
    for seed in range(300):
        values = rng.exponential(size=60)
        _, low, high = bootstrap_mean(values, 400, seed)
        held.append(low <= 1 <= high)
    assert 0.88 < np.mean(held) < 0.98


def test_level_and_seed():
    values = np.random.default_rng(2).normal(size=50)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    assert wide[1] < narrow[1] < narrow[2] < wide[2]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_rows_share_the_resamples():
    values = np.random.default_rng(3).normal(size=(2, 40))
    mean, low, high = bootstrap_mean(np.stack([values[0], values[1], values[0] - values[1]]))
    alone = bootstrap_mean(values[0] - values[1])
    np.testing.assert_allclose([mean[2], low[2], high[2]], alone)
    np.testing.assert_allclose(mean[2], mean[0] - mean[1])


def test_tokens_of_one_image_are_one_piece_of_evidence():
    rng = np.random.default_rng(4)
    images = np.repeat(np.arange(30), 20)
    hits = np.repeat(rng.random(30) < 0.5, 20)  # all tokens of an image alike
    _, low, high = bootstrap_share(hits, images)
    _, low_naive, high_naive = bootstrap_share(hits)
    assert (high - low) > 3 * (high_naive - low_naive)
    of_images = bootstrap_share(hits[::20])
    assert (low, high) == (pytest.approx(of_images[1]), pytest.approx(of_images[2]))


def test_digits_are_those_of_one_resample_at_a_time(monkeypatch):
    """Pieces bound the memory and change no digit; the references below draw resample by resample."""
    rng = np.random.default_rng(5)
    hits, images = rng.random(200) < 0.4, rng.integers(40, size=200)
    _, groups = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(groups, hits), np.bincount(groups)
    n, draws = len(sums), np.random.default_rng(7)
    shares = [(drawn @ sums) / (drawn @ counts) for drawn in (draws.multinomial(n, np.full(n, 1 / n)) for _ in range(500))]
    low, high = np.quantile(shares, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    values = rng.normal(size=37)
    means = values[np.random.default_rng(7).integers(37, size=(500, 37))].mean(1)
    expected = (values.mean(), *np.percentile(means, [2.5, 97.5]))
    for entries in (10_000_000, 900, 1):
        monkeypatch.setattr(module, "_ENTRIES", entries)
        assert bootstrap_share(hits, images, n_bootstrap=500, seed=7) == (hits.mean(), low, high)
        assert tuple(mean_interval(values, 500, seed=7)) == expected


def test_published_digits():
    """Frozen when the four functions were one each in the modules that now import them."""
    values = np.sin(np.arange(50.0))
    found = {
        "sums": bootstrap(values[:, None], share, 200, 3)["share"],
        "mean": tuple(float(v) for v in bootstrap_mean(values, 200, 3)),
        "share": bootstrap_share(values > 0, np.arange(50) // 3, n_bootstrap=200, seed=3),
        "interval": tuple(mean_interval(values, 200, 3)),
    }
    for name, numbers in PUBLISHED.items():  # up to the order in which a processor adds
        np.testing.assert_allclose(found[name], numbers, rtol=1e-12, err_msg=name)


def test_equal_values_have_no_width():
    assert bootstrap(np.ones((5, 1)), share, 10)["share"] == (1, 1, 1)
    assert bootstrap_share(np.ones(5, bool)) == (1, 1, 1)
    assert str(mean_interval([1, 1])) == "1.00 [1.00, 1.00]"


def test_nothing_to_resample():
    assert all(np.isnan(value) for value in bootstrap_share(np.array([], bool)))
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap_mean(np.zeros((3, 0)))
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap(np.zeros((0, 2)), share)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])
