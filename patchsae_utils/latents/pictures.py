"""Latents in pictures: what CLIP saw, reference images with masks, and the four levels from one patch to the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import TOKENS, LatentSummary, latent_masks

if TYPE_CHECKING:
    from .features import FeatureStore


def upsample_masks(masks: Tensor, size: int | tuple[int, int], mode: str = "nearest") -> Tensor:
    """Bring masks on the patch grid to the size of the image that CLIP saw (see :func:`seen_image`).

    Parameters
    ----------
    masks : Tensor [B, n, rows, columns]
    size : int or (height, width)
    mode : {"nearest", "bilinear"}
        Bilinear ends at the outermost patch centres' values, as ``align_corners=False`` does.

    Returns
    -------
    Tensor [B, n, height, width]
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"Unknown mode {mode!r}. Valid: nearest, bilinear.")
    size = (size, size) if isinstance(size, int) else tuple(size)
    return F.interpolate(masks.float(), size, mode=mode, **({"align_corners": False} if mode == "bilinear" else {}))


def seen_image(clip, image) -> Tensor:
    """The picture that CLIP saw, crop and scale included: uint8 [H, W, 3].

    Parameters
    ----------
    clip : ClipModel
    image : PIL image or Tensor [3, H, W]
        A tensor is taken as already preprocessed.

    Raises
    ------
    ValueError
        If ``clip.preprocess`` has no normalisation that could be undone.
    """
    normalised = image if isinstance(image, Tensor) else clip.preprocess(image)
    steps = [s for s in getattr(clip.preprocess, "transforms", []) if hasattr(s, "mean") and hasattr(s, "std")]
    if not steps:
        raise ValueError(f"clip.preprocess holds no Normalize step with a mean and a std to undo: {clip.preprocess!r}.")
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (steps[-1].mean, steps[-1].std))
    pixels = normalised.cpu().float() * std + mean
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


class References(NamedTuple):
    """A latent's strongest images and where it is active in them."""

    latent: int
    images: Tensor
    """[n, H, W, 3] uint8, as CLIP saw them; n <= k, no padding."""
    masks: Tensor
    """[n, rows, columns] activations on the patch grid."""
    values: Tensor
    """[n] mean activations, descending."""
    labels: Tensor
    """[n] classes."""
    indices: Tensor
    """[n] indices in the data set."""


def reference_images(clip, sae, dataset, summary: LatentSummary, latents: Sequence[int], layer: int, k: int = 5) -> list[References]:
    """The reference images of some latents, with masks.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset
        The one that ``summary`` was made from: its indices are looked up here.
    summary : LatentSummary
    latents : sequence of int
    layer : int
    k : int
        Images a latent; fewer where fewer were active.

    Raises
    ------
    ValueError
        If the summary was made from a data set of another length.
    """
    _check_dataset(summary, dataset)
    found = []
    for latent in map(int, latents):
        indices = summary.top_images[latent, :k]
        indices = indices[indices >= 0]
        n = len(indices)
        if n:
            inputs = torch.stack([clip.preprocess(dataset[int(i)].image) for i in indices])
            pictures = torch.stack([seen_image(clip, x) for x in inputs])
            masks = latent_masks(clip, sae, inputs, [latent], layer)[:, 0].cpu()
        else:
            pictures, masks = torch.zeros(0, *clip.image_size, 3, dtype=torch.uint8), torch.zeros(0, *clip.grid)
        found.append(References(latent, pictures, masks, summary.top_values[latent, :n], summary.top_labels[latent, :n], indices))
    return found


class PatchReferences(NamedTuple):
    """A latent's strongest patches, cut out with their surroundings."""

    latent: int
    crops: Tensor
    """[n, h, w, 3] uint8 parts of the images as CLIP saw them; n <= k, no padding."""
    boxes: Tensor
    """[n, 4] top, left, height and width of the patch within its crop, in pixels."""
    images: Tensor
    """[n] indices in the data set."""
    patches: Tensor
    """[n] ``row * columns + column`` on the grid."""
    values: Tensor
    """[n] activations, descending."""


