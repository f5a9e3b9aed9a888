"""Which cells of a notebook a profile runs: what needs the embedded world, masks, words or labels is left out where those are not there."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection

from nbformat import NotebookNode

# Tags of cells: the embedded world's pictures; pictures whose concepts have known places; a model with a text tower; pictures with labels.
NEEDS = ("openmoji", "truth", "words", "labels")
# In a text: ``<!-- any ... -->`` needs what its cell does but the embedded world, ``<!-- else <needs> ... -->`` what it names.
_ELSEWHERE = re.compile(r"<!-- (any|else)\b(.*?)\n(.*?)-->", re.DOTALL)


def cells_for(notebook: NotebookNode, given: Collection[str]) -> NotebookNode:
    """A copy without cells whose tags name a need that is not ``given``; of a text stays its first comment whose needs are."""
    fitting = copy.deepcopy(notebook)
    fitting.cells = []
    for cell in copy.deepcopy(notebook.cells):
        needs = set(NEEDS) & set(cell.metadata.get("tags", ()))
        if needs - set(given):
            texts = _ELSEWHERE.findall(cell.source) if cell.cell_type == "markdown" else []
            fits = [text for kind, own, text in texts if (needs - {"openmoji"} if kind == "any" else set(own.split())) <= set(given)]
            if not fits:
                continue
            cell.source = fits[0].strip()
        fitting.cells.append(cell)
    return fitting
