"""Concepts of every kind: what CLIP is asked about them, which latents stand for them, and what turning those off does.

The embedded world knows what every patch shows: objects, their categories, colours and backgrounds. A concept's score is that of the texts
that name it, so nothing is trained for it. As in :mod:`patchsae_utils.interventions.effects`, the reconstruction error is kept, latents are chosen on the
train split and measured on test, beside other latents that are about as active in the same picture.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, S d_sae, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches, openmoji
from .choosing import matched_latents
from .tail import Active, check_models, contribution, decoder_of, network_tail

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

KINDS = ("object", "category", "color", "background")


# -- concepts, their prompts and their latents ------------------------------------------------------------------------


def concept_prompts(concept: str) -> list[str]:
    """What CLIP is asked about a concept of the embedded world: ``object:dog``, ``category:bird``, ``color:red``, ``background:sand``.

    A colour or background is named together with each category, as the captions of the embedded world do.

    Raises
    ------
    ValueError
        If there is no such concept, or no words for it.
    """
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
    """The latents that are most characteristic of each concept, best first."""

    concepts: tuple[str, ...]
    """[K] "kind:name"."""
    latents: Tensor
    """LongTensor [K, k]"""
    levels: Tensor
    """[K, k] mean activation on the patches that show the concept."""
    cls_levels: Tensor
    """[K, k] mean activation at CLS in scenes that show the concept."""
    n_patches: Tensor
    """[K] patches that show it, in the scenes that were read."""

    def mapping(self, kinds: str | Sequence[str] = KINDS, k: int | None = None, min_patches: int = 20) -> dict[str, list[int]]:
        """Concept -> its k best latents, for concepts of some kinds that at least ``min_patches`` patches show."""
        kinds = [kinds] if isinstance(kinds, str) else kinds
        rows = zip(self.concepts, self.latents[:, :k].tolist(), self.n_patches.tolist(), strict=True)
        return {c: found for c, found, n in rows if c.split(":")[0] in kinds and n >= min_patches}


@torch.no_grad()
def rank_concepts(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    layer: int = -2,
    *,
    kinds: Sequence[str] = KINDS,
    k: int = 10,
    by: str = "activity",
    min_patches: int = 4,
    batch_size: int = 32,
    progress: bool = True,
) -> ConceptLatents:
    """Each concept's most characteristic latents, by where they are active or by what the concept's score owes to them.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset : OpenMojiData
        Of the train split.
    layer : int
    kinds : sequence of str
        Among ``object``, ``category``, ``color``, ``background``.
    k : int
    by : {"activity", "attribution"}
        ``activity``: mean activation on the concept's patches, times its share among the concepts of its kind, which count as equally
        frequent (as :func:`patchsae_utils.interventions.effects.class_scores` does for classes). ``attribution``: gradient times activation of the
        concept's score, less the log of the summed exponentials of the others' of its kind (:mod:`patchsae_utils.interventions.attribution`), averaged
        over scenes that show it; all tokens count.
    min_patches : int
        A scene shows a concept that fills so many patches by half.
    batch_size : int
    progress : bool

    Raises
    ------
    ValueError
        If the data set has no ground truth, a kind or ranking is unknown, or k is outside 1..S.
    """
    check_models(clip, sae, layer)
    check_truth(dataset)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"Unknown kinds={unknown or kinds}. Valid: {', '.join(KINDS)}.")
    if by not in ("activity", "attribution"):
        raise ValueError(f"Unknown by={by!r}. Valid: activity, attribution.")
    if not 1 <= k <= sae.d_sae:
        raise ValueError(f"k must lie between 1 and the number of latents, {sae.d_sae}; got {k}.")
    names = openmoji.concept_names()
    kept = [i for i, name in enumerate(names) if name.split(":")[0] in kinds]
    concepts = [names[i] for i in kept]
    peers = _peers(concepts)
    head = concept_head(clip, concepts) if by == "attribution" else None
    n_patches, n_scenes = torch.zeros(len(kept), dtype=torch.long), torch.zeros(len(kept), dtype=torch.long)
    sums, cls_sums, shares = (torch.zeros(len(kept), sae.d_sae) for _ in range(3))
    decoder, tail = decoder_of(sae).rows, None
    for batch in batches(dataset, clip.preprocess, batch_size, progress="concepts" if progress else None):
        residual = clip.run_to(batch.images, layer)
        h = sae.encode(residual.tokens)
        masks = np.stack([openmoji.concept_masks(dataset.truth(i))[kept].reshape(len(kept), -1) for i in batch.indices.tolist()])
        masks = torch.from_numpy(masks)
        for grids, activation in zip(masks, h.cpu(), strict=True):
            some, many = grids.any(1), grids.sum(1) >= min_patches
            sums[some] += grids[some].float() @ activation[1:]
            cls_sums[many] += activation[0]
            n_patches += grids.sum(1)
            n_scenes += many
        if head is not None:
            tail = tail or network_tail(clip, layer, residual)
            image, concept = (masks.sum(2) >= min_patches).nonzero(as_tuple=True)
            for i, c in zip(image.split(batch_size), concept.split(batch_size), strict=True):
                part = residual._replace(tokens=residual.tokens[i], extra=None if residual.extra is None else residual.extra[i])
                gradient = _margin_gradient(clip, tail, part, head, c.to(h.device), peers.to(h.device))
                active = Active.of(h[i])
                share = torch.zeros(len(i), sae.d_sae, device=h.device)
                share.view(-1).index_add_(0, active.image * sae.d_sae + active.latent, active.project(gradient, decoder))
                shares.index_add_(0, c, share.cpu())
    rate, cls_rate = sums / n_patches.clamp_min(1)[:, None], cls_sums / n_scenes.clamp_min(1)[:, None]
    score = shares / n_scenes.clamp_min(1)[:, None]
    if head is None:
        of_kind = (peers | torch.eye(len(kept), dtype=torch.bool)).float() @ rate
        score = rate**2 / of_kind.clamp_min(torch.finfo(torch.float32).tiny)
    latents = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ConceptLatents(tuple(concepts), latents, rate.gather(1, latents), cls_rate.gather(1, latents), n_patches)


@torch.no_grad()
def concept_specificity(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    latents: Mapping[str, int | Sequence[int]],
    layer: int = -2,
    *,
    ks: Sequence[int] | None = None,
    n_images: int = 8,
    n_controls: int = 3,
    min_patches: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Turn each concept's latents off in scenes that show it: does the text that names it fit less, and do the others stay?

    Objects, categories, colours and backgrounds alike; a concept's score is 'logit scale times cosine' with its own prompts
    (:func:`concept_prompts`), so no classifier is trained for it.

    Parameters
    ----------
    clip, sae, layer
        As for :func:`rank_concepts`.
    dataset : OpenMojiData
        Of the test split.
    latents : mapping of str to int, or to a sequence of int
        Concept -> its latents, the same number for each (``ConceptLatents.mapping``); turned off together, on all tokens.
    ks : sequence of int, optional
        How many of them are turned off: the first k; by default all.
    n_images : int
        Scenes a concept, from the front of the data set; fewer where it has fewer.
    n_controls : int
        Draws of as many other latents, each about as active in the same scene as the one it stands for; their effects are averaged.
    min_patches : int
        Patches that must show the concept.
    batch_size, seed, progress

    Returns
    -------
    DataFrame
        Two rows for each concept, scene and k, ``kind`` "own" and "control": concept, concept_kind, index, k, activation (of what was
        turned off, summed over tokens), ``own`` (change of the concept's score), ``others`` (mean change of the other given concepts of
        its kind), ``gap`` (own - others). Where a concept's latents are silent in a scene, both rows hold zeros.

    Raises
    ------
    ValueError
        If the data set has no ground truth, a concept or latent doesn't exist, or no scene shows any of the concepts.
    """
    check_models(clip, sae, layer)
    check_truth(dataset)
    lists = _checked_latents(latents, sae.d_sae)
    longest = len(next(iter(lists.values())))
    if ks is not None and not all(1 <= k <= longest for k in ks):
        raise ValueError(f"ks must lie between 1 and the number of latents given for each concept, {longest}; got {list(ks)}.")
    head = concept_head(clip, list(lists))
    concepts, own = list(lists), torch.tensor(list(lists.values()))
    peers = _peers(concepts).to(head)
    scenes = _scenes_of(dataset, concepts, n_images, min_patches)
    found: list = []
    rows_of, tail = decoder_of(sae).rows, None
    for batch in batches(dataset, clip.preprocess, batch_size, indices=sorted(scenes), progress="concepts" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        h = sae.encode(residual.tokens)
        activation, before = h.sum(1).cpu(), clip.logits(tail(residual), head)
        pairs = [(i, concept) for i, index in enumerate(batch.indices.tolist()) for concept in scenes[index]]
        for start in range(0, len(pairs), batch_size):
            image, concept = (torch.tensor(part) for part in zip(*pairs[start : start + batch_size], strict=True))
            part = residual._replace(tokens=residual.tokens[image], extra=None if residual.extra is None else residual.extra[image])
            mine, weights = own[concept], activation[image]
            places = batch.indices[image] * len(concepts) + concept
            draws = [matched_latents(mine, weights, places, seed + draw) for draw in range(n_controls)]

            def effect(chosen, part=part, image=image, concept=concept, h=h, before=before, tail=tail):
                tokens = part.tokens - contribution(rows_of, h[image], chosen)
                change = clip.logits(tail(part._replace(tokens=tokens)), head) - before[image]
                others = (change * peers[concept]).sum(1) / peers[concept].sum(1).clamp_min(1)
                return torch.stack([change.gather(1, concept.to(change.device)[:, None])[:, 0], others], 1).cpu()

            for k in ks or [longest]:
                for kind, sets in (("own", [mine[:, :k]]), ("control", [draw[:, :k] for draw in draws])):
                    mass = torch.stack([(weights.gather(1, s.clamp_min(0)) * (s >= 0)).sum(1) for s in sets]).mean(0)
                    change = torch.stack([effect(s) for s in sets]).mean(0)
                    values = zip(concept.tolist(), batch.indices[image].tolist(), mass.tolist(), change.tolist(), strict=True)
                    found.extend(
                        (kind, k, concepts[c], concepts[c].split(":")[0], index, active, *both) for c, index, active, both in values
                    )
    frame = pd.DataFrame(found, columns=["kind", "k", "concept", "concept_kind", "index", "activation", "own", "others"])
    return frame.assign(gap=frame["own"] - frame["others"])


# -- shared -----------------------------------------------------------------------------------------------------------


def check_truth(dataset) -> None:
    """Refuse a data set that does not know what its patches show."""
    if not hasattr(dataset, "truth"):
        raise ValueError(f"{dataset.spec!r} has no ground truth of places; use 'openmoji/all', a task, or 'openmoji/scenes'.")


def _peers(concepts: Sequence[str]) -> Tensor:
    """bool [K, K]: the other concepts of a concept's kind."""
    kinds = np.array([concept.split(":")[0] for concept in concepts])
    return torch.from_numpy((kinds[:, None] == kinds) & ~np.eye(len(kinds), dtype=bool))


def _margin_gradient(clip, tail, residual, head: Tensor, concepts: Tensor, peers: Tensor) -> Tensor:
    """Gradient in the residual stream of each image's concept score, less the log-sum-exp of the others of its kind: [B, T, D]."""
    with torch.enable_grad():
        tokens = residual.tokens.detach().clone().requires_grad_(True)
        logits = clip.logits(tail(residual._replace(tokens=tokens)), head)
        others = logits.masked_fill(~peers[concepts], -torch.inf).logsumexp(1)
        margin = logits.gather(1, concepts[:, None])[:, 0] - others.clamp_min(-1e4)  # a concept may be the only one of its kind
        return torch.autograd.grad(margin.sum(), tokens)[0]


def _checked_latents(latents: Mapping, d_sae: int) -> dict[str, list[int]]:
    lists = {c: [int(found)] if isinstance(found, int | np.integer) else [int(x) for x in found] for c, found in latents.items()}
    wrong = {c: found for c, found in lists.items() if not (found and all(0 <= latent < d_sae for latent in found))}
    if wrong or len({len(found) for found in lists.values()}) != 1:
        raise ValueError(f"latents must map concepts to latents (0 to {d_sae - 1}), the same number for each; got {wrong or lists}.")
    return lists


def _scenes_of(dataset, concepts: Sequence[str], n_images: int, min_patches: int) -> dict[int, list[int]]:
    """Image -> the concepts (places in the list) that are measured in it: each in the first ``n_images`` that show it."""
    names = openmoji.concept_names()
    rows, left = [names.index(concept) for concept in concepts], np.full(len(concepts), n_images)
    scenes: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        if not left.any():
            break
        shown = openmoji.concept_masks(dataset.truth(index))[rows].sum((1, 2)) >= min_patches
        chosen = np.flatnonzero(shown & (left > 0))
        left[chosen] -= 1
        if len(chosen):
            scenes[index] = chosen.tolist()
    if not scenes:
        raise ValueError(
            f"{dataset.spec!r} ({dataset.split}) shows none of the concepts {list(concepts)[:5]} on {min_patches} patches or more."
        )
    return scenes
