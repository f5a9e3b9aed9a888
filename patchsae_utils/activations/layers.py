"""What every layer holds: the norms of its tokens, their principal components, and what a linear probe reads from a single token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..clip.zero_shot import bootstrap_share
from ..data import batches

OUTLIER_FACTOR = 2.0
"""A patch is an outlier when its norm exceeds so many times the median patch's of its layer."""


class ResidualSurvey(NamedTuple):
    """A sample of the residual stream after every block."""

    layers: list[int]
    norms: Tensor
    """[L, N, 1+P] Euclidean norm of every token."""
    cls: Tensor
    """[L, N, D] CLS tokens."""
    patches: Tensor
    """[L, N, K, D] some patches of each image."""
    places: Tensor
    """[N, K] which: 0 to P-1, row by row."""
    patch_labels: Tensor
    """[N, K] class that covers at least half of the patch, -1 where none does; the image's label where no ground truth is known."""
    labels: Tensor
    """[N] label of each image."""


def residual_layers(clip, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """The residual stream after several blocks, by one forward pass.

    Parameters
    ----------
    clip : ClipModel
    images : Tensor [B, 3, H, W]
    layers : sequence of int, optional
        Default: all.

    Returns
    -------
    Tensor [L, B, 1+P, D]

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    chosen = [clip.layer_index(layer) for layer in (range(clip.n_layers) if layers is None else layers)]
    batch_first = clip.visual.transformer.batch_first
    seen: dict[int, Tensor] = {}

    def keep(index):
        def hook(_module, _inputs, output):
            seen[index] = (output if batch_first else output.transpose(0, 1))[:, : clip.n_tokens].float()

        return hook

    handles = [clip.blocks[index].register_forward_hook(keep(index)) for index in set(chosen)]
    try:
        clip.run_to(images, max(chosen))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([seen[index] for index in chosen])


@torch.no_grad()
def survey_residuals(
    clip, dataset, *, n_patches: int = 16, batch_size: int = 64, workers: int | None = None, seed: int = 0, progress: bool = True
) -> ResidualSurvey:
    """Sample the residual stream after every block.

    Parameters
    ----------
    clip : ClipModel
    dataset : ImageData or OpenMojiData
        With ground truth, the patches are drawn among those that an object covers by half or more.
    n_patches : int
        K, patches kept of each image; the norms are kept of all.
    batch_size, workers : int
    seed : int
        Which patches.
    progress : bool

    Returns
    -------
    ResidualSurvey
    """
    n_places = clip.n_tokens - 1
    if not 1 <= n_patches <= n_places:
        raise ValueError(f"n_patches must lie between 1 and {n_places}, got {n_patches}.")
    norms, cls, patches, places, patch_labels, labels = [], [], [], [], [], []
    for batch in batches(dataset, clip.preprocess, batch_size, workers, progress="residual stream" if progress else None):
        stream = residual_layers(clip, batch.images).cpu()
        owners = torch.stack([_owners(dataset, int(i), int(label), n_places) for i, label in zip(batch.indices, batch.labels, strict=True)])
        noise = torch.stack([torch.from_numpy(np.random.default_rng([seed, int(i)]).random(n_places)) for i in batch.indices])
        chosen = (noise + (owners < 0)).argsort(1)[:, :n_patches]  # labelled patches first, in random order
        norms.append(stream.norm(dim=-1))
        cls.append(stream[:, :, 0])
        patches.append(stream[:, :, 1:].gather(2, chosen[None, ..., None].expand(len(stream), -1, -1, stream.shape[-1])))
        places.append(chosen)
        patch_labels.append(owners.gather(1, chosen))
        labels.append(batch.labels)
    return ResidualSurvey(
        list(range(clip.n_layers)),
        torch.cat(norms, 1),
        torch.cat(cls, 1),
        torch.cat(patches, 1),
        torch.cat(places),
        torch.cat(patch_labels),
        torch.cat(labels),
    )


def norm_table(survey: ResidualSurvey) -> pd.DataFrame:
    """Norms by layer and kind of token.

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
    """The first three principal components of the patch tokens of each layer, as colours over the grid.

    The components are fitted per layer over all patches of all images, so that a colour means the same in each image. Their order and sign
    are arbitrary; they are matched to the layer before, so that colours change only where the content does.

    Parameters
    ----------
    stream : Tensor [L, B, 1+P, D]
        Of :func:`residual_layers`.
    grid : (int, int)
        Rows and columns of patches.

    Returns
    -------
    colors : Tensor [L, B, rows, columns, 3]
        In [0, 1]: each component between its 1st and 99th percentile.
    explained : Tensor [L, 3]
        Share of the patches' variance, in the order of the colours.

    Raises
    ------
    ValueError
        If the grid does not fit.
    """
    n_layers, n_images, n_tokens, width = stream.shape
    if n_tokens - 1 != grid[0] * grid[1]:
        raise ValueError(f"A grid of {grid[0]}x{grid[1]} patches and CLS are {grid[0] * grid[1] + 1} tokens; the stream has {n_tokens}.")
    colors, explained, before = [], [], None
    for layer in range(n_layers):
        x = stream[layer, :, 1:].reshape(-1, width).double()
        x = x - x.mean(0)
        variance, directions = torch.linalg.eigh(x.T @ x)
        scores, shares = x @ directions[:, -3:].flip(1), variance[-3:].flip(0) / variance.sum()
        scores = scores / scores.std(0).clamp_min(1e-12)
        if before is not None:
            correlation = (before.T @ scores / len(x)).numpy()
            order = linear_sum_assignment(-np.abs(correlation))[1]
            signs = np.where(correlation[np.arange(3), order] < 0, -1.0, 1.0)
            scores, shares = scores[:, order] * torch.from_numpy(signs), shares[order]
        before = scores
        low, high = torch.quantile(scores, 0.01, 0), torch.quantile(scores, 0.99, 0)
        colors.append(((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(n_images, *grid, 3))
        explained.append(shares)
    return torch.stack(colors).float(), torch.stack(explained).float()


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    n_classes: int,
    *,
    epochs: int = 15,
    batch_size: int = 512,
    lr: float = 0.01,
    weight_decay: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Multinomial logistic regression on standardised vectors: what one linear map can read.

    Parameters
    ----------
    train_x : Tensor [n, D]
    train_y : LongTensor [n]
    test_x : Tensor [m, D]
    n_classes : int
    epochs, batch_size, lr, weight_decay
        Of AdamW; the rate falls to 0 by a cosine.
    seed : int
        Order of the examples.

    Returns
    -------
    LongTensor [m]
        Predicted classes.

    Raises
    ------
    ValueError
        If there is nothing to learn from, or a label is outside ``range(n_classes)``.
    """
    if len(train_x) == 0 or len(train_x) != len(train_y):
        raise ValueError(f"A probe needs as many labels as vectors, and some; got {len(train_x)} vectors and {len(train_y)} labels.")
    if int(train_y.min()) < 0 or int(train_y.max()) >= n_classes:
        raise ValueError(f"Labels must lie in range({n_classes}), got {int(train_y.min())} to {int(train_y.max())}.")
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(n_classes, train_x.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    steps = epochs * -(-len(train_x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(train_x), generator=generator).split(batch_size):
            loss = F.cross_entropy(F.linear(train_x[rows], weight, bias), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return F.linear(test_x, weight, bias).argmax(1)


def probe_layers(
    train: ResidualSurvey, test: ResidualSurvey, n_classes: int, *, seed: int = 0, n_bootstrap: int = 1000, **options
) -> pd.DataFrame:
    """What a linear probe reads from one token, at every layer: from a patch, the object that covers it; from CLS, the image's class.

    Parameters
    ----------
    train, test : ResidualSurvey
        Of different images.
    n_classes : int
    seed, n_bootstrap : int
    **options
        Passed to :func:`linear_probe`.

    Returns
    -------
    DataFrame
        ``layer``, ``token`` (CLS or patch), ``accuracy`` with ``low`` and ``high`` (bootstrap over images), ``control`` (the same probe
        trained on permuted labels), ``n_train`` and ``n_test`` tokens.
    """
    width = train.cls.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer, *vectors in zip(train.layers, train.cls, test.cls, train.patches, test.patches, strict=True):
        for token, train_x, test_x, train_y, test_y in (
            ("CLS", vectors[0], vectors[1], train.labels, test.labels),
            (
                "patch",
                vectors[2].reshape(-1, width),
                vectors[3].reshape(-1, width),
                train.patch_labels.flatten(),
                test.patch_labels.flatten(),
            ),
        ):
            images = torch.arange(len(test_y)) // (len(test_y) // len(test.labels))
            known, asked = train_y >= 0, test_y >= 0
            train_x, train_y, test_x, test_y = train_x[known], train_y[known], test_x[asked], test_y[asked]
            hits = linear_probe(train_x, train_y, test_x, n_classes, seed=seed, **options) == test_y
            permuted = train_y[torch.randperm(len(train_y), generator=generator)]
            control = linear_probe(train_x, permuted, test_x, n_classes, seed=seed, **options) == test_y
            share, low, high = bootstrap_share(hits, images[asked], n_bootstrap=n_bootstrap, seed=seed)
            rows.append([layer, token, share, low, high, control.float().mean().item(), len(train_y), len(test_y)])
    return pd.DataFrame(rows, columns=["layer", "token", "accuracy", "low", "high", "control", "n_train", "n_test"])


def _owners(dataset, index: int, label: int, n_places: int) -> Tensor:
    """LongTensor [P]: label of what covers at least half of each patch, -1 where nothing does."""
    if not hasattr(dataset, "truth"):
        return torch.full((n_places,), label)
    truth = dataset.truth(index)
    to_label = {int(class_id): i for i, class_id in enumerate(dataset.class_ids)}
    owners = np.full(truth.object_share.shape[1:], -1)
    for class_id, share in zip(truth.class_ids, truth.object_share, strict=True):
        owners[share >= 0.5] = to_label.get(int(class_id), -1)
    return torch.from_numpy(owners).flatten()
