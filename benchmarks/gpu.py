"""All that is to be known of one GPU, in one command of at most eight minutes.

    python -m benchmarks.gpu [--minutes 8] [--json runs/gpu.json] [--peers-python PATH]

Parts, in this order: the tests that are marked ``gpu``; products of matrices (what the card can do); the SAE's step at the paper's size against
dense steps in TF32 and bfloat16 and against installable peers; extraction of ViT-B/16 in bfloat16; images to a trained SAE; a sweep of masks;
statistics. Each runs in processes of its own, and the JSON is written after each step: a part that fails, or takes too long, costs itself alone,
and a run that is cut off keeps what it has. Parts that the time no longer reaches say so. On a CPU (``--device cpu``, small sizes) it shows
that all is ready; its numbers then mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import sae_step
from .common import hardware, in_subprocess, matmul_peak, read_options, write_report

Row = dict[str, Any]
SIDES = ("textbook", "textbook bfloat16", "ours", "ours float32", "ours topk", *sae_step.PEERS)
TARGETS = {"images per second, end to end, on one H100": 2500, "ours over textbook (TF32)": 5.0, "ours topk over the best peer": 1.5}
SHORTEST = 20.0  # seconds: with less left, no further step is begun


class Run:
    """Rows as they come, in a file; and the time that is left."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.end = settings, time.monotonic() + 60 * settings["minutes"]
        self.result: dict[str, Any] = {
            "benchmark": "gpu", "command": "python -m benchmarks.gpu", "hardware": hardware(), "targets": TARGETS, "settings": settings, "parts": {},
        }  # fmt: skip

    def left(self, longest: float = float("inf")) -> float:
        """Seconds for the next step."""
        return min(longest, self.end - time.monotonic())

    def part(self, name: str, steps: Callable[[Run], Iterator[Row]]) -> None:
        """The rows of a part; what goes wrong becomes its last row."""
        rows: list[Row] = []
        self.result["parts"][name] = rows
        start = time.monotonic()
        try:
            if self.left() < SHORTEST:
                raise TimeoutError("left out: the time was over")
            for row in steps(self):
                rows.append(row)
                self.save()
                if self.left() < SHORTEST:
                    raise TimeoutError("ended here: the time was over")
        except Exception as error:  # whatever it is, the other parts go on
            rows.append({"error": f"{type(error).__name__}: {error}"})
        self.save()
        print(f"{name:<12} {time.monotonic() - start:5.0f} s  {rows[-1].get('error', 'done')}", file=sys.stderr)

    def save(self) -> None:
        write_report(self.settings["json"], self.result)

    def measure(self, module: str, side: str, **settings: Any) -> Row:
        """One side of a benchmark, in a process of its own."""
        given = {**self.settings, **settings}
        python = given["peers_python"] or None if side in sae_step.PEERS else None
        found = in_subprocess(f"benchmarks.{module}", side, given, python=python, timeout=self.left(given["longest"]))
        about = {"target_l0" if name == "l0" else name: value for name, value in settings.items()}
        return {"side": side, **about, **found}


def tests(run: Run) -> Iterator[Row]:
    """The tests marked ``gpu``; without a GPU they skip."""
    command = [sys.executable, "-m", "pytest", *run.settings["tests"].split(), "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=line"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=run.left(150), cwd=Path(__file__).resolve().parents[1])
    lines = done.stdout.strip().splitlines()
    yield {
        "status": done.returncode,
        "summary": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith("FAILED")],
    }


def products(run: Run) -> Iterator[Row]:
    """Products of matrices: the wall that a dense step, or an encoder, runs into."""
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.float32, torch.bfloat16):
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "flops": matmul_peak(run.settings["device"], dtype, size=run.settings["product"]),
        }


def step(run: Run, sizes: slice = slice(1)) -> Iterator[Row]:
    """The SAE's step over densities: at the smallest batch with all sides, peers included; at larger ones without."""
    for tokens in map(int, run.settings["tokens"].split(",")[sizes]):
        for l0 in map(int, run.settings["l0s"].split(",")):
            for side in SIDES if sizes == slice(1) else SIDES[:3]:
                yield run.measure("gpu", side, tokens=tokens, l0=l0)


