"""The grid of ablations: each cell changes one thing, and what was measured is not measured again."""

import dataclasses

import pytest

import patchsae_utils as ps
from experiments import ablations, grid
from experiments.ablations import Ablations, cells
from patchsae_utils.config import load_profile
from patchsae_utils.tables import load_table, table_path


@pytest.fixture
def small(tmp_path):
    profile = load_profile(
        overrides={
            "data.n_train_images": 24, "data.n_evaluation_images": 24, "data.evaluation": "openmoji/tools", "data.statistics": "openmoji/tools", "sae.expansion_factor": 4,
            "training.batch_tokens": 256, "training.start": "random", "training.warmup_steps": 2, "training.n_tokens": 1024,
        }
    )  # fmt: skip
    return dataclasses.replace(profile, root=tmp_path)


def test_cells_differ_from_the_profile_in_what_they_say(small, tiny_clip):
    found, grid_ = cells(small, 6, 768), Ablations(small, tiny_clip, progress=False)
    assert len({cell.name for cell in found}) == len(found) == len({repr(cell.settings) for cell in found})
    assert {"seed", "layer", "expansion", "paper", "start", "dead", "units", "tokens", "topk", "relu", "jumprelu", "gated"} < {
        cell.axis for cell in found
    }
    assert sum(cell.axis == "layer" for cell in found) >= 4 and sum(cell.axis == "seed" for cell in found) >= 3
    for cell in cells(small, tiny_clip.n_layers, tiny_clip.width):
        changed = grid_._profile(dict(cell.settings))[0]
        assert (changed == small) == (cell.name in ("seed-0", "start-random_weights")), f"{cell} is the main setting itself, or should be"
    papers = grid_._profile(dict(next(cell.settings for cell in found if cell.name == "paper-lambda_x1")))[0].training
    assert (papers.l1_coefficient, papers.start, papers.normalize) == (8e-5, "random", "none")  # in 768 dimensions


@pytest.fixture
def fewer_scenes(monkeypatch):
    def scenes(profile, split):
        return ablations.stages.load_dataset("openmoji/tools", split, n_images=72)

    monkeypatch.setattr(ablations.stages, "concept_scenes", scenes)


def test_a_cell_is_trained_measured_and_kept(small, tiny_clip, tmp_path, monkeypatch, fewer_scenes):
    chosen = [cell for cell in cells(small, tiny_clip.n_layers, tiny_clip.width) if cell.name in ("layer-0", "topk-k_16")]
    monkeypatch.setattr(grid, "current_commit", lambda: "abc")
    rows = [row for _, row, _ in grid.run(Ablations(small, tiny_clip, progress=False), chosen)]
    table = load_table(small, "ablations")
    assert table_path(small, "ablations") == tmp_path / "experiments" / "ablations.csv"
    assert list(table["axis"]) == ["layer", "topk"] and list(table["layer"]) == [0, 1] and set(table["commit"]) == {"abc"}
    assert (table["n_training_tokens"] == 1024).all() and table.loc[1, "k"] == 16 and 0 < table.loc[1, "l0_all"] <= 16 + 1e-6
    for name in ("explained_variance_all", "zero_shot_change", "contrastive_loss", "object_ap", "one_latent_change", "one_latent_flip"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    for name in ("log_frequency", "log_mean_activation", "label_entropy"):
        assert (table[f"{name}_q10"] <= table[f"{name}_q50"]).all() and (table[f"{name}_q50"] <= table[f"{name}_q90"]).all()
    assert (table["log_frequency_q90"] <= 0).all() and (table["label_entropy_q10"] >= 0).all()
    # The committed table was written by the same columns; rows of before lack what one latent does (FAULTS D22).
    optional = {"matched_cosine", *(f"matched_cosine_{end}" for end in ("low", "high", "random"))}
    optional |= {f"one_latent_{name}{end}" for name in ("change", "flip") for end in ("", "_low", "_high")}
    assert set(load_table(load_profile(), "ablations")) - optional == set(table) - optional

    monkeypatch.setattr(ablations, "train_sae", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(grid, "current_commit", lambda: "def")  # a row keeps the commit that measured it
    again = list(grid.run(Ablations(small, tiny_clip, progress=False), chosen, tmp_path / "elsewhere"))
    assert [row for _, row, _ in again] == rows and (tmp_path / "elsewhere" / "ablations.csv").exists()


def test_seeds_are_matched_with_the_first(small, tiny_clip, monkeypatch):
    monkeypatch.setattr(ablations.stages, "concept_scenes", lambda *_: None)
    few = Ablations(small, tiny_clip, progress=False)
    first, second = (grid.row(few, cell) for cell in cells(small, tiny_clip.n_layers, tiny_clip.width)[:2])
    assert "matched_cosine" not in first and "object_ap" not in first
    assert second["matched_cosine_low"] <= second["matched_cosine"] <= second["matched_cosine_high"] <= 1
    assert second["matched_cosine"] == pytest.approx(
        ablations.matched_cosine(ps.load_sae(few.folder / "seed-0"), ps.load_sae(few.folder / "seed-1")).mean.value
    )
