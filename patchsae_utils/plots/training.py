"""Figures of notebook 02: how an SAE was trained, how good it is, which choices matter, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator, PercentFormatter
from torch import Tensor

from . import style
from .drawing import PERCENT, intervals, legend, look, panels, plain_log
from .style import COLORS, CYCLE, drawn

_SERIES = ("blue", "gray", "orange", "green", "purple")
_TOKENS = {"cls": "CLS", "patch": "patches", "all": "all tokens"}
_VARIANTS = {
    "relu": ("ReLU + L1", "blue", "o"), "topk": ("TopK", "orange", "s"), "batchtopk": ("BatchTopK", "green", "^"),
    "matryoshka": ("Matryoshka", "purple", "v"), "jumprelu": ("JumpReLU", "red", "D"), "gated": ("gated", "black", "P"),
}  # fmt: skip
_AXES = {
    "layer": "layer", "expansion": "size", "lambda": "λ", "ghost": "ghost term", "start": "start", "b_dec": "b_dec starts at", "arithmetic": "arithmetic", "tokens": "tokens",
}  # fmt: skip
_MEASURES = {
    "explained_variance_all": "Explained\nvariance", "l0_all": "L0", "dead_fraction": "Dead\nlatents", "zero_shot_change": "Zero-shot\nchange", "object_ap": "Object\nAP",
}  # fmt: skip
_LEAST = 0.6
"""Explained variance below this is written at the edge, so that the rest can be told apart."""
_SIDES = {
    "ours": "ours, ReLU", "ours topk": "ours, TopK", "textbook": "dense float32, ReLU", "sparsify": "eai-sparsify, TopK",
    "overcomplete": "overcomplete, TopK", "sae_lens": "sae-lens, TopK",
}  # fmt: skip
_SIZES = {"d_sae": "latents", "tokens": "tokens per step", "target_l0": "active latents per token"}


@drawn(log="DataFrame of ``training_log``")
def training_curves(log: pd.DataFrame, save: str | None = None) -> Figure:
    """Loss with its terms, L0, centred explained variance and dead latents over the tokens seen."""
    fig, (loss, l0, shares) = panels(
        ["Loss", "Active latents per token (L0)", "Explained, and dead"], 2.9, xlabel="million tokens", sharey=False
    )
    lines = [
        (loss, "loss", "total", "black"), (loss, "mse", "squared error", "blue"), (loss, "l1", "λ · L1", "orange"), (l0, "l0", None, "blue"),
        (shares, "explained_variance", "explained variance", "green"), (shares, "dead_fraction", "dead latents", "red"),
    ]  # fmt: skip
    millions, ghost = log["tokens"] / 1e6, log["ghost"].where(log["ghost"] > 0)
    for ax, column, label, color in lines:
        ax.plot(millions, log[column], color=COLORS[color], label=label, lw=1.2)
        if ax is not loss:
            last = log[column].iloc[-1]
            spot, text = (millions.iloc[-1], last), f"{last:.0f}" if ax is l0 else f"{last:.1%}"
            ax.annotate(text, spot, xytext=(-4, 6), textcoords="offset points", ha="right")
    if ghost.notna().any():
        loss.plot(millions, ghost, color=COLORS["purple"], label="ghost", ls="none", marker=".", ms=2)
    loss.set_ylim(0, log["loss"].iloc[1:].max() * 1.4)
    loss.legend(loc="upper right", ncols=2, columnspacing=0.8, handlelength=1.2)
    l0.set_ylim(0, log["l0"].iloc[1:].max() * 1.15)
    shares.set_ylim(-0.02, 1.04)
    shares.yaxis.set_major_formatter(PERCENT)
    shares.legend(loc="center right")
    return style.save(fig, save)


@drawn(evaluation="DataFrame of ``evaluate_sae``, the trained SAE first")
def reconstruction_quality(evaluation: pd.DataFrame, save: str | None = None) -> Figure:
    """Explained variance by token type, and the accuracy of a CLIP whose residual stream goes through each SAE."""
    fig, (left, right) = style.figure(height=3.1, ncols=2, width_ratios=[1, 1.35])
    looks = {name: look(color) for name, color in zip(evaluation["sae"].unique(), _SERIES, strict=False)}
    accuracy = evaluation[evaluation["metric"] == "zero_shot_top1"]
    explained, replaced = evaluation[evaluation["metric"] == "explained_variance"], accuracy[accuracy["variant"] == "reconstruction"]
    intervals(left, explained, "tokens", "value", "sae", looks, order=_TOKENS, upright=True, bars=True)
    left.axhline(0, color=COLORS["black"], lw=0.8)
    left.set_title("Explained variance, centred")
    left.yaxis.set_major_formatter(PERCENT)
    if accuracy.empty:  # of a model without a text tower
        right.remove()
        legend(fig, left, ncols=len(looks))
        return style.save(fig, save)
    places = {token: f"{name}\nreplaced" for token, name in _TOKENS.items()} | {"kept": "all replaced,\nerror kept"}
    intervals(right, replaced, "tokens", "value", "sae", looks, order=places, upright=True, bars=True)
    raw, kept = (accuracy[accuracy["variant"] == variant].iloc[0] for variant in ("raw", "error_kept"))
    right.axhspan(raw["low"], raw["high"], color=COLORS["black"], alpha=0.12, lw=0)
    right.axhline(raw["value"], color=COLORS["black"], lw=1.2, label="CLIP as it is")
    right.plot(len(_TOKENS), kept["value"], "D", color=COLORS["black"], ms=6)
    right.set_ylim(0, None)
    right.set_title("Zero-shot accuracy with tokens replaced by the SAE")
    right.yaxis.set_major_formatter(PERCENT)
    legend(fig, right, ncols=len(looks) + 1)
    return style.save(fig, save)


@drawn(
    rates="mapping of str to Tensor [S], shares of tokens on which each latent fires",
    n_tokens="int; tokens they were counted on: no rate below 1 / n_tokens can be seen",
)
def firing_rates(rates: Mapping[str, Tensor], n_tokens: int, save: str | None = None) -> Figure:
    """How often latents fire: a histogram of the log of each latent's rate, those that never fire apart on the left."""
    fig, ax = style.figure(0.75, 3.0)
    lowest = np.floor(np.log10(1 / n_tokens))
    for (name, rate), color in zip(rates.items(), _SERIES, strict=False):
        rows = pd.DataFrame({"rate": np.log10(rate[rate > 0].double().numpy()), "share": 1 / len(rate)})
        bars = {"element": "step", "color": COLORS[color], "alpha": 0.5, "label": name}
        sns.histplot(rows, x="rate", weights="share", bins=44, binrange=(lowest, 0), ax=ax, **bars)
        ax.bar(lowest - 0.8, float((rate == 0).double().mean()), 0.4, color=COLORS[color], alpha=0.6)
    ticks = np.arange(lowest, 1)
    ax.set_xticks([lowest - 0.8, *ticks], ["never", *(f"$10^{{{int(t)}}}$" for t in ticks)])
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(xlabel="share of tokens on which a latent fires", ylabel="latents", title="How often latents fire")
    ax.legend()
    return style.save(fig, save)


