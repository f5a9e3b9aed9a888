"""One image tower read by a dictionary over a data set: which latents are active where, and which pictures each text head gets right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..interventions.tail import network_tail
from ..latents.passes import latent_chunks

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

FORMS = ("raw", "reconstructed", "error kept")


class Reading(NamedTuple):
    """One image tower, read by the dictionary over a data set."""

    counts: Tensor
    """[2, C, S] tokens a picture with h > tau, for the pictures of each class at even and at odd turns."""
    class_images: Tensor
    """[2, C] how many pictures those are."""
    labels: np.ndarray
    """int [N]: each picture's class."""
    predicted: dict[tuple[str, str], np.ndarray]
    """(head, form) -> int [N]: the class that each picture is taken for."""
    reconstruction: dict[str, float]
    """explained_variance (centred), normalized_mse, l0."""

    @property
    def right(self) -> dict[tuple[str, str], np.ndarray]:
        """(head, form) -> bool [N]: which pictures are classified rightly."""
        return {key: predicted == self.labels for key, predicted in self.predicted.items()}

    @property
    def mean_counts(self) -> Tensor:
        """[C, S] tokens a picture with h > tau: a_c over the number of pictures."""
        weights = self.class_images / self.class_images.sum(0).clamp_min(1)
        return (self.counts * weights[..., None]).sum(0)


class TowerReader:
    """Sums over batches of one image tower, for :class:`Reading`."""

    def __init__(self, clip: ClipModel, sae: SparseAutoencoder, layer: int, heads: Mapping[str, Tensor], n_classes: int, tau: float):
        sae.check_model(clip, layer)
        self.clip, self.sae, self.layer, self.heads, self.n_classes, self.tau = clip, sae, layer, heads, n_classes, tau
        self.counts = torch.zeros(2 * n_classes, sae.d_sae, dtype=torch.float64, device=clip.device)
        self.seen = torch.zeros(2 * n_classes, dtype=torch.long)
        self.labels: list[Tensor] = []
        self.predicted: dict[tuple[str, str], list[Tensor]] = {(head, form): [] for head in heads for form in FORMS}
        self.sums = dict.fromkeys(("error", "square", "active", "tokens"), 0.0)
        self.total = torch.zeros(clip.width, dtype=torch.float64, device=clip.device)
        self.tail: Callable[[Residual], Tensor] | None = None

    def read(self, images: Tensor, labels: Tensor) -> None:
        clip, sae = self.clip, self.sae
        residual = clip.run_to(images, self.layer)
        self.tail = self.tail or network_tail(clip, self.layer, residual)
        tokens, decoded = residual.tokens, torch.empty_like(residual.tokens)
        counts = torch.empty(len(labels), sae.d_sae, dtype=torch.float64, device=clip.device)
        for rows, h in latent_chunks(sae, tokens):
            decoded[rows] = sae.decode(h)
            counts[rows] = (h > self.tau).sum(1).double()
            self.sums["active"] += (h > 0).sum().item()
        self.labels.append(labels)
        self.counts.index_add_(0, self._turns(labels).to(clip.device), counts)
        self.sums["error"] += (tokens - decoded).square().sum(dtype=torch.float64).item()
        self.sums["square"] += tokens.square().sum(dtype=torch.float64).item()
        self.sums["tokens"] += tokens.shape[0] * tokens.shape[1]
        self.total += tokens.sum((0, 1), dtype=torch.float64)
        for form, edited in zip(FORMS, (tokens, decoded, decoded + (tokens - decoded)), strict=True):
            features = self.tail(residual._replace(tokens=edited))
            for head, matrix in self.heads.items():
                self.predicted[head, form].append(clip.logits(features, matrix).argmax(1).cpu())

    def _turns(self, labels: Tensor) -> Tensor:
        """Rows of the counts: pictures of a class go to its two halves by turns, so that these are two samples of one thing."""
        rows = torch.empty_like(labels)
        for i, label in enumerate(labels.tolist()):
            rows[i] = label + self.n_classes * int(self.seen[label] > self.seen[label + self.n_classes])
            self.seen[rows[i]] += 1
        return rows

    def reading(self) -> Reading:
        variance = self.sums["square"] - self.total.square().sum().item() / self.sums["tokens"]
        return Reading(
            counts=(self.counts.cpu() / self.seen.clamp_min(1)[:, None]).view(2, self.n_classes, -1).float(),
            class_images=self.seen.view(2, self.n_classes),
            labels=torch.cat(self.labels).numpy(),
            predicted={key: torch.cat(parts).numpy() for key, parts in self.predicted.items()},
            reconstruction={
                "explained_variance": 1 - self.sums["error"] / variance,
                "normalized_mse": self.sums["error"] / self.sums["square"],
                "l0": self.sums["active"] / self.sums["tokens"],
            },
        )
