"""The sparse feature store: every token's latent activations over a data set, on disk, queried by latent, image, patch or class.

A store is a folder::

    manifest.json              what the activations are, and a checksum of every other file
    index.safetensors          labels int64 [N]: the class of each image
    shard-00000.safetensors    images 0 to n-1
    shard-00001.safetensors    images n to 2n-1, and so on; the last shard may be shorter

Each ``.safetensors`` file is, byte for byte: an unsigned 64-bit little-endian integer H; H bytes of JSON that give every array's ``dtype``
(``F16``, ``F32``, ``I32``, ``I64``), ``shape`` and ``data_offsets`` counted from the end of that JSON; then the arrays' raw little-endian
values. A shard of n images holds the same E activations twice, token by token (CSR) and latent by latent (CSC)::

    offsets         int64 [n * T + 1]   entries offsets[t] to offsets[t + 1] - 1 belong to token t = image * T + token
    latents         int32 [E]           which latent, ascending within a token
    values          float16 or float32 [E]
    latent_offsets  int64 [S + 1]       entries latent_offsets[s] to latent_offsets[s + 1] - 1 belong to latent s
    latent_tokens   int32 [E]           which token of the shard, ascending within a latent
    latent_values   float16 or float32 [E]

Images count from the shard's first. T is 1 + P with CLS first and the patches row by row (``tokens="all"``), 1 (``"cls"``), or P
(``"patches"``). An activation h is kept where h > tau; with tau = 0 nothing is lost but the rounding to float16: relative error at most
2**-11, below 6.1e-5 an absolute one of at most 3e-8, and what would round to 0 is left out.

``manifest.json`` (UTF-8)::

    {"format": "patchsae_utils features", "format_version": 1,
     "fingerprint": 16 hex digits naming all inputs,  "complete": false while shards are missing,
     "model": {"name", "grid": [rows, columns]},      "layer": block whose output the SAE read,
     "sae": fingerprint of the SAE,                   "tau": threshold,   "tokens": "all" | "cls" | "patches",
     "dtype": "float16" | "float32",                  "shape": [N, T, S], "shard_images": n,
     "dataset": {"spec", "split", "class_names"},     "files": {"<file name>": {"bytes", "sha256", "n_entries"}, ...},
     "checksum": of all this without itself (absent in older stores)}

Every file is written under a temporary name and renamed, and enters the manifest afterwards: interrupted writing goes on with the shards
that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from scipy import sparse
from torch import Tensor

from ..run.artifacts import damage_named, file_sha256, read_checked_json

FORMAT = "patchsae_utils features"
FORMAT_VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.safetensors"

_NUMPY = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}
_REMEDY = "Delete this file and call write_features again with the same arguments: only what is missing is written."


class LatentEntries(NamedTuple):
    """Where one latent is active, in the order of the data set."""

    images: np.ndarray
    """int64 [n] places in the data set."""
    tokens: np.ndarray
    """int64 [n] places in the model's sequence: 0 is CLS, 1 + row * columns + column a patch."""
    values: np.ndarray
    """float32 [n] activations."""


class TokenEntries(NamedTuple):
    """What is active on the tokens of one image, token by token."""

    tokens: np.ndarray
    """int64 [n] places in the model's sequence: 0 is CLS, 1 + row * columns + column a patch."""
    latents: np.ndarray
    """int64 [n]."""
    values: np.ndarray
    """float32 [n] activations."""


