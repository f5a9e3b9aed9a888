"""Matching of dictionaries: by brute force on small ones, exact on permuted ones, and against the random baseline."""

import itertools

import numpy as np
import pytest
import torch

from experiments.matching import matched_cosine
from patchsae_utils.sae.model import SparseAutoencoder


def permuted(sae):
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    other = SparseAutoencoder(sae.d_in, sae.d_sae)
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[order])
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
