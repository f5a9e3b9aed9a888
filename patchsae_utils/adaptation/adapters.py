"""Adapting a CLIP from a few images a class, and the adapters on disk: ours, and official MaPLe checkpoints.

The adapted models themselves are in :mod:`patchsae_utils.adaptation.prompts` (MaPLe, CoOp, VPT) and :mod:`patchsae_utils.adaptation.weight_adapters` (LoRA, full
fine-tuning, a linear head).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing here unpickles
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm.auto import tqdm

from ..clip.model import PRECISIONS, ClipModel, load_clip
from ..config import AdapterConfig
from ..data import batches, few_shot, templates_for
from ..data.dataset import dataset_fingerprint
from ..run import artifacts
from ..run.memory import out_of_memory
from .adapted import AdaptedClip
from .fitting import PROMPT_RECIPE, RECIPES, Recipe, Unfinished, arithmetic, learning_rate, optimizer_of
from .prompts import CoOp, MaPLe, PromptedClip, VisualPrompt
from .weight_adapters import FineTuned, LinearHead, LoRA

__all__ = [
    "ADAPTERS", "NAMES", "RECIPES", "AdaptedClip", "CoOp", "FineTuned", "LinearHead", "LoRA", "MaPLe", "Recipe", "VisualPrompt", "fit_adapter",
    "learning_rate", "load_adapter", "save_adapter",
]  # fmt: skip

FORMAT_VERSION = 1

ADAPTERS: dict[str, type[AdaptedClip]] = {cls.kind: cls for cls in (MaPLe, CoOp, VisualPrompt, LoRA, FineTuned, LinearHead)}
NAMES = {"maple": "MaPLe", "coop": "CoOp", "vpt": "VPT", "lora": "LoRA", "finetune": "fine-tuning", "linear": "linear head"}
"""What figures and sentences call a kind."""


# -- fitting ----------------------------------------------------------------------------------------------------------


@out_of_memory("fitting an adapter", "adapters.batch_size lower, or a smaller adapters.depth")
def fit_adapter(
    clip: ClipModel,
    kind: str,
    dataset: Any,
    config: AdapterConfig,
    out: str | Path | None = None,
    *,
    seed: int | None = None,
    recipe: Recipe | None = None,
    precision: str | None = None,
    shuffle_labels: bool = False,
    progress: bool = True,
) -> AdaptedClip:
    """Adapt a CLIP to a data set from a few images a class.

    The cross-entropy is minimised by the kind's recipe; a first epoch at a constant rate of 1e-5, then a cosine by epochs
    (:func:`learning_rate`). Images are the preprocessed ones, flipped at random. Where the image tower or the text head is frozen, it is
    computed once.

    Parameters
    ----------
    clip : ClipModel
    kind : {"maple", "coop", "vpt", "lora", "finetune", "linear"}
    dataset : data set
        Training images of the classes to adapt to, e.g. ``load_dataset("openmoji/tools", "train", half="base")``;
        ``config.n_shots`` of each class are drawn from it.
    config : AdapterConfig
    out : path, optional
        Folder for the adapter. When it already holds one of the same inputs, that one is returned; when fitting was stopped, it goes on
        after the last whole epoch (``<out>.unfinished`` holds it).
    seed : int, optional
        Of shots, initial values, order and flips. Default: the first of ``config.seeds``.
    recipe : Recipe, optional
        Default: that of the kind in ``RECIPES``.
    precision : {"fp32", "bf16"}, optional
        Arithmetic of the image tower while fitting; learned weights are float32 either way. Default: the model's.
    shuffle_labels : bool
        Give every image the label of another, drawn with ``seed``: the control that can learn no class.
    progress : bool
        Show a bar.

    Returns
    -------
    AdaptedClip
        Frozen. ``.log`` holds, for each epoch, learning rate, loss and accuracy on the training images.

    Raises
    ------
    ValueError
        For an unknown kind, optimiser or precision, an impossible depth, or a data set with fewer images than shots.
    MemoryError
        If a batch doesn't fit the memory; says what to set.

    Source: the recipe of MaPLe (Khattak et al., CVPR 2023), without random resized crops: a crop of a few-object scene at 112
    pixels often loses the object. AdamW: Loshchilov and Hutter, ICLR 2019.
    """
    adapter_class = _adapter_class(kind)
    precision = clip.precision if precision is None else precision
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
    seed = config.seeds[0] if seed is None else seed
    recipe = recipe or RECIPES[kind]
    lr = recipe.rate(config)
    settings = {name: getattr(config, name) for name in ("n_shots", "epochs", "lr", "batch_size", "n_ctx", "depth", "template")}
    settings["lr"] = lr
    # What is as the prompts' recipe has it goes without saying: adapters from before there was a choice stay current.
    settings |= {} if recipe._replace(lr=None) == PROMPT_RECIPE else {"optimizer": recipe.optimizer, "weight_decay": recipe.weight_decay}
    settings |= {} if precision == clip.precision else {"precision": precision}
    settings |= {"shuffle_labels": True} if shuffle_labels else {}
    data = {
        "spec": dataset.spec,
        "split": dataset.split,
        "class_names": list(dataset.class_names),
        "fingerprint": dataset_fingerprint(dataset),
    }
    fp = artifacts.fingerprint(version=FORMAT_VERSION, kind=kind, clip=clip.fingerprint, data=data, recipe=settings, seed=seed)
    if out is not None and artifacts.is_current(out, fp):
        return load_adapter(out, clip)

    templates = templates_for(dataset.spec)
    adapted = adapter_class.for_fitting(clip, config, dataset.class_names, templates, seed)
    shots = few_shot(dataset, config.n_shots, seed)
    # Half precision: 16 shots of ImageNet's 500 base classes are 2.4 GB.
    images = torch.cat([batch.images.half() for batch in batches(dataset, clip.preprocess, indices=shots)])
    labels = torch.as_tensor(dataset.labels)[shots]
    if shuffle_labels:
        labels = labels[torch.randperm(len(labels), generator=Generator().manual_seed(seed))]
    labels = labels.to(clip.device)
    features = None if adapted.changes_images else _features(adapted, images)
    head = adapted.head_to_fit(dataset.class_names, templates)

    adapted.learned.requires_grad_(True)
    optimizer = optimizer_of(recipe, adapted.learned, lr)
    generator = Generator().manual_seed(seed)
    unfinished = Unfinished(out, fp, adapted, optimizer, generator)
    log = unfinished.restore()
    steps = math.ceil(len(images) / config.batch_size)
    shown = tqdm(
        total=config.epochs * steps, initial=len(log) * steps, desc=f"{kind}: {dataset.spec}", disable=not progress, unit="step"
    )  # fmt: skip
    with shown as bar, arithmetic(adapted, precision):
        for epoch in range(len(log), config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch, config.epochs, lr)
            order = torch.randperm(len(images), generator=generator)
            total = right = 0.0
            for chosen in order.split(config.batch_size):
                flip = (torch.rand(len(chosen), generator=generator) < 0.5).long()
                if features is None:
                    batch = torch.where(flip[:, None, None, None] > 0, images[chosen].flip(-1), images[chosen])
                    seen = adapted.encode_image(batch.float())
                else:
                    seen = features[flip, chosen]
                logits = adapted.logits(seen, head())
                loss = F.cross_entropy(logits, labels[chosen])
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"The loss of {kind!r} on {dataset.spec!r} is {loss.item()} in epoch {epoch + 1}: lower lr (now {lr})."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
                right += (logits.argmax(1) == labels[chosen]).sum().item()
                bar.update()
            rate = optimizer.param_groups[0]["lr"]
            log.append({"epoch": epoch + 1, "lr": rate, "loss": total / len(images), "accuracy": right / len(images)})
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
            unfinished.keep(log)
    adapted.learned.requires_grad_(False)
    adapted.log = log
    if out is not None:
        save_adapter(adapted, out, fingerprint=fp, data=data, recipe=settings, log=log)
    unfinished.forget()
    return adapted


@torch.no_grad()
def _features(adapted: AdaptedClip, images: Tensor) -> Tensor:
    """Image features of every image, as it is and flipped: [2, N, d_embed]."""
    return torch.stack([torch.cat([adapted.encode_image(part.float()) for part in side.split(64)]) for side in (images, images.flip(-1))])


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
        save_file({k: v.detach().cpu().contiguous() for k, v in adapted.learned.state_dict().items()}, folder / "adapter.safetensors")
        artifacts.write_checked_json(
            folder / "manifest.json",
            {
                "format_version": FORMAT_VERSION,
                "kind": adapted.kind,
                **adapted.options,
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
    manifest = artifacts.read_checked_json(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('format_version')}; this package reads {FORMAT_VERSION}. Fit the adapter again."
        )
    with artifacts.damage_named(path / "manifest.json"):
        base = manifest["base"]["name"], manifest["base"]["pretrained"]
    clip = clip or load_clip(*base)
    with artifacts.damage_named(path / "manifest.json"):
        return _from_manifest(path, manifest, clip, n_ctx, depth)


def _from_manifest(path: Path, manifest: dict[str, Any], clip: ClipModel, n_ctx: int | None, depth: int | None) -> AdaptedClip:
    """The adapter that a manifest describes, of the weights beside it."""
    base = manifest["base"]
    if clip.fingerprint != base["fingerprint"]:
        raise ValueError(
            f"The adapter in {path} was fitted to {base['name']!r} ({base['fingerprint']}); this model is "
            f"{clip.name!r} ({clip.fingerprint}). Load that model, or fit the adapter again."
        )
    weights = path / "adapter.safetensors"
    if not weights.exists() or artifacts.file_sha256(weights) != manifest["sha256"]:
        raise ValueError(f"{weights} is missing or damaged (its checksum is not the manifest's). Delete {path} and fit the adapter again.")
    options = {name: manifest[name] for name in _adapter_class(manifest["kind"]).OPTIONS}
    adapted = _filled(clip, manifest["kind"], load_file(weights), path, n_ctx, depth, options)
    adapted.log = manifest.get("log", [])
    return adapted


def _load_official(path: Path, clip: ClipModel, n_ctx: int | None, depth: int | None) -> MaPLe:
    """``MultiModalPromptLearner/model.pth.tar-*`` of the official code: a pickle, of which nothing but tensors is made real."""
    try:
        # Optimiser and schedule lie beside the weights; their classes become inert records.
        inert: list = [
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
    return cast(MaPLe, _filled(clip, "maple", tensors, path, n_ctx, depth, {}))


def _filled(
    clip: ClipModel, kind: str, tensors: dict[str, Tensor], path: Path, n_ctx: int | None, depth: int | None, options: dict[str, Any]
) -> AdaptedClip:
    """An adapter with these weights: all of them, and nothing else."""
    if issubclass(_adapter_class(kind), PromptedClip):
        options = options | _prompt_shape(kind, tensors, path, n_ctx, depth)
    elif n_ctx is not None or depth is not None:
        raise ValueError(f"{path} holds a {kind!r} adapter, which has no prompts: leave n_ctx and depth out.")
    adapted = _adapter_class(kind)(clip, **options)
    expected = {key: tuple(value.shape) for key, value in adapted.learned.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if given != expected:
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        raise ValueError(
            f"{path} does not fit {clip.name!r}: "
            + "; ".join(f"{key} is {given.get(key, 'missing')}, expected {expected.get(key, 'nothing of that name')}" for key in wrong[:4])
            + ". Load the model that it was trained on."
        )
    adapted.learned.load_state_dict(tensors, strict=True)
    return adapted


def _prompt_shape(kind: str, tensors: dict[str, Tensor], path: Path, n_ctx: int | None, depth: int | None) -> dict[str, int]:
    """Context and depth that the tensors have; an error when others were asked for."""
    if kind == "vpt":
        held_depth, held_ctx = tensors["tokens"].shape[:2]
    else:
        held_ctx = len(tensors["ctx"])
        held_depth = 1 + len({m[1] for m in (re.match(r"compound_prompts_text\.(\d+)$", key) for key in tensors) if m})
    for what, held, asked in (("context vectors", held_ctx, n_ctx), ("prompted blocks (depth)", held_depth, depth)):
        if asked is not None and asked != held:
            raise ValueError(f"{path} holds {held} {what}; {asked} were asked for. Leave the argument out to take what the file holds.")
    return {"n_ctx": held_ctx, "depth": held_depth}


def _adapter_class(kind: str) -> type[AdaptedClip]:
    if kind not in ADAPTERS:
        raise ValueError(f"Unknown adapter {kind!r}. Valid: {', '.join(ADAPTERS)}.")
    return ADAPTERS[kind]
