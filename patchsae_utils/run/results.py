"""Numbers that notebooks quote, and claims that they check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifacts import as_json, read_json, write_json

_BEGUN: set[Path] = set()  # files that this process has begun anew: a notebook's kernel leaves no numbers of earlier runs


def results(profile: Any, notebook: str, **numbers: Any) -> dict[str, Any]:
    """Add numbers that a notebook quotes to ``runs/<profile>/results/<notebook>.json``.

    The file is valid JSON (NaN is null). What an earlier run of the notebook wrote there is gone with its first call.

    Parameters
    ----------
    profile : Profile
        Its ``folder("results")`` is written to.
    notebook : str
        The notebook's name without its ending, e.g. ``"01_activation_extraction"``.
    **numbers
        Plain values, arrays, tensors, data frames (as records), or nested mappings of them; floats are rounded to six digits.

    Returns
    -------
    dict
        All numbers of this run so far.
    """
    path = Path(profile.folder("results")).resolve() / f"{notebook}.json"
    known = read_json(path) if path in _BEGUN and path.exists() else {}
    _BEGUN.add(path)
    known |= json.loads(json.dumps(as_json(numbers)), parse_float=lambda digits: round(float(digits), 6))
    write_json(path, known)
    return known


def check_claims(profile: Any, claims: Mapping[str, bool]) -> None:
    """Print the claims of a notebook that hold, and say which don't.

    They are findings about the default profile. On other images or sizes another result is a finding too: there the notebook goes on.

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
