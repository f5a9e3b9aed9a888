"""Concepts: what latents mean, measured on scenes whose every patch is known.

The best latent of each concept and the report of it (`detection`, `report`), beside other dictionaries and a supervised probe
(`comparison`, `baselines`, `probes`), where in the image (`places`), and names from ground truth, labels or text (`names`). May import:
latents, sae, activations, clip, data, run.
"""

from .names import label_latents, make_vocabulary, name_agreement, related_names, score_words
from .places import concept_examples, localize
from .report import ComparisonReport, ConceptReport

__all__ = [
    "ComparisonReport",
    "ConceptReport",
    "concept_examples",
    "label_latents",
    "localize",
    "make_vocabulary",
    "name_agreement",
    "related_names",
    "score_words",
]
