"""Which latents a mask touches: rankings made on the train split, and controls that match them in activation and frequency."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

CHOICES = ("oracle", "predicted", "wrong", "dataset", "random", "matched")
RANKINGS = ("count", "attribution")
N_NEAREST = 8  # a control is drawn among so many latents that are nearest to the one it stands for
SILENT, NONE_LEFT = -1, -2  # in place of a latent: none, or control of one silent in this image; no active latent is left as a control


class Choosing:
    """The latents of every choice, for the images of a sweep; labels are read for ``oracle`` alone.

    ``scores``: for each ranking [C, S]; latents with a positive score are ranked, and k = S means all, ranked or not. ``frequency`` [S] on
    the train split: random latents are drawn where it is positive, matched ones have about the same.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], ks: Sequence[int], frequency: Tensor | None, shape: tuple[int, int, int], n_random: int
    ):
        n_images, self.n_classes, self.d_sae = shape
        self.ks, self.scores, self.frequency = ks, scores, frequency
        rng = np.random.default_rng(0)
        self.wrong = torch.from_numpy(rng.integers(1, max(self.n_classes, 2), n_images))  # steps from the predicted class
        alive = np.arange(self.d_sae) if frequency is None else (frequency > 0).nonzero()[:, 0].cpu().numpy()
        self.random = [torch.from_numpy(rng.permutation(alive))[None] for _ in range(n_random)]
        # Only of classes that were asked for: sorting all of ImageNet's takes a while.
        self._known: dict[tuple[str, int | None], Tensor] = {}

    def tables(
        self, choice: str, ranking: str, predicted: Tensor, labels: Tensor, indices: Tensor, activation: Tensor | None
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """One table, for ``random`` one for each draw, for ``matched`` one for each k; ``activation`` [B, S] is summed over tokens.

        It holds the levels (places in ks) that it is about; the level at which each latent comes in, bytes [B or 1, S] (``len(ks)``: at
        none); which images have too few other latents for a control, bool [B or 1].
        """
        every, none = range(len(self.ks)), torch.zeros(1, dtype=torch.bool)
        if choice == "random":
            yield from ((every, self._levels(order), none) for order in self.random)
            return
        predicted = predicted.cpu()
        wrong = (predicted + self.wrong[indices]) % self.n_classes
        classes = {"oracle": labels, "wrong": wrong}.get(choice, predicted).tolist() if choice != "dataset" else [None]
        order = torch.stack([self._ranked(ranking, label) for label in classes])
        if choice != "matched":
            levels = self._levels(order)
            if self.ks[-1] == self.d_sae:
                levels.clamp_(max=len(self.ks) - 1)
            yield every, levels, none
            return
        for level, k in enumerate(self.ks):
            others = matched_latents(order[:, :k], activation, indices, frequency=self.frequency)
            table = torch.full((len(order), self.d_sae), len(self.ks), dtype=torch.uint8)
            image, place = (others >= 0).nonzero(as_tuple=True)
            table[image, others[image, place]] = level
            yield [level], table, (others == NONE_LEFT).any(1)

    def _ranked(self, ranking: str, label: int | None) -> Tensor:
        """[max(ks)] a class's latents, or the data set's (None), best first, then ``SILENT``: those without a score are none of them."""
        if (ranking, label) not in self._known:
            scores = self.scores[ranking].sum(0) if label is None else self.scores[ranking][label]
            best = scores.sort(descending=True, stable=True)
            self._known[ranking, label] = best.indices.masked_fill(best.values <= 0, SILENT)[: self.ks[-1]].cpu()
        return self._known[ranking, label]

    def _levels(self, order: Tensor) -> Tensor:
        """Rankings [R, n] to levels [R, S]."""
        levels = torch.full((len(order), self.d_sae + 1), len(self.ks), dtype=torch.uint8)
        for level in reversed(range(len(self.ks))):
            levels.scatter_(1, order[:, : self.ks[level]] % (self.d_sae + 1), level)  # SILENT falls into a column of its own
        return levels[:, :-1]


def matched_latents(own: Tensor, activation: Tensor, indices: Tensor, seed: int = 0, frequency: Tensor | None = None) -> Tensor:
    """For each of an image's ``own`` latents [B, k] another, about as active ([B, S]) and, where that is known, as frequent: [B, k]."""
    known = None if frequency is None else frequency.double().cpu().numpy()
    # Latents that no train image activates stand a decade below the rarest that some image does.
    known = None if known is None else np.log10(np.maximum(known, known[known > 0].min(initial=1) / 10))
    controls, activation = torch.full(own.shape, SILENT), activation.cpu().double().numpy()
    for i, index in enumerate(indices.tolist()):
        mine, active = own[i].numpy(), activation[i] > 0
        places = np.flatnonzero(active[mine] & (mine >= 0))
        pool = np.setdiff1d(np.flatnonzero(active), mine)
        weights = np.log10(activation[i], where=active, out=np.zeros(len(active)))[:, None]
        weights = weights if known is None else np.column_stack([weights, known])
        found = match_by_weight(mine[places], pool, weights, np.random.default_rng([seed, index]))
        controls[i, places] = torch.from_numpy(np.concatenate([found, np.full(len(places) - len(found), NONE_LEFT)]))
    if (controls == NONE_LEFT).any():
        warnings.warn(
            f"Controls of {own.shape[1]} latents: in some images too few others are active; there the outcome is NaN. Ask for fewer.",
            stacklevel=2,
        )
    return controls


def match_by_weight(targets: np.ndarray, pool: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each target in turn a random one of the pool's nearest members in standardised weight [S, d], none twice; fewer if it ends."""
    if not len(targets):
        return np.empty(0, int)
    spread = weights[np.concatenate([targets, pool])].std(0)
    points = weights / np.where(spread > 0, spread, 1)
    places, free = points[pool], np.ones(len(pool), dtype=bool)
    found: list[int] = []
    for target in targets[: len(pool)].tolist():
        distance = np.where(free, ((places - points[target]) ** 2).sum(1), np.inf)
        n = min(N_NEAREST, len(pool) - len(found))
        chosen = int(np.argpartition(distance, n - 1)[:n][rng.integers(n)])
        free[chosen] = False
        found.append(pool[chosen])
    return np.array(found, int)
