"""Figures of notebook 03 with pictures: reference images, concepts in scenes, levels, other domains, written words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from .drawing import DARKNESS, clip, legend, strips
from .heat import blend
from .style import COLORS, drawn, figure, image_axes

_SHARED = ("blue", "orange", "green", "purple", "sky", "red", "yellow", "black")
_LEVELS = {"patch": "activation", "image": "active tokens", "class": "active tokens per image", "data set": "active tokens per image"}


@drawn(credit=True, references="sequence of References", titles="sequence of str; one a latent")
def reference_images(references: Sequence, titles: Sequence[str]) -> Figure:
    """Latents' strongest images, darkened where the latent is silent."""
    cells = [(title, _shots(each)) for title, each in zip(titles, references, strict=True)]
    return strips(cells, max(len(each.images) for each in references), 2, 1.15)


def _shots(references: Any) -> list[tuple]:
    return [(image, mask, references.masks.max(), "") for image, mask in zip(references.images, references.masks, strict=True)]


@drawn(credit=True, examples="sequence of ConceptExample")
def concept_masks(examples: Sequence) -> Figure:
    """Concepts in scenes: the picture with the concept's patches outlined, and the activation of its best latent."""
    cells = []
    for each in examples:
        outlined = blend(np.asarray(each.image), np.asarray(each.truth, float), 1.0, 0.5, 0.0, contour=True)
        quiet = "" if float(each.activation.max()) else " (silent)"
        shots = [(outlined, None, 1, "where it is"), (each.activation, None, 1, f"latent {each.latent}{quiet}")]
        cells.append((f"{each.concept}: AP {each.ap:.2f}", shots))
    return strips(cells, 2, 4, 1.75)


@drawn(credit=True, found="Levels", names="mapping of int to str; what to call the latents")
def levels(found: Any, names: Mapping[int, str]) -> Figure:
    """One image from patch to data set: its top latents at each level; a latent that several levels share keeps its color."""
    count = found.table.groupby("latent", sort=False)["level"].nunique()
    colors = {latent: COLORS[name] for latent, name in zip(count.index[count > 1], _SHARED, strict=False)}
    titles = {"patch": f"patch {tuple(found.patch)}", "class": f"class: {found.class_name}"}
    units = {level: unit for level, unit in _LEVELS.items() if level != "class" or found.class_name}
    fig, axes = figure(height=5.4, nrows=2, ncols=len(units), height_ratios=[1, 1.4])
    image = found.image.numpy()
    for (level, unit), (top, bottom) in zip(units.items(), axes.T, strict=True):
        rows = found.table[found.table["level"] == level]
        image_axes(top).set_title(titles.get(level, level))
        first = int(rows["latent"].iloc[0]) if len(rows) else -1
        mask = next(iter(found.masks.values())) if first < 0 else found.masks[first]
        if level == "patch" or first < 0:
            top.imshow(image)
            high, wide = (side / n for side, n in zip(image.shape, mask.shape, strict=False))
            corner = (found.patch[1] * wide, found.patch[0] * high)
            top.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=COLORS["red"], lw=2))
        else:
            active = float(mask.max())
            top.imshow(blend(image, mask.numpy(), active, 0.0, DARKNESS) if active else image)
            top.set_xlabel(f"where {first} is active" if active else f"{first} is silent in this image", fontsize=9)
        bottom.barh(range(len(rows)), rows["value"], height=0.36, color=[colors.get(latent, "#C4C4C4") for latent in rows["latent"]])
        for y, latent in enumerate(rows["latent"]):
            words = f"{latent} {names.get(latent, '')}".strip()
            bottom.text(0.02, y - 0.2, clip(words, 24), transform=bottom.get_yaxis_transform(), fontsize=9, va="bottom")
        bottom.set(yticks=[], xlabel=unit, ylim=(len(rows) - 0.5, -0.8))
        bottom.grid(False, axis="y")
    return fig


@drawn(credit=True, found="CrossDomain")
def cross_domain(found: Any) -> Figure:
    """Latents by row, data sets by column: reference images, dark where the latent is silent; empty places where it never is active.

    Brightness is relative to the latent's strongest patch in that data set; the titles say in what share of its images it is active.
    """
    table, domains, cells = found.table.set_index(["latent", "domain"]), list(found.table["domain"].unique()), []
    for latent, by_domain in found.references.items():
        for domain in domains:
            numbers, shots = table.loc[(latent, domain)], _shots(by_domain[domain])[:3]
            same = f"same class {numbers['same_class']:.0%}" if "same_class" in numbers and shots else " "
            words = f"{domain}, {numbers['frequency']:.1%} of images\n" + (f"latent {latent}" if domain == domains[0] else same)
            cells.append((words, shots))
    return strips(cells, 3, len(domains), 1.35, size=8)


@drawn(found="TextAndImage")
def text_and_image(found: Any) -> Figure:
    """The share of latents of things that answer to the things' written names, against names dealt at random."""
    fig, ax = figure(width=0.75, height=2.9)
    sns.histplot(x=found.shuffled, bins=24, color="#C4C4C4", alpha=1, lw=0, label="names dealt at random", ax=ax)
    ax.axvline(found.share, color=COLORS["red"], label=f"own names: {found.share:.1%} (p = {found.p:.2g})")
    ax.set(xlabel=f"share of {len(found.table):,} latents that prefer their own thing's name (p ≤ {found.alpha:g})", ylabel="shuffles")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    legend(fig, ax)
    return fig
