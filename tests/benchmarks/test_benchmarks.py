"""The benchmarks' own arithmetic, and each at sizes of no consequence: they run, compare like with like, and write what they print."""

import json
import logging
import shutil
import sys

import pytest
import torch

from benchmarks import common, gpu, mask_sweep, sae_step, summary
from patchsae_utils.clip.loading import EMBEDDED

TINY = {"d_in": 24, "d_sae": 256, "tokens": 64, "l0": 8, "repeats": 1, "device": "cpu", "threads": 1}


@pytest.fixture
def one_process(monkeypatch):
    """Sides run here instead of in a process each, which takes long to start; peers are told from the rest by the name of their module."""

    def run(module, side, settings, *, python=None, timeout=None):
        settings = json.loads(json.dumps(settings))
        torch.manual_seed(0)  # as every fresh process begins alike
        if module == "benchmarks.summary":
            return summary.SIDES[side](settings)
        if side in ("extraction", "mask sweep"):
            return gpu.measure(side, settings)
        if side in sae_step.PEERS:
            return {"error": f"ModuleNotFoundError: No module named {side!r}"}
        return json.loads(json.dumps(sae_step.measure(side, settings)))

    for benchmark in (sae_step, gpu):
        monkeypatch.setattr(benchmark, "in_subprocess", run)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def test_a_side_has_a_process_of_its_own_and_a_failure_is_a_row():
    assert "No module named" in common.in_subprocess("benchmarks.no_such_benchmark", "ours", {})["error"]
    assert common.in_subprocess("benchmarks.sae_step", "ours", TINY, python=shutil.which("echo")) == {"error": "exit status 0"}, "no JSON"
    measured = common.in_subprocess("benchmarks.sae_step", "ours", TINY, python=sys.executable)
    assert measured["seconds"] > 0 and measured["peak_memory_gb"] > measured["step_memory_gb"] >= 0
    assert measured["tokens_per_second"] == pytest.approx(TINY["tokens"] / measured["seconds"])


def test_all_sides_of_the_step_compute_the_same_loss():
    sides = {side: sae_step.measure(side, TINY) for side in ("textbook", "ours", "ours float32")}
    for side, measured in sides.items():
        assert measured["first_loss"] == pytest.approx(sides["textbook"]["first_loss"], rel=1e-5), side
        assert measured["l0"] == pytest.approx(TINY["l0"], rel=0.5), side
    dead = [sae_step.measure(side, TINY)["first_loss"] for side in ("textbook dead", "ours dead")]
    assert dead[0] == pytest.approx(dead[1], rel=1e-3) and dead[0] > 1.3 * sides["textbook"]["first_loss"]
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
    assert printed["hardware"].keys() >= {"cpu", "cores", "gpu", "torch"} and [file.name for file in tmp_path.iterdir()] == [
        "sae_step.json"
    ]
    assert [pair["tokens"] for pair in printed["pairs"]] == [32, 16]
    assert all(pair["loss_difference"] < 1e-4 for pair in printed["pairs"])
    assert {row["kind"] for row in printed["rows"]} == {"headline", "dead", "peers", "d_sae", "tokens", "density"}
    assert all(pair["dead_ratio"] > 0 for pair in printed["pairs"])
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


WEIGHTS = str(EMBEDDED / "open_clip_model.safetensors")
GPU = "--device cpu --threads 1 --model openmoji --d-in 24 --d-sae 256 --tokens 32,64 --l0s 8 --images 1 --steps 1 --repeats 1 --product 64"
GPU += f" --pretrained {WEIGHTS} --sweep-images 1 --summary-images 2"


def test_one_command_measures_all_of_a_gpu_and_a_part_that_fails_costs_itself_alone(one_process, tmp_path, monkeypatch, capsys):
    path, kept = tmp_path / "gpu.json", []

    def fails(run):
        yield {"side": "first"}
        kept.append(json.loads(path.read_text())["parts"]["end to end"])  # what a run that is cut off here would leave
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def tests(run):
        yield {"status": 0}

    monkeypatch.setattr(gpu, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS | {"tests": tests, "end to end": fails})
    result = gpu.main([*GPU.split(), "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result)) and set(result["parts"]) == set(gpu.PARTS)
    parts = result["parts"]
    assert kept == [[{"side": "first"}]] and parts["end to end"][1]["error"].startswith("RuntimeError: CUDA error")
    assert "RuntimeError: CUDA error" in capsys.readouterr().err
    assert [(row["side"], row["tokens"]) for row in parts["step"]] == [(side, 32) for side in gpu.SIDES]
    assert all("seconds" in row for row in parts["step"] if row["side"] not in sae_step.PEERS)
    assert all("No module named" in row["error"] for row in parts["step"] if row["side"] in sae_step.PEERS)
    losses = [row["first_loss"] for row in parts["step"][:3]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2), "the same loss in bfloat16"
    assert parts["extraction"][0]["images_per_second"] > 0 and parts["mask sweep"][0]["ratio"] > 0 and parts["statistics"][0]["seconds"] > 0
    assert [(row["tokens"], set(row) - {"tokens", "target_l0"}) for row in result["ratios"]] == [
        (n, {"dense TF32", "dense bfloat16"}) for n in (32, 64)
    ]


def test_a_run_that_is_ended_in_the_middle_keeps_what_it_has(tmp_path, monkeypatch):
    def ended(run):
        yield {"side": "first"}
        raise KeyboardInterrupt

    parts = {"one": lambda run: iter([{"side": "whole"}]), "two": ended, "three": ended}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*GPU.split(), "--json", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"] == {"one": [{"side": "whole"}], "two": [{"side": "first"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
