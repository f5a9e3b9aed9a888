"""Figures of notebook 04: masking sweeps, one picture steered, concepts turned off, dose and response, swapped colours, removed objects."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style
from .drawing import PERCENT, band, before_after, intervals, legend, look, outline, panels, pretty
from .style import COLORS, CYCLE, drawn

_CHOICES = {
    "oracle": ("true class's (oracle)", "red"), "predicted": ("predicted class's", "blue"), "wrong": ("another class's", "orange"),
    "dataset": ("data set's", "green"), "matched": ("others, as active here", "sky"), "random": ("random", "gray"),
}  # fmt: skip
_MODES = {"on": "On: only k latents are kept", "off": "Off: k latents are zeroed"}
_PLACES = {"all": ("all tokens", "-"), "patches": ("patches", "--"), "cls": ("CLS", ":")}
_RANKS = {"attribution": ("by attribution", "-"), "count": ("by count", "--")}
_UNMASKED = {"raw": ("no mask, raw", "-"), "reconstructed": ("no mask, reconstructed", (0, (4, 3)))}
_KINDS = {
    "object": ("objects", "blue"),
    "category": ("categories", "green"),
    "color": ("colours", "red"),
    "background": ("backgrounds", "purple"),
}
_SWAPS = ("blue", "red", "green", "purple")


@drawn(frame="DataFrame of ``sweep_masks``; rows of other places than all tokens, or of groups of classes, are left out")
def mask_curves(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """Zero-shot accuracy over k, one column for on and off, one row for the error term kept and dropped, one line a choice of latents."""
    return _sweep(frame[frame["where"] == "all"], list(_CHOICES), "where", {"all": ("", "-")}, save)


@drawn(
    frame="DataFrame of ``sweep_masks`` with several ``where`` and one setting of the error term",
    choose="sequence of str; choices of latents that are shown",
)
def mask_places(frame: pd.DataFrame, choose: Sequence[str], save: str | None = None) -> Figure:
    """The same latents masked on all tokens, on the patches alone, on CLS alone."""
    return _sweep(frame, choose, "where", _PLACES, save)


@drawn(frame='DataFrame of ``sweep_masks`` with ``rank_by=["count", "attribution"]``, one place and one setting of the error term')
def mask_rankings(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """Latents ranked by where they are active, and by what the class's logit owes to them."""
    return _sweep(frame, ("predicted", "matched"), "rank", _RANKS, save)


