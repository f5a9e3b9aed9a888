"""What latents mean: every concept of the embedded world has a known place, so it can be measured which latents find it.

Scenes are split in two. On the first half the best latent of each concept is *chosen*; on the second its average precision is
*reported*, beside that of the residual stream's own dimensions and of a random dictionary of the same size. Names of latents are
chosen and scored the same way, and a latent stays "unnamed" when it answers to nothing more than shuffled pictures would make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from ..data.dataset import dataset_fingerprint
from ..run.artifacts import fingerprint, is_current
from ..sae.dictionary import NEEDS_NO_THRESHOLD, Dictionary, dimensions, random_sae, sae_dictionary
from ..sae.model import SparseAutoencoder
from .grounding import ConceptPatches, Ranking, bootstrap_precision, concept_patches, concept_sums, n_threads
from .names import UNNAMED, label_latents, unique_names
from .report import FORMAT_VERSION, ConceptReport, load_report, save_report

__all__ = [
    "KINDS",
    "UNNAMED",
    "ConceptReport",
    "common_concepts",
    "compete",
    "detect_concepts",
    "images_with",
    "label_latents",
    "load_report",
    "measure_concepts",
    "read_patches",
    "save_report",
    "unique_names",
]

KINDS = ("object", "category", "color", "background", "outline")


def measure_concepts(
    clip,
    sae: SparseAutoencoder,
    choose,
    report,
    layer: int,
    *,
    n_candidates: int = 8,
    n_bootstrap: int = 200,
    min_images: int = 2,
    seed: int = 0,
    baselines: bool = True,
    patches: Sequence[ConceptPatches] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> ConceptReport:
    """Find the best latent of each concept on some scenes and report how well it does on others.

    Candidates of a concept are the features that correlate most with its mask; among them the one of highest average precision is
    chosen. Both happen on ``choose`` alone. The baselines go through the same steps: the residual stream's dimensions (both signs), and
    a random dictionary of the SAE's size.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    choose, report : OpenMojiData
        Scenes that share none: different splits.
    layer : int
    n_candidates : int
        Candidates a concept.
    n_bootstrap : int
        Reweightings of the reported images. The Bayesian bootstrap (Rubin, 1981) gives each an exponential weight instead of a whole
        number: a concept that few images show is then never lost, which would favour the draws in which it abounds.
    min_images : int
        Concepts in fewer images of either set are left out.
    seed : int
        Of the random dictionary, the shuffle and the weights.
    baselines : bool
        Whether dimensions and random dictionary are measured too; :func:`patchsae_utils.concepts.comparison.measure_dictionaries` compares with more.
    patches : pair of ConceptPatches, optional
        Of ``choose`` and ``report``, when they were read before (:func:`patchsae_utils.concepts.grounding.concept_patches`).
    out : path, optional
        Folder to keep the report in; when it already holds the one of the same inputs, that is returned.

    Raises
    ------
    ValueError
        If the sets share scenes, have no ground truth, or hold no common concept.
    """
    identities = [dataset_fingerprint(d) for d in (choose, report)]
    if identities[0] == identities[1] or (choose.split == report.split and getattr(choose, "seed", 0) == getattr(report, "seed", 0)):
        raise ValueError(
            f"Latents are chosen and reported on scenes that differ; both sets are split {choose.split!r} of {choose.spec!r}. "
            "Give two splits."
        )
    fp = ""
    if out is not None:
        fp = fingerprint(
            stage="concepts", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, data=identities,
            layer=clip.layer_index(layer), n_candidates=n_candidates, n_bootstrap=n_bootstrap, min_images=min_images, seed=seed,
            **({} if baselines else {"baselines": False}),
        )  # fmt: skip
        if is_current(out, fp):
            return load_report(out)
    sae.check_model(clip, layer)
    data = read_patches(clip, (choose, report), layer, patches, progress)
    dictionaries = [sae_dictionary(sae)]
    if baselines:
        tokens = None if sae.activation in NEEDS_NO_THRESHOLD else data[0].tokens
        dictionaries += [dimensions(sae.d_in), sae_dictionary(random_sae(sae, seed, tokens), "random SAE")]
    result = detect_concepts(
        dictionaries, *data, n_candidates=n_candidates, n_bootstrap=n_bootstrap, min_images=min_images, seed=seed, progress=progress
    )
    if out is not None:
        save_report(result, out, fp)
    return result


def read_patches(
    clip, datasets: Sequence, layer: int, patches: Sequence[ConceptPatches] | None = None, progress: bool = True
) -> list[ConceptPatches]:
    """Patches of some data sets with ground truth: those given, if they fit, or read here.

    Raises
    ------
    ValueError
        If the patches given are of other numbers of images, or of another width.
    """
    if patches is None:
        return [concept_patches(clip, dataset, layer, progress=progress) for dataset in datasets]
    found, wanted = [(p.n_images, p.tokens.shape[1]) for p in patches], [(len(dataset), clip.width) for dataset in datasets]
    if found != wanted:
        raise ValueError(f"The patches are of (images, width) {found}, the scenes and the model of {wanted}: read these scenes.")
    return list(patches)


def detect_concepts(
    dictionaries: Sequence[Dictionary],
    choose: ConceptPatches,
    report: ConceptPatches,
    *,
    n_candidates: int = 8,
    n_bootstrap: int = 200,
    min_images: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> ConceptReport:
    """:func:`measure_concepts` on patches that were read before, for any dictionaries; the first one's features get names."""
    rng = np.random.default_rng(seed)
    common = common_concepts(choose, report, min_images=min_images)
    weights = rng.standard_exponential((report.n_images, n_bootstrap))
    frames, replicates, names = [], [], None
    for number, dictionary in enumerate(tqdm(dictionaries, desc="dictionaries", disable=not progress, leave=False)):
        sums, shuffled = concept_sums(choose, dictionary, shuffled=rng.permutation(choose.n_images) if number == 0 else None)
        correlation = sums.correlation()
        if number == 0:
            held_out = concept_sums(report, dictionary)[0].correlation()
            names = _name_by_correlation(correlation, shuffled.correlation(), held_out, common, report.names)
        rows, resampled = compete(dictionary, choose, report, common, weights, n_candidates, correlation)
        frames += rows
        replicates.append(resampled)
    return ConceptReport(pd.DataFrame(frames), np.concatenate(replicates), names)


