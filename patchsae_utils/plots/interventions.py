"""Figures of notebook 04: masking sweeps, specificity of single latents, dose and response, removed objects."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..interventions.effects import object_patches
from . import style
from .style import COLORS, STYLE

_CHOICES = {
    "oracle": ("true class's (oracle)", "red"),
    "predicted": ("predicted class's", "blue"),
    "wrong": ("another class's", "orange"),
    "dataset": ("data set's", "green"),
    "matched": ("others, as active here", "sky"),
    "random": ("random", "gray"),
}
_MODES = {"on": "On: only k latents are kept", "off": "Off: k latents are zeroed"}
_PLACES = {"all": ("all tokens", "-"), "patches": ("patches", "--"), "cls": ("CLS", ":")}
_REFERENCES = {"raw": ("raw", "black"), "reconstructed": ("reconstructed", "orange"), "error_kept": ("error kept", "sky")}


@rc_context(STYLE)
def mask_curves(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """Zero-shot accuracy over k, one column for on and off, one row for the error term kept and dropped, one line a choice of latents.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it; rows of other places than all tokens, or of groups of classes, are left out.
    save : str, optional
        Name of the picture in ``figures/``.
    """
    frame = _one_ranking(frame[(frame["group"] == "all") & ((frame["where"] == "all") | (frame["choose"] == "none"))])
    masked = frame[frame["choose"] != "none"]
    modes = [mode for mode in _MODES if mode in set(masked["mode"])]
    errors = [error for error in ("dropped", "kept") if error in set(masked["error"])]
    fig, axes = style.figure(height=0.4 + 2.6 * len(errors), nrows=len(errors), ncols=len(modes), sharex=True, sharey=True, squeeze=False)
    for axis_row, error in zip(axes, errors, strict=True):
        for ax, mode in zip(axis_row, modes, strict=True):
            _reference_line(ax, frame, "raw", "-")
            if error == "dropped":
                _reference_line(ax, frame, "reconstructed", (0, (4, 3)))
            for choose, (label, color) in _CHOICES.items():
                rows = masked[(masked["choose"] == choose) & (masked["mode"] == mode) & (masked["error"] == error)]
                _curve(ax, rows, label, color)
            ax.set(title=f"{_MODES[mode]}, error {error}", ylim=(0, None))
            _k_axis(ax, masked["k"])
    _finish_rows(fig, axes, "latents k", "zero-shot accuracy")
    return style.save(fig, save)


@rc_context(STYLE)
def mask_places(frame: pd.DataFrame, choose: Sequence[str] = ("predicted", "random"), save: str | None = None) -> Figure:
    """The same latents masked on all tokens, on the patches alone, on CLS alone.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it with several ``where`` and one setting of the error term.
    choose : sequence of str
    save : str, optional
    """
    frame = _one_ranking(frame[frame["group"] == "all"])
    masked = frame[frame["choose"].isin(choose)]
    error = masked["error"].iloc[0]
    masked = masked[masked["error"] == error]
    modes = [mode for mode in _MODES if mode in set(masked["mode"])]
    fig, axes = style.figure(height=3.3, ncols=len(modes), sharey=True, squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=True):
        _reference_line(ax, frame, "raw", "-")
        for name in choose:
            label, color = _CHOICES[name]
            for place, (place_label, line) in _PLACES.items():
                rows = masked[(masked["choose"] == name) & (masked["mode"] == mode) & (masked["where"] == place)]
                _curve(ax, rows, f"{label}, {place_label}", color, ls=line)
        ax.set(title=f"{_MODES[mode]}, error {error}", ylim=(0, None))
        _k_axis(ax, masked["k"])
    _finish_rows(fig, axes, "latents k", "zero-shot accuracy", columns=3)
    return style.save(fig, save)


@rc_context(STYLE)
def mask_errors(frame: pd.DataFrame, choose: Sequence[str] = ("predicted", "random"), save: str | None = None) -> Figure:
    """The same masks with the error term kept and dropped.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it with ``keep_error=[True, False]``; rows of all tokens are drawn.
    choose : sequence of str
    save : str, optional
    """
    lines = {"error kept": ("error", "kept", "-"), "error dropped": ("error", "dropped", "--")}
    return _overlaid(frame[(frame["where"] == "all") | (frame["choose"] == "none")], choose, lines, ("raw", "reconstructed"), save)


@rc_context(STYLE)
def mask_rankings(frame: pd.DataFrame, choose: Sequence[str] = ("predicted", "matched"), save: str | None = None) -> Figure:
    """Latents ranked by where they are active, and by what the class's logit owes to them.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it with ``rank_by=["count", "attribution"]``, one place and one setting of the error term.
    choose : sequence of str
    save : str, optional
    """
    lines = {"ranked by attribution": ("rank", "attribution", "-"), "ranked by count": ("rank", "count", "--")}
    return _overlaid(frame, choose, lines, ("raw",), save)


@rc_context(STYLE)
def mask_tasks(
    frame: pd.DataFrame,
    choose: Sequence[str] = ("oracle", "predicted", "wrong", "matched", "random"),
    mode: str = "off",
    columns: int = 5,
    save: str | None = None,
) -> Figure:
    """One small picture a task (or another group of classes): accuracy over k for each choice of latents.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it with ``groups``; where the error term was both kept and dropped, the rows that keep it are drawn.
    choose : sequence of str
        Those that are missing in the frame are left out.
    mode : {"on", "off"}
    columns : int
    save : str, optional

    Raises
    ------
    ValueError
        If the frame has no groups.
    """
    groups = [group for group in frame["group"].drop_duplicates() if group != "all"]
    if not groups:
        raise ValueError("There are no groups to draw: call sweep_masks(..., groups=[a name for each class]).")
    frame = _one_ranking(frame)
    masked = frame[(frame["mode"] == mode) & (frame["where"] == "all") & (frame["choose"] != "none")]
    masked = masked[masked["error"] == ("kept" if "kept" in set(masked["error"]) else "dropped")]
    rows = -(-len(groups) // columns)
    fig, axes = style.figure(height=0.7 + 1.75 * rows, nrows=rows, ncols=min(columns, len(groups)), sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, group in zip(axes.flat, groups, strict=False):
        part = frame[frame["group"] == group]
        _reference_line(ax, part, "raw", "-")
        for name, (label, color) in _CHOICES.items():
            if name in choose:
                _curve(ax, masked[(masked["group"] == group) & (masked["choose"] == name)], label, color)
        ax.set(ylim=(0, 1))
        ax.set_title(f"{group} ({int(part['n'].iloc[0])})".replace("_", " "), fontsize=9, weight="normal")
        _k_axis(ax, masked["k"])
        ticks = ax.get_xticks()
        ax.set_xticks(ticks[::2], [f"{k:,}" for k in sorted(masked["k"].unique())[::2]], fontsize=7.5)
    fig.suptitle(_MODES[mode], x=0.01, ha="left", fontsize=11, weight="bold")
    _finish_rows(fig, axes, "latents k", "accuracy", columns=4)
    return style.save(fig, save)


@rc_context(STYLE)
def raw_reconstructed_error(frame: pd.DataFrame, save: str | None = None) -> Figure:
    """What the autoencoder itself costs: accuracy on the raw residual stream, on its reconstruction, and with the error added back.

    Parameters
    ----------
    frame : DataFrame
        As ``sweep_masks`` gives it; one cluster of bars for each group of classes.
    save : str, optional
    """
    rows = frame[frame["choose"] == "none"]
    groups = rows["group"].drop_duplicates().tolist()
    counts = rows.drop_duplicates("group").set_index("group")["n"]
    fig, ax = style.figure(width=min(1.0, 0.25 + 0.18 * len(groups)), height=3.2)
    for i, (mode, (label, color)) in enumerate(_REFERENCES.items()):
        part = rows[rows["mode"] == mode].set_index("group").loc[groups]
        at = np.arange(len(groups)) + 0.26 * (i - 1)
        errors = np.abs(part[["low", "high"]].to_numpy().T - part["accuracy"].to_numpy())
        ax.bar(at, part["accuracy"], 0.24, color=COLORS[color], alpha=0.85, label=label)
        ax.errorbar(at, part["accuracy"], errors, fmt="none", ecolor="#4D4D4D", elinewidth=1)
        for x, value, top in zip(at, part["accuracy"], part["high"], strict=True):
            ax.annotate(f"{100 * value:.0f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set(xticks=range(len(groups)), xticklabels=[f"{'all classes' if g == 'all' else g}\n{counts[g]} images" for g in groups])
    ax.set(title="The autoencoder's own cost", ylabel="zero-shot accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(False, axis="x")
    fig.legend(loc="outside lower center", ncols=3)
    return style.save(fig, save)


@rc_context(STYLE)
def specificity(by_class: pd.DataFrame, overall: pd.DataFrame, class_names: Sequence[str], save: str | None = None) -> Figure:
    """What turning a concept's own latents off does to its class's logit and to the others', against equally active latents.

    Parameters
    ----------
    by_class : DataFrame
        ``summarize_effects(frame, ["own", "others"], ["kind", "class"])``, of one k.
    overall : DataFrame
        ``summarize_effects(frame, ["own", "others"], ["kind", "k"], over="class")``.
    class_names : sequence of str
    save : str, optional
    """
    fig, axes = style.figure(height=4.1, ncols=2, width_ratios=[2.6, 1])
    own, control = (by_class[by_class["kind"] == kind].set_index("class") for kind in ("own", "control"))
    order = own["own"].sort_values().index
    x = np.arange(len(order))
    ax = axes[0]
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.vlines(x, own.loc[order, "own_low"], own.loc[order, "own_high"], color=COLORS["blue"], lw=1.2, alpha=0.6)
    ax.plot(x, own.loc[order, "own"], "o", color=COLORS["blue"], ms=4)
    ax.plot(x, control.loc[order, "own"], "o", color=COLORS["gray"], ms=3.5)
    ax.plot(x, own.loc[order, "others"], "o", color=COLORS["orange"], ms=3.5)
    ax.set(title=f"{len(order)} concepts: the best latent off", ylabel="change of the logit", xlim=(-1, len(order)))
    ax.set_xticks(x, [class_names[c] for c in order], rotation=90, fontsize=6.5)
    ax.grid(False, axis="x")

    ax = axes[1]
    overall = overall.set_index(["kind", "k"])
    ks = sorted(overall.index.get_level_values("k").unique())
    bars = [
        ("own", "own", "blue", "own latents off: the class's logit"),
        ("control", "own", "gray", "as active ones off: the class's logit"),
        ("own", "others", "orange", "own latents off: other logits (mean)"),
    ]
    for i, k in enumerate(ks):
        for j, (kind, name, color, label) in enumerate(bars):
            _bar(ax, i + 0.27 * (j - 1), overall.loc[(kind, k)], name, 0.25, color, label=label if i == 0 else None)
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.set_xticks(range(len(ks)), [f"{k}" for k in ks])
    ax.set(title="Mean over concepts", xlabel="latents off")
    ax.grid(False, axis="x")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return style.save(fig, save)


@rc_context(STYLE)
def dose_response(table: pd.DataFrame, class_names: Sequence[str], save: str | None = None) -> Figure:
    """Change of the class's logit over the dose of its latent, where the class is shown and where another one is.

    Parameters
    ----------
    table : DataFrame
        As ``effects.dose_response`` gives it.
    class_names : sequence of str
    save : str, optional
    """
    fig, axes = style.figure(height=3.5, ncols=2, sharey=True)
    titles = {"show it": ("Scaled in scenes that show the class", 1.0), "show another": ("Added to scenes of another class", 0.0)}
    for ax, (scenes, (title, untouched)) in zip(axes, titles.items(), strict=True):
        part = table[table["scenes"] == scenes]
        ax.axhline(0, color=COLORS["black"], lw=0.8)
        ax.axvline(untouched, color=COLORS["black"], lw=0.8, ls=":")
        others = part.groupby("dose")["others"].mean()
        for i, (label, rows) in enumerate(part.groupby("class", sort=False)):
            color = style.CYCLE[i % (len(style.CYCLE) - 1)]
            ax.fill_between(rows["dose"], rows["own_low"], rows["own_high"], color=color, alpha=0.12, lw=0)
            ax.plot(rows["dose"], rows["own"], color=color, marker="o", ms=3.5, label=class_names[label])
        ax.plot(others.index, others, color=COLORS["black"], ls="--", lw=1.5, label="other classes (mean)")
        ax.set(title=title, xlabel="dose (1: as strong as in a scene of the class)")
    axes[0].set_ylabel("change of the logit")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, table["class"].nunique() + 1))
    return style.save(fig, save)


@rc_context(STYLE)
def object_removal(frame: pd.DataFrame, overall: pd.DataFrame, dataset, scenes: Sequence[int], save: str | None = None) -> Figure:
    """Scenes of two objects before and after each one's latents are turned off on its own patches; on the right the mean over scenes.

    Parameters
    ----------
    frame : DataFrame
        As ``remove_objects`` gives it.
    overall : DataFrame
        ``summarize_effects(frame, ["removed_change", "stays_change"])``.
    dataset : OpenMojiData
        The scenes.
    scenes : sequence of int
        Indices of the examples.
    save : str, optional
    """
    fig, axes = style.figure(height=4.6, ncols=len(scenes) + 1, nrows=2, height_ratios=[1, 0.8], width_ratios=[*[1] * len(scenes), 1.15])
    own = frame[frame["kind"] == "own"]
    names, colors = dataset.class_names, (COLORS["blue"], COLORS["orange"])
    for i, index in enumerate(scenes):
        first, second = (row for _, row in own[own["index"] == index].iterrows())
        image, truth = np.asarray(dataset[index].image), dataset.truth(index)
        ax = style.image_axes(axes[0, i])
        ax.imshow(image)
        for which, color in enumerate(colors):
            mask = object_patches(truth, which).numpy().reshape(truth.object_share.shape[1:])
            mask = np.pad(np.kron(mask, np.ones([side // n for side, n in zip(image.shape, mask.shape, strict=False)])), 1)
            rows, columns = (np.arange(n) - 1 for n in mask.shape)
            for line_color, width in (("white", 3.2), (color, 1.6)):
                ax.contour(columns, rows, mask, [0.5], colors=[line_color], linewidths=width)

        ax = axes[1, i]
        labels = [names[first["removed"]], names[second["removed"]]]
        states = [
            ("as it is", first["removed_before"], first["stays_before"]),
            (f"{labels[0]} off", first["removed_after"], first["stays_after"]),
            (f"{labels[1]} off", second["stays_after"], second["removed_after"]),
        ]
        for j, color in enumerate(colors):
            ax.bar(np.arange(3) + 0.2 * (2 * j - 1), [state[1 + j] for state in states], 0.38, color=color, alpha=0.9, label=labels[j])
        ax.set_xticks(range(3), [_wrapped(state[0]) for state in states], fontsize=8)
        ax.set(ylim=(0, 1))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(False, axis="x")
        ax.legend(fontsize=8, handlelength=1, borderpad=0)
    axes[1, 0].set_ylabel("zero-shot probability")

    grid = axes[0, -1].get_gridspec()
    for ax in axes[:, -1]:
        ax.remove()
    ax = fig.add_subplot(grid[:, -1])
    overall = overall.set_index("kind")
    for i, (name, label) in enumerate((("removed_change", "removed\nobject"), ("stays_change", "other\nobject"))):
        for j, (kind, color, what) in enumerate((("own", "red", "its own latents off"), ("control", "gray", "as active ones off"))):
            _bar(ax, i + 0.2 * (2 * j - 1), overall.loc[kind], name, 0.38, color, label=what if i == 0 else None)
        ax.text(i, 0.01, label, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    ax.axhline(0, color=COLORS["black"], lw=0.8)
    ax.set(title=f"Mean of {int(overall['n'].iloc[0])} scenes", ylabel="change of the logit", xticks=[], xlim=(-0.6, 1.6))
    ax.margins(y=0.2)
    ax.grid(False, axis="x")
    ax.legend(loc="upper center", fontsize=8)
    return style.save(fig, save, credit=True)


def _overlaid(frame: pd.DataFrame, choose: Sequence[str], lines: dict, references: Sequence[str], save: str | None) -> Figure:
    """On and off side by side; a colour for each choice, a line style for each value of one column."""
    frame = frame[frame["group"] == "all"]
    masked = frame[frame["choose"].isin(choose)]
    modes = [mode for mode in _MODES if mode in set(masked["mode"])]
    fig, axes = style.figure(height=3.4, ncols=len(modes), sharey=True, squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=True):
        for reference, dashes in zip(references, ("-", (0, (4, 3))), strict=False):
            _reference_line(ax, frame, reference, dashes)
        for name in choose:
            label, color = _CHOICES[name]
            for line_label, (column, value, dashes) in lines.items():
                rows = masked[(masked["choose"] == name) & (masked["mode"] == mode) & (masked[column] == value)]
                _curve(ax, rows, f"{label}, {line_label}", color, ls=dashes)
        ax.set(title=_MODES[mode], ylim=(0, None))
        _k_axis(ax, masked["k"])
    _finish_rows(fig, axes, "latents k", "zero-shot accuracy", columns=3)
    return style.save(fig, save)


def _one_ranking(frame: pd.DataFrame) -> pd.DataFrame:
    """Of several rankings the first."""
    ranks = frame["rank"][frame["rank"] != "none"]
    return frame[frame["rank"].isin(["none", *ranks.iloc[:1]])]


def _curve(ax, rows: pd.DataFrame, label: str, color: str, **line) -> None:
    """Accuracy with its interval over k; ks stand at equal distances."""
    if len(rows):
        rows = rows.sort_values("k")
        at = np.arange(len(rows))
        ax.fill_between(at, rows["low"], rows["high"], color=COLORS[color], alpha=0.15, lw=0)
        ax.plot(at, rows["accuracy"], color=COLORS[color], marker="o", ms=3.5, label=label, **line)


def _bar(ax, x: float, row: pd.Series, name: str, width: float, color: str, label: str | None = None) -> None:
    """A mean with its interval."""
    error = np.maximum([[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]], 0)
    ax.bar(x, row[name], width, color=COLORS[color], alpha=0.85, label=label)
    ax.errorbar(x, row[name], error, fmt="none", ecolor="#4D4D4D", elinewidth=1)


def _reference_line(ax, frame: pd.DataFrame, mode: str, line) -> None:
    row = frame[frame["mode"] == mode].iloc[0]
    ax.axhspan(row["low"], row["high"], color=COLORS["black"], alpha=0.07, lw=0)
    label = {"raw": "no mask, raw", "reconstructed": "no mask, reconstructed"}[mode]
    ax.axhline(row["accuracy"], color=COLORS["black"], lw=1.1, ls=line, label=label)


def _k_axis(ax, ks: pd.Series) -> None:
    values = sorted(ks.unique())
    ax.set_xticks(range(len(values)), [f"{k:,}" for k in values])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _finish_rows(fig: Figure, axes, xlabel: str, ylabel: str, columns: int = 4) -> None:
    """Labels at the outer axes and one legend for all of them."""
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    entries = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 8, break_long_words=False)
