"""Interventions: change latents, let the network finish, see what it says.

All edits go through `tail`, the part of the network behind the hook, and all refuse an SAE of another model, layer or weights. ``clip``,
``sae`` and ``layer`` are everywhere a model, perhaps adapted, and an SAE that reads it after this block. Letters: B batch, T tokens (CLS,
then patches), P patches, D d_in, S d_sae, C classes, K concepts. May import: concepts, latents, sae, clip, data, run.
"""

from .attribution import attribute_latents, attribution_check
from .choosing import CHOICES
from .concept_latents import rank_concepts
from .effects import (
    clearest_latents,
    concept_specificity,
    dose_response,
    one_latent_off,
    quote,
    remove_objects,
    summarize_effects,
    swap_colors,
)
from .masks import sweep_masks
from .steering import Edit, steer
from .tail import dataset_head

__all__ = [
    "CHOICES", "Edit", "attribute_latents", "attribution_check", "clearest_latents", "concept_specificity", "dataset_head", "dose_response",
    "one_latent_off", "quote", "rank_concepts", "remove_objects", "steer", "summarize_effects", "swap_colors", "sweep_masks",
]  # fmt: skip
