"""Pairs of scenes that differ in one thing, and latents that know it: planted ones, shuffled ones, random ones."""

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.concepts import pairs as module
from patchsae_utils.concepts.pairs import ATTRIBUTES, scene_pairs, selectivity
from patchsae_utils.concepts.report import ComparisonReport
from patchsae_utils.data import load_dataset, openmoji
from patchsae_utils.data.artwork import COLORS
from patchsae_utils.sae.model import SparseAutoencoder

NAMES = openmoji.concept_names()


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/scenes", "test", n_images=60)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_pairs_differ_in_one_attribute(scenes, attribute):
    pairs = scene_pairs(scenes, attribute, 6)
    assert len(pairs) == 6
    for before, after, changes, elsewhere in pairs:
        same = {
            "background": before._replace(background=0) == after._replace(background=0),
            "object": [p._replace(class_id=0) for p in before.placements] == [p._replace(class_id=0) for p in after.placements],
            "color": [p._replace(paint=None) for p in before.placements] == [p._replace(paint=None) for p in after.placements],
            "place": [p._replace(x=0, y=0) for p in before.placements] == [p._replace(x=0, y=0) for p in after.placements],
        }[attribute]
        assert same and before != after and before.domain == after.domain and (openmoji.render(before) != openmoji.render(after)).any()
        assert sum(a != b for a, b in zip(before.placements, after.placements, strict=True)) == (attribute != "background")
        truths = [openmoji.concept_masks(openmoji.scene_truth(scene)) for scene in (before, after)]
        where = np.zeros((14, 14), bool)
        for concept, gained, lost in changes:
            assert concept.startswith(ATTRIBUTES[attribute]) and (gained.sum() >= 2 or lost.sum() >= 2)
            c = NAMES.index(concept)
            assert (truths[1][c] & ~truths[0][c] == gained).all() and (truths[0][c] & ~truths[1][c] == lost).all()
            where |= gained | lost
        for c in np.flatnonzero(elsewhere):
            assert not (truths[0][c] | truths[1][c])[where].any()
    with pytest.raises(ValueError, match="Valid: object, color, background, place"):
        scene_pairs(scenes, "size", 3)


def test_paint_changes_one_color_and_nothing_else(scenes):
    before, after, _, _ = scene_pairs(scenes, "color", 1)[0]
    old, new = next(p.paint for p in after.placements if p.paint)
    truths = [openmoji.scene_truth(scene) for scene in (before, after)]
    np.testing.assert_array_equal(truths[0].object_share, truths[1].object_share)
    np.testing.assert_array_equal(truths[0].outline_share, truths[1].outline_share)
    kept = [i for i in range(len(COLORS)) if i not in (old, new)]
    np.testing.assert_array_equal(truths[0].color_share[kept], truths[1].color_share[kept])
    assert truths[1].color_share[new].sum() > truths[0].color_share[new].sum()
    moved = np.abs(openmoji.render(before).astype(int) - openmoji.render(after)).max(2) > 0
    objects = np.kron(truths[0].object_share.sum(0) > 0, np.ones((8, 8), bool))
    assert moved.any() and (moved <= objects).mean() > 0.999  # at most the rim of a sprite, which is thinner than a patch's share tells


def measured(scenes, monkeypatch, matched, read):
    """Selectivity of latents that are read off the ground truth by ``read``: masks [P, K] -> activations [P, K]."""

    def tokens(clip, pairs, layer):
        masks = [openmoji.concept_masks(openmoji.scene_truth(s)).reshape(len(NAMES), -1).T for pair in pairs for s in pair[:2]]
        return torch.stack([torch.from_numpy(read(mask.astype(np.float32))) for mask in masks]).unflatten(0, (-1, 2))

    monkeypatch.setattr(module, "_tokens", tokens)
    monkeypatch.setattr(SparseAutoencoder, "check_model", lambda *_: None)  # no model is asked
    sae = SparseAutoencoder(len(NAMES), len(NAMES)).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(len(NAMES)))
    frame = pd.DataFrame({"dictionary": "SAE", "readout": "activations", "concept": NAMES, "latent": matched})
    found = selectivity(None, {"SAE": sae}, ComparisonReport(frame, np.zeros((0, 0))), scenes, 0, n_pairs=12)
    return found, found.frame.pivot(index="attribute", columns="measure", values="value")


def test_latents_that_are_the_concepts_are_perfectly_selective(scenes, monkeypatch):
    found, values = measured(scenes, monkeypatch, np.arange(len(NAMES)), lambda masks: masks)
    assert set(values.index) == set(ATTRIBUTES) and (values == 1).all().all()
    assert "object: SAE 100% [100%, 100%]" in found.sentence()


def test_silent_and_shuffled_latents_are_not_selective_and_random_ones_are_at_chance(scenes, monkeypatch):
    assert (measured(scenes, monkeypatch, np.arange(len(NAMES)), np.zeros_like)[1] == 0).all().all()
    shuffled = np.random.default_rng(0).permutation(len(NAMES))
    assert (measured(scenes, monkeypatch, shuffled, lambda masks: masks)[1] < 0.3).all().all()
    rng = np.random.default_rng(1)
    _, noise = measured(scenes, monkeypatch, np.arange(len(NAMES)), lambda masks: rng.random(masks.shape, np.float32))
    assert noise["right"].between(0.2, 0.8).all() and noise["first"].max() < 0.1
    assert noise["selectivity"].between(0.1, 0.4).all() and noise["selectivity"].mean() == pytest.approx(0.25, abs=0.06)
    other = pd.DataFrame({"dictionary": ["x"], "readout": "activations", "concept": "a", "latent": 0})
    with pytest.raises(ValueError, match="no dictionary 'SAE'"):
        selectivity(None, {"SAE": None}, ComparisonReport(other, np.zeros(0)), scenes, 0)


def test_what_nothing_can_be_compared_with_is_left_out_and_said(scenes, monkeypatch):
    with pytest.raises(ValueError, match="give scenes in color, and a report of more concepts"):  # one latent for all: it has no others
        measured(scenes, monkeypatch, np.zeros(len(NAMES), int), lambda masks: masks)
    lines = load_dataset("openmoji/tools:line", "test", n_images=3)
    with pytest.raises(ValueError, match="give scenes in color, and a report of more concepts"):
        measured(lines, monkeypatch, np.arange(len(NAMES)), lambda masks: masks)
