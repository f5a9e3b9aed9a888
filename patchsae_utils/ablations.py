"""Why this layer, this size, this penalty? A grid of SAEs, each of which differs from the profile's in one thing.

The counterpart of Table 2 of Lim et al. (ICLR 2025), with what their reviewers missed: centred explained variance, dead latents, seeds, and how well the
latents of each SAE find concepts whose places are known. ``make ablations`` trains and measures the grid (about an hour on two CPU cores;
it goes on where it was stopped) and writes ``benchmarks/results/ablations.csv``, one row an SAE.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from . import stages
from .activations.extraction import extract_activations
from .clip.model import ClipModel
from .concepts.detection import detect_concepts
from .concepts.grounding import ConceptPatches, concept_patches
from .config import Profile, load_profile, repository_root
from .latents.matching import matched_cosine
from .latents.reading import summarize_latents
from .run.artifacts import current_commit, fingerprint, is_current, read_json, write_json, write_table
from .sae.dictionary import sae_dictionary
from .sae.quality import evaluate_sae
from .sae.trainer import train_sae, training_log

TABLE = Path("benchmarks") / "results" / "ablations.csv"
N_TOKENS = 1_000_000
"""Tokens each SAE of the grid is trained on; the main one of the notebooks sees more."""
N_TEST = 720
N_STATISTICS = 1080
STATISTICS = ("log_frequency", "log_mean_activation", "label_entropy")
"""The three numbers of the paper's scatter; logarithms to the base 10."""
QUANTILES = (10, 25, 50, 75, 90)
"""Percent of the alive latents."""
_FORMAT = 3


class Cell(NamedTuple):
    """One SAE of the grid."""

    axis: str
    """What is varied: ``layer``, ``expansion``, ``lambda``, ..."""
    value: str
    """The value it takes here, as a figure shows it."""
    settings: Mapping[str, Any]
    """Changes to the profile, by dotted name."""

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.axis}-{self.value}".replace(" ", "_").replace("/", "-")


def grid(profile: Profile, n_layers: int) -> list[Cell]:
    """The cells for a profile: one thing varied at a time around its own settings, and each variant over a range of sparsities.

    Parameters
    ----------
    profile : Profile
    n_layers : int
        Blocks of its image tower.
    """
    training, main_layer = profile.training, profile.model.layer % n_layers
    weight = training.l1_coefficient
    cells = [Cell("seed", str(seed), {"training.seed": seed}) for seed in (0, 1, 2)]
    cells += [Cell("layer", str(layer), {"model.layer": layer}) for layer in range(n_layers) if layer != main_layer]
    cells += [Cell("expansion", f"x{n}", {"sae.expansion_factor": n}) for n in (8, 32, 64) if n != profile.sae.expansion_factor]
    cells += [Cell("lambda", f"{factor * weight:.1e}", {"training.l1_coefficient": factor * weight}) for factor in (0.25, 0.5, 2, 4)]
    cells += [
        Cell("ghost", "off", {"training.ghost": False}),
        Cell("start", "random weights", {"training.start": "random"}),
        Cell("start", "random weights without ghost", {"training.start": "random", "training.ghost": False}),
        # start="data" puts b_dec at the median itself: these belong beside "random weights".
        Cell("b_dec", "mean, random weights", {"training.start": "random", "training.b_dec_start": "mean"}),
        Cell("b_dec", "zero, random weights", {"training.start": "random", "training.b_dec_start": "zero"}),
        Cell("arithmetic", "dense float32", {"training.precision": "float32", "training.sparse": "never"}),
        Cell("tokens", "cls", {"training.tokens": "cls"}),
        Cell("tokens", "patches", {"training.tokens": "patches"}),
    ]
    for activation, ks in (("topk", (16, 32, 64)), ("batchtopk", (24, 48)), ("matryoshka", (24, 48))):
        cells += [Cell(activation, f"k {k}", {"sae.activation": activation, "sae.k": k}) for k in ks]
    for activation, weights in (("jumprelu", JUMPRELU), ("gated", GATED)):
        scaled = {"sae.activation": activation, "training.normalize": "mean_and_norm"}
        cells += [Cell(activation, f"{w:g}", {**scaled, "training.l1_coefficient": w}) for w in weights]
    return cells


JUMPRELU = (0.3, 10)
"""Weights of the number of active latents; the input is scaled to unit size, as its authors train."""
GATED = (0.1, 0.6)
"""Weights of the gate's L1, on the same scale."""


