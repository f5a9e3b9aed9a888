"""What every layer holds: the norms of its tokens, their principal components, and what a linear probe reads from a single token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from torch import Tensor

from ..data import batches
from ..data.truth import patch_shares
from ..run.intervals import mean_interval, percent

OUTLIER_FACTOR = 2.0  # a patch is an outlier when its norm exceeds so many times the median patch's of its layer
_N_PATCHES = 16  # of each image that a survey keeps
_EPOCHS, _BATCH, _LR, _WEIGHT_DECAY = 15, 512, 0.01, 1e-3  # of a probe: AdamW, a rate that falls to 0 by a cosine


class ResidualSurvey(NamedTuple):
    """A sample of the residual stream after every block, on the CPU."""

    layers: list[int]
    norms: Tensor  # [L, N, 1+P] Euclidean norm of every token
    cls: Tensor  # [L, N, D] CLS tokens
    patches: Tensor  # [L, N, K, D] some patches of each image
    places: Tensor  # [N, K] which: 0 to P-1, row by row
    patch_labels: Tensor  # [N, K] class that covers half of the patch, -1 where none does; the image's label where no ground truth is known
    labels: Tensor  # [N] label of each image


@torch.no_grad()
def survey_residuals(clip, dataset, *, progress: bool = True) -> ResidualSurvey:
    """Sample the residual stream after every block: all norms, all CLS tokens, and up to 16 patches of each image.

    Parameters
    ----------
    clip : ClipModel
    dataset : ImageData or OpenMojiData
        With ground truth, the patches are drawn among those that an object covers by half or more.
    progress : bool
    """
    parts = []
    for batch in batches(dataset, clip.preprocess, progress="residual stream" if progress else None):
        stream = clip.residuals(batch.images).cpu()
        owners = torch.stack([_owners(clip, dataset, int(i), int(label)) for i, label in zip(batch.indices, batch.labels, strict=True)])
        noise = torch.stack([torch.from_numpy(np.random.default_rng([0, int(i)]).random(owners.shape[1])) for i in batch.indices])
        chosen = (noise + (owners < 0)).argsort(1)[:, :_N_PATCHES]  # labelled patches first, in random order
        patches = stream[:, :, 1:].gather(2, chosen[None, ..., None].expand(len(stream), -1, -1, stream.shape[-1]))
        parts.append((stream.norm(dim=-1), stream[:, :, 0], patches, chosen, owners.gather(1, chosen), batch.labels))
    by_layer, by_image = [*zip(*parts, strict=True)][:3], [*zip(*parts, strict=True)][3:]
    return ResidualSurvey(list(range(clip.n_layers)), *(torch.cat(part, 1) for part in by_layer), *(torch.cat(part) for part in by_image))


def norm_table(survey: ResidualSurvey) -> pd.DataFrame:
    """Norms by layer and kind of token.

    Parameters
    ----------
    survey : ResidualSurvey

    Returns
    -------
    DataFrame
        ``layer``, ``token`` (CLS or patch), ``low``, ``median``, ``high`` (5th, 50th, 95th percentile over tokens), and ``outliers``: the
        share of tokens above ``OUTLIER_FACTOR`` times the layer's median patch norm.
    """
    rows = []
    for layer, norms in zip(survey.layers, survey.norms.double().numpy(), strict=True):
        typical = np.median(norms[:, 1:])
        for token, values in (("CLS", norms[:, :1]), ("patch", norms[:, 1:])):
            rows.append([layer, token, *np.quantile(values, [0.05, 0.5, 0.95]), (values > OUTLIER_FACTOR * typical).mean()])
    return pd.DataFrame(rows, columns=["layer", "token", "low", "median", "high", "outliers"])


def patch_components(stream: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first three principal components of each layer's patch tokens, over all images, as colors over the grid.

    Their order and sign, which are arbitrary, are matched to the layer before, so that colors change only where the content does.

    Parameters
    ----------
    stream : Tensor [L, B, 1+P, D]
        Of ``clip.residuals``, on any device.
    grid : (int, int)
        Rows and columns of patches.

    Returns
    -------
    colors : Tensor [L, B, rows, columns, 3]
        In [0, 1]: each component between its 1st and 99th percentile.
    explained : Tensor [L, 3]
        Share of the patches' variance, in the order of the colors.
    """
    n_images = stream.shape[1]
    patches = stream[:, :, 1:].flatten(1, 2).double().numpy(force=True)
    colors, explained, before = [], [], None
    for x in patches:
        pca = PCA(3, whiten=True, svd_solver="covariance_eigh")
        scores, order, signs = pca.fit_transform(x), np.arange(3), np.ones(3)
        if before is not None:
            correlation = before.T @ scores / len(x)
            order = linear_sum_assignment(-np.abs(correlation))[1]
            signs = np.where(correlation[np.arange(3), order] < 0, -1.0, 1.0)
        before = scores[:, order] * signs
        low, high = np.quantile(before, [0.01, 0.99], axis=0)
        colors.append(((before - low) / np.maximum(high - low, 1e-12)).clip(0, 1).reshape(n_images, *grid, 3))
        explained.append(pca.explained_variance_ratio_[order])
    return torch.from_numpy(np.stack(colors)).float(), torch.from_numpy(np.stack(explained)).float()


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, n_classes: int) -> Tensor:
    """What one linear map reads: classes [m] of vectors [m, D], by multinomial logistic regression on standardised vectors [n, D]."""
    if not len(train_x) or not len(test_x):
        raise ValueError("A probe needs tokens whose class is known.")
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(n_classes, train_x.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * -(-len(train_x) // _BATCH))
    generator = torch.Generator().manual_seed(0)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(train_x), generator=generator).split(_BATCH):
            loss = F.cross_entropy(F.linear(train_x[rows], weight, bias), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return F.linear(test_x, weight, bias).argmax(1)


def probe_layers(train: ResidualSurvey, test: ResidualSurvey, n_classes: int) -> pd.DataFrame:
    """What a linear probe reads from one token, at every layer: from a patch, the object that covers it; from CLS, the image's class.

    Parameters
    ----------
    train, test : ResidualSurvey
        Of different images.
    n_classes : int

    Returns
    -------
    DataFrame
        ``layer``, ``token`` (CLS or patch), ``accuracy`` with ``low`` and ``high`` (resampled images), ``control`` (the same probe trained on
        permuted labels), ``n_train`` and ``n_test`` tokens. A ``ValueError`` if no token has a label.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for i, layer in enumerate(train.layers):
        for token in ("CLS", "patch"):
            (train_x, train_y, _), (test_x, test_y, images) = (_labelled(survey, i, token) for survey in (train, test))
            hits = linear_probe(train_x, train_y, test_x, n_classes) == test_y
            permuted = train_y[torch.randperm(len(train_y), generator=generator)]
            control = linear_probe(train_x, permuted, test_x, n_classes) == test_y
            share = mean_interval(hits, "images", groups=images)
            rows.append([layer, token, share.value, share.low, share.high, control.float().mean().item(), len(train_y), len(test_y)])
    return pd.DataFrame(rows, columns=["layer", "token", "accuracy", "low", "high", "control", "n_train", "n_test"])


def probe_sentence(probes: pd.DataFrame, layer: int) -> str:
    """What probes read at a layer, in words.

    Parameters
    ----------
    probes : DataFrame
        Of :func:`probe_layers`.
    layer : int
    """
    table = probes.set_index(["token", "layer"]).sort_index()
    patch, cls, first = table.loc[("patch", layer)], table.loc[("CLS", layer)], table.loc["patch"].iloc[0]
    patch_said, cls_said = (percent(*row[["accuracy", "low", "high"]]) for row in (patch, cls))
    return (
        f"At layer {layer} a probe reads the class from a single patch in {patch_said} of cases ({first['accuracy']:.0%} at layer "
        f"{probes['layer'].min()}, {patch['control']:.1%} with permuted labels), and from CLS in {cls_said}."
    )


def _labelled(survey: ResidualSurvey, i: int, token: str) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, labels and images of the tokens of one kind whose class is known."""
    x, y = (survey.cls[i], survey.labels) if token == "CLS" else (survey.patches[i].flatten(0, 1), survey.patch_labels.flatten())
    known = y >= 0
    return x[known], y[known], (torch.arange(len(y)) // (len(y) // len(survey.labels)))[known]


def _owners(clip, dataset, index: int, label: int) -> Tensor:
    """LongTensor [P]: label of what covers at least half of each patch, -1 where nothing does."""
    if not hasattr(dataset, "class_ids"):  # no scenes of the embedded world
        return torch.full((clip.n_tokens - 1,), label)
    truth = dataset.truth(index)
    to_label = {int(class_id): i for i, class_id in enumerate(dataset.class_ids)}
    owners = np.full(clip.grid, -1)
    for class_id, share in zip(truth.class_ids, patch_shares(truth.object_share, clip), strict=True):
        owners[share >= 0.5] = to_label.get(int(class_id), -1)
    return torch.from_numpy(owners).flatten()
