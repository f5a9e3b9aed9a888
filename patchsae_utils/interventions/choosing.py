"""Which latents a mask touches: rankings made on the train split, and controls that match them in activation and frequency.

Dimension letters: B batch, S d_sae, C classes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

CHOICES = ("oracle", "predicted", "wrong", "dataset", "random", "matched")
RANKINGS = ("count", "attribution")
MATCH_WINDOW = 4
"""A control is drawn among so many latents on either side of the one it replaces, in order of activation; of twice as many nearest
ones, where activation and frequency count."""


class Choosing:
    """For each way to choose latents: at which entry of ks each latent comes in (its level; ``len(ks)``: at none of them).

    Labels are read for ``oracle`` alone.

    Parameters
    ----------
    scores : mapping of str to Tensor [C, S]
        For each ranking how high every latent stands for every class.
    ks : sequence of int
        Rising.
    choose : sequence of str
    sae : SparseAutoencoder
    frequency : Tensor [S], optional
        How often latents are active on the train split: random ones are drawn where it is positive, matched ones have about the same.
    n_classes, n_images : int
        Of what is evaluated.
    n_random : int
    seed : int
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        ks: Sequence[int],
        choose: Sequence[str],
        sae: SparseAutoencoder,
        frequency: Tensor | None,
        *,
        n_classes: int,
        n_images: int,
        n_random: int,
        seed: int,
    ):
        self.ks, self.seed, self.n_classes, device = ks, seed, n_classes, sae.W_dec.device
        rng = np.random.default_rng(seed)
        self.wrong = torch.from_numpy(rng.integers(1, max(n_classes, 2), n_images)).to(device)  # steps from the predicted class
        self.device, self.scores, self.dataset, self.random = device, scores, {}, []
        self._known: dict[
            tuple[str, int], Tensor
        ] = {}  # levels of the classes that were asked for: sorting all of ImageNet's takes a while
        for name, values in scores.items():
            if "dataset" in choose:
                self.dataset[name] = self._levels(values.sum(0)[None])
        if "random" in choose:
            alive = np.arange(sae.d_sae) if frequency is None else (frequency > 0).nonzero()[:, 0].cpu().numpy()
            for _ in range(n_random):
                values = torch.zeros(1, sae.d_sae)
                drawn = torch.from_numpy(rng.permutation(alive))
                values[0, drawn] = torch.arange(len(drawn), 0, -1.0)
                self.random.append(self._levels(values, among=len(drawn)))
        # Latents that no train image activates stand a decade below the rarest that some image does.
        if frequency is not None:
            known = frequency.double().cpu().numpy()
            frequency = np.log10(np.maximum(known, known[known > 0].min(initial=1) / 10))
        self.log_frequency = frequency

    def _levels(self, scores: Tensor, among: int | None = None) -> Tensor:
        """Scores [R, S] to levels [R, S], bytes; only the first ``among`` of the ranking are ever chosen."""
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :among]
        levels = torch.full(scores.shape, len(self.ks), dtype=torch.uint8, device=scores.device)
        for level in reversed(range(len(self.ks))):
            levels.scatter_(1, order[:, : self.ks[level]], level)
        return levels.to(self.device)

    def _of_classes(self, ranking: str, labels: Tensor) -> Tensor:
        """[B, S]"""
        for label in labels.unique().tolist():
            if (ranking, label) not in self._known:
                self._known[ranking, label] = self._levels(self.scores[ranking][label, None])[0]
        return torch.stack([self._known[ranking, label] for label in labels.tolist()])

    def levels(
        self, choice: str, ranking: str, predicted: Tensor, labels: Tensor, indices: Tensor, activation: Tensor | None
    ) -> list[Tensor]:
        """Tables [B, S] or [1, S] of levels: one, or for ``random`` one a draw.

        Parameters
        ----------
        choice, ranking : str
        predicted, labels, indices : Tensor [B]
            The unmasked model's class, the true one, and the images' places in the data set.
        activation : Tensor [B, S]
            Summed over the image's tokens; read by ``matched`` alone.
        """
        match choice:
            case "oracle":
                return [self._of_classes(ranking, labels)]
            case "predicted":
                return [self._of_classes(ranking, predicted)]
            case "wrong":
                return [self._of_classes(ranking, (predicted + self.wrong[indices.to(predicted.device)]) % self.n_classes)]
            case "dataset":
                return [self.dataset[ranking]]
            case "random":
                return self.random
        return [self._matched(self._of_classes(ranking, predicted), indices, activation)]

    def _matched(self, levels: Tensor, indices: Tensor, activation: Tensor) -> Tensor:
        """Hand each image's levels on to other latents, about as active in the same image and about as frequent on the train split."""
        matched = np.full(levels.shape, len(self.ks), np.uint8)
        levels, activation = levels.cpu().numpy(), activation.cpu().numpy()
        for i, index in enumerate(indices.tolist()):
            targets = np.flatnonzero((levels[i] < len(self.ks)) & (activation[i] > 0))
            pool = np.flatnonzero((levels[i] == len(self.ks)) & (activation[i] > 0))
            targets = targets[np.argsort(levels[i, targets], kind="stable")]
            weights = activation[i]
            if self.log_frequency is not None:
                with np.errstate(divide="ignore"):
                    weights = np.stack([np.log10(activation[i]), self.log_frequency], 1)
            for target, partner in match_by_weight(targets, pool, weights, np.random.default_rng([self.seed, index])):
                matched[i, partner] = levels[i, target]
        return torch.from_numpy(matched).to(self.device)


