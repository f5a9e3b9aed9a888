"""Statistics of every latent in one pass: peak memory and images per second.

Random pictures, weights and 49,152 latents, about 150 a token active, at batch 128; the textbook way (the whole batch, every image's
activations, sorted at the end) at a size where it fits, beside ours; and 5,000 scenes of the default profile with its own SAE. Each side has
a process of its own: ``peak_bytes`` is that of the whole process, ``added_bytes`` what it needed beyond libraries and models.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.common import in_subprocess, noise, peak_memory, read_options, report, set_l0

MEMORY_LIMIT = 4e9  # bytes: the target at batch 128 and 49,152 latents
SCENES_LIMIT = 180.0  # seconds: the target for 5,000 scenes of the default profile on two CPU cores


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark; ``small_...``: where the textbook way fits; ``scenes`` of the default profile, 0 leaves that row out."""
    options = read_options(
        __doc__, arguments, lambda side, settings: SIDES[side](settings), model="ViT-B-16", d_sae=49_152, batch=128, images=128, classes=1000,
        small_d_sae=12_288, small_batch=64, small_images=64, scenes=5000, l0=150,
    )  # fmt: skip
    if options is None:
        return None
    sizes = ("d_sae", "batch", "images")
    small = options | {name: options[f"small_{name}"] for name in sizes}
    rows = []
    for side, settings in (("ours", options), ("ours", small), ("textbook", small)):
        rows.append({"side": side, **{name: settings[name] for name in sizes}, **in_subprocess("benchmarks.summary", side, settings)})
    if options["scenes"]:
        rows.append({"side": "scenes", **in_subprocess("benchmarks.summary", "scenes", options | {"images": options["scenes"]})})
    ours, textbook = rows[1], rows[2]
    added = [row.get("added_bytes", 0) for row in (textbook, ours)]
    ratio = added[0] / added[1] if min(added) > 0 else None
    return report(
        "summary", rows, ratio, path=options["json"], ratio_of="memory above that of libraries and models, textbook to ours, at the small size", model=options["model"],
        memory_limit_bytes=MEMORY_LIMIT, within_limit="peak_bytes" in rows[0] and rows[0]["peak_bytes"] < MEMORY_LIMIT,
        scenes_limit_seconds=SCENES_LIMIT, scenes_within_limit=options["scenes"] and rows[-1]["seconds"] * 5000 / options["scenes"] < SCENES_LIMIT,
    )  # fmt: skip


def world(settings: dict[str, Any]):
    """A CLIP and an SAE of random weights, and a data set of random pictures."""
    from patchsae_utils.clip.loading import load_clip
    from patchsae_utils.sae.model import SparseAutoencoder

    torch.manual_seed(0)
    clip = load_clip(settings["model"], "random", device=settings["device"])
    sae = SparseAutoencoder(clip.width, settings["d_sae"]).requires_grad_(False).to(settings["device"])
    data = noise(settings["images"], settings["classes"], clip.image_size)
    set_l0(sae, clip.residual(clip.preprocess(data[0].image)[None], -2)[0], settings["l0"])
    return clip, sae, data


def _measured(run, settings: dict[str, Any]) -> dict[str, Any]:
    before = peak_memory(settings["device"])  # libraries and models
    start = time.perf_counter()
    run()
    if settings["device"] != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = peak_memory(settings["device"])
    return {"seconds": seconds, "images_per_second": settings["images"] / seconds, "peak_bytes": peak, "added_bytes": peak - before}


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """``summarize_latents``."""
    from patchsae_utils.latents import summarize_latents

    clip, sae, data = world(settings)
    return _measured(lambda: summarize_latents(clip, sae, data, -2, batch_size=settings["batch"], progress=False), settings)


def scenes(settings: dict[str, Any]) -> dict[str, Any]:
    """``summarize_latents`` on the embedded world, with the SAE of notebook 02."""
    from patchsae_utils import stages
    from patchsae_utils.config import DEFAULT_PROFILE, load_profile
    from patchsae_utils.data import load_dataset
    from patchsae_utils.latents import summarize_latents

    profile = load_profile(DEFAULT_PROFILE)
    clip, layer = stages.load_world(profile)
    sae = stages.trained_sae(profile, clip)
    data = load_dataset(profile.data.statistics, "train", n_images=settings["images"])
    data[0]  # the artwork is rasterised once
    measured = _measured(lambda: summarize_latents(clip, sae, data, layer, progress=False), settings)
    return {"d_sae": sae.d_sae, "images": settings["images"], **measured}


def textbook(settings: dict[str, Any]) -> dict[str, Any]:
    """The whole batch's latents at once; every image's activations kept and sorted at the end."""
    from patchsae_utils.data import batches
    from patchsae_utils.latents.measures import label_entropy, label_std

    clip, sae, data = world(settings)

    @torch.no_grad()
    def run():
        means, counts = [], []
        for batch in batches(data, clip.preprocess, settings["batch"]):
            h = sae.encode(clip.residual(batch.images, -2))
            means.append(h.mean(1))
            counts.append((h > 0.2).sum(1))
        means, counts = torch.cat(means), torch.cat(counts).float()
        values, images = means.sort(0, descending=True)
        labels = data.labels.to(means.device)
        values, top_labels = values[:10].T, labels[images[:10]].T
        one_hot = torch.zeros(settings["classes"], len(means), device=means.device)
        one_hot[labels, torch.arange(len(means), device=means.device)] = 1
        active = (means > 0).float()
        return (
            active.mean(0), means.sum(0) / active.sum(0), label_entropy(values, top_labels, settings["classes"]),
            label_std(values, top_labels), one_hot @ counts, one_hot @ active,
        )  # fmt: skip

    return _measured(run, settings)


SIDES = {"ours": ours, "textbook": textbook, "scenes": scenes}

if __name__ == "__main__":
    main()
