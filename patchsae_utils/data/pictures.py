"""Picture files as RGB, whatever they are; a broken one is named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class BrokenImage(ValueError):
    """A picture that can't be decoded.

    Attributes
    ----------
    where : str
        The file, or the place in the data set.
    reason : str
    """

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return (
            f"{self.where} can't be read as an image: {self.reason}. Replace it or take it away, or let broken images be left out "
            "(data.max_broken above 0; if it is, this one has changed since all were checked: delete the report in runs/<profile>/images)."
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB: turned as its camera says (EXIF), the first frame of an animation, 16 bits a channel scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert would cut off all above 255
        values = np.asarray(image).astype(np.float32)
        image = Image.fromarray((values * (255 / 65535)).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def open_image(path: str | os.PathLike, draft: bool = False) -> Image.Image:
    """A picture from disk as RGB (see :func:`as_rgb`).

    Parameters
    ----------
    path : path
    draft : bool
        A JPEG at an eighth of its size: as good for telling whether the file is whole, and quicker.

    Raises
    ------
    BrokenImage
        If it can't be read, naming the file.
    """
    try:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (1, 1))
            image.load()
            return as_rgb(image)
    except Exception as error:  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        size = f" ({Path(path).stat().st_size:,} bytes)" if Path(path).exists() else ""
        raise BrokenImage(f"{path}{size}", _first_line(error).replace(f" {str(path)!r}", "")) from error


class ImageFiles:
    """Opener of picture files: place -> RGB picture.

    Names are kept as one block of bytes: 1.3 million strings would take 150 MB, and as much again in every process that opens pictures, which by
    counting references copies the pages that they lie on.

    Parameters
    ----------
    root : path
    names : sequence of str
        Relative to ``root``.
    """

    def __init__(self, root: str | os.PathLike, names: Sequence[str]):
        self.root = str(root)
        encoded = [os.fsencode(name) for name in names]
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def where(self, i: int) -> str:
        """The file."""
        return os.path.join(self.root, os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]].tobytes()))

    @property
    def source(self) -> str:
        """Names the list of files, not their contents: 16 hex digits."""
        digest = hashlib.sha256(self.root.encode(errors="surrogateescape"))
        digest.update(self._ends.astype(np.int64).tobytes() + self._names.tobytes())
        return digest.hexdigest()[:16]

    def contents(self, rows: Sequence[int]) -> str:
        """Names what lies in the files' place: names, sizes, times of change."""
        digest = hashlib.sha256()
        for path in map(self.where, rows):
            try:
                state = os.stat(path)
                size, time = state.st_size, state.st_mtime_ns
            except OSError:  # the one who opens it says so
                size = time = -1
            digest.update(f"{os.path.relpath(path, self.root)}\0{size}\0{time}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def __call__(self, i: int) -> Image.Image:
        return open_image(self.where(i))

    def check(self, i: int) -> None:
        """Raise :class:`BrokenImage` if the picture is not whole."""
        open_image(self.where(i), draft=True)


class Rows:
    """Opener of a data set that has no files of its own to show: place -> RGB picture.

    Parameters
    ----------
    name, source : str
        What to call it in messages; what names the listing.
    data : sequence
    column : str or int
        Where in a row the picture is.
    known : str, optional
        What names the contents.
    """

    def __init__(self, name: str, source: str, data: Any, column: str | int, known: str | None = None):
        self.name, self.source, self._known = name, source, known
        self._data, self._column = data, column

    def where(self, i: int) -> str:
        return f"{self.name}, row {i}"

    def contents(self, rows: Sequence[int]) -> str | None:
        """Names what the rows hold, if that is known."""
        return self._known

    def __call__(self, i: int) -> Image.Image:
        return decoded(lambda: self._data[i][self._column], self.where(i))

    def check(self, i: int) -> None:
        self(i)


def decoded(read: Callable[[], Image.Image], where: str) -> Image.Image:
    """What ``read`` returns as RGB; whatever it raises as :class:`BrokenImage` of ``where``."""
    try:
        return as_rgb(read())
    except BrokenImage:
        raise
    except Exception as error:
        raise BrokenImage(where, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
