"""The memory benchmark runs at a small size, and says what it should."""

from __future__ import annotations

import json
from pathlib import Path


def test_the_benchmark_reports_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import summary
    from patchsae_utils import stages
    from patchsae_utils.clip.loading import load_clip
    from patchsae_utils.sae.model import SparseAutoencoder

    clip = load_clip("openmoji")
    monkeypatch.setattr(stages, "trained_sae", lambda profile, model: SparseAutoencoder(clip.width, 64))
    # In this process: here the numbers don't matter, and a process a side takes long to start.
    monkeypatch.setattr(summary, "in_subprocess", lambda module, side, settings: summary.SIDES[side](json.loads(json.dumps(settings))))
    sizes = {
        "d-sae": 96,
        "batch": 4,
        "images": 8,
        "small-d-sae": 64,
        "small-batch": 4,
        "small-images": 8,
        "classes": 3,
        "l0": 9,
        "scenes": 12,
    }
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    returned = summary.main(["--model", "tiny", "--device", "cpu", "--json", str(tmp_path / "s.json"), *options])
    result = json.loads((tmp_path / "s.json").read_text())
    assert json.loads(capsys.readouterr().out) == result == json.loads(json.dumps(returned)) and result["benchmark"] == "summary"
    assert [(row["side"], row["d_sae"]) for row in result["rows"]] == [
        ("ours", 96),
        ("ours", 64),
        ("textbook", 64),
        ("scenes", 64),
    ]
    assert all(row["peak_bytes"] > 1e7 and row["images_per_second"] > 0 for row in result["rows"][:3])
    assert result["within_limit"] == (result["rows"][0]["peak_bytes"] < 4e9) and result["rows"][2]["added_bytes"] >= 0
    assert result["rows"][3]["images"] == 12 and result["scenes_within_limit"] == (result["rows"][3]["seconds"] * 5000 / 12 < 180)


def test_a_side_alone_prints_its_result(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import summary

    settings = {"model": "tiny", "device": "cpu", "threads": 1, "classes": 3, "l0": 9, "repeats": 1, "d_sae": 64, "batch": 4, "images": 4}
    assert summary.main(["--side", "textbook", "--settings", json.dumps(settings)]) is None
    assert set(json.loads(capsys.readouterr().out)) == {"seconds", "images_per_second", "peak_bytes", "added_bytes"}
