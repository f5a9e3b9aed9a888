"""Disks that fill up in the middle of a file, and folders in which nothing may be written: what is said, and that nothing is lost."""

import contextlib
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from tiny import assert_same_files
from tiny_saes import trained
from tiny_training import CONFIG, assert_same, cut_off, run

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.latents import passes
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.trainer import CHECKPOINT

LAYER = -2


@contextlib.contextmanager
def files_of_at_most(n_bytes: int):
    """The system refuses to let any file of this process grow beyond: a quota that needs no privileges."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_training_on_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """The first checkpoint fits, the next doesn't: the folder stays a run that goes on."""
    cut_off(tmp_path / "run", CONFIG, 20)
    checkpoint = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with files_of_at_most(2000), pytest.raises(OSError, match="File too large, while this file was being written|No space left on device"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == checkpoint
    assert not list((tmp_path / "run").glob(".*")), "what was half written is gone, and so is the lock"
    assert_same(run(tmp_path / "run"), run(tmp_path / "whole"))


@pytest.mark.parametrize("make", ["store", "statistics", "sae"])
def test_a_file_that_may_not_grow_is_named_and_the_same_call_goes_on(tiny_clip, tiny_sae, tiny_dataset, tmp_path, make):
    calls = {
        "store": lambda out: extract_activations(tiny_clip, tiny_dataset, LAYER, out, n_per_shard=5, progress=False),
        "statistics": lambda out: summarize_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, k=50, out=out, progress=False),
        "sae": lambda out: SparseAutoencoder(32, 64).save(out),
    }
    with files_of_at_most(12_000), pytest.raises(OSError, match="What was whole before is kept: free some space") as raised:
        calls[make](tmp_path / "out")
    assert str(tmp_path / "out") in str(raised.value)
    left = [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or ".lock" in path.name]
    assert left == []
    calls[make](tmp_path / "out")
    calls[make](tmp_path / "again")
    assert_same_files(tmp_path / "out", tmp_path / "again")


def test_a_full_disk_is_named_by_what_is_written_bit_by_bit_too(tiny_clip, tiny_sae, tiny_dataset, tmp_path, monkeypatch):
    """The log of a training and the counts of a pass ended in a bare "No space left on device"."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(passes, "save_file", full)
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0)
    with pytest.raises(OSError, match="free some space.*s-unfinished"):
        summarize_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, out=tmp_path / "s", progress=False)
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="free some space.*training_log.csv"):
        run(tmp_path / "run")


# -- read-only folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(tiny_clip, tiny_sae, tiny_dataset):
    """A folder with artifacts that nobody may write in; root, who may write everywhere, becomes somebody else while it is used."""
    folder = Path(tempfile.mkdtemp(prefix="read only "))  # pytest's folders are closed to others
    extract_activations(tiny_clip, tiny_dataset, LAYER, folder / "store", progress=False)
    summarize_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, out=folder / "statistics", progress=False)
    folders = [folder, folder / "store", folder / "statistics"]
    for path in folder.rglob("*"):
        path.chmod(0o644)
    for each in folders:
        each.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for each in folders:
            each.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_read_and_refuses_what_is_new(tiny_clip, tiny_sae, tiny_dataset, read_only):
    """No lock and no temporary file is needed for what is there; all else is said and leaves nothing."""
    before = sorted(read_only.rglob("*"))
    store = extract_activations(tiny_clip, tiny_dataset, LAYER, read_only / "store", progress=False)
    store.verify()
    assert next(store.tokens(8)).isfinite().all()
    assert summarize_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, out=read_only / "statistics", progress=False).n_images == 24
    for call in (
        lambda: trained({}).save(read_only / "sae"),
        lambda: extract_activations(tiny_clip, tiny_dataset, 0, read_only / "store", progress=False),
        lambda: extract_activations(tiny_clip, tiny_dataset, LAYER, read_only / "other", progress=False),
        lambda: summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 0, out=read_only / "statistics", progress=False),
        lambda: run(read_only / "run"),
    ):
        with pytest.raises(PermissionError, match="Permission denied: '.*read only"):
            call()
    assert sorted(read_only.rglob("*")) == before
