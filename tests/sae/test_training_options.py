"""The trainer's settings: schedules, clipping, warm-ups, token types, normalisation, variants, the sparse path, trackers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, METADATA, Store, assert_same, cut_off, fresh, run

from patchsae_utils.config import TrainConfig
from patchsae_utils.run.artifacts import read_json
from patchsae_utils.sae import steps
from patchsae_utils.sae import trainer as training
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.sparse.adam import l1_weight, learning_rate
from patchsae_utils.sae.starts import geometric_median
from patchsae_utils.sae.trainer import train_sae, training_log

NEW = dataclasses.replace(CONFIG, n_tokens=12 * 64, log_every=1)


def train(tmp_path, sae=None, store=None, config=NEW, **changes):
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    return train_sae(sae or fresh(), store or Store(), dataclasses.replace(config, **changes), out, progress=False), training_log(out)


def test_schedules_have_their_values():
    config = TrainConfig(n_tokens=21 * 64, batch_tokens=64, lr=2.0, warmup_steps=10, schedule="linear", lr_end=0.1)
    assert [learning_rate(step, config) for step in (0, 4, 9, 10, 15, 20)] == pytest.approx([0.2, 1, 2, 2, 1.1, 0.2])
    cosine = dataclasses.replace(config, schedule="cosine")
    expected = [0.2 + 1.8 * (1 + np.cos(np.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75, 1)]
    assert [learning_rate(step, dataclasses.replace(cosine, n_tokens=51 * 64)) for step in (10, 20, 30, 40, 50)] == pytest.approx(expected)
    rates = [learning_rate(step, dataclasses.replace(cosine, lr_end=0.0)) for step in range(21)]
    assert max(rates) == rates[10] == 2 and rates[20] == 0 and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_reaches_the_optimiser(tmp_path, schedule, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append([g["lr"] for g in self.param_groups]) or step(self))
    config = dataclasses.replace(NEW, schedule=schedule)
    _, log = train(tmp_path, config=config)
    assert rates == [[learning_rate(i, config)] for i in range(12)]
    assert log["lr"].tolist() == pytest.approx([rate for (rate,) in rates], rel=1e-5)
    assert (rates[-1][0] < config.lr / 2) == (schedule != "constant")


def test_the_l1_term_warms_up(tmp_path):
    config = dataclasses.replace(NEW, l1_warmup_steps=8, lr=1e-9)
    assert [l1_weight(step, config) for step in (0, 3, 7, 8, 99)] == pytest.approx([1e-3 / 8, 5e-4, 1e-3, 1e-3, 1e-3])
    _, warm = train(tmp_path, config=config)
    _, cold = train(tmp_path, config=config, l1_warmup_steps=0)
    np.testing.assert_allclose(warm["l1"] / cold["l1"], [min(1, (i + 1) / 8) for i in range(12)], rtol=1e-3)


@pytest.mark.parametrize("how", ["never", "always"])
def test_gradients_are_clipped_to_their_common_norm(tmp_path, how, monkeypatch):
    """Adam's first moment after one step is a tenth of the gradient it was given."""
    moments = {}
    real = training.Training.finish
    for clip in (0.0, 1e-3):
        runs = []
        monkeypatch.setattr(training.Training, "finish", lambda self, runs=runs: runs.append(self) or real(self))
        train(tmp_path, n_tokens=64, clip_gradient=clip, sparse=how)
        moments[clip] = [10 * runs[0].optimizer.state[p]["exp_avg"] for p in runs[0].sae.parameters()]
    norms = {clip: torch.cat([m.flatten() for m in moments[clip]]).norm().item() for clip in moments}
    assert norms[0.0] > 1e-2 and norms[1e-3] == pytest.approx(1e-3, rel=1e-4)
    for long, short in zip(moments[0.0], moments[1e-3], strict=True):  # shorter, of the same direction
        torch.testing.assert_close(short, long * 1e-3 / norms[0.0], rtol=1e-3, atol=1e-9)


def test_the_geometric_median_minimises_the_sum_of_distances():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(300, 5, generator=generator), 50 + torch.randn(60, 5, generator=generator)])
    total = lambda center: (points.double() - center.double()).norm(dim=1).sum()  # noqa: E731
    median = geometric_median(points)
    assert median.norm() < 1.0  # the mean lies at 8.3 in every dimension: outliers hardly move the median
    for direction in torch.eye(5):
        assert total(median) <= total(median + 1e-2 * direction) and total(median) <= total(median - 1e-2 * direction)


