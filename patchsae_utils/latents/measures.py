"""Statistics of a latent's reference images as plain functions: which images, which classes, how mixed."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor


def label_entropy(top_values: Tensor, top_labels: Tensor, n_classes: int) -> Tensor:
    """Entropy [S], in nats, of the labels of each latent's reference images [S, k], weighted by activation; NaN for dead latents.

    Source: Lim et al., ICLR 2025, section 3.2.
    """
    mass = torch.zeros(len(top_values), n_classes, dtype=top_values.dtype, device=top_values.device)
    mass.scatter_add_(1, top_labels.masked_fill(top_values <= 0, 0), top_values)
    p = mass / mass.sum(1, keepdim=True)  # 0/0 = NaN marks the dead
    return torch.special.entr(p).sum(1)


def label_std(top_values: Tensor, top_labels: Tensor) -> Tensor:
    """Standard deviation [S], by n, of the label indices of each latent's reference images [S, k]; NaN for dead latents.

    Source: Lim et al., ICLR 2025, section 3.2.
    """
    labels, real = top_labels.double(), (top_values > 0).double()
    n = real.sum(1)
    mean = (labels * real).sum(1) / n
    return (((labels - mean[:, None]) ** 2 * real).sum(1) / n).sqrt().to(top_values.dtype)


_PLACES = 2**32  # places that a key can name


def pack_top(values: Tensor, places: Tensor) -> Tensor:
    """One integer for a float32 value and its place in ``range(2**32)``: larger for larger values, then for earlier places; 0 is padding.

    The bits of a positive float32, ordered like the floats, are its upper half, the place, counted backwards, its lower one.
    """
    keys = (values.contiguous().view(torch.int32).long() << 32) + (_PLACES - 1 - places)
    return keys.masked_fill(~(values > 0), 0)


def unpack_top(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values (float32) and places of :func:`pack_top`'s keys; padding gives (0, -1)."""
    values = (keys >> 32).int().view(torch.float32)
    return values, (_PLACES - 1 - (keys & (_PLACES - 1))).masked_fill(keys == 0, -1)


def merge_keys(kept: Tensor, new: Tensor) -> None:
    """Bring the k largest keys of each latent up to date, in place: kept [S, k], descending, by new ones [S, n]."""
    rows = (new.amax(1) > kept[:, -1]).nonzero().flatten()  # few, once many images were read
    if len(rows):
        kept[rows] = torch.cat([kept[rows], new[rows]], 1).topk(kept.shape[1], dim=1).values


def shuffled_label_entropy(top_values: Tensor, top_images: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Label entropy under shuffled labels, [S] nats.

    Parameters
    ----------
    top_values, top_images : Tensor [S, k], of a ``LatentSummary``
    labels, n_classes : LongTensor [n_images] of the whole data set, and int
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return label_entropy(top_values, labels[order][top_images.clamp_min(0)], n_classes)


def contrasting_latents(frame: pd.DataFrame) -> dict[int, str]:
    """Four latents of different kind, by their statistics alone.

    Parameters
    ----------
    frame : DataFrame of ``LatentSummary.to_frame()``; latents that are not faint and have as many reference images as any are considered

    Returns latent -> what it stands for: "one class" (lowest label entropy), "related classes" (close label indices, above median entropy),
    "everywhere" (most frequent), "seldom, mixed" (rarest in the tenth of highest entropy); unlabelled: "strongest", "everywhere", "seldom".
    """
    full = frame[~frame["faint"]]
    full = full[full["n_reference"] == full["n_reference"].max()]
    above = lambda share: full[full["label_entropy"] >= full["label_entropy"].quantile(share)]  # noqa: E731
    rules = {
        "one class": (full, ["label_entropy", "frequency"], [True, False]),
        "related classes": (above(0.5), ["label_std", "frequency"], [True, False]),
        "everywhere": (full, ["frequency", "mean_activation"], [False, False]),
        "seldom, mixed": (above(0.9), ["frequency", "mean_activation"], [True, False]),
    }
    if full["label_entropy"].isna().all():
        strongest = (full, ["mean_activation", "frequency"], [False, False])
        rules = {"strongest": strongest, "everywhere": rules["everywhere"], "seldom": (full, *rules["seldom, mixed"][1:])}
    chosen: dict[int, str] = {}
    for title, (rows, by, ascending) in rules.items():
        rest = rows[~rows["latent"].isin(list(chosen))].sort_values(by, ascending=ascending, kind="stable")
        if len(rest):
            chosen[int(rest["latent"].iloc[0])] = title
    return chosen
