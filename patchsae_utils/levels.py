"""Latents in pictures: what CLIP saw, reference images with masks, and the four levels from one patch to the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import openmoji
from .latents import TOKENS, LatentSummary, latent_masks

if TYPE_CHECKING:
    from .concepts import ConceptReport


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
    if summary.n_images != len(dataset):
        raise ValueError(
            f"The summary read {summary.n_images} images, this data set has {len(dataset)}: give the data set that was summarised."
        )
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


@torch.no_grad()
def activation_levels(
    clip, sae, dataset, index: int, layer: int, summary: LatentSummary, *, patch: tuple[int, int] | None = None, k: int = 8
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
        Gives tau, the class counts and the data-set counts.
    patch : (row, column), optional
        Default: where the strongest latent of the image's class, relative to the data set, is most active.
    k : int
        Latents a level.

    Raises
    ------
    ValueError
        If the patch is outside the grid.
    """
    example = dataset[index]
    inputs = clip.preprocess(example.image)
    h = sae.encode(clip.residual(inputs[None], layer)[0, : clip.n_tokens].to(sae.W_enc.device)).cpu()
    rows, columns = clip.grid
    grid = h[1:].T.reshape(-1, rows, columns)

    per_class = summary.class_counts[example.label] / summary.class_images[example.label].clamp_min(1)
    per_dataset = (summary.dataset_counts / summary.n_images).float()
    if patch is None:
        own = int((per_class - per_dataset).argmax())
        patch = divmod(int(grid[own].argmax()), columns)
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f"Patch {tuple(patch)} is outside the grid of {rows} x {columns} patches.")

    levels = {
        "patch": grid[:, patch[0], patch[1]],
        "image": (h[TOKENS[summary.tokens]] > summary.tau).sum(0).float(),
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
    return Levels(seen_image(clip, inputs), int(example.label), dataset.class_names[example.label], tuple(patch), table, masks)


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


class ConceptExample(NamedTuple):
    """One concept in one scene, and its best latent there."""

    concept: str
    latent: int
    ap: float
    """Over all reported scenes, not this one alone."""
    index: int
    """Of the scene in the data set."""
    image: Tensor
    """[H, W, 3] uint8, as CLIP saw it."""
    truth: Tensor
    """[rows, columns] bool: patches that show the concept."""
    activation: Tensor
    """[rows, columns] of the latent."""


def concept_examples(clip, sae, dataset, layer: int, report: ConceptReport, concepts: Sequence[str]) -> list[ConceptExample]:
    """For each concept the scene that shows most of it, whatever its latent does there.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset : OpenMojiData
        The reported scenes.
    layer : int
    report : ConceptReport
    concepts : sequence of str
        As in ``report.detection["concept"]``.

    Raises
    ------
    ValueError
        For a concept that the report doesn't hold, or that no scene shows.
    """
    best = report.detection[report.detection["dictionary"] == report.detection["dictionary"].iloc[0]].set_index("concept")
    unknown = [c for c in concepts if c not in best.index]
    if unknown:
        raise ValueError(f"The report holds no concept {unknown[0]!r}. It holds {len(best)}, among them {', '.join(best.index[:5])}.")
    columns = [openmoji.concept_names().index(c) for c in concepts]
    area = np.array([openmoji.concept_masks(dataset.truth(i))[columns].sum((1, 2)) for i in range(len(dataset))])
    examples = []
    for concept, column, index, patches in zip(concepts, columns, area.argmax(0).tolist(), area.max(0).tolist(), strict=True):
        if patches == 0:
            raise ValueError(f"No scene of {dataset.spec!r} ({dataset.split}) shows {concept!r}.")
        row, inputs = best.loc[concept], clip.preprocess(dataset[index].image)
        truth = torch.from_numpy(openmoji.concept_masks(dataset.truth(index))[column])
        activation = latent_masks(clip, sae, inputs[None], [row["latent"]], layer)[0, 0].cpu()
        examples.append(ConceptExample(concept, int(row["latent"]), float(row["ap"]), index, seen_image(clip, inputs), truth, activation))
    return examples
