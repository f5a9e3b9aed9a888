"""Image data sets of the Hugging Face hub: whole (``hf:<repository>``), or the first images of a stream (``hf-stream:<repository>``)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from tqdm.auto import tqdm

from ..run.artifacts import atomic_folder, fingerprint, read_json, shortened, write_json
from .dataset import Listing
from .folders import data_root
from .pictures import ImageFiles, Rows
from .splits import SHARES, UNLABELLED, class_names, find_split, half_of_classes

STREAMED = 10_000
"""Images of a stream where no number is given."""
_SHUFFLED = 1000  # images of a stream that are mixed at a time: shards come in a drawn order too, but classes may lie together in each
_TENTHS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}  # of a stream without splits of its own: classes come in any order


def read_hub(given: str, split: str) -> Listing:
    """A map-style image data set of the hub, or of a local folder that ``datasets`` reads: ``<repository>[:<configuration>]``."""
    spec = f"hf:{given}"
    source = _Source(spec)
    for own, shared in source.splits(split):  # noqa: B007  # used below
        with _reaching(spec):
            data = source.load(own)
        image, label = source.columns(data.features)
        labels = [UNLABELLED if each is None else each for each in data[label]]
        if any(each != UNLABELLED for each in labels):
            break
        warnings.warn(f"{spec}: no row of split {own!r} has a label.", stacklevel=3)
    rows = Rows(f"{spec} ({split})", data, image, getattr(data, "_fingerprint", None))
    return Listing(class_names(data.features[label].names), labels, rows, SHARES if shared else None)


def read_stream(given: str, split: str, n_images: int | None, half: str | None, seed: int) -> Listing:
    """As many images of a data set as are asked for (of a half of its classes), mixed with ``seed``; the others are not kept.

    They are written to files under :func:`~.folders.data_root` while they arrive, as they are encoded, and read from there ever after.
    """
    spec, n_wanted = f"hf-stream:{given}", STREAMED if n_images is None else n_images
    key = fingerprint(repository=given, split=split, n_images=n_wanted, half=half, seed=seed, shuffled=_SHUFFLED, version=2)
    folder = data_root() / "streams" / f"{re.sub(r'[^A-Za-z0-9]+', '-', given).strip('-')}-{split}-{key}"
    if not (folder / "description.json").exists():
        source = _Source(spec)
        for own, shared in source.splits(split):
            with suppress(_NoLabels):
                _save_stream(source, own, _TENTHS[split] if shared else range(10), n_wanted, half, seed, folder)
                break
        else:
            raise ValueError(f"{spec} ({split}) gave no images with a label.")
    description = read_json(folder / "description.json")
    labels = description["labels"]
    if n_images is None and len(labels) == STREAMED:
        warnings.warn(f"The first {STREAMED:,} images of {spec} ({split}) are read; ask for more by n_images.", stacklevel=3)
    return Listing(description["class_names"], labels, ImageFiles(folder, list(map(_file, range(len(labels))))))


class _NoLabels(Exception):
    pass


def _file(i: int) -> str:
    return f"{i // 1000:04d}/{i % 1000:03d}"


def _save_stream(source: _Source, own: str, tenths: Sequence[int], n_images: int, half: str | None, seed: int, folder: Path) -> None:
    with _reaching(source.spec):
        stream = source.load(own, streaming=True)
    image, label = source.columns(stream.features)
    names = class_names(stream.features[label].names)
    unwanted = set(range(len(names))) - set(half_of_classes(len(names), half))
    stream = stream.cast_column(image, source.datasets.Image(decode=False)).shuffle(seed=seed, buffer_size=_SHUFFLED)
    labels: list[int] = []
    without: list[int] = []
    with atomic_folder(folder) as temporary, tqdm(total=n_images, desc=f"streaming {source.spec}", unit="image", leave=False) as bar:
        for i, row in enumerate(stream if n_images else ()):
            if i % 10 not in tenths or row[label] in unwanted:
                continue
            content = _bytes(row[image])
            if content is None or row[label] in (None, UNLABELLED):
                without.append(i)
            else:
                path = temporary / _file(len(labels))
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                labels.append(row[label])
                bar.update()
            if len(labels) == n_images or (not labels and len(without) == _SHUFFLED):
                break
        if not labels:
            raise _NoLabels
        entries = {"source": source.spec, "split": own, "seed": seed, "class_names": names, "labels": labels, "left_out": without}
        write_json(temporary / "description.json", entries)
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        warnings.warn(f"{len(without):,} rows of {source.spec} ({own}) have no image or no label and are left out: {shown}.", stacklevel=4)


def _bytes(image: dict[str, Any] | None) -> bytes | None:
    """A picture's encoded bytes, where there is one."""
    if image is None or image["bytes"] is not None or not image["path"]:
        return None if image is None else image["bytes"]
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except OSError:
        return None


class _Source:
    """A repository and one of its configurations."""

    def __init__(self, spec: str):
        self.spec, (self.repository, _, self.configuration) = spec, spec.partition(":")[2].partition(":")
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{spec} needs the package `datasets`: pip install datasets.") from error
        self.datasets = datasets
        self._given = (self.repository, self.configuration) if self.configuration else (self.repository,)

    def splits(self, split: str) -> Iterator[tuple[str, bool]]:
        """What to read for a split, the best first, and whether a share of it is meant."""
        with _reaching(self.spec):
            if self.configuration and self.configuration not in (valid := self.datasets.get_dataset_config_names(self.repository)):
                raise ValueError(self._choose(valid))
            try:
                present = self.datasets.get_dataset_split_names(*self._given)
            except ValueError as error:  # several configurations, and none of them is the default
                valid = self.datasets.get_dataset_config_names(self.repository)
                raise ValueError(self._choose(valid) if len(valid) > 1 else str(error)) from error
        names, shared = find_split(split, present, self.spec)
        return ((name, shared) for name in names)

    def _choose(self, valid: Sequence[str]) -> str:
        kind = self.spec.partition(":")[0]
        wrong = f"has no configuration {self.configuration!r}" if self.configuration else "has several configurations"
        return f"{self.spec} {wrong}. Name one of them, as in {kind}:{self.repository}:{valid[0]}: {', '.join(valid)}."

    def load(self, own_split: str, **options: Any):
        return self.datasets.load_dataset(*self._given, split=own_split, **options)

    def columns(self, features) -> tuple[str, str]:
        """Of the image and of its label."""
        image = next((key for key, kind in features.items() if isinstance(kind, self.datasets.Image)), None)
        label = next((key for key, kind in features.items() if isinstance(kind, self.datasets.ClassLabel)), None)
        if image is None or label is None:
            raise ValueError(f"{self.spec} needs an Image and a ClassLabel column; it has {dict(features)}.")
        return image, label


@contextmanager
def _reaching(spec: str) -> Iterator[None]:
    """What the hub and the network refuse, in words."""
    try:
        yield
    except OSError as error:  # DatasetNotFoundError and all that requests and huggingface_hub raise
        raise FileNotFoundError(
            f"{spec} could not be read ({type(error).__name__}: {shortened(error)}). Give the name of a repository of huggingface.co/datasets (private and gated "
            "ones need `hf auth login`) or of a local folder that `datasets` reads; without a network, a folder of images, <class>/<image>, will do."
        ) from error
