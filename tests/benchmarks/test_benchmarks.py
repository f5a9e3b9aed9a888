"""The benchmarks' own arithmetic, and the training step's benchmark at a size of seconds."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, end_to_end, extraction, mask_sweep, sae_step

TINY = {"d_in": 24, "d_sae": 256, "tokens": 64, "l0": 8, "repeats": 1, "device": "cpu", "threads": 1}


@pytest.fixture
def one_process(monkeypatch):
    """Sides run here instead of in a process each; peers are told from the rest by the name of their module."""

    def run(module, side, settings, *, python=None, timeout=None):
        assert module == "benchmarks.sae_step"
        if side in sae_step.PEERS:
            return {"error": f"ModuleNotFoundError: No module named {side!r}"}
        return json.loads(json.dumps(sae_step.measure(side, settings)))

    monkeypatch.setattr(sae_step, "in_subprocess", run)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_report_is_one_json_object_on_the_screen_and_in_the_file(tmp_path, capsys):
    path = tmp_path / "results" / "some.json"
    returned = common.report("some", [{"side": "ours", "seconds": 1.5}], 2.0, path=path, targets={"ratio": 5})
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text()) == returned
    assert printed["benchmark"] == "some" and printed["ratio"] == 2.0 and printed["rows"] == [{"side": "ours", "seconds": 1.5}]
    assert printed["hardware"].keys() >= {"cpu", "cores", "gpu", "torch"} and printed["targets"] == {"ratio": 5}
    assert [file.name for file in path.parent.iterdir()] == ["some.json"]  # nothing half written lies about


def test_timing_leaves_the_warm_up_out(monkeypatch):
    calls, clock = [], iter([0, 200, 203, 300, 301, 400, 402])
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert common.timed(lambda: calls.append(1), repeats=3, warmup=1) == {"best": 1, "median": 2}
    assert len(calls) == 4


def test_peak_memory_counts_what_was_held_and_freed():
    before = common.peak_memory()
    size = before // 4  # floats: more than all that this process has ever held
    torch.ones(size)
    assert common.peak_memory() - before > size


def test_matmul_peak_is_a_rate():
    assert 1e8 < common.matmul_peak(size=128, seconds=0.05) < 1e16


def test_a_side_has_a_process_of_its_own_and_a_failure_is_a_row(tmp_path):
    assert "No module named" in common.in_subprocess("benchmarks.no_such_benchmark", "ours", {})["error"]
    measured = common.in_subprocess("benchmarks.sae_step", "ours", TINY, python=sys.executable)
    assert measured["seconds"] > 0 and measured["peak_memory_gb"] > measured["step_memory_gb"] >= 0
    assert measured["tokens_per_second"] == pytest.approx(TINY["tokens"] / measured["seconds"])


def test_all_sides_of_the_step_compute_the_same_loss():
    sides = {side: sae_step.measure(side, TINY) for side in ("textbook", "ours", "ours float32")}
    for side, measured in sides.items():
        assert measured["first_loss"] == pytest.approx(sides["textbook"]["first_loss"], rel=1e-5), side
        assert measured["l0"] == pytest.approx(TINY["l0"], rel=0.5), side
    assert sae_step.measure("ours topk", TINY)["l0"] <= TINY["l0"]


def test_all_sides_take_the_same_step(monkeypatch):
    monkeypatch.setattr(sae_step, "LR", 1e-2)
    trained = {}
    for side in ("textbook", "ours float32"):
        step = sae_step.prepare(side, TINY)()
        for _ in range(3):
            step.step()
        trained[side] = step.weights
    for name, expected in trained["textbook"].named_parameters():
        got = getattr(trained["ours float32"], name)
        near = torch.isclose(got, expected, rtol=1e-3, atol=1e-4)  # Adam makes a whole step of a gradient that is 0 but for rounding
        assert near.float().mean() > 0.99, name
    fresh = sae_step.prepare("textbook", TINY)().weights
    assert (trained["textbook"].W_enc - fresh.W_enc).abs().max() > 0.02  # they did move


def test_the_step_benchmark_prints_one_object(one_process, capsys, tmp_path):
    path = tmp_path / "sae_step.json"
    sizes = ["--images", "2", "1", "--tokens-per-image", "16", "--d-in", "24", "--d-sae", "256", "--l0", "8"]
    result = sae_step.main([*sizes, "--repeats", "1", "--threads", "1", "--json", str(path)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text()) == json.loads(json.dumps(result))
    first = {row["side"]: row for row in printed["rows"] if row["kind"] == "headline" and row["tokens"] == 32}
    assert printed["ratio"] == pytest.approx(first["textbook"]["seconds"] / first["ours"]["seconds"])
    assert [pair["tokens"] for pair in printed["pairs"]] == [32, 16]
    assert all(pair["loss_difference"] < 1e-4 for pair in printed["pairs"])
    assert {row["kind"] for row in printed["rows"]} == {"headline", "peers", "d_sae", "tokens", "density"}
    peers = {row["side"]: row for row in printed["rows"] if row["kind"] == "peers"}
    assert peers.keys() == {"ours topk", "overcomplete", "sparsify", "sae_lens"}
    assert "No module named" in peers["sae_lens"]["error"] and peers["sae_lens"]["package"] == "sae-lens"
    assert "seconds" in peers["ours topk"]
    assert all(0 < row["dense_flops_per_second_over_matmul_peak"] for row in printed["rows"] if "seconds" in row)


def test_both_sides_of_the_mask_sweep_find_the_same_logits():
    setting = mask_sweep.Setting(model="openmoji", d_sae=64, n_images=2, l0=8, batch_size=2, n_classes=5)
    rows, ratio, about = mask_sweep.compare(setting)
    assert about["largest_logit_gap"] < 1e-3 < about["logit_range_over_masks"]  # equal, though the masks do change something
    assert about["n_masks"] == 3 + 2 * len(mask_sweep.KS) and ratio == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


def test_the_mask_sweep_refuses_sides_that_disagree(monkeypatch):
    setting = mask_sweep.Setting(model="openmoji", d_sae=64, n_images=1, l0=8, batch_size=1, n_classes=3)
    whole = setting.whole
    monkeypatch.setattr(setting, "whole", lambda: {key: logits + 0.1 for key, logits in whole().items()})
    with pytest.raises(RuntimeError, match="disagree"):
        mask_sweep.compare(setting)


def test_extraction_and_end_to_end_print_one_object(monkeypatch, capsys):
    small = ["--model", "openmoji", "--pretrained", "", "--images", "2", "--threads", "1"]
    monkeypatch.setattr(end_to_end, "in_subprocess", lambda module, side, settings: end_to_end.measure(side, settings))
    threads = torch.get_num_threads()
    try:
        result = extraction.main([*small, "--repeats", "1", "--no-memory"])
        assert [row["side"] for row in result["rows"]] == list(extraction.SIDES) and result["over_bare"]["best"] > 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
        result = end_to_end.main([*small, "--steps", "1", "--d-sae", "256", "--l0", "8"])
        assert [row["side"] for row in result["rows"]] == list(end_to_end.SIDES)
        assert result["rows"][0]["l0"] == pytest.approx(result["rows"][1]["l0"], rel=0.05)  # the same work, sparse and dense
    finally:
        torch.set_num_threads(threads)
