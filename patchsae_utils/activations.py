"""Extraction: a CLIP's residual stream over a data set, computed once, written shard by shard, read many times (see :mod:`.store`)."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .artifacts import atomic_file, fingerprint, folder_lock, is_current
from .data import batches
from .mixing import TOKENS, choose_tokens
from .store import DTYPES, FORMAT, FORMAT_VERSION, INDEX, MANIFEST, ActivationStore, StoreMetadata, read_manifest, write_manifest

__all__ = ["ActivationStore", "StoreMetadata", "extract_activations"]


def extract_activations(
    clip,
    dataset,
    layer: int,
    out: str | Path,
    *,
    tokens: str = "all",
    dtype: str = "bfloat16",
    batch_size: int = 64,
    workers: int = 0,
    n_per_shard: int = 512,
    progress: bool = True,
) -> ActivationStore:
    """Write the residual stream after one block, over a whole data set, into a store.

    A finished store of the same inputs is opened at once; of an unfinished one, only what is missing is computed; a store of other inputs
    is replaced. Other files in the folder are left alone.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are not stored.
    dataset : ImageData or OpenMojiData
    layer : int
        Block whose output is read; -2 is the paper's.
    out : path
        The store's folder.
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
    """
    if batch_size < 1 or n_per_shard < 1:
        raise ValueError(f"batch_size and n_per_shard must be at least 1, got {batch_size} and {n_per_shard}.")
    inputs = describe_activations(clip, dataset, layer, tokens, dtype)
    out = Path(out)
    key = fingerprint(n_per_shard=n_per_shard, **inputs)
    if not _is_whole(out, key):
        # Processes that were launched together all come here: one extracts, the others wait and find the store finished.
        with folder_lock(out, wait=int(os.environ.get("WORLD_SIZE", 1)) > 1):
            _extract(clip, dataset, inputs, key, out, batch_size, workers, n_per_shard, progress)
    return ActivationStore.open(out)


def _extract(clip, dataset, inputs, key, out, batch_size, workers, n_per_shard, progress) -> None:
    """Write what is missing of a store."""
    layer, tokens, dtype = inputs["layer"], inputs["tokens"], inputs["dtype"]
    n_images = inputs["shape"][0]
    starts = range(0, n_images, n_per_shard)
    sizes = {f"shard-{i:05d}.safetensors": min(n_per_shard, n_images - start) for i, start in enumerate(starts)}
    manifest = _begin(out, {**inputs, "fingerprint": key}, sizes)

    missing = [i for i, name in enumerate(sizes) if name not in manifest["files"]]
    rows = [row for i in missing for row in range(starts[i], starts[i] + sizes[f"shard-{i:05d}.safetensors"])]
    kept = choose_tokens("all", tokens)
    bar = tqdm(
        total=n_images, initial=n_images - len(rows), desc=f"activations of {dataset.name}", unit="image", disable=not progress or not rows
    )
    waiting: list[Tensor] = []
    with bar, torch.inference_mode():
        shards = iter(missing)
        shard = next(shards, None)
        for batch in batches(dataset, clip.preprocess, batch_size, workers, rows) if rows else ():
            waiting.append(clip.residual(batch.images, layer)[:, kept].to("cpu", DTYPES[dtype]))
            bar.update(len(batch.images))
            # A batch may end one shard and begin the next.
            while shard is not None and sum(map(len, waiting)) >= sizes[name := f"shard-{shard:05d}.safetensors"]:
                ready = torch.cat(waiting)
                if not ready.isfinite().all():
                    raise ValueError(
                        f"Activations of {dataset.spec!r} after layer {layer} of {clip.name!r} don't fit {dtype}. "
                        "Use dtype='bfloat16', or another layer."
                    )
                manifest["files"][name] = _write(out / name, {"tokens": ready[: sizes[name]].contiguous()}) | {"n_images": sizes[name]}
                write_manifest(out / MANIFEST, manifest)
                waiting = [ready[sizes[name] :]]
                shard = next(shards, None)
    if INDEX not in manifest["files"]:
        labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
        manifest["files"][INDEX] = _write(out / INDEX, {"labels": labels, "indices": torch.arange(n_images)}) | {"n_images": n_images}
    if not manifest["complete"]:
        order = [*sizes, INDEX]
        write_manifest(out / MANIFEST, {**manifest, "complete": True, "files": {name: manifest["files"][name] for name in order}})


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
        "dataset": _describe(dataset),
        "shape": [len(dataset), len(range(clip.n_tokens)[choose_tokens("all", tokens)]), clip.width],
    }


def _describe(dataset) -> dict[str, Any]:
    """What distinguishes a data set from others of its kind."""
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
    return {
        "spec": dataset.spec,
        "split": dataset.split,
        "half": getattr(dataset, "half", None),
        "seed": getattr(dataset, "seed", None),
        "n_images": len(dataset),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16],
        "class_names": list(dataset.class_names),
    }


def _is_whole(out: Path, key: str) -> bool:
    """Whether a finished store of these inputs is there, with all its files."""
    return is_current(out, key) and all(_is_there(out / name, entry) for name, entry in read_manifest(out / MANIFEST)["files"].items())


def _is_there(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == entry["bytes"]


def _begin(out: Path, manifest: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The manifest to go on from: the folder's own if it is of the same inputs, with the files that are still whole; else a new one."""
    path = out / MANIFEST
    found = read_manifest(path) if path.exists() else {}
    same = found.get("fingerprint") == manifest["fingerprint"]
    files = {name: entry for name, entry in (found["files"] if same else {}).items() if _is_there(out / name, entry)}
    complete = same and files.keys() == {*sizes, INDEX}
    begun = {**manifest, "complete": complete, "files": files}
    if not complete:
        write_manifest(path, begun)  # before anything is deleted: no manifest ever promises a file of other inputs
        for leftover in (*out.glob("shard-*.safetensors"), *out.glob(".shard-*.tmp"), *out.glob(".index.*.tmp")):
            if leftover.name not in files:
                leftover.unlink()
    return begun


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file under a temporary name, rename it, and return its manifest entry."""
    content = safetensors.torch.save(tensors)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
