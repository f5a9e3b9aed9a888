"""Tokens straight from the model: those of the store, in an order that follows from seed and step, in bounded memory."""

import dataclasses

import pytest
import torch
from tiny_training import CONFIG, assert_same, weights

from patchsae_utils.activations.mixing import TOKENS
from patchsae_utils.activations.streaming import TokenStream
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.trainer import train_sae, training_log

BYTES = 2 * 197 * 32  # of an image of the tiny model


@pytest.fixture(scope="module")
def stream(tiny_clip, tiny_dataset):
    """A buffer of eight images of 24."""
    return TokenStream(tiny_clip, tiny_dataset, -2, batch_size=4, buffer_bytes=8 * BYTES)


@pytest.mark.parametrize("tokens", ["all", "patches", "cls"])
def test_an_epoch_holds_what_the_store_holds(stream, tiny_store, tokens):
    n = {"all": 197, "patches": 196, "cls": 1}[tokens]
    mine, stored = (list(source.tokens(500, seed=3, positions=True, tokens=tokens)) for source in (stream, tiny_store))
    assert sum(len(x) for x, _ in mine) == 24 * n == sum(len(x) for x, _ in stored)
    order = [torch.cat([x for x, _ in batches]) for batches in (mine, stored)]
    # Sums are blind to the order; the batches of the forward passes differ, so bfloat16 may round another way here and there.
    torch.testing.assert_close(order[0].sum(0), order[1].sum(0), rtol=1e-3, atol=0.05)
    places = torch.cat([p for _, p in mine])
    expected = torch.arange(197)[TOKENS[tokens]]
    assert torch.equal(places.sort().values, expected.repeat_interleave(24))


def test_positions_are_those_of_the_tokens(stream, tiny_clip, tiny_inputs):
    """The token at a position, of one image among 24, is what the model says there."""
    truth = tiny_clip.residual(tiny_inputs, -2)
    x, places = next(stream.tokens(64, seed=1, positions=True))
    distances = (truth[:, places] - x).abs().amax(-1).amin(0)
    assert distances.max() < 0.02 * truth.abs().max()


def test_skipped_buffers_are_not_computed_and_the_buffer_is_bounded(stream, monkeypatch):
    seen, fill = [], TokenStream._read
    monkeypatch.setattr(TokenStream, "_read", lambda self, images, kept: seen.append(len(images)) or fill(self, images, kept))
    next(stream.tokens(100, epochs=None, start_step=2 * 24 * 197 // 100 + 20))  # the second buffer of the third epoch
    assert seen == [8]
    assert sum(len(x) for x in stream.tokens(1000)) == 24 * 197
    assert seen == [8] * 4


def test_training_on_a_stream_goes_on_bit_for_bit(tmp_path, stream, monkeypatch):
    config = dataclasses.replace(CONFIG, n_tokens=30 * 512, batch_tokens=512, start="data", tokens="patches")
    fresh = lambda: SparseAutoencoder(32, 64, seed=0)  # noqa: E731
    whole = weights(train_sae(fresh(), stream, config, tmp_path / "whole", progress=False))
    fill, calls = TokenStream._read, []

    def power_cut(self, images, kept):
        calls.append(1)
        if len(calls) == 20:  # thirteen fill the sample from which latents start
            raise KeyboardInterrupt
        return fill(self, images, kept)

    monkeypatch.setattr(TokenStream, "_read", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train_sae(fresh(), stream, config, tmp_path / "cut", progress=False)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    sae = train_sae(fresh(), stream, config, tmp_path / "cut", progress=False)
    assert_same(weights(sae), whole)
    assert sae.metadata["tokens"] == "patches" and sae.metadata["model_name"] == "tiny"
    assert len(training_log(tmp_path / "cut")) == 11


def test_the_fingerprint_names_what_the_batches_depend_on(stream, tiny_clip, tiny_dataset):
    def of(**changes):
        return TokenStream(tiny_clip, tiny_dataset, **{"layer": -2, "batch_size": 4, "buffer_bytes": 8 * BYTES} | changes).fingerprint

    assert of() == stream.fingerprint
    assert len({stream.fingerprint, of(layer=0), of(batch_size=5), of(buffer_bytes=9 * BYTES)}) == 4


def test_tokens_that_are_not_there_are_refused(stream):
    with pytest.raises(ValueError, match="Unknown tokens 'some'. Valid: all, cls, patches"):
        stream.tokens(10, tokens="some")
    with pytest.raises(ValueError, match="batch_size >= 1"):
        stream.tokens(0)
