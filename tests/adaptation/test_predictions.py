"""Predictions over k of CLIP and an adapted model: the same latents for all, and what is equal stays equal."""

import numpy as np
import pytest

from patchsae_utils.adaptation.compare import MODELS, masked_predictions, ranked_latents
from patchsae_utils.data import load_dataset
from patchsae_utils.latents.reading import summarize_latents

LAYER, KS = -2, (0, 3, 64)
KEYS = ["choose", "mode", "k", "group"]


@pytest.fixture(scope="module")
def data():
    return [load_dataset("openmoji/tools", split, half="base", n_images=20) for split in ("train", "test")]


@pytest.fixture(scope="module")
def tables(tiny_clip, tiny_sae, data, models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchsae_utils.adaptation.compare.KS", KS)
        return {name: masked_predictions(tiny_clip, models[name], tiny_sae, *data, LAYER, progress=False) for name in ("maple", "coop")}


def accuracy(table, model):
    return table[table["model"] == model].set_index(KEYS)["accuracy"]


def test_a_frozen_tower_under_the_new_head_is_the_adapted_model(tables):
    """CoOp changes the head alone; MaPLe's tower differs too."""
    logits = {name: [table[table["model"] == model]["logit"].to_numpy() for model in MODELS] for name, table in tables.items()}
    np.testing.assert_allclose(logits["coop"][1], logits["coop"][2], atol=1e-4)
    assert np.abs(logits["maple"][1] - logits["maple"][2]).max() > 1e-3
    np.testing.assert_allclose(logits["coop"][0], logits["maple"][0], atol=1e-4)
    for table in logits.values():
        assert np.abs(table[0] - table[1]).max() > 1e-3


def test_all_or_none_of_the_latents_is_the_reconstruction(tables):
    for model in MODELS:
        found = accuracy(tables["maple"], model).loc[lambda s: s.index.get_level_values("group") == "all"].droplevel("group")
        for choose in ("oracle", "random"):
            assert found[choose, "off", 0] == pytest.approx(found["none", "reconstructed", 0])
        assert found["oracle", "on", 64] == pytest.approx(found["none", "reconstructed", 0])


def test_latents_are_those_of_the_class_in_clip(tiny_clip, tiny_sae, data, models, monkeypatch):
    """What the sweep is given ranks latents as the specific ones of CLIP's train split."""
    given = []

    def remember(*arguments, class_counts, **options):
        given.append(class_counts)
        raise InterruptedError

    monkeypatch.setattr("patchsae_utils.adaptation.compare.sweep_masks", remember)
    with pytest.raises(InterruptedError):
        masked_predictions(tiny_clip, models["maple"], tiny_sae, *data, LAYER, progress=False)
    summary = summarize_latents(tiny_clip, tiny_sae, data[0], LAYER, progress=False)
    expected = ranked_latents(summary.class_counts / summary.class_images.clamp_min(1)[:, None], 3, "specific")
    assert ranked_latents(given[0].class_counts, 3) == expected
    assert given[0].frequency.tolist() == summary.frequency.tolist()