def match_by_weight(targets: np.ndarray, pool: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Pairs (target, partner): for each target in turn a random one of the pool's members that are nearest in weight, none twice.

    Ends early when the pool is exhausted.

    Parameters
    ----------
    targets, pool : int arrays
        Rows of ``weights``; disjoint.
    weights : array [S] or [S, d]
        With several columns, distances are Euclidean after each column is divided by its standard deviation over pool and targets.
    rng : numpy.random.Generator
    """
    if weights.ndim == 2:
        yield from _match_in_plane(targets, pool, weights, rng)
        return
    partners = pool[np.argsort(weights[pool], kind="stable")].tolist()
    keys = weights[partners].tolist()
    for target in targets.tolist():
        if not partners:
            return
        place = bisect_left(keys, weights[target])
        low = max(0, min(place - MATCH_WINDOW, len(keys) - 2 * MATCH_WINDOW))
        chosen = int(rng.integers(low, min(len(keys), low + 2 * MATCH_WINDOW)))
        keys.pop(chosen)
        yield target, partners.pop(chosen)


def _match_in_plane(targets: np.ndarray, pool: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    spread = weights[np.concatenate([targets, pool])].std(0) if len(targets) + len(pool) else np.ones(weights.shape[1])
    points = weights / np.where(spread > 0, spread, 1)
    places, free, n_free = points[pool], np.ones(len(pool), dtype=bool), len(pool)
    for target in targets.tolist():
        if not n_free:
            return
        distance = np.where(free, ((places - points[target]) ** 2).sum(1), np.inf)
        n = min(2 * MATCH_WINDOW, n_free)
        nearest = np.argpartition(distance, n - 1)[:n]
        chosen = int(nearest[rng.integers(n)])
        free[chosen] = False
        n_free -= 1
        yield target, int(pool[chosen])


def matched_latents(own: Tensor, activation: Tensor, indices: Tensor, seed: int) -> Tensor:
    """[B, k] for each of the image's own latents [B, k] another one about as active ([B, S]) in it; -1 where it is silent."""
    controls = np.full(tuple(own.shape), -1)
    weights = activation.numpy()
    for i, index in enumerate(indices.tolist()):
        mine = own[i].numpy()
        places = {latent: j for j, latent in enumerate(mine.tolist())}
        active = mine[weights[i, mine] > 0]
        pool = np.setdiff1d(np.flatnonzero(weights[i] > 0), mine)
        for target, partner in match_by_weight(active, pool, weights[i], np.random.default_rng([seed, index])):
            controls[i, places[target]] = partner
    return torch.from_numpy(controls)
