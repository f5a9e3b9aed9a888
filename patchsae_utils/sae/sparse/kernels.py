"""Sparse kernels: of an L0 of 150 in 49,152 latents, only the encoder's forward product is computed whole, a piece at a time.

It *finds* the active latents, in bfloat16 where asked; their values are computed again from the float32 weights. All else touches active
latents alone, in two orders: by token (CSR; decode) and by latent (CSC; weight gradients). Letters: N tokens of any images, D d_in, S
d_sae.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_TOKENS_CPU = 2048  # whose float32 activations stay in the last cache while they are gathered in any order
BLOCK_CPU = 1024  # latents whose weight rows stay in a core's cache together with what is computed from them
# Elements of one piece of pre-activations: bounds memory, and on a CPU keeps a piece in the last cache until it was searched.
_PIECE_CPU, _PIECE_GPU = 8 << 20, 1 << 28
_CROSSOVER = {"cpu": 0.05, "cuda": 0.02}  # on a CPU measured by ``benchmarks.sae_step`` (rows "density"); for GPUs a cautious guess


class TopK(NamedTuple):
    """Selection of each token's ``k`` largest pre-activations, as far as they are positive (Gao et al., 2024)."""

    k: int


class BatchTopK(NamedTuple):
    """Selection of the ``k`` N largest pre-activations of a batch of N tokens, as far as they are positive (Bussmann et al., 2024)."""

    k: int


Select = TopK | BatchTopK | Tensor | None
"""What is active: the largest; what lies above a level, one for all or one for each latent; or what is positive."""


class SparseLatents(NamedTuple):
    """Latents of N tokens, only those that are not 0; compressed by token (CSR)."""

    values: Tensor  # [nnz] activations, differentiable; float32, or the input's dtype if that is wider
    indices: Tensor  # [nnz] latent number of each, int64; ascending within a token
    offsets: Tensor  # [N + 1] where each token's entries begin, int64
    d_sae: int

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.offsets) - 1

    def tokens(self) -> Tensor:
        """[nnz] token number of each entry."""
        return torch.repeat_interleave(torch.arange(self.n_tokens, device=self.offsets.device), self.counts(), output_size=len(self.values))

    def dense(self) -> Tensor:
        """[N, S] with zeros filled in; differentiable."""
        return self.values.new_zeros(self.n_tokens, self.d_sae).index_put((self.tokens(), self.indices), self.values)

    def counts(self) -> Tensor:
        """[N] active latents of each token."""
        return self.offsets.diff()

    def fired(self) -> Tensor:
        """bool [S]: which latents are active on any token."""
        return torch.zeros(self.d_sae, dtype=torch.bool, device=self.indices.device).index_fill_(0, self.indices, True)

    def kept(self, which: Tensor) -> SparseLatents:
        """The entries for which ``which``, bool [nnz], is True."""
        before = F.pad(which.cumsum(0), (1, 0))
        offsets = before[self.offsets.long()].to(self.offsets.dtype)
        return self._replace(values=self.values[which], indices=self.indices[which], offsets=offsets)


def encode(x: Tensor, W_enc: Tensor, bias: Tensor, select: Select = None, *, precision: str = "float32") -> SparseLatents:
    """The active latents of x @ W_enc + bias (centred x [N, D], W_enc [D, S], bias [S]), with their gradients.

    ``precision`` is of the dense product that finds them. Fastest where columns of ``W_enc`` are contiguous, as in ``torch.empty(S, D).T``.
    """
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[0] or bias.shape != W_enc.shape[1:]:
        raise ValueError(
            f"encode needs x [N, D], W_enc [D, S] and bias [S]; got {tuple(x.shape)}, {tuple(W_enc.shape)} and {tuple(bias.shape)}. "
            "Flatten images to tokens first: x.flatten(0, -2)."
        )
    if not x.dtype.is_floating_point or W_enc.dtype != bias.dtype or W_enc.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"encode needs master weights in float32 (or float64), got W_enc {W_enc.dtype}, bias {bias.dtype}, x {x.dtype}.")
    if isinstance(select, Tensor) and select.shape != bias.shape:
        select = select.detach().expand_as(bias)
    deferred = _deferred(W_enc)
    parts = 1 if isinstance(select, BatchTopK) else _n_parts(len(x), x.device, deferred)
    found = [_Encode.apply(part, W_enc, bias, select, precision, deferred) for part in x.to(W_enc.dtype).chunk(parts)]
    values, indices, counts = (torch.cat(parts) for parts in zip(*((v, i, o.diff()) for v, i, o in found), strict=True))
    return SparseLatents(values, indices, F.pad(counts.cumsum(0), (1, 0)), W_enc.shape[1])


