"""Ground truth of pictures: which concepts each patch shows, from masks of the picture's pixels, on any model's grid.

A data set with ground truth has ``concept_names``, each "<kind>:<name>", and ``truth(index)``, which gives :class:`Regions`; ``families``, if it has
them, say which of them are a category's. Masks take the way of the picture through ``clip.preprocess``: scaled, and cropped or padded.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode

from ..run.artifacts import fingerprint, read_json
from .dataset import ImageData, Listing
from .folders import pictures_below
from .pictures import ImageFiles, open_picture
from .splits import SHARES, SPLITS, UNLABELLED, class_names, find_split

THRESHOLD = 0.5  # share of a patch's pixels from which on it shows a concept
VOID = 255  # value of label images that says nothing, unless it has a name
_NOTHING = {"background", "void", "other", "unlabeled", "unlabelled", "ignore"}
_GIVEN_KIND = re.compile(r"[a-z]+:\S.*")


class Regions(NamedTuple):
    """What a picture shows, and where; what lies in no mask shows none of the concepts."""

    concepts: np.ndarray  # [n] places in ``concept_names``; none twice
    masks: np.ndarray  # [n, H, W] of the picture's pixels, upright, or of a model's patches: whether, or to which share, they show it


def concept_masks(dataset, index: int, clip) -> np.ndarray:
    """bool [K, rows, columns]: which of ``dataset.concept_names`` each patch of a model shows in a picture."""
    truth = dataset.truth(index)
    shown = np.zeros((len(dataset.concept_names), *clip.grid), bool)
    if len(truth.concepts):
        shown[truth.concepts] = patch_shares(np.asarray(truth.masks), clip) >= THRESHOLD
    return shown


def patch_shares(masks: np.ndarray, clip) -> np.ndarray:
    """Shares of each patch's pixels, as the model sees them, in masks of a picture [n, H, W]: float [n, rows, columns]."""
    rows, columns = clip.grid
    if masks.shape[1:] == (rows, columns):
        return masks
    pixels = seen_pixels(clip.preprocess, masks.shape[1:])
    if pixels.shape != tuple(clip.image_size):
        raise ValueError(
            f"clip.preprocess makes {pixels.shape[0]} x {pixels.shape[1]} pixels of a mask, {clip.name!r} reads {clip.image_size[0]} x {clip.image_size[1]}: "
            "its steps are not understood. Use transforms of torchvision, open_clip or timm."
        )
    flat = np.concatenate([np.zeros((len(masks), 1), masks.dtype), masks.reshape(len(masks), -1)], 1)  # the first: beyond the picture
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    cut = pixels[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return flat[:, cut].mean((2, 4))


@lru_cache(maxsize=64)
def seen_pixels(preprocess, size: tuple[int, int]) -> np.ndarray:
    """Which pixel of a picture of that size (height, width) each pixel of the preprocessed one shows: [h, w], counted from 1; 0 for padding."""
    places = Image.fromarray(np.arange(1, size[0] * size[1] + 1, dtype=np.int32).reshape(size))
    for step in getattr(preprocess, "transforms", ()):
        if type(step).__name__.endswith(("ToTensor", "ToImage", "Normalize")):
            break
        if hasattr(step, "size"):  # what scales, crops or pads; the rest changes colors
            step = copy.copy(step)
            for name, value in (("interpolation", InterpolationMode.NEAREST), ("fill", 0)):
                if hasattr(step, name):
                    setattr(step, name, value)
            places = step(places)
    return np.asarray(places)


class MaskedData(ImageData):
    """Pictures without labels whose pixels' concepts are known: ``annotations`` has their names and families, ``regions(row)``, ``contents(rows)``."""

    def __init__(self, annotations: Any, *arguments: Any):
        super().__init__(*arguments)
        self.annotations, self.concept_names, self.families = annotations, annotations.concept_names, annotations.families

    @property
    def contents(self) -> str | None:
        return fingerprint(pictures=super().contents, truth=self.annotations.contents(self.rows.tolist()))

    def truth(self, index: int) -> Regions:
        row = int(self.rows[index])
        concepts, masks = self.annotations.regions(row)
        return Regions(concepts, _upright(masks, self.where_row(row)))


def read_masked(spec: str, split: str) -> tuple[Listing, Any]:
    """``coco:<images>:<annotations.json>[:<more.json>...]`` or ``masks:<images>:<label images>[:<names.txt>]``."""
    kind, *places = spec.split(":")
    if len(places) < 2 or (kind == "masks" and len(places) > 3):
        form = "coco:<images>:<annotations.json>" if kind == "coco" else "masks:<images>:<label images>[:<names.txt>]"
        raise ValueError(f"{spec!r} is not of the form {form}.")
    paths = [Path(place) for place in places]
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{spec}: there is no {str(missing[0])!r}.")
    return _read_coco(paths[0], paths[1:]) if kind == "coco" else _read_label_images(paths[0], paths[1], split, *paths[2:])


def _listing(base: Path, files: list[str], missing: str, n_missing: int, ends=SHARES) -> Listing:
    if not files:
        raise FileNotFoundError(f"{missing}: none of {n_missing:,} is there.")
    if n_missing:
        warnings.warn(f"{missing}: {n_missing:,} of {n_missing + len(files):,} images are left out.", stacklevel=5)
    return Listing([], [UNLABELLED] * len(files), ImageFiles(base, files), ends)


def _concept(kind: str, name: str) -> str:
    return name if _GIVEN_KIND.fullmatch(name) else f"{kind}:{class_names([name])[0]}"


def _upright(masks: np.ndarray, picture: str) -> np.ndarray:
    """Masks as the picture is shown: those of its raw pixels, which only their size tells, are turned as its EXIF entry says."""
    with Image.open(picture) as image:
        raw, orientation = image.size[::-1], image.getexif().get(0x0112, 1)
    shown = raw[::-1] if orientation >= 5 else raw
    if masks.shape[1:] not in (raw, shown):
        raise ValueError(f"{picture} has {shown[1]} x {shown[0]} pixels, its ground truth {masks.shape[2]} x {masks.shape[1]}.")
    if masks.shape[1:] == shown:
        return masks
    across = masks.transpose(0, 2, 1)
    return {5: across, 6: across[:, :, ::-1], 7: across[:, ::-1, ::-1], 8: across[:, ::-1]}[orientation]


def _pycocotools():
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError("coco: data sets need the package `pycocotools`: pip install pycocotools.") from error


class _Coco:
    """Annotations of COCO's form: categories and supercategories are concepts; masks of one are united, those of different ones may overlap."""

    def __init__(self, files: Sequence[Path], names: Iterable[str], families: dict[str, list[str]], sizes: list, shapes: list[list]):
        self.concept_names, self.families, self._files = tuple(names), families, [str(file) for file in files]
        self._sizes, self._shapes = sizes, shapes  # of each row: (height, width); (concepts, mask) of each annotation

    def contents(self, rows: Sequence[int]) -> str:
        return ImageFiles("/", self._files).contents(range(len(self._files)))

    def regions(self, row: int) -> Regions:
        mask = _pycocotools()
        found: dict[int, list] = {}
        for concepts, shape in self._shapes[row]:
            is_encoded = isinstance(shape, dict) and isinstance(shape["counts"], str | bytes)
            try:
                encoded = shape if is_encoded else mask.frPyObjects(shape, *self._sizes[row])
            except Exception as error:  # its own are of no class
                raise ValueError(
                    f"{self._files[0]}: {str(shape)[:60]} is no mask: neither polygons of 6 numbers or more nor runs."
                ) from error
            for concept in concepts:
                found.setdefault(concept, []).extend(encoded if isinstance(encoded, list) else [encoded])
        masks = [mask.decode(mask.merge(parts)).astype(bool) for parts in found.values()]
        return Regions(np.array(list(found), int), np.stack(masks) if masks else np.zeros((0, *self._sizes[row]), bool))


def _read_coco(base: Path, files: Sequence[Path]) -> tuple[Listing, _Coco]:
    _pycocotools()  # that it is missing is said before the files are read
    images: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}
    places: dict[Any, Any] = {}
    families: dict[Any, Any] = {}
    without = 0
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
            raise ValueError(f"{file} must hold an object with images, annotations and categories, as COCO's files do.")
        if any("segments_info" in each for each in content["annotations"][:1]):
            remedy = "give instances_*.json and stuff_*.json, joined by ':'"
            raise ValueError(f"{file} is of COCO's panoptic form, whose masks are pictures; {remedy}.")
        concepts = {}
        for each in content["categories"]:
            names = [_concept("object" if each.get("isthing", 1) else "stuff", each["name"])]
            if (above := each.get("supercategory")) and above != each["name"]:
                families.setdefault(f"category:{above}", []).append(names[0])
                names.append(f"category:{above}")
            concepts[each["id"]] = [places.setdefault(name, len(places)) for name in names]
        images |= {each["id"]: each for each in content["images"]}
        for each in content["annotations"]:
            if each["category_id"] not in concepts or each["image_id"] not in images:
                raise ValueError(f"{file}: annotation {each.get('id')} is of an image or a category that the file does not list.")
            if shape := each.get("segmentation"):
                shapes.setdefault(each["image_id"], []).append((concepts[each["category_id"]], shape))
            else:
                without += 1
    if without and not shapes:
        raise ValueError(f"{files[0]} holds boxes alone; which patches show a concept needs masks (segmentation).")
    if without:
        warnings.warn(f"{without:,} annotations of {files[0]} have no mask and are left out.", stacklevel=4)
    there = [each for each in images.values() if (base / each["file_name"]).is_file()]
    listing = _listing(base, [each["file_name"] for each in there], f"Images of {files[0]} in {base}", len(images) - len(there))
    sizes = [(each["height"], each["width"]) for each in there]
    return listing, _Coco(files, places, families, sizes, [shapes.get(each["id"], []) for each in there])


