"""Units of training, starts and constraints: what is folded is exact, and what starts from data lies in it."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_saes import dense, perturbed
from tiny_training import CONFIG, Store, assert_same, cut_off, fresh, run

from patchsae_utils.run.artifacts import read_json
from patchsae_utils.run.processes import Processes
from patchsae_utils.sae.files import load_sae, save_sae
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder
from patchsae_utils.sae.starts import ARCHETYPE_RELAXATION, SOFT_COSINE, Archetypes, Normalization, centroids, start_from
from patchsae_utils.sae.steps import Steps
from patchsae_utils.sae.trainer import training_log
from patchsae_utils.sae.variants import keep_topk

K = {name: {"k": 3} for name in ("topk", "batchtopk", "matryoshka")}
X = 30 + 4 * torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 500)[:, None]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["none", "mean", "mean_and_norm", "token_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_folded_an_sae_reads_raw_tokens_as_it_read_normalised_ones(activation, kind, sparse):
    """FAULTS D4: normalised once, before training, and folded once, after it; latents differ by the units alone."""
    plain, sae = (perturbed(activation=activation, **K.get(activation, {})).eval() for _ in range(2))
    for each in (plain, sae):
        if each.threshold is not None:
            each.threshold.data.abs_().add_(0.1)
        if kind == "token_norm":
            each.b_dec.data.zero_()
    normalization = Normalization.of(X, kind)
    x, unit = normalization.apply(X), {"none": 1.0, "mean": 1.0}.get(kind, normalization.norm.double() / 6**0.5)
    if kind == "token_norm":
        unit = (X - normalization.mean).norm(dim=1, keepdim=True) / 6**0.5
    expected = plain(x)
    normalization.fold(sae)
    output = sae(X, sparse=sparse)
    latents = dense(output.latents) if sparse and activation != "gated" else output.latents
    torch.testing.assert_close(latents, unit * expected.latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.encode(X), latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.reconstruction, normalization.mean + unit * expected.reconstruction, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sae.decode(latents), output.reconstruction)
    torch.testing.assert_close(sae.encode(X, torch.tensor([3, 7])), latents[:, [3, 7]], rtol=1e-6, atol=1e-6)  # of a folded one, too
    assert sae.token_norm == (kind == "token_norm") and sae.normalizes == (kind != "none")
    if kind != "token_norm":
        normalization.unfold(sae)
        torch.testing.assert_close(dict(sae.named_parameters()), dict(plain.named_parameters()), rtol=1e-6, atol=1e-6)


def test_topk_without_biases_needs_no_step_for_the_size_of_tokens():
    """The latents of a scaled token are the scaled latents: the weights alone say it, so every program's file does."""
    plain, sae = (SparseAutoencoder(6, 20, "topk", k=3, seed=1).double() for _ in range(2))
    normalization = Normalization.of(X, "token_norm")
    normalization.fold(sae)
    assert not sae.token_norm
    size = (X - normalization.mean).norm(dim=1, keepdim=True) / 6**0.5
    torch.testing.assert_close(sae.encode(X), size * plain.encode(normalization.apply(X)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "mean_and_norm", "token_norm"])
def test_normalised_tokens_have_unit_size_and_useless_ones_are_refused(kind):
    x = Normalization.of(X, kind).apply(X)
    if kind != "token_norm":
        torch.testing.assert_close(x.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-5)
    if kind != "mean":
        torch.testing.assert_close(x.square().mean().item(), 1.0, rtol=1e-5, atol=0)
    for bad in (X[:1].float(), X[:1].float().expand(9, 6), X * torch.nan):
        with pytest.raises(ValueError, match="at least two finite tokens"):
            Normalization.of(bad, kind)


class Moved(Store):
    """The toy tokens in other units."""

    def tokens(self, *args, **kwargs):
        for x, positions in super().tokens(*args, **kwargs):
            yield 64 * (x - 5) + 128, positions


