"""Base to novel: a cell is measured once, the table says what its cells say, and frozen image towers share their features."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments import grid, protocol
from experiments.protocol import Cell, Protocol, cells, feature_forms, tabulate
from patchsae_utils.adaptation.compare import FORMS
from patchsae_utils.adaptation.fit import RECIPES
from patchsae_utils.config import load_profile
from patchsae_utils.interventions.tail import dataset_head
from patchsae_utils.tables import AVERAGE, MEAN, load_table

TASK = "openmoji/tools"


@pytest.fixture
def small(tmp_path):
    profile = load_profile(overrides={"adapters.n_shots": 1, "adapters.epochs": 1, "adapters.depth": 2, "model.layer": 1})
    return dataclasses.replace(profile, root=tmp_path)


def test_cells_are_fitted_measured_and_kept(small, tiny_clip, tiny_sae, monkeypatch):
    read = []
    monkeypatch.setattr(protocol, "feature_forms", lambda clip, *rest: read.append(clip) or feature_forms(clip, *rest))
    monkeypatch.setattr(grid, "current_commit", lambda: "abc")
    chosen = cells([TASK], ["zero-shot", "linear", "lora"], [1, 2])
    measured = {cell: row for cell, row, _ in grid.run(Protocol(small, tiny_clip, tiny_sae, n_images=36, progress=False), chosen)}
    # Zero-shot and both linear heads look at the base's features of the two halves; each LoRA makes its own.
    assert len(read) == 2 + 2 * 2 and read[:2] == [tiny_clip, tiny_clip]
    table = load_table(small, "adaptation")
    assert len(table) == 3 * len(FORMS) * 3 and set(table["commit"]) == {"abc"}
    assert (table["low"] <= table["accuracy"] + 1e-6).all() and (table["accuracy"] <= table["high"] + 1e-6).all()
    rows = table.set_index(["kind", "form", "half"])
    assert rows.loc["linear"]["n_seeds"].eq(2).all() and rows.loc["zero-shot"]["n_seeds"].eq(1).all()
    splits = load_table(small, "gain_split").set_index(["quantity", "kind", "name"])["value"].sort_index()
    assert set(splits["gain"].index.get_level_values("kind")) == {"linear", "lora"}
    for kind in ("linear", "lora"):
        gain = rows.loc[(kind, "raw", "base"), "accuracy"]  # a mean over seeds; the split is the first one's
        parts = splits.loc["gain"].loc[kind]
        assert parts["retuning"] + parts["new concepts"] + parts["remapping"] == pytest.approx(parts["both"], abs=1e-5) and -1 < gain <= 1
    assert splits["gain", "linear", "new concepts"] == 0 and splits["gain", "lora", "text head"] == 0
    # On novel classes a linear head is zero-shot CLIP; keeping the error changes nothing.
    for form in FORMS:
        assert rows.loc[("linear", form, "novel"), "accuracy"] == rows.loc[("zero-shot", form, "novel"), "accuracy"]
    for row in measured.values():
        assert all(row["right"][half]["raw"] == row["right"][half]["error kept"] for half in ("base", "novel"))
    data = Protocol(small, tiny_clip, tiny_sae, n_images=36)._tests(chosen[0])["base"]
    images = torch.stack([tiny_clip.preprocess(data[i].image) for i in range(len(data))])
    right = tiny_clip.logits(tiny_clip.encode_image(images), dataset_head(tiny_clip, data)).argmax(1) == torch.as_tensor(data.labels)
    assert rows.loc[("zero-shot", "raw", "base"), "accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-6)

    monkeypatch.setattr(protocol, "feature_forms", lambda *args, **options: pytest.fail("measured again"))
    monkeypatch.setattr(protocol.stages, "adapter", lambda *args, **options: pytest.fail("fitted again"))
    again = {cell: row for cell, row, _ in grid.run(Protocol(small, tiny_clip, tiny_sae, n_images=36, progress=False), chosen)}
    assert again == measured
    # A rate that is the recipe's own, written into the profile, changes nothing; zero-shot CLIP has none.
    spelt = dataclasses.replace(small, adapters=dataclasses.replace(small.adapters, lr=RECIPES["lora"].lr))
    another = Protocol(spelt, tiny_clip, tiny_sae, n_images=36, progress=False)
    assert all(grid.row(another, cell) == measured[cell] for cell in chosen if cell.kind != "linear")


def row(base: str, novel: str):
    right = {"base": dict.fromkeys(FORMS, base), "novel": dict.fromkeys(FORMS, novel)}
    return {"right": right, "n_classes": {"base": 2, "novel": 2}, "fit_seconds": 1.0, "commit": "abc"}


def test_the_table_averages_seeds_and_tasks():
    measured = {
        Cell("a", "zero-shot", 0): row("1100", "1111"), Cell("a", "maple", 1): row("1110", "1100"), Cell("a", "maple", 2): row("1111", "1100"),
        Cell("b", "zero-shot", 0): row("1000", "1000"), Cell("b", "maple", 1): row("1111", "1000"), Cell("c", "zero-shot", 0): row("1111", "1111"),
    }  # fmt: skip
    table = tabulate(measured).query("form == 'raw'").set_index(["task", "kind", "half"])
    found = table.loc[("a", "maple", "base")]
    assert found["accuracy"] == 0.875 and found["seed_sd"] == pytest.approx(np.std([0.75, 1], ddof=1)) and found["n_seeds"] == 2
    assert table.loc[("a", "maple", MEAN), "accuracy"] == pytest.approx(2 * 0.875 * 0.5 / 1.375)
    assert np.isnan(table.loc[("b", "maple", "base"), "seed_sd"])
    # Task c has no MaPLe, so no average over tasks speaks of it.
    assert table.loc[(AVERAGE, "zero-shot", "base"), "accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert table.loc[(AVERAGE, "maple", "novel"), "accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
