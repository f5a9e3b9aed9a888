"""A data set of pictures that are opened when asked for, and what names a data set."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..run.artifacts import fingerprint
from .pictures import decoded
from .splits import half_of_classes
from .templates import name_of

UNKNOWN = "not known: if pictures are exchanged for others under the same spec, delete what was made of them"


class Example(NamedTuple):
    """One picture."""

    image: Image.Image
    """RGB."""
    label: int
    """Index into ``class_names``."""
    index: int  # type: ignore[assignment]  # tuples have a method of this name
    """Its place in the data set."""


class ImageData(Dataset):
    """Pictures that are opened when asked for.

    Parameters
    ----------
    spec, split : str
    class_names : sequence of str
    labels : sequence of int
        One a picture.
    open_image : callable
        Place in ``labels`` -> PIL image.
    half : {"base", "novel"}, optional
        Keep this half of the classes, relabelled from 0.
    n_images : int, optional
        Keep so many pictures, drawn with ``seed``.
    """

    workers = 0
    """Processes that :func:`batches` opens pictures with, where it is not told otherwise."""

    def __init__(
        self,
        spec: str,
        split: str,
        class_names: Sequence[str],
        labels: Sequence[int],
        open_image: Callable[[int], Image.Image],
        half: str | None = None,
        n_images: int | None = None,
        seed: int = 0,
    ):
        self.spec, self.split, self.half, self.seed = spec, split, half, seed
        self.opener, self.n_listed = open_image, len(labels)
        kept = half_of_classes(len(class_names), half)
        self.class_names = [class_names[i] for i in kept]
        relabel = torch.full((len(class_names),), -1)
        relabel[kept] = torch.arange(len(kept))
        new_labels = relabel[torch.as_tensor(labels)]
        self.rows: Tensor = (new_labels >= 0).nonzero().flatten()
        """[N] place of each picture in the whole listing, before halves, subsets and broken images were taken out."""
        if n_images is not None and n_images < len(self.rows):
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
            self.rows = self.rows[order[:n_images].sort().values]
        self.labels = new_labels[self.rows]

    @property
    def name(self) -> str:
        """What figures call it."""
        return name_of(self.spec)

    @property
    def contents(self) -> str | None:
        """Names what lies in the place of the pictures, as far as their opener knows it: 16 hex digits."""
        if not hasattr(self.opener, "contents") or (known := self.opener.contents(self.rows.tolist())) is None:
            return None
        return fingerprint(opener=known, rows=hash_of(self.rows))

    def where(self, index: int) -> str:
        """The file of a picture, or its place in a data set without files."""
        row = int(self.rows[index])
        return self.opener.where(row) if hasattr(self.opener, "where") else f"{self.spec} ({self.split}), row {row}"

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
        row = int(self.rows[index])  # our own openers check and convert by themselves
        image = self.opener(row) if hasattr(self.opener, "check") else decoded(lambda: self.opener(row), self.where(index))
        return Example(image, int(self.labels[index]), index)


def describe_dataset(dataset) -> dict[str, Any]:
    """What distinguishes a data set from all others, as plain JSON.

    Parameters
    ----------
    dataset
        As :func:`load_dataset` gives it, or any with ``labels`` and ``class_names``.

    Returns
    -------
    dict
        Spec, split, half, seed, number of images, a hash of their labels, class names; and ``contents``, which names what lies in the place of
        the images: of files their names, sizes and times of change, of hub data sets their own fingerprint, of scenes the artwork's
        version. What can't be known is said there.
    """
    return {
        **{name: getattr(dataset, name, None) for name in ("spec", "split", "half", "seed")},
        "n_images": len(dataset),
        "labels": hash_of(torch.as_tensor(dataset.labels)),
        "class_names": list(dataset.class_names),
        "contents": getattr(dataset, "contents", None) or UNKNOWN,
    }


def dataset_fingerprint(dataset) -> str:
    """Name a data set: 16 hex digits over :func:`describe_dataset`. Artifacts made from it are current as long as this stays.

    Parameters
    ----------
    dataset

    Returns
    -------
    str
    """
    return fingerprint(**describe_dataset(dataset))


def hash_of(numbers: Tensor) -> str:
    """Names integers: 16 hex digits."""
    return hashlib.sha256(numbers.to(torch.int64).numpy(force=True).tobytes()).hexdigest()[:16]
