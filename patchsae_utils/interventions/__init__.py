"""Interventions: change latents, let the network finish, see what it says.

Masks of many latents (`masks`), edits of single ones (`steering`), which latents matter (`choosing`, `attribution`), what an edit does to concepts (`effects`).
All edits go through `tail`, the part of the network behind the hook. May import: concepts, latents, sae, clip, data, run.
"""

from .attribution import attribute_latents, attribution_check
from .effects import (
    concept_latents,
    concept_specificity,
    dose_response,
    rank_concepts,
    rank_latents,
    remove_objects,
    specificity,
    summarize_effects,
    swap_colors,
)
from .masks import CHOICES, sweep_masks
from .steering import Edit, steer
from .tail import dataset_head

__all__ = [
    "CHOICES",
    "Edit",
    "attribute_latents",
    "attribution_check",
    "concept_latents",
    "concept_specificity",
    "dataset_head",
    "dose_response",
    "rank_concepts",
    "rank_latents",
    "remove_objects",
    "specificity",
    "steer",
    "summarize_effects",
    "swap_colors",
    "sweep_masks",
]
