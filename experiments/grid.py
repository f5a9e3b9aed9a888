"""One runner for all grids: a cell (hashable, with a ``name``) is measured once and kept, and the tables are written anew after each.

An experiment has a ``profile``, a ``folder`` for its cells, ``inputs(cell)`` (all that decides what it comes out as), ``measure(cell,
folder)`` and ``tables({cell: numbers})``, name -> DataFrame; the numbers, as JSON can hold them, get "seconds" and "commit", that of the
code that measured them. One whose rows stand for themselves has ``merged(before, table)`` as well, which keeps those of other cells.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from patchsae_utils.config import repository_root
from patchsae_utils.run.artifacts import fingerprint, is_current, read_json, write_json, write_table
from patchsae_utils.tables import read_table, table_path


def current_commit() -> str:
    """The commit of the code that runs, with a mark when files other than the tables differ from it; "unknown" outside a repository."""
    ask = lambda *words: subprocess.run(["git", *words], cwd=repository_root(), capture_output=True, text=True).stdout.strip()  # noqa: E731
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*.csv")
    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("+changes" if changed else "")


def row(experiment: Any, cell: Any) -> dict[str, Any]:
    """Measure a cell, or read what was measured before."""
    folder = experiment.folder / cell.name
    key = fingerprint(stage="experiment", **experiment.inputs(cell))
    if is_current(folder, key, "measures.json"):
        return read_json(folder / "measures.json")["row"]
    started = time.perf_counter()
    found = experiment.measure(cell, folder)
    found |= {"seconds": round(time.perf_counter() - started, 1), "commit": current_commit()}
    write_json(folder / "measures.json", {"fingerprint": key, "complete": True, "row": found})
    return found


def run(experiment: Any, cells: Iterable[Any], out: Path | None = None) -> Iterator[tuple[Any, dict[str, Any], dict[str, pd.DataFrame]]]:
    """Measure cells one after the other into the tables of ``out`` (default: the profile's): each cell, its numbers, the tables so far."""
    measured: dict[Any, dict[str, Any]] = {}
    for cell in cells:
        measured[cell] = row(experiment, cell)
        tables = experiment.tables(measured)
        for name, table in tables.items():
            path = table_path(experiment.profile, name) if out is None else out / f"{name}.csv"
            if hasattr(experiment, "merged") and path.exists():
                table = experiment.merged(read_table(path), table)
            write_table(path, table)
        yield cell, measured[cell], tables


def parser(module: str, text: str) -> argparse.ArgumentParser:
    """The words that every grid's command takes."""
    found = argparse.ArgumentParser(prog=f"python -m experiments.{module}", description=text.split("\n\n")[0])
    found.add_argument("--profile", help="name or path of a profile (default: openmoji)")
    found.add_argument("--out", type=Path, help="folder of the tables (default: experiments/results, or runs/<profile>/experiments)")
    return found
