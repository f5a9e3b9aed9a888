"""Prompt templates for zero-shot heads: the embedded world's own, OpenAI's 80 for ImageNet, and one a data set as CoOp and MaPLe use."""

from __future__ import annotations

from open_clip import OPENAI_IMAGENET_TEMPLATES

from .openmoji import TEMPLATES as OPENMOJI_TEMPLATES

# Source: the hand-written prompts of CoOp (Zhou et al., IJCV 2022), table of data sets.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "openmoji": OPENMOJI_TEMPLATES,
    "imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
    "caltech101": ("a photo of a {}.",),
    "oxfordiiitpet": ("a photo of a {}, a type of pet.",),
    "stanfordcars": ("a photo of a {}.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "fgvcaircraft": ("a photo of a {}, a type of aircraft.",),
    "sun397": ("a photo of a {}.",),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}


def templates_for(spec: str) -> tuple[str, ...]:
    """The templates that suit a data set's ``spec``; OpenAI's 80 where none are known.

    Parameters
    ----------
    spec : str
        As for ``load_dataset``: ``openmoji/animals``, ``torchvision:DTD``, a folder, ...
    """
    name = spec.split("/")[0] if spec.startswith("openmoji") else spec.rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]
    return TEMPLATES.get(name.lower(), TEMPLATES["imagenet"])
