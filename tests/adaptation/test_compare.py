"""Remapping: what can't change does not, what is counted is what the statistics count, and the groups are what they say."""

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.adaptation import base_to_novel, stack
from patchsae_utils.adaptation.compare import APART, COMPARISONS, FORMS, GROUPS, OTHER, OVERLAPS, RANDOM, SAME, TWICE, Reading, Remapping
from patchsae_utils.latents.reading import summarize_latents

LAYER = -2


def measure(remapping, comparison, name):
    table = remapping.comparisons()
    return table[(table["comparison"] == comparison) & (table["measure"] == name)]["value"].item()


def test_a_model_compared_with_itself_has_not_changed(compared):
    remapping = compared["itself"]
    assert set(remapping.latents()["group"]) == {"high"}
    for name in OVERLAPS:
        assert measure(remapping, SAME, name) == pytest.approx(1) and measure(remapping, APART, name) == measure(remapping, TWICE, name) < 1
        assert measure(remapping, RANDOM, name) < 0.9  # two draws: a model is not like itself by luck
    assert all(measure(remapping, RANDOM, name) == 0 for name in GROUPS[1:])


def test_coop_can_only_remap(compared):
    """Control by construction: without a change of the image tower no latent is gained or lost, and the whole gain is the head's."""
    remapping = compared["coop"]
    assert measure(remapping, SAME, "low-to-high") == measure(remapping, SAME, "high-to-low") == 0
    assert measure(remapping, SAME, "jaccard") == 1 > measure(remapping, OTHER, "jaccard")
    assert torch.equal(remapping.base.counts, remapping.adapted.counts)
    np.testing.assert_array_equal(remapping.right("base", "adapted"), remapping.right("adapted", "adapted"))


def test_counts_are_those_of_the_statistics(tiny_clip, tiny_sae, scenes, models, compared):
    for model, reading in ((tiny_clip, compared["maple"].base), (models["maple"], compared["maple"].adapted)):
        summary = summarize_latents(model, tiny_sae, scenes, LAYER, progress=False)
        torch.testing.assert_close(reading.mean_counts, summary.class_counts / summary.class_images[:, None])
        assert reading.mean_counts.max() <= tiny_clip.n_tokens


def test_keeping_the_error_leaves_every_prediction_as_it_is(compared, scenes):
    for tower in ("base", "adapted"):
        for head in ("base", "adapted"):
            assert compared["maple"].right(tower, head).shape == (len(scenes),)
            np.testing.assert_array_equal(compared["maple"].right(tower, head), compared["maple"].right(tower, head, FORMS[2]))


def test_reconstruction_is_measured_on_each_models_own_tokens(tiny_clip, tiny_sae, scenes, models, compared):
    for tower, model in (("base", tiny_clip), ("adapted", models["maple"])):
        with torch.no_grad():
            x = torch.cat([model.residual(tiny_clip.preprocess(scenes[i].image)[None], LAYER)[0] for i in range(len(scenes))]).double()
            error = x - tiny_sae(x.float()).reconstruction.double()
        row = compared["maple"].reconstruction().set_index("tower").loc[tower]
        assert row["explained_variance"] == pytest.approx((1 - error.square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)


def test_controls_are_beside_the_comparison(compared):
    comparisons = compared["maple"].comparisons()
    assert tuple(comparisons["comparison"].unique()) == COMPARISONS
    assert ((comparisons["low"] <= comparisons["value"]) & (comparisons["value"] <= comparisons["high"])).all()
    assert set(comparisons["measure"]) == {*GROUPS, *OVERLAPS} and comparisons["value"].notna().all()


def test_base_to_novel_has_three_forms_and_a_harmonic_mean(compared):
    table = base_to_novel(compared["maple"], compared["coop"]).set_index(["model", "form", "half"])
    assert len(table) == 2 * 3 * 3
    for model, side in (("CLIP", "base"), ("MaPLe", "adapted")):
        base, novel = (compared[name].right(side, side).mean() for name in ("maple", "coop"))
        assert table.loc[(model, "raw", "base"), "accuracy"] == pytest.approx(base)
        assert table.loc[(model, "raw", "harmonic mean"), "accuracy"] == pytest.approx(2 * base * novel / max(base + novel, 1e-12))
    assert ((table["low"] <= table["accuracy"] + 1e-9) & (table["accuracy"] <= table["high"] + 1e-9)).all()


def test_stack_names_its_parts():
    frame = pd.DataFrame({"x": [1, 2]})
    stacked = stack({("a", "base"): frame, ("b", "novel"): frame}, ["task", "half"])
    assert stacked.columns.tolist() == ["task", "half", "x"] and stacked["task"].tolist() == ["a", "a", "b", "b"]
    assert stack({"a": frame}, "task")["task"].tolist() == ["a", "a"]


def test_classes_of_one_picture_or_none_are_compared_with_nothing():
    """Where a class has one picture there are no others: CLIP shared 'half' of its latents with itself, of two classes the second with one."""
    own = torch.block_diag(*torch.arange(36, 0, -1.0, dtype=torch.float64).view(3, 1, 12))

    def compare(*images):
        images = torch.tensor(images)
        reading = Reading(own[None] * (images > 0)[..., None], images, np.zeros(1, int), {}, {})
        return Remapping("x", "y", ["a", "b", "c"], reading, reading)

    remapping = compare([5, 1, 0], [5, 0, 0])
    assert measure(remapping, TWICE, "jaccard") == measure(remapping, APART, "rbo") == 1
    assert measure(remapping, TWICE, "high") == measure(remapping, SAME, "high") == 10  # not diluted by classes without pictures
    alone = compare([1, 1, 1], [0, 0, 0])
    assert np.isnan(measure(alone, TWICE, "jaccard")) and measure(alone, SAME, "jaccard") == 1
