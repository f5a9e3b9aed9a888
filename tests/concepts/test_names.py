"""Names: permutation p-values that hold their level, words found where they are planted, agreement against chance."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from patchsae_utils.concepts import names as naming
from patchsae_utils.concepts.names import UNNAMED, Vocabulary, label_latents, make_vocabulary, name_agreement, score_words
from patchsae_utils.data import openmoji


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


def test_p_values_are_uniform_when_nothing_is_there():
    rng = np.random.default_rng(1)
    pool = torch.from_numpy(rng.normal(size=(300, 12))) + torch.from_numpy(rng.exponential(size=(300, 1)))  # words go together
    sets = np.array([rng.choice(300, 6, replace=False) for _ in range(600)])
    sets[::2, 4:] = -1  # some latents have fewer reference images
    scores = naming._means(pool, sets)
    p = naming._permutation_p(scores.max(1), [(pool, sets)], rng)
    assert p.min() > 0 and p.max() <= 1
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for part in (p[::2], p[1::2]):
        assert abs((part < 0.05).mean() - 0.05) < 0.04


def test_faults_d15_the_null_has_crops_of_its_own_images():
    """FAULTS D15: crops drawn apart from the images made one in eight latents significant at 5%, and one in twenty at 1%."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(400, 12))
    crop = lambda of: torch.from_numpy(0.7 * images[of] + 0.7 * rng.normal(size=(len(of), 12)))  # noqa: E731
    sets = np.array([rng.choice(400, 10, replace=False) for _ in range(600)])
    cut, pool, own, chance = np.arange(1800).reshape(600, 3), torch.from_numpy(images), crop(sets[:, :3].ravel()), crop(np.arange(400))
    chance, mean, std = naming._standardized(chance)
    scores = (naming._means(pool, sets) + naming._means((own - mean) / std, cut)) / 2
    p = naming._permutation_p(scores.max(1), [(pool, sets), (chance, cut)], rng)
    assert 0.02 < (p < 0.05).mean() < 0.08 and (p < 0.01).mean() < 0.025


def test_the_planted_word_is_found_and_noise_stays_unnamed(summary, tiny_dataset):
    latent = int((~summary.dead & ~summary.faint).nonzero()[0])
    words, images = planted(summary, tiny_dataset, latent, 3)
    bare = replace(summary, top_patches=None)
    living = (~summary.dead & ~summary.faint).nonzero().flatten().tolist()
    scores = score_words(Blind, tiny_dataset, bare, words, living, images)
    row = scores.set_index("latent").loc[latent]
    assert row["name"] == "w3" and row["p"] < 0.01 and row["margin"] > 0
    names = label_latents(summary, text=scores, max_p=0.2).set_index("latent")
    assert names.loc[latent, ["name", "kind"]].tolist() == ["w3", "word"]
    dead = summary.dead.nonzero().flatten().tolist()
    assert (names.loc[dead, "kind"] == "dead").all() and len(names) == summary.n_latents
    assert not names.isna().any().any() and (names["q"] >= names["p"] - 1e-12).all()
    np.testing.assert_allclose(names.loc[living, "q"], stats.false_discovery_control(scores["p"]))
    noise = score_words(Blind, tiny_dataset, bare, words, living, images.flip(0)[torch.randperm(24)])
    assert (label_latents(summary, text=noise, max_p=0.01)["name"] == UNNAMED).mean() > 0.9


def test_scores_are_means_of_standardised_cosines(summary, tiny_dataset, monkeypatch):
    monkeypatch.setattr(naming, "N_IMAGES", 4)
    words, images = planted(summary, tiny_dataset, 0, 1)
    scores = score_words(Blind, tiny_dataset, replace(summary, top_patches=None), words, [0, 5], images)
    cosine = images.double().numpy() @ words.embeddings.double().numpy().T
    z = (cosine - cosine.mean(0)) / cosine.std(0)
    for row, latent in zip(scores.itertuples(), (0, 5), strict=True):
        top = [i for i in summary.top_images[latent, :4].tolist() if i >= 0]
        expected = np.sort(z[top].mean(0))[::-1] if top else np.zeros(6)
        assert row.score == pytest.approx(expected[0], abs=1e-4) and row.margin == pytest.approx(expected[0] - expected[1], abs=1e-4)


