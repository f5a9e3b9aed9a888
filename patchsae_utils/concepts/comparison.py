"""The SAE against everything else, fairly: how well the best feature of each dictionary finds each concept, read in the same ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import dataset_fingerprint
from ..run.artifacts import fingerprint, is_current
from ..sae.dictionary import Dictionary, dimensions, random_sae, sae_dictionary
from ..sae.model import SparseAutoencoder
from ..sae.starts import centroids
from . import baselines, detection
from .baselines import projections
from .detection import Activations, ConceptPatches
from .probes import fit_probes
from .report import FORMAT_VERSION, ComparisonReport

PROBES = (2, 5)  # features of a sparse probe; of 1 it is the best feature itself
_STEP = 8192  # tokens whose reconstruction is measured at a time

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]  # tokens [N, D] -> what is written for them [N, D], features used [N]


class Competitor(NamedTuple):
    """One dictionary in the comparison."""

    name: str
    # By ways of reading, its own first: "activations", "pre-activations", "cosine" (of centred tokens and the written directions); "dense",
    # where there is one way alone; "nearest" and "4 nearest" of k-means.
    readouts: Mapping[str, Dictionary]
    role: str = "baseline"  # or "sae", "control" (an SAE trained with a part frozen), "ceiling" (supervised: feature k is of concept k)
    reconstruct: Mapping[str, Reconstruct] | None = None  # for ways of reading in which the dictionary writes tokens
    patches: tuple[ConceptPatches, ConceptPatches] | None = None  # of the same scenes in the same order, when it reads another model


def sae_competitor(
    sae: SparseAutoencoder, name: str = "SAE", role: str = "sae", *, centre: Tensor | None = None,
    patches: tuple[ConceptPatches, ConceptPatches] | None = None,
) -> Competitor:  # fmt: skip
    """An SAE as a competitor, read in three ways; in its own alone, without the mean ``centre`` [D] of its training tokens."""

    def before(x: Tensor, columns: np.ndarray | None) -> Tensor:
        x, latents = x.to(sae.W_enc.device), None if columns is None else torch.as_tensor(columns).to(sae.W_enc.device)
        before = sae.pre_activations(x, latents)
        return before / sae.sizes(x) if sae.reads_unit_tokens and not sae.token_norm else before

    def written(x: Tensor) -> tuple[Tensor, Tensor]:
        out = sae.eval()(x.to(sae.W_enc.device))
        return out.reconstruction.cpu(), (out.latents != 0).sum(1).cpu()

    readouts = {"activations": sae_dictionary(sae, name)}
    if centre is not None:
        directions = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1).cpu().numpy()
        cosine = projections(name, directions, centre.numpy(), cosine=True)
        readouts |= {"pre-activations": Dictionary(name, sae.d_sae, before), "cosine": cosine}
    return Competitor(name, readouts, role, dict.fromkeys(readouts, written), patches)


def kmeans_competitor(x: Tensor, n: int) -> Competitor:
    """Centroids of centred unit-norm tokens, read densely, and with only the four nearest or the nearest kept."""
    mean = x.mean(0)
    directions = centroids(x - mean, n)
    dense = projections("k-means, cosine", directions.numpy(), mean.numpy(), cosine=True, relu=True)

    def nearest(k: int, x: Tensor, columns: np.ndarray | None) -> Tensor:
        h = dense.encode(x, None)
        best = h.topk(k, dim=1)
        h = torch.zeros_like(h).scatter_(1, best.indices, best.values)
        return h if columns is None else h[:, torch.as_tensor(columns)]

    def written(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least-squares sum of the nearest centroids, for a token whose norm is known."""
        centred = x - mean
        near = directions[dense.encode(x, None).topk(k, dim=1).indices]
        gram = near @ near.transpose(1, 2) + 1e-6 * torch.eye(k)
        sizes = torch.linalg.solve(gram, (near @ centred[:, :, None]))
        return mean + (near.transpose(1, 2) @ sizes)[:, :, 0], torch.full((len(x),), k)

    ks = {"4 nearest": min(4, n), "nearest": 1}
    readouts = {way: Dictionary(dense.name, n, partial(nearest, k)) for way, k in ks.items()}
    return Competitor(dense.name, {"dense": dense, **readouts}, reconstruct={way: partial(written, k) for way, k in ks.items()})


