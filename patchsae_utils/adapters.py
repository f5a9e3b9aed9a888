"""Adapting a CLIP from a few images a class, and the adapters on disk: ours, and official MaPLe checkpoints.

The adapted models themselves (MaPLe, CoOp, VPT) are in :mod:`patchsae_utils.prompts`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing here unpickles
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm.auto import tqdm

from . import artifacts
from .clip import ClipModel, load_clip
from .config import AdapterConfig
from .data import batches, few_shot, templates_for
from .latents import dataset_fingerprint
from .prompts import AdaptedClip, CoOp, MaPLe, VisualPrompt

__all__ = ["ADAPTERS", "AdaptedClip", "CoOp", "MaPLe", "VisualPrompt", "fit_adapter", "learning_rate", "load_adapter", "save_adapter"]

FORMAT_VERSION = 1
WARMUP_LR = 1e-5

ADAPTERS: dict[str, type[AdaptedClip]] = {cls.kind: cls for cls in (MaPLe, CoOp, VisualPrompt)}


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit_adapter(
    clip: ClipModel,
    kind: str,
    dataset: Any,
    config: AdapterConfig,
    out: str | Path | None = None,
    *,
    seed: int | None = None,
    progress: bool = True,
) -> AdaptedClip:
    """Adapt a CLIP to a data set from a few images a class.

    SGD with momentum 0.9 and weight decay 5e-4 on the cross-entropy; a first epoch at a constant rate of 1e-5, then a cosine by
    epochs (:func:`learning_rate`). Images are the preprocessed ones, flipped at random.

    Parameters
    ----------
    clip : ClipModel
    kind : {"maple", "coop", "vpt"}
    dataset : data set
        Training images of the classes to adapt to, e.g. ``load_dataset("openmoji/tools", "train", half="base")``;
        ``config.n_shots`` of each class are drawn from it.
    config : AdapterConfig
    out : path, optional
        Folder for the adapter. When it already holds one of the same inputs, that one is returned.
    seed : int, optional
        Of shots, initial prompts, order and flips. Default: the first of ``config.seeds``.
    progress : bool
        Show a bar.

    Returns
    -------
    AdaptedClip
        Frozen. ``.log`` holds, for each epoch, learning rate, loss and accuracy on the training images.

    Raises
    ------
    ValueError
        For an unknown kind, an impossible depth, or a data set with fewer images than shots.

    Source: the recipe of MaPLe (Khattak et al., CVPR 2023), without random resized crops: a crop of a few-object scene at 112
    pixels often loses the object.
    """
    adapter_class = _adapter_class(kind)
    seed = config.seeds[0] if seed is None else seed
    recipe = {name: getattr(config, name) for name in ("n_shots", "epochs", "lr", "batch_size", "n_ctx", "depth", "template")}
    data = {
        "spec": dataset.spec,
        "split": dataset.split,
        "class_names": list(dataset.class_names),
        "fingerprint": dataset_fingerprint(dataset),
    }
    fp = artifacts.fingerprint(version=FORMAT_VERSION, kind=kind, clip=clip.fingerprint, data=data, recipe=recipe, seed=seed)
    if out is not None and artifacts.is_current(out, fp):
        return load_adapter(out, clip)

    depth = config.depth if adapter_class.default_depth > 1 else 1
    adapted = adapter_class(clip, config.n_ctx, depth, seed=seed, template=config.template)
    shots = few_shot(dataset, config.n_shots, seed)
    # Half precision: 16 shots of ImageNet's 500 base classes are 2.4 GB.
    images = torch.cat([batch.images.half() for batch in batches(dataset, clip.preprocess, indices=shots)])
    labels = torch.as_tensor(dataset.labels)[shots]
    labels = labels.to(clip.device)
    tokens = adapted.class_tokens(dataset.class_names)
    # A tower without prompts gives the same result in every step: computed once.
    head = None if adapted.text_prompts() else adapted.zero_shot_head(dataset.class_names, templates_for(dataset.spec))
    features = None if adapted.visual_prompts() else _features(adapted, images)

    adapted.prompts.requires_grad_(True)
    optimizer = torch.optim.SGD(adapted.prompts.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4)
    generator = Generator().manual_seed(seed)
    steps = math.ceil(len(images) / config.batch_size)
    log = []
    with tqdm(total=config.epochs * steps, desc=f"{kind}: {dataset.spec}", disable=not progress, unit="step") as bar:
        for epoch in range(config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch, config.epochs, config.lr)
            order = torch.randperm(len(images), generator=generator)
            total = right = 0.0
            for chosen in order.split(config.batch_size):
                flip = (torch.rand(len(chosen), generator=generator) < 0.5).long()
                if features is None:
                    batch = torch.where(flip[:, None, None, None] > 0, images[chosen].flip(-1), images[chosen])
                    shown = adapted.encode_image(batch.float())
                else:
                    shown = features[flip, chosen]
                logits = adapted.logits(shown, adapted.head(tokens) if head is None else head)
                loss = F.cross_entropy(logits, labels[chosen])
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"The loss of {kind!r} on {dataset.spec!r} is {loss.item()} in epoch {epoch + 1}: lower lr (now {config.lr})."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
                right += (logits.argmax(1) == labels[chosen]).sum().item()
                bar.update()
            log.append(
                {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": total / len(images), "accuracy": right / len(images)}
            )
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
    adapted.prompts.requires_grad_(False)
    adapted.log = log
    if out is not None:
        save_adapter(adapted, out, fingerprint=fp, data=data, recipe=recipe, log=log)
    return adapted


@torch.no_grad()
def _features(adapted: AdaptedClip, images: Tensor) -> Tensor:
    """Image features of every image, as it is and flipped: [2, N, d_embed]."""
    return torch.stack([torch.cat([adapted.encode_image(part.float()) for part in side.split(64)]) for side in (images, images.flip(-1))])


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """Rate of an epoch (from 0): 1e-5 in the first, then ``lr`` times a half cosine over ``epochs``, stepped once an epoch.

    Source: MaPLe's configuration (constant warm-up of one epoch before a cosine whose period is the whole run).
    """
    return WARMUP_LR if epoch == 0 else lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


# -- on disk ----------------------------------------------------------------------------------------------------------


def save_adapter(adapted: AdaptedClip, out: str | Path, **manifest: Any) -> None:
    """Write ``adapter.safetensors`` and ``manifest.json`` into a folder, at once.

    Parameters
    ----------
    adapted : AdaptedClip
    out : path
    **manifest
        Further entries of the manifest: fingerprint of the inputs, data set, recipe, log.
    """
    with artifacts.atomic_folder(out) as folder:
        save_file({k: v.detach().cpu().contiguous() for k, v in adapted.prompts.state_dict().items()}, folder / "adapter.safetensors")
        artifacts.write_json(
            folder / "manifest.json",
            {
                "format_version": FORMAT_VERSION,
                "kind": adapted.kind,
                "n_ctx": adapted.n_ctx,
                "depth": adapted.depth,
                "template": adapted.template,
                "seed": adapted.seed,
                "base": {"name": adapted.base.name, "pretrained": adapted.base.pretrained, "fingerprint": adapted.base.fingerprint},
                "sha256": artifacts.file_sha256(folder / "adapter.safetensors"),
                "complete": True,
                **manifest,
            },
        )


def load_adapter(path: str | Path, clip: ClipModel | None = None, *, n_ctx: int | None = None, depth: int | None = None) -> AdaptedClip:
    """Read an adapter: a folder of ours, or an official MaPLe checkpoint (``model.pth.tar-5``).

    Parameters
    ----------
    path : path
    clip : ClipModel, optional
        The model it adapts. Default, for a folder of ours: the one that its manifest names.
    n_ctx, depth : int, optional
        What the file must hold; by default what it does hold.

    Returns
    -------
    AdaptedClip
        Frozen.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter.
    ValueError
        If it was fitted to another model, its depth or context is not the one asked for, or the file is damaged.
    """
    path = Path(path)
    if path.is_file():
        if clip is None:
            raise ValueError(f"{path} does not say which model it adapts: give clip=, e.g. load_clip('ViT-B-16-quickgelu', 'openai').")
        return _load_official(path, clip, n_ctx, depth)
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(
            f"{path} holds no adapter (manifest.json and adapter.safetensors). Fit one: fit_adapter(clip, kind, dataset, config, out)."
        )
    manifest = artifacts.read_json(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('format_version')}; this package reads {FORMAT_VERSION}. Fit the adapter again."
        )
    base = manifest["base"]
    clip = clip or load_clip(base["name"], base["pretrained"])
    if clip.fingerprint != base["fingerprint"]:
        raise ValueError(
            f"The adapter in {path} was fitted to {base['name']!r} ({base['fingerprint']}); this model is "
            f"{clip.name!r} ({clip.fingerprint}). Load that model, or fit the adapter again."
        )
    weights = path / "adapter.safetensors"
    if not weights.exists() or artifacts.file_sha256(weights) != manifest["sha256"]:
        raise ValueError(f"{weights} is missing or damaged (its checksum is not the manifest's). Delete {path} and fit the adapter again.")
    adapted = _filled(clip, manifest["kind"], load_file(weights), path, n_ctx, depth, template=manifest["template"], seed=manifest["seed"])
    adapted.log = manifest.get("log", [])
    return adapted


def _load_official(path: Path, clip: ClipModel, n_ctx: int | None, depth: int | None) -> MaPLe:
    """``MultiModalPromptLearner/model.pth.tar-*`` of the official code: a pickle, of which nothing but tensors is made real."""
    try:
        # Optimiser and schedule lie beside the weights; their classes become inert records.
        inert = [
            (type("Inert", (), {"__init__": lambda self, *args, **kwargs: None}), name)
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ]
        with torch.serialization.safe_globals(inert):
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"{path} can't be read as a MaPLe checkpoint (a torch file with 'state_dict'): {type(error).__name__}: {error}"
        ) from error
    prefix = "prompt_learner."
    tensors = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix) and "token_" not in k}
    if "ctx" not in tensors or "proj.weight" not in tensors:
        raise ValueError(
            f"{path} holds no MaPLe prompts (prompt_learner.ctx, prompt_learner.proj.weight), but {', '.join(list(state)[:5])} ..."
        )
    return _filled(clip, "maple", tensors, path, n_ctx, depth)


def _filled(
    clip: ClipModel, kind: str, tensors: dict[str, Tensor], path: Path, n_ctx: int | None, depth: int | None, **options: Any
) -> AdaptedClip:
    """An adapter with these weights: all of them, and nothing else."""
    if kind == "vpt":
        held_depth, held_ctx = tensors["tokens"].shape[:2]
    else:
        held_ctx = len(tensors["ctx"])
        held_depth = 1 + len({m[1] for m in (re.match(r"compound_prompts_text\.(\d+)$", key) for key in tensors) if m})
    for what, held, asked in (("context vectors", held_ctx, n_ctx), ("prompted blocks (depth)", held_depth, depth)):
        if asked is not None and asked != held:
            raise ValueError(f"{path} holds {held} {what}; {asked} were asked for. Leave the argument out to take what the file holds.")
    adapted = _adapter_class(kind)(clip, held_ctx, held_depth, **options)
    expected = {key: tuple(value.shape) for key, value in adapted.prompts.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if given != expected:
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        raise ValueError(
            f"{path} does not fit {clip.name!r}: "
            + "; ".join(f"{key} is {given.get(key, 'missing')}, expected {expected.get(key, 'nothing of that name')}" for key in wrong[:4])
            + ". Load the model that it was trained on."
        )
    adapted.prompts.load_state_dict(tensors, strict=True)
    return adapted


def _adapter_class(kind: str) -> type[AdaptedClip]:
    if kind not in ADAPTERS:
        raise ValueError(f"Unknown adapter {kind!r}. Valid: {', '.join(ADAPTERS)}.")
    return ADAPTERS[kind]
