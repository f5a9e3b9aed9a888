"""Figures of the ablations in notebook 02: which choices matter, and what sparsity costs each variant."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from ..variants import VARIANTS
from . import style
from .style import COLORS

_NAMES = {"relu": "ReLU + L1", **VARIANTS}
_LOOKS = {
    "relu": ("blue", "o"), "topk": ("orange", "s"), "batchtopk": ("green", "^"), "matryoshka": ("purple", "v"), "jumprelu": ("red", "D"),
    "gated": ("black", "P"),
}  # fmt: skip
_AXES = {
    "layer": "layer", "expansion": "size", "lambda": "λ", "ghost": "ghost term", "start": "start", "b_dec": "b_dec starts at", "arithmetic": "arithmetic", "tokens": "tokens",
}  # fmt: skip
_MEASURES = {
    "explained_variance_all": "Explained\nvariance",
    "l0_all": "L0",
    "dead_fraction": "Dead\nlatents",
    "zero_shot_change": "Zero-shot\nchange",
    "object_ap": "Object\nAP",
}
_LEAST = 0.6
"""Explained variance below this is written at the edge, so that the rest can be told apart."""


@mpl.rc_context(style.STYLE)
def reconstruction_frontier(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Explained variance, and how well single latents find objects, against the number of active latents: one line a variant.

    Parameters
    ----------
    table : DataFrame
        As :func:`patchsae_utils.ablations.frontier` gives it.
    save : str, optional
        Name of the picture in ``figures/``.
    """
    fig, axes = style.figure(height=3.6, ncols=2)
    for activation, rows in table.groupby("activation", sort=False):
        label, (color, marker) = _NAMES[activation], _LOOKS[activation]
        for ax, measure in zip(axes, ("explained_variance_all", "object_ap"), strict=True):
            if measure in rows:
                errors = np.abs(rows[[f"{measure}_low", f"{measure}_high"]].to_numpy().T - rows[measure].to_numpy())
                ax.errorbar(
                    rows["l0_all"], rows[measure], errors, color=COLORS[color], marker=marker, ms=5, lw=1.4, elinewidth=0.9, label=label
                )
    for ax, title in zip(axes, ("Explained variance of unseen tokens", "Object AP of the best latent"), strict=True):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks([8, 16, 32, 64, 128])
        ax.set(title=title, xlabel="active latents a token (L0)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return style.save(fig, save)


@mpl.rc_context(style.STYLE)
def ablation_effects(table: pd.DataFrame, save: str | None = None) -> Figure:
    """One row an SAE that differs from the main setting in one thing, one column a measure; the gray band spans the main setting's seeds.

    Parameters
    ----------
    table : DataFrame
        As :func:`patchsae_utils.ablations.load_ablations` reads it.
    save : str, optional
    """
    main = table[table["axis"] == "seed"]
    rows = pd.concat([table[table["axis"] == axis] for axis in _AXES if (table["axis"] == axis).any()])
    groups = list(dict.fromkeys(rows["axis"]))
    y = np.arange(len(rows)) + 0.6 * np.array([groups.index(axis) for axis in rows["axis"]])
    measures = {name: title for name, title in _MEASURES.items() if name in table}
    fig, axes = style.figure(height=0.8 + 0.26 * (y[-1] + 1), ncols=len(measures), sharey=True)
    colors = [style.CYCLE[groups.index(axis) % len(style.CYCLE)] for axis in rows["axis"]]
    for ax, (measure, title) in zip(axes, measures.items(), strict=True):
        ax.axvspan(main[measure].min(), main[measure].max(), color=COLORS["gray"], alpha=0.35, lw=0)
        ax.axvline(main[measure].mean(), color=COLORS["gray"], lw=0.9)
        if f"{measure}_low" in rows:
            ax.hlines(y, rows[f"{measure}_low"], rows[f"{measure}_high"], color=colors, lw=1.2)
        ax.scatter(rows[measure], y, c=colors, s=20, zorder=3)
        ax.set_title(title, fontsize=9.5)
        if measure == "explained_variance_all" and rows[measure].min() < _LEAST < main[measure].min():
            ax.set_xlim(_LEAST, None)
            for place, value in zip(y, rows[measure], strict=True):
                if value < _LEAST:
                    ax.annotate(f"\u2190 {value:.0%}", (_LEAST, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8)
        if measure == "l0_all":
            ax.set_xscale("log")
            ax.set_xticks([10, 30, 100])
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
        elif measure != "object_ap":
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_yticks(y, [f"{_AXES[row.axis]} {row.value}" for row in rows.itertuples()])
    axes[0].set_ylim(y[-1] + 0.7, -0.7)
    return style.save(fig, save)
