"""Base to novel: every adapter on every task, over seeds: raw, through the reconstruction, and with its error kept.

16 shots of each *base* class, test pictures of base and *novel* classes, their harmonic mean; beside it what the gain on base classes is
made of, and MaPLe fitted to shuffled labels. ``python -m experiments.protocol`` (about four hours on one CPU core; it goes on where it was
stopped) writes ``experiments/results/adaptation.csv`` and ``gain_split.csv``. Protocol: Khattak et al., CVPR 2023, section 4.1; Zhou et
al., CVPR 2022.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import hmean
from torch import Tensor

from patchsae_utils import stages
from patchsae_utils.adaptation.compare import FORMS, resampled_means, with_harmonic_mean
from patchsae_utils.adaptation.fit import ADAPTERS, RECIPES, fit_adapter
from patchsae_utils.adaptation.gain import explain_gain
from patchsae_utils.adaptation.models import AdaptedClip
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.config import Profile, load_profile
from patchsae_utils.data import batches, dataset_fingerprint
from patchsae_utils.interventions.tail import dataset_head, network_tail
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.tables import AVERAGE, MEAN, SHUFFLED, ZERO_SHOT

from . import grid

KINDS = (ZERO_SHOT, *ADAPTERS, SHUFFLED)
SEEDS = (1, 2, 3)
HALVES = ("base", "novel")
N_TEST = 180  # test pictures of each half of a task: ten a class


class Cell(NamedTuple):
    """One adapter of one task and seed; zero-shot CLIP has seed 0 alone, the control the first seed alone."""

    task: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^A-Za-z0-9_]+", "-", f"{self.task}-{self.kind}-{self.seed}")


def cells(tasks: Sequence[str], kinds: Sequence[str] = KINDS, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells, task by task, so that a table that was stopped holds whole tasks."""
    once = {ZERO_SHOT: (0,), SHUFFLED: seeds[:1]}
    return [Cell(task, kind, seed) for task in tasks for kind in kinds for seed in once.get(kind, seeds)]


