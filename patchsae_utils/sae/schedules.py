"""What changes over a training run by a rule: the learning rate, and the weight of the L1 term. Plain functions of the step."""

from __future__ import annotations

import math

from ..config import TrainConfig


def n_steps(config: TrainConfig) -> int:
    """Steps of a whole run: ``n_tokens / batch_tokens``, rounded, at least 1."""
    return max(1, round(config.n_tokens / config.batch_tokens))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Adam's rate at a step, counted from 0.

    Linear up to ``config.lr`` over ``warmup_steps``; afterwards constant, or falling to ``lr_end * lr``, which the last step has.

    Parameters
    ----------
    step : int
    config : TrainConfig
        Its ``lr``, ``warmup_steps``, ``schedule``, ``lr_end``, ``n_tokens`` and ``batch_tokens``.
    """
    if step < config.warmup_steps:
        return config.lr * min(1.0, (step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, n_steps(config) - 1 - config.warmup_steps)
    share = min(1.0, share)
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.lr * (config.lr_end + (1 - config.lr_end) * left)


def l1_weight(step: int, config: TrainConfig) -> float:
    """Weight of the L1 term at a step, counted from 0: linear up to ``l1_coefficient`` over ``l1_warmup_steps``, then constant."""
    return config.l1_coefficient * min(1.0, (step + 1) / config.l1_warmup_steps) if config.l1_warmup_steps else config.l1_coefficient
