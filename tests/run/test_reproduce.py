"""The notebook runner, on a folder of throwaway notebooks."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from patchsae_utils import reproduce
from patchsae_utils.config import load_profile
from patchsae_utils.run.results import duration

FIRST = """
import json, os, sys, warnings
from pathlib import Path
from tqdm.auto import tqdm
total = sum(tqdm(range(3)))
warnings.warn("mind this")
results = Path("../runs") / os.environ.get("RUN_NAME", "openmoji") / "results"
results.mkdir(parents=True, exist_ok=True)
share = {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "images"}
rows = [{"k": 1, "error": "kept", "change": 0.25, "change_low": 0.2, "change_high": 0.3}, {"k": 2, "error": "kept", "change": 0.9, "low": 0.8, "high": 1}]
(results / "01_first.json").write_text(json.dumps({"total": total, "share": share, "rows": rows}))
figures = results.parent / "figures"
figures.mkdir(exist_ok=True)
(figures / "01_drawn.png").write_bytes(b"new")
with open("../executions", "a") as file:
    file.write("1")
print(Path.cwd(), total)
"""
SECOND = "with open('../executions', 'a') as file:\n    file.write('2')\nimport ipywidgets\nipywidgets.IntSlider(value=3)"


INTERVAL = ("value", "low", "high")


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


def quote(repository, **committed):
    """numbers.json with a number for each place in the first notebook's results, and its committed [value, low, high]."""
    entries = [{"notebook": "01_first", "number": at, "at": at} | dict(zip(INTERVAL, said, strict=True)) for at, said in committed.items()]
    (repository / "notebooks/numbers.json").write_text(json.dumps(entries))


def own(repository, name, run="openmoji"):
    """A notebook as a run has left it."""
    return repository / "runs" / run / "notebooks" / f"{name}.ipynb"


def executions(repository):
    return (repository / "executions").read_text()


def test_notebooks_run_in_order_leave_no_trace_of_the_machine_and_are_skipped_when_up_to_date(repository, capsys):
    sources = [repository / "notebooks" / f"{name}.ipynb" for name in ("01_first", "02_second")]
    paths, committed = [own(repository, path.stem) for path in sources], [path.read_bytes() for path in sources]
    assert reproduce.main([]) == 0
    assert [path.read_bytes() for path in sources] == committed, "FAULTS D19: the repository stays as it is"
    assert executions(repository) == "12"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[1/2] 01_first ... ") and said[0].endswith(" seconds")
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
    key = reproduce.run_key(sources[0], load_profile())
    assert reproduce.run_key(sources[0], load_profile(overrides={"training.seed": 1})) != key, "settings count as well"


PLACES = {"share": [0.55, 0.45, 0.65], "rows[k=1, error=kept].change": [0.5, 0.4, 0.6]}
PLACES |= {"rows[error=kept].change": [1, 0, 2], "gone.for.good": [1, 0, 2]}


def test_each_quoted_number_stands_beside_its_committed_interval(repository, capsys):
    """FAULTS D19: a reproduction says whether it reproduced, and changes no file of the repository."""
    quote(repository, **PLACES)
    before = {path: path.read_bytes() for path in (repository / "notebooks").iterdir()}
    assert reproduce.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in shown[1:5]] == [["0.500", "yes"], ["0.250", "no"], ["not", "found"], ["not", "found"]]
    assert "0.550 [0.450, 0.650]" in shown[1] and shown[5] == "1 of 4 numbers lie inside their committed 95% intervals."
    assert {path: path.read_bytes() for path in (repository / "notebooks").iterdir()} == before and not (repository / "figures").exists()
    table = (repository / "runs/openmoji/results/reproduction.csv").read_text()
    assert table.startswith("notebook,number,committed,yours,inside\n01_first,share,")
    assert reproduce.main(["--only", "02"]) == 0 and "0 of 0 numbers" in capsys.readouterr().out, "of the notebooks that were chosen"


def test_a_refresh_takes_over_what_a_run_left(repository, capsys):
    quote(repository, **{at: said for at, said in PLACES.items() if at != "rows[error=kept].change"})
    (repository / "figures").mkdir()
    for name in ("01_old", "01_drawn", "02_kept", "method"):
        (repository / "figures" / f"{name}.png").write_bytes(b"old")
    assert reproduce.main([]) == 0
    notebook = nbformat.read(repository / "notebooks/01_first.ipynb", as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, repository / "notebooks/01_first.ipynb")
    assert reproduce.main(["--refresh", "--only", "01"]) == 1, "a number is gone"
    assert "names what is in no results: 01_first: gone.for.good" in capsys.readouterr().err
    assert executions(repository) == "12", "text alone runs nothing anew"
    taken = nbformat.read(repository / "notebooks/01_first.ipynb", as_version=4)
    assert taken.cells[0].source == "# Another title" and taken.cells[1].execution_count == 1 and taken.cells[1].outputs
    assert nbformat.read(repository / "notebooks/02_second.ipynb", as_version=4).cells[1].execution_count is None
    figures = {path.stem: path.read_bytes() for path in (repository / "figures").iterdir()}
    assert figures == {"01_drawn": b"new", "02_kept": b"old", "method": b"old"}
    entries = json.loads((repository / "notebooks/numbers.json").read_text())
    made = {entry["at"]: [entry[name] for name in INTERVAL] for entry in entries}
    assert made == {"share": [0.5, 0.4, 0.6], "rows[k=1, error=kept].change": [0.25, 0.2, 0.3], "gone.for.good": [1, 0, 2]}
    assert reproduce.main(["--refresh", "--set", "name=quick"]) == 1 and "for the default profile" in capsys.readouterr().err


def test_the_committed_numbers_have_values_inside_their_intervals():
    entries = json.loads((Path(__file__).parents[2] / "notebooks/numbers.json").read_text())
    assert len(entries) >= 30 and all(entry["low"] <= entry["value"] <= entry["high"] for entry in entries)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 seconds"), (119, "119 seconds"), (120, "2 minutes"), (9000, "2 hours"), (2e5, "2 days")]
)
def test_times_in_words(seconds, said):
    assert duration(seconds) == said


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
    write(repository, "01_first", "from os import environ as e\nprint(e['PATCHSAE_PROFILE'], e['PATCHSAE_SET'], e['OMP_WAIT_POLICY'])")
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    before = (repository / "notebooks/01_first.ipynb").read_bytes()
    assert reproduce.main(["--only", "01", "--set", "name=quick", "--set", "training.n_tokens=1000"]) == 0
    assert (repository / "notebooks/01_first.ipynb").read_bytes() == before
    (output,) = nbformat.read(own(repository, "01_first", "quick"), as_version=4).cells[1].outputs
    assert output.text == f"openmoji name=quick; training.n_tokens=1000 {given or 'passive'}\n"
    assert json.loads((repository / "runs/quick/stamps/01_first.json").read_text())["files"] == []


def test_dead_kernel_is_an_error(repository, capsys):
    write(repository, "01_first", "import os", "os._exit(1)")
    assert reproduce.main(["--only", "01"]) == 1
    assert "01_first, cell 3: the kernel died" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--only", "09"], "no notebook '09'. Valid: 01_first, 02_second"),
    (["--set", "training.budget=3"], "unknown setting 'budget'. Valid: n_tokens"),
    (["--notebooks", "elsewhere"], "No notebooks 0*.ipynb in"),
])  # fmt: skip
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
