"""Concepts: what latents mean, measured on scenes whose every patch is known.

The best latent of each concept (`detection`, `report`), beside other dictionaries and a supervised probe (`comparison`, `baselines`,
`probes`), where in the image (`places`), whether it moves when one thing is changed (`pairs`), and names from ground truth, labels or text
(`names`). May import: latents, sae, activations, clip, data, run.
"""

from .names import label_latents, make_vocabulary, name_agreement, related_names, say_names, score_words
from .places import concept_examples, localize

__all__ = [
    "concept_examples", "label_latents", "localize", "make_vocabulary", "name_agreement", "related_names", "say_names", "score_words",
]  # fmt: skip
