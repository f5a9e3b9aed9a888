"""SIGKILL in the middle of statistics and of a notebook run (of training: test_resume.py, of extraction: test_activations.py): nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import shares
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file, save_file
from tiny import ENVIRONMENT, assert_same_files, killed

from patchsae_utils.latents import passes
from patchsae_utils.run.artifacts import read_json


def test_statistics_killed_at_random_moments_end_bit_for_bit_as_if_they_had_not_been(tmp_path, one_thread):
    (tmp_path / "killed").mkdir()
    assert killed(tmp_path / "killed", 2) == {"kills": 2, "status": 0}
    shares.statistics(tmp_path / "whole", shares.Pictures())
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """The folder of statistics that stopped at image 16, and its one file of what was counted."""
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0.0)
    with pytest.raises(ValueError, match="picture 16 is broken"):
        shares.statistics(tmp_path, shares.Pictures(bad=16))
    (file,) = (tmp_path / ".statistics-unfinished").glob("counted-*")
    return tmp_path, file


def resumed(folder) -> int:
    data = shares.Pictures()
    shares.statistics(folder, data)
    assert not (folder / ".statistics-unfinished").exists()
    return len(set(data.read))


@pytest.mark.parametrize("damage", ["a flipped bit", "other inputs"])
def test_what_was_counted_and_is_not_ours_costs_time_and_nothing_else(half_done, damage):
    folder, file = half_done
    if damage == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        save_file(load_file(file), folder / "other", {"key": "of something else"})
        file.unlink()
        (folder / "other").rename(file.with_name(f"counted-0-{passes.file_sha256(folder / 'other')[:16]}.safetensors"))
    assert resumed(folder) == 23


def test_images_that_two_files_count_are_counted_once(half_done, tmp_path_factory):
    """As a kill between writing a file and removing those that it replaces leaves them."""
    folder, file = half_done
    with pytest.raises(ValueError):
        shares.statistics(folder, shares.Pictures(bad=18))
    (larger,) = (folder / ".statistics-unfinished").glob("counted-*")
    earlier = tmp_path_factory.mktemp("earlier")
    with pytest.raises(ValueError):
        shares.statistics(earlier, shares.Pictures(bad=8))
    (smaller,) = (earlier / ".statistics-unfinished").glob("counted-*")
    (larger.parent / smaller.name.replace("counted-0", "counted-1")).write_bytes(smaller.read_bytes())
    assert resumed(folder) < 11
    shares.statistics(earlier, shares.Pictures())
    one, two = (root / "statistics" / "latents.safetensors" for root in (folder, earlier))
    assert one.read_bytes() == two.read_bytes()


# -- notebooks --------------------------------------------------------------------------------------------------------------

SLOW = """
import os, time
from pathlib import Path
Path("../kernel").write_text(str(os.getpid()))
time.sleep(0 if Path("../quick").exists() else 120)
1 + 1
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split(") ")[-1][0] != "Z" if Path("/proc").is_dir() else True


def test_a_killed_notebook_run_leaves_the_notebook_as_it_was_and_no_kernel(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    source = tmp_path / "notebooks" / "01_slow.ipynb"
    source.parent.mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1"), new_code_cell(SLOW)]), source)
    before = source.read_bytes()
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PATCHSAE_")}
    command = [sys.executable, "-m", "patchsae_utils.reproduce", "--notebooks", source.parent]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (tmp_path / "kernel").exists() or not (tmp_path / "kernel").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert source.read_bytes() == before and not list(tmp_path.rglob("stamps/*"))
    kernel = int((tmp_path / "kernel").read_text())
    while alive(kernel):
        assert time.monotonic() < deadline, "the kernel of a killed run must not stay"
        time.sleep(0.1)
    (tmp_path / "quick").touch()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert source.read_bytes() == before
    code = nbformat.read(tmp_path / "runs" / "openmoji" / "notebooks" / source.name, as_version=4).cells[1]
    assert code.execution_count == 2 and code.outputs[0].data["text/plain"] == "2"
    (stamp,) = tmp_path.rglob("stamps/01_slow.json")
    assert read_json(stamp)["key"]
