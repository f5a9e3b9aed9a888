"""What latents mean: every concept of the embedded world has a known place, so it can be measured which latents find it.

Scenes are split in two. On the first half the best latent of each concept is *chosen*; on the second its average precision is
*reported*, beside that of the residual stream's own dimensions and of a random dictionary of the same size. Names of latents are
chosen and scored the same way, and a latent stays "unnamed" when it answers to nothing more than shuffled pictures would make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from tqdm.auto import tqdm

from .artifacts import atomic_folder, fingerprint, is_current, write_json
from .grounding import (
    ConceptPatches,
    Dictionary,
    Ranking,
    bootstrap_precision,
    concept_patches,
    concept_sums,
    dimensions,
    random_sae,
    sae_dictionary,
)
from .latents import LatentSummary, dataset_fingerprint
from .sae import SparseAutoencoder

FORMAT_VERSION = 1
KINDS = ("object", "category", "color", "background", "outline")
UNNAMED = "unnamed"
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
        )  # fmt: skip
        if is_current(out, fp):
            return load_report(out)
    sae.check_source(d_in=clip.width, source=f"the residual stream of {clip.name!r}")
    data = [concept_patches(clip, d, layer, progress=progress) for d in (choose, report)]
    dictionaries = [sae_dictionary(sae), dimensions(sae.d_in), sae_dictionary(random_sae(sae, seed), "random SAE")]
    result = detect_concepts(
        dictionaries, *data, n_candidates=n_candidates, n_bootstrap=n_bootstrap, min_images=min_images, seed=seed, progress=progress
    )
    if out is not None:
        save_report(result, out, fp)
    return result


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
    common = np.flatnonzero(np.minimum(*(_images_with(p) for p in (choose, report))) >= min_images)
    if not len(common):
        raise ValueError(
            f"No concept is shown by {min_images} images of both sets ({choose.n_images} and {report.n_images} images). Give more scenes."
        )
    weights = rng.standard_exponential((report.n_images, n_bootstrap))
    positives = [p.masks.tocsc() for p in (choose, report)]
    n_images = _images_with(report)
    frames, replicates, names = [], [], None
    for number, dictionary in enumerate(tqdm(dictionaries, desc="dictionaries", disable=not progress, leave=False)):
        sums, shuffled = concept_sums(choose, dictionary, shuffled=rng.permutation(choose.n_images) if number == 0 else None)
        correlation = sums.correlation()
        if number == 0:
            held_out = concept_sums(report, dictionary)[0].correlation()
            names = _name_by_correlation(correlation, shuffled.correlation(), held_out, common, report.names)
        n = min(n_candidates, dictionary.n)
        candidates = np.argpartition(-correlation[common], n - 1, axis=1)[:, :n]
        pairs = {(int(f), int(c)) for c, features in zip(common, candidates, strict=True) for f in features}
        tried = _measure(dictionary, choose, positives[0], pairs)
        best = {}
        for feature, concept in sorted(tried):  # equal AP: the lower feature
            if concept not in best or tried[feature, concept] > tried[best[concept], concept]:
                best[concept] = feature
        chosen = {(feature, concept) for concept, feature in best.items()}
        reported = _measure(dictionary, report, positives[1], chosen, weights)
        for concept in common:
            feature = best[concept]
            ap, resampled = reported[feature, concept]
            kind, _, name = report.names[concept].partition(":")
            frames.append(
                {
                    "dictionary": dictionary.name, "concept": report.names[concept], "kind": kind, "name": name or kind, "latent": feature,
                    "ap_choose": tried[feature, concept], "ap": ap, "chance": positives[1][:, [concept]].nnz / len(report.tokens),
                    "n_patches": positives[1][:, [concept]].nnz, "n_images": int(n_images[concept]),
                }
            )  # fmt: skip
            replicates.append(resampled)
    return ConceptReport(pd.DataFrame(frames), np.array(replicates), names)


def _images_with(patches: ConceptPatches) -> np.ndarray:
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
    """Exact AP of (feature, concept) pairs, each feature sorted once; with weights also its resamples."""
    by_feature: dict[int, list[int]] = {}
    for feature, concept in sorted(pairs):
        by_feature.setdefault(feature, []).append(concept)
    features = list(by_feature)
    found = {}
    for start in range(0, len(features), block):
        some = features[start : start + block]
        activations = dictionary.encode(patches.tokens, np.array(some)).T.contiguous().cpu().numpy()
        for feature, scores in zip(some, activations, strict=True):
            ranking = Ranking(scores)
            for concept in by_feature[feature]:
                rows = positives.indices[positives.indptr[concept] : positives.indptr[concept + 1]]
                ap = ranking.precision(rows)
                found[feature, concept] = ap if weights is None else (ap, bootstrap_precision(scores, rows, patches.images, weights))
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


# -- names --------------------------------------------------------------------------------------------------------------------


def label_latents(
    summary: LatentSummary, report: ConceptReport | None = None, *, max_p: float = 0.01, min_score: float | None = None
) -> pd.DataFrame:
    """Name latents, with a score, a margin and "unnamed" where nothing stands out.

    With a report, a latent's name is the ground-truth concept whose mask its activation correlates with most; the score is that
    correlation on held-out scenes, the margin its lead over the second concept where both were chosen, and p the share of living
    latents that reach the score when pictures and masks are shuffled. Without one, the name is the class in whose images the latent is
    active most above the base rate; the score is that lift, the margin its lead over the second class, and p the binomial tail of so
    many active images, times the number of classes.

    Parameters
    ----------
    summary : LatentSummary
    report : ConceptReport, optional
        Of the same SAE.
    max_p : float
        Names less certain than that become "unnamed".
    min_score : float, optional
        So do names that score less. Default: correlation 0.1, or lift 2.

    Returns
    -------
    DataFrame
        latent, name, kind, score, margin, p, runner_up, class_index (-1 where the name is no class), n_images (where it is active),
        frequency. One row a latent; dead latents are unnamed, of kind "dead", with score and margin 0 and p 1.

    Raises
    ------
    ValueError
        If summary and report have different numbers of latents.
    """
    if report is not None and len(report.latents) != summary.n_latents:
        raise ValueError(f"The summary has {summary.n_latents} latents, the report {len(report.latents)}: they are of different SAEs.")
    frame = _names_from_labels(summary) if report is None else _names_from_truth(report)
    least = min_score if min_score is not None else 2.0 if report is None else 0.1
    frame["n_images"] = summary.class_hits.sum(0).long().numpy()
    frame["frequency"] = summary.frequency.numpy()
    frame.loc[(frame["p"] > max_p) | (frame["score"] < least), ["name", "kind", "class_index"]] = [UNNAMED, UNNAMED, -1]
    dead = summary.dead.numpy()
    frame.loc[dead, ["name", "kind", "class_index", "score", "margin", "p", "runner_up"]] = [UNNAMED, "dead", -1, 0.0, 0.0, 1.0, ""]
    return frame


def _names_from_truth(report: ConceptReport) -> pd.DataFrame:
    kind = report.latents["concept"].str.partition(":")
    frame = report.latents[["latent", "score", "margin", "p", "runner_up"]].copy()
    frame.insert(1, "name", kind[2].where(kind[2] != "", kind[0]))
    frame.insert(2, "kind", kind[0])
    frame["class_index"] = -1
    return frame


def _names_from_labels(summary: LatentSummary) -> pd.DataFrame:
    hits, per_class = summary.class_hits.double().numpy(), summary.class_images.double().numpy()
    active = hits.sum(0)
    base = per_class / max(per_class.sum(), 1)
    expected = np.outer(base, active)
    lift = np.divide(hits, expected, out=np.zeros_like(hits), where=expected > 0)
    order = np.argsort(-lift, axis=0, kind="stable")[: min(2, len(lift))]
    columns = np.arange(lift.shape[1])
    best = order[0]
    tail = stats.binom.sf(hits[best, columns] - 1, active, base[best]) * len(base)
    second = lift[order[1], columns] if len(order) > 1 else np.zeros(len(columns))
    names = unique_names(summary.class_names)
    return pd.DataFrame(
        {
            "latent": columns, "name": names[best], "kind": "class", "score": lift[best, columns], "margin": lift[best, columns] - second,
            "p": np.minimum(tail, 1.0), "runner_up": names[order[1]] if len(order) > 1 else "", "class_index": best,
        }
    )  # fmt: skip


def unique_names(class_names: Sequence[str]) -> np.ndarray:
    """Names that tell classes of equal name apart by their index: "missile (657)"; others stay as they are."""
    count = pd.Series(list(class_names)).value_counts()
    return np.array([f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(class_names)], dtype=object)


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
