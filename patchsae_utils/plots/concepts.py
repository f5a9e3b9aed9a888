"""Figures of notebook 03 without pictures: statistics of latents, dictionaries against each other, places, names, layers."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .drawing import HALO, PERCENT, band, colorbar, heat, interval_panels, intervals, look, panels
from .style import COLORS, drawn, figure

_OTHERS = (*(COLORS[name] for name in ("orange", "green", "purple", "sky", "red")), "#8B5A2B", COLORS["gray"], COLORS["black"])
_STATISTICS = {"log_frequency": "log10 frequency", "log_mean_activation": "log10 mean activation", "label_entropy": "label entropy (nats)"}
_LOCAL = {"ap": "average precision", "iou": "intersection over union", "pointing": "pointing game"}


@drawn(frame="DataFrame of ``LatentSummary.to_frame()``", annotate="mapping of int to str; latents to point at, and their names")
def latent_statistics(frame: pd.DataFrame, annotate: Mapping[int, str]) -> Figure:
    """How often each latent is active against how strongly, colored by label entropy, where there are labels."""
    fig, ax = figure(height=4.6)
    labelled = frame["label_entropy"].notna().any()
    color = {"c": frame["label_entropy"], "cmap": "viridis"} if labelled else {"color": COLORS["blue"]}
    points = ax.scatter(frame["frequency"], frame["mean_activation"], s=9, alpha=0.8, lw=0, **color)
    if labelled:
        bar = fig.colorbar(points, ax=ax, pad=0.01, label="label entropy (nats)")
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1)
    ax.set(xscale="log", yscale="log", xlabel="activated frequency (share of images)", ylabel="mean activation (over active images)")
    ax.set_title(f"{len(frame):,} living latents")
    at, red = frame.set_index("latent"), {"color": COLORS["red"], "weight": "bold", "path_effects": HALO}
    for i, (letter, (latent, text)) in enumerate(zip(string.ascii_uppercase, annotate.items(), strict=False)):
        place, y = at.loc[latent, ["frequency", "mean_activation"]], 0.97 - 0.055 * i
        ax.scatter(*place, s=50, facecolors="none", edgecolors=COLORS["red"], lw=1.5, zorder=3)
        ax.annotate(letter, place, (-5, 4), textcoords="offset points", ha="right", zorder=4, **red)
        ax.text(0.015, y, letter, transform=ax.transAxes, va="top", **red)
        ax.text(0.038, y, f"{latent}  {text}", transform=ax.transAxes, va="top", fontsize=9)
    return fig


def _looks(table: pd.DataFrame) -> dict[str, dict]:
    """Color and marker of each dictionary: the SAE is blue and round, the ceiling black."""
    looks, found, others = {"sae": look("blue", ms=7, elinewidth=2.4), "ceiling": look("black", "|")}, {}, 0
    for name, role in table.drop_duplicates("dictionary")[["dictionary", "role"]].itertuples(index=False):
        found[name] = looks.get(role) or {"color": _OTHERS[others % len(_OTHERS)], "marker": "s^vDPX<"[others % 7], "ms": 5}
        others += role not in looks
    return found


@drawn(table="DataFrame of ``ComparisonReport.table()``")
def concept_families(table: pd.DataFrame) -> Figure:
    """Mean average precision of the best feature by family of concepts: a row a dictionary, with its interval; the line is the supervised ceiling."""
    kinds = table.drop_duplicates("kind").set_index("kind")["n_concepts"]
    shown, ceiling = table[table["role"] != "ceiling"], table[table["role"] == "ceiling"]
    order = list(shown[shown["kind"] == kinds.index[-1]].sort_values("ap", ascending=False)["dictionary"])
    titles = {"kind": {kind: f"{kind} ({n})" for kind, n in kinds.items()}}
    fig, axes = interval_panels(
        shown, titles, "dictionary", "ap", "dictionary", _looks(table), height=0.24 * len(order) + 0.85, columns=3, ncols=0, xlim=(0, 1),
        order=order, spread=0, text="{:.2f}", subplots={"sharex": True},
    )  # fmt: skip
    for ax, kind in zip(axes, kinds.index, strict=True):
        for row in ceiling[ceiling["kind"] == kind].itertuples():
            ax.axvspan(row.low, row.high, color=COLORS["black"], alpha=0.12, lw=0)
            ax.axvline(row.ap, color=COLORS["black"], lw=1.2, ls="--")
        ax.axvline(table.loc[table["kind"] == kind, "chance"].iloc[0], color=COLORS["gray"], lw=1.1, ls=":")
    fig.supxlabel(
        "mean average precision; dotted: chance" + "".join(f"; dashed: {name}" for name in ceiling["dictionary"].unique()), fontsize=9
    )
    return fig


@drawn(table='DataFrame of ``load_table(profile, "twin")``')
def twins(table: pd.DataFrame) -> Figure:
    """Mean average precision by kind of concept, for a CLIP whose patches were taught and one that learned from captions alone; 95% intervals."""
    rows = table[table["measure"] == "AP"].reset_index(drop=True)
    rows[["dictionary", "kind"]] = rows["of"].str.split(", (?=[^,]+$)", expand=True, regex=True).to_numpy()
    looks = {name: look(color, marker) for name, color, marker in zip(rows["clip"].unique(), ("blue", "orange"), "os", strict=False)}
    names = {"SAE": "Best latent of the SAE", "random SAE": "Best latent of a random SAE"}
    titles = {"dictionary": names | {"k-means, cosine": "Best k-means centroid", "linear probe": "Supervised probe"}}
    return interval_panels(
        rows, titles, "kind", "value", "clip", looks, height=2.8, columns=2, ncols=2, xlim=(0, 1), text="{:.2f}",
        xlabel="mean average precision", subplots={"sharex": True},
    )[0]  # fmt: skip


@drawn(coverage="DataFrame of ``ComparisonReport.coverage(thresholds)``, of the dictionaries that are to be drawn; seven can be told apart")
def coverage_curves(coverage: pd.DataFrame) -> Figure:
    """Share of concepts found with an AP above a threshold, over the threshold; named at the side, with the share at 0.5."""
    fig, ax = figure(width=0.95, height=3.8)
    middle = coverage.loc[(coverage["threshold"] - 0.5).abs() < 1e-6].set_index("dictionary")["share"]
    looks = _looks(coverage)
    for name in middle.sort_values(ascending=False).index:
        rows, how = coverage[coverage["dictionary"] == name], looks[name]
        role = rows["role"].iloc[0]
        line = {"ls": "--", "marker": None} if role == "ceiling" else {"marker": how["marker"], "markevery": max(1, len(rows) // 8)}
        band(ax, rows, "threshold", "share", how["color"], label=f"{name}: {middle[name]:.0%}", lw=2.6 if role == "sae" else 1.3, **line)
    ax.axvline(0.5, color=COLORS["gray"], lw=1, ls=":")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="average precision", ylabel=f"share of {coverage['n_concepts'].iloc[0]} concepts above it")
    ax.yaxis.set_major_formatter(PERCENT)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="above 0.5 (dotted)", alignment="left")
    return fig


@drawn(concepts="DataFrame of ``Localization.concepts``")
def localization(concepts: pd.DataFrame) -> Figure:
    """Average precision, IoU and the pointing game by family: every concept a dot, the mean a bar; dotted gray for the pointing of a random patch."""
    counts, means = concepts["kind"].value_counts(sort=False), concepts.groupby("kind", sort=False)[[*_LOCAL, "pointing_chance"]].mean()
    places = pd.Categorical(concepts["kind"], counts.index).codes + np.random.default_rng(0).uniform(-0.26, 0.26, len(concepts))
    fig, axes = panels([*_LOCAL.values()], 0.42 * len(counts) + 1.2)
    for ax, metric in zip(axes, _LOCAL, strict=True):
        ax.scatter(concepts[metric], places, s=9, lw=0, color=COLORS["blue"], alpha=0.4)
        for y, mean in enumerate(means[metric]):
            ax.vlines(mean, y - 0.38, y + 0.38, color=COLORS["red"], lw=2.4, zorder=3)
            ax.annotate(f"{mean:.2f}", (1.03, y), annotation_clip=False, va="center", fontsize=8, color=COLORS["red"])
            if metric == "pointing":
                ax.vlines(means["pointing_chance"].iloc[y], y - 0.38, y + 0.38, color=COLORS["gray"], lw=1.6, ls=":")
        ax.set(xlim=(-0.02, 1.02), ylim=(len(counts) - 0.5, -0.5))
        ax.set_yticks(range(len(counts)), [f"{kind} ({n})" for kind, n in counts.items()])
    return fig


@drawn(agreement="DataFrame of ``name_agreement``")
def name_agreement(agreement: pd.DataFrame) -> Figure:
    """How often two sources of names agree, against chance: equal names, and names that are no contradiction."""
    titles = {"equal names": ("agreement", "chance")}
    if not agreement["related"].equals(agreement["agreement"]):  # where it is known which names are related
        titles["equal or related"] = ("related", "related_chance")
    named = dict(zip(agreement["a"], agreement["n_a"], strict=True)) | dict(zip(agreement["b"], agreement["n_b"], strict=True))
    fig, axes = panels([*titles], 0.75 * len(named) + 1.2)
    for ax, (value, chance) in zip(axes, titles.values(), strict=True):
        shares = pd.DataFrame(0.0, [*named], [*named])
        cells = [[f"{named[a]:,}\nnamed" if a == b else "no common\nlatent" for b in named] for a in named]
        texts = pd.DataFrame(cells, [*named], [*named])
        for row in agreement.dropna(subset=value).to_dict("records"):
            for a, b in ((row["a"], row["b"]), (row["b"], row["a"])):
                shares.loc[a, b] = row[value]
                texts.loc[a, b] = f"{row[value]:.0%}\nchance {row[chance]:.0%}\n{row['n_both']:,} latents"
        heat(ax, shares, texts, cmap="Blues", vmax=1)
        ax.tick_params(rotation=0)
    colorbar(fig, axes, "share of latents both name", fraction=0.04)
    return fig


@drawn(table="DataFrame of ``Likeness.table``", chance="float; expected score once the images are shuffled")
def monosemanticity(table: pd.DataFrame, chance: float) -> Figure:
    """Monosemanticity scores of all latents beside those of random directions and of single dimensions; and against how rare a feature is."""
    table = table.dropna(subset="score")
    medians = table.groupby("dictionary", sort=False)["score"].median()
    table = table.assign(dictionary=table["dictionary"].map({name: f"{name}: {median:.2f}" for name, median in medians.items()}))
    looks = dict(zip(table["dictionary"].unique(), (COLORS["blue"], COLORS["orange"], COLORS["green"]), strict=False))
    fig, (left, right) = panels(["Scores", "By rarity"], 3.4, sharey=False, width_ratios=[1.15, 1])
    common: dict[str, Any] = {"hue": "dictionary", "palette": looks}
    sns.histplot(
        table, x="score", bins=60, stat="proportion", common_norm=False, element="step", alpha=0.25, hue_order=list(looks), ax=left, **common,
        binrange=(min(chance, table["score"].quantile(0.002)) - 0.01, table["score"].max()),
    )  # fmt: skip
    sns.scatterplot(table.iloc[::-1], x="n_images", y="score", s=7, alpha=0.35, lw=0, legend=False, ax=right, **common)
    for draw in (left.axvline, right.axhline):
        draw(chance, color=COLORS["black"], lw=1.1, ls=":")
    left.set(xlabel="monosemanticity score", ylabel="share of features")
    left.get_legend().set_title("median (dotted: images shuffled)")
    right.set(xscale="log", xlabel="images where the feature is active")
    return fig


@drawn(rows="DataFrame of ``by_axis``")
def by_axis(rows: pd.DataFrame) -> Figure:
    """Statistics of living latents by layer, or by the tokens that are read (dot: median; bars: middle half, and from the 10th to the 90th percentile), and object AP."""
    axis = rows.columns[0]
    fig, axes = panels([*_STATISTICS.values(), "object AP"], 2.8, size=9.5, sharey=False)
    thin = {False: look("blue"), True: look("red")}
    thick = {main: {**how, "marker": "", "elinewidth": 6, "alpha": 0.5} for main, how in thin.items()}
    for ax, name in zip(axes, _STATISTICS, strict=False):
        for looks, low, high in ((thick, 25, 75), (thin, 10, 90)):
            between = (f"{name}_q{low}", f"{name}_q{high}")
            intervals(ax, rows, axis, f"{name}_q50", "main", looks, between=between, upright=True, spread=0)
    intervals(axes[-1], rows, axis, "object_ap", "main", thin, upright=True, spread=0)
    axes[-1].set_ylim(bottom=0)
    fig.supxlabel(f"{axis} that an SAE reads; red: the main setting's; object AP with its 95% interval", fontsize=9)
    return fig
