"""A data set of pictures that are opened when asked for, and what names a data set."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..run.artifacts import fingerprint
from .pictures import open_picture
from .splits import UNLABELLED, checked_labels, half_of_classes, require_labels

UNKNOWN = "not known: if pictures are exchanged for others under the same spec, delete what was made of them"


class Example(NamedTuple):
    """One picture: RGB, its place in ``class_names`` (-1 where there are no classes) and in the data set."""

    image: Image.Image
    label: int
    index: int  # type: ignore[assignment]  # tuples have a method of this name


class Listing(NamedTuple):
    """What a source gives of a split."""

    class_names: list[str]  # of all its splits
    labels: Sequence[int]  # one a row
    opener: Callable[[int], Any]  # row -> what :func:`~.pictures.open_picture` opens
    ends: Sequence[float] | None = None  # where the shares of the splits end, if the rows are a whole that is to be split within each class


class ImageData(Dataset):
    """Pictures that are opened when asked for. Where there are classes, rows without a label are left out, with a warning.

    Parameters
    ----------
    spec, split : str
    class_names : sequence of str [C], empty for pictures without labels
    labels : sequence of int [N], or LongTensor [N]
        One a row, in range(C), or -1 where there is none; a ``ValueError`` names the row of any other, and says if there is none at all.
    open_image : callable, row -> path, bytes or PIL image
    half : {"base", "novel"}, optional; keep this half of the classes, relabelled from 0
    n_images, seed : int; keep so many pictures, drawn with the seed
    rows : sequence of int, optional; keep only these
    """

    workers: int | None = None  # processes that :func:`batches` opens pictures with; None: as many as suit the machine

    def __init__(
        self, spec: str, split: str, class_names: Sequence[str], labels: Sequence[int] | Tensor, open_image: Callable[[int], Any],
        half: str | None = None, n_images: int | None = None, seed: int = 0, rows: Sequence[int] | None = None,
    ):  # fmt: skip
        self.spec, self.name, self.split, self.half, self.seed = spec, name_of(spec), split, half, seed
        self.opener, self.n_listed = open_image, len(labels)
        given = checked_labels(labels, len(class_names), self.where_row)
        kept = half_of_classes(len(class_names), half)
        self.class_names, self.has_labels = [class_names[i] for i in kept], bool(kept)
        relabel = torch.full((len(class_names) + 1,), UNLABELLED)  # the last is that of rows without label
        relabel[kept] = torch.arange(len(kept))
        # [N] place of each picture in the whole listing, before halves, subsets and broken images were taken out.
        self.rows: Tensor = torch.arange(len(given)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        if half is not None:
            require_labels(self)
        if self.has_labels:
            if n_without := int((given[self.rows] == UNLABELLED).sum()):
                if n_without == len(self.rows):
                    raise ValueError(f"No row of {spec} ({split}) has a label; give a split that has labels.")
                warnings.warn(f"{n_without:,} of {len(self.rows):,} rows of {spec} ({split}) have no label and are left out.", stacklevel=2)
            self.rows = self.rows[relabel[given[self.rows]] >= 0]
        if n_images is not None and n_images < len(self.rows):
            drawn = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:n_images]
            self.rows = self.rows[drawn.sort().values]
        self.labels = relabel[given[self.rows]]

    @property
    def contents(self) -> str | None:
        """Names what lies in the place of the pictures, as far as their opener knows it: 16 hex digits."""
        known = self.opener.contents(self.rows.tolist()) if hasattr(self.opener, "contents") else None
        return None if known is None else fingerprint(opener=known, rows=hash_of(self.rows))

    def where_row(self, row: int) -> str:
        """The file of a row of the listing, or its number in a data set without files."""
        return self.opener.where(row) if hasattr(self.opener, "where") else f"{self.spec} ({self.split}), row {row}"

    def where(self, index: int) -> str:
        """The file of a picture, or its place in a data set without files."""
        return self.where_row(int(self.rows[index]))

    def open_row(self, row: int, draft: bool = False) -> Image.Image:
        """The picture of a row of the listing; see :func:`~.pictures.open_picture`."""
        return open_picture(lambda: self.opener(row), self.where_row(row), draft)

    def without(self, rows: Sequence[int]) -> ImageData:
        """The same data set without some rows of the listing; classes and the order of the others stay."""
        kept = ~torch.isin(self.rows, torch.as_tensor(rows, dtype=torch.int64))
        smaller = copy.copy(self)
        smaller.rows, smaller.labels = self.rows[kept], self.labels[kept]
        return smaller

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec!r} ({self.split}) has {len(self)} images; there is no index {index}.")
        return Example(self.open_row(int(self.rows[index])), int(self.labels[index]), index)


def name_of(spec: str) -> str:
    """The name in a spec: ``DTD`` of ``torchvision:DTD?root=/data``, ``pets`` of ``/data/pets/``, ``birds`` of ``hf:owner/birds:small``."""
    path = spec.partition("?")[0]
    path = path.split(":")[1] if ":" in path else path
    return path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".txt")


def describe_dataset(dataset) -> dict[str, Any]:
    """What distinguishes a data set from all others, as plain JSON; ``contents`` names what lies in the place of its images."""
    return {
        **{name: getattr(dataset, name, None) for name in ("spec", "split", "half", "seed")},
        "n_images": len(dataset),
        "labels": hash_of(torch.as_tensor(dataset.labels)),
        "class_names": list(dataset.class_names),
        "contents": getattr(dataset, "contents", None) or UNKNOWN,
    }


def dataset_fingerprint(dataset) -> str:
    """Name a data set by its spec, split, labels, class names and, as far as they can be known, the sizes and times of its files: 16 hex digits.

    Parameters
    ----------
    dataset : ImageData or OpenMojiData
    """
    return fingerprint(**describe_dataset(dataset))


def hash_of(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.to(torch.int64).numpy(force=True).tobytes()).hexdigest()[:16]
