"""Listings of folders of images, of list files, and of CoOp's ``split_zhou_*.json`` beside images."""

from __future__ import annotations

import mimetypes
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..run.artifacts import read_json
from .dataset import Listing
from .pictures import ImageFiles, is_picture
from .splits import SHARES, SPLITS, UNLABELLED, class_names, find_split

_NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "#recycle", "System Volume Information"}  # left by operating systems


def read_folder(root: Path, split: str, names: Callable[[Sequence[str]], list[str]] = class_names) -> Listing:
    """``<root>[/<split>]/[<class>/]<image>``, or what ``split_zhou_*.json`` says; ``names``: all splits' folders' names -> names of classes."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(root)!r}. Expected {root}/train/<class>/<image> and {root}/val/<class>/<image>, or {root}/<class>/<image>. "
            "Other specs: openmoji/<task>, caltech101 and the rest of the paper's eleven, hf:<repo>, torchvision:<Name>, list:<file>."
        )
    if (split_file := find_split_file(root)) is not None:
        return read_split_file(split_file, split)
    beside, folders, _ = _look(root)
    present = [found[0] for own in SPLITS.values() if (found := [name for each in own for name in folders if name.lower() == each])]
    aside = [name for name in folders if name not in present] if present else []
    left_out = {"..": len(beside) * bool(present)} | {f"../{name}": len(pictures_below(root / name)) for name in aside}
    parts, shared = find_split(split, present or ["."], str(root))
    looked = {part: _look(root / part) for part in present or ["."]}
    inside = {part: {name: _look(root / part / name) for name in looked[part][1]} for part in looked}
    part = next((part for part in parts if inside[part]), parts[0])
    if part != parts[0]:
        warnings.warn(f"{root / parts[0]} has no class folders; {root / part} is read instead.", stacklevel=3)
    # A folder that holds files and no picture is no class: notes, annotations.
    classes = sorted({name for each in inside.values() for name, found in each.items() if any(found[:2]) or not found[2]})
    base, labels = root / part, []
    files: list[str] = []
    for label, name in enumerate(classes):
        pictures, deeper, _ = inside[part].get(name, ([], [], []))
        files += [f"{name}/{picture}" for picture in pictures]
        labels += [label] * len(pictures)
        left_out |= {f"{name}/{folder}": len(pictures_below(base / name / folder)) for folder in deeper}
    loose = looked[part][0]
    if loose and not files:  # no classes
        files, labels, classes = loose, [UNLABELLED] * len(loose), []
    elif loose:
        left_out["."] = len(loose)
    kinds = [mimetypes.guess_type(name)[0] or "" for found in (looked[part], *inside[part].values()) for name in found[2]]
    unread = Counter(kind for kind in kinds if kind.startswith("image/"))
    reasons = ("lie in no class folder or deeper than one", left_out), ("are of a kind that Pillow can't open", unread)
    named = ((why, n.total(), ", ".join(list(n)[:3])) for why, each in reasons if (n := +Counter(each)))
    said = "; ".join(f"{n:,} images of {base} {why} ({places})" for why, n, places in named)
    if not files:
        expected = f"{base}/<class>/<image> with endings such as .jpg, .png, .webp"
        raise FileNotFoundError(f"{base} holds no images for split {split!r}: expected {expected}. {said}")
    if said:
        warnings.warn(f"{said} and are left out; expected {base}/<class>/<image>, of which there are {len(files):,}.", stacklevel=3)
    return Listing(names(classes), labels, ImageFiles(base, files), SHARES if shared else None)


def _look(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Pictures, folders and others in a folder, sorted; nothing hidden, no link that leads back, which would never end."""
    found: tuple[list[str], list[str], list[str]] = [], [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        leads_back = entry.is_symlink() and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(entry.path) + os.sep)
        if not leads_back and not _is_hidden(entry.name):
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            found[1 if is_folder else 0 if is_picture(entry.name) else 2].append(entry.name)
    return found


def pictures_below(folder: Path) -> list[str]:
    """Of a folder and all that it holds, relative to it, sorted."""
    found: list[str] = []
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [os.path.relpath(os.path.join(at, name), folder) for name in names if is_picture(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


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
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in SPLITS):
        wanted = "an object with train, val and test, as CoOp's files do"
        raise ValueError(f"{path} must hold {wanted}. Take it away to have the folder split anew.")
    names: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for item in content[part]:
            if not (isinstance(item, list) and list(map(type, item)) == [str, int, str]):
                raise ValueError(f"{path}, {part}: expected [path, label, class name], got {item!r}.")
            if names.setdefault(item[1], item[2]) != item[2]:
                raise ValueError(f"{path}: class {item[1]} is called {names[item[1]]!r} and {item[2]!r}.")
    if missing := sorted(set(range(len(names))) - names.keys()):
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
