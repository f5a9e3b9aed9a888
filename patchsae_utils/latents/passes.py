"""One pass of the statistics over a data set: shared by processes, saved now and then, taken up where it was killed.

Every process reads whole batches, cut as one process cuts them, and all that is counted can be added exactly (:mod:`.summary`): the result
is, bit for bit, the same however many processes share the images and however often they were killed. Only :mod:`.monosemanticity` sums
float64 products in the order in which images come; its scores agree to about 1e-9.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..run.artifacts import file_sha256, folder_lock
from ..run.processes import OneProcess, Processes, current_processes

SAVE_SECONDS = 300.0
"""Between two savings of what was counted; longer where saving itself would take more than a twentieth of the time."""

_FILE = re.compile(r"counted-\d+-([0-9a-f]{16})\.safetensors")


def own_rows(n: int, unit: int, processes: Processes | OneProcess) -> slice:
    """A process's share of n rows: neighbouring whole units, so that what is cut into units is cut as one process cuts it."""
    units = -(-n // unit)
    low, high = (units * (processes.index + i) // processes.number for i in (0, 1))
    return slice(low * unit, min(n, high * unit))


class Unfinished:
    """What a pass has counted so far, on disk: a file for each process, named by its own hash.

    Parameters
    ----------
    folder : Path
    key : str
        Names the inputs; files of others are not taken up.
    parts : mapping
        What counts: each has ``state() -> dict of Tensor`` and ``absorb(state)``.
    n_images : int
    index : int
        Of this process.
    """

    def __init__(self, folder: Path, key: str, parts: Mapping[str, Any], n_images: int, index: int):
        self.folder, self.key, self.parts, self.index = folder, key, parts, index
        self.done = torch.zeros(n_images, dtype=torch.bool)
        """[N] images that were counted."""
        self._saved, self._effort, self._own_name = time.monotonic(), 0.0, ""

    def resume_counts(self, needed: Sequence[int] = ()) -> Tensor:
        """Count what all files of an earlier attempt counted, and make one file of them; only in the main process.

        Parameters
        ----------
        needed : sequence of int
            Images that another output of the pass needs to see. If one of them was counted already, all begins anew.

        Returns
        -------
        BoolTensor [N]
            Images that need not be read.
        """
        found = [(path, done) for path in sorted(self.folder.glob("counted-*")) if (done := self._done_by(path)) is not None]
        # A process that was killed between writing a file and removing those it replaces leaves images counted twice: the larger file holds them.
        for path, done in sorted(found, key=lambda pair: -int(pair[1].sum())):
            if not (done & self.done).any() and not done[list(needed)].any():
                state = load_file(path)
                for name, part in self.parts.items():
                    head = f"{name}/"
                    part.absorb({key.removeprefix(head): value for key, value in state.items() if key.startswith(head)})
                self.done |= done
        if self.done.any():
            self.save()
        for path in self.folder.glob("counted-*"):
            if path.name != self._own_name:
                path.unlink()
        return self.done.clone()

    def save_if_time(self) -> None:
        """Save, if the last time is long ago."""
        if self.done.any() and time.monotonic() - self._saved >= SAVE_SECONDS * max(1.0, self._effort / 15):
            self.save()

    def save(self) -> None:
        """Write all that was counted, as a whole, and remove this process's earlier file."""
        start = time.monotonic()
        state = {f"{name}/{key}": value.cpu().contiguous() for name, part in self.parts.items() for key, value in part.state().items()}
        temporary = self.folder / f".counted-{self.index}.tmp"
        save_file({**state, "done": self.done.to(torch.uint8)}, temporary, {"key": self.key})
        self._own_name = f"counted-{self.index}-{file_sha256(temporary)[:16]}.safetensors"
        os.replace(temporary, self.folder / self._own_name)
        for path in self.folder.glob(f"counted-{self.index}-*"):
            if path.name != self._own_name:
                path.unlink()
        self._saved = time.monotonic()
        self._effort = self._saved - start

    def _done_by(self, path: Path) -> Tensor | None:
        """Images that a file counts; None for one that is damaged or of other inputs."""
        named = _FILE.fullmatch(path.name)
        if named is None or file_sha256(path)[:16] != named[1]:
            return None
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor("done").bool() if file.metadata().get("key") == self.key else None


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def one_pass(
    read: Callable[[list[int] | None, Callable[[], None]], Iterable[tuple[Tensor, Tensor, Tensor]]],
    n_images: int,
    summaries: Mapping[str, Any],
    watch: Any,
    writer: Any,
    *,
    batch_size: int,
    unfinished: Path | None,
    key: str,
) -> Iterator[Processes | OneProcess]:
    """Read a data set into statistics. In the block, they hold what all processes counted; write them there, in the main process.

    Parameters
    ----------
    read : callable
        Takes places in the data set (None: all), and something to call between batches; yields labels, places and latents as
        :func:`patchsae_utils.latents.reading.read_latents` does.
    n_images : int
    summaries : mapping of RunningSummary
    watch : LikenessPass or None
    writer : FeatureWriter or None
    batch_size : int
    unfinished : Path, optional
        A folder of its own, for what was counted so far; removed at the end of the block.
    key : str
        Names the inputs.

    Yields
    ------
    Processes
    """
    processes = current_processes()
    parts = {**summaries, **({} if watch is None else {"likeness": watch})}
    saved: Unfinished | None = None
    with ExitStack() as stack:
        done = torch.zeros(n_images, dtype=torch.bool)
        if unfinished is not None and parts:
            if processes.main:
                stack.callback(_remove_if_empty, unfinished)  # of a pass that failed before anything was saved
            processes.on_main(lambda: stack.enter_context(folder_lock(unfinished)))
            saved = Unfinished(unfinished, key, parts, n_images, processes.index)
            needed = () if writer is None else writer.missing_images()
            if watch is not None and processes.main and any(unfinished.glob("counted-*")):
                watch.prepare()
            done = processes.on_main(lambda: saved.resume_counts(needed))
        if watch is not None and processes.number > 1 and watch.control is None:
            watch.prepare()
        rows = (~done).nonzero().flatten().tolist() if parts else writer.missing_images()
        unit = batch_size if writer is None else math.lcm(batch_size, writer.shard_images)
        own = rows[own_rows(len(rows), unit, processes)]

        def between() -> None:
            if saved is not None and (writer is None or writer.between_shards):
                saved.save_if_time()

        def count() -> None:
            for labels, places, h in read(None if len(own) == n_images else own, between) if own else ():
                for summary in summaries.values():
                    summary.update(h, labels, places)
                if watch is not None:
                    watch.add(h, places)
                if writer is not None:
                    writer.add(h, places)
                if saved is not None:
                    saved.done[places.cpu()] = True
            if saved is not None and processes.number > 1 and own:
                saved.save()  # others may take longer, or stop

        processes.everywhere(count)
        for part in parts.values():
            part.merge(processes)
        yield processes
        if saved is not None:
            processes.on_main(lambda: shutil.rmtree(saved.folder, ignore_errors=True))
