"""One function a figure, one style. Figures draw what others computed; ``save="name"`` also writes ``figures/name.png``."""

from .ablations import ablation_effects, reconstruction_frontier
from .activations import embedded_world, patch_probe, residual_norms, residual_pca, zero_shot_accuracy
from .adaptation import adapter_table, class_links, gain_experiments, gain_parts
from .benchmarks import step_costs
from .class_changes import confusion_change, dictionary_cross, prediction_heat
from .concepts import concept_families, concept_sharing, coverage_curves, localization, monosemanticity, name_agreement
from .domains import cross_domain, group_statistics, stability, text_and_image
from .explorer import adaptation_view, latent_explorer, patch_explorer, pointing
from .interventions import (
    dose_response,
    mask_curves,
    mask_errors,
    mask_places,
    mask_rankings,
    mask_tasks,
    object_removal,
    raw_reconstructed_error,
    specificity,
)
from .latents import concept_masks, latent_statistics, levels, mask_styles, reference_images, reference_patches
from .remapping import adaptation_accuracy, class_scatter, gain_split, latent_groups, tower_head_cross
from .steering import color_swap, concept_specificity, steered, steering_panel
from .style import COLORS, HEAT, figure, image_axes, save
from .training import firing_rates, patch_maps, reconstruction_quality, training_curves
from .variants import by_layer, variants

__all__ = [
    "COLORS",
    "HEAT",
    "ablation_effects",
    "adaptation_accuracy",
    "adaptation_view",
    "adapter_table",
    "by_layer",
    "class_links",
    "class_scatter",
    "color_swap",
    "concept_families",
    "concept_masks",
    "concept_sharing",
    "concept_specificity",
    "confusion_change",
    "coverage_curves",
    "cross_domain",
    "dictionary_cross",
    "dose_response",
    "embedded_world",
    "figure",
    "firing_rates",
    "gain_experiments",
    "gain_parts",
    "gain_split",
    "group_statistics",
    "image_axes",
    "latent_explorer",
    "latent_groups",
    "latent_statistics",
    "levels",
    "localization",
    "mask_curves",
    "mask_errors",
    "mask_places",
    "mask_rankings",
    "mask_styles",
    "mask_tasks",
    "monosemanticity",
    "name_agreement",
    "object_removal",
    "patch_explorer",
    "patch_maps",
    "patch_probe",
    "pointing",
    "prediction_heat",
    "raw_reconstructed_error",
    "reconstruction_frontier",
    "reconstruction_quality",
    "reference_images",
    "reference_patches",
    "residual_norms",
    "residual_pca",
    "save",
    "specificity",
    "stability",
    "steered",
    "steering_panel",
    "step_costs",
    "text_and_image",
    "tower_head_cross",
    "training_curves",
    "variants",
    "zero_shot_accuracy",
]
