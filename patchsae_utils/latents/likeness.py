"""How alike the images are that a latent answers to: the monosemanticity score, of all latents at once, in linear time.

The score is the mean cosine of all pairs of image embeddings, each pair weighted by the product of the latent's activations:
MS = (||sum_i a_i e_i||^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2) for unit embeddings e_i. Source: Pach et al., "Sparse autoencoders
learn monosemantic features in vision-language models", 2025; written out this way it needs one product A^T E instead of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.zero_shot import embed_images
from ..run.artifacts import atomic_folder, read_folder_manifest, write_folder_manifest
from ..run.processes import OneProcess, Processes
from ..sae.dictionary import Dictionary, dimensions, random_sae
from .reading import latent_chunks, read_latents
from .summary import TOKENS

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder


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
    running: list[RunningScores] = []
    for activations, *sets in batches:
        running = running or [RunningScores() for _ in sets]
        for scores, embeddings in zip(running, sets, strict=True):
            scores.update(activations, embeddings)
    if not running:
        raise ValueError("The monosemanticity score needs images; got none.")
    return tuple(scores.finish() for scores in running)


class RunningScores:
    """The sums of one set of latents and one set of embeddings, grown batch by batch: S d numbers of float64."""

    def __init__(self):
        self.total = self.squares = self.count = self.directions = None
        """[S] sums of activations and of their squares, [S] images where a latent is active, [S, d] weighted sums of embeddings."""

    def update(self, activations: Tensor, embeddings: Tensor) -> None:
        """Add images: activations [B, S], not negative, and unit vectors [B, d]."""
        _check(activations, [embeddings])
        a = activations.double()
        if self.total is None:
            self.total, self.directions = a.new_zeros(a.shape[1]), a.new_zeros(a.shape[1], embeddings.shape[1])
            self.squares, self.count = self.total.clone(), self.total.clone()
        self.total += a.sum(0)
        self.squares += a.square().sum(0)
        self.count += (a > 0).sum(0)
        self.directions += a.T @ embeddings.to(a)

    _SUMS = ("total", "squares", "count", "directions")

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {name: getattr(self, name) for name in self._SUMS if self.total is not None}

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add the sums over other images."""
        for name, value in state.items():
            getattr(self, name).add_(value)

    def finish(self) -> Tensor:
        """Scores [S], float64; NaN for latents that are active in fewer than two images."""
        pairs = self.total.square() - self.squares
        defined = (self.count >= 2) & (pairs > 1e-12 * self.total.square())  # rounding must not decide a score
        above = self.directions.square().sum(1) - self.squares
        return torch.where(defined, above / torch.where(defined, pairs, 1.0), torch.nan).clamp(-1, 1)


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


# -- beside the statistics, in the same pass -----------------------------------------------------------------------------------


