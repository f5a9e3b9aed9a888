"""Remapping: what can't change does not, what is counted is what the statistics count, and the groups are what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import loud

from patchsae_utils.adaptation.adapters import CoOp, MaPLe, VisualPrompt
from patchsae_utils.adaptation.compare import (
    COMPARISONS,
    FORMS,
    GROUPS,
    OVERLAPS,
    base_to_novel,
    compare_models,
    count_groups,
    latent_groups,
    ranked_latents,
    stack,
    top_latents,
)
from patchsae_utils.data import load_dataset
from patchsae_utils.latents.reading import summarize_latents

LAYER = -2


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "test", n_images=36, half="base")


@pytest.fixture(scope="module")
def compared(tiny_clip, tiny_sae, scenes):
    return {
        name: compare_models(tiny_clip, model, tiny_sae, scenes, LAYER, progress=False)
        for name, model in {
            "itself": tiny_clip,
            "maple": loud(MaPLe, tiny_clip),
            "coop": loud(CoOp, tiny_clip),
            "vpt": loud(VisualPrompt, tiny_clip),
        }.items()
    }


def measure(remapping, comparison, name):
    table = remapping.comparisons(top_k=5, n_bootstrap=50)
    return table[(table["comparison"] == comparison) & (table["measure"] == name)]["value"].item()


def test_a_model_compared_with_itself_has_not_changed(compared):
    remapping = compared["itself"]
    assert set(remapping.latents()["group"]) == {"high"}
    assert (remapping.groups()["jaccard"] == 1).all() and remapping.groups()["rbo"].tolist() == pytest.approx(
        [1] * len(remapping.class_names)
    )
    assert remapping.correlation("class") == pytest.approx(1) and remapping.correlation("dataset") == pytest.approx(1)
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


def test_visual_prompts_can_only_change_the_image_tower(compared):
    split = compared["vpt"].gain_split().set_index("part")["gain"]
    assert split["text head"] == 0 and split["image tower"] == split["both"]
    assert not torch.equal(compared["vpt"].base.counts, compared["vpt"].adapted.counts)


def test_the_parts_of_the_gain_sum_to_the_gain(compared):
    remapping = compared["maple"]
    split = remapping.gain_split().set_index("part")["gain"]
    assert split["image tower"] + split["text head"] == pytest.approx(split["both"])
    assert split["both"] == pytest.approx(remapping.score("adapted", "adapted") - remapping.score("base", "base"))


def test_counts_are_those_of_the_statistics(tiny_clip, tiny_sae, scenes, compared):
    for model, reading in ((tiny_clip, compared["maple"].base), (loud(MaPLe, tiny_clip), compared["maple"].adapted)):
        summary = summarize_latents(model, tiny_sae, scenes, LAYER, progress=False)
        torch.testing.assert_close(reading.mean_counts, summary.class_counts / summary.class_images[:, None])
        assert reading.mean_counts.max() <= tiny_clip.n_tokens


def test_every_tower_meets_every_head_in_every_form(compared, scenes):
    table = compared["maple"].accuracy(n_bootstrap=50)
    assert len(table) == 2 * 2 * len(FORMS) and ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    for tower in ("base", "adapted"):
        for head in ("base", "adapted"):
            assert compared["maple"].right(tower, head).shape == (len(scenes),)
            np.testing.assert_array_equal(compared["maple"].right(tower, head), compared["maple"].right(tower, head, "error kept"))


def test_raw_accuracy_is_that_of_the_model_alone(tiny_clip, scenes, compared):
    adapted = loud(MaPLe, tiny_clip)
    images = torch.stack([tiny_clip.preprocess(example.image) for example in (scenes[i] for i in range(len(scenes)))])
    right = adapted.logits(adapted.encode_image(images), adapted.zero_shot_head(scenes.class_names)).argmax(1) == scenes.labels
    np.testing.assert_array_equal(compared["maple"].right("adapted", "adapted"), right.numpy())


def test_reconstruction_is_measured_on_each_models_own_tokens(tiny_clip, tiny_sae, scenes, compared):
    for tower, model in (("base", tiny_clip), ("adapted", loud(MaPLe, tiny_clip))):
        with torch.no_grad():
            x = torch.cat([model.residual(tiny_clip.preprocess(scenes[i].image)[None], LAYER)[0] for i in range(len(scenes))]).double()
            error = x - tiny_sae(x.float()).reconstruction.double()
        row = compared["maple"].reconstruction().set_index("tower").loc[tower]
        assert row["explained_variance"] == pytest.approx((1 - error.square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
        assert row["normalized_mse"] == pytest.approx((error.square().sum() / x.square().sum()).item(), rel=1e-4)


def test_batch_size_changes_nothing(tiny_clip, tiny_sae, scenes, compared):
    other = compare_models(tiny_clip, tiny_clip, tiny_sae, scenes, LAYER, batch_size=7, progress=False).base
    one = compared["itself"].base
    torch.testing.assert_close(one.counts, other.counts)
    torch.testing.assert_close(one.mean_counts, other.mean_counts)
    assert torch.equal(one.class_images, other.class_images) and int(one.class_images.sum()) == len(scenes)
    assert one.reconstruction == pytest.approx(other.reconstruction)


def test_controls_are_beside_the_comparison(compared):
    comparisons = compared["maple"].comparisons(top_k=5, n_bootstrap=50)
    assert tuple(comparisons["comparison"].unique()) == COMPARISONS
    assert ((comparisons["low"] <= comparisons["value"]) & (comparisons["value"] <= comparisons["high"])).all()
    assert set(comparisons["measure"]) == {*GROUPS, *OVERLAPS} and comparisons["value"].notna().all()
    again = compared["itself"].comparisons(n_bootstrap=50)
    random = again[again["comparison"] == "CLIP and adapted, random latents"].set_index("measure")["value"]
    assert (random[list(GROUPS[1:])] == 0).all() and (random[list(OVERLAPS)] < 0.9).all()  # two draws: a model is not like itself by luck


# -- plain functions --------------------------------------------------------------------------------------------------

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


def test_a_higher_threshold_moves_latents_out_of_high_only():
    sizes = [(latent_groups(BASE, ADAPTED, top_k=5, low=low)["group"] == "high").sum() for low in (0.1, 0.4, 0.5, 0.6, 0.9)]
    assert sizes == sorted(sizes, reverse=True)


def test_specific_latents_are_those_that_other_classes_lack():
    counts = torch.tensor([[9.0, 5.0, 0.0], [9.0, 0.0, 4.0]])
    assert top_latents(counts, 1).tolist() == [[True, False, False], [True, False, False]]
    assert top_latents(counts, 1, "specific").tolist() == [[False, True, False], [False, False, True]]
    assert not top_latents(torch.zeros(2, 3), 2).any()  # silent latents are nobody's top ones


def test_bad_settings_say_what_is_valid(tiny_clip, tiny_sae, scenes):
    with pytest.raises(ValueError, match="Valid: count, specific"):
        top_latents(BASE, rank="entropy")
    with pytest.raises(ValueError, match="low must lie between 0 and 1"):
        latent_groups(BASE, ADAPTED, low=2)
    with pytest.raises(ValueError, match="one shape"):
        latent_groups(BASE, ADAPTED[:1])
    with pytest.raises(ValueError, match="top_k"):
        latent_groups(BASE, ADAPTED, top_k=0)
    with pytest.raises(ValueError, match="no tables"):
        stack({}, "task")
    with pytest.raises(ValueError, match="empty"):
        compare_models(tiny_clip, tiny_clip, tiny_sae, load_dataset("openmoji/tools", "test", n_images=0), LAYER)


def test_base_to_novel_has_three_forms_and_a_harmonic_mean(compared):
    table = base_to_novel(compared["maple"], compared["coop"], n_bootstrap=50).set_index(["model", "form", "half"])
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
