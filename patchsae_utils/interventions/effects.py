"""What single latents do to scores: of concepts, over doses, of swapped colors, of removed objects.

Every experiment keeps the SAE's error and sets a control beside the latents: others that are about as active in the same place. Latents are
chosen on the train split, effects are measured on test. Another model's SAE, data without ground truth and too few scenes raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..data import openmoji
from ..data.truth import patch_shares
from ..latents.classes import class_scores
from ..latents.summary import LatentSummary
from ..run.intervals import Interval, mean_interval
from ..sae.dictionary import numbers_of
from ..sae.model import SparseAutoencoder
from .choosing import SILENT, matched_latents
from .concept_latents import MIN_PATCHES, ConceptLatents, check_truth, concept_head, same_kind
from .tail import BATCH, contribution, dataset_head, read_batches

DOSES = (0, 0.5, 1, 1.5, 2, 3, 4)
DOSE_BATCH = 36  # images at a time where each receives the pattern of the one in front of it
N_CONTROLS = 3  # draws of as many other latents; their effects are averaged
MIN_OBJECT = 10  # patches that an object fills by half, so that it is worth removing
MAIN_COLOR = 0.6  # share of the colored pixels on an object's patches that makes a color its own


def summarize_effects(frame: pd.DataFrame, columns: Sequence[str], by: Sequence[str] = ("kind",), over: str = "index") -> pd.DataFrame:
    """Means with 95% bootstrap intervals of what the experiments list row by row, and n (how many were resampled).

    Parameters
    ----------
    frame : DataFrame
    columns : sequence of str, of what is averaged; the result has each, ``<column>_low`` and ``<column>_high``
    by : sequence of str; one row of the result for each combination of these
    over : str; resampled, after averaging the rows that share it: ``index`` (images) or ``concept``; NaN (no control) is left out
    """
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        means = group.groupby(over)[list(columns)].mean().dropna()
        none = np.full(len(columns), np.nan)
        found = mean_interval(means.to_numpy(float).T, over) if len(means) else Interval(none, none, none, over)
        row = dict(zip(by, key, strict=True))
        for name, mean, low, high in zip(columns, found.value, found.low, found.high, strict=True):
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(row | {"n": len(means)})
    return pd.DataFrame(rows)


def quote(table: pd.DataFrame, column: str = "accuracy", style: str = ".1%", **where: Any) -> str:
    """A number of a table with its interval, as text: "12.3% [11.0%, 13.6%]", of the first row in which columns have the values given.

    Parameters
    ----------
    table : DataFrame of ``sweep_masks`` or :func:`summarize_effects`
    column, style : str; which number, and its format
    **where
        Column = value.
    """
    rows = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    if rows.empty:
        raise ValueError(f"No row of the table has {where}.")
    ends = ("low", "high") if column == "accuracy" else (f"{column}_low", f"{column}_high")
    value, low, high = rows.iloc[0][[column, *ends]]
    return "not measured" if np.isnan(value) else f"{value:{style}} [{low:{style}}, {high:{style}}]"


@torch.no_grad()
def concept_specificity(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, latents: Mapping[str, Sequence[int]], layer: int = -2, *, n_images: int = 8
) -> pd.DataFrame:
    """Turn each concept's latents off in scenes that show it: does the text that names it fit less, and do the others stay?

    Parameters
    ----------
    clip, sae, layer
    dataset : OpenMojiData, of the test split
    latents : mapping of str to sequence of int
        Concept -> its latents, the same number for each (``rank_concepts(...).mapping()``); turned off together, on all tokens.
    n_images : int, of each concept, from the front; fewer where there are fewer

    Returns two rows for each concept and scene, kind "own" and "control" (as many others): concept, concept_kind, index, own (change of the
    concept's score: logit scale times cosine), others (mean change of the given others of its kind).
    """
    check_truth(dataset)
    sae.check_model(clip, layer)
    if len({len(each) for each in latents.values()}) != 1:
        raise ValueError(f"latents must map concepts to latents, the same number for each; got {latents}.")
    concepts, own = list(latents), torch.tensor(list(latents.values()))
    numbers_of(sae, own[own != SILENT])  # behind a concept's last one there may be none
    head, peers, scenes = concept_head(clip, concepts), same_kind(concepts), _scenes_of(dataset, concepts, n_images)
    parts = []
    for read in read_batches(clip, dataset, layer, "concepts", indices=list(scenes)):
        z = read.residual.tokens
        h, before = sae.encode(z), clip.logits(read.features(z), head)
        activation = h.sum(1)
        pairs = torch.tensor([(i, concept) for i, index in enumerate(read.indices.tolist()) for concept in scenes[index]])
        for image, concept in (part.unbind(1) for part in pairs.split(BATCH)):
            mine, index = own[concept], read.indices[image]
            controls = [matched_latents(mine, activation[image], index * len(concepts) + concept, draw) for draw in range(N_CONTROLS)]
            names = [concepts[c] for c in concept.tolist()]
            for kind, sets in (("own", [mine]), ("control", controls)):
                edited = [z[image] - contribution(sae.W_dec, h[image], chosen) for chosen in sets]
                change = torch.stack([clip.logits(read.features(tokens, image), head) - before[image] for tokens in edited]).mean(0).cpu()
                others = (change * peers[concept]).sum(1) / peers[concept].sum(1).clamp_min(1)
                part = {"kind": kind, "concept": names, "concept_kind": [name.split(":")[0] for name in names], "index": index}
                parts.append(part | {"own": _of(change, concept), "others": others})
    return _table(parts)


def _scenes_of(dataset: Any, concepts: Sequence[str], n_images: int) -> dict[int, list[int]]:
    """Image -> the concepts (places in the list) that are measured in it: each in the first ``n_images`` that show it."""
    names = openmoji.concept_names()
    rows, left = [names.index(concept) for concept in concepts], np.full(len(concepts), n_images)
    scenes = {}
    for index in range(len(dataset)):
        shown = openmoji.concept_masks(dataset.truth(index))[rows].sum((1, 2)) >= MIN_PATCHES
        if chosen := np.flatnonzero(shown & (left > 0)).tolist():
            scenes[index] = chosen
            left[chosen] -= 1
        if not left.any():
            break
    if not scenes:
        raise ValueError(f"{dataset.spec!r} ({dataset.split}) shows none of {list(concepts)[:5]} on {MIN_PATCHES} patches or more.")
    return scenes


def clearest_latents(summary: LatentSummary, n: int) -> dict[int, int]:
    """The n classes with the clearest latent of their own (one that is several classes' goes to the highest score): class -> latent.

    Parameters
    ----------
    summary : LatentSummary, of the train split
    n : int
    """
    best = class_scores(summary).max(1)
    chosen: dict[int, int] = {}
    for label in best.values.argsort(descending=True, stable=True).tolist():
        latent = int(best.indices[label])
        if len(chosen) < n and latent not in chosen.values() and best.values[label] > 0:
            chosen[label] = latent
    return chosen


@torch.no_grad()
def one_latent_off(clip: ClipModel, sae: SparseAutoencoder, dataset: Any, summary: LatentSummary, layer: int = -2) -> pd.DataFrame:
    """Turn the latent most characteristic of each class off in its images: how much does a single latent carry (FAULTS D22)?

    Parameters
    ----------
    clip, sae, layer
    dataset : ImageData or OpenMojiData, not seen by the choice of latents
    summary : LatentSummary, of the train split and the same classes

    Returns two rows for each image, kind "own" and "control": index, class, latent, change (of the probability of its class), flip (whether
    another class is predicted than before).
    """
    sae.check_model(clip, layer)
    summary.check(sae)
    if list(summary.class_names) != list(dataset.class_names):
        what = f"{len(dataset.class_names)} classes of {dataset.spec!r} (its train split)"
        raise ValueError(f"The summary must be of the {what}, got {len(summary.class_names)}.")
    best, head, parts = class_scores(summary).max(1), dataset_head(clip, dataset), []
    chosen = best.indices.masked_fill(best.values <= 0, SILENT)
    for read in read_batches(clip, dataset, layer, "one latent off"):
        z, labels = read.residual.tokens, read.labels.cpu()
        h, before = sae.encode(z), clip.logits(read.features(z), head).cpu()
        own = chosen[labels][:, None]
        for kind, latent in (("own", own), ("control", matched_latents(own, h.sum(1), read.indices))):
            after = clip.logits(read.features(z - contribution(sae.W_dec, h, latent)), head).cpu()
            flip = (after.argmax(1) != before.argmax(1)).double().masked_fill(after.isnan().any(1), torch.nan)
            part = {"kind": kind, "index": read.indices, "class": labels, "latent": latent[:, 0], "flip": flip}
            parts.append(part | {"change": _of(after.softmax(1) - before.softmax(1), labels)})
    return _table(parts)


@torch.no_grad()
def dose_response(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, latents: Mapping[int, int], layer: int = -2, *, head: Tensor, n_images: int = 12
) -> pd.DataFrame:
    """Scale each class's own latent in images of the class (dose 1: untouched), and add it to images of another (dose 0: untouched).

    What is added is the latent's activation on every token of an image that shows the class, times the dose.

    Parameters
    ----------
    clip, sae, layer
    dataset : ImageData or OpenMojiData, not seen by the choice of latents
    latents : mapping of int to int
        Class -> its latent (:func:`clearest_latents`), of at least two classes.
    head : Tensor [C, d_embed]
    n_images : int, of each class; fewer where the data set has fewer

    Returns class, scenes ("show it", "show another"), dose; own, own_low, own_high (change of the class's logit against the untouched
    image), others, others_low, others_high (mean change of the other logits), n.
    """
    sae.check_model(clip, layer)
    numbers_of(sae, list(latents.values()))
    head, labels = dataset_head(clip, dataset, head), np.asarray(dataset.labels)
    by_class = [np.flatnonzero(labels == label)[:n_images].tolist() for label in sorted(latents)]
    if len(latents) < 2 or not all(by_class):
        raise ValueError(f"dose_response needs two classes or more with images in {dataset.spec!r} ({dataset.split}); got {dict(latents)}.")
    order = [images[i] for i in range(n_images) for images in by_class if i < len(images)]  # neighbours differ in class
    parts = []
    for read in read_batches(clip, dataset, layer, "dose and response", batch_size=DOSE_BATCH, indices=order):
        z, shown = read.residual.tokens, read.labels
        before = clip.logits(read.features(z), head)
        pattern = contribution(sae.W_dec, sae.encode(z), torch.tensor([[latents[label]] for label in shown.tolist()]))
        guests = shown.roll(1)  # the class of the picture in front: its pattern arrives here
        cases = {"show it": (shown, pattern, shown >= 0), "show another": (guests, pattern.roll(1, 0), guests != shown)}
        for dose in DOSES:
            for scenes, (label, added, told) in cases.items():
                tokens = z + (dose - 1 if scenes == "show it" else dose) * added
                change = clip.logits(read.features(tokens), head) - before
                own = _of(change, label)
                others = (change.sum(1) - own) / max(len(head) - 1, 1)
                part = {"class": label[told], "index": read.indices[told.cpu()], "own": own[told], "others": others[told]}
                parts.append(part | {"scenes": scenes, "dose": float(dose)})
    table = summarize_effects(_table(parts), ["own", "others"], ["class", "scenes", "dose"])
    return table.sort_values(["class", "scenes", "dose"], ignore_index=True)


@torch.no_grad()
def swap_colors(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, latents: ConceptLatents, layer: int = -2, *, doses: Sequence[float] = (1.0,),
    edit_cls: bool = False, n_scenes: int = 100,
) -> pd.DataFrame:  # fmt: skip
    """Exchange the latents of two colors on an object's patches: does CLIP then see it in the other color?

    The latents of the main object's dominant color are turned off there, and those of another color, which is drawn, set to their usual
    level where it is seen. In the control others that are as active on these patches go, and random ones arrive in the same amounts.

    Parameters
    ----------
    clip, sae, layer
    dataset : OpenMojiData, of the test split
        Scenes with one main object (``openmoji/all`` or a task).
    latents : ConceptLatents, with kind ``color``, from the train split
    doses : sequence of float, factors on the level of what arrives
    edit_cls : bool; exchange them on the class token too, which has gathered the color from the blocks before
    n_scenes : int, from the front of the data set

    Returns two rows for each scene and dose, kind "own" and "control": index, source, target (colors), dose, saw_source (before the edit
    the source's prompts fit best), sees_target (1 where after it the target's do), source_change, target_change (of the probabilities among
    colors), object_change (of the logit of the object's class).
    """
    check_truth(dataset)
    sae.check_model(clip, layer)
    names = [name for name in openmoji.COLORS if f"color:{name}" in latents.concepts]
    if len(names) < 2:
        raise ValueError("swap_colors needs the latents of two colors: latents=rank_concepts(..., kinds=['color']).")
    scenes = _first_scenes(dataset, n_scenes, lambda index: _color_swap(dataset, index, names), "whose main object has one dominant color")
    colors, objects = concept_head(clip, [f"color:{name}" for name in names]), dataset_head(clip, dataset)
    rows = [latents.concepts.index(f"color:{name}") for name in names]
    table, levels, cls_levels = (part[rows] for part in (latents.latents, latents.levels, latents.cls_levels))
    spare = np.setdiff1d(np.arange(sae.d_sae), table)
    if len(spare) < table.shape[1]:
        raise ValueError(f"Controls are {table.shape[1]} latents of no color: of {sae.d_sae} there are {len(spare)}. Train a larger SAE.")
    parts = []
    for read in read_batches(clip, dataset, layer, "colors", indices=list(scenes)):
        indices, z = read.indices.tolist(), read.residual.tokens
        h, features = sae.encode(z), read.features(z)
        before, before_objects = clip.logits(features, colors).cpu(), clip.logits(features, objects)
        source, target = torch.tensor([[names.index(color) for color in scenes[i]] for i in indices]).T
        grids = torch.stack([object_patches(dataset.truth(i), -1, clip) for i in indices])
        here = torch.cat([torch.full((len(grids), 1), edit_cls), grids], 1).to(h)[..., None]
        local = h * here
        amounts = torch.cat([cls_levels[target][:, None], levels[target][:, None].expand(-1, grids.shape[1], -1)], 1).to(h) * here
        others = matched_latents(table[source], local.sum(1), read.indices)
        drawn = [np.random.default_rng([0, i]).choice(spare, table.shape[1], replace=False) for i in indices]
        for kind, out, into in (("own", table[source], table[target]), ("control", others, torch.from_numpy(np.stack(drawn)))):
            gone = contribution(sae.W_dec, local, out) + contribution(sae.W_dec, local, into)
            for dose in doses:
                features = read.features(z - gone + dose * (amounts @ sae.W_dec[into]))
                after = clip.logits(features, colors).cpu()
                change = after.softmax(1) - before.softmax(1)
                part = {"kind": kind, "dose": float(dose), "index": read.indices, "saw_source": before.argmax(1) == source}
                part |= {side: [scenes[i][which] for i in indices] for which, side in enumerate(("source", "target"))}
                part["sees_target"] = (after.argmax(1) == target).double().masked_fill(after.isnan().any(1), torch.nan)
                part |= {"source_change": _of(change, source), "target_change": _of(change, target)}
                parts.append(part | {"object_change": _of(clip.logits(features, objects) - before_objects, read.labels)})
    return _table(parts)


def _color_swap(dataset: Any, index: int, names: Sequence[str]) -> tuple[str, str] | None:
    """The (source, target) colors of a scene, if its main object is mostly of one color."""
    truth = dataset.truth(index)
    grid = object_patches(truth, -1).numpy().reshape(truth.color_share.shape[1:])
    fill = (truth.color_share * grid).sum((1, 2))
    source = openmoji.COLORS[int(fill.argmax())]
    if fill.max() < MAIN_COLOR * fill.sum() or fill.max() < MIN_PATCHES or source not in names:
        return None
    targets = [name for name in names if name != source]
    return source, targets[int(np.random.default_rng([0, index]).integers(len(targets)))]


@torch.no_grad()
def remove_objects(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, latents: Sequence[Sequence[int]], layer: int = -2, *, n_scenes: int = 60
) -> pd.DataFrame:
    """In scenes of two objects, turn one object's latents off on its own patches: does it go, and does the other stay?

    Parameters
    ----------
    clip, sae, layer
    dataset : OpenMojiData
        ``openmoji/scenes``: the ground truth says where each object is.
    latents : sequence of C sequences of int
        Latents of each class of the embedded world (:func:`patchsae_utils.latents.top_latents`).
    n_scenes : int, from the front of the data set; both objects of each are removed in turn

    Returns two rows for each scene and object, kind "own" and "control": index, removed (class), stays (class), removed_before,
    removed_after, stays_before, stays_after (probabilities among all classes), removed_change, stays_change (of the logits).
    """
    check_truth(dataset)
    sae.check_model(clip, layer)
    numbers_of(sae, [latent for each in latents for latent in each])
    if len(latents) != len(dataset.class_names):
        raise ValueError(f"Latents of each of the {len(dataset.class_names)} classes of {dataset.spec!r} are needed, got {len(latents)}.")
    scenes = _first_scenes(dataset, n_scenes, lambda index: _two_objects(dataset, index), "of two objects")
    head, longest = dataset_head(clip, dataset), max(map(len, latents))
    table = torch.tensor([[*each, *[SILENT] * (longest - len(each))] for each in latents])
    parts = []
    for read in read_batches(clip, dataset, layer, "removing objects", indices=list(scenes)):
        z = read.residual.tokens
        h, before = sae.encode(z), clip.logits(read.features(z), head).cpu()
        truths = [dataset.truth(index) for index in read.indices.tolist()]
        for which in range(2):
            removed, stays = (torch.tensor([truth.class_ids[i] for truth in truths]) for i in (which, 1 - which))
            masks = torch.stack([object_patches(truth, which, clip) for truth in truths])
            local = h * torch.cat([torch.zeros(len(masks), 1), masks], 1).to(h)[..., None]
            for kind, chosen in (("own", table[removed]), ("control", matched_latents(table[removed], local.sum(1), read.indices))):
                after = clip.logits(read.features(z - contribution(sae.W_dec, local, chosen)), head).cpu()
                part = {"kind": kind, "index": read.indices, "removed": removed, "stays": stays}
                for name, label in (("removed", removed), ("stays", stays)):
                    part |= {f"{name}_before": _of(before.softmax(1), label), f"{name}_after": _of(after.softmax(1), label)}
                    part[f"{name}_change"] = _of(after - before, label)
                parts.append(part)
    return _table(parts)


def _two_objects(dataset: Any, index: int) -> bool | None:
    """True if a scene in color shows exactly two objects, of different classes and each large enough; else None."""
    scene = dataset.scene(index)
    if scene.domain != "color" or len(scene.placements) != 2 or scene.placements[0].class_id == scene.placements[1].class_id:
        return None
    truth = dataset.truth(index)
    return all(int(object_patches(truth, which).sum()) >= MIN_OBJECT for which in range(2)) or None


def object_patches(truth: Any, which: int, clip: ClipModel | None = None) -> Tensor:
    """Patches [P] (bool), of a model or of the scene's own, that an object of a scene fills by half or more; ``truth`` is a ``SceneTruth``."""
    shares = truth.object_share[which][None]
    return torch.from_numpy((shares if clip is None else patch_shares(shares, clip)).reshape(-1) >= 0.5)


def _first_scenes(dataset: Any, n: int, told: Callable[[int], Any], what: str) -> dict[int, Any]:
    """The first n scenes of which ``told`` tells something, and what it tells."""
    found: dict[int, Any] = {}
    for index in range(len(dataset)):
        if len(found) < n and (value := told(index)) is not None:
            found[index] = value
    if len(found) < n:
        raise ValueError(f"{n} scenes {what} were asked for; {len(dataset)} of {dataset.spec!r} hold {len(found)}. Take a larger n_images.")
    return found


def _of(values: Tensor, columns: Tensor) -> Tensor:
    """One column of each row: [B] from [B, K]."""
    return values.gather(1, columns[:, None])[:, 0]


def _table(parts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Parts of columns (tensors, lists, or one value for all rows), one below the other."""
    plain = ({name: each.tolist() if isinstance(each, Tensor) else each for name, each in part.items()} for part in parts)
    return pd.concat(map(pd.DataFrame, plain), ignore_index=True)
