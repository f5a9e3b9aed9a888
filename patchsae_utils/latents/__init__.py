"""Latents: one pass over a data set, and what it says of every latent.

Statistics (`summary`), likeness (`likeness`), pictures (`pictures`), other domains (`domains`), other seeds (`stability`). May import: sae, activations, clip, data, run.
"""

from .pictures import activation_levels, reference_images, seen_image
from .reading import latent_masks, summarize_latents
from .summary import LatentSummary

__all__ = ["LatentSummary", "activation_levels", "latent_masks", "reference_images", "seen_image", "summarize_latents"]
