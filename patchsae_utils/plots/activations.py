"""Figures of notebook 01: the embedded world and its ground truth, zero-shot accuracy, the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..activations.layers import OUTLIER_FACTOR
from ..data import openmoji
from . import style
from .drawing import band, intervals, outline
from .style import COLORS, CYCLE, drawn

_TOKENS = {"patch": COLORS["blue"], "CLS": COLORS["orange"]}


@drawn(examples="sequence of (data set, index); data sets without ``.truth`` show their pictures alone")
def embedded_world(examples: Sequence[tuple], save: str | None = None) -> Figure:
    """Pictures, and below each what the ground truth says of its patches: whose they are, and which colour or outline they show."""
    known = [hasattr(data, "truth") for data, _ in examples]
    n_rows = 3 if any(known) else 1
    fig, axes = style.figure(1.0, 9.0 / len(examples) * n_rows + 0.3, nrows=n_rows, ncols=len(examples), squeeze=False)
    for column, (data, index), has_truth in zip(axes.T, examples, known, strict=True):
        example = data[index]
        picture = np.asarray(example.image)
        for ax in column:
            style.image_axes(ax)
        column[0].imshow(picture)
        title = data.class_names[example.label]
        if has_truth:
            scene, truth = data.scene(index), data.truth(index)
            title = f"{scene.domain}, {openmoji.BACKGROUND_KINDS[scene.background]}"
            _draw_objects(column[1], picture, truth)
            column[2].imshow(_painted(truth))
        column[0].set_title(title, fontsize=9, loc="center", fontweight="normal")
    for ax, label in zip(axes[:, 0], ("what CLIP sees", "object of each patch", "colour, outline") if any(known) else ("",), strict=True):
        ax.set_ylabel(label, fontsize=9)
    return style.save(fig, save, credit=any(known))


def _draw_objects(ax: Axes, picture: np.ndarray, truth: openmoji.SceneTruth) -> None:
    """A pale picture; every object's patches tinted and framed, with its name."""
    ax.imshow((255 - (255 - picture.astype(float)) * 0.35).astype(np.uint8))
    names, box = openmoji.class_table()["name"], {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for i, (class_id, share) in enumerate(zip(truth.class_ids, truth.object_share, strict=True)):
        if (share >= 0.5).any():
            outline(ax, share >= 0.5, picture.shape[:2], CYCLE[i % len(CYCLE)], tint=0.45)
            y, x = (np.argwhere(share >= 0.5).mean(0) + 0.5) * openmoji.PATCH_SIZE
            ax.text(np.clip(x, 24, picture.shape[1] - 24), y, names[class_id], ha="center", va="center", fontsize=7, bbox=box)


def _painted(truth: openmoji.SceneTruth) -> np.ndarray:
    """[14, 14, 3]: each patch in the mean of its palette colours and black outline, over near-white background."""
    palette = np.array([list(bytes.fromhex(openmoji.PALETTE[name][0])) for name in openmoji.COLORS]) / 255
    background = 1 - truth.color_share.sum(0) - truth.outline_share  # the outline is black: it adds nothing
    return np.einsum("chw,cd->hwd", truth.color_share, palette) + 0.95 * background[..., None]


@drawn(
    by_tier='DataFrame of ``accuracy_table(..., ["domain", "tier"])``',
    by_task='DataFrame of ``accuracy_table(..., ["task", "domain"], correct="correct_in_task")``',
)
def zero_shot_accuracy(by_tier: pd.DataFrame, by_task: pd.DataFrame, save: str | None = None) -> Figure:
    """Zero-shot accuracy with 95 % intervals: by domain and caption tier among all classes, by task and domain among the task's own."""
    fig, (left, right) = style.figure(1.0, 4.2, ncols=2, width_ratios=(1, 1.25))
    intervals(left, by_tier.sort_values("tier", kind="stable"), "domain", "accuracy", "tier", scale=100, upright=True)
    first = by_task[by_task["domain"] == by_task["domain"].iloc[0]].sort_values("accuracy", ascending=False)
    intervals(right, by_task, "task", "accuracy", "domain", order=first["task"], scale=100)
    for ax, table, line in ((left, by_tier, left.axhline), (right, by_task, right.axvline)):
        line(100 * table["chance"].mean(), color=COLORS["gray"], ls="--", lw=1, label="chance")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, handletextpad=0.3, columnspacing=1.2)
    left.set(ylabel="top-1 accuracy (%)", ylim=(0, 100), title="Among all classes")
    right.set(xlabel="top-1 accuracy (%)", xlim=(0, 100), title="Among the task's classes")
    return style.save(fig, save)


