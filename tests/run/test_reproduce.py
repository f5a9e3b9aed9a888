"""The notebook runner, on a folder of throwaway notebooks."""

from __future__ import annotations

import json
import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from patchsae_utils import reproduce
from patchsae_utils.config import load_profile

FIRST = """
import json, os, sys, warnings
from pathlib import Path
from tqdm.auto import tqdm
total = sum(tqdm(range(3)))
warnings.warn("mind this")
results = Path("../runs") / os.environ.get("RUN_NAME", "openmoji") / "results"
results.mkdir(parents=True, exist_ok=True)
(results / "01_first.json").write_text(json.dumps({"total": total}))
with open("../executions", "a") as file:
    file.write("1")
print(Path.cwd(), total)
"""
SECOND = "with open('../executions', 'a') as file:\n    file.write('2')\nimport ipywidgets\nipywidgets.IntSlider(value=3)"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that looks like the repository, with two notebooks that have not been run."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    write(tmp_path, "01_first", FIRST)
    write(tmp_path, "02_second", SECOND)
    monkeypatch.chdir(tmp_path)
    for name in ("PATCHSAE_PROFILE", "PATCHSAE_SET"):
        monkeypatch.setenv(name, "")  # restored afterwards: the runner sets both
    return tmp_path


def write(repository, name, *sources):
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), *map(new_code_cell, sources)])
    nbformat.write(notebook, repository / "notebooks" / f"{name}.ipynb")


def executions(repository):
    return (repository / "executions").read_text()


def test_notebooks_run_in_order_leave_no_trace_of_the_machine_and_are_skipped_when_up_to_date(repository, capsys):
    paths = [repository / "notebooks" / f"{name}.ipynb" for name in ("01_first", "02_second")]
    assert reproduce.main([]) == 0
    assert executions(repository) == "12"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[1/2] 01_first ... ") and said[0].endswith(" s")
    assert said[1].startswith("[2/2] 02_second ... ")
    assert said[2].startswith("Peak memory of a notebook: ")

    assert reproduce.main([]) == 0
    assert executions(repository) == "12"
    assert capsys.readouterr().err.splitlines()[:2] == ["[1/2] 01_first ... up to date", "[2/2] 02_second ... up to date"]

    before = [path.read_bytes() for path in paths]
    assert reproduce.main(["--force"]) == 0
    assert [path.read_bytes() for path in paths] == before and executions(repository) == "1212"
    first, second = (nbformat.reads(text.decode(), as_version=4) for text in before)
    assert str(repository) not in before[0].decode()
    assert "widgets" not in first.metadata and "version" not in first.metadata.language_info
    code = first.cells[1]
    assert code.execution_count == 1 and "execution" not in code.metadata
    assert [output.name for output in code.outputs] == ["stderr", "stdout"], "the progress bar is gone, the warning stays"
    assert code.outputs[0].text.startswith("<cell>:") and code.outputs[1].text == "./notebooks 3\n"
    assert second.cells[1].outputs[0].data == {"text/plain": "IntSlider: run this notebook to use it."}

    (repository / "runs/openmoji/results/01_first.json").unlink()
    assert reproduce.main([]) == 0
    assert executions(repository) == "12121"

    write(repository, "02_second", SECOND + "\n1 + 1")
    assert reproduce.main([]) == 0
    assert executions(repository) == "121212"
    key = reproduce.run_key(paths[0], load_profile())
    assert reproduce.run_key(paths[0], load_profile(overrides={"training.seed": 1})) != key, "settings count as well"


def test_failure_names_notebook_cell_and_error_and_leaves_the_notebook_alone(repository, capsys):
    write(repository, "02_second", "print('so far so good')", "raise ValueError('no such layer')", "1")
    before = (repository / "notebooks/02_second.ipynb").read_bytes()
    assert reproduce.main([]) == 1
    said = capsys.readouterr().err
    assert "error: 02_second, cell 3: ValueError: no such layer" in said
    assert (repository / "notebooks/02_second.ipynb").read_bytes() == before
    partial = nbformat.read(repository / "runs/openmoji/failed/02_second.ipynb", as_version=4)
    assert partial.cells[1].outputs[0].text == "so far so good\n"
    assert [cell.execution_count for cell in partial.cells[1:]] == [1, 2, None]

    write(repository, "02_second", "1")
    assert reproduce.main([]) == 0
    assert executions(repository) == "1", "the first notebook is not run again"
    assert not (repository / "runs/openmoji/failed/02_second.ipynb").exists()


