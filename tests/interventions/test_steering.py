"""Edits of single latents: what they do to the residual stream, where, and in what order."""

import numpy as np
import pytest
import torch

from patchsae_utils.interventions import Edit, steer

LAYER = -2


def edited(clip, sae, images, edits):
    before = clip.run_to(images, LAYER).tokens
    return before, steer(clip, sae, images, edits, LAYER).residual.tokens


def test_edits_act_in_turn_and_only_where_they_should(tiny_clip, sae, tiny_images):
    mask = torch.zeros(196, dtype=torch.bool)
    mask[[3, 50]] = True
    for patches, tokens in ((None, range(197)), ("cls", [0]), ("patches", range(1, 197)), ([0, 195], [1, 196]), (mask, [4, 51])):
        before, after = edited(tiny_clip, sae, tiny_images, [Edit(7, "set", 5.0), Edit(7, "scale", 2.0, patches)])
        level = torch.full((197,), 5.0)
        level[list(tokens)] = 10.0
        expected = (level - sae.encode(before)[..., 7])[..., None] * sae.W_dec[7]
        torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-4)


def test_a_sequence_equals_a_dense_edit_in_float64(tiny_clip, sae, tiny_images):
    edits = [Edit(3), Edit(9, "set", 4.0), Edit(9, "scale", 0.5, "cls"), Edit(5, "add", 1.0, [10, 40]), Edit(3, "add", 2.0)]
    before, after = edited(tiny_clip, sae, tiny_images, edits)
    old = sae.encode(before)
    new = old.clone()
    new[..., 3] = 2.0
    new[..., 9] = 4.0
    new[:, 0, 9] = 2.0
    new[:, [11, 41], 5] += 1.0
    expected = before.double() + (new.double() - old.double()) @ sae.W_dec.double()
    torch.testing.assert_close(after, expected.float(), rtol=0, atol=1e-4)
    steered = steer(tiny_clip, sae, tiny_images, edits, LAYER)
    torch.testing.assert_close(steered.activations_before, old[..., [3, 9, 5]])
    torch.testing.assert_close(steered.activations, new[..., [3, 9, 5]])


def test_steer_reports_probabilities_and_what_moved(tiny_clip, sae, tiny_images, tiny_dataset, head):
    steered = steer(tiny_clip, sae, tiny_clip.run_to(tiny_images, LAYER), [Edit(7, "set", 20.0)], LAYER, head)
    torch.testing.assert_close(steered.probabilities.sum(1), torch.ones(8))
    moved = steered.moved(tiny_dataset.class_names, image=2, n=4)
    assert len(moved) == 4 and moved["change"].abs().is_monotonic_decreasing
    np.testing.assert_allclose(moved["after"] - moved["before"], moved["change"], atol=1e-6)
    with pytest.raises(ValueError, match="zero-shot head"):
        _ = steer(tiny_clip, sae, tiny_images, [], LAYER).probabilities


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Edit(0, "scale", -1.0), "not negative"),
    (lambda: Edit(0, patches="corner").apply(torch.ones(1, 5)), "Valid: None"),
    (lambda: Edit(0, patches=[4]).apply(torch.ones(1, 5)), "between 0 and 3"),
    (lambda: Edit(0, patches=torch.ones(2, 4, dtype=torch.bool)).apply(torch.ones(2, 5)), r"\[2, 4\]"),
])  # fmt: skip
def test_bad_edits(make, message):
    with pytest.raises(ValueError, match=message):
        make()
