"""Figures of the ablation table in notebook 03: latents by layer, and the SAE's variants beside the baselines."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import COLORS, STYLE, figure
from .style import save as save_figure

_TITLES = {"log_frequency": "log10 frequency", "log_mean_activation": "log10 mean activation", "label_entropy": "label entropy (nats)"}


def by_layer(rows: pd.DataFrame, save: str | None = None) -> Figure:
    """Statistics of living latents by layer (dot: median; bars: middle half, and from the 10th to the 90th percentile), and object AP.

    Parameters
    ----------
    rows : DataFrame
        :func:`patchsae_utils.variants.by_layer`.
    save : str, optional
        Name under ``figures/``.
    """
    layers, colors = rows["layer"], [COLORS["red"] if main else COLORS["blue"] for main in rows["main"]]
    with plt.rc_context(STYLE):
        fig, axes = figure(height=2.7, ncols=len(_TITLES) + 1)
        for ax, (name, title) in zip(axes, _TITLES.items(), strict=False):
            ax.vlines(layers, rows[f"{name}_q10"], rows[f"{name}_q90"], color=colors, linewidth=1.3)
            ax.vlines(layers, rows[f"{name}_q25"], rows[f"{name}_q75"], color=colors, linewidth=5, alpha=0.55)
            ax.scatter(layers, rows[f"{name}_q50"], color=colors, s=22, zorder=3)
            ax.set_title(title, fontsize=9.5)
        axes[-1].vlines(layers, rows["object_ap_low"], rows["object_ap_high"], color=colors, linewidth=1.6)
        axes[-1].scatter(layers, rows["object_ap"], color=colors, s=22, zorder=3)
        axes[-1].set_title("object AP, 95 % interval", fontsize=9)
        axes[-1].set_ylim(bottom=0)
        for ax in axes:
            ax.set_xticks(layers)
            ax.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
            ax.grid(axis="x", visible=False)
        fig.supxlabel("layer (block whose output is read); red: the layer of this notebook", fontsize=9)
    return save_figure(fig, save)


def variants(rows: pd.DataFrame, baselines: pd.DataFrame | None = None, save: str | None = None) -> Figure:
    """How well the best latent finds objects: variants of the SAE, and below a line the dictionaries of the comparison.

    Parameters
    ----------
    rows : DataFrame
        :func:`patchsae_utils.variants.nearest_variants`.
    baselines : DataFrame, optional
        ``ComparisonReport.table()``; its rows of objects that are no SAE are shown, best first.
    save : str, optional
    """
    shown = [
        (f"{row.dictionary}  (L0 {row.l0:.0f})", row.object_ap, row.object_ap_low, row.object_ap_high, _color(row.dictionary))
        for row in rows.itertuples()
    ]
    n_saes = len(shown)
    if baselines is not None:
        others = baselines[(baselines["kind"] == "object") & (baselines["role"] != "sae")].sort_values("ap", ascending=False)
        shown += [(row.dictionary, row.ap, row.low, row.high, COLORS["gray"]) for row in others.itertuples()]
    y = [i + 0.6 * (i >= n_saes) for i in range(len(shown))]
    with plt.rc_context(STYLE):
        fig, ax = figure(width=0.85, height=0.24 * len(shown) + 1.0)
        for at, (_, value, low, high, color) in zip(y, shown, strict=True):
            ax.hlines(at, low, high, color=color, linewidth=2)
            ax.plot(value, at, "o", color=color, markersize=5.5)
            ax.annotate(f"{value:.2f}", (high, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
        if len(shown) > n_saes:
            ax.axhline(n_saes - 0.2, color="#4D4D4D", linewidth=0.8)
        ax.set_yticks(y, [label for label, *_ in shown])
        ax.set(xlim=(0, min(1.0, 1.15 * max(high for *_, high, _ in shown))), xlabel="object AP of the best feature (95 % interval)")
        ax.set_ylim(y[-1] + 0.6, -0.6)
        ax.grid(axis="y", visible=False)
    return save_figure(fig, save)


def _color(name: str) -> str:
    return COLORS["red"] if name.startswith("PatchSAE") else COLORS["green"] if name.endswith("alone") else COLORS["blue"]
