"""Figures of notebook 03: what latents answer to, where, and how that compares with the ground truth."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from .style import COLORS, HEAT, STYLE, figure, image_axes
from .style import save as save_figure

_SHARED_COLORS = ("blue", "orange", "green", "purple", "sky", "red", "yellow", "black")


def latent_statistics(frame: pd.DataFrame, annotate: Mapping[int, str] | None = None, save: str | None = None) -> Figure:
    """How often each latent is active against how strongly, coloured by label entropy.

    Parameters
    ----------
    frame : DataFrame
        ``LatentSummary.to_frame()``: living latents.
    annotate : mapping of int to str, optional
        Latents to point at, and what to call them.
    save : str, optional
        Name under ``figures/``.
    """
    with plt.rc_context(STYLE):
        fig, ax = figure(height=4.6)
        x, y = np.log10(frame["frequency"]), np.log10(frame["mean_activation"])
        points = ax.scatter(x, y, c=frame["label_entropy"], s=9, cmap="viridis", alpha=0.8, linewidths=0)
        bar = fig.colorbar(points, ax=ax, pad=0.01)
        bar.set_label("label entropy (nats)")
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1)
        ax.set(
            xlabel="log10 activated frequency (share of images)",
            ylabel="log10 mean activation (over active images)",
            title=f"{len(frame):,} living latents",
        )
        at, halo = frame.set_index("latent"), withStroke(linewidth=2.5, foreground="white")
        for letter, (latent, text) in zip(string.ascii_uppercase, (annotate or {}).items(), strict=False):
            place = np.log10(at.loc[latent, ["frequency", "mean_activation"]].astype(float))
            ax.scatter(*place, s=50, facecolors="none", edgecolors=COLORS["red"], linewidths=1.5, zorder=3)
            ax.annotate(
                letter,
                place,
                (-5, 4),
                textcoords="offset points",
                ha="right",
                color=COLORS["red"],
                weight="bold",
                zorder=4,
                path_effects=[halo],
            )
            row = 0.97 - 0.055 * string.ascii_uppercase.index(letter)
            ax.text(0.015, row, letter, transform=ax.transAxes, va="top", color=COLORS["red"], weight="bold", fontsize=9)
            ax.text(0.038, row, f"{latent}  {text}", transform=ax.transAxes, va="top", fontsize=9)
    return save_figure(fig, save)


def reference_images(references: Sequence, titles: Sequence[str], columns: int = 2, save: str | None = None, credit: bool = True) -> Figure:
    """Latents' strongest images, darkened where the latent is silent.

    Parameters
    ----------
    references : sequence of patchsae_utils.levels.References
    titles : sequence of str
        One a latent.
    columns : int
        Latents side by side.
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    k = max((len(r.images) for r in references), default=1)
    rows = -(-len(references) // columns)
    with plt.rc_context(STYLE):
        fig, _ = figure(height=1.15 * rows + 0.1, nrows=1, ncols=1)
        fig.clear()
        groups = np.atleast_1d(fig.subfigures(rows, columns, wspace=0.02)).reshape(rows, columns)
        for group, reference, title in zip(groups.flat, references, titles, strict=False):
            group.suptitle(title, x=0.01, ha="left", fontsize=9)
            for column, ax in enumerate(group.subplots(1, k)):
                image_axes(ax)
                if column < len(reference.images):
                    dimmed_image(ax, reference.images[column].numpy(), reference.masks[column].numpy(), float(reference.masks.max()))
    return save_figure(fig, save, credit=credit)


def dimmed_image(ax, image: np.ndarray, mask: np.ndarray, top: float) -> None:
    """A picture [H, W, 3], darkened by patch where the mask [rows, columns] is below ``top``."""
    size = (0, image.shape[1], image.shape[0], 0)
    ax.imshow(image, extent=size)
    shade = np.zeros((*mask.shape, 4))
    shade[..., 3] = 0.82 * (1 - np.clip(mask / max(top, 1e-12), 0, 1) ** 0.5)
    ax.imshow(shade, extent=size, interpolation="nearest")


def mask_styles(pictures: Mapping[str, np.ndarray], save: str | None = None, credit: bool = True) -> Figure:
    """Pictures side by side, e.g. one mask as heat map, contour and dimmed picture (see :mod:`patchsae_utils.overlays`).

    Parameters
    ----------
    pictures : mapping of str to uint8 array [H, W, 3]
        Title -> picture.
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    widths = [picture.shape[1] / picture.shape[0] for picture in pictures.values()]
    with plt.rc_context(STYLE):
        fig, axes = figure(height=8.6 / sum(widths) + 0.35, ncols=len(pictures), width_ratios=widths, squeeze=False)
        for ax, (title, picture) in zip(axes.flat, pictures.items(), strict=True):
            image_axes(ax).imshow(picture)
            ax.set_title(title, fontsize=9, fontweight="normal")
    return save_figure(fig, save, credit=credit)


def reference_patches(
    references: Sequence, titles: Sequence[str], columns: int = 2, save: str | None = None, credit: bool = True
) -> Figure:
    """Latents' strongest patches, each within its surroundings.

    Parameters
    ----------
    references : sequence of patchsae_utils.levels.PatchReferences
    titles : sequence of str
        One a latent.
    columns : int
        Latents side by side.
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    k = max((len(r.crops) for r in references), default=1) or 1
    rows = -(-len(references) // columns)
    with plt.rc_context(STYLE):
        fig, _ = figure(height=0.95 * rows + 0.1)
        fig.clear()
        groups = np.atleast_1d(fig.subfigures(rows, columns, wspace=0.02)).reshape(rows, columns)
        for group, reference, title in zip(groups.flat, references, titles, strict=False):
            group.suptitle(title, x=0.01, ha="left", fontsize=9)
            for column, ax in enumerate(np.atleast_1d(group.subplots(1, k))):
                image_axes(ax)
                if column < len(reference.crops):
                    ax.imshow(reference.crops[column].numpy())
                    top, left, height, width = reference.boxes[column].tolist()
                    box = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=COLORS["red"], linewidth=1.2)
                    ax.add_patch(box)
    return save_figure(fig, save, credit=credit)


def levels(found, names: Mapping[int, str] | None = None, save: str | None = None, credit: bool = True) -> Figure:
    """One image from patch to data set: its top latents at each level; a latent that several levels share keeps its colour.

    Parameters
    ----------
    found : patchsae_utils.levels.Levels
    names : mapping of int to str, optional
        What to call the latents.
    save : str, optional
    credit : bool
        Whether the picture is OpenMoji's.
    """
    names, table = {} if names is None else names, found.table
    count = table.groupby("latent")["level"].nunique()
    order = table.drop_duplicates("latent")["latent"]
    shared = [latent for latent in order if count[latent] > 1][: len(_SHARED_COLORS)]
    color = {latent: COLORS[name] for latent, name in zip(shared, _SHARED_COLORS, strict=False)}
    titles = {
        "patch": f"patch ({found.patch[0]}, {found.patch[1]})",
        "image": "image",
        "class": f"class: {found.class_name}",
        "data set": "data set",
    }
    units = {"patch": "activation", "image": "active tokens", "class": "active tokens an image", "data set": "active tokens an image"}
    with plt.rc_context(STYLE):
        fig, axes = figure(height=5.4, nrows=2, ncols=4, height_ratios=[1, 1.4])
        for (level, title), (top, bottom) in zip(titles.items(), axes.T, strict=True):
            rows = table[table["level"] == level]
            image_axes(top).set_title(title)
            image = found.image.numpy()
            if level == "patch" or rows.empty:
                top.imshow(image)
                height, width = image.shape[0] / _grid(found)[0], image.shape[1] / _grid(found)[1]
                corner = (found.patch[1] * width, found.patch[0] * height)
                top.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLORS["red"], linewidth=2))
            else:
                first = int(rows["latent"].iloc[0])
                mask = found.masks[first].numpy()
                dimmed_image(top, image, mask, float(mask.max()))
                top.set_xlabel(f"where {first} is active" if mask.max() > 0 else f"{first} is silent here", fontsize=8)
            bars = bottom.barh(
                range(len(rows)), rows["value"], height=0.36, color=[color.get(latent, "#C4C4C4") for latent in rows["latent"]]
            )
            bottom.set(yticks=[], xlabel=units[level])
            bottom.invert_yaxis()
            bottom.grid(axis="y", visible=False)
            for bar, latent in zip(bars, rows["latent"], strict=True):
                text = f"{latent} {names.get(latent, '')}".strip()
                bottom.text(0.02, bar.get_y() - 0.03, text, transform=bottom.get_yaxis_transform(), fontsize=7.5, va="bottom")
    return save_figure(fig, save, credit=credit)


