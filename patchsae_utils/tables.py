"""The tables that ``make ablations`` and ``python -m experiments.protocol``, ``.novelty`` and ``.twin`` write, read.

Their counterparts in Lim et al. (ICLR 2025) are Table 2, Fig. 9 (layers) and Fig. 8 (CLS alone).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .config import Profile, repository_root
from .run.intervals import Interval, percent

STATISTICS = ("log_frequency", "log_mean_activation", "label_entropy")  # of the paper's scatter; logarithms to the base 10
QUANTILES = (10, 25, 50, 75, 90)  # percent of the alive latents
ZERO_SHOT, SHUFFLED = "zero-shot", "maple, shuffled labels"
MEAN, AVERAGE = "harmonic mean", "average"  # of both halves of the classes; and the task name of the rows over all tasks
_AP = ["object_ap", "object_ap_low", "object_ap_high"]


def table_path(profile: Profile, name: str) -> Path:
    """Where a profile's table lies: the default one's is committed, others' are kept in ``runs/<profile>/experiments``."""
    folder = repository_root() / "experiments" / "results" if profile.is_default else profile.folder("experiments")
    return folder / f"{name}.csv"


def load_table(profile: Profile, name: str) -> pd.DataFrame | None:
    """One of the tables "ablations", "adaptation", "gain_split", "novelty" and "twin"; None where the profile has none yet."""
    path = table_path(profile, name)
    return read_table(path) if path.exists() else None


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])  # "null" is a kind of control


