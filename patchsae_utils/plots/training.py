"""Figures of notebook 02: how an SAE was trained, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from . import style
from .style import COLORS

_SERIES = ("blue", "gray", "orange", "green", "purple")
_TOKENS = {"cls": "CLS", "patch": "patches", "all": "all tokens"}


@mpl.rc_context(style.STYLE)
def training_curves(log: pd.DataFrame, save: str | None = None) -> Figure:
    """Loss with its terms, L0, centred explained variance and dead latents over the tokens seen.

    Parameters
    ----------
    log : DataFrame
        As :func:`patchsae_utils.sae.trainer.training_log` reads it.
    save : str, optional
        Name of the picture in ``figures/``.
    """
    fig, axes = style.figure(height=2.9, ncols=3)
    millions = log["tokens"] / 1e6
    ax = axes[0]
    for column, label, color in (("loss", "total", "black"), ("mse", "squared error", "blue"), ("l1", "λ · L1", "orange")):
        ax.plot(millions, log[column], color=COLORS[color], label=label, lw=1.2)
    if (log["ghost"] > 0).any():
        ax.plot(
            millions,
            log["ghost"].where(log["ghost"] > 0),
            color=COLORS["purple"],
            label="ghost",
            ls="none",
            marker=".",
            ms=2,
        )
    ax.set(ylim=(0, log["loss"].iloc[1:].max() * 1.4), title="Loss", xlabel="million tokens")
    ax.legend(loc="upper right", ncols=2, columnspacing=0.8, handlelength=1.2)

    ax = axes[1]
    ax.plot(millions, log["l0"], color=COLORS["blue"])
    ax.set(ylim=(0, log["l0"].iloc[1:].max() * 1.15), title="Active latents a token (L0)", xlabel="million tokens")
    _end_label(ax, millions, log["l0"], f"{log['l0'].iloc[-1]:.0f}")

    ax = axes[2]
    for column, label, color in (("explained_variance", "explained variance", "green"), ("dead_fraction", "dead latents", "red")):
        ax.plot(millions, log[column], color=COLORS[color], label=label)
        _end_label(ax, millions, log[column].clip(0, 1), f"{log[column].iloc[-1]:.1%}")
    ax.set(ylim=(-0.02, 1.04), title="Explained, and dead", xlabel="million tokens")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="center right")
    return style.save(fig, save)


@mpl.rc_context(style.STYLE)
def reconstruction_quality(evaluation: pd.DataFrame, save: str | None = None) -> Figure:
    """Explained variance by token type, and CLIP's accuracy when its residual stream goes through each SAE.

    Parameters
    ----------
    evaluation : DataFrame
        As :func:`patchsae_utils.evaluate_sae` gives it, the trained SAE first.
    save : str, optional
    """
    fig, axes = style.figure(height=3.1, ncols=2, width_ratios=[1, 1.35])
    evaluations = dict(list(evaluation.groupby("sae", sort=False)))
    width = 0.8 / len(evaluations)
    for ax in axes:
        ax.grid(False, axis="x")
    for i, (name, frame) in enumerate(evaluations.items()):
        shift = (i - (len(evaluations) - 1) / 2) * width
        rows = frame[frame["metric"] == "explained_variance"].set_index("tokens").loc[list(_TOKENS)]
        _bars(axes[0], np.arange(len(rows)) + shift, rows, width, COLORS[_SERIES[i]], name)
        rows = frame[(frame["metric"] == "zero_shot_top1") & (frame["variant"] == "reconstruction")].set_index("tokens").loc[list(_TOKENS)]
        _bars(axes[1], np.arange(len(rows)) + shift, rows, width, COLORS[_SERIES[i]], name)
    axes[0].set(title="Explained variance, centred", xticks=range(len(_TOKENS)), xticklabels=_TOKENS.values())
    axes[0].axhline(0, color=COLORS["black"], lw=0.8)

    first = next(iter(evaluations.values()))
    accuracy = first[first["metric"] == "zero_shot_top1"].set_index("variant")
    raw, kept = accuracy.loc["raw"], accuracy.loc["error_kept"]
    axes[1].axhspan(raw["low"], raw["high"], color=COLORS["black"], alpha=0.12, lw=0)
    axes[1].axhline(raw["value"], color=COLORS["black"], lw=1.2, label="CLIP as it is")
    axes[1].plot(len(_TOKENS), kept["value"], "D", color=COLORS["black"], ms=6)
    labels = [*(f"{name}\nreplaced" for name in _TOKENS.values()), "all replaced,\nerror kept"]
    axes[1].set(title="Zero-shot accuracy with tokens replaced by the SAE", xticks=range(len(labels)), xticklabels=labels)
    for ax in axes:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[1].set_ylim(0, None)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(evaluations) + 1)
    return style.save(fig, save)


@mpl.rc_context(style.STYLE)
def firing_rates(rates: Mapping[str, Tensor], n_tokens: int, save: str | None = None) -> Figure:
    """How often latents fire: a histogram of the log of each latent's rate, those that never fire apart on the left.

    Parameters
    ----------
    rates : mapping
        Name -> share of tokens on which each latent fires, Tensor [S]; see :func:`patchsae_utils.sae.quality.firing_rates`.
    n_tokens : int
        Tokens they were counted on: no rate below 1 / n_tokens can be seen.
    save : str, optional
    """
    fig, ax = style.figure(0.75, 3.0)
    lowest = np.floor(np.log10(1 / n_tokens))
    edges = np.linspace(lowest, 0, 45)
    for (name, rate), color in zip(rates.items(), _SERIES, strict=False):
        rate = rate.double().numpy()
        share = np.full((rate > 0).sum(), 1 / len(rate))
        ax.hist(np.log10(rate[rate > 0]), edges, weights=share, color=COLORS[color], alpha=0.55, label=name)
        ax.bar(lowest - 0.8, (rate == 0).mean(), 0.4, color=COLORS[color], alpha=0.55)
    ticks = np.arange(lowest, 1)
    ax.set_xticks([lowest - 0.8, *ticks], ["never", *(f"$10^{{{int(t)}}}$" for t in ticks)])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="share of tokens on which a latent fires", ylabel="latents", title="How often latents fire")
    ax.legend()
    return style.save(fig, save)


@mpl.rc_context(style.STYLE)
def patch_maps(images: Sequence[Image.Image], l0: Tensor, error: Tensor, save: str | None = None, credit: bool = True) -> Figure:
    """Pictures, and under each how many latents every patch has and how large its error is.

    Parameters
    ----------
    images : sequence of PIL images, as CLIP sees them
    l0, error : Tensor [n, rows, columns]
        See :func:`patchsae_utils.sae.quality.patch_readings`.
    save : str, optional
    credit : bool
        Whether OpenMoji art shows.
    """
    n = len(images)
    fig, axes = style.figure(1.0, 1.0 + 9.0 / n * 2.2, nrows=3, ncols=n, squeeze=False)
    for i, image in enumerate(images):
        axes[0, i].imshow(image)
        drawn = [
            axes[1 + row, i].imshow(values[i].numpy(), vmin=0, vmax=float(values.max()), cmap=style.HEAT)
            for row, values in enumerate((l0, error))
        ]
    for ax in axes.flat:
        style.image_axes(ax)
    for row, title in enumerate(("picture", "active latents", "error / norm")):
        axes[row, 0].set_ylabel(title)
        if row:
            fig.colorbar(drawn[row - 1], ax=axes[row, :], shrink=0.85, aspect=12, pad=0.01)
    return style.save(fig, save, credit=credit)


def _bars(ax, x, rows: pd.DataFrame, width: float, color: str, label: str) -> None:
    errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
    ax.bar(x, rows["value"], width * 0.92, color=color, label=label, yerr=errors, error_kw={"lw": 1.2, "ecolor": COLORS["black"]})


def _end_label(ax, x, y, text: str) -> None:
    ax.annotate(text, (x.iloc[-1], y.iloc[-1]), xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=9)
