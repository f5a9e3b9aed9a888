"""Numbers that notebooks quote, and claims that they check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifacts import plain, read_json, write_json


def results(profile: Any, notebook: str, **numbers: Any) -> dict[str, Any]:
    """Merge numbers that a notebook quotes into ``runs/<profile>/results/<notebook>.json`` and return all of them.

    Parameters
    ----------
    profile : Profile
        Its ``folder("results")`` is written to.
    notebook : str
        The notebook's name without its ending, e.g. ``"01_activation_extraction"``.
    **numbers
        Plain values, arrays, tensors, data frames (as records), or nested mappings of them; floats are rounded to six digits.
    """
    path = Path(profile.folder("results")) / f"{notebook}.json"
    known = read_json(path) if path.exists() else {}
    known.update(_rounded(json.loads(json.dumps(numbers, default=plain))))
    write_json(path, known)
    return known


def check_claims(profile: Any, claims: Mapping[str, bool]) -> None:
    """Print the claims of a notebook that hold, and say which don't.

    They are findings about the default profile. On other images or sizes another result is a finding too: there it is printed, and
    the notebook goes on.

    Parameters
    ----------
    profile : Profile
    claims : mapping of str to bool
        A sentence each, and whether it holds.

    Raises
    ------
    AssertionError
        If one does not hold on the default profile.
    """
    for claim, holds in claims.items():
        print(claim if holds else f"DOES NOT HOLD HERE: {claim}")
    failed = [claim for claim, holds in claims.items() if not holds]
    if failed and profile.is_default:
        raise AssertionError("; ".join(failed))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
