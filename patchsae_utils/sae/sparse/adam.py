"""Adam that reads sparse gradients: one pass over both weights sums, projects, moves and normalises a block while it is in cache.

Beside it the rate and the weight of the L1 term, as functions of the step. Letters: N tokens, D d_in, S d_sae."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim.adam import adam

from ...config import TrainConfig
from ..model import SparseAutoencoder
from ..variants import normalize_rows
from .kernels import COLLECTED, ChosenRows, WeightedRows

_BLOCK_CPU = 2048  # latents a block


class DeferredGradients:
    """Collects what gradients of ``W_enc`` and ``W_dec`` are summed from, of forward passes in its ``with`` block; ``.grad`` stays None."""

    def __init__(self, sae: SparseAutoencoder):
        if not sae.W_enc.T.is_contiguous():  # column after column, in place: what sparse gradients touch are columns
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.sae = sae
        self._parts: dict[str, list[WeightedRows | ChosenRows]] = {"W_enc": [], "W_dec": []}

    def __enter__(self) -> DeferredGradients:
        self._addresses = {getattr(self.sae, name).data_ptr(): parts for name, parts in self._parts.items()}
        COLLECTED.update(self._addresses)
        return self

    def __exit__(self, *_) -> None:
        for address in self._addresses:
            COLLECTED.pop(address)

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of ``W_enc.T`` or ``W_dec``, some rows [n, D] at a time; what ``.grad`` holds besides is added."""
        weight, parts = _rows_of(self.sae, name), self._parts[name]
        dense = None if getattr(self.sae, name).grad is None else _rows_of(self.sae, name, gradient=True)
        found = [part.bounds(len(weight), _BLOCK_CPU) for part in parts]
        bounds = found[0][0] if found else [0, len(weight)]
        for i, rows in enumerate(slice(*ends) for ends in pairwise(bounds)):
            block = None if parts else torch.zeros_like(weight[rows])
            for part, (_, at) in zip(parts, found, strict=True):
                block = part.add_to(block, rows, slice(at[i], at[i + 1]))
            yield rows, block if dense is None else block.add_(dense[rows])

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of the gradient of all the SAE's parameters, the part along the decoder's rows already taken off: for clipping."""
        squares = [p.grad.square().sum() for name, p in self.sae.named_parameters() if p.grad is not None and name not in self._parts]
        for name in self._parts:
            weight = _rows_of(self.sae, name)
            for rows, block in self.blocks(name):
                if name == "W_dec":
                    remove_parallel(block, weight[rows])
                squares.append(block.square().sum())
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def materialize(self) -> None:
        """Sum what was collected into ``.grad`` of both weights, for several processes to add up."""
        for name in (name for name, parts in self._parts.items() if parts):
            gradient = torch.cat([block for _, block in self.blocks(name)])
            getattr(self.sae, name).grad = gradient.T if name == "W_enc" else gradient
            self._parts[name].clear()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Adam, *, max_norm: float | None = None) -> Tensor | None:
        """:meth:`materialize`, ``remove_parallel_gradient``, ``clip_grad_norm_``, Adam and ``normalize_decoder`` at once; the norm, if it is limited."""
        norm = None if max_norm is None else self.norm()
        scale = None if norm is None else (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for name in self._parts:
            if getattr(self.sae, name).requires_grad:
                self._stream(optimizer, name, scale)
        if scale is not None:
            for parameter in self.sae.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.sae.variant.threshold == "each":
            self.sae.normalize_decoder()  # which also keeps thresholds from falling below 0
        return norm

    def _stream(self, optimizer: torch.optim.Adam, name: str, scale: Tensor | None) -> None:
        """Adam on one weight, block by block, its state where the optimiser has it; then forget what was collected."""
        parameter, weight, group = getattr(self.sae, name), _rows_of(self.sae, name), optimizer.param_groups[0]
        if not (state := optimizer.state[parameter]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        moments = []
        for moment in ("exp_avg", "exp_avg_sq"):
            if state[moment].stride() != parameter.stride():  # a checkpoint's, from before the weights were laid out by columns
                state[moment] = torch.empty_like(parameter).copy_(state[moment])
            moments.append(state[moment].T if name == "W_enc" else state[moment])
        options = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "foreach", "fused")}
        beta1, beta2 = group["betas"]
        for rows, block in self.blocks(name):
            part = weight[rows]
            if name == "W_dec":
                remove_parallel(block, part)
            if scale is not None:
                block.mul_(scale)
            first, second = (moment[rows] for moment in moments)
            adam([part], [block], [first], [second], [], [state["step"].clone()], amsgrad=False, beta1=beta1, beta2=beta2, **options)
            if name == "W_dec":
                normalize_rows(part)
        state["step"] += 1
        parameter.grad = None
        self._parts[name].clear()


def n_steps(config: TrainConfig) -> int:
    """Steps of a whole run, at least 1."""
    return max(1, round(config.n_tokens / config.batch_tokens))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Adam's rate at a step, counted from 0: a linear rise over ``warmup_steps``; then constant, or falling to ``lr_end * lr``, the last step's."""
    if step < config.warmup_steps:
        return config.lr * min(1.0, (step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    share = min(1.0, (step - config.warmup_steps) / max(1, n_steps(config) - 1 - config.warmup_steps))
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.lr * (config.lr_end + (1 - config.lr_end) * left)


def l1_weight(step: int, config: TrainConfig) -> float:
    """Weight of the L1 term at a step, counted from 0: linear up to ``l1_coefficient`` over ``l1_warmup_steps``, then constant."""
    return config.l1_coefficient * min(1.0, (step + 1) / config.l1_warmup_steps) if config.l1_warmup_steps else config.l1_coefficient


def remove_parallel(gradient: Tensor, rows: Tensor) -> None:
    """Take from a gradient [n, D], in place, its part along each unit row [n, D]."""
    gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows).unsqueeze(1), value=-1)


def _rows_of(sae: SparseAutoencoder, name: str, gradient: bool = False) -> Tensor:
    """A weight, or its gradient, as [S, D]."""
    tensor = getattr(sae, name)
    tensor = tensor.grad if gradient else tensor.detach()
    return tensor.T if name == "W_enc" else tensor
