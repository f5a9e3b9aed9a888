"""What a data set's spec means: one function opens any of them."""

from __future__ import annotations

from pathlib import Path

from . import folders, hub_sets, paper_sets, truth
from .dataset import ImageData
from .openmoji import OpenMojiData
from .splits import check_split, share


def load_dataset(spec: str, split: str, *, n_images: int | None = None, half: str | None = None, seed: int = 0) -> ImageData | OpenMojiData:
    """Open a data set.

    Where a source has no split ``val``, its ``test`` serves, and where it has no ``test``, its ``val``; where it has neither, its one part is split
    80/10/10 within each class, of at least three images, drawn with ``seed``. Classes are those of all its splits. A source without labels gives a
    data set without classes (``has_labels`` is False, labels are -1).

    Parameters
    ----------
    spec : str
        ``openmoji/<task>[:<domain>]``; a folder (``<split>/<class>/<image>`` or ``<class>/<image>``; without labels ``<split>/<image>`` or
        ``<image>``); ``list:<file>``, or a ``.txt`` file, that names a picture a line; one of the paper's eleven (``caltech101``, ``oxford_pets``,
        ``stanford_cars``, ``flowers102``, ``food101``, ``fgvc_aircraft``, ``sun397``, ``dtd``, ``eurosat``, ``ucf101``, ``imagenet``; a folder of such
        a name is written ``./dtd``); ``torchvision:<Name>``; ``hf:<repository>[:<configuration>]``; or ``hf-stream:<repository>[:<configuration>]``,
        of which only ``n_images`` are fetched (10,000 if no number is given). Names may end in ``?root=<folder>`` that holds the data set, instead of
        ``$PATCHSAE_DATA``; those of the hub in ``?image=<column>&label=<column>``. Without labels, but with what every pixel shows:
        ``coco:<images>:<annotations.json>[:<more.json>...]`` and ``masks:<images>:<label images>[:<names.txt>]``.
    split : str
        ``train``, ``val`` or ``test``.
    n_images : int, optional
        Take so many.
    half : {"base", "novel"}, optional
        Only this half of the classes, relabelled from 0.
    seed : int
        Draws the scenes, or the subset.

    Returns
    -------
    ImageData or OpenMojiData

    Raises
    ------
    ValueError
        For an unknown spec, task, domain, split, configuration or half (the message names the valid ones); a wrong label; classes of too few
        images to be split; a half of a data set without labels.
    FileNotFoundError
        For a missing folder; the message says what is expected in it.
    """
    check_split(split)
    if spec.startswith(("coco:", "masks:")):
        return truth.read_masked(spec, split, half, n_images, seed)
    if spec.startswith("openmoji/"):
        task, _, domain = spec.removeprefix("openmoji/").partition(":")
        return OpenMojiData(task, split, domain or "color", half, n_images, seed)
    kind, _, rest = spec.partition(":")
    name, _, root = rest.partition("?root=")
    if kind == "hf":
        listing = hub_sets.read_hub(rest, split)
    elif kind == "hf-stream":
        listing = hub_sets.read_stream(rest, split, n_images, half, seed)
    elif (one_of_eleven := paper_sets.paper_name(spec)) is not None:
        listing = paper_sets.read_paper_set(one_of_eleven, split, spec.partition("?root=")[2])
    elif kind == "torchvision":
        listing = paper_sets.read_torchvision(name, split, root)
    elif kind == "list" or (spec.endswith(".txt") and not Path(spec).is_dir()):
        listing = folders.read_list(Path(spec.removeprefix("list:")))
    else:
        listing = folders.read_folder(Path(spec), split)
    names, labels, opener, ends = listing
    rows = share(labels, split, ends, seed, names, spec) if ends else None
    return ImageData(spec, split, names, labels, opener, half, n_images, seed, rows)


def has_truth(data) -> bool:
    """Whether a data set, or the one that a spec means, knows what every patch shows. Opens nothing."""
    return data.startswith(("openmoji/", "coco:", "masks:")) if isinstance(data, str) else hasattr(data, "truth")
