"""Extraction: a CLIP's residual stream over a data set, computed once, written shard by shard, read many times (see :mod:`.store`)."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import batches
from ..data.dataset import describe_dataset
from ..run.artifacts import MANIFEST, fingerprint
from ..run.memory import HalvedBatches
from ..run.processes import Processes
from .folders import Folder
from .mixing import TOKENS
from .store import DTYPES, FORMAT, FORMAT_VERSION, INDEX, ActivationStore, OtherVersion, read_manifest, write_manifest

_PART = re.compile(r"manifest-\d+\.json")  # what one of several processes wrote
_LEFTOVER = re.compile(r"manifest-\d+\.json|shard-.*\.safetensors|\.(shard-|index\.|manifest).*\.tmp")


def extract_activations(
    clip, dataset, layer: int, out: str | Path, *, tokens: str = "all", dtype: str = "bfloat16", batch_size: int = 64, n_per_shard: int = 512,
    progress: bool = True,
) -> ActivationStore:  # fmt: skip
    """Write the residual stream after one block, over a whole data set, into a store; a finished one of the same inputs is opened at once.

    Of an unfinished one, only what is missing is computed; a store of other inputs is replaced; other files in the folder are left alone. Under
    several processes (``accelerate launch``) all must call this; each writes its share of the shards. The store is, byte for byte, the same
    however many there are and wherever a run was interrupted. A batch that doesn't fit the memory is halved, with a warning.

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
    batch_size, n_per_shard, progress : int, int, bool
        Images per forward pass, at most (the largest number up to it that divides a shard: no bit depends on interruptions), and per shard.

    Raises
    ------
    ValueError
        For an unknown layer, tokens or dtype (naming the valid ones), an empty data set, a folder that is another program's or in use, or
        activations that the dtype can't hold.
    MemoryError
        If not even one image fits the memory.
    """
    if batch_size < 1 or n_per_shard < 1:
        raise ValueError(f"batch_size and n_per_shard must be at least 1, got {batch_size} and {n_per_shard}.")
    batch_size = max(n for n in range(1, min(batch_size, n_per_shard) + 1) if n_per_shard % n == 0)
    inputs = describe_activations(clip, dataset, layer, tokens, dtype)
    manifest = {**inputs, "fingerprint": fingerprint(n_per_shard=n_per_shard, **inputs)}
    shards = plan_shards(len(dataset), n_per_shard)
    folder, processes = Folder(out), Processes()
    if not processes.on_main(lambda: _is_whole(folder, manifest)):
        with ExitStack() as stack:
            processes.on_main(lambda: stack.enter_context(folder.lock()))
            _extract(clip, dataset, manifest, shards, folder, processes, batch_size, progress)
    return ActivationStore.open(out)


def plan_shards(n_images: int, n_per_shard: int) -> dict[str, range]:
    """The images of each shard, by the shard's name."""
    starts = range(0, n_images, n_per_shard)
    return {f"shard-{i:05d}.safetensors": range(start, min(start + n_per_shard, n_images)) for i, start in enumerate(starts)}


def _extract(clip, dataset, manifest, shards: dict[str, range], folder: Folder, processes: Processes, batch_size: int, progress) -> None:
    """Write what is missing of a store, each process every so-many-th of the missing shards."""
    known = processes.on_main(lambda: _begin(folder, manifest, shards))
    names = [name for name in shards if name not in known][processes.index :: processes.number]
    own = dict(known) if processes.main else {}
    where = MANIFEST if processes.main else f"manifest-{processes.index}.json"  # each tells what it wrote; the next start reads all

    def residual(images: Tensor, rows: slice) -> Tensor:
        return clip.residual(images[rows], manifest["layer"])[:, TOKENS[manifest["tokens"]]]

    def keep(name: str, shard: Tensor) -> None:
        check_fits(shard, shards[name], manifest, dataset.spec, clip.name)
        own[name] = _write(folder, name, {"tokens": shard.cpu()})
        write_manifest(folder, {**manifest, "complete": False, "files": own}, where)

    def write_share() -> dict[str, Any]:
        wanted = [row for name in names for row in shards[name]]
        done = len(dataset) - len(wanted) if processes.number == 1 else 0
        hide = not progress or not wanted or not processes.main
        bar = tqdm(total=done + len(wanted), initial=done, desc=f"activations of {dataset.name}", unit="image", disable=hide)
        loaded, fitting = batches(dataset, clip.preprocess, batch_size, indices=wanted), HalvedBatches(clip.device)
        with bar, torch.inference_mode(), ThreadPoolExecutor(1) as writer:
            written = writer.submit(lambda: None)
            for name in names:
                shard = torch.empty(len(shards[name]), *manifest["shape"][1:], dtype=DTYPES[manifest["dtype"]], device=clip.device)
                for part in shard.split(batch_size):
                    for rows, tokens in fitting.run(len(part), partial(residual, next(loaded).images)):
                        part[rows] = tokens
                        bar.update(len(tokens))
                written.result()
                written = writer.submit(keep, name, shard)  # while the next one is computed
            written.result()
        return own

    files = {name: entry for part in processes.everywhere(write_share) for name, entry in part.items()}

    def finish() -> None:
        if INDEX not in files:
            labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
            files[INDEX] = _write(folder, INDEX, {"labels": labels, "indices": torch.arange(len(dataset))})
        write_manifest(folder, {**manifest, "complete": True, "files": {name: files[name] for name in [*shards, INDEX]}})
        for name in filter(_PART.fullmatch, folder.names()):
            folder.remove(name)

    processes.on_main(finish)


