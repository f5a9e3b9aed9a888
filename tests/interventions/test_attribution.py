"""Attribution of class logits to latents: against dense autograd, and against turning latents off one by one."""

import numpy as np
import pytest
import torch
from tiny import owed

from patchsae_utils.interventions import Edit, attribute_latents, attribution_check, steer, sweep_masks
from patchsae_utils.interventions.attribution import all_others, latent_shares
from patchsae_utils.interventions.tail import network_tail
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = -2


def dense(clip, sae, residual, head, classes, target):
    """Gradient in the latents themselves, through a dense decode, times the latents, summed over tokens: [B, S]."""
    h = sae.encode(residual.tokens).detach()
    error = residual.tokens - sae.decode(h)
    h = h.requires_grad_(True)
    logits = clip.logits(clip.finish(residual._replace(tokens=sae.decode(h) + error), LAYER), head)
    own = logits.gather(1, classes[:, None])[:, 0]
    if target == "margin":
        own = own - logits.masked_fill(torch.nn.functional.one_hot(classes, logits.shape[1]).bool(), -torch.inf).logsumexp(1)
    return (torch.autograd.grad(own.sum(), h)[0] * h).detach().sum(1)


@pytest.mark.parametrize("target", ["logit", "margin"])
@pytest.mark.parametrize("kind", ["base", "maple"])
def test_gradient_times_activation_equals_dense_autograd(kind, target, tiny_clip, maple, sae, tiny_images, head):
    clip = maple if kind == "maple" else tiny_clip
    residual = clip.run_to(tiny_images, LAYER)
    classes = torch.arange(len(tiny_images)) % len(head)
    expected = dense(clip, sae, residual, head, classes, target)
    peers = all_others(head) if target == "margin" else None
    found = latent_shares(clip, sae, network_tail(clip, LAYER, residual), residual, head, classes, peers)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().max() > 1e-2
    predicted = clip.logits(clip.finish(residual, LAYER), head).argmax(1)
    of_predicted = dense(clip, sae, residual, head, predicted, "logit")
    for h in (None, sae.encode(residual.tokens)):
        torch.testing.assert_close(owed(clip, sae, residual, head, LAYER, h), of_predicted, rtol=1e-3, atol=1e-4)


def test_class_scores_are_means_over_the_classs_own_images(tiny_clip, sae, tiny_dataset, tiny_inputs, head):
    scores = attribute_latents(tiny_clip, sae, tiny_dataset, LAYER, head=head)
    residual = tiny_clip.run_to(tiny_inputs, LAYER)
    each = dense(tiny_clip, sae, residual, head, tiny_dataset.labels, "margin")
    for label in range(len(head)):
        mine = each[tiny_dataset.labels == label]
        torch.testing.assert_close(scores.scores[label], mine.sum(0) / max(len(mine), 1), rtol=1e-3, atol=1e-4)
    assert torch.equal(scores.top(3)[:, 0], scores.scores.argmax(1))


def test_the_checks_exact_effect_is_that_of_steering_one_latent_off(tiny_clip, sae, tiny_dataset, head):
    check = attribution_check(tiny_clip, sae, tiny_dataset, head, LAYER)
    assert len(check["exact"]) == len(check["estimate"]) == 20 * len(tiny_dataset)
    assert np.corrcoef(check["estimate"], check["exact"])[0, 1] > 0.5
    residual = tiny_clip.run_to(tiny_clip.preprocess(tiny_dataset[0].image)[None], LAYER)
    best = owed(tiny_clip, sae, residual, head, LAYER)[0].topk(10)
    np.testing.assert_allclose(check["estimate"][:10], best.values, atol=1e-4)
    for latent, exact in zip(best.indices.tolist(), check["exact"][:10], strict=True):
        steered = steer(tiny_clip, sae, residual, [Edit(latent)], LAYER, head)
        assert exact == pytest.approx(float((steered.logits_before - steered.logits)[0, steered.logits_before.argmax()]), abs=1e-4)


def test_attribution_is_the_ablation_of_a_small_latent(tiny_clip, tiny_dataset, head):
    """Finite difference: with decoder rows a hundredth as long, first order is all there is."""
    sae = SparseAutoencoder(tiny_clip.width, 32, seed=3).requires_grad_(False)
    sae.W_dec.mul_(1e-2)
    check = attribution_check(tiny_clip, sae, tiny_dataset, head, LAYER)
    exact = torch.from_numpy(check["exact"])
    torch.testing.assert_close(torch.from_numpy(check["estimate"]), exact, rtol=0.05, atol=2e-3 * float(exact.abs().max()) + 2e-5)
    assert exact.abs().max() > 1e-3


def test_sweeps_rank_by_attribution(tiny_clip, sae, tiny_dataset, head):
    """A class's latents of highest attribution cost it more than those of lowest, by first order on the images themselves."""
    scores = attribute_latents(tiny_clip, sae, tiny_dataset, LAYER, head=head)
    best, worst = (
        sweep_masks(tiny_clip, sae, tiny_dataset, [3], "oracle", True, attribution=table, rank_by="attribution", head=head).iloc[4]
        for table in (scores, -scores.scores)
    )
    assert best["rank"] == worst["rank"] == "attribution" and best["mode"] == "off"
    assert best["logit"] < worst["logit"] - 0.1


def test_images_without_active_latents_have_nothing_to_check(tiny_clip, tiny_dataset, head):
    silent = SparseAutoencoder(tiny_clip.width, 8).requires_grad_(False)
    silent.b_enc.fill_(-1e6)
    check = attribution_check(tiny_clip, silent, tiny_dataset, head, LAYER)
    assert check["estimate"].shape == check["exact"].shape == (0,)
