"""What single latents do to the class logits: specificity, dose and response. Where a data set knows what every patch shows, see also
:mod:`patchsae_utils.interventions.concept_effects` and :mod:`patchsae_utils.interventions.scene_effects` (their public names are here too).

Every experiment keeps the reconstruction error, so nothing but the named latents changes, and every one has a control: other latents of
the same image that were about as active. Latents are chosen on the train split (:func:`rank_latents`), effects are measured on test.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..data import batches
from ..latents.classes import class_scores
from ..latents.summary import LatentSummary
from ..run.intervals import bootstrap_mean
from .choosing import matched_latents
from .concept_effects import ConceptLatents, concept_head, concept_prompts, concept_specificity, rank_concepts
from .scene_effects import color_swap_scenes, object_patches, remove_objects, swap_colors, two_object_scenes
from .tail import check_models, contribution, dataset_head, decoder_of, network_tail

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

__all__ = [
    "SCENES",
    "ConceptLatents",
    "class_scores",
    "color_swap_scenes",
    "concept_head",
    "concept_latents",
    "concept_prompts",
    "concept_specificity",
    "dose_response",
    "object_patches",
    "rank_concepts",
    "rank_latents",
    "remove_objects",
    "specificity",
    "summarize_effects",
    "swap_colors",
    "two_object_scenes",
]

SCENES = ("show it", "show another")


def rank_latents(summary: LatentSummary, k: int = 1) -> Tensor:
    """Each class's most characteristic latents by :func:`class_scores`, best first: LongTensor [C, k].

    Raises
    ------
    ValueError
        If k is outside 1..S.
    """
    n_latents = summary.class_counts.shape[1]
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must lie between 1 and the number of latents, {n_latents}; got {k}.")
    return class_scores(summary).argsort(dim=1, descending=True, stable=True)[:, :k]


def concept_latents(summary: LatentSummary, n: int = 60, k: int = 1) -> dict[int, list[int]]:
    """The n classes that have the clearest latent of their own, clearest first, and the k best latents of each.

    No two of the classes share their first latent: it goes to the class that scores highest for it.

    Returns
    -------
    dict of int to list of int
        Class -> latents, best first.
    """
    score, ranked = class_scores(summary), rank_latents(summary, k)
    best = score.gather(1, ranked[:, :1])[:, 0]
    chosen: dict[int, list[int]] = {}
    taken: set[int] = set()
    for label in best.argsort(dim=0, descending=True, stable=True).tolist():
        first = int(ranked[label, 0])
        if len(chosen) < n and first not in taken and best[label] > 0:
            taken.add(first)
            chosen[label] = ranked[label].tolist()
    return chosen


@torch.no_grad()
def specificity(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    latents: Mapping[int, int | Sequence[int]],
    layer: int = -2,
    *,
    ks: Sequence[int] | None = None,
    head: Tensor | None = None,
    n_images: int = 12,
    n_controls: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Turn each class's own latents off in images of that class: does its logit fall, and do the others stay?

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset : ImageData or OpenMojiData
        Images that the choice of latents has not seen.
    latents : mapping of int to int, or to a sequence of int
        Class -> its latent, or its latents, the same number for each (see :func:`concept_latents`); turned off together.
    layer : int
    ks : sequence of int, optional
        How many of each class's latents are turned off: the first k of them; by default all.
    head : Tensor [C, d_embed], optional
        By default from the data set's class names and templates.
    n_images : int
        Images a class; fewer where the data set has fewer.
    n_controls : int
        Draws of as many other latents, each about as active in the same image as the one it stands for; their effects are averaged.
    batch_size : int
    seed : int
    progress : bool

    Returns
    -------
    DataFrame
        Two rows an image and k, ``kind`` "own" and "control": class, index, k, activation (of the latents that were turned off, summed over
        tokens), ``own`` (change of the class's logit), ``others`` (mean change of the other logits). Where a class's latents are silent
        in an image, both rows hold zeros.

    Raises
    ------
    ValueError
        For a class or latent that doesn't exist, or classes without images.
    """
    head, latents = _prepare(clip, sae, dataset, latents, layer, head)
    decoder = decoder_of(sae).rows
    longest = len(next(iter(latents.values())))
    if ks is not None and not all(1 <= k <= longest for k in ks):
        raise ValueError(f"ks must lie between 1 and the number of latents given for each class, {longest}; got {list(ks)}.")
    rows: list = []

    def measure(residual: Residual, labels: Tensor, indices: Tensor, effect: Callable) -> None:
        h = sae.encode(residual.tokens)
        own = torch.tensor([latents[label] for label in labels.tolist()])
        activation = h.sum(1).cpu()
        draws = [matched_latents(own, activation, indices, seed + draw) for draw in range(n_controls)]
        for k in ks or [own.shape[1]]:
            for kind, sets in (("own", [own[:, :k]]), ("control", [draw[:, :k] for draw in draws])):
                mass = torch.stack([(activation.gather(1, chosen.clamp_min(0)) * (chosen >= 0)).sum(1) for chosen in sets]).mean(0)
                change = torch.stack([effect(-contribution(decoder, h, chosen)) for chosen in sets]).mean(0)
                values = zip(labels.tolist(), indices.tolist(), mass.tolist(), change.tolist(), strict=True)
                rows.extend((kind, k, label, index, active, *changes) for label, index, active, changes in values)

    images = _some_images(dataset, sorted(latents), n_images)
    _each_batch(clip, dataset, layer, head, images, batch_size, "specificity" if progress else None, measure)
    return pd.DataFrame(rows, columns=["kind", "k", "class", "index", "activation", "own", "others"])


