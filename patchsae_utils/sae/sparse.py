"""Sparse kernels: of an L0 of 150 in 49,152 latents, only the encoder's forward product is computed whole.

Everything else touches active latents alone: values, decode, the gradient of the values and of both weights. Two orders of the same
entries do all the work: by token (CSR; decode sums decoder rows a token) and by latent (CSC; a weight's gradient sums tokens a latent, and
each weight row is read once). Sums of weighted rows are :func:`torch.nn.functional.embedding_bag`, the fastest of what torch has for
it on a CPU; on CUDA the same calls work, and :mod:`patchsae_utils.sae.sparse_triton` replaces them where Triton imports.

The dense bfloat16 product only *finds* the active latents. Their values are computed again from the float32 weights, so that a step in
bfloat16 differs from one in float32 by latents whose activation is about 0, and by nothing else.

Dimension letters: N tokens of any images, D d_in, S d_sae.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sparse_selection import BatchTopK, ByLatent, TopK, above, best_of_batch, chosen, positions, run_offsets

# Tokens whose activations (float32) stay in the last cache while they are gathered in any order.
_TOKENS_CPU = 2048
PRECISIONS = ("bfloat16", "float32")

__all__ = ["BatchTopK", "SparseLatents", "TopK", "decode", "encode", "take_rows", "worthwhile"]

Select = Callable[[Tensor], Tensor] | Tensor | float | None


class SparseLatents(NamedTuple):
    """Latents of N tokens, only those that are not 0; compressed by token (CSR)."""

    values: Tensor
    """[nnz] activations, differentiable; float32, or the input's dtype if that is wider."""
    indices: Tensor
    """[nnz] latent number of each, int64; ascending within a token."""
    offsets: Tensor
    """[N + 1] where each token's entries begin, int64."""
    d_sae: int
    """S."""

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.offsets) - 1

    def tokens(self) -> Tensor:
        """[nnz] token number of each entry."""
        return torch.repeat_interleave(torch.arange(self.n_tokens, device=self.offsets.device), self.counts(), output_size=len(self.values))

    def dense(self) -> Tensor:
        """[N, S] with zeros filled in; differentiable."""
        empty = self.values.new_zeros(self.n_tokens, self.d_sae)
        return empty.index_put((self.tokens(), self.indices), self.values)

    def sums(self) -> Tensor:
        """[N] sum of each token's latents; differentiable."""
        return self.values.new_zeros(self.n_tokens).index_add(0, self.tokens(), self.values)

    def counts(self) -> Tensor:
        """[N] active latents of each token."""
        return self.offsets.diff()

    def fired(self) -> Tensor:
        """bool [S]: which latents are active on any token."""
        return torch.zeros(self.d_sae, dtype=torch.bool, device=self.indices.device).index_fill_(0, self.indices, True)


