"""Latents: one pass over a data set, and what it says of every latent.

Statistics (`summary`, `measures`), what else reads the same pass (`passes`, `likeness`), latents of a class (`classes`), pictures
(`pictures`), other domains and written words (`domains`). May import: sae, activations, clip, data, run.
"""

from .classes import class_scores, top_latents
from .domains import cross_domain_references, text_and_image_latents, word_scenes
from .measures import contrasting_latents, shuffled_label_entropy
from .pictures import activation_levels, level_overlap, reference_images, seen_image
from .reading import latent_masks, summarize_latents
from .summary import LatentSummary

__all__ = [
    "LatentSummary", "activation_levels", "class_scores", "contrasting_latents", "cross_domain_references", "latent_masks", "level_overlap",
    "reference_images", "seen_image", "shuffled_label_entropy", "summarize_latents", "text_and_image_latents", "top_latents", "word_scenes",
]  # fmt: skip
