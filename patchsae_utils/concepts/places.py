"""Where latents are active, against masks of the ground truth: average precision and IoU of every latent for every concept, the pointing
game, concepts that several latents share, classes that a category's latent skips, and the matching of latents with concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data import openmoji
from ..latents.pictures import seen_image
from ..latents.reading import latent_masks
from ..run.intervals import centred_interval
from ..sae.dictionary import Dictionary
from .detection import common_concepts
from .grounding import ConceptPatches, average_precision
from .report import ConceptReport


class ConceptMatrix(NamedTuple):
    """How well every feature finds every concept, on one set of scenes."""

    ap: np.ndarray
    """[S, K] average precision, exact, ties sharing one threshold; NaN for concepts that no patch shows."""
    iou: np.ndarray
    """[S, K] intersection over union at the best threshold."""
    threshold: np.ndarray
    """[S, K] that threshold: a patch counts where the activation reaches it. Infinite where no threshold above 0 marks a patch of the
    concept (IoU 0)."""


@torch.no_grad()
def concept_matrix(patches: ConceptPatches, dictionary: Dictionary, *, block: int = 128) -> ConceptMatrix:
    """Average precision and best IoU of all features for all concepts.

    Meant for sparse, non-negative features: a feature's active patches are sorted once, and only (active patch, concept it shows) pairs
    are looked at; the patches where it is silent share the last place.

    Parameters
    ----------
    patches : ConceptPatches
    dictionary : Dictionary
        Activations not negative.
    block : int
        Features at a time: [N, block] float32 in memory.

    Raises
    ------
    ValueError
        If an activation is negative.
    """
    n, n_concepts = patches.masks.shape
    shown = np.asarray(patches.masks.sum(0), np.float64).ravel()
    ap, iou = np.zeros((dictionary.n, n_concepts), np.float32), np.zeros((dictionary.n, n_concepts), np.float32)
    threshold = np.full((dictionary.n, n_concepts), np.inf, np.float32)
    for start in range(0, dictionary.n, block):
        features = np.arange(start, min(start + block, dictionary.n))
        columns = dictionary.encode(patches.tokens, features).T.contiguous().cpu().numpy()
        for feature, scores in zip(features, columns, strict=True):
            if len(scores) and scores.min() < 0:
                raise ValueError(f"Feature {feature} of {dictionary.name!r} has negative activations; concept_matrix needs a ReLU.")
            ap[feature], iou[feature], threshold[feature] = _one_feature(scores, patches.masks, shown, n)
    return ConceptMatrix(ap, iou, threshold)


def _one_feature(scores: np.ndarray, masks: sparse.csr_matrix, shown: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AP, best IoU and its threshold [K] of one feature."""
    active = np.flatnonzero(scores)
    values = np.sort(scores[active])
    at_least = len(values) - np.searchsorted(values, scores[active], "left")  # active patches at least as high: the last of its ties
    order = np.argsort(at_least, kind="stable")
    rows = masks[active[order]]
    rank = np.repeat(at_least[order], np.diff(rows.indptr)).astype(np.int64)
    by_concept = np.argsort(rows.indices, kind="stable")  # within a concept ranks stay ascending
    concept, rank = rows.indices[by_concept].astype(np.int64), rank[by_concept]
    found = np.bincount(concept, minlength=len(shown)).astype(float)
    first = np.concatenate([[0], np.cumsum(found)]).astype(np.int64)
    key = concept * (n + 1) + rank
    hits = np.searchsorted(key, key, "right") - first[concept]  # of the concept, at least as high
    with np.errstate(invalid="ignore"):
        ap = (np.bincount(concept, hits / rank, len(shown)) + (shown - found) * shown / max(n, 1)) / shown
    iou, threshold = np.zeros(len(shown)), np.full(len(shown), np.inf)
    overlap = hits / (rank + shown[concept] - hits)
    np.maximum.at(iou, concept, overlap)
    best = np.flatnonzero(overlap == iou[concept])[::-1]  # of equal ones the highest threshold: written last
    threshold[concept[best]] = values[len(values) - rank[best]]
    return ap, iou, threshold


# -- one latent a concept -----------------------------------------------------------------------------------------------------