class Grid:
    """Trains and measures cells, and keeps what several cells share: the model, and the patches of one layer.

    Parameters
    ----------
    profile : Profile
        The settings that the cells vary.
    clip : ClipModel
    n_tokens : int
        Training length of every cell.
    commit : str
        Of the code that measures, noted in the rows that it makes.
    progress : bool
    """

    def __init__(self, profile: Profile, clip: ClipModel, n_tokens: int = N_TOKENS, commit: str = "", progress: bool = True):
        self.profile, self.clip, self.n_tokens, self.commit, self.progress = profile, clip, n_tokens, commit, progress
        self.folder = profile.folder("ablations")
        data = profile.data
        self.test = stages.open_data(profile, data.evaluation, "test", min(N_TEST, data.n_evaluation_images or N_TEST))
        n_statistics = min(N_STATISTICS, data.n_statistics_images or N_STATISTICS)
        self.labelled = stages.open_data(profile, data.statistics, "train", n_statistics)
        self._patches: tuple[int, list[ConceptPatches] | None] = (-1, None)

    def row(self, cell: Cell) -> dict[str, Any]:
        """Train a cell's SAE, or open it, and measure it: one row of the table. What was measured before is read, not measured again."""
        profile = _changed(self.profile, {**self._common(), **cell.settings})
        layer = self.clip.layer_index(profile.model.layer)
        out = self.folder / cell.name
        key = fingerprint(
            stage="ablations", format=_FORMAT, clip=self.clip.fingerprint, data=profile.data.choice(), sae=profile.sae, training=profile.training,
            layer=layer,
        )  # fmt: skip
        if is_current(out, key, "measures.json"):
            return read_json(out / "measures.json")["row"]
        started = time.perf_counter()
        sae = self._train(profile, layer, out)
        row = {
            "axis": cell.axis, "value": cell.value, "layer": layer, "expansion": profile.sae.expansion_factor, "activation": profile.sae.activation,
            "k": profile.sae.k, "l1_coefficient": profile.training.l1_coefficient, "tokens": profile.training.tokens,
            "seed": profile.training.seed, "n_training_tokens": profile.training.n_tokens, **self._quality(sae, layer), **self._concepts(sae, layer),
            **self._statistics(sae, layer, profile.training.tokens), **(self._stability(sae) if cell.axis == "seed" and cell.value != "0" else {}),
            "dead_in_training": float(training_log(out)["dead_fraction"].iloc[-1]), "seconds": round(time.perf_counter() - started, 1),
            "commit": self.commit,
        }  # fmt: skip
        write_json(out / "measures.json", {"fingerprint": key, "complete": True, "row": row})
        return row

    def _common(self) -> dict[str, Any]:
        """What all cells share: their length, and that only active latents are computed, which is faster at every size here."""
        return {"training.n_tokens": self.n_tokens, "training.sparse": "always"}

    def _train(self, profile: Profile, layer: int, out: Path):
        return train_sae(stages.fresh_sae(profile, self.clip), self._store(profile, layer), profile.training, out, progress=self.progress)

    def _store(self, profile: Profile, layer: int):
        if layer == self.clip.layer_index(self.profile.model.layer):
            return stages.training_store(self.profile, self.clip)
        return extract_activations(self.clip, stages.training_data(profile), layer, self.folder / "activations" / f"layer-{layer}")

    def _quality(self, sae, layer: int) -> dict[str, float]:
        table = evaluate_sae(self.clip, sae, self.test, layer, progress=False)
        found = table[table["variant"] == "reconstruction"].set_index(["tokens", "metric"])
        row: dict[str, float] = {}
        for tokens in ("all", "cls", "patch"):
            for metric in ("explained_variance", "l0"):
                row |= {f"{metric}_{tokens}{end}": found.loc[(tokens, metric), column] for end, column in _ENDS.items()}
        for metric in ("mse", "l1", "dead_fraction", "contrastive_loss", "zero_shot_change"):
            ends = {"": "value"} if metric == "dead_fraction" else _ENDS
            row |= {f"{metric}{end}": found.loc[("all", metric), column] for end, column in ends.items()}
        return {name: float(value) for name, value in row.items()}

    def _statistics(self, sae, layer: int, tokens: str) -> dict[str, float]:
        """Quantiles over alive latents of the three numbers of the paper's scatter; of the tokens that the SAE was trained on."""
        summary = summarize_latents(self.clip, sae, self.labelled, layer, tokens=tokens, progress=False)
        alive = ~summary.dead
        if not alive.any():
            return {}
        values = (summary.frequency[alive].log10(), summary.mean_activation[alive].log10(), summary.label_entropy[alive])
        found = {name: np.percentile(each.double().cpu().numpy(), QUANTILES) for name, each in zip(STATISTICS, values, strict=True)}
        return {f"{name}_q{q}": float(value) for name, each in found.items() for q, value in zip(QUANTILES, each, strict=True)}

    def _stability(self, sae) -> dict[str, float]:
        """Matched cosine with the SAE of seed 0."""
        settings = {**self._common(), "training.seed": 0}
        first = self._train(_changed(self.profile, settings), self.clip.layer_index(self.profile.model.layer), self.folder / "seed-0")
        found = matched_cosine(first, sae)
        return {
            "matched_cosine": found.mean.value, "matched_cosine_low": found.mean.low, "matched_cosine_high": found.mean.high,
            "matched_cosine_random": found.random_mean,
        }  # fmt: skip

    def _concepts(self, sae, layer: int) -> dict[str, float]:
        if self._patches[0] != layer:
            scenes = [stages.concept_scenes(self.profile, split) for split in ("val", "test")]
            patches = None if None in scenes else [concept_patches(self.clip, each, layer, progress=False) for each in scenes]
            self._patches = (layer, patches)
        if self._patches[1] is None:
            return {}
        report = detect_concepts([sae_dictionary(sae)], *self._patches[1], n_bootstrap=200, progress=False)
        table = report.table().set_index("kind")
        row: dict[str, float] = {}
        for kind, values in table.iterrows():
            row |= {f"{kind}_ap": float(values["ap"]), f"{kind}_ap_low": float(values["low"]), f"{kind}_ap_high": float(values["high"])}
        return row


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _changed(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """A profile with settings changed, given by dotted name."""
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        profile = dataclasses.replace(profile, **{section: dataclasses.replace(getattr(profile, section), **{setting: value})})
    return profile


def run(grid_: Grid, cells: Iterable[Cell], out: Path) -> Iterator[dict[str, Any]]:
    """Measure cells one after the other; the table is written anew after each, so that nothing is lost."""
    rows = []
    for cell in cells:
        rows.append(grid_.row(cell))
        write_table(out, pd.DataFrame(rows))
        yield rows[-1]


def table_path(profile: Profile) -> Path:
    """Where a profile's table lies: the default one's is committed, others' are kept in ``runs/<profile>/ablations``."""
    return repository_root() / TABLE if profile.is_default else profile.folder("ablations") / TABLE.name


def load_ablations(path: str | Path | None = None, *, profile: Profile | None = None) -> pd.DataFrame:
    """The table that ``make ablations`` wrote, one row an SAE.

    Parameters
    ----------
    path : path, optional
        Default: :func:`table_path` of the profile.
    profile : Profile, optional
        Default: the one that ``$PATCHSAE_PROFILE`` and ``$PATCHSAE_SET`` choose.

    Raises
    ------
    FileNotFoundError
        If there is none, with the command that makes it.
    """
    path = Path(path) if path is not None else table_path(profile or load_profile())
    if not path.exists():
        raise FileNotFoundError(f"No table of ablations at {path}: `make ablations` trains and measures the grid (about an hour).")
    return pd.read_csv(path)


def at_matched_l0(table: pd.DataFrame, l0: float, measures: Sequence[str] = ("explained_variance_all", "object_ap")) -> pd.DataFrame:
    """What each variant reaches where as many latents are active: along its sparsities, linear in the logarithm of L0.

    Parameters
    ----------
    table : DataFrame
        As :func:`frontier` gives it.
    l0 : float
        Active latents a token.
    measures : sequence of str
        Columns.

    Returns
    -------
    DataFrame
        Index: activation; the measures. NaN where none of a variant's SAEs is as sparse, or as dense.
    """
    found = {}
    for activation, rows in table.groupby("activation", sort=False):
        rows = rows.groupby("l0_all")[list(measures)].mean()
        place = np.log(rows.index.to_numpy())
        found[activation] = {name: np.interp(np.log(l0), place, rows[name], left=np.nan, right=np.nan) for name in measures}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("activation")


def frontier(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of SAEs that read the same tokens at the main layer and size, for a picture of reconstruction against sparsity: by variant, from sparse to dense.

    The ReLU's points are the runs of the main setting and those that vary lambda.
    """
    main = table[table["axis"] == "seed"].iloc[0]
    same = table[(table["layer"] == main["layer"]) & (table["expansion"] == main["expansion"]) & (table["tokens"] == main["tokens"])]
    variants = same[~same["axis"].isin(["ghost", "start", "b_dec", "arithmetic"])]
    return variants.sort_values(["activation", "l0_all"])


def main(arguments: list[str] | None = None) -> None:
    """``python -m patchsae_utils.ablations``: train and measure the grid of a profile."""
    parser = argparse.ArgumentParser(prog="python -m patchsae_utils.ablations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", help="name or path of a profile (default: openmoji)")
    parser.add_argument(
        "--axis", action="append", help="measure only cells of this axis; may be given several times; the table then holds these alone"
    )
    parser.add_argument(
        "--n-tokens", type=lambda text: int(float(text)), default=N_TOKENS, help="training tokens of every cell (default: 1e6)"
    )
    parser.add_argument("--out", type=Path, help=f"the table (default: {TABLE} in the repository, or runs/<profile>/ablations)")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    cells = grid(profile, clip.n_layers)
    axes = list(dict.fromkeys(cell.axis for cell in cells))
    if unknown := set(options.axis or ()) - set(axes):
        parser.error(f"unknown axis {sorted(unknown)[0]!r}; valid: {', '.join(axes)}")
    cells = [cell for cell in cells if not options.axis or cell.axis in options.axis]
    out = options.out or table_path(profile)
    for number, row in enumerate(run(Grid(profile, clip, options.n_tokens, current_commit()), cells, out), 1):
        print(
            f"[{number}/{len(cells)}] {row['axis']} {row['value']}: EV {row['explained_variance_all']:.3f}, L0 {row['l0_all']:.1f}, "
            f"dead {row['dead_fraction']:.1%}, object AP {row.get('object_ap', float('nan')):.3f} ({row['seconds']:.0f} s)",
            flush=True,
        )  # fmt: skip
    print(out)


if __name__ == "__main__":
    main()
