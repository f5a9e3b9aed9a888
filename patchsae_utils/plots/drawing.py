"""The few shapes that most figures have: dots or bars with intervals, curves with bands, heat maps, panels, rows of masked pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .heat import blend
from .style import COLORS, CYCLE, HEAT, MARKERS, figure, image_axes

PERCENT = PercentFormatter(1, decimals=0)
HALO = [withStroke(linewidth=2.5, foreground="white")]
DARKNESS = 0.45  # how much a picture is darkened where a latent is silent


def pretty(name: Any) -> str:
    """How a class or a task is written in a figure: "animals, gray" for ``openmoji/animals:gray``."""
    return str(name).removeprefix("openmoji/").replace("_", " ").replace(":", ", ")


def clip(words: Any, n: int) -> str:
    """Words of at most n letters."""
    return str(words) if len(str(words)) <= n else str(words)[: n - 1] + "…"


def look(color: str, marker: str = "o", label: str | None = None, **options: Any) -> dict[str, Any]:
    """How a hue is drawn, for :func:`intervals`."""
    return {"color": COLORS[color], "marker": marker, **({} if label is None else {"label": label}), **options}


def panels(
    titles: Sequence[str], height: float, columns: int = 0, xlabel: str = "", ylabel: str = "", size: float = 11, **options: Any
) -> tuple[Figure, Any]:
    """A panel for each title, so many in a row (default: all); ``height`` of a row; labels at the outer panels. Returns figure and axes [n]."""
    n, columns = len(titles), min(columns or len(titles), len(titles))
    rows = -(-n // columns)
    fig, axes = figure(height=height * rows, nrows=rows, ncols=columns, squeeze=False, **{"sharey": True, **options})
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    axes = axes.ravel()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontsize=size)
    for ax in axes[n - columns : n]:
        ax.set_xlabel(xlabel)
        ax.tick_params(labelbottom=True)
    for ax in axes[n:]:
        ax.set_visible(False)
    return fig, axes[:n]


def legend(fig: Figure, axes: Any, ncols: int = 4, **options: Any) -> None:
    """One legend under the figure for all of its axes, each label once."""
    entries = {label: handle for ax in np.ravel(axes) for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), **{"loc": "outside lower center", "ncols": ncols, "columnspacing": 1.4, **options})


def measures(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """A row each number: columns measure, value, low and high beside the others."""
    parts = [table.assign(measure=name, value=table[name], low=table[f"{name}_low"], high=table[f"{name}_high"]) for name in names]
    return pd.concat(parts, ignore_index=True)


def ends(table: pd.DataFrame, value: str) -> tuple[str, str]:
    """The columns of a value's interval."""
    return (f"{value}_low", f"{value}_high") if f"{value}_low" in table else ("low", "high")


def errors(table: pd.DataFrame, value: str, between: tuple[str, str] | None = None) -> np.ndarray:
    """[2, n] lengths of error bars."""
    low, high = between or ends(table, value)
    return np.stack([table[value] - table[low], table[high] - table[value]]).clip(0)


def _look(i: int) -> dict[str, Any]:
    return {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}


