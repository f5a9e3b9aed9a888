"""The stages of a profile: each call opens its artifact under ``runs/<profile>``, and makes it when it is missing or stale."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from .activations.extraction import extract_activations
from .activations.store import ActivationStore
from .adaptation.fit import fit_adapter
from .adaptation.models import AdaptedClip
from .clip.loading import load_clip
from .clip.model import ClipModel
from .concepts import detection
from .concepts.baselines import sample_patches
from .concepts.comparison import measure_dictionaries
from .concepts.detection import ConceptPatches, measure_concepts
from .concepts.names import NO_NAME, label_latents
from .concepts.pairs import Selectivity, selectivity
from .concepts.report import ComparisonReport, ConceptReport
from .concepts.shipped import Shipped, open_shipped
from .config import Profile, repository_root
from .data import ImageData, OpenMojiData, load_dataset
from .data.loader import has_truth, without_broken
from .latents.likeness import Likeness, LikenessObserver
from .latents.reading import summarize_latents
from .latents.summary import LatentSummary
from .run.artifacts import MANIFEST, fingerprint, read_checked_json
from .sae.dictionary import random_sae
from .sae.files import load_sae
from .sae.model import SparseAutoencoder
from .sae.trainer import train_sae

# What the comparison calls them -> ``TrainConfig.constraint``.
CONTROLS = {"decoder frozen": "frozen_decoder", "decoder softly frozen": "soft_decoder", "encoder frozen": "frozen_encoder"}
CONTROL_RATE = 1.5e-3  # from random weights the way is longer: at the rate that suits a start from k-means they would hardly learn
ADAPTER_PRECISION = "bf16"  # of the image tower while an adapter is fitted: half the time on a CPU; learned weights are float32 either way


def load_world(profile: Profile) -> tuple[ClipModel, int]:
    """The profile's CLIP and the layer that is studied (the block whose output is read, counted from 0)."""
    precision = "bf16" if profile.model.precision == "bfloat16" else "fp32"
    clip = load_clip(profile.model.name, profile.model.pretrained, precision=precision)
    return clip, clip.layer_index(profile.model.layer)


def open_data(
    profile: Profile, spec: str, split: str, n_images: int | None = None, half: str | None = None, progress: bool = True
) -> ImageData | OpenMojiData:
    """A data set with the profile's seed and worker processes, without images that can't be read: ``runs/<profile>/images`` reports them."""
    data = load_dataset(spec, split, n_images=n_images, half=half, seed=profile.data.seed)
    report = f"{re.sub(r'[^A-Za-z0-9]+', '-', spec).strip('-')[-60:]}-{split}-{fingerprint(spec=spec)[:6]}.json"
    data = without_broken(data, profile.folder("images") / report, profile.data.max_broken, workers=profile.data.workers, progress=progress)
    data.workers = profile.data.workers
    return data


def training_data(profile: Profile) -> ImageData | OpenMojiData:
    """Images on whose tokens the SAE is trained."""
    return open_data(profile, profile.data.train, "train", profile.data.n_train_images)


def statistics_data(profile: Profile) -> ImageData | OpenMojiData:
    """Images for statistics, reference images and rankings: the train split."""
    return open_data(profile, profile.data.statistics, "train", profile.data.n_statistics_images)


def evaluation_data(profile: Profile) -> ImageData | OpenMojiData:
    """Images that nothing was trained or ranked on: the test split."""
    return open_data(profile, profile.data.evaluation, "test", profile.data.n_evaluation_images)


def has_classes(profile: Profile) -> bool:
    """Whether images for statistics, evaluation and adapters all have labels; those that can't be opened say so when they are needed."""
    data, tasks = profile.data, dict.fromkeys(profile.adapters.tasks, ("train", None))
    sets = tasks | {data.evaluation: ("test", data.n_evaluation_images), data.statistics: ("train", data.n_statistics_images)}
    with suppress(ValueError, OSError, ImportError):
        return all(load_dataset(spec, split, n_images=n, seed=data.seed).has_labels for spec, (split, n) in sets.items())
    return True


def training_store(profile: Profile, clip: ClipModel) -> ActivationStore:
    """Residual activations of the training images at the studied layer."""
    return extract_activations(clip, training_data(profile), profile.model.layer, profile.folder("activations") / "train")


def fresh_sae(profile: Profile, clip: ClipModel) -> SparseAutoencoder:
    """The PatchSAE before training, of the profile's size and variant."""
    return SparseAutoencoder(clip.width, profile.sae.expansion_factor * clip.width, seed=profile.training.seed, **profile.sae.options())


