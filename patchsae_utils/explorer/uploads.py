"""Pictures from strangers: an upload is bounded before it is read, decoded by few decoders, and a broken one is told in one sentence."""

from __future__ import annotations

import io

from PIL import Image

from ..data.pictures import as_rgb

MAX_BYTES = 8 * 2**20  # of the file; a notebook server's messages end at 10 MiB
MAX_PIXELS = 40_000_000  # of the decoded picture, known from the header before anything is decoded
SIDE = 1024  # longer sides are scaled down to this: CLIP sees 112 to 336 pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # the decoders that may run; Pillow has forty more


class UploadError(ValueError):
    """An upload that is no picture, or too large. The message is for the person who uploaded it."""


def read_upload(data: bytes | memoryview, name: str = "") -> tuple[Image.Image, str]:
    """Decode an uploaded picture."""
    name = "".join(c if c.isprintable() else " " for c in str(name)).strip()[:80] or "image"
    if not len(data):
        raise UploadError("The file is empty.")
    if len(data) > MAX_BYTES:
        raise UploadError(f"The file has {len(data) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are read.")
    try:
        picture = Image.open(io.BytesIO(bytes(data)), formats=FORMATS)
        width, height = picture.size
        if width * height <= MAX_PIXELS:
            picture.draft("RGB", (SIDE, SIDE))  # JPEG: decodes no more than is needed
            picture = as_rgb(picture)
    except Image.DecompressionBombError:
        raise UploadError(f"The picture is too large; at most {MAX_PIXELS // 10**6} million pixels are read.") from None
    except Exception:  # decoders raise whatever they like on broken files
        raise UploadError(f"This file can't be read as a picture; give one of {', '.join(FORMATS)}.") from None
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels, {width * height / 1e6:.0f} million"
        raise UploadError(f"The picture has {size}; at most {MAX_PIXELS // 10**6} million are read.")
    picture.thumbnail((SIDE, SIDE))
    return picture, name
