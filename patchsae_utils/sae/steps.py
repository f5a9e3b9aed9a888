"""One step of training, and what it changes: weights, Adam's moments, units, counters of silent latents.

Where few latents are active, a step touches those alone. Recipe: Lim et al., ICLR 2025, appendix A."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..run.processes import Processes
from .losses import objective
from .model import SparseAutoencoder
from .sparse.adam import DeferredGradients, l1_weight, learning_rate, n_steps
from .sparse.kernels import worthwhile
from .starts import SOFT_COSINE, Archetypes, Normalization, centroids, start_bias, start_from

TERMS = ("loss", "mse", "l1", "ghost", "l0", "residual")  # of a batch, summed over its chunks
_CHUNK_TOKENS = 512  # computed at once, at least: each chunk adds to all gradients
_CLUSTERED = 128, 400_000  # tokens per centroid that k-means sees, and at most, but four per centroid: what it finds grows with them
_CHUNK_DEAD = 1 << 26  # on the sparse path only the dead latents' pre-activations are computed whole, for the term that wakes them
# sparse="auto": a smaller dictionary's dense step is short, and stays dense. Density is the mean over so many rows of the log.
_SPARSE_FROM, _DENSITY_ROWS = 8192, 5
_SOUGHT = 0.8  # share of the run in which dead latents start anew, and a target L0 is followed: later, none would find its place
_RESTART_SIZE = 0.2  # of the living encoder columns' mean norm, as in the source; all of it where others compete, or a threshold is learned
_THRESHOLD_RATE = 30  # of ``jumprelu``'s thresholds, times the others'
_CONTROL, _AHEAD = 0.05, 50  # the weight of sparsity follows a target L0 by so much a step, and looks so many steps ahead


class Steps:
    """What a run is at some step, and the step to the next."""

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, processes: Processes):
        self.sae, self.config, self.processes = sae, config, processes
        self.device, self.loss = sae.W_enc.device, objective(sae)
        self.n_steps, self.step = n_steps(config), 0
        self.silent_for = torch.zeros(sae.d_sae, dtype=torch.long, device=self.device)  # tokens since each latent fired
        self.rows: list[dict[str, Any]] = []  # of the log
        self.n_sparse = 0  # steps on the sparse path
        self.l1_factor = 1.0  # by which a target L0 has moved the weight of sparsity
        self.off_target = self.trend = 0.0  # how far the last batch was from it, as a logarithm, and how fast that changes
        self.normalization: Normalization | None = Normalization.of(sae.b_dec[None], "none")
        self.archetypes: Archetypes | None = None
        self.anchor: Tensor | None = None
        may_be_sparse = not sae.variant.gate and (config.sparse == "always" or (config.sparse == "auto" and sae.d_sae >= _SPARSE_FROM))
        self.deferred = DeferredGradients(sae) if may_be_sparse else None
        self.unit_rows = False  # whether the last step has left the decoder's rows at unit norm
        held = {"frozen_decoder": ["W_dec"], "frozen_encoder": ["W_enc"]}.get(config.constraint, [])
        if config.normalize == "token_norm":  # without biases that a token's size would have to scale, as far as the variant needs none
            held += ["b_dec"] + ["b_enc"] * (sae.variant.competes == "token")
        self.held = [getattr(sae, name).requires_grad_(False) for name in held]
        own = [sae.threshold] if sae.variant.threshold == "each" else []
        groups = [{"params": [p for p in sae.parameters() if all(p is not other for other in own)]}]
        self.optimizer = torch.optim.Adam(groups + [{"params": own, "rate": _THRESHOLD_RATE}] * len(own), lr=config.lr, fused=True)

    def hold(self, archetypes: Archetypes | None, anchor: Tensor | None) -> None:
        """What keeps the decoder near the data, or near its start."""
        self.anchor, self.archetypes = anchor, archetypes
        if archetypes is not None:
            self.optimizer.add_param_group({"params": list(archetypes.to(self.device).parameters())})

    @torch.no_grad()
    def fold(self) -> None:
        """Put the units of training into the weights, once."""
        if self.normalization is None:
            return
        self.sae.normalize_decoder()
        self.normalization.fold(self.sae)
        self.normalization = None
        for parameter in self.held:
            parameter.requires_grad_(True)

    def begin(self, draw: Callable[[int], Tensor]) -> None:
        """Before the first step: units, and directions from the data; from tokens of another order than the training's."""
        config, sae = self.config, self.sae
        if config.start != "random" or config.normalize != "none" or config.constraint == "archetypal":
            clusters = config.start == "kmeans" or config.constraint == "archetypal"
            n = max(min(_CLUSTERED[0] * sae.d_sae, _CLUSTERED[1]), 4 * sae.d_sae) if clusters else max(20_000, 2 * sae.d_sae)
            x = draw(n).to(self.device, sae.W_dec.dtype)
            self.normalization = Normalization.of(x, config.normalize)
            if not sae.is_fresh:
                self.normalization.unfold(sae)
            x = self.normalization.apply(x)
            if config.normalize != "token_norm" and (config.start != "random" or clusters):
                start_bias(sae, x[:4096], config.b_dec_start)
            points = centroids(x - sae.b_dec, sae.d_sae, config.seed) if clusters else x[: sae.d_sae] - sae.b_dec
            if config.start != "random":
                start_from(sae, points, x[-4096:])
        if config.constraint != "none":
            sae.normalize_decoder()
            archetypal = Archetypes(points) if config.constraint == "archetypal" else None
            self.hold(archetypal, sae.W_dec.detach().clone() if config.constraint == "soft_decoder" else None)

    def _is_sparse(self) -> bool:
        """Whether this step computes with active latents alone; follows from the settings and from rows of the log that a checkpoint holds."""
        if self.deferred is None:
            return False
        if self.config.sparse == "always":
            return True
        recent = [row["l0"] / self.sae.d_sae for row in self.rows[-_DENSITY_ROWS:]]
        return bool(recent) and worthwhile(sum(recent) / len(recent), self.device)

    def _chunk(self, n: int, n_dead: int, sparse: bool) -> int:
        """Tokens of n that are computed at once."""
        if self.sae.variant.competes == "batch":
            return max(1, n)
        if sparse:
            return max(1, _CHUNK_DEAD // max(1, n_dead))
        return max(_CHUNK_TOKENS, self.sae.tokens_at_once)

    def move(self, x: Tensor, is_cls: Tensor, logged: bool) -> dict[str, float] | None:
        """One step of Adam on a batch [N, D]; chunk by chunk, since every term is a mean over tokens."""
        sae, config, processes = self.sae, self.config, self.processes
        if self.step == 0 and sae.b_dec.requires_grad:
            start_bias(sae, x, config.b_dec_start)
        rows_of = None if self.archetypes is None else self.archetypes()
        if rows_of is not None:
            sae.W_dec.data.copy_(rows_of.detach())
        elif not self.unit_rows:
            sae.normalize_decoder()
        dead = None
        if config.ghost and self.step * len(x) > config.dead_after_tokens:  # before, none can be: a GPU isn't waited for
            dead = (self.silent_for > config.dead_after_tokens).nonzero().squeeze(1)
        sparse = self._is_sparse()
        self.n_sparse += sparse
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        own = processes.share(len(x))
        tokens, own_is_cls = x[own], is_cls[own].to(self.device)
        rows = self._chunk(len(tokens), 0 if dead is None else len(dead), sparse)
        with self.deferred if sparse else nullcontext():
            for part, part_is_cls in zip(tokens.split(rows), own_is_cls.split(rows), strict=True):
                share = len(part) / len(x)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    output = sae(part, sparse=True) if sparse else sae(part)
                    weight = l1_weight(self.step, config) * self.l1_factor * math.exp(_clamped(self.off_target))
                    loss = self.loss(sae, part, dead, weight, config.cls_coefficient, is_cls=part_is_cls, output=output, ghost=config.ghost)
                (loss.total * share).backward()
                with torch.no_grad():
                    latents = output.latents
                    fired |= (latents.amax(0) > 0) if isinstance(latents, Tensor) else latents.fired()
                    if logged:
                        n_active = latents.count_nonzero() if isinstance(latents, Tensor) else latents.counts().sum()
                        residual = (part - output.reconstruction).double().square().sum() / share
                        sums += share * torch.stack([*(term.double() for term in loss), (n_active / len(part)).double(), residual])
        self._update(fired, sums, sparse, rows_of)
        self.silent_for = torch.where(fired, 0, self.silent_for + len(x))
        may_restart = config.restart_dead and config.constraint == "none" and self.step < _SOUGHT * self.n_steps
        if may_restart and (self.step + 1) * len(x) % max(1, config.dead_after_tokens) < len(x):
            self._restart(x, self.silent_for > config.dead_after_tokens)
        terms = dict(zip(TERMS, sums.tolist(), strict=True)) if logged else None
        if config.target_l0 is not None:
            self._control(terms["l0"])
        return terms

    @torch.no_grad()
    def _restart(self, x: Tensor, dead: Tensor) -> None:
        """Dead latents start anew at tokens [N, D], drawn by their squared loss. Source: Bricken et al., 2023, "Neuron Resampling"."""
        sae, index = self.sae, dead.nonzero().squeeze(1)[: len(x) // 2]
        if not len(index) or dead.all():
            return
        parts = x.split(self._chunk(len(x), 0, False))
        error = torch.cat([(sae(part).reconstruction - part).double().square().sum(1) for part in parts]).cpu()
        generator = torch.Generator().manual_seed(self.config.seed + self.step)
        drawn = torch.multinomial(error.square().clamp_min(1e-30), len(index), generator=generator).to(x.device)
        rows = torch.nn.functional.normalize(x[drawn] - sae.b_dec, dim=1)
        size = sae.W_enc[:, ~dead].norm(dim=0).mean() * (_RESTART_SIZE if sae.variant.control == "bias" else 1.0)
        starts = {"W_dec": (rows, (index,)), "W_enc": (rows.T * size, (slice(None), index)), "b_enc": (0, (index,))}
        if sae.variant.gate:
            starts |= {"b_mag": (0, (index,)), "r_mag": (0, (index,))}
        if sae.variant.threshold == "each":
            starts["threshold"] = (sae.threshold[~dead].median(), (index,))
        for name, (value, at) in starts.items():
            parameter = getattr(sae, name)
            parameter[at] = value
            for moment in {"exp_avg", "exp_avg_sq"} & set(state := self.optimizer.state.get(parameter, {})):
                state[moment][at] = 0
        self.silent_for[index] = 0

    def _control(self, l0: float) -> None:
        """Move the weight of sparsity after the step's L0, at once and for good; at the end of control it stays what it has become.

        For good, it moves after where L0 is heading: latents follow late, and a weight that grew until they arrive would kill them.
        """
        before, self.off_target = self.off_target, math.log(max(l0, 1e-3) / self.config.target_l0)
        if self.step >= _SOUGHT * self.n_steps:
            self.off_target = 0.0
            return
        self.trend += 0.1 * (self.off_target - before - self.trend)
        self.l1_factor *= math.exp(_CONTROL * _clamped(self.off_target + _AHEAD * self.trend))

    def _update(self, fired: Tensor, sums: Tensor, sparse: bool, rows_of: Tensor | None) -> None:
        """Gradients of all processes together, projected and clipped, and Adam's step."""
        sae, config = self.sae, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config) * group.get("rate", 1.0)
        self.unit_rows = sparse and self.processes.number == 1 and rows_of is None
        if self.unit_rows:
            self.deferred.step(self.optimizer, max_norm=config.clip_gradient or None)
            self._keep_near()
            return
        if sparse:
            self.deferred.materialize()
        self._add_up(fired, sums)
        sae.remove_parallel_gradient()
        if config.clip_gradient:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_gradient)
        if rows_of is not None:
            self.archetypes.zero_grad()
            rows_of.backward(sae.W_dec.grad)
            sae.W_dec.grad = None
        self.optimizer.step()
        self._keep_near()

    @torch.no_grad()
    def _keep_near(self) -> None:
        """Turn rows of a soft-frozen decoder back until their cosine to where they started is that allowed."""
        if self.anchor is not None:
            rows = self.sae.W_dec
            self.sae.normalize_decoder()
            cosine = (rows * self.anchor).sum(1, keepdim=True)
            aside = torch.nn.functional.normalize(rows - cosine * self.anchor, dim=1)
            rows.copy_(torch.where(cosine < SOFT_COSINE, SOFT_COSINE * self.anchor + (1 - SOFT_COSINE**2) ** 0.5 * aside, rows))

    def _add_up(self, fired: Tensor, sums: Tensor) -> None:
        """Over all processes: gradients, running thresholds, which latents fired, and the log's terms."""
        if self.processes.number == 1:
            return
        for parameter in self.sae.parameters():
            if parameter.grad is None and parameter.requires_grad:  # a share without tokens
                parameter.grad = torch.zeros_like(parameter)
            if parameter.requires_grad:
                self.processes.add_up(parameter.grad)
        if self.sae.variant.competes == "batch":
            self.processes.average(self.sae.threshold)
        counts = torch.cat([fired.double(), sums])
        self.processes.add_up(counts)
        fired.copy_(counts[: len(fired)] > 0)
        sums.copy_(counts[len(fired) :])


def _clamped(logarithm: float) -> float:
    return max(-1.0, min(1.0, logarithm))
