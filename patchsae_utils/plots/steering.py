"""Figures of steering: one picture before and after, concepts of every kind, swapped colours, and what the steering panel shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from . import style
from .heat import MODES, blend
from .interventions import _bar
from .style import COLORS, STYLE

_KINDS = {"object": "blue", "category": "green", "color": "red", "background": "purple"}
_KIND_WORDS = {"object": "objects", "category": "categories", "color": "colours", "background": "backgrounds"}


@rc_context(STYLE)
def steered(
    pictures: Sequence[np.ndarray],
    results: Sequence[Any],
    class_names: Sequence[str],
    titles: Sequence[str],
    *,
    grid: tuple[int, int] = (14, 14),
    n: int = 5,
    credit: bool = False,
    save: str | None = None,
) -> Figure:
    """Pictures, where their edited latents were active and what changed there, and the class probabilities before and after.

    Parameters
    ----------
    pictures : sequence of uint8 array [h, w, 3]
        What CLIP saw.
    results : sequence of Steered
        One a picture, each of a single image (``steer(..., image[None], ...)``) with a head.
    class_names : sequence of str
    titles : sequence of str
        What was done.
    grid : (int, int)
        Rows and columns of patches.
    n : int
        Classes with bars: those whose probability changed most.
    credit : bool
        Whether the pictures show OpenMoji artwork.
    save : str, optional
    """
    fig, axes = style.figure(height=0.3 + 1.95 * len(pictures), nrows=len(pictures), ncols=3, width_ratios=[1, 1, 2.1], squeeze=False)
    for row, picture, one, title in zip(axes, pictures, results, titles, strict=True):
        style.image_axes(row[0]).imshow(picture)
        row[0].set_title(fill(title, 24), fontsize=10)
        change = (one.activations - one.activations_before)[0].sum(-1).cpu().numpy()
        limit = float(np.abs(change).max()) or 1.0
        style.image_axes(row[1]).imshow(picture.mean(-1), cmap="gray", vmin=-120, vmax=300)
        height, width = picture.shape[:2]
        shown = change[1:].reshape(grid)
        whole, fading = (-0.5, width - 0.5, height - 0.5, -0.5), (np.abs(shown) / limit).clip(0, 1) ** 0.5
        row[1].imshow(shown, cmap=style.DIVERGING, vmin=-limit, vmax=limit, alpha=fading, extent=whole)
        row[1].set_title(f"change of latents (CLS {change[0]:+.1f})", fontsize=9, weight="normal")
        moved = one.moved(class_names, n=n).sort_values("before", ascending=False)
        _before_after(row[2], moved["class"].tolist(), moved["before"].to_numpy(), moved["after"].to_numpy())
    axes[-1, 2].set_xlabel("zero-shot probability")
    axes[0, 2].legend(loc="lower right", fontsize=8)
    return style.save(fig, save, credit=credit)


@rc_context(STYLE)
def steering_panel(
    card: Mapping[str, Any], *, tau: float = 0.2, opacity: float = 0.75, mode: str = MODES[1], credit: bool = False, save: str | None = None
) -> Figure:
    """What the steering panel shows, still: the picture with the selected patches, the sliders, the probabilities before and after.

    Parameters
    ----------
    card : mapping
        ``SteeringPanel.card``.
    tau, opacity, mode
        How the heat map looks; see :func:`patchsae_utils.explorer.render.overlay`.
    credit : bool
        Whether the picture shows OpenMoji artwork.
    save : str, optional
    """
    fig, (picture, sliders, odds) = style.figure(height=2.9, ncols=3, width_ratios=[1, 1.15, 1.45])
    shown, heat = card["picture"], card["heat"]
    if card["latent"] >= 0:
        shown = blend(shown, heat, float(heat.max()) or 1.0, tau, opacity, mode)
    style.image_axes(picture).imshow(shown)
    picture.set_title(f"Image {card['image']} · {card['label']}", fontsize=10)
    rows, columns = card["grid"]
    high, wide = shown.shape[0] / rows, shown.shape[1] / columns
    for patch in card["patches"]:
        at = ((patch % columns) * wide - 0.5, (patch // columns) * high - 0.5)
        picture.add_patch(Rectangle(at, wide, high, facecolor=COLORS["orange"], edgecolor="white", alpha=0.45, lw=0.6))

    places = {"all": "all tokens", "cls": "CLS", "patches": "all patches", "selected": f"{len(card['patches'])} selected patches"}
    style.image_axes(sliders).set_title(f"Edits on {places[card['where']]}", fontsize=10)
    for i, slider in enumerate(card["sliders"]):
        low, top, neutral = (0, 4, 1) if slider["op"] == "scale" else (-slider["limit"], 4 * slider["limit"], 0)
        at, start = (np.clip((x - low) / (top - low), 0, 1) for x in (slider["value"], neutral))
        color = COLORS["blue"] if slider["edited"] else COLORS["gray"]
        sliders.plot([0, 1], [i + 0.3] * 2, color="#D0D0D0", lw=3, solid_capstyle="round")
        sliders.plot([start, at], [i + 0.3] * 2, color=color, lw=3)
        sliders.plot(at, i + 0.3, "o", color=color, ms=7)
        sliders.text(0, i - 0.02, f"{slider['latent']}  {slider['name'][:24]}", fontsize=8, va="center")
        amount = f"×{slider['value']:.1f}" if slider["op"] == "scale" else f"{slider['value']:+.2g}"
        sliders.text(1, i - 0.02, amount, fontsize=8, ha="right", va="center", color=color)
    sliders.set(xlim=(-0.04, 1.04), ylim=(max(len(card["sliders"]), 3) - 0.3, -0.4))

    names, before, after = zip(*card["bars"], strict=True)
    _before_after(odds, list(names), np.array(before), np.array(after))
    odds.set_xlabel("zero-shot probability")
    odds.legend(loc="lower right", fontsize=8)
    return style.save(fig, save, credit=credit)


@rc_context(STYLE)
def concept_specificity(by_concept: pd.DataFrame, overall: pd.DataFrame, save: str | None = None) -> Figure:
    """What turning a concept's latents off does to its own score and to the others of its kind, for every concept, beside a control.

    Parameters
    ----------
    by_concept : DataFrame
        ``summarize_effects(frame, ["own", "others"], by=["kind", "concept", "concept_kind"])``, of one k.
    overall : DataFrame
        ``summarize_effects(frame, ["own", "others"], by=["kind", "concept_kind"], over="concept")``, of the same k.
    save : str, optional
    """
    fig, axes = style.figure(height=3.9, ncols=2, width_ratios=[1.25, 1])
    own, control = (by_concept[by_concept["kind"] == kind].set_index("concept") for kind in ("own", "control"))
    kinds = [kind for kind in _KINDS if kind in set(own["concept_kind"])]
    ax = axes[0]
    for frame in (own, control):
        values = frame[["own", "others"]].to_numpy()
        if frame is control:
            ax.plot(values[:, 1], values[:, 0], ".", color=COLORS["gray"], ms=4, label="as active latents off", zorder=3)
            continue
        for kind in kinds:
            part = frame[frame["concept_kind"] == kind]
            error = [part["own"] - part["own_low"], part["own_high"] - part["own"]]
            label = f"{len(part)} {_KIND_WORDS[kind]}"
            ax.errorbar(part["others"], part["own"], np.maximum(error, 0), fmt="o", ms=4, lw=0.7, alpha=0.7, color=COLORS[_KINDS[kind]], label=label)  # fmt: skip
    low, high = min(own["own"].min(), own["others"].min()), max(own["own"].max(), own["others"].max())
    ax.plot([low, high], [low, high], color=COLORS["black"], lw=0.8, ls=":")
    ax.annotate("unspecific", (low, low), (4, 10), textcoords="offset points", fontsize=8, color="#6E6E6E", rotation=35)
    for line in (ax.axhline, ax.axvline):
        line(0, color=COLORS["black"], lw=0.8)
    ax.set(
        title=f"{len(own)} concepts, each its own latents off",
        xlabel="mean change of the others of its kind",
        ylabel="change of its own score",
    )
    ax = axes[1]
    overall = overall.set_index(["kind", "concept_kind"])
    bars = [
        ("own", "own", "blue", "own latents off: own score"),
        ("own", "others", "orange", "own latents off: others of its kind"),
        ("control", "own", "gray", "as active latents off: own score"),
    ]
    for i, kind in enumerate(kinds):
        for j, (which, name, color, label) in enumerate(bars):
            _bar(ax, i + 0.27 * (j - 1), overall.loc[(which, kind)], name, 0.25, color, label=label if i == 0 else None)
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.set_xticks(range(len(kinds)), [_KIND_WORDS[kind] for kind in kinds])
    ax.set(title="Mean over concepts", ylabel="change of the score")
    ax.grid(False, axis="x")
    handles = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    fig.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=4, fontsize=8)
    return style.save(fig, save)


@rc_context(STYLE)
def color_swap(tables: Mapping[str, pd.DataFrame], save: str | None = None) -> Figure:
    """How often CLIP sees the other colour after two colours' latents changed places.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        What was edited ("patches", "patches and CLS") -> ``summarize_effects(frame[frame["saw_source"]], ["sees_target", "object_change"],
        by=["kind", "dose"])``.
    save : str, optional
    """
    fig, axes = style.figure(height=3.3, ncols=2, width_ratios=[1.1, 1])
    colors = [COLORS[name] for name in ("blue", "red", "green", "purple")]
    for (place, table), color in zip(tables.items(), colors, strict=False):
        for kind, line in (("own", "-"), ("control", "--")):
            rows = table[table["kind"] == kind].sort_values("dose")
            label = f"{place}, {'own latents' if kind == 'own' else 'others, as active'}"
            for ax, name in zip(axes, ("sees_target", "object_change"), strict=True):
                ax.fill_between(
                    rows["dose"], rows[f"{name}_low"], rows[f"{name}_high"], color=color, alpha=0.15 if kind == "own" else 0.07, lw=0
                )
                ax.plot(rows["dose"], rows[name], color=color, ls=line, marker="o", ms=4, label=label)
    n = int(next(iter(tables.values()))["n"].iloc[0])
    axes[0].set(title=f"Sees the other colour ({n} scenes)", ylabel="success rate", ylim=(-0.02, 1), xlabel="dose (1: usual level)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[1].axhline(0, color=COLORS["black"], lw=0.8)
    axes[1].set(title="What it costs the object", ylabel="change of its class's logit", xlabel="dose (1: usual level)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return style.save(fig, save)


def _before_after(ax: Axes, names: list[str], before: np.ndarray, after: np.ndarray) -> None:
    """Two bars a class, the first on top."""
    rows = np.arange(len(names))
    ax.barh(rows - 0.19, before, 0.36, color=COLORS["gray"], label="before")
    ax.barh(rows + 0.19, after, 0.36, color=COLORS["blue"], label="after")
    ax.set_yticks(rows, [name if len(name) < 20 else name[:19] + "…" for name in names])
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        ax.annotate(f"{100 * old:.0f} → {100 * new:.0f} %", (max(old, new), i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.18)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.grid(False, axis="y")
