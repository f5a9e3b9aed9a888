"""The activation store: a CLIP's residual stream over a data set, on disk.

A store is a folder::

    manifest.json            what the activations are, and a checksum of every other file
    index.safetensors        labels int64 [N], indices int64 [N]
    shard-00000.safetensors  tokens bfloat16 or float16 [n, T, d], images 0 to n-1
    shard-00001.safetensors  images n to 2n-1, and so on; the last shard may be shorter

Each ``.safetensors`` file is, byte for byte: an unsigned 64-bit little-endian integer H; H bytes of JSON that give every tensor's ``dtype``
(``BF16``, ``F16``, ``I64``), ``shape`` and ``data_offsets`` counted from the end of that JSON; then the tensors' raw little-endian values,
row-major. Token t of image i of a shard thus begins 2 * d * (i * T + t) bytes after the start of ``tokens``. T is 1 + P with CLS first and
the patches row by row (``tokens="all"``), 1 (``"cls"``), or P (``"patches"``).

``manifest.json`` (UTF-8)::

    {"format": "patchsae_utils activations", "format_version": 1,
     "fingerprint": 16 hex digits naming all inputs,     "complete": false while shards are missing,
     "model": {"name", "pretrained", "weights": hash of the weights, "fingerprint", "grid": [rows, columns]},
     "layer": block whose output this is, from 0,        "tokens": "all" | "cls" | "patches",
     "dtype": "bfloat16" | "float16",                    "preprocessing": the transforms, as text,
     "dataset": {"spec", "split", "half", "seed", "n_images", "labels": hash of the labels, "class_names": [...],
                 "contents": what names the images themselves, as far as known},
     "shape": [N, T, d],                                 "checksum": of all this without itself (absent in older stores),
     "files": {"<file name>": {"n_images", "bytes", "sha256"}, ...}}

Every file is written under a temporary name and renamed, and enters the manifest afterwards: an interrupted extraction goes on behind the
last whole shard.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from ..run.artifacts import file_sha256, fingerprint, plain, read_json
from .folders import LocalFolder, RemoteFolder, is_url
from .mixing import TokenMixer, choose_tokens

FORMAT = "patchsae_utils activations"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MANIFEST, INDEX = "manifest.json", "index.safetensors"

_OPEN_SHARDS = 64  # memory maps kept at a time
_REMEDY = "Delete this file and call extract_activations again with the same arguments: only this file is written anew."


def check_fits(tokens: Tensor, places: Sequence[int], dtype: str, dataset: str, layer: int, model: str) -> None:
    """Refuse activations [n, T, d] in a dtype that can't hold them, or that are NaN or infinite already; ``places`` are the images'.

    Raises
    ------
    ValueError
        Naming images.
    """
    bad = (~tokens.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        remedy = "Use dtype='bfloat16', or another layer." if dtype == "float16" else "The model itself gives NaN or infinity."
        shown = ", ".join(str(int(places[i])) for i in bad[:5])
        raise ValueError(
            f"Activations of {dataset!r} after layer {layer} of {model!r} don't fit {dtype}. {remedy} Look at the model's weights and at these "
            f"images: {len(bad)} of {len(tokens)}, at places {shown}{' and more' if len(bad) > 5 else ''} in the data set."
        )


class StoreMetadata(NamedTuple):
    """What a store holds."""

    model_name: str
    weights_hash: str
    """First 16 hex digits of the SHA-256 of the model's weights."""
    layer: int
    """Block whose output this is, from 0."""
    tokens: str
    """``all``, ``cls`` or ``patches``."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    dtype: str
    """On disk; readers get float32."""
    preprocessing: str
    dataset: str
    """The data set's spec."""
    split: str
    half: str | None
    seed: int | None
    class_names: list[str]
    n_images: int
    n_tokens: int
    """Tokens of an image."""
    d_in: int


