"""CoOp's ``split_zhou_*.json``: which image of a data set is in which split, so that everybody measures on the same ones.

A file holds ``{"train": [[path, label, class name], ...], "val": [...], "test": [...]}``; paths are relative to the folder of images that lies
beside it. Format and files: Zhou et al., "Learning to prompt for vision-language models", IJCV 2022 (github.com/KaiyangZhou/CoOp, DATASETS.md).
"""

from __future__ import annotations

from pathlib import Path

from ..run.artifacts import read_json
from .pictures import ImageFiles


def find_split_file(folder: Path) -> Path | None:
    """The folder's ``split_zhou_*.json``, if it has one.

    Raises
    ------
    ValueError
        If it has several.
    """
    found = sorted(folder.glob("split_zhou_*.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} files split_zhou_*.json ({', '.join(p.name for p in found)}); keep one.")
    return found[0] if found else None


def read_split_file(path: Path, split: str) -> tuple[list[str], list[int], ImageFiles]:
    """Class names, labels and opener of one split.

    Classes are the file's numbers; two of the same name stay two. Every split has all classes, whether or not it has images of them.

    Raises
    ------
    ValueError
        If the file is not of that form, or its classes contradict each other.
    FileNotFoundError
        If its images are not beside it; names the folders that were looked into.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"train", "val", "test"} <= content.keys():
        raise ValueError(
            f"{path} must hold an object with train, val and test, as CoOp's files do. Take it away to have the folder split anew."
        )
    names: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for item in content[part]:
            if not (
                isinstance(item, list)
                and len(item) == 3
                and isinstance(item[0], str)
                and isinstance(item[1], int)
                and isinstance(item[2], str)
            ):
                raise ValueError(f"{path}, {part}: expected [path, label, class name], got {item!r}.")
            if names.setdefault(item[1], item[2]) != item[2]:
                raise ValueError(f"{path}: class {item[1]} is called {names[item[1]]!r} and {item[2]!r}.")
    if sorted(names) != list(range(len(names))):
        missing = sorted(set(range(1 + max(names, default=0))) - names.keys())
        raise ValueError(f"{path}: classes must be numbered from 0 without gaps; there is none numbered {missing[:5]}.")
    if not content[split]:
        raise ValueError(f"{path} has no images for split {split!r}.")
    files = [item[0] for item in content[split]]
    return (
        [names[i].replace("_", " ") for i in range(len(names))],
        [item[1] for item in content[split]],
        ImageFiles(_folder_of(path, files[0]), files),
    )


def _folder_of(path: Path, first: str) -> Path:
    """The folder that the file's paths are relative to: its own, or one in it, such as ``images``, ``jpg`` or ``2750``."""
    candidates = [path.parent, *sorted(p for p in path.parent.iterdir() if p.is_dir())]
    for folder in candidates:
        if (folder / first).exists():
            return folder
    raise FileNotFoundError(
        f"{path} names the image {first!r}, which is neither in {path.parent} nor in a folder of it "
        f"({', '.join(p.name for p in candidates[1:]) or 'there is none'}). Unpack the data set's images beside the file."
    )