def intervals(
    ax: Axes, table: pd.DataFrame, place: str, value: str, hue: str, looks: Mapping[Any, Mapping] | None = None, *,
    order: Any = None, between: tuple[str, str] | None = None, scale: float = 1, upright: bool = False, bars: bool = False, spread: float = 0.6,
    text: str = "",
) -> None:  # fmt: skip
    """Dots or bars with given ends: a position for each ``place``, beside each other for each ``hue``.

    ``looks`` says how each hue is drawn, ``order`` gives the places or what to write at them, ``text`` is the format of the values' labels.
    """
    order = order if isinstance(order, Mapping) else {each: pretty(each) for each in (table[place].unique() if order is None else order)}
    kinds = [kind for kind in (looks or table[hue].unique()) if (table[hue] == kind).any()]
    low, high = between or ends(table, value)
    step, n = (0.8 if bars else spread) / len(kinds), len(order)
    for i, kind in enumerate(kinds):
        rows = scale * table[table[hue] == kind].set_index(place)[list({value, low, high})].reindex(list(order))
        at, middle, length = np.arange(n) + (i - (len(kinds) - 1) / 2) * step, rows[value], errors(rows, value, (low, high))
        how: dict[str, Any] = {"label": kind, "ls": "none", "elinewidth": 1.2, **_look(i), **(looks or {}).get(kind, {})}
        if bars:
            (ax.bar if upright else ax.barh)(at, middle, 0.9 * step, color=how["color"], label=how["label"])
            how = {"fmt": "none", "ecolor": "#4D4D4D", "elinewidth": 1.2}
        ax.errorbar(*((at, middle, length) if upright else (middle, at, None, length)), **how)
        for x, number, left, right in zip(at, middle, rows[low], rows[high], strict=True) if text else ():
            back = not (upright or bars) and right > 0.85 * ax.get_xlim()[1]
            ha, offset = ("center", (0, 2)) if upright else ("right", (-5, 0)) if back else ("left", (5, 0))
            spot = (x, right) if upright else (left if back else max(right, 0) if bars else right, x)
            words = {"ha": ha, "va": "bottom" if upright else "center", "fontsize": 8, "path_effects": HALO}
            if np.isfinite(number):
                ax.annotate(text.format(number), spot, offset, textcoords="offset points", **words)
    for i in range(0, n, 2) if len(kinds) > 1 and not bars and spread else ():
        (ax.axvspan if upright else ax.axhspan)(i - 0.5, i + 0.5, color="#F5F5F5", zorder=0, lw=0)
    axis, limits = ("x", (-0.5, n - 0.5)) if upright else ("y", (n - 0.5, -0.5))
    ax.set(**{f"{axis}ticks": range(n), f"{axis}ticklabels": list(order.values()), f"{axis}lim": limits})
    ax.tick_params(axis, length=0)
    ax.grid(False, axis=axis)


def interval_panels(
    table: pd.DataFrame, panel: str | Mapping, place: str, value: str, hue: str, looks: Mapping[Any, Mapping] | None = None, *, height: float,
    ncols: int = 4, columns: int = 0, xlabel: str = "", ylabel: str = "", xlim: Any = None, zero: bool = False, subplots: Any = None, **options: Any,
) -> tuple[Figure, Any]:  # fmt: skip
    """:func:`intervals` in a panel for each value of the column ``panel`` (or {column: {value: title}}), and one legend (``ncols=0``: none)."""
    panel = panel if isinstance(panel, Mapping) else {panel: {each: pretty(each) for each in table[panel].unique()}}
    ((column, titles),) = panel.items()
    fig, axes = panels([*titles.values()], height, columns, xlabel, ylabel, **(subplots or {}))
    given = looks or dict.fromkeys(table[hue].unique(), {})  # alike in all panels, whichever are shown there
    looks = {kind: {**_look(i), **given[kind]} for i, kind in enumerate(given)}
    for ax, which in zip(axes, titles, strict=True):
        if xlim is not None:
            ax.set_xlim(xlim)
        intervals(ax, table[table[column] == which], place, value, hue, looks, **options)
        if zero:
            (ax.axhline if options.get("upright") else ax.axvline)(0, color=COLORS["black"], lw=0.8)
    if ncols:
        legend(fig, axes, ncols)
    return fig, axes


def band(ax: Axes, rows: pd.DataFrame, x: Any, y: str, color: str, *, scale: float = 1, **line: Any) -> None:
    """A curve and the band between its given ends. ``x`` is a column, or the positions."""
    x, (low, high) = rows[x] if isinstance(x, str) else x, ends(rows, y)
    ax.fill_between(x, scale * rows[low], scale * rows[high], color=color, alpha=0.15, lw=0)
    ax.plot(x, scale * rows[y], color=color, **{"marker": "o", "ms": 4, **line})


def heat(ax: Axes, values: Any, texts: Any = None, size: float = 8, **options: Any) -> None:
    """A heat map with texts in its cells and no color bar of its own."""
    colors = {"cmap": HEAT, "vmin": 0, "vmax": 100, **options}
    sns.heatmap(values, annot=texts, fmt="", annot_kws={"fontsize": size}, cbar=False, ax=ax, **colors)
    ax.tick_params(length=0)


