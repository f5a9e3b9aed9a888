"""What latents answer to: statistics over a data set, and masks on the patch grid. Prompt tokens of adapted models never count."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..activations.mixing import TOKENS
from ..data.dataset import dataset_fingerprint
from ..data.pictures import open_picture
from ..run.artifacts import fingerprint
from ..run.processes import Processes
from ..sae.dictionary import select_latents
from .passes import Observer, one_pass
from .summary import FORMAT_VERSION, LatentSummary, RunningSummary


@torch.no_grad()
def summarize_latents(
    clip, sae, dataset, layer: int, *, k: int = 10, tau: float = 0.2, tokens: str = "all", batch_size: int = 64,
    out: str | Path | None = None, observers: Sequence[Observer] = (), progress: bool = True,
) -> LatentSummary:  # fmt: skip
    """Read a data set once and count what every latent does.

    Under several processes (``accelerate launch``, ``torchrun``) all must call this; the result is that of one.

    Parameters
    ----------
    clip, sae, layer : ClipModel or an adapted model, SparseAutoencoder, and int: the block whose output the SAE reads
    dataset : of :func:`patchsae_utils.load_dataset`, with labels in ``range(len(class_names))``, or without classes
    k : int, reference images, and reference patches, of each latent
    tau : float; a token counts in a_i where h > tau
    tokens : {"all", "patches", "cls"}; "all": CLS and the patches, as the paper's 197
    batch_size : int, images in one forward pass of CLIP; latents are computed in smaller chunks
    out : path, optional
        Folder for the summary, returned when it is there already; counts are saved every five minutes, and a killed run goes on from them.
    observers : sequence of Observer, optional
        What else reads the same pass, e.g. a :class:`LikenessObserver`. Those that are complete are left out.
    progress : bool

    An SAE that does not fit model and layer, a label without class name, and NaN in an image's residual stream raise ``ValueError``.
    """
    if tokens not in TOKENS:
        raise ValueError(f"Unknown tokens {tokens!r}. Valid: {', '.join(TOKENS)}.")
    sae.check_model(clip, layer, tokens)
    if k < 1 or tau < 0:
        raise ValueError(f"k must be at least 1 and tau at least 0; got k={k}, tau={tau}.")
    if len(dataset) == 0:
        raise ValueError(f"The data set {getattr(dataset, 'spec', dataset)!r} is empty: no statistics can be made.")
    if len(dataset) * clip.n_tokens >= 2**31:
        raise ValueError(f"{len(dataset):,} images of {clip.n_tokens} tokens are more than 2**31 tokens: summarise a part of the data set.")
    settings = dict(stage="latents", version=FORMAT_VERSION, k=k, tau=tau, tokens=tokens)
    key = "" if out is None else fingerprint(**pass_inputs(clip, sae, dataset, layer), **settings)
    running = RunningSummary(clip, sae, dataset, k, tau, tokens, out, key)
    every: list[Observer] = [running, *observers]
    complete = Processes().on_main(lambda: [each.is_complete() for each in every])
    if not all(complete):
        unfinished = None if out is None else (whole := Path(out).resolve()).with_name(f".{whole.name}-unfinished")
        reading = [each for each, has in zip(every, complete, strict=True) if not has]
        one_pass(clip, sae, dataset, layer, reading, batch_size, unfinished, progress)
    return running.summary() if out is None else LatentSummary.load(out)


def pass_inputs(clip, sae, dataset, layer: int) -> dict[str, object]:
    """What decides the outcome of a pass, for :func:`fingerprint`."""
    return dict(clip=clip.fingerprint, sae=sae.fingerprint, data=dataset_fingerprint(dataset), layer=clip.layer_index(layer))


@torch.no_grad()
def latent_masks(clip, sae, images, latents: Sequence[int] | Tensor, layer: int) -> Tensor:
    """Where latents are active: their activations on the grid of patches, [B, n, rows, columns].

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    images : Tensor [B, 3, H, W], or one or several of path, PIL image, array [H, W, 3]
        A tensor as ``clip.preprocess`` makes it. The grid covers what that leaves, which may be a crop (:func:`seen_image`).
    latents : sequence of int, length n
    """
    sae.check_model(clip, layer)
    if not isinstance(images, Tensor):
        single = isinstance(images, str | os.PathLike | bytes | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
        images = torch.stack([clip.preprocess(open_picture(each)) for each in ([images] if single else images)])
    patches = clip.residual(images, layer)[:, 1 : clip.n_tokens]
    return select_latents(sae, patches, latents).transpose(1, 2).unflatten(2, clip.grid)
