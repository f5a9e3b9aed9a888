"""Image data sets of the Hugging Face hub: whole (``hf:<repository>``), or the first images of a stream (``hf-stream:<repository>``)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..run.artifacts import atomic_folder, fingerprint, read_json, shortened, write_json
from .folders import SPLIT_FOLDERS, Opened, check_split, data_root
from .pictures import Rows, decoded

_SHUFFLED = 1000  # images of a stream that are mixed at a time: shards come in a drawn order too, but classes may lie together in each


def hugging_face(repository: str, split: str) -> Opened:
    """A map-style image data set of the hub, or of a local folder that ``datasets`` reads, with one image and one class-label column.

    Raises
    ------
    ImportError
        If the package ``datasets`` is missing.
    ValueError
        If there is no such split, or the columns can't be told.
    FileNotFoundError
        If there is no such repository, or the hub can't be reached.
    """
    datasets = _package(f"hf:{repository}")
    with _reaching(f"hf:{repository}"):
        data = datasets.load_dataset(repository, split=_split(datasets, repository, split))
    image, label = _columns(datasets, data.features, f"hf:{repository}")
    known = getattr(data, "_fingerprint", None)
    rows = Rows(f"hf:{repository} ({split})", known or f"{repository} {split} {len(data)}", data, image, known)
    return list(data.features[label].names), list(data[label]), rows


def hugging_face_stream(repository: str, split: str, n_images: int | None, seed: int = 0) -> Opened:
    """The first images of a data set that is not downloaded whole, mixed with ``seed``.

    Their encoded bytes are written to one file under :func:`~patchsae_utils.data.folders.data_root` while they arrive, and read from there
    ever after: memory holds one image at a time (and the stream's buffer of a thousand), the disk as many as were asked for.

    Raises
    ------
    ImportError
        If the package ``datasets`` is missing.
    ValueError
        If there is no such split, the columns can't be told, or the stream is empty.
    FileNotFoundError
        If there is no such repository, or the hub can't be reached.
    """
    check_split(split)
    name = re.sub(r"[^A-Za-z0-9]+", "-", repository).strip("-")
    key = fingerprint(repository=repository, split=split, n_images=n_images, seed=seed, shuffled=_SHUFFLED)
    folder = data_root() / "streams" / f"{name}-{split}-{key}"
    if not (folder / "description.json").exists():
        _save_stream(repository, split, n_images, seed, folder)
    index = load_file(folder / "index.safetensors")
    names = read_json(folder / "description.json")["class_names"]
    return names, index["labels"].tolist(), _SavedStream(f"hf-stream:{repository} ({split})", folder, index["ends"])


def _save_stream(repository: str, split: str, n_images: int | None, seed: int, folder: Path) -> None:
    datasets = _package(f"hf-stream:{repository}")
    with _reaching(f"hf-stream:{repository}"):
        chosen = _split(datasets, repository, split)
        stream = datasets.load_dataset(repository, split=chosen, streaming=True)
    image, label = _columns(datasets, stream.features, f"hf-stream:{repository}")
    names = list(stream.features[label].names)
    stream = stream.cast_column(image, datasets.Image(decode=False)).shuffle(seed=seed, buffer_size=_SHUFFLED)
    labels, ends = [], [0]
    with atomic_folder(folder) as temporary, (temporary / "images.bin").open("wb") as file:
        for row in tqdm(_first(stream, n_images), total=n_images, desc=f"streaming {repository}", unit="image", leave=False):
            content = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
            file.write(content)
            labels.append(int(row[label]))
            ends.append(ends[-1] + len(content))
        if not labels:
            raise ValueError(f"hf-stream:{repository} ({split}) gave no images.")
        save_file({"labels": np.array(labels), "ends": np.array(ends)}, temporary / "index.safetensors")
        write_json(temporary / "description.json", {"repository": repository, "split": chosen, "seed": seed, "class_names": names})


def _first(stream: Any, n: int | None) -> Iterator[dict[str, Any]]:
    yield from stream if n is None else stream.take(n)


class _SavedStream:
    """Opener of pictures that lie behind each other in one file."""

    def __init__(self, name: str, folder: Path, ends: np.ndarray):
        self.name, self.source = name, folder.name
        self._path, self._ends = folder / "images.bin", ends

    def where(self, i: int) -> str:
        return f"{self.name}, image {i} of {self._path}"

    def contents(self, rows: Sequence[int]) -> str:
        """Names what the file holds."""
        state = self._path.stat()
        return f"{self.source} {state.st_size} {state.st_mtime_ns}"

    def __call__(self, i: int) -> Image.Image:
        return decoded(lambda: self._read(i), self.where(i))

    def check(self, i: int) -> None:
        self(i)

    def _read(self, i: int) -> Image.Image:
        with self._path.open("rb") as file:
            file.seek(self._ends[i])
            return Image.open(io.BytesIO(file.read(self._ends[i + 1] - self._ends[i])))


def _package(spec: str):
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{spec} needs the package `datasets`: pip install datasets.") from error
    return datasets


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


def _split(datasets, repository: str, split: str) -> str:
    check_split(split)
    splits = datasets.get_dataset_split_names(repository)
    chosen = next((name for name in SPLIT_FOLDERS[split] if name in splits), None)
    if chosen is None:
        raise ValueError(f"hf:{repository} has no split {split!r}; it has {', '.join(splits)}.")
    return chosen


def _columns(datasets, features, spec: str) -> tuple[str, str]:
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"{spec} needs an Image and a ClassLabel column; it has {dict(features)}.")
    return image, label
