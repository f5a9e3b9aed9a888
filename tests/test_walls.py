"""The house keeps its shape: lower folders import no upper ones, nothing runs in a circle, and public names are documented and used."""

import importlib
import inspect
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import grimp
import networkx
import pandas as pd
import pytest
from importlinter.cli import lint_imports

import patchsae_utils
from patchsae_utils.latents import summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder

ROOT = Path(__file__).parents[1]
FOLDERS = ("run", "data", "clip", "activations", "sae", "latents", "concepts", "interventions", "adaptation", "plots", "explorer")


def public_names():
    """(where, name, object) of every public name: the root's, and each folder's ``__all__``."""
    for name in patchsae_utils.__all__:
        yield "patchsae_utils", name, getattr(patchsae_utils, name)
    for folder in FOLDERS:
        module = importlib.import_module(f"patchsae_utils.{folder}")
        for name in module.__all__:
            yield folder, name, getattr(module, name)


def test_no_arrow_runs_up(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, "run lint-imports: it names each import that runs up"


def test_nothing_imports_itself_in_a_circle():
    graph = grimp.build_graph("patchsae_utils", cache_dir=None)  # lazy imports and those for types alone count
    arrows = networkx.DiGraph((a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a))
    assert [sorted(circle) for circle in networkx.strongly_connected_components(arrows) if len(circle) > 1] == []


def test_folders_and_files_stay_small():
    package = ROOT / "patchsae_utils"
    files = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    assert {path.name: n for path, n in files.items() if n > 450} == {}
    per_folder = Counter(path.parent.relative_to(package).as_posix() for path in files)
    assert {folder: n for folder, n in per_folder.items() if n > (8 if folder == "." else 12)} == {}
    assert len([name for name in patchsae_utils.__all__ if not inspect.ismodule(getattr(patchsae_utils, name))]) <= 40


@pytest.mark.parametrize(("where", "name", "thing"), [pytest.param(*entry, id=".".join(entry[:2])) for entry in public_names()])
def test_public_names_say_what_they_take(where, name, thing):
    """numpydoc: a first sentence, and every parameter in a section of its own."""
    if not callable(thing):
        return
    assert (inspect.getdoc(thing) or "").strip(), "no docstring"
    if inspect.isclass(thing) and (issubclass(thing, tuple | Exception) or hasattr(thing, "__dataclass_fields__")):
        return  # a result or settings: each field has its own docstring
    text = inspect.getdoc(thing)
    if inspect.isclass(thing):  # described where the constructor is
        text = inspect.getdoc(next(base for base in thing.__mro__ if "__init__" in vars(base)))
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "args", "kwargs")]
    described = re.split(r"\n(?:Returns|Yields|Raises|Attributes|Notes)\n-+", text.partition("Parameters\n----------\n")[2])[0]
    names = {word.strip(" *") for line in re.findall(r"^\S[^:\n]*", described, re.M) for word in line.split(",")}
    assert {p.name for p in parameters} <= names, "parameters without a description"


READERS = {
    f"{where}.{name}": thing
    for where, name, thing in public_names()
    if where in FOLDERS and callable(thing) and not (inspect.isclass(thing) and issubclass(thing, tuple | Exception))
    if {"clip", "base"} & (given := {*inspect.signature(thing).parameters}) and "sae" in given
}
STRANGERS = {
    "layer": {"layer": 2}, "weights": {"weights_hash": "0" * 16}, "model": {"model_name": "another"}, "preprocessing": {"preprocessing": "Resize(3)"},
    "kind of tokens": {"tokens": "cls"}, "width": {},
}  # fmt: skip


@pytest.mark.parametrize("entry", READERS)
def test_an_sae_that_reads_something_else_is_refused_everywhere(entry, tiny_clip, tiny_sae, tiny_dataset, tiny_images, tmp_path):
    """FAULTS C8 and B7: width alone was checked, and the numbers were plausible nonsense."""
    parameters = inspect.signature(READERS[entry]).parameters
    known = {
        **dict.fromkeys(("clip", "base", "adapted"), tiny_clip), **dict.fromkeys(("dataset", "train", "test", "objects"), tiny_dataset),
        "datasets": {"tools": tiny_dataset}, "adapters": {"tools": tiny_clip}, "images": tiny_images[:2], "layer": -2, "latents": [1], "ks": [1],
        "choose": "random", "edits": [], "words": ["axe"], "path": tmp_path, "concepts": ["color:red"],
        "report": SimpleNamespace(detection=pd.DataFrame([{"concept": "color:red", "latent": 1, "ap": 0.5}])),
    }  # fmt: skip
    if "summary" in parameters:
        known["summary"] = summarize_latents(tiny_clip, tiny_sae, tiny_dataset, -2, progress=False)
    if entry == "adaptation.explain_gain":
        known["adapted"] = {"itself": tiny_clip}
    arguments = {
        name: known.get(name) for name, each in parameters.items() if each.default is each.empty or name in ("layer", "ks", "datasets")
    }
    for what, metadata in STRANGERS.items():
        if (entry, what) == ("sae.evaluate_sae", "kind of tokens"):  # it tells them apart
            continue
        width = tiny_clip.width // 2 if what == "width" else tiny_clip.width
        arguments["sae"] = SparseAutoencoder(width, 64, metadata={"model_name": "tiny", **metadata}).requires_grad_(False)
        with pytest.raises(ValueError, match=f"The SAE reads {width}-dimensional .*the residual stream of 'tiny' holds 32-dimensional"):
            READERS[entry](**arguments)


def words_of(paths):
    """All words of files; of notebooks, of their cells' sources."""
    texts = []
    for path in paths:
        cells = json.loads(path.read_text())["cells"] if path.suffix == ".ipynb" else []
        texts += ["".join(cell["source"]) for cell in cells] or [path.read_text()]
    return set(re.findall(r"\w+", "\n".join(texts)))


def test_public_names_are_used():
    """The root's by a notebook, the command line, the README or the docs; a folder's also by other folders, experiments or benchmarks."""
    package = ROOT / "patchsae_utils"
    shown = [*(ROOT / "notebooks").glob("0*.ipynb"), ROOT / "README.md", *(ROOT / "docs").glob("*.md"), package / "cli.py"]
    known = words_of(shown)
    beside = words_of([package / "stages.py", *(path for name in ("experiments", "benchmarks") for path in (ROOT / name).glob("*.py"))])
    inside = {folder: words_of((package / folder).glob("*.py")) for folder in FOLDERS}
    others = {folder: known | beside | set().union(*(inside[other] for other in FOLDERS if other != folder)) for folder in FOLDERS}
    names = [(where, name) for where, name, thing in public_names() if not (inspect.isclass(thing) and issubclass(thing, Exception))]
    assert [f"{where}.{name}" for where, name in names if name not in others.get(where, known)] == []
