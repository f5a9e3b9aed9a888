"""One function a figure, one style. Figures draw what others computed; ``save="name"`` also writes ``figures/name.png``."""

from .activations import embedded_world, patch_probe, residual_norms, residual_pca, zero_shot_accuracy
from .explorer import latent_explorer, patch_explorer, pointing
from .interventions import dose_response, mask_curves, mask_places, object_removal, raw_reconstructed_error, specificity
from .latents import concept_detection, concept_masks, latent_statistics, levels, reference_images
from .remapping import adaptation_accuracy, class_scatter, gain_split, latent_groups, tower_head_cross
from .style import COLORS, HEAT, figure, image_axes, save
from .training import firing_rates, patch_maps, reconstruction_quality, training_curves

__all__ = [
    "COLORS",
    "HEAT",
    "adaptation_accuracy",
    "class_scatter",
    "concept_detection",
    "concept_masks",
    "dose_response",
    "embedded_world",
    "figure",
    "firing_rates",
    "gain_split",
    "image_axes",
    "latent_explorer",
    "latent_groups",
    "latent_statistics",
    "levels",
    "mask_curves",
    "mask_places",
    "object_removal",
    "patch_explorer",
    "patch_maps",
    "patch_probe",
    "pointing",
    "raw_reconstructed_error",
    "reconstruction_quality",
    "reference_images",
    "residual_norms",
    "residual_pca",
    "save",
    "specificity",
    "tower_head_cross",
    "training_curves",
    "zero_shot_accuracy",
]