def colorbar(fig: Figure, axes: Any, label: str, **options: Any) -> None:
    """One color bar beside all heat maps."""
    fig.colorbar(axes[0].collections[0], ax=list(axes), label=label, pad=0.01, **options).outline.set_visible(False)


def paired_bars(ax: Axes, names: Sequence[Any], values: Mapping[str, Any], colors: Sequence[str]) -> None:
    """Two bars for each name, the first on top."""
    pd.DataFrame(dict(values), index=[clip(name, 18) for name in names]).plot.barh(ax=ax, color=list(colors), width=0.76, legend=False)
    ax.invert_yaxis()
    ax.set_ylabel("")
    ax.grid(False, axis="y")
    ax.legend(loc="lower right", fontsize=8)


def before_after(ax: Axes, names: Sequence[Any], before: Any, after: Any) -> None:
    """Probabilities of classes before and after an edit."""
    paired_bars(ax, names, {"before": before, "after": after}, [COLORS["gray"], COLORS["blue"]])
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        ax.annotate(f"{100 * old:.0f} → {100 * new:.0f}%", (max(old, new), i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set(xlim=(0, 1.18), xticks=[0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PERCENT)


def plain_log(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis, none at its minor ticks."""
    if ticks is not None:
        axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def outline(ax: Axes, mask: np.ndarray, shape: tuple[int, int], color: str, tint: float = 0.0) -> None:
    """The outline of a mask [rows, columns] over a picture of this shape, with a white rim or, with a tint, filled."""
    pixels = np.pad(np.kron(mask, np.ones([side // n for side, n in zip(shape, mask.shape, strict=True)])), 1)
    place = [np.arange(n) - 1 for n in pixels.shape[::-1]]
    if tint:
        ax.contourf(*place, pixels, [0.5, 1.5], colors=[color], alpha=tint)
    for line, width in ((color, 1.3),) if tint else (("white", 3.2), (color, 1.6)):
        ax.contour(*place, pixels, [0.5], colors=[line], linewidths=width)


def image_rows(rows: Mapping[str, Any], titles: Sequence[str] = (), scaled: bool = False) -> tuple[Figure, Any]:
    """Rows of as many pictures, each named on the left; titles over the columns. ``scaled``: rows of numbers get a color bar."""
    n = max(map(len, rows.values()))
    fig, axes = figure(height=(8.4 if scaled else 9.0) / n * len(rows) + 0.3, nrows=len(rows), ncols=n, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        top = max(float(np.asarray(each).max()) for each in pictures)
        for ax, picture in zip(line, pictures, strict=True):
            shown = image_axes(ax).imshow(np.asarray(picture), vmin=0, vmax=top)
        line[0].set_ylabel(name, fontsize=9)
        if scaled and np.ndim(np.asarray(pictures[0])) == 2:
            fig.colorbar(shown, ax=line, shrink=0.85, aspect=12, pad=0.01).outline.set_visible(False)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=8.5, loc="center", fontweight="normal")
    return fig, axes


def strips(cells: Sequence[tuple[str, Sequence[tuple]]], k: int, columns: int, height: float, fig: Any = None, size: float = 9) -> Any:
    """Cells of up to k pictures in a row under a title. A picture is (array, mask or None, mask's top, caption); one without colors is a heat map."""
    rows = -(-len(cells) // columns)
    if fig is None:
        fig, ax = figure(height=height * rows + 0.1)
        ax.remove()
    groups = fig.subfigures(rows, columns, wspace=0.03, hspace=0.02, squeeze=False)
    for group, (title, pictures) in zip(groups.flat, cells, strict=False):
        group.suptitle(title, x=0.01, ha="left", fontsize=size)
        axes = [image_axes(ax) for ax in group.subplots(1, k, squeeze=False)[0]]
        for ax, (picture, mask, top, caption) in zip(axes, pictures, strict=False):
            picture = np.asarray(picture)
            if mask is not None:
                picture = blend(picture, np.asarray(mask, float), max(float(top), 1e-12), 0.0, DARKNESS, size=224)
            ax.imshow(picture, vmin=0)
            ax.set_title(caption, fontsize=8, fontweight="normal", loc="center")
        if not len(pictures):
            axes[0].text(0, 0.5, "never active", fontsize=8, color=COLORS["gray"], va="center")
    return fig
