"""A run of one's own images, rehearsed without a network: ViT-B/16 of random weights and synthetic JPEGs through all stages and notebooks.

    python tools/rehearsal.py /tmp/rehearsal                                   # 2,000 pictures of 500 classes: hours on two cores
    python tools/rehearsal.py /tmp/rehearsal --images 300 --classes 100        # half an hour

Pictures, weights, a profile, what each command printed (``log.txt``) and what it took (``rehearsal.json``) lie in the folder; artifacts, notebooks
and figures in runs/rehearsal of the repository. Given again, it goes on where it stopped. Random weights say nothing about pictures: this shows
that a machine, a disk and an installation carry a run from end to end, before weights and data are fetched, and what each stage costs there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
SIDE = 256
COLORS = "amber azure beige black blue bronze brown copper coral crimson golden gray green indigo ivory olive orange pink purple red silver teal violet white yellow"
THINGS = "anchor basket bridge candle compass feather fountain harbour hammer kettle ladder lantern mirror orchard paddle pillow ribbon saddle tunnel wheel"
PROFILE = """\
name = "rehearsal"
[model]
name = "{out}/clip"
[data]
train = "{out}/pictures"
statistics = "{out}/pictures"
evaluation = "{out}/pictures"
tasks = ["{out}/pictures"]
n_train_images = {fifth}
n_statistics_images = {fifth}
n_evaluation_images = {tenth}
[sae]
expansion_factor = {expansion}
activation = "topk"
k = 32
[training]
n_tokens = {tokens}
start = "kmeans"
normalize = "token_norm"
batch_tokens = 1024
warmup_steps = 5
schedule = "linear"
dead_after_tokens = 8192
ghost = false
restart_dead = true
precision = "bfloat16"
[adapters]
tasks = ["{out}/pictures"]
n_shots = 1
epochs = 1
batch_size = 25
"""
STAGES = {name: ["patchsae_utils", name] for name in ("extract", "train", "summarize", "sweep", "adapt")}
NEED_LABELS = ("sweep", "adapt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=500, help="at most 500, and three images each; 0: pictures without labels")
    parser.add_argument("--model", default="ViT-B-16", help="an architecture of open_clip (default: %(default)s)")
    parser.add_argument("--expansion", type=int, default=8, help="latents, times the model's width")
    options = parser.parse_args()
    out = options.out.resolve()
    write_pictures(out / "pictures", options.images, options.classes)
    write_model(out / "clip", options.model)
    fifth, tenth = max(1, options.images // 5), max(1, options.images // 10)
    sizes = {"fifth": fifth, "tenth": tenth, "tokens": 197 * fifth, "expansion": options.expansion}
    (out / "rehearsal.toml").write_text(PROFILE.format(out=out.as_posix(), **sizes))
    notebooks = {path.stem: ["patchsae_utils.reproduce", "--only", path.stem] for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))}
    stages = {name: command for name, command in STAGES.items() if options.classes or name not in NEED_LABELS}
    rows = [measure(what, command, out) for what, command in (stages | notebooks).items()]
    took = sum(row["seconds"] for row in rows)
    (out / "rehearsal.json").write_text(json.dumps({**vars(options), "cores": os.cpu_count(), "steps": rows}, indent=1, default=str))
    failed = [row["step"] for row in rows if row["status"]]
    print(
        f"{'in all':<28} {took:8.0f} s  {max(row['peak_gb'] for row in rows):6.1f} GB"
        + (f"\nfailed: {', '.join(failed)}" if failed else "")
    )
    return bool(failed)


def measure(what: str, command: list[str], out: Path) -> dict:
    """Run a command with the profile; what it took, and the most memory that it or a process of its own held. A failure doesn't stop the others."""
    start = time.perf_counter()
    with open(out / "log.txt", "a") as log:
        arguments = [sys.executable, "-m", *command, "--profile", str(out / "rehearsal.toml")]
        process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    row = {"step": what, "seconds": time.perf_counter() - start, "peak_gb": peak, "status": os.waitstatus_to_exitcode(status)}
    print(f"{what:<28} {row['seconds']:8.0f} s  {peak:6.1f} GB{'  failed: see log.txt' if row['status'] else ''}", flush=True)
    return row


def write_pictures(folder: Path, n_images: int, n_classes: int) -> None:
    """JPEGs of coarse colours, alike within a class, as ``<class>/<image>``; those that lie there stay."""
    names = [f"{color}_{thing}" for thing in THINGS.split() for color in COLORS.split()][:n_classes] or ["."]
    for number in range(n_images):
        path = folder / names[number % len(names)] / f"{number:05d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        of_class, own = (np.random.default_rng(seed).integers(0, 256, (7, 7, 3)) for seed in (number % len(names), 10_000 + number))
        coarse = Image.fromarray((0.7 * of_class + 0.3 * own).astype(np.uint8))
        coarse.resize((SIDE + number % 60, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
    print(f"{n_images} pictures of {len(names)} classes in {folder}", flush=True)


def write_model(folder: Path, name: str) -> None:
    """An architecture of open_clip with random weights, in the form that ``model.name`` takes."""
    if (config_path := folder / "open_clip_config.json").exists():
        return
    torch.manual_seed(0)
    model, config = open_clip.create_model(name, pretrained=None), open_clip.get_model_config(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config_path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    print(f"{name} of random weights in {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
