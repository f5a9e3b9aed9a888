"""Triton kernels of :mod:`patchsae_utils.sae.sparse.kernels` for CUDA: sums of weighted rows bag by bag, and products of two rows.

Four of the five sparse products are the first. Both read each row in coalesced pieces of D, accumulate in float32 (float64 for float64),
need no atomics, and so give the same result in every run. ``TRITON_INTERPRET=1`` in the environment runs them on a CPU, for tests.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs, macOS or Windows comes without it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def usable(tensor: Tensor) -> bool:
    """Whether Triton is installed, and this tensor on a GPU (or Triton interprets)."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


if triton is not None:

    @triton.jit
    def _bags_kernel(rows, numbers, offsets, weights, out, d, stride, D_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr):
        bag = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
        inside = columns < d
        total = tl.zeros((D_BLOCK,), dtype=ACCUMULATE)
        for entry in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
            row = tl.load(rows + tl.load(numbers + entry) * stride + columns, mask=inside, other=0.0)
            total += tl.load(weights + entry).to(ACCUMULATE) * row.to(ACCUMULATE)
        tl.store(out + bag * d + columns, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _pairs_kernel(rows, numbers, offsets, bag_rows, out, d, stride, bag_stride, D_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr):
        bag = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, D_BLOCK)  # a whole row: it is read once for all entries of the bag
        inside = columns < d
        own = tl.load(bag_rows + bag * bag_stride + columns, mask=inside, other=0.0).to(ACCUMULATE)
        for entry in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
            row = tl.load(rows + tl.load(numbers + entry) * stride + columns, mask=inside, other=0.0)
            tl.store(out + entry, tl.sum(own * row.to(ACCUMULATE)).to(out.dtype.element_ty))


def bags(rows: Tensor, numbers: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """sum of weights[e] rows[numbers[e]] over each bag's entries e: [bags, D]; ``rows`` [n, D], int64 ``offsets`` [bags + 1]."""
    rows, n_bags, d = _row_major(rows), len(offsets) - 1, rows.shape[1]
    out = rows.new_empty(n_bags, d)
    if n_bags and d:
        block = min(triton.next_power_of_2(d), 1024)
        grid = (n_bags, triton.cdiv(d, block))
        numbers, offsets, weights = numbers.contiguous(), offsets.contiguous(), weights.contiguous()
        options = {"D_BLOCK": block, "ACCUMULATE": _accumulate(rows), "num_warps": 4}
        _bags_kernel[grid](rows, numbers, offsets, weights, out, d, rows.stride(0), **options)  # type: ignore
    return out


def pair_products(rows: Tensor, numbers: Tensor, bag_rows: Tensor, offsets: Tensor) -> Tensor:
    """<rows[numbers[e]], bag_rows[b]> of every entry e of every bag b: [nnz]."""
    rows, bag_rows, d = _row_major(rows), _row_major(bag_rows), rows.shape[1]
    out = rows.new_empty(len(numbers))
    if len(numbers):
        numbers, offsets = numbers.contiguous(), offsets.contiguous()
        options = {"D_BLOCK": triton.next_power_of_2(d), "ACCUMULATE": _accumulate(rows), "num_warps": 4}
        _pairs_kernel[(len(offsets) - 1,)](rows, numbers, offsets, bag_rows, out, d, rows.stride(0), bag_rows.stride(0), **options)  # type: ignore
    return out


def _row_major(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _accumulate(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