@pytest.mark.parametrize("kind", ["mean_and_norm", "token_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_knows_no_units(tmp_path, activation, kind):
    """FAULTS D4: under Adam, biases and thresholds stepped in raw units; now the same data in other units give the same SAE in those units."""
    config = dataclasses.replace(CONFIG, normalize=kind, start="data", n_tokens=30 * 64, l1_coefficient=1e-2, ghost=False)
    options = {"activation": activation, **K.get(activation, {})}
    one, other = (run(tmp_path / str(i), config, store, **options) for i, store in enumerate((Store(), Moved())))
    x = next(Store().tokens(200, seed=5, epochs=None, start_step=0, positions=True))[0]
    logs = [training_log(tmp_path / str(i)) for i in (0, 1)]
    same = slice(0, 1 if kind == "token_norm" else None)  # tokens near the mean make rounding large, and Adam magnifies it
    np.testing.assert_allclose(logs[0]["loss"][same], logs[1]["loss"][same], rtol=1e-2)
    apart = other.encode(64 * (x - 5) + 128) / 64 - one.encode(x)
    assert apart.norm() < (0.5 if kind == "token_norm" else 0.03) * one.encode(x).norm()
    loaded = load_sae(tmp_path / "1")
    torch.testing.assert_close(loaded.encode(x), other.encode(x), rtol=1e-4, atol=1e-4)
    assert loaded.token_norm == (kind == "token_norm" and activation != "topk")
    if loaded.token_norm:  # no other program's file can say it
        assert read_json(tmp_path / "1" / "cfg.json")["architecture"].endswith("_token_norm")
        with pytest.raises(ValueError, match="one length before it encodes it, which the format 'dictionary_learning' can't say"):
            save_sae(loaded, tmp_path / "export", "dictionary_learning")


def test_centroids_lie_among_the_directions():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    x = (true[torch.randint(12, (2000,), generator=generator)] + 0.02 * torch.randn(2000, 16, generator=generator)) * torch.rand(2000, 1)
    found = centroids(x, 40, seed=1)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(40))
    assert (found @ true.T).max(0).values.min() > 0.98 and (found @ true.T).max(1).values.min() > 0.9
    assert torch.equal(found, centroids(x, 40, seed=1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_started_from_directions_a_latent_is_one_of_them(activation):
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)) + 3
    sae = SparseAutoencoder(16, 64, activation, **K.get(activation, {}))
    sae.b_dec.data.copy_(x.mean(0))
    start_from(sae, x[:64] - sae.b_dec, x)
    directions = torch.nn.functional.normalize(x[:64] - sae.b_dec, dim=1)
    torch.testing.assert_close(sae.W_dec.detach(), directions)
    torch.testing.assert_close(torch.nn.functional.normalize(sae.W_enc.T, dim=1), directions)  # tied
    latents = sae(x).latents
    if sae.k:
        assert not sae.b_enc.any() and (latents > 0).sum(1).float().mean() == 3
        latents = keep_topk(torch.relu(sae.pre_activations(x)), 3)  # by which the gain was chosen
    else:
        assert ((latents > 0).float().mean(0) - 0.01).abs().max() < 0.002
    scaled = [(x - sae.decode(factor * latents)).square().sum() for factor in (0.9, 1.0, 1.1)]
    assert scaled[1] < scaled[0] and scaled[1] < scaled[2]


def test_archetypes_are_convex_combinations_and_a_bounded_rest():
    """Against the published equation; the gradient is autograd's own."""
    points = centroids(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), 10).double()
    archetypes = Archetypes(points)
    torch.testing.assert_close(archetypes(), points, rtol=0, atol=0.05)
    generator = torch.Generator().manual_seed(1)
    for parameter in archetypes.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    A = torch.exp(archetypes.weights.detach())
    A /= A.sum(1, keepdim=True)
    rest = archetypes.relaxation.detach().numpy()
    rest = rest * np.minimum(1, ARCHETYPE_RELAXATION / np.linalg.norm(rest, axis=1, keepdims=True))
    rows = A.numpy() @ points.numpy() + rest
    np.testing.assert_allclose(archetypes().detach(), rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)


CONSTRAINTS = ["frozen_decoder", "soft_decoder", "frozen_encoder", "archetypal"]


