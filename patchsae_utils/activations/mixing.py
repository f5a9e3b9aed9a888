"""Tokens of many images in one batch: which of an image's tokens, and in what order. What a store and a stream share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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


def choose_tokens(held: str, wanted: str) -> slice:
    """Which of an image's tokens are meant, of those that there are (``held``); ``"all"`` wants whatever there is."""
    if wanted not in TOKENS:
        raise ValueError(f"Unknown tokens {wanted!r}. Valid: {', '.join(TOKENS)}.")
    if wanted in ("all", held):
        return slice(0, None)
    if held != "all":
        raise ValueError(f"There are no tokens {wanted!r} here, only {held!r}. Extract with tokens={wanted!r} or 'all'.")
    return TOKENS[wanted]


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

    def tokens(
        self, batch_size: int, *, shuffle: bool = True, seed: int = 0, epochs: int | None = 1, start_step: int = 0, positions: bool = False,
        tokens: str = "all",
    ) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Batches of single tokens, mixed from many images."""
        kept = choose_tokens(self.metadata.tokens, tokens)
        if batch_size < 1 or start_step < 0 or (epochs is not None and epochs < 1):
            raise ValueError(f"Needs batch_size >= 1, start_step >= 0, epochs >= 1 or None; got {batch_size}, {start_step}, {epochs}.")
        first = kept.start + (self.metadata.tokens == "patches")
        places = range(first, first + len(range(self.n_tokens)[kept]))
        mixed = self._mixed(places, batch_size, shuffle, seed, itertools.count() if epochs is None else range(epochs), start_step)
        return mixed if positions else (x for x, _ in mixed)

    def _mixed(self, places: range, batch_size: int, shuffle: bool, seed: int, epochs, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        n, sizes = len(places), self._sizes
        per_buffer = max(self._least_parts, self.buffer_bytes // (2 * int(sizes.max()) * n * self.d_in))
        skip, pending, needed = start_step * batch_size, [], batch_size
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
                buffer = self._read(members, places).flatten(0, 1)
                order = torch.from_numpy(order[skip:]).to(buffer.device)
                skip = 0
                while len(order):
                    rows, order = order[:needed], order[needed:]
                    pending.append((buffer.index_select(0, rows).float(), rows % n + places.start))
                    needed -= len(rows)
                    if needed == 0:
                        yield _joined(pending)
                        pending, needed = [], batch_size
                del buffer
        if pending:
            yield _joined(pending)


def _joined(pending: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, places = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending, strict=True))
    return tokens, places
