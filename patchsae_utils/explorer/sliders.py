"""Plain sliders of ipywidgets, for people who want to change them: whatever a function draws, over the values it is given."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from ..plots.heat import blend
from .cards import Reader, first_sight, latent_card, living, read_names


def slider(draw: Callable[..., Any], **values: Sequence) -> ipywidgets.VBox:
    """A slider for each keyword over its values, and below it the picture that a function draws of the chosen ones.

    Parameters
    ----------
    draw : function
        Takes a value for each keyword; returns a matplotlib figure or a picture, uint8 [H, W, 3].
    **values
        Keyword -> sequence of values, or of (label, value): ``slider(draw, k=[1, 5, 20])``.

    Returns
    -------
    ipywidgets.VBox
        The sliders and an ``ipywidgets.Image``.
    """
    picture = ipywidgets.Image(format="png")
    wide = {"continuous_update": False, "layout": {"width": "90%"}}
    sliders = {name: ipywidgets.SelectionSlider(options=list(options), description=name, **wide) for name, options in values.items()}

    def show(_: Any = None) -> None:
        drawn, file = draw(**{name: one.value for name, one in sliders.items()}), io.BytesIO()
        if isinstance(drawn, np.ndarray):
            Image.fromarray(drawn).save(file, "PNG")
        else:
            drawn.savefig(file, format="png", bbox_inches="tight")
            plt.close(drawn)
        picture.value = file.getvalue()

    for one in sliders.values():
        one.observe(show, "value")
    show()
    return ipywidgets.VBox([*sliders.values(), picture])


def latent_slider(clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2) -> ipywidgets.VBox:
    """A slider over the living latents, the most frequent first, and the chosen one's strongest images, lit where it is active.

    Parameters
    ----------
    clip, sae, summary, dataset, names, layer
        As for :class:`LatentExplorer`.
    """
    reader, known = Reader.shared(clip, sae, dataset, layer), read_names(names, sae.W_enc.shape[1])
    summary.check(sae, dataset)
    if not len(latents := living(summary, "frequency").tolist()):
        raise ValueError(f"No image of {dataset.spec!r} activates a latent: there is nothing to slide over.")

    def draw(latent: int) -> np.ndarray:
        card = latent_card(reader, summary, latent, known, k=6, n_neighbors=0)
        pairs = zip(card.pictures, card.heats, strict=True)
        return np.hstack([blend(picture, heat, card.heats.max(), 0.0, 0.6, size=150) for picture, heat in pairs])

    box = slider(draw, latent=[(f"{latent} {known.get(latent, '')}".strip(), latent) for latent in latents])
    box.children[0].value = first_sight(summary, known)
    return box
