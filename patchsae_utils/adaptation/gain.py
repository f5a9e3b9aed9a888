"""What a gain in accuracy is made of. The residual stream is z = decode(h) + e, and adaptation may change four parts:

CLIP's own latents (h: "retuning"), what is outside its dictionary (e: "new concepts", no bound on what is new: :mod:`.novelty`), the later
blocks and the text head (both "remapping"). Each of the 16 combinations classifies every picture; a part's share is its *Owen value*, in
which the tower's three parts are one union, so the parts sum to the gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches, templates_for
from ..interventions.tail import check_same_tower, dataset_head, network_tail
from ..latents.passes import latent_chunks
from ..run.intervals import interval, mean_interval
from ..sae.model import SparseAutoencoder
from .links import ClassLinks, LinkSums, Reader
from .models import AdaptedClip

TOWER_PARTS = ("existing latents", "outside the dictionary", "later blocks")
PARTS = (*TOWER_PARTS, "text head")  # the players, in the order of the axes of GainSplit.outcomes
CONCEPTS = {"retuning": ("existing latents",), "new concepts": ("outside the dictionary",), "remapping": ("later blocks", "text head")}
MEASURES = ("accuracy", "log-probability")
BATCH = 32
EXPERIMENTS = {  # name -> which parts are the adapted model's
    "CLIP": (0, 0, 0, 0), "existing latents' part only": (1, 0, 0, 0), "outside part only": (0, 1, 0, 0),
    "whole change of the stream": (1, 1, 0, 0), "image tower": (1, 1, 1, 0), "text head": (0, 0, 0, 1), "remapping only": (0, 0, 1, 1),
    "adapted, without the outside part": (1, 0, 1, 1), "adapted, without the latents' part": (0, 1, 1, 1), "adapted": (1, 1, 1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class GainSplit:
    """CLIP and an adapted model on one data set, with every combination of old and new parts."""

    name: str  # of the data set
    outcomes: np.ndarray
    """[2 measures, 2, 2, 2, 3, N]: whether picture n is classified correctly, and the log-probability of its class (nats), with each part of
    ``PARTS`` as in CLIP (0) or as in the adapted model (1); the text head may also be CLIP's with the adapter's own texts (2)."""

    def parts(self, measure: str = "accuracy") -> pd.DataFrame:
        """Each part of the gain in "accuracy" or "log-probability": part, gain, low, high, share, share_low, share_high; over pictures.

        The text head's part is "template" plus "learning" (FAULTS D16: CLIP's head is a mean over templates, that of learned prompts has
        one). Shares are NaN where the gain's interval holds 0.
        """
        values = self.outcomes[MEASURES.index(measure)]
        parts = owen_values(values)
        for name, members in {"image tower": TOWER_PARTS, **CONCEPTS}.items():
            parts[name] = np.sum([parts[part] for part in members], axis=0)
        untrained = np.mean([values[tower, tower, tower, 2] - values[tower, tower, tower, 0] for tower in (0, 1)], axis=0)
        parts |= {"template": untrained, "learning": parts["text head"] - untrained}
        tower, base, head, both = values[1, 1, 1, 0], values[0, 0, 0, 0], values[0, 0, 0, 1], values[1, 1, 1, 1]
        parts |= {"both": both - base, "interaction": both - tower - head + base}
        rows, whole = np.stack(list(parts.values())), parts["both"]
        gain = mean_interval(rows, "images")
        table = pd.DataFrame({"part": list(parts), "gain": gain.value, "low": gain.low, "high": gain.high})
        at = list(parts).index("both")
        share = (np.nan,) * 3 if gain.low[at] <= 0 <= gain.high[at] else share_of(rows, whole)[:3]
        return table.assign(**dict(zip(("share", "share_low", "share_high"), share, strict=True)))

    def experiments(self) -> pd.DataFrame:
        """Of :data:`EXPERIMENTS`: experiment, value (accuracy), low, high, and the gain over CLIP with its interval."""
        rows = np.stack([self.outcomes[0][parts] for parts in EXPERIMENTS.values()])
        value, gain = mean_interval(rows, "images"), mean_interval(rows - rows[0], "images")
        table = pd.DataFrame({"experiment": list(EXPERIMENTS), "value": value.value, "low": value.low, "high": value.high})
        return table.assign(gain=gain.value, gain_low=gain.low, gain_high=gain.high)


def share_of(rows: np.ndarray, whole: np.ndarray):
    """Sums of rows [..., N] over the sum of ``whole`` [N], with intervals; resamples in which that is 0 have no share and are left out."""

    def shares(weights: np.ndarray) -> np.ndarray:
        totals = weights @ whole
        return (weights @ rows.T) / np.where(totals == 0, np.nan, totals)[(...,) + (None,) * (rows.ndim - 1)]

    return interval(shares, len(whole), "images")


def owen_values(values: np.ndarray) -> dict[str, np.ndarray]:
    """Each part's Owen value: what it adds, averaged over the orders in which the parts are exchanged, the tower's together.

    Parameters
    ----------
    values : ndarray [2, 2, 2, 2 or 3, ...]
        Outcomes with each of ``PARTS`` as in CLIP (0) or as in the adapted model (1).

    Source: Owen, "Values of games with a priori unions", 1977.
    """
    found = {name: np.zeros(values.shape[4:]) for name in PARTS}
    for head, order in product((0, 1), permutations(range(3))):
        state = [0, 0, 0, head]
        for part in order:
            before, state[part] = values[tuple(state)], 1
            found[PARTS[part]] += (values[tuple(state)] - before) / 12
    for tower in (0, 1):
        found["text head"] += (values[tower, tower, tower, 1] - values[tower, tower, tower, 0]) / 2
    return found


class GainAnalysis(NamedTuple):
    split: GainSplit
    links: ClassLinks


@torch.no_grad()
def explain_gain(
    base: ClipModel, adapted: Mapping[str, ClipModel], sae: SparseAutoencoder, dataset: Any, layer: int, *, progress: bool = True
) -> dict[str, GainAnalysis]:
    """Split the gain of adapted models into its parts, and compare what classes rest on.

    Parameters
    ----------
    base, sae, layer : a model, and an SAE that was trained on it and reads this block's output
    adapted : mapping of str to ClipModel, by name
    dataset : data set of labelled pictures that neither the SAE nor the adapters have seen
    progress : bool
    """
    models = [base, *adapted.values()]
    for model in models:
        check_same_tower(base, model)
        sae.check_model(model, layer)
    tails, heads = [None] * len(models), [dataset_head(model, dataset) for model in models]
    texts = dataset.class_names, templates_for(dataset.spec)
    between = [model.untrained_head(*texts) if isinstance(model, AdaptedClip) else heads[0] for model in models]
    sums = {name: LinkSums(list(dataset.class_names), sae) for name in adapted}
    found: dict[str, list[Tensor]] = {name: [] for name in adapted}
    for batch in batches(dataset, base.preprocess, BATCH, progress=f"explaining {dataset.name}" if progress else None):
        labels = batch.labels.to(base.device)
        residuals = [model.run_to(batch.images, layer) for model in models]
        tails = [tail or network_tail(model, layer, residual) for tail, model, residual in zip(tails, models, residuals, strict=True)]
        before, *others = (Reader(*parts) for parts in zip(models, heads, tails, residuals, strict=True))
        z = before.residual.tokens
        said = _decoded(sae, z)
        for name, after, untrained in zip(adapted, others, between[1:], strict=True):
            new = after.residual.tokens
            change_said = _decoded(sae, new) - said
            # With the latents' part, and with the part outside.
            streams = {(0, 0): z, (1, 0): z + change_said, (0, 1): new - change_said, (1, 1): new}
            found[name].append(_outcomes(streams, (before, after), untrained, labels))
            sums[name].add((before, after), labels)
    splits = {name: GainSplit(dataset.name, torch.cat(parts, -1).numpy()) for name, parts in found.items()}
    return {name: GainAnalysis(split, sums[name].links()) for name, split in splits.items()}


def _decoded(sae: SparseAutoencoder, tokens: Tensor) -> Tensor:
    return torch.cat([sae.decode(h) for _, h in latent_chunks(sae, tokens)])


def _outcomes(streams: Mapping[tuple[int, int], Tensor], readers: tuple[Reader, Reader], untrained: Tensor, labels: Tensor) -> Tensor:
    """Correctness and log-probability of streams [B, T, D] with every tail and head, [2, 2, 2, 2, 3, B]."""
    found = torch.zeros(2, 2, 2, 2, 3, len(labels), dtype=torch.float64)
    for tail, reader in enumerate(readers):
        for parts, tokens in streams.items():
            # Prompt tokens belong to the blocks that made them and read them: they go with the tail.
            features = reader.tail(reader.residual._replace(tokens=tokens))
            for head, matrix in enumerate((readers[0].head, readers[1].head, untrained)):
                logits = readers[head % 2].clip.logits(features, matrix)
                found[(0, *parts, tail, head)] = (logits.argmax(1) == labels).double().cpu()
                found[(1, *parts, tail, head)] = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0].cpu()
    return found
