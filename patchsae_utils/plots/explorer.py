"""Figures of notebook 06, and what the explorers show as static figures: GitHub and paper show no widgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from .drawing import before_after, clip, interval_panels, look, paired_bars, plain_log
from .heat import blend
from .style import COLORS, HEAT, drawn, figure, image_axes

_PLACES = {"all": "all tokens", "cls": "CLS", "patches": "all patches"}
_ANSWERS = {
    "distinctive": look("orange", "o", "most distinctive latent"), "strongest": look("blue", "o", "strongest latent"),
    "random": look("gray", "o", "any active latent"),
}  # fmt: skip


@drawn(credit=True)
def latent(card: Any, summary: Any, **shown: Any) -> Figure:
    """A latent: its place among all latents of the summary, its classes, its reference images."""
    fig, ax = figure(1.0, 3.9)
    ax.remove()
    left, right = fig.subfigures(1, 2, width_ratios=[3, 6.4])
    place, classes = left.subplots(2, 1, height_ratios=[1.2, 1])
    left.suptitle(f"Latent {card.latent}\n{clip(card.name or '', 30)}", x=0.02, ha="left", fontsize=11, weight="bold")
    alive = ~summary.dead.numpy()
    frequency = summary.frequency.numpy()[alive]
    place.scatter(frequency, summary.mean_activation.numpy()[alive], s=3, color=COLORS["gray"], alpha=0.4, lw=0, rasterized=True)
    if not card.dead:
        place.scatter(card.frequency, card.mean_activation, s=60, color=COLORS["orange"], edgecolor=COLORS["black"], zorder=3)
    entropy = "" if np.isnan(card.label_entropy) else f", entropy {card.label_entropy:.2f}"  # without labels there is none
    facts = "dead: active in no image" if card.dead else f"{100 * card.frequency:.3g}% of images{entropy}"
    axis = "log" if alive.any() else "linear"
    place.set(xscale=axis, yscale=axis, xlabel="frequency", ylabel="mean activation")
    place.set_title(facts, fontsize=9, weight="normal")
    if frequency.min(initial=1) > 0.05:  # less than two decades want more ticks than powers of ten
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_log(place.xaxis)
    words = [clip(name, 18) for name, _ in card.classes]
    classes.set_visible(bool(words))
    classes.barh(range(len(words)), [100 * share for _, share in card.classes], color=COLORS["blue"], height=0.7)
    classes.set(yticks=range(len(words)), yticklabels=words, xlabel="% of its active tokens")
    classes.invert_yaxis()
    classes.grid(False, axis="y")

    n, scale = len(card.images), float(card.heats.max(initial=0)) or 1.0
    columns = max(1, min(5, n))
    axes = [image_axes(ax) for ax in right.subplots(-(-max(1, n) // columns), columns, squeeze=False).ravel()]
    for ax, picture, heat, label, value in zip(axes, card.pictures, card.heats, card.labels, card.values, strict=False):
        ax.imshow(blend(picture, heat, scale, **shown))
        ax.set_title(clip(label, 16), fontsize=9, weight="normal", pad=3)
        ax.set_xlabel(f"{value:.3g}", fontsize=8, labelpad=2)
    if n:
        right.suptitle("Reference images, strongest first, with their mean activation", x=0.012, ha="left", fontsize=10)
        _colorbar(axes[columns - 1], [1.06, 0.05, 0.06, 0.9], scale, shown["mode"])
    else:
        _note(axes[0], "no image of the data set activates this latent")
    return fig


@drawn(credit=True)
def patch(card: Any, **shown: Any) -> Figure:
    """An image with its chosen patches, the chosen latent over it, the latents of the patches and of the whole image."""
    fig, (plain, heat, here, whole) = figure(1.0, 2.9, ncols=4, width_ratios=[1.35, 1.35, 1, 1])
    scale = float(card.heat.max()) or 1.0
    _picture(plain, card.picture, card.grid, card.patches)
    plain.set_title(f"Image {card.image}\n{clip(card.label, 24)}", fontsize=10)
    if card.latent >= 0:
        _picture(heat, blend(card.picture, card.heat, scale, **shown), card.grid, card.patches)
        heat.set_title(f"Latent {card.latent}\n{clip(card.names.get(card.latent, ''), 24)}", fontsize=10)
        _colorbar(heat, [1.03, 0.1, 0.04, 0.8], scale, shown["mode"])
    else:
        _note(image_axes(heat), "no latent chosen")
    these = "This patch" if len(card.patches) < 2 else f"These {len(card.patches)} patches"
    for ax, latents, title in ((here, card.patch_latents, these), (whole, card.image_latents, "Whole image")):
        image_axes(ax).set_title(title)
        for row, (latent, value) in enumerate(latents):
            color = COLORS["orange"] if latent == card.latent else COLORS["blue"]
            ax.barh(row + 0.28, value / max(each for _, each in latents), color=color, height=0.2)
            ax.text(0, row + 0.08, f"{latent}", fontsize=8, weight="bold", va="bottom")
            ax.text(0.28, row + 0.08, clip(card.names.get(latent, ""), 20), fontsize=8, va="bottom")
            ax.text(1.28, row + 0.28, f"{value:.3g}", fontsize=8, ha="right", va="center", color="#6E6E6E")
        ax.set(xlim=(0, 1.28), ylim=(8, -0.5))
        if not latents:
            _note(ax, "no patch chosen" if card.patch < 0 else "no latent active")
    return fig


@drawn(credit=True)
def adaptation(card: Any, **shown: Any) -> Figure:
    """One image read by CLIP and by an adapted CLIP: both masks of a latent, latents and probabilities of both."""
    models, colors = ("CLIP", card.adapter), (COLORS["blue"], COLORS["orange"])
    fig, (*pictures, latents, odds) = figure(1.0, 3.4, ncols=4, width_ratios=[1, 1, 1.8, 1.1])
    place = card.listed.index(card.latent) if card.latent >= 0 else -1
    chosen = "no latent chosen" if place < 0 else f"latent {card.latent} · {card.names.get(card.latent, 'unnamed')}"
    for i, (ax, words) in enumerate(zip(pictures, (f"{card.label} (image {card.image})", chosen), strict=True)):
        picture = card.picture
        if place >= 0:
            picture = blend(card.picture, card.heats[place, i], float(card.heats[place].max()) or 1.0, **shown)
        _picture(ax, picture, card.heats.shape[2:], [card.patch] if card.patch >= 0 else [])
        ax.set_title(models[i])
        ax.set_xlabel(words, fontsize=8)
    image_axes(latents).set_title("Latents" if card.patch < 0 else "Latents of the patch")
    heads = {"common": "in both", "base": f"at least halved by {card.adapter}", "adapted": f"at least doubled by {card.adapter}"}
    row = 0  # latents that change are often weak ones: each group of bars has its own scale
    for group, members in card.groups.items():
        latents.text(0, row + 0.3, heads[group] + ("" if members else ": none"), fontsize=8, weight="bold", va="center")
        most = max((card.values[card.listed.index(latent)].max() for latent in members), default=1.0)
        for latent in members:
            row += 1
            weight = "bold" if latent == card.latent else "normal"
            latents.text(0.02, row + 0.3, f"{latent}  {clip(card.names.get(latent, ''), 26)}", fontsize=8, va="center", weight=weight)
            for i, value in enumerate(card.values[card.listed.index(latent)]):
                latents.barh(row + 0.12 + 0.36 * i, 0.28 * value / most, left=0.77, color=colors[i], height=0.32)
        row += 1
    latents.set(xlim=(0, 1.05), ylim=(row, -0.3))
    words, *sides = zip(*card.bars, strict=True)
    paired_bars(odds, [clip(word, 14) for word in words], dict(zip(models, 100 * np.array(sides), strict=True)), colors)
    odds.set(xlim=(0, 100), xlabel="% probability", title="Classes")
    return fig


@drawn(credit=True)
def steering(card: Mapping[str, Any], **shown: Any) -> Figure:
    """The steering panel, still: the picture with the selected patches, the sliders, the probabilities before and after."""
    fig, (picture, sliders, odds) = figure(height=2.9, ncols=3, width_ratios=[1, 1.15, 1.45])
    image = card["picture"] if card["latent"] < 0 else blend(card["picture"], card["heat"], float(card["heat"].max()) or 1.0, **shown)
    _picture(picture, image, card["grid"], card["patches"])
    picture.set_title(f"Image {card['image']} · {clip(card['label'], 14)}", fontsize=10)
    where = _PLACES.get(card["where"], f"{len(card['patches'])} selected patches")
    image_axes(sliders).set_title(f"Edits on {where}", fontsize=10)
    for i, slider in enumerate(card["sliders"]):
        low, top, neutral = (0, 4, 1) if slider["op"] == "scale" else (-slider["limit"], 4 * slider["limit"], 0)
        at, start = (np.clip((x - low) / (top - low), 0, 1) for x in (slider["value"], neutral))
        color = COLORS["blue"] if slider["edited"] else COLORS["gray"]
        sliders.plot([0, 1], [i + 0.3] * 2, color="#D0D0D0", lw=3, solid_capstyle="round")
        sliders.plot([start, at], [i + 0.3] * 2, color=color, lw=3)
        sliders.plot(at, i + 0.3, "o", color=color, ms=7)
        sliders.text(0, i - 0.02, f"{slider['latent']}  {clip(slider['name'], 30)}", fontsize=8, va="center")
        amount = f"×{slider['value']:.1f}" if slider["op"] == "scale" else f"{slider['value']:+.2g}"
        sliders.text(1, i - 0.02, amount, fontsize=8, ha="right", va="center", color=color)
    sliders.set(xlim=(-0.04, 1.04), ylim=(max(len(card["sliders"]), 3) - 0.3, -0.4))
    before_after(odds, *zip(*card["bars"], strict=True))
    odds.set_xlabel("zero-shot probability")
    return fig


@drawn(frame="DataFrame of ``point``")
def pointing(frame: pd.DataFrame) -> Figure:
    """How often a patch's latent finds the same thing in another image, with 95% intervals; black: any patch of another image."""
    kinds = {kind: f"same {kind}" for kind in frame["kind"].unique()}
    fig, (ax,) = interval_panels(
        frame.assign(all=0), {"all": {0: ""}}, "kind", "hits", "answer", _ANSWERS, xlabel="% of asked patches, unseen images; black: any patch",
        xlim=(-1, 101), order=kinds, scale=100, height=1.2 + 0.55 * len(kinds), subplots={"width": 0.8},
    )  # fmt: skip
    chance = 100 * frame.groupby("kind", sort=False)["chance"].mean()
    ax.plot(chance, range(len(kinds)), ls="none", marker="|", ms=22, mew=2, color=COLORS["black"])
    return fig


def _picture(ax: Axes, picture: np.ndarray, grid: tuple[int, int], patches: Sequence[int]) -> None:
    """A picture with its chosen patches framed, in two lines that show on any picture."""
    image_axes(ax).imshow(picture)
    high, wide = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    for (color, width), patch in product(((COLORS["black"], 3.5), ("white", 1.5)), patches):
        corner = ((patch % grid[1]) * wide - 0.5, (patch // grid[1]) * high - 0.5)
        ax.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=color, lw=width, clip_on=False))


def _colorbar(ax: Axes, place: list[float], scale: float, mode: str) -> None:
    # Colors are linear in the activation, a spotlight's brightness in its square root.
    root = FuncNorm((lambda x: np.sqrt(np.clip(x, 0, None)), np.square), vmin=0, vmax=scale)
    shades = ScalarMappable(Normalize(0, scale), HEAT) if mode == "heat" else ScalarMappable(root, "gray")
    bar = ax.figure.colorbar(shades, cax=ax.inset_axes(place))
    bar.set_ticks([0, scale / 2, scale], labels=["0", f"{scale / 2:.2g}", f"{scale:.2g}"])
    bar.outline.set_visible(False)


def _note(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", color="#6E6E6E", transform=ax.transAxes)
