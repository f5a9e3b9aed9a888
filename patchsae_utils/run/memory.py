"""Batches that don't fit the memory are halved until they do, and that is said; what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

Result = TypeVar("Result")


class HalvedBatches:
    """Runs a model on the largest part of a batch that fits, and remembers its size for the batches to come; ``place``: whose memory."""

    def __init__(self, place: object):
        self.place, self.limit = place, 0  # 0: none is known yet

    def run(self, n: int, action: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """Rows of n images and what ``action(rows)`` returned; tried again with fewer where they don't fit, so it must change nothing outside."""
        start, halved = 0, False
        while start < n:
            rows = slice(start, min(n, start + (self.limit or n)))
            result, size = _attempt(action, rows), rows.stop - rows.start
            if result is None:
                if size == 1:
                    raise MemoryError(
                        f"Not even one image fits the memory of {self.place}. Free some of it (other programs, other models), run on a device "
                        "that has more (load_clip(..., device='cpu')), or use bfloat16 (precision='bf16') or a smaller model."
                    )
                self.limit, halved = size // 2, True
                continue
            if halved:
                text = f"A batch of {n} images doesn't fit the memory of {self.place}; going on with {self.limit} at a time. "
                warnings.warn(f"{text}Set batch_size={self.limit} to begin with that.", stacklevel=2)
                halved = False
            yield rows, result[0]
            start = rows.stop


def _attempt(action: Callable[[slice], Result], rows: slice) -> tuple[Result] | None:
    """The result; None if memory ran out. The error, which holds what was half computed, is gone when this returns."""
    try:
        return (action(rows),)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the processor's, whose allocator raises a plain ``RuntimeError``."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def out_of_memory(what: str, setting: str) -> Iterator[None]:
    """Where a batch can't be halved without changing the result: a ``MemoryError`` that says what to set, in place of torch's own errors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().partition("\n")[0]
        raise MemoryError(f"The memory ran out in {what} ({text}). Set {setting}, and run the same again.") from error


def give_back() -> None:
    """Gives freed memory back to the system. By itself glibc keeps gigabytes where what lives on lies between large tensors that don't."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)
