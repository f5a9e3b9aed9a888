"""The autoencoder: its equations, its refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import loud
from tiny_saes import perturbed

from patchsae_utils.adaptation.prompts import VisualPrompt
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder
from patchsae_utils.sae.starts import Normalization


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


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_the_centre_of_unit_size_tokens_gets_its_gradient(activation, sparse):
    """Finite differences: with ``token_norm`` the centre is divided by each token's size, too; its gradient was a quarter off."""
    sae = perturbed(activation=activation)
    sae.token_norm = True
    x = torch.randn(5, sae.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    total = lambda: sae(x, sparse=sparse).reconstruction.square().sum()  # noqa: E731
    total().backward()
    for i, gradient in enumerate(sae.b_dec.grad.tolist()):
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                sae.b_dec[i] += step
                ends.append(float(total()))
            sae.b_dec[i] += 1e-6
        assert gradient == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-6)


def test_batchtopk_keeps_the_largest_of_the_batch_in_training_and_what_exceeds_its_threshold_afterwards():
    sae = perturbed(activation="batchtopk", k=3)
    x = torch.randn(4, 10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = sae(x)
    pre = out.pre_activations.detach().flatten()
    kept = torch.zeros_like(pre)
    best = torch.from_numpy(np.argsort(-pre.numpy())[: 3 * 40].copy())
    kept[best] = pre[best].clamp_min(0)
    torch.testing.assert_close(out.latents.flatten(), kept)
    assert out.latents.count_nonzero(-1).unique().numel() > 1  # tokens share the budget
    assert sae.threshold.item() == pytest.approx(kept[kept > 0].min().item())
    sae.eval()
    expected = torch.where(out.pre_activations > sae.threshold, out.pre_activations, 0.0)
    torch.testing.assert_close(sae(x).latents, expected)
    torch.testing.assert_close(sae.train().encode(x), expected)  # of single tokens, in either mode
    torch.testing.assert_close(sae.encode(x[1, 2]), expected[1, 2])


@pytest.mark.parametrize("sparse", [False, True])
def test_the_threshold_is_a_running_mean_and_moves_in_training_alone(sparse):
    sae = perturbed(activation="matryoshka", k=3)
    batches = [torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = None
    for x in batches:
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach().flatten()
        smallest = pre.clamp_min(0).sort(descending=True).values[:90]
        smallest = smallest[smallest > 0].min().item()
        expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
        sae(x, sparse=sparse)
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-6)
    before = sae.threshold.item()
    with torch.no_grad():
        sae(batches[0], sparse=sparse)
    sae.eval()(batches[0], sparse=sparse)
    sae.train().encode(batches[0])
    assert sae.threshold.item() == before
    sae.b_enc.data.fill_(-1e9)
    sae(batches[0], sparse=sparse)  # nothing is kept: nothing to learn from
    assert sae.threshold.item() == before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_alone_are_columns_of_all(activation):
    sae = perturbed(activation=activation, **({"k": 3} if activation in ("topk", "batchtopk", "matryoshka") else {}))
    x, some = torch.randn(5, 4, 6, dtype=torch.float64), torch.tensor([17, 2, 2, 9])
    if sae.threshold is not None:
        sae.threshold.data.abs_().add_(0.05)
    torch.testing.assert_close(sae.pre_activations(x, latents=some), sae.pre_activations(x)[..., some])
    torch.testing.assert_close(sae.encode(x, latents=some), sae.encode(x)[..., some])


def test_activations_with_other_statistics_are_refused():
    x = 5 + torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder(6, 20, metadata={"model_name": "openmoji", "layer": 4})
    sae.check_statistics(100 * x)  # nothing known, nothing refused
    Normalization.of(x, "mean_and_norm").fold(sae)
    sae.check_statistics(x[:100])
    sae.check_statistics(x.view(50, 10, 6) * 1.02)
    for other in (x / x.norm(dim=1, keepdim=True), 10 * x, x - x.mean(0), x.mean(0) + 0.01 * (x - x.mean(0)), x * torch.nan):
        with pytest.raises(ValueError, match=r"trained on activations 2.4\d away .* of 'openmoji', layer 4; another model's are"):
            sae.check_statistics(other, source="another model's")


def test_fresh_weights_follow_the_recipe():
    assert SparseAutoencoder(4, 64, "matryoshka", k=2).groups == (4, 8, 16, 32, 64)
    assert SparseAutoencoder(4, 3, "matryoshka", k=2).groups == (1, 3)
    sae = SparseAutoencoder(16, 64, seed=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert sae.W_enc.abs().max() <= (6 / 64) ** 0.5  # Kaiming-uniform, fan = columns
    assert not sae.b_enc.any() and not sae.b_dec.any()
    torch.testing.assert_close(SparseAutoencoder(16, 64, seed=3).W_enc, sae.W_enc, rtol=0, atol=0)
    assert not torch.equal(SparseAutoencoder(16, 64, seed=4).W_enc, sae.W_enc)


def test_fingerprint_follows_the_weights():
    sae = SparseAutoencoder(4, 8)
    before = sae.fingerprint
    assert before == SparseAutoencoder(4, 8).fingerprint
    sae.b_enc.data[3] += 1e-3
    assert sae.fingerprint != before
    assert SparseAutoencoder(4, 8, "topk", k=2).fingerprint != before
    variants = [SparseAutoencoder(4, 8, "matryoshka", k=2, groups=groups) for groups in ((8,), (2, 8))]
    variants += [SparseAutoencoder(4, 8, "jumprelu", bandwidth=width) for width in (0.1, 0.2)] + [SparseAutoencoder(4, 8, "gated")]
    variants[0].threshold.fill_(0.3)
    trained = variants[0].fingerprint
    variants[0].threshold.fill_(0.4)
    assert len({trained, *(sae.fingerprint for sae in variants)}) == 6


@pytest.mark.parametrize(("options", "expected"), [({}, "a5b41f01eaeef572"), ({"activation": "topk", "k": 2}, "f06aa406365d08da")])
def test_fingerprint_of_the_first_variants_is_what_it_always_was(options, expected):
    """Artifacts are recognised by it."""
    sae = SparseAutoencoder(4, 8, **options)
    for i, parameter in enumerate(sae.parameters()):
        parameter.data.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 8 + i)
    assert sae.fingerprint == expected


@pytest.mark.parametrize(("arguments", "message"), [
    ({"d_in": 0}, "must be positive"),
    ({"activation": "tanh"}, "Unknown activation 'tanh'. Valid: relu, topk"),
    ({"activation": "topk"}, "needs k between 1 and d_sae=4"),
    ({"activation": "topk", "k": 5}, "needs k between 1 and d_sae=4"),
    ({"k": 2}, "no meaning for activation='relu'"),
    ({"activation": "batchtopk"}, "activation='batchtopk' needs k between 1 and d_sae=4"),
    ({"groups": (2, 4)}, "groups=.* no meaning for activation='relu'.*'matryoshka'"),
    ({"bandwidth": 0.1}, "bandwidth=0.1 has no meaning"),
    ({"activation": "jumprelu", "bandwidth": -1.0}, "bandwidth must be positive"),
    ({"activation": "matryoshka", "k": 1, "groups": (3, 2, 4)}, r"rise from at least 1 to d_sae=4, got \(3, 2, 4\)"),
    ({"activation": "matryoshka", "k": 1, "groups": (2, 3)}, "rise from at least 1 to d_sae=4"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**{"d_in": 4, "d_sae": 4} | arguments)


def store(d_in=4, **known):
    return SimpleNamespace(d_in=d_in, metadata=SimpleNamespace(**known))


KNOWN = {"model_name": "ViT-B-16", "layer": 4, "weights_hash": "aaaa", "tokens": "patches", "preprocessing": "Resize(224)"}


@pytest.mark.parametrize(("given", "message"), [
    ({"d_in": 5}, "reads 4-dimensional .* this store holds 5-dimensional"),
    ({"layer": 3}, "of 'ViT-B-16', layer 4; this store holds .* of 'ViT-B-16', layer 3. Extract again with layer=4"),
    ({"weights_hash": "bbbb"}, "of 'ViT-B-16', layer 4, weights aaaa; this store holds .* layer 4, weights bbbb"),
    ({"tokens": "cls"}, "tokens patches; this store .* tokens cls"),
    ({"preprocessing": "Resize(\n  336)"}, r"preprocessing Resize\(224\); this store .* preprocessing Resize\( 336\)"),
    ({"model_name": "ViT-L-14", "weights_hash": "bbbb"}, "of 'ViT-B-16', layer 4; this store holds .*'ViT-L-14'"),
    ({"model_name": "ViT-L-14", "weights_hash": None}, "of 'ViT-B-16', layer 4; this store holds .*'ViT-L-14'"),
])  # fmt: skip
def test_what_an_sae_says_of_itself_is_compared(given, message):
    sae = SparseAutoencoder(4, 8, metadata=KNOWN)
    sae.check_store(store(**KNOWN))
    sae.check_store(store(**(KNOWN | {"model_name": "the same/in another place", "tokens": "all"})))
    sae.check_store(store(**(KNOWN | {"model_name": "ViT-B-16-quickgelu", "weights_hash": None})))  # what is not known is not compared
    SparseAutoencoder(4, 8).check_store(store(**KNOWN))
    with pytest.raises(ValueError, match=message):
        sae.check_store(store(**(KNOWN | given)))


def test_a_model_is_compared_by_width_layer_weights_and_preprocessing(tiny_clip):
    """FAULTS C8: the strict check."""
    metadata = {"model_name": "tiny", "weights_hash": tiny_clip.weights_hash, "layer": 1, "preprocessing": repr(tiny_clip.preprocess)}
    SparseAutoencoder(tiny_clip.width, 64, metadata=metadata).check_model(tiny_clip, -2)
    wrong = {"layer 2;": {"layer": 2}, "weights 0{16};": {"weights_hash": "0" * 16}, "preprocessing Resize;": {"preprocessing": "Resize"}}
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=f"{message} the residual stream of 'tiny' holds"):
            SparseAutoencoder(tiny_clip.width, 64, metadata=metadata | change).check_model(tiny_clip, -2)
    with pytest.raises(ValueError, match="reads 31-dimensional"):
        SparseAutoencoder(31, 64).check_model(tiny_clip, -2)


def test_an_adapted_model_counts_as_its_base_on_either_side(tiny_clip):
    """An SAE of CLIP reads an adapted CLIP, an adapted CLIP's SAE reads both; another CLIP's still reads neither."""
    adapted = loud(VisualPrompt, tiny_clip)
    for trained_on in (tiny_clip, adapted):
        sae = SparseAutoencoder(tiny_clip.width, 64, metadata={"model_name": "tiny", "weights_hash": trained_on.weights_hash, "layer": 1})
        for model in (tiny_clip, adapted):
            sae.check_model(model, -2)
    stranger = SparseAutoencoder(tiny_clip.width, 64, metadata={"model_name": "tiny", "weights_hash": "0" * 16 + "+1", "layer": 1})
    for model in (tiny_clip, adapted):
        with pytest.raises(ValueError, match="weights 0"):
            stranger.check_model(model, -2)
