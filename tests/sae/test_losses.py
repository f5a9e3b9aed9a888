"""The objectives, against float64 references written plainly in numpy, and their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from tiny_saes import perturbed

from patchsae_utils.sae.dictionary import geometric_median
from patchsae_utils.sae.losses import auxk_loss, auxk_size, normalized_squared_error, objective, patchsae_loss
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder
from patchsae_utils.sae.variants import jump_relu, step

LAMBDA = 0.03


def reference(weights, x, dead, l1_coefficient, cls_factor, constants=None):
    """(mse, l1, ghost) of PAPER section 1, token by token; ``constants`` fixes what the optimiser must not differentiate."""
    W_enc, b_enc, W_dec, b_dec = weights
    n, d = x.shape
    mse = l1 = ghost = 0.0
    kept = []
    for i in range(n):
        pre = [sum((x[i, a] - b_dec[a]) * W_enc[a, s] for a in range(d)) + b_enc[s] for s in range(len(b_enc))]
        h = [max(p, 0.0) for p in pre]
        z = [sum(h[s] * W_dec[s, a] for s in range(len(h))) + b_dec[a] for a in range(d)]
        norm = math.sqrt(sum(v * v for v in x[i]))
        error = [(z[a] - x[i, a]) ** 2 / norm for a in range(d)]
        mse += cls_factor[i] * sum(error) / (n * d)
        l1 += l1_coefficient * sum(h) / n
        g = [sum(math.exp(pre[s]) * W_dec[s, a] for s in dead) for a in range(d)]
        if constants is None:
            r = [x[i, a] - z[a] for a in range(d)]
            r_norm = math.sqrt(sum(v * v for v in r))
            scale = r_norm / (1e-6 + 2 * math.sqrt(sum(v * v for v in g)))
            raw = [(g[a] * scale - r[a]) ** 2 / r_norm for a in range(d)]
            ratio = [error[a] / (raw[a] + 1e-6) for a in range(d)]
            kept.append((r, r_norm, scale, ratio))
        else:
            r, r_norm, scale, ratio = constants[i]
            raw = [(g[a] * scale - r[a]) ** 2 / r_norm for a in range(d)]
        if len(dead):
            ghost += sum(ratio[a] * raw[a] for a in range(d)) / (n * d)
    return (mse, l1, ghost), kept


@pytest.fixture
def case():
    sae = perturbed()
    sae.normalize_decoder()
    x = 2 + torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[1, 7, 19]] = True
    with torch.no_grad():
        sae.b_enc[dead] -= 8  # so that they really don't fire
    return sae, x, dead


def arrays(sae):
    return [p.detach().numpy().copy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("cls_coefficient", [1.0, 3.5])
def test_terms_equal_the_reference(case, with_dead, cls_coefficient):
    """FAULTS D21: the ghost term's ratio is taken before the CLS coefficient, as in the official code."""
    sae, x, dead = case
    is_cls = torch.tensor([True, False, False, True, False])
    loss = patchsae_loss(sae, x, dead if with_dead else None, LAMBDA, cls_coefficient, is_cls=is_cls)
    factor = np.where(is_cls, cls_coefficient, 1.0)
    (mse, l1, ghost), _ = reference(arrays(sae), x.numpy(), np.flatnonzero(dead) if with_dead else [], LAMBDA, factor)
    assert loss.mse.item() == pytest.approx(mse, rel=1e-10)
    assert loss.l1.item() == pytest.approx(l1, rel=1e-10)
    assert loss.ghost.item() == pytest.approx(ghost, rel=1e-10, abs=1e-15)
    assert loss.total.item() == pytest.approx(mse + l1 + ghost, rel=1e-10)
    assert (loss.ghost > 0) == with_dead


def test_gradients_equal_finite_differences_ghost_included(case):
    sae, x, dead = case
    index = np.flatnonzero(dead)
    patchsae_loss(sae, x, dead, LAMBDA).total.backward()
    weights = arrays(sae)
    ones = np.ones(len(x))
    _, constants = reference(weights, x.numpy(), index, LAMBDA, ones)
    step = 1e-6
    for parameter, values in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), weights, strict=True):
        gradient = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            keep = values[place]
            totals = []
            for sign in (1, -1):
                values[place] = keep + sign * step
                totals.append(sum(reference(weights, x.numpy(), index, LAMBDA, ones, constants)[0]))
            values[place] = keep
            gradient[place] = (totals[0] - totals[1]) / (2 * step)
        np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=2e-5, atol=2e-8)


