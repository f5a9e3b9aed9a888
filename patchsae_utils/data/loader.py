"""Data sets, by what a spec means, and their preprocessed pictures a batch at a time, opened here or by other processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from . import controls, folders, hub_sets, paper_sets, truth
from .dataset import ImageData
from .openmoji import OpenMojiData
from .pictures import BrokenImage
from .splits import check_split, share

PREFETCH = 2  # batches that each process has ready at most: the bound on memory


def load_dataset(spec: str, split: str, *, n_images: int | None = None, half: str | None = None, seed: int = 0) -> Any:
    """Open a data set.

    A missing ``val`` is the ``test``, and the other way round; where there is neither, the one part is split 80/10/10 within each class, drawn with
    ``seed``. Classes are those of all splits. Without labels there are no classes (``has_labels`` is False, labels are -1).

    Parameters
    ----------
    spec : str
        ``openmoji/<task>[:<domain>]``, or a task whose answer is known: ``openmoji/unseen``, ``openmoji/sign-<2, 10 or 50>``,
        ``openmoji/<task>:<nonce, relabelled or a sign>``; a folder (``[<split>/]<class>/<image>``, without labels ``[<split>/]<image>``); ``list:<file>``, or a ``.txt``
        file, that names a picture a line; one of the paper's eleven (``caltech101``, ``oxford_pets``, ``stanford_cars``, ``flowers102``, ``food101``,
        ``fgvc_aircraft``, ``sun397``, ``dtd``, ``eurosat``, ``ucf101``, ``imagenet``; a folder of such a name is written ``./dtd``);
        ``torchvision:<Name>``; ``hf:<repository>[:<configuration>]``; or ``hf-stream:<repository>[:<configuration>]``, of which only ``n_images``
        (10,000 by default) are fetched. Names may end in ``?root=<folder>``, instead of ``$PATCHSAE_DATA``; those of the hub in
        ``?image=<column>&label=<column>``. With what every pixel shows instead of labels:
        ``coco:<images>:<annotations.json>[:<more.json>...]`` and ``masks:<images>:<label images>[:<names.txt>]``.
    split : str
        ``train``, ``val`` or ``test``.
    n_images : int, optional
    half : {"base", "novel"}, optional
        Only this half of the classes, relabelled from 0.
    seed : int
        Draws the scenes, or the subset.

    Raises
    ------
    ValueError
        For anything unknown (naming the valid ones), a wrong label, classes too small to be split, or a half where there are no labels.
    FileNotFoundError
        For a missing folder; says what is expected in it.
    """
    check_split(split)
    if spec.startswith(("coco:", "masks:")):
        return truth.read_masked(spec, split, half, n_images, seed)
    if spec.startswith("openmoji/"):
        task, _, domain = spec.removeprefix("openmoji/").partition(":")
        if controls.is_control(task, domain):
            return controls.ControlData(task, domain, split, half, n_images, seed)
        return OpenMojiData(task, split, domain or "color", half, n_images, seed)
    kind, _, rest = spec.partition(":")
    name, _, root = rest.partition("?root=")
    if kind == "hf":
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
    return ImageData(spec, split, names, labels, opener, half, n_images, seed, rows)


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
    """Preprocessed pictures in order, a batch at a time; the same ones however many processes open them.

    Parameters
    ----------
    dataset : ImageData or OpenMojiData
    preprocess : callable
        ``clip.preprocess``.
    batch_size : int
    workers : int, optional
        Processes that open and preprocess pictures; with 0 they are opened here. None: ``dataset.workers``, which a profile sets, and where that
        is None too, one a spare processor if a GPU computes, else none.
    indices : sequence of int, optional
        Only these places, in this order.
    progress : str, optional
        Show a bar with this label.

    Yields
    ------
    Batch
        In pinned memory where there is a GPU.

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
    n_batches, workers = -(-n // batch_size), automatic_workers() if workers is None else workers
    workers = min(workers, n_batches) if n_batches > 1 else 0  # starting a process takes longer than opening a batch
    loader = DataLoader(
        _Items(read, n), batch_size, num_workers=workers, prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(), collate_fn=partial(_collate, collate),
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


class _Items(Dataset):
    """Hands a broken image on as a value: between processes an error would become a wall of text."""

    def __init__(self, read: Callable[[int], Any], n: int):
        self.read, self.n = read, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        try:
            return self.read(i)
        except BrokenImage as error:
            return error


def _collate(collate: Callable[[list], Any], items: list) -> Any:
    return next((item for item in items if isinstance(item, BrokenImage)), None) or collate(items)


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
