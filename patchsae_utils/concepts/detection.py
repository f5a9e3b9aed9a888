"""Which latent finds which concept: patches whose concepts are known, average precision, and the choice of the best latent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from ..data import batches, dataset_fingerprint, truth
from ..data.loader import has_truth
from ..run.artifacts import fingerprint, is_current
from ..run.intervals import resamples
from ..sae.dictionary import Dictionary, sae_dictionary
from ..sae.model import SparseAutoencoder
from .report import FORMAT_VERSION, ConceptReport

N_CANDIDATES = 8  # features a concept, of highest correlation with its mask, whose exact average precision decides
MIN_IMAGES = 2  # concepts in fewer images of either set are left out
N_LEVELS, FEW_LEVELS = 128, 24  # thresholds of an average precision under weights, exactly and coarsely
THIN, MANY = 5, 20_000  # coarsely, one in so many patches without the concept stands for all, where there are many
N_PEERS = 300  # latents whose correlations by chance a latent is compared with
DENSE = 0.1  # share of activations that are not 0, above which they are kept dense
_KEPT = 2**27  # dense activations are kept where they are fewer


class ConceptPatches(NamedTuple):
    """Residual activations of patches, and which concepts each patch shows."""

    tokens: Tensor  # [N, D] float32, N = images x patches; CLS left out
    images: np.ndarray  # [N] which image a patch belongs to, counted from 0
    masks: sparse.csr_matrix  # [N, K] 1 where a patch shows a concept
    names: tuple[str, ...]  # [K] "kind:name"
    families: Mapping[str, Sequence[str]] = {}  # a category's name -> those of its objects

    @property
    def n_images(self) -> int:
        return int(self.images[-1]) + 1

    def rows(self) -> list[np.ndarray]:
        """[K] the patches that show each concept."""
        masks = self.masks.tocsc()
        return np.split(masks.indices, masks.indptr[1:-1])

    def n_images_with(self) -> np.ndarray:
        """[K] how many images show each concept."""
        return np.array([len(np.unique(self.images[rows])) for rows in self.rows()])

    def concepts(self, columns: np.ndarray) -> pd.DataFrame:
        """One row a concept: concept, kind, name, n_patches, n_images."""
        parts = pd.Series([self.names[k] for k in columns]).str.partition(":")
        n_patches = np.diff(self.masks.tocsc().indptr).astype(np.int64)
        names = {"concept": parts[0] + parts[1] + parts[2], "kind": parts[0], "name": parts[2].where(parts[2] != "", parts[0])}
        return pd.DataFrame({**names, "n_patches": n_patches[columns], "n_images": self.n_images_with()[columns]})


def concept_masks(dataset, clip) -> sparse.csr_matrix:
    """Which concepts every patch of a model shows in the pictures of a data set: [images x patches, K]."""
    if not has_truth(dataset):
        raise ValueError(
            f"The data set {getattr(dataset, 'spec', dataset)!r} has no ground truth (no method truth(i)). Use one of the embedded "
            f"world, e.g. 'openmoji/scenes'; without ground truth, name latents from labels: label_latents(summary)."
        )
    n_patches, n_concepts = clip.grid[0] * clip.grid[1], len(dataset.concept_names)
    shown = [truth.concept_masks(dataset, i, clip).reshape(n_concepts, n_patches).nonzero() for i in range(len(dataset))]
    columns = np.concatenate([concept for concept, _ in shown])
    rows = np.concatenate([patch + i * n_patches for i, (_, patch) in enumerate(shown)])
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(dataset) * n_patches, n_concepts))


@torch.no_grad()
def concept_patches(clip, dataset, layer: int, *, progress: bool = True) -> ConceptPatches:
    """Read a data set with ground truth: 4 N D bytes."""
    masks, images = concept_masks(dataset, clip), np.repeat(np.arange(len(dataset)), clip.n_tokens - 1)
    tokens = torch.cat([
        clip.residual(batch.images, layer)[:, 1 : clip.n_tokens].flatten(0, 1).cpu()
        for batch in batches(dataset, clip.preprocess, 64, progress="patches" if progress else None)
    ])  # fmt: skip
    return ConceptPatches(tokens, images, masks, tuple(dataset.concept_names), getattr(dataset, "families", {}))


def read_patches(clip, datasets: Sequence, layer: int, patches: Sequence[ConceptPatches] | None = None) -> list[ConceptPatches]:
    """Patches of some data sets with ground truth: those given, if they fit, or read here."""
    if patches is None:
        return [concept_patches(clip, dataset, layer) for dataset in datasets]
    found, wanted = [(p.n_images, p.tokens.shape[1]) for p in patches], [(len(dataset), clip.width) for dataset in datasets]
    if found != wanted:
        raise ValueError(f"The patches are of (images, width) {found}, the scenes and the model of {wanted}: read these scenes.")
    return list(patches)


def different_scenes(*datasets) -> list[str]:
    """Fingerprints of data sets that must not share scenes."""
    found = [dataset_fingerprint(dataset) for dataset in datasets]
    if min(len(set(found)), len({(dataset.split, getattr(dataset, "seed", 0)) for dataset in datasets})) < len(datasets):
        splits = ", ".join(f"{dataset.spec} ({dataset.split})" for dataset in datasets)
        raise ValueError(f"Latents are fitted, chosen and reported on scenes that differ, got {splits}. Give {len(datasets)} splits.")
    return found


def common_concepts(choose: ConceptPatches, report: ConceptPatches, min_patches: int = 20) -> np.ndarray:
    """Concepts that enough patches of enough images show, in both sets: int array [K'], columns of the masks."""
    shown = [(p.n_images_with() >= MIN_IMAGES) & (np.diff(p.masks.tocsc().indptr) >= min_patches) for p in (choose, report)]
    common = np.flatnonzero(shown[0] & shown[1])
    if not len(common):
        raise ValueError(
            f"No concept is shown by {MIN_IMAGES} images of both sets on {min_patches} patches ({choose.n_images} and {report.n_images} "
            "images). Give more scenes."
        )
    return common


def average_precision(scores: np.ndarray, positive: np.ndarray, ascending: np.ndarray | None = None) -> float:
    """Average precision of scores [N] for some rows [n], ties sharing one threshold, as in scikit-learn.

    ``ascending``: all scores, sorted; or an even part of them that stands for all.
    """
    ascending = np.sort(scores) if ascending is None else ascending
    thresholds, mine = np.unique(scores[positive], return_counts=True)
    hits = mine[::-1].cumsum()[::-1]
    every = np.maximum(hits, len(scores) / len(ascending) * (len(ascending) - np.searchsorted(ascending, thresholds, "left")))
    return float((mine * hits / every).sum() / mine.sum()) if len(mine) else float("nan")


@lru_cache(maxsize=4)
def evenly(n: int, n_images: int, step: int) -> np.ndarray:
    """One in ``step`` of n patches, of all places in turn: where images would have the same few, each begins one later than that before it."""
    at, per_image = np.arange(n), n // n_images
    return np.flatnonzero((at if gcd(step, per_image) == 1 else at % per_image + at // per_image) % step == 0)


def resampled_precision(
    scores: np.ndarray, positive: np.ndarray, images: np.ndarray, weights: np.ndarray, coarse: bool = False
) -> np.ndarray:
    """:func:`average_precision` under weights [R, n_images], how often each image counts: [R]; NaN where no positive counts.

    Exact where the positives have at most ``N_LEVELS`` distinct scores, else at their quantiles. ``coarse`` is for intervals that are
    centred on the exact value: at ``FEW_LEVELS``, with a part of the other patches.
    """
    thresholds, n_levels = np.unique(scores[positive]), FEW_LEVELS if coarse else N_LEVELS
    thin = THIN if coarse and len(scores) > MANY else 1
    if not len(thresholds):
        return np.full(len(weights), np.nan)
    if len(thresholds) > n_levels:  # scores that occur, in their own precision: not numpy's quantiles
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, n_levels).astype(int)]

    def reaching(rows: np.ndarray) -> np.ndarray:
        """[levels, R] weight of the rows that reach each threshold."""
        level, n = np.searchsorted(thresholds, scores[rows], "right") - 1, weights.shape[1]
        counts = np.bincount(level * n + images[rows], minlength=len(thresholds) * n).reshape(-1, n)[::-1].cumsum(0)[::-1]
        shown = np.flatnonzero(counts[0])
        shown = shown if 2 * len(shown) < n else slice(None)  # a slice is not copied
        return counts[:, shown].astype(weights.dtype) @ weights[:, shown].T

    other = scores >= thresholds[0]
    other[positive] = False
    hits = reaching(positive)
    every = hits + thin * reaching(thin * np.flatnonzero(other[::thin]))
    precision = hits / np.maximum(every, np.finfo(every.dtype).tiny)
    with np.errstate(invalid="ignore"):
        return -(np.diff(hits, axis=0, append=0) * precision).sum(0) / hits[0]


class Activations:
    """Features of some patches, [N, n]. Sparse ones, and few dense ones, are read once and kept; others when asked for."""

    block = 128  # features at a time: float32 [block, N]

    @torch.no_grad()
    def __init__(self, dictionary: Dictionary, patches: ConceptPatches):
        self.dictionary, self.patches, self.n = dictionary, patches, dictionary.n
        self.kept: Any = None  # csc_matrix [N, n], array [n, N] or neither
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        step = len(patches.tokens) // patches.n_images  # an image at a time stays in a cache, and in memory that was used before
        for start, some in zip(range(0, len(patches.tokens), step), patches.tokens.split(step), strict=True):
            h = dictionary.encode(some, None).cpu()
            row, column = h.nonzero(as_tuple=True)
            if not parts and len(row) > DENSE * h.numel():
                if dictionary.n * len(patches.tokens) <= _KEPT:
                    self.kept = dictionary.encode(patches.tokens, None).T.contiguous().cpu().numpy()
                return
            parts.append((h[row, column], (row + start).int(), column.int()))
        values, rows, columns = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
        self.kept = sparse.coo_matrix((values, (rows, columns)), (len(patches.tokens), dictionary.n)).tocsc()

    def columns(self, features: np.ndarray) -> np.ndarray:
        """Some features, one row each: [m, N]."""
        if self.kept is None:
            return self.dictionary.encode(self.patches.tokens, features).T.contiguous().cpu().numpy()
        return np.ascontiguousarray(self.kept[:, features].toarray().T) if sparse.issparse(self.kept) else self.kept[features]

    def active(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Patches where a feature is not 0, ascending, and its values there."""
        if sparse.issparse(self.kept):
            some = slice(*self.kept.indptr[feature : feature + 2])
            return self.kept.indices[some], self.kept.data[some]
        scores = self.columns(np.array([feature]))[0]
        return (rows := np.flatnonzero(scores)), scores[rows]

    def chunks(self) -> Iterator[tuple[slice, Any]]:
        """All features of some whole images at a time."""
        if sparse.issparse(self.kept):
            yield slice(0, self.kept.shape[0]), self.kept
            return
        step = len(self.patches.tokens) // self.patches.n_images
        for start in range(0, len(self.patches.tokens), step):
            rows = slice(start, start + step)
            h = self.dictionary.encode(self.patches.tokens[rows], None).cpu().numpy() if self.kept is None else self.kept[:, rows].T
            yield rows, h


@torch.no_grad()
def precisions(
    features: Activations, some: np.ndarray, concepts: np.ndarray, weights: np.ndarray | None = None, coarse: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision of pairs of feature and concept, [m], and with weights [R, n_images] in every resample, [m, R].

    ``coarse``: in resamples as :func:`resampled_precision`; without weights, to choose by, a part of the patches stands for all.
    """
    patches, (each, which) = features.patches, np.unique(some, return_inverse=True)
    rows, weights = patches.rows(), np.zeros((0, patches.n_images)) if weights is None else weights
    ap, resampled = np.zeros(len(some)), np.zeros((len(some), len(weights)), np.float32)
    thin = coarse and not len(weights) and len(patches.tokens) > MANY

    for start in range(0, len(each), features.block):
        for at, scores in enumerate(features.columns(each[start : start + features.block]), start):
            ascending = np.sort(scores[evenly(len(scores), patches.n_images, THIN)] if thin else scores)  # once for all its concepts
            for i in np.flatnonzero(which == at):
                ap[i] = average_precision(scores, rows[concepts[i]], ascending)
                if len(weights):
                    resampled[i] = resampled_precision(scores, rows[concepts[i]], patches.images, weights, coarse)
    return ap, resampled


@torch.no_grad()
def concept_correlations(features: Activations, *more: sparse.csr_matrix) -> tuple[list[np.ndarray], np.ndarray]:
    """Pearson correlations [K, S] of features with the patches' masks and some others (0 where a side is constant); effective images [S].

    Effective is the squared sum over images of a feature's activation over the sum of squares.
    """
    patches, S = features.patches, features.n
    n, n_concepts = patches.masks.shape
    masks, per_image = [patches.masks, *more], n // patches.n_images
    a, a2, images2 = np.zeros((3, S))
    am = [np.zeros((n_concepts, S)) for _ in masks]
    for rows, h in features.chunks():
        n_rows = h.shape[0]
        in_image = sparse.csr_matrix((np.ones(n_rows, np.float32), (np.arange(n_rows) // per_image, np.arange(n_rows))))
        a += np.asarray(h.sum(0, dtype=np.float64)).ravel()
        a2 += np.asarray(h.multiply(h).sum(0, dtype=np.float64)).ravel() if sparse.issparse(h) else np.square(h, dtype=float).sum(0)
        by_image = in_image @ h
        images2 += np.asarray(by_image.multiply(by_image).sum(0)).ravel() if sparse.issparse(by_image) else (by_image**2).sum(0)
        for total, mask in zip(am, masks, strict=True):
            product = mask[rows].T @ h
            total += product.toarray() if sparse.issparse(product) else product
    m = np.asarray(patches.masks.sum(0), np.float64).ravel() / n
    scale = np.outer(np.sqrt(m * (1 - m)), np.sqrt(np.maximum(a2 / n - (a / n) ** 2, 0)))
    found = [np.divide(total / n - np.outer(m, a / n), scale, out=np.zeros_like(scale), where=scale > 1e-12) for total in am]
    return found, np.divide(a**2, images2, out=np.zeros_like(a), where=images2 > 0)


def candidates(correlation: np.ndarray) -> np.ndarray:
    """The features of highest correlation for each concept: [K, S] -> [K, n]."""
    n = min(N_CANDIDATES, correlation.shape[1])
    return np.sort(np.argpartition(-correlation, n - 1, axis=1)[:, :n], axis=1)


def image_weights(n_images: int) -> np.ndarray:
    """How often each image counts in each resample: float32 [R, n_images]."""
    return np.concatenate([part.astype(np.float32) for part in resamples(n_images)])


def best_features(
    name: str, role: str, choose: Activations, report: Activations, concepts: np.ndarray, tried: np.ndarray, weights: np.ndarray,
    coarse: bool = False,
) -> tuple[pd.DataFrame, np.ndarray]:  # fmt: skip
    """The best of the features tried [K', n], ascending, for each concept on ``choose``; its AP on ``report``, and in resamples [K', R]."""
    ap = precisions(choose, tried.ravel(), np.repeat(concepts, tried.shape[1]), coarse=coarse)[0].reshape(tried.shape)
    best = np.take_along_axis(tried, ap.argmax(1)[:, None], 1)[:, 0]
    held_out, resampled = precisions(report, best, concepts, weights, coarse)
    frame = report.patches.concepts(concepts)
    frame = pd.DataFrame({"dictionary": name, "role": role}, frame.index).join(frame[["concept", "kind", "name"]]).assign(
        latent=best, ap_choose=ap.max(1), ap=held_out, chance=frame["n_patches"] / len(report.patches.tokens),
        n_patches=frame["n_patches"], n_images=frame["n_images"], readout="activations", l0=np.nan, explained_variance=np.nan,
    )  # fmt: skip
    return frame, resampled


def measure_concepts(
    clip, sae: SparseAutoencoder, choose, report, layer: int, *, out: str | Path, patches: Sequence[ConceptPatches] | None = None
) -> ConceptReport:
    """Find the best latent of each concept on ``choose``, report how well it does on ``report``, and say what each latent answers to.

    It is the one of highest average precision among those that correlate most with the concept's mask. The report is kept in ``out``;
    ``patches`` are of both sets, when they were read before.
    """
    key = fingerprint(
        stage="concepts", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, data=different_scenes(choose, report),
        layer=clip.layer_index(layer),
    )  # fmt: skip
    if is_current(out, key, holds="replicates.npy"):
        return ConceptReport.load(out)
    sae.check_model(clip, layer)
    found = detect_concepts(sae_dictionary(sae), *read_patches(clip, (choose, report), layer, patches))
    result = dataclasses.replace(found, sae=sae.fingerprint)
    result.save(out, key)
    return result


def detect_concepts(dictionary: Dictionary, choose: ConceptPatches, report: ConceptPatches) -> ConceptReport:
    """:func:`measure_concepts` on patches that were read before."""
    common = common_concepts(choose, report, min_patches=1)
    per_image = len(choose.tokens) // choose.n_images
    order = np.random.default_rng(0).permutation(choose.n_images)
    shuffled = choose.masks[(order[:, None] * per_image + np.arange(per_image)).ravel()]
    chosen, reported = Activations(dictionary, choose), Activations(dictionary, report)
    (correlation, null), spread = concept_correlations(chosen, shuffled)
    (held_out,), _ = concept_correlations(reported)
    weights = image_weights(report.n_images)
    frame, replicates = best_features(dictionary.name, "sae", chosen, reported, common, candidates(correlation[common]), weights)
    names = np.array(report.names)[common]
    return ConceptReport(frame, replicates, answers(correlation[common], held_out[common], null[common], spread, names))


def answers(correlation: np.ndarray, held_out: np.ndarray, null: np.ndarray, spread: np.ndarray, names: np.ndarray) -> pd.DataFrame:
    """The concept that each latent correlates with most, the runner-up, and how often shuffled pictures (``null``, all [K', S]) do as well.

    Each is compared with the ``N_PEERS`` that are active in about as many images (``spread`` [S]): few images correlate more by chance.
    """
    latents, order = np.arange(correlation.shape[1]), np.argsort(-correlation, axis=0, kind="stable")
    best, score = correlation[order[0], latents], held_out[order[0], latents]
    second = correlation[order[1], latents] if len(order) > 1 else 0.0
    living = np.flatnonzero(spread > 0)
    living = living[np.argsort(spread[living], kind="stable")]
    by_chance, n = null.max(0)[living], min(N_PEERS, len(living))
    first = np.clip(np.arange(len(living)) - n // 2, 0, len(living) - n)
    p = np.ones(len(latents))
    p[living] = (1 + (by_chance[first[:, None] + np.arange(n)] >= score[living, None]).sum(1)) / (1 + n)
    said = {"latent": latents, "concept": names[order[0]], "runner_up": names[order[1]] if len(order) > 1 else ""}
    return pd.DataFrame({**said, "score_choose": best, "margin": best - second, "score": score, "p": p})
