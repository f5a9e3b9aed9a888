"""Top latents of two models: rank-biased overlap against the infinite sum that it stands for, and groups on small examples."""

import math

import numpy as np
import pytest
import torch

from patchsae_utils.adaptation.compare import GROUPS, count_groups, latent_groups, overlaps, rank_biased_overlap, ranked_latents


def by_infinite_sum(first, second, p, depth=3000):
    """The definition, term by term: beyond the end of the shorter list its share of common items goes on, beyond both the agreement stays."""
    short, long = sorted((first, second), key=len)
    s, length = len(short), len(long)
    total = 0.0
    for d in range(1, depth + 1):
        end = min(d, length)
        assumed = len({*short} & {*long[:s]}) * max(end - s, 0) / s
        agreement = (len({*short[:end]} & {*long[:end]}) + assumed) / end
        total += (1 - p) * p ** (d - 1) * agreement
    return total


@pytest.mark.parametrize("p", [0.3, 0.9, 0.98])
def test_it_is_the_infinite_sum(p):
    rng = np.random.default_rng(0)
    for _ in range(40):
        first, second = (rng.permutation(14)[: rng.integers(1, 12)].tolist() for _ in range(2))
        expected = by_infinite_sum(first, second, p)
        assert rank_biased_overlap(first, second, p) == pytest.approx(expected, abs=1e-9)
        assert rank_biased_overlap(second, first, p) == pytest.approx(expected, abs=1e-9)
        assert -1e-12 <= expected <= 1 + 1e-12


def test_empty_rankings():
    assert math.isnan(rank_biased_overlap([], [])) and rank_biased_overlap([], [1]) == 0
    table = overlaps([[], [1, 2], [1, 2]], [[], [2, 3], [1, 2]])
    assert table["jaccard"].tolist() == pytest.approx([math.nan, 1 / 3, 1], nan_ok=True)
    assert table["rbo"].isna().tolist() == [True, False, False]


BASE = torch.tensor([[10.0, 8.0, 6.0, 0.0, 1.0], [0.0, 4.0, 4.0, 4.0, 0.0]])
ADAPTED = torch.tensor([[10.0, 3.0, 7.0, 9.0, 1.0], [0.0, 2.0, 4.0, 4.0, 0.0]])


def test_groups_on_a_small_example():
    table = latent_groups(BASE, ADAPTED, top_k=2)
    found = {(row["class"], row["latent"]): row["group"] for row in table.to_dict("records")}
    # Class 0: union of {0, 1} and {0, 3}. Class 1: {1, 2} (equal values keep their order) and {2, 3}; 2 is not below half of 4.
    assert found == {(0, 0): "high", (0, 1): "high-to-low", (0, 3): "low-to-high", (1, 1): "high", (1, 2): "high", (1, 3): "high"}
    counts = count_groups(BASE, ADAPTED, top_k=2)
    assert counts[list(GROUPS)].to_numpy().tolist() == [[1, 1, 1], [3, 0, 0]]
    assert counts["jaccard"].tolist() == pytest.approx([1 / 3, 1 / 3])
    # Class 0: (0, 1) and (0, 3), agreements 1, 1/2, 1/2, ...; class 1: (1, 2) and (2, 3), agreements 0, 1/2, 1/2, ...
    assert ranked_latents(ADAPTED, 2) == [[0, 3], [2, 3]] and counts["rbo"].tolist() == pytest.approx([0.1 + 0.45, 0.45])


def test_exchanging_the_models_exchanges_the_groups():
    forward, backward = latent_groups(BASE, ADAPTED, top_k=3), latent_groups(ADAPTED, BASE, top_k=3)
    swap = {"high": "high", "high-to-low": "low-to-high", "low-to-high": "high-to-low"}
    assert forward["group"].tolist() == [swap[group] for group in backward["group"]]