def decode(latents: SparseLatents, W_dec: Tensor, b_dec: Tensor, groups: Sequence[int] | None = None) -> Tensor:
    """latents @ W_dec + b_dec [N, D], from active latents alone.

    With ``groups``, rising ends of nested prefixes (Matryoshka): [G, N, D], one reconstruction from the latents before each end.
    """
    if W_dec.ndim != 2 or W_dec.shape[0] != latents.d_sae or b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"decode needs W_dec [{latents.d_sae}, D] and b_dec [D], got {tuple(W_dec.shape)} and {tuple(b_dec.shape)}.")
    if groups is None:
        return _decode(latents, W_dec) + b_dec
    parts, start = [], 0
    for end in groups:
        parts.append(_decode(latents.kept((latents.indices >= start) & (latents.indices < end)), W_dec))
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
    """Parts in which a CPU goes through the tokens, so that gathered rows stay in cache; one where a part would make a dense gradient."""
    return max(1, -(-n_tokens // _TOKENS_CPU)) if device.type == "cpu" and deferred is not None else 1


def worthwhile(density: float, device: torch.device | str) -> bool:
    """Whether the sparse step is faster than the dense one at this share of active latents (L0 / d_sae)."""
    return density < _CROSSOVER.get(torch.device(device).type, 0.0)


def take_rows(W: Tensor, index: Tensor) -> Tensor:
    """W[index]: some latents' rows [n, D]; within :class:`~patchsae_utils.sae.sparse.adam.DeferredGradients` the gradient stays these rows."""
    return _Rows.apply(W, index, _deferred(W))


# -- which latents are active: a dense product a piece at a time, searched while it is in cache ----------------------------------------


class ByLatent(NamedTuple):
    """The entries ordered by latent, then by token (CSC)."""

    tokens: Tensor  # [nnz]
    offsets: Tensor  # [S + 1]

    def latents(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1, device=self.offsets.device), self.offsets.diff())

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(rows, entries) slices of consecutive latents; one block where there is no cache to mind."""
        n = len(self.offsets) - 1
        size = BLOCK_CPU if self.offsets.device.type == "cpu" else max(n, 1)
        bounds = [*range(0, n, size), n]
        at = self.offsets[bounds].tolist()
        for i in range(len(bounds) - 1):
            yield slice(bounds[i], bounds[i + 1]), slice(at[i], at[i + 1])


def run_offsets(sorted_numbers: Tensor, n: int) -> Tensor:
    """[n + 1] where each number's run begins among sorted numbers below n."""
    return F.pad(torch.bincount(sorted_numbers, minlength=n).cumsum(0), (1, 0))


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
    size = max(8, min(BLOCK_CPU, _PIECE_CPU // max(n, 1))) if x.device.type == "cpu" else max(8, _PIECE_GPU // max(n, 1))
    tokens, counts = [], []
    for start in range(0, d_sae, size):
        block = W[start : start + size].to(dtype)
        excess = F.linear(block, x).sub_(threshold[start : start + size, None]).relu_()  # [latents, N]: positions come by latent
        at = positions(excess)
        latent = at // n
        tokens.append(at - latent * n)
        counts.append(torch.bincount(latent, minlength=len(block)))
    return ByLatent(torch.cat(tokens), F.pad(torch.cat(counts).cumsum(0), (1, 0)))


def _pieces(x: Tensor, W: Tensor, bias: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre-activations [n, S]) of some whole tokens at a time."""
    size = max(1, (_PIECE_CPU if x.device.type == "cpu" else _PIECE_GPU) // len(W))
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
            found, bound = found[best], float(values.min())
    return _ordered(found, d_sae)


# -- sums over entries ---------------------------------------------------------------------------------------


def _triton(tensor: Tensor):
    """The module of Triton kernels if they run on this tensor's device, else None. Imported late: Triton takes a while, and memory."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from . import triton

    return triton if triton.usable(tensor) else None


def _bags(rows: Tensor, numbers: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """sum of weights[e] rows[numbers[e]] over each bag's entries e: [bags, D]."""
    if len(numbers) == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    if kernels := _triton(rows):
        return kernels.bags(rows, numbers, offsets, weights)
    return F.embedding_bag(numbers, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _pair_products(rows: Tensor, numbers: Tensor, bags: Tensor, bag_rows: Tensor, offsets: Tensor) -> Tensor:
    """<rows[numbers[e]], bag_rows[bags[e]]> of every entry e: [nnz]; a bag's entries lie together. It is the gradient of :func:`_bags` in its weights."""
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
        return for_x, for_W, for_bias, None, None, None


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
