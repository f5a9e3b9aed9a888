"""One pass over a data set: read once, shared by processes, saved now and then, resumed where it was killed.

Every process reads whole batches, cut as one process cuts them, and counts are added exactly (:mod:`.summary`): the result is the same, bit
for bit. Only :mod:`.likeness` sums float64 products in the order in which images come; its scores agree to about 1e-9.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.model import Residual
from ..data.loader import batches
from ..run.artifacts import disk_errors, file_sha256, fingerprint, folder_lock
from ..run.memory import HalvedBatches
from ..run.processes import Processes

CHUNK_BYTES = 24 * 2**20  # of the largest [images, tokens, S] float32 block, small enough for a processor's caches
SAVE_SECONDS = 300.0  # between two savings of what was counted


class Observer:
    """What counts something while :func:`summarize_latents` reads a data set; a subclass overrides what it needs.

    Each image comes once, in one of the processes; what was counted by another, or before a kill, is absorbed in any order.
    """

    key = ""  # fingerprint of what is made from which inputs

    def is_complete(self) -> bool:
        """Whether what it makes is there already."""
        return False

    def read(self, images: Tensor, stream: Residual, places: Tensor) -> None:
        """A batch as CLIP reads it, its residual stream and its places in the data set [B], before its latents come."""

    def add(self, h: Tensor, labels: Tensor, places: Tensor) -> None:
        """Some images of the batch: latents [b, 1+P, S], classes and places [b]."""

    def state(self) -> dict[str, Tensor]:
        """All that was counted, in the tensors that count."""
        return {}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add entries of another's :meth:`state`, which counted other images."""
        own = self.state()
        for name, value in state.items():
            own[name].add_(value.to(own[name]))

    def finish(self) -> None:
        """After the last image, in the main process: write what was counted."""


def read_streams(
    clip, dataset, layer: int, batch_size: int = 64, indices: Sequence[int] | None = None, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Residual]]:
    """Images, labels [B] (-1 without classes), places in the data set [B] and residual stream, by batches or parts that fit the memory."""
    fitting = HalvedBatches(clip.device)
    for batch in batches(dataset, clip.preprocess, batch_size, indices=indices, progress=progress):
        for rows, stream in fitting.run(len(batch.labels), partial(lambda images, rows: clip.run_to(images[rows], layer), batch.images)):
            bad = ~stream.tokens.isfinite().flatten(1).all(1).cpu()
            if bad.any():
                raise ValueError(
                    f"The residual stream of {clip.name!r} after layer {layer} holds NaN or infinity in {int(bad.sum())} of {len(bad)} images of a batch "
                    f"(places {', '.join(map(str, batch.indices[rows][bad].tolist()[:5]))} in the data set). Look at these images; with precision='bf16', try 'fp32'."
                )
            yield batch.images[rows], batch.labels[rows], batch.indices[rows], stream


def read_latents(clip, sae, dataset, layer: int, progress: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Labels [b], places [b] and latents [b, 1+P, S] at CLS and the patches, a few images at a time."""
    for _, labels, places, stream in read_streams(clip, dataset, layer, progress=progress):
        for rows, h in latent_chunks(sae, stream.tokens[:, : clip.n_tokens]):
            yield labels[rows], places[rows], h


def latent_chunks(sae, residual: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a batch [B, T, D] and their latents [b, T, S]: ``CHUNK_BYTES`` at a time (on a GPU 16 times that), at least one image."""
    most = CHUNK_BYTES if sae.W_enc.device.type == "cpu" else 16 * CHUNK_BYTES
    step = max(1, most // (4 * residual.shape[1] * sae.W_enc.shape[1]))
    for start in range(0, len(residual), step):
        rows = slice(start, min(start + step, len(residual)))
        yield rows, sae.encode(residual[rows].to(sae.W_enc.device))


def one_pass(
    clip, sae, dataset, layer: int, observers: Sequence[Observer], batch_size: int, unfinished: Path | None, progress: bool
) -> None:
    """Read a data set into observers and let them finish; until then the folder ``unfinished`` holds what was counted."""
    processes = Processes()
    with ExitStack() as stack:
        if unfinished is not None:
            if processes.main:
                stack.callback(_remove_if_empty, unfinished)
            processes.on_main(lambda: stack.enter_context(folder_lock(unfinished)))
        saved = SavedCounts(unfinished, observers, len(dataset), processes.index)
        rows = (~processes.on_main(saved.resume)).nonzero().flatten().tolist()
        whole = processes.share(-(-len(rows) // batch_size))  # batches, so that they are cut as one process cuts them
        own = rows[whole.start * batch_size : whole.stop * batch_size]

        def count() -> None:
            shown = "latents" if progress and processes.main else None
            for images, labels, places, stream in read_streams(clip, dataset, layer, batch_size, own, shown):
                for observer in observers:
                    observer.read(images, stream, places)
                for some, h in latent_chunks(sae, stream.tokens[:, : clip.n_tokens]):
                    for observer in observers:
                        observer.add(h, labels[some].to(h.device), places[some].to(h.device))
                saved.done[places] = True
                if time.monotonic() - saved.time >= SAVE_SECONDS:
                    saved.save()
            if processes.number > 1 and own:
                saved.save()  # others may take longer, or stop

        processes.everywhere(count)
        for observer in observers:
            for name, value in observer.state().items():
                for other in processes.others(value):
                    observer.absorb({name: other})
            processes.on_main(observer.finish)
        if unfinished is not None:
            processes.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class SavedCounts:
    """What a pass has counted so far, in a folder if there is one: a file for each process, named by its hash."""

    def __init__(self, folder: Path | None, observers: Sequence[Observer], n_images: int, index: int):
        self.folder, self.observers, self.index = folder, observers, index
        self.key = fingerprint(observers=[each.key for each in observers])
        self.done = torch.zeros(n_images, dtype=torch.bool)  # images that were counted
        self.time = time.monotonic()

    def resume(self) -> Tensor:
        """In the main process: count what an earlier attempt counted, and make one file of it. Images [N] that need not be read."""
        found = []
        for path in () if self.folder is None else sorted(self.folder.glob("counted-*")):
            if path.stem.endswith(file_sha256(path)[:16]):  # else damaged
                with safetensors.safe_open(path, "pt") as file:
                    if file.metadata().get("key") == self.key:
                        found.append((file.get_tensor("done").bool(), path))
        # Killed between writing a file and removing those it replaces, a process leaves images counted twice: the larger file holds them.
        for done, path in sorted(found, key=lambda pair: -int(pair[0].sum())):
            if not (done & self.done).any():
                state = load_file(path)
                for i, observer in enumerate(self.observers):
                    observer.absorb({key.removeprefix(f"{i}/"): each for key, each in state.items() if key.startswith(f"{i}/")})
                self.done |= done
        if found:
            self.save("counted-*")
        return self.done.clone()

    def save(self, replaced: str | None = None) -> None:
        """Write all that was counted, as a whole, and remove the files that it replaces: this process's earlier one."""
        if self.folder is None:
            return
        state = {f"{i}/{name}": value.cpu().contiguous() for i, each in enumerate(self.observers) for name, value in each.state().items()}
        temporary = self.folder / f".counted-{self.index}.tmp"
        with disk_errors(temporary):
            save_file({**state, "done": self.done.to(torch.uint8)}, temporary, {"key": self.key})
        own = self.folder / f"counted-{self.index}-{file_sha256(temporary)[:16]}.safetensors"
        os.replace(temporary, own)
        for path in set(self.folder.glob(replaced or f"counted-{self.index}-*")) - {own}:
            path.unlink()
        self.time = time.monotonic()
