"""The objectives, against float64 references written plainly in numpy, and their gradients against finite differences."""

import numpy as np
import pytest
import torch
from tiny_saes import dense, perturbed

from patchsae_utils.sae.losses import auxk_loss, auxk_size, objective, patchsae_loss
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder

D, S, WEIGHT = 6, 20, 0.05
OPTIONS = {"topk": {"k": 4}, "batchtopk": {"k": 4}, "jumprelu": {"bandwidth": 0.4}, "matryoshka": {"k": 4, "groups": (3, 8, 20)}}
SPARSE = [name for name in ACTIVATIONS if name != "gated"]


def variant(activation, seed=0):
    """An SAE with no parameter at 0, in float64, in training mode."""
    sae = perturbed(D, S, seed=seed, activation=activation, **OPTIONS.get(activation, {}))
    if activation == "jumprelu":
        sae.threshold.data.abs_()
    sae.normalize_decoder()
    return sae


@pytest.fixture
def tokens():
    return 0.5 + torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def dead():
    return torch.isin(torch.arange(S), torch.tensor([1, 7, 12, 13, 19]))


def largest(values, n):
    """The n largest positive entries of an array of any shape, the others 0."""
    flat = np.maximum(values, 0).ravel()
    kept = np.zeros_like(flat)
    kept[np.argsort(-flat)[:n]] = np.sort(flat)[::-1][:n]
    return kept.reshape(values.shape)


def auxk(w, pre, x, x_hat, dead, constants):
    """alpha ||e - e_hat||^2 with e held constant, and the constant."""
    residual = x - x_hat if constants is None else constants
    total = 0.0
    for pre_token, e in zip(pre, residual, strict=True):
        guess = largest(pre_token[dead], min(auxk_size(D), dead.sum())) @ w["W_dec"][dead]
        total += ((e - guess) ** 2).sum() / len(x)
    return total / 32, residual


def finite_differences(total, values, pace=1e-6):
    """The gradient of ``total()`` with respect to an array that it reads."""
    gradient = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        keep, totals = values[place], []
        for sign in (1, -1):
            values[place] = keep + sign * pace
            totals.append(total())
        values[place] = keep
        gradient[place] = (totals[0] - totals[1]) / (2 * pace)
    return gradient


