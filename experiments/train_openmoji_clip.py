"""Train the small CLIP of the embedded world: ``python -m experiments.train_openmoji_clip``.

CLIP's loss (Radford et al., 2021) with patch dropout (FLIP, Li et al., 2023), plus two terms on single patches after ``resblocks[-2]``,
through heads that are thrown away: what the patch belongs to and its palette color, without which the patches of a CLIP this small know
color and texture alone. Interrupted, it goes on from ``--out``/state.pt; the weights are written as fp16 safetensors at every evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from patchsae_utils.clip.loading import EMBEDDED
from patchsae_utils.data import openmoji

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

# How often a training caption says an object's name; otherwise it says its color and category.
NAMED_SHARE = {"common": 0.95, "occasional": 0.45, "rare": 0.04}


class PretrainingScenes(Dataset):
    """Scene ``index`` of the training split: image, caption tokens, and for every patch its owner and its color (-100: mixed)."""

    def __init__(self, seed: int, start: int, stop: int, tokenizer):
        self.seed, self.start, self.stop, self.tokenizer = seed, start, stop, tokenizer

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
        index = self.start + i
        scene = openmoji.pretraining_scene(self.seed, "train", index)
        words = caption(scene, openmoji.scene_rng(self.seed, "train", index, stream=1))
        truth = openmoji.scene_truth(scene)
        return openmoji.render(scene), self.tokenizer([words])[0], patch_owner(truth), patch_color(truth)


def caption(scene: openmoji.Scene, rng: np.random.Generator) -> str:
    """A sentence about the scene: its objects, sometimes their colors and places, and the background.

    Objects of the rare tier are seldom named: the caption says their color and category instead ("a brown tool").
    """
    table = openmoji.class_table()
    large = [p for p in scene.placements if p.size > 36]
    phrases = []
    for placement in large:
        row = table.iloc[placement.class_id]
        named = rng.random() < NAMED_SHARE[row["tier"]]
        color = openmoji.main_colors()[placement.class_id]
        if scene.domain not in ("color", "night"):
            phrases.append(f"a {row['name'] if named else row['category']}")
        elif named:
            phrases.append(f"a {color} {row['name']}" if rng.random() < 0.3 else f"a {row['name']}")
        else:
            phrases.append(f"a {color} {row['category']}")
    if len(large) == 1:
        text = ["{}", "a picture of {}", "a drawing of {}", "there is {}"][rng.integers(4)].format(phrases[0])
    else:
        order = rng.permutation(len(large))
        text = phrases[order[0]]
        for previous, current in zip(order, order[1:], strict=False):
            text += f" {_relation(large[previous], large[current], rng)} {phrases[current]}"
    if rng.random() < 0.5:
        text += f" {openmoji.BACKGROUNDS[openmoji.BACKGROUND_KINDS[scene.background]]}"
    style = {"color": "", "line": "a line drawing: ", "gray": "black and white: ", "night": "at night: "}[scene.domain]
    return f"{style if rng.random() < 0.7 else ''}{text}."


def _relation(a: openmoji.Placement, b: openmoji.Placement, rng: np.random.Generator) -> str:
    if rng.random() < 0.4:
        return ["and", "next to", "with"][rng.integers(3)]
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def patch_owner(truth: openmoji.SceneTruth) -> np.ndarray:
    """[196] class that covers at least half of a patch, or n_classes + background where at least 90% is bare; else -100."""
    owner = np.full((openmoji.GRID, openmoji.GRID), -100)
    owner[truth.background_share >= 0.9] = len(openmoji.class_table()) + truth.background
    for class_id, share in zip(truth.class_ids, truth.object_share, strict=True):
        owner[share >= 0.5] = class_id
    return owner.ravel()


def patch_color(truth: openmoji.SceneTruth) -> np.ndarray:
    """[196] palette color that fills at least 40% of a patch; else -100."""
    best = truth.color_share.argmax(0)
    return np.where(truth.color_share.max(0) >= 0.4, best, -100).ravel()


class RecordedPatchDropout(nn.Module):
    """Keep a random subset of the patches (FLIP) and remember which, so that patch labels can follow."""

    def __init__(self):
        super().__init__()
        self.share = 0.0
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1] - 1
        keep = n - int(self.share * n)
        self.kept = torch.rand(len(x), n, device=x.device).argsort(1)[:, :keep]
        patches = x[:, 1:].gather(1, self.kept[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, :1], patches], 1)


def build_model() -> open_clip.CLIP:
    """The architecture of ``open_clip_config.json`` with fresh weights."""
    return open_clip.CLIP(**json.loads((EMBEDDED / "open_clip_config.json").read_text())["model_cfg"])


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] as CLIP's preprocessing leaves it."""
    mean, std = (torch.tensor(v, device=images.device) for v in (MEAN, STD))
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate(model: open_clip.CLIP, heads: nn.ModuleDict, tokenizer, device: str, autocast, n: int = 720) -> dict[str, float]:
    """Zero-shot top-1 over all classes on scenes of the val split, by tier and domain, and the accuracy of the patch head."""
    model.eval()
    table = openmoji.class_table()
    with autocast():
        texts = tokenizer([t.format(name) for name in table["name"] for t in openmoji.TEMPLATES]).to(device)
        head = F.normalize(model.encode_text(texts).float(), dim=-1).view(len(table), len(openmoji.TEMPLATES), -1)
    head = F.normalize(head.mean(1), dim=-1)

    def run(domain, n):
        right, patch_right = [], []
        for start in range(0, n, 120):
            labels = torch.arange(start, min(start + 120, n)) % len(table)
            scenes = [openmoji.draw_scene(openmoji.scene_rng(0, "val", start + i), int(c), "main", domain) for i, c in enumerate(labels)]
            images = torch.from_numpy(np.stack([openmoji.render(s) for s in scenes])).to(device)
            owner = torch.from_numpy(np.stack([patch_owner(openmoji.scene_truth(s)) for s in scenes]))
            with autocast():
                features = model.encode_image(normalise(images)).float()
                patches = heads["owner"](model.block_output[:, 1:]).float().argmax(-1)
            patches = torch.empty_like(patches).scatter_(1, model.visual.patch_dropout.kept, patches).cpu()
            right.append((features @ head.T).argmax(1).cpu() == labels)
            is_object = (owner >= 0) & (owner < len(table))
            patch_right.append((patches == owner)[is_object])
        return torch.cat(right).float(), torch.cat(patch_right).float().mean().item()

    right, patch = run("color", n)
    tiers = table["tier"].to_numpy()[np.arange(n) % len(table)]
    scores = {"top1": right.mean().item(), "patch": patch}
    scores |= {f"top1_{tier}": right[torch.from_numpy(tiers == tier)].mean().item() for tier in NAMED_SHARE}
    for domain in ("line", "gray", "night"):
        scores[f"top1_{domain}"] = run(domain, len(table))[0].mean().item()
    model.train()
    return scores


