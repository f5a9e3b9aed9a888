"""The benchmarks of extraction and of the whole way, at sizes of no consequence: they run, compare like with like, and write what they print."""

import json

import pytest

from benchmarks import end_to_end, extraction
from benchmarks.common import in_subprocess

SMALL = ["--model", "openmoji", "--images", "1", "--repeats", "1", "--threads", "1", "--device", "cpu"]


def test_extraction(tmp_path, capfd):
    path = tmp_path / "extraction.json"
    result = extraction.main([*SMALL, "--no-memory", "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(capfd.readouterr().out) == json.loads(json.dumps(result))
    rows = {row["side"]: row for row in result["rows"]}
    assert set(rows) == set(extraction.SIDES)
    assert all(row["images_per_second"] == pytest.approx(1 / row["seconds"]) for row in rows.values())
    assert result["ratio"] == pytest.approx(rows["whole"]["seconds"] / rows["ours"]["seconds"])
    assert result["over_bare"]["best"] == pytest.approx(rows["ours"]["seconds"] / rows["bare"]["seconds"])


def test_memory_of_a_side_is_measured_in_a_process_of_its_own():
    settings = {"model": "openmoji", "pretrained": None, "images": 1, "layer": -2, "device": "cpu", "threads": 1}
    found = in_subprocess("benchmarks.extraction", "ours", settings)
    assert 0.1 < found["peak_memory_gb"] < 10


def test_end_to_end(tmp_path, capfd):
    path, sizes = tmp_path / "end_to_end.json", ["--images", "2", "--steps", "2", "--d-sae", "512", "--l0", "16"]
    result = end_to_end.main(["--model", "openmoji", *sizes, "--threads", "1", "--device", "cpu", "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    rows = {row["side"]: row for row in result["rows"]}
    assert set(rows) == set(end_to_end.SIDES)
    assert all(row["tokens_per_second"] == pytest.approx(197 * row["images_per_second"]) for row in rows.values())
    assert rows["ours"]["l0"] == pytest.approx(16, rel=0.5), "as many latents fire as were asked for"
    assert rows["ours"]["l0"] == pytest.approx(rows["dense"]["l0"], rel=0.02), "in both"
    assert result["ratio"] == pytest.approx(rows["ours"]["images_per_second"] / rows["dense"]["images_per_second"])
