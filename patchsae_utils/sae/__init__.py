"""SAE: the model, its losses and variants, its training, its quality, and files of every program.

May import: activations, clip, data, run.
"""

from .dead_latents import dead_causes
from .files import load_sae, save_sae
from .logs import training_log
from .losses import objective, patchsae_loss
from .model import SparseAutoencoder
from .publishing import push_sae
from .quality import evaluate_sae, evaluation_table, firing_rates, patch_readings, random_control, readings_by_place
from .trainer import train_sae

__all__ = [
    "SparseAutoencoder",
    "dead_causes",
    "evaluate_sae",
    "evaluation_table",
    "firing_rates",
    "load_sae",
    "objective",
    "patch_readings",
    "patchsae_loss",
    "push_sae",
    "random_control",
    "readings_by_place",
    "save_sae",
    "train_sae",
    "training_log",
]