@drawn()
def mask_tasks(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """One small picture a task (or another group of classes): accuracy without k latents, for each choice of them.

    Parameters
    ----------
    frame : DataFrame of ``sweep_masks`` with ``groups``
    save : str, optional

    Raises
    ------
    ValueError
        If the frame has no groups.
    """
    groups = [group for group in frame["group"].unique() if group != "all"]
    if not groups:
        raise ValueError("There are no groups to draw: call sweep_masks(..., groups=[a name for each class]).")
    fig, axes = panels(groups, 1.95, 5, "latents k", sharex=True)
    for ax, group in zip(axes, groups, strict=True):
        part = frame[frame["group"] == group]
        ks = _curves(ax, part, "off", None, list(_CHOICES), "where", {"all": ("", "-")})
        ax.set_title(f"{pretty(group)} ({part['n'].iloc[0]:.0f})", fontsize=9, weight="normal")
        ax.set(ylim=(0, 1), xticks=range(0, len(ks), 2), xticklabels=[f"{k:,}" for k in ks[::2]])
    fig.suptitle(f"{_MODES['off']}: zero-shot accuracy", x=0.01, ha="left", fontsize=11, weight="bold")
    legend(fig, axes)
    return style.save(fig, save)


def _sweep(frame: pd.DataFrame, choose: Sequence[str], column: str, lines: Mapping[str, tuple], save: str | None) -> Figure:
    """On and off side by side, the error term dropped and kept below each other; a colour for each choice, a line style for each value of one column."""
    frame = frame[frame["group"] == "all"]
    rows = frame[frame["choose"].isin(choose)].drop_duplicates(["error", "mode"])[["error", "mode"]].itertuples(index=False)
    pairs = sorted(rows, key=lambda pair: (pair.error, list(_MODES).index(pair.mode)))
    height = 3.4 if len(pairs) < 3 else 2.8
    fig, axes = panels(
        [f"{_MODES[mode]}, error {error}" for error, mode in pairs], height, 2, "latents k", "zero-shot accuracy", sharex=True
    )
    for ax, (error, mode) in zip(axes, pairs, strict=True):
        _curves(ax, frame, mode, error, choose, column, lines)
        ax.set_ylim(0, None)
    legend(fig, axes, ncols=4 if len(lines) < 2 else 3)
    return style.save(fig, save)


def _curves(
    ax: Axes, frame: pd.DataFrame, mode: str, error: str | None, choose: Sequence[str], column: str, lines: Mapping[str, tuple]
) -> list[int]:
    """Accuracy with its interval over k, and without any mask; ks stand at equal distances. Returns them."""
    for unmasked, (label, dashes) in _UNMASKED.items():
        if unmasked == "raw" or error == "dropped":
            row = frame[frame["mode"] == unmasked].iloc[0]
            ax.axhspan(row["low"], row["high"], color=COLORS["black"], alpha=0.07, lw=0)
            ax.axhline(row["accuracy"], color=COLORS["black"], lw=1.1, ls=dashes, label=label)
    rows = frame[(frame["mode"] == mode) & (frame["error"] == (error or frame["error"]))]
    if column != "rank":
        ranks = rows.loc[rows["rank"] != "none", "rank"]
        rows = rows[rows["rank"].isin(["none", *ranks.iloc[:1]])]  # of several rankings the first; random latents have none
    ks = sorted(rows["k"].unique())
    for (name, (label, color)), (value, (words, dashes)) in product(_CHOICES.items(), lines.items()):
        part = rows[(rows["choose"] == name) & (rows[column] == value)].sort_values("k")
        if name in choose and len(part):
            band(ax, part, part["k"].map(ks.index), "accuracy", COLORS[color], ls=dashes, label=f"{label}, {words}".removesuffix(", "))
    ax.set_xticks(range(len(ks)), [f"{k:,}" for k in ks])
    ax.yaxis.set_major_formatter(PERCENT)
    return ks


@drawn(frame="DataFrame of ``sweep_masks``; one cluster of bars for each group of classes")
def raw_reconstructed_error(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """What the autoencoder itself costs: accuracy on the raw residual stream, on its reconstruction, and with the error added back."""
    rows = frame[frame["choose"] == "none"]
    places = {row.group: f"{'all classes' if row.group == 'all' else row.group}\n{row.n:.0f} images" for row in rows.itertuples()}
    looks = {"raw": look("gray"), "reconstructed": look("orange"), "error_kept": look("sky", "o", "error kept")}
    fig, ax = style.figure(width=min(1.0, 0.25 + 0.18 * len(places)), height=3.2)
    intervals(ax, rows, "group", "accuracy", "mode", looks, order=places, scale=100, upright=True, bars=True, text="{:.0f}")
    ax.set(title="The autoencoder's own cost", ylabel="zero-shot accuracy (%)")
    legend(fig, ax)
    return style.save(fig, save)


@drawn(
    pictures="sequence of uint8 array [h, w, 3]; what CLIP saw",
    results="sequence of Steered; one a picture, each of a single image (``steer(..., image[None], ...)``) with a head",
    class_names="sequence of str",
    titles="sequence of str; what was done",
    grid="(int, int); rows and columns of patches",
)
def steered(
    pictures: Sequence[np.ndarray], results: Sequence[Any], class_names: Sequence[str], titles: Sequence[str], *, grid: tuple[int, int],
    credit: bool = False, save: str | None = None,
) -> Figure:  # fmt: skip
    """Pictures, where their edited latents were active and what changed there, and the class probabilities before and after."""
    fig, axes = style.figure(height=0.3 + 1.95 * len(pictures), nrows=len(pictures), ncols=3, width_ratios=[1, 1, 2.1], squeeze=False)
    for (left, middle, right), picture, one, title in zip(axes, pictures, results, titles, strict=True):
        style.image_axes(left).imshow(picture)
        left.set_title(textwrap.fill(title, 24), fontsize=10)
        change = (one.activations - one.activations_before)[0].sum(-1).cpu().numpy()
        limit, shown = float(np.abs(change).max()) or 1.0, change[1:].reshape(grid)
        style.image_axes(middle).imshow(picture.mean(-1), cmap="gray", vmin=-120, vmax=300)
        colors = {"cmap": style.DIVERGING, "vmin": -limit, "vmax": limit, "alpha": (np.abs(shown) / limit) ** 0.5}
        middle.imshow(shown, extent=(-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5), **colors)
        middle.set_title(f"change of latents (CLS {change[0]:+.1f})", fontsize=9, weight="normal")
        moved = one.moved(class_names, n=5).sort_values("before", ascending=False)
        before_after(right, moved["class"].tolist(), moved["before"].to_numpy(), moved["after"].to_numpy())
    axes[-1, 2].set_xlabel("zero-shot probability")
    return style.save(fig, save, credit=credit)


@drawn(
    by_concept='DataFrame of ``summarize_effects(frame, ["own", "others"], by=["kind", "concept", "concept_kind"])``, of one k',
    overall='DataFrame of ``summarize_effects(frame, ["own", "others"], by=["kind", "concept_kind"], over="concept")``, of the same k',
)
def concept_specificity(by_concept: pd.DataFrame, overall: pd.DataFrame, save: str | None = None) -> Figure:
    """What turning a concept's latents off does to its own score and to the others of its kind, for every concept, beside a control."""
    fig, (left, right) = style.figure(height=4.1, ncols=2, width_ratios=[1.25, 1])
    own, control = by_concept[by_concept["kind"] == "own"], by_concept[by_concept["kind"] == "control"]
    kinds = [kind for kind in _KINDS if (own["concept_kind"] == kind).any()]
    left.plot(control["others"], control["own"], ".", color=COLORS["gray"], ms=4, label="as active latents off", zorder=3)
    for kind in kinds:
        part, (words, color) = own[own["concept_kind"] == kind], _KINDS[kind]
        error = np.stack([part["own"] - part["own_low"], part["own_high"] - part["own"]]).clip(0)
        left.errorbar(
            part["others"], part["own"], error, fmt="o", ms=4, lw=0.7, alpha=0.7, color=COLORS[color], label=f"{len(part)} {words}"
        )
    low, high = own[["own", "others"]].min().min(), own[["own", "others"]].max().min()
    left.plot([low, high], [low, high], color=COLORS["black"], lw=0.8, ls=":", label="unspecific: all change alike")
    for line in (left.axhline, left.axvline, right.axhline):
        line(0, color=COLORS["black"], lw=0.8)
    left.set(xlabel="mean change of the others of its kind", ylabel="change of its own score")
    left.set_title(f"{len(own)} concepts, each its own latents off")
    rows, words = _long(overall, ["own", "others"]), {kind: _KINDS[kind][0] for kind in kinds}
    looks = {
        "own, own": look("blue", "o", "own latents off: own score"),
        "own, others": look("orange", "o", "own latents off: others of its kind"),
        "control, own": look("gray", "o", "as active latents off: own score"),
    }
    rows["bar"] = rows["kind"] + ", " + rows["measure"]
    intervals(right, rows, "concept_kind", "value", "bar", looks, order=words, upright=True, bars=True)
    right.set(title="Mean over concepts", ylabel="change of the score")
    legend(fig, [left, right], fontsize=8)
    return style.save(fig, save)


def _long(effects: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A row each effect: columns measure, value, low and high beside the others."""
    parts = [effects.assign(measure=name, value=effects[name], low=effects[f"{name}_low"], high=effects[f"{name}_high"]) for name in names]
    return pd.concat(parts, ignore_index=True)


@drawn(table="DataFrame of ``dose_response``", class_names="sequence of str")
def dose_response(table: pd.DataFrame, class_names: Sequence[str], save: str | None = None) -> Figure:
    """Change of the class's logit over the dose of its latent, where the class is shown and where another one is."""
    titles = {"show it": ("Scaled in scenes that show the class", 1.0), "show another": ("Added to scenes of another class", 0.0)}
    fig, axes = panels(
        [title for title, _ in titles.values()], 3.5, xlabel="dose (1: as strong as in a scene of the class)", ylabel="change of the logit"
    )
    for ax, (scenes, (_, untouched)) in zip(axes, titles.items(), strict=True):
        part = table[table["scenes"] == scenes]
        ax.axhline(0, color=COLORS["black"], lw=0.8)
        ax.axvline(untouched, color=COLORS["black"], lw=0.8, ls=":")
        for i, (label, rows) in enumerate(part.groupby("class", sort=False)):
            band(ax, rows, "dose", "own", CYCLE[i % 6], label=pretty(class_names[label]))
        others = part.groupby("dose")["others"].mean()
        ax.plot(others.index, others, color=COLORS["black"], ls="--", lw=1.5, label="other classes (mean)")
    legend(fig, axes)
    return style.save(fig, save)


@drawn(
    tables="mapping of what was edited to DataFrame of ``summarize_effects(..., ['sees_target', 'object_change'], by=['kind', 'dose'])``"
)
def color_swap(tables: Mapping[str, pd.DataFrame], save: str | None = None) -> Figure:
    """How often CLIP sees the other colour after two colours' latents changed places."""
    n = int(next(iter(tables.values()))["n"].iloc[0])
    fig, (left, right) = panels(
        [f"Sees the other colour ({n} scenes)", "What it costs the object"], 3.4, xlabel="dose (1: usual level)", sharey=False
    )
    for (place, table), color in zip(tables.items(), _SWAPS, strict=False):
        for kind, words, dashes in (("own", "own latents", "-"), ("control", "others, as active", "--")):
            rows = table[table["kind"] == kind].sort_values("dose")
            for ax, name in ((left, "sees_target"), (right, "object_change")):
                band(ax, rows, "dose", name, COLORS[color], ls=dashes, label=f"{place}, {words}")
    left.set(ylabel="success rate", ylim=(-0.02, 1))
    left.yaxis.set_major_formatter(PERCENT)
    right.axhline(0, color=COLORS["black"], lw=0.8)
    right.set_ylabel("change of its class's logit")
    legend(fig, left, ncols=2)
    return style.save(fig, save)


@drawn(
    frame="DataFrame of ``remove_objects``",
    overall='DataFrame of ``summarize_effects(frame, ["removed_change", "stays_change"])``',
    dataset="OpenMojiData; the scenes",
    scenes="sequence of int; indices of the examples",
)
def object_removal(frame: pd.DataFrame, overall: pd.DataFrame, dataset: Any, scenes: Sequence[int], save: str | None = None) -> Figure:
    """Scenes of two objects before and after each one's latents are turned off on its own patches; on the right the mean over scenes."""
    fig = style.figure(height=4.6)[0]
    fig.clear()
    *columns, right = fig.subfigures(1, len(scenes) + 1, width_ratios=[*[1] * len(scenes), 1.3])
    names, colors = dataset.class_names, (COLORS["blue"], COLORS["orange"])
    for i, (column, index) in enumerate(zip(columns, scenes, strict=True)):
        top, bottom = column.subplots(2, 1, height_ratios=[1, 0.9])
        first, second = (row for _, row in frame[(frame["kind"] == "own") & (frame["index"] == index)].iterrows())
        image, truth = np.asarray(dataset[index].image), dataset.truth(index)
        style.image_axes(top).imshow(image)
        for which, color in enumerate(colors):
            outline(top, truth.object_share[which] >= 0.5, image.shape[:2], color)
        labels = [pretty(names[row["removed"]]) for row in (first, second)]
        values = {
            labels[0]: [first["removed_before"], first["removed_after"], second["stays_after"]],
            labels[1]: [first["stays_before"], first["stays_after"], second["removed_after"]],
        }
        pd.DataFrame(values, index=["none", "first", "second"]).plot.bar(ax=bottom, color=list(colors), width=0.8, rot=0)
        for tick, color in zip(bottom.get_xticklabels()[1:], colors, strict=True):
            tick.set_color(color)
        bottom.set(ylim=(0, 1.5), yticks=np.linspace(0, 1, 5), xlabel="latents off", ylabel="zero-shot probability" if i == 0 else "")
        bottom.yaxis.set_major_formatter(PERCENT)
        bottom.grid(False, axis="x")
        bottom.legend(loc="upper center", fontsize=8, handlelength=0.8)
    ax = right.subplots()
    places = {"removed_change": "removed\nobject", "stays_change": "other\nobject"}
    looks = {"own": look("red", "o", "its own latents off"), "control": look("gray", "o", "as active ones off")}
    intervals(ax, _long(overall, list(places)), "measure", "value", "kind", looks, order=places, upright=True, bars=True)
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.set(title=f"Mean of {overall['n'].iloc[0]:.0f} scenes", ylabel="change of the logit")
    ax.margins(y=0.2)
    ax.legend(loc="upper center", fontsize=8)
    return style.save(fig, save, credit=True)
