"""The embedded world: scenes composed of OpenMoji artwork (:mod:`.artwork`), with exact ground truth for every patch.

A scene, one to three objects on a background of 112x112 pixels, is a pure function of ``(seed, split, index)``: every process draws the same bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset

from . import artwork
from .artwork import BACKGROUND_KINDS, BACKGROUNDS, COLORS, N_VARIANTS, OUTLINE, PALETTE, SPRITE_SIZES, TEXTURE_SIZE, Sprites, textures
from .dataset import Example
from .splits import SPLITS, check_split, half_of_classes

__all__ = ["BACKGROUNDS", "BACKGROUND_KINDS", "COLORS", "PALETTE", "OpenMojiData"]

IMAGE_SIZE, PATCH_SIZE = 112, 8
GRID = IMAGE_SIZE // PATCH_SIZE
DOMAINS = ("color", "line", "gray", "night")

# The mixture of pretraining scenes: the line domain is hardly shown; those of layout "several" hold two or three objects of similar size.
DOMAIN_SHARES = {"color": 0.88, "gray": 0.06, "night": 0.05, "line": 0.01}
MAIN_SHARE = 0.4

TEMPLATES = (
    "a {}.", "a picture of a {}.", "a drawing of a {}.", "there is a {}.", "a {} on a plain background.",
    "a {} on grass.", "a picture of a {} on sand.", "a {} in front of a brick wall.",
)  # fmt: skip


class Placement(NamedTuple):
    """One object in a scene, in pixels and degrees counter-clockwise; ``size`` is its longer side."""

    class_id: int
    x: float
    y: float
    size: float
    angle: float
    flip: bool
    paint: tuple[int, int] | None = None  # palette color that is painted over with another one, if any: indices into ``COLORS``


class Scene(NamedTuple):
    """What is in a scene, before a pixel is drawn; a ``variant`` is a background's texture and the corner it is cut at."""

    background: int
    variant: tuple[int, int, int]
    brightness: float
    placements: tuple[Placement, ...]  # back to front
    domain: str


class SceneTruth(NamedTuple):
    """What every patch shows: shares of its 64 pixels, in [0, 1]."""

    class_ids: np.ndarray  # [n] class of each placed object
    object_share: np.ndarray  # [n, 14, 14] visible pixels of each object, outline included
    color_share: np.ndarray  # [13, 14, 14] fill of each palette color; zero in `line` and `gray`, which show none
    outline_share: np.ndarray  # [14, 14] pixels of black outline
    background: int  # index into ``BACKGROUND_KINDS``
    concepts: np.ndarray  # [m] what is shown: places in :func:`concept_names`
    masks: np.ndarray  # [m, 112, 112] the pixels that show it; those of outlines, which are thin, count twice

    @property
    def background_share(self) -> np.ndarray:
        """[14, 14] pixels that no object covers."""
        return 1 - self.object_share.sum(0)


