"""How alike the images are that a latent answers to: the monosemanticity score, of all latents at once, in linear time.

A latent is read off CLIP, so CLIP's own embedding is no independent judge: pixels and, where it is known, what a scene shows judge as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.model import Residual
from ..data import truth
from ..data.loader import has_truth
from ..run.artifacts import atomic_folder, fingerprint, is_current, write_folder_manifest
from ..run.intervals import mean_interval
from ..sae.dictionary import dimensions, random_sae
from .passes import Observer, latent_chunks, read_streams
from .reading import pass_inputs
from .summary import open_manifest

FORMAT_VERSION = 2
CONTROL_IMAGES = 64  # by which random directions are made as sparse as the SAE
PIXELS = 8  # rows and columns to which an image is averaged
_COLUMNS = {"clip": "score", "pixels": "pixels", "objects": "objects"}  # of the table, for each embedding


class RunningScores:
    """The score's sums over images, for n features and embeddings of some widths: float64.

    MS = (||sum_i a_i e_i||^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2), for activations a_i and unit embeddings e_i: their mean cosine
    over pairs of images, by a_i a_j. Zero vectors, of images that show nothing, are like no other. Source: Pach et al., "Sparse autoencoders
    learn monosemantic features in vision-language models", 2025.
    """

    def __init__(self, n: int, widths: Mapping[str, int]):
        self.widths, single = widths, ("total", "squares", "count", *(f"{name} itself" for name in widths))
        shapes = {**dict.fromkeys(single, (n,)), **{name: (n, d) for name, d in widths.items()}}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, activations: Tensor, embeddings: Mapping[str, Tensor]) -> None:
        """Add images: activations [B, n], not negative, and unit vectors [B, width]."""
        a = activations.cpu().double()
        for name, value in (("total", a), ("squares", a.square()), ("count", a > 0)):
            self.sums[name] += value.sum(0)
        for name, e in embeddings.items():
            self.sums[name] += a.T @ e.to(a)
            self.sums[f"{name} itself"] += a.square().T @ e.to(a).square().sum(1)

    def finish(self) -> dict[str, Tensor]:
        """Scores [n] in [-1, 1] for each embedding; NaN for features that are active in fewer than two images."""
        total, squares = self.sums["total"].square(), self.sums["squares"]
        pairs = total - squares
        defined = (self.sums["count"] >= 2) & (pairs > 1e-12 * total)  # rounding must not decide a score
        above = {name: self.sums[name].square().sum(1) - self.sums[f"{name} itself"] for name in self.widths}
        return {name: torch.where(defined, each / torch.where(defined, pairs, 1.0), torch.nan).clamp(-1, 1) for name, each in above.items()}


class Likeness(NamedTuple):
    """How alike the images are that latents answer to, beside controls; and the embeddings in which that was measured."""

    # A row a feature: dictionary ("SAE", "random directions", "single dimensions"), latent, score by CLIP's own embedding, by pixels and,
    # where they are known, objects (NaN below two images); n_images (where it is active)
    table: pd.DataFrame
    vectors: dict[str, Tensor]  # unit [N, width], of the images: clip (features), pixels (8 x 8 means), objects (patches of each object)

    @property
    def embeddings(self) -> Tensor:
        """[N, d_embed] unit image features of CLIP."""
        return self.vectors["clip"]

    @property
    def chance(self) -> float:
        """By CLIP's own embedding: see :meth:`null`."""
        return self.null("clip")

    def null(self, judge: str) -> float:
        """Mean cosine of two different images: the expected score once the images are shuffled."""
        e = self.vectors[judge].double()
        return float((e.sum(0).square().sum() - e.square().sum()) / (len(e) * (len(e) - 1))) if len(e) > 1 else float("nan")

    def above_chance(self) -> pd.DataFrame:
        """Mean score minus its null: judge, dictionary, n (features that have a score), null, excess, low, high (95%, over features)."""
        rows = []
        for judge in self.vectors:
            for name, scores in self.table.dropna(subset="score").groupby("dictionary", sort=False)[_COLUMNS[judge]]:
                null, found = self.null(judge), mean_interval(scores, "latents")
                rows.append([judge, name, len(scores), null, *(end - null for end in found[:3])])
        return pd.DataFrame(rows, columns=["judge", "dictionary", "n", "null", "excess", "low", "high"])

    def sentence(self) -> str:
        """Scores minus their null in words, judge by judge."""
        words = {"clip": "CLIP's own embedding", "objects": "the objects shown", "pixels": "pixels"}
        judged = [
            f"by {words[judge]} (null {rows['null'].iloc[0]:.2f}) "
            + ", ".join(f"{row.dictionary} {row.excess:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in rows.itertuples())
            for judge, rows in self.above_chance().groupby("judge", sort=False)
        ]
        return f"Monosemanticity above chance: {'; '.join(judged)}."

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write monosemanticity.csv, embeddings.safetensors and manifest.json, atomically."""
        with atomic_folder(folder) as temporary:
            self.table.to_csv(temporary / "monosemanticity.csv", index=False)
            save_file({name: e.contiguous() for name, e in self.vectors.items()}, temporary / "embeddings.safetensors")
            write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True})

    @classmethod
    def load(cls, folder: str | Path) -> Likeness:
        """Read what :meth:`save` wrote; FileNotFoundError where nothing is, ValueError for another format version or damage."""
        folder = Path(folder)
        open_manifest(folder, FORMAT_VERSION, f"summarize_latents(..., observers=[LikenessObserver(..., out={str(folder)!r})])")
        vectors = load_file(folder / "embeddings.safetensors")
        return cls(pd.read_csv(folder / "monosemanticity.csv"), {name: vectors[name] for name in _COLUMNS if name in vectors})


class LikenessObserver(Observer):
    """Makes a :class:`Likeness` in ``out`` while :func:`summarize_latents` reads a data set; all arguments are those of that call."""

    def __init__(self, clip, sae, dataset, layer: int, out: str | Path):
        self.clip, self.sae, self.dataset, self.layer, self.out = clip, sae, dataset, layer, out
        self.key = fingerprint(**pass_inputs(clip, sae, dataset, layer), stage="likeness", version=FORMAT_VERSION)
        widths = {"clip": clip.d_embed, "pixels": 3 * PIXELS**2}
        names = dataset.concept_names if has_truth(dataset) else ()
        if objects := [c for c, name in enumerate(names) if name.startswith("object:")]:
            self.objects, widths["objects"] = objects, len(objects)
        self.vectors = {name: torch.zeros(len(dataset), d) for name, d in widths.items()}
        sizes = {"SAE": sae.d_sae, "random directions": sae.d_sae, "single dimensions": 2 * sae.d_in}
        self.scores = {name: RunningScores(n, widths) for name, n in sizes.items()}

    def is_complete(self) -> bool:
        return is_current(self.out, self.key, holds="embeddings.safetensors")

    @cached_property
    def control(self):
        """Random directions, as sparse as the SAE is on the first images."""
        first = next(read_streams(self.clip, self.dataset, self.layer, indices=range(min(CONTROL_IMAGES, len(self.dataset)))))[3]
        tokens = first.tokens[:, : self.clip.n_tokens].to(self.sae.W_enc.device).flatten(0, 1)
        return random_sae(self.sae, tokens[:: -(-len(tokens) // 2048)])

    def read(self, images: Tensor, stream: Residual, places: Tensor) -> None:
        """Embed a batch, and read the controls."""
        e = {"clip": self.clip.finish(stream, self.layer).float(), "pixels": F.adaptive_avg_pool2d(images.float(), PIXELS).flatten(1)}
        if "objects" in self.vectors:
            shown = [truth.concept_masks(self.dataset, i, self.clip)[self.objects].sum((1, 2)) for i in places.tolist()]
            e["objects"] = torch.from_numpy(np.stack(shown)).float()
        e = {name: F.normalize(vectors, dim=-1).cpu() for name, vectors in e.items()}
        for name, vectors in e.items():
            self.vectors[name][places.cpu()] += vectors
        tokens = stream.tokens[:, : self.clip.n_tokens].to(self.sae.W_enc.device)
        for rows, h in latent_chunks(self.control, tokens):
            self.scores["random directions"].add(h.mean(1), {name: vectors[rows] for name, vectors in e.items()})
        both_signs = dimensions(self.sae.d_in).encode((tokens - self.sae.b_dec).flatten(0, 1), None)
        self.scores["single dimensions"].add(both_signs.relu_().unflatten(0, tokens.shape[:2]).mean(1), e)

    def add(self, h: Tensor, labels: Tensor, places: Tensor) -> None:
        self.scores["SAE"].add(h.mean(1), {name: vectors[places.cpu()] for name, vectors in self.vectors.items()})

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": sums for name, scores in self.scores.items() for key, sums in scores.sums.items()} | self.vectors

    def finish(self) -> None:
        parts = []
        for name, scores in self.scores.items():
            found = {_COLUMNS[judge]: values.numpy() for judge, values in scores.finish().items()}
            n_images = scores.sums["count"].long().numpy()
            parts.append(pd.DataFrame({"dictionary": name, "latent": np.arange(len(n_images)), **found, "n_images": n_images}))
        Likeness(pd.concat(parts, ignore_index=True), self.vectors).save(self.out, self.key)