@torch.no_grad()
def dose_response(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    latents: Mapping[int, int | Sequence[int]],
    doses: Sequence[float] = (0, 0.5, 1, 1.5, 2, 3, 4),
    layer: int = -2,
    *,
    head: Tensor | None = None,
    n_images: int = 12,
    batch_size: int = 36,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Scale each class's own latents in images that show the class, and add them to images that show another class.

    Where another class is shown, the pattern (the latents' activation on every token) of an image that shows the class is transplanted,
    times the dose. So dose 1 is the untouched image in the first case, and dose 0 in the second.

    Parameters
    ----------
    clip, sae, dataset, latents, layer, head, n_images, batch_size, seed, progress
        As for :func:`specificity`; at least two classes.
    doses : sequence of float
        Factors, not negative.
    n_bootstrap : int
        Resamples of the images.

    Returns
    -------
    DataFrame
        A row for each class, kind of scenes ("show it", "show another") and dose: ``own`` (change of the class's logit against
        the untouched image) with ``own_low, own_high``, ``others`` (mean change of the other logits) likewise, n.

    Raises
    ------
    ValueError
        For fewer than two classes or a negative dose; else as :func:`specificity`.
    """
    if len(latents) < 2 or min(doses) < 0:
        raise ValueError(
            f"dose_response needs two classes or more and doses that are not negative, got {len(latents)} classes and doses {list(doses)}."
        )
    head, latents = _prepare(clip, sae, dataset, latents, layer, head)
    decoder = decoder_of(sae).rows
    by_class = [_some_images(dataset, [label], n_images) for label in sorted(latents)]
    order = [images[i] for i in range(n_images) for images in by_class if i < len(images)]  # neighbours differ in class
    rows: list = []

    def measure(residual: Residual, labels: Tensor, indices: Tensor, effect: Callable) -> None:
        h = sae.encode(residual.tokens)
        pattern = contribution(decoder, h, torch.tensor([latents[label] for label in labels.tolist()]))
        # The class of the picture in front of it: this is where the pattern of that picture goes.
        guests = labels.roll(1)
        for dose in doses:
            changes = {
                "show it": (labels, effect((dose - 1) * pattern)),
                "show another": (guests, effect(dose * pattern.roll(1, 0), guests)),
            }
            for scenes, (concerned, change) in changes.items():
                for label, shown, index, values in zip(concerned.tolist(), labels.tolist(), indices.tolist(), change.tolist(), strict=True):
                    if scenes == "show it" or label != shown:
                        rows.append((label, index, scenes, float(dose), *values))

    _each_batch(clip, dataset, layer, head, order, batch_size, "dose and response" if progress else None, measure)
    raw = pd.DataFrame(rows, columns=["class", "image", "scenes", "dose", "own", "others"])
    table = summarize_effects(raw, ["own", "others"], ["class", "scenes", "dose"], "image", n_bootstrap, seed)
    return table.sort_values(["class", "scenes", "dose"], ignore_index=True)


def summarize_effects(
    frame: pd.DataFrame, columns: Sequence[str], by: Sequence[str] = ("kind",), over: str = "index", n_bootstrap: int = 1000, seed: int = 0
):
    """Means with 95 % bootstrap intervals of what :func:`specificity` and :func:`remove_objects` list row by row.

    Parameters
    ----------
    frame : DataFrame
    columns : sequence of str
        What is averaged: ``["own", "others"]``, ``["removed_change", "stays_change"]``, ...
    by : sequence of str
        One row of the result for each combination of these.
    over : str
        What is resampled, after averaging the rows that share it: images or scenes (``index``), or concepts (``class``).
    n_bootstrap : int
    seed : int

    Returns
    -------
    DataFrame
        The columns of ``by``; for each of ``columns`` its mean and ``<column>_low``, ``<column>_high``; n (how many were resampled).
    """
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        means = group.groupby(over)[list(columns)].mean()
        row = dict(zip(by, key, strict=True))
        for name in columns:
            mean, low, high = bootstrap_mean(means[name], n_bootstrap, seed)
            row |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row | {"n": len(means)})
    return pd.DataFrame(rows)


# -- shared -----------------------------------------------------------------------------------------------------------


def _prepare(clip, sae, dataset, latents: Mapping, layer: int, head: Tensor | None) -> tuple[Tensor, dict[int, list[int]]]:
    """The head, and each class's latents as a list; checked."""
    check_models(clip, sae, layer)
    n_classes = len(dataset.class_names)
    lists = {label: [chosen] if isinstance(chosen, int) else list(chosen) for label, chosen in latents.items()}
    wrong = {c: ls for c, ls in lists.items() if not (0 <= c < n_classes and ls and all(0 <= latent < sae.d_sae for latent in ls))}
    if wrong or len({len(ls) for ls in lists.values()}) != 1:
        raise ValueError(
            f"latents must map classes (0 to {n_classes - 1}) to latents (0 to {sae.d_sae - 1}), the same number for each; "
            f"got {wrong or lists}."
        )
    return dataset_head(clip, dataset) if head is None else head, lists


def _some_images(dataset, classes: Sequence[int], n_images: int) -> list[int]:
    labels = np.asarray(dataset.labels)
    chosen = [index for label in classes for index in np.flatnonzero(labels == label)[:n_images].tolist()]
    if not chosen:
        raise ValueError(f"{dataset.spec!r} ({dataset.split}) has no images of the classes {list(classes)[:10]}.")
    return chosen


def _each_batch(clip, dataset, layer, head, indices, batch_size, progress, measure) -> None:
    """Call ``measure(residual, labels, indices, effect)`` on each batch.

    ``effect(delta, classes=labels)`` is what adding ``delta`` to the residual stream changes: [B, 2], the logit of a class of each
    image, and the mean of its other logits.
    """
    tail = None
    for batch in batches(dataset, clip.preprocess, batch_size, indices=indices, progress=progress):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        before = clip.logits(tail(residual), head)

        def effect(delta: Tensor, classes: Tensor = batch.labels, residual=residual, before=before, tail=tail) -> Tensor:
            change = clip.logits(tail(residual._replace(tokens=residual.tokens + delta)), head) - before
            own = change.gather(1, classes.to(change.device)[:, None])[:, 0]
            return torch.stack([own, (change.sum(1) - own) / max(change.shape[1] - 1, 1)], 1).cpu()

        measure(residual, batch.labels, batch.indices, effect)
