"""Writing the sparse feature store: every token's latent activations over a data set. ``feature_store.py`` describes the files and reads them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy import sparse
from torch import Tensor

from ..data.dataset import dataset_fingerprint
from ..run.artifacts import atomic_file, file_sha256, fingerprint, folder_lock, read_checked_json, write_checked_json
from ..run.processes import current_processes
from .feature_store import FORMAT, FORMAT_VERSION, INDEX, MANIFEST, FeatureStore, LatentEntries, TokenEntries, shard_name
from .passes import one_pass
from .reading import read_latents
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
    bar = "features" if progress else None
    with FeatureWriter.of(clip, sae, dataset, layer, out, tau=tau, tokens=tokens, dtype=dtype, shard_images=shard_images) as writer:
        if not writer.complete:

            def read(rows, between):
                return read_latents(clip, sae, dataset, layer, batch_size, workers, rows, bar, between=between)

            with torch.no_grad(), one_pass(read, len(dataset), {}, None, writer, batch_size=batch_size, unfinished=None, key=""):
                pass
        return writer.finish()


class FeatureWriter:
    """Writes a store shard by shard while images come in, in the order of the data set. Made by :meth:`of`; a ``with`` block lets go of the folder.

    Several processes that were launched together write one store: each adds whole shards of its own, and all call :meth:`finish`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: np.ndarray):
        self.folder, self._manifest, self._labels = folder, manifest, labels
        self._processes, self._lock = current_processes(), ExitStack()
        self.n_images, self.n_tokens, self.n_latents = manifest["shape"]
        self._size = manifest["shard_images"]
        self._entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._collected = 0
        try:
            self._manifest = self._processes.on_main(self._resume)
        except BaseException:
            self._lock.close()
            raise
        self._missing = {i for i in range(math.ceil(self.n_images / self._size)) if shard_name(i) not in self._manifest["files"]}

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

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

    def _resume(self) -> dict[str, Any]:
        """Take over the whole files of an earlier attempt; clear away those of other inputs."""
        path = self.folder / MANIFEST
        others = [each for each in self.folder.iterdir() if each.name != ".lock"] if self.folder.is_dir() else []
        if others and not path.exists():
            raise ValueError(f"{self.folder} holds other files. Give write_features a folder of its own.")
        if self._take_over(path):
            return self._manifest
        self._lock.enter_context(folder_lock(self.folder))
        if self._take_over(path, clear=True):  # another process has finished it
            return self._manifest
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        write_checked_json(path, self._manifest)
        for part in self._parts():
            part.unlink()
        if INDEX not in self._manifest["files"]:
            self._write(INDEX, {"labels": self._labels}, 0)
        return self._manifest

    def _take_over(self, path: Path, clear: bool = False) -> bool:
        """Enter the whole files of the same inputs into the manifest, and remove those of others if asked to; whether nothing is missing."""
        told = [read_checked_json(each) for each in (path, *self._parts()) if each.exists()]
        if told and told[0].get("format") != FORMAT:
            raise ValueError(f"{self.folder} holds {told[0].get('format')!r}, no feature store. Give write_features a folder of its own.")
        same = [each for each in told if each.get("fingerprint") == self._manifest["fingerprint"]]
        entries = {name: entry for each in same for name, entry in each["files"].items()}
        known = self._manifest["files"]  # checked a moment ago
        whole = {name: entry for name, entry in entries.items() if known.get(name) == entry or _whole(self.folder / name, entry)}
        complete = any(each["complete"] for each in same) and len(whole) == len(entries)
        self._manifest |= {"files": whole, "complete": complete}
        for name in {name for each in told if clear and each not in same for name in each["files"]} - whole.keys():
            (self.folder / name).unlink(missing_ok=True)
        return complete

    def _parts(self) -> list[Path]:
        """Manifests of the other processes of an earlier attempt."""
        return sorted(self.folder.glob("manifest-*.json"))

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
        if not self.complete:
            for files in self._processes.everywhere(lambda: self._manifest["files"]):
                self._manifest["files"] |= files
            self._missing = {i for i in self._missing if shard_name(i) not in self._manifest["files"]}
            if self._missing:
                raise ValueError(f"{len(self.missing_images())} of {self.n_images} images were not added to {self.folder}.")
            self._manifest |= {"complete": True, "files": dict(sorted(self._manifest["files"].items()))}
            self._processes.on_main(self._complete)
        return FeatureStore.open(self.folder)

    def _complete(self) -> None:
        write_checked_json(self.folder / MANIFEST, self._manifest)
        for part in self._parts():
            part.unlink()
        self._lock.close()

    @property
    def shard_images(self) -> int:
        """Images a shard."""
        return self._size

    @property
    def between_shards(self) -> bool:
        """Whether all that was added is on disk."""
        return self._collected == 0

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
        with atomic_file(self.folder / name) as temporary:
            save_file(arrays, temporary)
            entry = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary), "n_entries": n_entries}
        self._manifest["files"][name] = entry
        where = MANIFEST if self._processes.main else f"manifest-{self._processes.index}.json"
        write_checked_json(self.folder / where, self._manifest)


def _whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]
