"""What latents answer to: statistics over a data set, and masks on the patch grid (see levels.py for pictures and levels).

One pass over the images, never more than one chunk of [tokens, S] activations in memory. Only image tokens count (CLS and the
patches; prompt tokens of adapted models never do), classes are keyed by index, and padding is no reference image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .artifacts import atomic_folder, fingerprint, is_current, read_json, write_json
from .data import batches
from .statistics import label_entropy, label_std, merge_top

FORMAT_VERSION = 1
CHUNK_BYTES = 96 * 2**20
"""Size of the largest [images, tokens, S] float32 block; one image is the smallest chunk."""

TOKENS = {"all": slice(None), "patches": slice(1, None), "cls": slice(0, 1)}
"""Which tokens of [CLS, patch 1, ..., patch P] a statistic reads."""


def select_latents(sae, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
    """Activations of some latents: [..., d_in] -> [..., n].

    For a ReLU the other columns of the encoder are not computed; activations that compare latents (top-k) need all of them, in chunks.
    """
    latents = torch.as_tensor(latents, dtype=torch.long, device=sae.W_enc.device)
    x = x.to(sae.W_enc.device)
    if sae.activation == "relu":
        some = sae.W_enc[:, latents]
        return torch.relu(x @ some + (sae.b_enc[latents] - sae.b_dec @ some))  # no copy of x, which may be large
    flat = x.reshape(-1, x.shape[-1])
    step = max(1, CHUNK_BYTES // (4 * sae.W_enc.shape[1]))
    parts = [sae.encode(flat[start : start + step])[:, latents] for start in range(0, len(flat), step)]
    return torch.cat(parts).view(*x.shape[:-1], len(latents))


# -- summary ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LatentSummary:
    """What every latent does over a data set.

    Two image-level activations are used. The *mean activation* of an image is the mean of h over its tokens; an image is active where
    that is positive, and reference images are those where it is largest. The *count* a_i of an image is its number of tokens with
    h > tau; class counts a_c and data-set counts a_D are its sums (Lim et al., ICLR 2025, section 3).
    """

    frequency: Tensor
    """[S] share of images where the latent is active: images, not tokens."""
    mean_activation: Tensor
    """[S] mean of the images' mean activations over active images; 0 for dead latents."""
    label_entropy: Tensor
    """[S] see :func:`label_entropy`; NaN for dead latents."""
    label_std: Tensor
    """[S] see :func:`label_std`; NaN for dead latents."""
    top_images: Tensor
    """[S, k] data-set indices of the reference images, strongest first; -1 where there are fewer than k."""
    top_values: Tensor
    """[S, k] their mean activations; 0 where there are fewer than k."""
    top_labels: Tensor
    """[S, k] their classes; -1 where there are fewer than k."""
    class_counts: Tensor
    """[C, S] a_c: sum over the class's images of a_i; whole numbers."""
    class_hits: Tensor
    """[C, S] images of the class where the latent is active."""
    class_images: Tensor
    """[C] images of the class."""
    dead: Tensor
    """[S] bool: active in no image."""
    class_names: tuple[str, ...]
    """By class index; equal names stay two classes."""
    tau: float
    """Threshold of the counts."""
    tokens: str
    """Tokens that were read: a key of ``TOKENS``."""

    @property
    def n_images(self) -> int:
        """Images that were read."""
        return int(self.class_images.sum())

    @property
    def n_latents(self) -> int:
        """S."""
        return len(self.frequency)

    @property
    def dataset_counts(self) -> Tensor:
        """[S] a_D: sum over all images of a_i."""
        return self.class_counts.sum(0, dtype=torch.float64)

    @property
    def faint(self) -> Tensor:
        """[S] bool: alive, but above tau on less than one token in a hundred images."""
        return ~self.dead & (self.dataset_counts < self.n_images / 100)

    def to_frame(self, dead: bool = False) -> pd.DataFrame:
        """One row a latent: latent, frequency, mean_activation, label_entropy, label_std, top_class, n_reference, dead, faint.

        Parameters
        ----------
        dead : bool
            Whether dead latents get a row. Theirs has frequency and mean activation 0, entropy and std NaN, and no top class (-1);
            without them the frame holds no NaN.
        """
        frame = pd.DataFrame(
            {
                "latent": torch.arange(self.n_latents).numpy(),
                "frequency": self.frequency.numpy(),
                "mean_activation": self.mean_activation.numpy(),
                "label_entropy": self.label_entropy.numpy(),
                "label_std": self.label_std.numpy(),
                "top_class": self.top_labels[:, 0].numpy(),
                "n_reference": (self.top_images >= 0).sum(1).numpy(),
                "dead": self.dead.numpy(),
                "faint": self.faint.numpy(),
            }
        )
        return frame if dead else frame[~frame["dead"]].reset_index(drop=True)

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write ``latents.safetensors`` and ``manifest.json`` into a folder, atomically."""
        tensors, plain = {}, {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            (tensors if isinstance(value, Tensor) else plain)[field.name] = value
        with atomic_folder(folder) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "latents.safetensors")
            write_json(temporary / "manifest.json", {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True, **plain})

    @classmethod
    def load(cls, folder: str | Path) -> LatentSummary:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If the folder holds no summary.
        ValueError
            If it was written by another format version or is damaged.
        """
        folder = Path(folder)
        for name in ("manifest.json", "latents.safetensors"):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder} holds no latent summary ({name} is missing). Make one: summarize_latents(..., out={str(folder)!r})."
                )
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {manifest.get('format_version')}; this package reads version {FORMAT_VERSION}. "
                f"Delete the folder and call summarize_latents again."
            )
        fields = {**load_file(folder / "latents.safetensors"), **manifest, "class_names": tuple(manifest["class_names"])}
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in fields]
        if missing:
            raise ValueError(f"{folder} is damaged: {', '.join(missing)} missing. Delete the folder and call summarize_latents again.")
        return cls(**{name: fields[name] for name in names})


