"""What a training step costs, from the JSON of ``python -m benchmarks.sae_step``."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from . import style
from .style import COLORS

_NAMES = {
    "ours": "ours, ReLU", "ours topk": "ours, TopK", "textbook": "dense float32, ReLU", "sparsify": "eai-sparsify, TopK",
    "overcomplete": "overcomplete, TopK", "sae_lens": "sae-lens, TopK",
}  # fmt: skip
_SCALES = {"d_sae": "latents", "tokens": "tokens a step", "target_l0": "active latents a token"}


@mpl.rc_context(style.STYLE)
def step_costs(result: Mapping, save: str | None = None) -> Figure:
    """Seconds of one training step: ours beside the dense step and installable packages, and how it grows with three sizes.

    Parameters
    ----------
    result : mapping
        The benchmark's JSON object: ``rows``, ``hardware``.
    save : str, optional
        Name of the picture in ``figures/``.
    """
    rows = pd.DataFrame(result["rows"])
    rows = rows[rows["seconds"].notna()]
    n_tokens = rows["tokens"].iloc[0]  # the headline's
    fig, axes = style.figure(height=2.9, ncols=4, width_ratios=[1.5, 1, 1, 1])
    sides = rows[rows["kind"].isin(["headline", "peers"]) & (rows["tokens"] == n_tokens) & rows["side"].isin(list(_NAMES))]
    sides = sides.sort_values("seconds", ascending=False)
    colors = [COLORS["blue"] if side.startswith("ours") else COLORS["gray"] for side in sides["side"]]
    bars = axes[0].barh([_NAMES[side] for side in sides["side"]], sides["seconds"], color=colors, height=0.7)
    axes[0].bar_label(bars, [f"{seconds:.2f} s" for seconds in sides["seconds"]], padding=3, fontsize=8.5)
    axes[0].set(title="Seconds a step", xticks=[], xlim=(0, 1.25 * sides["seconds"].max()))
    axes[0].grid(False)
    axes[0].spines["bottom"].set_visible(False)
    axes[0].tick_params(axis="y", length=0, labelcolor=COLORS["black"])
    headline = rows[(rows["kind"] == "headline") & (rows["tokens"] == n_tokens)]
    for ax, (size, label) in zip(axes[1:], _SCALES.items(), strict=True):
        kind = "density" if size == "target_l0" else size
        line = pd.concat([rows[rows["kind"] == kind], rows[rows["kind"] == "headline"] if size == "tokens" else headline])
        for side, color, name in (("textbook", COLORS["gray"], "dense float32"), ("ours", COLORS["blue"], "ours")):
            points = line[line["side"] == side].sort_values(size)
            ax.plot(points[size], points["seconds"], color=color, marker="o", ms=4, label=name)
        ax.set(xscale="log", yscale="log", xlabel=label)
        ends = line[size].agg(["min", "max"]).unique()
        ax.set_xticks(ends, [f"{end / 1000:.3g}k" if end >= 1000 else f"{end:g}" for end in ends])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.sharey(axes[1])
        ax.tick_params(axis="y", labelleft=ax is axes[1])
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    low, high = rows.loc[rows["side"].isin(["textbook", "ours"]), "seconds"].agg(["min", "max"])
    axes[1].set_ylim(low / 1.5, high * 1.5)
    axes[1].legend(loc="upper left", fontsize=8.5)
    axes[1].set_title("... and how they grow")
    return style.save(fig, save)
