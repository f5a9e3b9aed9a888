"""Which latents a class rests on: a *link* is a latent's activation times the gradient of the class's margin along its decoder row, over tokens.

A class's positive links over their sum are its *evidence*; its *reuse* is what two models share of it: the sum of the smaller shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..interventions.attribution import all_others, logit_gradient
from ..run.intervals import mean_interval
from ..sae.model import SparseAutoencoder
from .compare import APART, OTHER, SAME, TWICE, latent_groups, mean_of_halves, turns

LINKS = {"high": "stayed", "high-to-low": "vanished", "low-to-high": "appeared"}  # group of latent_groups -> what happened to the link
_IMAGES = 8  # whose latents [T, S] are held at once


@dataclass(frozen=True)
class ClassLinks:
    """What each class's margin owes to each latent [C, S], in CLIP and in the adapted model; means over pictures of the class."""

    class_names: list[str]
    halves: Tensor  # [2, 2, C, S] links of CLIP and of the adapted model, on the pictures of each class at even and at odd turns
    half_images: Tensor  # [2, C] how many pictures those are

    @property
    def base(self) -> Tensor:
        """[C, S] CLIP's links, on all pictures."""
        return mean_of_halves(self.halves[0], self.half_images)

    @property
    def adapted(self) -> Tensor:
        """[C, S] the adapted model's."""
        return mean_of_halves(self.halves[1], self.half_images)

    def reuse(self) -> pd.DataFrame:
        """How much of a class's evidence rests on the same latents, beside controls: comparison, reuse, low, high (over classes)."""
        pairs = {SAME: (self.base, self.adapted), APART: (self.halves[0, 0], self.halves[1, 1]), TWICE: tuple(self.halves[0])}
        if len(self.class_names) > 1:
            shift = int(np.random.default_rng(0).integers(1, len(self.class_names)))
            pairs[OTHER] = (self.base, self.adapted.roll(shift, 0))
        records = []
        for name, (first, second) in pairs.items():
            shared = shared_evidence(first, second)
            shared = shared[~shared.isnan()]
            records.append((name, *(mean_interval(shared, "classes")[:3] if len(shared) else (np.nan,) * 3)))
        return pd.DataFrame(records, columns=["comparison", "reuse", "low", "high"])

    def links(self) -> pd.DataFrame:
        """Each class's strongest links in either model: class, class_name, latent, base, adapted (shares of evidence), link (``LINKS``)."""
        table = latent_groups(evidence(self.base), evidence(self.adapted))
        table["link"] = table.pop("group").map(LINKS)
        table.insert(1, "class_name", [self.class_names[i] for i in table["class"]])
        return table


def evidence(links: Tensor) -> Tensor:
    """Positive links [C, S], each class's divided by their sum; a class without any gets zeros."""
    positive = links.clamp_min(0)
    return positive / positive.sum(1, keepdim=True).clamp_min(torch.finfo(positive.dtype).tiny)


def shared_evidence(first: Tensor, second: Tensor) -> Tensor:
    """What two models share of each class's evidence, from links [C, S]: [C] in [0, 1], NaN where one of them has none."""
    shares = [evidence(links) for links in (first, second)]
    shared = torch.minimum(*shares).sum(1)
    shared[(shares[0].sum(1) == 0) | (shares[1].sum(1) == 0)] = torch.nan
    return shared


class Reader(NamedTuple):
    """One model on a batch."""

    clip: ClipModel
    head: Tensor
    tail: Callable[[Residual], Tensor]
    residual: Residual


class LinkSums:
    """Sums of links over batches; ``links()`` gives their means."""

    def __init__(self, class_names: list[str], sae: SparseAutoencoder):
        self.class_names, self.sae, self.rows = class_names, sae, sae.W_dec.detach()
        self.halves = self.rows.new_zeros(2, 2, len(class_names), sae.d_sae, dtype=torch.float64)
        self.seen = torch.zeros(2, len(class_names), dtype=torch.long)

    def add(self, readers: Sequence[Reader], labels: Tensor) -> None:
        """Add a batch: CLIP and the adapted model on the same pictures, and their classes [B]."""
        gradients = [logit_gradient(each.clip, each.tail, each.residual, each.head, labels, all_others(each.head)) for each in readers]
        turn = turns(labels.cpu(), self.seen).to(labels.device)
        n_classes, n_latents = self.halves.shape[2:]
        for rows in torch.arange(len(labels), device=labels.device).split(_IMAGES):
            h = [self.sae.encode(each.residual.tokens[rows]) for each in readers]
            active = (h[0] > 0) | (h[1] > 0)  # all other links are 0
            image, token, latent = active.nonzero(as_tuple=True)
            place = (turn[rows][image] * n_classes + labels[rows][image]) * n_latents + latent
            for total, activation, gradient in zip(self.halves, h, gradients, strict=True):
                weight = (self.rows[latent] * gradient[rows][image, token]).sum(1)
                total.view(-1).index_add_(0, place, (activation[active] * weight).double())

    def links(self) -> ClassLinks:
        """The means over the pictures of each class."""
        return ClassLinks(self.class_names, self.halves.cpu() / self.seen.clamp_min(1)[..., None], self.seen)
