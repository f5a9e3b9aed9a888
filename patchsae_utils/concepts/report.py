"""What a detection of concepts found: tables with intervals, the numbers to quote, a sentence, and the report on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ..run.artifacts import atomic_folder, read_folder_manifest, write_folder_manifest
from ..run.intervals import Interval, drawn_interval

FORMAT_VERSION = 4
OWN = ("activations", "dense")  # how a dictionary is read where nothing else is said


@dataclass(frozen=True, eq=False)
class ComparisonReport:
    """How well each dictionary's best feature finds each concept, on scenes that it was not chosen on.

    Intervals are of the reported images, 95%, centred on the value. What is resampled is the report, not the choice.
    """

    detection: pd.DataFrame
    """One row a dictionary, way of reading and concept: dictionary, role ("sae", "control", "baseline" or "ceiling"), concept, kind, name,
    latent (chosen on other scenes), ap_choose, ap, chance (share of patches that show it), n_patches, n_images, readout, l0,
    explained_variance."""
    replicates: np.ndarray
    """[rows, R] average precision in R resamples of the reported images, the same for every row; NaN where no image shows the concept."""
    sae: str = field(default="", kw_only=True)
    """The SAE's fingerprint; empty where it is not known."""

    @property
    def frame(self) -> pd.DataFrame:
        """The fair table, by kind of concept ("all" last): dictionary, role, readout, l0, explained_variance, kind, n_concepts, ap, low,
        high, chance.

        ``readout``: see ``Competitor``; "probe of 2" and "probe of 5" (features) of all. L0 and variance are NaN where no tokens are
        written.
        """
        rows = []
        for (name, role, readout), mine in self.detection.groupby(["dictionary", "role", "readout"], sort=False):
            same = [name, role, readout, *mine[["l0", "explained_variance"]].iloc[0]]
            for kind, group in [*mine.groupby("kind", sort=False), ("all", mine)]:
                ap = self._interval(group["ap"].mean(), _mean(self.replicates[group.index]))
                rows.append([*same, kind, len(group), ap.value, ap.low, ap.high, group["chance"].mean()])
        columns = ["dictionary", "role", "readout", "l0", "explained_variance", "kind", "n_concepts", "ap", "low", "high", "chance"]
        return pd.DataFrame(rows, columns=columns)

    def table(self) -> pd.DataFrame:
        """Mean average precision, each dictionary read in its own way: the rows of :attr:`frame` that say so."""
        return self.frame.query("readout in @OWN").reset_index(drop=True)

    def coverage(self, thresholds: Sequence[float]) -> pd.DataFrame:
        """Share of concepts found with an AP above each threshold: dictionary, role, threshold, n_concepts, share, low, high."""
        rows = []
        for (name, role), group in self._own.groupby(["dictionary", "role"], sort=False):
            draws, ap = self.replicates[group.index], group["ap"].to_numpy()
            for threshold in thresholds:
                share = self._interval((ap > threshold).mean(), _mean(np.where(np.isnan(draws), np.nan, draws > threshold)))
                rows.append([name, role, float(threshold), len(group), share.value, *np.clip(share[1:3], 0, 1)])
        return pd.DataFrame(rows, columns=["dictionary", "role", "threshold", "n_concepts", "share", "low", "high"])

    def ratio(self, kind: str = "all", to: str = "best baseline") -> tuple[Interval, str]:
        """Mean AP of the SAE over that of another dictionary, each read in its own way, on the same resamples, and the other's name.

        ``to`` is a name, "best baseline" or "ceiling". Which baseline is best is decided on the reported images: that favours it.
        """
        mine = self._own if kind == "all" else self._own[self._own["kind"] == kind]
        if mine.empty:
            raise ValueError(f"No concepts of kind {kind!r}. Valid: all, {', '.join(self.detection['kind'].unique())}.")
        means = mine.groupby(["role", "dictionary"], sort=False)["ap"].mean()
        if to in ("best baseline", "ceiling"):
            to = means[to.split()[-1]].idxmax()
        if to not in means.index.get_level_values(1):
            raise ValueError(f"No dictionary {to!r} in the report. Valid: {', '.join(means.index.get_level_values(1))}.")
        ours, theirs = (mine[mine["dictionary"] == name] for name in (means["sae"].index[0], to))
        draws = _mean(self.replicates[ours.index]) / _mean(self.replicates[theirs.index])
        return self._interval(ours["ap"].mean() / theirs["ap"].mean(), draws), to

    def headline(self) -> dict[str, float | str]:
        """The numbers to quote, for all concepts and for objects: ``ap_sparse``, ``ap_cosine``, ``l0`` and the rest, as plain values."""
        means = self._own.groupby(["role", "dictionary"], sort=False)["ap"].mean()
        every = self.frame.query("kind == 'all'").set_index(["dictionary", "readout"])
        sae = means["sae"].index[0]
        found: dict[str, float | str] = {"n_concepts": int(self.detection["concept"].nunique()), "mean_ap_sae": float(means["sae"].iloc[0])}
        quoted = {"sparse": (sae, "activations"), "pre_activations": (sae, "pre-activations"), "cosine": (sae, "cosine")}
        quoted |= {"kmeans_cosine": ("k-means, cosine", "dense"), "kmeans_nearest": ("k-means, cosine", "nearest")}
        found |= {f"ap_{name}": float(every.loc[row, "ap"]) for name, row in quoted.items() if row in every.index}
        found |= {name: float(every.loc[sae, name].iloc[0]) for name in ("l0", "explained_variance")}
        for role, to, key in (("baseline", "best baseline", "best_baseline"), ("ceiling", "ceiling", "probe")):
            for kind in ("all", "object"):
                if role not in means.index or (kind == "object" and "object" not in set(self.detection["kind"])):
                    continue
                ratio, name = self.ratio(kind, to)
                start = f"ap_ratio_to_{key}" if kind == "all" else f"object_ap_ratio_to_{key}"
                found |= {start: ratio.value, f"{start}_low": ratio.low, f"{start}_high": ratio.high}
                if kind == "all":
                    found |= {to.replace(" ", "_"): name, f"mean_ap_{key}": float(means[role, name])}
        return found

    def sentence(self) -> str:
        """The comparison over all concepts in words, each dictionary read in its own way."""
        table = self.table().query("kind == 'all'").sort_values("ap", ascending=False)
        say = {row.dictionary: str(Interval(row.ap, row.low, row.high)) for row in table.itertuples()}
        sae = table.loc[table["role"] == "sae", "dictionary"].iloc[0]
        (best, name), (ceiling, _) = self.ratio(), self.ratio(to="ceiling")
        others = "; ".join(f"{other} {ap}" for other, ap in say.items() if other != sae)
        return (
            f"Over {table['n_concepts'].iloc[0]} concepts the best latent reaches an AP of {say[sae]} on average. The others: {others}. "
            f"That is {best} times the best unsupervised baseline ({name}) and {ceiling.value:.0%} of the supervised probe."
        )

    def readouts(self) -> pd.DataFrame:
        """Mean AP over all concepts, as text with its interval, L0 and explained variance: a row a dictionary, a column a read-out."""
        frame = self.frame.query("kind == 'all'")
        frame = frame.assign(said=[str(Interval(*row)) for row in frame[["ap", "low", "high"]].itertuples(index=False)])
        known = frame[frame["readout"].isin(OWN)].set_index("dictionary")[["l0", "explained_variance"]]
        known = known.round({"l0": 0, "explained_variance": 2})
        table = frame.pivot(index="dictionary", columns="readout", values="said").reindex(known.index)[frame["readout"].unique()]
        return known.join(table).fillna("").rename_axis(None)

    def losses(self) -> str:
        """In words: by read-out, the kinds of concept of which another dictionary, read in the same way, is a better detector, and the best of them."""
        frame, found = self.frame, []
        sae = frame.loc[frame["role"] == "sae", "dictionary"].iloc[0]
        ours = frame[frame["dictionary"] == sae]
        text = f"The SAE uses {ours['l0'].iloc[0]:.0f} latents per token and explains {ours['explained_variance'].iloc[0]:.0%} of the variance. "
        comparable = frame[(frame["role"] != "ceiling") & frame["readout"].isin(ours["readout"]) & (frame["kind"] != "all")]
        for way, rows in comparable.groupby("readout", sort=False):
            mine = rows[rows["dictionary"] == sae].set_index("kind")
            better = rows[rows["low"] > rows["kind"].map(mine["high"])].sort_values("ap", ascending=False).drop_duplicates("kind")
            said = [f"{row.kind} to {row.dictionary} ({row.ap:.2f} against {mine.loc[row.kind, 'ap']:.2f})" for row in better.itertuples()]
            found += [f"{way}: {', '.join(said)}"] if said else []
        return text + (f"It loses, with intervals apart, by {'; by '.join(found)}." if found else "It loses nowhere with intervals apart.")

    @property
    def _own(self) -> pd.DataFrame:
        return self.detection.query("readout in @OWN")

    def save(self, folder: str | Path, key: str = "") -> None:
        """Write the tables, the replicates and a manifest with the fingerprint of the inputs, atomically."""
        with atomic_folder(folder) as temporary:
            for name, part in ((each.name, getattr(self, each.name)) for each in fields(self)):
                if isinstance(part, pd.DataFrame):
                    part.to_csv(temporary / f"{name}.csv", index=False)
            np.save(temporary / "replicates.npy", self.replicates, allow_pickle=False)
            write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": key, "complete": True, "sae": self.sae})

    @classmethod
    def load(cls, folder: str | Path):
        """Read what :meth:`save` wrote; another format version, or a damaged file, is a ``ValueError``."""
        folder = Path(folder)
        version = (manifest := read_folder_manifest(folder)).get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder} has format version {version}, expected {FORMAT_VERSION}. Delete the folder and measure again.")
        numbers = {"l0": [""], "explained_variance": [""]}
        tables = {path.stem: pd.read_csv(path, keep_default_na=False, na_values=numbers) for path in folder.glob("*.csv")}
        return cls(**tables, replicates=np.load(folder / "replicates.npy", allow_pickle=False), sae=manifest.get("sae", ""))

    def _interval(self, value: float, draws: np.ndarray) -> Interval:
        return drawn_interval(value, draws, "images", centred=True)


@dataclass(frozen=True, eq=False)
class ConceptReport(ComparisonReport):
    """Which concepts an SAE's latents find, and which concept each latent answers to."""

    latents: pd.DataFrame
    """One row a latent: latent, concept, runner_up, score_choose, margin, score (on held-out scenes), p."""


def _mean(draws: np.ndarray) -> np.ndarray:
    """Mean over rows [m, R] in every resample, of those that have a value there."""
    with np.errstate(invalid="ignore"):
        return np.nansum(draws, 0, dtype=np.float64) / (~np.isnan(draws)).sum(0)
