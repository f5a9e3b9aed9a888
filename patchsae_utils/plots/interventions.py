"""Figures of notebook 04: masking sweeps, one picture steered, concepts turned off, dose and response, swapped colors, removed objects."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .drawing import PERCENT, band, before_after, errors, intervals, legend, look, measures, outline, panels, pretty
from .style import COLORS, CYCLE, DIVERGING, drawn, figure, image_axes

_CHOICES = {
    "oracle": ("true class's (oracle)", "red"), "predicted": ("predicted class's", "blue"), "wrong": ("another class's", "orange"),
    "dataset": ("data set's", "green"), "matched": ("others, as active here", "sky"), "random": ("random", "gray"),
}  # fmt: skip
_MODES = {"on": "On: only k latents are kept", "off": "Off: k latents are zeroed"}
_LINES = {
    "where": {"all": ("all tokens", "-"), "patches": ("patches", "--"), "cls": ("CLS", ":")},
    "rank": {"attribution": ("by attribution", "-"), "count": ("by count", "--")},
    None: {"all": ("", "-")},
}
_UNMASKED = {"raw": ("no mask, raw", "-"), "reconstructed": ("no mask, reconstructed", (0, (4, 3)))}
_KINDS = {
    "object": ("objects", "blue"), "category": ("categories", "green"), "color": ("colors", "red"), "background": ("backgrounds", "purple"),
}  # fmt: skip


@drawn(
    frame="DataFrame of ``sweep_masks``; groups of classes are left out", choose="sequence of str, optional; choices of latents that are shown",
    by='{"where", "rank"}, optional; a line style for each place or ranking, otherwise all tokens and the first ranking alone',
)  # fmt: skip
def mask_curves(frame: pd.DataFrame, choose: Sequence[str] | None = None, by: str | None = None) -> Figure:
    """Zero-shot accuracy over k, one column for on and off, one row for the error term kept and dropped, a color for each choice of latents."""
    frame = frame[(frame["group"] == "all") & ((frame["where"] == "all") if by != "where" else True)]
    rows = frame[frame["choose"].isin(choose or [*_CHOICES])].drop_duplicates(["error", "mode"])[["error", "mode"]].itertuples(index=False)
    pairs = sorted(rows, key=lambda pair: (pair.error, [*_MODES].index(pair.mode)))
    titles = [f"{_MODES[mode]}, error {error}" for error, mode in pairs]
    fig, axes = panels(titles, 3.4 if len(pairs) < 3 else 2.8, 2, "latents k", "zero-shot accuracy", sharex=True)
    for ax, (error, mode) in zip(axes, pairs, strict=True):
        _curves(ax, frame, mode, error, choose, by)
        ax.set_ylim(0, None)
    legend(fig, axes, ncols=3 if by else 4)
    return fig


@drawn(frame="DataFrame of ``sweep_masks`` with ``groups``")
def mask_tasks(frame: pd.DataFrame) -> Figure:
    """One small picture a task (or another group of classes): accuracy without k latents, for each choice of them."""
    groups = [group for group in frame["group"].unique() if group != "all"]
    fig, axes = panels(groups, 1.95, 5, "latents k", sharex=True)
    for ax, group in zip(axes, groups, strict=True):
        part = frame[frame["group"] == group]
        ks = _curves(ax, part, "off")
        ax.set_title(f"{pretty(group)} ({part['n'].iloc[0]:.0f})", fontsize=9, weight="normal")
        ax.set(ylim=(0, 1), xticks=range(0, len(ks), 2), xticklabels=[f"{k:,}" for k in ks[::2]])
    fig.suptitle(f"{_MODES['off']}: zero-shot accuracy", x=0.01, ha="left", fontsize=11, weight="bold")
    legend(fig, axes)
    return fig


def _curves(ax: Axes, frame: pd.DataFrame, mode: str, error: Any = None, choose: Any = None, by: str | None = None) -> list[int]:
    """Accuracy with its interval over k, and without any mask; ks stand at equal distances. Returns them."""
    for unmasked, (label, dashes) in _UNMASKED.items():
        if unmasked == "raw" or error == "dropped":
            row = frame[frame["mode"] == unmasked].iloc[0]
            ax.axhspan(row["low"], row["high"], color=COLORS["black"], alpha=0.07, lw=0)
            ax.axhline(row["accuracy"], color=COLORS["black"], lw=1.1, ls=dashes, label=label)
    rows = frame[(frame["mode"] == mode) & (frame["error"] == (error or frame["error"]))]
    if by != "rank":
        ranks = rows.loc[rows["rank"] != "none", "rank"]
        rows = rows[rows["rank"].isin(["none", *ranks.iloc[:1]])]  # of several rankings the first; random latents have none
    ks = sorted(rows["k"].unique())
    for (name, (label, color)), (value, (words, dashes)) in product(_CHOICES.items(), _LINES[by].items()):
        part = rows[(rows["choose"] == name) & (rows[by or "where"] == value)].sort_values("k")
        if name in (choose or _CHOICES) and len(part):
            band(ax, part, part["k"].map(ks.index), "accuracy", COLORS[color], ls=dashes, label=f"{label}, {words}".removesuffix(", "))
    ax.set_xticks(range(len(ks)), [f"{k:,}" for k in ks])
    ax.yaxis.set_major_formatter(PERCENT)
    return ks


@drawn(
    credit=False, pictures="sequence of uint8 array [h, w, 3]; what CLIP saw", titles="sequence of str; what was done",
    results="sequence of Steered; one per picture, each of a single image with a head",
)  # fmt: skip
def steered(
    pictures: Sequence[np.ndarray], results: Sequence[Any], class_names: Sequence[str], titles: Sequence[str], *, grid: tuple[int, int]
) -> Figure:
    """Pictures, where their edited latents were active and what changed there, and the class probabilities before and after."""
    fig, axes = figure(height=0.3 + 1.95 * len(pictures), nrows=len(pictures), ncols=3, width_ratios=[1, 1, 2.1], squeeze=False)
    for (left, middle, right), picture, one, title in zip(axes, pictures, results, titles, strict=True):
        image_axes(left).imshow(picture)
        left.set_title(textwrap.fill(title, 24), fontsize=10)
        change = (one.activations - one.activations_before)[0].sum(-1).cpu().numpy()
        limit, shown = float(np.abs(change).max()) or 1.0, change[1:].reshape(grid)
        image_axes(middle).imshow(picture.mean(-1), cmap="gray", vmin=-120, vmax=300)
        colors = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit, "alpha": (np.abs(shown) / limit) ** 0.5}
        middle.imshow(shown, extent=(-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5), **colors)
        middle.set_title(f"change of latents (CLS {change[0]:+.1f})", fontsize=9, weight="normal")
        moved = one.moved(class_names, n=5).sort_values("before", ascending=False)
        before_after(right, moved["class"].tolist(), moved["before"].to_numpy(), moved["after"].to_numpy())
    axes[-1, 2].set_xlabel("zero-shot probability")
    return fig


@drawn(
    by_concept='DataFrame of ``summarize_effects(frame, ["own", "others"], by=["kind", "concept", "concept_kind"])``, of one k',
    overall='DataFrame of ``summarize_effects(frame, ["own", "others"], by=["kind", "concept_kind"], over="concept")``, of the same k',
)
def concept_specificity(by_concept: pd.DataFrame, overall: pd.DataFrame) -> Figure:
    """What turning a concept's latents off does to its own score and to the others of its kind, for every concept, beside a control."""
    fig, (left, right) = figure(height=4.1, ncols=2, width_ratios=[1.25, 1])
    own, control = by_concept[by_concept["kind"] == "own"], by_concept[by_concept["kind"] == "control"]
    kinds = {kind: words for kind, words in _KINDS.items() if (own["concept_kind"] == kind).any()}
    left.plot(control["others"], control["own"], ".", color=COLORS["gray"], ms=4, label="as active latents off", zorder=3)
    for kind, (words, color) in kinds.items():
        part, how = own[own["concept_kind"] == kind], {"fmt": "o", "ms": 4, "lw": 0.7, "alpha": 0.7, "color": COLORS[color]}
        left.errorbar(part["others"], part["own"], errors(part, "own"), label=f"{len(part)} {words}", **how)
    low, high = own[["own", "others"]].min().min(), own[["own", "others"]].max().min()
    left.plot([low, high], [low, high], color=COLORS["black"], lw=0.8, ls=":", label="unspecific: all change alike")
    for line in (left.axhline, left.axvline, right.axhline):
        line(0, color=COLORS["black"], lw=0.8)
    left.set(xlabel="mean change of the others of its kind", ylabel="change of its own score")
    left.set_title(f"{len(own)} concepts, each its own latents off")
    rows = measures(overall, ["own", "others"])
    rows["bar"] = rows["kind"] + ", " + rows["measure"]
    looks = {
        "own, own": look("sky", "o", "own latents off: own score"), "own, others": look("orange", "o", "own latents off: others of its kind"),
        "control, own": look("gray", "o", "as active latents off: own score"),
    }  # fmt: skip
    order = {kind: words for kind, (words, _) in kinds.items()}
    intervals(right, rows, "concept_kind", "value", "bar", looks, order=order, upright=True, bars=True)
    right.set(title="Mean over concepts", ylabel="change of the score")
    legend(fig, [left, right], fontsize=8)
    return fig


