"""The supervised CLIP beside its twin: both are measured in the same ways."""

from __future__ import annotations

import dataclasses
import shutil

import pandas as pd
import pytest

from experiments import twin
from patchsae_utils import stages
from patchsae_utils.clip.loading import EMBEDDED
from patchsae_utils.config import load_profile
from patchsae_utils.tables import load_table

SMALL = {
    "data.n_train_images": 48, "data.n_evaluation_images": 24, "data.evaluation": "openmoji/tools", "data.n_statistics_images": 72,
    "data.statistics": "openmoji/tools", "sae.expansion_factor": 2, "training.batch_tokens": 256, "training.n_tokens": 1024,
    "training.warmup_steps": 2,
}  # fmt: skip


def test_a_model_beside_itself_has_the_same_measures(tmp_path, monkeypatch):
    def small(name=None, overrides=None):
        profile = load_profile(name, SMALL | (overrides or {}))
        return dataclasses.replace(profile, root=tmp_path / profile.name)

    monkeypatch.setattr(twin, "load_profile", small)
    monkeypatch.setattr(stages, "concept_scenes", lambda profile, split: stages.load_dataset("openmoji/tools", split, n_images=72))
    weights = tmp_path / "openmoji_twin" / "clip"
    shutil.copytree(EMBEDDED, weights)
    twin.main([])
    table = load_table(small(), "twin").set_index(["measure", "of"])
    taught, alone = (rows[["value", "low", "high"]] for _, rows in table.groupby("clip", sort=False))
    pd.testing.assert_frame_equal(taught, alone, check_exact=False, rtol=1e-5)
    assert {("zero-shot", "classes"), ("token probe", "patch"), ("SAE", "l0"), ("AP", "SAE, object"), ("AP", "linear probe, object")} <= {
        *taught.index
    }
    assert taught.loc[("SAE", "l0"), "value"] == pytest.approx(10)
    (weights / "open_clip_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        twin.main([])
