"""Tokens of many images in one batch: which of an image's tokens, and in what order. Used by the store and by the stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOKENS = ("all", "cls", "patches")


def choose_tokens(held: str, wanted: str) -> slice:
    """Which of an image's tokens are meant, of those that there are (``held``); ``"all"`` wants whatever there is."""
    if wanted not in TOKENS:
        raise ValueError(f"Unknown tokens {wanted!r}. Valid: {', '.join(TOKENS)}.")
    if wanted in ("all", held):
        return slice(0, None)
    if held != "all":
        raise ValueError(f"There are no tokens {wanted!r} here, only {held!r}. Extract with tokens={wanted!r} or 'all'.")
    return slice(0, 1) if wanted == "cls" else slice(1, None)


class TokenMixer(NamedTuple):
    """Tokens of many images in an order that follows from seed and step alone, by a buffer that is filled, permuted and emptied."""

    n_tokens: int
    """Of an image."""
    first: int
    """The first one's place in the model's sequence."""
    batch_size: int
    shuffle: bool
    seed: int
    epochs: int | None
    start_step: int
    positions: bool

    def batches(self, sizes: np.ndarray, per_buffer: int, load: Callable[[np.ndarray], Tensor]) -> Iterator:
        """Batches [batch, d] in float32, or pairs with positions.

        ``sizes`` are the images in each part (a shard, or a single image), ``per_buffer`` parts fit the buffer, and ``load`` takes numbers of some
        parts and returns their tokens [images, T, d].
        """
        if self.batch_size < 1 or self.start_step < 0 or (self.epochs is not None and self.epochs < 1):
            raise ValueError(
                f"Needs batch_size >= 1, start_step >= 0, epochs >= 1 or None; got {self.batch_size}, {self.start_step}, {self.epochs}."
            )
        return self._batches(sizes, per_buffer, load)

    def _batches(self, sizes, per_buffer, load):
        skip, epoch_tokens = self.start_step * self.batch_size, int(sizes.sum()) * self.n_tokens
        pending: list[tuple[Tensor, Tensor]] = []
        needed = self.batch_size
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
            if skip >= epoch_tokens:
                skip -= epoch_tokens
                continue
            parts = np.random.default_rng([self.seed, epoch]).permutation(len(sizes)) if self.shuffle else np.arange(len(sizes))
            for number, members in enumerate(np.array_split(parts, math.ceil(len(sizes) / per_buffer))):
                size = int(sizes[members].sum()) * self.n_tokens
                if skip >= size:
                    skip -= size
                    continue
                order = np.random.default_rng([self.seed, epoch, number]).permutation(size) if self.shuffle else np.arange(size)
                buffer = load(members).flatten(0, 1)
                order = torch.from_numpy(order[skip:]).to(buffer.device)
                skip = 0
                while len(order):
                    rows, order = order[:needed], order[needed:]
                    pending.append((buffer.index_select(0, rows).float(), rows % self.n_tokens + self.first))
                    needed -= len(rows)
                    if needed == 0:
                        yield self._joined(pending)
                        pending, needed = [], self.batch_size
                del buffer
        if pending:
            yield self._joined(pending)

    def _joined(self, pending: list[tuple[Tensor, Tensor]]):
        tokens, places = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending, strict=True))
        return (tokens, places) if self.positions else tokens
