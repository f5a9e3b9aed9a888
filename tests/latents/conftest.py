"""An SAE with sparse and dead latents, some pictures, and what it says of them, for all tests of this folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import inputs

from patchsae_utils.data import ImageData
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder


@pytest.fixture(scope="package")
def sae(tiny_clip):
    """32 -> 24 with sparse latents; latents 3 and 7 can never be active."""
    sae = SparseAutoencoder(tiny_clip.width, 24, seed=1).requires_grad_(False)
    sae.b_enc.fill_(-1.0)
    sae.b_enc[[3, 7]] = -1e6
    return sae


@pytest.fixture(scope="package")
def data():
    """Twelve small pictures, two of them alike; two classes of equal name, one with a single image, one with none."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) // (1 + i % 3) for i in range(12)]
    pixels[5] = pixels[2]
    labels = [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    return ImageData("noise", "test", ["missile", "crane", "crane", "empty"], labels, lambda i: Image.fromarray(pixels[i]))


@pytest.fixture(scope="package")
def summary(tiny_clip, sae, data):
    return summarize_latents(tiny_clip, sae, data, 1, k=4, tau=0.2, batch_size=5, progress=False)


@pytest.fixture(scope="package")
def all_latents(tiny_clip, sae, data):
    """[12, 197, 24] in float64, all at once."""
    with torch.no_grad():
        return sae.encode(tiny_clip.residual(inputs(tiny_clip, data), 1)).double()