def test_ghost_gradients_reach_the_dead_alone(case):
    sae, x, dead = case
    patchsae_loss(sae, x, None, 0.0).total.backward()
    assert not sae.W_enc.grad[:, dead].any() and not sae.W_dec.grad[dead].any()
    without = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    patchsae_loss(sae, x, dead, 0.0).total.backward()
    assert (sae.W_enc.grad[:, dead].norm(dim=0) > 0).all() and (sae.W_dec.grad[dead].norm(dim=1) > 0).all()
    torch.testing.assert_close(sae.W_dec.grad[~dead], without["W_dec"][~dead], rtol=0, atol=0)
    torch.testing.assert_close(sae.W_enc.grad[:, ~dead], without["W_enc"][:, ~dead], rtol=0, atol=0)


def test_ghost_reads_pre_activations(case):
    """PAPER.md 1: after the ReLU exp(0) = 1, and the encoder of the dead would get nothing."""
    sae, x, dead = case
    patchsae_loss(sae, x, dead, LAMBDA).total.backward()
    assert sae.W_enc.grad[:, dead].abs().max() > 0
    output = sae(x)
    sae.zero_grad()
    patchsae_loss(sae, x, dead, LAMBDA, output=output._replace(pre_activations=output.latents)).total.backward()
    assert not sae.W_enc.grad[:, dead].any()


def test_all_zero_tokens_and_perfect_reconstructions_give_no_nan():
    sae = SparseAutoencoder(6, 20)
    dead = torch.ones(20, dtype=torch.bool)
    loss = patchsae_loss(sae, torch.zeros(3, 6), dead, LAMBDA)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())


def test_cls_coefficient_weighs_token_0_of_every_image_not_image_0(case):
    sae, _, _ = case
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    error = normalized_squared_error(x, sae(x).reconstruction)
    error[:, 0] *= 10
    torch.testing.assert_close(patchsae_loss(sae, x, None, 0.0, 10.0).total, error.mean())
    flat = torch.zeros(12, dtype=torch.bool)
    flat[::4] = True
    mixed = patchsae_loss(sae, x.flatten(0, 1), None, 0.0, 10.0, is_cls=flat)
    torch.testing.assert_close(mixed.total, error.mean())


def test_cls_coefficient_needs_to_know_where_cls_is(case):
    sae, x, _ = case
    with pytest.raises(ValueError, match=r"needs to know which tokens are CLS"):
        patchsae_loss(sae, x, None, LAMBDA, 2.0)
    with pytest.raises(ValueError, match=r"is_cls has shape \(3,\)"):
        patchsae_loss(sae, x, None, LAMBDA, 2.0, is_cls=torch.zeros(3, dtype=torch.bool))
    patchsae_loss(sae, x, None, LAMBDA, 1.0)  # nothing to weigh, nothing to know


def test_geometric_median_minimises_the_sum_of_distances():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(300, 5, generator=generator), 50 + torch.randn(60, 5, generator=generator)])

    def total(center):
        return (points.double() - center.double()).norm(dim=1).sum()

    median = geometric_median(points)
    assert median.norm() < 1.0  # the mean lies at 8.3 in every dimension: outliers hardly move the median
    for direction in torch.eye(5):
        assert total(median) <= total(median + 1e-2 * direction) and total(median) <= total(median - 1e-2 * direction)
    torch.testing.assert_close(geometric_median(torch.ones(4, 3)), torch.ones(3))


# -- the other variants' ---------------------------------------------------------------------------------------------------


def test_auxk_follows_the_source():
    assert (auxk_size(768), auxk_size(192), auxk_size(2), auxk_size(1)) == (512, 128, 1, 1)
    x, rows = torch.tensor([[3.0, 1.0]]), torch.eye(2)  # one latent of two: the larger
    assert auxk_loss(x, torch.zeros(1, 2), torch.tensor([[2.0, 1.5]]), rows).item() == 1 + 1
    assert auxk_loss(x, torch.zeros(1, 2), torch.tensor([[-2.0, -5.0]]), rows).item() == 9 + 1


D, S, WEIGHT = 6, 20, 0.05
OPTIONS = {
    "relu": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {"bandwidth": 0.4},
    "gated": {},
    "matryoshka": {"k": 4, "groups": (3, 8, 20)},
}
SPARSE = [name for name in ACTIVATIONS if name != "gated"]