@drawn(
    table="DataFrame of ``norm_table``",
    norms="Tensor [L, N, 1+P] of the same survey",
    layer="int; the layer that is read",
    grid="(int, int); rows and columns of patches",
)
def residual_norms(table: pd.DataFrame, norms: Tensor, layer: int, grid: tuple[int, int], save: str | None = None) -> Figure:
    """Norms of the residual stream: by layer, their distribution at the layer that is read, and where on the grid they are large."""
    fig, (left, middle, right) = style.figure(1.0, 2.9, ncols=3, width_ratios=(1.15, 1.15, 1))
    here = norms[layer].numpy()
    for (token, color), values, n_bins in zip(_TOKENS.items(), (here[:, 1:], here[:, :1]), (60, 25), strict=True):
        band(left, table[table["token"] == token], "layer", "median", color, label=token)
        sns.histplot(values.ravel(), bins=n_bins, stat="density", element="step", color=color, alpha=0.5, label=token, ax=middle)
    left.axvline(layer, color=COLORS["gray"], ls=":", lw=1)
    left.set(xlabel="after block", ylabel="norm of a token", title="Norms: median, 5-95 %", ylim=(0, None), xticks=table["layer"].unique())
    left.legend()
    limit = OUTLIER_FACTOR * table.set_index(["token", "layer"]).loc[("patch", layer), "median"]
    middle.axvline(limit, color=COLORS["red"], ls="--", lw=1.2)
    middle.annotate(
        "outliers from here ", (limit, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="center", fontsize=8
    )
    middle.set(xlabel=f"norm after block {layer}", ylabel="density", title="At the layer that is read")
    middle.legend(loc="upper center")
    sns.heatmap(here[:, 1:].mean(0).reshape(grid), square=True, cmap=style.HEAT, xticklabels=False, yticklabels=False, ax=right)
    right.set_title("Mean norm over the grid")
    return style.save(fig, save)


@drawn(
    pictures="sequence of B images, as CLIP saw them",
    colors="Tensor [L, B, rows, columns, 3] of ``patch_components``",
    explained="Tensor [L, 3] of ``patch_components``",
)
def residual_pca(pictures: Sequence, colors: Tensor, explained: Tensor, credit: bool = False, save: str | None = None) -> Figure:
    """The patch tokens' first three principal components as red, green and blue, after every block."""
    n_layers, n_images = colors.shape[:2]
    fig, axes = style.figure(1.0, 9.0 / (n_layers + 1) * n_images + 0.35, nrows=n_images, ncols=n_layers + 1, squeeze=False)
    for i, row in enumerate(axes):
        for ax, image in zip(row, [pictures[i], *colors[:, i].numpy()], strict=True):
            style.image_axes(ax).imshow(image)
    titles = ["picture", *(f"block {layer}\n{share:.0%} of variance" for layer, share in enumerate(explained.sum(1).tolist()))]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8.5, loc="center", fontweight="normal")
    return style.save(fig, save, credit)


@drawn(table="DataFrame of ``probe_layers``", n_classes="int", layer="int; the layer that is read")
def patch_probe(table: pd.DataFrame, n_classes: int, layer: int, save: str | None = None) -> Figure:
    """What a linear probe reads from a single token, by layer, with the probe on permuted labels beside it."""
    fig, ax = style.figure(0.7, 3.2)
    for (token, color), label in zip(_TOKENS.items(), ("one patch: the object on it", "CLS: the main object"), strict=True):
        rows = table[table["token"] == token]
        band(ax, rows, "layer", "accuracy", color, scale=100, label=label)
        ax.plot(rows["layer"], 100 * rows["control"], color=color, ls="--", lw=1.2, label="the same, permuted labels")
    ax.axhline(100 / n_classes, color=COLORS["gray"], lw=1)
    ax.annotate("chance", (table["layer"].max(), 100 / n_classes), ha="right", va="bottom", fontsize=8, color=COLORS["gray"])
    ax.axvline(layer, color=COLORS["gray"], ls=":", lw=1)
    ax.set(xlabel="after block", ylabel="accuracy on unseen scenes (%)", ylim=(0, 100), xticks=table["layer"].unique())
    ax.set_title("Linear probes on single tokens")
    ax.legend(fontsize=8)
    return style.save(fig, save)
