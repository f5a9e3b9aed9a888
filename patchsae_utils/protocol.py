"""Base to novel: every adapter on every task, over seeds, in the three forms that the paper mixes up.

An adapter sees 16 shots of each *base* class of a task (the first half of its sorted classes) and is judged on test pictures of the base
classes and of the *novel* ones, which it never saw; the harmonic mean counts both. Every accuracy is given as it is (raw), with the residual stream
replaced by its reconstruction, and with the error of the reconstruction kept.

Beside it, for the first seed of each adapter, what its gain on base classes is made of (:mod:`patchsae_utils.adaptation.gain`), with a control: MaPLe fitted to
shuffled labels.

``python -m patchsae_utils.protocol`` fits and measures (about four hours on one free CPU core; it goes on where it was stopped) and writes
``benchmarks/results/adaptation.csv`` and ``benchmarks/results/gain_split.csv``. Protocol: Khattak et al., CVPR 2023, section 4.1; Zhou et al., CVPR 2022.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import stages
from .adaptation.adapters import ADAPTERS, RECIPES, AdaptedClip, fit_adapter
from .adaptation.compare import FORMS, harmonic_mean
from .adaptation.gain import explain_gain
from .clip.model import ClipModel
from .config import Profile, load_profile, repository_root
from .data import batches
from .data.dataset import dataset_fingerprint
from .interventions.tail import dataset_head, network_tail
from .run.artifacts import current_commit, fingerprint, is_current, read_json, write_json, write_table
from .run.intervals import resampled_means
from .sae.model import SparseAutoencoder

TABLE = Path("benchmarks") / "results" / "adaptation.csv"
SPLIT_NAME = "gain_split.csv"
"""Name of the second table, in the folder of the first."""
ZERO_SHOT, SHUFFLED = "zero-shot", "maple, shuffled labels"
KINDS = (ZERO_SHOT, "maple", "coop", "vpt", "lora", "finetune", "linear", SHUFFLED)
SEEDS = (1, 2, 3)
HALVES = ("base", "novel")
MEAN = "harmonic mean"
AVERAGE = "average"
"""Task name of the rows over all tasks."""
N_TEST = 180
"""Test pictures of each half of a task: ten a class."""
_FORMAT = 2


class Cell(NamedTuple):
    """One adapter of one task and seed; zero-shot CLIP has seed 0 alone, the control the first seed alone."""

    task: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", f"{self.task}-{self.kind}-{self.seed}")


def cells(tasks: Sequence[str], kinds: Sequence[str] = KINDS, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells, task by task, so that a table that was stopped holds whole tasks."""
    once = {ZERO_SHOT: (0,), SHUFFLED: seeds[:1]}
    return [Cell(task, kind, seed) for task in tasks for kind in kinds for seed in once.get(kind, seeds)]


