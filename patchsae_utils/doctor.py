"""``python -m patchsae_utils doctor``: what a profile finds on this machine, what is missing, and how long its stages take here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import stages
from .activations.extraction import extract_activations
from .clip.model import ClipModel
from .config import Profile
from .data import load_dataset
from .latents.reading import summarize_latents
from .run.results import duration
from .sae.trainer import train_sae, training_log

_N_TRIED = 32  # images of the trial


def examine(profile: Profile) -> dict[str, Any]:
    """Look at the machine, the model, the data and the artifacts, try 32 images, and say what is missing; ``missing`` is empty when all can run."""
    missing: list[str] = []
    found: dict[str, Any] = {"profile": f"{profile.name}, in {profile.root}", **_machine(profile)}
    rows, sets = [], {}
    for name, split in (("train", "train"), ("statistics", "train"), ("evaluation", "test")):
        spec, n_images = getattr(profile.data, name), getattr(profile.data, f"n_{name}_images")
        try:
            data = sets[name] = load_dataset(spec, split, n_images=n_images, seed=profile.data.seed)
            rows.append({"data": name, "spec": spec, "split": split, "images": len(data), "classes": len(data.class_names) or "no labels"})
        except (ValueError, OSError, ImportError) as error:
            missing.append(f"data.{name}: {error}")
    try:
        clip, layer = stages.load_world(profile)
        size = sum(parameter.numel() for parameter in clip.model.parameters())
        words = "" if clip.has_text else ", without a text tower: what needs one is left out of the notebooks"
        places = f"block {layer} of {clip.n_layers}, {clip.grid[0]} x {clip.grid[1]} patches"
        found["model"] = f"{clip.name}, {size / 1e6:.0f} million weights; {places}{words}"
    except (ValueError, OSError, ImportError) as error:
        missing.append(f"model: {error}")
        return found | {"data": rows, "stages": _stages(profile, {}, {}), "missing": missing}
    if profile.sae.path:
        try:
            sae = stages.trained_sae(profile, clip)
            found["SAE"] = f"{profile.sae.path}: {sae.d_in} -> {sae.d_sae}, {sae.activation}; it is studied as it is, nothing is trained"
        except (ValueError, OSError, ImportError) as error:
            missing.append(f"sae.path: {error}")
    seconds, needs = {}, _needs(profile, clip, sets)
    if {"train", "statistics"} <= sets.keys() and not missing:
        missing += _too_large(profile, clip, len(sets["train"]), needs)
        try:
            seconds = _trial(profile, clip)
        except (ValueError, OSError, MemoryError) as error:
            missing.append(f"{_N_TRIED} images were tried, and that failed: {error}")
    amounts = {"activations": "train", "statistics of the latents": "statistics"}
    takes = {stage: seconds[stage] * (len(sets[amounts[stage]]) if stage in amounts else profile.training.n_tokens) for stage in seconds}
    return found | {"data": rows, "stages": _stages(profile, takes, needs), "missing": missing}


def _machine(profile: Profile) -> dict[str, str]:
    found = {"processors": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads compute", "GPU": "none: everything runs, slower"}
    if memory := _memory():
        found["memory"] = f"{memory / 1e9:.0f} GB"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    return found | {"disk": f"{_disk(profile) / 1e9:.0f} GB free for runs"}


def _memory() -> int | None:
    """Bytes of the machine, where the system says it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def _disk(profile: Profile) -> int:
    """Bytes free where the profile's artifacts lie, or will."""
    return shutil.disk_usage(next(folder for folder in (profile.root, *profile.root.parents) if folder.exists())).free


def _needs(profile: Profile, clip: ClipModel, sets: dict[str, Any]) -> dict[str, int]:
    """Bytes that the large stages take: on the disk (activations) and of memory, beyond model and batch (SAE, statistics of the latents)."""
    d_sae = profile.sae.expansion_factor * clip.width
    n_classes = len(sets["statistics"].class_names) if "statistics" in sets else 0
    return {
        "activations": 2 * len(sets.get("train", ())) * clip.n_tokens * clip.width,
        "SAE": 4 * 4 * 2 * d_sae * clip.width,  # float32: weights, gradients, two moments
        "statistics of the latents": 8 * d_sae * max(1, n_classes),
    }


def _too_large(profile: Profile, clip: ClipModel, n_images: int, needs: dict[str, int]) -> list[str]:
    """What the disk or the memory can't hold."""
    said, free = [], _disk(profile)
    if needs["activations"] > free and not (profile.sae.path or stages.is_made(profile.folder("activations") / "train")):
        sizes = f"take {needs['activations'] / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        said.append(f"disk: activations of {n_images:,} images {sizes}: set data.n_train_images lower.")
    memory = torch.cuda.mem_get_info()[0] if clip.device.type == "cuda" else _memory()
    if memory and needs["SAE"] > memory and not profile.sae.path:
        sizes = f"takes {needs['SAE'] / 1e9:.0f} GB, {memory / 1e9:.0f} are there"
        said.append(f"memory: training {profile.sae.expansion_factor * clip.width:,} latents {sizes}: set sae.expansion_factor lower.")
    return said


def _trial(profile: Profile, clip: ClipModel) -> dict[str, float]:
    """Seconds for each image or token of the stages that compute, by a small run in a folder that is gone afterwards."""
    data, layer = profile.data, profile.model.layer
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=3, desc=f"trying {_N_TRIED} images", unit="stage", leave=False) as bar:
        some = load_dataset(data.train, "train", n_images=_N_TRIED, seed=data.seed)
        clip.encode_image(clip.preprocess(some[0].image)[None])  # the first time takes longer
        start = time.perf_counter()
        store = extract_activations(clip, some, layer, Path(folder) / "store", progress=False)
        spent["activations"] = (time.perf_counter() - start) / len(some)
        bar.update()
        if profile.sae.path:
            sae = stages.trained_sae(profile, clip)
        else:
            size = min(profile.training.batch_tokens, len(store))
            few = dataclasses.replace(profile.training, n_tokens=4 * size, batch_tokens=size, log_every=1, start="random")
            sae = train_sae(stages.fresh_sae(profile, clip), store, few, Path(folder) / "sae", progress=False)
            spent["SAE"] = 1 / training_log(Path(folder) / "sae")["tokens_per_second"].iloc[-1]
        bar.update()
        some = load_dataset(data.statistics, "train", n_images=_N_TRIED, seed=data.seed)
        start = time.perf_counter()
        summarize_latents(clip, sae, some, layer, progress=False)
        spent["statistics of the latents"] = (time.perf_counter() - start) / len(some)
        bar.update()
    return spent


def _stages(profile: Profile, takes: dict[str, float], needs: dict[str, int]) -> list[dict[str, str]]:
    rows = []
    for what, (folder, notebook) in stages.artifacts(profile).items():
        state = "made" if stages.is_made(folder) else "begun" if folder.exists() and any(folder.iterdir()) else "not made"
        about = f"about {duration(takes[what])}" if what in takes and state != "made" else ""
        size = f"{needs[what] / 1e9:.1f} GB of {'disk' if what == 'activations' else 'memory'}" if what in needs else ""
        rows.append({"stage": what, "is": state, "takes": about, "needs": size, "by notebook": notebook})
    return rows
