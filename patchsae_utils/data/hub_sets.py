"""Image data sets of the Hugging Face hub: whole (``hf:<repository>``), or the first images of a stream (``hf-stream:<repository>``); tar shards alike."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import fsspec
from tqdm.auto import tqdm

from ..run.artifacts import atomic_folder, fingerprint, read_json, shortened, write_json
from .dataset import Listing
from .paper_sets import data_root
from .pictures import ImageFiles, Rows
from .splits import SHARES, UNLABELLED, class_names, find_split, half_of_classes

STREAMED = 10_000  # images of a stream where no number is given
# Names of columns that are taken before others of their kind; as a label a plain number or text is taken under these names alone.
IMAGES, LABELS = ("image", "img", "picture", "photo"), ("label", "labels", "class", "class_name", "category", "target", "cls")
_SHUFFLED = 1000  # images of a stream that are mixed at a time: shards come in a drawn order too, but classes may lie together in each
_TENTHS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}  # of a stream without splits of its own: classes come in any order


def read_hub(given: str, split: str) -> Listing:
    """A map-style image data set of the hub, or of a local folder that ``datasets`` reads: ``<repository>[:<configuration>]``."""
    source = _Source(spec := f"hf:{given}")
    for own, shared in source.splits(split):  # noqa: B007  # used below
        with _reaching(spec):
            data = source.load(own)
        image, label = source.columns(data.features)
        if label is None:
            names, labels = [], [UNLABELLED] * len(data)
            break
        values, kind = list(data[label]), data.features[label]
        if hasattr(kind, "names"):
            names, labels = class_names(kind.names), [UNLABELLED if each is None else each for each in values]
        else:  # classes are those of all splits
            every = {name: values if name == own else source.load(name)[label] for name in source.present}
            names, labels = source.classes(label, every, own)
        if any(each != UNLABELLED for each in labels):
            break
        warnings.warn(f"{spec}: no row of split {own!r} has a label.", stacklevel=3)
    rows = Rows(f"{spec} ({split})", source.encoded(data, image), image, getattr(data, "_fingerprint", None))
    return Listing(names, labels, rows, SHARES if shared else None)


def read_stream(given: str, split: str, n_images: int | None, half: str | None, seed: int) -> Listing:
    """As many images as are asked for (of a half of the classes), mixed with ``seed``; they become files under :func:`~.paper_sets.data_root`."""
    spec, n_wanted = f"hf-stream:{given}", STREAMED if n_images is None else n_images
    here = _files_here(given.partition("?")[0])
    key = fingerprint(repository=given, split=split, n_images=n_wanted, half=half, seed=seed, shuffled=_SHUFFLED, version=2, **here)
    folder = data_root() / "streams" / f"{re.sub(r'[^A-Za-z0-9]+', '-', given).strip('-')}-{split}-{key}"
    if not (folder / "description.json").exists():
        source = _Source(spec)
        for own, shared in source.splits(split):
            with suppress(_NoLabels), atomic_folder(folder) as temporary:
                tenths = _TENTHS[split] if shared else range(10)
                write_json(temporary / "description.json", _save(source, own, tenths, n_wanted, half, seed, temporary))
                break
        else:
            few = "; of its one part eight of ten rows are train, one is val and one is test" if shared else ""
            raise ValueError(f"{spec} ({split}) gave no images with a label{few}.")
    description = read_json(folder / "description.json")
    labels = description["labels"]
    if n_images is None and len(labels) == STREAMED:
        warnings.warn(f"The first {STREAMED:,} images of {spec} ({split}) are read; ask for more by n_images.", stacklevel=3)
    return Listing(description["class_names"], labels, ImageFiles(folder, list(map(_file, range(len(labels))))))


def _files_here(repository: str) -> dict[str, str]:
    """What lies in the files of a local repository, or of shards, which may be exchanged for others."""
    places = [Path(place) for place in glob(repository) or glob(repository.rpartition(":")[0])]
    files = sorted(str(path.absolute()) for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file())
    return {"contents": ImageFiles("/", files).contents(range(len(files)))} if files else {}


class _NoLabels(Exception):
    pass


def _file(i: int) -> str:
    return f"{i // 1000:04d}/{i % 1000:03d}"


def _save(source: _Source, own: str, tenths: Sequence[int], n_images: int, half: str | None, seed: int, folder) -> dict[str, Any]:
    """Write a stream's pictures as they come; what they are."""
    with _reaching(source.spec):
        stream = source.load(own, streaming=True)
        if stream.features is None:
            raise OSError(f"the columns of split {own!r} can't be told")
    image, label = source.columns(stream.features)
    if label is not None and not hasattr(stream.features[label], "names"):
        said = f"{source.spec}: the classes in column {label!r} are not known beforehand; images are read without labels."
        warnings.warn(said, stacklevel=5)
        label = None
    names = [] if label is None else class_names(stream.features[label].names)
    unwanted = set(range(len(names))) - set(half_of_classes(len(names), half))
    stream = source.encoded(stream, image, *([] if label is None else [label])).shuffle(seed=seed, buffer_size=_SHUFFLED)
    labels: list[int] = []
    without: list[int] = []
    with _reaching(source.spec), tqdm(total=n_images, desc=f"streaming {source.spec}", unit="image", leave=False) as bar:
        for i, row in enumerate(stream if n_images else ()):
            found = UNLABELLED if label is None else row[label]
            if i % 10 not in tenths or found in unwanted:
                continue
            content = _bytes(row[image])
            if content is None or (names and found in (None, UNLABELLED)):
                without.append(i)
            else:
                path = folder / _file(len(labels))
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                labels.append(found)
                bar.update()
            if len(labels) == n_images or (not labels and len(without) == _SHUFFLED):
                break
    if not labels:
        raise _NoLabels
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        warnings.warn(f"{len(without):,} rows of {source.spec} ({own}) have no image or no label and are left out: {shown}.", stacklevel=5)
    return {"source": source.spec, "split": own, "seed": seed, "class_names": names, "labels": labels, "left_out": without}


