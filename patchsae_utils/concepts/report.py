"""What :func:`patchsae_utils.concepts.detection.measure_concepts` found: tables with intervals, the numbers to quote, and the report on disk."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..run.artifacts import atomic_folder, read_folder_manifest, write_folder_manifest
from ..run.intervals import centred_interval

FORMAT_VERSION = 1
_KEYS = {"SAE": "sae", "single dimensions": "best_dimension", "random SAE": "random_sae"}  # in results


class ConceptReport(NamedTuple):
    """Which concepts the latents find, beside baselines, and which concept each latent answers to."""

    detection: pd.DataFrame
    """One row a dictionary and concept: dictionary, concept, kind, name, latent (the best, chosen on other scenes), ap_choose, ap, chance
    (share of patches that show it), n_patches, n_images."""
    replicates: np.ndarray
    """[rows of detection, R] average precision under R reweightings of the reported images, the same for every row."""
    latents: pd.DataFrame
    """One row a latent: latent, concept, runner_up, score_choose, margin, score (on held-out scenes), p, n_patches (where it is active)."""

    def table(self, by: str = "kind") -> pd.DataFrame:
        """Mean average precision by dictionary and kind of concept, with 95 % intervals (Bayesian bootstrap over images, centred
        on the value).

        Returns
        -------
        DataFrame
            dictionary, kind, n_concepts, ap, low, high, chance.
        """
        rows = []
        for (name, kind), group in self.detection.groupby(["dictionary", by], sort=False):
            low, high = centred_interval(np.nanmean(self.replicates[group.index], 0), group["ap"].mean())
            rows.append(
                {
                    "dictionary": name,
                    by: kind,
                    "n_concepts": len(group),
                    "ap": group["ap"].mean(),
                    "low": low,
                    "high": high,
                    "chance": group["chance"].mean(),
                }
            )
        return pd.DataFrame(rows)

    def headline(self, kind: str = "object") -> dict[str, float | str]:
        """The numbers to quote for one kind of concept: mean AP of each dictionary, and :meth:`ratio`."""
        mine = self.detection[self.detection["kind"] == kind]
        ap = mine.groupby("dictionary", sort=False)["ap"].mean()
        numbers = {f"mean_{kind}_ap_{_KEYS.get(name, name)}": value for name, value in ap.items()}
        ratio = self.ratio(kind)
        return numbers | {
            "ap_ratio_to_best_baseline": ratio["ratio"],
            "ap_ratio_low": ratio["low"],
            "ap_ratio_high": ratio["high"],
            "best_baseline": ratio["baseline"],
        }

    def coverage(self, threshold: float = 0.5) -> pd.DataFrame:
        """Share of concepts that some feature of each dictionary finds with an AP above ``threshold``.

        Returns
        -------
        DataFrame
            dictionary, n_concepts, share, low, high (95 % interval, Bayesian bootstrap over images).
        """
        rows = []
        for name, group in self.detection.groupby("dictionary", sort=False):
            share = (group["ap"] > threshold).mean()
            low, high = np.clip(centred_interval((self.replicates[group.index] > threshold).mean(0), share), 0, 1)
            rows.append({"dictionary": name, "n_concepts": len(group), "share": share, "low": low, "high": high})
        return pd.DataFrame(rows)

    def ratio(self, kind: str = "object") -> dict[str, float]:
        """Mean AP of the first dictionary over that of the best other one: ratio, low, high (95 %, paired) and baseline.

        Which baseline is best is decided once, on the reported images themselves: that favours the baseline.
        """
        mine = self.detection[self.detection["kind"] == kind]
        means = mine.groupby("dictionary", sort=False)["ap"].mean()
        first, others = means.index[0], means.iloc[1:]
        best = others.idxmax()
        over = [np.nanmean(self.replicates[mine.index[mine["dictionary"] == name]], 0) for name in (first, best)]
        low, high = centred_interval(over[0] / over[1], means[first] / means[best])
        return {"ratio": means[first] / means[best], "low": low, "high": high, "baseline": best}


def save_report(report: ConceptReport, folder: str | Path, fp: str = "") -> None:
    """Write detection.csv, latents.csv, replicates.npy and manifest.json, atomically."""
    with atomic_folder(folder) as temporary:
        report.detection.to_csv(temporary / "detection.csv", index=False)
        report.latents.to_csv(temporary / "latents.csv", index=False)
        np.save(temporary / "replicates.npy", report.replicates, allow_pickle=False)
        write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True})


def load_report(folder: str | Path) -> ConceptReport:
    """Read what :func:`save_report` wrote.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If one is damaged, or another format version wrote them.
    """
    folder = Path(folder)
    missing = [name for name in ("detection.csv", "latents.csv", "replicates.npy", "manifest.json") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no concept report: {', '.join(missing)} missing. Make one: measure_concepts(..., out={str(folder)!r})."
        )
    version = read_folder_manifest(folder).get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}; this package reads {FORMAT_VERSION}. Delete the folder and measure again."
        )
    frames = [pd.read_csv(folder / f"{name}.csv", keep_default_na=False) for name in ("detection", "latents")]
    return ConceptReport(frames[0], np.load(folder / "replicates.npy", allow_pickle=False), frames[1])
