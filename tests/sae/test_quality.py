"""The measures: centred, by token type, on all tokens, with intervals; and the splice into CLIP."""

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.data import templates_for
from patchsae_utils.sae import dead_causes, evaluate_sae, evaluation_table, firing_rates, readings_by_place
from patchsae_utils.sae.dictionary import random_sae
from patchsae_utils.sae.losses import patchsae_loss
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.quality import TokenReadings, _image_sums, _reconstruction_metrics, read_tokens
from patchsae_utils.sae.starts import Normalization

LAYER = -2


def measured(clip, sae, dataset, **options):
    frame = evaluate_sae(clip, sae, dataset, LAYER, batch_size=10, progress=False, **options)
    assert set(frame["sae"]) == {"SAE"}
    return frame.drop(columns="sae").set_index(["variant", "tokens", "metric"])


@pytest.fixture(scope="module")
def residual(tiny_clip, tiny_inputs):
    return tiny_clip.residual(tiny_inputs, LAYER)


@pytest.fixture(scope="module")
def good_sae(tiny_sae, residual):
    """Reconstructs roughly: enough to tell its measures from trivial ones."""
    return random_sae(tiny_sae, residual.flatten(0, 1))


@pytest.fixture(scope="module")
def frame(tiny_clip, good_sae, tiny_dataset):
    return measured(tiny_clip, good_sae, tiny_dataset)


@pytest.mark.parametrize(("tokens", "part"), [("cls", slice(0, 1)), ("patch", slice(1, None)), ("all", slice(None))])
def test_reconstruction_measures_are_those_of_all_tokens_of_the_type(frame, good_sae, residual, tokens, part):
    x = residual[:, part].double()
    sae = SparseAutoencoder(good_sae.d_in, good_sae.d_sae).double()
    sae.load_state_dict(good_sae.state_dict())
    with torch.no_grad():
        out = sae(x)
        expected = {
            "mse": patchsae_loss(sae, x, None, 0.0).mse,
            "l1": out.latents.sum(-1).mean(),
            "l0": (out.latents > 0).sum(-1).double().mean(),
            "explained_variance": 1 - (x - out.reconstruction).square().sum() / (x - x.flatten(0, 1).mean(0)).square().sum(),
            "dead_fraction": (out.latents.flatten(0, 1) == 0).all(0).double().mean(),
        }
    for metric, value in expected.items():
        assert frame.loc[("reconstruction", tokens, metric), "value"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), metric


def test_explained_variance_of_the_mean_is_zero(tiny_clip, tiny_dataset, residual):
    """Uncentred it would be large: the residual stream has a big common part."""
    mean = residual.flatten(0, 1).mean(0)
    sae = SparseAutoencoder(32, 64)
    for parameter in sae.parameters():
        parameter.data.zero_()
    sae.b_dec.data.copy_(mean)
    frame = measured(tiny_clip, sae, tiny_dataset)
    assert frame.loc[("reconstruction", "all", "explained_variance"), "value"] == pytest.approx(0, abs=1e-5)
    assert frame.loc[("reconstruction", "cls", "explained_variance"), "value"] < 0
    assert (frame.xs("dead_fraction", level="metric")["value"] == 1).all()
    assert frame["value"].notna().all()  # dead latents make no NaN


def test_tokens_that_do_not_differ_have_no_explained_variance():
    """What rounding leaves of their variance made it -4e13; in resamples of few images the class token is the same, too."""
    x = 30 * torch.ones(3, 7, 1) + torch.randn(7, 1, 8, generator=torch.Generator().manual_seed(0))[0]
    read = TokenReadings(x + 0.1, torch.ones(3, 7), torch.ones(3, 7), {})
    found = _reconstruction_metrics(np.random.default_rng(0).multinomial(3, [1 / 3] * 3, 50) @ _image_sums(x, read, slice(None)))
    assert np.isnan(found[3]).all() and np.isfinite(found[0]).all()


