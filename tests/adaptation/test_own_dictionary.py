"""Dictionaries of both models: equal where the models are, measured on the activations that they are said to be measured on."""

from __future__ import annotations

import pytest
import torch

from patchsae_utils.adaptation.own_dictionary import ADAPTED, BASE, DICTIONARIES, MEASURES, OTHER_SEED, train_dictionaries
from patchsae_utils.config import SaeConfig, TrainConfig
from patchsae_utils.data import load_dataset
from patchsae_utils.interventions.tail import dataset_head

LAYER = 1
SAE = SaeConfig(expansion_factor=2)
TRAINING = TrainConfig(n_tokens=4096, batch_tokens=512, lr=1e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "train", n_images=12)


@pytest.fixture(scope="module")
def adapted(models):
    return models["vpt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dictionaries")


@pytest.fixture(scope="module")
def trained(tiny_clip, adapted, scenes, folder):
    return train_dictionaries(tiny_clip, adapted, scenes, LAYER, SAE, TRAINING, folder, progress=False)


@pytest.fixture(scope="module")
def held_out():
    return load_dataset("openmoji/tools", "test", n_images=10, half="base")


def test_the_comparison_is_fair(tiny_clip, scenes, tmp_path):
    """An adapted model that is CLIP gets the very SAE of CLIP; another seed does not."""
    found = train_dictionaries(tiny_clip, tiny_clip, scenes, LAYER, SAE, TRAINING, tmp_path, progress=False)
    torch.testing.assert_close(found.saes[BASE].W_dec, found.saes[ADAPTED].W_dec, rtol=0, atol=0)
    assert not torch.allclose(found.saes[BASE].W_dec, found.saes[OTHER_SEED].W_dec)


def test_each_sae_is_trained_on_its_own_model(trained, tiny_clip, adapted, scenes):
    assert tuple(trained.saes) == DICTIONARIES
    hashes = {name: sae.metadata["weights_hash"] for name, sae in trained.saes.items()}
    assert hashes == {BASE: tiny_clip.weights_hash, OTHER_SEED: tiny_clip.weights_hash, ADAPTED: adapted.weights_hash}
    assert {sae.metadata["n_training_tokens"] for sae in trained.saes.values()} == {TRAINING.n_tokens}
    x = adapted.residual(torch.stack([adapted.preprocess(scenes[i].image) for i in range(len(scenes))]), LAYER)
    assert x.shape[1] == tiny_clip.n_tokens  # prompt tokens are not among them
    fired = (trained.saes[ADAPTED].encode(x.bfloat16().float()) > 0).flatten(0, 1).any(0)
    assert torch.equal(trained.alive[ADAPTED], fired)


def test_what_is_trained_is_opened(trained, tiny_clip, adapted, scenes, folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trains again")

    monkeypatch.setattr("patchsae_utils.sae.trainer.Training", refuse)
    monkeypatch.setattr("patchsae_utils.activations.extraction._extract", refuse)
    again = train_dictionaries(tiny_clip, adapted, scenes, LAYER, SAE, TRAINING, folder, progress=False)
    for name in DICTIONARIES:
        torch.testing.assert_close(again.saes[name].W_enc, trained.saes[name].W_enc, rtol=0, atol=0)


def test_four_combinations_by_hand(trained, tiny_clip, adapted, held_out):
    cross = trained.cross(tiny_clip, adapted, held_out, LAYER, progress=False)
    assert (
        len(cross) == 3 * 2 * len(MEASURES) and ((cross["low"] <= cross["value"] + 1e-9) & (cross["value"] <= cross["high"] + 1e-9)).all()
    )
    found = cross.set_index(["sae", "activations", "measure"])["value"]
    images = torch.stack([tiny_clip.preprocess(held_out[i].image) for i in range(len(held_out))])
    for side, model in ((BASE, tiny_clip), (ADAPTED, adapted)):
        with torch.no_grad():
            residual, head = model.run_to(images, LAYER), dataset_head(model, held_out)
            x = residual.tokens
            raw = model.logits(model.finish(residual, LAYER), head).argmax(1) == held_out.labels
            for name, sae in trained.saes.items():
                out = sae(x)
                error, centred = x - out.reconstruction, x - x.mean((0, 1))
                right = model.logits(model.finish(residual._replace(tokens=out.reconstruction), LAYER), head).argmax(1) == held_out.labels
                expected = {
                    "explained_variance": 1 - error.square().sum() / centred.square().sum(),
                    "l0": (out.latents > 0).sum(-1).float().mean(),
                    "accuracy": right.float().mean(),
                    "change": right.float().mean() - raw.float().mean(),
                }
                for measure, value in expected.items():
                    assert found[name, side, measure] == pytest.approx(float(value), rel=1e-4, abs=1e-4), (name, side, measure)


def test_matches_are_beside_another_seed(trained):
    table = trained.matches().set_index(["a", "b"])
    assert set(table.index) == {(BASE, OTHER_SEED), (BASE, ADAPTED), (OTHER_SEED, ADAPTED)}
    assert table["found"].between(0, 1).all()
