"""Listings of folders of images, of list files, and of CoOp's ``split_zhou_*.json`` beside images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..run.artifacts import read_json
from .dataset import Listing
from .pictures import ImageFiles, is_picture
from .splits import SHARES, SPLITS, UNLABELLED, class_names, find_split

_NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # left by operating systems


def read_folder(root: Path, split: str, names: Callable[[Sequence[str]], list[str]] = class_names) -> Listing:
    """``<root>[/<split>]/[<class>/]<image>``, or what ``split_zhou_*.json`` says; ``names``: all splits' folders' names -> names of classes."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(root)!r}. Expected {root}/train/<class>/<image> and {root}/val/<class>/<image>, or {root}/<class>/<image>. "
            "Other specs: openmoji/<task>, caltech101 and the rest of the paper's eleven, hf:<repo>, torchvision:<Name>, list:<file>."
        )
    if (split_file := find_split_file(root)) is not None:
        return read_split_file(split_file, split)
    known = {name for names in SPLITS.values() for name in names}
    present = [name for name in _look(root)[1] if name.lower() in known] or ["."]
    parts, shared = find_split(split, present, str(root))
    inside = {part: {name: _look(root / part / name) for name in _look(root / part)[1]} for part in present}
    part = next((part for part in parts if inside[part]), parts[0])
    if part != parts[0]:
        warnings.warn(f"{root / parts[0]} has no class folders; {root / part} is read instead.", stacklevel=3)
    # A folder that holds files and no picture is no class: notes, annotations.
    classes = sorted({name for each in inside.values() for name, found in each.items() if any(found[:2]) or not found[2]})
    base, labels = root / part, []
    files: list[str] = []
    left_out: dict[str, int] = {}
    for label, name in enumerate(classes):
        pictures, deeper, _ = inside[part].get(name, ([], [], 0))
        files += [f"{name}/{picture}" for picture in pictures]
        labels += [label] * len(pictures)
        left_out |= {f"{name}/{folder}": len(pictures_below(base / name / folder)) for folder in deeper}
    loose = _look(base)[0]
    if loose and not files:  # no classes
        files, labels, classes = loose, [UNLABELLED] * len(loose), []
    elif loose:
        left_out["."] = len(loose)
    others, n = [name for name, n in left_out.items() if n], sum(left_out.values())
    said = f"{n:,} images of {base} lie in no class folder or deeper than one ({', '.join(others[:3])})" if others else ""
    if not files:
        expected = f"{base}/<class>/<image> with endings such as .jpg, .png, .webp"
        raise FileNotFoundError(f"{base} holds no images for split {split!r}: expected {expected}. {said}")
    if others:
        warnings.warn(f"{said} and are left out; expected {base}/<class>/<image>, of which there are {len(files):,}.", stacklevel=3)
    return Listing(names(classes), labels, ImageFiles(base, files), SHARES if shared else None)


def _look(folder: Path) -> tuple[list[str], list[str], int]:
    """Pictures and folders in a folder, sorted, and how many others; nothing hidden, no link that leads back, which would never end."""
    pictures, folders, others = [], [], 0
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in _NO_CLASSES:
            continue
        if entry.is_symlink() and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(entry.path) + os.sep):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.name)
        elif is_picture(entry.name):
            pictures.append(entry.name)
        else:
            others += 1
    return pictures, folders, others


def pictures_below(folder: Path) -> list[str]:
    """Of a folder and all that it holds, relative to it, sorted."""
    paths = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if is_picture(name))
    return sorted(os.path.relpath(path, folder) for path in paths)


def read_list(path: Path) -> Listing:
    """A text file with the path of a picture in each line, absolute or relative to the file: pictures without labels."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; expected a text file with the path of a picture in each line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()]
    files = list(dict.fromkeys(filter(None, lines)))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}, line {lines.index(missing[0]) + 1}: there is no file {str(path.parent / missing[0])!r}; {len(missing):,} of "
            f"{len(files):,} are missing. Each line is the path of a picture, relative to the folder of the list."
        )
    if not files:
        raise FileNotFoundError(f"{path} names no picture.")
    return Listing([], [UNLABELLED] * len(files), ImageFiles(path.parent, files), SHARES)


def find_split_file(folder: Path) -> Path | None:
    found = sorted(folder.glob("split_zhou_*.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} files split_zhou_*.json ({', '.join(p.name for p in found)}); keep one.")
    return found[0] if found else None


def read_split_file(path: Path, split: str) -> Listing:
    """CoOp's ``{"train": [[path, label, class name], ...], "val": [...], "test": [...]}``; paths are relative to the folder of images beside it.

    Source: Zhou et al., "Learning to prompt for vision-language models", IJCV 2022 (github.com/KaiyangZhou/CoOp, DATASETS.md).
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"train", "val", "test"} <= content.keys():
        wanted = "an object with train, val and test, as CoOp's files do"
        raise ValueError(f"{path} must hold {wanted}. Take it away to have the folder split anew.")
    names: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for item in content[part]:
            if not (isinstance(item, list) and list(map(type, item)) == [str, int, str]):
                raise ValueError(f"{path}, {part}: expected [path, label, class name], got {item!r}.")
            if names.setdefault(item[1], item[2]) != item[2]:
                raise ValueError(f"{path}: class {item[1]} is called {names[item[1]]!r} and {item[2]!r}.")
    if missing := sorted(set(range(1 + max(names, default=0))) - names.keys()):
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
