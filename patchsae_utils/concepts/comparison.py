"""The SAE against everything else: one table of how well the best feature of each dictionary finds each ground-truth concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data.dataset import dataset_fingerprint
from ..run.artifacts import atomic_folder, fingerprint, is_current, read_folder_manifest, write_folder_manifest
from ..run.intervals import centred_interval
from ..sae.dictionary import NEEDS_NO_THRESHOLD, Dictionary, dimensions, random_sae, sae_dictionary
from .baselines import ica_dictionary, kmeans_dictionary, nmf_dictionary, pca_dictionary, random_weights_sae, sample_patches
from .detection import common_concepts, compete, read_patches
from .grounding import ConceptPatches, concept_patches
from .probes import fit_probes

FORMAT_VERSION = 1
ROLES = ("sae", "baseline", "ceiling")
_MATERIALIZE = 2**27  # activations of a whole set are computed once where they are fewer


class Competitor(NamedTuple):
    """One dictionary in the comparison."""

    dictionary: Dictionary
    role: str = "baseline"
    """"sae", "baseline", or "ceiling" (supervised: feature k belongs to concept k)."""
    choose: ConceptPatches | None = None
    report: ConceptPatches | None = None
    """Patches of its own, when it reads another model: of the same scenes, in the same order."""


class ComparisonReport(NamedTuple):
    """How well each dictionary's best feature finds each concept, on scenes that it was not chosen on."""

    detection: pd.DataFrame
    """One row a dictionary and concept: dictionary, role, concept, kind, name, latent, ap_choose, ap, chance, n_patches, n_images."""
    replicates: np.ndarray
    """[rows, R] average precision under R reweightings of the reported images, the same for every row."""

    @property
    def main(self) -> str:
        """The first SAE."""
        return self._names("sae")[0]

    def table(self, by: str = "kind") -> pd.DataFrame:
        """Mean average precision by dictionary and kind of concept and over all concepts, 95 % intervals by the Bayesian bootstrap over images,
        centred on the value.

        Returns
        -------
        DataFrame
            dictionary, role, kind ("all" last), n_concepts, ap, low, high, chance.
        """
        rows = []
        for name, mine in self.detection.groupby("dictionary", sort=False):
            for kind, group in [*mine.groupby(by, sort=False), ("all", mine)]:
                low, high = centred_interval(np.nanmean(self.replicates[group.index], 0), group["ap"].mean())
                rows.append(
                    {
                        "dictionary": name, "role": mine["role"].iloc[0], by: kind, "n_concepts": len(group), "ap": group["ap"].mean(),
                        "low": low, "high": high, "chance": group["chance"].mean(),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def ratio(self, kind: str = "all", to: str = "best baseline", sae: str | None = None) -> dict[str, float | str]:
        """Mean AP of an SAE over that of another dictionary, with a paired 95 % interval.

        Parameters
        ----------
        kind : str
            Family of concepts, or "all".
        to : str
            A dictionary's name, "best baseline" or "ceiling". Which baseline is best is decided once, on the reported images themselves:
            that favours the baseline.
        sae : str, optional
            Default: the first.

        Returns
        -------
        dict
            ratio, low, high, to (the dictionary's name), kind, n_concepts.

        Raises
        ------
        ValueError
            If there is no such dictionary or kind.
        """
        mine = self.detection if kind == "all" else self.detection[self.detection["kind"] == kind]
        if mine.empty:
            raise ValueError(f"No concepts of kind {kind!r}. Valid: all, {', '.join(self.detection['kind'].unique())}.")
        means = mine.groupby("dictionary", sort=False)["ap"].mean()
        if to == "best baseline":
            to = means[self._names("baseline")].idxmax()
        elif to == "ceiling":
            to = self._names("ceiling")[0]
        over = []
        for name in (sae or self.main, to):
            if name not in means.index:
                raise ValueError(f"No dictionary {name!r} in the report. Valid: {', '.join(means.index)}.")
            over.append((means[name], np.nanmean(self.replicates[mine.index[mine["dictionary"] == name]], 0)))
        (first, draws), (second, others) = over
        low, high = centred_interval(draws / others, first / second)
        n = int((mine["dictionary"] == to).sum())
        return {"ratio": float(first / second), "low": float(low), "high": float(high), "to": to, "kind": kind, "n_concepts": n}

    def ratios(self) -> pd.DataFrame:
        """:meth:`ratio` of every SAE to the best baseline and, where there is one, to the ceiling, by kind and overall."""
        kinds = ["all", *self.detection["kind"].unique()]
        goals = ["best baseline", *(["ceiling"] if "ceiling" in set(self.detection["role"]) else [])]
        return pd.DataFrame([{"sae": sae, **self.ratio(k, to, sae)} for sae in self._names("sae") for to in goals for k in kinds])

    def headline(self) -> dict[str, float | str]:
        """The numbers to quote, for all concepts and for objects: ``ap_ratio_to_best_baseline`` and the rest, as plain values."""
        found: dict[str, float | str] = {"n_concepts": int(self.detection["concept"].nunique())}
        means = self.detection.groupby("dictionary", sort=False)["ap"].mean()
        found |= {"mean_ap_sae": float(means[self.main])}
        goals = {"best_baseline": "best baseline"} | ({"probe": "ceiling"} if "ceiling" in set(self.detection["role"]) else {})
        for key, to in goals.items():
            for kind in ("all", "object"):
                if kind == "object" and "object" not in set(self.detection["kind"]):
                    continue
                ratio = self.ratio(kind, to)
                name = f"ap_ratio_to_{key}" if kind == "all" else f"{kind}_ap_ratio_to_{key}"
                found |= {name: ratio["ratio"], f"{name}_low": ratio["low"], f"{name}_high": ratio["high"]}
                if kind == "all":
                    found |= {key if key == "best_baseline" else "ceiling": ratio["to"], f"mean_ap_{key}": float(means[ratio["to"]])}
        return found

    def coverage(self, thresholds: Sequence[float] = (0.5,)) -> pd.DataFrame:
        """Share of concepts that some feature finds with an AP above each threshold.

        Returns
        -------
        DataFrame
            dictionary, role, threshold, n_concepts, share, low, high.
        """
        rows = []
        for name, group in self.detection.groupby("dictionary", sort=False):
            draws, ap = self.replicates[group.index], group["ap"].to_numpy()
            for threshold in thresholds:
                share = float((ap > threshold).mean())
                low, high = np.clip(centred_interval((draws > threshold).mean(0), share), 0, 1)
                rows.append([name, group["role"].iloc[0], float(threshold), len(group), share, low, high])
        return pd.DataFrame(rows, columns=["dictionary", "role", "threshold", "n_concepts", "share", "low", "high"])

    def _names(self, role: str) -> list[str]:
        names = list(self.detection.loc[self.detection["role"] == role, "dictionary"].unique())
        if not names:
            raise ValueError(f"The report holds no dictionary of role {role!r}.")
        return names

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write detection.csv, replicates.npy and manifest.json, atomically."""
        with atomic_folder(folder) as temporary:
            self.detection.to_csv(temporary / "detection.csv", index=False)
            np.save(temporary / "replicates.npy", self.replicates, allow_pickle=False)
            write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True})

    @classmethod
    def load(cls, folder: str | Path) -> ComparisonReport:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If another format version wrote it, or a file is damaged.
        """
        folder = Path(folder)
        if missing := [name for name in ("manifest.json", "detection.csv", "replicates.npy") if not (folder / name).exists()]:
            raise FileNotFoundError(
                f"{folder} holds no comparison: {', '.join(missing)} missing. Make one: measure_dictionaries(..., out=...)."
            )
        version = read_folder_manifest(folder).get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {version}; this package reads {FORMAT_VERSION}. Delete the folder and measure again."
            )
        frame = pd.read_csv(folder / "detection.csv", keep_default_na=False)
        return cls(frame, np.load(folder / "replicates.npy", allow_pickle=False))


def compare_dictionaries(
    competitors: Sequence[Competitor],
    choose: ConceptPatches,
    report: ConceptPatches,
    *,
    min_patches: int = 20,
    min_images: int = 2,
    n_candidates: int = 8,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> ComparisonReport:
    """Every dictionary takes the same steps: for each concept its best feature on ``choose``, average precision on ``report``.

    Parameters
    ----------
    competitors : sequence of Competitor
        At least one SAE. Names must differ.
    choose, report : ConceptPatches
        Of scenes that differ.
    min_patches, min_images : int
        Concepts with fewer in either set are left out, for all dictionaries alike.
    n_candidates : int
        Features a concept, of highest correlation with its mask on ``choose``, whose exact average precision is computed there. The ceiling
        has one feature a concept.
    n_bootstrap : int
        Reweightings of the reported images (Bayesian bootstrap, Rubin, 1981).
    seed : int
    progress : bool

    Raises
    ------
    ValueError
        If names repeat, a role is unknown, no SAE is among them, patches of a competitor's own are of other scenes, or no concept is left.
    """
    names = [c.dictionary.name for c in competitors]
    if len(set(names)) < len(names):
        raise ValueError(f"Dictionaries need names that differ, got {', '.join(names)}. Rename: dictionary._replace(name=...).")
    if wrong := {c.role for c in competitors} - set(ROLES):
        raise ValueError(f"Unknown role {sorted(wrong)[0]!r}. Valid: {', '.join(ROLES)}.")
    if "sae" not in {c.role for c in competitors}:
        raise ValueError("Nothing is compared: give at least one Competitor of role 'sae'.")
    concepts = common_concepts(choose, report, min_patches=min_patches, min_images=min_images)
    weights = np.random.default_rng(seed).standard_exponential((report.n_images, n_bootstrap))
    rows, replicates = [], []
    for competitor in tqdm(competitors, desc="dictionaries", disable=not progress):
        sets = [own or given for own, given in ((competitor.choose, choose), (competitor.report, report))]
        for own, given in zip(sets, (choose, report), strict=True):
            if own is not given and (own.masks.shape != given.masks.shape or (own.masks != given.masks).nnz):
                raise ValueError(
                    f"The patches of {competitor.dictionary.name!r} are of other scenes than the others'. Read the same data sets."
                )
        dictionary = competitor.dictionary
        own_feature = None
        if competitor.role == "ceiling":
            own_feature = np.full((len(report.names), dictionary.n), -np.inf)
            np.fill_diagonal(own_feature, 0.0)
        if dictionary.n * max(len(s.tokens) for s in sets) <= _MATERIALIZE:
            sets = [s._replace(tokens=dictionary.encode(s.tokens, None)) for s in sets]
            dictionary = dictionary._replace(encode=_columns)
        found, resampled = compete(
            dictionary, sets[0], sets[1], concepts, weights, 1 if own_feature is not None else n_candidates, own_feature
        )
        rows += [{"dictionary": row["dictionary"], "role": competitor.role, **row} for row in found]
        replicates.append(resampled)
    return ComparisonReport(pd.DataFrame(rows), np.concatenate(replicates))


def measure_dictionaries(
    clip,
    saes: Mapping[str, Any],
    store,
    training,
    choose,
    report,
    layer: int,
    *,
    random_weights: object | None = None,
    random_scenes: object | None = None,
    probe: bool = True,
    n_fit: int = 60_000,
    min_patches: int = 20,
    min_images: int = 2,
    n_candidates: int = 8,
    n_bootstrap: int = 200,
    seed: int = 0,
    patches: Sequence[ConceptPatches] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> ComparisonReport:
    """SAEs, every baseline and the probe, from training scenes to the table.

    Parameters
    ----------
    clip : ClipModel
    saes : mapping of name to SparseAutoencoder
        The first is the one that the headline speaks of.
    store : ActivationStore
        Of ``training``: the unsupervised dictionaries and the probe are fitted on it.
    training, choose, report : OpenMojiData
        Three splits.
    layer : int
    random_weights : TrainConfig, optional
        Recipe of the SAE on a CLIP of random weights, which is trained under ``out`` when it is not there. None leaves it out.
    random_scenes : data set, optional
        What that SAE is trained on; by default ``training``.
    probe : bool
        Whether to train the ceiling.
    n_fit : int
        Training patches that PCA, k-means, ICA and NMF see at most.
    min_patches, min_images, n_candidates, n_bootstrap, seed
        See :func:`compare_dictionaries`.
    patches : pair of ConceptPatches, optional
        Of ``choose`` and ``report``, when they were read before.
    out : path, optional
        Folder to keep the report in (and below it the probes and the random-weights SAE).
    progress : bool

    Raises
    ------
    ValueError
        If no SAE is given, scenes are shared, or ``random_weights`` is given without ``out``.
    """
    if not saes:
        raise ValueError("Nothing is compared: give at least one SAE, e.g. saes={'SAE': sae}.")
    if random_weights is not None and out is None:
        raise ValueError("The SAE on random weights takes minutes to train and is kept: give out= as well.")
    identities = [dataset_fingerprint(d) for d in (training, choose, report)]
    splits = {(d.split, getattr(d, "seed", 0)) for d in (training, choose, report)}
    if len(set(identities)) < 3 or len(splits) < 3:
        raise ValueError("Training, choosing and reporting need scenes that differ: give three splits (train, val, test).")
    key = ""
    if out is not None:
        out = Path(out)
        key = fingerprint(
            stage="comparison", version=FORMAT_VERSION, clip=clip.fingerprint, saes={n: s.fingerprint for n, s in saes.items()},
            store=store.fingerprint, data=identities, layer=clip.layer_index(layer), random_weights=random_weights, probe=probe, n_fit=n_fit,
            min_patches=min_patches, min_images=min_images, n_candidates=n_candidates, n_bootstrap=n_bootstrap, seed=seed,
            random_scenes=random_scenes and dataset_fingerprint(random_scenes),
        )  # fmt: skip
        if is_current(out / "report", key):
            return ComparisonReport.load(out / "report")
    patches = read_patches(clip, (choose, report), layer, patches, progress)
    first = next(iter(saes.values()))
    competitors = [Competitor(sae_dictionary(sae, name), "sae") for name, sae in saes.items()]
    competitors += [Competitor(d) for d in unsupervised(sample_patches(store, n_fit, seed), first, seed)]
    if random_weights is not None:
        control, trained = random_weights_sae(
            clip, random_scenes or training, layer, first, random_weights, out / "random_weights", seed=seed, progress=progress
        )
        own = [concept_patches(control, d, layer, progress=progress) for d in (choose, report)]
        competitors.append(Competitor(sae_dictionary(trained, "SAE on random weights"), "baseline", *own))
    if probe:
        folder = None if out is None else out / "probes"
        competitors.append(Competitor(fit_probes(store, training, patches[0], seed=seed, out=folder, progress=progress), "ceiling"))
    result = compare_dictionaries(
        competitors, *patches, min_patches=min_patches, min_images=min_images, n_candidates=n_candidates, n_bootstrap=n_bootstrap, seed=seed,
        progress=progress,
    )  # fmt: skip
    if out is not None:
        result.save(out / "report", key)
    return result


def unsupervised(x: torch.Tensor, sae, seed: int = 0) -> list[Dictionary]:
    """The baselines that see no labels, fitted on patches [N, D]; k-means gets as many centroids as the SAE has latents, if x allows it."""
    n = min(sae.d_sae, len(x) // 4)
    return [
        dimensions(sae.d_in),
        pca_dictionary(x, seed),
        ica_dictionary(x, seed=seed),
        nmf_dictionary(x, seed=seed),
        kmeans_dictionary(x, n, seed=seed),
        kmeans_dictionary(x, n, cosine=True, seed=seed),
        sae_dictionary(random_sae(sae, seed, None if sae.activation in NEEDS_NO_THRESHOLD else x), "random SAE"),
    ]


def _columns(h: torch.Tensor, columns: np.ndarray | None) -> torch.Tensor:
    """Some columns of activations that were computed before."""
    return h if columns is None else h[:, torch.as_tensor(np.asarray(columns), dtype=torch.long)]
