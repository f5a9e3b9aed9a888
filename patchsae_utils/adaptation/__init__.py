"""Adaptation: adapted models, their fitting, and what their gain is made of.

Models with learned prompts (`prompts`) or changed weights (`models`) have the interface of a `ClipModel`, so every stage runs on them; `fit` fits,
saves and loads them, `official` reads other programs' prompts. One dictionary reads CLIP and the adapted model (`compare`, `groups`), the gain is taken
apart (`gain`, `links`), a dictionary of the adapted model's own is held against CLIP's (`own_dictionary`), and a joint one (`joint`) says which latents
are new (`novelty`). May import: interventions, concepts, latents, sae, activations, clip, data, run.
"""

from .compare import Remapping, base_to_novel, compare_models, masked_predictions, stack
from .fit import NAMES, fit_adapter, load_adapter
from .gain import explain_gain
from .models import FineTuned, LinearHead, LoRA
from .novelty import new_latents
from .prompts import CoOp, MaPLe, VisualPrompt

__all__ = [
    "NAMES",
    "CoOp",
    "FineTuned",
    "LinearHead",
    "LoRA",
    "MaPLe",
    "Remapping",
    "VisualPrompt",
    "base_to_novel",
    "compare_models",
    "explain_gain",
    "fit_adapter",
    "load_adapter",
    "masked_predictions",
    "new_latents",
    "stack",
]
