"""Killed at any moment, a run goes on bit for bit; what was half written is never read; two processes never train into one folder."""

import subprocess
import sys

import pandas as pd
import pytest
import tiny
import torch
from tiny_training import CONFIG, assert_same, cut_off, run, weights

from patchsae_utils.config import TrainConfig
from patchsae_utils.run.artifacts import folder_lock, read_json
from patchsae_utils.sae.files import load_sae
from patchsae_utils.sae.trainer import CHECKPOINT, training_log

SETTINGS = {
    "n_tokens": 160 * 64, "batch_tokens": 64, "lr": 3e-3, "warmup_steps": 30, "schedule": "cosine", "l1_coefficient": 1e-3, "l1_warmup_steps": 50,
    "clip_gradient": 1.0, "dead_after_tokens": 4 * 64, "log_every": 1, "checkpoint_every": 3, "normalize": "mean_and_norm", "seed": 1,
}  # fmt: skip


RUNS = {
    "relu": {"n_kills": 10, "options": {}, "settings": SETTINGS},
    # Its threshold is a running mean.
    "batchtopk": {"n_kills": 5, "options": {"activation": "batchtopk", "k": 3}, "settings": SETTINGS | {"l1_coefficient": 0.0}},
    "sparse": {"n_kills": 5, "options": {}, "settings": SETTINGS | {"sparse": "always", "start": "data", "normalize": "none"}},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Each run's folder, and at which rows of its log it was killed."""
    out = tmp_path_factory.mktemp("killed")
    return out, tiny.killed(out, RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_a_run_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, killed, one_thread, name):
    folder, found = killed[0] / name, killed[1][name]
    n_kills, options, settings = RUNS[name].values()
    assert len(found["killed_at"]) == n_kills and found["status"] == 0
    assert max(found["killed_at"]) < 160 and len(set(found["killed_at"])) > n_kills / 2, "at different moments"
    run(tmp_path, TrainConfig(**settings), **options)
    assert_same(weights(load_sae(folder)), weights(load_sae(tmp_path)))
    logs = [training_log(path).drop(columns="tokens_per_second") for path in (folder, tmp_path)]
    pd.testing.assert_frame_equal(*logs)
    assert len(logs[0]) == 160
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert read_json(folder / "summary.json")["starts"] > 1


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path):
    """In the middle of a tensor, where nothing but a checksum can notice."""
    cut_off(tmp_path, CONFIG, 20)
    checkpoint = tmp_path / CHECKPOINT
    content = bytearray(checkpoint.read_bytes())
    state = torch.load(checkpoint, weights_only=True)
    place = content.index(state["sae"]["W_enc"].numpy().tobytes())
    content[place + 100] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt can't be read.*Delete it"):
        run(tmp_path)
    assert not (tmp_path / ".lock").exists(), "a run that fails lets go of its folder"


HOLDER = """
import sys, time
from patchsae_utils.run.artifacts import folder_lock
with folder_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_two_processes_can_t_train_into_one_folder(tmp_path, holder):
    with pytest.raises(ValueError, match="is being written by another process.*Wait"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "and nothing was touched"
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists(), "the dead process has left its lock"
    run(tmp_path)
    assert not (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        run(tmp_path)  # what is finished is opened
