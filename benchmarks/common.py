"""What the benchmarks share: one JSON object a run, each side measured in a process of its own, the machine's name and its matmul peak."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchsae_utils.data import ImageData
from patchsae_utils.run.artifacts import atomic_file


def report(name: str, rows: Sequence[Mapping[str, Any]], ratio: float | None, *, path: str | Path | None = None, **more: Any) -> dict:
    """Print a benchmark's result as one JSON object, write it to ``path``, and return it; ``ratio``: how many times faster ours is."""
    result = {"benchmark": name, "hardware": hardware(), "rows": [dict(row) for row in rows], "ratio": ratio, **more}
    if path is not None:
        write_report(path, result)
    print(json.dumps(result, indent=1))
    return result


def write_report(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result, as a whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def noise(n_images: int, n_classes: int, size: tuple[int, int]) -> ImageData:
    """Labelled pictures of noise, drawn when asked for, the same each time."""

    def picture(index: int) -> Image.Image:
        coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(size[::-1])

    return ImageData("noise", "test", [f"class {c}" for c in range(n_classes)], [i % n_classes for i in range(n_images)], picture)


def hardware() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, GPU (or None), torch's version and its threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes: ``--json``, ``--device``, ``--repeats`` and ``--threads``."""
    first, layout = (description or "").partition("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    arguments = argparse.ArgumentParser(description=first, formatter_class=layout)
    arguments.add_argument("--json", metavar="PATH", help="write the result here, too")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--repeats", type=int, default=5, help="timed repetitions; the best and the median are reported")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    return arguments


def read_options(
    description: str | None, arguments: Sequence[str] | None, measure: Callable[[str, dict], dict] | None = None, **defaults: Any
) -> dict[str, Any] | None:
    """A benchmark's settings: :func:`parser`'s, and one for each default. None where this process was to measure one side, which is done then."""
    command = parser(description)
    for name, default in defaults.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    for name in ("--side", "--settings"):
        command.add_argument(name, help=argparse.SUPPRESS)
    settings = vars(command.parse_args(arguments))
    side, given = settings.pop("side"), settings.pop("settings")
    if settings["device"] == "cpu":
        torch.set_num_threads(json.loads(given)["threads"] if side else settings["threads"])
    if measure is not None and side:
        print(json.dumps(measure(side, json.loads(given))))
        return None
    return settings


@torch.no_grad()
def set_l0(sae: Any, x: torch.Tensor, l0: int) -> None:
    """As sparse as a trained SAE: b_dec at the mean of tokens x [N, D], one encoder bias for all latents, so that about ``l0`` of them fire a token."""
    x = x.to(sae.b_dec)
    sae.b_dec.copy_(x.mean(0))
    sample = ((x[:: max(1, len(x) // 32)][:32] - sae.b_dec) @ sae.W_enc).flatten()
    sae.b_enc.fill_(-sample.kthvalue(max(1, round(len(sample) * (1 - l0 / sae.W_enc.shape[1])))).values)


def timed(run: Callable[[], Any], *, repeats: int = 5, warmup: int = 1, device: str = "cpu") -> dict[str, float]:
    """Seconds of ``run()``: ``best`` and ``median`` of some repetitions after a warm-up; waits for the GPU where there is one."""
    cuda = torch.device(device).type == "cuda"
    seconds = []
    for i in range(warmup + repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return {"best": min(seconds), "median": statistics.median(seconds)}


def peak_memory(device: str = "cpu") -> int:
    """Most bytes this process has held so far: on the GPU by torch's allocator, else resident memory by the operating system's count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_subprocess(
    module: str, side: str, settings: Mapping[str, Any], *, python: str | None = None, timeout: float = 3600
) -> dict[str, Any]:
    """The JSON object that ``python -m module --side side --settings JSON`` prints last, or its ``error``: each side's memory is its own."""
    command = [python or sys.executable, "-m", module, "--side", side, "--settings", json.dumps(dict(settings))]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    if "threads" in settings:  # as early as this: some libraries read it when they are loaded
        environment |= {"OMP_NUM_THREADS": str(settings["threads"])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=root)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 3072, seconds: float = 1.0) -> float:
    """Floating-point operations per second of the best of several square products, in ``dtype`` (TF32 where the caller has allowed it)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, timed(lambda: torch.mm(a, b, out=out), repeats=1, warmup=0, device=device)["best"])
    return 2 * size**3 / best


def _processor() -> str:
    """The processor's name, as far as the operating system says it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
