"""Broken images, found before a run: all are decoded once, those that can't be are left out and reported, too many stop the run.

So the data set holds readable images alone, and stores, statistics, few-shot draws and explorers mean the same image by the same index.
"""

from __future__ import annotations

import base64
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..run.artifacts import folder_lock, read_json, write_json
from .loader import load
from .pictures import BrokenImage

_SHOWN, _SAVE_EVERY = 5, 60.0  # images that a message names; seconds between two reports of an unfinished check


class TooManyBroken(ValueError):
    """More images than allowed can't be read; the message names the first few, and the report of all."""


def without_broken(dataset, report: str | Path, max_broken: float = 0.01, *, workers: int | None = None, progress: bool = True):
    """A data set without the images that can't be decoded; the others keep their order, labels and classes.

    The report is shared by subsets and halves of one data set, an interrupted check goes on, and broken images are looked at again each time.

    Parameters
    ----------
    dataset : ImageData or OpenMojiData
        Scenes of the embedded world are drawn, never broken, and returned as they are.
    report : path
        A JSON file.
    max_broken : float
        Largest share of the data set, between 0 and 1; a single image never stops a run. With 0 nothing is checked.
    workers : int, optional
        Processes that decode, as for :func:`batches`.
    progress : bool

    Raises
    ------
    TooManyBroken
        If more than that share is broken; checking ends as soon as that is known.
    """
    if max_broken <= 0 or not hasattr(getattr(dataset, "opener", None), "listing"):
        return dataset
    checked, known = _read(dataset, report := Path(report))
    if checked[dataset.rows.numpy()].all() and known.keys().isdisjoint(dataset.rows.tolist()):
        return dataset
    with folder_lock(report.parent, wait=True):  # another process checks: it will leave its report
        broken = _check(dataset, report, max_broken, workers, progress)
    if not broken:
        return dataset
    more = [f"and {len(broken) - _SHOWN} more"] if len(broken) > _SHOWN else []
    named = "; ".join([f"{error.where}: {error.reason}" for error in list(broken.values())[:_SHOWN]] + more)
    said = f"{len(broken):,} of {len(dataset):,} images of {dataset.spec} ({dataset.split}) can't be read"
    if len(broken) > max(1, max_broken * len(dataset)):
        raise TooManyBroken(
            f"At least {said}, more than data.max_broken = {max_broken:g} of them: {named}. All found so far: {report}. Repair them or take them "
            "away, or set data.max_broken higher; 1 leaves out any number."
        )
    warnings.warn(f"{said} and are left out: {named}. All, with reasons: {report}", stacklevel=3)
    return dataset.without(list(broken))


def _read(dataset, report: Path) -> tuple[np.ndarray, dict[int, BrokenImage]]:
    """Which rows of the listing have been decoded, and the broken ones; nothing where the report is of another listing."""
    known = read_json(report) if report.exists() else {}
    if known.get("source") != dataset.opener.listing or known.get("images") != dataset.n_listed:
        return np.zeros(dataset.n_listed, bool), {}
    bits = np.frombuffer(zlib.decompress(base64.b64decode(known["checked"])), np.uint8)
    broken = {entry["row"]: BrokenImage(entry["image"], entry["reason"]) for entry in known["broken"]}
    return np.unpackbits(bits, count=dataset.n_listed).astype(bool), broken


def _write(dataset, report: Path, checked: np.ndarray, broken: dict[int, BrokenImage]) -> None:
    write_json(report, {
        "data": dataset.spec, "split": dataset.split, "source": dataset.opener.listing,
        "images": int(checked.size), "images_checked": int(checked.sum()), "images_broken": len(broken),
        "broken": [{"row": int(row), "image": error.where, "reason": error.reason} for row, error in sorted(broken.items())],
        "checked": base64.b64encode(zlib.compress(np.packbits(checked).tobytes())).decode(),  # a bit an image: 1.3 million take 100 letters
        "note": "Broken images are left out of every stage, and looked at again each time. Delete this file to have all images checked again.",
    })  # fmt: skip


def _check(dataset, report: Path, max_broken: float, workers: int | None, progress: bool) -> dict[int, BrokenImage]:
    """The data set's broken images, by their rows of the listing; writes the report."""
    rows = dataset.rows.numpy()
    checked, before = _read(dataset, report)
    broken = {row: error for row in before if (error := _broken(dataset, [row], 0)[1]) is not None}
    mine, saved, todo = set(rows.tolist()), time.monotonic(), rows[~checked[rows]]
    said = {"desc": f"checking images of {dataset.name}", "unit": "image", "leave": False, "disable": not progress or not len(todo)}
    with tqdm(total=len(todo), **said) as bar:
        for batch in load(partial(_broken, dataset, todo), len(todo), 64, workers, list):
            checked[[row for row, _ in batch]] = True
            broken |= {row: error for row, error in batch if error is not None}
            bar.update(len(batch))
            if len(broken.keys() & mine) > max(1, max_broken * len(rows)):
                break
            if time.monotonic() - saved > _SAVE_EVERY:
                _write(dataset, report, checked, broken)
                saved = time.monotonic()
    if len(todo) or broken.keys() != before.keys():
        _write(dataset, report, checked, broken)
    return {row: broken[row] for row in sorted(broken.keys() & mine)}


def _broken(dataset, rows, i: int) -> tuple[int, BrokenImage | None]:
    """A row, and what is wrong with its image."""
    try:
        dataset.open_row(row := int(rows[i]), draft=True)
    except BrokenImage as error:
        return row, error
    return row, None
