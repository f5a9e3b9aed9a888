"""Adaptation: adapted models, their fitting, and what their gain is made of.

Adapted models (`prompts`, `models`) have the interface of a `ClipModel`; `fit` and `official` make and read them. One dictionary reads CLIP
and the adapted model (`compare`), the gain is taken apart (`gain`, `links`), a joint dictionary says what is new (`joint`,
`novelty`), `concepts` shows it, `told` says it. May import: interventions, concepts, latents, sae, activations, clip, data, run.
"""

from . import told
from .compare import Remapping, base_to_novel, compare_models, masked_predictions, stack
from .concepts import remapped_concepts
from .fit import NAMES, fit_adapter, load_adapter
from .gain import explain_gain, owen_values
from .models import FineTuned, LinearHead, LoRA
from .novelty import new_latents
from .prompts import CoOp, MaPLe, VisualPrompt

__all__ = [
    "NAMES", "CoOp", "FineTuned", "LinearHead", "LoRA", "MaPLe", "Remapping", "VisualPrompt", "base_to_novel", "compare_models", "explain_gain",
    "fit_adapter", "load_adapter", "masked_predictions", "new_latents", "owen_values", "remapped_concepts", "stack", "told",
]  # fmt: skip
