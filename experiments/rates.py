"""Each adapter's rate by one rule, on tasks that stand in no other table: a third of its recipe's, the recipe's, or three times that?

``python -m experiments.rates`` (about an hour on one CPU core; it goes on where it was stopped) fits each to 16 shots of base classes and
classifies validation pictures of base and novel ones: ``experiments/results/rates.csv``. A recipe changes when another rate, or MaPLe's
random crops, classify more of the same pictures correctly, by the interval over pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from patchsae_utils import stages
from patchsae_utils.adaptation.fit import RECIPES, fit_adapter
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.config import AdapterConfig, Profile, load_profile
from patchsae_utils.data import batches
from patchsae_utils.interventions.tail import dataset_head
from patchsae_utils.run.intervals import mean_interval

from . import grid

TASKS = ("openmoji/tools:night", "openmoji/birds_sea:gray")
FACTORS = (1.0, 1 / 3, 3.0)
HALVES = ("base", "novel")
N_TEST = 180  # validation pictures of each half of a task


class Cell(NamedTuple):
    """An adapter of one task, its rate as a multiple of its recipe's, and whether it sees random crops."""

    task: str
    kind: str
    factor: float
    random_crop: bool = False

    @property
    def name(self) -> str:
        return f"{self.task.partition('/')[2].replace(':', '-')}-{self.kind}-{self.factor:.2g}{'-crops' * self.random_crop}"


def cells(kinds: list[str]) -> list[Cell]:
    found = [Cell(task, kind, factor) for task in TASKS for kind in kinds for factor in FACTORS]
    return found + [Cell(task, "maple", 1.0, True) for task in TASKS if "maple" in kinds]


class Rates:
    """Fits and measures cells."""

    def __init__(self, profile: Profile, clip: ClipModel, n_images: int = N_TEST, progress: bool = True):
        self.profile, self.clip, self.n_images, self.progress = profile, clip, n_images, progress
        self.folder = profile.folder("adapters") / "rates"

    def config(self, cell: Cell) -> AdapterConfig:
        return dataclasses.replace(self.profile.adapters, lr=cell.factor * RECIPES[cell.kind].lr, random_crop=cell.random_crop)

    def inputs(self, cell: Cell) -> dict[str, Any]:
        settings = dataclasses.replace(self.config(cell), tasks=(cell.task,), kind=cell.kind)
        return {"what": "rates", "format": 1, "clip": self.clip.fingerprint, "cell": cell, "settings": settings, "n_images": self.n_images}

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """``right``: half -> 0s and 1s, one a picture."""
        data = stages.open_data(self.profile, cell.task, "train", half="base")
        model = fit_adapter(self.clip, cell.kind, data, self.config(cell), precision=stages.ADAPTER_PRECISION, progress=self.progress)
        tests = {half: stages.open_data(self.profile, cell.task, "val", self.n_images, half) for half in HALVES}
        return {"right": {half: right(model, tests[half]) for half in HALVES}}

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        """A row a kind, rate and crops, over tasks: lr, accuracy on either half, and gain over the recipe's rate, with its interval."""
        rows = []
        for kind, factor, crop in dict.fromkeys(cell[1:] for cell in measured):
            tasks = [task for task in TASKS if (task, kind, factor, crop) in measured]
            found, recipe = ([measured[Cell(task, kind, *how)]["right"] for task in tasks] for how in ((factor, crop), (1.0, False)))
            gain = mean_interval(_bits(found, HALVES) - _bits(recipe, HALVES), "images")
            row = {"kind": kind, "lr": factor * RECIPES[kind].lr, "factor": factor, "random_crop": crop, "tasks": len(tasks)}
            row |= {half: _bits(found, (half,)).mean() for half in HALVES}
            rows.append(row | {"gain": gain.value, "low": gain.low, "high": gain.high})
        return {"rates": pd.DataFrame(rows)}


def _bits(found: list[Mapping[str, str]], halves: tuple[str, ...]) -> np.ndarray:
    return np.array([int(bit) for right in found for half in halves for bit in right[half]], float)


@torch.no_grad()
def right(model: ClipModel, dataset: Any) -> str:
    """Which pictures a model classifies correctly: a 0 or 1 for each."""
    head = dataset_head(model, dataset)
    hits = [model.logits(model.encode_image(b.images), head).argmax(1).cpu() == b.labels for b in batches(dataset, model.preprocess)]
    return "".join(str(int(hit)) for hit in torch.cat(hits))


def main(arguments: list[str] | None = None) -> None:
    """Fit and measure each kind at each rate."""
    parser = grid.parser("rates", __doc__)
    parser.add_argument("--kind", action="append", choices=list(RECIPES), help="only this adapter; may be given again")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    for _, _, tables in grid.run(Rates(profile, clip), cells(options.kind or list(RECIPES)), options.out):
        print(tables["rates"].tail(1).to_string(header=False, index=False), flush=True)


if __name__ == "__main__":
    main()
