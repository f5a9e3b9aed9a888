"""What the tests of interventions share: an SAE with biases, a model with prompts, rankings."""

import pytest
import torch

from patchsae_utils.adaptation import MaPLe
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = -2


@pytest.fixture(scope="session")
def sae(tiny_sae):
    """With a bias on either side, so that forgetting one shows."""
    sae = SparseAutoencoder(tiny_sae.d_in, tiny_sae.d_sae, seed=0).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(sae.d_in, generator=torch.Generator().manual_seed(1)))
    sae.b_enc.copy_(0.1 * torch.randn(sae.d_sae, generator=torch.Generator().manual_seed(2)))
    return sae


@pytest.fixture(scope="session")
def maple(tiny_clip):
    return MaPLe(tiny_clip, n_ctx=2, depth=2)


@pytest.fixture(scope="session")
def counts(tiny_dataset, tiny_sae):
    """Rankings of latents by class, [C, S]."""
    return torch.randint(0, 50, (len(tiny_dataset.class_names), tiny_sae.d_sae), generator=torch.Generator().manual_seed(3)).float()