def compete(
    dictionary: Dictionary,
    choose: ConceptPatches,
    report: ConceptPatches,
    concepts: np.ndarray,
    weights: np.ndarray,
    n_candidates: int = 8,
    correlation: np.ndarray | None = None,
) -> tuple[list[dict], np.ndarray]:
    """The best feature of each concept on ``choose``, and its average precision on ``report``.

    Parameters
    ----------
    dictionary : Dictionary
    choose, report : ConceptPatches
        Of scenes that differ.
    concepts : int array [K']
        Columns of the masks.
    weights : float array [n_images of report, R]
        For the resamples.
    n_candidates : int
        Features of highest correlation whose exact average precision is computed.
    correlation : float array [K, S], optional
        On ``choose``; computed when not given.

    Returns
    -------
    rows : list of dict
        One a concept, as in ``ConceptReport.detection``.
    replicates : float array [K', R]
    """
    if correlation is None:
        correlation = concept_sums(choose, dictionary)[0].correlation()
    positives = [p.masks.tocsc() for p in (choose, report)]
    n_images = images_with(report)
    n = min(n_candidates, dictionary.n)
    candidates = np.argpartition(-correlation[concepts], n - 1, axis=1)[:, :n]
    pairs = {(int(f), int(c)) for c, features in zip(concepts, candidates, strict=True) for f in features}
    tried = _measure(dictionary, choose, positives[0], pairs)
    best: dict = {}
    for feature, concept in sorted(tried):  # equal AP: the lower feature
        if concept not in best or tried[feature, concept] > tried[best[concept], concept]:
            best[concept] = feature
    reported = _measure(dictionary, report, positives[1], {(feature, concept) for concept, feature in best.items()}, weights)
    rows = []
    for concept in concepts:
        feature = best[concept]
        kind, _, name = report.names[concept].partition(":")
        n_patches = int(np.diff(positives[1].indptr)[concept])
        rows.append(
            {
                "dictionary": dictionary.name, "concept": report.names[concept], "kind": kind, "name": name or kind, "latent": feature,
                "ap_choose": tried[feature, concept], "ap": reported[feature, concept][0], "chance": n_patches / len(report.tokens),
                "n_patches": n_patches, "n_images": int(n_images[concept]),
            }
        )  # fmt: skip
    return rows, np.array([reported[best[concept], concept][1] for concept in concepts])


