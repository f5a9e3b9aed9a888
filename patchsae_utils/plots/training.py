"""Figures of notebook 02: how an SAE was trained, how good it is, which choices matter, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import PERCENT, errors, image_rows, intervals, legend, look, panels, plain_log
from .style import COLORS, CYCLE, drawn, figure

_SERIES = ("blue", "gray", "orange", "green", "purple")
_TOKENS = {"cls": "CLS", "patch": "patches", "all": "all tokens"}
_VARIANTS = {
    "relu": look("blue", "o", "ReLU + L1"), "topk": look("orange", "s", "TopK"), "batchtopk": look("green", "^", "BatchTopK"),
    "matryoshka": look("purple", "v", "Matryoshka"), "jumprelu": look("red", "D", "JumpReLU"), "gated": look("black", "P"),
    "paper": look("sky", "X", "paper's recipe"),
}  # fmt: skip
_AXES = {
    "layer": "layer", "expansion": "size", "paper": "paper,", "start": "start:", "dead": "dead latents:", "units": "units:", "rate": "rate:",
    "tokens": "tokens:", "constraint": "decoder:",
}  # fmt: skip
_MEASURES = {
    "object_ap": "Object\nAP", "explained_variance_all": "Explained\nvariance", "l0_all": "L0", "dead_fraction": "Dead\nlatents",
    "zero_shot_change": "Zero-shot\nchange",
}  # fmt: skip
_LEAST = 0.6  # explained variance below this is written at the edge, so that the rest can be told apart
_SIDES = {
    "ours": "ours, ReLU", "ours topk": "ours, TopK", "textbook": "dense float32, ReLU", "sparsify": "eai-sparsify, TopK",
    "overcomplete": "overcomplete, TopK", "sae_lens": "sae-lens, TopK",
}  # fmt: skip


@drawn(log="DataFrame of ``training_log``")
def training_curves(log: pd.DataFrame) -> Figure:
    """Loss with its terms, L0, centred explained variance and dead latents over the tokens seen."""
    titles = ["Loss", "Active latents per token (L0)", "Explained, and dead"]
    fig, (loss, l0, shares) = panels(titles, 2.9, xlabel="million tokens", sharey=False)
    lines = [
        (loss, "loss", "total", "black"), (loss, "mse", "squared error", "blue"), (loss, "l1", "λ · L1", "orange"), (l0, "l0", None, "blue"),
        (shares, "explained_variance", "explained variance", "green"), (shares, "dead_fraction", "dead latents", "red"),
    ]  # fmt: skip
    millions, ghost = log["tokens"] / 1e6, log["ghost"].where(log["ghost"] > 0)
    for ax, column, label, color in lines:
        ax.plot(millions, log[column], color=COLORS[color], label=label, lw=1.2)
        if ax is not loss:
            last = log[column].iloc[-1]
            text, spot = f"{last:.0f}" if ax is l0 else f"{last:.1%}", (millions.iloc[-1], last)
            ax.annotate(text, spot, (-4, 6), textcoords="offset points", ha="right")
    if ghost.notna().any():
        loss.plot(millions, ghost, color=COLORS["purple"], label="ghost", ls="none", marker=".", ms=2)
    loss.set_ylim(0, log["loss"].iloc[1:].max() * 1.4)
    loss.legend(loc="upper right", ncols=2, columnspacing=0.8, handlelength=1.2)
    l0.set_ylim(0, log["l0"].iloc[1:].max() * 1.15)
    shares.set_ylim(-0.02, 1.04)
    shares.yaxis.set_major_formatter(PERCENT)
    shares.legend(loc="center right")
    return fig


@drawn(evaluation="DataFrame of ``evaluate_sae``, the trained SAE first")
def reconstruction_quality(evaluation: pd.DataFrame) -> Figure:
    """Explained variance by token type, and the accuracy of a CLIP whose residual stream goes through each SAE."""
    fig, (left, right) = figure(height=3.1, ncols=2, width_ratios=[1, 1.35])
    looks = {name: look(color) for name, color in zip(evaluation["sae"].unique(), _SERIES, strict=False)}
    accuracy = evaluation[evaluation["metric"] == "zero_shot_top1"]
    explained, replaced = evaluation[evaluation["metric"] == "explained_variance"], accuracy[accuracy["variant"] == "reconstruction"]
    intervals(left, explained, "tokens", "value", "sae", looks, order=_TOKENS, upright=True, bars=True)
    left.axhline(0, color=COLORS["black"], lw=0.8)
    for ax, title in ((left, "Explained variance, centred"), (right, "Zero-shot accuracy with tokens replaced by the SAE")):
        ax.set_title(title)
        ax.yaxis.set_major_formatter(PERCENT)
    if accuracy.empty:  # of a model without a text tower, or images without labels
        right.remove()
        legend(fig, left, ncols=len(looks))
        return fig
    places = {token: f"{name}\nreplaced" for token, name in _TOKENS.items()} | {"kept": "all replaced,\nerror kept"}
    intervals(right, replaced, "tokens", "value", "sae", looks, order=places, upright=True, bars=True)
    raw, kept = (accuracy[accuracy["variant"] == variant].iloc[0] for variant in ("raw", "error_kept"))
    right.axhspan(raw["low"], raw["high"], color=COLORS["black"], alpha=0.12, lw=0)
    right.axhline(raw["value"], color=COLORS["black"], lw=1.2, label="CLIP as it is")
    right.plot(len(_TOKENS), kept["value"], "D", color=COLORS["black"], ms=6)
    right.set_ylim(0, None)
    legend(fig, right, ncols=len(looks) + 1)
    return fig


@drawn(rates="mapping of str to Tensor [S], shares of tokens on which each latent fires", n_tokens="int; tokens they were counted on")
def firing_rates(rates: Mapping[str, Tensor], n_tokens: int) -> Figure:
    """How often latents fire: a histogram of the log of each latent's rate, those that never fire apart on the left."""
    fig, ax = figure(0.75, 3.0)
    lowest = np.floor(np.log10(1 / n_tokens))
    for (name, rate), color in zip(rates.items(), _SERIES, strict=False):
        rows = pd.DataFrame({"rate": np.log10(rate[rate > 0].double().numpy()), "share": 1 / len(rate)})
        bars: dict[str, Any] = {"element": "step", "color": COLORS[color], "alpha": 0.5, "label": name}
        sns.histplot(rows, x="rate", weights="share", bins=44, binrange=(lowest, 0), ax=ax, **bars)
        ax.bar(lowest - 0.8, float((rate == 0).double().mean()), 0.4, color=COLORS[color], alpha=0.6)
    ticks = np.arange(lowest, 1)
    ax.set_xticks([lowest - 0.8, *ticks], ["never", *(f"$10^{{{int(t)}}}$" for t in ticks)])
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="share of tokens on which a latent fires", ylabel="latents", title="How often latents fire")
    ax.legend()
    return fig


