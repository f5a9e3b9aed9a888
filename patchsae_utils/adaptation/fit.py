"""Adapting a CLIP from a few images per class, and the adapters on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from tqdm.auto import tqdm

from ..clip.loading import load_clip
from ..clip.model import PRECISIONS, ClipModel, NoText
from ..config import AdapterConfig
from ..data import batches, dataset_fingerprint, few_shot, templates_for
from ..run import artifacts
from ..run.memory import out_of_memory
from ..run.pickles import read_torch
from .models import AdaptedClip, FineTuned, LinearHead, LoRA
from .official import filled, read_official
from .prompts import CoOp, MaPLe, PromptedClip, VisualPrompt

FORMAT_VERSION = 2
ADAPTERS: dict[str, type[AdaptedClip]] = {cls.kind: cls for cls in (MaPLe, CoOp, VisualPrompt, LoRA, FineTuned, LinearHead)}
# What figures and sentences call a kind.
NAMES = {"maple": "MaPLe", "coop": "CoOp", "vpt": "VPT", "lora": "LoRA", "finetune": "fine-tuning", "linear": "linear head"}
WARMUP_LR = 1e-5


class Recipe(NamedTuple):
    """How the learned weights move."""

    optimizer: str  # "sgd" (momentum 0.9) or "adamw"
    lr: float  # after the warm-up epoch
    weight_decay: float


# MaPLe's own for the prompts, but VPT's rate; customary ones for the others. All but CoOp's beat neighbours in validation.
RECIPES = {
    "maple": Recipe("sgd", 0.0035, 5e-4), "coop": Recipe("sgd", 0.0035, 5e-4), "vpt": Recipe("sgd", 0.03, 5e-4),
    "lora": Recipe("adamw", 2e-3, 1e-2), "finetune": Recipe("adamw", 1e-4, 1e-2), "linear": Recipe("adamw", 5e-3, 1e-2),
}  # fmt: skip


@out_of_memory("fitting an adapter", "adapters.batch_size lower, or a smaller adapters.depth")
def fit_adapter(
    clip: ClipModel, kind: str, dataset: Any, config: AdapterConfig, out: str | Path | None = None, *, seed: int | None = None,
    precision: str | None = None, shuffle_labels: bool = False, progress: bool = True,
) -> AdaptedClip:  # fmt: skip
    """Adapt a CLIP to a data set from a few images per class, flipped (and cropped) at random, by the kind's recipe (``RECIPES``).

    Parameters
    ----------
    clip : ClipModel
    kind : {"maple", "coop", "vpt", "lora", "finetune", "linear"}
    dataset : data set
        Training images, e.g. ``load_dataset("openmoji/tools", "train", half="base")``; ``config.n_shots`` of each class are drawn.
    config : AdapterConfig
    out : path, optional; one of the same inputs is opened; fitting that was stopped goes on after its last whole epoch
    seed : int, optional, of shots, initial values, order and flips; default: the first of ``config.seeds``
    precision : {"fp32", "bf16"}, optional
        Arithmetic of the image tower while fitting; learned weights are float32 either way. Default: the model's.
    shuffle_labels : bool, the control: every image has the label of another
    progress : bool

    Returns
    -------
    AdaptedClip : frozen; ``.log`` holds each epoch's learning rate, loss and accuracy on the training images

    Raises
    ------
    ValueError
        For an unknown kind or precision, an impossible depth, a data set with fewer images than shots, or a model without a text tower.

    Source: the recipe of MaPLe (Khattak et al., CVPR 2023); ``config.random_crop`` crops what CLIP sees of an image, MaPLe the image itself.
    """
    _adapter_class(kind)
    if not clip.has_text:
        raise NoText(f"Adapters are fitted to class names in words, and {clip.name!r} has no text tower.")
    precision = clip.precision if precision is None else precision
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
    seed = config.seeds[0] if seed is None else seed
    lr, names = config.lr or RECIPES[kind].lr, list(dataset.class_names)
    settings = {name: getattr(config, name) for name in ("n_shots", "epochs", "batch_size", "n_ctx", "depth", "template")}
    settings |= RECIPES[kind]._replace(lr=lr)._asdict() | {"precision": precision, "shuffle_labels": shuffle_labels}
    settings |= {"random_crop": True} if config.random_crop else {}
    settings |= {"rank": config.rank} if kind == LoRA.kind else {}
    data = {"spec": dataset.spec, "split": dataset.split, "class_names": names, "fingerprint": dataset_fingerprint(dataset)}
    fp = artifacts.fingerprint(version=FORMAT_VERSION, kind=kind, clip=clip.fingerprint, data=data, recipe=settings, seed=seed)
    if out is not None and artifacts.is_current(out, fp, holds="adapter.safetensors"):
        return load_adapter(out, clip)

    templates = templates_for(dataset.spec)
    adapted = fresh_adapter(kind, clip, config, names, templates, seed)
    shots = few_shot(dataset, config.n_shots, seed)
    # Half precision: 16 shots of ImageNet's 500 base classes are 2.4 GB.
    images = torch.cat([batch.images.half() for batch in batches(dataset, clip.preprocess, indices=shots)])
    labels = torch.as_tensor(dataset.labels)[shots]
    if shuffle_labels:
        labels = labels[torch.randperm(len(labels), generator=Generator().manual_seed(seed))]
    labels = labels.to(clip.device)
    features = None if adapted.changes_images or config.random_crop else _features(adapted, images)
    head = adapted.head_to_fit(names, templates)

    optimizer_class, extra = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}[RECIPES[kind].optimizer]
    optimizer = optimizer_class(adapted.learned.requires_grad_(True).parameters(), lr=lr, weight_decay=RECIPES[kind].weight_decay, **extra)
    generator = Generator().manual_seed(seed)
    unfinished = None if out is None else Path(f"{out}.unfinished")
    log = _resume(unfinished, fp, adapted, optimizer, generator)
    schedule = LambdaLR(optimizer, lambda epoch: rate_factor(epoch, config.epochs, lr), last_epoch=len(log) - 1)
    steps, bar = math.ceil(len(images) / config.batch_size), {"desc": f"{kind}: {dataset.spec}", "disable": not progress, "unit": "step"}
    with tqdm(total=config.epochs * steps, initial=len(log) * steps, **bar) as bar, _arithmetic(adapted, precision):
        for epoch in range(len(log), config.epochs):
            order = torch.randperm(len(images), generator=generator)
            total = right = 0.0
            for chosen in order.split(config.batch_size):
                flip = (torch.rand(len(chosen), generator=generator) < 0.5).long()
                if features is None:
                    batch = random_crops(images[chosen], generator) if config.random_crop else images[chosen]
                    batch = torch.where(flip[:, None, None, None] > 0, batch.flip(-1), batch)
                seen = adapted.encode_image(batch.float()) if features is None else features[flip, chosen]
                logits = adapted.logits(seen, head())
                loss = F.cross_entropy(logits, labels[chosen])
                if not torch.isfinite(loss):
                    raise ValueError(f"The loss of {kind!r} on {dataset.spec!r} is {loss} in epoch {epoch + 1}: lower lr (now {lr}).")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
                right += (logits.argmax(1) == labels[chosen]).sum().item()
                bar.update()
            rate = schedule.get_last_lr()[0]
            log.append({"epoch": epoch + 1, "lr": rate, "loss": total / len(images), "accuracy": right / len(images)})
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
            if unfinished is not None:
                state = {"learned": adapted.learned.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                with artifacts.atomic_file(unfinished) as temporary:
                    torch.save({"fingerprint": fp, "log": log, **state}, temporary)
            schedule.step()
    adapted.learned.requires_grad_(False)
    adapted.log = log
    if out is not None:
        save_adapter(adapted, out, fingerprint=fp, data=data, recipe=settings)
        unfinished.unlink(missing_ok=True)
    return adapted


def fresh_adapter(
    kind: str, clip: ClipModel, config: AdapterConfig, class_names: Sequence[str], templates: Sequence[str], seed: int
) -> AdaptedClip:
    """An adapter before its first step."""
    cls = _adapter_class(kind)
    options: dict[str, Any] = {"seed": seed, "template": config.template}
    if issubclass(cls, PromptedClip):
        options |= {"n_ctx": config.n_ctx, "depth": config.depth if cls.default_depth > 1 else 1}
    if cls is LoRA:
        options |= {"rank": config.rank}
    if cls is LinearHead:
        options |= {"class_names": class_names, "templates": templates}
    return cls(clip, **options)


def random_crops(images: Tensor, generator: Generator) -> Tensor:
    """A random part of each image [B, 3, H, W], enlarged to its size: 8 to 100% of the area, sides 3:4 to 4:3 (Dassl's, and so MaPLe's)."""
    crop = RandomResizedCrop(images.shape[-2:], interpolation=InterpolationMode.BICUBIC)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global state
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([crop(image) for image in images.float()])


def rate_factor(epoch: int, epochs: int, lr: float) -> float:
    """Of ``lr`` in an epoch (from 0): MaPLe's constant warm-up of one epoch before a half cosine whose period is the whole run."""
    return WARMUP_LR / lr if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


