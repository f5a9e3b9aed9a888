"""PatchSAE: which visual concepts a CLIP vision transformer holds, where, what they do, and what adaptation changes.

Lim et al., "Sparse autoencoders reveal selective remapping of visual concepts during adaptation", ICLR 2025 (arXiv 2412.05276).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it. Loaded when first used, so that `import patchsae_utils` is quick.
_PUBLIC = {
    "load_profile": "config",
    "results": "artifacts",
    "check_claims": "artifacts",
    "load_clip": "clip",
    "ClipModel": "clip",
    "Residual": "clip",
    "load_dataset": "data",
    "templates_for": "data",
    "few_shot": "data",
    "extract_activations": "activations",
    "ActivationStore": "activations",
    "zero_shot_accuracy": "zeroshot",
    "SparseAutoencoder": "sae",
    "load_sae": "checkpoints",
    "save_sae": "checkpoints",
    "push_sae": "hub",
    "patchsae_loss": "losses",
    "objective": "losses",
    "train_sae": "training",
    "training_log": "training",
    "evaluate_sae": "evaluation",
    "evaluation_table": "evaluation",
    "random_control": "evaluation",
    "firing_rates": "evaluation",
    "patch_readings": "evaluation",
    "readings_by_place": "evaluation",
    "dead_causes": "dead_latents",
    "summarize_latents": "latents",
    "LatentSummary": "latents",
    "latent_masks": "latents",
    "write_features": "features",
    "FeatureStore": "feature_store",
    "label_latents": "concepts",
    "sweep_masks": "interventions",
    "steer": "steering",
    "Edit": "steering",
    "rank_latents": "effects",
    "concept_latents": "effects",
    "specificity": "effects",
    "dose_response": "effects",
    "remove_objects": "effects",
    "summarize_effects": "effects",
    "MaPLe": "adapters",
    "CoOp": "adapters",
    "fit_adapter": "adapters",
    "load_adapter": "adapters",
    "VisualPrompt": "prompts",
    "LoRA": "weight_adapters",
    "FineTuned": "weight_adapters",
    "LinearHead": "weight_adapters",
    "explain_gain": "gain_split",
    "compare_models": "remapping",
    "Remapping": "remapping",
    "AdaptationView": "explorer",
    "LatentExplorer": "explorer",
    "PatchExplorer": "explorer",
    "SteeringPanel": "explorer",
}
_MODULES = (
    "ablations", "adapted_dictionary", "attribution", "baselines", "class_links", "comparison", "concepts", "confusions", "data", "domains", "effects", "explorer",
    "gain_split", "grounding", "interventions", "latents", "levels", "localization", "masked_predictions", "monosemanticity", "naming", "overlays", "plots",
    "probes", "protocol", "rank_overlap", "remapping", "stability", "stages", "statistics", "variants", "zeroshot",
)  # fmt: skip

__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"patchsae_utils has no {name!r}. Public names: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
