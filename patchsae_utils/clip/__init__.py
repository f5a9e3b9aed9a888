"""CLIP: any vision transformer, run block by block.

`load_clip` opens open_clip's models, the embedded world's and timm's; `zero_shot` classifies with them. May import: data, run.
"""

from .model import ClipModel, Residual, load_clip
from .zero_shot import accuracy_table, domains_of, embed_images, zero_shot_predictions

__all__ = ["ClipModel", "Residual", "accuracy_table", "domains_of", "embed_images", "load_clip", "zero_shot_predictions"]
