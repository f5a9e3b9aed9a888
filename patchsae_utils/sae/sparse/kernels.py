"""Sparse kernels: only the encoder's forward product, which finds the active latents, is whole, a piece at a time, in bfloat16 where asked.

All else, their float32 values too, touches active latents alone, in two orders: by token (CSR) and by latent (CSC; weight gradients).
Letters: N tokens of any images, D d_in, S d_sae."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_CPU = 2048  # latents whose weight rows are worked on at once: fewer calls weigh more than a core's own cache
# Elements of one piece of pre-activations: bounds memory, and on a CPU keeps a piece in a cache until it was searched.
_PIECE_CPU, _PIECE_GPU = 1 << 21, 1 << 28
_TOKENS_CPU = 8 << 20  # the same of pieces of whole tokens
_CROSSOVER = {"cpu": 0.05, "cuda": 0.02}  # on a CPU measured by ``benchmarks.sae_step`` (rows "density"); for GPUs a cautious guess


class TopK(NamedTuple):
    """Selection of each token's ``k`` largest pre-activations, as far as they are positive (Gao et al., 2024)."""

    k: int


class BatchTopK(NamedTuple):
    """Selection of the ``k`` N largest pre-activations of a batch of N tokens, as far as they are positive (Bussmann et al., 2024)."""

    k: int


Select = TopK | BatchTopK | Tensor | None  # active are the largest; what lies above a level, of all or each latent; or what is positive


class ByLatent(NamedTuple):
    """The entries ordered by latent, then by token (CSC)."""

    tokens: Tensor  # [nnz]
    offsets: Tensor  # [S + 1]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(rows, entries) slices of consecutive latents; one block where there is no cache to mind, nor a wait for the device."""
        for rows, entries in zip(*map(pairwise, block_bounds(self.offsets, BLOCK_CPU, len(self.tokens))), strict=True):
            yield slice(*rows), slice(*entries)


class SparseLatents(NamedTuple):
    """Latents of N tokens, only those that are not 0, by token (CSR); and in which order they lie by latent, for gradients."""

    values: Tensor  # [nnz] activations, differentiable; float32, or the input's dtype if that is wider
    indices: Tensor  # [nnz] latent number of each, int64; ascending within a token
    offsets: Tensor  # [N + 1] where each token's entries begin, int64
    entries: ByLatent
    order: Tensor  # [nnz] place of each entry in ``entries``

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    def tokens(self) -> Tensor:
        """[nnz] token number of each entry."""
        return _numbers(self.offsets, len(self.values))

    def counts(self) -> Tensor:
        """[N] active latents of each token."""
        return self.offsets.diff()

    def fired(self) -> Tensor:
        """bool [S]: which latents are active on any token."""
        return self.entries.offsets.diff() > 0

    def kept(self, which: Tensor) -> SparseLatents:
        """The entries for which ``which``, bool [nnz], is True."""
        by_latent = torch.empty_like(which).index_copy_(0, self.order, which)
        entries = ByLatent(self.entries.tokens[by_latent], _before(by_latent)[self.entries.offsets])
        order = _before(by_latent)[self.order[which]]
        return SparseLatents(self.values[which], self.indices[which], _before(which)[self.offsets], entries, order)


def encode(x: Tensor, W_enc: Tensor, bias: Tensor, select: Select = None, *, precision: str = "float32") -> SparseLatents:
    """The active latents of x @ W_enc + bias (x [N, D], W_enc [D, S], best with contiguous columns), found in ``precision``."""
    if isinstance(select, Tensor):
        select = select.detach().expand_as(bias)
    values, indices, offsets, tokens, by_latent, order = _Encode.apply(x.to(W_enc.dtype), W_enc, bias, select, precision, _deferred(W_enc))
    return SparseLatents(values, indices, offsets, ByLatent(tokens, by_latent), order)


def decode(latents: SparseLatents, W_dec: Tensor, b_dec: Tensor, groups: Sequence[int] | None = None) -> Tensor:
    """latents @ W_dec + b_dec [N, D]; with ``groups``, rising ends of nested prefixes, [G, N, D]: from the latents before each end."""
    if groups is None:
        values, indices, offsets, entries, order = latents
        return _Decode.apply(values, indices, offsets, *entries, order, W_dec, _deferred(W_dec)) + b_dec
    between = zip((0, *groups), groups, strict=False)
    parts = [latents.kept((latents.indices >= start) & (latents.indices < end)) for start, end in between]
    return torch.stack([decode(part, W_dec, torch.zeros_like(b_dec)) for part in parts]).cumsum(0) + b_dec


