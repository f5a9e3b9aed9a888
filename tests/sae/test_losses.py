"""The objective, against a float64 reference written loop by loop in numpy, and its gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from tiny_saes import perturbed

from patchsae_utils.sae.losses import (
    dead_pre_activations,
    explained_variance,
    fired,
    geometric_median,
    ghost_loss,
    l0_norm,
    l1_norm,
    normalized_squared_error,
    patchsae_loss,
)
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.sparse import SparseLatents

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
        error = [cls_factor[i] * (z[a] - x[i, a]) ** 2 / norm for a in range(d)]
        mse += sum(error) / (n * d)
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
    sae, x, dead = case
    index = dead.nonzero().squeeze(-1)
    out = sae(x)
    error = normalized_squared_error(x, out.reconstruction)
    ghost_loss(x, out.reconstruction, dead_pre_activations(sae, x, out, index), sae.W_dec[index], error).backward()
    assert sae.W_enc.grad[:, dead].abs().max() > 0
    again = sae(x)
    wrong = again._replace(pre_activations=again.latents)  # exp(0) = 1: the encoder of the dead would get nothing
    sae.zero_grad()
    ghost_loss(x, again.reconstruction, dead_pre_activations(sae, x, wrong, index), sae.W_dec[index], error.detach()).backward()
    assert not sae.W_enc.grad[:, dead].any()


def test_ghost_asks_for_pre_activations_that_the_output_does_not_hold(case):
    sae, x, dead = case
    grads = []
    for output in (sae(x), sae(x)._replace(pre_activations=None)):
        sae.zero_grad()
        loss = patchsae_loss(sae, x, dead, LAMBDA, output=output)
        loss.total.backward()
        grads.append([loss.ghost.detach(), *(p.grad.clone() for p in sae.parameters())])
    for known, asked in zip(*grads, strict=True):
        torch.testing.assert_close(asked, known, rtol=1e-12, atol=1e-14)


def test_ghost_can_be_left_out(case):
    sae, x, dead = case
    loss, without = patchsae_loss(sae, x, dead, LAMBDA), patchsae_loss(sae, x, dead, LAMBDA, ghost=False)
    assert loss.ghost > 0 and without.ghost == 0
    assert without.total.item() == pytest.approx((loss.mse + loss.l1).item(), rel=1e-12)


@pytest.mark.parametrize("bias", [1e30, 1e4, -1e4, -1e30])
def test_ghost_is_finite_when_everything_is_dead(bias):
    sae = SparseAutoencoder(6, 20)
    sae.b_enc.data.fill_(-1e30)
    sae.b_enc.data[3] = bias
    sae.W_dec.data[4] = -sae.W_dec.data[3]
    x = torch.randn(5, 6)
    output = sae(x)._replace(reconstruction=sae.decode(torch.zeros(5, 20)))  # as if what is dead really didn't fire
    loss = patchsae_loss(sae, x, torch.ones(20, dtype=torch.bool), 0.0, output=output)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


def test_ghost_survives_pre_activations_that_overflow_exp(case):
    sae, x, dead = case
    sae.float()
    with torch.no_grad():
        sae.b_enc[7] = 500.0
    loss = patchsae_loss(sae, x.float(), dead, LAMBDA)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())


def test_ghost_survives_pre_activations_that_underflow_exp(case):
    sae, x, dead = case
    sae.float()
    with torch.no_grad():
        sae.b_enc[dead] = -1e4
    loss = patchsae_loss(sae, x.float(), dead, LAMBDA)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())


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


def test_chunks_add_up_to_the_batch(case):
    """The trainer splits a batch: every term is a mean over tokens."""
    sae, x, dead = case
    whole = patchsae_loss(sae, x, dead, LAMBDA)
    parts = [(patchsae_loss(sae, part, dead, LAMBDA), len(part) / len(x)) for part in x.split(2)]
    for name in whole._fields:
        torch.testing.assert_close(sum(getattr(loss, name) * share for loss, share in parts), getattr(whole, name))


def test_norms():
    latents = torch.tensor([[0.0, 2.0, 0.5], [1.0, 0.0, 0.0]])
    assert l1_norm(latents).item() == pytest.approx(1.75)
    assert l0_norm(latents).item() == pytest.approx(1.5)
    assert l1_norm(torch.full((2, 60_000), 0.1, dtype=torch.bfloat16)).dtype == torch.float32
    assert fired(latents).tolist() == fired(latents[None]).tolist() == [True, True, True]
    assert fired(latents[:1]).tolist() == [False, True, True]


def test_norms_of_sparse_latents_are_those_of_the_same_latents_dense():
    dense = torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.25, 0.0]])
    latents = SparseLatents(torch.tensor([2.0, 0.5, 0.25]), torch.tensor([1, 2, 1]), torch.tensor([0, 2, 2, 3]), 3)
    torch.testing.assert_close(latents.dense(), dense)
    for measure in (l1_norm, l0_norm, fired):
        torch.testing.assert_close(measure(latents), measure(dense))


def test_centre_changes_only_the_norm_the_error_is_divided_by():
    x, reconstruction = torch.randn(8, 6) + 30, torch.randn(8, 6) + 30
    plain, centred = normalized_squared_error(x, reconstruction), normalized_squared_error(x, reconstruction, x.mean(0))
    ratio = x.norm(dim=1, keepdim=True) / (x - x.mean(0)).norm(dim=1, keepdim=True)
    torch.testing.assert_close(centred, plain * ratio)


def test_explained_variance_is_centred():
    x = torch.randn(2000, 6, dtype=torch.float64) + 100  # a large constant, which a decoder bias gives for free
    assert explained_variance(x, x.mean(0).expand_as(x)).item() == pytest.approx(0, abs=1e-9)
    assert explained_variance(x, x).item() == 1
    noisy = x + 0.5 * torch.randn(2000, 6, dtype=torch.float64)
    assert explained_variance(x, noisy).item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(explained_variance(x.view(100, 20, 6), noisy.view(100, 20, 6)), explained_variance(x, noisy))


def test_geometric_median_minimises_the_sum_of_distances():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(300, 5, generator=generator), 50 + torch.randn(60, 5, generator=generator)])

    def total(center):
        return (points.double() - center.double()).norm(dim=1).sum()

    median = geometric_median(points)
    assert median.norm() < 1.0  # the mean lies at 8.3 in every dimension: outliers hardly move the median
    for direction in torch.eye(5):
        assert total(median) <= total(median + 1e-2 * direction) and total(median) <= total(median - 1e-2 * direction)


def test_geometric_median_of_equal_points_and_of_a_median_that_is_a_point():
    torch.testing.assert_close(geometric_median(torch.ones(4, 3)), torch.ones(3))
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(geometric_median(points), torch.zeros(2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="N > 0"):
        geometric_median(torch.zeros(0, 3))