def _grid(found) -> tuple[int, int]:
    return next(iter(found.masks.values())).shape


def concept_masks(examples: Sequence, columns: int = 2, save: str | None = None, credit: bool = True) -> Figure:
    """Concepts in scenes: the picture, where the concept is, and where its best latent is active.

    Parameters
    ----------
    examples : sequence of patchsae_utils.levels.ConceptExample
    columns : int
        Concepts side by side.
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    rows = -(-len(examples) // columns)
    with plt.rc_context(STYLE):
        fig, _ = figure(height=1.9 * rows)
        fig.clear()
        groups = np.atleast_1d(fig.subfigures(rows, columns, wspace=0.04)).reshape(rows, columns)
        for group, example in zip(groups.flat, examples, strict=False):
            group.suptitle(f"{example.concept}: latent {example.latent}, AP {example.ap:.2f}", x=0.01, ha="left", fontsize=9)
            picture, truth, heat = group.subplots(1, 3)
            for ax, title in zip((picture, truth, heat), ("scene", "ground truth", "latent"), strict=True):
                image_axes(ax).set_title(title, fontsize=8, fontweight="normal", loc="center")
            picture.imshow(example.image.numpy())
            dimmed_image(truth, example.image.numpy(), example.truth.numpy().astype(float), 1.0)
            heat.imshow(example.activation.numpy(), cmap=HEAT, vmin=0, interpolation="nearest")
    return save_figure(fig, save, credit=credit)