@torch.no_grad()
def summarize_latents(
    clip,
    sae,
    dataset,
    layer: int,
    *,
    k: int = 10,
    tau: float = 0.2,
    tokens: str = "all",
    batch_size: int = 64,
    workers: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> LatentSummary:
    """Read a data set once and count what every latent does.

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
        Reference images a latent.
    tau : float
        A token counts in a_i where h > tau.
    tokens : {"all", "patches", "cls"}
        "all" reads CLS and the patches, as the paper's 197.
    batch_size : int
        Images in one forward pass of CLIP; latents are computed in smaller chunks (``CHUNK_BYTES``).
    workers : int
        Processes that load images.
    out : path, optional
        Folder to keep the summary in; when it already holds the one of the same inputs, that is returned.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    LatentSummary

    Raises
    ------
    ValueError
        If the widths of the SAE and the model differ, a label has no class name, or an argument is out of range.
    """
    sae.check_source(d_in=clip.width, source=f"the residual stream of {clip.name!r}")
    if tokens not in TOKENS:
        raise ValueError(f"Unknown tokens {tokens!r}. Valid: {', '.join(TOKENS)}.")
    if k < 1 or tau < 0:
        raise ValueError(f"k must be at least 1 and tau at least 0, got k={k}, tau={tau}.")
    fp = ""
    if out is not None:
        fp = fingerprint(
            stage="latents", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, data=dataset_fingerprint(dataset),
            layer=clip.layer_index(layer), k=k, tau=tau, tokens=tokens,
        )  # fmt: skip
        if is_current(out, fp):
            return LatentSummary.load(out)

    n_classes, n_latents, device = len(dataset.class_names), sae.W_enc.shape[1], sae.W_enc.device
    active_images = torch.zeros(n_latents, dtype=torch.long, device=device)
    sum_mean = torch.zeros(n_latents, dtype=torch.float64, device=device)
    values = torch.zeros(n_latents, k, device=device)
    images = torch.full((n_latents, k), -1, dtype=torch.long, device=device)
    class_counts = torch.zeros(n_classes, n_latents, device=device)
    class_hits = torch.zeros(n_classes, n_latents, device=device)
    class_images = torch.zeros(n_classes, dtype=torch.long, device=device)
    label_of = torch.full((len(dataset) + 1,), -1, dtype=torch.long, device=device)  # the last entry answers for index -1

    for batch in batches(dataset, clip.preprocess, batch_size, workers, progress="latents" if progress else None):
        labels, indices = batch.labels.to(device), batch.indices.to(device)
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(
                f"Labels must lie in range({n_classes}), the number of class names; got {int(labels.min())} to {int(labels.max())}."
            )
        residual = clip.residual(batch.images, layer)[:, : clip.n_tokens]
        means = torch.empty(len(labels), n_latents, device=device)
        counts = torch.empty(len(labels), n_latents, device=device)
        for rows, h in latent_chunks(sae, residual[:, TOKENS[tokens]]):
            means[rows] = h.mean(1)
            counts[rows] = (h > tau).float().sum(1)  # faster than summing booleans, and exact
        hits = means > 0
        active_images += hits.sum(0)
        sum_mean += means.sum(0, dtype=torch.float64)
        class_counts.index_add_(0, labels, counts)
        class_hits.index_add_(0, labels, hits.float())
        class_images += torch.bincount(labels, minlength=n_classes)
        label_of[indices] = labels
        values, images = merge_top(values, images, means, indices)

    n_images = int(class_images.sum())
    if n_images == 0:
        raise ValueError(f"The data set {getattr(dataset, 'spec', dataset)!r} is empty: no statistics can be made.")
    top_labels = label_of[images]
    dead = active_images == 0
    summary = LatentSummary(
        frequency=(active_images / n_images).float().cpu(),
        mean_activation=(sum_mean / active_images.clamp_min(1)).float().cpu(),
        label_entropy=label_entropy(values, top_labels, n_classes).cpu(),
        label_std=label_std(values, top_labels).cpu(),
        top_images=images.cpu(),
        top_values=values.cpu(),
        top_labels=top_labels.cpu(),
        class_counts=class_counts.cpu(),
        class_hits=class_hits.cpu(),
        class_images=class_images.cpu(),
        dead=dead.cpu(),
        class_names=tuple(dataset.class_names),
        tau=tau,
        tokens=tokens,
    )
    if out is not None:
        summary.save(out, fp)
    return summary


def latent_chunks(sae, residual: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[slice, Tensor]]:
    """Latent activations of a batch, a few images at a time.

    Parameters
    ----------
    sae : SparseAutoencoder
    residual : Tensor [B, T, d_in]
    chunk_bytes : int
        Largest float32 block [b, T, S]; one image is the smallest.

    Yields
    ------
    rows : slice
        Of the batch.
    h : Tensor [b, T, S]
    """
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
        CLS and prompt tokens left out; see :func:`patchsae_utils.levels.upsample_masks` for pixels.

    Raises
    ------
    ValueError
        If a latent is outside range(S), or the widths of the SAE and the model differ.
    """
    sae.check_source(d_in=clip.width, source=f"the residual stream of {clip.name!r}")
    latents = torch.as_tensor(latents, dtype=torch.long).flatten()
    n_latents = sae.W_enc.shape[1]
    if latents.numel() and (latents.min() < 0 or latents.max() >= n_latents):
        raise ValueError(f"Latents must lie in range({n_latents}), got {int(latents.min())} to {int(latents.max())}.")
    patches = clip.residual(images, layer)[:, 1 : clip.n_tokens]
    return select_latents(sae, patches, latents).transpose(1, 2).unflatten(2, clip.grid)


# -- helpers ------------------------------------------------------------------------------------------------------------


def dataset_fingerprint(dataset) -> str:
    """Name a data set by what decides its examples: spec, split, settings and labels."""
    given = getattr(dataset, "fingerprint", None)
    if given is not None:
        return given
    labels = hashlib.sha256(torch.as_tensor(dataset.labels, dtype=torch.int64).numpy().tobytes()).hexdigest()
    parts = {name: getattr(dataset, name, None) for name in ("spec", "split", "half", "seed")}
    return fingerprint(labels=labels, class_names=list(dataset.class_names), n=len(dataset), **parts)
