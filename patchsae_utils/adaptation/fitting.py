"""How an adapter's weights move while it is fitted: recipes, rates, arithmetic, and the state of a fit that was stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing here unpickles
from typing import Any, NamedTuple

import torch
from torch import Generator, nn

from ..config import AdapterConfig
from ..run.artifacts import atomic_file
from .adapted import AdaptedClip

WARMUP_LR = 1e-5


class Recipe(NamedTuple):
    """How the learned weights move."""

    optimizer: str
    """"sgd" (momentum 0.9) or "adamw"."""
    lr: float | None
    """Rate after the warm-up epoch; None: the configuration's."""
    weight_decay: float

    def rate(self, config: AdapterConfig) -> float:
        """Its own, or the configuration's."""
        return config.lr if self.lr is None else self.lr


PROMPT_RECIPE = Recipe("sgd", None, 5e-4)
RECIPES = {
    "maple": PROMPT_RECIPE,
    "coop": PROMPT_RECIPE,
    "vpt": PROMPT_RECIPE._replace(lr=0.03),
    "lora": Recipe("adamw", 2e-3, 1e-2),
    "finetune": Recipe("adamw", 1e-4, 1e-2),
    "linear": Recipe("adamw", 5e-3, 1e-2),
}
"""Kind -> its recipe; the prompts' is MaPLe's. The rates of the others are customary ones. All but CoOp's were held against neighbours on 180
validation pictures of the embedded world: of openmoji/tools a linear head reached 95 % of base classes (91 % at a quarter and at four times its
rate), LoRA 87 % (83 % at a quarter), fine-tuning 93 % (90 % at a third); of openmoji/animals MaPLe 93 % of base and 88 % of novel classes (92 % and
84 % at ten times its rate); of animals:gray VPT 61 % of base classes (49 %, as zero-shot, at a tenth, MaPLe's rate: image prompts alone move
little)."""


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """Rate of an epoch (from 0): 1e-5 in the first, then ``lr`` times a half cosine over ``epochs``, stepped once an epoch.

    Source: MaPLe's configuration (constant warm-up of one epoch before a cosine whose period is the whole run).
    """
    return WARMUP_LR if epoch == 0 else lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def optimizer_of(recipe: Recipe, learned: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimiser of what is learned.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(learned.parameters(), lr=lr, momentum=0.9, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(learned.parameters(), lr=lr, weight_decay=recipe.weight_decay)
    raise ValueError(f"Unknown optimizer {recipe.optimizer!r}. Valid: sgd, adamw.")


@contextmanager
def arithmetic(adapted: AdaptedClip, precision: str) -> Iterator[None]:
    """While it lasts, the image tower computes in this precision."""
    transformer, before = adapted.visual.transformer, adapted.precision
    attention = [block.attn for block in transformer.resblocks if isinstance(getattr(block, "attn", None), torch.nn.MultiheadAttention)]
    turned = precision == "bf16" and transformer.batch_first and len(attention) == len(transformer.resblocks)
    adapted.precision = precision
    # The same numbers in another order: on a CPU, attention in bfloat16 that reads [T, B, d] is several times as fast.
    modules = [transformer, *attention] if turned else []
    try:
        for module in modules:
            module.batch_first = False
        yield
    finally:
        for module in modules:
            module.batch_first = True
        adapted.precision = before


class Unfinished:
    """A fit after its last whole epoch: learned weights, optimiser, random state and log, in ``<out>.unfinished``."""

    def __init__(self, out: str | Path | None, fp: str, adapted: AdaptedClip, optimizer: torch.optim.Optimizer, generator: Generator):
        self.path = None if out is None else Path(f"{out}.unfinished")
        self.fp, self.adapted, self.optimizer, self.generator = fp, adapted, optimizer, generator

    def restore(self) -> list[dict[str, Any]]:
        """Go back to the state on disk, when it is one of these inputs; its log, or an empty one."""
        if self.path is None or not self.path.exists():
            return []
        try:
            state = torch.load(self.path, map_location=self.adapted.device, weights_only=True)
            if state["fingerprint"] != self.fp:
                return []
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError):
            return []  # damaged: fitting starts anew
        self.adapted.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        return state["log"]

    def keep(self, log: list[dict[str, Any]]) -> None:
        """Write the state."""
        if self.path is None:
            return
        state = {
            "learned": self.adapted.learned.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        with atomic_file(self.path) as temporary:
            torch.save({"fingerprint": self.fp, "log": log, **state}, temporary)

    def forget(self) -> None:
        """The fit is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
