"""The ceiling: what a supervised linear probe finds of each concept in one patch token, trained on the training scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from ..data.dataset import dataset_fingerprint
from ..run.artifacts import atomic_folder, fingerprint, is_current, read_folder_manifest, write_folder_manifest
from ..sae.dictionary import Dictionary
from .detection import Activations, ConceptPatches, concept_masks, precisions

RIDGE = (1e-4, 1e-2, 1.0)  # strengths, in units of the mean variance of a dimension
EPOCHS, BATCH, LR = 2, 8192, 0.02  # of the logistic regression


def fit_probes(store, dataset, choose: ConceptPatches, out: str | Path, clip) -> Dictionary:
    """One linear probe a concept, on the patches of a store and its scenes, each the best of several on other scenes; kept in ``out``."""
    if store.metadata.tokens == "cls" or store.n_images != len(dataset):
        raise ValueError(
            f"Probes need patches of the same scenes: the store holds {store.metadata.tokens!r} tokens of {store.n_images} images, the "
            f"data set has {len(dataset)} images."
        )
    out = Path(out)
    key = fingerprint(
        stage="probes", version=2, store=store.fingerprint, data=dataset_fingerprint(dataset), n_choose=choose.n_images,
        first=choose.tokens[:8].double().sum().item(), logistic=[EPOCHS, BATCH, LR], ridge=RIDGE,
    )  # fmt: skip
    if is_current(out, key, holds="probes.safetensors"):
        read_folder_manifest(out)
        parts = load_file(out / "probes.safetensors")
        return probe_dictionary(parts["weights"], parts["bias"])
    masks = concept_masks(dataset, clip)
    first = 1 if store.metadata.tokens == "all" else 0
    tokens = torch.cat([x[:, first:].flatten(0, 1) for x, _, _ in store.images()]).float()
    weights, bias = train_probes(tokens, masks, choose)
    with atomic_folder(out) as temporary:
        save_file({"weights": weights, "bias": bias}, temporary / "probes.safetensors")
        write_folder_manifest(temporary, {"format_version": 1, "fingerprint": key, "complete": True})
    return probe_dictionary(weights, bias)


def probe_dictionary(weights: Tensor, bias: Tensor) -> Dictionary:
    """Probes [K, D] with biases [K] as a dictionary: feature k belongs to concept k."""

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        some = slice(None) if columns is None else torch.as_tensor(columns)
        return x @ weights[some].to(x).T + bias[some].to(x)

    return Dictionary("linear probe", len(weights), encode)


def train_probes(tokens: Tensor, masks: sparse.csr_matrix, choose: ConceptPatches) -> tuple[Tensor, Tensor]:
    """Weights [K, D] and bias [K]: of ridge and :func:`logistic_probes` the best on ``choose``; of concepts it doesn't show the last."""
    mean = tokens.mean(0)
    covariance, cross = moments(tokens, masks, mean)
    scale = float(np.trace(covariance)) / len(covariance)
    candidates = [np.linalg.solve(covariance + strength * scale * np.eye(len(covariance)), cross).T for strength in RIDGE]
    candidates = torch.from_numpy(np.stack([*candidates, *logistic_probes(tokens, masks, mean, covariance)])).float()
    every = np.arange(masks.shape[1])
    ap = [precisions(Activations(probe_dictionary(W, torch.zeros(len(W))), choose), every, every)[0] for W in candidates]
    best = np.where(np.isnan(ap[0]), len(ap) - 1, np.nan_to_num(ap).argmax(0))
    weights = candidates[best, every].contiguous()
    return weights, -(weights @ mean)


def moments(tokens: Tensor, masks: sparse.csr_matrix, mean: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Covariance [D, D] of the tokens, and of tokens and masks [D, K]: float64."""
    covariance = np.zeros((tokens.shape[1], tokens.shape[1]))
    cross = np.zeros((masks.shape[1], tokens.shape[1]))
    for start in range(0, len(tokens), 65_536):
        x = (tokens[start : start + 65_536] - mean).numpy()
        covariance += x.T @ x
        cross += masks[start : start + 65_536].T @ x
    return covariance / len(tokens), cross.T / len(tokens)


def logistic_probes(tokens: Tensor, masks: sparse.csr_matrix, mean: Tensor, covariance: np.ndarray) -> list[np.ndarray]:
    """Logistic regression of all concepts by Adam on whitened tokens: weights [K, D] for centred tokens, half way and at the end."""
    spread, directions = np.linalg.eigh(covariance)
    whiten = torch.from_numpy(directions / np.sqrt(np.maximum(spread, 1e-9 * spread.max()))).float()
    share = np.asarray(masks.mean(0)).ravel()
    bias = torch.from_numpy(np.log(np.clip(share, 1e-9, 0.5))).float().requires_grad_()
    weights = torch.zeros(masks.shape[1], tokens.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=LR)
    batch = min(BATCH, len(tokens))
    n_steps, generator, found = EPOCHS * (len(tokens) // batch), torch.Generator().manual_seed(0), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    with tqdm(total=n_steps, desc="probes", unit="step") as bar:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(tokens), generator=generator)[: len(tokens) // batch * batch].split(batch):
                x = (tokens[rows] - mean) @ whiten
                with torch.no_grad():  # the gradient of the cross-entropy written out: (sigmoid - mask)^T x, of sparse masks
                    error = torch.sigmoid(x @ weights.T + bias)
                    mask = masks[rows.numpy()].tocoo()
                    error[torch.from_numpy(mask.row).long(), torch.from_numpy(mask.col).long()] -= 1
                    weights.grad, bias.grad = error.T @ x / batch, error.sum(0) / batch
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n in (n_steps // 2, n_steps):
                    found.append((weights.detach() @ whiten.T).double().numpy())
    return found
