"""What latents mean: every concept of the embedded world has a known place, so it can be measured which latents find it.

Scenes are split in two. On the first half the best latent of each concept is *chosen*; on the second its average precision is
*reported*, beside that of the residual stream's own dimensions and of a random dictionary of the same size. Names of latents are
chosen and scored the same way, and a latent stays "unnamed" when it answers to nothing more than shuffled pictures would make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from .artifacts import atomic_folder, fingerprint, is_current, write_json
from .grounding import (
    NEEDS_NO_THRESHOLD,
    ConceptPatches,
    Dictionary,
    Ranking,
    bootstrap_precision,
    concept_patches,
    concept_sums,
    dimensions,
    n_threads,
    random_sae,
    sae_dictionary,
)
from .latents import dataset_fingerprint
from .naming import UNNAMED, label_latents, unique_names
from .sae import SparseAutoencoder

__all__ = [
    "KINDS",
    "UNNAMED",
    "ConceptReport",
    "centred_interval",
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

FORMAT_VERSION = 1
KINDS = ("object", "category", "color", "background", "outline")
_KEYS = {"SAE": "sae", "single dimensions": "best_dimension", "random SAE": "random_sae"}  # in results


# -- the measurement ----------------------------------------------------------------------------------------------------------


class ConceptReport(NamedTuple):
    """Which concepts the latents find, beside baselines, and which concept each latent answers to."""

    detection: pd.DataFrame
    """One row a dictionary and concept: dictionary, concept, kind, name, latent (the best, chosen on other scenes), ap_choose, ap, chance
    (share of patches that show it), n_patches, n_images."""
    replicates: np.ndarray
    """[rows of detection, R] average precision under R reweightings of the reported images, the same for every row."""
    latents: pd.DataFrame
    """One row a latent: latent, concept, runner_up, score_choose, margin, score (on held-out scenes), p, n_patches (where it is active)."""

    def table(self, by: str = "kind") -> pd.DataFrame:
        """Mean average precision by dictionary and kind of concept, with 95 % intervals (Bayesian bootstrap over images).

        Returns
        -------
        DataFrame
            dictionary, kind, n_concepts, ap, low, high, chance.
        """
        rows = []
        for (name, kind), group in self.detection.groupby(["dictionary", by], sort=False):
            low, high = np.nanpercentile(np.nanmean(self.replicates[group.index], 0), [2.5, 97.5])
            rows.append(
                {
                    "dictionary": name,
                    by: kind,
                    "n_concepts": len(group),
                    "ap": group["ap"].mean(),
                    "low": low,
                    "high": high,
                    "chance": group["chance"].mean(),
                }
            )
        return pd.DataFrame(rows)

    def headline(self, kind: str = "object") -> dict[str, float | str]:
        """The numbers to quote for one kind of concept: mean AP of each dictionary, and :meth:`ratio`."""
        mine = self.detection[self.detection["kind"] == kind]
        ap = mine.groupby("dictionary", sort=False)["ap"].mean()
        numbers = {f"mean_{kind}_ap_{_KEYS.get(name, name)}": value for name, value in ap.items()}
        ratio = self.ratio(kind)
        return numbers | {
            "ap_ratio_to_best_baseline": ratio["ratio"],
            "ap_ratio_low": ratio["low"],
            "ap_ratio_high": ratio["high"],
            "best_baseline": ratio["baseline"],
        }

    def coverage(self, threshold: float = 0.5) -> pd.DataFrame:
        """Share of concepts that some feature of each dictionary finds with an AP above ``threshold``.

        Returns
        -------
        DataFrame
            dictionary, n_concepts, share, low, high (95 % interval, Bayesian bootstrap over images).
        """
        rows = []
        for name, group in self.detection.groupby("dictionary", sort=False):
            low, high = np.percentile((self.replicates[group.index] > threshold).mean(0), [2.5, 97.5])
            rows.append({"dictionary": name, "n_concepts": len(group), "share": (group["ap"] > threshold).mean(), "low": low, "high": high})
        return pd.DataFrame(rows)

    def ratio(self, kind: str = "object") -> dict[str, float]:
        """Mean AP of the first dictionary over that of the best other one: ratio, low, high (95 %, paired) and baseline.

        Which baseline is best is decided once, on the reported images themselves: that favours the baseline.
        """
        mine = self.detection[self.detection["kind"] == kind]
        means = mine.groupby("dictionary", sort=False)["ap"].mean()
        first, others = means.index[0], means.iloc[1:]
        best = others.idxmax()
        over = [np.nanmean(self.replicates[mine.index[mine["dictionary"] == name]], 0) for name in (first, best)]
        low, high = np.nanpercentile(over[0] / over[1], [2.5, 97.5])
        return {"ratio": means[first] / means[best], "low": low, "high": high, "baseline": best}


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
        Whether dimensions and random dictionary are measured too; :func:`patchsae_utils.comparison.measure_dictionaries` compares with more.
    patches : pair of ConceptPatches, optional
        Of ``choose`` and ``report``, when they were read before (:func:`patchsae_utils.grounding.concept_patches`).
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
    best = {}
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


def centred_interval(draws: np.ndarray, value: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resamples, moved so that their mean lies at the value.

    Average precision and IoU of concepts that few images show are lower in the mean of their resamples, where fewer images carry the
    weight, than in the data; left as they are, percentiles may exclude the value itself. The difference is the bootstrap's estimate of that
    bias (Efron and Tibshirani, 1993, chapter 10).
    """
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [tail, 100 - tail]) + value - np.nanmean(draws)
    return float(low), float(high)


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

    found = {}
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


# -- on disk ------------------------------------------------------------------------------------------------------------------


def save_report(report: ConceptReport, folder: str | Path, fp: str = "") -> None:
    """Write detection.csv, latents.csv, replicates.npy and manifest.json, atomically."""
    with atomic_folder(folder) as temporary:
        report.detection.to_csv(temporary / "detection.csv", index=False)
        report.latents.to_csv(temporary / "latents.csv", index=False)
        np.save(temporary / "replicates.npy", report.replicates, allow_pickle=False)
        write_json(temporary / "manifest.json", {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True})


def load_report(folder: str | Path) -> ConceptReport:
    """Read what :func:`save_report` wrote.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    """
    folder = Path(folder)
    missing = [name for name in ("detection.csv", "latents.csv", "replicates.npy") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no concept report: {', '.join(missing)} missing. Make one: measure_concepts(..., out={str(folder)!r})."
        )
    frames = [pd.read_csv(folder / f"{name}.csv", keep_default_na=False) for name in ("detection", "latents")]
    return ConceptReport(frames[0], np.load(folder / "replicates.npy", allow_pickle=False), frames[1])
