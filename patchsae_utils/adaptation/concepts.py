"""The concepts that adaptation changed, one by one: where both models show them, and what a class loses without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..interventions.choosing import matched_latents
from ..interventions.tail import Read, check_same_tower, contribution, dataset_head, read_batches
from ..latents.classes import class_scores
from ..latents.pictures import seen_image
from ..run.intervals import mean_interval
from ..sae.model import SparseAutoencoder
from .joint import JointDictionary
from .novelty import NEW

KINDS = {"appeared": "links that appeared", "vanished": "links that vanished", NEW: "new latents"}
MODELS = ("CLIP", "adapted")
N_EACH = 5  # concepts of each kind
N_PICTURES = 3  # of each model that show a concept


class Chosen(NamedTuple):
    """A class and a latent of CLIP's dictionary or, if it is new, of the joint one."""

    kind: str
    label: int
    latent: int


@dataclass(frozen=True)
class RemappedConcepts:
    """Some concepts of each of :data:`KINDS`, in pictures and by experiment."""

    table: pd.DataFrame
    """A row for each concept and model: kind, class_name, latent, name, model, change (of the class's log-odds when the latent is turned off:
    nats, mean over pictures of the class), control (the same for another latent that is about as active), beyond (change minus control), more
    (change minus CLIP's), each with its _low and _high over pictures; n (pictures)."""
    pictures: list[dict[str, tuple[np.ndarray, np.ndarray]]]
    """Of each concept in each model: strongest pictures, uint8 [n, H, W, 3], and activations there [n, rows, columns]."""

    def sentence(self) -> str:
        """How many concepts do what their kind says, by intervals over pictures."""
        after = self.table[self.table["model"] == MODELS[1]]
        told, tests = [], (
            ("appeared", after["more_high"] < 0, "carry more of their class than in CLIP"),
            ("vanished", after["more_low"] > 0, "carry less than in CLIP"),
            (NEW, after["beyond_high"] < 0, "carry more than another latent that is as active"),
        )  # fmt: skip
        for kind, does, words in tests:
            if n := (after["kind"] == kind).sum():
                told.append(f"{does[after['kind'] == kind].sum()} of {n} {KINDS[kind]} {words}")
        return f"In the adapted model, {'; '.join(told) or 'no link changed and no latent is new'}."


@torch.no_grad()
def remapped_concepts(
    base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int, links: pd.DataFrame,
    names: Mapping[int, str], joint: JointDictionary, verdicts: pd.DataFrame, *, progress: bool = True,
) -> RemappedConcepts:  # fmt: skip
    """Show the links that changed most, and new latents, in pictures of both models, and turn each off in both.

    Parameters
    ----------
    base, adapted, sae, layer : models, and an SAE that was trained on ``base`` and reads this block's output
    dataset : data set of labelled pictures that chose neither the links nor the new latents
    links : DataFrame of ``ClassLinks.links()``
        On other pictures. Of the links that appeared, and of those that vanished, the five that changed most are shown, each class and latent
        once.
    names : mapping of int to str, of the SAE's latents; a new latent is called by the class that it is most characteristic of
    joint, verdicts : what :func:`new_latents` returns
    progress : bool
    """
    check_same_tower(base, adapted)
    for model in (base, adapted):
        sae.check_model(model, layer)
    models, heads = (base, adapted), [dataset_head(model, dataset) for model in (base, adapted)]
    label = f"concepts of {dataset.name}" if progress else None
    reads = list(zip(*(read_batches(model, dataset, layer, label) for model in models), strict=True))
    new = verdicts.loc[verdicts["verdict"] == NEW, "latent"].tolist()
    chosen = _changed(links) + _new(joint, new, reads, len(dataset.class_names))
    effects: list[list[Tensor]] = [[] for _ in chosen]  # of each concept [2 models, 2 (change, control), images]
    shown: list[list[Tensor]] = []  # of each batch and concept [2 models, B, T]
    for pair in reads:
        codes: dict[bool, tuple[list[Tensor], list[Tensor]]] = {
            False: ([sae.encode(read.residual.tokens) for read in pair], [sae.W_dec] * 2),
            True: ([joint.encode(_both(pair))] * 2, [joint.rows(0), joint.rows(1)]),
        }
        shown.append([torch.stack([h[..., each.latent] for h in codes[each.kind == NEW][0]]).cpu() for each in chosen])
        for found, each in zip(effects, chosen, strict=True):
            images = (pair[0].labels == each.label).nonzero()[:, 0]
            if len(images):
                h, rows = codes[each.kind == NEW]
                of_models = zip(models, pair, h, rows, heads, strict=True)
                found.append(torch.stack([_turned_off(model, read, f, d, head, images, each) for model, read, f, d, head in of_models]))
    kept = [i for i, found in enumerate(effects) if found]
    table = pd.DataFrame([row for i in kept for row in _rows(chosen[i], torch.cat(effects[i], 2).double().numpy())])
    if len(table):
        table["class_name"] = [dataset.class_names[i] for i in table["label"]]
        named = table["latent"].map(dict(names)).fillna("unnamed")
        table.insert(2, "name", named.where(table["kind"] != NEW, "mostly " + table["class_name"]))
    activations = [torch.cat([batch[i] for batch in shown], 1) for i in kept]
    return RemappedConcepts(table, [_pictures(base, dataset, each) for each in activations])


