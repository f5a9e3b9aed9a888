"""Remapping: what can't change does not, what is counted is what the statistics count, and the groups are what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.adaptation.compare import COMPARISONS, FATES, FORMS, Reading, Remapping, base_to_novel, compare_models, stack
from patchsae_utils.adaptation.groups import GROUPS, OVERLAPS
from patchsae_utils.data import load_dataset
from patchsae_utils.latents.reading import summarize_latents

LAYER = -2


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "test", n_images=36, half="base")


@pytest.fixture(scope="module")
def compared(tiny_clip, tiny_sae, scenes, models):
    kinds = ("itself", "maple", "coop")
    return {name: compare_models(tiny_clip, models[name], tiny_sae, scenes, LAYER, progress=False) for name in kinds}


def measure(remapping, comparison, name):
    table = remapping.comparisons()
    return table[(table["comparison"] == comparison) & (table["measure"] == name)]["value"].item()


def test_a_model_compared_with_itself_has_not_changed(compared):
    remapping = compared["itself"]
    assert set(remapping.latents()["group"]) == {"high"}
    assert (remapping.groups()["jaccard"] == 1).all() and remapping.groups()["rbo"].tolist() == pytest.approx(
        [1] * len(remapping.class_names)
    )
    assert remapping.correlation() == pytest.approx(1)
    assert remapping.delta == 0 and (remapping.gain_split()[["gain", "low", "high"]] == 0).all(axis=None)


def test_coop_can_only_remap(compared):
    """Control by construction: without a change of the image tower no latent is gained or lost, and the whole gain is the head's."""
    remapping = compared["coop"]
    assert measure(remapping, "CLIP and adapted", "low-to-high") == measure(remapping, "CLIP and adapted", "high-to-low") == 0
    assert measure(remapping, "CLIP and adapted", "jaccard") == 1
    assert torch.equal(remapping.base.counts, remapping.adapted.counts)
    split = remapping.gain_split().set_index("part")["gain"]
    assert split["image tower"] == 0 and split["text head"] == split["both"]
    assert remapping.score("base", "adapted") == remapping.score("adapted", "adapted")


def test_counts_are_those_of_the_statistics(tiny_clip, tiny_sae, scenes, models, compared):
    for model, reading in ((tiny_clip, compared["maple"].base), (models["maple"], compared["maple"].adapted)):
        summary = summarize_latents(model, tiny_sae, scenes, LAYER, progress=False)
        torch.testing.assert_close(reading.mean_counts, summary.class_counts / summary.class_images[:, None])
        assert reading.mean_counts.max() <= tiny_clip.n_tokens


def test_every_tower_meets_every_head_in_every_form(compared, scenes):
    table = compared["maple"].accuracy()
    assert len(table) == 2 * 2 * len(FORMS) and ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    for tower in ("base", "adapted"):
        for head in ("base", "adapted"):
            assert compared["maple"].right(tower, head).shape == (len(scenes),)
            np.testing.assert_array_equal(compared["maple"].right(tower, head), compared["maple"].right(tower, head, "error kept"))