def encode(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    select: Select = None,
    *,
    precision: str = "float32",
    chunk_tokens: int | None = None,
) -> SparseLatents:
    """The active latents of x @ W_enc + bias, and their gradients.

    Parameters
    ----------
    x : Tensor [N, D]
        Centred activations. Its gradient is computed only if it requires one.
    W_enc : Tensor [D, S]
        Fastest with columns contiguous in memory, as ``torch.empty(S, D).T``: what is read and written here are columns.
    bias : Tensor [S]
    select : None, float, Tensor [S] or function
        None: what is positive (ReLU). A number or one per latent: what lies above it (JumpReLU, BatchTopK's threshold). A
        :class:`TopK` or :class:`BatchTopK`. Any other function gets pre-activations [n, S] of n whole tokens at a time, and returns a bool
        mask of that shape; what it selects counts where it is positive.
    precision : {"float32", "bfloat16"}
        Of the dense product that finds the active latents (bfloat16 accumulates in float32). Values and gradients are float32 either way,
        or ``x``'s dtype if that is wider.
    chunk_tokens : int, optional
        Tokens whose pre-activations are held at once when ``select`` needs whole tokens; by default as many as a cache likes.

    Returns
    -------
    SparseLatents

    Raises
    ------
    ValueError
        If shapes, dtypes or ``precision`` don't fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[0] or bias.shape != W_enc.shape[1:]:
        raise ValueError(
            f"encode needs x [N, D], W_enc [D, S] and bias [S]; got {tuple(x.shape)}, {tuple(W_enc.shape)} and {tuple(bias.shape)}. "
            "Flatten images to tokens first: x.flatten(0, -2)."
        )
    if not x.dtype.is_floating_point or W_enc.dtype != bias.dtype or W_enc.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"encode needs master weights in float32 (or float64), got W_enc {W_enc.dtype}, bias {bias.dtype}, x {x.dtype}.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}.")
    if isinstance(select, (int, float)):
        select = bias.new_full((), float(select)).expand_as(bias)
    if isinstance(select, Tensor) and select.shape != bias.shape:
        select = select.detach().expand_as(bias)
    deferred = _deferred(W_enc)
    parts = 1 if isinstance(select, BatchTopK) else _n_parts(len(x), x.device, deferred)
    found = [_Encode.apply(part, W_enc, bias, select, precision, chunk_tokens, deferred) for part in x.to(W_enc.dtype).chunk(parts)]
    values, indices, counts = (torch.cat(parts) for parts in zip(*((v, i, o.diff()) for v, i, o in found), strict=True))
    return SparseLatents(values, indices, F.pad(counts.cumsum(0), (1, 0)), W_enc.shape[1])


def decode(latents: SparseLatents, W_dec: Tensor, b_dec: Tensor, groups: Sequence[int] | None = None) -> Tensor:
    """latents @ W_dec + b_dec, from active latents alone.

    Parameters
    ----------
    latents : SparseLatents
    W_dec : Tensor [S, D]
    b_dec : Tensor [D]
    groups : sequence of int, optional
        Sizes of nested prefixes, ascending (Matryoshka): one reconstruction for each, from the latents before that number.

    Returns
    -------
    Tensor [N, D], or [G, N, D] with ``groups``
        Differentiable in values, ``W_dec`` and ``b_dec``.

    Raises
    ------
    ValueError
        If shapes don't fit or ``groups`` don't ascend within S.
    """
    if W_dec.ndim != 2 or W_dec.shape[0] != latents.d_sae or b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"decode needs W_dec [{latents.d_sae}, D] and b_dec [D], got {tuple(W_dec.shape)} and {tuple(b_dec.shape)}.")
    if groups is None:
        return _decode(latents, W_dec) + b_dec
    groups = [int(size) for size in groups]
    if not groups or any(a >= b for a, b in zip([0, *groups], groups, strict=False)) or groups[-1] > latents.d_sae:
        raise ValueError(f"groups must ascend from at least 1 to at most d_sae={latents.d_sae}, got {groups}.")
    tokens, parts, start = latents.tokens(), [], 0
    for end in groups:
        inside = (latents.indices >= start) & (latents.indices < end)
        offsets = run_offsets(tokens[inside], latents.n_tokens)
        parts.append(_decode(SparseLatents(latents.values[inside], latents.indices[inside], offsets, latents.d_sae), W_dec))
        start = end
    return torch.stack(parts).cumsum(0) + b_dec


def _decode(latents: SparseLatents, W_dec: Tensor) -> Tensor:
    """latents @ W_dec, part by part of the tokens."""
    deferred, n = _deferred(W_dec), latents.n_tokens
    parts = _n_parts(n, latents.values.device, deferred)
    if parts == 1:
        return _Decode.apply(latents.values, latents.indices, latents.offsets, W_dec, deferred)
    size = -(-n // parts)
    offsets = [latents.offsets[start : start + size + 1] for start in range(0, n, size)]
    at = torch.stack([ends[-1] - ends[0] for ends in offsets]).tolist()
    pieces = zip(latents.values.split(at), latents.indices.split(at), offsets, strict=True)
    return torch.cat([_Decode.apply(values, indices, ends - ends[0], W_dec, deferred) for values, indices, ends in pieces])


def _n_parts(n_tokens: int, device: torch.device, deferred) -> int:
    """Parts in which a CPU goes through the tokens, so that the rows it gathers stay in its cache; only where no part has to make a dense gradient."""
    return max(1, -(-n_tokens // _TOKENS_CPU)) if device.type == "cpu" and deferred is not None else 1


def worthwhile(latents_density: float, device: torch.device | str) -> bool:
    """Whether the sparse step is faster than the dense one at this share of active latents (L0 / d_sae).

    On a CPU the two took equally long at 0.06 (d_in 128, d_sae 2,048) and at 0.12 (768, 6,144), against float32; a dense step in bfloat16
    is up to twice as fast, hence the lower bound here. ``python -m benchmarks.sae_step`` measures it anew (rows "density"). For GPUs it is
    a guess on the cautious side.
    """
    return latents_density < _CROSSOVER.get(torch.device(device).type, 0.0)


_CROSSOVER = {"cpu": 0.05, "cuda": 0.02}


def take_rows(W: Tensor, index: Tensor) -> Tensor:
    """W[index]: some latents' rows [n, D] of W [S, D], or of ``W_enc.T``.

    As ``index_select``; but within :class:`~patchsae_utils.sparse_adam.DeferredGradients` the gradient stays these n rows. ``index`` ascends.
    """
    return _Rows.apply(W, index, _deferred(W))


# -- sums over entries ---------------------------------------------------------------------------------------


def _triton(tensor: Tensor):
    """The module of Triton kernels if they run on this tensor's device, else None. Imported late: Triton takes a while, and memory."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from . import sparse_triton

    return sparse_triton if sparse_triton.usable(tensor) else None


