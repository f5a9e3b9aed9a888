"""Run by test_fault_kills.py: kills a pass of the statistics at random moments, then lets it finish; prints how far each attempt had come."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import shares  # noqa: E402

from patchsae_utils.latents import passes

torch.set_num_threads(1)  # a fork inherits no threads
passes.SAVE_SECONDS = 0.0


class SlowPictures(shares.Pictures):
    """Time to be killed in."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def attempt(out: Path) -> int:
    """A child that makes the statistics; its process id."""
    child = os.fork()
    if child == 0:
        try:
            shares.statistics(out, SlowPictures())
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def saved(out: Path) -> set[str]:
    return {path.name for path in (out / ".statistics-unfinished").glob("counted-*.safetensors")}


def run(out: Path, n_kills: int) -> dict:
    moments, steps = random.Random(0), []
    for _ in range(n_kills):
        before, child = saved(out), attempt(out)
        seen: set[str] = set()
        while len(seen) < 2:  # two savings later, so that every attempt gets on
            seen |= saved(out) - before
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                raise SystemExit(f"the statistics ended before they could be killed, with status {status}")
        time.sleep(moments.uniform(0, 0.03))  # somewhere in a forward pass, an update or a saving
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps.append(len(seen))
    _, status = os.waitpid(attempt(out), 0)
    return {"kills": len(steps), "status": status}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
