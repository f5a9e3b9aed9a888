"""Run by test_resume.py and test_fault_kills.py: kills training, or a pass of the statistics, at random moments, and then lets it finish.

A parent that has imported torch, and nothing more, forks a child for every attempt: a fresh process in no time. The child trains as anybody
would; the parent watches its log, waits until it has got some random way further, and sends SIGKILL. Prints how often, and where.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_training import Store, fresh

from patchsae_utils.config import TrainConfig
from patchsae_utils.sae.trainer import train_sae

torch.set_num_threads(1)  # a fork inherits no threads


class SlowStore(Store):
    """Two milliseconds a batch: time to be killed in."""

    def tokens(self, *args, **kwargs):
        for batch in super().tokens(*args, **kwargs):
            time.sleep(0.002)
            yield batch


def attempt(work) -> int:
    """A child that calls ``work``; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def killed(work, far_enough, delay: float) -> bool:
    """Start ``work``, wait until ``far_enough``, and a moment more; then kill it. False if it had ended in that moment."""
    child = attempt(work)
    while not far_enough():
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            raise SystemExit(f"the run ended before it could be killed, with status {status}")
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(out: Path, n_kills: int, options: dict, settings: dict) -> dict:
    """Train into ``out`` with so many kills."""
    moments = random.Random(0)
    n_steps = settings["n_tokens"] // settings["batch_tokens"]
    killed_at, log = [], out / "training_log.csv"
    train = lambda: train_sae(fresh(**options), SlowStore(), TrainConfig(**settings), out, progress=False)  # noqa: E731
    for kill in range(n_kills):
        goal = 0.9 * n_steps * moments.uniform(kill, kill + 1) / n_kills  # rows of the log: later each time, so that the run gets on
        if killed(train, lambda goal=goal: lines(log) - 1 >= goal, moments.uniform(0, 0.006)):  # somewhere in a step, a row or a checkpoint
            killed_at.append(lines(log) - 1)
    _, status = os.waitpid(attempt(train), 0)
    return {"killed_at": killed_at, "status": status}


def statistics(out: Path, n_kills: int) -> dict:
    """The pass of shares.py, at 20 milliseconds a picture, killed so often."""
    import shares

    class SlowPictures(shares.Pictures):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    shares.passes.SAVE_SECONDS, moments, kills = 0.0, random.Random(0), 0
    saved = lambda: {path.name for path in (out / ".statistics-unfinished").glob("counted-*.safetensors")}  # noqa: E731
    make = lambda: shares.statistics(out, SlowPictures())  # noqa: E731
    for _ in range(n_kills):
        before, seen = saved(), set()

        def two_savings_later(before=before, seen=seen):  # so that every attempt gets on
            seen |= saved() - before
            return len(seen) >= 2

        kills += killed(make, two_savings_later, moments.uniform(0, 0.03))  # somewhere in a forward pass, an update or a saving
    return {"kills": kills, "status": os.waitpid(attempt(make), 0)[1]}


if __name__ == "__main__":
    runs = json.loads(sys.argv[2])
    if isinstance(runs, int):
        print(json.dumps(statistics(Path(sys.argv[1]), runs)))
    else:
        print(json.dumps({name: run(Path(sys.argv[1]) / name, **arguments) for name, arguments in runs.items()}))