@drawn(credit=True, l0="Tensor [n, rows, columns], latents of each patch", error="Tensor [n, rows, columns], relative to its norm")
def patch_maps(images: Sequence, l0: Tensor, error: Tensor) -> Figure:
    """Pictures, and under each how many latents every patch has and how large its error is."""
    return image_rows({"picture": images, "active latents": l0, "error / norm": error}, scaled=True)[0]


@drawn(table="DataFrame of ``frontier``")
def reconstruction_frontier(table: pd.DataFrame) -> Figure:
    """Explained variance, and how well single latents find objects, against the number of active latents: one line a variant."""
    titles = {"explained_variance_all": "Explained variance of unseen tokens", "object_ap": "Object AP of the best latent"}
    fig, axes = panels([*titles.values()], 3.6, xlabel="active latents per token (L0)", sharey=False)
    for variant, rows in table.groupby("variant", sort=False):
        for ax, measure in zip(axes, titles, strict=True):
            how = {"lw": 1.4, "elinewidth": 0.9, "label": variant, **_VARIANTS[variant]}
            ax.errorbar(rows["l0_all"], rows[measure], errors(rows, measure), **how)
    for ax in axes:
        ax.set_xscale("log")
        plain_log(ax.xaxis, [2, 4, 8, 16, 32, 64, 128])
    axes[0].yaxis.set_major_formatter(PERCENT)
    legend(fig, axes, ncols=6)
    return fig


