"""How alike the images are that a latent answers to: the monosemanticity score, of all latents at once, in linear time.

The score is the mean cosine of all pairs of image embeddings, each pair weighted by the product of the latent's activations:
MS = (||sum_i a_i e_i||^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2) for unit embeddings e_i. Source: Pach et al., "Sparse autoencoders
learn monosemantic features in vision-language models", 2025; written out this way it needs one product A^T E instead of all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.model import Residual
from ..run.artifacts import atomic_folder, fingerprint, is_current, write_folder_manifest
from ..sae.dictionary import dimensions, random_sae
from .passes import Observer, latent_chunks
from .reading import pass_inputs
from .summary import open_manifest

FORMAT_VERSION = 1


class RunningScores:
    """The score's sums over images, for n features and embeddings of d numbers: n d numbers of float64, whatever the number of images."""

    def __init__(self, n: int, d: int):
        columns = {name: torch.zeros(n, dtype=torch.float64) for name in ("total", "squares", "count")}
        self.sums = {**columns, "directions": torch.zeros(n, d, dtype=torch.float64)}

    def add(self, activations: Tensor, embeddings: Tensor) -> None:
        """Add images: activations [B, n], not negative, and unit vectors [B, d]."""
        a = activations.cpu().double()
        for name, value in (("total", a), ("squares", a.square()), ("count", a > 0)):
            self.sums[name] += value.sum(0)
        self.sums["directions"] += a.T @ embeddings.to(a)

    def finish(self) -> Tensor:
        """Scores [n] in [-1, 1]; NaN for features that are active in fewer than two images, which make no pair."""
        total, squares = self.sums["total"].square(), self.sums["squares"]
        pairs = total - squares
        defined = (self.sums["count"] >= 2) & (pairs > 1e-12 * total)  # rounding must not decide a score
        above = self.sums["directions"].square().sum(1) - squares
        return torch.where(defined, above / torch.where(defined, pairs, 1.0), torch.nan).clamp(-1, 1)


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
            write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True})

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
        open_manifest(folder, FORMAT_VERSION, f"summarize_latents(..., observers=[LikenessObserver(..., out={str(folder)!r})])")
        return cls(pd.read_csv(folder / "monosemanticity.csv"), load_file(folder / "embeddings.safetensors")["embeddings"])


class LikenessObserver(Observer):
    """Makes a :class:`Likeness` while :func:`summarize_latents` reads a data set.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset
    layer : int
        All as in the call of :func:`summarize_latents`.
    out : path
        Folder for the likeness. When it already holds the one of the same inputs, nothing is made.
    """

    def __init__(self, clip, sae, dataset, layer: int, out: str | Path):
        self.clip, self.sae, self.layer, self.out = clip, sae, layer, out
        self.key = fingerprint(**pass_inputs(clip, sae, dataset, layer), stage="likeness", version=FORMAT_VERSION)
        self.embeddings = torch.full((len(dataset), clip.d_embed), torch.nan)
        sizes = {"SAE": sae.d_sae, "random directions": sae.d_sae, "single dimensions": 2 * sae.d_in}
        self.scores = {name: RunningScores(n, clip.d_embed) for name, n in sizes.items()}

    def is_complete(self) -> bool:
        """Whether ``out`` holds the likeness of these inputs."""
        return is_current(self.out, self.key)

    def prepare(self, tokens: Tensor) -> None:
        """Make the random directions as sparse as the SAE is on these tokens."""
        some = tokens.flatten(0, 1)[:: -(-tokens.shape[0] * tokens.shape[1] // 2048)]
        self.control = random_sae(self.sae, 0, some)

    def read(self, stream: Residual, places: Tensor) -> None:
        """Embed a batch, and read the controls."""
        self.embeddings[places.cpu()] = e = F.normalize(self.clip.finish(stream, self.layer).float(), dim=-1).cpu()
        tokens = stream.tokens[:, : self.clip.n_tokens].to(self.sae.W_enc.device)
        for rows, h in latent_chunks(self.control, tokens):
            self.scores["random directions"].add(h.mean(1), e[rows])
        both_signs = dimensions(self.sae.d_in).encode((tokens - self.sae.b_dec).flatten(0, 1), None)
        self.scores["single dimensions"].add(both_signs.relu_().unflatten(0, tokens.shape[:2]).mean(1), e)

    def add(self, h: Tensor, labels: Tensor, places: Tensor) -> None:
        """Count latents of images that were read."""
        self.scores["SAE"].add(h.mean(1), self.embeddings[places.cpu()])

    def state(self) -> dict[str, Tensor]:
        """All that was collected."""
        sums = {f"{name}/{key}": value for name, scores in self.scores.items() for key, value in scores.sums.items()}
        return {**sums, "embeddings": self.embeddings}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add what another has collected on other images."""
        for name, value in state.items():
            if name == "embeddings":
                self.embeddings = torch.where(value.isnan(), self.embeddings, value)
            else:
                dictionary, key = name.split("/")
                self.scores[dictionary].sums[key] += value

    def finish(self) -> None:
        """Write what was collected; ValueError if an image was not read."""
        if n := int(self.embeddings.isnan().any(1).sum()):
            raise ValueError(f"{n} of {len(self.embeddings)} images were not read; the score needs all of them.")
        parts = []
        for name, scores in self.scores.items():
            score, n_images = scores.finish().numpy(), scores.sums["count"].long().numpy()
            parts.append(pd.DataFrame({"dictionary": name, "latent": np.arange(len(score)), "score": score, "n_images": n_images}))
        Likeness(pd.concat(parts, ignore_index=True), self.embeddings).save(self.out, self.key)