def test_b_dec_starts_where_it_is_told(tmp_path):
    """FAULTS D2: also where the latents start from data."""
    stay = {"n_tokens": 64, "lr": 1e-12, "start": "data"}
    middles = [train(tmp_path, b_dec_start=kind, **stay)[0].b_dec.detach() for kind in ("median", "mean", "zero")]
    sample = next(Store().tokens(20_000, seed=1, epochs=None, start_step=0, positions=True))[0][:4096]
    for middle, expected in zip(middles, (geometric_median(sample), sample.mean(0), torch.zeros(8)), strict=True):
        torch.testing.assert_close(middle, expected)


class KindStore(Store):
    """Notes which tokens it was asked for."""

    def tokens(self, *args, tokens="all", **kwargs):
        self.kind = tokens
        return super().tokens(*args, **kwargs)


def test_token_types_are_chosen_from_the_store(tmp_path):
    for kind in ("all", "patches", "cls"):
        store = KindStore()
        sae, _ = train(tmp_path, store=store, tokens=kind)
        assert store.kind == kind and sae.metadata["tokens"] == kind
    store.metadata = SimpleNamespace(**vars(METADATA) | {"tokens": "cls"})
    with pytest.raises(ValueError, match="tokens='patches' can't be had from a store of 'cls' tokens. Extract with"):
        train(tmp_path, store=store, tokens="patches")
    store.n_images, KindStore.__len__ = 20, lambda _: 100
    for kind, n in (("patches", 80), ("cls", 20), ("all", 100)):
        store.metadata, config = METADATA, dataclasses.replace(NEW, tokens=kind, start="data")
        with pytest.raises(ValueError, match=f"start='data', constraint='none' need a token for each of 128 latents; there are {n}"):
            train_sae(SparseAutoencoder(8, 128), store, config, tmp_path / kind, progress=False)
        assert not list((tmp_path / kind).iterdir())


VARIANTS = {
    "relu": ({}, 1e-3), "topk": ({"k": 3}, 0.0), "batchtopk": ({"k": 3}, 0.0), "matryoshka": ({"k": 3, "groups": (8, 32)}, 0.0), "jumprelu": ({}, 1e-2),
    "gated": ({}, 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("activation", VARIANTS)
def test_every_variant_learns(tmp_path, activation):
    options, weight = VARIANTS[activation]
    config = dataclasses.replace(NEW, n_tokens=200 * 64, log_every=20, l1_coefficient=weight, normalize="mean_and_norm")
    logs = {}
    for how in ("never", "always"):
        out = tmp_path / how
        sae = run(out, dataclasses.replace(config, sparse=how), activation=activation, **options)
        logs[how] = training_log(out)
        assert not sae.training
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)
        assert read_json(out / "summary.json")["sparse_steps"] == (200 if how == "always" and activation != "gated" else 0)
    assert logs["never"]["explained_variance"].iloc[-1] > 0.7 > logs["never"]["explained_variance"].iloc[0]
    early = slice(0, 4)  # afterwards rounding has been amplified
    np.testing.assert_allclose(logs["always"]["loss"][early], logs["never"]["loss"][early], rtol=1e-2)
    assert logs["always"]["explained_variance"].iloc[-1] == pytest.approx(logs["never"]["explained_variance"].iloc[-1], abs=0.03)
    assert logs["always"]["l0"].iloc[-1] == pytest.approx(logs["never"]["l0"].iloc[-1], rel=0.1)


def test_auto_turns_sparse_when_few_latents_are_active(tmp_path, monkeypatch):
    config = dataclasses.replace(NEW, n_tokens=60 * 64, l1_coefficient=0.05, lr=1e-2, sparse="auto")
    _, log = train(tmp_path, config=config)
    assert read_json(tmp_path / "0" / "summary.json")["sparse_steps"] == 0, "a small dictionary stays dense"
    monkeypatch.setattr(steps, "_SPARSE_FROM", 1)
    asked = []
    monkeypatch.setattr(steps, "worthwhile", lambda density, device: asked.append(density) or density < 0.2)
    _, log = train(tmp_path, config=config)
    density = log["l0"].to_numpy() / 32
    recent = [density[max(0, i - 5) : i].mean() for i in range(1, 60)]  # steps 1 to 59; step 0 knows nothing
    assert asked == pytest.approx(recent, rel=1e-4)
    n_sparse = read_json(tmp_path / "1" / "summary.json")["sparse_steps"]
    assert n_sparse == sum(value < 0.2 for value in asked) and 0 < n_sparse < 59


def test_auto_goes_on_bit_for_bit_over_the_change(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_SPARSE_FROM", 1)
    monkeypatch.setattr(steps, "worthwhile", lambda density, device: density < 0.2)
    config = dataclasses.replace(NEW, n_tokens=40 * 64, l1_coefficient=0.05, lr=1e-2, sparse="auto", checkpoint_every=5)
    whole, _ = train(tmp_path, config=config)
    cut_off(tmp_path / "cut", config, 12, 23, 34)
    assert_same(run(tmp_path / "cut", config), whole)
