"""Pictures as RGB, whatever they are and wherever they come from; a broken one is named."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

GROUND = "white"  # shows through the transparent parts of a picture
_DEPTHS = (255, 1023, 4095, 16383, 65535)  # largest numbers of 8 to 16 bits
_NO_PICTURES = frozenset("BUFR EPS GRIB HDF5 IPTC MPEG PALM PDF WMF".split())  # what Pillow has endings for, and can't decode


class BrokenImage(ValueError):
    """A picture that can't be decoded: ``where`` it lies (a file, or a place in a data set), and the ``reason``."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return (
            f"{self.where} can't be read as an image: {self.reason}. Replace it or take it away, or let broken images be left out "
            "(data.max_broken above 0; if it is, this one has changed since all were checked: delete the report in runs/<profile>/images)."
        )


def open_picture(source: Any, where: str | None = None, draft: bool = False, convert: Callable | None = None) -> Image.Image:
    """A path, bytes, either as ``datasets`` has it, a PIL image, an array, or what a function returns of these, as :func:`as_rgb` or ``convert``
    makes it; ``draft``: a JPEG at an eighth of its size."""
    try:
        source = source() if callable(source) else source
        source = (source["path"] if source["bytes"] is None else source["bytes"]) if isinstance(source, dict) else source
        if source is None:
            raise ValueError("there is none")
        if isinstance(source, np.ndarray):
            source = _drawn(source)
        source = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        if not isinstance(source, str | os.PathLike | Image.Image) and not hasattr(source, "read"):
            raise TypeError(f"it is a {type(source).__name__}; expected a path, bytes, a PIL image or an array")
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            if draft:
                image.draft(None, (1, 1))
            return (convert or as_rgb)(image)
    except Exception as error:  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        reason = ((getattr(error, "strerror", None) or str(error)).splitlines() or [type(error).__name__])[0].rstrip(".")
        path = Path(source) if isinstance(source, str | os.PathLike) else None
        where = where or str(path or "A picture")
        if path and path.exists():
            where += f" ({path.stat().st_size:,} bytes)"
        raise BrokenImage(where, reason.replace(f" {source if path is None else str(source)!r}", "")) from error


def _drawn(values: np.ndarray) -> Image.Image:
    if not values.size or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ValueError(f"it is an array of shape {list(values.shape)}; expected [H, W] or [H, W, channels], of 1, 3 or 4 channels")
    values = values[..., 0] if values.shape[2:] == (1,) else values
    return Image.fromarray(values if values.dtype == np.uint8 else _eight_bits(values))


def as_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: upright (EXIF), of an animation the first frame, on a white ground, deeper numbers scaled to 8 bits by their range."""
    image.load()
    with suppress(Exception):  # damaged EXIF of a picture that is whole
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(np.asarray(image), image.info.get("transparency")))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
    return image.convert("RGB")


def _eight_bits(numbers: np.ndarray, clear: Any = None) -> np.ndarray:
    """Numbers of 16 bits; others by the smallest range that holds them: that of so many bits, and of fractions up to 1; ``clear`` ones are white."""
    values, fractions = numbers.astype(np.float64), numbers.dtype.kind == "f"
    ranges = _DEPTHS[-1:] if numbers.dtype.str[1:] == "u2" else {"b": (1,), "f": (1, *_DEPTHS)}.get(numbers.dtype.kind, _DEPTHS)
    low, high, slack = values.min(), values.max(), 0.05 if fractions else 0  # resampling overshoots
    top = next((top for top in ranges if high <= (1 + slack) * top), None)
    if top is None or low < -slack * top:
        read = "fractions from 0 to 1 are read, and numbers from 0 to 255 or 65,535"
        raise ValueError(f"its values lie between {low:g} and {high:g}; {read}")
    scaled = (values * (255 / top)).clip(0, 255).round().astype(np.uint8)
    if isinstance(clear, int):
        scaled[values == clear] = 255
    return scaled


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture: not hidden, with an ending that Pillow can open."""
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind is not None and kind not in _NO_PICTURES and not name.startswith(".")


class ImageFiles:
    """Opener of picture files: row -> path. Names are relative to the root, and one array: 1.3 million strings take 150 MB in every process."""

    def __init__(self, root: str | os.PathLike, names: Sequence[str]):
        self.root, self._names = str(root), np.array([os.fsencode(name) for name in names], dtype=bytes)

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[row]))

    where = __call__

    @property
    def listing(self) -> str:
        """Names the list of files, not their contents: 16 hex digits."""
        return hashlib.sha256(self.root.encode(errors="surrogateescape") + self._names.tobytes()).hexdigest()[:16]

    def contents(self, rows: Sequence[int]) -> str:
        """Names what lies in the files' place: names, sizes, times of change; 16 hex digits."""
        digest = hashlib.sha256()
        for path in map(self, rows):
            size = time = -1
            with suppress(OSError):  # the one who opens it says so
                size, time = (state := os.stat(path)).st_size, state.st_mtime_ns
            digest.update(f"{os.path.relpath(path, self.root)}\0{size}\0{time}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


class Rows:
    """Opener of a data set without files: row -> its column. ``known`` names what it holds, where that is known."""

    def __init__(self, name: str, data: Any, column: str | int, known: str | None = None):
        self.name, self.data, self.column, self.known = name, data, column, known
        self.listing = known or f"{name}, {len(data)}"

    def where(self, row: int) -> str:
        return f"{self.name}, row {row}"

    def contents(self, rows: Sequence[int]) -> str | None:
        return self.known

    def __call__(self, row: int) -> Any:
        return self.data[row][self.column]