def trained_sae(profile: Profile, clip: ClipModel) -> SparseAutoencoder:
    """The PatchSAE, trained on :func:`training_store`; or, where the profile has a ``sae.path``, the SAE that lies there, if it fits the model."""
    if not profile.sae.path:
        return train_sae(fresh_sae(profile, clip), training_store(profile, clip), profile.training, profile.folder("sae"))
    near = profile.sae.path.startswith("hf:") or Path(profile.sae.path).exists()
    sae = load_sae(profile.sae.path if near else repository_root() / profile.sae.path).to(clip.device)  # notebooks run in a folder of it
    sae.check_model(clip, profile.model.layer)
    return sae


def latent_summary(profile: Profile, clip: ClipModel, sae: SparseAutoencoder) -> LatentSummary:
    """Statistics of every latent over :func:`statistics_data`; the same pass makes what :func:`latent_likeness` opens."""
    folder, data, layer = profile.folder("latents"), statistics_data(profile), profile.model.layer
    likeness = LikenessObserver(clip, sae, data, layer, folder / "likeness")
    return summarize_latents(clip, sae, data, layer, out=folder / "statistics", observers=[likeness])


def latent_likeness(profile: Profile, clip: ClipModel, sae: SparseAutoencoder) -> Likeness:
    """Embeddings of the images of :func:`statistics_data`, and the monosemanticity of every latent beside controls."""
    latent_summary(profile, clip, sae)
    return Likeness.load(profile.folder("latents") / "likeness")


def explorers_ship(profile: Profile) -> bool:
    """Whether explorers open on the dictionary that ships with the package: the default profile's, where none was trained."""
    return profile.is_default and not is_made(profile.folder("sae")) and open_shipped() is not None


def explorable(profile: Profile, clip: ClipModel) -> Shipped:
    """The SAE, statistics, names and likeness that explorers show: of this profile, made where they are missing; or those that ship."""
    if explorers_ship(profile):
        return open_shipped()
    sae = trained_sae(profile, clip)
    summary = latent_summary(profile, clip, sae)
    return Shipped(sae, summary, latent_names(summary, concept_report(profile, clip, sae)), latent_likeness(profile, clip, sae))


def concept_scenes(profile: Profile, split: str) -> ImageData | OpenMojiData | None:
    """Scenes on which latents are chosen for concepts (``val``) and reported (``test``); None where the data set knows no concepts."""
    return open_data(profile, profile.data.train, split, 1000) if has_truth(profile.data.train) else None


def concept_patches(profile: Profile, clip: ClipModel) -> tuple[ConceptPatches, ConceptPatches] | None:
    """Patches of the choosing and the reported scenes, for all measurements; not kept: 150 MB a thousand scenes. None without concepts."""
    if not has_truth(profile.data.train):
        return None
    chosen, reported = (detection.concept_patches(clip, concept_scenes(profile, split), profile.model.layer) for split in ("val", "test"))
    return chosen, reported


def concept_report(
    profile: Profile, clip: ClipModel, sae: SparseAutoencoder, patches: Sequence[ConceptPatches] | None = None
) -> ConceptReport | None:
    """Which latents find which ground-truth concepts; None where the data set knows none. ``patches``: :func:`concept_patches`, if at hand."""
    if not has_truth(profile.data.train):
        return None
    choose, held_out = (concept_scenes(profile, split) for split in ("val", "test"))
    out = profile.folder("latents") / "concepts"
    return measure_concepts(clip, sae, choose, held_out, profile.model.layer, patches=patches, out=out)


def latent_names(summary: LatentSummary, report: ConceptReport | None) -> pd.DataFrame:
    """Names by ground truth, where there is a report, else by labels; without either, all latents are unnamed."""
    nothing = None if report is not None or summary.class_names else pd.DataFrame([{"latent": 0, **NO_NAME}])
    return label_latents(summary, report, text=nothing)


def concept_comparison(
    profile: Profile, clip: ClipModel, sae: SparseAutoencoder, patches: Sequence[ConceptPatches] | None = None
) -> ComparisonReport | None:
    """How well latents find ground-truth concepts beside other dictionaries and a supervised probe; None where the data set knows no concepts.

    The control on a CLIP of random weights sees at most a million tokens, of no more scenes than hold so many.
    """
    if not has_truth(profile.data.train):
        return None
    choose, held_out = (concept_scenes(profile, split) for split in ("val", "test"))
    training, shorter = training_data(profile), min(profile.training.n_tokens, 1_000_000)
    n_scenes = min(len(training), math.ceil(shorter / clip.n_tokens))
    fewer = open_data(profile, profile.data.train, "train", n_scenes)
    return measure_dictionaries(
        clip, sae, training_store(profile, clip), training, choose, held_out, profile.model.layer, patches=patches,
        random_weights=dataclasses.replace(profile.training, n_tokens=shorter), random_scenes=fewer, out=profile.folder("latents") / "comparison",
        controls=trained_controls(profile, clip, sae),
    )  # fmt: skip


