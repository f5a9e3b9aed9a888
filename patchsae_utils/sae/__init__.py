"""SAE: the autoencoder over residual activations, trained, measured, saved and shared.

The model and its variants (`model`, `variants`), objectives (`losses`), training (`starts`, `steps`, `trainer`, `sparse`), what an SAE is
worth (`quality`), its random control and its latents as a dictionary (`dictionary`), files of seven programs and the hub (`files`,
`formats`). May import: activations, clip, data, run.
"""

from .dictionary import random_sae, sae_dictionary
from .files import load_sae, push_sae, save_sae
from .losses import patchsae_loss
from .model import SparseAutoencoder
from .quality import dead_causes, evaluate_sae, evaluation_sentence, evaluation_table, firing_rates, places_sentence, readings_by_place
from .trainer import train_sae, training_log

__all__ = [
    "SparseAutoencoder", "dead_causes", "evaluate_sae", "evaluation_sentence", "evaluation_table", "firing_rates", "load_sae",
    "patchsae_loss", "places_sentence", "push_sae", "random_sae", "readings_by_place", "sae_dictionary", "save_sae", "train_sae", "training_log",
]  # fmt: skip
