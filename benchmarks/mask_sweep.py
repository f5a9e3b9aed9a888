"""A sweep of masks over many k: ours (one pass up to the hook, sparse edits, the class token's tail) against the whole model per mask.

    python -m benchmarks.mask_sweep [--images 4] [--model ViT-B-16] [--d-sae 49152] [--threads 2] [--json PATH]

Both sides run here, on the same images, weights and masks, and their logits must agree. Weights are random; the encoder's bias is set so
that as many latents are active as in the paper's SAE (about 149 a token). The whole-model side is what a hook does: for each mask it
runs the network to the hook, encodes, multiplies by the mask, decodes, adds the error term, and finishes the network. Its zero-shot head
is made once, outside the clock; so is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from patchsae_utils.clip.loading import load_clip
from patchsae_utils.data import batches
from patchsae_utils.interventions import sweep_masks
from patchsae_utils.sae.model import SparseAutoencoder

from .common import noise, read_options, report, set_l0

KS = (1, 2, 5, 10, 50, 100, 500, 1000, 2000, 10_000)  # latents, as in the paper's figure; on and off make twenty masks
LAYER = -2


class Setting:
    """Model, SAE, pictures and rankings of a comparison, and its two sides."""

    @torch.no_grad()
    def __init__(self, model: str, d_sae: int, n_images: int, l0: int, batch_size: int, n_classes: int = 100):
        self.clip, self.batch_size = load_clip(model, pretrained=None if model == "openmoji" else "random"), batch_size
        self.dataset = noise(n_images, n_classes, self.clip.image_size)
        generator = torch.Generator().manual_seed(0)
        self.head = F.normalize(torch.randn(n_classes, self.clip.d_embed, generator=generator), dim=1).to(self.clip.device)
        self.images = torch.stack([self.clip.preprocess(self.dataset[i].image) for i in range(min(2, n_images))])
        residual = self.clip.residual(self.images, LAYER)
        self.sae = SparseAutoencoder(self.clip.width, d_sae, seed=0).to(self.clip.device).requires_grad_(False)
        set_l0(self.sae, residual[0], min(l0, d_sae // 2))
        active = self.sae.encode(residual) > 0
        self.l0 = float(active.float().sum(-1).mean())
        # Latents that are active somewhere rank first, as they do when counted, so that the masks change something.
        self.counts = torch.rand(n_classes, d_sae, generator=generator) + active.sum((0, 1)).cpu()

    def ours(self):
        """The table of the sweep."""
        return sweep_masks(
            self.clip, self.sae, self.dataset, [min(k, self.sae.d_sae) for k in KS], "oracle", True, LAYER,
            class_counts=self.counts, head=self.head, batch_size=self.batch_size,
        )  # fmt: skip

    @torch.no_grad()
    def whole(self) -> dict[tuple[str, int], float]:
        """Mean true-class logit of every mask (mode, k), each from a whole run of the model."""
        clip, sae, found = self.clip, self.sae, {}
        order = self.counts.argsort(dim=1, descending=True, stable=True)
        for batch in batches(self.dataset, clip.preprocess, self.batch_size):
            labels = batch.labels.to(clip.device)
            for mode, k in [("raw", 0), ("reconstructed", 0), ("error_kept", 0), *((mode, k) for k in KS for mode in ("on", "off"))]:
                z = clip.residual(batch.images, LAYER)
                if mode != "raw":
                    h = sae.encode(z)
                    error = z - sae.decode(h)
                    if mode in ("on", "off"):
                        chosen = order[batch.labels, :k].to(z.device)
                        top = torch.zeros(len(z), sae.d_sae, device=z.device).scatter_(1, chosen, 1.0)[:, None]
                        h = h * (top if mode == "on" else 1 - top)
                    z = sae.decode(h) + (0 if mode == "reconstructed" else error)
                logits = clip.logits(clip.finish(z, LAYER), self.head).gather(1, labels[:, None])[:, 0]
                found[mode, k] = found.get((mode, k), 0.0) + float(logits.double().sum()) / len(self.dataset)
        return found


def compare(setting: Setting) -> tuple[list[dict[str, Any]], float, dict[str, Any]]:
    """Run both sides; rows for the report, the ratio of their times, and how far their results lie apart."""
    clip, d_sae, n_images = setting.clip, setting.sae.d_sae, len(setting.dataset)
    clip.encode_image(setting.images)  # threads and memory pools are there before the clock starts
    table, our_times = _timed(setting.ours)
    logits, their_times = _timed(setting.whole)
    found = table.set_index(["mode", "k"])["logit"]
    gap = max(abs(value - found[mode, min(k, d_sae)]) for (mode, k), value in logits.items())
    if gap > 2e-3:
        raise RuntimeError(f"The two sides disagree: their mean true-class logits lie up to {gap:.2g} apart.")
    rows = [
        {"side": side, "seconds": wall, "cpu_seconds": cpu, "ms_per_mask_and_image": 1000 * wall / (len(logits) * n_images)}
        for side, (wall, cpu) in (("ours", our_times), ("whole model per mask", their_times))
    ]
    about = {"model": clip.name, "d_sae": d_sae, "n_images": n_images, "n_masks": len(logits), "ks": list(KS), "l0": setting.l0}
    about |= {"largest_logit_gap": gap, "logit_range_over_masks": float(found.max() - found.min())}
    return rows, their_times[0] / our_times[0], about | {"ratio_cpu_seconds": their_times[1] / our_times[1]}


def _timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What it gives, and its (wall, CPU) seconds: on a busy machine the second is the steadier one. Both sides end with numbers on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see the module's docstring."""
    options = read_options(__doc__, arguments, model="ViT-B-16", d_sae=49_152, images=4, batch_size=4, l0=149)
    assert options is not None
    sizes = [options[name] for name in ("d_sae", "images", "l0", "batch_size")]
    rows, ratio, about = compare(Setting(options["model"], *sizes))
    report("mask_sweep", rows, ratio, target=20, path=options["json"], **about)


if __name__ == "__main__":
    main()
