"""The ceiling: what a supervised linear probe finds of each concept in one patch token, trained on the training scenes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from ..data import openmoji
from ..data.dataset import dataset_fingerprint
from ..data.sources import has_truth
from ..run.artifacts import atomic_folder, fingerprint, is_current, read_folder_manifest, write_folder_manifest
from ..sae.dictionary import Dictionary
from .grounding import ConceptPatches, average_precision, n_threads

RIDGE = (1e-4, 1e-2, 1.0)
"""Strengths, in units of the mean variance of a dimension."""


def patch_concepts(dataset, progress: bool = True) -> sparse.csr_matrix:
    """Which concepts every patch of a data set shows: [images x patches, K], rows as in :class:`ConceptPatches`.

    Raises
    ------
    ValueError
        If the data set has no ground truth.
    """
    if not has_truth(dataset):
        raise ValueError(f"The data set {getattr(dataset, 'spec', dataset)!r} has no ground truth (no method truth(i)).")
    n_patches, names = openmoji.GRID**2, openmoji.concept_names()
    rows, columns = [], []
    for i in tqdm(range(len(dataset)), desc="ground truth", disable=not progress):
        concept, patch = openmoji.concept_masks(dataset.truth(i)).reshape(len(names), -1).nonzero()
        rows.append(patch + i * n_patches)
        columns.append(concept)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(dataset) * n_patches, len(names)))


def fit_probes(
    store,
    dataset,
    choose: ConceptPatches,
    *,
    epochs: int = 2,
    batch_size: int = 8192,
    lr: float = 0.02,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Dictionary:
    """One linear probe a concept, each the best of several on the choosing scenes.

    The candidates: ridge regression on the mask at the strengths ``RIDGE``, in closed form, and logistic regression, all concepts at once,
    by Adam on whitened tokens with a rate that falls to 0, read half way (early stopping) and at the end. A concept that the choosing scenes
    do not show gets the last.

    Parameters
    ----------
    store : ActivationStore
        Of the training scenes, whole images.
    dataset : OpenMojiData
        The same scenes, for their ground truth.
    choose : ConceptPatches
        Other scenes, on which the candidate of highest average precision is chosen.
    epochs, batch_size, lr, seed
        Of the logistic regression.
    out : path, optional
        Folder to keep the probes in; when it already holds those of the same inputs, they are opened.
    progress : bool

    Returns
    -------
    Dictionary
        Feature k is the probe of concept k: a dictionary with as many features as concepts.

    Raises
    ------
    ValueError
        If store and data set differ in length, or the store lacks patches.
    """
    if store.metadata.tokens == "cls" or store.n_images != len(dataset):
        raise ValueError(
            f"Probes need patches of the same scenes: the store holds {store.metadata.tokens!r} tokens of {store.n_images} images, the data "
            f"set has {len(dataset)} images."
        )
    key = ""
    if out is not None:
        key = fingerprint(
            stage="probes", version=1, store=store.fingerprint, data=dataset_fingerprint(dataset), n_choose=choose.n_images,
            first=choose.tokens[:8].double().sum().item(), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, ridge=RIDGE,
        )  # fmt: skip
        if is_current(out, key):
            read_folder_manifest(Path(out))
            parts = load_file(Path(out) / "probes.safetensors")
            return probe_dictionary(parts["weights"], parts["bias"])
    masks = patch_concepts(dataset, progress)
    first = 1 if store.metadata.tokens == "all" else 0
    tokens = torch.cat([x[:, first:].flatten(0, 1) for x, _, _ in store.images()]).float()
    weights, bias = train_probes(tokens, masks, choose, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, progress=progress)
    if out is not None:
        with atomic_folder(out) as temporary:
            save_file({"weights": weights, "bias": bias}, temporary / "probes.safetensors")
            write_folder_manifest(temporary, {"format_version": 1, "fingerprint": key, "complete": True})
    return probe_dictionary(weights, bias)


def probe_dictionary(weights: Tensor, bias: Tensor) -> Dictionary:
    """Probes [K, D] with biases [K] as a dictionary: feature k belongs to concept k."""

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        some = slice(None) if columns is None else torch.as_tensor(columns, dtype=torch.long)
        return x @ weights[some].to(x).T + bias[some].to(x)

    return Dictionary("linear probe", len(weights), encode)


def train_probes(
    tokens: Tensor,
    masks: sparse.csr_matrix,
    choose: ConceptPatches,
    *,
    epochs: int = 2,
    batch_size: int = 8192,
    lr: float = 0.02,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`fit_probes` on tokens [N, D] and masks [N, K] in memory: weights [K, D], bias [K]."""
    mean = tokens.mean(0)
    covariance, cross = moments(tokens, masks, mean)
    scale = float(np.trace(covariance)) / len(covariance)
    candidates = [np.linalg.solve(covariance + strength * scale * np.eye(len(covariance)), cross).T for strength in RIDGE]
    candidates += logistic_probes(
        tokens, masks, mean, covariance, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, progress=progress
    )
    positives = choose.masks.tocsc()
    best = np.full(masks.shape[1], -1.0)
    chosen = candidates[-1].copy()

    def precision(k: int, values: np.ndarray) -> float:
        rows = positives.indices[positives.indptr[k] : positives.indptr[k + 1]]
        return average_precision(values, rows) if len(rows) else -1.0

    with ThreadPoolExecutor(n_threads()) as pool:
        for W in candidates:
            for start in range(0, len(W), 64):
                scores = (choose.tokens @ torch.from_numpy(W[start : start + 64]).float().T).T.contiguous().numpy()
                for k, ap in enumerate(pool.map(precision, range(start, start + len(scores)), scores), start):
                    if ap > best[k]:
                        best[k], chosen[k] = ap, W[k]
    weights = torch.from_numpy(chosen).float()
    return weights, -(weights @ mean)


