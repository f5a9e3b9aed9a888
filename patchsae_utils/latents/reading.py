"""What latents answer to: statistics over a data set, and masks on the patch grid (see levels.py for pictures and levels).

One pass over the images, never more than one chunk of [tokens, S] activations in memory. Only image tokens count (CLS and the
patches; prompt tokens of adapted models never do), classes are keyed by index, and padding is no reference image. The result, and how
it grows, is in summary.py; its formulas are in statistics.py; features.py keeps single activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..clip.model import Residual
from ..data.dataset import dataset_fingerprint
from ..data.loader import batches
from ..run.artifacts import fingerprint, is_current
from ..run.memory import HalvedBatches
from ..run.processes import current_processes
from ..sae.dictionary import select_latents
from .passes import one_pass
from .summary import FORMAT_VERSION, TOKENS, LatentSummary, RunningSummary

CHUNK_BYTES = 24 * 2**20
"""Size of the largest [images, tokens, S] float32 block, small enough for a processor's caches; one image is the smallest chunk."""


# -- summary ------------------------------------------------------------------------------------------------------------


@overload
def summarize_latents(clip, sae, dataset, layer: int, *, tokens: str = "all", **options: Any) -> LatentSummary: ...  # type: ignore[overload-overlap]
@overload
def summarize_latents(clip, sae, dataset, layer: int, *, tokens: Sequence[str], **options: Any) -> dict[str, LatentSummary]: ...
@torch.no_grad()  # type: ignore[misc]  # the overloads leave out what doesn't matter to the result's type
def summarize_latents(
    clip,
    sae,
    dataset,
    layer: int,
    *,
    k: int = 10,
    tau: float = 0.2,
    tokens: str | Sequence[str] = "all",
    patches_per_image: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    out: str | Path | None = None,
    features: str | Path | None = None,
    feature_tau: float = 0.0,
    likeness: str | Path | None = None,
    progress: bool = True,
) -> LatentSummary | dict[str, LatentSummary]:
    """Read a data set once and count what every latent does.

    Under several processes (``accelerate launch``, ``torchrun``) all must call this; each reads its share, and the result is that of one process
    (:mod:`.passes`). With ``out``, what was counted is saved every five minutes, and a killed run goes on from there.

    Memory: the models, one forward pass of CLIP, a block of ``CHUNK_BYTES`` (at least one image's [1+P, S] activations, a few times over),
    and the statistics themselves; never a [batch, 1+P, S] tensor (``python -m benchmarks.summary`` measures it).

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are not read.
    sae : SparseAutoencoder
    dataset
        As :func:`patchsae_utils.load_dataset` gives it: examples with labels in ``range(len(class_names))``.
    layer : int
        Block whose output the SAE reads.
    k : int
        Reference images, and reference patches, a latent.
    tau : float
        A token counts in a_i where h > tau.
    tokens : {"all", "patches", "cls"}, or several of them
        "all" reads CLS and the patches, as the paper's 197. Several give one summary each, from the same pass.
    patches_per_image : int
        Reference patches that one image may give a latent; with ``k`` or more they are simply the k strongest patches of all.
    batch_size : int
        Images in one forward pass of CLIP; latents are computed in smaller chunks (``CHUNK_BYTES``).
    workers : int
        Processes that load images.
    out : path, optional
        Folder to keep the summary in (several: a subfolder each); when it already holds the one of the same inputs, that is returned.
    features : path, optional
        Folder for a :class:`patchsae_utils.latents.features.FeatureStore` of the token activations, written in the same pass.
    feature_tau : float
        The store keeps activations above this.
    likeness : path, optional
        Folder for a :class:`patchsae_utils.latents.likeness.Likeness`, made in the same pass: CLIP's embeddings of the images, and how alike the
        images are that each latent answers to, beside random directions and single dimensions.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    LatentSummary, or a dict by kind of tokens where several were asked for

    Raises
    ------
    ValueError
        If the widths of the SAE and the model differ, a label has no class name, or an argument is out of range.
    """
    sae.check_model(clip, layer)
    kinds = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    for kind in kinds:
        if kind not in TOKENS:
            raise ValueError(f"Unknown tokens {kind!r}. Valid: {', '.join(TOKENS)}.")
    if not kinds or k < 1 or tau < 0 or patches_per_image < 1:
        raise ValueError(
            f"k must be at least 1, tau at least 0, patches_per_image at least 1, and tokens not empty; "
            f"got tokens={tokens!r}, k={k}, tau={tau}, patches_per_image={patches_per_image}."
        )
    if len(dataset) == 0:
        raise ValueError(f"The data set {getattr(dataset, 'spec', dataset)!r} is empty: no statistics can be made.")
    n_patches = clip.n_tokens - 1
    if len(dataset) * n_patches >= 2**32:
        raise ValueError(f"{len(dataset):,} images of {n_patches} patches are more than 2**32 patches: summarise a part of the data set.")
    folders, prints, likeness_print = {}, {}, ""
    source = dict(clip=clip.fingerprint, sae=sae.fingerprint, data=dataset_fingerprint(dataset), layer=clip.layer_index(layer))
    if out is not None:
        settings = dict(stage="latents", version=FORMAT_VERSION, k=k, tau=tau, patches_per_image=patches_per_image)
        folders = {kind: Path(out) if isinstance(tokens, str) else Path(out) / kind for kind in kinds}
        prints = {kind: fingerprint(**source, **settings, tokens=kind) for kind in kinds}
    if likeness is not None:
        likeness_print = fingerprint(**source, stage="likeness", version=1)
    made = current_processes().on_main(lambda: {kind for kind in folders if is_current(folders[kind], prints[kind])})
    found = {kind: LatentSummary.load(folders[kind]) for kind in made}
    device, n_classes = sae.W_enc.device, len(dataset.class_names)
    running = {
        kind: RunningSummary(sae.W_enc.shape[1], n_classes, n_patches, k, tau, kind, patches_per_image, device)
        for kind in kinds
        if kind not in found
    }
    watch = None
    if likeness is not None and not current_processes().on_main(lambda: is_current(likeness, likeness_print)):
        from .likeness import LikenessPass

        watch = LikenessPass(clip, sae, layer, len(dataset), first=lambda: _first_images(clip, dataset, batch_size))
    with ExitStack() as stack:
        writer = None
        if features is not None:
            from .features import FeatureWriter

            one = tokens if isinstance(tokens, str) else "all"
            writer = stack.enter_context(FeatureWriter.of(clip, sae, dataset, layer, features, tau=feature_tau, tokens=one))

        def read(rows: list[int] | None, between: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            bar = "latents" if progress else None
            return read_latents(clip, sae, dataset, layer, batch_size, workers, rows, bar, None if watch is None else watch.read, between)

        if running or watch is not None or (writer is not None and not writer.complete):
            key = fingerprint(prints={kind: prints.get(kind) for kind in running}, likeness=watch is not None and likeness_print)
            unfinished = None if out is None else (whole := Path(out).resolve()).with_name(f".{whole.name}-unfinished")
            with one_pass(
                read, len(dataset), running, watch, writer, batch_size=batch_size, unfinished=unfinished, key=key
            ) as processes:  # fmt: skip
                labels = torch.as_tensor(dataset.labels, dtype=torch.long, device=device)
                for kind, summary in running.items():
                    found[kind] = result = summary.finish(labels, dataset.class_names)
                    if out is not None:
                        processes.on_main(partial(result.save, folders[kind], prints[kind]))
                if writer is not None:
                    writer.finish()
                if watch is not None:
                    processes.on_main(lambda: watch.finish().save(likeness, likeness_print))
    return found[tokens] if isinstance(tokens, str) else {kind: found[kind] for kind in kinds}


def _first_images(clip, dataset, batch_size: int) -> Tensor:
    """The first batch of a pass over the whole data set."""
    return next(batches(dataset, clip.preprocess, batch_size, indices=range(min(batch_size, len(dataset))))).images


def read_latents(
    clip,
    sae,
    dataset,
    layer: int,
    batch_size: int = 64,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    observe: Callable[[Residual, Tensor], None] | None = None,
    between: Callable[[], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every image's latent activations at CLS and the patches, a few images at a time.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset
    layer : int
    batch_size : int
        Images in one forward pass of CLIP.
    workers : int
    indices : sequence of int, optional
        Only these places, in this order.
    progress : str, optional
        Show a bar with this label.
    observe : callable, optional
        Called once a batch, before its latents come, with the residual stream (as ``clip.run_to`` gives it) and the images' places [B].
    between : callable, optional
        Called before each batch, when all latents of the batches before were taken.

    A batch that doesn't fit the memory is read in parts, with a warning.

    Yields
    ------
    labels, indices : LongTensor [b]
        Classes, and places in the data set.
    h : Tensor [b, 1+P, S]
        See :func:`latent_chunks`.

    Raises
    ------
    ValueError
        If a label is outside range(len(class_names)), or the residual stream of an image holds NaN or infinity.
    MemoryError
        If not even one image fits the memory.
    """
    fitting = HalvedBatches(clip.device)
    n_classes, device = len(dataset.class_names), sae.W_enc.device
    for batch in batches(dataset, clip.preprocess, batch_size, workers, indices, progress):
        labels, places = batch.labels.to(device), batch.indices.to(device)
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(
                f"Labels must lie in range({n_classes}), the number of class names; got {int(labels.min())} to {int(labels.max())}."
            )
        for part, stream in fitting.run(len(places), partial(_run_to, clip, layer, batch.images)):
            _check_finite(stream.tokens, places[part], clip, layer)
            if between is not None:
                between()
            if observe is not None:
                observe(stream, places[part])
            for rows, h in latent_chunks(sae, stream.tokens[:, : clip.n_tokens]):
                yield labels[part][rows], places[part][rows], h


def _run_to(clip, layer: int, images: Tensor, rows: slice) -> Residual:
    return clip.run_to(images[rows], layer)


def _check_finite(tokens: Tensor, places: Tensor, clip, layer: int) -> None:
    bad = ~tokens.isfinite().flatten(1).all(1)
    if bad.any():
        shown = ", ".join(map(str, places[bad.to(places.device)].tolist()[:5]))
        raise ValueError(
            f"The residual stream of {clip.name!r} after layer {layer} holds NaN or infinity in {int(bad.sum())} of {len(bad)} images of a batch "
            f"(places {shown} in the data set). Look at these images; with precision='bf16', try 'fp32'."
        )


def latent_chunks(sae, residual: Tensor, chunk_bytes: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Latent activations of a batch, a few images at a time.

    Parameters
    ----------
    sae : SparseAutoencoder
    residual : Tensor [B, T, d_in]
    chunk_bytes : int, optional
        Largest float32 block [b, T, S]; one image is the smallest. Default: ``CHUNK_BYTES``, on a GPU 16 times that.

    Yields
    ------
    rows : slice
        Of the batch.
    h : Tensor [b, T, S]
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if sae.W_enc.device.type == "cpu" else 16 * CHUNK_BYTES
    step = max(1, chunk_bytes // (4 * residual.shape[1] * sae.W_enc.shape[1]))
    for start in range(0, len(residual), step):
        rows = slice(start, min(start + step, len(residual)))
        yield rows, sae.encode(residual[rows].to(sae.W_enc.device))


# -- masks --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_masks(clip, sae, images: Tensor, latents: Sequence[int] | Tensor, layer: int) -> Tensor:
    """Where latents are active: their activations on the grid of patches.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    images : Tensor [B, 3, H, W]
        As ``clip.preprocess`` makes them.
    latents : sequence of int, length n
    layer : int
        Block whose output the SAE reads.

    Returns
    -------
    Tensor [B, n, rows, columns]
        CLS and prompt tokens left out; see :func:`patchsae_utils.latents.pictures.upsample_masks` for pixels.

    Raises
    ------
    ValueError
        If a latent is outside range(S), or the widths of the SAE and the model differ.
    """
    sae.check_model(clip, layer)
    latents = torch.as_tensor(latents, dtype=torch.long).flatten()
    n_latents = sae.W_enc.shape[1]
    if latents.numel() and (latents.min() < 0 or latents.max() >= n_latents):
        raise ValueError(f"Latents must lie in range({n_latents}), got {int(latents.min())} to {int(latents.max())}.")
    patches = clip.residual(images, layer)[:, 1 : clip.n_tokens]
    return select_latents(sae, patches, latents).transpose(1, 2).unflatten(2, clip.grid)