def reference_patches(clip, dataset, summary: LatentSummary, latents: Sequence[int], k: int = 5, margin: int = 2) -> list[PatchReferences]:
    """The strongest patches of some latents, as pictures to look at or to name the latent by.

    Parameters
    ----------
    clip : ClipModel
        For its preprocessing and grid; nothing is computed with it.
    dataset
        The one that ``summary`` was made from.
    summary : LatentSummary
        Of all tokens, or of patches.
    latents : sequence of int
    k : int
        Patches a latent; fewer where fewer were found.
    margin : int
        Patches around it on every side. At the border the crop is moved inwards, so that all crops have one size.

    Raises
    ------
    ValueError
        If the summary read no patches or another data set, or margin is out of range.
    """
    _check_dataset(summary, dataset)
    rows, columns = clip.grid
    if summary.top_patches is None:
        raise ValueError("The summary read CLS alone, which has no place. Make one with tokens='all' or 'patches'.")
    if margin < 0 or 2 * margin + 1 > min(rows, columns):
        raise ValueError(f"margin must be 0 to {(min(rows, columns) - 1) // 2} on a grid of {rows} x {columns}, got {margin}.")
    height, width = clip.image_size[0] // rows, clip.image_size[1] // columns
    side = 2 * margin + 1
    found = []
    for latent in map(int, latents):
        images = summary.top_patch_images[latent, :k]
        images = images[images >= 0]
        patches = summary.top_patches[latent, : len(images)]
        crops = torch.zeros(len(images), side * height, side * width, 3, dtype=torch.uint8)
        boxes = torch.zeros(len(images), 4, dtype=torch.long)
        for i, (image, patch) in enumerate(zip(images.tolist(), patches.tolist(), strict=True)):
            row, column = divmod(patch, columns)
            top, left = min(max(row - margin, 0), rows - side), min(max(column - margin, 0), columns - side)
            picture = seen_image(clip, dataset[image].image)
            crops[i] = picture[top * height : (top + side) * height, left * width : (left + side) * width]
            boxes[i] = torch.tensor([(row - top) * height, (column - left) * width, height, width])
        found.append(PatchReferences(latent, crops, boxes, images, patches, summary.top_patch_values[latent, : len(images)]))
    return found


def _check_dataset(summary: LatentSummary, dataset) -> None:
    if summary.n_images != len(dataset):
        raise ValueError(
            f"The summary read {summary.n_images} images, this data set has {len(dataset)}: give the data set that was summarised."
        )


# -- levels -------------------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """One image's top latents at the four levels of Lim et al., section 3: patch, image, class, data set."""

    image: Tensor
    """[H, W, 3] uint8, as CLIP saw it."""
    label: int
    class_name: str
    patch: tuple[int, int]
    """Row and column of the patch."""
    table: pd.DataFrame
    """level, rank, latent, value: h at the patch; a_i; a_c and a_D as tokens per image."""
    masks: dict[int, Tensor]
    """[rows, columns] activations in the image of every latent in the table."""
    tau: float = 0.2
    """Threshold of the counts."""


class LevelCounts(NamedTuple):
    """Activations counted at the four levels of Lim et al., section 3."""

    tokens: Tensor
    """[B, T, S] bool, a_ij: h > tau."""
    images: Tensor
    """[B, S] a_i: active tokens of each image."""
    classes: Tensor
    """[C, S] a_c: summed over the images of each class."""
    dataset: Tensor
    """[S] a_D: summed over all images."""


def count_levels(h: Tensor, labels: Tensor, n_classes: int, tau: float = 0.2) -> LevelCounts:
    """From token to data set: a_ij = 1(h_ij > tau) and its sums. For activations in memory; ``summarize_latents`` does it for a data set.

    Parameters
    ----------
    h : Tensor [B, T, S]
        Activations of image tokens: without the prompt tokens of adapted models.
    labels : LongTensor [B]
    n_classes : int
    tau : float

    Returns
    -------
    LevelCounts
        Counts are int64.

    Raises
    ------
    ValueError
        If the shapes differ, a label is outside range(n_classes) or tau is negative.

    Source: Lim et al., ICLR 2025, section 3.1.
    """
    if h.ndim != 3 or len(labels) != len(h):
        raise ValueError(f"h must be [B, T, S] with a label an image, got {list(h.shape)} and {len(labels)} labels.")
    if tau < 0 or (len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < n_classes)):
        raise ValueError(f"Needs tau >= 0 and labels in range({n_classes}), got tau={tau}, labels={labels.tolist()[:10]}.")
    tokens = h > tau
    images = tokens.sum(1)
    classes = torch.zeros(n_classes, h.shape[2], dtype=torch.long, device=h.device).index_add_(0, labels.to(h.device), images)
    return LevelCounts(tokens, images, classes, images.sum(0))