def load_benchmark(name: str) -> dict[str, Any]:
    """What a command of ``benchmarks/`` measured, as it is committed."""
    return json.loads((repository_root() / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def frontier(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the variants by the main recipe, with the main setting itself, and of the paper's recipe: by ``variant``, from sparse to dense."""
    main = _main(table).iloc[:1]
    rows = pd.concat([main.assign(axis=main["activation"]), table[table["axis"].isin([*table["activation"].unique(), "paper"])]])
    return rows.rename(columns={"axis": "variant"}).sort_values(["variant", "l0_all"])


def at_matched_l0(rows: pd.DataFrame, l0: float) -> pd.DataFrame:
    """What each variant of :func:`frontier` reaches at ``l0`` active latents, linear in log L0; NaN beyond its sparsest and densest SAE."""
    found = {}
    for variant, runs in rows.groupby("variant", sort=False):
        runs = runs.groupby("l0_all")[["explained_variance_all", "object_ap"]].mean()
        place = np.log(runs.index.to_numpy())
        found[variant] = {name: np.interp(np.log(l0), place, runs[name], left=np.nan, right=np.nan) for name in runs}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("variant")


def frontier_sentence(rows: pd.DataFrame, l0: float) -> str:
    """Of :func:`frontier`: the variants where they are as sparse, the SAE that finds objects best, and the dead latents that each leaves."""
    equal, best = at_matched_l0(rows, l0).dropna().sort_values("object_ap", ascending=False), rows.loc[rows["object_ap"].idxmax()]
    each = ", ".join(f"{name} {row.explained_variance_all:.1%} and {row.object_ap:.2f}" for name, row in equal.iterrows())
    trained, unseen = (rows.groupby("variant")[name].agg(["min", "max"]) for name in ("dead_in_training", "dead_fraction"))
    left = ", ".join(
        f"{name} {row['min']:.0%} to {row['max']:.0%} ({unseen.loc[name, 'min']:.0%} to {unseen.loc[name, 'max']:.0%})"
        for name, row in trained.sort_values("max").iterrows()
    )
    return (
        f"At {l0:.0f} active latents per token (the main setting's), explained variance and object AP are: {each}. Of all, {best['variant']} with "
        f"{best['l0_all']:.0f} latents finds objects best ({best['object_ap']:.2f}, at {best['explained_variance_all']:.0%} of the variance). "
        f"Dead when training ends (and on unseen pictures) are: {left}."
    )


def ablation_sentence(table: pd.DataFrame) -> str:
    """The table of ablations in words: which changes of the main setting find objects better or worse than all of its seeds do."""
    main = _main(table)
    rest = table[~table["axis"].isin(["seed", *table["activation"].unique()])].sort_values("object_ap")
    changes = [f"{row.axis} {row.value} ({row.object_ap:.2f})" for row in rest.itertuples()]
    better, worse = rest["object_ap_low"] > main["object_ap"].max(), rest["object_ap_high"] < main["object_ap"].min()
    above, below = (", ".join(np.array(changes, dtype=object)[which]) or "none" for which in (better, worse))
    seeds = f"{len(main)} seeds: {main['object_ap'].min():.2f} to {main['object_ap'].max():.2f}"
    return f"The main setting finds objects with a mean AP of {main['object_ap'].mean():.2f} ({seeds}). Above all of these: {above}. Below: {below}."


def by_axis(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """One row a "layer", or kind of "tokens", in order: the main setting's SAE (its first seed) and those that differ from it in that alone."""
    rows = pd.concat([_main(table).iloc[:1], table[table["axis"] == axis]])
    rows = rows.assign(main=rows["axis"] == "seed").sort_values(axis)
    return rows[[axis, "main", *(f"{name}_q{q}" for name in STATISTICS for q in QUANTILES), *_AP]].reset_index(drop=True)


def _main(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the main setting, one a seed."""
    main = table[table["axis"] == "seed"]
    if main.empty:
        raise ValueError("The table of ablations lacks any row of axis 'seed', the main setting. `make ablations` writes it anew.")
    return main


def planted_and_found(table: pd.DataFrame, method: str = "combined") -> dict[str, float]:
    """Of the table "novelty", pooled over controls: ``planted_recall``, ``planted_precision``, and the ``null_new_share`` of latents."""
    rows = table[table["method"] == method]
    new, null = rows[(rows["kind"] == "new") & (rows["planted"] > 0)], rows[rows["kind"] == "null"]
    right = (new["precision"].fillna(0) * new["called"]).sum()
    parts = {"planted_recall": (new["found"].sum(), new["planted"].sum()), "planted_precision": (right, new["called"].sum())}
    parts["null_new_share"] = (null["called"].sum(), null["candidates"].sum())
    return {name: float(part / whole) if whole else np.nan for name, (part, whole) in parts.items()}


def novelty_sentence(table: pd.DataFrame) -> str:
    """What the table "novelty" says of the combined verdict, what bounds it, and what the split's part outside the dictionary can't tell."""
    alone = table["control"] == "planted directions"
    directions, things, held = (
        planted_and_found(rows, method)
        for rows, method in ((table[alone], "combined"), (table[~alone], "combined"), (table[~alone], "any latent"))
    )
    share = table[table["method"] == "split of the gain"].groupby("kind")["new_share"].agg(["min", "max"])
    known, new = (f"{share.loc[kind, 'min']:.0%} to {share.loc[kind, 'max']:.0%}" for kind in ("null", "new"))
    return (
        f"Of directions planted in the adapted model's stream alone, the combined verdict finds {directions['planted_recall']:.0%}, and "
        f"{directions['planted_precision']:.0%} of what it calls new is planted. Where nothing is new it calls {things['null_new_share']:.1%} of "
        f"the latents new. Of the unseen objects and signs that fine-tuning learned it finds {things['planted_recall']:.0%} "
        f"({held['planted_recall']:.0%} have a latent at all): CLIP's own stream, which sees them as well, predicts most of these latents as well "
        f"as the adapted one does. Outside the dictionary lie {known} of the gain where nothing is new, and {new} where something is: that share "
        "alone does not tell one from the other."
    )


def twin_sentence(table: pd.DataFrame) -> str:
    """What the table "twin" says of a CLIP whose patches were taught, and of one that learned from captions alone."""
    said = {
        "zero-shot": ("classes", "classifies {} of the pictures"),
        "token probe": ("patch", "a probe reads the object from {} of its patches"),
    }
    words = []
    for name, rows in table.groupby("clip", sort=False):
        numbers = rows.set_index(["measure", "of"])[["value", "low", "high"]]
        parts = [text.format(percent(*numbers.loc[measure, of])) for measure, (of, text) in said.items()]
        found = [Interval(*numbers.loc["AP", f"{dictionary}, object"]) for dictionary in ("SAE", "random SAE", "linear probe")]
        aps = "best latents find objects with an AP of {}, a random SAE's with {}, probes with {}".format(*found)
        words.append(f"{name}: CLIP {parts[0]}, {parts[1]}; {aps}")
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."
