"""One runner for all grids: a cell is measured once and kept under ``runs``, and the tables are written anew after each, so that nothing is lost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from patchsae_utils.config import Profile
from patchsae_utils.run.artifacts import current_commit, fingerprint, is_current, read_json, write_json, write_table
from patchsae_utils.tables import table_path


class Cell(Protocol):
    """What is measured in one go; hashable."""

    @property
    def name(self) -> str:
        """A folder's name."""


class Experiment(Protocol):
    """What a grid must say of itself."""

    profile: Profile
    folder: Path
    """Where its cells are kept."""

    def inputs(self, cell: Cell) -> dict[str, Any]:
        """All that decides what a cell comes out as: another value, and it is measured again."""

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """One cell's numbers, as JSON can hold them; what it makes on the way lies in the folder."""

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        """Name -> table of the cells measured so far; each has "seconds" and "commit", that of the code that measured it."""


def row(experiment: Experiment, cell: Cell) -> dict[str, Any]:
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


def run(
    experiment: Experiment, cells: Iterable[Cell], out: Path | None = None
) -> Iterator[tuple[Cell, dict[str, Any], dict[str, pd.DataFrame]]]:
    """Measure cells one after the other into the tables of ``out`` (default: the profile's): each cell, its numbers, the tables so far."""
    measured: dict[Cell, dict[str, Any]] = {}
    for cell in cells:
        measured[cell] = row(experiment, cell)
        tables = experiment.tables(measured)
        for name, table in tables.items():
            write_table(table_path(experiment.profile, name) if out is None else out / f"{name}.csv", table)
        yield cell, measured[cell], tables


def parser(module: str, text: str) -> argparse.ArgumentParser:
    """The words that every grid's command takes."""
    found = argparse.ArgumentParser(prog=f"python -m experiments.{module}", description=text.split("\n\n")[0])
    found.add_argument("--profile", help="name or path of a profile (default: openmoji)")
    found.add_argument("--out", type=Path, help="folder of the tables (default: experiments/results, or runs/<profile>/experiments)")
    return found
