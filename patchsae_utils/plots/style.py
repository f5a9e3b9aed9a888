"""One look for every figure: sizes, colors that color-blind readers can tell apart (Okabe and Ito, 2008), saving, credit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..config import load_profile

COLORS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00", "purple": "#CC79A7", "sky": "#56B4E9", "yellow": "#F0E442",
    "black": "#1A1A1A", "gray": "#8C8C8C",
}  # fmt: skip
CYCLE = [COLORS[name] for name in ("blue", "orange", "green", "red", "purple", "sky", "gray", "black")]
MARKERS = "osD^vPXp"
HEAT, DIVERGING = "magma", "RdBu_r"
PAGE_WIDTH = 9.0  # inches: 900 pixels in a notebook

# Load the backend now: a notebook's turns interactive mode on when it is first used, which the end of an rc_context would undo.
plt.switch_backend(mpl.get_backend())

STYLE: dict[str, Any] = {
    "figure.dpi": 100, "savefig.dpi": 150, "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "font.size": 10,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#4D4D4D", "axes.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=CYCLE), "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.color": "#4D4D4D", "ytick.color": "#4D4D4D", "legend.frameon": False, "legend.fontsize": 9, "legend.title_fontsize": 9,
    "lines.linewidth": 1.8, "lines.markersize": 5, "image.interpolation": "nearest", "image.cmap": HEAT,
}  # fmt: skip


def figure(width: float = 1.0, height: float = 3.2, **subplots: Any) -> tuple[Figure, Any]:
    """Subplots in the house style.

    Parameters
    ----------
    width, height : float, share of the page's nine inches, and inches
    **subplots
        Passed to ``matplotlib.pyplot.subplots``: ``ncols``, ``sharey``, ...
    """
    with mpl.rc_context(STYLE):
        return plt.subplots(figsize=(PAGE_WIDTH * width, height), **subplots)


def drawn(credit: bool | None = None, **said: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Decorates a figure function: the house style, parameters ``save`` and, if given, ``credit``, and a docstring with all, ``said`` in words."""

    def decorate(function: Callable[..., Figure]) -> Callable[..., Figure]:
        own = {"save": None} if credit is None else {"save": None, "credit": credit}
        words = {
            "save": "str, optional; a file's name under ``runs/<profile>/figures``, without ending",
            "credit": "bool; shows OpenMoji artwork",
        } | said
        parameters = [*inspect.signature(function).parameters.values()]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in own.items()]

        @functools.wraps(function)
        def draw(*args: Any, **options: Any) -> Figure:
            kept = {name: options.pop(name, default) for name, default in own.items()}
            with mpl.rc_context(STYLE):
                return save(function(*args, **options), kept["save"], kept.get("credit", False))

        lines = [f"{p.name} : {words.get(p.name, p.annotation)}" for p in parameters]
        draw.__doc__ = "\n".join([function.__doc__ or "", "", "Parameters", "----------", *lines])
        draw.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.kind))  # type: ignore[attr-defined]
        return draw

    return decorate


def image_axes(axes: Any) -> Any:
    """Bare an axes that shows a picture: no ticks, no grid, no frame. Returns it."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes


def save(fig: Figure, name: str | None, credit: bool = False) -> Figure:
    """Write a figure to ``runs/<profile>/figures/<name>.png`` and return it; ``name=None`` writes nothing.

    Parameters
    ----------
    fig : Figure
    name : str or None, without folder and ending, e.g. ``"04_mask_curves"``
    credit : bool, whether it shows OpenMoji artwork, which must be attributed
    """
    if credit:
        fig.text(0.995, -0.01, "Artwork: OpenMoji, CC BY-SA 4.0", ha="right", va="top", fontsize=7, color="#6E6E6E")
    if name is not None:
        folder = load_profile().folder("figures")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.tmp.png"
        with mpl.rc_context(STYLE):
            fig.savefig(temporary, bbox_inches="tight", metadata={"Software": None})
        temporary.replace(folder / f"{name}.png")
    return fig
