"""Images in: the embedded OpenMoji world, a folder of images, the paper's eleven data sets, Hugging Face data sets, torchvision's sets.

Every data set is a map-style sequence of :class:`Example` with ``spec``, ``split``, ``class_names``, ``labels`` and ``name``. Classes are
keyed by their index, never by their name: names may repeat (ImageNet's "missile" and "sunglasses" do).
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from . import artwork, openmoji
from .broken import TooManyBroken, without_broken
from .dataset import Example, ImageData, dataset_fingerprint, describe_dataset
from .loader import Batch, DeadWorker, batches
from .pictures import BrokenImage
from .splits import few_shot, half_of_classes
from .templates import TEMPLATES, templates_for

__all__ = [
    "Batch",
    "BrokenImage",
    "DeadWorker",
    "Example",
    "ImageData",
    "OpenMojiData",
    "TEMPLATES",
    "TooManyBroken",
    "batches",
    "dataset_fingerprint",
    "describe_dataset",
    "few_shot",
    "half_of_classes",
    "load_dataset",
    "templates_for",
    "without_broken",
]


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

    workers = 0
    """Processes that :func:`batches` draws scenes with, where it is not told otherwise."""

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

    @property
    def contents(self) -> str:
        """What draws the scenes."""
        return artwork.version()

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
        ``openmoji/<task>[:<domain>]``; a folder (``<split>/<class>/<image>`` or ``<class>/<image>``); one of the paper's eleven (``caltech101``,
        ``oxford_pets``, ``stanford_cars``, ``flowers102``, ``food101``, ``fgvc_aircraft``, ``sun397``, ``dtd``, ``eurosat``, ``ucf101``,
        ``imagenet``; a folder of such a name is written ``./dtd``); ``torchvision:<Name>``; ``hf:<repository>``; or ``hf-stream:<repository>``, of
        which only ``n_images`` are fetched. Names may end in ``?root=<folder>`` that holds the data set, instead of ``$PATCHSAE_DATA``.
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
    from . import folders, hub_sets, paper_sets

    kind, _, rest = spec.partition(":")
    name, _, root = spec.partition("?root=")
    if kind == "hf":
        opened = hub_sets.hugging_face(rest, split)
    elif kind == "hf-stream":
        opened = hub_sets.hugging_face_stream(rest, split, n_images, seed)
    elif (one_of_eleven := paper_sets.paper_name(spec)) is not None:
        folders.check_split(split)
        opened = paper_sets.paper_set(one_of_eleven, split, root or None, seed)
    elif kind == "torchvision":
        opened = folders.torchvision_set(name.removeprefix("torchvision:"), split, root or None)
    else:
        opened = folders.folder(Path(spec), split, seed)
    return ImageData(spec, split, *opened, half, n_images, seed)
