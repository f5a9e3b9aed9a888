"""Two processes give what one gives: each takes its share of every batch.

On CPUs ``accelerate launch`` starts several processes through MPI only; torch's own launcher, which accelerate understands as well, needs nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
from tiny_training import weights

from patchsae_utils.run.artifacts import read_json
from patchsae_utils.sae.files import load_sae
from patchsae_utils.sae.trainer import training_log

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of what one process trained, and what two."""
    out = tmp_path_factory.mktemp("processes")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        HERE / "two_processes.py",
        out / "two",
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "ACCELERATE_USE_CPU": "true",
    }
    (out / "two").mkdir()
    (out / "one").mkdir()
    two = subprocess.run(launch, capture_output=True, text=True, timeout=180, env=environment)
    assert two.returncode == 0, two.stderr[:4000]
    threads = torch.get_num_threads()
    two_processes.main(out / "one")
    torch.set_num_threads(threads)
    return out / "one", out / "two"


@pytest.mark.parametrize("name", [*two_processes.RUNS, "stream"])
def test_two_processes_follow_one(runs, name):
    one, two = (training_log(folder / name) for folder in runs)
    assert len(two) == len(one) and (two["step"] == one["step"]).all(), "one process writes"
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    for column in ("mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "lr"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-4, atol=1e-5)
    for parameter, value in weights(load_sae(runs[0] / name)).items():
        torch.testing.assert_close(weights(load_sae(runs[1] / name))[parameter], value, rtol=0, atol=1e-4)
    assert [read_json(folder / name / "summary.json")["processes"] for folder in runs] == [1, 2]


def test_interrupted_under_two_processes_it_goes_on_bit_for_bit(runs):
    for folder in runs:
        whole, resumed = (weights(load_sae(folder / name)) for name in ("relu", "resumed"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert read_json(folder / "resumed" / "summary.json")["starts"] == 2


def test_a_stream_runs_the_model_once_an_image_not_once_a_process(runs):
    """400 tokens are eight epochs of ten images: 80 passes for one process; shared, 40 each."""
    counts = [[int(path.read_text()) for path in sorted(folder.glob("images-*"))] for folder in runs]
    assert counts == [[80], [40, 40]]


def test_selection_over_the_batch_is_over_each_share(runs):
    """Not the same run, then, but as good a one, and its threshold is the mean of both."""
    one, two = (training_log(folder / "batchtopk").iloc[-1] for folder in runs)
    assert two["l0"] == pytest.approx(one["l0"], rel=0.02) and two["explained_variance"] == pytest.approx(
        one["explained_variance"], abs=0.02
    )
    thresholds = [load_sae(folder / "batchtopk").threshold.item() for folder in runs]
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.1)


def test_an_error_is_raised_in_all_processes(runs):
    for folder, number in zip(runs, (1, 2), strict=True):
        messages = [path.read_text() for path in folder.glob("error-*")]
        assert len(messages) == number and all("checkpoint.pt can't be read" in message for message in messages)
