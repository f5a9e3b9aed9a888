"""The grid of ablations: each cell changes one thing, and what was measured is not measured again."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

import patchsae_utils as ps
from patchsae_utils import ablations
from patchsae_utils.config import load_profile


@pytest.fixture
def small(tmp_path):
    profile = load_profile(
        overrides={
            "data.n_train_images": 24, "data.n_evaluation_images": 24, "data.evaluation": "openmoji/tools", "sae.expansion_factor": 4,
            "training.batch_tokens": 256, "training.start": "random", "training.warmup_steps": 2,
        }
    )  # fmt: skip
    return dataclasses.replace(profile, root=tmp_path)


def test_cells_differ_from_the_profile_in_what_they_say():
    profile = load_profile()
    cells = ablations.grid(profile, 6)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {"seed", "layer", "expansion", "lambda", "ghost", "start", "b_dec", "tokens"} < {cell.axis for cell in cells}
    assert sum(cell.axis == "layer" for cell in cells) >= 4 and sum(cell.axis == "seed" for cell in cells) >= 3
    for cell in cells:
        changed = ablations._changed(profile, cell.settings)
        assert (changed == profile) == (cell.value == "0" and cell.axis == "seed"), f"{cell} is the profile itself, or should be"


def test_a_cell_is_trained_measured_and_kept(small, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ablations.stages, "concept_scenes", lambda profile, split: ablations.stages.load_dataset("openmoji/tools", split, n_images=72)
    )
    cells = [cell for cell in ablations.grid(small, tiny_clip.n_layers) if cell.name in ("layer-0", "topk-k_16")]
    out = tmp_path / "table.csv"
    grid = ablations.Grid(small, tiny_clip, n_tokens=1024, commit="abc", progress=False)
    rows = list(ablations.run(grid, cells, out))
    table = ablations.load_ablations(out)
    assert list(table["axis"]) == ["layer", "topk"] and list(table["layer"]) == [0, 1] and set(table["commit"]) == {"abc"}
    assert (table["n_training_tokens"] == 1024).all() and table.loc[1, "k"] == 16 and 0 < table.loc[1, "l0_all"] <= 16 + 1e-6
    for name in ("explained_variance_all", "zero_shot_change", "contrastive_loss", "object_ap"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    for name in ("log_frequency", "log_mean_activation", "label_entropy"):
        assert (table[f"{name}_q10"] <= table[f"{name}_q50"]).all() and (table[f"{name}_q50"] <= table[f"{name}_q90"]).all()
    assert (table["log_frequency_q90"] <= 0).all() and (table["label_entropy_q10"] >= 0).all()

    def train(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train_sae", train)
    again = list(ablations.run(ablations.Grid(small, tiny_clip, n_tokens=1024, progress=False), cells, out))
    assert again == rows


def test_seeds_are_matched_with_the_first(small, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.stages, "concept_scenes", lambda profile, split: None)
    grid = ablations.Grid(small, tiny_clip, n_tokens=512, progress=False)
    first, second = (grid.row(cell) for cell in ablations.grid(small, tiny_clip.n_layers)[:2])
    assert "matched_cosine" not in first and "object_ap" not in first
    assert second["matched_cosine_low"] <= second["matched_cosine"] <= second["matched_cosine_high"] <= 1
    assert second["matched_cosine"] == pytest.approx(
        ablations.matched_cosine(ps.load_sae(grid.folder / "seed-0"), ps.load_sae(grid.folder / "seed-1")).mean.mean
    )


def test_the_frontier_compares_like_with_like():
    row = {"layer": 4, "expansion": 16, "tokens": "all", "activation": "relu", "l0_all": 30.0, "axis": "seed", "value": "0"}
    others = [
        {"axis": "layer", "layer": 1},
        {"axis": "tokens", "tokens": "cls"},
        {"axis": "ghost"},
        {"axis": "topk", "activation": "topk", "l0_all": 16.0},
    ]
    table = pd.DataFrame([row, *({**row, **other} for other in others), {**row, "axis": "lambda", "l0_all": 20.0}])
    kept = ablations.frontier(table)
    assert list(kept["axis"]) == ["lambda", "seed", "topk"]


def test_variants_are_compared_where_they_are_as_sparse():
    rows = [("relu", 10, 0.5), ("relu", 40, 0.7), ("topk", 16, 0.8), ("topk", 32, 0.9), ("gated", 50, 0.9)]
    table = pd.DataFrame(rows, columns=["activation", "l0_all", "object_ap"])
    found = ablations.at_matched_l0(table, 20, ["object_ap"])["object_ap"]
    assert found["relu"] == pytest.approx(0.6)  # 20 is half-way between 10 and 40 on a logarithmic scale
    assert 0.8 < found["topk"] < 0.9 and pd.isna(found["gated"])


def test_tables_of_other_profiles_lie_with_their_runs():
    default, other = load_profile(), load_profile(overrides={"training.seed": 3})
    assert ablations.table_path(default).parts[-3:] == ("benchmarks", "results", "ablations.csv")
    assert ablations.table_path(other) == other.folder("ablations") / "ablations.csv"
    with pytest.raises(FileNotFoundError, match="make ablations"):
        ablations.load_ablations(profile=load_profile(overrides={"training.seed": 3}))


def test_a_missing_table_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="make ablations"):
        ablations.load_ablations(tmp_path / "none.csv")


def test_figures_draw(tmp_path):
    import matplotlib.pyplot as plt

    from patchsae_utils.plots import ablation_effects, reconstruction_frontier

    measures = ("explained_variance_all", "l0_all", "zero_shot_change", "object_ap")
    rows = [
        {
            "axis": axis,
            "value": value,
            "activation": axis if axis == "topk" else "relu",
            "layer": 4,
            "expansion": 16,
            "tokens": "all",
            "dead_fraction": 0.1,
        }
        | {f"{name}{end}": 0.1 * (number + 1) + shift for name in measures for end, shift in (("", 0), ("_low", -0.01), ("_high", 0.01))}
        for number, (axis, value) in enumerate(
            [("seed", "0"), ("seed", "1"), ("lambda", "1e-4"), ("ghost", "off"), ("topk", "k 16"), ("topk", "k 32")]
        )
    ]
    table = pd.DataFrame(rows)
    figures = [ablation_effects(table), reconstruction_frontier(ablations.frontier(table))]
    for fig in figures:
        fig.canvas.draw()
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["λ 1e-4", "", "ghost term off"]
    assert len(figures[1].axes[0].containers) == 2
    plt.close("all")
