"""Measuring against ground truth: patches that know their concepts, features that compete, average precision and its resamples."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..data import batches, openmoji
from ..data.sources import has_truth
from ..sae.dictionary import Dictionary

# -- patches with ground truth --------------------------------------------------------------------------------------------


class ConceptPatches(NamedTuple):
    """Residual activations of patches, and which concepts each patch shows."""

    tokens: Tensor
    """[N, D] float32, N = images x patches; CLS left out."""
    images: np.ndarray
    """[N] which image a patch belongs to, counted from 0."""
    masks: sparse.csr_matrix
    """[N, K] 1 where a patch shows a concept."""
    names: tuple[str, ...]
    """[K] "kind:name"."""

    @property
    def n_images(self) -> int:
        return int(self.images[-1]) + 1


@torch.no_grad()
def concept_patches(clip, dataset, layer: int, *, batch_size: int = 64, progress: bool = True) -> ConceptPatches:
    """Read a data set with ground truth.

    Memory: 4 N D bytes, e.g. 150 MB for 1,000 images of 196 patches at d_in 192.

    Parameters
    ----------
    clip : ClipModel
    dataset : OpenMojiData
        Or any data set with ``truth(i)`` as :class:`patchsae_utils.data.openmoji.SceneTruth`.
    layer : int

    Raises
    ------
    ValueError
        If the data set has no ground truth, or its grid is not the model's.
    """
    if not has_truth(dataset):
        raise ValueError(
            f"The data set {getattr(dataset, 'spec', dataset)!r} has no ground truth (no method truth(i)). Use one of the embedded "
            f"world, e.g. 'openmoji/scenes'; without ground truth, name latents from labels: label_latents(summary)."
        )
    if tuple(clip.grid) != (openmoji.GRID, openmoji.GRID):
        raise ValueError(
            f"The ground truth lies on a {openmoji.GRID} x {openmoji.GRID} grid; {clip.name!r} has {clip.grid[0]} x {clip.grid[1]} patches."
        )
    names = openmoji.concept_names()
    n_patches = openmoji.GRID**2
    tokens = torch.empty(len(dataset) * n_patches, clip.width)
    rows, columns = [], []
    done = 0
    for batch in batches(dataset, clip.preprocess, batch_size, progress="patches" if progress else None):
        patches = clip.residual(batch.images, layer)[:, 1 : clip.n_tokens]
        tokens[done * n_patches : (done + len(patches)) * n_patches] = patches.flatten(0, 1).cpu()
        for i in batch.indices.tolist():
            concept, patch = openmoji.concept_masks(dataset.truth(i)).reshape(len(names), -1).nonzero()
            rows.append(patch + done * n_patches)
            columns.append(concept)
            done += 1
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    masks = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(tokens), len(names)))
    return ConceptPatches(tokens, np.repeat(np.arange(len(dataset)), n_patches), masks, names)


# -- dictionaries that compete ----------------------------------------------------------------------------------------------


# -- how well a feature finds a concept ---------------------------------------------------------------------------------------


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision of a score for a set of patches; ties share one threshold, as in ``sklearn.metrics.average_precision_score``.

    Parameters
    ----------
    scores : float array [N]
    positive : int array [n]
        Rows that show the concept.

    Returns
    -------
    float
        Mean over positives of (positives at least as high) / (rows at least as high); NaN without positives.
    """
    return Ranking(np.asarray(scores)).precision(np.asarray(positive))


class Ranking:
    """A feature's values sorted once, to be asked about many concepts. Zeros, most of a sparse latent's values, stay out of the sort."""

    def __init__(self, scores: np.ndarray):
        self.scores = scores
        self.sparse = bool(scores.size) and scores.min() == 0
        self.ascending = np.sort(scores[scores > 0] if self.sparse else scores)

    def at_least(self, values: np.ndarray) -> np.ndarray:
        """How many scores reach each value."""
        above = len(self.ascending) - np.searchsorted(self.ascending, values, "left")
        return np.where(values <= 0, len(self.scores), above) if self.sparse else above

    def precision(self, positive: np.ndarray) -> float:
        """:func:`average_precision` for these rows."""
        values = np.sort(self.scores[positive])
        if not len(values):
            return float("nan")
        return float(np.mean((len(values) - np.searchsorted(values, values, "left")) / self.at_least(values)))


