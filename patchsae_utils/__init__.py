"""PatchSAE: which visual concepts a CLIP vision transformer holds, where, what they do, and what adaptation changes.

Lim et al., "Sparse autoencoders reveal selective remapping of visual concepts during adaptation", ICLR 2025 (arXiv 2412.05276).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names by the module that holds them. Loaded when first used, so that `import patchsae_utils` is quick.
_NAMES = {
    "config": "load_profile", "run.results": "results check_claims", "clip": "load_clip ClipModel", "data": "load_dataset",
    "activations": "extract_activations ActivationStore", "latents": "summarize_latents LatentSummary latent_masks",
    "sae": "SparseAutoencoder load_sae save_sae push_sae patchsae_loss train_sae evaluate_sae",
    "concepts": "label_latents", "interventions": "sweep_masks steer Edit",
    "adaptation": "MaPLe CoOp fit_adapter load_adapter VisualPrompt LoRA FineTuned LinearHead explain_gain compare_models",
    "explorer": "AdaptationView LatentExplorer PatchExplorer SteeringPanel latent_slider",
}  # fmt: skip
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names.split()}
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