@drawn(
    images="sequence of PIL images, as CLIP sees them",
    l0="Tensor [n, rows, columns] of ``patch_readings``",
    error="Tensor [n, rows, columns] of ``patch_readings``",
)
def patch_maps(images: Sequence, l0: Tensor, error: Tensor, save: str | None = None, credit: bool = True) -> Figure:
    """Pictures, and under each how many latents every patch has and how large its error is."""
    fig, axes = style.figure(1.0, 1.0 + 9.0 / len(images) * 2.2, nrows=3, ncols=len(images), squeeze=False)
    for row, values, title in zip(axes, (images, l0, error), ("picture", "active latents", "error / norm"), strict=True):
        for ax, each in zip(row, values, strict=True):
            shown = style.image_axes(ax).imshow(
                np.asarray(each), vmin=0, vmax=None if values is images else float(np.asarray(values).max())
            )
        row[0].set_ylabel(title)
        if values is not images:
            fig.colorbar(shown, ax=row, shrink=0.85, aspect=12, pad=0.01).outline.set_visible(False)
    return style.save(fig, save, credit=credit)


@drawn(table="DataFrame of ``frontier``")
def reconstruction_frontier(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Explained variance, and how well single latents find objects, against the number of active latents: one line a variant."""
    titles = {"explained_variance_all": "Explained variance of unseen tokens", "object_ap": "Object AP of the best latent"}
    fig, axes = panels(list(titles.values()), 3.6, xlabel="active latents per token (L0)", sharey=False)
    for activation, rows in table.groupby("activation", sort=False):
        label, color, marker = _VARIANTS[activation]
        for ax, measure in zip(axes, titles, strict=True):
            errors = np.stack([rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure]])
            ax.errorbar(rows["l0_all"], rows[measure], errors, color=COLORS[color], marker=marker, lw=1.4, elinewidth=0.9, label=label)
    for ax in axes:
        ax.set_xscale("log")
        plain_log(ax.xaxis, [8, 16, 32, 64, 128])
    axes[0].yaxis.set_major_formatter(PERCENT)
    legend(fig, axes, ncols=6)
    return style.save(fig, save)


@drawn(table="DataFrame of ``load_ablations``")
def ablation_effects(table: pd.DataFrame, save: str | None = None) -> Figure:
    """One row an SAE that differs from the main setting in one thing, one column a measure; the gray band spans the main setting's seeds."""
    main, axes_of = table[table["axis"] == "seed"], [axis for axis in _AXES if (table["axis"] == axis).any()]
    rows = table.assign(place=[f"{_AXES.get(row.axis, row.axis)} {row.value}" for row in table.itertuples()])
    order: dict[str, str] = {}  # groups with an empty line between them
    for axis in axes_of:
        order |= ({axis: ""} if order else {}) | {place: place for place in rows.loc[rows["axis"] == axis, "place"]}
    measures = {name: title for name, title in _MEASURES.items() if name in table}
    fig, axes = panels(list(measures.values()), 0.8 + 0.25 * len(order))
    looks = {axis: {"color": CYCLE[i % len(CYCLE)], "marker": "o"} for i, axis in enumerate(axes_of)}
    for ax, measure in zip(axes, measures, strict=True):
        ax.axvspan(main[measure].min(), main[measure].max(), color=COLORS["gray"], alpha=0.35, lw=0)
        ax.axvline(main[measure].mean(), color=COLORS["gray"], lw=0.9)
        ends = (f"{measure}_low", f"{measure}_high") if f"{measure}_low" in rows else (measure, measure)
        intervals(ax, rows, "place", measure, "axis", looks, order=order, ends=ends, spread=0)
        if measure == "l0_all":
            ax.set_xscale("log")
            plain_log(ax.xaxis, [10, 30, 100])
        elif measure != "object_ap":
            ax.xaxis.set_major_formatter(PERCENT)
    if "explained_variance_all" in measures and rows["explained_variance_all"].min() < _LEAST < main["explained_variance_all"].min():
        axes[0].set_xlim(_LEAST, None)
        for place, value in rows[rows["explained_variance_all"] < _LEAST].set_index("place")["explained_variance_all"].items():
            axes[0].annotate(
                f"← {value:.0%}", (_LEAST, list(order).index(place)), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    return style.save(fig, save)


@drawn(result="mapping; the JSON object of ``python -m benchmarks.sae_step``: ``rows``")
def step_costs(result: Mapping[str, Any], save: str | None = None) -> Figure:
    """Seconds of one training step: ours beside the dense step and installable packages, and how it grows with three sizes."""
    rows = pd.DataFrame(result["rows"]).dropna(subset="seconds")
    headline = rows[(rows["kind"] == "headline") & (rows["tokens"] == rows["tokens"].iloc[0])]
    sides = rows[rows["kind"].isin(["headline", "peers"]) & (rows["tokens"] == rows["tokens"].iloc[0]) & rows["side"].isin(list(_SIDES))]
    sides = sides.sort_values("seconds", ascending=False)
    fig, (left, *growth) = style.figure(height=2.9, ncols=4, width_ratios=[1.5, 1, 1, 1])
    colors = [COLORS["blue" if side.startswith("ours") else "gray"] for side in sides["side"]]
    bars = left.barh(sides["side"].map(_SIDES), sides["seconds"], color=colors, height=0.7)
    left.bar_label(bars, fmt="%.2f s", padding=3, fontsize=8.5)
    left.set(title="Seconds per step", xticks=[], xlim=(0, 1.25 * sides["seconds"].max()))
    left.grid(False)
    left.spines["bottom"].set_visible(False)
    left.tick_params(axis="y", length=0, labelcolor=COLORS["black"])
    for ax, (size, label) in zip(growth, _SIZES.items(), strict=True):
        kind = "density" if size == "target_l0" else size
        line = pd.concat([rows[rows["kind"] == kind], rows[rows["kind"] == "headline"] if size == "tokens" else headline]).sort_values(size)
        for side, color, name in (("textbook", "gray", "dense float32"), ("ours", "blue", "ours")):
            points = line[line["side"] == side]
            ax.plot(points[size], points["seconds"], color=COLORS[color], marker="o", ms=4, label=name)
        ends = line[size].agg(["min", "max"]).unique()
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.set_xticks(ends, [f"{end / 1000:.3g}k" if end >= 1000 else f"{end:g}" for end in ends])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.sharey(growth[0])
        ax.tick_params(axis="y", labelleft=ax is growth[0])
    low, high = rows.loc[rows["side"].isin(["textbook", "ours"]), "seconds"].agg(["min", "max"])
    growth[0].set(ylim=(low / 1.5, high * 1.5), title="... and how they grow")
    growth[0].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))
    growth[0].yaxis.set_minor_formatter(NullFormatter())
    growth[0].legend(loc="upper left", fontsize=8.5)
    return style.save(fig, save)
