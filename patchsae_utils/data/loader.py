"""Data sets, by what a spec means, and their preprocessed pictures a batch at a time, opened here or by other processes."""

from __future__ import annotations

import base64
import os
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from ..run.artifacts import folder_lock, read_json, write_json
from . import controls, folders, hub_sets, paper_sets, truth
from .dataset import ImageData
from .openmoji import OpenMojiData
from .pictures import BrokenImage
from .splits import check_split, share

_SHOWN, _SAVE_EVERY = 5, 60.0  # images that a message names; seconds between two reports of an unfinished check
PREFETCH = 2  # batches that each process has ready at most: the bound on memory


def load_dataset(spec: str | Path, split: str, *, n_images: int | None = None, half: str | None = None, seed: int = 0) -> Any:
    """Open a data set.

    A missing ``val`` is the ``test``, and the other way round; where there is neither, the one part is split 80/10/10 within each class, drawn with
    ``seed``. Classes are those of all splits. Without labels there are no classes (``has_labels`` is False, labels are -1).

    Parameters
    ----------
    spec : str, or path
        ``openmoji/<task>[:<domain>]``, or a task whose answer is known: ``openmoji/unseen``, ``openmoji/sign-<2, 10 or 50>``,
        ``openmoji/<task>:<nonce, relabelled or a sign>``; a folder (``[<split>/]<class>/<image>``, without labels ``[<split>/]<image>``); ``list:<file>``, or a ``.txt``
        file, that names a picture a line; one of the paper's eleven (``caltech101``, ``oxford_pets``, ``stanford_cars``, ``flowers102``, ``food101``,
        ``fgvc_aircraft``, ``sun397``, ``dtd``, ``eurosat``, ``ucf101``, ``imagenet``; a folder of such a name is written ``./dtd``);
        ``torchvision:<Name>``; ``hf:<repository>[:<configuration>]``; or ``hf-stream:<repository>[:<configuration>]``, of which only ``n_images``
        (10,000 by default) are fetched; ``<folder>/*.tar`` in place of a repository, or alone, for shards of webdataset. Names may end in
        ``?root=<folder>``, instead of ``$PATCHSAE_DATA``; those of the hub in ``?image=<column>&label=<column>``. With what every pixel shows instead of labels:
        ``coco:<images>:<annotations.json>[:<more.json>...]`` and ``masks:<images>:<label images>[:<names.txt>]``.
    split : str, ``train``, ``val`` or ``test``
    n_images, half : int, and {"base", "novel"}; optional
    seed : int, draws the scenes, or the subset

    Raises
    ------
    ValueError, FileNotFoundError
        For anything unknown (naming the valid ones), a wrong label, classes too small to be split, or a half where there are no labels; for a
        missing folder (says what is expected in it).
    """
    spec = str(spec)
    check_split(split, n_images)
    if spec.startswith("openmoji/"):
        task, _, domain = spec.removeprefix("openmoji/").partition(":")
        if controls.is_control(task, domain):
            return controls.ControlData(task, domain, split, half, n_images, seed)
        return OpenMojiData(task, split, domain or "color", half, n_images, seed)
    if spec.endswith(".tar") and not spec.startswith("hf"):
        spec = f"hf:{spec}"
    kind, _, rest = spec.partition(":")
    name, _, root = rest.partition("?root=")
    annotations = None
    if kind in ("coco", "masks"):
        listing, annotations = truth.read_masked(spec, split)
    elif kind == "hf":
        listing = hub_sets.read_hub(rest, split)
    elif kind == "hf-stream":
        listing = hub_sets.read_stream(rest, split, n_images, half, seed)
    elif (one_of_eleven := paper_sets.paper_name(spec)) is not None:
        listing = paper_sets.read_paper_set(one_of_eleven, split, spec.partition("?root=")[2])
    elif kind == "torchvision":
        listing = paper_sets.read_torchvision(name, split, root)
    elif kind == "list" or (spec.endswith(".txt") and not Path(spec).is_dir()):
        listing = folders.read_list(Path(spec.removeprefix("list:")))
    else:
        listing = folders.read_folder(Path(spec), split)
    names, labels, opener, ends = listing
    rows = share(labels, split, ends, seed, names, spec) if ends else None
    given = spec, split, names, labels, opener, half, n_images, seed, rows
    return ImageData(*given) if annotations is None else truth.MaskedData(annotations, *given)


def has_truth(data) -> bool:
    """Whether a data set, or the one that a spec means, knows what every patch shows."""
    return data.startswith(("openmoji/", "coco:", "masks:")) if isinstance(data, str) else hasattr(data, "truth")


