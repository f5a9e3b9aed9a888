"""Which latents are active: a dense product a piece at a time, searched while it is in cache, and the entries that were found.

Nothing here is differentiated, and no tensor of all tokens and all latents is ever made. Dimension letters: N tokens, D d_in, S d_sae.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Latents whose weight rows (float32) stay in a core's cache together with what is computed from them.
BLOCK_CPU = 1024
# Elements of one piece of pre-activations: bounds memory, and on a CPU keeps a piece in the last cache until it was searched.
_PIECE_CPU, _PIECE_GPU = 8 << 20, 1 << 28


class TopK:
    """Selection of each token's ``k`` largest pre-activations, as far as they are positive (Gao et al., 2024)."""

    def __init__(self, k: int):
        self.k = k

    def positions(self, pre: Tensor) -> Tensor:
        """Flat positions in [n, S], in no order."""
        values, latents = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False)
        starts = torch.arange(len(pre), device=pre.device)[:, None] * pre.shape[1]
        return (latents + starts)[values > 0]


class BatchTopK:
    """Selection of the ``k`` N largest pre-activations of a whole batch of N tokens, as far as they are positive (Bussmann et al., 2024)."""

    def __init__(self, k: int):
        self.k = k


class ByLatent(NamedTuple):
    """The entries ordered by latent, then by token (CSC)."""

    tokens: Tensor  # [nnz]
    offsets: Tensor  # [S + 1]

    def latents(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1, device=self.offsets.device), self.offsets.diff())

    def blocks(self):
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


def _pieces(x: Tensor, W: Tensor, bias: Tensor, dtype: torch.dtype, chunk_tokens: int | None):
    """(first token, pre-activations [n, S]) of some whole tokens at a time."""
    size = chunk_tokens or max(1, (_PIECE_CPU if x.device.type == "cpu" else _PIECE_GPU) // len(W))
    W, bias, x = W.to(dtype), bias.to(dtype), x.to(dtype)
    for start in range(0, len(x), size):
        yield start, F.linear(x[start : start + size], W, bias)


def _ordered(flat: Tensor, d_sae: int) -> ByLatent:
    """Flat positions in [N, S] to entries by latent."""
    token = flat // d_sae
    latent = flat - token * d_sae
    latent, order = torch.sort(latent, stable=True)
    return ByLatent(token[order], run_offsets(latent, d_sae))


def chosen(x: Tensor, W: Tensor, bias: Tensor, select, dtype: torch.dtype, chunk_tokens: int | None) -> ByLatent:
    """Entries that a :class:`TopK` or a function of whole tokens selects."""
    d_sae, found = len(W), [torch.empty(0, dtype=torch.long, device=x.device)]
    for start, pre in _pieces(x, W, bias, dtype, chunk_tokens):
        if isinstance(select, TopK):
            found.append(select.positions(pre) + start * d_sae)
            continue
        mask = select(pre)
        if mask.shape != pre.shape or mask.dtype != torch.bool:
            raise ValueError(f"select must return a bool mask of shape {tuple(pre.shape)}, got {mask.dtype} {tuple(mask.shape)}.")
        found.append(positions(mask.contiguous()) + start * d_sae)
    return _ordered(torch.cat(found).sort().values, d_sae)


def best_of_batch(x: Tensor, W: Tensor, bias: Tensor, k: int, dtype: torch.dtype, chunk_tokens: int | None) -> ByLatent:
    """The k N largest positive entries. What lies below the k N-th largest so far can't be among them, so few are ever held."""
    d_sae, budget, bound = len(W), k * len(x), 0.0
    found, values = torch.empty(0, dtype=torch.long, device=x.device), torch.empty(0, dtype=dtype, device=x.device)
    for start, pre in _pieces(x, W, bias, dtype, chunk_tokens):
        at = positions(pre > bound)
        found, values = torch.cat([found, at + start * d_sae]), torch.cat([values, pre.view(-1)[at]])
        if len(values) > budget:
            values, best = values.topk(budget, sorted=False)
            found, bound = found[best], float(values.min())
    return _ordered(found.sort().values, d_sae)