def describe_activations(clip, dataset, layer: int, tokens: str, dtype: str) -> dict[str, Any]:
    """Everything that the activations of a data set depend on, and their shape, as a store's manifest says it."""
    for name, value, valid in (("tokens", tokens, TOKENS), ("dtype", dtype, tuple(DTYPES))):
        if value not in valid:
            raise ValueError(f"Unknown {name} {value!r}. Valid: {', '.join(valid)}.")
    clip.check_class_token(tokens)
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to extract.")
    data, model = describe_dataset(dataset), {"name": clip.name, "pretrained": clip.pretrained, "weights": clip.weights_hash}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model | {"fingerprint": clip.fingerprint, "grid": list(clip.grid)},
        "layer": clip.layer_index(layer),
        "tokens": tokens,
        "dtype": dtype,
        "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", repr(clip.preprocess)),
        "dataset": {name: value for name, value in data.items() if name not in ("labels", "contents")}
        | {"fingerprint": fingerprint(**data)},
        "shape": [len(dataset), len(range(clip.n_tokens)[TOKENS[tokens]]), clip.width],
    }


def check_fits(tokens: Tensor, places: Any, inputs: dict[str, Any], dataset: str, model: str) -> None:
    """Refuse activations [n, T, d] in a dtype that can't hold them, or that are NaN or infinite already; ``places`` are the images'."""
    bad = (~tokens.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        remedy = "Use dtype='bfloat16', or another layer." if inputs["dtype"] == "float16" else "The model itself gives NaN or infinity."
        raise ValueError(
            f"Activations of {dataset!r} after layer {inputs['layer']} of {model!r} don't fit {inputs['dtype']}. {remedy} Look at the model's weights "
            f"and at these images: {len(bad)} of {len(tokens)}, at places {', '.join(str(int(places[i])) for i in bad[:5])}"
            f"{' and more' if len(bad) > 5 else ''} in the data set."
        )


def _told(folder: Folder, name: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that lies there, if it is of the same inputs; another program's is refused."""
    with suppress(OtherVersion):
        if folder.size(name) is not None and (found := read_manifest(folder, name))["fingerprint"] == manifest["fingerprint"]:
            return found
    return None


def _is_whole(folder: Folder, manifest: dict[str, Any]) -> bool:
    """Whether a finished store of these inputs is there, with all its files."""
    found = _told(folder, MANIFEST, manifest)
    return bool(found and found["complete"]) and all(folder.size(name) == entry["bytes"] for name, entry in found["files"].items())


def _begin(folder: Folder, manifest: dict[str, Any], shards: dict[str, range]) -> dict[str, Any]:
    """The files of these inputs that are whole already; a manifest names them, and all else is removed."""
    names = folder.names()
    told = [_told(folder, name, manifest) for name in names if name == MANIFEST or _PART.fullmatch(name)]
    entries = {name: entry for each in told if each is not None for name, entry in each["files"].items()}
    files = {name: entry for name, entry in entries.items() if folder.size(name) == entry["bytes"]}
    if files.keys() != {*shards, INDEX}:
        write_manifest(folder, {**manifest, "complete": False, "files": files})  # first: no manifest ever promises a file of other inputs
        for name in filter(_LEFTOVER.fullmatch, names):
            if name not in files:
                folder.remove(name)
    return files


def _write(folder: Folder, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its manifest entry."""
    folder.write(name, content := safetensors.torch.save(tensors))
    n_images = len(next(iter(tensors.values())))
    return {"n_images": n_images, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