class Batch(NamedTuple):
    """Some pictures, preprocessed: [B, 3, H, W], their labels [B] and their places in the data set [B]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class DeadWorker(ChildProcessError):
    """A process that opens pictures has ended before its work was done."""


def batches(
    dataset: Sized, preprocess: Callable[[Image.Image], Tensor], batch_size: int = 64, workers: int | None = None,
    indices: Sequence[int] | None = None, progress: str | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Preprocessed pictures in order, a batch at a time, in pinned memory where there is a GPU; the same however many processes open them.

    Parameters
    ----------
    dataset, preprocess : ImageData or OpenMojiData, and ``clip.preprocess``
    batch_size : int
    workers : int, optional
        Processes that open and preprocess pictures; with 0 they are opened here. None: ``dataset.workers``, which a profile sets, and where that
        is None too, one a spare processor if a GPU computes, else none.
    indices : sequence of int, optional; only these places, in this order
    progress : str, optional; show a bar with this label

    Raises
    ------
    BrokenImage, DeadWorker
        If a picture can't be read (names its file), or a process ends before its time (says why that happens, and what to do).
    """
    places = range(len(dataset)) if indices is None else [int(i) for i in indices]
    workers = getattr(dataset, "workers", None) if workers is None else workers
    loaded = load(partial(_preprocessed, dataset, preprocess, places), len(places), batch_size, workers)
    for batch in tqdm(loaded, desc=progress, total=-(-len(places) // batch_size), disable=progress is None, leave=False):
        yield Batch(*batch)


def _preprocessed(dataset, preprocess, places: Sequence[int], i: int) -> tuple[Tensor, int, int]:
    example = dataset[places[i]]
    return preprocess(example.image), example.label, example.index


def load(read: Callable[[int], Any], n: int, batch_size: int, workers: int | None, collate: Callable = default_collate) -> Iterator:
    """``read(0)`` to ``read(n - 1)``, in batches, by torch's DataLoader, with errors for people."""
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise ValueError(f"workers must be a whole number from 0 on, or None for as many as suit the machine, got {workers!r}.")
    n_batches, workers = -(-n // batch_size), automatic_workers() if workers is None else workers
    workers = min(workers, n_batches) if n_batches > 1 else 0  # starting a process takes longer than opening a batch
    loader: DataLoader = DataLoader(
        range(n), batch_size, num_workers=workers, prefetch_factor=PREFETCH if workers else None,  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(), collate_fn=partial(_opened, read, collate),
    )  # fmt: skip
    with _no_signals():
        parts = iter(loader)
    while True:
        try:
            batch = next(parts, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not _means_dead(error):
                raise
            raise DeadWorker(
                f"A process that opens pictures (data.workers = {workers}) has ended before its time ({str(error) or 'no answer'}). Most often memory has run out, or "
                "in a container /dev/shm (docker run --shm-size=8g). Set data.workers lower, or to 0, which opens pictures without other "
                "processes, and give the same command again: what was finished is kept."
            ) from error
        if batch is None:
            return
        if isinstance(batch, BrokenImage):
            raise batch
        yield batch


def _opened(read: Callable[[int], Any], collate: Callable[[list], Any], places: Sequence[int]) -> Any:
    """A batch, or the broken image in it as a value: between processes an error would become a wall of text."""
    try:
        return collate([read(i) for i in places])
    except BrokenImage as error:
        return error


def _means_dead(error: Exception) -> bool:
    """Whether torch raises this for a dead worker: in its own words, or while it fetches a batch that the worker was to hand over."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | FileNotFoundError | EOFError) and "in DataLoader worker" not in str(error)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Take back torch's signal handler, which would raise the death of a worker in the midst of a write; ``next`` finds it within five seconds."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield  # torch installs none
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        own = getattr(before, "__module__", "") == "torch.utils.data._utils.signal_handling"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or own else before)


def automatic_workers() -> int:
    """As many processes as there are processors to spare, at most 16, where a GPU computes; 0 where the processors themselves do."""
    if not torch.cuda.is_available():
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(16, processors - 1))


class TooManyBroken(ValueError):
    """More images than allowed can't be read; the message names the first few, and the report of all."""


def without_broken(dataset, report: str | Path, max_broken: float = 0.01, *, workers: int | None = None, progress: bool = True):
    """A data set without the images that can't be decoded, found before a run: so all stages mean the same image by the same index.

    More than the share ``max_broken`` is :class:`TooManyBroken` (one image never is); with 0 nothing is checked. The ``report``, a JSON file, is shared
    by subsets and halves of one data set, an interrupted check goes on, and broken images are looked at again each time.
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