def worthwhile(density: float, device: torch.device | str) -> bool:
    """Whether the sparse step is faster than the dense one at this share of active latents (L0 / d_sae)."""
    return density < _CROSSOVER.get(torch.device(device).type, 0.0)


def take_rows(W: Tensor, index: Tensor) -> Tensor:
    """W[index]: some latents' rows [n, D]; within :class:`~patchsae_utils.sae.sparse.adam.DeferredGradients` the gradient stays these rows."""
    return _Rows.apply(W, index, _deferred(W))


def _numbers(offsets: Tensor, n: int) -> Tensor:
    """[n] which run each of n entries belongs to, from where the runs begin."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff(), output_size=n)


def _before(which: Tensor) -> Tensor:
    """[n + 1] how many are True before each place."""
    return F.pad(which.cumsum(0), (1, 0))


def run_offsets(sorted_numbers: Tensor, n: int) -> Tensor:
    """[n + 1] where each number's run begins among sorted numbers below n."""
    return torch.searchsorted(sorted_numbers, torch.arange(n + 1, device=sorted_numbers.device))


def block_bounds(offsets: Tensor, size: int, nnz: int) -> tuple[list[int], list[int]]:
    """Where blocks of ``size`` latents begin and end, and their entries; a GPU has one block, and isn't waited for."""
    bounds = [*range(0, n := len(offsets) - 1, size), n]
    return (bounds, offsets[bounds].tolist()) if offsets.device.type == "cpu" else ([0, n], [0, nnz])


def positions(array: Tensor) -> Tensor:
    """Flat positions of what is not 0, ascending. Eight bytes at a time: nearly all words of a sparse array are 0."""
    flat, width = array.view(-1), 8 // array.element_size()
    if flat.device.type != "cpu" or flat.numel() % width:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    row, column = flat.view(-1, width)[words].nonzero().unbind(1)
    return words[row] * width + column


