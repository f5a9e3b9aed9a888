"""Latents that are characteristic of a class."""

import dataclasses

import pytest
import torch

from patchsae_utils.latents.classes import class_scores, top_latents
from patchsae_utils.latents.pictures import level_overlap


def test_classes_of_disjoint_latents_share_none(summary):
    """FAULTS D10: zero counts filled each class's ten top latents, and their ties were the same ones: 6 of 10 were 'shared'."""
    counts = torch.zeros(4, 24)
    counts[0, [5, 6, 8, 9]], counts[1, [10, 11]], counts[2, 12] = torch.tensor([3.0, 9, 4, 2]), torch.tensor([7.0, 6]), 1.0
    assert top_latents(counts) == [[6, 8, 5, 9], [10, 11], [12], []]
    found = level_overlap(dataclasses.replace(summary, class_counts=counts), k=10).set_index("class_index")
    assert found["other"].tolist() == [0, 0, 0] and found["dataset"].tolist() == [4, 2, 1]
    n_living = int((~summary.dead).sum())
    assert found["chance"].tolist() == pytest.approx([4 * 7 / n_living, 2 * 7 / n_living, 7 / n_living])


def test_equal_scores_keep_the_order_of_latents():
    assert top_latents(torch.tensor([[2.0, 3, 3, 2, 0, -1]]), 3) == [[1, 2, 0]] and top_latents(torch.zeros(2, 3)) == [[], []]


def test_scores_are_their_formulas(summary):
    rate = summary.class_counts.double() / summary.class_images.clamp_min(1)[:, None]
    torch.testing.assert_close(class_scores(summary, "count"), rate)
    torch.testing.assert_close(class_scores(summary, "specific"), rate - rate.mean(0))
    strength = summary.mean_activation.double() * summary.frequency.double() / summary.dataset_counts.clamp_min(1)
    score = class_scores(summary)
    for c in range(4):
        for s in range(24):
            share = rate[c, s] / rate[:, s].sum() if rate[:, s].sum() > 0 else 0
            assert float(score[c, s]) == pytest.approx(float(rate[c, s] * share * strength[s]))
    torch.testing.assert_close(class_scores(rate) * strength, score)
    with pytest.raises(ValueError, match="Unknown rank 'entropy'. Valid: count, specific, share"):
        class_scores(rate, "entropy")
