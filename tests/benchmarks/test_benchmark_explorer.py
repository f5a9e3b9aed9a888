"""The explorers' benchmark: what it reports. Its interactions are tried in test_explorer_end_to_end.py, where a page is open anyway."""

import ast
import json

import nbformat
import pytest

pytest.importorskip("playwright", reason="the benchmark drives a browser: pip install playwright")
from benchmarks import explorer  # noqa: E402


def test_the_report_sets_each_median_beside_its_target(monkeypatch, capsys, tmp_path):
    asked = []

    def measure(world, settings, repeats, threads, interactions, reruns, timeout):
        asked.append((world, settings.get("d_sae"), repeats, interactions, reruns))
        times = {"heat map": [10, 30, 90], "steering step": [100.0], explorer.FIRST_USE: [2500.0]}
        rows = [explorer.row(what, ms, world) for what, ms in times.items()]
        return rows, [{"within_target": True}] * bool(interactions)

    monkeypatch.setattr(explorer, "measure", measure)
    returned = explorer.main(["--json", str(tmp_path / "explorer.json"), "--d-sae", "512"])
    assert asked == [("openmoji", None, 30, 1000, 10), ("large", 512, 30, 0, 0)]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "explorer.json").read_text()) == json.loads(json.dumps(returned))
    rows = {(row["world"], row["interaction"]): row for row in returned["rows"]}
    assert [rows[world, "heat map"]["within_target"] for world in ("openmoji", "large")] == [False, True]  # twice the time is allowed
    assert rows["openmoji", "heat map"]["median_ms"] == 30 and rows["openmoji", "heat map"]["p90_ms"] == 78
    assert rows["openmoji", explorer.FIRST_USE]["target_ms"] is None and rows["large", explorer.FIRST_USE]["within_target"] is False
    assert returned["within_targets"] is False and returned["memory"] == [{"within_target": True}]


@pytest.mark.parametrize("world", ["openmoji", "large"])
def test_its_notebook_is_python_and_shows_three_views(tmp_path, world):
    path = explorer.write_notebook(tmp_path, world, {"d_sae": 64}, threads=1)
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) == 3 and cells[-1].source.endswith(
        "display(latents, patches, panel)\n"
    )  # one cell, which is run again for the memory
    ast.parse("\n".join(cell.source for cell in cells))
