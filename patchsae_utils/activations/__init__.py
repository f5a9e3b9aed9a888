"""Activations: residual streams of a data set on disk, or computed while they are read.

`extract_activations` writes an `ActivationStore`; `streaming` computes instead; `layers` says what each layer's tokens hold. May import: clip, data, run.
"""

from .extraction import extract_activations
from .layers import norm_table, patch_components, probe_layers, probe_sentence, survey_residuals
from .store import ActivationStore
from .streaming import TokenStream

__all__ = [
    "ActivationStore", "TokenStream", "extract_activations", "norm_table", "patch_components", "probe_layers", "probe_sentence", "survey_residuals",
]  # fmt: skip