def test_crops_count_half(tiny_clip, summary, tiny_dataset, tiny_inputs, monkeypatch):
    for name, value in (("N_IMAGES", 3), ("N_CROPS", 2), ("N_RANDOM_CROPS", 20), ("N_PERMUTATIONS", 50)):
        monkeypatch.setattr(naming, name, value)
    words = make_vocabulary(tiny_clip, tiny_dataset)
    words = Vocabulary(words.words[:2], words.kinds[:2], words.embeddings[:2], words.class_index[:2])
    living = (~summary.dead & ~summary.faint).nonzero().flatten()[:4].tolist()
    images = F.normalize(tiny_clip.encode_image(tiny_inputs), dim=1)
    both = score_words(tiny_clip, tiny_dataset, summary, words, living, images)
    rng = np.random.default_rng(0)
    places = np.stack([rng.integers(24, size=20), rng.integers(196, size=20)], 1)
    null = (naming.embed_crops(tiny_clip, tiny_dataset, places) @ words.embeddings.T).double()
    top = np.stack([summary.top_patch_images[living[1], :2].numpy(), summary.top_patches[living[1], :2].numpy()], 1)
    seen = (naming.embed_crops(tiny_clip, tiny_dataset, top[top[:, 0] >= 0]) @ words.embeddings.T).double()
    crops = ((seen - null.mean(0)) / null.std(0, correction=0)).mean(0).numpy()
    cosine = (images @ words.embeddings.T).double().numpy()
    shown = [i for i in summary.top_images[living[1], :3].tolist() if i >= 0]
    whole = ((cosine - cosine.mean(0)) / cosine.std(0))[shown].mean(0)
    assert both["score"][1] == pytest.approx(((crops + whole) / 2).max(), abs=1e-2)
    assert both["p"].between(1 / 51, 1).all()


def test_a_crop_is_a_part_of_what_clip_saw_enlarged(tiny_clip, tiny_dataset, monkeypatch):
    monkeypatch.setattr(naming, "CROP_MARGIN", 1)
    places = np.array([[3, 0], [3, 7 * 14 + 7]])
    found = naming.embed_crops(tiny_clip, tiny_dataset, places)
    picture = np.asarray(tiny_dataset[3].image)
    for row, (top, left) in zip(found, ((0, 0), (48, 48)), strict=True):
        inputs = tiny_clip.preprocess(Image.fromarray(picture[top : top + 24, left : left + 24]))[None]
        with torch.no_grad():
            torch.testing.assert_close(row, F.normalize(tiny_clip.encode_image(inputs), dim=-1)[0], rtol=1e-3, atol=1e-4)


def test_the_vocabulary_of_the_embedded_world_and_of_others(tiny_clip, tiny_dataset):
    words = make_vocabulary(tiny_clip, tiny_dataset)
    assert {"object", "category", "color", "background"} == set(words.kinds)
    assert words.class_index[: len(tiny_dataset.class_names)] == tuple(range(len(tiny_dataset.class_names)))
    assert len(words.words) == len(words.kinds) == len(words.embeddings) == len(words.class_index)
    torch.testing.assert_close(words.embeddings.norm(dim=1), torch.ones(len(words.words)))
    other = type("Photos", (), {"spec": "my/photos", "class_names": ["crane", "dog", "crane"]})()
    mine = make_vocabulary(tiny_clip, other)
    assert mine.words[:3] == ("crane (0)", "dog", "crane (2)") and "texture" in mine.kinds
    torch.testing.assert_close(mine.embeddings[0], mine.embeddings[2])  # the index is not spoken


def table(names):
    return pd.DataFrame({"latent": range(len(names)), "name": names})


def test_agreement_counts_latents_that_both_name():
    a, b = table(["dog", "cat", UNNAMED, "red", "crane (3)"]), table(["dog", "red", "cat", UNNAMED, "crane"])
    row = name_agreement({"labels": a, "text": b}).iloc[0]
    assert row[["a", "b", "n_a", "n_b", "n_both"]].tolist() == ["labels", "text", 4, 4, 3]
    assert row["agreement"] == pytest.approx(2 / 3)
    assert row["chance"] == pytest.approx(2 / 9, abs=0.03)  # two names in common, each at its place once in three
    assert row["low"] < 2 / 3 < row["high"]


def test_related_names_are_no_contradiction():
    a, b = table(["dog", "hammer", "dog"]), table(["animal", "tool", "tool"])
    rows = name_agreement({"a": a, "b": b}, {"dog": ["animal"], "hammer": ["tool"]})
    assert rows["agreement"][0] == 0 and rows["related"][0] == pytest.approx(2 / 3)
    known = openmoji.class_table().set_index("name")["category"].to_dict()
    assert {name: related[0] for name, related in naming.related_names().items()} == known


def test_chance_level_holds_for_names_that_know_nothing_of_each_other():
    rng = np.random.default_rng(3)
    p = []
    for _ in range(120):
        a, b = (table(rng.choice(["u", "v", "w"], 40, p=[0.6, 0.3, 0.1])) for _ in range(2))
        row = name_agreement({"a": a, "b": b}).iloc[0]
        p.append(row["p"])
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 0.06 and 0.4 < np.mean(p) < 0.68
