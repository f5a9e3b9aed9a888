"""What the explorers open, and which notebook makes it: said before a stage that is missing is computed anew, which takes minutes."""

from __future__ import annotations

from typing import Any

from ..stages import adapter_folder

NOTEBOOKS = {
    "SAE": ("sae", "02_sae_training"),
    "statistics of the latents": ("latents/statistics", "03_concept_labeling"),
    "names of the latents": ("latents/concepts", "03_concept_labeling"),
}


def missing_artifacts(profile: Any) -> list[str]:
    """Artifacts of a profile that are not there, each as a sentence that names the notebook that makes it; empty when all are.

    Parameters
    ----------
    profile : Profile
    """
    wanted = {what: (profile.folder(path.split("/")[0]) / "/".join(path.split("/")[1:]), by) for what, (path, by) in NOTEBOOKS.items()}
    shown = {f"adapter of {task}": (task, profile.adapters.kind) for task in profile.adapters.tasks}
    shown[f"fine-tuned model of {profile.adapters.tasks[-1]}"] = (profile.adapters.tasks[-1], "finetune")
    for what, (task, kind) in shown.items():
        wanted[what] = (adapter_folder(profile, task, f"{kind}-{profile.adapters.seeds[0]}"), "05_adaptation_remapping")
    return [
        f"The {what} is missing: notebook {by} makes it in a few minutes; here it is made on the way."
        for what, (folder, by) in wanted.items()
        if not any(folder.glob("*.json"))
    ]
