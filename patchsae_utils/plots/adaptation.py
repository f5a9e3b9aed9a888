"""Figures of what a gain is made of: its parts, the experiments behind them, the links from latents to classes, the table of adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..adaptation.adapters import NAMES
from .style import COLORS, STYLE, figure
from .style import save as save_figure

PART_COLORS = {
    "text head": COLORS["orange"],
    "later blocks": COLORS["yellow"],
    "existing latents": COLORS["blue"],
    "outside the dictionary": COLORS["red"],
    "both": COLORS["black"],
}
PART_TITLES = {
    "text head": "text head\n(remapping)",
    "later blocks": "later blocks\n(remapping)",
    "existing latents": "existing latents\n(retuning)",
    "outside the dictionary": "outside dictionary\n(new concepts)",
    "both": "whole gain",
}
LINK_COLORS = {"stayed": COLORS["gray"], "vanished": COLORS["orange"], "appeared": COLORS["blue"]}
KIND_LOOKS = {
    "zero-shot": (COLORS["gray"], "o"),
    "maple": (COLORS["blue"], "s"),
    "coop": (COLORS["orange"], "^"),
    "vpt": (COLORS["green"], "D"),
    "lora": (COLORS["purple"], "v"),
    "finetune": (COLORS["red"], "P"),
    "linear": (COLORS["black"], "x"),
}


@rc_context(STYLE)
def gain_parts(parts: pd.DataFrame, save: str | None = None) -> Figure:
    """The parts of each gain in points of accuracy, one panel a part, with 95 % intervals over pictures.

    Parameters
    ----------
    parts : DataFrame
        task, adapter, part, gain, low, high: ``GainSplit.parts()`` of several models under each other.
    save : str, optional
        Name under ``figures/``.
    """
    models = list(dict.fromkeys(zip(parts["task"], parts["adapter"], strict=True)))
    y = np.arange(len(models))
    fig, axes = figure(height=1.3 + 0.34 * len(models), ncols=len(PART_TITLES), sharex=True, sharey=True, squeeze=False)
    for ax, (part, title) in zip(axes[0], PART_TITLES.items(), strict=True):
        rows = parts[parts["part"] == part].set_index(["task", "adapter"]).loc[models]
        bars = 100 * np.stack([rows["gain"] - rows["low"], rows["high"] - rows["gain"]]).clip(0)
        ax.barh(y, 100 * rows["gain"], 0.6, xerr=bars, color=PART_COLORS[part], error_kw={"elinewidth": 1, "ecolor": COLORS["gray"]})
        ax.axvline(0, color=COLORS["black"], linewidth=0.8)
        ax.set_title(title, fontsize=9.5)
        ax.set(yticks=y, yticklabels=[f"{task}, {adapter}" for task, adapter in models])
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("accuracy over zero-shot CLIP, base classes (points)", fontsize=10)
    return save_figure(fig, save)


@rc_context(STYLE)
def gain_experiments(experiments: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy with some parts of the adapted model put into CLIP, or taken out of the adapted model; one panel a task.

    Parameters
    ----------
    experiments : DataFrame
        task, experiment, value, low, high: ``GainSplit.experiments()`` of several data sets under each other.
    save : str, optional
    """
    tasks, names = list(experiments["task"].unique()), list(experiments["experiment"].unique())
    fig, axes = figure(height=0.9 + 0.27 * len(names), ncols=len(tasks), sharey=True, squeeze=False)
    y = np.arange(len(names))
    for ax, task in zip(axes[0], tasks, strict=True):
        rows = experiments[experiments["task"] == task].set_index("experiment").loc[names]
        value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
        ax.axvspan(*sorted((value[0], value[-1])), color=COLORS["gray"], alpha=0.15, linewidth=0)
        for i, name in enumerate(names):
            color = COLORS["black"] if name in ("CLIP", "adapted") else COLORS["blue"]
            ax.errorbar(value[i], y[i], xerr=[[value[i] - low[i]], [high[i] - value[i]]], fmt="o", color=color, elinewidth=1)
        ax.set(title=task, yticks=y, yticklabels=names, xlabel="accuracy (%)")
        ax.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    return save_figure(fig, save)