@drawn(table="DataFrame of ``load_ablations``")
def ablation_effects(table: pd.DataFrame) -> Figure:
    """One row an SAE that differs from the main setting in one thing, what changes the object AP most on top; one column a measure."""
    main = table[table["axis"] == "seed"]
    rows = table.assign(place=[f"{_AXES.get(row.axis, row.axis)} {row.value}" for row in table.itertuples()])
    effect = (rows["object_ap"] - main["object_ap"].mean()).abs().groupby(rows["axis"]).max().sort_values(ascending=False)
    axes_of = [axis for axis in effect.index if axis in _AXES]
    rows = rows[rows["axis"].isin(axes_of)]
    order = {"main": f"main setting, {len(main)} seeds"}
    for axis in axes_of:  # groups with an empty line between them
        order |= {axis: ""} | {place: place for place in rows.loc[rows["axis"] == axis, "place"]}
    measures = {name: title for name, title in _MEASURES.items() if name in table}
    fig, axes = panels([*measures.values()], 0.8 + 0.25 * len(order))
    looks = {axis: {"color": CYCLE[i % len(CYCLE)], "marker": "o"} for i, axis in enumerate(axes_of)}
    for ax, measure in zip(axes, measures, strict=True):
        ax.axvspan(main[measure].min(), main[measure].max(), color=COLORS["gray"], alpha=0.35, lw=0)
        ax.axvline(main[measure].mean(), color=COLORS["gray"], lw=0.9)
        between = (f"{measure}_low", f"{measure}_high") if f"{measure}_low" in rows else (measure, measure)
        intervals(ax, rows, "place", measure, "axis", looks, order=order, between=between, spread=0)
        ax.plot(main[measure], [0] * len(main), "|", color=COLORS["black"], ms=9)
        if measure == "l0_all":
            ax.set_xscale("log")
            plain_log(ax.xaxis, [10, 30, 100])
        elif measure != "object_ap":
            ax.xaxis.set_major_formatter(PERCENT)
        if measure == "explained_variance_all" and rows[measure].min() < _LEAST < main[measure].min():
            ax.set_xlim(_LEAST, None)
            for place, value in rows[rows[measure] < _LEAST].set_index("place")[measure].items():
                spot = (_LEAST, list(order).index(place))
                ax.annotate(f"← {value:.0%}", spot, (4, 0), textcoords="offset points", va="center", fontsize=8)
    return fig


@drawn(result="mapping; the JSON object of ``python -m benchmarks.sae_step``: ``rows``")
def step_costs(result: Mapping[str, Any]) -> Figure:
    """Seconds of one training step: ours beside the dense step and installable packages."""
    rows = pd.DataFrame(result["rows"]).dropna(subset="seconds")
    sides = rows[rows["kind"].isin(["headline", "peers"]) & (rows["tokens"] == rows["tokens"].iloc[0]) & rows["side"].isin([*_SIDES])]
    sides = sides.sort_values("seconds", ascending=False)
    fig, ax = figure(0.8, 0.7 + 0.3 * len(sides))
    colors = [COLORS["blue" if side.startswith("ours") else "gray"] for side in sides["side"]]
    ax.bar_label(ax.barh(sides["side"].map(_SIDES), sides["seconds"], color=colors, height=0.7), fmt="%.2f s", padding=3)
    ax.set(title="Seconds per step", xticks=[], xlim=(0, 1.15 * sides["seconds"].max()))
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    return fig
