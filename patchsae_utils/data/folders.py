"""Pictures from a folder, and any of torchvision's sets. Each reader returns (class names, labels, opener)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from .pictures import ImageFiles, Rows, open_image
from .split_files import find_split_file, read_split_file

__all__ = ["Opened", "data_root", "folder", "open_image", "torchvision_set"]

Opened = tuple[list[str], list[int], Callable[[int], Image.Image]]

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test", "val", "valid", "validation")}
SPLIT_SHARES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}  # where a folder has no split of its own


def folder(root: Path, split: str, seed: int = 0) -> Opened:
    """``<root>/<split>/<class>/<image>``, or ``<root>/<class>/<image>``, then split 80/10/10 within each class with ``seed``.

    Where ``train`` is the only split that has a folder, it is split in the same way. A file ``split_zhou_*.json`` in the folder, as CoOp
    wrote them for its data sets, is followed instead.

    Raises
    ------
    FileNotFoundError
        If the folder is missing, holds no class folders with images, or has folders for other splits than this one.
    ValueError
        For an unknown split.
    """
    check_split(split)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(root)!r}. Expected {root}/train/<class>/<image> and {root}/val/<class>/<image>, or {root}/<class>/<image>; "
            f"give its path as data.train, data.statistics and data.evaluation of the profile. Other specs: openmoji/<task>, caltech101 and the rest "
            "of the paper's eleven, hf:<repo>, torchvision:<Name>."
        )
    if (split_file := find_split_file(root)) is not None:
        return read_split_file(split_file, split)
    own = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
    present = {name for names in SPLIT_FOLDERS.values() for name in names if (root / name).is_dir()}
    if own is None and present - {"train"}:
        raise FileNotFoundError(
            f"{root} has {' and '.join(sorted(present))} but no folder for split {split!r}: expected {' or '.join(SPLIT_FOLDERS[split])}."
        )
    made = own is None or present == {"train"}
    base = root / "train" if present == {"train"} else own or root
    endings = set(Image.registered_extensions())
    classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    names, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(entry.name for entry in os.scandir(base / name) if os.path.splitext(entry.name)[1].lower() in endings)
        if made:
            files = share(files, *SPLIT_SHARES[split], seed)
        names += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    if not names:
        raise FileNotFoundError(
            f"{base} holds no images for split {split!r}: expected {base}/<class>/<image> with endings such as .jpg, .png, .webp."
        )
    return readable(classes), labels, ImageFiles(base, names)


def share(items: Sequence, low: float, high: float, seed: int) -> list:
    """The part of a sequence between two shares of it, in an order drawn with ``seed``; given back in their first order."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in sorted(order[round(low * len(items)) : round(high * len(items))])]


def torchvision_set(name: str, split: str, root: str | os.PathLike | None = None) -> Opened:
    """One of torchvision's classification sets, downloaded when it can be.

    Parameters
    ----------
    name : str
        Of the class in ``torchvision.datasets``.
    split : str
    root : path, optional
        Default: :func:`data_root`.

    Raises
    ------
    ValueError
        For a name that torchvision doesn't have.
    FileNotFoundError
        If it is neither there nor to be downloaded; says where it was sought.
    """
    check_split(split)
    sets = torchvision.datasets
    if not inspect.isclass(getattr(sets, name, None)):
        raise ValueError(
            f"torchvision has no data set {name!r}. Valid: {', '.join(n for n in sets.__all__ if inspect.isclass(getattr(sets, n)))}."
        )
    accepted = inspect.signature(getattr(sets, name)).parameters
    options: dict[str, str | bool] = {}
    if "split" in accepted:
        options["split"] = split
    elif "train" in accepted:
        options["train"] = split == "train"
    data = opened_by_torchvision(name, Path(root or data_root()), options)
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    labels = next((list(getattr(data, key)) for key in ("targets", "_labels", "labels", "y") if hasattr(data, key)), None)
    if labels is None:
        labels = [int(data[i][1]) for i in range(len(data))]
    if names is None:
        names = [str(i) for i in range(1 + max(labels))]
    return readable([str(n) for n in names]), labels, Rows(f"torchvision:{name} ({split})", f"{name} {split} {len(labels)}", data, 0)


def opened_by_torchvision(name: str, root: Path, options: Mapping[str, str | bool]):
    """The object of ``torchvision.datasets``, downloaded when it is not there and can be."""
    kind = getattr(torchvision.datasets, name)
    try:
        try:
            return kind(root, **options)
        except (OSError, RuntimeError):
            if "download" not in inspect.signature(kind).parameters:
                raise
            return kind(root, **options, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"torchvision's {name} is not whole under {root} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}), and could not be downloaded. "
            f"Put it there as torchvision.datasets.{name} expects it, or name the folder that holds it: {name}?root=/data, or "
            "export PATCHSAE_DATA=/data."
        ) from error


def data_root() -> Path:
    """Where data sets lie that are called by name: ``$PATCHSAE_DATA``, else ``~/.cache/patchsae_utils/data``."""
    given = os.environ.get("PATCHSAE_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "patchsae_utils" / "data"


def readable(classes: Sequence[str]) -> list[str]:
    """ImageNet's folders are WordNet ids (n01440764): say CLIP's names for them, in the same order."""
    if len(classes) == 1000 and all(name.startswith("n") and name[1:].isdigit() for name in classes):
        return list(IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in classes]


def check_split(split: str) -> None:
    """Raise ``ValueError`` for an unknown split."""
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"Unknown split {split!r}. Valid: {', '.join(SPLIT_FOLDERS)}.")