@pytest.mark.parametrize("sparse", ["never", "always"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_constraint_holds_to_the_end_over_an_interruption(tmp_path, constraint, sparse):
    config = dataclasses.replace(CONFIG, constraint=constraint, sparse=sparse, lr=3e-2)
    trained = run(tmp_path / "whole", config)
    cut_off(tmp_path / "cut", config, 20)
    assert_same(run(tmp_path / "cut", config), trained)
    start, cosine = fresh(), (trained.W_dec * fresh().W_dec).sum(1)
    assert training_log(tmp_path / "whole")["explained_variance"].diff().sum() > 0
    if constraint == "frozen_encoder":
        assert torch.equal(trained.W_enc, start.W_enc) and not torch.equal(trained.b_enc, start.b_enc) and cosine.min() < 0.8
    elif constraint != "archetypal":
        torch.testing.assert_close(cosine.min().item(), {"frozen_decoder": 1.0, "soft_decoder": SOFT_COSINE}[constraint], rtol=1e-5, atol=0)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(32))
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_a_target_l0_is_met_from_any_weight(tmp_path, activation):
    """FAULTS D5: nobody has to know which lambda suits the width; kept in the last fifth, in which it drifts, and over an interruption."""
    found = []
    for start in (1e-2, 1e-1):
        config = dataclasses.replace(CONFIG, n_tokens=1500 * 64, l1_coefficient=start, target_l0=1.5, checkpoint_every=400)
        config = dataclasses.replace(config, normalize="mean_and_norm", start="data")
        sae = run(tmp_path / str(start), config, activation=activation)
        found.append(training_log(tmp_path / str(start))["l0"].iloc[-100:].mean())
        assert sae.metadata["l1_coefficient"] != start
    assert found == pytest.approx([1.5, 1.5], rel=0.15)
    cut_off(tmp_path / "cut", config, 500, activation=activation)
    assert_same(run(tmp_path / "cut", config, activation=activation), sae)
    with pytest.raises(ValueError, match="target_l0=1.5 has no meaning for activation='topk', whose k=3"):
        run(tmp_path / "topk", config, activation="topk", k=3)


class Clustered(Store):
    """Tokens of which most lie along few directions, so that latents that start elsewhere are never among the largest."""

    def tokens(self, *args, **kwargs):
        for x, positions in super().tokens(*args, **kwargs):
            yield x + 30 * torch.eye(x.shape[1])[torch.arange(len(x)) % 3], positions


@pytest.mark.parametrize("sparse", ["never", "always"])
def test_dead_latents_start_anew_and_a_resumed_run_is_the_same(tmp_path, sparse):
    """FAULTS D6: of the same run, fewer latents end dead; restarts follow from the step alone, so that resuming stays bit-exact."""
    config = dataclasses.replace(CONFIG, start="random", n_tokens=60 * 64, dead_after_tokens=640, ghost=False)
    config = dataclasses.replace(config, sparse=sparse, checkpoint_every=17, warmup_steps=0)
    anew = dataclasses.replace(config, restart_dead=True)

    def train(config, name):
        return run(tmp_path / name, config, Clustered(), activation="topk", k=2)

    left, restarted = train(config, "left"), train(anew, "anew")
    x = torch.cat([next(Clustered().tokens(2048, seed=9, epochs=None, start_step=0, positions=True))[0]])
    alive = [(sae.encode(x) > 0).any(0).sum() for sae in (left, restarted)]
    assert alive[1] > alive[0]

    cut_off(tmp_path / "resumed", anew, 40, store=Clustered, activation="topk", k=2)
    assert_same(train(anew, "resumed"), restarted)
    held = dataclasses.replace(anew, constraint="frozen_decoder")
    assert_same(train(held, "held"), train(dataclasses.replace(held, restart_dead=False), "held_left"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_latent_that_starts_anew_fires_on_the_token_it_starts_at(activation):
    """FAULTS D6: at a fifth of the others' size, as a ReLU's, it stays below the thresholds that others have learned."""
    sae = perturbed(activation=activation, d_sae=40, **K.get(activation, {})).double().train()
    x, dead = Normalization.of(X, "token_norm").apply(X), torch.arange(40) % 4 == 0
    with torch.no_grad():
        sae.W_enc[:, dead] = 0
        sae.b_dec.zero_()
        if sae.threshold is not None:
            size = x.norm(dim=1).mean() * sae.W_enc[:, ~dead].norm(dim=0).mean()
            sae.threshold.copy_(torch.where(dead, 9.0, 0.5 * size) if sae.threshold.ndim else 0.5 * size)
    Steps(sae, dataclasses.replace(CONFIG, restart_dead=True), Processes())._restart(x, dead)
    assert (sae.eval().encode(x)[:, dead] > 0).any(0).all()


def test_the_weight_of_sparsity_waits_for_latents_that_follow_late():
    """FAULTS D6: L0 moves by a hundredth of its way a step; a weight that grew until it arrives would pass its place many times over."""
    config = dataclasses.replace(CONFIG, target_l0=10.0, n_tokens=750 * CONFIG.batch_tokens)
    steps, l0, weights = Steps(perturbed(activation="jumprelu"), config, Processes()), 80.0, []
    for steps.step in range(600):
        weights.append(steps.l1_factor * np.exp(np.clip(steps.off_target, -1, 1)))
        l0 += 0.01 * (40 / weights[-1] ** 0.2 - l0)  # at rest with 10 where the weight is 1024
        steps._control(l0)
    assert l0 == pytest.approx(10, rel=0.1) and max(weights) < 16 * 1024
