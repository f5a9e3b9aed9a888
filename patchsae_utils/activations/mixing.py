"""Tokens of many images in one batch: which of an image's tokens, and in what order. What a store and a stream share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

TOKENS = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}  # of [CLS, patch 1, ..., patch P]


class StoreMetadata(NamedTuple):
    """What a store, or a stream, holds."""

    model_name: str
    weights_hash: str  # first 16 hex digits of the SHA-256 of the model's weights
    layer: int  # block whose output this is, from 0
    tokens: str
    grid: tuple[int, int]  # rows and columns of patches
    dtype: str  # on disk; readers get float32
    preprocessing: str
    dataset: str  # the data set's spec
    split: str
    seed: int | None
    class_names: list[str]
    n_images: int
    n_tokens: int  # of an image
    d_in: int

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> StoreMetadata:
        model, data = inputs["model"], inputs["dataset"]
        known = {name: inputs[name] for name in ("layer", "tokens", "dtype", "preprocessing")}
        known |= {name: data[name] for name in ("split", "seed", "class_names")}
        known |= dict(zip(("n_images", "n_tokens", "d_in"), inputs["shape"], strict=True))
        return cls(model_name=model["name"], weights_hash=model["weights"], grid=tuple(model["grid"]), dataset=data["spec"], **known)


class TokenSource:
    """Tokens of many images, mixed by a buffer that is filled with parts (shards, or single images), permuted and emptied."""

    buffer_bytes = 2**31  # at most so many bytes of tokens are held at a time, but at least one part
    _least_parts = 1
    _sizes: np.ndarray  # images in each part
    _read: Any  # (parts [n], places of the model's sequence: a range) -> tokens [images, T, d]

    def __init__(self, inputs: dict[str, Any]):
        self.metadata = StoreMetadata.of(inputs)
        self.n_images, self.n_tokens, self.d_in = inputs["shape"]

    def __len__(self) -> int:
        return self.n_images * self.n_tokens

    def __repr__(self) -> str:
        m, place = self.metadata, f"{str(self.folder)!r}: " if hasattr(self, "folder") else ""
        size = f"{m.n_images:,} images of {m.dataset!r} x {m.n_tokens} tokens x {m.d_in}"
        return f"{type(self).__name__}({place}{size}, {m.model_name!r} layer {m.layer}, {m.dtype})"

    def tokens(
        self, batch_size: int, *, shuffle: bool = True, seed: int = 0, epochs: int | None = 1, start_step: int = 0, positions: bool = False,
        tokens: str = "all", device: torch.device | None = None,
    ) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Batches of single tokens, mixed from many images; on a GPU as ``device`` whole buffers lie, the next one read and copied meanwhile."""
        if tokens not in TOKENS:
            raise ValueError(f"Unknown tokens {tokens!r}. Valid: {', '.join(TOKENS)}.")
        held = self.metadata.tokens
        wanted = held if tokens == "all" else tokens  # "all": whatever there is
        if held not in ("all", wanted):
            raise ValueError(f"There are no tokens {wanted!r} here, only {held!r}. Extract with tokens={wanted!r} or 'all'.")
        if batch_size < 1 or start_step < 0 or (epochs is not None and epochs < 1):
            raise ValueError(f"Needs batch_size >= 1, start_step >= 0, epochs >= 1 or None; got {batch_size}, {start_step}, {epochs}.")
        places = range(self.n_tokens + (held == "patches"))[TOKENS[wanted]]  # of the model's sequence
        buffers = self._buffers(places, shuffle, seed, itertools.count() if epochs is None else range(epochs), start_step * batch_size)
        mixed = _batches(buffers if device is None or device.type == "cpu" else _ahead(buffers, device), places, batch_size)
        return mixed if positions else (x for x, _ in mixed)

    def _buffers(self, places: range, shuffle: bool, seed: int, epochs, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens [m, D] of some parts at a time, and the order in which they come, without the first ``skip`` of all."""
        n, sizes = len(places), self._sizes
        per_buffer = max(self._least_parts, self.buffer_bytes // (2 * int(sizes.max()) * n * self.d_in))
        for epoch in epochs:
            if skip >= self.n_images * n:
                skip -= self.n_images * n
                continue
            parts = np.random.default_rng([seed, epoch]).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
            for number, members in enumerate(np.array_split(parts, math.ceil(len(sizes) / per_buffer))):
                size = int(sizes[members].sum()) * n
                if skip >= size:
                    skip -= size
                    continue
                order = np.random.default_rng([seed, epoch, number]).permutation(size) if shuffle else np.arange(size)
                yield self._read(members, places).flatten(0, 1), torch.from_numpy(order[skip:])
                skip = 0


def _batches(buffers: Iterator[tuple[Tensor, Tensor]], places: range, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 tokens [n, D] and their places in the sequence [n], from one buffer after the other."""
    pending, needed = [], batch_size
    for buffer, order in buffers:
        order = order.to(buffer.device)
        while len(order):
            rows, order = order[:needed], order[needed:]
            pending.append((buffer.index_select(0, rows).float(), rows % len(places) + places.start))
            needed -= len(rows)
            if needed == 0:
                yield _joined(pending)
                pending, needed = [], batch_size
        del buffer  # before the next one is read
    if pending:
        yield _joined(pending)


def _joined(pending: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, places = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending, strict=True))
    return tokens, places


def _ahead(buffers: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Buffers on a GPU: while one is emptied, a thread reads the next into pinned memory and lets it be copied."""

    def moved(part: Tensor) -> Tensor:
        return (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)

    def following() -> tuple[Tensor, Tensor] | None:
        found = next(buffers, None)
        return None if found is None else (moved(found[0]), moved(found[1]))

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while found := coming.result():
            coming = thread.submit(following)
            yield found
            del found
