"""Figures of latents elsewhere: in other domains, at other layers, on written words, and in SAEs of other seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .latents import dimmed_image
from .style import COLORS, STYLE, figure, image_axes
from .style import save as save_figure


def cross_domain(found, names: Mapping[int, str] | None = None, k: int = 3, save: str | None = None, credit: bool = True) -> Figure:
    """Latents by row, data sets by column: reference images, dark where the latent is silent; empty places where it never is active.

    Brightness is relative to the latent's strongest patch in that data set; the titles say in what share of its images it is active.

    Parameters
    ----------
    found : patchsae_utils.domains.CrossDomain
    names : mapping of int to str, optional
        What to call the latents.
    k : int
        Images a latent and data set.
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    names = {} if names is None else names
    table = found.table.set_index(["latent", "domain"])
    domains = list(found.table["domain"].unique())
    with plt.rc_context(STYLE):
        fig, _ = figure(height=min(8.4 / (len(domains) * k) + 0.42, 1.6) * len(found.references))
        fig.clear()
        groups = np.atleast_2d(fig.subfigures(len(found.references), len(domains), wspace=0.03, hspace=0.02, squeeze=False))
        for row, (latent, by_domain) in zip(groups, found.references.items(), strict=True):
            for group, domain in zip(row, domains, strict=True):
                reference, numbers = by_domain[domain], table.loc[(latent, domain)]
                first = f"{latent} {names.get(latent, '')}".strip() + ": " if domain == domains[0] else ""
                strongest = float(reference.masks.max()) if len(reference.masks) else 1.0
                share = f"{numbers['frequency']:.1%} of images"
                if "same_class" in numbers and domain != domains[0] and len(reference.images):
                    share += f", same class {numbers['same_class']:.0%}"
                group.suptitle(f"{first}{domain}, {share}", x=0.01, ha="left", fontsize=7.5)
                for column, ax in enumerate(group.subplots(1, k)):
                    image_axes(ax)
                    if column < len(reference.images):
                        dimmed_image(ax, reference.images[column].numpy(), reference.masks[column].numpy(), strongest)
                    elif column == 0:
                        ax.text(0, 0.5, "never active", fontsize=8, color=COLORS["gray"], va="center")
    return save_figure(fig, save, credit=credit)


def group_statistics(found, save: str | None = None) -> Figure:
    """Frequency against mean activation, a panel a group (layers, kinds of tokens, or SAEs), coloured by label entropy; crosses mark medians.

    Parameters
    ----------
    found : patchsae_utils.domains.GroupStatistics
    save : str, optional
    """
    groups = list(found.table["group"])
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    latents, table = found.latents, found.table.set_index("group")
    top = latents["label_entropy"].max() if len(latents) else 1
    with plt.rc_context(STYLE):
        fig, axes = figure(height=2.9 * rows + 0.2, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False)
        points = None
        for ax, group in zip(axes.flat, groups, strict=False):
            frame, row = latents[latents["group"] == group], table.loc[group]
            x, y = np.log10(frame["frequency"]), np.log10(frame["mean_activation"])
            points = ax.scatter(x, y, c=frame["label_entropy"], s=7, cmap="viridis", vmin=0, vmax=top, alpha=0.8, linewidths=0)
            if len(frame):
                place = np.log10(row["frequency"]), np.log10(row["mean_activation"])
                ax.plot(*place, "+", color=COLORS["red"], markersize=13, markeredgewidth=2.2)
            ax.set_title(group)
            text = f"{len(frame):,} living, {row['dead']:.0%} dead\nentropy {row['label_entropy']:.2f} ({row['shuffled_entropy']:.2f} shuffled)"
            ax.text(0.02, 0.98, text, transform=ax.transAxes, va="top", fontsize=7.5, linespacing=1.3)
        low, high = axes.flat[0].get_ylim()
        axes.flat[0].set_ylim(low, high + 0.28 * (high - low))  # room for the words
        for ax in axes.flat[len(groups) :]:
            ax.set_visible(False)
        fig.supxlabel("log10 activated frequency (share of images)", fontsize=10)
        fig.supylabel("log10 mean activation", fontsize=10)
        bar = fig.colorbar(points, ax=axes, pad=0.01)
        bar.set_label("label entropy (nats)")
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1)
    return save_figure(fig, save)


def text_and_image(found, examples: Sequence = (), save: str | None = None, credit: bool = True) -> Figure:
    """Do latents of things answer to the things' names? The share that does, against names dealt at random; and some latents in pictures.

    Parameters
    ----------
    found : patchsae_utils.domains.TextAndImage
    examples : sequence of patchsae_utils.domains.TextExample
    save : str, optional
    credit : bool
        Whether the pictures are OpenMoji's.
    """
    with plt.rc_context(STYLE):
        n = len(examples)
        fig, _ = figure(height=max(2.9, 1.5 * -(-n // 2) + 0.2))
        fig.clear()
        left, right = fig.subfigures(1, 2, width_ratios=[1, 1.5 if n else 0.01])
        ax = left.subplots()
        ax.hist(found.shuffled, bins=24, color="#C4C4C4", label="names dealt at random")
        ax.axvline(found.share, 0, 0.74, color=COLORS["red"], label=f"own names: {found.share:.1%} (p = {found.p:.2g})")
        ax.set(xlabel=f"share of latents with p ≤ {found.alpha:g}", ylabel="shuffles", title=f"{len(found.table):,} latents of things")
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.legend(loc="upper left", fontsize=8)
        if n:
            cells = np.atleast_1d(right.subfigures(-(-n // 2), min(2, n), squeeze=False))
            for cell, example in zip(cells.flat, examples, strict=False):
                cell.suptitle(f"latent {example.latent}", x=0.01, ha="left", fontsize=8)
                strongest = float(example.masks.max())
                for place, ax in enumerate(cell.subplots(1, 3)):
                    image_axes(ax).set_title(example.titles[place], fontsize=7, fontweight="normal", loc="center")
                    dimmed_image(ax, example.images[place].numpy(), example.masks[place].numpy(), strongest)
    return save_figure(fig, save, credit=credit and n > 0)


def stability(found: Mapping[str, Any], save: str | None = None) -> Figure:
    """Cosines of latents matched between SAEs, and what matching to random directions reaches.

    Parameters
    ----------
    found : mapping of str to patchsae_utils.stability.MatchedCosine
        By what to call the pair, e.g. "seed 0, seed 1".
    save : str, optional
    """
    bins = np.linspace(min(0.0, *(float(min(m.cosine.min(), m.random.min())) for m in found.values()), 0.0), 1, 41)
    with plt.rc_context(STYLE):
        fig, axes = figure(height=2.7, ncols=len(found), sharey=True, squeeze=False)
        for ax, (name, match) in zip(axes.flat, found.items(), strict=True):
            weights = np.full(len(match.cosine), 1 / max(len(match.cosine), 1))
            ax.hist(match.random, bins, weights=weights, color="#C4C4C4", label=f"random directions: {match.random_mean:.2f}")
            ax.hist(match.cosine, bins, weights=weights, color=COLORS["blue"], alpha=0.75, label=f"trained: {match.mean}")
            ax.set(title=name, xlabel="cosine of matched decoder rows")
            ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
            ax.legend(loc="upper left", fontsize=8)
        axes.flat[0].set_ylabel("share of latents")
    return save_figure(fig, save)