@drawn(table="DataFrame of ``dose_response``")
def dose_response(table: pd.DataFrame, class_names: Sequence[str]) -> Figure:
    """Change of the class's logit over the dose of its latent, where the class is shown and where another one is."""
    titles = {"show it": ("Scaled in scenes that show the class", 1.0), "show another": ("Added to scenes of another class", 0.0)}
    words: dict[str, Any] = {"xlabel": "dose (1: as strong as in a scene of the class)", "ylabel": "change of the logit"}
    fig, axes = panels([title for title, _ in titles.values()], 3.5, **words)
    for ax, (scenes, (_, untouched)) in zip(axes, titles.items(), strict=True):
        part = table[table["scenes"] == scenes]
        ax.axhline(0, color=COLORS["black"], lw=0.8)
        ax.axvline(untouched, color=COLORS["black"], lw=0.8, ls=":")
        for i, (label, rows) in enumerate(part.groupby("class", sort=False)):
            band(ax, rows, "dose", "own", CYCLE[i % 6], label=pretty(class_names[label]))
        part.groupby("dose")["others"].mean().plot(ax=ax, color=COLORS["black"], ls="--", lw=1.5, label="other classes (mean)", **words)
    legend(fig, axes)
    return fig


@drawn(tables="mapping of what was edited to ``summarize_effects(..., ['sees_target', 'object_change'], by=['kind', 'dose'])``")
def color_swap(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """How often CLIP sees the other color after two colors' latents changed places."""
    n = int(next(iter(tables.values()))["n"].iloc[0])
    titles = {"sees_target": f"Sees the other color ({n} scenes)", "object_change": "What it costs the object"}
    fig, (left, right) = panels([*titles.values()], 3.4, xlabel="dose (1: usual level)", sharey=False)
    for (place, table), color in zip(tables.items(), ("blue", "red", "green", "purple"), strict=False):
        for kind, words, dashes in (("own", "own latents", "-"), ("control", "others, as active", "--")):
            for ax, name in zip((left, right), titles, strict=True):
                rows = table[table["kind"] == kind].sort_values("dose")
                band(ax, rows, "dose", name, COLORS[color], ls=dashes, label=f"{place}, {words}")
    left.set(ylabel="success rate", ylim=(-0.02, 1))
    left.yaxis.set_major_formatter(PERCENT)
    right.axhline(0, color=COLORS["black"], lw=0.8)
    right.set_ylabel("change of its class's logit")
    legend(fig, left, ncols=2)
    return fig


@drawn(
    credit=True, frame="DataFrame of ``remove_objects``", dataset="OpenMojiData; the scenes", scenes="sequence of int; the examples' indices",
    overall='DataFrame of ``summarize_effects(frame, ["removed_change", "stays_change"])``',
)  # fmt: skip
def object_removal(frame: pd.DataFrame, overall: pd.DataFrame, dataset: Any, scenes: Sequence[int]) -> Figure:
    """Scenes of two objects before and after each one's latents are turned off on its own patches; on the right the mean over scenes."""
    fig, ax = figure(height=4.6)
    ax.remove()
    *columns, right = fig.subfigures(1, len(scenes) + 1, width_ratios=[*[1] * len(scenes), 1.3])
    colors = (COLORS["blue"], COLORS["orange"])
    for i, (column, index) in enumerate(zip(columns, scenes, strict=True)):
        top, bottom = column.subplots(2, 1, height_ratios=[1, 0.9])
        first, second = (row for _, row in frame[(frame["kind"] == "own") & (frame["index"] == index)].iterrows())
        image, truth = np.asarray(dataset[index].image), dataset.truth(index)
        image_axes(top).imshow(image)
        for share, color in zip(truth.object_share, colors, strict=False):
            outline(top, share >= 0.5, image.shape[:2], color)
        odds = {
            "none": [first["removed_before"], first["stays_before"]], "first": [first["removed_after"], first["stays_after"]],
            "second": [second["stays_after"], second["removed_after"]],
        }  # fmt: skip
        labels = [pretty(dataset.class_names[row["removed"]]) for row in (first, second)]
        pd.DataFrame(odds, index=labels).T.plot.bar(ax=bottom, color=list(colors), width=0.8, rot=0)
        for tick, color in zip(bottom.get_xticklabels()[1:], colors, strict=True):
            tick.set_color(color)
        bottom.set(ylim=(0, 1.5), yticks=np.linspace(0, 1, 5), xlabel="latents off", ylabel="zero-shot probability" if i == 0 else "")
        bottom.yaxis.set_major_formatter(PERCENT)
        bottom.grid(False, axis="x")
        bottom.legend(loc="upper center", fontsize=8, handlelength=0.8)
    ax = right.subplots()
    places = {"removed_change": "removed\nobject", "stays_change": "other\nobject"}
    looks = {"own": look("red", "o", "its own latents off"), "control": look("gray", "o", "as active ones off")}
    intervals(ax, measures(overall, places), "measure", "value", "kind", looks, order=places, upright=True, bars=True)
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.set(title=f"Mean of {overall['n'].iloc[0]:.0f} scenes", ylabel="change of the logit")
    ax.margins(y=0.2)
    ax.legend(loc="upper center", fontsize=8)
    return fig