def test_error_kept_is_raw_and_replacing_hits_its_tokens_alone(tiny_clip, good_sae, tiny_dataset, residual, frame):
    labels = tiny_dataset.labels
    head = tiny_clip.zero_shot_head(tiny_dataset.class_names, templates_for(tiny_dataset.spec))
    reconstruction = read_tokens(good_sae, residual).reconstruction
    cases = {("raw", "none"): residual, ("error_kept", "all"): residual, ("reconstruction", "all"): reconstruction}
    cases["reconstruction", "cls"] = torch.cat([reconstruction[:, :1], residual[:, 1:]], 1)
    cases["reconstruction", "patch"] = torch.cat([residual[:, :1], reconstruction[:, 1:]], 1)
    for key, tokens in cases.items():
        logits = tiny_clip.logits(tiny_clip.finish(tokens, LAYER), head)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert frame.loc[(*key, "contrastive_loss"), "value"] == pytest.approx(loss, rel=1e-4)
        assert frame.loc[(*key, "zero_shot_top1"), "value"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert frame.loc[("error_kept", "all", "zero_shot_change"), ["value", "low", "high"]].tolist() == [0, 0, 0]
    assert ("raw", "none", "zero_shot_change") not in frame.index


def test_several_saes_share_one_pass_and_give_what_each_gives_alone(tiny_clip, good_sae, tiny_sae, tiny_dataset, frame):
    both = evaluate_sae(tiny_clip, {"good": good_sae, "fresh": tiny_sae}, tiny_dataset, LAYER, batch_size=10, progress=False)
    assert both["sae"].unique().tolist() == ["good", "fresh"]
    pd.testing.assert_frame_equal(both[both["sae"] == "good"].drop(columns="sae").set_index(frame.index.names), frame)
    assert evaluation_table(both).index.get_level_values("sae").unique().tolist() == ["good", "fresh"]


def test_activations_unlike_those_of_training_are_refused(tiny_clip, tiny_dataset, residual):
    sae = SparseAutoencoder(32, 64)
    Normalization.of(residual.flatten(0, 1), "mean").fold(sae)
    measured(tiny_clip, sae, tiny_dataset)
    Normalization.of(10 * residual.flatten(0, 1), "mean").fold(sae)
    with pytest.raises(ValueError, match="the activations of 'tiny' on 'openmoji/tools' are"):
        measured(tiny_clip, sae, tiny_dataset)


def test_readings_by_place_follow_the_ground_truth_and_leave_cls_out(tiny_clip, tiny_sae, tiny_dataset, residual):
    frame = readings_by_place(tiny_clip, tiny_sae, tiny_dataset, LAYER).set_index(["place", "metric"])
    x = residual[:, 1:]
    out = tiny_sae(x)
    l0, error = (out.latents > 0).sum(-1).float(), (x - out.reconstruction).norm(dim=-1) / x.norm(dim=-1)
    l0, error = (each.detach().unflatten(1, (14, 14)) for each in (l0, error))
    bare = np.stack([tiny_dataset.truth(i).background_share for i in range(len(tiny_dataset))])
    assert frame.loc[("object", "l0"), "value"] == pytest.approx(l0.numpy()[bare <= 0.5].mean(), rel=1e-5)
    assert frame.loc[("background", "error"), "value"] == pytest.approx(error.numpy()[bare >= 0.9].mean(), rel=1e-5)
    assert (frame["low"] <= frame["value"]).all() and (frame["value"] <= frame["high"]).all()


def test_firing_rates_count_tokens(tiny_sae, residual):
    x = residual.flatten(0, 1)
    rates = firing_rates(tiny_sae, x.split(100), n_tokens=250)
    torch.testing.assert_close(rates, (tiny_sae.encode(x[:250]) > 0).float().mean(0))
    with pytest.raises(ValueError, match="no tokens"):
        firing_rates(tiny_sae, [])


UP, RIGHT = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])


def five_causes(activation="relu", **options):
    """Latents that each fire for one reason or not for another; train tokens lie up and right, test tokens right alone."""
    sae = SparseAutoencoder(2, 5, activation, **options)
    directions = torch.stack([RIGHT, UP, RIGHT, 0.02 * RIGHT, -RIGHT])
    sae.W_enc.data.copy_(directions.T)
    sae.W_dec.data.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae.b_enc.data.copy_(torch.tensor([-0.5, -0.5, -5.0, 0.0, -0.5]))
    return sae, [torch.stack([3 * UP, 2 * RIGHT])], [torch.stack([RIGHT, 2 * RIGHT, 3 * RIGHT])]


def test_every_cause_of_death_is_found():
    sae, train, test = five_causes("jumprelu")
    sae.threshold.data.fill_(0.1)
    frame = dead_causes(sae, train, test)
    assert frame["cause"].tolist() == ["alive", "train_only", "bias", "bias", "starved"]  # 0.02 * 3 < 0.1: no direction helps
    assert frame["train_rate"].tolist() == [0.5, 0.5, 0, 0, 0]
    assert frame["test_rate"].tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_allclose(frame["largest"], [3 - 0.6, 3 - 0.6, 3 - 5.1, 0.06 - 0.1, -0.6], atol=1e-6)
    np.testing.assert_allclose(frame["bound"], [3 - 0.6, 3 - 0.6, 3 - 5.1, 0.06 - 0.1, 3 - 0.6], atol=1e-6)
    sae, train, test = five_causes("topk", k=1)
    assert dead_causes(sae, train, test)["cause"].tolist() == ["alive", "train_only", "bias", "outcompeted", "starved"]
    sae, train, test = five_causes("relu")
    assert dead_causes(sae, train, test)["cause"].tolist() == ["alive", "train_only", "bias", "alive", "starved"]
