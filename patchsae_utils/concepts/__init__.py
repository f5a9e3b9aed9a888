"""Concepts: latents against ground truth, beside baselines, in places, and by name.

May import: latents, sae, activations, clip, data, run.
"""

from .names import label_latents

__all__ = ["label_latents"]
