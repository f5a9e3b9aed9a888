"""Attribution of class logits to latents: against dense autograd, and against turning latents off one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchsae_utils.interventions.attribution import ablate_latents, attribute_latents, attribution_check, image_attribution
from patchsae_utils.interventions.masks import dataset_head, sweep_masks
from patchsae_utils.interventions.steering import Edit, steer
from patchsae_utils.interventions.tail import Active, decoder_of
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = -2


@pytest.fixture(scope="module")
def head(tiny_clip, tiny_dataset):
    return dataset_head(tiny_clip, tiny_dataset)


@pytest.fixture(scope="module")
def maple(tiny_clip):
    from patchsae_utils.adaptation.adapters import MaPLe

    return MaPLe(tiny_clip, n_ctx=2, depth=2)


def dense(clip, sae, residual, head, classes, target="logit"):
    """Gradient in the latents themselves, through a dense decode, times the latents; in float32 as the model is: [B, T, S]."""
    with torch.no_grad():
        h = sae.encode(residual.tokens)
        error = residual.tokens - sae.decode(h)
    h = h.requires_grad_(True)
    logits = clip.logits(clip.finish(residual._replace(tokens=sae.decode(h) + error), LAYER), head)
    own = logits.gather(1, classes[:, None])[:, 0]
    if target == "margin":
        mask = torch.nn.functional.one_hot(classes, logits.shape[1]).bool()
        own = own - logits.masked_fill(mask, -torch.inf).logsumexp(1)
    return (torch.autograd.grad(own.sum(), h)[0] * h).detach()


@pytest.mark.parametrize("target", ["logit", "margin"])
@pytest.mark.parametrize("kind", ["base", "maple"])
def test_gradient_times_activation_equals_dense_autograd(kind, target, tiny_clip, maple, tiny_sae, tiny_images, head):
    clip = maple if kind == "maple" else tiny_clip
    residual = clip.run_to(tiny_images, LAYER)
    classes = torch.arange(len(tiny_images)) % len(head)
    expected = dense(clip, tiny_sae, residual, head, classes, target)
    places = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}
    for where, tokens in places.items():
        found = image_attribution(clip, tiny_sae, residual, head, classes, LAYER, target=target, where=where)
        torch.testing.assert_close(found, expected[:, tokens].sum(1), rtol=1e-3, atol=1e-4)
    assert expected.abs().max() > 1e-2


def test_class_scores_are_means_over_the_classs_own_images(tiny_clip, tiny_sae, tiny_dataset, head):
    scores = attribute_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, head=head, batch_size=7, progress=False)
    images = torch.stack([tiny_clip.preprocess(tiny_dataset[i].image) for i in range(len(tiny_dataset))])
    each = image_attribution(tiny_clip, tiny_sae, images, head, tiny_dataset.labels, LAYER)
    for label in range(len(head)):
        mine = each[tiny_dataset.labels == label]
        expected = mine.mean(0) if len(mine) else torch.zeros(tiny_sae.d_sae)
        torch.testing.assert_close(scores.scores[label], expected, rtol=1e-3, atol=1e-4)
    assert scores.class_images.sum() == len(tiny_dataset)
    assert torch.equal(scores.top(3)[:, 0], scores.scores.argmax(1))


def test_exact_ablation_is_what_steering_one_latent_off_does(tiny_clip, tiny_sae, tiny_images, head):
    for where, patches in (("all", None), ("cls", "cls"), ("patches", "patches")):
        change = ablate_latents(tiny_clip, tiny_sae, tiny_images, [7, 30], head, LAYER, where=where)
        for i, latent in enumerate((7, 30)):
            steered = steer(tiny_clip, tiny_sae, tiny_images, [Edit(latent, "scale", 0.0, patches)], LAYER, head)
            torch.testing.assert_close(change[:, i], steered.logits - steered.logits_before, rtol=0, atol=1e-4)
    assert change.abs().max() > 1e-3


def test_attribution_is_the_ablation_of_a_small_latent(tiny_clip, tiny_images, head):
    """Finite difference: with decoder rows a thousandth as long, first order is all there is."""
    sae = SparseAutoencoder(tiny_clip.width, 32, seed=3)
    with torch.no_grad():
        sae.W_dec.mul_(1e-2)
    residual = tiny_clip.run_to(tiny_images, LAYER)
    classes = torch.zeros(len(tiny_images), dtype=torch.long)
    estimate = image_attribution(tiny_clip, sae, residual, head, classes, LAYER)
    exact = -ablate_latents(tiny_clip, sae, residual, range(32), head, LAYER)[..., 0]
    torch.testing.assert_close(estimate, exact, rtol=0.05, atol=2e-3 * float(exact.abs().max()) + 2e-5)
    assert exact.abs().max() > 1e-3


def test_the_check_lists_estimate_and_truth(tiny_clip, tiny_sae, tiny_dataset, head):
    check = attribution_check(tiny_clip, tiny_sae, tiny_dataset, head, LAYER, n_latents=6)
    assert len(check["exact"]) == len(check["estimate"]) == 6 * len(tiny_dataset)
    assert np.corrcoef(check["estimate"], check["exact"])[0, 1] > 0.5


def test_sweeps_rank_by_attribution(tiny_clip, tiny_sae, tiny_dataset, head):
    """A class's latents of highest attribution cost it more than those of lowest, by first order on the images themselves."""
    scores = attribute_latents(tiny_clip, tiny_sae, tiny_dataset, LAYER, head=head, progress=False)
    options = {"choose": "oracle", "rank_by": "attribution", "modes": "off", "keep_error": True, "head": head, "n_bootstrap": 20}
    best = sweep_masks(tiny_clip, tiny_sae, tiny_dataset, [3], attribution=scores, progress=False, **options).iloc[3]
    worst = sweep_masks(tiny_clip, tiny_sae, tiny_dataset, [3], attribution=-scores.scores, progress=False, **options).iloc[3]
    assert best["rank"] == worst["rank"] == "attribution"
    assert best["logit"] < worst["logit"] - 0.1