@rc_context(STYLE)
def class_links(links: pd.DataFrame, per_class: int = 3, save: str | None = None) -> Figure:
    """The remapping matrix: which latents each class rests on, and which of these links stayed, vanished or appeared.

    One row a class, one column a latent; a disc is a link, its area the share of the class's evidence (in the model that has more of it), its
    colour what became of it. Latents stand in the order of the classes that rest on them most, so that links of a class to its own latents
    lie near the diagonal.

    Parameters
    ----------
    links : DataFrame
        class, class_name, latent, base, adapted, link: ``ClassLinks.links()`` of one data set.
    per_class : int
        Strongest links of each class that are shown; a latent shown for one class is shown for all.
    save : str, optional

    Raises
    ------
    ValueError
        If there are no links.
    """
    if links.empty:
        raise ValueError("There are no links to draw.")
    links = links.assign(size=links[["base", "adapted"]].max(axis=1))
    strongest = links.sort_values("size", ascending=False).groupby("class").head(per_class)
    shown = links[links["latent"].isin(strongest["latent"])]
    owner = shown.sort_values("size", ascending=False).drop_duplicates("latent").sort_values(["class", "size"], ascending=[True, False])
    column = {latent: i for i, latent in enumerate(owner["latent"])}
    classes = links.drop_duplicates("class").sort_values("class")
    row = {name: i for i, name in enumerate(classes["class"])}
    fig, ax = figure(height=1.5 + 0.24 * len(row))
    largest = float(shown["size"].max())
    for name, color in LINK_COLORS.items():
        part = shown[shown["link"] == name]
        ax.scatter(
            part["latent"].map(column), part["class"].map(row), s=150 * part["size"] / largest, color=color, linewidths=0, zorder=3
        )  # fmt: skip
    ax.set(
        yticks=range(len(row)),
        yticklabels=[str(name).replace("_", " ") for name in classes["class_name"]],
        xticks=range(len(column)),
        xlabel="latent of CLIP's dictionary",
        xlim=(-0.8, len(column) - 0.2),
        ylim=(len(row) - 0.4, -0.6),
    )
    ax.set_xticklabels([str(latent) for latent in column], rotation=90, fontsize=6)
    counts = shown["link"].value_counts()
    handles = [
        Line2D([], [], linestyle="none", marker="o", markersize=7, color=color, label=f"{name} ({counts.get(name, 0)})")
        for name, color in LINK_COLORS.items()
    ]
    sizes = [share for share in (0.5, 0.2, 0.05) if share <= largest] or [largest]
    handles += [
        Line2D([], [], linestyle="none", marker="o", markersize=np.sqrt(150 * share / largest), color="#CCCCCC", label=f"{share:.0%} of the class's evidence")
        for share in sizes
    ]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8.5, handletextpad=0.3, columnspacing=1.2)
    return save_figure(fig, save)


@rc_context(STYLE)
def adapter_table(table: pd.DataFrame, halves: Sequence[str] = ("base", "novel", "harmonic mean"), save: str | None = None) -> Figure:
    """Raw accuracy of every adapter on every task, one panel a half; bars are 95 % intervals over pictures.

    Parameters
    ----------
    table : DataFrame
        task, kind, form, half, accuracy, low, high: :func:`patchsae_utils.protocol.load_protocol`.
    halves : sequence of str
    save : str, optional
    """
    table = table[table["form"] == "raw"]
    tasks, kinds = list(table["task"].unique()), list(table["kind"].unique())
    fig, axes = figure(height=1.3 + 0.42 * len(tasks), ncols=len(halves), sharex=True, sharey=True, squeeze=False)
    for ax, half in zip(axes[0], halves, strict=True):
        for k, kind in enumerate(kinds):
            rows = table[(table["half"] == half) & (table["kind"] == kind)].set_index("task").reindex(tasks)
            y = np.arange(len(tasks)) + (k - (len(kinds) - 1) / 2) * min(0.12, 0.76 / len(kinds))
            bars = 100 * np.stack([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]).clip(0)
            color, marker = KIND_LOOKS.get(kind, (COLORS["sky"], "*"))
            ax.errorbar(
                100 * rows["accuracy"],
                y,
                xerr=bars,
                color=color,
                marker=marker,
                linestyle="none",
                elinewidth=1,
                label=NAMES.get(kind, kind),
            )
        ax.set(title=half, yticks=range(len(tasks)), yticklabels=[task.removeprefix("openmoji/") for task in tasks], xlabel="accuracy (%)")
        ax.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds))
    return save_figure(fig, save)
