"""Images in: the embedded OpenMoji world, a folder of images, Hugging Face data sets, torchvision's sets.

Every data set is a map-style sequence of :class:`Example` with ``spec``, ``split``, ``class_names``, ``labels`` and ``name``. Classes are
keyed by their index, never by their name: names may repeat (ImageNet's "missile" and "sunglasses" do).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from . import openmoji
from .splits import few_shot, half_of_classes
from .templates import TEMPLATES, templates_for

__all__ = [
    "Batch",
    "Example",
    "ImageData",
    "OpenMojiData",
    "TEMPLATES",
    "batches",
    "few_shot",
    "half_of_classes",
    "load_dataset",
    "templates_for",
]


class Example(NamedTuple):
    """One picture."""

    image: Image.Image
    """RGB."""
    label: int
    """Index into ``class_names``."""
    index: int
    """Its place in the data set."""


class Batch(NamedTuple):
    """Some pictures, preprocessed."""

    images: Tensor
    """[B, 3, H, W]."""
    labels: Tensor
    """[B]."""
    indices: Tensor
    """[B] places in the data set."""


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
        self._open = open_image
        kept = half_of_classes(len(class_names), half)
        self.class_names = [class_names[i] for i in kept]
        relabel = torch.full((len(class_names),), -1)
        relabel[kept] = torch.arange(len(kept))
        new_labels = relabel[torch.as_tensor(labels)]
        self._rows = (new_labels >= 0).nonzero().flatten()
        if n_images is not None and n_images < len(self._rows):
            order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))
            self._rows = self._rows[order[:n_images].sort().values]
        self.labels = new_labels[self._rows]

    @property
    def name(self) -> str:
        """What figures call it."""
        return self.spec.rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec!r} ({self.split}) has {len(self)} images; there is no index {index}.")
        return Example(self._open(int(self._rows[index])).convert("RGB"), int(self.labels[index]), index)


class OpenMojiData(Dataset):
    """Scenes of the embedded world: drawn on demand, balanced over classes, with ground truth.

    Parameters
    ----------
    task : str
        One of ``openmoji.tasks()``; ``"all"``; or ``"scenes"``, the mixture that the small CLIP was trained on.
    split : {"train", "val", "test"}
    domain : {"color", "line", "gray", "night"}
        Ignored by ``scenes``, which mixes them.
    half : {"base", "novel"}, optional
    n_images : int, optional
        Default: 20 a class.
    seed : int
    """

    def __init__(self, task: str, split: str, domain: str = "color", half: str | None = None, n_images: int | None = None, seed: int = 0):
        table = openmoji.class_table()
        valid = ["all", "scenes", *openmoji.tasks()]
        if task not in valid:
            raise ValueError(f"Unknown task {task!r} of the embedded world. Valid: {', '.join(valid)}.")
        if split not in openmoji.SPLITS:
            raise ValueError(f"Unknown split {split!r}. Valid: {', '.join(openmoji.SPLITS)}.")
        if domain not in openmoji.DOMAINS:
            raise ValueError(f"Unknown domain {domain!r}. Valid: {', '.join(openmoji.DOMAINS)}.")
        half_of_classes(0, half)  # refuses an unknown half
        if task == "scenes" and domain != "color":
            raise ValueError(
                f"openmoji/scenes mixes the domains; openmoji/scenes:{domain} does not exist. Use openmoji/all:{domain} or a task."
            )
        if task == "scenes" and half is not None:
            raise ValueError("openmoji/scenes mixes objects of both halves; halves are for openmoji/all and the tasks.")
        rows = table if task in ("all", "scenes") else table[table["task"] == task]
        rows = rows if half is None else rows[rows["half"] == half]
        self.task, self.split, self.domain, self.half, self.seed = task, split, domain, half, seed
        self.spec = f"openmoji/{task}" + ("" if domain == "color" else f":{domain}")
        self.name = task if domain == "color" else f"{task} ({domain})"
        self.class_ids = rows.index.to_numpy()
        self.class_names = rows["name"].tolist()
        n = 20 * len(rows) if n_images is None else n_images
        self.labels = torch.arange(n) % len(rows)
        if task == "scenes":
            self.labels = torch.tensor([openmoji.pretraining_main(seed, split, i) for i in range(n)])

    def __len__(self) -> int:
        return len(self.labels)

    def scene(self, index: int) -> openmoji.Scene:
        """What is in scene ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec!r} ({self.split}) has {len(self)} images; there is no index {index}.")
        if self.task == "scenes":
            return openmoji.pretraining_scene(self.seed, self.split, index)
        main = int(self.class_ids[self.labels[index]])
        return openmoji.draw_scene(openmoji.scene_rng(self.seed, self.split, index), main, "main", self.domain)

    def truth(self, index: int) -> openmoji.SceneTruth:
        """What every patch of scene ``index`` shows."""
        return openmoji.scene_truth(self.scene(index))

    def __getitem__(self, index: int) -> Example:
        return Example(Image.fromarray(openmoji.render(self.scene(index))), int(self.labels[index]), index)


def load_dataset(spec: str, split: str, *, n_images: int | None = None, half: str | None = None, seed: int = 0) -> ImageData | OpenMojiData:
    """Open a data set.

    Parameters
    ----------
    spec : str
        ``openmoji/<task>[:<domain>]``, a folder (``<split>/<class>/<image>`` or ``<class>/<image>``), ``hf:<repository>``, or ``torchvision:<Name>``.
    split : str
        ``train``, ``val`` or ``test``.
    n_images : int, optional
        Take so many.
    half : {"base", "novel"}, optional
        Only this half of the classes, relabelled from 0.
    seed : int
        Draws the scenes, or the subset.

    Raises
    ------
    ValueError
        For an unknown spec, task, domain, split or half; the message names the valid ones.
    FileNotFoundError
        For a missing folder; the message says what is expected in it.
    """
    if spec.startswith("openmoji/"):
        task, _, domain = spec.removeprefix("openmoji/").partition(":")
        return OpenMojiData(task, split, domain or "color", half, n_images, seed)
    from . import images

    kind, _, rest = spec.partition(":")
    if kind == "hf":
        class_names, labels, open_image = images.hugging_face(rest, split)
    elif kind == "torchvision":
        class_names, labels, open_image = images.torchvision_set(rest, split)
    else:
        class_names, labels, open_image = images.folder(Path(spec), split, seed)
    return ImageData(spec, split, class_names, labels, open_image, half, n_images, seed)


def batches(
    dataset: Dataset,
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
) -> Iterator[Batch]:
    """Preprocessed pictures in order, a batch at a time; never more than a few batches in memory.

    Parameters
    ----------
    dataset : ImageData or OpenMojiData
    preprocess : callable
        ``clip.preprocess``.
    batch_size : int
    workers : int
        Processes that open and preprocess pictures; 0 does it here.
    indices : sequence of int, optional
        Only these places, in this order.
    progress : str, optional
        Show a bar with this label.
    """
    pictures = _Preprocessed(dataset, preprocess, range(len(dataset)) if indices is None else [int(i) for i in indices])
    loader = DataLoader(pictures, batch_size, num_workers=workers, prefetch_factor=2 if workers else None)
    for images, labels, places in tqdm(loader, desc=progress, disable=progress is None, leave=False):
        yield Batch(images, labels, places)


class _Preprocessed(Dataset):
    def __init__(self, dataset, preprocess, indices):
        self.dataset, self.preprocess, self.indices = dataset, preprocess, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        example = self.dataset[self.indices[i]]
        return self.preprocess(example.image), example.label, example.index
