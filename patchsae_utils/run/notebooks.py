"""Which cells of a notebook a profile runs: what speaks of the embedded world, or needs masks or words, is left out where those are not there."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection

from nbformat import NotebookNode

# Tags of cells: the embedded world's pictures; pictures whose concepts have known places; a model with a text tower.
NEEDS = ("openmoji", "truth", "words")
_ELSEWHERE = re.compile(r"<!-- any\b(.*?)-->", re.DOTALL)


def cells_for(notebook: NotebookNode, given: Collection[str]) -> NotebookNode:
    """A copy without cells whose tags name a need that is not ``given``; where that is the embedded world alone, what ``<!-- any -->`` holds stays."""
    fitting = copy.deepcopy(notebook)
    fitting.cells = []
    for cell in copy.deepcopy(notebook.cells):
        if missing := set(NEEDS) & set(cell.metadata.get("tags", ())) - set(given):
            other = _ELSEWHERE.search(cell.source) if cell.cell_type == "markdown" and missing == {"openmoji"} else None
            if other is None:
                continue
            cell.source = other[1].strip()
        fitting.cells.append(cell)
    return fitting