def moments(tokens: Tensor, masks: sparse.csr_matrix, mean: Tensor, chunk: int = 65_536) -> tuple[np.ndarray, np.ndarray]:
    """Covariance [D, D] of the tokens, and of tokens and masks [D, K]: float64."""
    covariance = np.zeros((tokens.shape[1], tokens.shape[1]))
    cross = np.zeros((masks.shape[1], tokens.shape[1]))
    for start in range(0, len(tokens), chunk):
        x = (tokens[start : start + chunk] - mean).numpy()
        covariance += x.T @ x
        cross += masks[start : start + chunk].T @ x
    return covariance / len(tokens), cross.T / len(tokens)


def logistic_probes(
    tokens: Tensor,
    masks: sparse.csr_matrix,
    mean: Tensor,
    covariance: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[np.ndarray]:
    """Logistic regression of every concept by Adam, half way and at the end: two arrays [K, D] for centred tokens, biases left out."""
    spread, directions = np.linalg.eigh(covariance)
    whiten = torch.from_numpy(directions / np.sqrt(np.maximum(spread, 1e-9 * spread.max()))).float()
    share = np.asarray(masks.mean(0)).ravel()
    bias = torch.from_numpy(np.log(np.clip(share, 1e-9, 0.5))).float().requires_grad_()
    weights = torch.zeros(masks.shape[1], tokens.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=lr)
    batch_size = min(batch_size, len(tokens))
    per_epoch = len(tokens) // batch_size
    n_steps, generator, found, step = epochs * per_epoch, torch.Generator().manual_seed(seed), [], 0
    with tqdm(total=n_steps, desc="probes", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(tokens), generator=generator)[: per_epoch * batch_size].split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / n_steps)
                x = (tokens[rows] - mean) @ whiten
                # The gradient of the summed cross-entropy is (sigmoid - mask)^T x: written out, since masks are sparse and autograd would make
                # four [batch, K] tensors.
                with torch.no_grad():
                    error = torch.sigmoid(x @ weights.T + bias)
                    mask = masks[rows.numpy()].tocoo()
                    error[torch.from_numpy(mask.row).long(), torch.from_numpy(mask.col).long()] -= 1
                    weights.grad, bias.grad = error.T @ x / batch_size, error.sum(0) / batch_size
                optimizer.step()
                step += 1
                bar.update()
                if step in (n_steps // 2, n_steps):
                    found.append((weights.detach() @ whiten.T).double().numpy())
    return found
