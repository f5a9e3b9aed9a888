"""What travels to the page, as pure functions: pictures, heat maps and colours from arrays to bytes and back.

A heat map travels as one byte a patch, 196 bytes on a 14x14 grid, and is coloured and blended in the page. The code is the
square root of the activation, so that steps are fine near zero, where thresholds are, and coarse near the maximum:
``value = scale * (byte / 255) ** 2``. :func:`patchsae_utils.plots.heat.blend` does in Python what the page does, for static figures.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_picture(picture: np.ndarray, quality: int = 92) -> bytes:
    """A picture, uint8 [H, W, 3], as JPEG without chroma subsampling: crisp edges, a few kilobytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_heats(heats: np.ndarray) -> tuple[bytes, float]:
    """Heat maps [n, H, W] as one byte a patch, and the activation that byte 255 stands for: 1 when nothing is active."""
    heats = np.asarray(heats, np.float32)
    if heats.ndim != 3:
        raise ValueError(f"Heat maps have shape [n, rows, columns], got {list(heats.shape)}.")
    if not np.isfinite(heats).all() or (heats < 0).any():
        raise ValueError("Heat maps hold activations: finite and not negative. Pass latents after the SAE's nonlinearity.")
    scale = float(heats.max(initial=0.0)) or 1.0
    return np.round(255 * np.sqrt(heats / scale)).astype(np.uint8).tobytes(), scale
