"""Edits that are aimed at a place of a scene: a colour swapped on an object, an object removed from one of two.

The embedded world says where each object is, so an edit acts there alone. As in :mod:`patchsae_utils.interventions.effects`, the reconstruction error is
kept, latents are chosen on the train split and measured on test, and each effect stands beside that of other latents which are about as
active in the same place.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, S d_sae, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches, openmoji
from .choosing import matched_latents
from .concept_effects import ConceptLatents, check_truth, concept_head
from .tail import check_models, contribution, dataset_head, decoder_of, network_tail

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

# -- colours ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def swap_colors(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    latents: ConceptLatents,
    layer: int = -2,
    *,
    k: int = 3,
    pairs: Sequence[tuple[str, str]] | None = None,
    doses: Sequence[float] = (1.0,),
    edit_cls: bool = False,
    n_scenes: int = 100,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Exchange the latents of two colours on an object's patches: does CLIP then see it in the other colour?

    In a scene whose main object has one dominant colour, the k latents of that colour are turned off there, and those of another colour
    are set to the level that they usually have where it is seen. The control exchanges as many others: latents that are as active on these
    patches go, and random ones arrive in the same amounts.

    Parameters
    ----------
    clip, sae, layer
        As for :func:`patchsae_utils.interventions.concept_effects.rank_concepts`.
    dataset : OpenMojiData
        Of the test split; scenes with one main object (``openmoji/all`` or a task).
    latents : ConceptLatents
        With kind ``color``, from the train split.
    k : int
        Latents of each colour.
    pairs : sequence of (from, to), optional
        Colours, e.g. ``[("red", "green")]``. By default each scene's colour goes to another one that is drawn.
    doses : sequence of float
        Factors on the level of what arrives.
    edit_cls : bool
        Exchange them on the class token too. It has gathered the colour from the blocks before; patches alone act through the attention
        that is left.
    n_scenes : int
        From the front of the data set.
    batch_size, seed, progress

    Returns
    -------
    DataFrame
        Two rows for each scene and dose, ``kind`` "own" and "control": index, source, target (colours), dose, ``saw_source`` (before the
        edit the source's prompts fit best among all colours'), ``sees_target`` (after it the target's do), ``source_change,
        target_change`` (of the probabilities among colours), ``object_change`` (of the logit of the object's class).

    Raises
    ------
    ValueError
        If the data set has no ground truth, colours have no latents, or there are too few scenes.
    """
    check_models(clip, sae, layer)
    check_truth(dataset)
    names = [name for name in openmoji.COLORS if f"color:{name}" in latents.concepts]
    rows_of_color = {name: latents.concepts.index(f"color:{name}") for name in names}
    if len(names) < 2 or not 1 <= k <= latents.latents.shape[1]:
        raise ValueError(
            f"swap_colors needs two colours with k={k} latents each: latents=rank_concepts(..., kinds=['color'], k={k}) or more."
        )
    scenes = color_swap_scenes(dataset, n_scenes, pairs, names, seed)
    colors, objects = concept_head(clip, [f"color:{name}" for name in names]), dataset_head(clip, dataset)
    decoder, tail, found = decoder_of(sae).rows, None, []
    table = torch.stack([latents.latents[rows_of_color[name], :k] for name in names])
    levels, cls_levels = (torch.stack([part[rows_of_color[name], :k] for name in names]) for part in (latents.levels, latents.cls_levels))
    taken = set(table.flatten().tolist())
    spare = np.array([latent for latent in range(sae.d_sae) if latent not in taken])
    for batch in batches(dataset, clip.preprocess, batch_size, indices=list(scenes), progress="colours" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        h = sae.encode(residual.tokens)
        features = tail(residual)
        before, before_objects = clip.logits(features, colors), clip.logits(features, objects)
        indices = batch.indices.tolist()
        source, target = (torch.tensor([names.index(scenes[i][side]) for i in indices]) for side in range(2))
        grids = torch.stack([object_patches(dataset.truth(i), -1) for i in indices])
        tokens = torch.cat([torch.full((len(grids), 1), edit_cls), grids], 1).to(h)
        local = h * tokens[..., None]
        leaving, arriving = table[source], table[target]
        amounts = torch.cat([cls_levels[target][:, None], levels[target][:, None].expand(-1, grids.shape[1], -1)], 1).to(h)
        amounts = amounts * tokens[..., None]
        others = matched_latents(leaving, local.sum(1).cpu(), batch.indices, seed)
        random = torch.stack([torch.from_numpy(np.random.default_rng([seed, i]).choice(spare, k, replace=False)) for i in indices])
        for kind, (out, into) in {"own": (leaving, arriving), "control": (others, random)}.items():
            gone = contribution(decoder, local, out) + contribution(decoder, local, into)
            for dose in doses:
                edited = residual.tokens - gone + dose * (amounts @ decoder[into])
                features = tail(residual._replace(tokens=edited))
                after, after_objects = clip.logits(features, colors), clip.logits(features, objects)
                for i, index in enumerate(indices):
                    s, t, label = int(source[i]), int(target[i]), int(batch.labels[i])
                    probability = after[i].softmax(0) - before[i].softmax(0)
                    found.append(
                        {
                            "kind": kind,
                            "dose": float(dose),
                            "index": index,
                            "source": names[s],
                            "target": names[t],
                            "saw_source": int(before[i].argmax()) == s,
                            "sees_target": int(after[i].argmax()) == t,
                            "source_change": float(probability[s]),
                            "target_change": float(probability[t]),
                            "object_change": float(after_objects[i, label] - before_objects[i, label]),
                        }
                    )
    return pd.DataFrame(found)


def color_swap_scenes(
    dataset,
    n: int,
    pairs: Sequence[tuple[str, str]] | None = None,
    names: Sequence[str] = openmoji.COLORS,
    seed: int = 0,
    share: float = 0.6,
) -> dict[int, tuple[str, str]]:
    """Scenes whose main object is mostly of one colour, and the (source, target) colours of each.

    Parameters
    ----------
    dataset : OpenMojiData
    n : int
        Scenes, from the front of the data set.
    pairs : sequence of (from, to), optional
        Only scenes of these source colours; by default the target is drawn among the other colours.
    names : sequence of str
        Colours that may be source or target.
    seed : int
    share : float
        Of the coloured pixels on the object's patches.

    Raises
    ------
    ValueError
        For an unknown colour, or if there are fewer such scenes.
    """
    check_truth(dataset)
    unknown = [name for pair in pairs or () for name in pair if name not in names]
    if unknown or any(a == b for a, b in pairs or ()):
        raise ValueError(f"pairs must name two different colours each, among {', '.join(names)}; got {list(pairs or ())}.")
    found: dict[int, tuple[str, str]] = {}
    for index in range(len(dataset)):
        if len(found) == n:
            break
        truth, rng = dataset.truth(index), np.random.default_rng([seed, index])
        grid = object_patches(truth, -1).numpy().reshape(truth.color_share.shape[1:])
        fill = (truth.color_share * grid).sum((1, 2))
        source = openmoji.COLORS[int(fill.argmax())]
        if fill.max() < share * fill.sum() or fill.max() < 4 or source not in names:
            continue
        targets = [b for a, b in pairs if a == source] if pairs else [name for name in names if name != source]
        if targets:
            found[index] = (source, targets[int(rng.integers(len(targets)))])
    if len(found) < n:
        raise ValueError(
            f"{n} scenes were asked for whose main object has one dominant colour; the {len(dataset)} of {dataset.spec!r} hold {len(found)}. "
            f"Take a larger n_images."
        )
    return found


# -- places -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def remove_objects(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    latents: Tensor,
    layer: int = -2,
    *,
    head: Tensor | None = None,
    n_scenes: int = 60,
    min_patches: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """In scenes of two objects, turn one object's latents off on its own patches: does it go, and does the other stay?

    Parameters
    ----------
    clip, sae, layer, batch_size, seed, progress
        As for :func:`patchsae_utils.interventions.concept_effects.rank_concepts`.
    dataset : OpenMojiData
        ``openmoji/scenes``: the ground truth says where each object is.
    latents : LongTensor [classes of the embedded world, k]
        Each class's latents, from :func:`patchsae_utils.interventions.effects.rank_latents`.
    head : Tensor [C, d_embed], optional
        By default from the data set's class names and templates.
    n_scenes : int
        Scenes, from the front of the data set; both objects of each are removed in turn.
    min_patches : int
        Patches that each object must fill by half at least.

    Returns
    -------
    DataFrame
        Two rows for each scene and object, ``kind`` "own" and "control" (as many other latents that are about as active on
        these patches): index, removed (class), stays (class), ``removed_before, removed_after, stays_before, stays_after`` (probabilities
        among all classes), ``removed_change, stays_change`` (of the logits).

    Raises
    ------
    ValueError
        If the data set has no ground truth, or too few scenes of two objects.
    """
    check_models(clip, sae, layer)
    scenes = two_object_scenes(dataset, n_scenes, min_patches)
    head = dataset_head(clip, dataset) if head is None else head
    tail, rows, decoder = None, [], decoder_of(sae).rows
    for batch in batches(dataset, clip.preprocess, batch_size, indices=scenes, progress="removing objects" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        h = sae.encode(residual.tokens)
        before = clip.logits(tail(residual), head)
        truths = [dataset.truth(index) for index in batch.indices.tolist()]
        for which in range(2):
            pairs = np.array([(t.class_ids[which], t.class_ids[1 - which]) for t in truths])
            masks = torch.stack([object_patches(t, which) for t in truths]).to(h.device)
            local = h[:, 1:] * masks[..., None]
            own = latents[pairs[:, 0]].cpu()
            controls = matched_latents(own, local.sum(1).cpu(), batch.indices, seed)
            for kind, chosen in (("own", own), ("control", controls)):
                edited = residual.tokens.clone()
                edited[:, 1:] -= contribution(decoder, local, chosen)
                after = clip.logits(tail(residual._replace(tokens=edited)), head)
                for i, (removed, stays) in enumerate(pairs.tolist()):
                    values = {"kind": kind, "index": int(batch.indices[i]), "removed": removed, "stays": stays}
                    for name, label in (("removed", removed), ("stays", stays)):
                        values |= {f"{name}_before": float(before[i].softmax(0)[label]), f"{name}_after": float(after[i].softmax(0)[label])}
                        values[f"{name}_change"] = float(after[i, label] - before[i, label])
                    rows.append(values)
    return pd.DataFrame(rows)


def two_object_scenes(dataset, n: int, min_patches: int = 10) -> list[int]:
    """The first n scenes in colour that show exactly two objects, of different classes and each with ``min_patches`` patches or more.

    Raises
    ------
    ValueError
        If the data set has no ground truth, or fewer such scenes.
    """
    check_truth(dataset)
    found: list = []
    for index in range(len(dataset)):
        if len(found) == n:
            break
        scene = dataset.scene(index)
        if scene.domain != "color" or len(scene.placements) != 2 or scene.placements[0].class_id == scene.placements[1].class_id:
            continue
        truth = dataset.truth(index)
        if all(int(object_patches(truth, which).sum()) >= min_patches for which in range(2)):
            found.append(index)
    if len(found) < n:
        raise ValueError(
            f"{n} scenes of two objects were asked for; the {len(dataset)} of {dataset.spec!r} hold {len(found)}. Take a larger n_images."
        )
    return found


def object_patches(truth, which: int, share: float = 0.5) -> Tensor:
    """Patches [P] (bool) that an object of a scene fills by ``share`` or more; ``truth`` is a ``SceneTruth``."""
    return torch.from_numpy(truth.object_share[which].reshape(-1) >= share)