def above(x: Tensor, W: Tensor, bias: Tensor, level: Tensor | None, dtype: torch.dtype) -> ByLatent:
    """Entries where x W + bias > level (0 if None): latent by latent, so that no weight copy or row of S is ever whole."""
    n, d_sae = len(x), len(W)
    threshold = -bias if level is None else level - bias
    if dtype != W.dtype:
        threshold = threshold - 2.0**-8 * threshold.abs()  # room for the product's rounding; exact values decide afterwards
    threshold, x = threshold.to(dtype), x.to(dtype)
    size = max(8, (_PIECE_CPU if x.device.type == "cpu" else _PIECE_GPU) // max(n, 1))
    found = []
    for start in range(0, d_sae, size):
        product = F.linear(W[start : start + size].to(dtype), x)  # [latents, N]: positions come by latent
        found.append(positions(product > threshold[start : start + size, None]).add_(start * n))
    at = torch.cat(found)
    latent = at // n
    return ByLatent(at - latent * n, run_offsets(latent, d_sae))


def _pieces(x: Tensor, W: Tensor, bias: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre-activations [n, S]) of some whole tokens at a time."""
    size = max(1, (_TOKENS_CPU if x.device.type == "cpu" else _PIECE_GPU) // len(W))
    W, bias, x = W.to(dtype), bias.to(dtype), x.to(dtype)
    for start in range(0, len(x), size):
        yield start, F.linear(x[start : start + size], W, bias)


def _ordered(flat: Tensor, d_sae: int) -> ByLatent:
    """Flat positions in [N, S] to entries by latent."""
    flat = flat.sort().values
    token = flat // d_sae
    latent = flat - token * d_sae
    latent, order = torch.sort(latent, stable=True)
    return ByLatent(token[order], run_offsets(latent, d_sae))


def best_of_tokens(x: Tensor, W: Tensor, bias: Tensor, k: int, dtype: torch.dtype) -> ByLatent:
    """Each token's k largest entries, as far as they are positive."""
    d_sae, found = len(W), [torch.empty(0, dtype=torch.long, device=x.device)]
    for start, pre in _pieces(x, W, bias, dtype):
        values, latents = pre.topk(min(k, d_sae), dim=1, sorted=False)
        rows = torch.arange(start, start + len(pre), device=pre.device)[:, None] * d_sae
        found.append((latents + rows)[values > 0])
    return _ordered(torch.cat(found), d_sae)


def best_of_batch(x: Tensor, W: Tensor, bias: Tensor, k: int, dtype: torch.dtype) -> ByLatent:
    """The k N largest positive entries. What lies below the k N-th largest so far can't be among them, so few are ever held."""
    d_sae, budget, bound = len(W), k * len(x), 0.0
    found, values = torch.empty(0, dtype=torch.long, device=x.device), torch.empty(0, dtype=dtype, device=x.device)
    for start, pre in _pieces(x, W, bias, dtype):
        at = positions(pre > bound)
        found, values = torch.cat([found, at + start * d_sae]), torch.cat([values, pre.view(-1)[at]])
        if len(values) > budget:
            values, best = values.topk(budget, sorted=False)
            found, bound = found[best], values.min()
    return _ordered(found, d_sae)


def _bags(rows: Tensor, numbers: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """sum of weights[e] rows[numbers[e]] over each bag's entries e: [bags, D]."""
    if len(numbers) == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    return F.embedding_bag(numbers, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _pair_products(rows: Tensor, numbers: Tensor, bags: Tensor, bag_rows: Tensor, offsets: Tensor) -> Tensor:
    """<rows[numbers[e]], bag_rows[bags[e]]> of every entry e, bag by bag: [nnz]. It is the gradient of :func:`_bags` in its weights."""
    if len(numbers) == 0:
        return rows.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(bag_rows, rows, numbers, offsets, bags, 0, -1)


def _products_by_latent(x: Tensor, W: Tensor, entries: ByLatent) -> Tensor:
    """<x[token], W[latent]> of every entry, W [S, D] of any strides."""
    out = x.new_empty(len(entries.tokens))
    for rows, span in entries.blocks():
        offsets = entries.offsets[rows.start : rows.stop + 1] - span.start
        bags = _numbers(offsets, span.stop - span.start)
        out[span] = _pair_products(x, entries.tokens[span], bags, W[rows].contiguous(), offsets)
    return out


class WeightedRows(NamedTuple):
    """A weight's gradient [S, D], not yet summed: weights[e] x[token] of every entry e, by latent."""

    x: Tensor  # [N, D]
    entries: ByLatent
    weights: Tensor  # [nnz]

    def bounds(self, n: int, size: int) -> tuple[list[int], list[int]]:
        return block_bounds(self.entries.offsets, size, len(self.weights))

    def add_to(self, block: Tensor | None, rows: slice, span: slice) -> Tensor:
        """The rows of some latents, whose entries are ``span``, added to a block in place, if there is one."""
        offsets = self.entries.offsets[rows.start : rows.stop + 1] - span.start
        summed = _bags(self.x, self.entries.tokens[span], offsets, self.weights[span])
        return summed if block is None else block.add_(summed)


class ChosenRows(NamedTuple):
    """A weight's gradient [S, D] that is 0 but for some rows."""

    index: Tensor  # type: ignore[assignment]  # [n], ascending
    rows: Tensor  # [n, D]

    def bounds(self, n: int, size: int) -> tuple[list[int], list[int]]:
        return block_bounds(run_offsets(self.index, n), size, len(self.index))

    def add_to(self, block: Tensor | None, rows: slice, span: slice) -> Tensor:
        """As of :class:`WeightedRows`."""
        block = self.rows.new_zeros(rows.stop - rows.start, self.rows.shape[1]) if block is None else block
        return block.index_add_(0, self.index[span] - rows.start, self.rows[span].to(block.dtype))


def _weight_gradient(gradient: WeightedRows, like: Tensor, deferred: list | None) -> Tensor | None:
    """The sum [S, D] in the memory layout of ``like``; or None, where it is collected instead."""
    if deferred is not None:
        deferred.append(gradient)
        return None
    out = torch.empty_like(like)
    for rows, span in gradient.entries.blocks():
        out[rows] = gradient.add_to(None, rows, span)
    return out


COLLECTED: dict[int, list[WeightedRows | ChosenRows]] = {}  # address of a weight -> where its gradients are collected


def _deferred(W: Tensor) -> list[WeightedRows | ChosenRows] | None:
    return COLLECTED.get(W.data_ptr()) if torch.is_grad_enabled() and W.requires_grad else None


class _Encode(torch.autograd.Function):
    """(x [N, D], W_enc [D, S], bias [S]) -> what :class:`SparseLatents` hold; the one sort of a step."""

    @staticmethod
    def forward(ctx, x, W_enc, bias, select, precision, deferred):
        ctx.deferred = deferred
        with torch.autocast(x.device.type, enabled=False):
            W = W_enc.T
            dtype = torch.bfloat16 if precision == "bfloat16" else W.dtype
            if isinstance(select, TopK):
                entries = best_of_tokens(x, W, bias, select.k, dtype)
            elif isinstance(select, BatchTopK):
                entries = best_of_batch(x, W, bias, select.k, dtype)
            else:
                entries = above(x, W, bias, select, dtype)
            latents = _numbers(entries.offsets, len(entries.tokens))
            values = _products_by_latent(x, W, entries).add_(bias[latents])
            kept = positions(values > (select[latents] if isinstance(select, Tensor) else 0))
            if len(kept) < len(values):
                latents, values = latents[kept], values[kept]
                entries = ByLatent(entries.tokens[kept], run_offsets(latents, len(W)))
            tokens, order = torch.sort(entries.tokens, stable=True)
            offsets, indices = run_offsets(tokens, len(x)), latents[order]
        whole = (indices, offsets, *entries, order)
        ctx.save_for_backward(x, W_enc, *whole)
        ctx.mark_non_differentiable(*whole)
        return values[order], *whole

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        x, W_enc, indices, offsets, tokens, by_latent, order = ctx.saved_tensors
        for_x = for_W = for_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                for_x = _bags(W_enc.T.contiguous(), indices, offsets, gradient)
            if ctx.needs_input_grad[1]:
                weights = torch.empty_like(gradient).index_copy_(0, order, gradient)
                for_W = _weight_gradient(WeightedRows(x, ByLatent(tokens, by_latent), weights), W_enc.T, ctx.deferred)
            if ctx.needs_input_grad[2]:
                for_bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, indices, gradient)
        return for_x, None if for_W is None else for_W.T, for_bias, None, None, None


class _Decode(torch.autograd.Function):
    """(what :class:`SparseLatents` hold, W_dec [S, D]) -> [N, D]."""

    @staticmethod
    def forward(ctx, values, indices, offsets, tokens, by_latent, order, W_dec, deferred):
        ctx.deferred = deferred
        ctx.save_for_backward(values, tokens, by_latent, order, W_dec)
        with torch.autocast(values.device.type, enabled=False):
            return _bags(W_dec, indices, offsets, values.to(W_dec.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        values, tokens, by_latent, order, W_dec = ctx.saved_tensors
        for_values = for_W = None
        with torch.autocast(values.device.type, enabled=False):
            gradient, entries = gradient.contiguous().to(W_dec.dtype), ByLatent(tokens, by_latent)
            if ctx.needs_input_grad[0]:
                for_values = _products_by_latent(gradient, W_dec, entries).to(values.dtype)[order]
            if ctx.needs_input_grad[6]:
                weights = torch.empty_like(values).index_copy_(0, order, values).to(W_dec.dtype)
                for_W = _weight_gradient(WeightedRows(gradient, entries, weights), W_dec, ctx.deferred)
        return for_values, None, None, None, None, None, for_W, None


class _Rows(torch.autograd.Function):
    """(W [S, D], index [n]) -> [n, D]."""

    @staticmethod
    def forward(ctx, W, index, deferred):
        ctx.save_for_backward(index)
        ctx.deferred, ctx.shape = deferred, W.shape
        return W.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        if ctx.deferred is None:
            return gradient.new_zeros(ctx.shape).index_add_(0, index, gradient), None, None
        ctx.deferred.append(ChosenRows(index, gradient))
        return None, None, None
