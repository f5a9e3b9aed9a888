"""Images in: the embedded OpenMoji world, folders of images, the paper's eleven data sets, Hugging Face data sets, torchvision's sets.

`load_dataset` opens any of them as a map-style sequence of `Example` with ``spec``, ``split``, ``class_names``, ``labels`` and ``name``; `batches`
reads it. One function opens pictures (`pictures`), one place knows splits, labels and class names (`splits`), one names a data set
(`dataset`). Classes are keyed by their index, never by their name: ImageNet has two called "missile". May import: run.
"""

from . import openmoji
from .dataset import Example, ImageData, dataset_fingerprint
from .loader import DeadWorker, TooManyBroken, batches, load_dataset
from .openmoji import OpenMojiData
from .paper_sets import templates_for
from .pictures import BrokenImage
from .splits import few_shot

__all__ = [
    "BrokenImage", "DeadWorker", "Example", "ImageData", "OpenMojiData", "TooManyBroken", "batches", "dataset_fingerprint", "few_shot",
    "load_dataset", "openmoji", "templates_for",
]  # fmt: skip