class Protocol:
    """Fits and measures cells, and keeps the base model's image features of one task, which frozen image towers share.

    Parameters
    ----------
    profile : Profile
        Its ``adapters`` settings say how to fit.
    clip : ClipModel
    sae : SparseAutoencoder
        Trained on ``clip``; it makes the reconstructions.
    n_images : int, optional
        Test pictures of each half; None takes all.
    split_seeds : sequence of int
        Seeds whose adapters' gains are split.
    progress : bool
    """

    def __init__(
        self,
        profile: Profile,
        clip: ClipModel,
        sae: SparseAutoencoder,
        n_images: int | None = N_TEST,
        split_seeds: Sequence[int] = SEEDS[:1],
        progress: bool = True,
    ):
        self.profile, self.clip, self.sae, self.n_images, self.progress = profile, clip, sae, n_images, progress
        self.split_seeds = tuple(split_seeds)
        self.layer = clip.layer_index(profile.model.layer)
        sae.check_model(clip, self.layer)
        self.folder = profile.folder("adapters") / "protocol"
        self._features: tuple[str, dict[str, Tensor]] = ("", {})
        self._tests: dict[tuple[str, str], Any] = {}

    def test(self, task: str, half: str):
        """The test pictures of one half of a task's classes."""
        return stages.open_data(self.profile, task, "test", self.n_images, half, self.progress)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Fit a cell's adapter, or open it, and classify the test pictures. What was measured before is read, not measured again.

        Returns
        -------
        dict
            ``right``: half -> form -> string of 0 and 1, one a picture; ``n_classes``: half -> number; ``fit_seconds``; ``split``: rows of the
            second table (none for other seeds).
        """
        out = self.folder / cell.name
        tests = {half: self.test(cell.task, half) for half in HALVES}
        # Which tasks and seeds others use, and the profile's rate where the recipe has its own, does not matter to this cell.
        recipe, adapters = RECIPES.get(cell.kind), self.profile.adapters
        lr = recipe.rate(adapters) if recipe else adapters.lr
        settings = dataclasses.replace(adapters, tasks=(cell.task,), kind=cell.kind, seeds=(cell.seed,), lr=lr)
        key = fingerprint(
            stage="protocol", format=_FORMAT, clip=self.clip.fingerprint, sae=self.sae.fingerprint, layer=self.layer, cell=cell,
            split=cell.seed in self.split_seeds,
            settings=settings, recipe=recipe, tests={half: dataset_fingerprint(data) for half, data in tests.items()},
        )  # fmt: skip
        if is_current(out, key, "measures.json"):
            return read_json(out / "measures.json")["row"]
        started = time.perf_counter()
        model = self._model(cell)
        fitted = time.perf_counter()
        right = {}
        for half, data in tests.items():
            labels, head = torch.as_tensor(data.labels), dataset_head(model, data)
            predicted = [model.logits(features, head).argmax(1).cpu() for features in self._features_of(model, cell.task, half, data)]
            right[half] = {
                form: "".join(str(int(hit)) for hit in found == labels) for form, found in zip(FORMS, predicted, strict=True)
            }  # fmt: skip
        row = {
            "right": right,
            "n_classes": {half: len(data.class_names) for half, data in tests.items()},
            "fit_seconds": round(fitted - started, 1),
            "split": self._split(model, tests["base"]) if cell.seed in self.split_seeds else [],
        }
        write_json(out / "measures.json", {"fingerprint": key, "complete": True, "row": row})
        return row

    def _model(self, cell: Cell) -> ClipModel:
        if cell.kind == ZERO_SHOT:
            return self.clip
        if cell.kind != SHUFFLED:
            return stages.adapter(self.profile, self.clip, cell.task, cell.kind, cell.seed)
        data = stages.open_data(self.profile, cell.task, "train", half="base", progress=self.progress)
        return fit_adapter(
            self.clip, "maple", data, self.profile.adapters, self.folder / f"{cell.name}-adapter", seed=cell.seed,
            precision=stages.ADAPTER_PRECISION, shuffle_labels=True, progress=self.progress,
        )  # fmt: skip

    def _split(self, model: ClipModel, dataset) -> list[dict[str, Any]]:
        """The parts of a model's gain, what of its change lies outside the dictionary, and its reuse of evidence: quantity, name, value, low, high."""
        analysis = explain_gain(self.clip, model, self.sae, dataset, self.layer, progress=self.progress)
        tables = [
            analysis.split.parts().rename(columns={"part": "name", "gain": "value"}).assign(quantity="gain"),
            analysis.split.change().rename(columns={"change": "name", "outside": "value"}).assign(quantity="outside share of the change"),
            analysis.links.reuse().rename(columns={"comparison": "name", "reuse": "value"}).assign(quantity="reuse"),
        ]
        table = pd.concat(tables)[["quantity", "name", "value", "low", "high"]]
        return table.astype(object).where(table.notna(), None).to_dict("records")  # NaN is no JSON

    def _features_of(self, model: ClipModel, task: str, half: str, data) -> Tensor:
        """Image features [3 forms, N, d_embed]; the base model's are kept while the task lasts."""
        if isinstance(model, AdaptedClip) and model.changes_images:
            return feature_forms(model, self.sae, data, self.layer, progress=self.progress)
        if self._features[0] != task:
            self._features = (task, {})
        kept = self._features[1]
        if half not in kept:
            kept[half] = feature_forms(self.clip, self.sae, data, self.layer, progress=self.progress)
        return kept[half]


