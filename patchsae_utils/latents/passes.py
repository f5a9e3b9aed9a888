"""One pass over a data set: read once, shared by processes, saved now and then, resumed where it was killed.

Every process reads whole batches, cut as one process cuts them, and counts are added exactly (:mod:`.summary`): the result is the same, bit
for bit. Only :mod:`.likeness` sums float64 products in the order in which images come; its scores agree to about 1e-9.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.model import Residual
from ..data.loader import batches
from ..run.artifacts import file_sha256, folder_lock
from ..run.memory import HalvedBatches
from ..run.processes import Processes

CHUNK_BYTES = 24 * 2**20  # of the largest [images, tokens, S] float32 block, small enough for a processor's caches
SAVE_SECONDS = 300.0  # between two savings of what was counted

_FILE = re.compile(r"counted-\d+-([0-9a-f]{16})\.safetensors")


class Observer:
    """What counts something while :func:`summarize_latents` reads a data set; a subclass overrides what it needs.

    Each image comes once, in one of the processes; what was counted by another, or before a kill, is absorbed in any order. ``key`` is the
    fingerprint of what is made from which inputs.
    """

    key = ""

    def is_complete(self) -> bool:
        """Whether what it makes is there already."""
        return False

    def prepare(self, tokens: Tensor) -> None:
        """Before all else: the residual stream [B, 1+P, D] of the data set's first batch, in every process the same."""

    def read(self, images: Tensor, stream: Residual, places: Tensor) -> None:
        """A batch as CLIP reads it, its residual stream and its places in the data set [B], before its latents come."""

    def add(self, h: Tensor, labels: Tensor, places: Tensor) -> None:
        """Some images of the batch: latents [b, 1+P, S], classes and places [b]."""

    def state(self) -> dict[str, Tensor]:
        """All that was counted."""
        return {}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add entries of another's :meth:`state`, which counted other images."""

    def finish(self) -> object:
        """After the last image, in the main process: write, or return, what was counted."""


def read_streams(
    clip, dataset, layer: int, batch_size: int = 64, indices: Sequence[int] | None = None, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Residual]]:
    """Images, labels [B] (-1 without classes), places in the data set [B] and residual stream, by batches or parts that fit the memory."""
    fitting, n_classes = HalvedBatches(clip.device), len(dataset.class_names)
    for batch in batches(dataset, clip.preprocess, batch_size, indices=indices, progress=progress):
        if n_classes and (batch.labels.min() < 0 or batch.labels.max() >= n_classes):
            raise ValueError(
                f"Labels must lie in range({n_classes}), as there are class names; got {int(batch.labels.min())} to {int(batch.labels.max())}."
            )
        for rows, stream in fitting.run(len(batch.labels), partial(lambda images, rows: clip.run_to(images[rows], layer), batch.images)):
            _check_finite(stream.tokens, batch.indices[rows], clip, layer)
            yield batch.images[rows], batch.labels[rows], batch.indices[rows], stream


