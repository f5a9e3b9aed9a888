"""Figures of notebook 01: the embedded world and its ground truth, zero-shot accuracy, the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ..activations.layers import OUTLIER_FACTOR
from ..data import openmoji
from . import style
from .style import COLORS, CYCLE, STYLE

_MARKERS = "osD^vP"


@rc_context(STYLE)
def embedded_world(examples: Sequence[tuple], save: str | None = None) -> Figure:
    """Pictures, and below each what the ground truth says of its patches: whose they are, and which colour or outline they show.

    Parameters
    ----------
    examples : sequence of (data set, index)
        Data sets without ``.truth`` show their pictures alone.
    save : str, optional
        Name under ``figures/``.
    """
    known = [hasattr(data, "truth") for data, _ in examples]
    n_rows = 3 if any(known) else 1
    fig, axes = style.figure(1.0, 9.0 / len(examples) * n_rows + 0.3, nrows=n_rows, ncols=len(examples), squeeze=False)
    for column, (data, index) in zip(axes.T, examples, strict=True):
        example = data[index]
        picture = np.asarray(example.image)
        for ax in column:
            style.image_axes(ax)
        column[0].imshow(picture)
        if not hasattr(data, "truth"):
            column[0].set_title(data.class_names[example.label], fontsize=8, loc="center")
            continue
        scene, truth = data.scene(index), data.truth(index)
        column[0].set_title(f"{scene.domain}, {openmoji.BACKGROUND_KINDS[scene.background]}", fontsize=9, loc="center", fontweight="normal")
        _draw_objects(column[1], picture, truth)
        column[2].imshow(_paint(truth), extent=(0, openmoji.IMAGE_SIZE, openmoji.IMAGE_SIZE, 0))
    if any(known):
        for ax, label in zip(axes[:, 0], ("what CLIP sees", "object of each patch", "colour, outline"), strict=True):
            ax.set_ylabel(label, fontsize=9)
    return style.save(fig, save, credit=any(known))


@rc_context(STYLE)
def zero_shot_accuracy(by_tier: pd.DataFrame, by_task: pd.DataFrame, save: str | None = None) -> Figure:
    """Zero-shot accuracy with 95 % intervals: by domain and caption tier among all classes, by task and domain among the task's own.

    Parameters
    ----------
    by_tier : DataFrame
        Of ``accuracy_table(..., ["domain", "tier"])``.
    by_task : DataFrame
        Of ``accuracy_table(..., ["task", "domain"], correct="correct_in_task")``.
    save : str, optional
    """
    fig, (left, right) = style.figure(1.0, 3.8, ncols=2, width_ratios=(1, 1.25))
    _points(left, by_tier.sort_values("tier", kind="stable"), "domain", "tier", horizontal=False)
    left.set(ylabel="top-1 accuracy (%)", ylim=(0, 100), title="Among all classes")
    first = by_task.loc[by_task["domain"] == by_task["domain"].iloc[0]].sort_values("accuracy")
    _points(right, by_task.set_index("task").loc[first["task"]].reset_index(), "task", "domain", horizontal=True)
    right.set(xlabel="top-1 accuracy (%)", xlim=(0, 100), title="Among the task's classes")
    right.set_yticks(range(len(first)), [task.replace("_", " ") for task in first["task"]])
    right.grid(axis="y", visible=False)
    for i in range(0, len(first), 2):
        right.axhspan(i - 0.5, i + 0.5, color="#F5F5F5", zorder=0)
    right.set_ylim(-0.5, len(first) - 0.5)
    return style.save(fig, save)


@rc_context(STYLE)
def residual_norms(table: pd.DataFrame, norms: Tensor, layer: int, grid: tuple[int, int], save: str | None = None) -> Figure:
    """Norms of the residual stream: by layer, their distribution at the layer that is read, and where on the grid they are large.

    Parameters
    ----------
    table : DataFrame
        Of ``norm_table``.
    norms : Tensor [L, N, 1+P]
        Of the same survey.
    layer : int
        The layer that is read.
    grid : (int, int)
        Rows and columns of patches.
    save : str, optional
    """
    fig, (left, middle, right) = style.figure(1.0, 2.9, ncols=3, width_ratios=(1.15, 1.15, 1))
    for token, color in (("CLS", COLORS["orange"]), ("patch", COLORS["blue"])):
        rows = table[table["token"] == token]
        left.plot(rows["layer"], rows["median"], color=color, marker="o", label=token)
        left.fill_between(rows["layer"], rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
    left.axvline(layer, color=COLORS["gray"], linestyle=":", linewidth=1)
    left.set(xlabel="after block", ylabel="norm of a token", title="Norms: median, 5-95 %", ylim=(0, None), xticks=table["layer"].unique())
    left.legend()

    here = norms[layer].numpy()
    for values, token, color, n_bins in ((here[:, 1:], "patch", COLORS["blue"], 60), (here[:, :1], "CLS", COLORS["orange"], 25)):
        middle.hist(values.ravel(), n_bins, density=True, histtype="stepfilled", color=color, alpha=0.65, label=token)
    limit = OUTLIER_FACTOR * table.set_index(["token", "layer"]).loc[("patch", layer), "median"]
    middle.axvline(limit, color=COLORS["red"], linestyle="--", linewidth=1.2)
    middle.annotate(
        "outliers from here ", (limit, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="center", fontsize=8
    )
    middle.set(xlabel=f"norm after block {layer}", ylabel="density", title="At the layer that is read")
    middle.legend(loc="upper center", fontsize=8)

    image = right.imshow(here[:, 1:].mean(0).reshape(grid))
    style.image_axes(right).set_title("Mean norm over the grid")
    fig.colorbar(image, ax=right, shrink=0.85)
    return style.save(fig, save)


@rc_context(STYLE)
def residual_pca(pictures: Sequence, colors: Tensor, explained: Tensor, credit: bool = False, save: str | None = None) -> Figure:
    """The patch tokens' first three principal components as red, green and blue, after every block.

    Parameters
    ----------
    pictures : sequence of images
        B, as CLIP saw them (``levels.seen_image``).
    colors : Tensor [L, B, rows, columns, 3]
    explained : Tensor [L, 3]
        Both of ``patch_components``.
    credit : bool
        Whether the pictures show OpenMoji artwork.
    save : str, optional
    """
    n_layers, n_images = colors.shape[:2]
    fig, axes = style.figure(1.0, 9.0 / (n_layers + 1) * n_images + 0.35, nrows=n_images, ncols=n_layers + 1, squeeze=False)
    for i, row in enumerate(axes):
        style.image_axes(row[0]).imshow(pictures[i])
        for layer, ax in enumerate(row[1:]):
            style.image_axes(ax).imshow(colors[layer, i].numpy())
    axes[0, 0].set_title("picture", fontsize=9, loc="center", fontweight="normal")
    for layer, ax in enumerate(axes[0, 1:]):
        ax.set_title(
            f"block {layer}\n{100 * float(explained[layer].sum()):.0f} % of variance", fontsize=8.5, loc="center", fontweight="normal"
        )
    return style.save(fig, save, credit)


@rc_context(STYLE)
def patch_probe(table: pd.DataFrame, n_classes: int, layer: int, save: str | None = None) -> Figure:
    """What a linear probe reads from a single token, by layer, with the probe on permuted labels beside it.

    Parameters
    ----------
    table : DataFrame
        Of ``probe_layers``.
    n_classes : int
    layer : int
        The layer that is read.
    save : str, optional
    """
    fig, ax = style.figure(0.6, 3.2)
    for token, label, color in (
        ("patch", "one patch: the object on it", COLORS["blue"]),
        ("CLS", "CLS: the main object", COLORS["orange"]),
    ):
        rows = table[table["token"] == token]
        ax.plot(rows["layer"], 100 * rows["accuracy"], color=color, marker="o", label=label)
        ax.fill_between(rows["layer"], 100 * rows["low"], 100 * rows["high"], color=color, alpha=0.18, linewidth=0)
        ax.plot(rows["layer"], 100 * rows["control"], color=color, linestyle="--", linewidth=1.2, label="permuted labels")
    ax.axhline(100 / n_classes, color=COLORS["gray"], linewidth=1)
    ax.annotate("chance", (table["layer"].max(), 100 / n_classes), ha="right", va="bottom", fontsize=8, color=COLORS["gray"])
    ax.axvline(layer, color=COLORS["gray"], linestyle=":", linewidth=1)
    ax.set(
        xlabel="after block",
        ylabel="accuracy on unseen scenes (%)",
        ylim=(0, 100),
        xticks=table["layer"].unique(),
        title="Linear probes on single tokens",
    )
    ax.legend(fontsize=8)
    return style.save(fig, save)


def _points(ax, table: pd.DataFrame, place: str, series: str, horizontal: bool) -> None:
    """Accuracies as points with intervals: one position for each value of ``place``, side by side for each of ``series``."""
    places, kinds = list(dict.fromkeys(table[place])), list(dict.fromkeys(table[series]))
    for i, kind in enumerate(kinds):
        rows = table[table[series] == kind].set_index(place).reindex(places)
        at = np.arange(len(places)) + (i - (len(kinds) - 1) / 2) * (0.14 if horizontal else 0.2)
        value = 100 * rows["accuracy"]
        error = np.stack([value - 100 * rows["low"], 100 * rows["high"] - value])
        look = {"fmt": _MARKERS[i % len(_MARKERS)], "color": CYCLE[i % len(CYCLE)], "markersize": 4, "elinewidth": 1.1, "label": kind}
        if horizontal:
            ax.errorbar(value, at, xerr=error, **look)
        else:
            ax.errorbar(at, value, yerr=error, **look)
    chance = 100 * table["chance"].mean()
    (ax.axvline if horizontal else ax.axhline)(chance, color=COLORS["gray"], linestyle="--", linewidth=1, label="chance")
    if not horizontal:
        ax.set_xticks(range(len(places)), places)
        ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(kinds) + 1, handletextpad=0.3, columnspacing=1.2)


def _draw_objects(ax, picture: np.ndarray, truth: openmoji.SceneTruth) -> None:
    """A pale picture; every object's patches tinted and framed, with its name."""
    size, patch = openmoji.IMAGE_SIZE, openmoji.PATCH_SIZE
    pale = 255 - (255 - picture.astype(float)) * 0.35
    ax.imshow(pale.astype(np.uint8), extent=(0, size, size, 0))
    names = openmoji.class_table()["name"]
    for i, (class_id, share) in enumerate(zip(truth.class_ids, truth.object_share, strict=True)):
        mask = share >= 0.5
        if not mask.any():
            continue
        color = CYCLE[i % len(CYCLE)]
        tint = np.zeros((*mask.shape, 4))
        tint[mask] = (*to_rgb(color), 0.45)
        ax.imshow(tint, extent=(0, size, size, 0))
        ax.add_collection(LineCollection(patch * _frame(mask), colors=color, linewidths=1.2))
        rows, columns = np.nonzero(mask)
        x, y = patch * (columns.mean() + 0.5), patch * (rows.mean() + 0.5)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        ax.text(np.clip(x, 20, size - 20), y, names[class_id], ha="center", va="center", fontsize=7, color="black", bbox=box)


def _frame(mask: np.ndarray) -> np.ndarray:
    """Edges between patches inside and outside a mask: [n, 2, 2] as (x, y) ends, in patches."""
    padded = np.pad(mask, 1).astype(int)
    y, x = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
    flat = np.stack([np.stack([x, y], 1), np.stack([x + 1, y], 1)], 1)
    y, x = np.nonzero(np.diff(padded, axis=1)[1:-1])
    upright = np.stack([np.stack([x, y], 1), np.stack([x, y + 1], 1)], 1)
    return np.concatenate([flat, upright])


def _paint(truth: openmoji.SceneTruth) -> np.ndarray:
    """[14, 14, 3]: each patch in the mean of its palette colours and black outline, over near-white background."""
    palette = np.array([list(bytes.fromhex(openmoji.PALETTE[name][0])) for name in openmoji.COLORS]) / 255
    known = truth.color_share.sum(0) + truth.outline_share
    mixed = np.einsum("chw,cd->hwd", truth.color_share, palette)  # the outline is black: it adds nothing
    return mixed + (1 - known)[..., None] * 0.95