def plain_competitor(dictionary: Dictionary, role: str = "baseline") -> Competitor:
    """A dictionary that is read in one way."""
    return Competitor(dictionary.name, {"dense": dictionary}, role)


@torch.no_grad()
def compare(
    competitors: Sequence[Competitor], choose: ConceptPatches, report: ConceptPatches, *, min_patches: int = 20
) -> ComparisonReport:
    """Every dictionary takes the same steps: for each concept its best feature on some scenes, and average precision on others.

    Sparse probes, of two and of five features, read each dictionary's own activations: features are added by least squares among the eight
    that correlate most with the concept, chosen and weighted on ``choose`` (as by Gurnee et al., 2023).
    """
    names = [c.name for c in competitors]
    if len(set(names)) < len(names):
        raise ValueError(f"Dictionaries need names that differ, got {', '.join(names)}.")
    concepts, weights = detection.common_concepts(choose, report, min_patches), detection.image_weights(report.n_images)
    frames, replicates = [], []
    for name, readouts, role, reconstruct, own in tqdm(competitors, desc="dictionaries"):
        sets = own or (choose, report)
        for mine, given in zip(sets, (choose, report), strict=True):
            if mine is not given and (mine.masks.shape != given.masks.shape or (mine.masks != given.masks).nnz):
                raise ValueError(f"The patches of {name!r} are of other scenes than the others'. Read the same data sets.")
        qualities = {written: quality(written, sets[1]) for written in {*(reconstruct or {}).values()}}
        for i, (way, dictionary) in enumerate(readouts.items()):
            choose_from, report_on = (Activations(dictionary, each) for each in sets)
            l0, explained = qualities.get((reconstruct or {}).get(way), (np.nan, np.nan))
            tried = concepts[:, None]
            if role != "ceiling":
                tried = detection.candidates(detection.concept_correlations(choose_from)[0][0][concepts])
            frame, resampled = detection.best_features(name, role, choose_from, report_on, concepts, tried, weights, coarse=True)
            found = [(way, frame, resampled)]
            if i == 0 and role != "ceiling" and len(competitors) > 1:
                for k, ap, draws in sparse_probes(choose_from, report_on, concepts, tried, weights):
                    found.append((f"probe of {k}", frame.assign(ap=ap), draws))
            frames += [frame.assign(readout=label, l0=l0, explained_variance=explained) for label, frame, _ in found]
            replicates += [resampled for *_, resampled in found]
    return ComparisonReport(pd.concat(frames, ignore_index=True), np.concatenate(replicates))


