"""Confusions of CLIP and of an adapted model: counted by hand on a few pictures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from patchsae_utils import plots
from patchsae_utils.adaptation.compare import Remapping
from patchsae_utils.adaptation.confusions import FATES, confusions, fates
from patchsae_utils.adaptation.tower_readings import Reading

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2])
BEFORE = np.array([0, 1, 1, 1, 0, 1, 2, 0])
AFTER = np.array([0, 0, 1, 0, 0, 2, 2, 1])


def reading(side, predicted):
    """A tower that classified as told; with the other head it takes everything for class 2."""
    other = {"base": "adapted", "adapted": "base"}[side]
    table = {(side, "raw"): predicted, (other, "raw"): np.full_like(predicted, 2)}
    return Reading(torch.zeros(2, 3, 4), torch.ones(2, 3), LABELS, table, {})


@pytest.fixture(scope="module")
def compared():
    return Remapping("pictures", "MaPLe", ["cat", "dog", "owl"], reading("base", BEFORE), reading("adapted", AFTER))


def test_matrices_count_true_rows_and_predicted_columns(compared):
    found = confusions(compared)
    for matrix, predicted in ((found.base, BEFORE), (found.adapted, AFTER)):
        by_hand = [[sum((LABELS == i) & (predicted == j)) for j in range(3)] for i in range(3)]
        assert matrix.tolist() == by_hand
    assert found.base.tolist() == [[1, 2, 0], [1, 1, 0], [1, 1, 1]]


def test_the_change_is_in_shares_of_the_class(compared):
    found = confusions(compared)
    np.testing.assert_allclose(found.change, [[1 / 3, -1 / 3, 0], [0.5, -0.5, 0], [-1 / 3, 0, 1 / 3]])
    assert found.order.tolist() == [0, 2, 1]  # gained, gained as much, lost


def test_resolved_confusions_come_first(compared):
    table = confusions(compared).pairs()
    assert table[["class_name", "taken_for", "base", "adapted"]].values.tolist() == [
        ["cat", "dog", 2, 1],
        ["owl", "cat", 1, 0],
        ["dog", "cat", 1, 2],
    ]
    assert table["pictures"].tolist() == [3, 3, 2] and len(confusions(compared).pairs(1)) == 1


def test_every_picture_has_one_fate(compared):
    table = fates(compared, n_bootstrap=50).set_index("fate")
    assert (8 * table["share"]).to_dict() == pytest.approx(dict(zip(FATES, (2, 2, 2, 1, 1), strict=True)))
    assert ((table["low"] <= table["share"] + 1e-9) & (table["share"] <= table["high"] + 1e-9)).all()


def test_a_class_without_pictures_stands_in_the_middle():
    before = Reading(torch.zeros(2, 4, 4), torch.ones(2, 4), LABELS, {("base", "raw"): BEFORE}, {})
    after = Reading(torch.zeros(2, 4, 4), torch.ones(2, 4), LABELS, {("adapted", "raw"): AFTER}, {})
    found = confusions(Remapping("pictures", "MaPLe", ["cat", "dog", "owl", "yak"], before, after))
    assert np.isnan(found.change[3]).all() and found.order.tolist() == [0, 2, 3, 1]


def test_the_figure_draws(compared):
    fig = plots.confusion_change({"pictures": confusions(compared), "again": confusions(compared)})
    fig.canvas.draw()
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["cat", "owl", "dog"]
    plt.close("all")
