"""How alike the images are that a latent answers to: the monosemanticity score, of all latents at once, in linear time.

The score is the mean cosine of all pairs of image embeddings, each pair weighted by the product of the latent's activations:
MS = (||sum_i a_i e_i||^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2) for unit embeddings e_i. Source: Pach et al., "Sparse autoencoders
learn monosemantic features in vision-language models", 2025; written out this way it needs one product A^T E instead of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .latents import read_latents
from .naming import embed_images
from .summary import TOKENS


def monosemanticity_scores(activations: Tensor, embeddings: Tensor) -> Tensor:
    """The score of each latent.

    Parameters
    ----------
    activations : Tensor [N, S]
        Of each image; not negative. The score does not change when a column is scaled.
    embeddings : Tensor [N, d]
        Of the same images, of unit norm.

    Returns
    -------
    Tensor [S], float64
        In [-1, 1]; NaN for latents that are active in fewer than two images, which make no pair.

    Raises
    ------
    ValueError
        If the numbers of images differ, an activation is negative, or embeddings are not of unit norm.
    """
    return stream_scores([(activations, embeddings)])[0]


def stream_scores(batches: Iterable[tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """:func:`monosemanticity_scores` of images that come batch by batch.

    Memory: S d numbers of float64 for each set of embeddings, whatever the number of images.

    Parameters
    ----------
    batches : iterable of (activations [B, S], embeddings [B, d], ...)
        Several embeddings of the same images (a control beside the real ones) give one result each.

    Returns
    -------
    tuple of Tensor [S], float64
        One for each set of embeddings.

    Raises
    ------
    ValueError
        As :func:`monosemanticity_scores`; or if there are no images.
    """
    first = None
    for activations, *sets in batches:
        _check(activations, sets)
        a = activations.double()
        if first is None:
            n, kinds = a.shape[1], len(sets)
            first = a.new_zeros(n)
            total, squares, largest, count = first.clone(), first.clone(), first.clone(), first.clone()
            directions = [a.new_zeros(n, e.shape[1]) for e in sets]
        total += a.sum(0)
        squares += a.square().sum(0)
        largest = torch.maximum(largest, a.max(0).values)
        count += (a > 0).sum(0)
        for direction, e in zip(directions, sets, strict=True):
            direction += a.T @ e.to(a)
    if first is None:
        raise ValueError("The monosemanticity score needs images; got none.")
    pairs = total.square() - squares
    defined = (count >= 2) & (pairs > 1e-12 * total.square())  # rounding must not decide a score
    safe = torch.where(defined, pairs, 1.0)
    scores = [torch.where(defined, (direction.square().sum(1) - squares) / safe, torch.nan) for direction in directions]
    return tuple(score.clamp(-1, 1) for score in scores[:kinds])


@torch.no_grad()
def monosemanticity(
    clip,
    sae,
    dataset,
    layer: int,
    *,
    embeddings: Tensor | None = None,
    tokens: str = "all",
    pooling: str = "mean",
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Monosemanticity of every latent over a data set, beside what the same activations give on shuffled images.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset
    layer : int
        Block whose output the SAE reads.
    embeddings : Tensor [N, d], optional
        Unit vectors of all images, in the order of the data set: by another model than the studied one, if at hand (the score says how
        alike images are in *its* eyes). Default: ``clip``'s own image features.
    tokens : {"all", "patches", "cls"}
    pooling : {"mean", "max"}
        Of a latent's activations over an image's tokens.
    batch_size, workers : int
    seed : int
        Of the shuffle: one permutation of the embeddings, the same for all latents.
    progress : bool

    Returns
    -------
    DataFrame
        One row a latent: latent, score, shuffled (the control), gain (their difference), n_images (where it is active). score, shuffled
        and gain are NaN for latents that are active in fewer than two images.

    Raises
    ------
    ValueError
        If a word is unknown, or the embeddings are not one unit vector an image.
    """
    if tokens not in TOKENS:
        raise ValueError(f"Unknown tokens {tokens!r}. Valid: {', '.join(TOKENS)}.")
    if pooling not in ("mean", "max"):
        raise ValueError(f"Unknown pooling {pooling!r}. Valid: mean, max.")
    if embeddings is None:
        embeddings = embed_images(clip, dataset, batch_size=batch_size, workers=workers, progress=progress)
    if len(embeddings) != len(dataset):
        raise ValueError(f"{len(dataset)} images need as many embeddings, got {len(embeddings)}.")
    shuffled = embeddings[torch.from_numpy(np.random.default_rng(seed).permutation(len(embeddings)))]
    n_active = torch.zeros(sae.W_enc.shape[1], dtype=torch.long)

    def pooled():
        parts = read_latents(clip, sae, dataset, layer, batch_size, workers, progress="monosemanticity" if progress else None)
        for _, indices, h in parts:
            h, indices = h[:, TOKENS[tokens]], indices.cpu()
            a = (h.mean(1) if pooling == "mean" else h.amax(1)).cpu()
            n_active.add_((a > 0).sum(0))
            yield a, embeddings[indices], shuffled[indices]

    score, control = (values.numpy() for values in stream_scores(pooled()))
    return pd.DataFrame(
        {"latent": np.arange(len(score)), "score": score, "shuffled": control, "gain": score - control, "n_images": n_active.numpy()}
    )


def _check(activations: Tensor, sets: list[Tensor]) -> None:
    for e in sets:
        if activations.ndim != 2 or e.ndim != 2 or len(activations) != len(e):
            raise ValueError(
                f"Activations [N, S] and embeddings [N, d] of the same images, got {list(activations.shape)}, {list(e.shape)}."
            )
        if len(e) and (e.float().norm(dim=1) - 1).abs().max() > 1e-3:
            raise ValueError("Embeddings must have unit norm: divide them by embeddings.norm(dim=1, keepdim=True).")
    if activations.numel() and activations.min() < 0:
        raise ValueError(f"Activations must not be negative, got {float(activations.min())}.")
