"""Figures of what latents mean, measured: dictionaries against each other by family of concepts, places, names, sharing, monosemanticity."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import COLORS, STYLE, figure
from .style import save as save_figure

_BASELINES = (*(COLORS[name] for name in ("orange", "green", "purple", "sky", "red")), "#8B5A2B", COLORS["gray"], COLORS["black"])
_SAES = ("blue", "sky", "green", "purple")
_MARKERS = ("s", "^", "v", "D", "P", "X", "<", ">")


def _looks(table: pd.DataFrame) -> dict[str, dict]:
    """Colour and marker of each dictionary: SAEs are round and blue first, the ceiling is black."""
    looks, seen = {}, {"sae": 0, "baseline": 0, "ceiling": 0}
    for name, role in table.drop_duplicates("dictionary")[["dictionary", "role"]].itertuples(index=False):
        i = seen[role]
        seen[role] += 1
        if role == "sae":
            looks[name] = {"color": COLORS[_SAES[i % len(_SAES)]], "marker": "o", "markersize": 7}
        elif role == "ceiling":
            looks[name] = {"color": COLORS["black"], "marker": "|", "markersize": 11, "markeredgewidth": 2.2}
        else:
            looks[name] = {"color": _BASELINES[i % len(_BASELINES)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
    return looks


def concept_families(table: pd.DataFrame, save: str | None = None) -> Figure:
    """Mean average precision of the best feature by family of concepts: a row a dictionary, with its interval; the line is the supervised ceiling.

    Parameters
    ----------
    table : DataFrame
        ``ComparisonReport.table()``: dictionary, role, kind, n_concepts, ap, low, high, chance.
    save : str, optional
        Name under ``figures/``.
    """
    kinds = list(table["kind"].unique())
    shown = table[table["role"] != "ceiling"]
    order = list(shown[shown["kind"] == kinds[-1]].sort_values("ap", ascending=False)["dictionary"])
    looks = _looks(table)
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    with plt.rc_context(STYLE):
        fig, axes = figure(height=lines * (0.23 * len(order) + 0.85), nrows=lines, ncols=columns, sharex=True, sharey=True, squeeze=False)
        for ax, kind in zip(axes.flat, kinds, strict=False):
            rows = table[table["kind"] == kind].set_index("dictionary")
            for y, name in enumerate(order):
                row = rows.loc[name]
                strong = row["role"] == "sae"
                ax.hlines(y, row["low"], row["high"], color=looks[name]["color"], linewidth=2.4 if strong else 1.6)
                ax.plot(row["ap"], y, linestyle="", **looks[name])
                right = row["high"] < 0.8
                ax.annotate(
                    f"{row['ap']:.2f}", (row["high"] if right else row["low"], y), (5 if right else -5, 0), textcoords="offset points",
                    ha="left" if right else "right", va="center", fontsize=7.5, weight="bold" if strong else "normal",
                )  # fmt: skip
            for _, row in rows[rows["role"] == "ceiling"].iterrows():
                ax.axvspan(row["low"], row["high"], color=COLORS["black"], alpha=0.12, linewidth=0)
                ax.axvline(row["ap"], color=COLORS["black"], linewidth=1.2, linestyle="--")
            ax.axvline(rows["chance"].iloc[0], color=COLORS["gray"], linewidth=1.1, linestyle=":")
            ax.set_title(f"{kind} ({rows['n_concepts'].iloc[0]})")
            ax.set_yticks(range(len(order)), order)
            ax.tick_params(axis="x", labelbottom=True)
            ax.grid(axis="y", visible=False)
            ax.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
        for ax in axes.flat[len(kinds) :]:
            ax.set_visible(False)
        ceiling = table[table["role"] == "ceiling"]["dictionary"].unique()
        text = "mean average precision of the best feature, on scenes it was not chosen on (95 % interval); dotted: chance"
        fig.supxlabel(text + (f"; dashed: {ceiling[0]}" if len(ceiling) else ""), fontsize=9)
    return save_figure(fig, save)


def coverage_curves(coverage: pd.DataFrame, save: str | None = None) -> Figure:
    """Share of concepts found with an AP above a threshold, over the threshold.

    Parameters
    ----------
    coverage : DataFrame
        ``ComparisonReport.coverage(thresholds)``: dictionary, role, threshold, n_concepts, share, low, high.
    save : str, optional
    """
    looks = _looks(coverage)
    with plt.rc_context(STYLE):
        fig, ax = figure(width=0.95, height=3.8)
        for name, rows in coverage.groupby("dictionary", sort=False):
            role, color = rows["role"].iloc[0], looks[name]["color"]
            ax.fill_between(rows["threshold"], rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
            every = max(1, len(rows) // 8)
            ax.plot(
                rows["threshold"], rows["share"], color=color, label=name, linewidth=2.6 if role == "sae" else 1.3,
                linestyle="--" if role == "ceiling" else "-", marker=None if role == "ceiling" else looks[name]["marker"], markersize=4,
                markevery=every,
            )  # fmt: skip
        ax.axvline(0.5, color=COLORS["gray"], linewidth=1, linestyle=":")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="average precision", ylabel=f"share of {coverage['n_concepts'].iloc[0]} concepts above it")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save_figure(fig, save)


def localization(concepts: pd.DataFrame, save: str | None = None) -> Figure:
    """IoU and the pointing game by family: every concept a dot, the mean a bar; a grey line for the pointing of a random patch.

    Parameters
    ----------
    concepts : DataFrame
        ``Localization.concepts``.
    save : str, optional
    """
    kinds = list(concepts["kind"].unique())
    titles = {"ap": "average precision", "iou": "intersection over union", "pointing": "pointing game"}
    rng = np.random.default_rng(0)
    with plt.rc_context(STYLE):
        fig, axes = figure(height=0.42 * len(kinds) + 1.2, ncols=3, sharey=True)
        for ax, (metric, title) in zip(axes, titles.items(), strict=True):
            for y, kind in enumerate(kinds):
                rows = concepts[concepts["kind"] == kind]
                jitter = y + rng.uniform(-0.26, 0.26, len(rows)) * (len(rows) > 1)
                ax.scatter(rows[metric], jitter, s=9, color=COLORS["blue"], alpha=0.35, linewidths=0)
                ax.vlines(rows[metric].mean(), y - 0.38, y + 0.38, color=COLORS["red"], linewidth=2.4)
                ax.annotate(f"{rows[metric].mean():.2f}", (1.02, y), annotation_clip=False, va="center", fontsize=8, color=COLORS["red"])
                if metric == "pointing":
                    ax.vlines(rows["pointing_chance"].mean(), y - 0.38, y + 0.38, color=COLORS["gray"], linewidth=1.6, linestyle=":")
            ax.set_title(title, fontsize=9.5)
            ax.set(xlim=(-0.02, 1.02))
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(kinds)), [f"{kind} ({(concepts['kind'] == kind).sum()})" for kind in kinds])
        axes[0].invert_yaxis()
        fig.supxlabel("each dot a concept, latent and threshold chosen on other scenes; red: mean; dotted grey: a random patch", fontsize=9)
    return save_figure(fig, save)


def name_agreement(agreement: pd.DataFrame, save: str | None = None) -> Figure:
    """How often two sources of names agree, against chance: equal names, and names that are no contradiction.

    Parameters
    ----------
    agreement : DataFrame
        :func:`patchsae_utils.concepts.names.name_agreement`.
    save : str, optional
    """
    names = list(dict.fromkeys([*agreement["a"], *agreement["b"]]))
    panels = {"equal names": ("agreement", "chance"), "equal or related": ("related", "related_chance")}
    with plt.rc_context(STYLE):
        fig, axes = figure(width=0.92, height=0.75 * len(names) + 1.5, ncols=2, sharey=True)
        for ax, (title, (value, chance)) in zip(axes, panels.items(), strict=True):
            grid, texts = np.full((len(names), len(names)), np.nan), {}
            for row in agreement.itertuples():
                for i, j in ((names.index(row.a), names.index(row.b)), (names.index(row.b), names.index(row.a))):
                    grid[i, j] = getattr(row, value)
                    texts[i, j] = f"{getattr(row, value):.0%}\nchance {getattr(row, chance):.0%}\n{row.n_both:,} latents"
            shades = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (i, j), text in texts.items():
                dark = np.isfinite(grid[i, j]) and grid[i, j] > 0.55
                text = "no common\nlatent" if np.isnan(grid[i, j]) else text
                ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else COLORS["black"])
            for i, name in enumerate(names):
                n = agreement.loc[agreement["a"] == name, "n_a"].tolist() + agreement.loc[agreement["b"] == name, "n_b"].tolist()
                ax.text(i, i, f"{n[0]:,}\nnamed", ha="center", va="center", fontsize=8, color=COLORS["gray"])
            ax.set_title(title)
            ax.set_xticks(range(len(names)), names)
            ax.set_yticks(range(len(names)), names)
            ax.grid(False)
        bar = fig.colorbar(shades, ax=list(axes), pad=0.015, fraction=0.04)
        bar.set_label("share of latents both name")
        bar.outline.set_visible(False)
    return save_figure(fig, save)


def concept_sharing(splitting: pd.DataFrame, absorption: pd.DataFrame, most: int = 12, save: str | None = None) -> Figure:
    """How many latents share a concept, by family; and how many classes the best latent of each category finds, skips, or leaves to others.

    Parameters
    ----------
    splitting : DataFrame
        :func:`patchsae_utils.concepts.places.splitting`.
    absorption : DataFrame
        :func:`patchsae_utils.concepts.places.absorption`.
    most : int
        Categories shown: those of most classes.
    save : str, optional
    """
    kinds = list(splitting["kind"].unique())
    top = max(8, int(splitting["n_latents"].quantile(0.9)))
    with plt.rc_context(STYLE):
        fig, (left, right) = figure(height=4.2, ncols=2, width_ratios=[1, 1.25])
        edges = [0, 1, 2, 3, 5, 9, 17, 33]
        labels = ["0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33 +"]
        shades = plt.get_cmap("viridis")(np.linspace(0.95, 0.1, len(edges)))
        start = np.zeros(len(kinds))
        for i, low in enumerate(edges):
            high = edges[i + 1] if i + 1 < len(edges) else np.inf
            inside = (splitting["n_latents"] >= low) & (splitting["n_latents"] < high)
            share = np.array([inside[splitting["kind"] == kind].mean() for kind in kinds])
            if i == len(edges) - 1 and not share.any() and top < 33:
                continue
            left.barh(range(len(kinds)), share, left=start, height=0.66, color=shades[i], label=labels[i])
            start += share
        left.set_yticks(range(len(kinds)), [f"{kind} ({(splitting['kind'] == kind).sum()})" for kind in kinds])
        left.set(xlim=(0, 1), xlabel="share of concepts", title="latents that share a concept")
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        left.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=4, title="latents", handlelength=1.2, columnspacing=1.0)
        groups = absorption.groupby("category")
        order = groups.size().sort_values(ascending=False, kind="stable").index[:most]
        rows = [groups.get_group(category) for category in order]
        parts = {
            "found": ("blue", [int(g["found"].sum()) for g in rows]),
            "skipped": ("red", [int((g["skipped"] & ~g["absorbed"]).sum()) for g in rows]),
            "skipped, and another latent stands for it": ("orange", [int(g["absorbed"].sum()) for g in rows]),
            "no latent of the category": (None, [int((~g["found"] & ~g["skipped"]).sum()) for g in rows]),
        }
        start = np.zeros(len(order))
        for label, (color, counts) in parts.items():
            right.barh(range(len(order)), counts, left=start, height=0.7, color=COLORS[color] if color else "#DDDDDD", label=label)
            start += counts
        right.set_yticks(range(len(order)), order)
        right.set(xlabel="classes", title="classes of a category, for its best latent")
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, columnspacing=1.0)
    return save_figure(fig, save)


def monosemanticity(table: pd.DataFrame, chance: float, save: str | None = None) -> Figure:
    """Monosemanticity scores of all latents beside those of random directions and of single dimensions; and against how rare a feature is.

    Parameters
    ----------
    table : DataFrame
        ``Likeness.table`` of :mod:`patchsae_utils.latents.likeness`: dictionary, latent, score, n_images.
    chance : float
        Expected score once the images are shuffled.
    save : str, optional
    """
    heard = table.dropna(subset=["score"])
    looks = dict(zip(heard["dictionary"].unique(), ("blue", "orange", "green"), strict=False))
    with plt.rc_context(STYLE):
        fig, (left, right) = figure(height=3.4, ncols=2, width_ratios=[1.15, 1])
        bins = np.linspace(min(chance, heard["score"].quantile(0.002)) - 0.01, heard["score"].max(), 60)
        for name, color in looks.items():
            rows = heard[heard["dictionary"] == name]
            weights = np.full(len(rows), 1 / len(rows))
            left.hist(rows["score"], bins, weights=weights, histtype="stepfilled", color=COLORS[color], alpha=0.3)
            label = f"{name}: {rows['score'].median():.2f}"
            left.hist(rows["score"], bins, weights=weights, histtype="step", color=COLORS[color], linewidth=1.5, label=label)
        for name in reversed(looks):
            rows = heard[heard["dictionary"] == name]
            right.scatter(rows["n_images"], rows["score"], s=5, color=COLORS[looks[name]], alpha=0.35, linewidths=0)
        for draw in (left.axvline, right.axhline):
            draw(chance, color=COLORS["black"], linewidth=1.1, linestyle=":")
        left.set(xlabel="monosemanticity score", ylabel="share of features", title="Scores")
        left.legend(loc="upper right", title="median (dotted: images shuffled)", title_fontsize=8.5)
        right.set(xscale="log", xlabel="images where the feature is active", ylabel="score", title="By rarity")
    return save_figure(fig, save)