def _changed(links: pd.DataFrame) -> list[Chosen]:
    """The links that appeared, then those that vanished, by how much of the class's evidence they gained or lost."""
    found = []
    for kind in list(KINDS)[:2]:
        rows = links[links["link"] == kind].assign(size=lambda table: (table["adapted"] - table["base"]).abs())
        rows = rows.sort_values("size", ascending=False, kind="stable").drop_duplicates("latent").drop_duplicates("class")
        found += [Chosen(kind, int(label), int(latent)) for label, latent in rows[["class", "latent"]].head(N_EACH).itertuples(index=False)]
    return found


def _new(joint: JointDictionary, latents: list[int], reads: list[tuple[Read, Read]], n_classes: int) -> list[Chosen]:
    """Of new latents those most characteristic of a class, each class once."""
    sums, seen = torch.zeros(n_classes, len(joint.b_enc)), torch.zeros(n_classes)
    for pair in reads:
        labels = pair[0].labels.cpu()
        sums.index_add_(0, labels, joint.encode(_both(pair)).mean(1).cpu())
        seen += torch.bincount(labels, minlength=n_classes)
    best = class_scores(sums / seen.clamp_min(1)[:, None]).max(0)
    table = pd.DataFrame({"latent": latents, "label": best.indices[latents].tolist(), "score": best.values[latents].tolist()})
    rows = table[table["score"] > 0].sort_values("score", ascending=False, kind="stable").drop_duplicates("label").head(N_EACH)
    return [Chosen(NEW, row.label, row.latent) for row in rows.itertuples()]


def _both(pair: tuple[Read, Read]) -> Tensor:
    """The tokens of both models, [B, T, 2, D]."""
    return torch.stack([read.residual.tokens for read in pair], 2)


def _turned_off(clip: ClipModel, read: Read, h: Tensor, rows: Tensor, head: Tensor, images: Tensor, each: Chosen) -> Tensor:
    """Change of the class's log-odds in some images [n] without the latent, and without another about as active: [2, n]."""
    z, own = read.residual.tokens[images], torch.full((len(images), 1), each.latent)
    other = matched_latents(own, h[images].sum(1), read.indices[images.cpu()])
    odds, others = [], torch.arange(len(head), device=head.device) != each.label
    for latents in (None, own, other):
        tokens = z if latents is None else z - contribution(rows, h[images], latents)
        logits = clip.logits(read.features(tokens, images), head).double()
        odds.append(logits[:, each.label] - logits[:, others].logsumexp(1))
    return torch.stack(odds[1:]).cpu() - odds[0].cpu()


def _rows(each: Chosen, values: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table from changes [2 models, 2 (own, control), images]; images without a control are left out of what needs one."""
    rows = []
    for model, (own, control) in zip(MODELS, values, strict=True):
        row = {**each._asdict(), "model": model, "n": len(own)}
        for name, numbers in {"change": own, "control": control, "beyond": own - control, "more": own - values[0, 0]}.items():
            some = numbers[np.isfinite(numbers)]
            found = mean_interval(some, "images")[:3] if len(some) else (np.nan,) * 3
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, found), strict=True))
        rows.append(row)
    return rows


def _pictures(clip: ClipModel, dataset: Any, activation: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pictures in which a latent is strongest on average, from its activations [2 models, N, T], and its masks there."""
    found = {}
    for model, values in zip(MODELS, activation, strict=True):
        best = values.mean(1).topk(min(N_PICTURES, len(values)))
        places = best.indices[best.values > 0].tolist()
        pictures = np.stack([seen_image(clip, dataset[i].image).numpy() for i in places]) if places else np.zeros((0, 1, 1, 3), np.uint8)
        found[model] = pictures, values[places, 1:].unflatten(1, clip.grid).numpy()
    return found
