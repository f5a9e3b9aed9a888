"""A dictionary of the adapted model's own, beside CLIP's: would it have found other concepts?

One SAE is trained on each model, with the same pictures, settings and seed, and a second one of CLIP says what another seed does. Each then
reads both models: the four combinations of Lim et al., ICLR 2025, Fig. 11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
from torch import Tensor

from ..activations.extraction import extract_activations
from ..clip.model import ClipModel
from ..config import SaeConfig, TrainConfig
from ..interventions.tail import check_same_tower
from ..latents.matching import MAX_LATENTS, stability
from ..sae.model import SparseAutoencoder
from ..sae.quality import evaluate_sae, firing_rates
from ..sae.trainer import train_sae

BASE, OTHER_SEED, ADAPTED = "CLIP", "CLIP, other seed", "adapted"
DICTIONARIES = (BASE, OTHER_SEED, ADAPTED)
MEASURES = {"explained_variance": "explained_variance", "l0": "l0", "zero_shot_top1": "accuracy", "zero_shot_change": "change"}
"""Metric of :func:`patchsae_utils.evaluate_sae` -> column of :meth:`Dictionaries.cross`."""
_N_ALIVE = 40_000  # tokens on which a latent must fire once to be matched


class Dictionaries(NamedTuple):
    """Three SAEs that differ in nothing but whose activations they were trained on, or the seed."""

    saes: dict[str, SparseAutoencoder]
    """By the names of :data:`DICTIONARIES`."""
    alive: dict[str, Tensor]
    """bool [S]: latents that fire on the SAE's training activations; the most frequent ones, where these are too many to match."""

    def cross(self, base: ClipModel, adapted: ClipModel, dataset: Any, layer: int, *, progress: bool = True) -> pd.DataFrame:
        """Each SAE on each model's activations of new pictures: sae, activations ("CLIP" or "adapted"), measure, value, low, high.

        Measures: explained_variance, l0, accuracy of that model through the reconstruction, its change against raw. Intervals are over
        pictures.
        """
        check_same_tower(base, adapted)
        tables = []
        for name, model in ((BASE, base), (ADAPTED, adapted)):
            found = evaluate_sae(model, self.saes, dataset, layer, progress=progress)
            found = found[(found["variant"] == "reconstruction") & (found["tokens"] == "all") & found["metric"].isin(list(MEASURES))]
            tables.append(found.assign(activations=name, measure=found["metric"].map(MEASURES)))
        return pd.concat(tables, ignore_index=True)[["sae", "activations", "measure", "value", "low", "high"]]

    def matches(self, threshold: float = 0.7) -> pd.DataFrame:
        """How many latents each pair of SAEs has in common: :func:`stability` of those that are alive."""
        return stability(self.saes, self.alive, threshold=threshold)


def train_dictionaries(
    base: ClipModel, adapted: ClipModel, dataset: Any, layer: int, sae: SaeConfig, training: TrainConfig, out: str | Path, *, progress: bool = True
) -> Dictionaries:  # fmt: skip
    """An SAE of each model's residual stream, and one more of CLIP's with the next seed; what lies in ``out`` already is opened."""
    check_same_tower(base, adapted)
    out = Path(out)
    stores = {
        name: extract_activations(model, dataset, layer, out / f"activations-{folder}", progress=progress)
        for name, folder, model in ((BASE, "base", base), (ADAPTED, "adapted", adapted))
    }
    saes, alive = {}, {}
    for name, folder, source, seed in (
        (BASE, "sae-base", BASE, training.seed),
        (OTHER_SEED, "sae-base-other-seed", BASE, training.seed + 1),
        (ADAPTED, "sae-adapted", ADAPTED, training.seed),
    ):
        fresh = SparseAutoencoder(base.width, sae.expansion_factor * base.width, seed=seed, **sae.options())
        saes[name] = train_sae(fresh, stores[source], dataclasses.replace(training, seed=seed), out / folder, progress=progress)
        alive[name] = _alive(firing_rates(saes[name], cast(Iterator[Tensor], stores[source].tokens(4096, seed=0)), _N_ALIVE))
    return Dictionaries(saes, alive)


def _alive(rates: Tensor) -> Tensor:
    alive = torch.zeros_like(rates, dtype=torch.bool)
    alive[rates.argsort(descending=True, stable=True)[:MAX_LATENTS]] = True
    return alive & (rates > 0)