class OpenMojiData(Dataset):
    """Scenes of the embedded world: drawn on demand, balanced over classes, with ground truth.

    Parameters
    ----------
    task : str, one of ``openmoji.tasks()``; ``"all"``; or ``"scenes"``, the mixture that the small CLIP was trained on
    split : {"train", "val", "test"}
    domain : {"color", "line", "gray", "night"}; ``scenes`` mixes them
    half : {"base", "novel"}, optional
    n_images, seed : int; by default 20 per class

    Anything unknown is a ``ValueError`` that names the valid ones.
    """

    has_labels = True
    workers: int | None = None  # processes that :func:`batches` draws scenes with; None: as many as suit the machine

    def __init__(self, task: str, split: str, domain: str = "color", half: str | None = None, n_images: int | None = None, seed: int = 0):
        table, valid = class_table(), ["all", "scenes", *tasks()]
        if task not in valid:
            raise ValueError(f"Unknown task {task!r} of the embedded world. Valid: {', '.join(valid)}.")
        check_split(split, n_images)
        if domain not in DOMAINS:
            raise ValueError(f"Unknown domain {domain!r}. Valid: {', '.join(DOMAINS)}.")
        half_of_classes(0, half)  # refuses an unknown half
        if task == "scenes" and domain != "color":
            raise ValueError(f"openmoji/scenes mixes the domains; openmoji/scenes:{domain} does not exist. Use openmoji/all:{domain}.")
        if task == "scenes" and half is not None:
            raise ValueError("openmoji/scenes mixes objects of both halves; halves are for openmoji/all and the tasks.")
        rows = table if task in ("all", "scenes") else table[table["task"] == task]
        rows = rows if half is None else rows[rows["half"] == half]
        self.task, self.split, self.domain, self.half, self.seed, self.contents = task, split, domain, half, seed, artwork.version()
        self.spec = f"openmoji/{task}" + ("" if domain == "color" else f":{domain}")
        self.name = task if domain == "color" else f"{task} ({domain})"
        self.class_ids, self.class_names = rows.index.to_numpy(), rows["name"].tolist()
        n = 20 * len(rows) if n_images is None else n_images
        self.labels = torch.arange(n) % len(rows)
        if task == "scenes":  # the class that :func:`pretraining_scene` draws first
            self.labels = torch.tensor([int(scene_rng(seed, split, i).integers(len(table))) for i in range(n)])

    def __len__(self) -> int:
        return len(self.labels)

    def scene(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec!r} ({self.split}) has {len(self)} images; there is no index {index}.")
        if self.task == "scenes":
            return pretraining_scene(self.seed, self.split, index)
        main = int(self.class_ids[self.labels[index]])
        return draw_scene(scene_rng(self.seed, self.split, index), main, "main", self.domain)

    @property
    def concept_names(self) -> tuple[str, ...]:
        return concept_names()

    @property
    def families(self) -> dict[str, list[str]]:
        """Each category's objects, by their concepts' names."""
        return {f"category:{kind}": [f"object:{name}" for name in rows] for kind, rows in class_table().groupby("category")["name"]}

    def truth(self, index: int) -> SceneTruth:
        return scene_truth(self.scene(index))

    def __getitem__(self, index: int) -> Example:
        return Example(Image.fromarray(render(self.scene(index))), int(self.labels[index]), index)


@lru_cache
def class_table() -> pd.DataFrame:
    """One row a class: codepoint, name, task, half (base or novel), category, caption tier. Sorted by task, then name."""
    with (resources.files("patchsae_utils.data") / "openmoji_classes.csv").open("rb") as file:
        return pd.read_csv(file, dtype=str)


def sprites() -> Sprites:
    """The pictures of all classes, in the order of :func:`class_table`."""
    return artwork.load_sprites(tuple(class_table()["codepoint"]))


def tasks() -> list[str]:
    """Names of the label sets, besides ``all``."""
    return list(_codes("task")[1])


@lru_cache
def concept_names() -> tuple[str, ...]:
    """Every ground-truth concept, in the order of :func:`concept_masks`: ``object:dog``, ``category:bird``, ``color:red``, ..."""
    kinds = {"object": class_table()["name"], "category": _codes("category")[1], "color": COLORS, "background": BACKGROUND_KINDS}
    return (*(f"{kind}:{name}" for kind, names in kinds.items() for name in names), "outline")


def concept_masks(truth: SceneTruth) -> np.ndarray:
    """bool [n_concepts, 14, 14]: which concepts (:func:`concept_names`) fill half of a patch; of the thin outline half of that is enough."""
    shown = np.zeros((len(concept_names()), GRID, GRID), bool)
    patches = truth.masks.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE)
    shown[truth.concepts] = patches.mean((2, 4)) >= 0.5
    return shown


