"""Preprocessed pictures, a batch at a time, opened here or by other processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from .pictures import BrokenImage

PREFETCH = 2
"""Batches that each process has ready at most: the bound on memory."""


class Batch(NamedTuple):
    """Some pictures, preprocessed: [B, 3, H, W], their labels [B] and their places in the data set [B]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class DeadWorker(ChildProcessError):
    """A process that opens pictures has ended before its work was done."""


def batches(
    dataset: Sized,
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    workers: int | None = None,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
) -> Iterator[Batch]:
    """Preprocessed pictures in order, a batch at a time; the same ones however many processes open them.

    Parameters
    ----------
    dataset : ImageData or OpenMojiData
    preprocess : callable
        ``clip.preprocess``.
    batch_size : int
    workers : int, optional
        Processes that open and preprocess pictures; each has two batches ready at most. 0: none, pictures are opened here. None:
        ``dataset.workers``, which a profile sets (``data.workers``); where that is None too, one a spare processor if a GPU computes, else none.
    indices : sequence of int, optional
        Only these places, in this order.
    progress : str, optional
        Show a bar with this label.

    Yields
    ------
    Batch
        In pinned memory where there is a GPU, which reads from it while the processor goes on.

    Raises
    ------
    BrokenImage
        If a picture can't be read, naming its file.
    DeadWorker
        If a process ends before its time; says why that happens, and what to do.
    """
    places = range(len(dataset)) if indices is None else [int(i) for i in indices]
    workers = getattr(dataset, "workers", None) if workers is None else workers
    loaded = load(partial(_preprocessed, dataset, preprocess, places), len(places), batch_size, workers)
    for batch in tqdm(loaded, desc=progress, total=-(-len(places) // batch_size), disable=progress is None, leave=False):
        yield Batch(*batch)


def _preprocessed(dataset, preprocess, places: Sequence[int], i: int) -> tuple[Tensor, int, int]:
    example = dataset[places[i]]
    return preprocess(example.image), example.label, example.index


def load(
    read: Callable[[int], Any], n: int, batch_size: int, workers: int | None, collate: Callable[[list], Any] = default_collate
) -> Iterator:
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
    """Items as a batch; the first error, where there is one."""
    return next((item for item in items if isinstance(item, BrokenImage)), None) or collate(items)


def _means_dead(error: Exception) -> bool:
    """Whether torch raises this for a dead worker: in its own words, or while it fetches a batch that the worker was to hand over."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | FileNotFoundError | EOFError) and "in DataLoader worker" not in str(error)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Take back the signal handler that torch installs with the first DataLoader.

    It would raise the death of a worker in the midst of whatever runs then, a write to disk included. Without it ``next`` finds a dead worker
    within five seconds, where it can be told to the user.
    """
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
