"""torchvision's sets; and the paper's eleven by name: where they lie, which images are in which split, what CLIP calls their classes, and prompts.

The eleven lie as CoOp's instructions or torchvision put them. Names and prompts are CoOp's (Zhou et al., IJCV 2022); with its ``split_zhou_*.json``
so are the splits, without it a set's own; where there are none, classes are split 50/20/30 as CoOp does, and a missing val is a fifth of train.
"""

from __future__ import annotations

import csv
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torchvision
from open_clip import OPENAI_IMAGENET_TEMPLATES

from . import openmoji
from .dataset import Listing, name_of
from .folders import find_split_file, read_folder, read_split_file
from .pictures import ImageFiles, Rows
from .splits import SHARES, SPLITS, UNLABELLED, class_names, find_split

_ROOTS = "Or name the folder that holds it: {0}?root=/data, or export PATCHSAE_DATA=/data."
_ENDS, _ENDS_OF_TRAIN = (0.5, 0.7, 1.0), (0.8, 1.0)  # CoOp's p_trn and p_val; its split_trainval

_EUROSAT = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings", "Pasture": "Pasture Land", "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings", "River": "River", "SeaLake": "Sea or Lake",
}  # fmt: skip
_CALTECH = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
_CALTECH_LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")

# torchvision's names of classes -> CoOp's.
_RENAMED: dict[str, Callable[[str], str]] = {
    "Caltech101": lambda name: _CALTECH.get(name, name),
    "EuroSAT": lambda name: _EUROSAT.get(name, name),
    "OxfordIIITPet": str.lower,
    "StanfordCars": lambda name: " ".join([*name.split()[-1:], *name.split()[:-1]]),  # the year first
    "SUN397": lambda name: " ".join(reversed(name.split("/"))),  # apse/indoor
}


class PaperSet(NamedTuple):
    torchvision: str  # torchvision's class
    template: str  # CoOp's prompt
    folders: list[str]  # where it lies under the root
    page: str  # where it can be had
    splits: dict[str, str]  # torchvision's names of our splits


with (resources.files(__package__) / "paper_sets.csv").open(encoding="utf-8") as _file:
    PAPER_SETS = {  # by the names that CoOp, MaPLe and PatchSAE give them
        name: PaperSet(kind, template, folders.split(), page, dict(pair.split("=") for pair in splits.split()))
        for name, kind, template, folders, page, splits in [*csv.reader(_file)][1:]
    }


def data_root(given: str = "") -> Path:
    """Where data sets lie that are called by name."""
    return Path(given or os.environ.get("PATCHSAE_DATA") or "~/.cache/patchsae_utils/data").expanduser()


def paper_name(spec: str) -> str | None:
    """Which of the eleven a spec means: ``caltech101``, ``torchvision:Caltech101``, each with or without ``?root=...``; None for another."""
    kind, _, name = spec.partition("?")[0].rpartition(":")
    if kind == "torchvision":
        return next((key for key, entry in PAPER_SETS.items() if entry.torchvision == name), None)
    return name if not kind and name in PAPER_SETS else None


def read_paper_set(name: str, split: str, given_root: str = "") -> Listing:
    """One split of one of :data:`PAPER_SETS`; the data sets' folders lie under :func:`data_root`."""
    entry, root = PAPER_SETS[name], data_root(given_root)
    places = [root / place for place in entry.folders if (root / place).is_dir()]
    for place in places:
        if (split_file := find_split_file(place)) is not None:
            return read_split_file(split_file, split)
    if name == "imagenet":
        return _imagenet(places, split, root)
    if name == "fgvc_aircraft" and (root / "fgvc_aircraft" / "variants.txt").exists():
        return _aircraft(root / "fgvc_aircraft", split)
    if name == "ucf101":  # torchvision's are videos, of which CLIP reads one frame
        raise FileNotFoundError(_missing(name, root, "with split_zhou_UCF101.json and UCF-101-midframes in it"))
    try:
        data = _open(entry.torchvision, root, {"split": entry.splits.get(split, entry.splits["train"])} if entry.splits else {})
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_missing(name, root)} torchvision says: {error}") from error
    ends = (None if "val" in entry.splits or split == "test" else _ENDS_OF_TRAIN) if entry.splits else _ENDS
    return _listing(data, entry.torchvision, root, split, ends, _RENAMED.get(entry.torchvision, str))


def _missing(name: str, root: Path, content: str = "") -> str:
    entry = PAPER_SETS[name]
    places = " or ".join(str(root / place) for place in entry.folders)
    return (
        f"The data set {name} was sought in {places}{' ' + content if content else ''}, and is not there. Get it from {entry.page} and unpack it there, "
        f"as CoOp's DATASETS.md or torchvision.datasets.{entry.torchvision} describe. {_ROOTS.format(name)}"
    )