def _bags(rows: Tensor, numbers: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """sum of weights[e] rows[numbers[e]] over each bag's entries e: [bags, D]."""
    if len(numbers) == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    if kernels := _triton(rows):
        return kernels.bags(rows, numbers, offsets, weights)
    return F.embedding_bag(numbers, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _pair_products(rows: Tensor, numbers: Tensor, bags: Tensor, bag_rows: Tensor, offsets: Tensor) -> Tensor:
    """<rows[numbers[e]], bag_rows[bags[e]]> of every entry e: [nnz]; a bag's entries lie together.

    It is the gradient of :func:`_bags` in its weights, and torch has a kernel for that.
    """
    if len(numbers) == 0:
        return rows.new_zeros(0)
    if kernels := _triton(rows):
        return kernels.pair_products(rows, numbers, bag_rows, offsets)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(bag_rows, rows, numbers, offsets, bags, 0, -1)


def _products_by_latent(x: Tensor, W: Tensor, entries: ByLatent) -> Tensor:
    """<x[token], W[latent]> of every entry, W [S, D] of any strides."""
    out = x.new_empty(len(entries.tokens))
    for rows, span in entries.blocks():
        offsets = entries.offsets[rows.start : rows.stop + 1] - span.start
        bags = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=x.device), offsets.diff(), output_size=span.stop - span.start)
        out[span] = _pair_products(x, entries.tokens[span], bags, W[rows].contiguous(), offsets)
    return out


def _weight_gradient(x: Tensor, entries: ByLatent, weights: Tensor, like: Tensor) -> Tensor:
    """sum of weights[e] x[token] over each latent's entries: [S, D], in the memory layout of ``like``."""
    gradient, out = WeightedRows(x, entries, weights), torch.empty_like(like)
    for rows, span in entries.blocks():
        out[rows] = gradient.block(rows, span)
    return out


class WeightedRows(NamedTuple):
    """A weight's gradient [S, D], not yet summed: weights[e] x[token] of every entry e, by latent."""

    x: Tensor  # [N, D]
    entries: ByLatent
    weights: Tensor  # [nnz]

    def block(self, rows: slice, span: slice) -> Tensor:
        """The rows of some latents, whose entries are ``span``."""
        offsets = self.entries.offsets[rows.start : rows.stop + 1] - span.start
        return _bags(self.x, self.entries.tokens[span], offsets, self.weights[span])


class ChosenRows(NamedTuple):
    """A weight's gradient [S, D] that is 0 but for some rows."""

    index: Tensor  # type: ignore[assignment]  # [n], ascending
    rows: Tensor  # [n, D]


