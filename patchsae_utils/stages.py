"""The stages of a profile, in one place: each call opens its artifact under ``runs/<profile>``, and makes it when it is missing or stale.

The notebooks call these, so any of them runs alone in a fresh clone and none computes what another has left.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from . import grounding
from .activations import ActivationStore, extract_activations
from .adapted_dictionary import Dictionaries, train_dictionaries
from .adapters import fit_adapter
from .clip import ClipModel, load_clip
from .comparison import ComparisonReport, measure_dictionaries
from .concepts import ConceptReport, measure_concepts
from .config import Profile
from .data import ImageData, OpenMojiData, load_dataset
from .grounding import ConceptPatches, has_truth
from .latents import LatentSummary, summarize_latents
from .monosemanticity import Likeness
from .sae import SparseAutoencoder
from .training import train_sae


def load_world(profile: Profile) -> tuple[ClipModel, int]:
    """The profile's CLIP and the layer that is studied (the block whose output is read, counted from 0)."""
    clip = load_clip(profile.model.name, profile.model.pretrained)
    return clip, clip.layer_index(profile.model.layer)


def training_data(profile: Profile) -> ImageData | OpenMojiData:
    """Images on whose tokens the SAE is trained."""
    return load_dataset(profile.data.train, "train", n_images=profile.data.n_train_images, seed=profile.data.seed)


def statistics_data(profile: Profile) -> ImageData | OpenMojiData:
    """Labelled images for statistics, reference images and rankings: the train split."""
    return load_dataset(profile.data.statistics, "train", n_images=profile.data.n_statistics_images, seed=profile.data.seed)


def evaluation_data(profile: Profile) -> ImageData | OpenMojiData:
    """Labelled images that nothing was trained or ranked on: the test split."""
    return load_dataset(profile.data.evaluation, "test", n_images=profile.data.n_evaluation_images, seed=profile.data.seed)


def training_store(profile: Profile, clip: ClipModel) -> ActivationStore:
    """Residual activations of the training images at the studied layer."""
    return extract_activations(clip, training_data(profile), profile.model.layer, profile.folder("activations") / "train")


def fresh_sae(profile: Profile, clip: ClipModel) -> SparseAutoencoder:
    """The PatchSAE before training, of the profile's size and variant."""
    return SparseAutoencoder(clip.width, profile.sae.expansion_factor * clip.width, seed=profile.training.seed, **profile.sae.options())


def trained_sae(profile: Profile, clip: ClipModel) -> SparseAutoencoder:
    """The PatchSAE, trained on :func:`training_store`."""
    return train_sae(fresh_sae(profile, clip), training_store(profile, clip), profile.training, profile.folder("sae"))


def latent_summary(profile: Profile, clip: ClipModel, sae: SparseAutoencoder) -> LatentSummary:
    """Statistics of every latent over :func:`statistics_data`; the same pass makes what :func:`latent_likeness` opens."""
    folder = profile.folder("latents")
    data = statistics_data(profile)
    return summarize_latents(clip, sae, data, profile.model.layer, out=folder / "statistics", likeness=folder / "likeness")


def latent_likeness(profile: Profile, clip: ClipModel, sae: SparseAutoencoder) -> Likeness:
    """Embeddings of the images of :func:`statistics_data`, and the monosemanticity of every latent beside controls."""
    latent_summary(profile, clip, sae)
    return Likeness.load(profile.folder("latents") / "likeness")


def concept_scenes(profile: Profile, split: str) -> ImageData | OpenMojiData:
    """Scenes on which latents are chosen for concepts (``val``) and reported (``test``); the SAE has seen neither."""
    return load_dataset(profile.data.train, split, n_images=1000, seed=profile.data.seed)


def concept_patches(profile: Profile, clip: ClipModel) -> tuple[ConceptPatches, ConceptPatches] | None:
    """Patches of the choosing and the reported scenes with their concepts, read once for all measurements; None where there is no ground truth.

    Nothing is left under ``runs``: what was measured is kept, and patches take 150 MB a thousand scenes.
    """
    scenes = [concept_scenes(profile, split) for split in ("val", "test")]
    if not has_truth(scenes[0]):
        return None
    return tuple(grounding.concept_patches(clip, each, profile.model.layer) for each in scenes)


def concept_report(
    profile: Profile, clip: ClipModel, sae: SparseAutoencoder, patches: Sequence[ConceptPatches] | None = None
) -> ConceptReport | None:
    """Which latents find which ground-truth concepts; None where the data set knows none. ``patches``: :func:`concept_patches`, if at hand."""
    held_out = concept_scenes(profile, "test")
    if not has_truth(held_out):
        return None
    choose = concept_scenes(profile, "val")
    out = profile.folder("latents") / "concepts"
    return measure_concepts(clip, sae, choose, held_out, profile.model.layer, baselines=False, patches=patches, out=out)


def concept_comparison(
    profile: Profile, clip: ClipModel, sae: SparseAutoencoder, patches: Sequence[ConceptPatches] | None = None
) -> ComparisonReport | None:
    """How well latents find ground-truth concepts beside other dictionaries and a supervised probe; None where the data set knows no concepts.

    ``patches``: :func:`concept_patches`, if at hand.
    """
    choose, held_out = (concept_scenes(profile, split) for split in ("val", "test"))
    if not has_truth(held_out):
        return None
    return measure_dictionaries(
        clip, {"SAE": sae}, training_store(profile, clip), training_data(profile), choose, held_out, profile.model.layer,
        patches=patches, out=profile.folder("latents") / "comparison",
    )  # fmt: skip


def adapter(profile: Profile, clip: ClipModel, task: str, kind: str | None = None, seed: int | None = None) -> ClipModel:
    """CLIP adapted to the base classes of a task, by few shots of its train split."""
    kind, seed = kind or profile.adapters.kind, profile.adapters.seeds[0] if seed is None else seed
    data = load_dataset(task, "train", half="base", seed=profile.data.seed)
    return fit_adapter(clip, kind, data, profile.adapters, out=_adapter_folder(profile, task, f"{kind}-{seed}"), seed=seed)


def adapted_dictionaries(profile: Profile, clip: ClipModel, task: str, n_images: int = 1500, n_tokens: int = 300_000) -> Dictionaries:
    """SAEs of CLIP and of CLIP adapted to a task, trained alike on pictures of the task's domain; smaller than :func:`trained_sae`, so that both are made here."""
    data, domain = profile.data, task.partition(":")[2] if task.startswith("openmoji/") else ""
    spec = f"{data.statistics}:{domain}" if domain and ":" not in data.statistics else data.statistics
    pictures = load_dataset(spec, "train", n_images=min(n_images, data.n_train_images or n_images), seed=data.seed)
    training = dataclasses.replace(profile.training, n_tokens=min(n_tokens, profile.training.n_tokens))
    out = _adapter_folder(profile, task, "dictionaries")
    return train_dictionaries(clip, adapter(profile, clip, task), pictures, profile.model.layer, profile.sae, training, out)


def _adapter_folder(profile: Profile, task: str, what: str) -> Path:
    return profile.folder("adapters") / f"{re.sub(r'[^A-Za-z0-9]+', '-', task).strip('-')}-{what}"