def _bytes(image: dict[str, Any] | None) -> bytes | None:
    if image is None or image["bytes"] is not None or not image["path"]:
        return None if image is None else image["bytes"]
    with suppress(OSError), fsspec.open(image["path"], "rb") as file:
        return file.read()
    return None


class _Source:
    """A repository and one of its configurations: ``<kind>:<repository>[:<configuration>][?image=<column>&label=<column>]``."""

    def __init__(self, spec: str):
        given, _, wanted = spec.partition("?")
        self.spec, self.wanted = spec, dict(parse_qsl(wanted))
        self.kind, *self._given = given.split(":", 2)
        self.repository, self.configuration = [*self._given, ""][:2]
        self._files: dict[str, Any] = {}
        if self.repository.endswith(".tar"):  # shards in the form of webdataset, of one name or a pattern
            self._given, self._files = ["webdataset"], {"data_files": self.repository}
        if unknown := self.wanted.keys() - {"image", "label"}:
            raise ValueError(f"{spec}: unknown option {min(unknown)!r}; expected ?image=<column>&label=<column>.")
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{spec} needs the package `datasets`: pip install datasets.") from error
        self.datasets = datasets

    def splits(self, split: str) -> Iterator[tuple[str, bool]]:
        """What to read for a split, the best first, and whether a share of it is meant."""
        with _reaching(self.spec):
            if self.configuration and self.configuration not in (valid := self.datasets.get_dataset_config_names(self.repository)):
                raise ValueError(self._choose(valid))
            try:
                self.present = self.datasets.get_dataset_split_names(*self._given, **self._files)
            except ValueError as error:  # several configurations, and none of them is the default
                valid = self.datasets.get_dataset_config_names(self.repository)
                raise (ValueError(self._choose(valid)) if len(valid) > 1 else OSError(str(error))) from error
        names, shared = find_split(split, self.present, self.spec)
        return ((name, shared) for name in names)

    def _choose(self, valid: Sequence[str]) -> str:
        wrong = f"has no configuration {self.configuration!r}" if self.configuration else "has several configurations"
        return f"{self.spec} {wrong}. Name one of them, as in {self.kind}:{self.repository}:{valid[0]}: {', '.join(valid)}."

    def load(self, own_split: str, **options: Any):
        return self.datasets.load_dataset(*self._given, split=own_split, **self._files, **options)

    def encoded(self, data, image: str, *others: str):
        """Some columns alone, with pictures as bytes or paths, which one function opens: ``datasets`` has another way."""
        return data.select_columns([image, *others]).cast_column(image, self.datasets.Image(decode=False))

    def columns(self, features) -> tuple[str, str | None]:
        """Of the image and of its label, where there is one."""
        for role, name in self.wanted.items():
            if name not in features:
                raise ValueError(f"{self.spec} has no column {name!r} for its {role}; it has {', '.join(features)}.")
        kinds = self.datasets.Image, self.datasets.ClassLabel, getattr(self.datasets, "Value", ())
        pictures, classes, plain = ([name for name, feature in features.items() if isinstance(feature, kind)] for kind in kinds)
        image = self.wanted.get("image") or next((name for name in (*IMAGES, *pictures) if name in pictures), None)
        found = (*(name for name in (*LABELS, *classes) if name in classes), *(name for name in LABELS if name in plain), None)
        label = self.wanted.get("label") or found[0]
        if image not in pictures:
            raise ValueError(f"{self.spec} needs a column of images (of datasets.Image); it has {dict(features)}.")
        for role, taken, others in (("image", image, pictures), ("label", label, classes)):
            if len(others) > 1 and role not in self.wanted:
                said = f"{self.spec} has the {role} columns {', '.join(others)}; {taken!r} is read. Choose by ?{role}=<column>."
                warnings.warn(said, stacklevel=4)
        if label is None:
            said = f"{self.spec} has no label column, as ?label=<column> would name one: images are read without labels."
            warnings.warn(said, stacklevel=4)
        return image, label

    def classes(self, label: str, values: dict[str, Iterable[Any]], own: str) -> tuple[list[str], list[int]]:
        """Names and labels of a column of plain values: its classes are the different ones of all splits, sorted."""
        found = {split: [None if each in ("", UNLABELLED) else each for each in column] for split, column in values.items()}
        every = [each for column in found.values() for each in column if each is not None]
        if odd := [each for each in every if not isinstance(each, str | Real) or (isinstance(each, Real) and not float(each).is_integer())]:
            raise ValueError(f"{self.spec}: column {label!r} holds {odd[0]!r}, which names no class. Choose another by ?label=<column>.")
        order = {each: i for i, each in enumerate(sorted(set(every)))}
        names = class_names(int(each) if isinstance(each, float) else each for each in order)
        return names, [UNLABELLED if each is None else order[each] for each in found[own]]


@contextmanager
def _reaching(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # OSError: DatasetNotFoundError and all that requests and huggingface_hub raise; RuntimeError: a script in place of data
        if not isinstance(error, OSError | RuntimeError) and not type(error).__module__.startswith("datasets."):
            raise
        raise FileNotFoundError(
            f"{spec} could not be read ({type(error).__name__}: {shortened(error)}). Give the name of a repository of huggingface.co/datasets (private and gated "
            "ones need `hf auth login`) or of a local folder that `datasets` reads; without a network, a folder of images, <class>/<image>, will do."
        ) from error
