"""Which rows belong to a split, a half or a few-shot draw; what classes are called; whether labels are right. The same for every source."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo
from torch import Tensor

# What sources call our splits, in small letters or large.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}
SHARES = (0.8, 0.9, 1.0)  # where the shares of train, val and test end, of a class that is split here
UNLABELLED = -1


def check_split(split: str, n_images: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Valid: {', '.join(SPLITS)}.")
    if n_images is not None and (not isinstance(n_images, Integral) or n_images < 0):
        raise ValueError(f"n_images must be a whole number from 0 on, or None for all, got {n_images!r}.")


def find_split(split: str, present: Sequence[str], source: str) -> tuple[Sequence[str], bool]:
    """Which of a source's splits to read (the best first), and whether a share of it is meant."""
    own = {kind: [name for each in names for name in present if name.lower() == each] for kind, names in SPLITS.items()}
    held_out = {"val": [*own["val"], *own["test"]], "test": [*own["test"], *own["val"]]}
    if not held_out["val"] and (own["train"] or len(present) == 1):
        if others := [name for name in present if name not in (own["train"] or present)]:
            said = f"{source} has no split val or test: {own['train'][0]} is split 80/10/10. Not read: {', '.join(others)}."
            warnings.warn(said, stacklevel=4)
        return own["train"] or present, True
    found = {"train": own["train"], **held_out}[split]
    if not found:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(present)}. Where a source has no split val, its test serves, and where it has no "
            "test, its val; where it has neither, its one part is split 80/10/10 within each class, drawn with the seed."
        )
    return found, False


def share(labels: Sequence[int], split: str, ends: Sequence[float], seed: int, class_names: Sequence[str], source: str) -> list[int]:
    """Rows of one split of a listing that is split within each class, at least one row a split; rows without label of one that has classes are in all."""
    members: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    kept, part = members.pop(UNLABELLED, []) if class_names else [], list(SPLITS).index(split)
    if few := [(label, len(rows)) for label, rows in sorted(members.items()) if len(rows) < len(ends)]:
        shown = [f"{class_names[label]!r} has {n}" if class_names else f"it has {n}" for label, n in few[:3]]
        raise ValueError(
            f"{source} has too few images{' a class' if class_names else ''} to split: {', '.join(shown)}"
            f"{f' and {len(few) - 3} more' if len(few) > 3 else ''}; at least {len(ends)} are needed, one a split. Add images, or split it yourself: "
            "train/<class>/<image>, val/<class>/<image> and test/<class>/<image>."
        )
    for rows in members.values():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        cuts = [0]
        for i, end in enumerate(ends, 1):
            cuts.append(min(max(round(end * len(rows)), cuts[-1] + 1), len(rows) - len(ends) + i))
        kept += [rows[i] for i in order[cuts[part] : cuts[part + 1]]]
    return sorted(kept)


def half_of_classes(n_classes: int, half: str | None) -> list[int]:
    """Labels of a half: the first ceil(n/2) are base, the rest novel; all for None.

    Source: the base-to-novel protocol of CoCoOp (Zhou et al., CVPR 2022), which MaPLe and PatchSAE follow.
    """
    middle = math.ceil(n_classes / 2)
    halves = {None: range(n_classes), "base": range(middle), "novel": range(middle, n_classes)}
    if half not in halves:
        raise ValueError(f"Unknown half {half!r}. Valid: base, novel, or None for all classes.")
    return list(halves[half])


def require_labels(dataset) -> None:
    """Raise ``ValueError`` for a data set, or statistics of one, without classes."""
    if not len(dataset.class_names):
        raise ValueError(
            f"{getattr(dataset, 'spec', 'The data set')!s} has no labels, which are needed here. Activations, training, statistics, masks and the explorer do "
            "without; for the rest put its pictures into folders, <class>/<image>."
        )


def few_shot(dataset, n_shots: int, seed: int = 0) -> list[int]:
    """Indices of some examples of each class; a class that has fewer is a ``ValueError``.

    Parameters
    ----------
    dataset, n_shots, seed : ImageData or OpenMojiData, and int
    """
    require_labels(dataset)
    labels, generator = torch.as_tensor(dataset.labels), torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(dataset.class_names):
        members = (labels == label).nonzero().flatten()
        if len(members) < n_shots:
            has = f"Class {label} ({name!r}) of {dataset.spec!r} has {len(members)} {dataset.split} examples"
            raise ValueError(f"{has}; {n_shots} shots were asked for.")
        chosen += members[torch.randperm(len(members), generator=generator)[:n_shots]].tolist()
    return chosen


def class_names(given: Iterable[Any]) -> list[str]:
    """What prompts call classes: CLIP's names for ImageNet's; of synonyms the first, where classes would share it all, or else what was given."""
    names = [", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in given]
    names = [_wordnet().get(name, name) if re.fullmatch(r"n\d{8}", name) else name for name in names]
    forms = [[name.split(",")[0].replace("_", " ").strip() for name in names], [name.replace("_", " ").strip() for name in names], names]
    if len(names) == 1000 and forms[0] == [text.split(",")[0] for text in ImageNetInfo().label_descriptions()]:
        return list(IMAGENET_CLASSNAMES)
    counts, rows = [Counter(each) for each in forms], zip(*forms, strict=True)
    return [next((name for name, n in zip(row, counts, strict=True) if name and n[name] == 1), row[1]) for row in rows]


@lru_cache
def _wordnet() -> dict[str, str]:
    others = ImageNetInfo("imagenet-22k")
    names = {wnid: others.label_name_to_description(wnid) for wnid in others.label_names()}
    return names | dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def checked_labels(labels: Sequence[Any] | Tensor, n_classes: int, where: Callable[[int], str]) -> Tensor:
    """Labels [N] in range(C), or :data:`UNLABELLED`; an error names the first row (``where``) that has anything else."""
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels, valid = [each.tolist() if hasattr(each, "tolist") else each for each in labels], range(UNLABELLED, n_classes)
    for row, label in enumerate(labels):
        if not isinstance(label, Integral) or label not in valid:
            expected = f"a whole number in range({n_classes}), or {UNLABELLED} for one without label"
            raise ValueError(f"{where(row)} has the label {label!r}; expected {expected}.")
    return torch.tensor(labels, dtype=torch.int64)
