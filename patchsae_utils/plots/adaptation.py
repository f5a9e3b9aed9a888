"""Figures of notebook 05: CLIP against adapted CLIP by accuracy, classes and latents, and what a gain is made of."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from ..adaptation.fit import NAMES
from . import style
from .drawing import colorbar, heat, intervals, legend, look, panels, pretty
from .style import COLORS, drawn

_GROUPS = {"high": COLORS["gray"], "high-to-low": COLORS["orange"], "low-to-high": COLORS["blue"]}
_LINKS = {"stayed": COLORS["gray"], "vanished": COLORS["orange"], "appeared": COLORS["blue"]}
_COMPARISONS = {
    "CLIP and adapted": look("blue"), "CLIP twice, other pictures": look("gray", "s"), "CLIP and adapted, other class": look("orange", "^"),
    "CLIP and adapted, random latents": look("purple", "D"),
}  # fmt: skip
_MEASURES = {"high": "high in both", "high-to-low": "high to low", "low-to-high": "low to high", "jaccard": "Jaccard", "rbo": "rank-biased"}
_FORMS = {"raw": {"marker": "o"}, "reconstructed": {"marker": "s", "markerfacecolor": "white"}, "error kept": {"marker": "x"}}
_DICTIONARIES = {
    "CLIP": look("blue", "o", "SAE of CLIP"), "CLIP, other seed": look("sky", "s", "SAE of CLIP, other seed"),
    "adapted": look("orange", "^", "SAE of the adapted model"),
}  # fmt: skip
_PARTS = {
    "text head": ("text head\n(remapping)", "orange"), "later blocks": ("later blocks\n(remapping)", "yellow"),
    "existing latents": ("existing latents\n(retuning)", "blue"), "outside the dictionary": ("outside dictionary\n(new concepts)", "red"),
    "both": ("whole gain", "black"),
}  # fmt: skip
_TOWERS = {"image tower": look("blue"), "text head": look("orange"), "both": look("gray")}
_KINDS = {
    "zero-shot": ("gray", "o"), "maple": ("blue", "s"), "coop": ("orange", "^"), "vpt": ("green", "D"), "lora": ("purple", "v"),
    "finetune": ("red", "P"), "linear": ("black", "x"),
}  # fmt: skip
_READERS = {"CLIP": "CLIP", "CLIP, adapted head": "CLIP's tower, adapted head", "adapted": "adapted tower and head"}
_MODES = {"on": "only k latents kept", "off": "k latents removed"}


@drawn(table="DataFrame of ``base_to_novel``, of several tasks (column ``task``) under each other")
def adaptation_accuracy(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy on base and novel classes and their harmonic mean, one panel a task; bars are 95 % intervals."""
    table = table.assign(series=table["model"] + ", " + table["form"], half=table["half"].str.replace(" ", "\n"))
    colors = zip(table["model"].unique(), ("gray", "blue", "green", "purple"), strict=False)
    looks = {f"{model}, {form}": look(color, **options) for model, color in colors for form, options in _FORMS.items()}
    fig, axes = panels(list(table["task"].unique()), 3.1, ylabel="accuracy (%)")
    for ax, (_, rows) in zip(axes, table.groupby("task", sort=False), strict=True):
        intervals(ax, rows, "half", "accuracy", "series", looks, scale=100, upright=True, spread=0.7)
        ax.set_ylim(0, 103)
    legend(fig, axes, ncols=3)
    return style.save(fig, save)


