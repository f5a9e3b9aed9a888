"""The residual stream after one block: ours against the bare forward of those blocks, and against a whole forward pass of CLIP.

    python -m benchmarks.extraction [--model ViT-B-16] [--images 8] [--layer -2] [--json PATH]

Images are preprocessed and in memory, weights are random: what is timed is arithmetic. Sides, in bfloat16 by autocast: ``ours`` is
``ClipModel.residual``, which checks its input, stops after the block and returns float32; ``bare`` is a loop over the same blocks with nothing
around it; ``whole`` is a whole forward pass, both towers, of the images and as many texts. Rounds alternate between the sides, so that what
else the machine does falls on all alike; memory is measured in a process for each. ``ratio`` is ours over whole, in images/s.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .common import in_subprocess, peak_memory, read_options, report, timed

SIDES = ("ours", "bare", "whole")
TARGETS = {"seconds of ours over bare": 1.15}


def prepare(settings: dict, sides: Sequence[str] = SIDES) -> dict[str, Callable[[], Tensor]]:
    """Each side as a function without arguments."""
    from patchsae_utils.clip.loading import load_clip

    logging.disable(logging.WARNING)  # random weights are meant
    device = settings["device"]
    clip = load_clip(settings["model"], settings["pretrained"], device=device, precision="bf16")
    images = torch.randn(settings["images"], 3, *clip.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    texts = clip.tokenize(["a photo of a bird."] * settings["images"])
    layer = clip.layer_index(settings["layer"])
    for module in clip.model.modules():  # the text tower, too
        if hasattr(module, "batch_first"):
            module.batch_first = False

    visual, blocks = clip.visual, clip.blocks[: layer + 1]

    def ours() -> Tensor:
        return clip.residual(images, layer)

    def bare() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            x = visual._embeds(images).transpose(0, 1)
            for block in blocks:
                x = block(x)
            return x.transpose(0, 1)

    def whole() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return clip.model(images, texts)[0]

    return {name: run for name, run in zip(SIDES, (ours, bare, whole), strict=True) if name in sides}


@torch.inference_mode()
def measure_memory(side: str, settings: dict) -> dict:
    """Peak memory of one side, in this process."""
    run = prepare(settings, (side,))[side]
    run()
    return {"peak_memory_gb": peak_memory(settings["device"]) / 1e9}


@torch.inference_mode()
def measure_seconds(settings: dict) -> dict[str, list[float]]:
    """Seconds of every round of every side; in each round every side has its turn."""
    runs = prepare(settings)
    torch.testing.assert_close(runs["ours"](), runs["bare"]().float())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(1 + settings["repeats"]):
        for name, run in runs.items():
            taken = timed(run, repeats=1, warmup=0, device=settings["device"])["best"]
            if i:  # the first round warms up
                seconds[name].append(taken)
    return seconds


def main(arguments: Sequence[str] | None = None) -> dict | None:
    """Run the benchmark; see the module's docstring."""
    settings = read_options(__doc__, arguments, measure_memory, model="ViT-B-16", pretrained="random", images=8, layer=-2)
    if settings is None:
        return None
    n_images = settings["images"]
    rows = []
    for name, seconds in measure_seconds(settings).items():
        best, median = min(seconds), statistics.median(seconds)
        row = {"side": name, "images": n_images, "seconds": best, "median_seconds": median, "images_per_second": n_images / best}
        rows.append(row | in_subprocess("benchmarks.extraction", name, settings))
        print(f"{name:<11} {best:.3f} s, {row['images_per_second']:.1f} images/s", file=sys.stderr)
    best, median = ({row["side"]: row[key] for row in rows} for key in ("seconds", "median_seconds"))
    over_bare = {"best": best["ours"] / best["bare"], "median": median["ours"] / median["bare"]}
    more = {"model": settings["model"], "layer": settings["layer"], "targets": TARGETS, "command": "python -m benchmarks.extraction"}
    return report("extraction", rows, best["whole"] / best["ours"], path=settings["json"], over_bare=over_bare, **more)


if __name__ == "__main__":
    main()
