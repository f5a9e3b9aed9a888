"""Explorers for the notebook: widgets that show a latent, an image and its patches. See :mod:`.widgets`."""

from .adaptation import AdaptationView
from .gallery import export_gallery
from .latent_explorer import LatentExplorer
from .patch_explorer import PatchExplorer
from .pointing import point, pointing_sentence
from .sliders import latent_slider, slider
from .steering import SteeringPanel
from .widgets import link

__all__ = [
    "AdaptationView", "LatentExplorer", "PatchExplorer", "SteeringPanel", "export_gallery", "latent_slider", "link", "point",
    "pointing_sentence", "slider",
]  # fmt: skip
