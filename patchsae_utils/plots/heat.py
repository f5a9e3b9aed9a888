"""The one blend of a picture with a heat map: what the explorers' pages draw, in Python for static figures."""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

MODES = ("spotlight", "heat")  # the rest of the picture darkened, or colors laid over a picture that fades to gray


def palette() -> bytes:
    """The color map as 256 RGB triples: 768 bytes."""
    return np.round(matplotlib.colormaps["magma"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8).tobytes()


def overlay(heat: np.ndarray, scale: float, tau: float, opacity: float, mode: str) -> np.ndarray:
    """The layer that is laid over a picture, one pixel a patch: uint8 RGBA [H, W, 4], alpha not premultiplied."""
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}. Valid: {', '.join(MODES)}.")
    share, shown = np.clip(heat / (scale or 1.0), 0, 1), heat > tau
    layer = np.zeros((*heat.shape, 4), np.float32)
    if mode == "heat":
        layer[..., :3] = np.frombuffer(palette(), np.uint8).reshape(256, 3)[np.round(255 * share).astype(int)]
        layer[..., 3] = 255 * opacity * np.where(shown, np.sqrt(share), 0)
    else:
        layer[..., 3] = 255 * opacity * np.where(shown, 1 - np.sqrt(share), 1)
    return np.round(layer).astype(np.uint8)


def blend(
    picture: np.ndarray, heat: np.ndarray, scale: float, tau: float, opacity: float, mode: str = MODES[0], size: int = 448,
    contour: bool = False,
) -> np.ndarray:  # fmt: skip
    """A picture, uint8 [H, W, 3], with a heat map [rows, columns] over it, as the page shows it: uint8 [size * H / W, size, 3].

    ``scale`` is the activation at the top of the color map; activations up to ``tau`` are not shown; ``contour``: a line around those above it.
    """
    shape = (size, round(size * picture.shape[0] / picture.shape[1]))
    below = Image.fromarray(picture)
    if mode == "heat":
        below = Image.blend(below, below.convert("L").convert("RGB"), opacity)
    below = below.resize(shape, Image.Resampling.BILINEAR).convert("RGBA")
    layer = Image.fromarray(overlay(heat, scale, tau, opacity, mode))
    layer = layer.convert("RGBa").resize(shape, Image.Resampling.BILINEAR).convert("RGBA")  # premultiplied: clear patches don't bleed
    result = Image.alpha_composite(below, layer).convert("RGB")
    if contour:
        _draw_contour(result, heat > tau)
    return np.asarray(result)


def _draw_contour(picture: Image.Image, inside: np.ndarray) -> None:
    width, height = picture.width / inside.shape[1], picture.height / inside.shape[0]
    padded = np.pad(inside, 1)
    lines = [(x, y - 1, x, y) for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1])]  # an edge between a patch and its right neighbour
    lines += [(x - 1, y, x, y) for y, x in np.argwhere(padded[1:] != padded[:-1])]
    draw, thickness = ImageDraw.Draw(picture), max(1, round(2 * picture.width / 448))
    for color, extra in (("#1a1a1a", 2), ("white", 0)):
        for left, top, right, bottom in lines:
            draw.line((left * width, top * height, right * width, bottom * height), color, thickness + extra)