class ActivationStore:
    """Activations on disk, read shard by shard; checksums are verified when a shard is first read. Made by :meth:`open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self._manifest = manifest
        model, data = manifest["model"], manifest["dataset"]
        n_images, n_tokens, d_in = manifest["shape"]
        self.metadata = StoreMetadata(
            model_name=model["name"],
            weights_hash=model["weights"],
            layer=manifest["layer"],
            tokens=manifest["tokens"],
            grid=tuple(model["grid"]),
            dtype=manifest["dtype"],
            preprocessing=manifest["preprocessing"],
            dataset=data["spec"],
            split=data["split"],
            half=data["half"],
            seed=data["seed"],
            class_names=data["class_names"],
            n_images=n_images,
            n_tokens=n_tokens,
            d_in=d_in,
        )
        self.n_images, self.n_tokens, self.d_in = n_images, n_tokens, d_in
        self._shards = [name for name in manifest["files"] if name != INDEX]
        self._sizes = np.array([manifest["files"][name]["n_images"] for name in self._shards], np.int64)
        self._verified: set[str] = set()
        self._mapped: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open a finished store, in a folder or behind a URL of any kind that fsspec knows (:mod:`.remote_store`).

        Raises
        ------
        FileNotFoundError
            If the folder holds no manifest.
        ValueError
            If it is not a store of this format, or unfinished.
        """
        if is_url(folder):
            from .remote_store import RemoteStore

            return RemoteStore.open(folder)
        folder = Path(str(folder).removeprefix("file://"))
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(
                f"{folder} holds no activation store ({MANIFEST} is missing). "
                f"Make one with extract_activations(clip, dataset, layer, {str(folder)!r})."
            )
        manifest = read_manifest(folder / MANIFEST)
        if not manifest["complete"]:
            raise ValueError(
                f"The activation store {folder} is unfinished. "
                "Call extract_activations again with the same arguments: it goes on where it stopped."
            )
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Names everything that the activations depend on."""
        return self._manifest["fingerprint"]

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        return self._load(INDEX)

    @property
    def labels(self) -> Tensor:
        """LongTensor [N]: each image's label."""
        return self._index["labels"]

    @property
    def indices(self) -> Tensor:
        """LongTensor [N]: each image's place in the data set."""
        return self._index["indices"]

    def __len__(self) -> int:
        """Tokens in the store: ``n_images * n_tokens``."""
        return self.n_images * self.n_tokens

    def __repr__(self) -> str:
        m = self.metadata
        size = f"{m.n_images:,} images of {m.dataset!r} x {m.n_tokens} tokens x {m.d_in}"
        return f"ActivationStore({str(self.folder)!r}: {size}, {m.model_name!r} layer {m.layer}, {m.dtype})"

    def describe(self) -> pd.Series:
        """The store in words and numbers, for a notebook."""
        m = self.metadata
        n_bytes = sum(entry["bytes"] for entry in self._manifest["files"].values())
        return pd.Series(
            {
                "model": f"{m.model_name} (weights {m.weights_hash})",
                "layer": f"after block {m.layer + 1} (resblocks[{m.layer}])",
                "data set": f"{m.dataset}, {m.split}, {m.n_images:,} images",
                "tokens": f"{m.tokens}: {m.n_tokens} an image, {len(self):,} in all",
                "width": str(m.d_in),
                "on disk": f"{len(self._shards)} shards of {m.dtype}, {n_bytes / 1e6:,.0f} MB, format version {FORMAT_VERSION}",
                "fingerprint": self.fingerprint,
            },
            name="activation store",
        )

    def verify(self) -> None:
        """Check every file against its checksum now.

        Raises
        ------
        ValueError, FileNotFoundError
            Naming the first damaged or missing file, and how to make it again.
        """
        self._verified.clear()
        for name in self._manifest["files"]:
            self._check(name)

    def tokens(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        start_step: int = 0,
        positions: bool = False,
        tokens: str = "all",
        buffer_bytes: int = 2**31,
    ) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:
        """Batches of single tokens, mixed from many images.

        Every epoch the shards are put in a new order and read, sequentially, into a buffer of as many as fit; the tokens of a buffer are
        permuted. A store that fits the buffer is thus shuffled as a whole. The order depends on ``seed``, the epoch and ``buffer_bytes``
        alone, so that step k of a restarted run gets the batch that it would have got.

        Parameters
        ----------
        batch_size : int
            Tokens a batch. Batches run on from one epoch into the next; only the very last may be shorter.
        shuffle : bool
            Otherwise image by image, CLS first.
        seed : int
        epochs : int or None
            Passes over the store; None goes on for ever.
        start_step : int
            Skip so many batches, without reading them.
        positions : bool
            Also yield each token's place in the model's sequence, LongTensor [batch] (0 is CLS).
        tokens : {"all", "cls", "patches"}
            All that the store holds, or only those of a store that holds all.
        buffer_bytes : int
            At most so many bytes of shards are held at a time, but at least one shard.

        Yields
        ------
        Tensor [batch, d], float32
            Or a pair with the positions.

        Raises
        ------
        ValueError
            If an argument is out of range, the store lacks the tokens wanted, or a shard is damaged.
        """
        kept = choose_tokens(self.metadata.tokens, tokens)
        n = len(range(self.n_tokens)[kept])
        mixer = TokenMixer(n, kept.start + (self.metadata.tokens == "patches"), batch_size, shuffle, seed, epochs, start_step, positions)
        shard_bytes = 2 * int(self._sizes.max()) * n * self.d_in
        per_buffer = max(1, buffer_bytes // shard_bytes)

        def load(shards: np.ndarray) -> Tensor:
            return torch.cat([self._shard(i)[:, kept] for i in shards])

        return mixer.batches(self._sizes, per_buffer, load)

    def images(self, indices: Sequence[int] | Tensor | None = None, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Whole images in order.

        Parameters
        ----------
        indices : sequence of int, optional
            Places in the data set, in the order wanted; default: all.
        batch_size : int

        Yields
        ------
        tokens : Tensor [B, T, d], float32
        labels : LongTensor [B]
        indices : LongTensor [B]

        Raises
        ------
        ValueError
            If an index is out of range, or a shard is damaged.
        """
        rows = torch.arange(self.n_images) if indices is None else torch.as_tensor(indices, dtype=torch.int64).flatten()
        if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < self.n_images):
            raise ValueError(f"The store holds images 0 to {self.n_images - 1}; got indices from {int(rows.min())} to {int(rows.max())}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        return self._image_batches(rows, batch_size)

    def _image_batches(self, rows: Tensor, batch_size: int):
        ends = torch.from_numpy(self._sizes.cumsum())
        for chunk in rows.split(batch_size) if len(rows) else ():
            shards = torch.searchsorted(ends, chunk, right=True)
            tokens = torch.empty(len(chunk), self.n_tokens, self.d_in)
            for i in shards.unique().tolist():
                mine = shards == i
                tokens[mine] = self._shard(i)[chunk[mine] - (ends[i] - self._sizes[i])].float()
            yield tokens, self.labels[chunk], self.indices[chunk]

    def _shard(self, i: int) -> Tensor:
        """Tokens [n, T, d] of a shard in their dtype on disk, mapped into memory."""
        name = self._shards[i]
        if name in self._mapped:
            self._mapped.move_to_end(name)
        else:
            tokens = self._load(name)["tokens"]
            expected = (int(self._sizes[i]), self.n_tokens, self.d_in)
            if tuple(tokens.shape) != expected or tokens.dtype != DTYPES[self.metadata.dtype]:
                raise ValueError(
                    f"{self.folder / name} holds {tokens.dtype} {list(tokens.shape)}; "
                    f"the manifest says {self.metadata.dtype} {list(expected)}. {_REMEDY}"
                )
            self._mapped[name] = tokens
            while len(self._mapped) > _OPEN_SHARDS:
                self._mapped.popitem(last=False)
        return self._mapped[name]

    def _load(self, name: str) -> dict[str, Tensor]:
        self._check(name)
        return safetensors.torch.load_file(self.folder / name)

    def _check(self, name: str) -> None:
        """Compare a file with its checksum, once."""
        if name in self._verified:
            return
        path, entry = self.folder / name, self._manifest["files"][name]
        if not path.exists():
            raise FileNotFoundError(
                f"The activation store lacks {path}. Call extract_activations again with the same arguments: only this file is written."
            )
        found = file_sha256(path)
        if found != entry["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says {entry['sha256'][:16]}.... {_REMEDY}")
        self._verified.add(name)


_KEYS = {
    "format", "format_version", "fingerprint", "complete", "model", "layer", "tokens", "dtype", "preprocessing", "dataset", "shape", "files",
}  # fmt: skip


def write_manifest(folder: LocalFolder | RemoteFolder, manifest: dict[str, Any], name: str = MANIFEST) -> None:
    """Write a manifest with its checksum."""
    text = json.dumps({**manifest, "checksum": fingerprint(**manifest)}, indent=2, default=plain, ensure_ascii=False)
    folder.write(name, f"{text}\n".encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check that it is one of ours, and whole."""
    return check_manifest(read_json(path), path)


def check_manifest(manifest: Any, path: str | Path) -> dict[str, Any]:
    """The manifest that was read from a path, if it is one of ours, and whole."""
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(manifest).__name__}. Delete the folder and extract again.")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of an activation store (format {manifest.get('format')!r}). Choose another folder.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('format_version')!r}; this package reads {FORMAT_VERSION}. "
            "Delete the folder and extract again."
        )
    checksum = manifest.pop("checksum", None)
    if set(manifest) != _KEYS or (checksum is not None and checksum != fingerprint(**manifest)):
        raise ValueError(f"{path} is damaged: it is not what was written there. Delete the folder and extract again.")
    return manifest
