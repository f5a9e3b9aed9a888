"""Listings of folders of images, of CoOp's ``split_zhou_*.json`` beside images, and of any of torchvision's sets."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision

from ..run.artifacts import read_json
from .dataset import Listing
from .pictures import ImageFiles, Rows, is_picture
from .splits import SHARES, SPLITS, class_names, find_split

_NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # left by operating systems


def read_folder(root: Path, split: str, names: Callable[[Sequence[str]], list[str]] = class_names) -> Listing:
    """``<root>/<split>/<class>/<image>``, or ``<root>/<class>/<image>``; a file ``split_zhou_*.json`` in the folder is followed instead.

    ``names``: folders' names -> names of the classes. Classes are those of all splits together.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(root)!r}. Expected {root}/train/<class>/<image> and {root}/val/<class>/<image>, or {root}/<class>/<image>; "
            f"give its path as data.train, data.statistics and data.evaluation of the profile. Other specs: openmoji/<task>, caltech101 and the rest "
            "of the paper's eleven, hf:<repo>, torchvision:<Name>."
        )
    if (split_file := find_split_file(root)) is not None:
        return read_split_file(split_file, split)
    known = {name for names in SPLITS.values() for name in names}
    present = [name for name in _folders(root) if name.lower() in known] or ["."]
    parts, shared = find_split(split, present, str(root))
    part = next((name for name in parts if _folders(root / name)), parts[0])
    if part != parts[0]:
        warnings.warn(f"{root / parts[0]} has no class folders; {root / part} is read instead.", stacklevel=3)
    classes = sorted({name for each in present for name in _folders(root / each) if _is_class(root / each / name)})
    base, files, labels = root / part, [], []
    deeper: dict[str, int] = {}
    for label, name in enumerate(classes):
        found = sorted(os.scandir(base / name), key=lambda entry: entry.name) if (base / name).is_dir() else []
        pictures = [f"{name}/{entry.name}" for entry in found if is_picture(entry.name)]
        files += pictures
        labels += [label] * len(pictures)
        deeper |= {f"{name}/{entry.name}": _count(entry.path) for entry in found if entry.is_dir() and _is_visible(entry.name)}
    deeper["."] = sum(is_picture(entry.name) for entry in base.iterdir())
    others = [name for name, n in deeper.items() if n]
    said = (
        f"{sum(deeper.values()):,} images of {base} lie in no class folder or deeper than one ({', '.join(others[:3])})" if others else ""
    )
    if not files:
        raise FileNotFoundError(
            f"{base} holds no images for split {split!r}: expected {base}/<class>/<image> with endings such as .jpg, .png, .webp. {said}"
        )
    if others:
        warnings.warn(f"{said} and are left out; expected {base}/<class>/<image>, of which there are {len(files):,}.", stacklevel=3)
    return Listing(names(classes), labels, ImageFiles(base, files), SHARES if shared else None)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in _NO_CLASSES


def _folders(base: Path) -> list[str]:
    return [entry.name for entry in os.scandir(base) if entry.is_dir() and _is_visible(entry.name)]


def _is_class(folder: Path) -> bool:
    """Not so if it holds files and no picture: notes, annotations."""
    entries = [entry for entry in os.scandir(folder) if _is_visible(entry.name)]
    return not entries or any(is_picture(entry.name) or entry.is_dir() for entry in entries)


def _count(folder: str) -> int:
    """Pictures in a folder and all that it holds."""
    return sum(is_picture(name) for _, _, names in os.walk(folder) for name in names)


# -- CoOp's split files ----------------------------------------------------------------------------------------------------


