"""Numbers that notebooks quote, claims that they check, and whether another run gives the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .artifacts import as_json, read_json, write_json
from .intervals import Interval

_BEGUN: set[Path] = set()  # files that this process has begun anew: a notebook's kernel leaves no numbers of earlier runs


def results(profile: Any, notebook: str, **numbers: Any) -> dict[str, Any]:
    """Add numbers that a notebook quotes to ``runs/<profile>/results/<notebook>.json``; returns all of this run so far.

    The file is valid JSON (NaN is null). What an earlier run of the notebook wrote there is gone with its first call.

    Parameters
    ----------
    profile, notebook : Profile and str, the notebook's name without its ending, e.g. ``"01_activation_extraction"``
    **numbers
        Plain values, arrays, tensors, data frames (as records), or nested mappings of them; floats are rounded to six digits.
    """
    path = Path(profile.folder("results")).resolve() / f"{notebook}.json"
    known = read_json(path) if path in _BEGUN and path.exists() else {}
    _BEGUN.add(path)
    known |= json.loads(json.dumps(as_json(numbers)), parse_float=lambda digits: round(float(digits), 6))
    write_json(path, known)
    return known


def check_claims(profile: Any, claims: Mapping[str, bool]) -> None:
    """Print the claims of a notebook that hold, and say which don't: an ``AssertionError`` on the default profile, about which they are.

    Parameters
    ----------
    profile, claims : Profile, and mapping of a sentence to whether it holds
    """
    for claim, holds in claims.items():
        print(claim if holds else f"DOES NOT HOLD HERE: {claim}")
    failed = [claim for claim, holds in claims.items() if not holds]
    if failed and profile.is_default:
        raise AssertionError("; ".join(failed))


def beside_committed(entries: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    """Committed numbers, each with its interval, beside those that a run's ``results`` folder holds, and whether these lie inside."""
    rows = []
    for entry in entries:
        found, (low, high) = _quoted(folder, entry), (entry["low"], entry["high"])
        inside = "not found" if found is None else "yes" if low <= found.value <= high else "no"
        committed = f"{entry['value']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([entry["notebook"], entry["number"], committed, None if found is None else found.value, inside])
    return pd.DataFrame(rows, columns=["notebook", "number", "committed", "yours", "inside"])


def measured_anew(entries: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The same entries with the values and intervals of a ``results`` folder; and what was not found there and stays as it was."""
    found = [(entry, _quoted(folder, entry)) for entry in entries]
    made = [{**entry, **({} if new is None else {"value": new.value, "low": new.low, "high": new.high})} for entry, new in found]
    return made, [f"{entry['notebook']}: {entry['at']}" for entry, new in found if new is None]


def _quoted(folder: Path, entry: Mapping[str, Any]) -> Interval | None:
    """The number that an entry means: names parted by dots, rows of a table by ``[column=value, ...]``; its interval stands beside it."""
    path = folder / f"{entry['notebook']}.json"
    holder: Any = None
    found: Any = read_json(path) if path.exists() else {}
    name = ""
    for name, conditions in re.findall(r"([^.\[]+)(?:\[([^\]]*)\])?\.?", entry["at"]):
        holder, found = found, found.get(name) if isinstance(found, dict) else None
        if conditions and isinstance(found, list):
            wanted = dict(condition.strip().split("=") for condition in conditions.split(","))
            rows = [row for row in found if all(str(row.get(key)) == value for key, value in wanted.items())]
            found = rows[0] if len(rows) == 1 else None
    if isinstance(found, dict):
        holder, found = found, found.get("value")
    ends = [holder.get(f"{name}_{end}", holder.get(end)) for end in ("low", "high")] if isinstance(holder, dict) else [None]
    return None if found is None or None in ends else Interval(found, *ends)


def duration(seconds: float) -> str:
    """A time for people: "3 hours", "12 minutes", "40 seconds"."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(1, seconds):.0f} seconds"
