"""Figures of notebook 01: the embedded world and its ground truth, zero-shot accuracy, the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from ..activations.layers import OUTLIER_FACTOR
from ..data import openmoji
from .drawing import band, image_rows, intervals, outline
from .style import COLORS, CYCLE, HEAT, drawn, figure

_TOKENS = {"patch": COLORS["blue"], "CLS": COLORS["orange"]}


@drawn(credit=True, examples="sequence of (data set, index); data sets other than the embedded world's show their pictures alone")
def embedded_world(examples: Sequence[tuple]) -> Figure:
    """Pictures, and below each what the ground truth says of its patches: whose they are, and which color or outline they show."""
    pictures = [np.asarray(data[index].image) for data, index in examples]
    if not all(hasattr(data, "scene") for data, _ in examples):
        return image_rows({"": pictures}, [data.class_names[data[index].label] if data.class_names else "" for data, index in examples])[0]
    scenes, truths = zip(*((data.scene(index), data.truth(index)) for data, index in examples), strict=True)
    pale = [(255 - (255 - picture.astype(float)) * 0.35).astype(np.uint8) for picture in pictures]
    rows = {"what CLIP sees": pictures, "object of each patch": pale, "color, outline": [_painted(truth) for truth in truths]}
    fig, axes = image_rows(rows, [f"{scene.domain}, {openmoji.BACKGROUND_KINDS[scene.background]}" for scene in scenes])
    names, box = openmoji.class_table()["name"], {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for ax, picture, truth in zip(axes[1], pictures, truths, strict=True):
        for i, (class_id, share) in enumerate(zip(truth.class_ids, truth.object_share, strict=True)):
            if (share >= 0.5).any():
                outline(ax, share >= 0.5, picture.shape[:2], CYCLE[i % len(CYCLE)], tint=0.45)
                y, x = (np.argwhere(share >= 0.5).mean(0) + 0.5) * openmoji.PATCH_SIZE
                ax.text(np.clip(x, 24, picture.shape[1] - 24), y, names[class_id], ha="center", va="center", fontsize=7, bbox=box)
    return fig


def _painted(truth: openmoji.SceneTruth) -> np.ndarray:
    """[14, 14, 3]: each patch in the mean of its palette colors and black outline, over near-white background."""
    palette = np.array([list(bytes.fromhex(openmoji.PALETTE[name][0])) for name in openmoji.COLORS]) / 255
    background = 1 - truth.color_share.sum(0) - truth.outline_share  # the outline is black: it adds nothing
    return np.einsum("chw,cd->hwd", truth.color_share, palette) + 0.95 * background[..., None]


@drawn(
    by_tier='DataFrame of ``accuracy_table(..., ["domain", "tier"])``',
    by_task='DataFrame of ``accuracy_table(..., ["task", "domain"], correct="correct_in_task")``',
)
def zero_shot_accuracy(by_tier: pd.DataFrame, by_task: pd.DataFrame) -> Figure:
    """Zero-shot accuracy with 95% intervals: by domain and caption tier among all classes, by task and domain among the task's own."""
    fig, (left, right) = figure(1.0, 4.2, ncols=2, width_ratios=(1, 1.25))
    intervals(left, by_tier.sort_values("tier", kind="stable"), "domain", "accuracy", "tier", scale=100, upright=True)
    first = by_task[by_task["domain"] == by_task["domain"].iloc[0]].sort_values("accuracy", ascending=False)
    intervals(right, by_task, "task", "accuracy", "domain", order=first["task"], scale=100)
    for ax, table, line in ((left, by_tier, left.axhline), (right, by_task, right.axvline)):
        line(100 * table["chance"].mean(), color=COLORS["gray"], ls="--", lw=1, label="chance")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, handletextpad=0.3, columnspacing=1.2)
    left.set(ylabel="top-1 accuracy (%)", ylim=(-2, 102), title="Among all classes")
    right.set(xlabel="top-1 accuracy (%)", xlim=(-2, 102), title="Among the task's classes")
    return fig


@drawn(table="DataFrame of ``norm_table``", norms="Tensor [L, N, 1+P] of the same survey", layer="int; the layer that is read")
def residual_norms(table: pd.DataFrame, norms: Tensor, layer: int, grid: tuple[int, int]) -> Figure:
    """Norms of the residual stream: by layer, their distribution at the layer that is read, and where on the grid they are large."""
    fig, (left, middle, right) = figure(1.0, 2.9, ncols=3, width_ratios=(1.15, 1.15, 1))
    here = norms[layer].numpy()
    for (token, color), values, bins in zip(_TOKENS.items(), (here[:, 1:], here[:, :1]), (60, 25), strict=True):
        band(left, table[table["token"] == token], "layer", "median", color, label=token)
        sns.histplot(values.ravel(), bins=bins, stat="density", element="step", color=color, alpha=0.5, label=token, ax=middle)
    left.axvline(layer, color=COLORS["gray"], ls=":", lw=1)
    left.set(xlabel="after block", ylabel="norm of a token", title="Norms: median, 5-95%", ylim=(0, None), xticks=table["layer"].unique())
    left.legend()
    limit = OUTLIER_FACTOR * table.set_index(["token", "layer"]).loc[("patch", layer), "median"]
    middle.axvline(limit, color=COLORS["red"], ls="--", lw=1.2)
    middle.set(xlabel=f"norm at layer {layer}", ylabel="density", title="At the layer that we read")
    sns.heatmap(here[:, 1:].mean(0).reshape(grid), square=True, cmap=HEAT, xticklabels=False, yticklabels=False, ax=right)
    right.set_title("Mean norm over the grid")
    return fig


@drawn(credit=False, colors="Tensor [L, B, rows, columns, 3] of ``patch_components``", explained="Tensor [L, 3] of ``patch_components``")
def residual_pca(pictures: Sequence, colors: Tensor, explained: Tensor) -> Figure:
    """The patch tokens' first three principal components as red, green and blue, after every block."""
    titles = ["picture", *(f"block {layer}\n{share:.0%} of variance" for layer, share in enumerate(explained.sum(1).tolist()))]
    return image_rows({" " * i: [picture, *colors[:, i].numpy()] for i, picture in enumerate(pictures)}, titles)[0]


@drawn(table="DataFrame of ``probe_layers``", layer="int; the layer that is read")
def patch_probe(table: pd.DataFrame, n_classes: int, layer: int) -> Figure:
    """What a linear probe reads from a single token, by layer, with the probe on permuted labels beside it."""
    fig, ax = figure(0.7, 3.2)
    for (token, color), label in zip(_TOKENS.items(), ("one patch", "CLS"), strict=True):
        rows = table[table["token"] == token]
        band(ax, rows, "layer", "accuracy", color, scale=100, label=label)
        ax.plot(rows["layer"], 100 * rows["control"], color=color, ls="--", lw=1.2, label="the same, permuted labels")
    ax.axhline(100 / n_classes, color=COLORS["gray"], lw=1)
    ax.annotate("chance", (table["layer"].max(), 100 / n_classes), ha="right", va="bottom", fontsize=8, color=COLORS["gray"])
    ax.axvline(layer, color=COLORS["gray"], ls=":", lw=1)
    ax.set(xlabel="after block", ylabel="accuracy on unseen pictures (%)", ylim=(0, 100), xticks=table["layer"].unique())
    ax.legend(fontsize=8)
    return fig
