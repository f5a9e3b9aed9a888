"""One process or several: what accelerate knows of the machine, in the few words that extraction, statistics and the trainer need.

``accelerate launch train.py`` (on CPUs: ``torchrun --nproc_per_node 2 train.py``) gives each process its share of every batch, or of the images.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_PATIENCE = timedelta(days=7)  # a process that has done its share waits for the slowest; torch's ten minutes are for lost messages


class Processes:
    """The processes that work together; most often there is one, for which nothing is set up and nothing waited for."""

    def __init__(self):
        self.device, self.number, self.index, self.main = torch.device(default_device()), 1, 0, True
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        from accelerate import PartialState  # here: whoever only opens a trained SAE needs none of it
        from accelerate.utils import parse_flag_from_env

        # Apple's GPUs have no float64, in which medians and variances are summed.
        state = PartialState(cpu=not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
        self.device, self.main, self.number, self.index = state.device, state.is_main_process, state.num_processes, state.process_index

    def share(self, n: int) -> slice:
        """This process's part of n rows."""
        return slice(n * self.index // self.number, n * (self.index + 1) // self.number)

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.number > 1:
            flat = tensor if tensor.is_contiguous() else tensor.T  # W_enc may lie in memory column by column
            there = flat.to(self.device)  # GPUs speak to GPUs
            torch.distributed.all_reduce(there)
            if there is not flat:
                flat.copy_(there)

    def average(self, tensor: Tensor) -> None:
        """Mean of a tensor over all processes, in place."""
        if self.number > 1:
            self.add_up(tensor)
            tensor /= self.number

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run a function in the main process, and have its result, or its error, in all."""
        return self.everywhere(action if self.main else lambda: None)[0]

    def everywhere(self, action: Callable[[], Any]) -> list[Any]:
        """Run a function in every process, and have all results in all; or, once all have ended, the error (a ``ValueError`` in others)."""
        if self.number == 1:
            return [action()]
        from accelerate.utils import gather_object

        answer, error = (None, None), None
        try:
            answer = (action(), None)
        except Exception as caught:
            error, answer = caught, (None, str(caught))
            print(f"Process {self.index} stopped; the others end their shares first. {caught}", file=sys.stderr, flush=True)
        answers = gather_object([answer])
        if error is not None:
            raise error
        for index, (_, text) in enumerate(answers):
            if text is not None:
                raise ValueError(f"Process {index} stopped: {text}")
        return [result for result, _ in answers]

    def others(self, tensor: Tensor) -> list[Tensor]:
        """What the other processes hold in place of this tensor, of the same shape."""
        if self.number == 1:
            return []
        own = tensor.to(self.device).contiguous()
        found = [torch.empty_like(own) for _ in range(self.number)]
        torch.distributed.all_gather(found, own)
        return [part.to(tensor.device) for index, part in enumerate(found) if index != self.index]


def default_device() -> str:
    """A GPU where there is one, and to each of several processes its own; else ``cpu``."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