def _aircraft(place: Path, split: str) -> Listing:
    """CoOp's layout: ``variants.txt``, ``images_variant_<split>.txt`` with "<image> <variant>" lines, and ``images``."""
    names = [line.strip() for line in (place / "variants.txt").read_text(encoding="utf-8").splitlines()]
    lines = (place / f"images_variant_{split}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
    return Listing(names, [names.index(name) for _, name in pairs], ImageFiles(place / "images", [f"{image}.jpg" for image, _ in pairs]))


def _imagenet(places: Sequence[Path], split: str, root: Path) -> Listing:
    """Folders of WordNet ids; names are of CoOp's ``classnames.txt`` ("<id> <name>" lines) where it lies in ``imagenet``, else CLIP's."""
    place = next((place for place in [*places, root] if (place / "train").is_dir()), None)
    if place is None:
        raise FileNotFoundError(_missing("imagenet", root, "with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in it"))
    listing = root / "imagenet" / "classnames.txt"
    if not listing.exists():
        return read_folder(place, split)
    words = dict(line.strip().split(" ", 1) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip())

    def named(ids: Sequence[str]) -> list[str]:
        if unknown := [wnid for wnid in ids if wnid not in words]:
            raise ValueError(f"{listing} lacks a name for {unknown[:3]}; take it away to use CLIP's names.")
        return [words[wnid] for wnid in ids]

    return read_folder(place, split, named)


def read_torchvision(name: str, split: str, given_root: str = "") -> Listing:
    """One of torchvision's other classification sets, downloaded when it can be."""
    kind = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(kind):
        valid = ", ".join(n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n)))
        raise ValueError(f"torchvision has no data set {name!r}. Valid: {valid}.")
    accepted, root = inspect.signature(kind).parameters, data_root(given_root)
    if "split" not in accepted:
        data = _open(name, root, {"train": split == "train"} if "train" in accepted else {})
        return _listing(data, name, root, split, None if "train" in accepted else SHARES)
    for own in find_split(split, [own for names in SPLITS.values() for own in names], name)[0]:  # which there are, only trying tells
        try:
            return _listing(_open(name, root, {"split": own}), name, root, split, None)
        except ValueError as error:
            refused = error
    raise ValueError(f"torchvision's {name} has no split {split!r}: {refused}") from refused


def _open(name: str, root: Path, options: Mapping[str, str | bool]) -> Any:
    """The object of ``torchvision.datasets``, downloaded when it is not there and can be."""
    kind = getattr(torchvision.datasets, name)
    try:
        return kind(root, **options)  # a ValueError: it has no such split
    except (OSError, RuntimeError) as error:
        missing = error
    try:
        if "download" not in inspect.signature(kind).parameters:
            raise missing
        return kind(root, **options, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"torchvision's {name} is not whole under {root} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}), and could not be downloaded. "
            f"Put it there as torchvision.datasets.{name} expects it. {_ROOTS.format(name)}"
        ) from error


def _label(given: Any) -> Any:
    return UNLABELLED if given is None else given.tolist() if hasattr(given, "tolist") else given


def _first(data: Any, *attributes: str) -> Any:
    return next((found for name in attributes if (found := getattr(data, name, None)) is not None), None)


def _listing(data: Any, kind: str, root: Path, split: str, ends, renamed: Callable[[str], str] = str) -> Listing:
    """What torchvision's object knows: files where it names them, sorted (SUN397's come in the disk's order), else its rows."""
    names, labels = _first(data, "classes", "categories"), _first(data, "targets", "_labels", "labels", "y")
    files, pairs = _first(data, "_images", "_image_files"), _first(data, "samples", "_samples")
    if kind == "Caltech101":
        base, kept = Path(data.root) / "101_ObjectCategories", [y for y, name in enumerate(names) if name not in _CALTECH_LEFT_OUT]
        pairs = [(base / names[y] / f"image_{i:04d}.jpg", kept.index(y)) for i, y in zip(data.index, data.y, strict=True) if y in kept]
        names = [names[y] for y in kept]
    elif files is not None:
        pairs = zip(files, labels, strict=True)
    pairs = None if pairs is None else list(pairs)
    if not pairs or not isinstance(pairs[0][0], str | os.PathLike):
        opener: ImageFiles | Rows = Rows(f"torchvision:{kind} ({split})", data, 0)
        labels = [*map(_label, (data[i][1] for i in range(len(data))) if labels is None else labels)]
    else:
        rows = sorted((os.path.relpath(path, root), _label(label)) for path, label in pairs)
        opener, labels = ImageFiles(root, [path for path, _ in rows]), [label for _, label in rows]
    names = range(1 + max((each for each in labels if isinstance(each, int)), default=0)) if names is None else names
    return Listing(class_names(renamed(name) if isinstance(name, str) else name for name in names), labels, opener, ends)


# Source: CUSTOM_TEMPLATES of CoOp (Zhou et al., IJCV 2022; trainers/zsclip.py), after Radford et al., 2021; for ImageNet OpenAI's 80.
TEMPLATES: dict[str, tuple[str, ...]] = {
    **{name: (entry.template,) for name, entry in PAPER_SETS.items()},
    "openmoji": openmoji.TEMPLATES,
    "imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}
_OTHER_NAMES = {alias.split("/")[0].lower(): name for name, entry in PAPER_SETS.items() for alias in (entry.torchvision, *entry.folders)}


def templates_for(spec: str) -> tuple[str, ...]:
    """The prompt templates that suit a data set; OpenAI's 80 where none are known.

    Parameters
    ----------
    spec : str, as for ``load_dataset``; a folder of the name of one of the paper's data sets, CoOp's or torchvision's, gets its template
    """
    name = spec.split("/")[0] if spec.startswith("openmoji") else name_of(spec).lower()
    return TEMPLATES.get(_OTHER_NAMES.get(name, name), TEMPLATES["imagenet"])