def common_concepts(choose: ConceptPatches, report: ConceptPatches, *, min_patches: int = 1, min_images: int = 2) -> np.ndarray:
    """Concepts that enough patches of enough images show, in both sets: int array [K'], columns of the masks.

    Raises
    ------
    ValueError
        If there are none.
    """
    images, patches = (
        np.minimum(*pair) for pair in ([images_with(p) for p in (choose, report)], [_patches_with(p) for p in (choose, report)])
    )
    common = np.flatnonzero((images >= min_images) & (patches >= min_patches))
    if not len(common):
        least = f"{min_images} images of both sets" + (f" on {min_patches} patches" if min_patches > 1 else "")
        raise ValueError(f"No concept is shown by {least} ({choose.n_images} and {report.n_images} images). Give more scenes.")
    return common


def _patches_with(patches: ConceptPatches) -> np.ndarray:
    """[K] patches that show each concept."""
    return np.asarray(patches.masks.sum(0)).ravel()


def images_with(patches: ConceptPatches) -> np.ndarray:
    """[K] images that show each concept."""
    coo = patches.masks.tocoo()
    seen = sparse.coo_matrix((np.ones(coo.nnz), (patches.images[coo.row], coo.col)), (patches.n_images, coo.shape[1])).tocsr()
    return np.asarray((seen > 0).sum(0)).ravel()


@torch.no_grad()
def _measure(
    dictionary: Dictionary,
    patches: ConceptPatches,
    positives: sparse.csc_matrix,
    pairs: set[tuple[int, int]],
    weights=None,
    block: int = 128,
) -> dict:
    """Exact AP of (feature, concept) pairs, each feature sorted once, on all cores; with weights also its resamples."""
    by_feature: dict[int, list[int]] = {}
    for feature, concept in sorted(pairs):
        by_feature.setdefault(feature, []).append(concept)
    features = list(by_feature)

    def one(feature: int, scores: np.ndarray) -> dict:
        ranking, results = Ranking(scores), {}
        for concept in by_feature[feature]:
            rows = positives.indices[positives.indptr[concept] : positives.indptr[concept + 1]]
            ap = ranking.precision(rows)
            results[feature, concept] = ap if weights is None else (ap, bootstrap_precision(scores, rows, patches.images, weights))
        return results

    found: dict = {}
    with ThreadPoolExecutor(n_threads()) as pool:
        for start in range(0, len(features), block):
            some = features[start : start + block]
            activations = dictionary.encode(patches.tokens, np.array(some)).T.contiguous().cpu().numpy()
            for results in pool.map(one, some, activations):
                found |= results
    return found


def _name_by_correlation(
    correlation: np.ndarray, null: np.ndarray, held_out: np.ndarray, common: np.ndarray, names: Sequence[str]
) -> pd.DataFrame:
    """The concept that each latent correlates with most, what comes second, and how often shuffled pictures do as well."""
    r = correlation[common]
    order = np.argsort(-r, axis=0, kind="stable")[:2]
    latents = np.arange(r.shape[1])
    best, second = (r[row, latents] for row in order)
    score = held_out[common][order[0], latents]
    null_best = np.sort(null[common].max(0)[correlation.any(0)])  # of living latents
    p = (1 + len(null_best) - np.searchsorted(null_best, score, "left")) / (1 + len(null_best))
    labels = np.array(names)[common]
    return pd.DataFrame(
        {
            "latent": latents,
            "concept": labels[order[0]],
            "runner_up": labels[order[1]],
            "score_choose": best,
            "margin": best - second,
            "score": score,
            "p": p,
        }
    )