def reference(activation, w, x, dead, constants=None, factor=1.0):
    """(error, sparsity, auxiliary), and what the optimiser must not differentiate; ``constants`` fixes that."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if activation == "relu":  # section 1 of PAPER.md
        h = np.maximum(pre, 0)
        z = h @ w["W_dec"] + w["b_dec"]
        error = (z - x) ** 2 / np.linalg.norm(x, axis=1, keepdims=True)
        g = np.exp(pre[:, dead]) @ w["W_dec"][dead]
        if constants is None:
            norm = np.linalg.norm(x - z, axis=1, keepdims=True)
            scale = norm / (1e-6 + 2 * np.linalg.norm(g, axis=1, keepdims=True))
            constants = (x - z, norm, scale, error / ((g * scale - (x - z)) ** 2 / norm + 1e-6))
        r, norm, scale, ratio = constants
        ghost = (ratio * (g * scale - r) ** 2 / norm).mean() if dead.any() else 0.0
        return ((factor * error).mean(), WEIGHT * h.sum(1).mean(), ghost), constants
    if activation == "gated":
        frozen = (w["W_dec"].copy(), w["b_dec"].copy()) if constants is None else constants[0]
        projection = (x - w["b_dec"]) @ w["W_enc"]
        h = np.where(projection + w["b_enc"] > 0, np.maximum(np.exp(w["r_mag"]) * projection + w["b_mag"], 0), 0)
        gate = np.maximum(pre, 0)
        x_hat = h @ w["W_dec"] + w["b_dec"]
        aux, residual = auxk(w, pre, x, x_hat, dead, None if constants is None else constants[1])
        learning = ((gate @ frozen[0] + frozen[1] - x) ** 2).sum(1).mean()
        return (((x_hat - x) ** 2).sum(1).mean(), WEIGHT * gate.sum(1).mean(), learning + aux), (frozen, residual)
    if activation == "jumprelu":
        active = pre > w["threshold"]
        x_hat = (pre * active) @ w["W_dec"] + w["b_dec"]
        aux, residual = auxk(w, pre, x, x_hat, dead, constants)
        return (((x_hat - x) ** 2).sum(1).mean(), WEIGHT * active.sum(1).mean(), aux), residual
    k = 4
    h = np.stack([largest(row, k) for row in pre]) if activation == "topk" else largest(pre, k * len(x))
    x_hat = h @ w["W_dec"] + w["b_dec"]
    groups = (3, 8, 20) if activation == "matryoshka" else (S,)
    error = sum(((h[:, :m] @ w["W_dec"][:m] + w["b_dec"] - x) ** 2).sum(1).mean() for m in groups)
    aux, residual = auxk(w, pre, x, x_hat, dead, constants)
    return (error, 0.0, aux), residual


def named(sae):
    return {name: parameter.detach().numpy().copy() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize(
    "activation, cls, with_dead", [*((name, 1, True) for name in ACTIVATIONS), ("relu", 3.5, True), ("relu", 3.5, False)]
)
def test_terms_equal_the_reference(activation, cls, with_dead, tokens, dead):
    """FAULTS D21: the ghost term's ratio is taken before the CLS coefficient, as in the official code."""
    sae, is_cls = variant(activation), torch.arange(9) % 3 == 0
    loss = objective(sae)(sae, tokens, dead if with_dead else None, WEIGHT, cls, is_cls=is_cls)
    factor = np.where(is_cls, cls, 1.0)[:, None]
    terms, _ = reference(activation, named(sae), tokens.numpy(), dead.numpy() & with_dead, factor=factor)
    np.testing.assert_allclose([loss.mse.item(), loss.l1.item(), loss.ghost.item()], terms, rtol=1e-10, atol=1e-15)
    assert loss.total.item() == pytest.approx(sum(terms), rel=1e-10) and (loss.ghost > 0) == with_dead


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_finite_differences(activation, tokens, dead):
    """All but the thresholds', whose true derivative is 0 almost everywhere; they have a test of their own."""
    sae = variant(activation)
    objective(sae)(sae, tokens, dead, WEIGHT).total.backward()
    weights = named(sae)
    _, constants = reference(activation, weights, tokens.numpy(), dead.numpy())
    total = lambda: sum(reference(activation, weights, tokens.numpy(), dead.numpy(), constants)[0])  # noqa: E731
    for name in weights.keys() - {"threshold"}:
        gradient = getattr(sae, name).grad
        np.testing.assert_allclose(gradient.numpy(), finite_differences(total, weights[name]), rtol=2e-5, atol=1e-7, err_msg=name)
        assert gradient.abs().max() > 1e-3, name


def test_ghost_reads_pre_activations(tokens, dead):
    """PAPER.md 1: after the ReLU exp(0) = 1, and the encoder of the dead would get nothing."""
    sae = variant("relu")
    sae.b_enc.data[dead] -= 20  # so that they really don't fire
    for wrong in (False, True):
        output = sae(tokens)
        if wrong:
            output = output._replace(pre_activations=output.latents)
        sae.zero_grad()
        patchsae_loss(sae, tokens, dead, WEIGHT, output=output).total.backward()
        assert sae.W_enc.grad[:, dead].any() == (not wrong)
    by_mask, by_number = (patchsae_loss(sae, tokens, which, WEIGHT).ghost for which in (dead, dead.nonzero()[:, 0]))
    assert torch.equal(by_mask, by_number) and by_mask > 0


def test_all_zero_tokens_and_perfect_reconstructions_give_no_nan():
    sae = SparseAutoencoder(6, 20)
    dead = torch.ones(20, dtype=torch.bool)
    loss = patchsae_loss(sae, torch.zeros(3, 6), dead, WEIGHT)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())


def test_cls_coefficient_needs_to_know_where_cls_is(tokens):
    sae = variant("relu")
    with pytest.raises(ValueError, match=r"needs to know which tokens are CLS"):
        patchsae_loss(sae, tokens, None, WEIGHT, 2.0)
    with pytest.raises(ValueError, match=r"is_cls has shape \(3,\)"):
        patchsae_loss(sae, tokens, None, WEIGHT, 2.0, is_cls=torch.zeros(3, dtype=torch.bool))
    patchsae_loss(sae, tokens, None, WEIGHT, 1.0)  # nothing to weigh, nothing to know


