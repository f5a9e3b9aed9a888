"""Masks over pictures, as arrays: heat map, contour or dimmed picture, over what CLIP saw or over the whole original.

A mask is a latent's activations on the grid of patches (:func:`patchsae_utils.latent_masks`). CLIP saw a resized and cropped picture, so a
mask belongs on that (:func:`patchsae_utils.levels.seen_image`); stretched over the original it would lie in the wrong place.
:func:`mask_on_original` undoes the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .levels import upsample_masks

MODES = ("bilinear", "nearest")

# Steps of a preprocessing that leave every pixel where it is.
_STILL = ("ToTensor", "PILToTensor", "Normalize", "ConvertImageDtype", "ToDtype", "MaybeToTensor", "MaybeConvertMode", "_convert_to_rgb")


def heat_map(
    image: Tensor | np.ndarray,
    mask: Tensor | np.ndarray,
    *,
    top: float | None = None,
    mode: str = "bilinear",
    opacity: float = 0.75,
    colors: str = "magma",
) -> np.ndarray:
    """A picture, grey where the latent is active, under the latent's activations in colour.

    Parameters
    ----------
    image : uint8 [H, W, 3]
    mask : float [rows, columns]
        Activations on the grid of patches, or [H, W] ones by pixel.
    top : float, optional
        Activation at the end of the colour map; default: the mask's largest. Give the same for pictures that are to be compared.
    mode : {"bilinear", "nearest"}
    opacity : float
        Of the strongest activation; weaker ones are the clearer.
    colors : str
        A colour map of matplotlib.

    Returns
    -------
    uint8 array [H, W, 3]

    Raises
    ------
    ValueError
        If the shapes or the mode don't fit.
    """
    from matplotlib import colormaps

    picture, strength = _prepare(image, mask, top, mode)
    heat = colormaps[colors](strength)[..., :3] * 255
    alpha = opacity * np.sqrt(strength)[..., None]
    gray = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    return _pixels((1 - alpha) * (picture + (gray - picture) * np.sqrt(strength)[..., None]) + alpha * heat)


def dimmed(
    image: Tensor | np.ndarray, mask: Tensor | np.ndarray, *, top: float | None = None, mode: str = "bilinear", darkness: float = 0.82
) -> np.ndarray:
    """A picture in its own colours, darkened where the latent is silent.

    Parameters
    ----------
    image, mask, top, mode
        As for :func:`heat_map`.
    darkness : float
        How much of the light goes where the mask is 0.

    Returns
    -------
    uint8 array [H, W, 3]
    """
    picture, strength = _prepare(image, mask, top, mode)
    return _pixels(picture * (1 - darkness * (1 - np.sqrt(strength)))[..., None])


def contour(
    image: Tensor | np.ndarray,
    mask: Tensor | np.ndarray,
    level: float,
    *,
    mode: str = "bilinear",
    width: int = 2,
    color: Sequence[int] = (213, 94, 0),
) -> np.ndarray:
    """A picture with a line around the pixels whose activation exceeds a level.

    Parameters
    ----------
    image, mask, mode
        As for :func:`heat_map`.
    level : float
        Activation, e.g. the paper's tau = 0.2.
    width : int
        Of the line, in pixels, all of it inside.
    color : three of 0 to 255

    Returns
    -------
    uint8 array [H, W, 3]

    Raises
    ------
    ValueError
        If the shapes or the mode don't fit, or width is below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 pixel, got {width}.")
    picture, _ = _prepare(image, mask, 1.0, mode)
    inside = _by_pixel(mask, picture.shape[:2], mode) > level
    core = np.pad(inside, width, mode="edge")
    size = inside.shape
    shifts = [(a, b) for a in range(2 * width + 1) for b in range(2 * width + 1)]
    kept = np.logical_and.reduce([core[a : a + size[0], b : b + size[1]] for a, b in shifts])
    picture[inside & ~kept] = color
    return _pixels(picture)


