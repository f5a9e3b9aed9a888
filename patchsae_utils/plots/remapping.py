"""Figures of CLIP against adapted CLIP: accuracy, class-level scatter, groups of latents, towers crossed with heads, the gain split."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..adaptation.compare import OVERLAPS
from .style import COLORS, HEAT, STYLE, figure
from .style import save as save_figure

GROUP_COLORS = {"high": COLORS["gray"], "high-to-low": COLORS["orange"], "low-to-high": COLORS["blue"]}
COMPARISON_LOOKS = {
    "CLIP and adapted": (COLORS["blue"], "o"),
    "CLIP twice, other pictures": (COLORS["gray"], "s"),
    "CLIP and adapted, other class": (COLORS["orange"], "^"),
    "CLIP and adapted, random latents": (COLORS["purple"], "D"),
}


@rc_context(STYLE)
def adaptation_accuracy(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy on base and novel classes and their harmonic mean, one panel a task; bars are 95 % intervals.

    Parameters
    ----------
    table : DataFrame
        task, model, form, half, accuracy, low, high: tables of :func:`patchsae_utils.adaptation.compare.base_to_novel` under each other.
    save : str, optional
        Name under ``figures/``.
    """
    tasks, models, halves = (list(table[column].unique()) for column in ("task", "model", "half"))
    looks = {"raw": dict(marker="o"), "reconstructed": dict(marker="s", markerfacecolor="white"), "error kept": dict(marker="x")}
    fig, axes = figure(height=3.0, ncols=len(tasks), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for m, model in enumerate(models):
            color = [COLORS["gray"], COLORS["blue"], COLORS["green"], COLORS["purple"]][m % 4]
            for f, (form, look) in enumerate(looks.items()):
                rows = table[(table["task"] == task) & (table["model"] == model) & (table["form"] == form)].set_index("half").loc[halves]
                x = np.arange(len(halves)) + (m - (len(models) - 1) / 2) * 0.42 + (f - 1) * 0.11
                bars = 100 * np.stack([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]).clip(0)
                ax.errorbar(x, 100 * rows["accuracy"], bars, color=color, linestyle="none", elinewidth=1, label=f"{model}, {form}", **look)
        ax.set(title=task, xticks=range(len(halves)), xticklabels=[half.replace(" ", "\n") for half in halves], ylim=(0, 103))
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("accuracy (%)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save_figure(fig, save)


@rc_context(STYLE)
def class_scatter(latents: pd.DataFrame, low: float = 0.5, save: str | None = None) -> Figure:
    """Each class's top latents: on how many tokens a picture they are active in CLIP, and in the adapted model; one panel a task.

    Parameters
    ----------
    latents : DataFrame
        task, class, base, adapted, group: ``Remapping.latents`` of several data sets under each other.
    low : float
        The threshold that the groups were made with.
    save : str, optional
    """
    tasks = list(latents["task"].unique())
    largest = float(latents[["base", "adapted"]].to_numpy().max()) * 1.6
    positive = latents[["base", "adapted"]].to_numpy()
    floor = max(float(positive[positive > 0].min()), largest / 4000)
    fig, axes = figure(height=3.1, ncols=len(tasks), sharex=True, sharey=True, squeeze=False)
    line = np.array([floor / 2, largest])
    for ax, task in zip(axes[0], tasks, strict=True):
        rows = latents[latents["task"] == task]
        ax.fill_between(line, line / low, largest, color=GROUP_COLORS["low-to-high"], alpha=0.08, linewidth=0)
        ax.fill_between(line, floor / 2, line * low, color=GROUP_COLORS["high-to-low"], alpha=0.10, linewidth=0)
        ax.plot(line, line, color=COLORS["black"], linewidth=0.8, zorder=1)
        for group, color in GROUP_COLORS.items():
            part = rows[rows["group"] == group]
            ax.scatter(part["base"].clip(floor), part["adapted"].clip(floor), s=11, color=color, alpha=0.7, linewidths=0, label=group)
        n_classes = rows["class"].nunique()
        for group, (x, y, align) in {"low-to-high": (0.04, 0.78, "left"), "high-to-low": (0.78, 0.05, "right")}.items():
            text = f"{(rows['group'] == group).sum() / n_classes:.1f} a class"
            vertical = "top" if y > 0.5 else "bottom"
            ax.text(x, y, text, transform=ax.transAxes, ha=align, va=vertical, color=GROUP_COLORS[group], fontsize=9, fontweight="bold")
        ax.set(title=task, xscale="log", yscale="log", xlim=line, ylim=line, xlabel="CLIP: tokens a picture")
        ax.set_box_aspect(1)
        for axis in (ax.xaxis, ax.yaxis):  # over less than a decade matplotlib labels every minor tick, in powers of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 30 * floor else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("adapted: tokens a picture")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
    return save_figure(fig, save)


@rc_context(STYLE)
def latent_groups(comparisons: pd.DataFrame, save: str | None = None) -> Figure:
    """Latents per class in each group, and the overlap of top latents, beside the controls; bars are 95 % intervals over classes.

    Parameters
    ----------
    comparisons : DataFrame
        task, comparison, measure, value, low, high: ``Remapping.comparisons`` of several data sets under each other.
    save : str, optional
    """
    tasks = list(comparisons["task"].unique())
    titles = {
        "high": "high in both",
        "high-to-low": "high to low",
        "low-to-high": "low to high",
        "jaccard": "Jaccard",
        "rbo": "rank-biased",
    }
    fig, axes = figure(height=0.9 + 0.62 * len(tasks), ncols=len(titles), sharey=True, squeeze=False)
    names = [name for name in COMPARISON_LOOKS if name in set(comparisons["comparison"])]
    for ax, (measure, title) in zip(axes[0], titles.items(), strict=True):
        for i, name in enumerate(names):
            color, marker = COMPARISON_LOOKS[name]
            rows = comparisons[(comparisons["comparison"] == name) & (comparisons["measure"] == measure)].set_index("task").reindex(tasks)
            y = np.arange(len(tasks)) + (i - (len(names) - 1) / 2) * 0.18
            bars = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(0)
            ax.errorbar(rows["value"], y, xerr=bars, color=color, marker=marker, linestyle="none", elinewidth=1, label=name)
        ax.set(
            title=title,
            xlabel="latents a class" if measure not in OVERLAPS else "overlap",
            yticks=range(len(tasks)),
            yticklabels=tasks,
        )
        ax.set_xlim(left=-0.02 * (ax.get_xlim()[1]), right=None if measure not in OVERLAPS else 1.04)
        ax.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return save_figure(fig, save)


@rc_context(STYLE)
def tower_head_cross(accuracy: pd.DataFrame, form: str = "raw", save: str | None = None) -> Figure:
    """Every image tower with every text head: accuracy in per cent, with its 95 % interval; one panel a task.

    Parameters
    ----------
    accuracy : DataFrame
        task, tower, head, form, accuracy, low, high: ``Remapping.accuracy`` of several data sets under each other.
    form : {"raw", "reconstructed", "error kept"}
    save : str, optional
    """
    tasks, sides = list(accuracy["task"].unique()), ["base", "adapted"]
    chosen = accuracy[accuracy["form"] == form]
    fig, axes = figure(height=2.7, ncols=len(tasks), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        rows = chosen[chosen["task"] == task].set_index(["tower", "head"])
        values = np.array([[100 * rows.loc[(tower, head), "accuracy"] for head in sides] for tower in sides])
        picture = ax.imshow(values, cmap=HEAT, vmin=0, vmax=100)
        for i, tower in enumerate(sides):
            for j, head in enumerate(sides):
                row = rows.loc[(tower, head)]
                color = "white" if values[i, j] < 60 else "black"
                ax.text(j, i - 0.08, f"{values[i, j]:.0f} %", ha="center", va="center", color=color, fontsize=13, fontweight="bold")
                ax.text(j, i + 0.2, f"[{100 * row['low']:.0f}, {100 * row['high']:.0f}]", ha="center", va="center", color=color, fontsize=8)
        ax.set(
            title=task, xticks=[0, 1], yticks=[0, 1], xticklabels=["CLIP", "adapted"], yticklabels=["CLIP", "adapted"], xlabel="text head"
        )
        ax.grid(False)
    axes[0, 0].set_ylabel("image tower")
    fig.colorbar(picture, ax=axes[0].tolist(), label="accuracy (%)", shrink=0.75, pad=0.01)
    return save_figure(fig, save)


@rc_context(STYLE)
def gain_split(table: pd.DataFrame, save: str | None = None) -> Figure:
    """How many points of the gain each tower brings, with 95 % intervals over pictures.

    Parameters
    ----------
    table : DataFrame
        task, part, gain, low, high: ``Remapping.gain_split()`` of several data sets under each other.
    save : str, optional
    """
    tasks, parts = list(table["task"].unique()), list(table["part"].unique())
    colors = {"image tower": COLORS["blue"], "text head": COLORS["orange"], "both": COLORS["gray"]}
    fig, ax = figure(width=0.8, height=1.0 + 0.5 * len(tasks))
    for i, part in enumerate(parts):
        rows = table[table["part"] == part].set_index("task").loc[tasks]
        y = np.arange(len(tasks)) + (i - (len(parts) - 1) / 2) * 0.26
        bars = 100 * np.stack([rows["gain"] - rows["low"], rows["high"] - rows["gain"]]).clip(0)
        ax.barh(
            y, 100 * rows["gain"], 0.24, xerr=bars, color=colors[part], error_kw={"elinewidth": 1, "ecolor": COLORS["black"]}, label=part
        )
    ax.axvline(0, color=COLORS["black"], linewidth=0.8)
    ax.set(yticks=range(len(tasks)), yticklabels=tasks, xlabel="gain over zero-shot CLIP, base classes (points)")
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return save_figure(fig, save)
