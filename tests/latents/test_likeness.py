"""Monosemanticity against the sum over pairs, alone and beside the statistics."""

import copy

import numpy as np
import pytest
import torch

from patchsae_utils.data.truth import concept_masks
from patchsae_utils.latents import passes
from patchsae_utils.latents.likeness import Likeness, LikenessObserver, RunningScores
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.dictionary import random_sae


def by_pairs(a: np.ndarray, e: np.ndarray) -> float:
    """The definition: all ordered pairs of different images, in float64."""
    above = below = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            if i != j:
                above += a[i] * a[j] * (e[i] @ e[j])
                below += a[i] * a[j]
    return above / below if below > 0 else np.nan


def scores(a, e, batch=1000) -> np.ndarray:
    a, e = torch.as_tensor(a), torch.as_tensor(e)
    running = RunningScores(a.shape[1], {"e": e.shape[1]})
    for some, vectors in zip(a.split(batch), e.split(batch), strict=True):
        running.add(some, {"e": vectors})
    return running.finish()["e"].numpy()


def unit(e):
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def test_score_is_the_sum_over_pairs_whatever_the_scale_and_batches():
    rng = np.random.default_rng(0)
    a, e = rng.exponential(size=(20, 9)) * (rng.random((20, 9)) < 0.5), unit(rng.normal(size=(20, 5)))
    a[:, 0] = 0  # dead
    a[1:, 1], a[0, 1] = 0, 2.0  # one image alone
    a[:, 2] = 1.0  # always, equally
    found = scores(a, e)
    assert np.isnan(found[:2]).all() and not np.isnan(found[2:]).any()
    np.testing.assert_allclose(found, [by_pairs(a[:, s], e) for s in range(9)], atol=1e-12)
    np.testing.assert_allclose(scores(1e3 * a, e, batch=7), found, rtol=1e-9)


def test_images_that_show_nothing_are_like_no_other():
    """Their vectors are zero: two of them are not opposites, and one doesn't count as unlike itself."""
    a, e = np.ones((4, 1)), np.array([[1.0, 0], [1, 0], [0, 0], [0, 0]])
    assert scores(a, e)[0] == pytest.approx(2 / 12)
    assert scores(a[2:], e[2:])[0] == 0


def test_the_statistics_pass_scores_latents_and_controls(tiny_clip, tiny_sae, tiny_dataset, tiny_inputs, tmp_path):
    """Every kind of feature against all pairs of images in float64, from one pass over the images; the summary is what it is without."""
    sae = copy.deepcopy(tiny_sae).requires_grad_(False)
    sae.b_enc.fill_(-0.5)
    sae.b_enc[[3, 9]] = -1e6  # dead
    settings = dict(batch_size=7, progress=False)
    plain = summarize_latents(tiny_clip, sae, tiny_dataset, 1, **settings)
    observers = [LikenessObserver(tiny_clip, sae, tiny_dataset, 1, tmp_path / "l")]
    summary = summarize_latents(tiny_clip, sae, tiny_dataset, 1, observers=observers, **settings)
    assert torch.equal(plain.top_images, summary.top_images) and torch.equal(plain.class_counts, summary.class_counts)
    found = Likeness.load(tmp_path / "l")
    images = torch.nn.functional.normalize(tiny_clip.encode_image(tiny_inputs), dim=1)
    torch.testing.assert_close(found.embeddings, images, rtol=1e-4, atol=1e-5)
    e = {
        column: found.vectors[judge].double().numpy() for judge, column in (("clip", "score"), ("pixels", "pixels"), ("objects", "objects"))
    }
    areas = np.stack([concept_masks(tiny_dataset, i, tiny_clip).sum((1, 2)) for i in range(24)])[:, : e["objects"].shape[1]]
    np.testing.assert_allclose(e["objects"], unit(areas + 1e-30), atol=1e-6)
    blocks = tiny_inputs.view(24, 3, 8, 14, 8, 14).mean((3, 5)).flatten(1)
    torch.testing.assert_close(found.vectors["pixels"], torch.nn.functional.normalize(blocks, dim=1), rtol=1e-4, atol=1e-5)
    tokens = tiny_clip.residual(tiny_inputs, 1).detach()
    control = random_sae(sae, tokens.flatten(0, 1)[::3])
    centred = tokens - sae.b_dec
    means = {
        "SAE": sae.encode(tokens), "random directions": control.encode(tokens), "single dimensions": torch.cat([centred, -centred], -1).relu(),
    }  # fmt: skip
    assert found.table["dictionary"].unique().tolist() == list(means)
    for name, h in means.items():
        a, rows = h.double().mean(1).numpy(), found.table[found.table["dictionary"] == name].reset_index(drop=True)
        assert rows["latent"].tolist() == list(range(a.shape[1])) and rows["n_images"].tolist() == (a > 0).sum(0).tolist()
        for s in [*range(0, a.shape[1], 9), 3]:
            for judge, vectors in e.items():
                assert rows.loc[s, judge] == pytest.approx(by_pairs(a[:, s], vectors), abs=1e-5, nan_ok=True), (name, s)
    assert found.table.query("dictionary == 'SAE'")["score"].isna().to_numpy()[[3, 9]].all()
    assert found.chance == pytest.approx(by_pairs(np.ones(24), e["score"]))  # every pair alike
    above = found.above_chance().set_index(["judge", "dictionary"]).loc[("objects", "SAE")]
    mean = found.table.query("dictionary == 'SAE'")["objects"].mean()
    assert above["null"] == pytest.approx(by_pairs(np.ones(24), e["objects"])) and above["excess"] == pytest.approx(mean - above["null"])
    assert above["low"] < above["excess"] < above["high"]
    assert f"by the objects shown (null {above['null']:.2f}) SAE {above['excess']:+.3f}" in found.sentence()


def test_what_was_made_before_is_opened_and_what_is_missing_made_alone(tiny_clip, tiny_sae, tiny_dataset, tmp_path, monkeypatch):
    settings = dict(out=tmp_path / "s", batch_size=7, progress=False)
    likeness = lambda: [LikenessObserver(tiny_clip, tiny_sae, tiny_dataset, 1, tmp_path / "l")]  # noqa: E731
    first = summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, **settings)
    with pytest.raises(FileNotFoundError, match="Make it: summarize_latents"):
        Likeness.load(tmp_path / "l")
    again = summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, observers=likeness(), **settings)
    assert torch.equal(first.top_images, again.top_images) and len(Likeness.load(tmp_path / "l").embeddings) == 24
    monkeypatch.setattr(passes, "batches", lambda *_, **__: pytest.fail("the images were read again"))
    summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, observers=likeness(), **settings)