def variant(activation, seed=0):
    """An SAE with no parameter at 0, in float64, in training mode."""
    sae = SparseAutoencoder(D, S, activation, seed=seed, **OPTIONS[activation]).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if activation == "jumprelu":
            sae.threshold.abs_()
    sae.normalize_decoder()
    return sae


@pytest.fixture
def tokens():
    return 0.5 + torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def dead():
    mask = torch.zeros(S, dtype=torch.bool)
    mask[[1, 7, 12, 13, 19]] = True
    return mask


# -- the published formulas, written down plainly ---------------------------------------------------------------------------


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


def variant_reference(activation, w, x, dead, constants=None):
    """(error, sparsity, auxiliary), and what the optimiser must not differentiate; ``constants`` fixes that."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if activation == "gated":
        frozen = (w["W_dec"].copy(), w["b_dec"].copy()) if constants is None else constants
        h = np.zeros_like(pre)
        for i, token in enumerate(x):
            for s in range(S):
                projection = (token - w["b_dec"]) @ w["W_enc"][:, s]
                if projection + w["b_enc"][s] > 0:
                    h[i, s] = max(np.exp(w["r_mag"][s]) * projection + w["b_mag"][s], 0)
        gate = np.maximum(pre, 0)
        error = ((h @ w["W_dec"] + w["b_dec"] - x) ** 2).sum(1).mean()
        return (error, WEIGHT * gate.sum(1).mean(), ((gate @ frozen[0] + frozen[1] - x) ** 2).sum(1).mean()), frozen
    if activation == "jumprelu":
        active = pre > w["threshold"]
        error = (((pre * active) @ w["W_dec"] + w["b_dec"] - x) ** 2).sum(1).mean()
        return (error, WEIGHT * active.sum(1).mean(), 0.0), None
    k = 4
    h = np.stack([largest(row, k) for row in pre]) if activation == "topk" else largest(pre, k * len(x))
    x_hat = h @ w["W_dec"] + w["b_dec"]
    groups = (3, 8, 20) if activation == "matryoshka" else (S,)
    error = sum(((h[:, :m] @ w["W_dec"][:m] + w["b_dec"] - x) ** 2).sum(1).mean() for m in groups)
    aux, residual = auxk(w, pre, x, x_hat, dead, constants)
    return (error, 0.0, aux), residual


def named(sae):
    return {name: parameter.detach().numpy().copy() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_variants_terms_equal_the_reference(activation, tokens, dead):
    sae = variant(activation)
    loss = objective(sae)(sae, tokens, dead, WEIGHT)
    terms, _ = variant_reference(activation, named(sae), tokens.numpy(), dead.numpy())
    np.testing.assert_allclose([loss.mse.item(), loss.l1.item(), loss.ghost.item()], terms, rtol=1e-10, atol=1e-15)
    assert loss.total.item() == pytest.approx(sum(terms), rel=1e-10)
    assert (loss.ghost > 0) == (activation != "jumprelu")


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_variants_gradients_equal_finite_differences(activation, tokens, dead):
    """All but the thresholds', whose true derivative is 0 almost everywhere; they have a test of their own."""
    sae = variant(activation)
    objective(sae)(sae, tokens, dead, WEIGHT).total.backward()
    weights, pace = named(sae), 1e-6
    _, constants = variant_reference(activation, weights, tokens.numpy(), dead.numpy())
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            continue
        values, gradient = weights[name], np.zeros(parameter.shape)
        for place in np.ndindex(values.shape):
            keep, totals = values[place], []
            for sign in (1, -1):
                values[place] = keep + sign * pace
                totals.append(sum(variant_reference(activation, weights, tokens.numpy(), dead.numpy(), constants)[0]))
            values[place] = keep
            gradient[place] = (totals[0] - totals[1]) / (2 * pace)
        np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=2e-5, atol=1e-7, err_msg=name)
        assert parameter.grad.abs().max() > 1e-3, name


def test_thresholds_learn_by_the_published_estimator(tokens):
    sae, x = variant("jumprelu"), tokens
    output = sae(x)
    output.reconstruction.retain_grad()
    objective(sae)(sae, x, None, WEIGHT, output=output).total.backward()
    width = OPTIONS["jumprelu"]["bandwidth"]
    pre, threshold, rows = output.pre_activations.detach(), sae.threshold.detach(), sae.W_dec.detach()
    expected = np.zeros(S)
    for i in range(len(x)):
        for s in range(S):
            if abs(pre[i, s] - threshold[s]) < width / 2:
                on_latent = (output.reconstruction.grad[i] @ rows[s]).item()
                expected[s] += -threshold[s].item() / width * on_latent - WEIGHT / width / len(x)
    np.testing.assert_allclose(sae.threshold.grad.numpy(), expected, rtol=1e-10, atol=1e-14)
    assert np.count_nonzero(expected) > 5