def test_both_rankings_stand_in_one_table(tiny_clip, tiny_sae, tiny_dataset, head):
    counts = torch.rand(len(tiny_dataset.class_names), tiny_sae.d_sae, generator=torch.Generator().manual_seed(0))
    table = sweep_masks(
        tiny_clip, tiny_sae, tiny_dataset, [2], choose=["predicted", "random"], rank_by=["count", "attribution"], layer=LAYER,
        class_counts=counts, attribution=counts.flip(0), head=head, n_bootstrap=10, n_random=1, progress=False,
    )  # fmt: skip
    assert table[table["mode"] == "off"][["choose", "rank"]].to_numpy().tolist() == [
        ["predicted", "count"], ["predicted", "attribution"], ["random", "none"],
    ]  # fmt: skip


def test_decoder_is_read_off_decode(tiny_sae):
    """An SAE that undoes a scale and a centre behind its decoder adds scaled rows to the residual stream."""

    class Scaled(SparseAutoencoder):
        def decode(self, latents):
            return super().decode(latents) * 2.5 + 1.0

    sae = Scaled(16, 40, seed=1)
    with torch.no_grad():
        sae.b_dec.normal_()
    h = torch.rand(3, 5, 40) * (torch.rand(3, 5, 40) < 0.2)
    decoder = decoder_of(sae)
    with torch.no_grad():
        torch.testing.assert_close(h @ decoder.rows + decoder.offset, sae.decode(h), rtol=0, atol=1e-4)
        torch.testing.assert_close(Active.of(h).decode(decoder.rows) + decoder.offset, sae.decode(h), rtol=0, atol=1e-4)
    assert decoder_of(tiny_sae).rows.data_ptr() == tiny_sae.W_dec.data_ptr()  # no copy where none is needed

    class Other(SparseAutoencoder):
        def decode(self, latents):
            return super().decode(latents).flip(-1)

    with pytest.raises(ValueError, match="one by one"):
        decoder_of(Other(16, 40))


def test_bad_input(tiny_clip, tiny_sae, tiny_images, tiny_dataset, head):
    with pytest.raises(ValueError, match="Valid: logit, margin"):
        image_attribution(tiny_clip, tiny_sae, tiny_images, head, target="loss")
    with pytest.raises(ValueError, match="Valid: all, cls, patches"):
        attribute_latents(tiny_clip, tiny_sae, tiny_dataset, where="corner", head=head)
    with pytest.raises(ValueError, match="latents 0 to 63"):
        ablate_latents(tiny_clip, tiny_sae, tiny_images, [64], head)
    with pytest.raises(ValueError, match="attribution=attribute_latents"):
        sweep_masks(
            tiny_clip,
            tiny_sae,
            tiny_dataset,
            [1],
            choose="predicted",
            rank_by="attribution",
            class_counts=torch.rand(len(head), 64),
            head=head,
        )