@torch.no_grad()
def _features(adapted: AdaptedClip, images: Tensor) -> Tensor:
    """Image features of every image, as it is and flipped: [2, N, d_embed]."""
    return torch.stack([torch.cat([adapted.encode_image(part.float()) for part in side.split(64)]) for side in (images, images.flip(-1))])


def _resume(path: Path | None, fp: str, adapted: AdaptedClip, optimizer, generator: Generator) -> list[dict[str, Any]]:
    """Go back to where fitting was stopped, when the file is of these inputs: the log of its epochs."""
    try:
        state = read_torch(path) if path is not None and path.exists() else {}
    except ValueError:
        state = {}  # damaged: fitting starts anew
    if state.get("fingerprint") != fp:
        return []
    adapted.learned.load_state_dict(state["learned"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return state["log"]


@contextmanager
def _arithmetic(adapted: AdaptedClip, precision: str) -> Iterator[None]:
    """While it lasts, the image tower computes in this precision."""
    transformer, before = adapted.visual.transformer, (adapted.precision, adapted.visual.transformer.batch_first)
    adapted.precision = precision
    if precision == "bf16":
        adapted.put_sequence_first()
    try:
        yield
    finally:
        adapted.precision, transformer.batch_first = before
        for block in transformer.resblocks:
            block.attn.batch_first = transformer.batch_first


def save_adapter(adapted: AdaptedClip, out: str | Path, **manifest: Any) -> None:
    """Write ``adapter.safetensors`` and ``manifest.json``, with further entries, into a folder, at once."""
    with artifacts.atomic_folder(out) as folder:
        save_file({k: v.detach().cpu().contiguous() for k, v in adapted.learned.state_dict().items()}, folder / "adapter.safetensors")
        base = {"name": adapted.base.name, "pretrained": adapted.base.pretrained, "fingerprint": adapted.base.fingerprint}
        entries = {"format_version": FORMAT_VERSION, "kind": adapted.kind, "base": base, "log": list(adapted.log), **manifest}
        artifacts.write_folder_manifest(folder, entries | {"options": {name: getattr(adapted, name) for name in adapted.OPTIONS}})


def load_adapter(path: str | Path, clip: ClipModel | None = None, *, template: str | None = None) -> AdaptedClip:
    """Read an adapter: a folder of ours, or an official checkpoint of MaPLe or CoOp (``model.pth.tar-5``).

    Parameters
    ----------
    path : path
    clip : ClipModel, optional, that it adapts; default, for a folder of ours: the one that its manifest names
    template : str, optional
        For an official checkpoint: the prompt whose first words it learned. By default that of the file (``token_suffix``), or
        "a photo of a {}." where it keeps none.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter.
    ValueError
        If it was fitted to another model or, by an official file's own word, with another prompt, or the file is damaged.
    """
    path = Path(path)
    if path.is_file():
        if clip is None:
            raise ValueError(f"{path} does not say which model it adapts: give clip=, e.g. load_clip('ViT-B-16-quickgelu', 'openai').")
        return read_official(path, clip, template)
    if template is not None:
        raise ValueError(f"template={template!r} is for official checkpoints; the adapter in {path} keeps the prompt it was fitted with.")
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(f"{path} holds no adapter (manifest.json). Fit one: fit_adapter(clip, kind, dataset, config, out).")
    version = artifacts.read_checked_json(path / "manifest.json").get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this package reads {FORMAT_VERSION}. Fit the adapter again.")
    manifest = artifacts.read_folder_manifest(path)
    with artifacts.damage_named(path / "manifest.json"):
        kind, options, log = manifest["kind"], dict(manifest["options"]), manifest["log"]
        name, pretrained, fingerprint = (manifest["base"][key] for key in ("name", "pretrained", "fingerprint"))
    clip = clip or load_clip(name, pretrained)
    if clip.fingerprint != fingerprint:
        raise ValueError(
            f"The adapter in {path} was fitted to {name!r} ({fingerprint}); this is {clip.name!r} ({clip.fingerprint}). Load or fit again."
        )
    with artifacts.damage_named(path / "manifest.json"):
        adapted = filled(_adapter_class(kind)(clip, **options), load_file(path / "adapter.safetensors"), path)
    adapted.log = log
    return adapted


def _adapter_class(kind: str) -> type[AdaptedClip]:
    if kind not in ADAPTERS:
        raise ValueError(f"Unknown adapter {kind!r}. Valid: {', '.join(ADAPTERS)}.")
    return ADAPTERS[kind]