class _LabelImages:
    """A picture of numbers beside each picture, one a pixel, as ADE20K and Pascal have them."""

    families: dict[str, list[str]] = {}

    def __init__(self, files: ImageFiles, names: dict[int, str], void: set[int]):
        self.concept_names, self._files, self._void = tuple(names.values()), files, void
        self._places = {value: place for place, value in enumerate(names)}
        self.contents = files.contents

    def regions(self, row: int) -> Regions:
        image = open_picture(self._files(row), convert=ImageOps.exif_transpose)
        if (pixels := np.asarray(image)).ndim != 2:
            raise ValueError(f"{self._files(row)} is a picture of colors (mode {image.mode}); a label image has one number a pixel.")
        values = [value for value in np.unique(pixels).tolist() if value not in self._void]
        if unknown := [value for value in values if value not in self._places]:
            raise ValueError(f"{self._files(row)} holds the value {unknown[0]}, for which there is no name; name them all in a names file.")
        masks = np.stack([pixels == value for value in values]) if values else np.zeros((0, *pixels.shape), bool)
        return Regions(np.array([self._places[value] for value in values], int), masks)


def _read_label_images(base: Path, labels: Path, split: str, names: Path | None = None) -> tuple[Listing, _LabelImages]:
    """Pictures and label images of the same names, in folders of splits or in one."""
    known = {name for own in SPLITS.values() for name in own}
    present = [entry.name for entry in os.scandir(base) if entry.is_dir() and entry.name.lower() in known] or ["."]
    (part, *_), shared = find_split(split, present, str(base))
    found = {os.path.splitext(name)[0]: name for name in pictures_below(labels / part)}
    pictures = pictures_below(base / part)
    pairs = [(name, found[stem]) for name in pictures if (stem := os.path.splitext(name)[0]) in found]
    missing = f"Label images of {base / part} in {labels / part}"
    listing = _listing(base / part, [name for name, _ in pairs], missing, len(pictures) - len(pairs), SHARES if shared else None)
    named = {value: str(value) for value in range(1, VOID)} if names is None else _read_names(names)
    void = {0, VOID} - {value for value in named if value}
    concepts = {value: _concept("object", name) for value, name in named.items() if value not in void}
    return listing, _LabelImages(ImageFiles(labels / part, [name for _, name in pairs]), concepts, void)


def _read_names(path: Path) -> dict[int, str]:
    """Value -> name: "<value> <name>" in each line (of several columns the last), or names alone, from 1, or 0 if the first is "background"."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
    lines = lines[1:] if lines and lines[0].split("\t")[0].lower() in ("idx", "id", "value") else lines
    numbered = [re.fullmatch(r"(\d+)[\s:,]+(.+)", line) for line in lines]
    if any(numbered):
        if not all(numbered):
            raise ValueError(f"{path}: {lines[numbered.index(None)]!r} has no number, other lines have. Expected '<value> <name>' in each.")
        return {int(each[1]): each[2].rpartition("\t")[2] for each in numbered}
    return dict(enumerate(lines, 0 if lines and lines[0].lower() in _NOTHING else 1))
