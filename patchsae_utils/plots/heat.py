"""The one blend of a picture with a heat map: what the explorers' pages draw, in Python for static figures.

*spotlight* darkens the picture where the latent is silent, less the more it is active: the picture keeps its colours, which matter when
the latent means one. *heat* lays a colour map over the picture, which fades to grey under it.
"""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

MODES = ("spotlight", "heat")
"""How activations are shown: the rest of the picture darkened, or colours laid over it."""


def palette(name: str = "magma") -> bytes:
    """A matplotlib colour map as 256 RGB triples: 768 bytes."""
    colors = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return np.round(colors * 255).astype(np.uint8).tobytes()


def overlay(heat: np.ndarray, scale: float, tau: float, opacity: float, mode: str = MODES[0], colors: bytes | None = None) -> np.ndarray:
    """The layer that is laid over a picture, one pixel a patch.

    Parameters
    ----------
    heat : float array [H, W]
        Activations.
    scale : float
        Activation at the top of the colour map.
    tau : float
        Activations up to it are not shown.
    opacity : float
        In [0, 1].
    mode : {"spotlight", "heat"}
    colors : bytes, optional
        As :func:`palette` makes them.

    Returns
    -------
    uint8 array [H, W, 4]
        RGBA, alpha not premultiplied.

    Raises
    ------
    ValueError
        For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}. Valid: {', '.join(MODES)}.")
    share = np.clip(heat / scale, 0, 1)
    shown = heat > tau
    layer = np.zeros((*heat.shape, 4), np.float32)
    if mode == "heat":
        table = np.frombuffer(colors or palette(), np.uint8).reshape(256, 3)
        layer[..., :3] = table[np.round(255 * share).astype(int)]
        layer[..., 3] = 255 * opacity * np.where(shown, np.sqrt(share), 0)
    else:
        layer[..., 3] = 255 * opacity * np.where(shown, 1 - np.sqrt(share), 1)
    return np.round(layer).astype(np.uint8)


def blend(
    picture: np.ndarray,
    heat: np.ndarray,
    scale: float,
    tau: float,
    opacity: float,
    mode: str = MODES[0],
    size: int = 448,
    contour: bool = False,
) -> np.ndarray:
    """A picture with a heat map over it, as the page shows it.

    Parameters
    ----------
    picture : uint8 array [H, W, 3]
    heat : float array [rows, columns]
    scale, tau, opacity, mode
        As in :func:`overlay`.
    size : int
        Width of the result, in pixels.
    contour : bool
        Whether a line, white over black, goes around the patches above ``tau``.

    Returns
    -------
    uint8 array [size * H / W, size, 3]
    """
    shape = (size, round(size * picture.shape[0] / picture.shape[1]))
    below = Image.fromarray(picture)
    if mode == "heat":
        below = Image.blend(below, below.convert("L").convert("RGB"), opacity)
    below = below.resize(shape, Image.Resampling.BILINEAR).convert("RGBA")
    layer = Image.fromarray(overlay(heat, scale, tau, opacity, mode))
    layer = layer.convert("RGBa").resize(shape, Image.Resampling.BILINEAR).convert("RGBA")  # premultiplied: clear patches don't bleed
    picture = Image.alpha_composite(below, layer).convert("RGB")
    if contour:
        _draw_contour(picture, heat > tau)
    return np.asarray(picture)


def _draw_contour(picture: Image.Image, inside: np.ndarray) -> None:
    rows, columns = inside.shape
    width, height = picture.width / columns, picture.height / rows
    padded = np.pad(inside, 1)
    lines = []
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):  # an edge between a patch and its right neighbour
        lines.append([(column * width, (row - 1) * height), (column * width, row * height)])
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([((column - 1) * width, row * height), (column * width, row * height)])
    draw, thickness = ImageDraw.Draw(picture), max(1, round(2 * picture.width / 448))
    for color, extra in (("#1a1a1a", 2), ("white", 0)):
        for line in lines:
            draw.line(line, color, thickness + extra)
