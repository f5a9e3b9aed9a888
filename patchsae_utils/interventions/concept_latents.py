"""Concepts of the embedded world: what CLIP is asked about them, in texts that name them, and which latents stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import ClipModel
from ..data import openmoji
from ..data.truth import concept_masks
from ..latents.classes import class_scores
from ..sae.model import SparseAutoencoder
from .attribution import latent_shares
from .choosing import SILENT
from .tail import BATCH, read_batches

KINDS = ("object", "category", "color", "background")
N_LATENTS = 10  # of each concept
MIN_PATCHES = 4  # a scene shows a concept that fills so many patches by half
MIN_EVIDENCE = 20  # patches that must show a concept before its latents are believed


def concept_prompts(concept: str) -> list[str]:
    """What CLIP is asked about ``object:dog``, ``category:bird``, ``color:red``, ``background:sand``; the last two beside each category."""
    kind, _, name = concept.partition(":")
    if concept not in openmoji.concept_names() or kind not in KINDS:
        raise ValueError(f"Unknown concept {concept!r}. Valid: '<kind>:<name>' with kind {', '.join(KINDS)}; see openmoji.concept_names().")
    categories = sorted(openmoji.class_table()["category"].unique())
    if kind == "color":
        return [f"a {name} {category}." for category in categories]
    if kind == "background":
        return [f"a {category} {openmoji.BACKGROUNDS[name]}." for category in categories]
    return [template.format(name) for template in openmoji.TEMPLATES]


def concept_head(clip: ClipModel, concepts: Sequence[str]) -> Tensor:
    """One unit vector a concept, [K, d_embed]: the mean of its prompts' unit vectors, normalised again."""
    with torch.no_grad():
        means = [F.normalize(clip.encode_text(concept_prompts(concept)), dim=-1).mean(0) for concept in concepts]
    return F.normalize(torch.stack(means), dim=-1)


class ConceptLatents(NamedTuple):
    """Each "kind:name" [K] and its most characteristic latents [K, k], best first, -1 behind the last of positive score; with their mean
    activation on the patches that show it, at CLS in scenes that show it, both [K, k], and the number of these patches [K]."""

    concepts: tuple[str, ...]
    latents: Tensor
    levels: Tensor
    cls_levels: Tensor
    n_patches: Tensor

    def mapping(self) -> dict[str, list[int]]:
        """Concept -> its latents, for concepts that enough patches show."""
        rows = zip(self.concepts, self.latents.tolist(), self.n_patches.tolist(), strict=True)
        return {concept: latents for concept, latents, n in rows if n >= MIN_EVIDENCE}


@torch.no_grad()
def rank_concepts(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int = -2, *, kinds: Sequence[str] = KINDS, by: str = "activity"
) -> ConceptLatents:
    """Each concept's ten most characteristic latents, by where they are active or by what the concept's score owes to them.

    Parameters
    ----------
    clip, sae, layer
    dataset : OpenMojiData, of the train split
    kinds : sequence of str, among ``object``, ``category``, ``color``, ``background``
    by : {"activity", "attribution"}
        Mean activation on the concept's patches, times its share among the concepts of its kind (``latents.class_scores``); or gradient
        times activation of the margin of the concept's score over the others of its kind, averaged over scenes that show it.
    """
    check_truth(dataset)
    sae.check_model(clip, layer)
    if not set(kinds) <= set(KINDS) or by not in ("activity", "attribution"):
        raise ValueError(f"Unknown kinds={list(kinds)} or by={by!r}. Valid: {', '.join(KINDS)}; activity, attribution.")
    names = openmoji.concept_names()
    kept = [i for i, name in enumerate(names) if name.split(":")[0] in kinds]
    concepts = [names[i] for i in kept]
    peers = same_kind(concepts)
    head = concept_head(clip, concepts) if by == "attribution" else None
    n_patches, n_scenes = torch.zeros(2, len(kept), dtype=torch.long)
    sums, cls_sums, shares = torch.zeros(3, len(kept), sae.d_sae)
    for read in read_batches(clip, dataset, layer, "concepts"):
        h = sae.encode(read.residual.tokens)
        masks = torch.from_numpy(np.stack([concept_masks(dataset, i, clip)[kept] for i in read.indices.tolist()])).flatten(2)
        shown = masks.sum(2) >= MIN_PATCHES
        for grids, many, activation in zip(masks, shown, h.cpu(), strict=True):
            some = grids.any(1)
            sums[some] += grids[some].float() @ activation[1:]
            cls_sums[many] += activation[0]
        n_patches += masks.sum((0, 2))
        n_scenes += shown.sum(0)
        if head is not None:
            image, concept = shown.nonzero(as_tuple=True)
            for i, c in zip(image.split(BATCH), concept.split(BATCH), strict=True):
                shares.index_add_(0, c, latent_shares(clip, sae, read.tail, read.some(i), head, c.to(h.device), peers, h[i]).cpu())
    rate, cls_rate = sums / n_patches.clamp_min(1)[:, None], cls_sums / n_scenes.clamp_min(1)[:, None]
    score = shares / n_scenes.clamp_min(1)[:, None]
    for kind in kinds if head is None else ():
        rows = [i for i, concept in enumerate(concepts) if concept.split(":")[0] == kind]
        score[rows] = class_scores(rate[rows])
    best, latents = (part[:, :N_LATENTS] for part in score.sort(dim=1, descending=True, stable=True))
    levels, cls_levels = (each.gather(1, latents).masked_fill(best <= 0, 0) for each in (rate, cls_rate))
    return ConceptLatents(tuple(concepts), latents.masked_fill(best <= 0, SILENT), levels, cls_levels, n_patches)


def same_kind(concepts: Sequence[str]) -> Tensor:
    """bool [K, K]: the other concepts of a concept's kind."""
    kinds = np.array([concept.split(":")[0] for concept in concepts])
    return torch.from_numpy((kinds[:, None] == kinds) & ~np.eye(len(kinds), dtype=bool))


def check_truth(dataset: Any) -> None:
    """Refuse a data set that is not of the embedded world."""
    if not hasattr(dataset, "class_ids"):
        raise ValueError(f"{dataset.spec!r} has no ground truth of places; use 'openmoji/all', a task, or 'openmoji/scenes'.")
