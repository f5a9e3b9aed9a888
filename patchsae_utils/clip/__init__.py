"""CLIP: any vision transformer, run block by block.

`load_clip` opens the embedded world's model, open_clip's and timm's; all have the words of `ClipModel`. `zero_shot` classifies with them. May import: data, run.
"""

from .loading import load_clip
from .model import ClipModel, Residual
from .zero_shot import accuracy_sentence, accuracy_table, domains_of, zero_shot_predictions

__all__ = ["ClipModel", "Residual", "accuracy_sentence", "accuracy_table", "domains_of", "load_clip", "zero_shot_predictions"]