class Protocol:
    """Fits and measures cells, and keeps the base model's image features of one task, which frozen image towers share."""

    def __init__(self, profile: Profile, clip: ClipModel, sae: SparseAutoencoder, n_images: int = N_TEST, progress: bool = True):
        self.profile, self.clip, self.sae, self.n_images, self.progress = profile, clip, sae, n_images, progress
        self.layer = clip.layer_index(profile.model.layer)
        sae.check_model(clip, self.layer)
        self.folder = profile.folder("adapters") / "protocol"
        self._features: tuple[str, dict[str, Tensor]] = ("", {})

    def _tests(self, cell: Cell) -> dict[str, Any]:
        """The test pictures of both halves of a task's classes."""
        return {half: stages.open_data(self.profile, cell.task, "test", self.n_images, half, self.progress) for half in HALVES}

    def inputs(self, cell: Cell) -> dict[str, Any]:
        recipe, adapters = RECIPES.get(cell.kind), self.profile.adapters
        lr = recipe and (adapters.lr or recipe.lr)  # the one that is used; nor does it matter which tasks and seeds others have
        return {
            "what": "protocol", "format": 4, "clip": self.clip.fingerprint, "sae": self.sae.fingerprint, "layer": self.layer, "cell": cell,
            "settings": dataclasses.replace(adapters, tasks=(cell.task,), kind=cell.kind, seeds=(cell.seed,), lr=lr), "recipe": recipe,
            "tests": {half: dataset_fingerprint(data) for half, data in self._tests(cell).items()},
        }  # fmt: skip

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """``right``: half -> form -> 0s and 1s, one a picture; ``n_classes``: half -> number; ``split``: rows of the second table."""
        tests, started = self._tests(cell), time.perf_counter()
        model = self._model(cell, folder)
        row: dict[str, Any] = {"fit_seconds": round(time.perf_counter() - started, 1), "right": {}}
        for half, data in tests.items():
            labels, head = torch.as_tensor(data.labels), dataset_head(model, data)
            predicted = [model.logits(features, head).argmax(1).cpu() for features in self._features_of(model, cell.task, half, data)]
            hits = zip(FORMS, predicted, strict=True)
            row["right"][half] = {form: "".join(str(int(hit)) for hit in found == labels) for form, found in hits}
        row["n_classes"] = {half: len(data.class_names) for half, data in tests.items()}
        return row | {"split": self._split(model, tests["base"]) if cell.seed == SEEDS[0] else []}

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        splits = [{**cell._asdict(), **part, "commit": row["commit"]} for cell, row in measured.items() for part in row["split"]]
        columns = [*Cell._fields, "quantity", "name", "value", "low", "high", "commit"]
        return {"adaptation": tabulate(measured, self.profile.data.tasks), "gain_split": pd.DataFrame(splits, columns=columns)}

    def _model(self, cell: Cell, folder: Path) -> ClipModel:
        if cell.kind == ZERO_SHOT:
            return self.clip
        if cell.kind != SHUFFLED:
            return stages.adapter(self.profile, self.clip, cell.task, cell.kind, cell.seed)
        data = stages.open_data(self.profile, cell.task, "train", half="base", progress=self.progress)
        return fit_adapter(
            self.clip, "maple", data, self.profile.adapters, folder.with_name(f"{folder.name}-adapter"), seed=cell.seed,
            precision=stages.ADAPTER_PRECISION, shuffle_labels=True, progress=self.progress,
        )  # fmt: skip

    def _split(self, model: ClipModel, dataset) -> list[dict[str, Any]]:
        """Of a model's gain and reuse of evidence: quantity, name, value, low, high."""
        analysis = explain_gain(self.clip, {"model": model}, self.sae, dataset, self.layer, progress=self.progress)["model"]
        tables = [
            analysis.split.parts().rename(columns={"part": "name", "gain": "value"}).assign(quantity="gain"),
            analysis.links.reuse().rename(columns={"comparison": "name", "reuse": "value"}).assign(quantity="reuse"),
        ]
        table = pd.concat(tables)[["quantity", "name", "value", "low", "high"]]
        return table.astype(object).where(table.notna(), None).to_dict("records")  # NaN is no JSON

    def _features_of(self, model: ClipModel, task: str, half: str, data) -> Tensor:
        """Image features [3 forms, N, d_embed]; the base model's are kept while the task lasts."""
        if isinstance(model, AdaptedClip) and model.changes_images:
            return feature_forms(model, self.sae, data, self.layer, self.progress)
        if self._features[0] != task:
            self._features = (task, {})
        if half not in self._features[1]:
            self._features[1][half] = feature_forms(self.clip, self.sae, data, self.layer, self.progress)
        return self._features[1][half]