def seen_box(preprocess: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What part of an original picture CLIP sees.

    Parameters
    ----------
    preprocess : torchvision.transforms.Compose
        ``clip.preprocess``: resizing and centre-cropping; other steps that move pixels are refused.
    size : (width, height)
        Of the original, as PIL gives it.

    Returns
    -------
    left, top, right, bottom : float
        In pixels of the original.

    Raises
    ------
    ValueError
        If a step moves pixels in a way that is not known here.
    """
    width, height = size
    left, top, across, down = 0.0, 0.0, float(width), float(height)  # of the box, in the original
    for step in getattr(preprocess, "transforms", [preprocess]):
        name = getattr(step, "__name__", type(step).__name__)
        if name == "Resize":
            target = step.size if isinstance(step.size, int) else tuple(step.size)
            if isinstance(target, tuple) and len(target) == 1:
                target = target[0]
            if isinstance(target, int):
                short, long = sorted((width, height))
                new = target, int(target * long / short)
                width, height = new if width <= height else new[::-1]
            else:
                height, width = target
        elif name == "CenterCrop":
            rows, columns = (step.size, step.size) if isinstance(step.size, int) else step.size
            y, x = round((height - rows) / 2), round((width - columns) / 2)
            left, top = left + x * across / width, top + y * down / height
            across, down = columns * across / width, rows * down / height
            width, height = columns, rows
        elif name not in _STILL:
            raise ValueError(
                f"Can't tell where the step {step!r} of clip.preprocess puts a pixel; known: Resize, CenterCrop, {', '.join(_STILL)}."
            )
    return left, top, left + across, top + down


def mask_on_original(clip, mask: Tensor | np.ndarray, size: tuple[int, int], mode: str = "bilinear") -> np.ndarray:
    """A mask over the whole original picture; 0 outside the part that CLIP saw.

    Parameters
    ----------
    clip : ClipModel
        For its preprocessing.
    mask : float [rows, columns]
        Activations on the grid of patches.
    size : (width, height)
        Of the original, as PIL gives it.
    mode : {"bilinear", "nearest"}

    Returns
    -------
    float32 array [height, width]
        Which :func:`heat_map`, :func:`dimmed` and :func:`contour` take as it is.
    """
    mask = _array(mask)
    _check_mode(mode)
    left, top, right, bottom = seen_box(clip.preprocess, size)
    y = (np.arange(size[1]) + 0.5 - top) / (bottom - top)  # 0 to 1 over what was seen
    x = (np.arange(size[0]) + 0.5 - left) / (right - left)
    inside = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))[None]
    weights = [_weights(at, n, mode) for at, n in ((y, mask.shape[0]), (x, mask.shape[1]))]
    return np.where(inside, weights[0] @ mask @ weights[1].T, 0).astype(np.float32)


def _weights(at: np.ndarray, n: int, mode: str) -> np.ndarray:
    """How much each of n cells gives to points at 0 to 1 across them: [len(at), n]; outside, the last cell goes on."""
    place = at * n - (0.5 if mode == "bilinear" else 0)
    low = np.floor(place).clip(0, n - 1).astype(int)
    share = (place - low).clip(0, 1) if mode == "bilinear" else np.zeros(len(at))
    weights = np.zeros((len(at), n))
    rows = np.arange(len(at))
    np.add.at(weights, (rows, low), 1 - share)
    np.add.at(weights, (rows, (low + 1).clip(0, n - 1)), share)
    return weights


def _prepare(image, mask, top: float | None, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture as float64 [H, W, 3] and the mask over it, 0 to 1."""
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"A picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}. levels.seen_image makes one.")
    strength = _by_pixel(mask, picture.shape[:2], mode)
    scale = float(strength.max()) if top is None else float(top)
    return picture.astype(np.float64), np.clip(strength / (scale or 1.0), 0, 1)


def _by_pixel(mask, size: tuple[int, int], mode: str) -> np.ndarray:
    _check_mode(mode)
    mask = _array(mask)
    if mask.shape == tuple(size):
        return mask
    return upsample_masks(torch.from_numpy(mask)[None, None], (size[0], size[1]), mode)[0, 0].numpy()


def _array(mask) -> np.ndarray:
    mask = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask, np.float32)
    if mask.ndim != 2 or not np.isfinite(mask).all():
        raise ValueError(f"A mask is [rows, columns] of finite activations, got shape {list(mask.shape)}.")
    return mask


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}. Valid: {', '.join(MODES)}.")


def _pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
