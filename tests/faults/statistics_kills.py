"""Run by test_fault_kills.py: kills a pass of the statistics at random moments, then lets it finish; prints how far each attempt had come."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import shares  # noqa: E402
from kills import attempt, killed  # noqa: E402

from patchsae_utils.latents import passes

passes.SAVE_SECONDS = 0.0


class SlowPictures(shares.Pictures):
    """Time to be killed in."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def run(out: Path, n_kills: int) -> dict:
    moments, kills = random.Random(0), 0
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
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