def scene_rng(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The scene's own random numbers; ``stream`` 0 draws the scene, 1 its caption."""
    return np.random.default_rng([seed, list(SPLITS).index(split), index, stream])


def draw_scene(rng: np.random.Generator, main: int, layout: str = "main", domain: str = "color") -> Scene:
    """Choose objects, places and background. Layout ``main``: one large object, often with small ones of other tasks; ``several``: two or three."""

    def place(class_id: int, x: float, y: float, size: float, jitter: float) -> Placement:
        dx, dy = rng.uniform(-jitter, jitter, 2)
        return Placement(int(class_id), x + dx, y + dy, size, rng.uniform(-20, 20), bool(rng.random() < 0.5))

    placements = []
    if layout == "main":
        size, tasks_of = rng.uniform(58, 96), _codes("task")[0]
        main_placement = place(main, IMAGE_SIZE / 2, IMAGE_SIZE / 2, size, (IMAGE_SIZE - size) / 2)
        others = np.flatnonzero(tasks_of != tasks_of[main])
        for _ in range(rng.integers(1, 3) if rng.random() < 0.5 else 0):
            # Small things go behind the main one and to the edge that it leaves free.
            x = 16 if main_placement.x > IMAGE_SIZE / 2 else IMAGE_SIZE - 16
            placements.append(place(rng.choice(others), x, rng.uniform(14, 98), rng.uniform(20, 32), 4))
        placements.append(main_placement)
    else:
        n_objects, low, high, jitter = (2, 42, 60, 6) if rng.random() < 0.6 else (3, 38, 52, 5)
        class_ids = [main, *rng.integers(0, len(class_table()), n_objects - 1)]
        if n_objects == 2:
            spots = [[(30, 56), (82, 56)], [(56, 30), (56, 82)], [(32, 32), (80, 80)], [(32, 80), (80, 32)]][rng.integers(4)]
        else:
            spots = [[(30, 30), (82, 30), (30, 82), (82, 82)][i] for i in rng.permutation(4)[:3]]
        order = rng.permutation(n_objects)
        placements = [place(class_ids[i], spots[j][0], spots[j][1], rng.uniform(low, high), jitter) for j, i in enumerate(order)]

    kinds = ["plain", "paper"] if domain == "line" else BACKGROUND_KINDS  # black lines need light paper
    background = BACKGROUND_KINDS.index(kinds[rng.integers(len(kinds))])
    variant = (int(rng.integers(N_VARIANTS)), int(rng.integers(TEXTURE_SIZE - IMAGE_SIZE)), int(rng.integers(TEXTURE_SIZE - IMAGE_SIZE)))
    return Scene(background, variant, float(rng.uniform(0.88, 1.08)), tuple(placements), domain)


def pretraining_scene(seed: int, split: str, index: int) -> Scene:
    """Scene ``index`` of the mixture that the small CLIP is trained on: all domains, one large object or several of similar size."""
    rng = scene_rng(seed, split, index)
    main = int(rng.integers(len(class_table())))
    domain = str(rng.choice(list(DOMAIN_SHARES), p=list(DOMAIN_SHARES.values())))
    return draw_scene(rng, main, "main" if rng.random() < MAIN_SHARE else "several", domain)


def render(scene: Scene, sheet: Sprites | None = None) -> np.ndarray:
    """Draw a scene: uint8 [112, 112, 3]; ``sheet`` holds the sprites by class (default: :func:`sprites`)."""
    sheet = sheet or sprites()
    variant, top, left = scene.variant
    texture = textures()[BACKGROUND_KINDS[scene.background]][0 if scene.domain == "line" else variant]  # 0: the lightest
    canvas = texture[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].astype(np.float32)
    for placement in scene.placements:
        level = 0 if placement.size > SPRITE_SIZES[1] else 1
        sprite = (sheet.line if scene.domain == "line" else sheet.color)[level][placement.class_id]
        if placement.paint is not None and scene.domain != "line":
            sprite = artwork.painted(sprite, sheet.truth[level][placement.class_id], *placement.paint)
        patch, rows, columns = _warp(Image.fromarray(sprite, "RGBa"), placement, Image.Resampling.BILINEAR)
        layer, region = np.asarray(patch, np.float32), canvas[rows, columns]
        region *= 1 - layer[..., 3:] / 255
        region += layer[..., :3]
    if scene.domain == "gray":
        canvas = np.repeat(canvas @ np.array([0.299, 0.587, 0.114], np.float32)[:, None], 3, axis=2)
    elif scene.domain == "night":
        canvas = canvas * np.array([0.30, 0.34, 0.52], np.float32) + np.array([4, 6, 18], np.float32)
    return np.clip(canvas * scene.brightness, 0, 255).astype(np.uint8)


def scene_truth(scene: Scene) -> SceneTruth:
    """Where everything is, from the same geometry as :func:`render`."""
    sheet = sprites()
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1, np.int16)
    paint = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for i, placement in enumerate(scene.placements):
        level = 0 if placement.size > SPRITE_SIZES[1] else 1
        sprite = sheet.truth[level][placement.class_id]
        if placement.paint is not None:
            sprite = np.where(sprite == placement.paint[0] + 1, placement.paint[1] + 1, sprite).astype(np.uint8)
        patch, rows, columns = _warp(Image.fromarray(sprite, "L"), placement, Image.Resampling.NEAREST)
        visible = (mark := np.asarray(patch)) > 0
        owner[rows, columns][visible] = i
        paint[rows, columns][visible] = mark[visible]
    fill = np.where(paint & OUTLINE, 0, paint) if scene.domain in ("color", "night") else np.zeros_like(paint)
    class_ids = np.array([p.class_id for p in scene.placements], int)
    first, (category, categories) = len(class_table()), _codes("category")
    shown: dict[int, np.ndarray] = {}
    for i, class_id in enumerate(class_ids):
        for concept in (class_id, first + category[class_id]):
            shown[concept] = shown.get(concept, False) | (owner == i)
    first += len(categories)
    shown |= {first + color - 1: fill == color for color in np.unique(fill[fill > 0]).tolist()}
    shown[first + len(COLORS) + scene.background] = owner < 0
    shown[len(concept_names()) - 1] = (paint >> 7) * 2.0
    objects, colors = _shares(owner, np.arange(len(class_ids))), _shares(fill, np.arange(1, len(COLORS) + 1))
    outline, masks = _shares(paint >> 7, np.array([1]))[0], np.stack(list(shown.values())).astype(np.float32)
    return SceneTruth(class_ids, objects, colors, outline, scene.background, np.array(list(shown), int), masks)


