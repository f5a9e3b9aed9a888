"""The picture of the method that opens every notebook."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

from .heat import blend
from .style import COLORS, drawn, figure

STAGES = ("extraction", "training", "concepts", "interventions", "adaptation", "explorer")
_INK, _FILL, _PALE_INK, _PALE_FILL = COLORS["blue"], "#D6E8F5", "#9A9A9A", "#F4F4F4"
_TITLES = {  # where, and what happens there
    "extraction": (1, 36.2, "1 extraction: read the residual stream after one block"),
    "training": (37.3, 17.6, "2 training: a sparse autoencoder"),
    "concepts": (73, 15.6, "3 concepts"),
    "interventions": (56.5, 36.2, "4 interventions: edit latents, finish the network"),
    "adaptation": (1, 3.2, "5 adaptation: which latents change?"),
}


@drawn(highlight="str, optional; in color: extraction, training, concepts, interventions, adaptation; explorer or None: all of them")
def method(highlight: str | None = None) -> Figure:
    """PatchSAE in one picture: what is read, what is trained on it, and what the latents are used for; one stage stands out."""
    if highlight not in (None, *STAGES):
        raise ValueError(f"Unknown stage {highlight!r}. Valid: {', '.join(STAGES)}.")
    fig, ax = figure(height=3.9)
    ax.set(xlim=(0, 90), ylim=(-0.5, 38.5), aspect="equal")
    ax.axis("off")
    lit = {stage: highlight in (None, "explorer", stage) for stage in STAGES}
    box, arrow = partial(_box, ax, lit), partial(_arrow, ax, lit)
    for stage, (x, y, words) in _TITLES.items():
        ax.text(x, y, words, fontsize=9.5, fontweight="bold", color=_INK if lit[stage] else _PALE_INK, va="center")

    _picture(ax, (1, 22), _scene())
    ax.text(6, 20.8, "image in patches", ha="center", va="top", fontsize=8)
    arrow("extraction", (11.5, 27), (15, 27))
    for i, name in enumerate(("block 0", "block 1", "...", "block $l$")):
        box("extraction", (15 + 3.6 * i, 21), 2.8, 12, name, rotation=90)
    arrow("extraction", (29, 27), (33, 27))
    tokens = np.random.default_rng(3).uniform(0.1, 1, (7, 6))
    ax.imshow(tokens, cmap="Blues" if lit["extraction"] else "Greys", extent=(33, 40, 21, 33), vmin=-0.2, vmax=1.6, aspect="auto", zorder=2)
    ax.text(36.5, 34.2, "CLS + patches: $x$", ha="center", va="center", fontsize=8)

    arrow("training", (36.5, 20.6), (36.5, 8.2), (39.5, 8.2))
    ax.add_patch(Polygon([(39.8, 6), (39.8, 10.4), (44.5, 14), (44.5, 2.4)], closed=True, **_colors(lit["training"])))
    ax.text(42.3, 8.2, "encoder", rotation=90, ha="center", va="center", fontsize=8)
    values = np.zeros(14)
    values[[2, 6, 11]] = 0.9, 0.5, 0.7
    used = lit["training"] or lit["concepts"] or lit["interventions"]
    color = np.where(values > 0, COLORS["orange"] if used else _PALE_INK, "#D0D0D0")
    ax.barh(np.linspace(2.8, 13.6, 14), 0.4 + 6.5 * values, 0.55, 46, color=color)
    ax.text(53, 0.6, "latents: few active", ha="right", va="center", fontsize=8)
    ax.add_patch(Polygon([(55.5, 14), (55.5, 2.4), (60.2, 6), (60.2, 10.4)], closed=True, **_colors(lit["training"])))
    ax.text(57.8, 8.2, "decoder", rotation=90, ha="center", va="center", fontsize=8)

    arrow("interventions", (60.8, 8.2), (63.5, 8.2), (63.5, 20.6))
    ax.text(64.3, 14, r"$\hat{x}$ (+ error)", fontsize=8, va="center")
    ax.text(49.5, 15.2, "off, up, down", fontsize=8, va="center", ha="center", color=COLORS["red"] if lit["interventions"] else _PALE_INK)
    arrow("interventions", (40.5, 27), (61.5, 27), linestyle=(0, (4, 3)))
    ax.text(50.5, 28.3, r"error $x - \hat{x}$ kept or dropped", ha="center", fontsize=8)
    for i, name in enumerate(("block $l + 1$", "...")):
        box("interventions", (62 + 3.6 * i, 21), 2.8, 12, name, rotation=90)
    arrow("interventions", (69, 27), (73, 27))
    for i, (name, share) in enumerate((("cherry", 0.85), ("tomato", 0.35), ("balloon", 0.15))):
        ax.barh(31 - 4 * i, 9 * share, 1.6, 73.5, color=COLORS["green"] if lit["interventions"] else _PALE_INK)
        ax.text(73.5, 32.6 - 4 * i, f"“{name}”", fontsize=8, va="center")

    arrow("concepts", (54, 4), (54, 0.6), (71.5, 0.6), (71.5, 8), (73.2, 8))
    heat = np.zeros((5, 5))
    heat[1:4, 1:4] = [[0.6, 0.9, 0.6], [0.9, 1, 0.9], [0.5, 0.9, 0.5]]
    _picture(ax, (73.5, 3), blend(_scene(), heat, 1, 0.0, 0.75, size=200))
    ax.text(84.5, 8.2, "where, how\noften, for\nwhat: a name,\na score", fontsize=8, va="center", linespacing=1.25)
    ax.text(78.5, 1.4, "mask of one latent", ha="center", va="center", fontsize=8)

    for i, name in enumerate(("learned\nprompts", "changed\nweights")):
        box("adaptation", (5 + 10.5 * i, 6.5), 9, 6.4, name)
    arrow("adaptation", (20, 13.2), (20, 20.6))
    ax.text(1, 0.8, "the same autoencoder reads both models", fontsize=8, va="center")
    return fig


def _colors(lit: bool) -> dict[str, Any]:
    return {"facecolor": _FILL if lit else _PALE_FILL, "edgecolor": _INK if lit else _PALE_INK, "lw": 1.2}


def _box(ax: Axes, lit: dict, stage: str, corner: tuple[float, float], width: float, height: float, words: str, **text: Any) -> None:
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.6", **_colors(lit[stage])))
    ax.text(corner[0] + width / 2, corner[1] + height / 2, words, ha="center", va="center", fontsize=8, **text)


def _arrow(ax: Axes, lit: dict, stage: str, *points: tuple[float, float], **options: Any) -> None:
    """A line through the points with a head at its end."""
    color = _INK if lit[stage] else _PALE_INK
    ax.plot(*zip(*points, strict=True), color=color, lw=1.3, **options)
    ax.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=10, color=color, shrinkA=0, shrinkB=0))


def _scene() -> np.ndarray:
    """A cherry before a pale sky and a meadow: uint8 [200, 200, 3]."""
    y, x = np.mgrid[:200, :200]
    picture = np.where((y < 130)[..., None], (214, 232, 245), (186, 214, 170)).astype(np.uint8)
    picture[(abs(x - 104 - (90 - y) * 0.25) < 4) & (y > 30) & (y < 90)] = (90, 70, 50)
    picture[(x - 100) ** 2 + (y - 112) ** 2 < 46**2] = (200, 45, 50)
    picture[(x - 84) ** 2 + (y - 98) ** 2 < 9**2] = (240, 150, 150)
    return picture


def _picture(ax: Axes, corner: tuple[float, float], picture: np.ndarray, side: float = 10) -> None:
    x, y = corner
    ax.imshow(picture, extent=(x, x + side, y, y + side), zorder=2)
    for line in np.linspace(0, side, 6):
        ax.plot((x + line, x + line), (y, y + side), (x, x + side), (y + line, y + line), color="white", lw=0.7, zorder=3)