class Localization(NamedTuple):
    """Which latent finds which concept, and where."""

    concepts: pd.DataFrame
    """One row a concept: concept, kind, name, n_patches, n_images; latent (of highest AP on the choosing scenes), ap_choose, ap; iou_latent
    (of highest IoU there), threshold, iou_choose, iou; pointing (share of the images that show the concept where the latent's most
    active patch lies on it), pointing_chance (a random patch). Everything without ``_choose`` is of the reported scenes."""
    replicates: dict[str, np.ndarray]
    """"iou" and "pointing": [rows, R] under reweightings of the reported images."""
    matrix: ConceptMatrix
    """On the choosing scenes; all latents, the concepts of the rows in their order."""
    n_patches_choose: np.ndarray
    """[rows] patches of the choosing scenes that show each concept."""

    def table(self, by: str = "kind") -> pd.DataFrame:
        """Means by kind of concept and over all of them ("all").

        Returns
        -------
        DataFrame
            kind, n_concepts, ap, iou, iou_low, iou_high, pointing, pointing_low, pointing_high, pointing_chance; 95 % intervals by the
            Bayesian bootstrap over images, centred on the value: a ratio of sums over few images is lower in the mean of its resamples.
        """
        groups = [*self.concepts.groupby(by, sort=False), ("all", self.concepts)]
        rows = []
        for kind, group in groups:
            row = {by: kind, "n_concepts": len(group), "ap": group["ap"].mean()}
            for metric, draws in self.replicates.items():
                low, high = centred_interval(np.nanmean(draws[group.index], 0), group[metric].mean())
                row |= {metric: group[metric].mean(), f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row | {"pointing_chance": group["pointing_chance"].mean()})
        return pd.DataFrame(rows)


@torch.no_grad()
def localize(
    dictionary: Dictionary,
    choose: ConceptPatches,
    report: ConceptPatches,
    *,
    min_patches: int = 20,
    min_images: int = 2,
    n_bootstrap: int = 200,
    seed: int = 0,
    matrix: ConceptMatrix | None = None,
) -> Localization:
    """Choose a latent and a threshold for every concept on some scenes, and report IoU and the pointing game on others.

    The pointing game (Zhang et al., 2018): does the most active patch lie on the concept? Patches that tie for it share the point; an image
    where the latent is silent is a miss.

    Parameters
    ----------
    dictionary : Dictionary
        Of features that are not negative.
    choose, report : ConceptPatches
        Of scenes that differ.
    min_patches, min_images : int
        Concepts with fewer in either set are left out.
    n_bootstrap : int
    seed : int
    matrix : ConceptMatrix, optional
        Of the choosing scenes, all concepts, when it is at hand.

    Raises
    ------
    ValueError
        If no concept is left.
    """
    columns = common_concepts(choose, report, min_patches=min_patches, min_images=min_images)
    found = concept_matrix(choose, dictionary) if matrix is None else matrix
    found = ConceptMatrix(*(part[:, columns] for part in found))
    masks, n_images = report.masks.tocsc(), report.n_images
    weights = np.random.default_rng(seed).standard_exponential((n_images, n_bootstrap))
    best = {metric: getattr(found, metric).argmax(0) for metric in ("ap", "iou")}
    some, back = np.unique(np.concatenate([best["ap"], best["iou"]]), return_inverse=True)
    activations = dictionary.encode(report.tokens, some).T.contiguous().cpu().numpy()
    rows = []
    replicates: dict[str, list] = {"iou": [], "pointing": []}
    for i, column in enumerate(columns):
        positive = masks.indices[masks.indptr[column] : masks.indptr[column + 1]]
        by_ap, by_iou = activations[back[i]], activations[back[len(columns) + i]]
        threshold = float(found.threshold[best["iou"][i], i])
        iou, iou_draws = _iou(by_iou >= threshold, positive, report.images, weights)
        pointing, chance, pointing_draws = _pointing(by_ap, positive, report.images, weights)
        kind, _, name = report.names[column].partition(":")
        rows.append(
            {
                "concept": report.names[column], "kind": kind, "name": name or kind, "n_patches": len(positive),
                "n_images": len(np.unique(report.images[positive])), "latent": int(best["ap"][i]),
                "ap_choose": float(found.ap[best["ap"][i], i]), "ap": average_precision(by_ap, positive), "iou_latent": int(best["iou"][i]),
                "threshold": threshold, "iou_choose": float(found.iou[best["iou"][i], i]), "iou": iou, "pointing": pointing,
                "pointing_chance": chance,
            }
        )  # fmt: skip
        replicates["iou"].append(iou_draws)
        replicates["pointing"].append(pointing_draws)
    shown = np.diff(choose.masks.tocsc().indptr)[columns]
    return Localization(pd.DataFrame(rows), {name: np.array(draws) for name, draws in replicates.items()}, found, shown)


