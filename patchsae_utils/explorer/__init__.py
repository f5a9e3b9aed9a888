"""Explorers for the notebook: widgets that show a latent, an image and its patches. See :mod:`.widgets`.

The widgets are imported when asked for: :mod:`.cards` does not need them.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "AdaptationView": "adaptation",
    "LatentExplorer": "latent_explorer",
    "PatchExplorer": "patch_explorer",
    "SteeringPanel": "steering",
    "export_gallery": "gallery",
    "latent_slider": "sliders",
    "link": "widgets",
    "point": "pointing",
    "slider": "sliders",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
