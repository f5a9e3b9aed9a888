"""Pictures from outside: folders, Hugging Face data sets, torchvision's sets. Each reader returns (class names, labels, opener)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image, ImageOps

Opened = tuple[list[str], list[int], Callable[[int], Image.Image]]

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test", "val", "valid", "validation")}
SPLIT_SHARES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}  # where a folder has no split of its own


def folder(root: Path, split: str, seed: int = 0) -> Opened:
    """``<root>/<split>/<class>/<image>``, or ``<root>/<class>/<image>``, then split 80/10/10 within each class with ``seed``.

    Raises
    ------
    FileNotFoundError
        If the folder is missing, or holds no class folders with images.
    ValueError
        For an unknown split.
    """
    _check_split(split)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(root)!r}. Expected {root}/train/<class>/<image> and {root}/val/<class>/<image>, or {root}/<class>/<image>; "
            f"give its path as data.train, data.statistics and data.evaluation of the profile. Other specs: openmoji/<task>, hf:<repo>, torchvision:<Name>."
        )
    own = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
    base = own or root
    if own is None and (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root} has a folder 'train' but none for split {split!r}: expected one of {', '.join(SPLIT_FOLDERS[split])}."
        )
    endings = set(Image.registered_extensions())
    classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (base / name).iterdir() if p.suffix.lower() in endings)
        if own is None:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
            low, high = (round(share * len(files)) for share in SPLIT_SHARES[split])
            files = [files[i] for i in sorted(order[low:high])]
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise FileNotFoundError(
            f"{base} holds no images for split {split!r}: expected {base}/<class>/<image> with endings such as .jpg, .png, .webp."
        )
    return _readable(classes), labels, lambda i: open_image(paths[i])


def open_image(path: Path) -> Image.Image:
    """A picture from disk as RGB: turned as its camera says (EXIF), the first frame of an animation, 16 bits a channel scaled to 8.

    Raises
    ------
    ValueError
        If it can't be read, naming the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # convert would cut off all above 255
                values = np.asarray(image).astype(np.float32)
                image = Image.fromarray((values * (255 / 65535)).clip(0, 255).round().astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size if path.exists() else 0:,} bytes) can't be read as an image: {error}. Replace it or take it away; "
            "what was computed before it is kept."
        ) from error


def hugging_face(repository: str, split: str) -> Opened:
    """A map-style image data set of the hub, with one image and one class-label column.

    Raises
    ------
    ImportError
        If the package ``datasets`` is missing.
    ValueError
        If there is no such split, or the columns can't be told.
    """
    _check_split(split)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hf:{repository} needs the package `datasets`: pip install datasets.") from error
    splits = datasets.get_dataset_split_names(repository)
    chosen = next((name for name in SPLIT_FOLDERS[split] if name in splits), None)
    if chosen is None:
        raise ValueError(f"hf:{repository} has no split {split!r}; it has {', '.join(splits)}.")
    data = datasets.load_dataset(repository, split=chosen)
    image = next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"hf:{repository} needs an Image and a ClassLabel column; it has {dict(data.features)}.")
    return list(data.features[label].names), list(data[label]), lambda i: data[i][image]


def torchvision_set(name: str, split: str) -> Opened:
    """One of torchvision's classification sets, kept under ``$PATCHSAE_DATA`` (default ``~/.cache/patchsae_utils/data``), downloaded when it can be.

    Raises
    ------
    ValueError
        For a name that torchvision doesn't have.
    """
    _check_split(split)
    sets = torchvision.datasets
    if not inspect.isclass(getattr(sets, name, None)):
        raise ValueError(
            f"torchvision has no data set {name!r}. Valid: {', '.join(n for n in sets.__all__ if inspect.isclass(getattr(sets, n)))}."
        )
    kind = getattr(sets, name)
    accepted = inspect.signature(kind).parameters
    options = {"root": os.environ.get("PATCHSAE_DATA") or str(Path.home() / ".cache" / "patchsae_utils" / "data")}
    if "download" in accepted:
        options["download"] = True
    if "split" in accepted:
        options["split"] = {"OxfordIIITPet": {"train": "trainval", "val": "test"}}.get(name, {}).get(split, split)
        if name in ("StanfordCars", "Food101", "OxfordIIITPet") and split == "val":
            options["split"] = "test"
    elif "train" in accepted:
        options["train"] = split == "train"
    data = kind(**options)
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    if names is None:
        names = [str(i) for i in range(1 + max(int(data[i][1]) for i in range(len(data))))]
    labels = next((list(getattr(data, key)) for key in ("targets", "_labels", "labels", "y") if hasattr(data, key)), None)
    if labels is None:
        labels = [int(data[i][1]) for i in range(len(data))]
    return _readable([str(n).replace("_", " ") for n in names]), labels, lambda i: data[i][0]


def _readable(classes: list[str]) -> list[str]:
    """ImageNet's folders are WordNet ids (n01440764): say CLIP's names for them, in the same order."""
    if len(classes) == 1000 and all(name.startswith("n") and name[1:].isdigit() for name in classes):
        return list(IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in classes]


def _check_split(split: str) -> None:
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"Unknown split {split!r}. Valid: {', '.join(SPLIT_FOLDERS)}.")