def _iou(marked: np.ndarray, positive: np.ndarray, images: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Intersection over union of a set of patches and a concept, and its resamples."""
    n = len(weights)
    both = np.bincount(images[positive], marked[positive], n)
    either = np.bincount(images[marked], minlength=n) + np.bincount(images[positive], minlength=n) - both
    return float(both.sum() / either.sum()), (both @ weights) / np.maximum(either @ weights, 1e-300)


def _pointing(scores: np.ndarray, positive: np.ndarray, images: np.ndarray, weights: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Share of images whose highest patch lies on the concept, that of a random patch, and resamples of the first."""
    n = len(weights)
    top = np.zeros(n)
    np.maximum.at(top, images, scores)
    highest = (scores == top[images]) & (scores > 0)
    ties = np.bincount(images, highest, n)
    hits = np.bincount(images[positive], highest[positive], n) / np.maximum(ties, 1)
    shown = np.bincount(images[positive], minlength=n)
    has = shown > 0
    area = shown[has] / np.bincount(images, minlength=n)[has]
    return float(hits[has].mean()), float(area.mean()), (hits[has] @ weights[has]) / weights[has].sum(0)


# -- many latents, many concepts ----------------------------------------------------------------------------------------------


def splitting(found: Localization, share: float = 0.5, min_ap: float = 0.1) -> pd.DataFrame:
    """How many latents share each concept.

    A latent shares a concept if that is the concept it finds best and its AP is at least ``share`` of the best latent's and ``min_ap``,
    all on the choosing scenes.

    Returns
    -------
    DataFrame
        One row a concept: concept, kind, best_ap, n_latents.
    """
    ap = found.matrix.ap
    own = ap.argmax(1)
    best = ap.max(0)
    counts = (ap >= np.maximum(share * best, min_ap)) & (own[:, None] == np.arange(ap.shape[1]))
    frame = found.concepts[["concept", "kind"]].copy()
    return frame.assign(best_ap=best, n_latents=counts.sum(0))


@torch.no_grad()
def absorption(
    found: Localization,
    dictionary: Dictionary,
    report: ConceptPatches,
    *,
    skipped: float = 0.25,
    min_ap: float = 0.3,
    min_recall: float = 0.1,
    members: dict[str, list[str]] | None = None,
) -> pd.DataFrame:
    """Classes that the best latent of their category skips, although it finds the category's others.

    The latent's recall on a class is the share of the class's patches, on the reported scenes, where it reaches the threshold of its best
    IoU for the category. A class is *skipped* where that is less than ``skipped`` times the median over the category's classes, and
    *absorbed* where moreover another latent stands for the class (AP of at least ``min_ap`` on the choosing scenes): the general latent
    stays silent because the special one speaks (Chanin et al., 2024). Where that median is below ``min_recall`` no latent stands for the
    category: its classes are neither found nor skipped.

    Parameters
    ----------
    found : Localization
    dictionary : Dictionary
        The one that ``found`` was made from.
    report : ConceptPatches
        The reported scenes.
    skipped, min_ap, min_recall : float
    members : dict of str to list of str, optional
        Category -> its classes, as the names of concepts without their kind. Default: the embedded world's.

    Returns
    -------
    DataFrame
        One row a category and class: category, latent, object, n_patches, recall, median_recall, found, skipped,
        object_latent, object_ap, absorbed.
    """
    if members is None:
        table = openmoji.class_table()
        members = {category: rows["name"].tolist() for category, rows in table.groupby("category")}
    at = {concept: i for i, concept in enumerate(found.concepts["concept"])}
    masks = report.masks.tocsc()
    rows = []
    for category, classes in members.items():
        here = at.get(f"category:{category}")
        some = [name for name in classes if f"object:{name}" in at]
        if here is None or len(some) < 2:
            continue
        row = found.concepts.iloc[here]
        marked = dictionary.encode(report.tokens, np.array([row["iou_latent"]]))[:, 0].cpu().numpy() >= row["threshold"]
        recalls = {}
        for name in some:
            column = report.names.index(f"object:{name}")
            positive = masks.indices[masks.indptr[column] : masks.indptr[column + 1]]
            recalls[name] = (marked[positive].mean(), len(positive))
        median = float(np.median([recall for recall, _ in recalls.values()]))
        for name, (recall, n_patches) in recalls.items():
            special = found.concepts.iloc[at[f"object:{name}"]]
            general, skips = median >= min_recall, recall < skipped * median
            rows.append(
                {
                    "category": category, "latent": int(row["iou_latent"]), "object": name, "n_patches": n_patches, "recall": float(recall),
                    "median_recall": median, "found": bool(general and not skips), "skipped": bool(general and skips),
                    "object_latent": int(special["latent"]), "object_ap": special["ap_choose"],
                    "absorbed": bool(general and skips and special["latent"] != row["iou_latent"] and special["ap_choose"] >= min_ap),
                }
            )  # fmt: skip
    columns = [
        "category",
        "latent",
        "object",
        "n_patches",
        "recall",
        "median_recall",
        "found",
        "skipped",
        "object_latent",
        "object_ap",
        "absorbed",
    ]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def match_latents(found: Localization, dictionary: Dictionary, report: ConceptPatches) -> pd.DataFrame:
    """One latent a concept, no latent twice, so that the sum of AP on the choosing scenes is largest (Hungarian method, Kuhn, 1955).

    Returns
    -------
    DataFrame
        One row a concept that got a latent: concept, kind, latent, ap_choose, ap (on the reported scenes), best_latent (when latents may
        serve several concepts), best_ap (of that one, reported).
    """
    latents, order = linear_sum_assignment(found.matrix.ap, maximize=True)
    masks = report.masks.tocsc()
    activations = dictionary.encode(report.tokens, latents).T.contiguous().cpu().numpy()
    rows = []
    for latent, concept, scores in zip(latents, order, activations, strict=True):
        row = found.concepts.iloc[concept]
        column = report.names.index(row["concept"])
        positive = masks.indices[masks.indptr[column] : masks.indptr[column + 1]]
        rows.append(
            {
                "concept": row["concept"], "kind": row["kind"], "latent": int(latent), "ap_choose": float(found.matrix.ap[latent, concept]),
                "ap": average_precision(scores, positive), "best_latent": int(row["latent"]), "best_ap": row["ap"],
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    place = {concept: i for i, concept in enumerate(found.concepts["concept"])}
    return frame.sort_values("concept", key=lambda column: column.map(place)).reset_index(drop=True)


class ConceptExample(NamedTuple):
    """One concept in one scene, and its best latent there."""

    concept: str
    latent: int
    ap: float
    """Over all reported scenes, not this one alone."""
    index: int  # type: ignore[assignment]
    """Of the scene in the data set."""
    image: Tensor
    """[H, W, 3] uint8, as CLIP saw it."""
    truth: Tensor
    """[rows, columns] bool: patches that show the concept."""
    activation: Tensor
    """[rows, columns] of the latent."""


def concept_examples(clip, sae, dataset, layer: int, report: ConceptReport, concepts: Sequence[str]) -> list[ConceptExample]:
    """For each concept the scene that shows most of it, whatever its latent does there.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset : OpenMojiData
        The reported scenes.
    layer : int
    report : ConceptReport
    concepts : sequence of str
        As in ``report.detection["concept"]``.

    Raises
    ------
    ValueError
        For a concept that the report doesn't hold, or that no scene shows.
    """
    best = report.detection[report.detection["dictionary"] == report.detection["dictionary"].iloc[0]].set_index("concept")
    unknown = [c for c in concepts if c not in best.index]
    if unknown:
        raise ValueError(f"The report holds no concept {unknown[0]!r}. It holds {len(best)}, among them {', '.join(best.index[:5])}.")
    columns = [openmoji.concept_names().index(c) for c in concepts]
    area = np.array([openmoji.concept_masks(dataset.truth(i))[columns].sum((1, 2)) for i in range(len(dataset))])
    examples = []
    for concept, column, index, patches in zip(concepts, columns, area.argmax(0).tolist(), area.max(0).tolist(), strict=True):
        if patches == 0:
            raise ValueError(f"No scene of {dataset.spec!r} ({dataset.split}) shows {concept!r}.")
        row, inputs = best.loc[concept], clip.preprocess(dataset[index].image)
        truth = torch.from_numpy(openmoji.concept_masks(dataset.truth(index))[column])
        activation = latent_masks(clip, sae, inputs[None], [row["latent"]], layer)[0, 0].cpu()
        examples.append(ConceptExample(concept, int(row["latent"]), float(row["ap"]), index, seen_image(clip, inputs), truth, activation))
    return examples
