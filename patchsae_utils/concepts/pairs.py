"""Selectivity by pairs: two scenes differ in one thing; the latent that is matched to it must move, the right way, and others must not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data import openmoji
from ..data.openmoji import BACKGROUND_KINDS, COLORS, IMAGE_SIZE, Scene
from ..run.intervals import mean_interval
from ..sae.dictionary import select_latents
from ..sae.model import SparseAutoencoder
from .report import ComparisonReport

ATTRIBUTES = {"object": "object", "color": "color", "background": "background", "place": "object"}  # what differs: the kind that changes
MIN_PATCHES = 2  # on which a concept appears, and disappears
_BATCH = 32  # pairs


class ScenePair(NamedTuple):
    """Two scenes that differ in one attribute, and where that shows."""

    before: Scene
    after: Scene
    changes: tuple[tuple[str, np.ndarray, np.ndarray], ...]  # (concept, patches [14, 14] where it appears, and where it disappears)
    elsewhere: np.ndarray  # [K] bool: concepts that none of those patches shows, before or after


def scene_pairs(dataset, attribute: str, n: int) -> list[ScenePair]:
    """At most n pairs from the first scenes of a data set that allow the change, and nothing else changed.

    The largest object becomes one of another category ("object"), is painted in another color ("color"), or moved ("place"); or what is
    behind it all is another kind ("background").
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"Unknown attribute {attribute!r}. Valid: {', '.join(ATTRIBUTES)}.")
    names, found = openmoji.concept_names(), []
    kinds = np.array([name.partition(":")[0] for name in names])
    for index in range(len(dataset)):
        before = dataset.scene(index)
        if before.domain not in ("color", "night"):  # the others show no color
            continue
        after = _changed(before, attribute, np.random.default_rng([list(ATTRIBUTES).index(attribute), index]))
        if after is None:
            continue
        masks = [openmoji.concept_masks(openmoji.scene_truth(scene)) for scene in (before, after)]
        gained, lost = masks[1] & ~masks[0], masks[0] & ~masks[1]
        mine = np.flatnonzero((kinds == ATTRIBUTES[attribute]) & ((gained.sum((1, 2)) >= MIN_PATCHES) | (lost.sum((1, 2)) >= MIN_PATCHES)))
        where = (gained[mine] | lost[mine]).any(0)
        changes = tuple((names[c], gained[c], lost[c]) for c in mine)
        if changes:
            found.append(ScenePair(before, after, changes, ~(masks[0] | masks[1])[:, where].any(1)))
        if len(found) == n:
            break
    return found


