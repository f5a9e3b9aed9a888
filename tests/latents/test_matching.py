"""Matching of dictionaries: by brute force on small ones, exact on permuted ones, and against the random baseline."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from patchsae_utils.latents.matching import matched_cosine, stability
from patchsae_utils.sae.model import SparseAutoencoder


def permuted(sae, seed=0, noise=0.0):
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))
    other = SparseAutoencoder(sae.d_in, sae.d_sae)
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[order] + noise * torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed)))
    return other, order.numpy()


def test_the_matching_is_the_best_of_all():
    a, b = SparseAutoencoder(3, 5, seed=0), SparseAutoencoder(3, 5, seed=1)
    found = matched_cosine(a, b)
    unit = [s.W_dec.detach().double().numpy() / np.linalg.norm(s.W_dec.detach().double().numpy(), axis=1, keepdims=True) for s in (a, b)]
    cosine = unit[0] @ unit[1].T
    best = max(sum(cosine[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    assert found.cosine.sum() == pytest.approx(best) and sorted(found.b) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found.cosine, cosine[found.a, found.b])
    assert found.mean.value == pytest.approx(found.cosine.mean()) and found.mean.low <= found.mean.value <= found.mean.high


def test_a_permuted_dictionary_is_found_whole_and_scale_does_not_matter():
    a = SparseAutoencoder(16, 40, seed=0)
    b, order = permuted(a)
    with torch.no_grad():
        b.W_dec.mul_(7)
    found = matched_cosine(a, b)
    assert (order[found.b] == found.a).all() and found.cosine == pytest.approx(np.ones(40))
    assert found.random_mean < 0.8 < found.mean.low


def test_unrelated_dictionaries_reach_the_baseline_even_with_a_shared_mean():
    """All directions lie around one mean, so cosines are high by luck: the baseline must know that."""
    torch.manual_seed(0)
    shared = torch.randn(16) * 2
    pair = [SparseAutoencoder(16, 60, seed=s) for s in range(2)]
    with torch.no_grad():
        for sae in pair:
            sae.W_dec.copy_(torch.randn(60, 16) + shared)
    found = matched_cosine(*pair)
    assert found.cosine.mean() > 0.8 and found.random_mean == pytest.approx(found.cosine.mean(), abs=0.05)


def test_only_living_latents_are_matched():
    a = SparseAutoencoder(16, 30, seed=0)
    b, order = permuted(a)
    alive_a, alive_b = torch.ones(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    alive_a[:20] = False
    alive_b[torch.from_numpy(np.isin(order, [25, 26]))] = False
    found = matched_cosine(a, b, alive_a, alive_b)
    assert found.a.tolist() == [*range(20, 30)] and not set(found.b) & set(np.flatnonzero(~alive_b.numpy()))
    kept = ~np.isin(found.a, [25, 26])
    assert (order[found.b[kept]] == found.a[kept]).all() and found.cosine[~kept].max() < 0.99


def test_stability_has_a_row_a_pair():
    a = SparseAutoencoder(16, 40, seed=0)
    saes = {0: a, 1: permuted(a, 1, noise=0.03)[0], 2: SparseAutoencoder(16, 40, seed=9)}
    table = stability(saes).set_index(["a", "b"])
    assert list(table.index) == [(0, 1), (0, 2), (1, 2)]
    assert table.loc[(0, 1), "cosine"] > 0.95 > table.loc[(0, 2), "cosine"]
    assert table.loc[(0, 1), "found"] == 1 and table.loc[(0, 2), "found"] < 0.7
    assert table.loc[(0, 2), "cosine"] == pytest.approx(table.loc[(0, 2), "random"], abs=0.06)
    assert (table["low"] <= table["cosine"]).all() and (table["cosine"] <= table["high"]).all()
