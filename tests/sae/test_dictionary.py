"""Random controls are as sparse as the SAE."""

import numpy as np
import pytest
import torch

from patchsae_utils.sae.dictionary import random_sae, select_latents
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_random_sae_is_as_sparse_as_the_sae_on_the_tokens_given(activation):
    k = 5 if activation in ("topk", "batchtopk", "matryoshka") else None
    sae = SparseAutoencoder(16, 64, activation, k=k, seed=1).requires_grad_(False)
    x = 3 * torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) + 1
    sae.b_dec.fill_(1.0)
    if activation in ("batchtopk", "matryoshka", "jumprelu"):
        sae.threshold.fill_(2.0)
    elif activation != "topk":
        sae.b_enc.fill_(-2.0)
    control = random_sae(sae, x)
    ours, theirs = ((each.encode(x) > 0).float().sum(1).mean().item() for each in (sae, control))
    assert 0 < ours < 16 and theirs == pytest.approx(ours, rel=1e-3)
    assert control.activation == activation and (control.encode(x) >= 0).all()
    guess = control.decode(control.encode(x)) - control.b_dec
    assert (((x - control.b_dec) * guess).sum() / guess.square().sum()).item() == pytest.approx(1, abs=1e-3)  # no other gain is better
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(control.b_dec, sae.b_dec)
    assert torch.equal(control.W_enc, random_sae(sae, x).W_enc)
    if activation in ("batchtopk", "matryoshka", "jumprelu", "gated"):
        projections = (x - 1) @ control.W_enc
        active = control.encode(x) > 0
        torch.testing.assert_close(control.encode(x)[active], projections[active], rtol=1e-4, atol=1e-4)  # a threshold moves no value
    with pytest.raises(ValueError, match=r"tokens \[N, D\]"):
        random_sae(SparseAutoencoder(16, 64), x[:0])


def test_a_random_sae_of_a_silent_sae_is_silent():
    sae = SparseAutoencoder(6, 12, "jumprelu").requires_grad_(False)
    sae.threshold.fill_(1e6)
    x = torch.randn(50, 6)
    assert not random_sae(sae, x).encode(x).any()


@pytest.mark.parametrize("latents", [np.array([1.7]), torch.ones(20, dtype=torch.bool), np.arange(20) > 3])
def test_a_mask_of_latents_is_no_list_of_their_numbers(latents):
    """It was read as the latents 0 and 1, over and over."""
    with pytest.raises(ValueError, match="no latent 1.7|by their numbers"):
        select_latents(SparseAutoencoder(6, 20), torch.randn(3, 6), latents)