def read_latents(
    clip, sae, dataset, layer: int, batch_size: int = 64, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Labels [b], places [b] and latents [b, 1+P, S] at CLS and the patches, a few images at a time."""
    for _, labels, places, stream in read_streams(clip, dataset, layer, batch_size, progress=progress):
        for rows, h in latent_chunks(sae, stream.tokens[:, : clip.n_tokens]):
            yield labels[rows], places[rows], h


def latent_chunks(sae, residual: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a batch [B, T, D] and their latents [b, T, S]: ``CHUNK_BYTES`` at a time (on a GPU 16 times that), at least one image."""
    most = CHUNK_BYTES if sae.W_enc.device.type == "cpu" else 16 * CHUNK_BYTES
    step = max(1, most // (4 * residual.shape[1] * sae.W_enc.shape[1]))
    for start in range(0, len(residual), step):
        rows = slice(start, min(start + step, len(residual)))
        yield rows, sae.encode(residual[rows].to(sae.W_enc.device))


def _check_finite(tokens: Tensor, places: Tensor, clip, layer: int) -> None:
    bad = ~tokens.isfinite().flatten(1).all(1).cpu()
    if bad.any():
        shown = ", ".join(map(str, places[bad].tolist()[:5]))
        raise ValueError(
            f"The residual stream of {clip.name!r} after layer {layer} holds NaN or infinity in {int(bad.sum())} of {len(bad)} images of a batch "
            f"(places {shown} in the data set). Look at these images; with precision='bf16', try 'fp32'."
        )


@contextmanager
def one_pass(
    clip,
    sae,
    dataset,
    layer: int,
    observers: Mapping[str, Observer],
    batch_size: int,
    unfinished: Path | None,
    key: str,
    progress: str | None,
) -> Iterator[Processes]:
    """Read a data set into observers, which hold in the block what all processes counted; ``unfinished``, a folder, is removed after it."""
    processes, read = Processes(), partial(read_streams, clip, dataset, layer, batch_size)
    prepared = False

    def prepare(stream: Residual) -> None:
        nonlocal prepared
        for observer in () if prepared else observers.values():
            observer.prepare(stream.tokens[:, : clip.n_tokens].to(sae.W_enc.device))
        prepared = True

    with ExitStack() as stack:
        saved = SavedCounts(unfinished, key, observers, len(dataset), processes.index)
        if unfinished is not None:
            if processes.main:
                stack.callback(_remove_if_empty, unfinished)  # left by a pass that failed before anything was saved
            processes.on_main(lambda: stack.enter_context(folder_lock(unfinished)))
        if processes.number > 1 or saved.files():  # whoever begins elsewhere reads the first batch for this alone
            prepare(next(read(range(min(batch_size, len(dataset)))))[3])
        rows = (~processes.on_main(saved.resume)).nonzero().flatten().tolist()
        whole = processes.share(-(-len(rows) // batch_size))  # batches, so that they are cut as one process cuts them
        own = rows[whole.start * batch_size : whole.stop * batch_size]

        def count() -> None:
            for images, labels, places, stream in read(own, progress if processes.main else None) if own else ():
                prepare(stream)
                if saved.done.any() and time.monotonic() - saved.time >= SAVE_SECONDS:
                    saved.save()
                for observer in observers.values():
                    observer.read(images, stream, places)
                for some, h in latent_chunks(sae, stream.tokens[:, : clip.n_tokens]):
                    for observer in observers.values():
                        observer.add(h, labels[some].to(h.device), places[some].to(h.device))
                saved.done[places] = True
            if processes.number > 1 and own:
                saved.save()  # others may take longer, or stop

        processes.everywhere(count)
        for observer in observers.values():
            for name, value in observer.state().items():
                for other in processes.others(value):
                    observer.absorb({name: other})
        yield processes
        if unfinished is not None:
            processes.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))


class SavedCounts:
    """What a pass has counted so far, in a folder if there is one: a file for each process, named by its hash."""

    def __init__(self, folder: Path | None, key: str, observers: Mapping[str, Observer], n_images: int, index: int):
        self.folder, self.key, self.observers, self.index = folder, key, observers, index
        self.done = torch.zeros(n_images, dtype=torch.bool)  # images that were counted
        self.time, self._own_name = time.monotonic(), ""

    def files(self, pattern: str = "counted-*") -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(pattern))

    def resume(self) -> Tensor:
        """In the main process: count what an earlier attempt counted, and make one file of it. Images [N] that need not be read."""
        found = [(path, done) for path in self.files() if (done := self._done_by(path)) is not None]
        # Killed between writing a file and removing those it replaces, a process leaves images counted twice: the larger file holds them.
        for path, done in sorted(found, key=lambda pair: -int(pair[1].sum())):
            if not (done & self.done).any():
                state = load_file(path)
                for name, observer in self.observers.items():
                    observer.absorb({key.removeprefix(f"{name}/"): each for key, each in state.items() if key.startswith(f"{name}/")})
                self.done |= done
        if self.done.any():
            self.save()
        self._remove_all_but_own(self.files())
        return self.done.clone()

    def save(self) -> None:
        """Write all that was counted, as a whole, and remove this process's earlier file."""
        if self.folder is None:
            return
        parts = self.observers.items()
        state = {f"{name}/{key}": value.cpu().contiguous() for name, observer in parts for key, value in observer.state().items()}
        temporary = self.folder / f".counted-{self.index}.tmp"
        save_file({**state, "done": self.done.to(torch.uint8)}, temporary, {"key": self.key})
        self._own_name = f"counted-{self.index}-{file_sha256(temporary)[:16]}.safetensors"
        os.replace(temporary, self.folder / self._own_name)
        self._remove_all_but_own(self.files(f"counted-{self.index}-*"))
        self.time = time.monotonic()

    def _remove_all_but_own(self, paths: list[Path]) -> None:
        for path in paths:
            if path.name != self._own_name:
                path.unlink()

    def _done_by(self, path: Path) -> Tensor | None:
        """Images that a file counts; None for one that is damaged or of other inputs."""
        named = _FILE.fullmatch(path.name)
        if named is None or file_sha256(path)[:16] != named[1]:
            return None
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor("done").bool() if file.metadata().get("key") == self.key else None


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
