"""Figures of what adaptation changed class by class: confusions, predictions from the top k latents; and of dictionaries of both models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..adaptation.confusions import Confusions
from ..adaptation.masked_predictions import MODELS, class_heat
from ..adaptation.own_dictionary import ADAPTED, BASE, OTHER_SEED
from .style import COLORS, DIVERGING, HEAT, STYLE, figure
from .style import save as save_figure

_TOWERS = {"CLIP": "CLIP", "CLIP, adapted head": "CLIP's tower, adapted head", "adapted": "adapted tower and head"}
_MODES = {"on": "only k latents kept", "off": "k latents removed"}
_WHOSE = {ADAPTED: "the adapted model"}
_DICTIONARIES = {BASE: (COLORS["blue"], "o"), OTHER_SEED: (COLORS["sky"], "s"), ADAPTED: (COLORS["orange"], "^")}


@rc_context(STYLE)
def confusion_change(found: Mapping[str, Confusions], save: str | None = None) -> Figure:
    """The adapted model's confusion matrix minus CLIP's, one panel a task; classes from the one that gained most to the one that lost most.

    On the diagonal red is gained and blue is lost; elsewhere blue is a confusion resolved and red a new one. The number at a class is how many points of
    accuracy it gained.

    Parameters
    ----------
    found : mapping of str to Confusions
        By task.
    save : str, optional
        Name under ``figures/``.
    """
    n_columns = min(2, len(found))
    n_rows = -(-len(found) // n_columns)
    largest = max(len(each.class_names) for each in found.values())
    fig, axes = figure(height=n_rows * (1.35 + 0.17 * largest), ncols=n_columns, nrows=n_rows, squeeze=False)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (task, each) in zip(axes.flat, found.items(), strict=False):
        order = each.order
        change = 100 * each.change[np.ix_(order, order)]
        names = [each.class_names[i].replace("_", " ") for i in order]
        picture = ax.imshow(change, cmap=DIVERGING, vmin=-60, vmax=60)
        ax.set(title=task, xticks=range(len(names)), yticks=range(len(names)), yticklabels=names, xlabel="taken for")
        ax.set_xticklabels(names, rotation=90)
        ax.tick_params(labelsize=7, length=0)
        ax.grid(False)
        for i, gain in enumerate(np.nan_to_num(change.diagonal())):
            if gain:
                color = "white" if abs(gain) > 35 else "black"
                ax.text(i, i, f"{gain:+.0f}", ha="center", va="center", fontsize=5.5, color=color)
    for ax in axes[:, 0]:
        ax.set_ylabel("true class")
    fig.colorbar(
        picture, ax=axes.ravel().tolist(), label="adapted minus CLIP (% of the class's pictures)", shrink=0.5, pad=0.01, extend="both"
    )
    return save_figure(fig, save)


@rc_context(STYLE)
def prediction_heat(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Accuracy of each class from its top k latents: one column a model, one row a mode; under each k the mean over classes.

    Parameters
    ----------
    table : DataFrame
        :func:`patchsae_utils.adaptation.masked_predictions.masked_predictions` of one data set.
    save : str, optional
    """
    modes = [mode for mode in _MODES if mode in set(table["mode"])]
    models = [model for model in MODELS if model in set(table["model"])]
    heats = {(mode, model): 100 * class_heat(table, model, mode) for mode in modes for model in models}
    # From the class that the adapted model reads best from few latents to the one it reads worst.
    order = heats[modes[0], models[-1]].mean(axis=1).to_numpy().argsort(kind="stable")[::-1]
    n_classes, ks = len(order), list(heats[modes[0], models[0]].columns)
    # Each panel writes its own means under its axis, so only the classes are shared.
    fig, axes = figure(height=0.9 + len(modes) * (0.5 + 0.15 * n_classes), nrows=len(modes), ncols=len(models), sharey=True, squeeze=False)
    for axis_row, mode in zip(axes, modes, strict=True):
        for ax, model in zip(axis_row, models, strict=True):
            heat = heats[mode, model].iloc[order]
            picture = ax.imshow(heat.to_numpy(), cmap=HEAT, vmin=0, vmax=100, aspect="auto")
            ax.set(xticks=range(len(ks)), yticks=range(n_classes))
            ax.set_yticklabels([str(name).replace("_", " ") for name in heat.index], fontsize=7)
            ax.set_xticklabels([f"{k}\n{mean:.0f} %" for k, mean in heat.mean().items()], fontsize=8)
            ax.tick_params(length=0)
            ax.grid(False)
        axis_row[0].set_ylabel(_MODES[mode])
    for ax, model in zip(axes[0], models, strict=True):
        ax.set_title(_TOWERS[model], fontsize=9.5)
    fig.supxlabel("latents k of the true class; below, the mean accuracy over classes", fontsize=10)
    fig.colorbar(picture, ax=axes.ravel().tolist(), label="accuracy (%)", shrink=0.6, pad=0.01)
    return save_figure(fig, save)


@rc_context(STYLE)
def dictionary_cross(cross: pd.DataFrame, save: str | None = None) -> Figure:
    """Each dictionary on the activations of each model: explained variance, active latents, accuracy with the reconstruction; 95 % intervals.

    Parameters
    ----------
    cross : DataFrame
        ``Dictionaries.cross`` of :mod:`patchsae_utils.adaptation.own_dictionary`.
    save : str, optional
    """
    titles = {"explained_variance": "explained variance", "l0": "active latents a token", "change": "accuracy change (points)"}
    sides = list(cross["activations"].unique())
    fig, axes = figure(height=2.4, ncols=len(titles), squeeze=False, sharey=True)
    for ax, (measure, title) in zip(axes[0], titles.items(), strict=True):
        scale = 100 if measure == "change" else 1
        for i, (name, (color, marker)) in enumerate(_DICTIONARIES.items()):
            rows = cross[(cross["sae"] == name) & (cross["measure"] == measure)].set_index("activations").loc[sides]
            y = np.arange(len(sides)) + (i - 1) * 0.2
            bars = scale * np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(0)
            ax.errorbar(
                scale * rows["value"],
                y,
                xerr=bars,
                color=color,
                marker=marker,
                linestyle="none",
                elinewidth=1,
                label=f"SAE of {_WHOSE.get(name, name)}",
            )
        ax.set(
            title=title,
            yticks=range(len(sides)),
            yticklabels=[f"activations of\n{_WHOSE.get(side, side)}" for side in sides],
        )
        ax.set_ylim(len(sides) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save_figure(fig, save)
