"""Plots: one function a figure, one look; they draw what others computed and compute nothing.

One file a notebook (03 has two: `concepts`, `pictures`), the look in `style`, shared shapes in `drawing`, a picture blended with a heat map in `heat`.
``save="name"`` also writes ``runs/<profile>/figures/name.png``. May import the small readers of all folders below: data to adaptation.
"""

# isort: off
from .activations import embedded_world, patch_probe, residual_norms, residual_pca, zero_shot_accuracy
from .adaptation import (
    adaptation_accuracy, adapter_table, class_links, class_scatter, gain_experiments, gain_parts, latent_groups, planted_controls,
    prediction_heat, remapped_concepts,
)  # fmt: skip
from .concepts import (
    by_axis, concept_families, coverage_curves, latent_statistics, localization, monosemanticity, name_agreement, twins,
)  # fmt: skip
from .explorer import pointing
from .interventions import (
    color_swap, concept_specificity, dose_response, mask_curves, mask_tasks, object_removal, steered,
)  # fmt: skip
from .method import method
from .pictures import concept_masks, cross_domain, levels, reference_images, text_and_image
from .style import figure, save
from .training import (
    ablation_effects, firing_rates, patch_maps, reconstruction_frontier, reconstruction_quality, step_costs, training_curves,
)  # fmt: skip

__all__ = [
    "ablation_effects", "adaptation_accuracy", "adapter_table", "by_axis", "class_links", "class_scatter", "color_swap",
    "concept_families", "concept_masks", "concept_specificity", "coverage_curves", "cross_domain", "dose_response", "embedded_world",
    "figure", "firing_rates", "gain_experiments", "gain_parts", "latent_groups", "latent_statistics", "levels", "localization",
    "mask_curves", "mask_tasks", "method", "monosemanticity", "name_agreement", "object_removal", "patch_maps", "patch_probe",
    "planted_controls", "pointing", "prediction_heat", "reconstruction_frontier", "reconstruction_quality", "reference_images",
    "remapped_concepts", "residual_norms", "residual_pca", "save", "steered", "step_costs", "text_and_image", "training_curves", "twins",
    "zero_shot_accuracy",
]  # fmt: skip
