"""The autoencoder: its equations, its refusals."""

import numpy as np
import pytest
import torch

from patchsae_utils.sae import SparseAutoencoder


def perturbed(d_in=6, d_sae=20, seed=0, **options):
    """An SAE with no parameter left at 0, in float64."""
    sae = SparseAutoencoder(d_in, d_sae, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def test_forward_is_the_papers_equation():
    sae = perturbed()
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    W_enc, b_enc, W_dec, b_dec = (p.detach().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = np.einsum("nd,ds->ns", x.numpy() - b_dec, W_enc) + b_enc
    latents = np.where(pre > 0, pre, 0)
    out = sae(x)
    np.testing.assert_allclose(out.pre_activations.detach(), pre, rtol=1e-12)
    np.testing.assert_allclose(out.latents.detach(), latents, rtol=1e-12)
    np.testing.assert_allclose(out.reconstruction.detach(), latents @ W_dec + b_dec, rtol=1e-12)
    torch.testing.assert_close(sae.encode(x), out.latents, rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(out.latents), out.reconstruction, rtol=0, atol=0)


def test_leading_dimensions_are_free():
    sae = SparseAutoencoder(6, 20)
    x = torch.randn(3, 5, 6)
    assert sae(x).latents.shape == (3, 5, 20)
    torch.testing.assert_close(sae(x).reconstruction[1, 2], sae(x[1, 2]).reconstruction)


def test_topk_keeps_the_largest_and_no_negative():
    sae = perturbed(activation="topk", k=4)
    x = torch.randn(50, 6, dtype=torch.float64)
    out = sae(x)
    assert (out.latents >= 0).all()
    assert (out.latents.count_nonzero(1) <= 4).all()
    for pre, latents in zip(out.pre_activations, out.latents, strict=True):
        kept = latents > 0
        torch.testing.assert_close(latents[kept], pre[kept])
        if kept.any():
            assert pre[~kept].max() <= max(pre[kept].min().item(), 0) or kept.sum() == 4


def test_fresh_weights_follow_the_recipe():
    sae = SparseAutoencoder(16, 64, seed=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert sae.W_enc.abs().max() <= (6 / 64) ** 0.5  # Kaiming-uniform, fan = columns
    assert not sae.b_enc.any() and not sae.b_dec.any()
    torch.testing.assert_close(SparseAutoencoder(16, 64, seed=3).W_enc, sae.W_enc, rtol=0, atol=0)
    assert not torch.equal(SparseAutoencoder(16, 64, seed=4).W_enc, sae.W_enc)


def test_fresh_weights_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    SparseAutoencoder(4, 8)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_parallel_gradient_is_removed_and_nothing_else():
    sae = perturbed()
    sae.normalize_decoder()
    sae(torch.randn(9, 6, dtype=torch.float64)).reconstruction.square().sum().backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient()
    after = sae.W_dec.grad
    torch.testing.assert_close((after * sae.W_dec).sum(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)
    removed = before - after
    cosine = torch.nn.functional.cosine_similarity(removed, sae.W_dec, dim=1).abs()
    torch.testing.assert_close(cosine[removed.norm(dim=1) > 1e-9], torch.ones_like(cosine[removed.norm(dim=1) > 1e-9]))


def test_normalising_a_zero_row_gives_no_nan():
    sae = SparseAutoencoder(4, 8)
    sae.W_dec.data[2] = 0
    sae.normalize_decoder()
    assert torch.isfinite(sae.W_dec).all()


def test_fingerprint_follows_the_weights():
    sae = SparseAutoencoder(4, 8)
    before = sae.fingerprint
    assert before == SparseAutoencoder(4, 8).fingerprint
    sae.b_enc.data[3] += 1e-3
    assert sae.fingerprint != before
    assert SparseAutoencoder(4, 8, "topk", k=2).fingerprint != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_in": 0, "d_sae": 4}, "must be positive"),
        ({"d_in": 4, "d_sae": 4, "activation": "tanh"}, "Unknown activation 'tanh'. Valid: relu, topk"),
        ({"d_in": 4, "d_sae": 4, "activation": "topk"}, "needs k between 1 and d_sae=4"),
        ({"d_in": 4, "d_sae": 4, "activation": "topk", "k": 5}, "needs k between 1 and d_sae=4"),
        ({"d_in": 4, "d_sae": 4, "k": 2}, "no meaning for activation='relu'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**arguments)


def test_wrong_width_names_both_sides():
    sae = SparseAutoencoder(4, 8, metadata={"model_name": "openmoji", "layer": 4})
    with pytest.raises(ValueError, match=r"reads 4-dimensional activations of 'openmoji', layer 4; the given tensor holds 5-dimensional"):
        sae(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "given", [{"d_in": 5}, {"d_in": 4, "model_name": "ViT-B-16", "layer": 4}, {"d_in": 4, "model_name": "openmoji", "layer": 3}]
)
def test_activations_of_another_source_are_refused(given):
    sae = SparseAutoencoder(4, 8, metadata={"model_name": "openmoji", "layer": 4})
    with pytest.raises(
        ValueError, match=r"The SAE reads 4-dimensional activations of 'openmoji', layer 4; this store holds .*Extract again with layer=4"
    ):
        sae.check_source(**given)


def test_activations_of_the_same_or_an_unknown_source_pass():
    sae = SparseAutoencoder(4, 8, metadata={"model_name": "openmoji", "layer": 4})
    sae.check_source(d_in=4, model_name="openmoji", layer=4)
    sae.check_source(d_in=4)
    SparseAutoencoder(4, 8).check_source(d_in=4, model_name="openmoji", layer=4)