class FeatureStore:
    """Latent activations on disk, mapped into memory when they are asked for. Made by :meth:`open`.

    A shard's checksum is verified when it is first read, unless that was declined; sizes are compared on opening.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], verify: bool):
        self.folder, self._manifest, self._verify = folder, manifest, verify
        self.n_images, self.n_tokens, self.n_latents = manifest["shape"]
        self.grid: tuple[int, int] = tuple(manifest["model"]["grid"])
        self.tau, self.tokens, self.layer = manifest["tau"], manifest["tokens"], manifest["layer"]
        self.class_names: list[str] = manifest["dataset"]["class_names"]
        self.shard_images = manifest["shard_images"]
        self._mapped: dict[int, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> FeatureStore:
        """Open a finished store.

        Parameters
        ----------
        folder : path
        verify : bool
            Compare each shard with its checksum when it is first read.

        Raises
        ------
        FileNotFoundError
            If the folder holds no store, or a file of it is missing.
        ValueError
            If it is not a store of this format, unfinished, its manifest is damaged, or a file has another size than it was written with.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(
                f"{folder} holds no feature store ({MANIFEST} is missing). "
                f"Make one with write_features(clip, sae, dataset, layer, {str(folder)!r})."
            )
        manifest = read_checked_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / MANIFEST} describes {manifest.get('format')!r}, version {manifest.get('format_version')}; this package reads {FORMAT!r}, "
                f"version {FORMAT_VERSION}. Write it again with write_features into an empty folder."
            )
        with damage_named(folder / MANIFEST):
            return cls._checked(folder, manifest, verify)

    @classmethod
    def _checked(cls, folder: Path, manifest: dict[str, Any], verify: bool) -> FeatureStore:
        """The store of a manifest, if it is finished and its files have their sizes."""
        if not manifest["complete"]:
            raise ValueError(
                f"The feature store {folder} is unfinished. Call write_features again with the same arguments: it goes on where it stopped."
            )
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.exists():
                raise FileNotFoundError(f"The feature store lacks {path}. {_REMEDY}")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{path} is damaged: it has {path.stat().st_size:,} bytes, the manifest says {entry['bytes']:,}. {_REMEDY}"
                )
        return cls(folder, manifest, verify)

    def __repr__(self) -> str:
        shape = f"{self.n_images:,} images x {self.n_tokens} tokens x {self.n_latents:,} latents"
        return f"FeatureStore({str(self.folder)!r}: {shape}, {self.n_entries:,} activations above {self.tau:g})"

    @property
    def fingerprint(self) -> str:
        """Names everything that the activations depend on."""
        return self._manifest["fingerprint"]

    @property
    def n_entries(self) -> int:
        """Activations in the store."""
        return sum(entry["n_entries"] for entry in self._manifest["files"].values())

    @property
    def n_bytes(self) -> int:
        """On disk, manifest apart."""
        return sum(entry["bytes"] for entry in self._manifest["files"].values())

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: each image's class."""
        _check(self.folder, INDEX, self._manifest["files"][INDEX])
        return load_file(self.folder / INDEX)["labels"]

    def describe(self) -> pd.Series:
        """The store in words and numbers, for a notebook."""
        m, entries = self._manifest, self.n_entries
        return pd.Series(
            {
                "latents": f"{self.n_latents:,} of SAE {m['sae']}, layer {self.layer} of {m['model']['name']}",
                "data set": f"{m['dataset']['spec']}, {m['dataset']['split']}, {self.n_images:,} images",
                "tokens": f"{self.tokens}: {self.n_tokens} an image",
                "activations": f"{entries:,} above {self.tau:g}, {entries / (self.n_images * self.n_tokens):.1f} a token",
                "on disk": f"{m['dtype']}, {self.n_bytes / 1e6:,.0f} MB; dense it would be {2e-6 * math.prod(m['shape']):,.0f} MB",
            },
            name="feature store",
        )

    def verify(self) -> None:
        """Check every file against its checksum now.

        Raises
        ------
        ValueError, FileNotFoundError
            Naming the first damaged or missing file, and how to make it again.
        """
        for name, entry in self._manifest["files"].items():
            _check(self.folder, name, entry)

    # -- queries ----------------------------------------------------------------------------------------------------------

    def latent(self, latent: int) -> LatentEntries:
        """Every token on which one latent is active.

        Raises
        ------
        ValueError
            If there is no such latent.
        """
        latent = _within(latent, self.n_latents, "latent")
        tokens, values = [], []
        for i in range(self._n_shards):
            shard = self._shard(i)
            low, high = shard["latent_offsets"][latent : latent + 2]
            tokens.append(shard["latent_tokens"][low:high] + np.int64(i * self.shard_images * self.n_tokens))
            values.append(shard["latent_values"][low:high])
        token = np.concatenate(tokens)
        return LatentEntries(token // self.n_tokens, token % self.n_tokens + self._first, np.concatenate(values).astype(np.float32))

    def image(self, index: int) -> TokenEntries:
        """Everything that is active in one image.

        Raises
        ------
        ValueError
            If there is no such image.
        """
        offsets, latents, values = self._rows(index)
        tokens = np.repeat(np.arange(self.n_tokens), np.diff(offsets)) + self._first
        return TokenEntries(tokens, latents.astype(np.int64), values.astype(np.float32))

    def patch(self, index: int, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """What is active on one patch, strongest first.

        Returns
        -------
        latents : int64 [n]
        values : float32 [n]

        Raises
        ------
        ValueError
            If there is no such image or patch, or the store holds CLS alone.
        """
        if self.tokens == "cls":
            raise ValueError(f"{self.folder} holds CLS alone, no patches. Write a store with tokens='all' or 'patches'.")
        rows, columns = self.grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"Patch ({row}, {column}) is outside the grid of {rows} x {columns} patches.")
        offsets, latents, values = self._rows(index)
        token = 1 + row * columns + column - self._first
        part = slice(offsets[token] - offsets[0], offsets[token + 1] - offsets[0])
        order = np.argsort(-values[part].astype(np.float32), kind="stable")
        return latents[part][order].astype(np.int64), values[part][order].astype(np.float32)

    def of_class(self, label: int, tau: float = 0.2) -> np.ndarray:
        """a_c of one class: tokens of its images on which each latent exceeds tau; float64 [S].

        Raises
        ------
        ValueError
            If there is no such class, or tau is below the store's.
        """
        label = _within(label, len(self.class_names), "class")
        tau = self._checked_tau(tau)
        counts = np.zeros(self.n_latents)
        for index in np.flatnonzero(self.labels == label):
            _, latents, values = self._rows(int(index))
            counts += np.bincount(latents[values > tau], minlength=self.n_latents)
        return counts

    def class_counts(self, tau: float = 0.2) -> Tensor:
        """a_c of every class, float32 [C, S]: what ``summarize_latents(..., tau=tau)`` counts, for any tau, without reading an image.

        Entries that the rounding to float16 moves across tau are the exception.

        Raises
        ------
        ValueError
            If tau is below the store's.
        """
        tau = self._checked_tau(tau)
        counts = np.zeros((len(self.class_names), self.n_latents), np.float32)
        for i in range(self._n_shards):
            shard = self._shard(i)
            images = np.diff(shard["offsets"][:: self.n_tokens])
            labels = np.repeat(self.labels[i * self.shard_images :][: len(images)], images)
            above = shard["values"] > np.float32(tau)
            pairs = (np.ones(above.sum(), np.float32), (labels[above], shard["latents"][above]))
            table = sparse.coo_matrix(pairs, counts.shape).tocsr()
            rows = np.unique(labels)
            counts[rows] += table[rows].toarray()
        return torch.from_numpy(counts)

    def masks(self, images: Sequence[int], latents: Sequence[int]) -> Tensor:
        """Activations on the grid of patches, float32 [B, n, rows, columns], as :func:`patchsae_utils.latent_masks` computes them.

        Raises
        ------
        ValueError
            If there is no such image or latent, or the store holds CLS alone.
        """
        if self.tokens == "cls":
            raise ValueError(f"{self.folder} holds CLS alone, no patches. Write a store with tokens='all' or 'patches'.")
        latents = [_within(s, self.n_latents, "latent") for s in latents]
        dense = torch.from_numpy(self.csr(images)[:, latents].toarray()).view(len(images), self.n_tokens, len(latents))
        return dense[:, 1 - self._first :].transpose(1, 2).unflatten(2, self.grid).contiguous()

    def csr(self, images: Sequence[int] | None = None) -> sparse.csr_matrix:
        """Activations of some images (default: all) as a float32 matrix [len(images) * T, S], image by image, token by token."""
        parts = [self._rows(int(i)) for i in (range(self.n_images) if images is None else images)]
        lengths = [np.diff(offsets) for offsets, _, _ in parts]
        indptr = np.concatenate([np.zeros(1, np.int64), np.concatenate(lengths).cumsum()]) if parts else np.zeros(1, np.int64)
        latents = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.int32)
        values = np.concatenate([part[2] for part in parts]).astype(np.float32) if parts else np.zeros(0, np.float32)
        return sparse.csr_matrix((values, latents, indptr), (len(parts) * self.n_tokens, self.n_latents))

    def dense(self, images: Sequence[int]) -> Tensor:
        """Activations of some images, float32 [B, T, S]: mind the size."""
        return torch.from_numpy(self.csr(images).toarray()).view(len(images), self.n_tokens, self.n_latents)

    # -- shards -----------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        """Place of the first kept token in the model's sequence."""
        return 1 if self.tokens == "patches" else 0

    @property
    def _n_shards(self) -> int:
        return math.ceil(self.n_images / self.shard_images)

    def _checked_tau(self, tau: float) -> float:
        if tau < self.tau:
            raise ValueError(
                f"This store keeps activations above {self.tau:g}; it can't count those above {tau:g}. Write one with a lower tau."
            )
        return tau

    def _rows(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets [T + 1], latents and values of an image."""
        shard, local = divmod(_within(index, self.n_images, "image"), self.shard_images)
        arrays = self._shard(shard)
        offsets = arrays["offsets"][local * self.n_tokens : (local + 1) * self.n_tokens + 1]
        part = slice(offsets[0], offsets[-1])
        return offsets, arrays["latents"][part], arrays["values"][part]

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        if i not in self._mapped:
            name = shard_name(i)
            if self._verify:
                _check(self.folder, name, self._manifest["files"][name])
            self._mapped[i] = _map(self.folder / name)
        return self._mapped[i]


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


def _map(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as read-only views of a memory map."""
    raw = np.memmap(path, np.uint8, "r")
    size = int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8 : 8 + size].tobytes())
    body = raw[8 + size :]
    views = {}
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            views[name] = body[low:high].view(np.ndarray).view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return views


def _check(folder: Path, name: str, entry: dict[str, Any]) -> None:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"The feature store lacks {path}. {_REMEDY}")
    found = file_sha256(path)
    if found != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says {entry['sha256'][:16]}.... {_REMEDY}")


def _within(value: int, n: int, what: str) -> int:
    value = int(value)
    if not 0 <= value < n:
        raise ValueError(f"There is no {what} {value}; the store holds {what}s 0 to {n - 1}.".replace("classs", "classes"))
    return value