def trained_controls(profile: Profile, clip: ClipModel, sae: SparseAutoencoder) -> dict[str, SparseAutoencoder]:
    """SAEs of this size, variant and recipe, of which a part stays at random, or near it, on at most a million tokens each.

    Source: the sanity checks of SAEs of 2026, where such controls nearly reach trained ones on several scores.
    """
    shorter, store = min(profile.training.n_tokens, 1_000_000), training_store(profile, clip)
    options, found = {name: getattr(sae, name) for name in sae.variant.options}, {}
    recipe = dataclasses.replace(profile.training, n_tokens=shorter, start="random", lr=max(CONTROL_RATE, profile.training.lr))
    for name, constraint in CONTROLS.items():
        recipe = dataclasses.replace(recipe, constraint=constraint)
        out = profile.folder("latents") / "comparison" / constraint
        fresh = SparseAutoencoder(sae.d_in, sae.d_sae, sae.activation, **options, seed=profile.training.seed)
        found[name] = train_sae(fresh, store, recipe, out).requires_grad_(False)
    return found


def pair_selectivity(profile: Profile, clip: ClipModel, sae: SparseAutoencoder, compared: ComparisonReport) -> Selectivity:
    """How the latents of :func:`concept_comparison` answer when one thing in a scene of the embedded world is changed, beside controls."""
    control = random_sae(sae, sample_patches(training_store(profile, clip)))
    saes = {"SAE": sae, **trained_controls(profile, clip, sae), "random SAE": control}
    return selectivity(clip, saes, compared, concept_scenes(profile, "test"), profile.model.layer)


def adapter(profile: Profile, clip: ClipModel, task: str, kind: str | None = None, seed: int | None = None) -> AdaptedClip:
    """CLIP adapted to the base classes of a task, by few shots of its train split."""
    kind, seed = kind or profile.adapters.kind, profile.adapters.seeds[0] if seed is None else seed
    data, out = open_data(profile, task, "train", half="base"), adapter_folder(profile, task, f"{kind}-{seed}")
    return fit_adapter(clip, kind, data, profile.adapters, out=out, seed=seed, precision=ADAPTER_PRECISION)


def adapter_folder(profile: Profile, task: str, what: str) -> Path:
    """Where :func:`adapter` keeps a task's model; ``what`` is its kind and seed, as in "maple-1"."""
    return profile.folder("adapters") / f"{re.sub(r'[^A-Za-z0-9]+', '-', task).strip('-')}-{what}"


def artifacts(profile: Profile) -> dict[str, tuple[Path, str]]:
    """What the notebooks of a profile leave for each other: what it is -> its folder, and the notebook that makes it."""
    folder = profile.folder
    kept = {"activations": (folder("activations") / "train", "01_activation_extraction")}
    if not profile.sae.path:
        kept["SAE"] = (folder("sae"), "02_sae_training")
    kept["statistics of the latents"] = (folder("latents") / "statistics", "03_concept_labeling")
    if has_truth(profile.data.train):
        kept["names of the latents"] = (folder("latents") / "concepts", "03_concept_labeling")
    if not profile.model.name.startswith("timm:") and has_classes(profile):  # they need class names in words
        tasks, kind = profile.adapters.tasks, profile.adapters.kind
        shown = {f"adapter of {task}": (task, kind) for task in tasks} | {f"fine-tuned model of {tasks[-1]}": (tasks[-1], "finetune")}
        for what, (task, kind) in shown.items():
            kept[what] = (adapter_folder(profile, task, f"{kind}-{profile.adapters.seeds[0]}"), "05_adaptation_remapping")
    return kept


def is_made(folder: Path) -> bool:
    """Whether an artifact's folder holds a finished one, of whatever settings."""
    return (folder / MANIFEST).is_file() and read_checked_json(folder / MANIFEST).get("complete", True)


def missing_artifacts(profile: Profile) -> list[str]:
    """Artifacts that notebook 06 shows and that are not there, each as a sentence that names the notebook that makes it; empty when all are."""
    if explorers_ship(profile):
        opened = "the explorers open on the dictionary that ships with the package, without adapted models (notebook 05 makes them)"
        return [f"Nothing is made yet: {opened}."]
    return [
        f"The {what} is missing: notebook {by} makes it in a few minutes; here it is made on the way."
        for what, (folder, by) in artifacts(profile).items()
        if what != "activations" and not is_made(folder)
    ]
