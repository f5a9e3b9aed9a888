"""The SAE against everything else: one table of how well the best feature of each dictionary finds each ground-truth concept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data import dataset_fingerprint
from ..run.artifacts import fingerprint, is_current
from ..sae.dictionary import NEEDS_NO_THRESHOLD, Dictionary, dimensions, random_sae, sae_dictionary
from ..sae.model import SparseAutoencoder
from .baselines import ica_dictionary, kmeans_dictionary, nmf_dictionary, pca_dictionary, random_weights_sae, sample_patches
from .detection import (
    ConceptPatches,
    best_features,
    candidates,
    common_concepts,
    concept_correlations,
    concept_patches,
    different_scenes,
    image_weights,
    read_patches,
)  # fmt: skip
from .probes import fit_probes
from .report import FORMAT_VERSION, ComparisonReport

_MATERIALIZE = 2**27  # activations of a whole set are computed once where they are fewer


class Competitor(NamedTuple):
    """One dictionary in the comparison."""

    dictionary: Dictionary
    role: str = "baseline"
    """"sae", "baseline", or "ceiling" (supervised: feature k belongs to concept k)."""
    patches: tuple[ConceptPatches, ConceptPatches] | None = None
    """Of its own, when it reads another model: of the same scenes, in the same order."""


def compare_dictionaries(
    competitors: Sequence[Competitor], choose: ConceptPatches, report: ConceptPatches, *, min_patches: int = 20
) -> ComparisonReport:
    """Every dictionary takes the same steps: for each concept its best feature on ``choose``, average precision on ``report``.

    Concepts on fewer than ``min_patches`` patches of either set are left out, for all dictionaries alike.
    """
    names = [c.dictionary.name for c in competitors]
    if len(set(names)) < len(names):
        raise ValueError(f"Dictionaries need names that differ, got {', '.join(names)}. Rename: dictionary._replace(name=...).")
    concepts, weights = common_concepts(choose, report, min_patches), image_weights(report.n_images)
    frames, replicates = [], []
    for dictionary, role, own in tqdm(competitors, desc="dictionaries"):
        sets = own or (choose, report)
        for mine, given in zip(sets, (choose, report), strict=True):
            if mine is not given and (mine.masks.shape != given.masks.shape or (mine.masks != given.masks).nnz):
                raise ValueError(f"The patches of {dictionary.name!r} are of other scenes than the others'. Read the same data sets.")
        if dictionary.n * max(len(s.tokens) for s in sets) <= _MATERIALIZE:
            with torch.no_grad():
                sets = [s._replace(tokens=dictionary.encode(s.tokens, None)) for s in sets]
            dictionary = dictionary._replace(encode=lambda h, columns: h if columns is None else h[:, torch.as_tensor(columns)])
        tried = concepts[:, None] if role == "ceiling" else candidates(concept_correlations(sets[0], dictionary)[0][0][concepts])
        frame, resampled = best_features(dictionary, role, sets[0], sets[1], concepts, tried, weights)
        frames.append(frame)
        replicates.append(resampled)
    return ComparisonReport(pd.concat(frames, ignore_index=True), np.concatenate(replicates))


def measure_dictionaries(
    clip, sae: SparseAutoencoder, store, training, choose, report, layer: int, *, random_weights, random_scenes, out: str | Path,
    patches: Sequence[ConceptPatches] | None = None,
) -> ComparisonReport:  # fmt: skip
    """An SAE, every baseline and the probe, from training scenes to the table, which is kept in ``out``.

    ``store`` is of ``training``; ``random_weights`` is the recipe of an SAE on a CLIP of random weights, trained on ``random_scenes``;
    ``patches`` are of ``choose`` and ``report``, when they were read before.
    """
    out = Path(out)
    key = fingerprint(
        stage="comparison", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, store=store.fingerprint,
        data=different_scenes(training, choose, report), layer=clip.layer_index(layer), random_weights=random_weights,
        random_scenes=dataset_fingerprint(random_scenes),
    )  # fmt: skip
    if is_current(out / "report", key):
        return ComparisonReport.load(out / "report")
    sae.check_model(clip, layer)
    patches = read_patches(clip, (choose, report), layer, patches)
    x = sample_patches(store)
    n = min(sae.d_sae, len(x) // 4)  # as many centroids as latents, where there are tokens enough
    by_chance = random_sae(sae, 0, None if sae.activation in NEEDS_NO_THRESHOLD else x)
    untrained, trained = random_weights_sae(clip, random_scenes, layer, sae, random_weights, out / "random_weights")
    result = compare_dictionaries(
        [
            Competitor(sae_dictionary(sae), "sae"),
            Competitor(dimensions(sae.d_in)),
            Competitor(pca_dictionary(x)),
            Competitor(ica_dictionary(x)),
            Competitor(nmf_dictionary(x)),
            Competitor(kmeans_dictionary(x, n)),
            Competitor(kmeans_dictionary(x, n, cosine=True)),
            Competitor(sae_dictionary(by_chance, "random SAE")),
            Competitor(
                sae_dictionary(trained, "SAE on random weights"),
                patches=(concept_patches(untrained, choose, layer), concept_patches(untrained, report, layer)),
            ),
            Competitor(fit_probes(store, training, patches[0], out / "probes"), "ceiling"),
        ],
        *patches,
    )
    result.save(out / "report", key)
    return result