@torch.no_grad()
def activation_levels(
    clip,
    sae,
    dataset,
    index: int,
    layer: int,
    summary: LatentSummary,
    *,
    patch: tuple[int, int] | None = None,
    k: int = 8,
    tau: float | None = None,
    features: FeatureStore | None = None,
) -> Levels:
    """Follow one image from a patch to the data set.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset
        With the classes of ``summary``.
    index : int
        Of the image.
    layer : int
    summary : LatentSummary
        Gives the class counts and the data-set counts.
    patch : (row, column), optional
        Default: where the strongest latent of the image's class, relative to the data set, is most active.
    k : int
        Latents a level.
    tau : float, optional
        A token counts where h > tau. Default: the summary's; any other needs ``features``.
    features : FeatureStore, optional
        Of the same data set and tokens as the summary: counts classes at any tau, without reading an image.

    Raises
    ------
    ValueError
        If the patch is outside the grid, or tau is not the summary's and there is no store to count with.
    """
    tau = summary.tau if tau is None else tau
    counts = summary.class_counts
    if tau != summary.tau:
        if features is None:
            raise ValueError(
                f"The summary counted tokens above {summary.tau:g}. For tau={tau:g} give features=write_features(clip, sae, dataset, layer, "
                f"folder), or a summary made with summarize_latents(..., tau={tau:g})."
            )
        if (features.n_images, features.n_latents, features.tokens) != (summary.n_images, summary.n_latents, summary.tokens):
            raise ValueError(
                f"{features!r} was not written from the data set and tokens of the summary ({summary.n_images:,} images, {summary.tokens!r})."
            )
        counts = features.class_counts(tau)
    example = dataset[index]
    inputs = clip.preprocess(example.image)
    h = sae.encode(clip.residual(inputs[None], layer)[0, : clip.n_tokens].to(sae.W_enc.device)).cpu()
    rows, columns = clip.grid
    grid = h[1:].T.reshape(-1, rows, columns)

    per_class = counts[example.label] / summary.class_images[example.label].clamp_min(1)
    per_dataset = (counts.sum(0, dtype=torch.float64) / summary.n_images).float()
    if patch is None:
        own = int((per_class - per_dataset).argmax())
        patch = divmod(int(grid[own].argmax()), columns)
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f"Patch {tuple(patch)} is outside the grid of {rows} x {columns} patches.")

    levels = {
        "patch": grid[:, patch[0], patch[1]],
        "image": (h[TOKENS[summary.tokens]] > tau).sum(0).float(),
        "class": per_class,
        "data set": per_dataset,
    }
    records = []
    for level, activation in levels.items():
        value, latent = activation.sort(descending=True, stable=True)
        records += [
            {"level": level, "rank": rank, "latent": int(latent[rank]), "value": float(value[rank])}
            for rank in range(min(k, len(value)))
            if value[rank] > 0
        ]
    table = pd.DataFrame(records, columns=["level", "rank", "latent", "value"])
    masks = {int(latent): grid[latent] for latent in table["latent"].unique()}
    return Levels(seen_image(clip, inputs), int(example.label), dataset.class_names[example.label], tuple(patch), table, masks, tau)


def level_overlap(summary: LatentSummary, k: int = 10) -> pd.DataFrame:
    """How many of its k top latents each class shares with other levels.

    Parameters
    ----------
    summary : LatentSummary
    k : int

    Returns
    -------
    DataFrame
        One row a class with images: class_index, dataset (latents shared with the data set's top k), other (mean number shared with the
        other classes' top k), chance (what k random living latents would share).
    """
    present = summary.class_images.nonzero().flatten()
    top = summary.class_counts[present].topk(k, dim=1).indices
    members = torch.zeros(len(present), summary.n_latents).scatter_(1, top, 1.0)
    overall = torch.zeros(summary.n_latents)
    overall[summary.dataset_counts.topk(k).indices] = 1
    between = members @ members.T
    other = (between.sum(1) - between.diag()) / max(len(present) - 1, 1)
    chance = k * k / max(int((~summary.dead).sum()), 1)
    return pd.DataFrame({"class_index": present.numpy(), "dataset": (members @ overall).numpy(), "other": other.numpy(), "chance": chance})


# -- concepts ---------------------------------------------------------------------------------------------------------
