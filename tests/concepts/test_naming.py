"""Names: corrections and permutation p-values that hold their level, words found where they are planted, agreement against chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from patchsae_utils.concepts import names as naming
from patchsae_utils.concepts import vocabulary
from patchsae_utils.concepts.names import (
    UNNAMED,
    adjust_p_values,
    embed_crops,
    embed_images,
    label_latents,
    make_vocabulary,
    name_agreement,
    related_names,
    score_words,
)
from patchsae_utils.concepts.vocabulary import TextScores, Vocabulary, _permutation_p
from patchsae_utils.latents.reading import summarize_latents


@pytest.fixture(scope="module")
def summary(tiny_clip, tiny_sae, tiny_dataset):
    return summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, k=6, progress=False)


class Blind:
    """A CLIP whose embeddings are given: images are keyed by their place, so the towers cannot be asked."""

    grid, image_size, d_embed = (14, 14), (112, 112), 8


def planted(summary, tiny_dataset, latent: int, word: int, n_words: int = 6):
    """Embeddings in which the reference images of one latent look like one word, and everything else is noise."""
    rng = np.random.default_rng(0)
    words = F.normalize(torch.from_numpy(rng.normal(size=(n_words, 8))).float(), dim=-1)
    images = F.normalize(torch.from_numpy(rng.normal(size=(len(tiny_dataset), 8))).float(), dim=-1)
    top = summary.top_images[latent]
    images[top[top >= 0]] = F.normalize(words[word] + 0.05 * torch.from_numpy(rng.normal(size=8)).float(), dim=-1)
    names = tuple(f"w{i}" for i in range(n_words))
    return Vocabulary(names, ("word",) * n_words, words, (-1,) * n_words), images


# -- corrections --------------------------------------------------------------------------------------------------------------


def test_adjusted_p_values_are_scipys():
    p = np.random.default_rng(0).random(50) ** 3
    np.testing.assert_allclose(adjust_p_values(p), stats.false_discovery_control(p))
    ties = np.array([0.2, 0.01, 0.2, 0.01, 1.0])
    np.testing.assert_allclose(adjust_p_values(ties), stats.false_discovery_control(ties))
    assert len(adjust_p_values(np.array([]))) == 0


def test_p_values_are_uniform_when_nothing_is_there():
    rng = np.random.default_rng(1)
    pool = torch.from_numpy(rng.normal(size=(300, 12))) + torch.from_numpy(rng.exponential(size=(300, 1)))  # words go together
    sets = np.array([rng.choice(300, 6, replace=False) for _ in range(600)])
    sets[::2, 4:] = -1  # some latents have fewer reference images
    scores = vocabulary._means(pool, sets)
    p = _permutation_p(scores.max(1), [(pool, sets)], 500, rng)
    assert p.min() > 0 and p.max() <= 1
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for part in (p[::2], p[1::2]):
        assert abs((part < 0.05).mean() - 0.05) < 0.04


def test_sets_are_compared_with_sets_of_their_own_size():
    rng = np.random.default_rng(2)
    pool = torch.from_numpy(rng.normal(size=(400, 1)))
    sets = np.full((2, 9), -1)
    sets[0, 0], sets[1] = 0, np.arange(9)
    p = _permutation_p(np.array([0.8, 0.8]), [(pool, sets)], 2000, rng)
    assert p[0] == pytest.approx((pool.numpy() >= 0.8).mean(), abs=0.04) and p[1] < 0.03  # nine together seldom reach what one does
    empty = _permutation_p(np.array([5.0]), [(pool, np.full((1, 9), -1))], 100, rng)
    assert empty[0] == 1


# -- words --------------------------------------------------------------------------------------------------------------------


def test_the_planted_word_is_found_and_noise_stays_unnamed(summary, tiny_dataset):
    latent = int((~summary.dead & ~summary.faint).nonzero()[0])
    words, images = planted(summary, tiny_dataset, latent, 3)
    scores = score_words(Blind, tiny_dataset, summary, words, embeddings=images, n_crops=0, n_permutations=3000, progress=False)
    row = scores.table.set_index("latent").loc[latent]
    assert row["name"] == "w3" and row["p"] < 0.01 and row["margin"] > 0
    names = label_latents(summary, text=scores, max_p=0.2).set_index("latent")
    assert names.loc[latent, ["name", "kind"]].tolist() == ["w3", "word"]
    dead = summary.dead.nonzero().flatten().tolist()
    assert (names.loc[dead, "kind"] == "dead").all() and len(names) == summary.n_latents
    assert not names.isna().any().any() and (names["q"] >= names["p"] - 1e-12).all()
    noise = score_words(Blind, tiny_dataset, summary, words, embeddings=images.flip(0)[torch.randperm(24)], n_crops=0, progress=False)
    assert (label_latents(summary, text=noise, max_p=0.01)["name"] == UNNAMED).mean() > 0.9


def test_scores_are_means_of_standardised_cosines(summary, tiny_dataset):
    words, images = planted(summary, tiny_dataset, 0, 1)
    scores = score_words(Blind, tiny_dataset, summary, words, [0, 5], embeddings=images, n_images=4, n_crops=0, progress=False)
    cosine = images.double().numpy() @ words.embeddings.double().numpy().T
    z = (cosine - cosine.mean(0)) / cosine.std(0)
    for row, latent in enumerate((0, 5)):
        top = [i for i in summary.top_images[latent, :4].tolist() if i >= 0]
        np.testing.assert_allclose(scores.scores[row], z[top].mean(0) if top else 0, atol=1e-4)


def test_crops_count_half(tiny_clip, summary, tiny_dataset):
    words = make_vocabulary(tiny_clip, ["dog", "hammer", "red", "grass"])
    living = (~summary.dead & ~summary.faint).nonzero().flatten()[:4].tolist()
    settings = {"n_images": 3, "n_random_crops": 20, "n_permutations": 50, "progress": False}
    both = score_words(tiny_clip, tiny_dataset, summary, words, living, n_crops=2, **settings)
    images = score_words(tiny_clip, tiny_dataset, summary, words, living, n_crops=0, **settings)
    rng = np.random.default_rng(0)
    places = np.stack([rng.integers(24, size=20), rng.integers(196, size=20)], 1)
    null = (embed_crops(tiny_clip, tiny_dataset, places, 2, progress=False) @ words.embeddings.T).double()
    top = np.stack([summary.top_patch_images[living[1], :2].numpy(), summary.top_patches[living[1], :2].numpy()], 1)
    seen = (embed_crops(tiny_clip, tiny_dataset, top[top[:, 0] >= 0], 2, progress=False) @ words.embeddings.T).double()
    crops = ((seen - null.mean(0)) / null.std(0, correction=0)).mean(0).numpy()
    np.testing.assert_allclose(2 * both.scores[1] - images.scores[1], crops, atol=1e-2)
    assert both.table["p"].between(1 / 51, 1).all()


def test_a_crop_is_a_part_of_what_clip_saw_enlarged(tiny_clip, tiny_dataset):
    from PIL import Image

    places = np.array([[3, 0], [3, 7 * 14 + 7]])
    found = embed_crops(tiny_clip, tiny_dataset, places, 1, progress=False)
    picture = np.asarray(tiny_dataset[3].image)
    for row, (top, left) in zip(found, ((0, 0), (48, 48)), strict=True):
        inputs = tiny_clip.preprocess(Image.fromarray(picture[top : top + 24, left : left + 24]))[None]
        with torch.no_grad():
            torch.testing.assert_close(row, F.normalize(tiny_clip.encode_image(inputs), dim=-1)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="margin must be 0 to 6"):
        embed_crops(tiny_clip, tiny_dataset, places, 7)


def test_embeddings_of_images_come_in_order_and_unit_norm(tiny_clip, tiny_dataset, tiny_images):
    found = embed_images(tiny_clip, tiny_dataset, batch_size=5, progress=False)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(24))
    with torch.no_grad():
        torch.testing.assert_close(found[:8], F.normalize(tiny_clip.encode_image(tiny_images), dim=-1), rtol=1e-3, atol=1e-4)


def test_the_vocabulary_of_the_embedded_world_and_of_others(tiny_clip, tiny_dataset):
    words = make_vocabulary(tiny_clip, dataset=tiny_dataset)
    assert {"object", "category", "color", "background"} == set(words.kinds)
    assert words.class_index[: len(tiny_dataset.class_names)] == tuple(range(len(tiny_dataset.class_names)))
    torch.testing.assert_close(words.embeddings.norm(dim=1), torch.ones(len(words.words)))
    other = type("Photos", (), {"spec": "my/photos", "class_names": ["crane", "dog", "crane"]})()
    mine = make_vocabulary(tiny_clip, dataset=other, templates=("{}",))
    assert mine.words[:3] == ("crane (0)", "dog", "crane (2)") and "texture" in mine.kinds
    torch.testing.assert_close(mine.embeddings[0], mine.embeddings[2])  # the index is not spoken
    assert make_vocabulary(tiny_clip, ["a", "b", "a"]).words == ("a", "b")
    with pytest.raises(ValueError, match="vocabulary is empty"):
        make_vocabulary(tiny_clip, [])
    with pytest.raises(ValueError, match="needs words"):
        make_vocabulary(tiny_clip)


def test_bad_arguments_are_refused(summary, tiny_clip, tiny_dataset):
    words = make_vocabulary(tiny_clip, ["dog", "cat"])
    with pytest.raises(ValueError, match="n_images and n_permutations must be positive"):
        score_words(tiny_clip, tiny_dataset, summary, words, n_images=0)
    with pytest.raises(ValueError, match=r"Latents must lie in range\(64\)"):
        score_words(tiny_clip, tiny_dataset, summary, words, [64])
    with pytest.raises(ValueError, match="this data set has 10"):
        score_words(tiny_clip, list(range(10)), summary, words)
    wrong = TextScores(pd.DataFrame(), np.zeros((0, 2)), words, 63)
    with pytest.raises(ValueError, match="text scores 63"):
        label_latents(summary, text=wrong)
    with pytest.raises(ValueError, match="not from both"):
        label_latents(summary, report=object(), text=wrong)


def test_one_word_has_no_runner_up(summary, tiny_dataset):
    words, images = planted(summary, tiny_dataset, 0, 0, n_words=1)
    table = score_words(Blind, tiny_dataset, summary, words, embeddings=images, n_crops=0, n_permutations=50, progress=False).table
    assert (table["runner_up"] == "").all() and (table["name"] == "w0").all()


def test_min_margin_and_entropy(summary):
    names = label_latents(summary)
    assert names["entropy"].notna().all()
    assert (label_latents(summary, min_margin=1e9)["name"] == UNNAMED).all()


# -- agreement ----------------------------------------------------------------------------------------------------------------


def table(names):
    return pd.DataFrame({"latent": range(len(names)), "name": names})


def test_agreement_counts_latents_that_both_name():
    a, b = table(["dog", "cat", UNNAMED, "red", "crane (3)"]), table(["dog", "red", "cat", UNNAMED, "crane"])
    row = name_agreement({"labels": a, "text": b}, n_permutations=2000).iloc[0]
    assert row[["a", "b", "n_a", "n_b", "n_both"]].tolist() == ["labels", "text", 4, 4, 3]
    assert row["agreement"] == pytest.approx(2 / 3)
    assert row["chance"] == pytest.approx(2 / 9, abs=0.03)  # two names in common, each at its place once in three
    assert row["low"] < 2 / 3 < row["high"]


def test_related_names_are_no_contradiction():
    a, b = table(["dog", "hammer", "dog"]), table(["animal", "tool", "tool"])
    rows = name_agreement({"a": a, "b": b}, {"dog": ["animal"], "hammer": ["tool"]}, n_permutations=500)
    assert rows["agreement"][0] == 0 and rows["related"][0] == pytest.approx(2 / 3)
    assert related_names()["dog" if "dog" in related_names() else next(iter(related_names()))]


def test_chance_level_holds_for_names_that_know_nothing_of_each_other():
    rng = np.random.default_rng(3)
    p = []
    for _ in range(120):
        a, b = (table(rng.choice(["u", "v", "w"], 40, p=[0.6, 0.3, 0.1])) for _ in range(2))
        row = name_agreement({"a": a, "b": b}, n_permutations=199, seed=int(rng.integers(1000))).iloc[0]
        p.append(row["p"])
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 0.06 and 0.4 < np.mean(p) < 0.68


def test_agreement_without_common_latents_is_nan_and_one_source_is_refused():
    row = name_agreement({"a": table(["dog", UNNAMED]), "b": table([UNNAMED, "dog"])}).iloc[0]
    assert row["n_both"] == 0 and np.isnan(row["agreement"]) and np.isnan(row["p"])
    with pytest.raises(ValueError, match="two sources"):
        name_agreement({"a": table(["dog"])})
    with pytest.raises(ValueError, match="no column 'name'"):
        name_agreement({"a": table(["dog"]), "b": pd.DataFrame({"latent": [0]})})


def test_names_are_where_they_were(summary):
    from patchsae_utils.concepts import detection as concepts

    assert concepts.label_latents is naming.label_latents and concepts.UNNAMED is UNNAMED
