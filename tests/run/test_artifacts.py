"""Artifacts: nothing half-written stays, and equal inputs are recognised."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.adaptation import fit_adapter
from patchsae_utils.config import AdapterConfig, load_profile
from patchsae_utils.data import load_dataset
from patchsae_utils.latents import summarize_latents
from patchsae_utils.run.artifacts import atomic_folder, fingerprint, folder_lock, is_current, read_json, write_json
from patchsae_utils.run.results import check_claims, results


@dataclass(frozen=True)
class _Settings:
    rate: float
    where: Path


def test_a_fingerprint_depends_on_every_input_and_on_no_order():
    one = fingerprint(a=1, settings=_Settings(0.1, Path("x")), names=["p", "q"])
    assert one == fingerprint(names=["p", "q"], settings=_Settings(0.1, Path("x")), a=1)
    changes = {"a": 2}, {"settings": _Settings(0.2, Path("x"))}, {"settings": _Settings(0.1, Path("y"))}, {"names": ["q", "p"]}
    others = [fingerprint(**{"a": 1, "settings": _Settings(0.1, Path("x")), "names": ["p", "q"]} | change) for change in changes]
    assert len({one, *others}) == 5
    with pytest.raises(TypeError, match="function"):
        fingerprint(f=lambda: 0)


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "numbers.json"
    write_json(path, {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": pd.DataFrame({"x": [1]})})
    assert read_json(path) == {"a": 0.5, "b": [1, 2], "c": [{"x": 1}]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path)["a"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["numbers.json"]


def test_a_folder_appears_only_when_it_is_finished(tmp_path):
    out = tmp_path / "sae"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "first").write_text("1")
    with pytest.raises(ValueError), atomic_folder(out) as folder:
        raise ValueError
    assert (out / "first").read_text() == "1"
    with atomic_folder(out) as folder:
        (folder / "first").write_text("2")
        (folder / "second").write_text("2")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"first": "2", "second": "2"}


def test_what_others_keep_in_a_folder_is_never_deleted(tiny_clip, tiny_sae, tiny_dataset, tmp_path):
    """Whoever gave a folder with anything in it, such as a trained SAE, as ``out`` lost it all; now before the work, and in ``save`` too."""
    count = lambda out, layer=-2: summarize_latents(tiny_clip, tiny_sae, tiny_dataset, layer, out=out, progress=False)  # noqa: E731
    summary = count(tmp_path / "statistics")
    tiny_sae.save(tmp_path / "sae")
    (tmp_path / "statistics" / "notes.txt").write_text("mine")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    base = load_dataset("openmoji/tools", "train", half="base", n_images=40)
    config = AdapterConfig(tasks=("openmoji/tools",), n_shots=1, epochs=1)
    for out, call in {
        "sae": count,
        "statistics": lambda out: fit_adapter(tiny_clip, "coop", base, config, out, progress=False),
        ".": summary.save,
    }.items():
        with pytest.raises(ValueError, match="which would be lost: .*Choose a folder of its own"):
            call(tmp_path / out)
    with pytest.raises(ValueError, match="statistics holds notes.txt, which would be lost"):
        count(tmp_path / "statistics", 0)
    assert count(tmp_path / "statistics").n_images == len(tiny_dataset), "what is read is not replaced"
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_others_may_read_what_their_umask_lets_them(tmp_path, tiny_sae):
    """Runs are shared on clusters; temporary files of Python are closed to everybody else."""
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "numbers.json", {})
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("")
        tiny_sae.save(tmp_path / "sae")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_dir()} == {0o750}
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_file()} == {0o640}, modes


def test_an_artifact_is_current_only_if_finished_and_of_the_same_inputs(tmp_path):
    assert not is_current(tmp_path, "abc")
    write_json(tmp_path / "manifest.json", {"fingerprint": "abc"})
    assert is_current(tmp_path, "abc")
    assert not is_current(tmp_path, "abd")
    write_json(tmp_path / "manifest.json", {"fingerprint": "abc", "complete": False})
    assert not is_current(tmp_path, "abc")


def test_claims_are_asserted_on_the_default_profile_and_told_elsewhere(capsys):
    claims = {"latents are sparse": True, "they are few": False}
    with pytest.raises(AssertionError, match="they are few"):
        check_claims(load_profile(), claims)
    capsys.readouterr()
    check_claims(load_profile(overrides={"training.n_tokens": 1000}), claims)
    assert capsys.readouterr().out == "latents are sparse\nDOES NOT HOLD HERE: they are few\n"


def test_results_are_valid_json_without_keys_of_earlier_runs(tmp_path):
    """FAULTS D11: NaN is null, and the first call of a process leaves nothing of an earlier run; later calls add to it."""
    profile = SimpleNamespace(folder=lambda stage: tmp_path / stage)
    path = tmp_path / "results" / "01_test.json"
    path.parent.mkdir()
    path.write_text('{"gone": 1}')
    results(profile, "01_test", a=float("nan"), b=np.array([np.inf, 1.0]), table=pd.DataFrame({"x": [None, 2.0]}))
    assert results(profile, "01_test", c=1 / 3)["c"] == 0.333333
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"a": None, "b": [None, 1.0], "table": [{"x": None}, {"x": 2.0}], "c": 0.333333}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch, number):
    """FAULTS D12: any OSError counted as "held". An error of the disk is said as it is."""

    def refuses(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuses)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"), folder_lock(tmp_path):
            pass
        return
    for wait in (False, True):
        with folder_lock(tmp_path, wait=wait), pytest.raises(ValueError, match="another process"), folder_lock(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
