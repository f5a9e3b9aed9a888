"""Concepts that adaptation changed: the strongest links are chosen, turning one off is arithmetic, and sentences count what tables say."""

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.adaptation import told
from patchsae_utils.adaptation.compare import COMPARISONS
from patchsae_utils.adaptation.concepts import RemappedConcepts, remapped_concepts
from patchsae_utils.adaptation.joint import JointDictionary
from patchsae_utils.data import load_dataset
from patchsae_utils.interventions.tail import dataset_head

LAYER = -2


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "val", n_images=18, half="base")


@pytest.fixture(scope="module")
def active(tiny_clip, tiny_sae, scenes):
    """The latents that are most active in the first picture."""
    h = tiny_sae.encode(tiny_clip.residual(tiny_clip.preprocess(scenes[0].image)[None], LAYER))
    return h.sum((0, 1)).argsort(descending=True)[:4].tolist()


@pytest.fixture(scope="module")
def found(tiny_clip, tiny_sae, scenes, models, active):
    rows = [
        (0, active[0], 0.0, 0.2, "appeared"), (1, active[0], 0.0, 0.1, "appeared"), (0, active[1], 0.0, 0.1, "appeared"),
        (1, active[2], 0.0, 0.05, "appeared"), (2, active[3], 0.3, 0.0, "vanished"), (3, active[1], 0.2, 0.2, "stayed"),
    ]  # fmt: skip
    links = pd.DataFrame(rows, columns=["class", "latent", "base", "adapted", "link"])
    both = torch.stack([model.residual(tiny_clip.preprocess(scenes[0].image)[None], LAYER) for model in (tiny_clip, models["maple"])], 2)
    joint = JointDictionary(both[0], 24, k=4).requires_grad_(False)
    verdicts = pd.DataFrame({"latent": range(24), "verdict": ["new"] * 20 + ["changed"] * 4})
    names = {active[0]: "hammer"}
    return remapped_concepts(tiny_clip, models["maple"], tiny_sae, scenes, LAYER, links, names, joint, verdicts, progress=False)


def test_the_strongest_links_are_shown_each_class_and_latent_once(found, scenes, active):
    rows = found.table[found.table["kind"] != "new"]
    shown = rows[["kind", "label", "latent", "name", "model"]].values.tolist()
    expected = [("appeared", 0, active[0], "hammer"), ("appeared", 1, active[2], "unnamed"), ("vanished", 2, active[3], "unnamed")]
    assert shown == [[*row, model] for row in expected for model in ("CLIP", "adapted")]
    new = found.table[found.table["kind"] == "new"]
    assert 0 < len(new) <= 10 and not new["label"].iloc[::2].duplicated().any() and new["latent"].max() < 20
    assert (new["name"] == "mostly " + new["class_name"]).all()
    assert (found.table["class_name"] == np.array(scenes.class_names)[found.table["label"]]).all()
    assert len(found.pictures) == len(found.table) / 2
    for images, masks in (side for pair in found.pictures for side in pair.values()):
        assert images.shape == (len(masks), 112, 112, 3) and masks.shape[1:] == (14, 14) and len(masks) <= 3


def test_turning_a_latent_off_is_arithmetic(found, tiny_clip, tiny_sae, scenes, models, active):
    labels = np.asarray(scenes.labels)
    images = torch.stack([tiny_clip.preprocess(scenes[i].image) for i in np.flatnonzero(labels == 0)])
    first = found.table[(found.table["kind"] == "appeared") & (found.table["label"] == 0)].set_index("model")
    for name, model in (("CLIP", tiny_clip), ("adapted", models["maple"])):
        residual, head = model.run_to(images, LAYER), dataset_head(model, scenes).double()
        odds = []
        for h in (0, tiny_sae.encode(residual.tokens)[..., active[0], None]):
            features = model.finish(residual._replace(tokens=residual.tokens - h * tiny_sae.W_dec[active[0]]), LAYER).double()
            p = (model.logit_scale * torch.nn.functional.normalize(features, dim=1) @ head.T).softmax(1)[:, 0]
            odds.append(torch.log(p / (1 - p)))
        row = first.loc[name]
        assert row["change"] == pytest.approx((odds[1] - odds[0]).mean().item(), abs=1e-3) and row["n"] == len(images)
        assert row["change_low"] <= row["change"] <= row["change_high"]
    change, more = first["change"], first["more"]
    assert more["CLIP"] == 0 and more["adapted"] == pytest.approx(change["adapted"] - change["CLIP"], abs=1e-6)


def test_sentences_say_their_tables():
    rows = [("appeared", -0.5, -0.1, 0, 0), ("appeared", -0.5, 0.1, 0, 0), ("vanished", 0.2, 0.4, 0, 0), ("new", 0, 0, -0.2, -0.1)]
    table = pd.DataFrame(rows, columns=["kind", "more_low", "more_high", "beyond_low", "beyond_high"]).assign(model="adapted")
    said = RemappedConcepts(table, []).sentence()
    assert "1 of 2 links that appeared" in said and "1 of 1 links that vanished" in said and "1 of 1 new latents" in said
    assert "no link changed" in RemappedConcepts(table.iloc[:0], []).sentence()

    values = {"jaccard": (0.9, 0.4, 0.5, 0.03, 0.01), "high-to-low": (1.5, 0, 0, 0, 0), "low-to-high": (2.5, 0, 0, 0, 0)}
    groups = [(name, measure, x) for measure, some in values.items() for name, x in zip(COMPARISONS, some, strict=True)]
    said = told.overlap_sentence(pd.DataFrame(groups, columns=["comparison", "measure", "value"]))
    for text in ("share 90%", "share 40%", "shares 50% with itself", "share 3%", "2.5 latents doubled and 1.5 halved"):
        assert text in said

    parts = pd.DataFrame(
        [("a", "MaPLe", part, gain, gain - 0.01, gain + 0.01) for part, gain in (("remapping", 0.1), ("retuning", 0.0), ("new concepts", 0.02), ("both", 0.12))],
        columns=["task", "adapter", "part", "gain", "low", "high"],
    )  # fmt: skip
    assert told.parts_table(parts).loc[("a", "MaPLe"), "whole gain"] == "+12 [+11, +13]"
    assert "MaPLe gains +12 points: +10.0 by remapping, +0.0 by retuning, +2.0 by new concepts" in told.parts_sentence(parts)
    names = ["adapted", "remapping only", "whole change of the stream"]
    experiments = pd.DataFrame({"task": "a", "experiment": names, "gain": [0.1, 0.08, 0.02]})
    assert "reaches 80% of the gain" in told.experiments_sentence(experiments) and "reaches 20%" in told.experiments_sentence(experiments)