@drawn(latents="DataFrame of ``Remapping.latents``, of several tasks (column ``task``) under each other; the groups' threshold is one half")
def class_scatter(latents: pd.DataFrame, save: str | None = None) -> Figure:
    """Each class's top latents: on how many tokens a picture they are active in CLIP, and in the adapted model; one panel a task."""
    counts = latents[["base", "adapted"]].to_numpy()
    largest = float(counts.max()) * 1.6
    floor = max(float(counts[counts > 0].min()), largest / 4000)
    fig, axes = panels(list(latents["task"].unique()), 3.2, xlabel="CLIP", ylabel="adapted: tokens per picture", sharex=True)
    line = np.array([floor / 2, largest])
    for ax, (_, rows) in zip(axes, latents.groupby("task", sort=False), strict=True):
        ax.fill_between(line, 2 * line, largest, color=_GROUPS["low-to-high"], alpha=0.08, lw=0)
        ax.fill_between(line, floor / 2, line / 2, color=_GROUPS["high-to-low"], alpha=0.10, lw=0)
        ax.plot(line, line, color=COLORS["black"], lw=0.8, zorder=1)
        for group, color in _GROUPS.items():
            part = rows[rows["group"] == group]
            ax.scatter(part["base"].clip(floor), part["adapted"].clip(floor), s=11, color=color, alpha=0.7, lw=0, label=group)
        for group, (x, y, ha, va) in {"low-to-high": (0.04, 0.78, "left", "top"), "high-to-low": (0.78, 0.05, "right", "bottom")}.items():
            text = f"{(rows['group'] == group).sum() / rows['class'].nunique():.1f} per class"
            ax.text(x, y, text, transform=ax.transAxes, ha=ha, va=va, color=_GROUPS[group], fontsize=9, fontweight="bold")
        ax.set(xscale="log", yscale="log", xlim=line, ylim=line, box_aspect=1)
        for axis in (ax.xaxis, ax.yaxis):  # over less than a decade matplotlib labels every minor tick, in powers of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 30 * floor else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    legend(fig, axes, ncols=3, markerscale=2)
    return style.save(fig, save)


@drawn(comparisons="DataFrame of ``Remapping.comparisons``, of several tasks (column ``task``) under each other")
def latent_groups(comparisons: pd.DataFrame, save: str | None = None) -> Figure:
    """Latents per class in each group, and the overlap of top latents, beside the controls; bars are 95 % intervals over classes."""
    fig, axes = panels(list(_MEASURES.values()), 1.1 + 0.62 * comparisons["task"].nunique())
    for ax, measure in zip(axes, _MEASURES, strict=True):
        intervals(ax, comparisons[comparisons["measure"] == measure], "task", "value", "comparison", _COMPARISONS)
        overlap = measure in ("jaccard", "rbo")
        ax.set(xlabel="overlap" if overlap else "latents per class", xlim=(-0.02 * ax.get_xlim()[1], 1.04 if overlap else None))
    legend(fig, axes, ncols=2)
    return style.save(fig, save)


@drawn(accuracy="DataFrame of ``Remapping.accuracy``, of several tasks (column ``task``) under each other")
def tower_head_cross(accuracy: pd.DataFrame, save: str | None = None) -> Figure:
    """Every image tower with every text head: accuracy in per cent, with its 95 % interval; one panel a task."""
    accuracy, sides = accuracy[accuracy["form"] == "raw"], {"base": "CLIP", "adapted": "adapted"}
    fig, axes = panels(list(accuracy["task"].unique()), 2.7, xlabel="text head", ylabel="image tower")
    for ax, (_, rows) in zip(axes, accuracy.groupby("task", sort=False), strict=True):
        rows = rows.assign(text=[f"{100 * r.accuracy:.0f} %\n[{100 * r.low:.0f}, {100 * r.high:.0f}]" for r in rows.itertuples()])
        grids = [rows.pivot(index="tower", columns="head", values=name).loc[[*sides], [*sides]] for name in ("accuracy", "text")]
        heat(ax, 100 * grids[0], grids[1], 10, square=True, xticklabels=sides.values(), yticklabels=sides.values())
        ax.set(xlabel="text head", ylabel="image tower" if ax is axes[0] else "")
        ax.tick_params("y", rotation=0)
    colorbar(fig, axes, "accuracy (%)", shrink=0.75)
    return style.save(fig, save)


@drawn(table="DataFrame of ``Remapping.gain_split()``, of several tasks (column ``task``) under each other")
def gain_split(table: pd.DataFrame, save: str | None = None) -> Figure:
    """How many points of the gain each tower brings, with 95 % intervals over pictures."""
    fig, ax = style.figure(width=0.85, height=1.2 + 0.5 * table["task"].nunique())
    intervals(ax, table, "task", "gain", "part", _TOWERS, scale=100, bars=True)
    ax.axvline(0, color=COLORS["black"], lw=0.8)
    ax.set_xlabel("gain over zero-shot CLIP, base classes (points)")
    legend(fig, ax)
    return style.save(fig, save)