def test_auxk_follows_the_source():
    assert (auxk_size(768), auxk_size(192), auxk_size(2), auxk_size(1)) == (512, 128, 1, 1)
    x, rows = torch.tensor([[3.0, 1.0]]), torch.eye(2)  # one latent of two: the larger
    assert auxk_loss(x, torch.zeros(1, 2), torch.tensor([[2.0, 1.5]]), rows).item() == 1 + 1
    assert auxk_loss(x, torch.zeros(1, 2), torch.tensor([[-2.0, -5.0]]), rows).item() == 9 + 1


def test_thresholds_learn_by_the_published_estimator(tokens):
    sae, x = variant("jumprelu"), tokens
    output = sae(x)
    output.reconstruction.retain_grad()
    objective(sae)(sae, x, None, WEIGHT, output=output).total.backward()
    width = OPTIONS["jumprelu"]["bandwidth"]
    pre, threshold, rows = output.pre_activations.detach(), sae.threshold.detach(), sae.W_dec.detach()
    on_latents = output.reconstruction.grad @ rows.T
    inside = (pre - threshold).abs() < width / 2
    expected = (inside * (-threshold / width * on_latents - WEIGHT / width / len(x))).sum(0).numpy()
    np.testing.assert_allclose(sae.threshold.grad.numpy(), expected, rtol=1e-10, atol=1e-14)
    assert np.count_nonzero(expected) > 5


def test_a_threshold_below_0_lets_no_negative_through_and_comes_back():
    sae = variant("jumprelu")
    with torch.no_grad():
        sae.threshold[3] = -0.1
    assert (sae.encode(torch.randn(50, D, dtype=torch.float64)) >= 0).all()
    sae.normalize_decoder()
    assert sae.threshold[3] == 0 and sae.threshold.min() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cls_coefficient_weighs_squared_errors_alone(activation):
    """Of token 0 of every image, not of image 0: by linearity, weights 1 and 10 differ by nine times the CLS tokens' share."""
    sae = variant(activation).eval()
    images = torch.randn(4, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss = objective(sae)
    once, ten = (loss(sae, images, None, WEIGHT, factor) for factor in (1.0, 10.0))
    cls = loss(sae, images[:, :1], None, WEIGHT)
    torch.testing.assert_close(ten.mse - once.mse, 9 * cls.mse / 3)
    torch.testing.assert_close(ten.l1, once.l1)
    mixed = loss(sae, images.flatten(0, 1), None, WEIGHT, 10.0, is_cls=(torch.arange(12) % 3 == 0))
    torch.testing.assert_close(mixed.total, ten.total)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", SPARSE)
def test_sparse_equals_dense_in_value_and_gradient(activation, training, dead):
    images = torch.randn(5, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    results = []
    for sparse in (False, True):
        sae = variant(activation).train(training)
        if sae.threshold is not None and not sae.threshold.any():
            sae.threshold.fill_(0.4)
        output = sae(images, sparse=sparse)
        loss = objective(sae)(sae, images, dead, WEIGHT, 3.0, output=output)
        loss.total.backward()
        latents = dense(output.latents).view(5, 7, S) if sparse else output.latents
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        results.append([*loss, output.reconstruction, latents, gradients, sae.decode(output.latents).reshape(5, 7, D), sae.state_dict()])
        assert (output.pre_activations is None) == sparse
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    if activation == "jumprelu":
        assert results[0][6]["threshold"].count_nonzero() > 5


@pytest.mark.parametrize("bias", [1e30, 1e4, 0.0, -1e4, -1e30])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "matryoshka"])
def test_dead_latent_terms_are_finite_whatever_the_pre_activations_even_if_all_are_dead(activation, bias):
    sae = variant(activation).float()
    sae.b_enc.data[[3, 5]] = bias
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    living = sae.decode(torch.zeros(9, S))
    output = sae(x)._replace(reconstruction=living, latents=torch.zeros(9, S))  # as if none had fired
    loss = objective(sae)(sae, x, torch.ones(S, dtype=torch.bool), WEIGHT, output=output)
    loss.total.backward()
    assert torch.isfinite(loss.ghost)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    assert sae.W_dec.grad.abs().max() > 0