@pytest.mark.parametrize("given", [None, "active"])
def test_other_settings_reach_the_kernel_and_leave_the_committed_notebooks_alone(repository, monkeypatch, given):
    """FAULTS D18: beside any other program, threads that spin at barriers slow everything five to ten times; so they wait passively unless told."""
    write(
        repository,
        "01_first",
        "import os\nprint(*(os.environ[f'PATCHSAE_{x}'] for x in ('PROFILE', 'SET')), os.environ['OMP_WAIT_POLICY'])",
    )
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    before = (repository / "notebooks/01_first.ipynb").read_bytes()
    assert reproduce.main(["--only", "01", "--set", "name=quick", "--set", "training.n_tokens=1000"]) == 0
    assert (repository / "notebooks/01_first.ipynb").read_bytes() == before
    own = nbformat.read(repository / "runs/quick/notebooks/01_first.ipynb", as_version=4)
    assert own.cells[1].outputs[0].text == f"openmoji name=quick; training.n_tokens=1000 {given or 'passive'}\n"
    assert json.loads((repository / "runs/quick/stamps/01_first.json").read_text())["files"] == []


def test_what_needs_words_is_left_out_of_a_model_without_and_the_next_notebook_runs(repository, capsys):
    """FAULTS C2: notebooks of a model without a text tower end where words begin, and say so."""
    write(repository, "01_first", "1 + 1", "class NoText(ValueError): pass\nraise NoText('x has no text tower')", "1")
    path = repository / "notebooks/01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[3].outputs, notebook.cells[3].execution_count = [new_output("stream", text="of an earlier run")], 3
    nbformat.write(notebook, path)
    assert reproduce.main([]) == 0
    said = capsys.readouterr().err
    assert "(left out from there: x has no text tower)" in said and executions(repository) == "2"
    assert nbformat.read(path, as_version=4).cells[3].outputs == []
    assert reproduce.main([]) == 0 and "01_first ... up to date" in capsys.readouterr().err


def test_dead_kernel_is_an_error(repository, capsys):
    write(repository, "01_first", "import os", "os._exit(1)")
    assert reproduce.main(["--only", "01"]) == 1
    assert "01_first, cell 3: the kernel died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "09"], "no notebook '09'. Valid: 01_first, 02_second"),
        (["--set", "training.budget=3"], "unknown setting 'budget'. Valid: n_tokens"),
        (["--notebooks", "elsewhere"], "No notebooks 0*.ipynb in"),
    ],
)
def test_bad_arguments_are_named(repository, capsys, arguments, message):
    assert reproduce.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not os.path.exists("executions")


def test_what_a_disk_refuses_and_an_interrupt_end_in_words(repository, capsys, monkeypatch):
    def stops(error):
        def run(*_, **__):
            raise error

        monkeypatch.setattr(reproduce, "choose", run)

    stops(PermissionError(13, "Permission denied", "notebooks/01_first.ipynb"))
    assert reproduce.main([]) == 1 and "error: [Errno 13] Permission denied: 'notebooks/01_first.ipynb'" in capsys.readouterr().err
    stops(KeyboardInterrupt())
    assert reproduce.main([]) == 130 and "Interrupted. The same command goes on from here." in capsys.readouterr().err


def test_tidy_keeps_what_people_read():
    picture = new_output("display_data", {"image/png": "aGk=", "text/plain": "<Figure size 900x320>"})
    table = new_output("execute_result", {"text/html": "<table></table>", "text/plain": "   a\n0  1"}, execution_count=1)
    cell = new_code_cell("1", outputs=[picture, table], execution_count=1, metadata={"tags": ["nbval-ignore-output"]})
    tidied = reproduce.tidy(new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}}))
    assert [output.data for output in tidied.cells[0].outputs] == [picture.data, table.data]
    assert tidied.cells[0].metadata == {"tags": ["nbval-ignore-output"]}
    assert tidied.metadata["language_info"] == {"name": "python"}