@lru_cache
def main_colors() -> tuple[str, ...]:
    """The palette color that fills most of each class's picture (black only where nothing else is)."""
    filled = (sprite[(sprite > 0) & (sprite < OUTLINE)] for sprite in sprites().truth[0])
    counts = np.stack([np.bincount(fill, minlength=len(COLORS) + 1)[1:] for fill in filled]) * np.where(np.arange(len(COLORS)), 1, 0.01)
    return tuple(COLORS[i] for i in counts.argmax(1))  # where nothing is filled the first: black


def _warp(sprite: Image.Image, placement: Placement, resample) -> tuple[Image.Image, slice, slice]:
    """Scale, rotate and flip a square sprite; return it with the rows and columns of the canvas that it covers."""
    angle = math.radians(placement.angle)
    cos, sin = math.cos(angle), math.sin(angle)
    half = placement.size / 2 * (abs(cos) + abs(sin))
    left, right = max(0, math.floor(placement.x - half)), min(IMAGE_SIZE, math.ceil(placement.x + half))
    top, bottom = max(0, math.floor(placement.y - half)), min(IMAGE_SIZE, math.ceil(placement.y + half))
    scale, mirror = sprite.width / placement.size, -1 if placement.flip else 1
    a, b, c, d = cos * scale * mirror, -sin * scale * mirror, sin * scale, cos * scale
    dx, dy, middle = left - placement.x, top - placement.y, sprite.width / 2
    matrix = (a, b, a * dx + b * dy + middle, c, d, c * dx + d * dy + middle)
    warped = sprite.transform((right - left, bottom - top), Image.Transform.AFFINE, matrix, resample)
    return warped, slice(top, bottom), slice(left, right)


def _shares(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of each patch's pixels that hold each value: float32 [len(values), 14, 14]."""
    hits = pixels[None] == values[:, None, None]
    return hits.reshape(len(values), GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((2, 4), dtype=np.float32)


@lru_cache
def _codes(column: str) -> tuple[np.ndarray, pd.Index]:
    """[n_classes] number of each class's task or category, and their names."""
    return pd.factorize(class_table()[column], sort=True)
