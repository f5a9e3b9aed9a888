"""Prose that knows its data (issue 20.6): which cells a profile runs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tiny import picture_folder

from patchsae_utils import reproduce
from patchsae_utils.config import load_profile
from patchsae_utils.run.notebooks import cells_for

CELLS = [
    ("always", []), ("Scenes of OpenMoji.\n\n<!-- any\nYour own pictures.\n-->", ["openmoji"]),
    ("Found on scenes.\n\n<!-- any\nFound by masks.\n-->", ["openmoji", "truth"]), ("## A section about colors", ["truth"]),
    ("colors()", ["truth", "nbval-ignore-output"]), ("names()", ["openmoji", "words"]),
    ("Scenes by class.\n\n<!-- any\nPictures by class.\n-->\n\n<!-- else words\nPictures.\n-->", ["openmoji", "labels"]), ("last()", []),
]  # fmt: skip
NOTEBOOK = new_notebook(
    cells=[(new_code_cell if "()" in text else new_markdown_cell)(text, metadata={"tags": tags} if tags else {}) for text, tags in CELLS]
)


@pytest.mark.parametrize(("given", "sources"), [
    ({"openmoji", "truth", "words", "labels"}, [cell.source for cell in NOTEBOOK.cells]),
    (
        {"truth", "words", "labels"},
        ["always", "Your own pictures.", "Found by masks.", "## A section about colors", "colors()", "Pictures by class.", "last()"],
    ),
    ({"words"}, ["always", "Your own pictures.", "Pictures.", "last()"]),
    (set(), ["always", "Your own pictures.", "last()"]),
])  # fmt: skip
def test_a_cell_whose_need_is_not_met_is_left_out_or_says_its_other_text(given, sources):
    before = [cell.source for cell in NOTEBOOK.cells]
    assert [cell.source for cell in cells_for(NOTEBOOK, given).cells] == sources
    assert [cell.source for cell in NOTEBOOK.cells] == before, "the notebook itself is not changed"


def test_what_a_profile_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSAE_IMAGES", str(tmp_path))
    assert reproduce.given_by(load_profile("imagefolder")) == {"words", "labels"}, "an empty folder, which says so when it is read"
    picture_folder(tmp_path, a=3, b=3)
    assert reproduce.given_by(load_profile("openmoji")) == {"openmoji", "truth", "words", "labels"}
    assert reproduce.given_by(load_profile("imagefolder")) == {"words", "labels"}
    assert reproduce.given_by(load_profile("dinov2")) == {"labels"}
    assert reproduce.given_by(load_profile("imagefolder", {"data.train": "coco:pictures:labels.json"})) == {"truth", "words", "labels"}
    (tmp_path / "list.txt").write_text("".join(f"a/{i}.png\n" for i in range(3)))
    assert reproduce.given_by(load_profile("imagefolder", {"data.evaluation": str(tmp_path / "list.txt")})) == {"words"}


FOLDER = Path(__file__).parents[2] / "notebooks"
WORLD = re.compile(r"openmoji|embedded world|this world|drawing|artwork|palette|supervised\*? at|1,800|a \*?tool", re.IGNORECASE)
CLASSES = re.compile(r"\bclass(es)?\b|entropy|zero-shot|accuracy|adapters", re.IGNORECASE)
ELSEWHERE = {
    "folder": {"words", "labels"}, "masks": {"truth", "words", "labels"}, "no words": {"labels"}, "flat folder": {"words"}, "pictures alone": set()
}  # fmt: skip


@pytest.mark.parametrize("given", ELSEWHERE.values(), ids=ELSEWHERE)
def test_elsewhere_no_lesson_speaks_of_the_embedded_world_or_announces_what_it_leaves_out(given):
    """FAULTS C2: lessons of a model without words, or of pictures without labels, end where these are needed."""
    sections, mentioned = set(), set()
    for path in sorted(FOLDER.glob("0*.ipynb")):
        heads, empty = [], None
        for cell in cells_for(nbformat.read(path, as_version=4), given).cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"<!-- .*?-->", "", cell.source, flags=re.DOTALL)
                for said in (WORLD, *([] if "labels" in given else [CLASSES])):
                    assert not (found := said.search(cell.source)), f"{path.stem}: {found[0]!r} in {cell.source[:80]!r}"
                for head in re.findall(r"^##+ (.*)$", cell.source, re.MULTILINE):
                    assert empty is None, f"{path.stem}: nothing is shown under {empty!r}"
                    heads.append(empty := head)
                mentioned |= set(re.findall(r"(?:section|of|in) (\d\.\d)\b(?! of the paper)", cell.source))
            else:
                assert "Markdown(" not in cell.source or not WORLD.search(cell.source), f"{path.stem}: {cell.source[:80]!r}"
                empty = None
        assert empty is None, f"{path.stem}: nothing is shown under {empty!r}"
        sections |= {head.split()[0] for head in heads}
    assert mentioned <= sections, f"sections that are spoken of and left out: {mentioned - sections}"


def test_the_sections_that_the_readme_names_are_there():
    table = (FOLDER.parent / "README.md").read_text(encoding="utf-8").partition("| paper | notebook and section |")[2].partition("\n\n")[0]
    named = [(number, title.strip()) for number, title in re.findall(r"(0\d), ([A-Z][^;|(]+)", table)]
    for number, title in named:
        cells = nbformat.read(next(FOLDER.glob(f"{number}_*.ipynb")), as_version=4).cells
        assert re.search(rf"^## [\d.]* ?{re.escape(title)}$", "\n".join(cell.source for cell in cells), re.MULTILINE), f"{number}, {title}"
    assert len(named) > 15