class Likeness(NamedTuple):
    """How alike the images are that latents answer to, beside controls; and the embeddings in which that was measured."""

    table: pd.DataFrame
    """One row a feature: dictionary ("SAE", "random directions", "single dimensions"), latent, score (NaN where it is active in fewer than
    two images), n_images (where it is active). All features are read around the SAE's centre ``b_dec``; an image's activation is the mean
    over its tokens. The random directions are as sparse as the SAE."""
    embeddings: Tensor
    """[N, d_embed] unit image features of the data set, in its order."""

    @property
    def chance(self) -> float:
        """Mean cosine of two different images: the expected score of any feature once the images are shuffled."""
        e, n = self.embeddings.double(), len(self.embeddings)
        return float((e.sum(0).square().sum() - e.square().sum()) / (n * (n - 1))) if n > 1 else float("nan")

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write monosemanticity.csv, embeddings.safetensors and manifest.json, atomically."""
        with atomic_folder(folder) as temporary:
            self.table.to_csv(temporary / "monosemanticity.csv", index=False)
            save_file({"embeddings": self.embeddings.contiguous()}, temporary / "embeddings.safetensors")
            write_folder_manifest(temporary, {"format_version": 1, "fingerprint": fp, "complete": True})

    @classmethod
    def load(cls, folder: str | Path) -> Likeness:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If one is damaged, or another format version wrote them.
        """
        folder = Path(folder)
        if missing := [name for name in ("monosemanticity.csv", "embeddings.safetensors", "manifest.json") if not (folder / name).exists()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. Make them: summarize_latents(..., likeness={str(folder)!r}).")
        version = read_folder_manifest(folder).get("format_version")
        if version != 1:
            raise ValueError(
                f"{folder} has format version {version}; this package reads 1. Delete the folder and call summarize_latents again."
            )
        return cls(pd.read_csv(folder / "monosemanticity.csv"), load_file(folder / "embeddings.safetensors")["embeddings"])


class LikenessPass:
    """Collects a :class:`Likeness` while :func:`patchsae_utils.summarize_latents` reads images: each batch goes to :meth:`read`, then its
    latents to :meth:`add`.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    layer : int
    n_images : int
        Of the data set.
    seed : int
        Of the random directions.
    first : callable, optional
        Gives the data set's first batch of images, for :meth:`prepare`.
    """

    def __init__(self, clip, sae, layer: int, n_images: int, seed: int = 0, first: Callable[[], Tensor] | None = None):
        self.clip, self.sae, self.layer, self.seed, self._first = clip, sae, layer, seed, first
        self.embeddings = torch.full((n_images, clip.d_embed), torch.nan)
        self.scores = {name: RunningScores() for name in ("SAE", "random directions", "single dimensions")}
        self.control: SparseAutoencoder | None = None

    def prepare(self) -> None:
        """Make the controls by the data set's first batch, as a pass over all of it does, wherever this one begins."""
        self._prepare(self.clip.run_to(self._first(), self.layer).tokens[:, : self.clip.n_tokens].to(self.sae.W_enc.device))

    def _prepare(self, tokens: Tensor) -> None:
        self.control = random_sae(self.sae, self.seed, tokens.flatten(0, 1))
        for name, n in (("SAE", self.sae.d_sae), ("random directions", self.sae.d_sae), ("single dimensions", 2 * self.sae.d_in)):
            self.scores[name].update(torch.zeros(0, n), self.embeddings[:0])

    def read(self, stream, places: Tensor) -> None:
        """A batch: the residual stream as ``clip.run_to`` gives it, and places in the data set [B]."""
        e = F.normalize(self.clip.finish(stream, self.layer).float(), dim=-1).cpu()
        self.embeddings[places.cpu()] = e
        tokens = stream.tokens[:, : self.clip.n_tokens].to(self.sae.W_enc.device)
        if self.control is None:
            self._prepare(tokens)
        for rows, h in latent_chunks(self.control, tokens):
            self.scores["random directions"].update(h.mean(1).cpu(), e[rows])
        self.scores["single dimensions"].update(_positive_parts(dimensions(self.sae.d_in), tokens - self.sae.b_dec).cpu(), e)

    def add(self, h: Tensor, places: Tensor) -> None:
        """Latents [b, 1+P, S] of images that were read."""
        self.scores["SAE"].update(h.mean(1).cpu(), self.embeddings[places.cpu()])

    def state(self) -> dict[str, Tensor]:
        """All that was collected."""
        sums = {f"{name}/{key}": value for name, scores in self.scores.items() for key, value in scores.state().items()}
        return {**sums, "embeddings": self.embeddings}

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add what another has collected on other images (its :meth:`state`); needs :meth:`prepare` before."""
        for name, scores in self.scores.items():
            scores.absorb({key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")})
        self.embeddings = torch.where(state["embeddings"].isnan(), self.embeddings, state["embeddings"])

    def merge(self, processes: Processes | OneProcess) -> None:
        """Have, in every process, what all have collected."""
        if processes.number == 1:
            return
        for scores in self.scores.values():
            for value in scores.state().values():
                processes.add_up(value)
        known = ~self.embeddings.isnan()
        self.embeddings.nan_to_num_(0.0)
        processes.add_up(self.embeddings)
        seen = known.float()
        processes.add_up(seen)
        self.embeddings[seen == 0] = torch.nan

    def finish(self) -> Likeness:
        """What was collected.

        Raises
        ------
        ValueError
            If an image was not read.
        """
        if n := int(self.embeddings.isnan().any(1).sum()):
            raise ValueError(f"{n} of {len(self.embeddings)} images were not read; the score needs all of them.")
        parts = []
        for name, scores in self.scores.items():
            score = scores.finish().cpu()
            columns = {"dictionary": name, "latent": np.arange(len(score)), "score": score.numpy(), "n_images": scores.count.long().numpy()}
            parts.append(pd.DataFrame(columns))
        return Likeness(pd.concat(parts, ignore_index=True), self.embeddings)


def _positive_parts(dictionary: Dictionary, tokens: Tensor) -> Tensor:
    """Mean over tokens [B, T, D] of the positive parts of all features: [B, n]."""
    return dictionary.encode(tokens.flatten(0, 1), None).relu_().unflatten(0, tokens.shape[:2]).mean(1)


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
