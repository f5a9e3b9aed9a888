"""Latents in pictures: what CLIP saw, reference images with masks, and the four levels from one patch to the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..activations.mixing import TOKENS
from .classes import class_scores, top_latents
from .reading import latent_masks
from .summary import LatentSummary

N_REFERENCES = 5  # images that show a latent; fewer where fewer were active
N_LATENTS = 8  # of each level


def seen_image(clip, image) -> Tensor:
    """The picture that CLIP saw, crop and scale included: uint8 [H, W, 3].

    Parameters
    ----------
    clip : ClipModel; its ``preprocess`` must hold a normalisation, which is undone
    image : PIL image, or preprocessed Tensor [3, H, W]
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

    images: Tensor  # [n, H, W, 3] uint8, as CLIP saw them; n <= 5, no padding
    masks: Tensor  # [n, rows, columns] activations on the patch grid
    values: Tensor  # [n] mean activations, descending
    indices: Tensor  # [n] indices in the data set


def reference_images(clip, sae, dataset, summary: LatentSummary, latents: Sequence[int], layer: int) -> list[References]:
    """The five strongest images of some latents, with masks; fewer where fewer were active.

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    dataset, summary : the one that the LatentSummary was made from, and that
    latents : sequence of int
    """
    sae.check_model(clip, layer)
    summary.check(sae, dataset)
    images, values = summary.top_images[:, :N_REFERENCES], summary.top_values[:, :N_REFERENCES]
    return [references(clip, sae, dataset, latent, images[latent], values[latent], layer) for latent in map(int, latents)]


def references(clip, sae, dataset, latent: int, images: Tensor, values: Tensor, layer: int) -> References:
    """A latent's images by their places [k], strongest first; -1 is padding."""
    images = images[images >= 0]
    if not len(images):
        return References(torch.zeros(0, *clip.image_size, 3, dtype=torch.uint8), torch.zeros(0, *clip.grid), values[:0], images)
    inputs = torch.stack([clip.preprocess(dataset[int(i)].image) for i in images])
    masks = latent_masks(clip, sae, inputs, [latent], layer)[:, 0].cpu()
    return References(torch.stack([seen_image(clip, x) for x in inputs]), masks, values[: len(images)], images)


class Levels(NamedTuple):
    """One image's top latents at the levels of Lim et al., section 3: patch, image, class (where there are labels), data set."""

    image: Tensor  # [H, W, 3] uint8, as CLIP saw it
    class_name: str
    patch: tuple[int, int]  # row and column
    table: pd.DataFrame  # level, rank, latent, value: h at the patch; a_i; a_c and a_D as tokens per image
    masks: dict[int, Tensor]  # [rows, columns] activations in the image of every latent in the table


@torch.no_grad()
def activation_levels(clip, sae, dataset, index: int, layer: int, summary: LatentSummary) -> Levels:
    """Follow one image from a patch to the data set: the eight top latents of each level.

    The patch is where the latent that most exceeds the data set on the image's class (without labels: on the image) is most active.

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    dataset, index : with the classes of ``summary``, and a place in it
    summary : LatentSummary
    """
    sae.check_model(clip, layer)
    summary.check(sae)
    example = dataset[index]
    inputs = clip.preprocess(example.image)
    h = sae.encode(clip.residual(inputs[None], layer)[0, : clip.n_tokens].to(sae.W_enc.device)).cpu()
    grid = h[1:].T.unflatten(1, clip.grid)
    per_dataset = (summary.dataset_counts / summary.n_images).float()
    image, label = (h[TOKENS[summary.tokens]] > summary.tau).sum(0).float(), example.label
    of_class = {"class": summary.class_counts[label] / summary.class_images[label].clamp_min(1)} if summary.class_names else {}
    row, column = divmod(int(grid[(of_class.get("class", image) - per_dataset).argmax()].argmax()), clip.grid[1])
    levels = {"patch": grid[:, row, column], "image": image, **of_class, "data set": per_dataset}
    records = [
        (level, rank, latent, float(activation[latent]))
        for level, activation in levels.items()
        for rank, latent in enumerate(top_latents(activation[None], N_LATENTS)[0])
    ]
    table = pd.DataFrame(records, columns=["level", "rank", "latent", "value"])
    masks = {int(latent): grid[latent] for latent in table["latent"].unique()}
    return Levels(seen_image(clip, inputs), dataset.class_names[example.label] if dataset.class_names else "", (row, column), table, masks)


def level_overlap(summary: LatentSummary, k: int = 10) -> pd.DataFrame:
    """How many of its k top latents each class shares with other levels.

    Parameters
    ----------
    summary : LatentSummary
    k : int

    Returns a row a class with images: class_index, dataset (latents shared with the data set's top k), other (mean number shared with the
    other classes' top k), chance (what as many random living latents would share with the data set's).
    """
    present = summary.class_images.nonzero().flatten()
    overall = set(top_latents(summary.dataset_counts[None], k)[0])
    tops = [set(latents) for latents in top_latents(class_scores(summary, "count")[present], k)]
    shared = np.array([[len(a & b) for b in tops] for a in tops])
    n_living = max(int((~summary.dead).sum()), 1)
    dataset, chance = [float(len(top & overall)) for top in tops], [len(top) * len(overall) / n_living for top in tops]
    other = (shared.sum(1) - shared.diagonal()) / max(len(tops) - 1, 1)
    return pd.DataFrame({"class_index": present.numpy(), "dataset": dataset, "other": other, "chance": chance})