def _changed(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene | None:
    """A scene with one attribute changed; None where that can't be."""
    largest = max(range(len(scene.placements)), key=lambda i: scene.placements[i].size)
    placement = scene.placements[largest]
    if attribute == "background":
        others = [i for i in range(len(BACKGROUND_KINDS)) if i != scene.background]
        return scene._replace(background=int(rng.choice(others)))
    if attribute == "object":
        categories = openmoji.class_table()["category"].to_numpy()
        placement = placement._replace(class_id=int(rng.choice(np.flatnonzero(categories != categories[placement.class_id]))))
    elif attribute == "color":
        old = COLORS.index(openmoji.main_colors()[placement.class_id])
        placement = placement._replace(paint=(old, int(rng.choice([i for i in range(len(COLORS)) if i != old]))))
    else:
        low, high = placement.size / 2, IMAGE_SIZE - placement.size / 2
        spots = rng.uniform(low, max(low, high), (20, 2))
        far = spots[np.abs(spots - (placement.x, placement.y)).max(1) >= 16]
        if not len(far):
            return None
        placement = placement._replace(x=float(far[0][0]), y=float(far[0][1]))
    placements = list(scene.placements)
    placements[largest] = placement
    return scene._replace(placements=tuple(placements))


class Selectivity(NamedTuple):
    """Whether latents answer to what they are matched with, and to nothing else."""

    frame: pd.DataFrame
    """One row each: dictionary, attribute, n_pairs, measure, value, low, high (95%, over pairs). ``right``: share of changes in which the
    matched latent moves the right way. ``selectivity``: how often it does so by more than another latent moves either way, whose concept is
    nowhere near; 0.25 if all moved alike. ``first``: by more than every other."""

    def sentence(self) -> str:
        """Selectivity by attribute in words."""
        parts = [
            f"{attribute}: " + ", ".join(f"{row.dictionary} {row.value:.0%} [{row.low:.0%}, {row.high:.0%}]" for row in rows.itertuples())
            for attribute, rows in self.frame.query("measure == 'first'").groupby("attribute", sort=False)
        ]
        return f"Changes that move the matched latent, the right way, more than every other: {'; '.join(parts)}."


@torch.no_grad()
def selectivity(
    clip, saes: Mapping[str, SparseAutoencoder], report: ComparisonReport, dataset, layer: int, *, n_pairs: int = 100
) -> Selectivity:
    """Change one thing in a scene and see whether the matched latents move, and the others don't.

    For each concept that appears on some patches and disappears from others, a latent's movement is its mean change where the concept
    appears, minus that where it disappears, over the latent's mean activation where it is active. The matched latent is the one that the
    report chose on other scenes. The others are those matched to concepts which none of these patches shows, before or after.
    """
    chosen = report.detection.query("readout == 'activations'")
    matched = {name: chosen[chosen["dictionary"] == name].set_index("concept")["latent"] for name in saes}
    if unknown := [name for name, latents in matched.items() if latents.empty]:
        raise ValueError(f"The report holds no dictionary {unknown[0]!r}. Valid: {', '.join(chosen['dictionary'].unique())}.")
    for name, sae in saes.items():
        sae.check_model(clip, layer)
        if report.sae and name in set(chosen.loc[chosen["role"] == "sae", "dictionary"]):
            sae.check_own("The report", report.sae)
    rows = []
    for attribute in ATTRIBUTES:
        pairs = scene_pairs(dataset, attribute, n_pairs)
        tokens = [_tokens(clip, pairs[i : i + _BATCH], layer) for i in tqdm(range(0, len(pairs), _BATCH), desc=f"pairs: {attribute}")]
        for name, sae in saes.items():
            movements = np.array(_movements(pairs, torch.cat(tokens), sae, matched[name]) if tokens else [])
            for column, measure in enumerate(("right", "selectivity", "first") if len(movements) else (), 1):
                found = mean_interval(movements[:, column], "pairs", groups=movements[:, 0])
                rows.append([name, attribute, len(np.unique(movements[:, 0])), measure, *found[:3]])
    if not rows:
        what = f"No scene of {dataset.spec!r} ({dataset.split}) can be changed in what two latents of the report are matched to"
        raise ValueError(f"{what}: give scenes in color, and a report of more concepts.")
    return Selectivity(pd.DataFrame(rows, columns=["dictionary", "attribute", "n_pairs", "measure", "value", "low", "high"]))


def _tokens(clip, pairs: Sequence[ScenePair], layer: int) -> Tensor:
    """[n, 2, P, D] patches of both scenes."""
    scenes = [scene for pair in pairs for scene in (pair.before, pair.after)]
    images = torch.stack([clip.preprocess(Image.fromarray(openmoji.render(scene))) for scene in scenes])
    return clip.residual(images, layer)[:, 1 : clip.n_tokens].cpu().unflatten(0, (-1, 2))


def _movements(pairs: Sequence[ScenePair], tokens: Tensor, sae: SparseAutoencoder, matched: pd.Series) -> list[tuple]:
    """For each change that a latent is matched to: the pair, and what :class:`Selectivity` measures."""
    latents, column = np.unique(matched.to_numpy(), return_inverse=True)
    h = select_latents(sae, tokens, torch.from_numpy(latents)).cpu().numpy()
    scale = h.sum((0, 1, 2)) / np.maximum((h > 0).sum((0, 1, 2)), 1)
    change = (h[:, 1] - h[:, 0]) / np.maximum(scale, np.finfo(np.float32).tiny)
    place, at = {name: i for i, name in enumerate(openmoji.concept_names())}, dict(zip(matched.index, column, strict=True))
    concept_of = np.array([place[name] for name in matched.index])
    found = []
    for i, (_, _, changes, elsewhere) in enumerate(pairs):
        others = np.unique(column[elsewhere[concept_of]])
        for concept, gained, lost in changes:
            if concept not in at:
                continue
            moved = sum(sign * change[i][mask.ravel()].mean(0) for sign, mask in ((1, gained), (-1, lost)) if mask.sum() >= MIN_PATCHES)
            if not len(away := np.abs(moved[others[others != at[concept]]])):
                continue  # nothing to compare it with
            mine = moved[at[concept]]
            found.append((i, mine > 0, mine > 0 and (mine > away).mean(), mine > away.max()))
    return found
