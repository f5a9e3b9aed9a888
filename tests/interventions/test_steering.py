"""Edits that bring activations in from elsewhere: swaps and transplants, and sequences of edits. (Single-latent edits: test_interventions.py.)"""

from __future__ import annotations

import pytest
import torch

from patchsae_utils.interventions.masks import dataset_head
from patchsae_utils.interventions.steering import Edit, steer

LAYER = -2


@pytest.fixture(scope="module")
def head(tiny_clip, tiny_dataset):
    return dataset_head(tiny_clip, tiny_dataset)


@pytest.fixture(scope="module")
def stream(tiny_clip, tiny_images):
    return tiny_clip.run_to(tiny_images, LAYER)


@pytest.fixture(scope="module")
def latents(tiny_sae, stream):
    """[8, 197, 64] before any edit."""
    with torch.no_grad():
        return tiny_sae.encode(stream.tokens)


def expected_stream(sae, stream, before, after):
    """Dense, in float64: what the residual stream is after the latents became ``after``."""
    with torch.no_grad():
        return (stream.tokens.double() + (after.double() - before.double()) @ sae.W_dec.double()).float()


def check(clip, sae, stream, latents, edits, change):
    after = latents.clone()
    change(after)
    found = steer(clip, sae, stream, edits, LAYER).residual.tokens
    torch.testing.assert_close(found, expected_stream(sae, stream, latents, after), rtol=0, atol=1e-4)
    assert (after - latents).abs().max() > 0.1


def test_a_swap_exchanges_two_latents_where_it_acts(tiny_clip, tiny_sae, stream, latents):
    def change(h):
        h[:, [11, 41], 3], h[:, [11, 41], 7] = latents[:, [11, 41], 7], latents[:, [11, 41], 3]

    check(tiny_clip, tiny_sae, stream, latents, [Edit(3, "swap", other=7, patches=[10, 40])], change)


def test_a_swap_multiplies_what_arrives(tiny_clip, tiny_sae, stream, latents):
    def change(h):
        h[..., 3], h[..., 7] = 2.5 * latents[..., 7], 2.5 * latents[..., 3]

    check(tiny_clip, tiny_sae, stream, latents, [Edit(3, "swap", 2.5, other=7)], change)


def test_swapping_twice_changes_nothing(tiny_clip, tiny_sae, stream, head):
    twice = [Edit(3, "swap", other=7), Edit(7, "swap", other=3)]
    steered = steer(tiny_clip, tiny_sae, stream, twice, LAYER, head)
    assert torch.equal(steered.residual.tokens, stream.tokens)
    assert torch.equal(steered.logits, steered.logits_before)


def test_transplants_from_the_batch_from_a_stream_and_from_activations_agree(tiny_clip, tiny_sae, stream, latents):
    def change(h):
        h[:, 1:, 5] = latents[2, 1:, 5]

    other = stream._replace(tokens=stream.tokens[2:3])
    for source in (2, other, latents[2, :, 5], latents[2:3, :, 5]):
        check(tiny_clip, tiny_sae, stream, latents, [Edit(5, "transplant", patches="patches", source=source)], change)
    each = Edit(5, "transplant", source=stream._replace(tokens=stream.tokens.flip(0)))  # one a image
    check(tiny_clip, tiny_sae, stream, latents, [each], lambda h: h[..., 5].copy_(latents.flip(0)[..., 5]))


def test_sequences_act_in_turn_on_what_is_there(tiny_clip, tiny_sae, stream, latents):
    """Off, then swapped: the other latent is off. A transplant takes what was there before any edit."""
    edits = [
        Edit(3),
        Edit(3, "swap", other=7),
        Edit(9, "set", 4.0),
        Edit(9, "scale", 0.5, "cls"),
        Edit(5, "transplant", source=0),
        Edit(5, "add", 1.0),
    ]

    def change(h):
        h[..., 3], h[..., 7] = latents[..., 7], 0
        h[..., 9] = 4.0
        h[:, 0, 9] = 2.0
        h[..., 5] = latents[0, :, 5] + 1

    check(tiny_clip, tiny_sae, stream, latents, edits, change)


def test_steer_tells_what_became_of_the_latents(tiny_clip, tiny_sae, stream, latents):
    steered = steer(tiny_clip, tiny_sae, stream, [Edit(7), Edit(3, "add", 2.0, [0, 1])], LAYER)
    assert steered.latents == (7, 3)
    torch.testing.assert_close(steered.activations_before, latents[..., [7, 3]])
    table = steered.edited(image=4)
    assert table["latent"].tolist() == [7, 3] and table["after"].tolist()[0] == 0
    assert table["tokens"].tolist() == [int((latents[4, :, 7] > 0).sum()), 2]
    assert table["after"][1] - table["before"][1] == pytest.approx(4.0, abs=1e-3)
    assert steer(tiny_clip, tiny_sae, stream, [], LAYER).edited().empty


def test_an_adapted_models_prompts_pass_unchanged(tiny_clip, tiny_sae, tiny_images):
    from patchsae_utils.adaptation.adapters import VisualPrompt

    clip = VisualPrompt(tiny_clip, 3, 1)
    before = clip.run_to(tiny_images, LAYER)
    steered = steer(clip, tiny_sae, before, [Edit(3, "swap", other=7), Edit(5, "transplant", source=1)], LAYER)
    assert torch.equal(steered.residual.extra, before.extra) and steered.residual.tokens.shape == before.tokens.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(3, "swap"), "other= .*needed there"),
        (lambda: Edit(3, "scale", other=4), "other= .*belongs to op='swap'"),
        (lambda: Edit(3, "swap", other=3), "two latents"),
        (lambda: Edit(3, "transplant"), "source= .*needed there"),
        (lambda: Edit(3, "swap", -1.0, other=4), "not negative"),
    ],
)
def test_incomplete_edits_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(3, "swap", other=64), "no latent 64"),
        (Edit(3, "transplant", source=8), "images 0 to 7"),
        (Edit(3, "transplant", source=torch.ones(5)), r"\[197\] activations"),
        (Edit(3, "transplant", source=-torch.ones(197)), "not negative"),
    ],
)
def test_what_does_not_exist_is_refused(edit, message, tiny_clip, tiny_sae, stream):
    with pytest.raises(ValueError, match=message):
        steer(tiny_clip, tiny_sae, stream, [edit], LAYER)