@torch.no_grad()
def feature_forms(clip: ClipModel, sae: SparseAutoencoder, dataset, layer: int, progress: bool = True) -> Tensor:
    """Image features of each of :data:`FORMS`: [3, N, d_embed]."""
    tail, parts = None, []
    for batch in batches(dataset, clip.preprocess, 64, progress=f"classifying {dataset.name}" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        decoded = torch.cat([sae.decode(sae.encode(part)) for part in residual.tokens.split(8)])
        forms = (residual.tokens, decoded, decoded + (residual.tokens - decoded))
        parts.append(torch.stack([tail(residual._replace(tokens=tokens)) for tokens in forms]))
    return torch.cat(parts, 1)


def tabulate(measured: Mapping[Cell, Mapping[str, Any]], averaged: Sequence[str] | None = None) -> pd.DataFrame:
    """Each task and kind over the seeds measured so far, and the average over tasks that all kinds have (of ``averaged``, where it is given).

    Columns: task, kind, form, half ("base", "novel", "harmonic mean" of the mean accuracies), accuracy (mean over seeds), low, high (over
    pictures), seed_sd (NaN with one seed), n_seeds, n_images, n_classes, fit_seconds (mean), commit.
    """
    records, draws, points = [], {}, {}
    keys = list(dict.fromkeys((cell.task, cell.kind) for cell in measured))
    for task, kind in keys:
        found = [row for cell, row in measured.items() if (cell.task, cell.kind) == (task, kind)]
        common = {
            "n_seeds": len(found), "fit_seconds": float(np.mean([row["fit_seconds"] for row in found])),
            "commit": " ".join(dict.fromkeys(row["commit"] for row in found)),
        }  # fmt: skip
        for form in FORMS:
            right = [np.array([[int(c) for c in row["right"][half][form]] for row in found], float) for half in HALVES]
            n_images, n_classes = [values.shape[1] for values in right], [found[0]["n_classes"][half] for half in HALVES]
            seeds = [values.mean(1) for values in right]
            point = [values.mean() for values in right]
            drawn = [resampled_means(values.mean(0), seed=i) for i, values in enumerate(right)]
            draws[task, kind, form], points[task, kind, form] = [*drawn, hmean(drawn, axis=0)], [*point, hmean(point)]
            seeds, n_images, n_classes = [*seeds, hmean(seeds, axis=0)], [*n_images, sum(n_images)], [*n_classes, sum(n_classes)]
            for i, (half, numbers) in enumerate(with_harmonic_mean(point, drawn).items()):
                sd = seeds[i].std(ddof=1) if len(found) > 1 else np.nan
                record = {"task": task, "kind": kind, "form": form, "half": half, **_numbers(numbers), "seed_sd": sd}
                records.append(record | {"n_images": n_images[i], "n_classes": n_classes[i], **common})
    return pd.DataFrame([*records, *_averages(keys, measured, averaged, draws, points)])


def _averages(keys, measured, averaged, draws, points) -> Iterator[dict[str, Any]]:
    """Rows over the tasks that all kinds have."""
    kinds = list(dict.fromkeys(kind for _, kind in keys))
    tasks = [task for task in dict.fromkeys(task for task, _ in keys) if all((task, kind) in keys for kind in kinds)]
    tasks = [task for task in tasks if averaged is None or task in averaged]
    for kind in kinds if len(tasks) > 1 else ():
        seeds = min(sum((cell.task, cell.kind) == (task, kind) for cell in measured) for task in tasks)
        for form in FORMS:
            for i, half in enumerate((*HALVES, MEAN)):
                low, high = np.quantile(np.mean([draws[task, kind, form][i] for task in tasks], axis=0), [0.025, 0.975])
                mean = float(np.mean([points[task, kind, form][i] for task in tasks]))
                yield {"task": AVERAGE, "kind": kind, "form": form, "half": half, **_numbers((mean, low, high)), "n_seeds": seeds}


def _numbers(numbers) -> dict[str, float]:
    return dict(zip(("accuracy", "low", "high"), map(float, numbers), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Fit and measure the adapters of a profile's tasks."""
    parser = grid.parser("protocol", __doc__)
    parser.add_argument("--task", action="append", help="measure only this data set, e.g. openmoji/tools:line; may be given several times")
    parser.add_argument("--kind", action="append", choices=KINDS, help="measure only this adapter; may be given several times")
    parser.add_argument("--seed", action="append", type=int, help="only this seed; may be given several times (default: 1, 2, 3)")
    parser.add_argument("--images", type=int, default=N_TEST, help=f"test pictures of each half of a task (default: {N_TEST})")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    # Beside the ten tasks those of the notebook, in domains where CLIP is weak; they don't enter the average.
    tasks = options.task or list(dict.fromkeys([*profile.data.tasks, *profile.adapters.tasks]))
    chosen = cells(tasks, options.kind or KINDS, options.seed or SEEDS)
    protocol = Protocol(profile, clip, stages.trained_sae(profile, clip), options.images)
    for number, (cell, row, tables) in enumerate(grid.run(protocol, chosen, options.out), 1):
        table = tables["adaptation"].query("task == @cell.task and kind == @cell.kind and form == 'raw'").set_index("half")["accuracy"]
        print(
            f"[{number}/{len(chosen)}] {cell.task} {cell.kind} seed {cell.seed}: base {table['base']:.1%}, novel {table['novel']:.1%}, "
            f"harmonic mean {table[MEAN]:.1%} (fitted in {row['fit_seconds']:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