@drawn(found="mapping of str to Confusions, by task")
def confusion_change(found: Mapping[str, Any], save: str | None = None) -> Figure:
    """The adapted model's confusion matrix minus CLIP's, one panel a task; classes from the one that gained most to the one that lost most.

    On the diagonal red is gained and blue is lost; elsewhere blue is a confusion resolved and red a new one. The number at a class is how many points of
    accuracy it gained.
    """
    largest = max(len(each.class_names) for each in found.values())
    fig, axes = panels(list(found), 1.35 + 0.18 * largest, 2, ylabel="true class", sharey=False)
    for ax, each in zip(axes, found.values(), strict=True):
        change, names = 100 * each.change[np.ix_(each.order, each.order)], [pretty(each.class_names[i]) for i in each.order]
        gains = np.full(change.shape, "", dtype=object)
        np.fill_diagonal(gains, [f"{gain:.0f}" if gain else "" for gain in np.nan_to_num(change.diagonal())])
        heat(ax, change, gains, 6.5, square=True, cmap=style.DIVERGING, vmin=-60, vmax=60, xticklabels=names, yticklabels=names)
        ax.set_xlabel("taken for")
        ax.tick_params(labelsize=7)
    colorbar(fig, axes, "adapted minus CLIP (% of the class's pictures)", shrink=0.5, extend="both")
    return style.save(fig, save)


