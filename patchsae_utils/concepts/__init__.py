"""Concepts: what latents mean, measured on scenes whose every patch is known.

The best latent of each concept and the report of it (`detection`, `report`), beside other dictionaries and a supervised probe
(`comparison`, `baselines`, `probes`), where in the image (`places`), whether it moves when one thing is changed (`pairs`), and names from
ground truth, labels or text (`names`). May import: latents, sae, activations, clip, data, run.
"""

from .comparison import compare, sae_competitor
from .names import label_latents, make_vocabulary, name_agreement, related_names, score_words
from .pairs import selectivity
from .places import concept_examples, localize
from .report import ComparisonReport, ConceptReport

__all__ = [
    "ComparisonReport",
    "ConceptReport",
    "compare",
    "concept_examples",
    "label_latents",
    "localize",
    "make_vocabulary",
    "name_agreement",
    "related_names",
    "sae_competitor",
    "score_words",
    "selectivity",
]
