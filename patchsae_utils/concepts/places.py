"""Where latents are active, against masks of the ground truth: IoU, the pointing game, absorption, matching."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data import truth
from ..latents.pictures import seen_image
from ..latents.reading import latent_masks
from ..run.intervals import interval
from ..sae.dictionary import Dictionary
from .detection import Activations, ConceptPatches, common_concepts, precisions
from .report import ConceptReport

SKIPPED, MIN_RECALL, MIN_SPECIAL_AP = 0.25, 0.1, 0.3  # of absorption


class ConceptMatrix(NamedTuple):
    """How well every feature finds every concept, on one set of scenes."""

    ap: np.ndarray  # [S, K] average precision, exact, ties sharing one threshold; NaN for concepts that no patch shows
    iou: np.ndarray  # [S, K] intersection over union at the best threshold
    threshold: np.ndarray  # [S, K] that threshold, which activations reach; infinite where the IoU is 0


def concept_matrix(features: Activations) -> ConceptMatrix:
    """Average precision and best IoU of all features, which are not negative, for all concepts."""
    masks = features.patches.masks
    n, shown = masks.shape[0], np.asarray(masks.sum(0), np.float64).ravel()
    found = np.zeros((3, features.n, len(shown)), np.float32)
    for feature in range(features.n):
        active, values = features.active(feature)
        if len(values) and values.min() < 0:
            raise ValueError(f"Feature {feature} of {features.dictionary.name!r} has negative activations; concept_matrix needs a ReLU.")
        found[:, feature] = _one_feature(active, values, n, masks, shown)
    return ConceptMatrix(*found)


def _one_feature(active: np.ndarray, scores: np.ndarray, n: int, masks: sparse.csr_matrix, shown: np.ndarray) -> tuple[np.ndarray, ...]:
    """AP, best IoU and its threshold [K] of one feature, from the patches where it is active and its scores there."""
    values = np.sort(scores)
    at_least = len(values) - np.searchsorted(values, scores, "left")  # active patches at least as high: the last of its ties
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


class Localization(NamedTuple):
    """Which latent finds which concept, and where."""

    concepts: pd.DataFrame
    """One row a concept: concept, kind, name, n_patches, n_images; latent (of highest AP), ap_choose, ap; iou_latent (of highest IoU),
    threshold, iou_choose, iou; pointing (share of its images where the latent's most active patch lies on it), pointing_chance (a random
    patch)."""
    by_image: dict[str, tuple[np.ndarray, np.ndarray]]  # "iou", "pointing": each image's numerator and denominator [rows, n_images]
    matrix: ConceptMatrix  # on the choosing scenes; all latents, the concepts of the rows in their order
    features: Activations  # on the reported scenes

    def table(self) -> pd.DataFrame:
        """Means by kind of concept ("all" last): kind, n_concepts, ap, iou, pointing, pointing_chance; 95% over images, centred."""
        rows = []
        for kind, group in [*self.concepts.groupby("kind", sort=False), ("all", self.concepts)]:
            row = {"kind": kind, "n_concepts": len(group), "ap": group["ap"].mean()}
            for metric, sums in self.by_image.items():
                top, bottom = (part[group.index] for part in sums)
                found = interval(partial(_mean_ratio, top=top, bottom=bottom), top.shape[1], "images", centred=True)
                row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
            rows.append(row | {"pointing_chance": group["pointing_chance"].mean()})
        return pd.DataFrame(rows)

    def sentence(self) -> str:
        """IoU and pointing by kind of concept in words."""
        return "; ".join(
            f"{row.kind}: IoU {row.iou:.2f} [{row.iou_low:.2f}, {row.iou_high:.2f}], pointing {row.pointing:.0%} "
            f"[{row.pointing_low:.0%}, {row.pointing_high:.0%}] (by chance {row.pointing_chance:.0%})"
            for row in self.table().itertuples()
        )

    @torch.no_grad()
    def absorption(self) -> pd.DataFrame:
        """Classes that the best latent of their category skips, although it finds the category's others; one row a category and class.

        ``recall``: share of the class's patches where the latent reaches the threshold of its best IoU for the category. A class is
        *skipped* where that is less than a quarter of the median over the category's classes, *absorbed* where moreover another latent
        stands for the class (AP of at least 0.3): Chanin et al., 2024. Where that median is below 0.1 classes are neither *found* nor
        skipped.
        """
        patches, concepts, parts = self.features.patches, self.concepts.set_index("concept"), []
        positives = dict(zip(patches.names, patches.rows(), strict=True))
        for category, objects in patches.families.items():
            some = [concept for concept in objects if concept in concepts.index]
            if category not in concepts.index or len(some) < 2:
                continue
            latent, threshold = concepts.loc[category, ["iou_latent", "threshold"]]
            marked = self.features.columns(np.array([int(latent)]))[0] >= threshold
            special = concepts.loc[some, ["n_patches", "latent", "ap_choose"]].reset_index()
            recall = special["concept"].map(lambda concept, marked=marked: marked[positives[concept]].mean())
            general, skips = recall.median() >= MIN_RECALL, recall < SKIPPED * recall.median()
            stands = (special["latent"] != latent) & (special["ap_choose"] >= MIN_SPECIAL_AP)
            found = {"category": category.partition(":")[2], "latent": int(latent), "object": [name.partition(":")[2] for name in some]}
            found |= {"n_patches": special["n_patches"], "recall": recall, "median_recall": recall.median(), "found": general & ~skips}
            found |= {"skipped": general & skips, "object_latent": special["latent"], "object_ap": special["ap_choose"]}
            parts.append(pd.DataFrame({**found, "absorbed": general & skips & stands}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["category", "found", "skipped", "absorbed"])

    def sharing(self) -> str:
        """Absorption and matching in words."""
        absorbed, matched = self.absorption(), self.matching()
        found = absorbed[absorbed["found"].astype(bool) | absorbed["skipped"].astype(bool)]
        words = ""
        if len(absorbed):
            words = f"{found['category'].nunique()} of {absorbed['category'].nunique()} categories have a latent of their own. "
        if len(found):
            skips, others = found["skipped"].sum(), found["absorbed"].sum()
            words += f"Of their {len(found)} classes it skips {skips}; another latent stands for {others} of these (absorption). "
        return (
            f"{words}If no latent may serve two concepts, mean AP is {matched['ap'].mean():.3f} instead of {matched['best_ap'].mean():.3f}."
        )

    def matching(self) -> pd.DataFrame:
        """One latent a concept, none twice, of largest summed AP (Hungarian method, Kuhn, 1955); best_*: when one may serve several."""
        latents, order = linear_sum_assignment(self.matrix.ap, maximize=True)
        rows = self.concepts.iloc[order]
        columns = np.array([self.features.patches.names.index(concept) for concept in rows["concept"]])
        matched = rows[["concept", "kind"]].assign(
            latent=latents, ap_choose=self.matrix.ap[latents, order], ap=precisions(self.features, latents, columns)[0],
            best_latent=rows["latent"], best_ap=rows["ap"],
        )  # fmt: skip
        return matched.sort_index().reset_index(drop=True)


def _mean_ratio(weights: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """[R] mean over concepts of ratios of weighted sums over images, of those that some image shows."""
    below = weights @ bottom.T
    ratios = np.divide(weights @ top.T, below, out=np.zeros_like(below), where=below > 0)
    with np.errstate(invalid="ignore"):
        return ratios.sum(1) / (below > 0).sum(1)


@torch.no_grad()
def localize(dictionary: Dictionary, choose: ConceptPatches, report: ConceptPatches) -> Localization:
    """Choose a latent and a threshold for every concept on some scenes, and report IoU and the pointing game on others.

    The pointing game (Zhang et al., 2018): does the most active patch lie on the concept? Patches that tie share the point, a silent latent
    misses. Concepts on fewer than 20 patches, or in fewer than two images, of either set are left out.

    Parameters
    ----------
    dictionary : Dictionary, of features that are not negative
    choose, report : ConceptPatches, of scenes that differ
    """
    columns = common_concepts(choose, report)
    found = ConceptMatrix(*(part[:, columns] for part in concept_matrix(Activations(dictionary, choose))))
    features = Activations(dictionary, report)
    at = np.arange(len(columns))
    best, widest = found.ap.argmax(0), found.iou.argmax(0)
    frame = report.concepts(columns).assign(
        latent=best, ap_choose=found.ap[best, at], ap=precisions(features, best, columns)[0], iou_latent=widest,
        threshold=found.threshold[widest, at], iou_choose=found.iou[widest, at],
    )  # fmt: skip
    positives = report.rows()
    by_ap, by_iou = (features.columns(some) for some in (best, widest))
    both, either = zip(*(_overlap(by_iou[i] >= frame["threshold"][i], positives[k], report) for i, k in enumerate(columns)), strict=True)
    hits, shown, chance = zip(*(_pointing(by_ap[i], positives[k], report) for i, k in enumerate(columns)), strict=True)
    sums = {"iou": (np.array(both), np.array(either)), "pointing": (np.array(hits), np.array(shown))}
    values = {metric: top.sum(1) / bottom.sum(1) for metric, (top, bottom) in sums.items()}
    frame = frame.assign(**values, pointing_chance=chance)
    return Localization(frame, sums, found, features)


def _overlap(marked: np.ndarray, positive: np.ndarray, patches: ConceptPatches) -> tuple[np.ndarray, np.ndarray]:
    """[n_images] patches that are marked and show a concept, and those that do either."""
    images, n = patches.images, patches.n_images
    both = np.bincount(images[positive], marked[positive], n)
    return both, np.bincount(images[marked], minlength=n) + np.bincount(images[positive], minlength=n) - both


def _pointing(scores: np.ndarray, positive: np.ndarray, patches: ConceptPatches) -> tuple[np.ndarray, np.ndarray, float]:
    """[n_images] whether the highest patch lies on the concept, and whether the image shows it; that share for a random patch."""
    images, n = patches.images, patches.n_images
    top = np.zeros(n)
    np.maximum.at(top, images, scores)
    highest = (scores == top[images]) & (scores > 0)
    hits = np.bincount(images[positive], highest[positive], n) / np.maximum(np.bincount(images, highest, n), 1)
    area = np.bincount(images[positive], minlength=n) / np.bincount(images, minlength=n)
    return hits, (area > 0).astype(float), float(area[area > 0].mean())


class ConceptExample(NamedTuple):
    """One concept in one scene, and its best latent there."""

    concept: str
    latent: int
    ap: float  # over all reported scenes, not this one alone
    image: Tensor  # [H, W, 3] uint8, as CLIP saw it
    truth: Tensor  # [rows, columns] bool: patches that show the concept
    activation: Tensor  # [rows, columns] of the latent


def concept_examples(clip, sae, dataset, layer: int, report: ConceptReport, concepts: Sequence[str]) -> list[ConceptExample]:
    """For each concept the scene in full color that shows most of it, whatever its latent does there.

    Parameters
    ----------
    clip, sae, layer
    dataset : the reported scenes
    report : ConceptReport
    concepts : sequence of str, as in ``report.detection["concept"]``
    """
    sae.check_model(clip, layer)
    sae.check_own("The report", report.sae)
    best = report.detection.set_index("concept")
    if unknown := [c for c in concepts if c not in best.index]:
        raise ValueError(f"The report holds no concept {unknown[0]!r}. It holds {len(best)}, among them {', '.join(best.index[:5])}.")
    columns = [dataset.concept_names.index(c) for c in concepts]
    area = np.array([truth.concept_masks(dataset, i, clip)[columns].sum((1, 2)) for i in range(len(dataset))])
    if hasattr(dataset, "scene") and any(lit := np.array([dataset.scene(i).domain == "color" for i in range(len(dataset))])):
        area *= lit[:, None]
    examples = []
    for concept, column, index, patches in zip(concepts, columns, area.argmax(0).tolist(), area.max(0).tolist(), strict=True):
        if patches == 0:
            raise ValueError(f"No scene of {dataset.spec!r} ({dataset.split}) shows {concept!r}.")
        row, inputs = best.loc[concept], clip.preprocess(dataset[index].image)
        shown = torch.from_numpy(truth.concept_masks(dataset, index, clip)[column])
        activation = latent_masks(clip, sae, inputs[None], [row["latent"]], layer)[0, 0].cpu()
        examples.append(ConceptExample(concept, int(row["latent"]), float(row["ap"]), seen_image(clip, inputs), shown, activation))
    return examples