def find_split_file(folder: Path) -> Path | None:
    """The folder's ``split_zhou_*.json``, if it has one."""
    found = sorted(folder.glob("split_zhou_*.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} files split_zhou_*.json ({', '.join(p.name for p in found)}); keep one.")
    return found[0] if found else None


def read_split_file(path: Path, split: str) -> Listing:
    """Which image is in which split, so that everybody measures on the same ones; of two classes of the same name both stay.

    A file holds ``{"train": [[path, label, class name], ...], "val": [...], "test": [...]}``; paths are relative to the folder of images that
    lies beside it. Source: Zhou et al., "Learning to prompt for vision-language models", IJCV 2022 (github.com/KaiyangZhou/CoOp, DATASETS.md).
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"train", "val", "test"} <= content.keys():
        raise ValueError(
            f"{path} must hold an object with train, val and test, as CoOp's files do. Take it away to have the folder split anew."
        )
    names: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for item in content[part]:
            if not (isinstance(item, list) and list(map(type, item)) == [str, int, str]):
                raise ValueError(f"{path}, {part}: expected [path, label, class name], got {item!r}.")
            if names.setdefault(item[1], item[2]) != item[2]:
                raise ValueError(f"{path}: class {item[1]} is called {names[item[1]]!r} and {item[2]!r}.")
    if sorted(names) != list(range(len(names))):
        missing = sorted(set(range(1 + max(names, default=0))) - names.keys())
        raise ValueError(f"{path}: classes must be numbered from 0 without gaps; there is none numbered {missing[:5]}.")
    if not content[split]:
        raise ValueError(f"{path} has no images for split {split!r}.")
    files, labels = [item[0] for item in content[split]], [item[1] for item in content[split]]
    candidates = [path.parent, *sorted(p for p in path.parent.iterdir() if p.is_dir())]  # such as images, jpg or 2750
    base = next((folder for folder in candidates if (folder / files[0]).exists()), None)
    if base is None:
        raise FileNotFoundError(
            f"{path} names the image {files[0]!r}, which is neither in {path.parent} nor in a folder of it "
            f"({', '.join(p.name for p in candidates[1:]) or 'there is none'}). Unpack the data set's images beside the file."
        )
    return Listing(class_names(names[i] for i in range(len(names))), labels, ImageFiles(base, files))


# -- torchvision -----------------------------------------------------------------------------------------------------------


def read_torchvision(name: str, split: str, root: str = "") -> Listing:
    """One of torchvision's classification sets, downloaded when it can be; ``root`` as for :func:`data_root`."""
    sets = torchvision.datasets
    if not inspect.isclass(getattr(sets, name, None)):
        valid = ", ".join(n for n in sets.__all__ if inspect.isclass(getattr(sets, n)))
        raise ValueError(f"torchvision has no data set {name!r}. Valid: {valid}.")
    accepted, place = inspect.signature(getattr(sets, name)).parameters, data_root(root)
    if "split" in accepted:
        data = _open_split(name, place, split)
    else:
        data = open_torchvision(name, place, {"train": split == "train"} if "train" in accepted else {})
    given = next((getattr(data, key) for key in ("targets", "_labels", "labels", "y") if hasattr(data, key)), None)
    labels = [int(data[i][1]) for i in range(len(data))] if given is None else torch.as_tensor(given).tolist()
    names = getattr(data, "classes", None) or getattr(data, "categories", None) or range(1 + max(labels))
    ends = None if {"split", "train"} & set(accepted) else SHARES
    return Listing(class_names(names), labels, Rows(f"torchvision:{name} ({split})", data, 0), ends)


def _open_split(name: str, root: Path, split: str):
    """The object for the best of the splits that a class of torchvision has, of which only trying tells."""
    for own in find_split(split, [own for names in SPLITS.values() for own in names], name)[0]:
        try:
            return open_torchvision(name, root, {"split": own})
        except ValueError as error:
            refused = error
    raise ValueError(f"torchvision's {name} has no split {split!r}: {refused}") from refused


def open_torchvision(name: str, root: Path, options: Mapping[str, str | bool]):
    """The object of ``torchvision.datasets``, downloaded when it is not there and can be."""
    kind = getattr(torchvision.datasets, name)
    try:
        return kind(root, **options)  # a ValueError: it has no such split
    except (OSError, RuntimeError) as error:
        missing = error
    try:
        if "download" not in inspect.signature(kind).parameters:
            raise missing
        return kind(root, **options, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"torchvision's {name} is not whole under {root} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}), and could not be downloaded. "
            f"Put it there as torchvision.datasets.{name} expects it, or name the folder that holds it: {name}?root=/data, or "
            "export PATCHSAE_DATA=/data."
        ) from error


def data_root(given: str = "") -> Path:
    """Where data sets lie that are called by name: the folder that is given, else ``$PATCHSAE_DATA``, else ``~/.cache/patchsae_utils/data``."""
    return Path(given or os.environ.get("PATCHSAE_DATA") or "~/.cache/patchsae_utils/data").expanduser()
