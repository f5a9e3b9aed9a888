"""Two processes write what one writes, byte for byte, and one goes on where two were stopped; two train as one does.

On CPUs ``accelerate launch`` starts several processes through MPI only; torch's own launcher, which accelerate understands as well, needs nothing.
"""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import shares
import torch
import two_processes
from tiny import ENVIRONMENT, HERE, assert_same_files
from tiny_training import weights

from patchsae_utils.latents.likeness import Likeness
from patchsae_utils.run.artifacts import read_json
from patchsae_utils.sae.files import load_sae
from patchsae_utils.sae.trainer import training_log


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    """Folders of what one process made, and what two."""
    out = tmp_path_factory.mktemp("shares")
    folders = {number: out / str(number) for number in (1, 2)}
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    for folder in folders.values():
        folder.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "shares.py", folders[2]]
    launched = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares.passes, "SAVE_SECONDS", 0.0)
        shares.main(folders[1])
    two_processes.main(folders[1] / "trained")
    _, text = launched.communicate(timeout=300)
    assert launched.returncode == 0, text[-4000:]
    return folders


@pytest.mark.parametrize("name", ["store", "statistics"])
def test_processes_write_what_one_writes(runs, name):
    """Byte for byte, manifests included."""
    assert_same_files(*(runs[n] / "whole" / name for n in (1, 2)))
    assert len(list((runs[2] / "whole" / name).iterdir())) >= 2


def test_every_image_is_read_once_and_shares_are_fair(runs):
    for name in shares.STAGES:
        read = [list(map(int, (runs[2] / f"read-{name}-{rank}").read_text().split())) for rank in range(2)]
        for part in read if name == "statistics" else ():
            assert part[2:4] == [0, 1]  # by which the controls are made, in every process
            del part[2:4]
        assert sorted(row for part in read for row in part) == list(range(23)), name
        assert max(map(len, read)) <= 23 // 2 + 4


def test_monosemanticity_agrees_to_rounding(runs):
    one, several = (Likeness.load(runs[n] / "whole" / "likeness") for n in (1, 2))
    assert torch.equal(one.embeddings, several.embeddings)
    pd.testing.assert_frame_equal(one.table, several.table, check_exact=False, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", shares.STAGES)
def test_what_stops_one_process_is_said_by_all_and_any_number_goes_on(runs, tmp_path, one_thread, number, name):
    messages = [(runs[number] / f"error-{name}-{rank}").read_text() for rank in range(number)]
    assert all(f"picture {shares.BAD} is broken" in message for message in messages)
    assert sum(message.startswith("Process ") for message in messages) == number - 1, "one has the error itself, the others its text"
    shutil.copytree(runs[number] / "cut", tmp_path / "cut")
    data = shares.Pictures()
    shares.STAGES[name](tmp_path / "cut", data)
    assert_same_files(runs[1] / "whole" / name, tmp_path / "cut" / name)
    assert shares.BAD in data.read and len(set(data.read)) <= 12, "what was done is not done again"
    left = {path.name for path in (tmp_path / "cut").rglob(".*")}
    assert left == (set() if name == "statistics" else {".statistics-unfinished"}), "of what was completed nothing is left lying about"


# -- training ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(runs):
    """Folders of what one process trained, and what two."""
    return runs[1] / "trained", runs[2] / "trained"


@pytest.mark.parametrize("name", [*two_processes.RUNS, "stream"])
def test_two_processes_follow_one(trained, name):
    one, two = (training_log(folder / name) for folder in trained)
    assert len(two) == len(one) and (two["step"] == one["step"]).all(), "one process writes"
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    for column in ("mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "lr"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-4, atol=1e-5)
    for parameter, value in weights(load_sae(trained[0] / name)).items():
        torch.testing.assert_close(weights(load_sae(trained[1] / name))[parameter], value, rtol=0, atol=1e-4)
    assert [read_json(folder / name / "summary.json")["processes"] for folder in trained] == [1, 2]


def test_interrupted_under_two_processes_it_goes_on_bit_for_bit(trained):
    for folder in trained:
        whole, resumed = (weights(load_sae(folder / name)) for name in ("relu", "resumed"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert read_json(folder / "resumed" / "summary.json")["starts"] == 2


def test_a_stream_trained_the_model_once_an_image_not_once_a_process(trained):
    """400 tokens are eight epochs of ten images: 80 passes for one process; shared, 40 each."""
    counts = [[int(path.read_text()) for path in sorted(folder.glob("images-*"))] for folder in trained]
    assert counts == [[80], [40, 40]]


def test_selection_over_the_batch_is_over_each_share(trained):
    """Not the same run, then, but as good a one, and its threshold is the mean of both."""
    one, two = (training_log(folder / "batchtopk").iloc[-1] for folder in trained)
    assert two["l0"] == pytest.approx(one["l0"], rel=0.02)
    assert two["explained_variance"] == pytest.approx(one["explained_variance"], abs=0.02)
    thresholds = [load_sae(folder / "batchtopk").threshold.item() for folder in trained]
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.1)


def test_an_error_is_raised_in_all_processes(trained):
    for folder, number in zip(trained, (1, 2), strict=True):
        messages = [path.read_text() for path in folder.glob("error-*")]
        assert len(messages) == number and all("checkpoint.pt can't be read" in message for message in messages)