def single(side: str, run: Run) -> Iterator[Row]:
    """One row: the residual stream against bare blocks and a whole forward pass; or twenty masks against the whole model for each."""
    yield run.measure("gpu", side)


def end_to_end(run: Run) -> Iterator[Row]:
    """Images in memory to a trained SAE."""
    for side in ("ours", "dense", "extraction"):
        yield run.measure("end_to_end", side, l0=int(run.settings["l0s"].split(",")[-1]))


def summary(run: Run) -> Iterator[Row]:
    """Statistics of every latent."""
    yield run.measure(
        "summary", "ours", images=run.settings["summary_images"], batch=min(128, run.settings["summary_images"]), classes=1000, l0=150
    )


PARTS = {
    "tests": tests, "products": products, "step": step, "end to end": end_to_end, "extraction": partial(single, "extraction"),
    "mask sweep": partial(single, "mask sweep"), "statistics": summary, "larger steps": partial(step, sizes=slice(1, None)),
}  # fmt: skip


def textbook_in_bfloat16(x: torch.Tensor, weights: sae_step.Textbook, l0: int) -> sae_step.Step:
    """The dense step with its products in bfloat16."""
    dense = sae_step.textbook(x, weights, l0)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            return dense.step()

    return dense._replace(step=step)


sae_step.SIDES["textbook bfloat16"] = textbook_in_bfloat16


def measure(side: str, settings: dict[str, Any]) -> Row:
    """What a process of its own does: extraction, a sweep, or a side of the step."""
    if side == "extraction":
        from .extraction import measure_seconds

        best = {name: min(seconds) for name, seconds in measure_seconds(settings).items()}
        return {"images": settings["images"], "seconds": best, "images_per_second": settings["images"] / best["ours"]}
    if side == "mask sweep":
        from .mask_sweep import Setting, compare

        n = settings["sweep_images"]
        rows, ratio, about = compare(Setting(settings["model"], settings["d_sae"], n, min(149, settings["d_sae"] // 8), n))
        return {"rows": rows, "ratio": ratio, **about}
    return sae_step.measure(side, settings)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark; see the module's docstring. ``longest``: seconds that one measurement may take."""
    settings = read_options(
        __doc__, arguments, measure, minutes=8.0, model="ViT-B-16", pretrained="random", layer=-2, d_in=768, d_sae=49_152, tokens="4096,8192,16384,32768",
        l0s="32,150", images=256, steps=20, product=8192, sweep_images=32, summary_images=512, longest=60.0, tests="tests/gpu tests/sae/test_sparse.py",
        peers_python="",
    )  # fmt: skip
    if settings is None:
        return None
    settings["json"] = settings["json"] or "runs/gpu.json"
    run = Run(settings)
    for name, steps in PARTS.items():
        run.part(name, steps)
    run.result["ratios"] = ratios([row for name in ("step", "larger steps") for row in run.result["parts"][name]])
    run.save()
    print(f"Written: {settings['json']}", file=sys.stderr)
    return run.result


def ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times faster ours is, at each size that has both sides; the best peer against ours at TopK."""
    found = []
    for key in dict.fromkeys((row["tokens"], row["target_l0"]) for row in rows if "seconds" in row):
        seconds = {row["side"]: row["seconds"] for row in rows if (row.get("tokens"), row.get("target_l0")) == key and "seconds" in row}
        peers = [seconds[name] for name in sae_step.PEERS if name in seconds]
        pairs = {"dense TF32": ("textbook", "ours"), "dense bfloat16": ("textbook bfloat16", "ours")}
        row = {name: seconds[theirs] / seconds[own] for name, (theirs, own) in pairs.items() if {theirs, own} <= seconds.keys()}
        if peers and "ours topk" in seconds:
            row["best peer"] = min(peers) / seconds["ours topk"]
        found.append({"tokens": key[0], "target_l0": key[1], **row})
    return found


if __name__ == "__main__":
    main()
