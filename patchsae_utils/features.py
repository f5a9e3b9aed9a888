"""Writing the sparse feature store: every token's latent activations over a data set. ``feature_store.py`` describes the files and reads them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy import sparse
from torch import Tensor

from .artifacts import file_sha256, fingerprint, read_json, write_json
from .feature_store import FORMAT, FORMAT_VERSION, INDEX, MANIFEST, FeatureStore, LatentEntries, TokenEntries, shard_name
from .latents import dataset_fingerprint, read_latents
from .summary import TOKENS

__all__ = ["FeatureStore", "FeatureWriter", "LatentEntries", "TokenEntries", "write_features"]

DTYPES = ("float16", "float32")
SHARD_IMAGES = 256


def write_features(
    clip,
    sae,
    dataset,
    layer: int,
    out: str | Path,
    *,
    tau: float = 0.0,
    tokens: str = "all",
    dtype: str = "float16",
    shard_images: int = SHARD_IMAGES,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> FeatureStore:
    """Write the latent activations of a data set; opens what is there of the same inputs, and completes what was interrupted.

    ``summarize_latents(..., features=out)`` writes the same store in the pass that makes the statistics.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are not read.
    sae : SparseAutoencoder
    dataset
    layer : int
        Block whose output the SAE reads.
    out : path
        A folder of its own.
    tau : float
        Keep activations above this; 0 keeps all.
    tokens : {"all", "patches", "cls"}
    dtype : {"float16", "float32"}
        Of the values on disk; see the module's description for the rounding.
    shard_images : int
        Images a shard. Memory while writing: about 30 bytes an entry of one shard.
    batch_size : int
        Images in one forward pass of CLIP.
    workers : int
    progress : bool

    Returns
    -------
    FeatureStore

    Raises
    ------
    ValueError
        If an argument is out of range, the SAE doesn't fit the model, an activation is too large for float16, or ``out`` holds other files.
    """
    writer = FeatureWriter.of(clip, sae, dataset, layer, out, tau=tau, tokens=tokens, dtype=dtype, shard_images=shard_images)
    if not writer.complete:
        bar = "features" if progress else None
        with torch.no_grad():
            for _, indices, h in read_latents(clip, sae, dataset, layer, batch_size, workers, writer.missing_images(), bar):
                writer.add(h, indices)
    return writer.finish()


class FeatureWriter:
    """Writes a store shard by shard while images come in, in the order of the data set. Made by :meth:`of`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: np.ndarray):
        self.folder, self._manifest, self._labels = folder, manifest, labels
        self.n_images, self.n_tokens, self.n_latents = manifest["shape"]
        self._size = manifest["shard_images"]
        self._entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._collected = 0
        self._resume()

    @classmethod
    def of(
        cls,
        clip,
        sae,
        dataset,
        layer: int,
        out: str | Path,
        *,
        tau: float = 0.0,
        tokens: str = "all",
        dtype: str = "float16",
        shard_images: int = SHARD_IMAGES,
    ) -> FeatureWriter:
        """Begin, or take up, the store of these inputs; see :func:`write_features`."""
        sae.check_model(clip, layer)
        for name, value, valid in (("tokens", tokens, TOKENS), ("dtype", dtype, DTYPES)):
            if value not in valid:
                raise ValueError(f"Unknown {name} {value!r}. Valid: {', '.join(valid)}.")
        if tau < 0 or shard_images < 1:
            raise ValueError(f"Needs tau >= 0 and shard_images >= 1, got tau={tau}, shard_images={shard_images}.")
        n_tokens = {"all": clip.n_tokens, "patches": clip.n_tokens - 1, "cls": 1}[tokens]
        if shard_images * n_tokens >= 2**31:
            raise ValueError(f"A shard of {shard_images:,} images of {n_tokens} tokens has more than 2**31 tokens: use smaller shards.")
        layer = clip.layer_index(layer)
        inputs = fingerprint(
            stage="features", version=FORMAT_VERSION, clip=clip.fingerprint, sae=sae.fingerprint, data=dataset_fingerprint(dataset),
            layer=layer, tau=tau, tokens=tokens, dtype=dtype, shard_images=shard_images,
        )  # fmt: skip
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": inputs,
            "complete": False,
            "model": {"name": clip.name, "grid": list(clip.grid)},
            "layer": layer,
            "sae": sae.fingerprint,
            "tau": tau,
            "tokens": tokens,
            "dtype": dtype,
            "shape": [len(dataset), n_tokens, sae.W_enc.shape[1]],
            "shard_images": shard_images,
            "dataset": {
                "spec": getattr(dataset, "spec", None),
                "split": getattr(dataset, "split", None),
                "class_names": list(dataset.class_names),
            },
            "files": {},
        }
        return cls(Path(out), manifest, np.asarray(dataset.labels, np.int64))

    def _resume(self) -> None:
        """Take over the whole files of an earlier attempt; clear away those of other inputs."""
        path = self.folder / MANIFEST
        if path.exists():
            earlier = read_json(path)
            if earlier.get("format") != FORMAT:
                raise ValueError(
                    f"{self.folder} holds {earlier.get('format')!r}, no feature store. Give write_features a folder of its own."
                )
            if earlier.get("fingerprint") == self._manifest["fingerprint"]:
                whole = {name: entry for name, entry in earlier["files"].items() if _whole(self.folder / name, entry)}
                self._manifest |= {"files": whole, "complete": earlier["complete"] and len(whole) == len(earlier["files"])}
            else:
                for name in earlier["files"]:
                    (self.folder / name).unlink(missing_ok=True)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files. Give write_features a folder of its own.")
        if not self.complete:
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            write_json(path, self._manifest)
            if INDEX not in self._manifest["files"]:
                self._write(INDEX, {"labels": self._labels}, 0)
        self._missing = {i for i in range(math.ceil(self.n_images / self._size)) if shard_name(i) not in self._manifest["files"]}

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self._manifest["complete"]

    def missing_images(self) -> list[int]:
        """Places of the images that :meth:`add` still needs, in order."""
        return [i for shard in sorted(self._missing) for i in range(shard * self._size, min((shard + 1) * self._size, self.n_images))]

    def add(self, h: Tensor, indices: Tensor) -> None:
        """Add some images; those that are already on disk are passed over.

        Parameters
        ----------
        h : Tensor [b, 1+P, S]
            Latent activations at CLS and the patches.
        indices : LongTensor [b]
            Places in the data set, ascending from call to call.
        """
        if self.complete:
            return
        h = h[:, TOKENS[self._manifest["tokens"]]]
        for row, index in enumerate(indices.tolist()):
            shard = index // self._size
            if shard not in self._missing:
                continue
            self._entries.append(self._sparse(h[row]))
            self._collected += 1
            if self._collected == min(self._size, self.n_images - shard * self._size):
                self._flush(shard)

    def finish(self) -> FeatureStore:
        """Mark the store complete and open it.

        Raises
        ------
        ValueError
            If images are missing.
        """
        if self._missing:
            raise ValueError(f"{len(self.missing_images())} of {self.n_images} images were not added to {self.folder}.")
        if not self.complete:
            self._manifest["complete"] = True
            write_json(self.folder / MANIFEST, self._manifest)
        return FeatureStore.open(self.folder)

    def _sparse(self, h: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries a token, latents and values of one image's [T, S]."""
        tokens, latents = (h > self._manifest["tau"]).nonzero(as_tuple=True)
        dtype = self._manifest["dtype"]
        values = h[tokens, latents].float().cpu().numpy()
        tokens, latents = tokens.cpu().numpy(), latents.cpu().numpy().astype(np.int32)
        if dtype == "float16":
            if values.size and values.max() > np.finfo(np.float16).max:
                raise ValueError(f"An activation of {values.max():g} is too large for float16. Write the store with dtype='float32'.")
            values = values.astype(np.float16)
            kept = values > 0
            tokens, latents, values = tokens[kept], latents[kept], values[kept]
        return np.bincount(tokens, minlength=self.n_tokens), latents, values

    def _flush(self, shard: int) -> None:
        counts, latents, values = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        offsets = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        # A counting sort of the entries' numbers: linear, and stable, so tokens ascend within a latent.
        order = sparse.csr_matrix((np.arange(len(latents)), latents, offsets), (len(counts), self.n_latents)).tocsc()
        arrays = {
            "offsets": offsets,
            "latents": latents,
            "values": values,
            "latent_offsets": order.indptr.astype(np.int64),
            "latent_tokens": order.indices.astype(np.int32),
            "latent_values": values[order.data],
        }
        self._write(shard_name(shard), arrays, len(latents))
        self._missing.remove(shard)
        self._entries, self._collected = [], 0

    def _write(self, name: str, arrays: dict[str, np.ndarray], n_entries: int) -> None:
        temporary = self.folder / f".{name}.tmp"
        save_file(arrays, temporary)
        entry = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary), "n_entries": n_entries}
        os.replace(temporary, self.folder / name)
        self._manifest["files"][name] = entry
        write_json(self.folder / MANIFEST, self._manifest)


def _whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]
