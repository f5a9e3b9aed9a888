"""What the explorers show, as static figures: GitHub and paper show no widgets."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from ..latents.summary import LatentSummary
from .heat import MODES, blend
from .style import COLORS, HEAT, STYLE, figure, image_axes, save


def latent_explorer(
    card: Any,
    summary: LatentSummary,
    *,
    tau: float = 0.2,
    opacity: float = 0.75,
    mode: str = MODES[0],
    contour: bool = False,
    credit: bool = False,
    save: str | None = None,
) -> Figure:
    """A latent: its statistics, its place among all latents, its classes, its reference images with heat maps.

    Parameters
    ----------
    card : Any
    summary : LatentSummary
        All latents, for the scatter.
    tau, opacity, mode, contour
        How heat maps look; see :func:`patchsae_utils.explorer.render.blend`.
    credit : bool
        Whether the pictures show OpenMoji artwork.
    save : str, optional
        Name of a file in ``figures/``, without ending.
    """
    with mpl.rc_context(STYLE):
        fig, axes = figure(1.0, 3.7)
        axes.remove()
        left, right = fig.subfigures(1, 2, width_ratios=[3, 6.4])
        place, classes = left.subplots(2, 1, height_ratios=[1.2, 1])
        left.suptitle(f"Latent {card.latent}" + (f" · {card.name}" if card.name else ""), x=0.02, ha="left", fontsize=12, weight="bold")
        _place(place, card, summary)
        _bars(classes, [name for name, _ in card.classes], [100 * share for _, share in card.classes], "% of its active tokens")
        _references(right, card, {"tau": tau, "opacity": opacity, "mode": mode, "contour": contour})
    return _saved(fig, save, credit)


def patch_explorer(
    card: Any,
    *,
    tau: float = 0.2,
    opacity: float = 0.75,
    mode: str = MODES[0],
    contour: bool = False,
    credit: bool = False,
    save: str | None = None,
) -> Figure:
    """An image with a chosen patch, a chosen latent over it, and the latents of the patch and of the whole image.

    Parameters
    ----------
    card : Any
    tau, opacity, mode, contour
        How the heat map looks; see :func:`patchsae_utils.explorer.render.blend`.
    credit : bool
        Whether the picture shows OpenMoji artwork.
    save : str, optional
        Name of a file in ``figures/``, without ending.
    """
    with mpl.rc_context(STYLE):
        fig, (plain, heat, here, whole) = figure(1.0, 2.7, ncols=4, width_ratios=[1.35, 1.35, 1, 1])
        scale = float(card.heat.max()) or 1.0
        _picture(plain, card.picture, card)
        plain.set_title(f"Image {card.image} · {card.label}")
        if card.latent >= 0:
            _picture(heat, blend(card.picture, card.heat, scale, tau, opacity, mode, contour=contour), card)
            heat.set_title(f"Latent {card.latent}" + (f" · {card.names[card.latent].name}" if card.latent in card.names else ""))
            _colorbar(fig, heat.inset_axes([1.03, 0.1, 0.04, 0.8]), scale, mode)
        else:
            _note(image_axes(heat), "no latent chosen")
        these = "This patch" if len(card.patches) < 2 else f"These {len(card.patches)} patches"
        for axes, latents, title in ((here, card.patch_latents, these), (whole, card.image_latents, "Whole image")):
            image_axes(axes).set_title(title)
            _list(axes, latents, card)
            if not latents:
                _note(axes, "no patch chosen" if card.patch < 0 else "no latent active")
    return _saved(fig, save, credit)


def adaptation_view(
    card: Any,
    *,
    tau: float = 0.2,
    opacity: float = 0.75,
    mode: str = MODES[1],
    contour: bool = False,
    credit: bool = False,
    save: str | None = None,
) -> Figure:
    """One image read by CLIP and by an adapted CLIP: both masks of a latent, the latents of either, the probabilities of both.

    Parameters
    ----------
    card : Any
    tau, opacity, mode, contour
        How heat maps look; see :func:`patchsae_utils.explorer.render.blend`.
    credit : bool
        Whether the picture shows OpenMoji artwork.
    save : str, optional
        Name of a file in ``figures/``, without ending.
    """
    models, colors = ("CLIP", card.adapter), (COLORS["blue"], COLORS["orange"])
    with mpl.rc_context(STYLE):
        fig, (*pictures, latents, odds) = figure(1.0, 3.4, ncols=4, width_ratios=[1.15, 1.15, 1.35, 1.1])
        place = card.listed.index(card.latent) if card.latent >= 0 else -1
        scale = 1.0 if place < 0 else float(card.heats[place].max()) or 1.0
        for i, axes in enumerate(pictures):
            shown = card.picture
            if place >= 0:
                shown = blend(card.picture, card.heats[place, i], scale, tau, opacity, mode, contour=contour)
            image_axes(axes).imshow(shown)
            axes.set_title(models[i])
        name = card.names.get(card.latent, "")
        pictures[0].set_xlabel(f"{card.label} (image {card.image})", fontsize=8)
        pictures[1].set_xlabel("no latent chosen" if place < 0 else f"latent {card.latent}" + (f" · {name}" if name else ""), fontsize=8)
        image_axes(latents).set_title("Latents")
        _twins(latents, card, models, colors)
        words, *sides = zip(*card.bars, strict=True)
        rows = np.arange(len(words))
        for i, values in enumerate(sides):
            odds.barh(rows + 0.2 * (2 * i - 1), [100 * v for v in values], color=colors[i], height=0.36, label=models[i])
        odds.set_yticks(rows, [_clip(word, 14) for word in words])
        odds.set(xlim=(0, 100), xlabel="% probability", title="Classes")
        odds.invert_yaxis()
        odds.grid(axis="y", visible=False)
        odds.legend(loc="lower right", fontsize=8)
    return _saved(fig, save, credit)


def _twins(axes: Axes, card: Any, models: tuple[str, str], colors: tuple[str, str]) -> None:
    """Latents of both models and of one alone, with a bar for each model."""
    heads = {"common": "in both", "base": f"at least halved by {models[1]}", "adapted": f"at least doubled by {models[1]}"}
    row = 0
    for group, latents in card.groups.items():
        axes.text(0, row + 0.3, heads[group] + ("" if latents else ": none"), fontsize=8, weight="bold", va="center")
        row += 1
        # Latents that change are often weak ones: each group has its own scale.
        most = max((card.values[card.listed.index(latent)].max() for latent in latents), default=1.0)
        for latent in latents:
            weight = "bold" if latent == card.latent else "normal"
            axes.text(0.02, row + 0.3, f"{latent}  {_clip(card.names.get(latent, ''), 14)}", fontsize=7, va="center", weight=weight)
            for i, value in enumerate(card.values[card.listed.index(latent)]):
                axes.barh(row + 0.12 + 0.36 * i, 0.38 * value / most, left=0.66, color=colors[i], height=0.32)
            row += 1
        row += 0.4
    axes.set(xlim=(0, 1.05), ylim=(row, -0.3))


def pointing(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """How often a patch's latent finds the same thing in another image, with 95 % intervals, beside two controls.

    Parameters
    ----------
    frame : DataFrame
        As :func:`patchsae_utils.explorer.pointing.point` returns it.
    save : str, optional
        Name of a file in ``figures/``, without ending.
    """
    words = {"distinctive": "most distinctive latent", "strongest": "strongest latent", "random": "any active latent"}
    colors = {"distinctive": COLORS["orange"], "strongest": COLORS["blue"], "random": COLORS["gray"]}
    kinds = list(frame["kind"].unique())
    with mpl.rc_context(STYLE):
        fig, axes = figure(0.75, 0.9 + 0.55 * len(kinds))
        for i, (answer, word) in enumerate(words.items()):
            part = frame[frame["answer"] == answer].set_index("kind").loc[kinds]
            hits, low, high = (100 * part[name].to_numpy() for name in ("hits", "low", "high"))
            rows = np.arange(len(kinds)) + 0.22 * (i - 1)
            axes.errorbar(hits, rows, xerr=[hits - low, high - hits], fmt="o", color=colors[answer], capsize=3, label=word)
        chance = 100 * frame.groupby("kind")["chance"].mean().loc[kinds]
        axes.scatter(chance, range(len(kinds)), marker="|", s=700, color=COLORS["black"], label="any patch", zorder=3)
        axes.set_yticks(range(len(kinds)), [f"same {kind}" for kind in kinds])
        axes.set(xlabel="% of asked patches, unseen images", xlim=(-1, 101), ylim=(len(kinds) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        legend = fig.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        legend.legend_handles[0].set_sizes([120])
    return _saved(fig, save, False)


def _references(fig, card: Any, look: dict) -> None:
    n = len(card.images)
    columns = max(1, min(5, n))
    axes = np.atleast_1d(fig.subplots(-(-max(1, n) // columns), columns, squeeze=False)).ravel()
    scale = float(card.heats.max(initial=0)) or 1.0
    for i, one in enumerate(axes):
        image_axes(one)
        if i < n:
            one.imshow(blend(card.pictures[i], card.heats[i], scale, **look))
            one.set_title(_clip(card.labels[i], 16), fontsize=9, weight="normal", loc="left", pad=3)
            one.set_xlabel(f"{card.values[i]:.3g}", fontsize=8, labelpad=2)
    if n:
        fig.suptitle("Reference images, strongest first, with their mean activation", x=0.012, ha="left", fontsize=10)
        _colorbar(fig, axes[columns - 1].inset_axes([1.06, 0.05, 0.06, 0.9]), scale, look["mode"])
    else:
        _note(axes[0], "no image of the data set activates this latent")


def _place(axes: Axes, card: Any, summary: LatentSummary) -> None:
    alive = ~summary.dead.numpy()
    frequency, activation = summary.frequency.numpy()[alive], summary.mean_activation.numpy()[alive]
    axes.scatter(frequency, activation, s=3, color=COLORS["gray"], alpha=0.4, lw=0, rasterized=True)
    if not card.dead:
        axes.scatter(card.frequency, card.mean_activation, s=60, color=COLORS["orange"], edgecolor=COLORS["black"], zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="frequency", ylabel="mean activation")
    if frequency.min() > 0.05:  # less than two decades want more ticks than powers of ten
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    facts = "dead: active in no image" if card.dead else f"{100 * card.frequency:.3g} % of images, entropy {card.label_entropy:.2f}"
    axes.set_title(facts, fontsize=9, weight="normal")


def _list(axes: Axes, latents: list[tuple[int, float]], card: Any) -> None:
    most = max((value for _, value in latents), default=1.0)
    for row, (latent, value) in enumerate(latents):
        color = COLORS["orange"] if latent == card.latent else COLORS["blue"]
        axes.barh(row + 0.28, value / most, color=color, height=0.2)
        axes.text(0, row + 0.08, f"{latent}", fontsize=8, weight="bold", va="bottom")
        axes.text(0.26, row + 0.08, _clip(str(card.names.get(latent, "")), 19), fontsize=8, va="bottom")
        axes.text(1.28, row + 0.28, f"{value:.3g}", fontsize=8, ha="right", va="center", color=COLORS["gray"])
    axes.set(xlim=(0, 1.28), ylim=(8, -0.5))


def _bars(axes: Axes, words: list[str], values: list[float], unit: str) -> None:
    rows = np.arange(len(words))
    axes.barh(rows, values, color=COLORS["blue"], height=0.7)
    axes.set_yticks(rows, [_clip(word, 18) for word in words])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)


def _picture(axes: Axes, picture: np.ndarray, card: Any) -> None:
    height, width = picture.shape[:2]
    image_axes(axes).imshow(picture)
    for color, thickness in ((COLORS["black"], 3.5), ("white", 1.5)):  # shows on any picture
        for patch in card.patches:
            row, column = divmod(patch, card.grid[1])
            high, wide = height / card.grid[0], width / card.grid[1]
            axes.add_patch(
                Rectangle((column * wide - 0.5, row * high - 0.5), wide, high, fill=False, edgecolor=color, lw=thickness, clip_on=False)
            )


def _colorbar(fig, axes: Axes, scale: float, mode: str) -> None:
    # Colours are linear in the activation, a spotlight's brightness in its square root: see render.py.
    root = FuncNorm((lambda x: np.sqrt(np.clip(x, 0, None)), np.square), vmin=0, vmax=scale)
    bar = fig.colorbar(ScalarMappable(Normalize(0, scale), HEAT) if mode == "heat" else ScalarMappable(root, "gray"), cax=axes)
    bar.set_ticks([0, scale / 2, scale], labels=["0", f"{scale / 2:.2g}", f"{scale:.2g}"])
    bar.outline.set_visible(False)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=COLORS["gray"], transform=axes.transAxes)


def _clip(word: str, n: int) -> str:
    return word if len(word) <= n else word[: n - 1] + "…"


def _saved(fig: Figure, name: str | None, credit: bool) -> Figure:
    return save(fig, name, credit=credit)