def test_reconstruction_is_measured_on_each_models_own_tokens(tiny_clip, tiny_sae, scenes, models, compared):
    for tower, model in (("base", tiny_clip), ("adapted", models["maple"])):
        with torch.no_grad():
            x = torch.cat([model.residual(tiny_clip.preprocess(scenes[i].image)[None], LAYER)[0] for i in range(len(scenes))]).double()
            error = x - tiny_sae(x.float()).reconstruction.double()
        row = compared["maple"].reconstruction().set_index("tower").loc[tower]
        assert row["explained_variance"] == pytest.approx((1 - error.square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
        assert row["normalized_mse"] == pytest.approx((error.square().sum() / x.square().sum()).item(), rel=1e-4)


def test_controls_are_beside_the_comparison(compared):
    comparisons = compared["maple"].comparisons()
    assert tuple(comparisons["comparison"].unique()) == COMPARISONS
    assert ((comparisons["low"] <= comparisons["value"]) & (comparisons["value"] <= comparisons["high"])).all()
    assert set(comparisons["measure"]) == {*GROUPS, *OVERLAPS} and comparisons["value"].notna().all()
    again = compared["itself"].comparisons()
    random = again[again["comparison"] == "CLIP and adapted, random latents"].set_index("measure")["value"]
    assert (random[list(GROUPS[1:])] == 0).all() and (random[list(OVERLAPS)] < 0.9).all()  # two draws: a model is not like itself by luck


def test_base_to_novel_has_three_forms_and_a_harmonic_mean(compared):
    table = base_to_novel(compared["maple"], compared["coop"]).set_index(["model", "form", "half"])
    assert len(table) == 2 * 3 * 3
    for model, side in (("CLIP", "base"), ("MaPLe", "adapted")):
        base, novel = compared["maple"].score(side, side), compared["coop"].score(side, side)
        assert table.loc[(model, "raw", "base"), "accuracy"] == pytest.approx(base)
        assert table.loc[(model, "raw", "harmonic mean"), "accuracy"] == pytest.approx(2 * base * novel / max(base + novel, 1e-12))
    assert ((table["low"] <= table["accuracy"] + 1e-9) & (table["accuracy"] <= table["high"] + 1e-9)).all()


def test_stack_names_its_parts():
    frame = pd.DataFrame({"x": [1, 2]})
    stacked = stack({("a", "base"): frame, ("b", "novel"): frame}, ["task", "half"])
    assert stacked.columns.tolist() == ["task", "half", "x"] and stacked["task"].tolist() == ["a", "a", "b", "b"]
    assert stack({"a": frame}, "task")["task"].tolist() == ["a", "a"]


LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2])
BEFORE = np.array([0, 1, 1, 1, 0, 1, 2, 0])
AFTER = np.array([0, 0, 1, 0, 0, 2, 2, 1])


def reading(side, predicted):
    """A tower that classified as told; with the other head it takes everything for class 2."""
    other = {"base": "adapted", "adapted": "base"}[side]
    table = {(side, "raw"): predicted, (other, "raw"): np.full_like(predicted, 2)}
    return Reading(torch.zeros(2, 3, 4), torch.ones(2, 3), LABELS, table, {})


@pytest.fixture(scope="module")
def mistakes():
    return Remapping("pictures", "MaPLe", ["cat", "dog", "owl"], reading("base", BEFORE), reading("adapted", AFTER))


def test_matrices_count_true_rows_and_predicted_columns(mistakes):
    found = mistakes.confusions()
    for matrix, predicted in ((found.base, BEFORE), (found.adapted, AFTER)):
        by_hand = [[sum((LABELS == i) & (predicted == j)) for j in range(3)] for i in range(3)]
        assert matrix.tolist() == by_hand
    assert found.base.tolist() == [[1, 2, 0], [1, 1, 0], [1, 1, 1]]


def test_the_change_is_in_shares_of_the_class(mistakes):
    found = mistakes.confusions()
    np.testing.assert_allclose(found.change, [[1 / 3, -1 / 3, 0], [0.5, -0.5, 0], [-1 / 3, 0, 1 / 3]])
    assert found.order.tolist() == [0, 2, 1]  # gained, gained as much, lost


def test_resolved_confusions_come_first(mistakes):
    table = mistakes.confusions().pairs()
    assert table[["class_name", "taken_for", "base", "adapted"]].values.tolist() == [
        ["cat", "dog", 2, 1],
        ["owl", "cat", 1, 0],
        ["dog", "cat", 1, 2],
    ]
    assert table["pictures"].tolist() == [3, 3, 2]


def test_every_picture_has_one_fate(mistakes):
    table = mistakes.fates().set_index("fate")
    assert (8 * table["share"]).to_dict() == pytest.approx(dict(zip(FATES, (2, 2, 2, 1, 1), strict=True)))
    assert ((table["low"] <= table["share"] + 1e-9) & (table["share"] <= table["high"] + 1e-9)).all()


def test_a_class_without_pictures_stands_in_the_middle():
    before = Reading(torch.zeros(2, 4, 4), torch.ones(2, 4), LABELS, {("base", "raw"): BEFORE}, {})
    after = Reading(torch.zeros(2, 4, 4), torch.ones(2, 4), LABELS, {("adapted", "raw"): AFTER}, {})
    found = Remapping("pictures", "MaPLe", ["cat", "dog", "owl", "yak"], before, after).confusions()
    assert np.isnan(found.change[3]).all() and found.order.tolist() == [0, 2, 3, 1]
