"""Extraction: a CLIP's residual stream over a data set, computed once, written shard by shard, read many times (see :mod:`.store`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.dataset import describe_dataset
from ..data.loader import batches
from ..run.artifacts import fingerprint
from ..run.memory import HalvedBatches
from ..run.processes import Processes
from .folders import LocalFolder, RemoteFolder, open_folder, read_object
from .mixing import TOKENS, choose_tokens
from .store import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    ActivationStore,
    StoreMetadata,
    check_fits,
    check_manifest,
    write_manifest,
)

__all__ = ["ActivationStore", "StoreMetadata", "extract_activations"]

_PART = re.compile(r"manifest-\d+\.json")
_LEFTOVER = re.compile(r"manifest-\d+\.json|shard-.*\.safetensors|\.(shard-|index\.|manifest).*\.tmp")


def extract_activations(
    clip,
    dataset,
    layer: int,
    out: str | Path,
    *,
    tokens: str = "all",
    dtype: str = "bfloat16",
    batch_size: int = 64,
    workers: int | None = None,
    n_per_shard: int = 512,
    progress: bool = True,
) -> ActivationStore:
    """Write the residual stream after one block, over a whole data set, into a store.

    A finished store of the same inputs is opened at once; of an unfinished one, only what is missing is computed; a store of other inputs
    is replaced. Other files in the folder are left alone.

    Under several processes (``accelerate launch``, ``torchrun``) all must call this: each writes its share of the shards, and the store is, byte
    for byte, the one that a single process writes. An interrupted run may go on with another number of processes. A batch that doesn't fit the
    memory is halved, with a warning.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are not stored.
    dataset : ImageData or OpenMojiData
    layer : int
        Block whose output is read; -2 is the paper's.
    out : path or str
        The store's folder, or a URL of any kind that fsspec writes: ``s3://bucket/folder``.
    tokens : {"all", "cls", "patches"}
    dtype : {"bfloat16", "float16"}
        bfloat16 keeps 8 bits of precision at any magnitude; float16 keeps 11 below 65,504.
    batch_size : int
        Images a forward pass.
    workers : int
        Processes that open images.
    n_per_shard : int
        Images a shard.
    progress : bool
        Show a bar.

    Raises
    ------
    ValueError
        For an unknown layer, tokens or dtype (naming the valid ones); an empty data set; a folder whose manifest is another program's, or
        that another process writes; activations that the dtype can't hold.
    MemoryError
        If not even one image fits the memory.
    """
    if batch_size < 1 or n_per_shard < 1:
        raise ValueError(f"batch_size and n_per_shard must be at least 1, got {batch_size} and {n_per_shard}.")
    inputs = describe_activations(clip, dataset, layer, tokens, dtype)
    folder = open_folder(out)
    key = fingerprint(n_per_shard=n_per_shard, **inputs)
    processes = Processes()
    if not processes.on_main(lambda: _is_whole(folder, key)):
        with ExitStack() as stack:
            processes.on_main(lambda: stack.enter_context(folder.lock()))
            _extract(clip, dataset, inputs, key, folder, processes, batch_size, workers, n_per_shard, progress)
    return ActivationStore.open(out)


def _extract(clip, dataset, inputs, key, folder, processes, batch_size, workers, n_per_shard, progress) -> None:
    """Write what is missing of a store, each process every so-many-th of the missing shards."""
    n_images = inputs["shape"][0]
    sizes = {f"shard-{i:05d}.safetensors": min(n_per_shard, n_images - start) for i, start in enumerate(range(0, n_images, n_per_shard))}
    manifest = processes.on_main(lambda: _begin(folder, {**inputs, "fingerprint": key}, sizes))
    names = [name for name in sizes if name not in manifest["files"]][processes.index :: processes.number]
    own = {**manifest, "files": dict(manifest["files"]) if processes.main else {}}
    where = MANIFEST if processes.main else f"manifest-{processes.index}.json"  # each tells what it wrote; the next start reads all

    def write_share() -> dict[str, Any]:
        rows = [int(name[6:11]) * n_per_shard + i for name in names for i in range(sizes[name])]
        done = n_images - len(rows) if processes.number == 1 else 0
        hide = not progress or not rows or not processes.main
        bar = tqdm(total=done + len(rows), initial=done, desc=f"activations of {dataset.name}", unit="image", disable=hide)
        with bar, torch.inference_mode():
            loaded = (batch.images for batch in batches(dataset, clip.preprocess, batch_size, workers, rows)) if rows else iter(())
            shards = _shards(clip, loaded, inputs, [sizes[name] for name in names], batch_size, bar)
            for name, shard in zip(names, shards, strict=True):
                places = range(int(name[6:11]) * n_per_shard, n_images)
                check_fits(shard, places, inputs["dtype"], dataset.spec, inputs["layer"], clip.name)
                own["files"][name] = _write(folder, name, {"tokens": shard}) | {"n_images": sizes[name]}
                write_manifest(folder, own, where)
        return own["files"]

    def finish() -> None:
        files = {name: entry for part in parts for name, entry in part.items()}
        if INDEX not in files:
            labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
            files[INDEX] = _write(folder, INDEX, {"labels": labels, "indices": torch.arange(n_images)}) | {"n_images": n_images}
        if not manifest["complete"]:
            write_manifest(folder, {**manifest, "complete": True, "files": {name: files[name] for name in [*sizes, INDEX]}})
        for name in filter(_PART.fullmatch, folder.names()):
            folder.remove(name)

    parts = processes.everywhere(write_share)
    processes.on_main(finish)


def _shards(clip, loaded: Iterator[Tensor], inputs: dict[str, Any], sizes: list[int], batch_size: int, bar) -> Iterator[Tensor]:
    """Tokens [n, T, d] of each shard.

    Batches begin anew with every shard: how the forward passes are cut, and with that the last bit, is the same wherever a run was interrupted
    and however many processes share the shards.
    """
    kept, fitting = choose_tokens("all", inputs["tokens"]), HalvedBatches(clip.device)
    waiting: Tensor | None = None
    for size in sizes:
        shard = torch.empty(size, *inputs["shape"][1:], dtype=DTYPES[inputs["dtype"]])
        for start in range(0, size, batch_size):
            part = shard[start : start + batch_size]
            while waiting is None or len(waiting) < len(part):
                more = next(loaded)
                waiting = more if waiting is None or not len(waiting) else torch.cat([waiting, more])
            images, waiting = waiting[: len(part)], waiting[len(part) :]

            def read(rows: slice, images: Tensor = images) -> Tensor:
                return clip.residual(images[rows], inputs["layer"])[:, kept]

            for rows, tokens in fitting.run(len(images), read):
                part[rows] = tokens
                bar.update(len(tokens))
        yield shard


def describe_activations(clip, dataset, layer: int, tokens: str, dtype: str) -> dict[str, Any]:
    """Everything that the activations of a data set depend on, and their shape, as a store's manifest says it.

    Raises
    ------
    ValueError
        For an unknown layer, tokens or dtype (naming the valid ones), or an empty data set.
    """
    for name, value, valid in (("tokens", tokens, TOKENS), ("dtype", dtype, tuple(DTYPES))):
        if value not in valid:
            raise ValueError(f"Unknown {name} {value!r}. Valid: {', '.join(valid)}.")
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to extract.")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "name": clip.name,
            "pretrained": clip.pretrained,
            "weights": clip.weights_hash,
            "fingerprint": clip.fingerprint,
            "grid": list(clip.grid),
        },
        "layer": clip.layer_index(layer),
        "tokens": tokens,
        "dtype": dtype,
        "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", repr(clip.preprocess)),
        "dataset": describe_dataset(dataset),
        "shape": [len(dataset), len(range(clip.n_tokens)[choose_tokens("all", tokens)]), clip.width],
    }


def _is_whole(folder: LocalFolder | RemoteFolder, key: str) -> bool:
    """Whether a finished store of these inputs is there, with all its files."""
    if folder.size(MANIFEST) is None:
        return False
    found = read_object(folder, MANIFEST)
    if not isinstance(found, dict) or found.get("fingerprint") != key or not found.get("complete"):
        return False
    return all(folder.size(name) == entry["bytes"] for name, entry in check_manifest(found, f"{folder}/{MANIFEST}")["files"].items())


def _begin(folder: LocalFolder | RemoteFolder, manifest: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The manifest to go on from: the folder's own if it is of the same inputs, with the files that are still whole; else a new one."""
    names = folder.names()
    told = [check_manifest(read_object(folder, name), f"{folder}/{name}") for name in names if name == MANIFEST or _PART.fullmatch(name)]
    entries = {name: entry for each in told if each["fingerprint"] == manifest["fingerprint"] for name, entry in each["files"].items()}
    files = {name: entry for name, entry in entries.items() if folder.size(name) == entry["bytes"]}
    complete = files.keys() == {*sizes, INDEX}
    begun = {**manifest, "complete": complete, "files": files}
    if not complete:
        write_manifest(folder, begun)  # before anything is deleted: no manifest ever promises a file of other inputs
        for name in filter(_LEFTOVER.fullmatch, names):
            if name not in files:
                folder.remove(name)
    return begun


def _write(folder: LocalFolder | RemoteFolder, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its manifest entry."""
    content = safetensors.torch.save(tensors)
    folder.write(name, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
