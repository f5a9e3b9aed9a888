"""A sweep of masks over many k: ours (one pass up to the hook, sparse edits, the class token's tail) against the whole model per mask.

    python -m benchmarks.mask_sweep [--images 4] [--model ViT-B-16] [--d-sae 49152] [--threads 2] [--memory] [--json PATH]

Both sides run here, on the same images, weights and masks, and their logits must agree. Weights are random; the encoder's bias is set so
that as many latents are active as in the paper's SAE (about 149 a token). The whole-model side is what a hook does: for each mask it
runs the network to the hook, encodes, multiplies by the mask, decodes, adds the error term, and finishes the network. Its zero-shot head
is made once, outside the clock; so is ours. ``--memory`` also runs each side in a process of its own and reports the most memory it held.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchsae_utils.clip.loading import load_clip
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.data import Example, batches
from patchsae_utils.interventions import sweep_masks
from patchsae_utils.sae.model import SparseAutoencoder

from .common import in_subprocess, peak_memory, report

KS = (1, 2, 5, 10, 50, 100, 500, 1000, 2000, 10_000)
"""Ten numbers of latents, as in the paper's figure; on and off make twenty masks."""


class Noise:
    """Pictures of noise with labels; drawn when asked for, the same each time."""

    spec, split, name = "noise", "test", "noise"

    def __init__(self, n_images: int, n_classes: int, size: int):
        self.labels, self.size = torch.arange(n_images) % n_classes, size
        self.class_names = [f"class {i}" for i in range(n_classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures; there is no index {index}.")
        coarse = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        return Example(Image.fromarray(coarse).resize((self.size, self.size)), int(self.labels[index]), index)


def sparse_sae(clip: ClipModel, d_sae: int, images: Tensor, l0: int, layer: int) -> SparseAutoencoder:
    """An SAE of random weights on which about ``l0`` latents are active a token."""
    sae = SparseAutoencoder(clip.width, d_sae, seed=0).to(clip.device).requires_grad_(False)
    tokens = clip.residual(images[:1], layer).flatten(0, 1)
    sae.b_dec.copy_(tokens.mean(0))
    pre = sae.pre_activations(tokens)
    sae.b_enc.fill_(-float(pre.flatten().kthvalue(pre.numel() - l0 * len(tokens)).values))
    return sae


@torch.no_grad()
def whole_model(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Noise, counts: Tensor, head: Tensor, layer: int, batch_size: int, ks: Sequence[int]
) -> dict:
    """True-class logits [n_images] of every mask, each from a whole run of the model; keys (mode, k)."""
    order = counts.argsort(dim=1, descending=True, stable=True)
    found: dict[tuple[str, int], list[Tensor]] = {}
    for batch in batches(dataset, clip.preprocess, batch_size):
        labels = batch.labels.to(clip.device)
        for mode, k in [("raw", 0), ("reconstructed", 0), ("error_kept", 0), *((mode, k) for k in ks for mode in ("on", "off"))]:
            z = clip.residual(batch.images, layer)
            if mode != "raw":
                h = sae.encode(z)
                error = z - sae.decode(h)
                if mode in ("on", "off"):
                    top = torch.zeros(len(z), sae.d_sae, device=z.device).scatter_(1, order[batch.labels, :k].to(z.device), 1.0)[:, None]
                    h = h * (top if mode == "on" else 1 - top)
                z = sae.decode(h) + (0 if mode == "reconstructed" else error)
            logits = clip.logits(clip.finish(z, layer), head)
            found.setdefault((mode, k), []).append(logits.gather(1, labels[:, None])[:, 0].cpu())
    return {key: torch.cat(parts) for key, parts in found.items()}


class Setting:
    """Model, SAE, pictures and rankings of a comparison, and its two sides."""

    def __init__(self, model: str, d_sae: int, n_images: int, l0: int, batch_size: int, n_classes: int = 100):
        self.clip, self.layer, self.batch_size = load_clip(model, pretrained=None if model == "openmoji" else "random"), -2, batch_size
        self.dataset = Noise(n_images, n_classes, self.clip.image_size[0])
        generator = torch.Generator().manual_seed(0)
        self.head = F.normalize(torch.randn(n_classes, self.clip.d_embed, generator=generator), dim=1).to(self.clip.device)
        self.images = torch.stack([self.clip.preprocess(self.dataset[i].image) for i in range(min(2, n_images))])
        self.sae = sparse_sae(self.clip, d_sae, self.images, min(l0, d_sae // 2), self.layer)
        active = self.sae.encode(self.clip.residual(self.images, self.layer)) > 0
        self.l0 = float(active.float().sum(-1).mean())
        # Latents that are active somewhere rank first, as they do when counted, so that the masks change something.
        self.counts = torch.rand(n_classes, d_sae, generator=generator) + active.sum((0, 1)).cpu()

    def ours(self):
        """The table of the sweep."""
        return sweep_masks(
            self.clip, self.sae, self.dataset, [min(k, self.sae.d_sae) for k in KS], choose="oracle", keep_error=True, layer=self.layer,
            class_counts=self.counts, head=self.head, batch_size=self.batch_size,
        )  # fmt: skip

    def whole(self, ks: Sequence[int] = KS) -> dict:
        """True-class logits of every mask."""
        return whole_model(self.clip, self.sae, self.dataset, self.counts, self.head, self.layer, self.batch_size, ks)


def compare(setting: Setting) -> tuple[list[dict], float, dict]:
    """Run both sides; rows for the report, the ratio of their times, and how far their results lie apart."""
    clip, d_sae, n_images = setting.clip, setting.sae.d_sae, len(setting.dataset)
    clip.encode_image(setting.images)  # threads and memory pools are there before the clock starts
    table, our_times = _timed(setting.ours, clip)
    logits, their_times = _timed(setting.whole, clip)
    found = table.set_index(["mode", "k"])["logit"]
    gap = max(abs(float(values.double().mean()) - found[mode, min(k, d_sae)]) for (mode, k), values in logits.items())
    spread = float(found.max() - found.min())
    if gap > 2e-3:
        raise RuntimeError(f"The two sides disagree: their mean true-class logits lie up to {gap:.2g} apart.")
    n_masks = len(logits)
    rows = [
        {"side": side, "seconds": wall, "cpu_seconds": cpu, "ms_per_mask_and_image": 1000 * wall / (n_masks * n_images)}
        for side, (wall, cpu) in (("ours", our_times), ("whole model per mask", their_times))
    ]
    about = {
        "model": clip.name,
        "d_sae": d_sae,
        "n_images": n_images,
        "n_masks": n_masks,
        "ks": list(KS),
        "l0": setting.l0,
        "largest_logit_gap": gap,
        "logit_range_over_masks": spread,
        "ratio_cpu_seconds": their_times[1] / our_times[1],
    }
    return rows, their_times[0] / our_times[0], about


def _timed(run, clip: ClipModel):
    """What it gives, and its (wall, CPU) seconds: on a busy machine the second is the steadier one."""
    if clip.device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if clip.device.type == "cuda":
        torch.cuda.synchronize()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--d-sae", type=int, default=49_152)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--l0", type=int, default=149)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--memory", action="store_true", help="also measure each side's memory, in a process of its own")
    parser.add_argument("--side", choices=("ours", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="PATH", help="also write the report here")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.side:
        setting = Setting(**json.loads(options.settings))
        setting.ours() if options.side == "ours" else setting.whole(KS[:1])  # the first mask holds as much as the others
        print(json.dumps({"peak_bytes": peak_memory(setting.clip.device.type)}))
        return
    settings = {
        "model": options.model,
        "d_sae": options.d_sae,
        "n_images": options.images,
        "l0": options.l0,
        "batch_size": options.batch_size,
    }
    rows, ratio, about = compare(Setting(**settings))
    if options.memory:
        for row, side in zip(rows, ("ours", "whole"), strict=True):
            row |= in_subprocess("benchmarks.mask_sweep", side, settings)
    report("mask_sweep", rows, ratio, target=20, path=options.json, **about)


if __name__ == "__main__":
    main()