@torch.no_grad()
def feature_forms(clip: ClipModel, sae: SparseAutoencoder, dataset, layer: int, batch_size: int = 64, progress: bool = True) -> Tensor:
    """Image features as they are, of the reconstructed residual stream, and with the reconstruction's error kept: [3, N, d_embed]."""
    tail, parts = None, []
    for batch in batches(dataset, clip.preprocess, batch_size, progress=f"classifying {dataset.name}" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        decoded = torch.cat([sae.decode(sae.encode(part)) for part in residual.tokens.split(8)])
        forms = (residual.tokens, decoded, decoded + (residual.tokens - decoded))
        parts.append(torch.stack([tail(residual._replace(tokens=tokens)) for tokens in forms]))
    return torch.cat(parts, 1)


def tabulate(measured: Mapping[Cell, Mapping[str, Any]], averaged: Sequence[str] | None = None, n_bootstrap: int = 1000) -> pd.DataFrame:
    """The table: each task and kind over the seeds measured so far, and the average over tasks.

    Parameters
    ----------
    measured : mapping of Cell to what :meth:`Protocol.measure` gave
    averaged : sequence of str, optional
        Tasks that the average may speak of; by default all.
    n_bootstrap : int
        Resamples of the pictures of each task and half; the seeds of a cell, and all kinds, share them.

    Returns
    -------
    DataFrame
        task ("average" for the mean over the tasks that all kinds have), kind, form, half ("base", "novel", "harmonic mean"), accuracy (mean over
        seeds), low, high (over pictures), seed_sd (standard deviation over seeds; NaN with one), n_seeds, n_images, n_classes, fit_seconds
        (mean). The harmonic mean is that of the mean accuracies.

    Raises
    ------
    ValueError
        If nothing was measured.
    """
    if not measured:
        raise ValueError("Nothing was measured yet: there is no table to make.")
    records, draws, points = [], {}, {}
    keys = list(dict.fromkeys((cell.task, cell.kind) for cell in measured))
    for task, kind in keys:
        found = [row for cell, row in measured.items() if (cell.task, cell.kind) == (task, kind)]
        for form in FORMS:
            right = {half: np.array([[int(c) for c in row["right"][half][form]] for row in found], float) for half in HALVES}
            seeds = {half: values.mean(1) for half, values in right.items()}
            seeds[MEAN] = harmonic_mean(*(seeds[half] for half in HALVES))
            point = {half: values.mean() for half, values in right.items()}
            point[MEAN] = harmonic_mean(*(point[half] for half in HALVES))
            drawn = {half: resampled_means(values.mean(0), n_bootstrap, i) for i, (half, values) in enumerate(right.items())}
            drawn[MEAN] = harmonic_mean(*(drawn[half] for half in HALVES))
            for half in (*HALVES, MEAN):
                draws[task, kind, form, half], points[task, kind, form, half] = drawn[half], point[half]
                counts = [HALVES.index(half)] if half in HALVES else range(len(HALVES))
                records.append(
                    {
                        "task": task, "kind": kind, "form": form, "half": half, "accuracy": point[half], **_ends(drawn[half]),
                        "seed_sd": seeds[half].std(ddof=1) if len(found) > 1 else np.nan, "n_seeds": len(found),
                        "n_images": sum(right[HALVES[i]].shape[1] for i in counts),
                        "n_classes": sum(found[0]["n_classes"][HALVES[i]] for i in counts),
                        "fit_seconds": float(np.mean([row["fit_seconds"] for row in found])),
                    }
                )  # fmt: skip
    kinds = list(dict.fromkeys(kind for _, kind in keys))
    tasks = [task for task in dict.fromkeys(task for task, _ in keys) if all((task, kind) in keys for kind in kinds)]
    tasks = [task for task in tasks if averaged is None or task in averaged]
    for kind in kinds if len(tasks) > 1 else ():
        for form in FORMS:
            for half in (*HALVES, MEAN):
                drawn = np.mean([draws[task, kind, form, half] for task in tasks], axis=0)
                mean = float(np.mean([points[task, kind, form, half] for task in tasks]))
                seeds = min(sum((cell.task, cell.kind) == (task, kind) for cell in measured) for task in tasks)
                records.append(
                    {"task": AVERAGE, "kind": kind, "form": form, "half": half, "accuracy": mean, **_ends(drawn), "n_seeds": seeds}
                )  # fmt: skip
    return pd.DataFrame(records)


def _ends(drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def tabulate_splits(measured: Mapping[Cell, Mapping[str, Any]]) -> pd.DataFrame:
    """The second table, one row a quantity of a cell: task, kind, seed, quantity ("gain", "outside share of the change", "reuse"), name, value, low, high."""
    rows = [{**cell._asdict(), **record} for cell, row in measured.items() for record in row["split"]]
    return pd.DataFrame(rows, columns=[*Cell._fields, "quantity", "name", "value", "low", "high"])


def run(protocol: Protocol, chosen: Iterable[Cell], out: Path, commit: str) -> Iterator[tuple[Cell, dict[str, Any], pd.DataFrame]]:
    """Measure cells one after the other; both tables are written anew after each, so that nothing is lost."""
    measured = {}
    for cell in chosen:
        measured[cell] = protocol.measure(cell)
        table = tabulate(measured, protocol.profile.data.tasks)
        write_table(out, table.assign(commit=commit))
        write_table(out.with_name(SPLIT_NAME), tabulate_splits(measured).assign(commit=commit))
        yield cell, measured[cell], table


def table_path() -> Path:
    """Where the table is committed."""
    return repository_root() / TABLE


def load_protocol(path: str | Path | None = None) -> pd.DataFrame:
    """The table that ``python -m patchsae_utils.protocol`` wrote; the one of the splits lies beside it, as ``gain_split.csv``.

    Raises
    ------
    FileNotFoundError
        If there is none, with the command that makes it.
    """
    path = Path(path) if path is not None else table_path()
    if not path.exists():
        raise FileNotFoundError(f"No table of adapters at {path}: `python -m patchsae_utils.protocol` fits and measures them (four hours).")
    return pd.read_csv(path)


def load_splits(path: str | Path | None = None) -> pd.DataFrame:
    """The second table, of what the gains are made of.

    Raises
    ------
    FileNotFoundError
        If there is none, with the command that makes it.
    """
    path = Path(path) if path is not None else table_path().with_name(SPLIT_NAME)
    if not path.exists():
        raise FileNotFoundError(f"No table of gains at {path}: `python -m patchsae_utils.protocol` makes it (four hours).")
    return pd.read_csv(path)


def main(arguments: list[str] | None = None) -> None:
    """``python -m patchsae_utils.protocol``: fit and measure the adapters of a profile's tasks."""
    parser = argparse.ArgumentParser(prog="python -m patchsae_utils.protocol", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", help="name or path of a profile (default: openmoji)")
    parser.add_argument("--task", action="append", help="measure only this data set, e.g. openmoji/tools:line; may be given several times")
    parser.add_argument(
        "--kind", action="append", choices=(ZERO_SHOT, *ADAPTERS, SHUFFLED), help="measure only this adapter; may be given several times"
    )
    parser.add_argument("--seed", action="append", type=int, help="only this seed; may be given several times (default: 1, 2, 3)")
    parser.add_argument("--images", type=int, default=N_TEST, help=f"test pictures of each half of a task (default: {N_TEST})")
    parser.add_argument("--out", type=Path, help=f"the table (default: {TABLE} in the repository)")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    # Beside the ten tasks those of the notebook, in domains where CLIP is weak; they don't enter the average.
    tasks = options.task or list(dict.fromkeys([*profile.data.tasks, *profile.adapters.tasks]))
    chosen = cells(tasks, options.kind or KINDS, options.seed or SEEDS)
    out = options.out or table_path()
    protocol = Protocol(profile, clip, stages.trained_sae(profile, clip), options.images)
    for number, (cell, row, table) in enumerate(run(protocol, chosen, out, current_commit()), 1):
        means = table[(table["task"] == cell.task) & (table["kind"] == cell.kind) & (table["form"] == "raw")].set_index("half")["accuracy"]
        print(
            f"[{number}/{len(chosen)}] {cell.task} {cell.kind} seed {cell.seed}: base {means['base']:.1%}, novel {means['novel']:.1%}, "
            f"harmonic mean {means[MEAN]:.1%} (fitted in {row['fit_seconds']:.0f} s)",
            flush=True,
        )
    print(out)


if __name__ == "__main__":
    main()
