"""Images to a trained SAE: the residual stream of ViT-B/16 and the SAE's step on it, as the trainer runs them.

    python -m benchmarks.end_to_end [--model ViT-B-16] [--images 8] [--steps 5] [--d-sae 49152] [--json PATH]

Images are synthetic, preprocessed and in memory on the device; CLIP's weights are random; one encoder bias is set so that about ``--l0`` latents
a token fire, and the rate is so small that it stays so. Sides: ``ours`` extracts in bfloat16 and trains with active latents alone;
``dense`` is the same trainer with dense float32 products (TF32 on a GPU); ``extraction`` trains nothing. ``ratio`` is ours over dense, in images/s.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from .common import in_subprocess, peak_memory, read_options, report, set_l0

SIDES = ("ours", "dense", "extraction")
TARGETS = {"images per second on one H200": 2500}
WARM_UP = 2


class Resident:
    """Tokens of images that lie in memory, computed as they are asked for; notes when each batch was wanted."""

    fingerprint = "resident"

    def __init__(self, clip, images: torch.Tensor, layer: int):
        self.clip, self.images, self.layer, self.d_in = clip, images, clip.layer_index(layer), clip.width
        self.asked: list[float] = []
        self.metadata = SimpleNamespace(
            model_name=clip.name, weights_hash="", layer=self.layer, tokens="all", grid=clip.grid, preprocessing="", dataset="synthetic",
            split="train", seed=0, n_images=len(images),
        )  # fmt: skip

    def tokens(self, batch_size: int, *, seed: int, epochs: int | None, start_step: int, positions: bool):
        """The same images again and again: what they show makes no difference to the time."""
        places = torch.arange(self.clip.n_tokens, device=self.images.device).repeat(len(self.images))
        while True:
            if self.images.device.type == "cuda":
                torch.cuda.synchronize()
            self.asked.append(time.perf_counter())
            with torch.no_grad():
                x = self.clip.residual(self.images, self.layer).flatten(0, 1)
            yield x, places


def measure(side: str, settings: dict) -> dict:
    """Images and tokens a second, and memory, of one side in this process."""
    from patchsae_utils.clip.loading import load_clip
    from patchsae_utils.config import TrainConfig
    from patchsae_utils.sae.model import SparseAutoencoder
    from patchsae_utils.sae.trainer import train_sae, training_log

    logging.disable(logging.WARNING)  # random weights are meant
    device = settings["device"]
    torch.backends.cuda.matmul.allow_tf32 = True  # the dense side's float32 on a GPU
    clip = load_clip(settings["model"], settings["pretrained"], device=device, precision="bf16")
    images = torch.randn(settings["images"], 3, *clip.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    source = Resident(clip, images, settings["layer"])
    batch, n_steps = len(images) * clip.n_tokens, WARM_UP + settings["steps"]
    l0 = None
    if side == "extraction":
        stream = source.tokens(batch, seed=0, epochs=None, start_step=0, positions=True)
        for _ in range(n_steps + 1):
            next(stream)
    else:
        sae = SparseAutoencoder(clip.width, settings["d_sae"])
        set_l0(sae, next(source.tokens(batch, seed=0, epochs=None, start_step=0, positions=True))[0].cpu(), settings["l0"])
        source.asked.clear()
        config = TrainConfig(
            n_tokens=(n_steps + 1) * batch, batch_tokens=batch, lr=1e-9, warmup_steps=0, b_dec_start="zero", log_every=10**6,
            checkpoint_every=10**6, precision="bfloat16" if side == "ours" else "float32", sparse="always" if side == "ours" else "never",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train_sae(sae.to(device), source, config, folder, progress=False)
            l0 = float(training_log(folder)["l0"].iloc[-1])
    steps = sorted(b - a for a, b in zip(source.asked[WARM_UP:], source.asked[WARM_UP + 1 :], strict=False))
    best, median = steps[0], steps[len(steps) // 2]
    return {
        "seconds": best, "median_seconds": median, "images_per_second": len(images) / best, "tokens_per_second": batch / best, "l0": l0,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict | None:
    """Run the benchmark; see the module's docstring. ``images`` are those of a batch, ``steps`` those timed, after two to warm up."""
    images, steps = (256, 20) if torch.cuda.is_available() else (8, 5)
    settings = read_options(
        __doc__, arguments, measure, model="ViT-B-16", pretrained="random", layer=-2, images=images, steps=steps, d_sae=49_152, l0=150
    )
    if settings is None:
        return None
    rows = []
    for side in SIDES:
        about = {name: settings[name] for name in ("images", "d_sae")}
        row = {"side": side} | about | in_subprocess("benchmarks.end_to_end", side, settings)
        if "error" in row:
            raise SystemExit(f"{side} failed: {row['error']}")
        rows.append(row)
        print(f"{side:<10} {row['images_per_second']:.1f} images/s, {row['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    ours, dense, extraction = rows
    ratio = ours["images_per_second"] / dense["images_per_second"]
    more = {"model": settings["model"], "layer": settings["layer"], "targets": TARGETS, "command": "python -m benchmarks.end_to_end"}
    return report("end_to_end", rows, ratio, path=settings["json"], extraction_share=extraction["seconds"] / ours["seconds"], **more)


if __name__ == "__main__":
    main()