_COLLECTORS: list = []


def _deferred(W: Tensor):
    """Where the gradient of ``W`` goes if somebody collects it: a function, else None."""
    return _COLLECTORS[-1].recorder(W) if _COLLECTORS and torch.is_grad_enabled() else None


# -- autograd -----------------------------------------------------------------------------------------------------------------


class _Encode(torch.autograd.Function):
    """(x [N, D], W_enc [D, S], bias [S]) -> values, indices, offsets by token."""

    @staticmethod
    def forward(ctx, x, W_enc, bias, select, precision, chunk_tokens, deferred):
        ctx.deferred = deferred
        with torch.autocast(x.device.type, enabled=False):
            W = W_enc.T
            dtype = torch.bfloat16 if precision == "bfloat16" else W.dtype
            if select is None or isinstance(select, Tensor):
                entries = above(x, W, bias, select, dtype)
            elif isinstance(select, BatchTopK):
                entries = best_of_batch(x, W, bias, select.k, dtype, chunk_tokens)
            else:
                entries = chosen(x, W, bias, select, dtype, chunk_tokens)
            latents = entries.latents()
            values = _products_by_latent(x, W, entries).add_(bias[latents])
            kept = positions(values > (select[latents] if isinstance(select, Tensor) else 0))
            if len(kept) < len(values):
                latents, values = latents[kept], values[kept]
                entries = ByLatent(entries.tokens[kept], run_offsets(latents, len(W)))
            tokens, order = torch.sort(entries.tokens, stable=True)
            offsets, indices = run_offsets(tokens, len(x)), latents[order]
        ctx.save_for_backward(x, W_enc, entries.tokens, entries.offsets, order, indices, offsets)
        ctx.mark_non_differentiable(indices, offsets)
        return values[order], indices, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        x, W_enc, tokens, by_latent, order, indices, offsets = ctx.saved_tensors
        for_x = for_W = for_bias = None
        with torch.autocast(x.device.type, enabled=False):
            entries = ByLatent(tokens, by_latent)
            if ctx.needs_input_grad[0]:
                for_x = _bags(W_enc.T.contiguous(), indices, offsets, gradient)
            if ctx.needs_input_grad[1]:
                weights = torch.empty_like(gradient).index_copy_(0, order, gradient)
                if ctx.deferred is None:
                    for_W = _weight_gradient(x, entries, weights, W_enc.T).T
                else:
                    ctx.deferred(WeightedRows(x, entries, weights))
            if ctx.needs_input_grad[2]:
                for_bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, indices, gradient)
        return for_x, for_W, for_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    """(values, indices, offsets by token, W_dec [S, D]) -> [N, D]."""

    @staticmethod
    def forward(ctx, values, indices, offsets, W_dec, deferred):
        ctx.deferred = deferred
        with torch.autocast(values.device.type, enabled=False):
            ctx.save_for_backward(values, indices, offsets, W_dec)
            return _bags(W_dec, indices, offsets, values.to(W_dec.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        values, indices, offsets, W_dec = ctx.saved_tensors
        for_values = for_W = None
        with torch.autocast(values.device.type, enabled=False):
            gradient = gradient.contiguous().to(W_dec.dtype)
            latents, order = torch.sort(indices, stable=True)
            n = len(offsets) - 1
            tokens = torch.repeat_interleave(torch.arange(n, device=values.device), offsets.diff(), output_size=len(values))
            entries = ByLatent(tokens[order], run_offsets(latents, len(W_dec)))
            if ctx.needs_input_grad[0]:
                products = _products_by_latent(gradient, W_dec, entries).to(values.dtype)
                for_values = torch.empty_like(values).index_copy_(0, order, products)
            if ctx.needs_input_grad[3]:
                weights = values[order].to(W_dec.dtype)
                if ctx.deferred is None:
                    for_W = _weight_gradient(gradient, entries, weights, W_dec)
                else:
                    ctx.deferred(WeightedRows(gradient, entries, weights))
        return for_values, None, None, for_W, None


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
        ctx.deferred(ChosenRows(index, gradient))
        return None, None, None
