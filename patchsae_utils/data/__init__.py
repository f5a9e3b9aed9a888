"""Images in: the embedded OpenMoji world, folders of images, the paper's eleven data sets, Hugging Face data sets, torchvision's sets.

`load_dataset` opens any of them as a map-style sequence of `Example` with ``spec``, ``split``, ``class_names``, ``labels`` and ``name``; `batches`
reads it. One function opens pictures (`pictures`), one place knows splits, labels and class names (`splits`), one names a data set
(`dataset`). Classes are keyed by their index, never by their name: ImageNet has two called "missile". May import: run.
"""

from . import artwork, openmoji
from .broken import TooManyBroken, without_broken
from .dataset import Example, ImageData, dataset_fingerprint, describe_dataset
from .loader import Batch, DeadWorker, batches
from .openmoji import OpenMojiData
from .paper_sets import TEMPLATES, templates_for
from .pictures import BrokenImage, open_picture
from .sources import has_truth, load_dataset
from .splits import few_shot, half_of_classes

__all__ = [
    "Batch",
    "BrokenImage",
    "DeadWorker",
    "Example",
    "ImageData",
    "OpenMojiData",
    "TEMPLATES",
    "TooManyBroken",
    "artwork",
    "batches",
    "dataset_fingerprint",
    "describe_dataset",
    "few_shot",
    "half_of_classes",
    "has_truth",
    "load_dataset",
    "open_picture",
    "openmoji",
    "templates_for",
    "without_broken",
]
