"""What the benchmarks share: one JSON object a run, each side measured in a process of its own, the machine's name and its matmul peak."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def report(name: str, rows: Sequence[Mapping[str, Any]], ratio: float | None, *, path: str | Path | None = None, **more: Any) -> dict:
    """Print a benchmark's result as one JSON object, and write it to ``path`` if that is given.

    Parameters
    ----------
    name : str
        Of the benchmark: ``sae_step``.
    rows : sequence of mappings
        One for each thing measured, plain values.
    ratio : float or None
        The headline: how many times faster ours is. None where the run compared nothing.
    path : path, optional
        Usually ``benchmarks/results/<name>.json``.
    **more
        Further entries, such as the targets.

    Returns
    -------
    dict
        What was printed: ``benchmark``, ``hardware``, ``rows``, ``ratio`` and ``more``.
    """
    result = {"benchmark": name, "hardware": hardware(), "rows": [dict(row) for row in rows], "ratio": ratio, **more}
    text = json.dumps(result, indent=1)
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    print(text)
    return result


def hardware() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, GPU (or None), torch's version and its threads."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes: ``--json``, ``--device``, ``--repeats`` and ``--threads``."""
    arguments = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_argument("--json", metavar="PATH", help="write the result here, too")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--repeats", type=int, default=5, help="timed repetitions; the best and the median are reported")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    return arguments


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
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_subprocess(
    module: str, side: str, settings: Mapping[str, Any], *, python: str | None = None, timeout: float = 3600
) -> dict[str, Any]:
    """Run ``python -m module --side side`` and return the JSON object that it prints last.

    A process of its own, so that one side's peak memory and caches are not the other's. A side that can't run (a peer that is not
    installed) says so in ``error``.

    Parameters
    ----------
    module : str
        ``benchmarks.sae_step``; it must take ``--side NAME --settings JSON``.
    side : str
    settings : mapping
        Plain values.
    python : str, optional
        Another interpreter, with the peers installed.
    timeout : float
        Seconds after which the side counts as failed.
    """
    command = [python or sys.executable, "-m", module, "--side", side, "--settings", json.dumps(dict(settings))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")]))}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    if "threads" in settings:  # as early as this: some libraries read it when they are loaded
        environment |= {"OMP_NUM_THREADS": str(settings["threads"])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=_root(), check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": reason}


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 3072, seconds: float = 1.0) -> float:
    """Floating-point operations per second of the best of several square products of this machine, in ``dtype``.

    On a GPU float32 is measured as the benchmarks run it: with TF32 where the caller has allowed it.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, timed(lambda: torch.mm(a, b, out=out), repeats=1, warmup=0, device=device)["best"])
    return 2 * size**3 / best


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _processor() -> str:
    """The processor's name, as far as the operating system says it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
