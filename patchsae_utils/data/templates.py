"""Prompt templates for zero-shot heads: the embedded world's own, OpenAI's 80 for ImageNet, and one a data set as CoOp and MaPLe use."""

from __future__ import annotations

from open_clip import OPENAI_IMAGENET_TEMPLATES

from .openmoji import TEMPLATES as OPENMOJI_TEMPLATES
from .paper_sets import PAPER_SETS

# Source: CUSTOM_TEMPLATES of CoOp (Zhou et al., IJCV 2022; trainers/zsclip.py), after Radford et al., 2021; for ImageNet OpenAI's 80.
TEMPLATES: dict[str, tuple[str, ...]] = {
    **{name: (entry.template,) for name, entry in PAPER_SETS.items()},
    "openmoji": OPENMOJI_TEMPLATES,
    "imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}
_OTHER_NAMES = {
    alias.lower(): name
    for name, entry in PAPER_SETS.items()
    for alias in (entry.torchvision, *(folder.split("/")[0] for folder in entry.folders))
}


def name_of(spec: str) -> str:
    """The last part of a data set's ``spec``: ``DTD`` of ``torchvision:DTD?root=/data``, ``pets`` of ``/data/pets/``."""
    return spec.partition("?")[0].rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]


def templates_for(spec: str) -> tuple[str, ...]:
    """The templates that suit a data set's ``spec``; OpenAI's 80 where none are known.

    Parameters
    ----------
    spec : str
        As for ``load_dataset``: ``openmoji/animals``, ``oxford_pets``, ``torchvision:DTD``, a folder, ... A folder of the name of one of the paper's
        data sets, CoOp's or torchvision's, gets its template.
    """
    name = spec.split("/")[0] if spec.startswith("openmoji") else name_of(spec).lower()
    return TEMPLATES.get(_OTHER_NAMES.get(name, name), TEMPLATES["imagenet"])
