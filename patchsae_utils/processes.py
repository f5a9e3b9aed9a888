"""One process or several: what accelerate knows of the machine, in the few words that the trainer needs.

A script that runs as ``python train.py`` runs on every GPU as ``accelerate launch train.py`` (on two CPUs: ``torchrun --nproc_per_node 2
train.py``) and gives the same loss curve: each process takes its share of every batch, and sums over the batch are added up over the
processes. Precision is the profile's affair, not the launcher's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


class Processes:
    """The processes that train together; most often there is one.

    Parameters
    ----------
    trackers : sequence of {"tensorboard", "wandb"}
        Where :meth:`log` sends numbers.
    folder : path, optional
        For the trackers' files.

    Attributes
    ----------
    device : torch.device
        Of this process: its GPU, or the CPU.
    number, index : int
        How many processes there are, and which this is.
    main : bool
        Whether this is the one that writes.

    Raises
    ------
    ImportError
        If a tracker's package is missing.
    """

    def __init__(self, trackers: Sequence[str] = (), folder: str | Path | None = None):
        for name in trackers:
            if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
                raise ImportError(f"The tracker {name!r} needs a package that is not installed: pip install {_PACKAGES[name][0]}.")
        from accelerate import Accelerator  # here: whoever only opens a trained SAE needs none of it

        # Apple's GPUs have no float64, in which medians and variances are summed.
        self._accelerator = Accelerator(cpu=torch.backends.mps.is_available(), log_with=list(trackers) or None, project_dir=folder)
        self.device: torch.device = self._accelerator.device
        self.number: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.main: bool = self._accelerator.is_main_process
        self._tracks = bool(trackers)

    def share(self, n: int) -> slice:
        """This process's part of n rows."""
        return slice(n * self.index // self.number, n * (self.index + 1) // self.number)

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.number > 1:
            flat = tensor if tensor.is_contiguous() else tensor.T  # W_enc may lie in memory column by column
            torch.distributed.all_reduce(flat)

    def average(self, tensor: Tensor) -> None:
        """Mean of a tensor over all processes, in place."""
        if self.number > 1:
            self.add_up(tensor)
            tensor /= self.number

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run a function in the main process, and have its result, or its error, in all."""
        if self.number == 1:
            return action()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.main:
            try:
                answer = [action(), None]
            except Exception as caught:
                error, answer = caught, [None, str(caught)]
        torch.distributed.broadcast_object_list(answer, src=0)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise ValueError(f"The main process stopped: {answer[1]}")
        return answer[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def begin_tracking(self, settings: Mapping[str, Any]) -> None:
        """Open the trackers; settings are shown beside the curves."""
        if self._tracks:
            plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
            self._accelerator.init_trackers("patchsae", config=plain)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers, if there are any."""
        if self._tracks:
            self._accelerator.log(dict(numbers), step=step)

    def end_tracking(self) -> None:
        """Close the trackers; the processes stay together."""
        for tracker in self._accelerator.trackers if self._tracks else ():
            tracker.finish()
