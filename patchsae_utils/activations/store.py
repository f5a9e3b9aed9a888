"""The activation store, in a folder or behind a URL: a manifest, an index, and shards of some images each; ``docs/formats.md`` says what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from ..run.artifacts import MANIFEST, file_sha256, read_json, with_checksum
from .folders import Folder
from .mixing import TokenSource

FORMAT = "patchsae_utils activations"
FORMAT_VERSION = 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "index.safetensors"

_OPEN_SHARDS = 64  # memory maps kept at a time
_AGAIN = "extract_activations again with the same arguments"


class ActivationStore(TokenSource):
    """Activations on disk, read shard by shard; checksums are verified when a shard is first read. Made by :meth:`open`.

    Parameters
    ----------
    place : Folder
    manifest : dict
        What lies there, as :func:`read_manifest` reads it.
    """

    def __init__(self, place: Folder, manifest: dict[str, Any]):
        self._place, self._manifest = place, manifest
        self.folder: Path | str = place.name if place.local is None else place.local
        self.fingerprint: str = manifest["fingerprint"]  # names everything that the activations depend on
        super().__init__(manifest)
        self._shards = [name for name in manifest["files"] if name != INDEX]
        self._sizes = np.array([manifest["files"][name]["n_images"] for name in self._shards], np.int64)
        self._verified: set[str] = set()
        self._shard = lru_cache(_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open a finished store, in a folder or behind a URL, whose shards are fetched when they are first read; an error says what is wrong."""
        place = Folder(folder)
        if place.size(MANIFEST) is None:
            make = f"extract_activations(clip, dataset, layer, {str(place)!r})"
            raise FileNotFoundError(f"{place} holds no activation store ({MANIFEST} is missing). Make one with {make}.")
        manifest = read_manifest(place)
        if not manifest["complete"]:
            raise ValueError(f"The activation store {place} is unfinished. Call {_AGAIN}: it goes on where it stopped.")
        return cls(place, manifest)

    @cached_property
    def labels(self) -> Tensor:
        """LongTensor [N]: each image's label."""
        return self._load(INDEX)["labels"]

    @cached_property
    def indices(self) -> Tensor:
        """LongTensor [N]: each image's place in the data set."""
        return self._load(INDEX)["indices"]

    def describe(self) -> pd.Series:
        """The store in words and numbers, for a notebook."""
        m, n_bytes = self.metadata, sum(entry["bytes"] for entry in self._manifest["files"].values())
        facts = {
            "model": f"{m.model_name} (weights {m.weights_hash})",
            "layer": f"{m.layer}: after resblocks[{m.layer}], counted from 0",
            "data set": f"{m.dataset}, {m.split}, {m.n_images:,} images",
            "tokens": f"{m.tokens}: {m.n_tokens} per image, {len(self):,} in all",
            "width": str(m.d_in),
            "on disk": f"{len(self._shards)} shards of {m.dtype}, {n_bytes / 1e6:,.0f} MB, format version {FORMAT_VERSION}",
            "fingerprint": self.fingerprint,
        }
        return pd.Series(facts, name="activation store")

    def verify(self) -> None:
        """Check every file against its checksum now: an error names the first that is damaged or missing, and how to make it again."""
        self._verified.clear()
        for name in self._manifest["files"]:
            self._checked(name)

    def _read(self, parts: np.ndarray, places: range) -> Tensor:
        before = int(self.metadata.tokens == "patches")  # places that are not stored
        return torch.cat([self._shard(i)[:, places.start - before : places.stop - before] for i in parts])

    def images(self, indices: Sequence[int] | Tensor | None = None, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Whole images, all or those of some places in the data set, in that order: float32 tokens [B, T, d], labels [B] and places [B]."""
        rows = torch.arange(self.n_images) if indices is None else torch.as_tensor(indices, dtype=torch.int64).flatten()
        if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < self.n_images):
            raise ValueError(f"The store holds images 0 to {self.n_images - 1}; got indices from {int(rows.min())} to {int(rows.max())}.")
        ends = torch.from_numpy(self._sizes.cumsum())
        for chunk in rows.split(batch_size) if len(rows) else ():
            shards = torch.searchsorted(ends, chunk, right=True)
            tokens = torch.empty(len(chunk), self.n_tokens, self.d_in)
            for i in shards.unique().tolist():
                mine = shards == i
                tokens[mine] = self._shard(i)[chunk[mine] - (ends[i] - self._sizes[i])].float()
            yield tokens, self.labels[chunk], self.indices[chunk]

    def _map_shard(self, i: int) -> Tensor:
        """Tokens [n, T, d] of a shard in their dtype on disk, mapped into memory."""
        name, dtype = self._shards[i], DTYPES[self.metadata.dtype]
        tokens, expected = self._load(name)["tokens"], (int(self._sizes[i]), self.n_tokens, self.d_in)
        if tuple(tokens.shape) != expected or tokens.dtype != dtype:
            raise self._damaged(name, f"it holds {tokens.dtype} {list(tokens.shape)}; the manifest says {dtype} {[*expected]}")
        return tokens

    def _load(self, name: str) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self._checked(name))

    def _checked(self, name: str) -> Path:
        """A file on this machine, compared with its checksum when it is first read."""
        expected = self._manifest["files"][name]["sha256"]
        try:
            path = self._place.path(name)
            if name in self._verified:
                return path
            if self._place.local is None and file_sha256(path) != expected:
                path = self._place.path(name, anew=True)  # of a disk that lost something, or of another store in this place
            found = file_sha256(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"The activation store lacks {self._place}/{name}. Call {_AGAIN}: only this file is written.") from None
        if found != expected:
            raise self._damaged(name, f"its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...")
        self._verified.add(name)
        return path

    def _damaged(self, name: str, why: str) -> ValueError:
        return ValueError(f"{self._place}/{name} is damaged: {why}. Delete this file and call {_AGAIN}: only this file is written anew.")


def write_manifest(folder: Folder, manifest: dict[str, Any], name: str = MANIFEST) -> None:
    folder.write(name, f"{json.dumps(with_checksum(manifest), indent=2, ensure_ascii=False)}\n".encode(errors="backslashreplace"))


def read_manifest(folder: Folder, name: str = MANIFEST) -> dict[str, Any]:
    """Read a manifest and check that it is one of ours, and whole."""
    path = f"{folder}/{name}"
    found = read_json(path, folder.read(name))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of an activation store. Choose another folder.")
    if found.get("format_version") != FORMAT_VERSION:
        raise OtherVersion(
            f"{path} has format version {found.get('format_version')!r}; this package reads {FORMAT_VERSION}. "
            "Extract again: extract_activations replaces it."
        )
    manifest = {key: value for key, value in found.items() if key != "checksum"}
    if with_checksum(manifest) != found:
        raise ValueError(f"{path} is damaged: it is not what was written there. Delete the folder and extract again.")
    return manifest


class OtherVersion(ValueError):
    """The manifest of another version of this package."""