def bootstrap_precision(
    scores: np.ndarray, positive: np.ndarray, images: np.ndarray, weights: np.ndarray, n_levels: int = 256
) -> np.ndarray:
    """Average precision under other weights of the images, as a bootstrap draws them.

    Parameters
    ----------
    scores : float array [N]
    positive : int array [n]
        Rows that show the concept.
    images : int array [N]
        Image of each row.
    weights : float array [n_images, R]
        R weights of each image; ones give the plain average precision.
    n_levels : int
        Thresholds; exact where the positives have no more distinct scores, else their quantiles are used.

    Returns
    -------
    float array [R]
        NaN where all positives weigh nothing.
    """
    scores = np.asarray(scores)
    thresholds = np.unique(scores[positive])
    if len(thresholds) > n_levels:
        # Ranks, not numpy's quantile: thresholds must be scores that occur, in their own precision.
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, n_levels).astype(int)]
    rows = np.flatnonzero(scores > thresholds[0])  # all others are either exactly at the lowest threshold or below every one
    lowest = np.flatnonzero(scores == thresholds[0])
    n_images = len(weights)

    def weighted(rows: np.ndarray) -> np.ndarray:
        level = np.searchsorted(thresholds, scores[rows], "right") - 1
        counts = np.bincount(level * n_images + images[rows], minlength=len(thresholds) * n_images)
        return counts.reshape(len(thresholds), n_images) @ weights

    mine = weighted(positive)
    every = weighted(rows)
    every[0] += np.bincount(images[lowest], minlength=n_images) @ weights
    reach_mine, reach_every = mine[::-1].cumsum(0)[::-1], every[::-1].cumsum(0)[::-1]
    precision = np.divide(reach_mine, reach_every, out=np.zeros_like(reach_mine), where=reach_every > 0)
    total = reach_mine[0]
    return np.where(total > 0, (mine * precision).sum(0) / np.where(total > 0, total, 1), np.nan)


def n_threads() -> int:
    """Threads for work on single features: numpy lets go of the interpreter while it sorts and multiplies. The cores at hand, at most eight."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class ConceptSums(NamedTuple):
    """Sums over patches that give every correlation of features and concepts."""

    n: int
    a: np.ndarray
    """[S] sum of activations."""
    a2: np.ndarray
    """[S] sum of their squares."""
    m: np.ndarray
    """[K] patches that show each concept."""
    am: np.ndarray
    """[K, S] sum of activations on those patches."""

    def correlation(self) -> np.ndarray:
        """Pearson correlation [K, S] of activation and mask; 0 where either is constant."""
        covariance = self.am / self.n - np.outer(self.m / self.n, self.a / self.n)
        spread_a = np.sqrt(np.maximum(self.a2 / self.n - (self.a / self.n) ** 2, 0))
        spread_m = np.sqrt(self.m / self.n * (1 - self.m / self.n))
        scale = np.outer(spread_m, spread_a)
        return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)


@torch.no_grad()
def concept_sums(
    patches: ConceptPatches, dictionary: Dictionary, *, shuffled: np.ndarray | None = None, chunk_rows: int = 6272
) -> tuple[ConceptSums, ConceptSums | None]:
    """One pass over the patches.

    Parameters
    ----------
    patches : ConceptPatches
    dictionary : Dictionary
    shuffled : int array [n_images], optional
        A permutation of the images: the second result pairs each image's activations with the masks of another.
    chunk_rows : int
        Patches at a time: the largest block is [chunk_rows, S] float32.
    """
    n, n_concepts = patches.masks.shape
    masks = [patches.masks]
    if shuffled is not None:
        per_image = n // patches.n_images
        masks.append(patches.masks[(shuffled[:, None] * per_image + np.arange(per_image)).ravel()])
    a, a2 = np.zeros(dictionary.n), np.zeros(dictionary.n)
    am = [np.zeros((n_concepts, dictionary.n)) for _ in masks]
    for start in range(0, n, chunk_rows):
        h = dictionary.encode(patches.tokens[start : start + chunk_rows], None).cpu().numpy()
        a += h.sum(0, dtype=np.float64)
        a2 += np.einsum("ns,ns->s", h, h)
        for total, mask in zip(am, masks, strict=True):
            total += mask[start : start + chunk_rows].T @ h
    m = np.asarray(patches.masks.sum(0), np.float64).ravel()
    sums = [ConceptSums(n, a, a2, m, total) for total in am]
    return sums[0], sums[1] if shuffled is not None else None
