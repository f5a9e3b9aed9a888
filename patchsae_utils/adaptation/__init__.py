"""Adaptation: adapted models, their fitting, and what their gain is made of.

Adapted models (`prompts`, `models`) have the interface of a `ClipModel`; `fit` and `official` make and read them. One dictionary reads CLIP
and the adapted model (`compare`, `groups`), the gain is taken apart (`gain`, `links`), a dictionary of its own (`own_dictionary`) and a
joint one (`joint`, `novelty`) say what is new. May import: interventions, concepts, latents, sae, activations, clip, data, run.
"""

from .compare import Remapping, base_to_novel, compare_models, masked_predictions, stack
from .fit import NAMES, fit_adapter, load_adapter
from .gain import explain_gain
from .models import FineTuned, LinearHead, LoRA
from .novelty import new_latents
from .prompts import CoOp, MaPLe, VisualPrompt

__all__ = [
    "NAMES", "CoOp", "FineTuned", "LinearHead", "LoRA", "MaPLe", "Remapping", "VisualPrompt", "base_to_novel", "compare_models",
    "explain_gain", "fit_adapter", "load_adapter", "masked_predictions", "new_latents", "stack",
]  # fmt: skip
