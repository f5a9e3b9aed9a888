"""One function a figure, one style. Figures draw what others computed; ``save="name"`` also writes ``figures/name.png``."""

from .activations import embedded_world, patch_probe, residual_norms, residual_pca, zero_shot_accuracy
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

__all__ = [
    "COLORS",
    "HEAT",
    "adaptation_accuracy",
    "adaptation_view",
    "class_scatter",
    "color_swap",
    "concept_families",
    "concept_masks",
    "concept_sharing",
    "concept_specificity",
    "coverage_curves",
    "cross_domain",
    "dose_response",
    "embedded_world",
    "figure",
    "firing_rates",
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
    "raw_reconstructed_error",
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
    "text_and_image",
    "tower_head_cross",
    "training_curves",
    "zero_shot_accuracy",
]