def quality(reconstruct: Reconstruct, patches: ConceptPatches) -> tuple[float, float]:
    """L0 and explained variance of patches' tokens: 1 - ||x - x'||^2 / ||x - mean||^2, summed over at most some 40,000."""
    tokens = patches.tokens[detection.evenly(n := len(patches.tokens), patches.n_images, n // 40_000 | 1)]
    mean, error, total, active = tokens.double().mean(0), 0.0, 0.0, 0.0
    for x in tokens.split(_STEP):
        written, n = reconstruct(x)
        error += float((x - written).double().square().sum())
        total += float((x - mean).square().sum())
        active += float(n.sum())
    return active / len(tokens), 1 - error / total if total else float("nan")


def sparse_probes(choose: Activations, report: Activations, concepts: np.ndarray, tried: np.ndarray, weights: np.ndarray):
    """For each size of ``PROBES``: the AP [K'] on ``report`` of probes of so many features, and in every resample [K', R]."""
    rows, sizes = choose.patches.rows(), [min(k, tried.shape[1]) for k in PROBES]
    chosen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in PROBES]
    step = max(1, choose.block // tried.shape[1])
    for start in range(0, len(concepts), step):
        some, at = np.unique(tried[start : start + step], return_inverse=True)
        read = choose.columns(some)
        for concept, mine in zip(concepts[start : start + step], at.reshape(-1, tried.shape[1]), strict=True):
            for found, (picked, size) in zip(chosen, _added(read[mine], rows[concept], sizes), strict=True):
                found.append((some[mine[picked]], size))
    scores, n = _Probes(report, [probe for each in zip(*chosen, strict=True) for probe in each]), len(PROBES)  # a concept's sizes together
    ap, resampled = detection.precisions(scores, np.arange(scores.n), np.repeat(concepts, n), weights, coarse=True)
    for i, k in enumerate(PROBES):
        yield k, ap[i::n], resampled[i::n]


def _added(x: np.ndarray, positive: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Least squares of a mask on ever more of the features x [n, N]: those picked and their weights, at each of the sizes."""
    x = x - x.mean(1, dtype=np.float64, keepdims=True)
    gram = x @ x.T / x.shape[1]
    gram += 1e-6 * max(np.trace(gram) / len(gram), np.finfo(float).tiny) * np.eye(len(gram))
    cross = x[:, positive].sum(1) / x.shape[1]
    picked: list[int] = []
    while len(picked) < max(sizes):
        tried = [[*picked, i] for i in range(len(x)) if i not in picked]
        picked = max(tried, key=lambda at: cross[at] @ np.linalg.solve(gram[np.ix_(at, at)], cross[at]))
        for _ in range(sizes.count(len(picked))):
            yield picked, np.linalg.solve(gram[np.ix_(picked, picked)], cross[picked])


class _Probes(Activations):
    """Weighted sums of some features as features."""

    block = 48

    def __init__(self, features: Activations, probes: Sequence[tuple[np.ndarray, np.ndarray]]):
        self.features, self.probes, self.patches, self.n = features, probes, features.patches, len(probes)

    def columns(self, features: np.ndarray) -> np.ndarray:
        some = np.unique(np.concatenate([self.probes[i][0] for i in features]))
        read = self.features.columns(some)
        return np.stack([size.astype(np.float32) @ read[np.searchsorted(some, each)] for each, size in (self.probes[i] for i in features)])


def measure_dictionaries(
    clip, sae: SparseAutoencoder, store, training, choose, report, layer: int, *, random_weights, random_scenes, out: str | Path,
    patches: Sequence[ConceptPatches] | None = None, controls: Mapping[str, SparseAutoencoder] | None = None,
) -> ComparisonReport:  # fmt: skip
    """An SAE, every baseline and the probe, from training scenes to the table, which is kept in ``out``.

    ``store`` is of ``training``; ``random_weights`` is the recipe of an SAE on a CLIP of random weights and ``random_scenes``; ``patches``
    are of ``choose`` and ``report``, when they were read before; ``controls`` are SAEs of which a part was frozen in training.
    """
    out, controls = Path(out), controls or {}
    key = fingerprint(
        stage="comparison", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, store=store.fingerprint,
        data=detection.different_scenes(training, choose, report), layer=clip.layer_index(layer), random_weights=random_weights,
        random_scenes=dataset_fingerprint(random_scenes), controls={name: each.fingerprint for name, each in controls.items()},
    )  # fmt: skip
    if is_current(out / "report", key, holds="replicates.npy"):
        return ComparisonReport.load(out / "report")
    sae.check_model(clip, layer)
    patches = detection.read_patches(clip, (choose, report), layer, patches)
    x = baselines.sample_patches(store)
    n, centre = min(sae.d_sae, len(x) // 4), x.mean(0)
    untrained, trained = baselines.random_weights_sae(clip, random_scenes, layer, sae, random_weights, out / "random_weights")
    theirs = (detection.concept_patches(untrained, choose, layer), detection.concept_patches(untrained, report, layer))
    result = compare(
        [
            sae_competitor(sae, centre=centre),
            *(sae_competitor(control, name, "control", centre=centre) for name, control in controls.items()),
            plain_competitor(dimensions(sae.d_in)),
            *(plain_competitor(make(x)) for make in (baselines.pca_dictionary, baselines.ica_dictionary, baselines.nmf_dictionary)),
            plain_competitor(baselines.kmeans_dictionary(x, n)),
            kmeans_competitor(x, n),
            sae_competitor(random_sae(sae, x), "random SAE", "baseline", centre=centre),
            sae_competitor(trained, "SAE on random weights", "baseline", patches=theirs),
            plain_competitor(fit_probes(store, training, patches[0], out / "probes", clip), "ceiling"),
        ],
        *patches,
    )
    result = dataclasses.replace(result, sae=sae.fingerprint)
    result.save(out / "report", key)
    return result