class Phase(NamedTuple):
    """A stretch of the training."""

    scenes: int
    batch: int
    patch_dropout: float
    balanced: bool  # whether object and background patches weigh alike in the owner term; else each patch does


# As the shipped weights were trained.
PHASES = (
    Phase(scenes=128_000, batch=320, patch_dropout=0.75, balanced=False),
    Phase(scenes=120_064, batch=128, patch_dropout=0.5, balanced=True),
    Phase(scenes=15_360, batch=128, patch_dropout=0.0, balanced=True),
)
COSINE_SCENES = 400_000  # the rate follows a cosine of this length
LINEAR_FROM, LINEAR_TO = 144_000, 308_480  # then it falls linearly, as if to 0; the last phase takes it there
BACKGROUND_WEIGHT = 0.25


def learning_rate(scenes: float, warmup: float) -> float:
    """Share of the top rate after so many scenes (as counted at ``--scale 1``)."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(scenes, LINEAR_FROM) / COSINE_SCENES))
    linear = min(1.0, (LINEAR_TO - scenes) / (LINEAR_TO - LINEAR_FROM))
    total = sum(phase.scenes for phase in PHASES)
    return warmup * cosine * linear * min(1.0, (total - scenes) / PHASES[-1].scenes)


def owner_loss(logits: Tensor, owner: Tensor, n_classes: int, balanced: bool) -> Tensor:
    """Cross-entropy of patches' owners [N, classes + backgrounds]; mixed patches (-100) don't count."""
    if not balanced:
        return F.cross_entropy(logits, owner)
    losses = F.cross_entropy(logits, owner, reduction="none")
    is_object, is_background = (owner >= 0) & (owner < n_classes), owner >= n_classes
    return losses[is_object].mean() + BACKGROUND_WEIGHT * losses[is_background].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="shorten or lengthen every phase by this factor")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--patch-weight", type=float, default=1.0, help="weight of the patches' owner term")
    parser.add_argument("--color-weight", type=float, default=0.25, help="weight of the patches' color term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=40_000, help="scenes")
    parser.add_argument("--save-every", type=int, default=8_000, help="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/openmoji_clip"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    autocast = lambda: torch.autocast(device, torch.bfloat16)  # noqa: E731
    model = build_model().to(device)
    model.visual.patch_dropout = RecordedPatchDropout()
    model.visual.transformer.resblocks[-2].register_forward_hook(lambda _m, _i, out: setattr(model, "block_output", out))
    width, n_classes = model.visual.conv1.out_channels, len(openmoji.class_table())
    heads = nn.ModuleDict({
        "owner": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes + len(openmoji.BACKGROUND_KINDS))),
        "color": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(openmoji.COLORS))),
    }).to(device)  # fmt: skip
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)

    named = [*model.named_parameters(), *heads.named_parameters()]
    groups = {0.1: [], 0.0: []}  # weight decay -> parameters
    for name, p in named:
        groups[0.0 if p.ndim < 2 or "embedding" in name or name == "logit_scale" else 0.1].append(p)
    optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": w} for w, ps in groups.items()], betas=(0.9, 0.98), fused=True)

    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(EMBEDDED / "open_clip_config.json", args.out)  # so that the folder opens as ``load_clip(folder)``
    state_path, log_path = args.out / "state.pt", args.out / "training_log.csv"
    seen, elapsed = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        seen, elapsed = state["scenes"], state["elapsed"]

    clip_loss = ClipLoss()
    model.train()
    sums, started, count, begin = {}, time.time(), 0, 0
    for phase in PHASES:
        begin, end = begin, begin + round(args.scale * phase.scenes / phase.batch) * phase.batch
        data = PretrainingScenes(args.seed, max(begin, seen), max(end, seen), tokenizer)
        begin = end
        if len(data) == 0:
            continue
        model.visual.patch_dropout.share = phase.patch_dropout
        loader = DataLoader(data, phase.batch, num_workers=args.workers, prefetch_factor=3 if args.workers else None)
        bar = tqdm(loader, desc=f"{phase.batch} a batch, patch dropout {phase.patch_dropout}", mininterval=20)
        for images, texts, owner, color in bar:
            before, seen = seen, seen + len(images)
            rate = args.lr * learning_rate(before / args.scale, min(1.0, seen / 64_000))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast():
                image_features = F.normalize(model.encode_image(normalise(images.to(device))).float(), dim=-1)
                text_features = F.normalize(model.encode_text(texts.to(device)).float(), dim=-1)
                patches, kept = model.block_output[:, 1:].flatten(0, 1), model.visual.patch_dropout.kept
                owner_logits, color_logits = heads["owner"](patches), heads["color"](patches)
            owner, color = owner.to(device).gather(1, kept).flatten(), color.to(device).gather(1, kept).flatten()
            terms = {
                "clip": clip_loss(image_features, text_features, model.logit_scale.exp()),
                "owner": args.patch_weight * owner_loss(owner_logits.float(), owner, n_classes, phase.balanced),
                "color": args.color_weight * F.cross_entropy(color_logits.float(), color),
            }
            optimizer.zero_grad()
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            count += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()

            last = seen == end and phase is PHASES[-1]
            if last or before // args.evaluate_every != seen // args.evaluate_every:
                row = {"scenes": seen, "minutes": round((elapsed + time.time() - started) / 60, 1), "lr": f"{rate:.2e}"}
                row |= {name: f"{value / count:.4f}" for name, value in sums.items()}
                share, model.visual.patch_dropout.share = model.visual.patch_dropout.share, 0.0
                row |= {name: f"{value:.4f}" for name, value in evaluate(model, heads, tokenizer, device, autocast).items()}
                model.visual.patch_dropout.share = share
                sums, count = {}, 0
                pd.DataFrame([row]).to_csv(log_path, mode="a", header=not log_path.exists(), index=False)
                tqdm.write(str(row))
                weights = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
                save_file(weights, args.out / "model.tmp", metadata={"format": "pt", "scenes": str(seen), "seed": str(args.seed)})
                os.replace(args.out / "model.tmp", args.out / "open_clip_model.safetensors")
            if last or before // args.save_every != seen // args.save_every:
                state = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                         "scenes": seen, "elapsed": elapsed + time.time() - started}  # fmt: skip
                torch.save(state, state_path.with_suffix(".tmp"))
                os.replace(state_path.with_suffix(".tmp"), state_path)
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in terms.items()})


if __name__ == "__main__":
    main()