@drawn(table="DataFrame of ``masked_predictions`` of one data set")
def prediction_heat(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy of each class from its top k latents: one column a model, one row a mode; under each k the mean over classes."""
    table = table[(table["choose"] == "oracle") & (table["class"] >= 0)]
    heats = {key: 100 * rows.pivot(index="group", columns="k", values="accuracy") for key, rows in table.groupby(["mode", "model"])}
    pairs, order = list(product(_MODES, _READERS)), heats["on", "adapted"].mean(axis=1).sort_values(ascending=False, kind="stable").index
    fig, axes = panels([_READERS[model] if mode == "on" else "" for mode, model in pairs], 0.9 + 0.155 * len(order), 3, size=9.5)
    for ax, (mode, model) in zip(axes, pairs, strict=True):
        rows = heats[mode, model].loc[order]  # best read from few latents first
        heat(ax, rows, xticklabels=[f"{k}\n{mean:.0f} %" for k, mean in rows.mean().items()], yticklabels=[pretty(name) for name in order])
        ax.set(xlabel="", ylabel=_MODES[mode] if model == "CLIP" else "")
        ax.tick_params(labelsize=8)
        ax.tick_params("x", rotation=0)
    fig.supxlabel("latents k of the true class; below, the mean accuracy over classes", fontsize=10)
    colorbar(fig, axes, "accuracy (%)", shrink=0.6)
    return style.save(fig, save)


@drawn(cross="DataFrame of ``Dictionaries.cross``")
def dictionary_cross(cross: pd.DataFrame, save: str | None = None) -> Figure:
    """Each dictionary on the activations of each model: explained variance, active latents, accuracy with the reconstruction; 95 % intervals."""
    titles = {"explained_variance": "explained variance", "l0": "active latents per token", "change": "accuracy change (points)"}
    places = {"CLIP": "activations of\nCLIP", "adapted": "activations of\nthe adapted model"}
    fig, axes = panels(list(titles.values()), 2.5)
    for ax, measure in zip(axes, titles, strict=True):
        rows, scale = cross[cross["measure"] == measure], 100 if measure == "change" else 1
        intervals(ax, rows, "activations", "value", "sae", _DICTIONARIES, order=places, scale=scale)
    legend(fig, axes)
    return style.save(fig, save)


@drawn(parts="DataFrame of ``GainSplit.parts()``, of several models (columns ``task``, ``adapter``) under each other")
def gain_parts(parts: pd.DataFrame, save: str | None = None) -> Figure:
    """The parts of each gain in points of accuracy, one panel a part, with 95 % intervals over pictures."""
    parts = parts.assign(of=parts["task"] + ", " + parts["adapter"])
    fig, axes = panels([title for title, _ in _PARTS.values()], 1.3 + 0.34 * parts["of"].nunique(), size=9.5, sharex=True)
    for ax, (part, (_, color)) in zip(axes, _PARTS.items(), strict=True):
        rows = parts[parts["part"] == part]
        intervals(ax, rows, "of", "gain", "part", {part: look(color)}, order=parts["of"].unique(), scale=100, bars=True)
        ax.axvline(0, color=COLORS["black"], lw=0.8)
    fig.supxlabel("accuracy over zero-shot CLIP, base classes (points)", fontsize=10)
    return style.save(fig, save)


@drawn(experiments="DataFrame of ``GainSplit.experiments()``, of several tasks (column ``task``) under each other")
def gain_experiments(experiments: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy with some parts of the adapted model put into CLIP, or taken out of the adapted model; one panel a task."""
    experiments = experiments.assign(whole=experiments["experiment"].isin(["CLIP", "adapted"]))
    looks = {True: look("black"), False: look("blue")}
    order = experiments["experiment"].unique()
    fig, axes = panels(list(experiments["task"].unique()), 0.9 + 0.27 * len(order), xlabel="accuracy (%)")
    for ax, (_, rows) in zip(axes, experiments.groupby("task", sort=False), strict=True):
        ax.axvspan(*sorted(100 * rows["value"].iloc[[0, -1]]), color=COLORS["gray"], alpha=0.15, lw=0)
        intervals(ax, rows, "experiment", "value", "whole", looks, order=order, scale=100, spread=0)
    return style.save(fig, save)


@drawn()
def class_links(links: pd.DataFrame, save: str | None = None) -> Figure:
    """The remapping matrix: which latents each class rests on, and which of these links stayed, vanished or appeared.

    One row a class, one column a latent; a disc is a link, its area the share of the class's evidence (in the model that has more of it), its
    colour what became of it. Latents stand in the order of the classes that rest on them most, so that links of a class to its own latents
    lie near the diagonal.

    Parameters
    ----------
    links : DataFrame of ``ClassLinks.links()`` of one data set; the three strongest of each class are shown, and these latents' other links
    save : str, optional

    Raises
    ------
    ValueError
        If there are no links.
    """
    if links.empty:
        raise ValueError("There are no links to draw.")
    links = links.assign(size=links[["base", "adapted"]].max(axis=1)).sort_values("size", ascending=False)
    shown = links[links["latent"].isin(links.groupby("class").head(3)["latent"])]
    owner = shown.drop_duplicates("latent").sort_values(["class", "size"], ascending=[True, False])
    column = {latent: i for i, latent in enumerate(owner["latent"])}
    names = links.sort_values("class").drop_duplicates("class").set_index("class")["class_name"].map(pretty)
    fig, ax = style.figure(height=1.5 + 0.24 * len(names))
    largest = float(shown["size"].max())
    for name, color in _LINKS.items():
        part = shown[shown["link"] == name]
        spots = part["latent"].map(column), part["class"].map(names.index.get_loc)
        ax.scatter(*spots, s=150 * part["size"] / largest, color=color, lw=0, zorder=3)
    ax.set(xlabel="latent of CLIP's dictionary", xlim=(-0.8, len(column) - 0.2), ylim=(len(names) - 0.4, -0.6))
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(column)), list(column), rotation=90, fontsize=7)
    disc = {"linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], ms=7, color=color, label=f"{name} ({(shown['link'] == name).sum()})", **disc) for name, color in _LINKS.items()
    ]
    sizes = [share for share in (0.5, 0.2, 0.05) if share <= largest] or [largest]
    handles += [Line2D([], [], ms=np.sqrt(150 * share / largest), color="#CCCCCC", label=f"{share:.0%} of the class's evidence", **disc) for share in sizes]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8.5, handletextpad=0.3, columnspacing=1.2)
    return style.save(fig, save)


@drawn(table="DataFrame of ``load_protocol``")
def adapter_table(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Raw accuracy of every adapter on every task, one panel a half; bars are 95 % intervals over pictures."""
    table = table[table["form"] == "raw"]
    looks = {kind: look(color, marker, NAMES.get(kind, kind)) for kind, (color, marker) in _KINDS.items()}
    halves, tasks = ["base", "novel", "harmonic mean"], table["task"].unique()
    fig, axes = panels(halves, 1.3 + 0.48 * len(tasks), xlabel="accuracy (%)", sharex=True)
    for ax, half in zip(axes, halves, strict=True):
        intervals(ax, table[table["half"] == half], "task", "accuracy", "kind", looks, order=tasks, scale=100, spread=0.82)
    legend(fig, axes, ncols=7)
    return style.save(fig, save)