def test_the_estimator_is_the_derivative_of_the_expectation():
    """For z uniform on [0, 1]: E[step] = 1 - t, with derivative -1; E[jump_relu] = (1 - t^2) / 2, with derivative -t."""
    z = torch.rand(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function, derivative in ((step, -1.0), (jump_relu, -0.4)):
        threshold = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
        function(z, threshold, 0.1).mean().backward()
        assert threshold.grad.item() == pytest.approx(derivative, rel=0.02)


def test_a_threshold_below_0_lets_no_negative_through_and_comes_back():
    sae = variant("jumprelu")
    with torch.no_grad():
        sae.threshold[3] = -0.1
    assert (sae.encode(torch.randn(50, D, dtype=torch.float64)) >= 0).all()
    sae.normalize_decoder()
    assert sae.threshold[3] == 0 and sae.threshold.min() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cls_coefficient_weighs_squared_errors_alone(activation, dead):
    """Tokens that are CLS or not: by linearity, weights 1 and 10 differ by nine times the CLS tokens' share."""
    sae = variant(activation).eval()
    images = torch.randn(4, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss = objective(sae)
    once, ten = (loss(sae, images, None, WEIGHT, factor) for factor in (1.0, 10.0))
    cls = loss(sae, images[:, :1], None, WEIGHT)
    torch.testing.assert_close(ten.mse - once.mse, 9 * cls.mse / 3)
    torch.testing.assert_close(ten.l1, once.l1)
    mixed = loss(sae, images.flatten(0, 1), None, WEIGHT, 10.0, is_cls=(torch.arange(12) % 3 == 0))
    torch.testing.assert_close(mixed.total, ten.total)


# -- the sparse path --------------------------------------------------------------------------------------------------------


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
        latents = output.latents.dense().view(5, 7, S) if sparse else output.latents
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        results.append([*loss, output.reconstruction, latents, gradients, sae.decode(output.latents).reshape(5, 7, D), sae.state_dict()])
        assert (output.pre_activations is None) == sparse
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    if activation == "jumprelu":
        assert results[0][6]["threshold"].count_nonzero() > 5


# -- dead latents -------------------------------------------------------------------------------------------------------------


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


# -- normalised input -----------------------------------------------------------------------------------------------------


def folded(plain, mean, scale):
    """The SAE of x that does what ``plain`` does to (x - mean) / scale, by the formulas in ``set_normalization``."""
    sae = SparseAutoencoder(D, S, plain.activation, **OPTIONS[plain.activation]).double()
    sae.load_state_dict(plain.state_dict())
    with torch.no_grad():
        sae.input_mean.copy_(mean)
        sae.input_scale.fill_(scale)
        sae.b_dec.copy_(mean + scale * plain.b_dec)
        for name in {"b_enc", "b_mag"} & dict(sae.named_parameters()).keys():
            getattr(sae, name).mul_(scale)
        if sae.threshold is not None:
            sae.threshold.mul_(scale)
    return sae


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_normalising_sae_has_the_objective_of_a_plain_one_on_normalised_input(activation, sparse, tokens, dead):
    plain = variant(activation)
    mean, scale = torch.linspace(-2, 3, D, dtype=torch.float64), 7.0
    sae = folded(plain, mean, scale)
    raw = mean + scale * tokens
    output, expected = sae(raw, sparse=sparse), plain(tokens)
    loss, reference_loss = objective(sae)(sae, raw, dead, WEIGHT, output=output), objective(plain)(plain, tokens, dead, WEIGHT)
    torch.testing.assert_close(loss, reference_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.reconstruction, mean + scale * expected.reconstruction)
    loss.total.backward()
    reference_loss.total.backward()
    for name, parameter in sae.named_parameters():  # units of a parameter appear in its gradient, and nowhere else
        units = 1 if name in ("W_enc", "W_dec", "r_mag") else scale
        torch.testing.assert_close(parameter.grad * units, getattr(plain, name).grad, rtol=1e-8, atol=1e-11)


# -- they train -----------------------------------------------------------------------------------------------------------
