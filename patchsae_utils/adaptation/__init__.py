"""Adaptation: adapted models, their fitting, and what their gain is made of.

May import: interventions, concepts, latents, sae, activations, clip, data, run.
"""

from .adapters import fit_adapter, load_adapter
from .compare import Remapping, compare_models
from .gain import explain_gain
from .prompts import CoOp, MaPLe, VisualPrompt
from .weight_adapters import FineTuned, LinearHead, LoRA

__all__ = [
    "CoOp",
    "FineTuned",
    "LinearHead",
    "LoRA",
    "MaPLe",
    "Remapping",
    "VisualPrompt",
    "compare_models",
    "explain_gain",
    "fit_adapter",
    "load_adapter",
]
