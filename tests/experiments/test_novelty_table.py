"""Controls with a known answer: what is planted is where it is said to be, scores count it, and a cell is measured once."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import grid, novelty
from experiments.novelty import CONTROLS, SPLIT, Cell, Novelty, belongs, called_new, plant, scores, split_shares, trained_further
from patchsae_utils.config import load_profile
from patchsae_utils.tables import load_table


def test_what_belongs_to_a_planted_feature_in_slow_float64():
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(6, 5, 8, generator=generator) * (torch.rand(6, 5, 8, generator=generator) < 0.3)
    for planted in (torch.rand(6, 5, 3, generator=generator) < 0.3, torch.rand(6, 1, 3, generator=generator) < 0.4):
        found = belongs(f.split(4), planted)
        for s in range(8):
            for i in range(3):
                mass = [(f[n, t, s].item(), bool(planted[n, t % planted.shape[1], i])) for n in range(6) for t in range(5)]
                share, chance = sum(m for m, on in mass if on) / sum(m for m, _ in mass), np.mean([on for _, on in mass])
                assert found[s, i] == ((share - chance) / (1 - chance) >= 0.5)
    nothing = belongs([torch.zeros(6, 5, 2)], torch.ones(6, 5, 1, dtype=torch.bool))
    assert not nothing.any()


def test_scores_count_features_and_latents():
    inside = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
    row = scores(np.array([1, 1, 1, 1, 0], bool), inside)
    assert (row["planted"], row["found"], row["called"], row["candidates"]) == (3, 2, 4, 5)
    assert row["recall"] == pytest.approx(2 / 3) and row["precision"] == pytest.approx(3 / 4) and row["new_share"] == pytest.approx(4 / 5)
    n, p, z = 3, 2 / 3, 1.959964  # Wilson's interval, by hand
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (row["recall_low"], row["recall_high"]) == pytest.approx((middle - half, middle + half), abs=1e-6)
    nothing = scores(np.zeros(5, bool), inside[:, :0])
    assert nothing["recall"] is None and nothing["precision"] is None and nothing["new_share"] == 0


def small_streams(n=160, n_tokens=20, width=24, n_features=30):
    """Streams [n, T, 2, D] of sparse features, the same in both models but for noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n_features, width, generator=generator), dim=1)
    f = (torch.rand(n, n_tokens, n_features, generator=generator) < 0.08) * (1 + torch.rand(n, n_tokens, n_features, generator=generator))
    return (f @ rows)[:, :, None] + 0.02 * torch.randn(n, n_tokens, 2, width, generator=generator)


def test_planted_directions_are_in_the_second_model_alone_and_the_verdict_finds_them(monkeypatch):
    """Norms alone find none."""
    monkeypatch.setattr(novelty, "DIRECTIONS", {0.2: 2, 0.4: 2})
    before = small_streams()
    streams, planted = plant(before, per_picture=3)
    assert torch.equal(streams[:, :, 0], before[:, :, 0]) and planted.shape == (160, 20, 4)
    shown = planted.any(1).float()
    assert shown[::2].sum(0).tolist() == shown[1::2].sum(0).tolist() == [16, 16, 32, 32]
    assert torch.equal((streams - before)[:, :, 1].norm(dim=-1) > 0, planted.any(2))
    options = {"d_sae": 96, "k": 4, "progress": False}
    found = called_new(streams[::2], streams[1::2], planted[1::2], n_tokens=60_000, **options)
    rows = {name: scores(*each) for name, each in found.items()}
    for name in ("combined", "Latent Scaling", "two ridges", "own dictionary", "difference dictionary"):
        assert rows[name]["found"] == 4 and rows[name]["precision"] >= 0.75, name
    assert rows["any latent"]["found"] == 4
    assert rows["joint dictionary's norms"]["found"] == 0
    for name in ("random latents", "PCA of the difference"):
        assert rows[name]["precision"] < 0.5, name
    nothing = called_new(before[::2], before[1::2], planted[1::2, :, :0], n_tokens=20_000, **options)
    assert nothing["combined"][0].mean() < 0.05


def test_more_steps_on_the_training_mixture_move_the_image_tower_alone(tiny_clip, tiny_images):
    before = tiny_clip.weights_hash
    further = trained_further(tiny_clip, 2, 4)
    assert not torch.allclose(further.encode_image(tiny_images), tiny_clip.encode_image(tiny_images)) and tiny_clip.weights_hash == before
    assert torch.equal(further.encode_text("a cat."), tiny_clip.encode_text("a cat."))
    assert further.fingerprint == trained_further(tiny_clip, 2, 4).fingerprint


def test_controls_are_measured_once_and_make_one_table(tmp_path, tiny_clip, tiny_sae, monkeypatch):
    settings = {"adapters.epochs": 1, "adapters.n_ctx": 2, "model.layer": 1}
    profile = dataclasses.replace(load_profile(overrides=settings), root=tmp_path)
    monkeypatch.setattr(grid, "current_commit", lambda: "abc")
    monkeypatch.setattr(novelty, "N_SPLIT", 8)
    monkeypatch.setattr(novelty.stages, "trained_sae", lambda profile, clip: tiny_sae)
    options = {"n_fit": 24, "n_pictures": 24, "size": {"d_sae": 32, "k": 4, "n_tokens": 10_000}, "progress": False}
    by_name = {control.name: control for control in CONTROLS}
    cells = [
        Cell(by_name["CLIP itself"], "latents"),
        *(Cell(by_name[name], what) for name in ("CoOp", "unseen objects") for what in ("latents", "split")),
    ]
    for _ in grid.run(Novelty(profile, tiny_clip, **options), cells):
        pass
    table = load_table(profile, "novelty")
    assert set(table["control"]) == {"CLIP itself", "CoOp", "unseen objects"} and set(table["commit"]) == {"abc"}
    combined = table[table["method"] == "combined"].set_index("control")
    assert combined["new_share"]["CLIP itself"] == combined["new_share"]["CoOp"] == 0  # the image tower is CLIP's
    assert combined["planted"].tolist() == [0, 0, 24] and combined["recall"].notna().tolist() == [False, False, True]
    split = table[table["method"] == SPLIT].set_index("control")
    assert split["new_nats"]["CoOp"] == 0 and split["new_nats"]["unseen objects"] != 0
    monkeypatch.setattr(Novelty, "measure", lambda *args: pytest.fail("measured again"))
    again = Novelty(profile, tiny_clip, **options)
    assert sum(len(grid.row(again, cell)["rows"]) for cell in cells) == len(table)
    for _ in grid.run(again, cells[1:2]):  # one of them alone: the rows of the others stay
        pass
    kept = load_table(profile, "novelty").sort_values(["control", "method"], ignore_index=True)
    pd.testing.assert_frame_equal(kept, table.sort_values(["control", "method"], ignore_index=True), check_dtype=False)


def test_the_split_says_the_new_part_in_nats_and_as_a_share():
    parts = pd.DataFrame({"part": ["new concepts", "both"], "gain": [0.1, 0.5], "low": [0.0, 0.4], "high": [0.2, 0.6], "share": [0.2, 1.0],
                          "share_low": [0.0, 1.0], "share_high": [0.4, np.nan]})  # fmt: skip
    row = split_shares(parts)
    assert row["new_share"] == 0.2 and row["new_nats_high"] == 0.2 and row["gain_nats"] == 0.5
    assert split_shares(parts.assign(share=np.nan))["new_share"] is None
