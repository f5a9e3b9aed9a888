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
    "results": "run.results",
    "check_claims": "run.results",
    "load_clip": "clip",
    "ClipModel": "clip",
    "load_dataset": "data",
    "extract_activations": "activations",
    "ActivationStore": "activations",
    "SparseAutoencoder": "sae",
    "load_sae": "sae",
    "save_sae": "sae",
    "push_sae": "sae",
    "patchsae_loss": "sae",
    "train_sae": "sae",
    "evaluate_sae": "sae",
    "summarize_latents": "latents",
    "LatentSummary": "latents",
    "latent_masks": "latents",
    "label_latents": "concepts",
    "sweep_masks": "interventions",
    "steer": "interventions",
    "Edit": "interventions",
    "MaPLe": "adaptation",
    "CoOp": "adaptation",
    "fit_adapter": "adaptation",
    "load_adapter": "adaptation",
    "VisualPrompt": "adaptation",
    "LoRA": "adaptation",
    "FineTuned": "adaptation",
    "LinearHead": "adaptation",
    "explain_gain": "adaptation",
    "compare_models": "adaptation",
    "AdaptationView": "explorer",
    "LatentExplorer": "explorer",
    "PatchExplorer": "explorer",
    "SteeringPanel": "explorer",
    "latent_slider": "explorer",
}
_MODULES = (
    "activations", "adaptation", "clip", "concepts", "data", "explorer", "interventions", "latents", "plots", "run", "sae", "stages",
    "tables",
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
