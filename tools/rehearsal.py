"""Everything a trial of one's own images needs, without a network: a folder of pictures in eight forms, and a CLIP of random weights.

    python tools/rehearsal.py /tmp/rehearsal                     # 240 pictures, and ViT-B-16 (600 MB)
    python tools/rehearsal.py /tmp/rehearsal --model ViT-B-32    # or another architecture of open_clip

It prints the commands that go on from there. Random weights say nothing about pictures: this shows that a machine, a disk and an
installation carry a run from end to end, before weights and data are fetched.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from patchsae_utils.data import load_dataset

N_CLASSES, SIDE = 6, 160
KINDS = ("png", "jpg", "webp", "bmp", "gif", "tiff", "16-bit png", "cmyk jpg", "gray jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--model", default="ViT-B-16", help="an architecture of open_clip, random weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_pictures(options.out / "pictures", options.images, options.seed)
    write_model(options.out / "clip", options.model, options.seed)
    print(
        f"export PATCHSAE_IMAGES={options.out / 'pictures'}\n"
        f'export PATCHSAE_SET="name=rehearsal; model.name={options.out / "clip"}; model.pretrained=none; sae.expansion_factor=2; '
        "data.n_train_images=40; data.n_statistics_images=24; data.n_evaluation_images=12; training.n_tokens=16000; "
        'training.warmup_steps=5; adapters.n_shots=1; adapters.epochs=1"\n'
        "python -m patchsae_utils train --profile imagefolder          # or extract, summarize, sweep, adapt\n"
        "python -m patchsae_utils.reproduce --profile imagefolder      # the six notebooks"
    )


def write_pictures(folder: Path, n_images: int, seed: int) -> None:
    """Scenes of the embedded world as ``<class>/<image>``, the kinds of files in turn."""
    scenes = load_dataset("openmoji/animals", "train", n_images=n_images * 10, seed=seed)
    wanted = [i for i in range(len(scenes)) if scenes.labels[i] < N_CLASSES][:n_images]
    for number, index in enumerate(wanted):
        image, label, _ = scenes[index]
        kind = KINDS[(number // N_CLASSES + label) % len(KINDS)]
        path = folder / scenes.class_names[label].replace(" ", "_") / f"{number:04d}.{kind.split()[-1]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _in_form(image.resize((SIDE + number % 60, SIDE)), kind).save(path)
    print(f"{len(wanted)} pictures of {N_CLASSES} classes and {len(KINDS)} kinds in {folder}")


def _in_form(image: Image.Image, kind: str) -> Image.Image:
    if kind == "16-bit png":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if kind.startswith(("cmyk", "gray")):
        return image.convert("CMYK" if kind.startswith("cmyk") else "L")
    return image


def write_model(folder: Path, name: str, seed: int) -> None:
    """An architecture of open_clip with random weights, in the form that ``model.name`` takes."""
    torch.manual_seed(seed)
    model, config = open_clip.create_model(name, pretrained=None), open_clip.get_model_config(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    print(f"{name} of random weights in {folder}")


if __name__ == "__main__":
    main()
