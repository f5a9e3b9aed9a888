"""Latents in other domains, layers, kinds of tokens and written words: against slow references, and on latents made for the purpose."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import inputs

from patchsae_utils.data import ImageData, load_dataset
from patchsae_utils.latents import domains as module
from patchsae_utils.latents.domains import cross_domain_references, text_and_image_latents, word_scene, word_scenes

LAYER = 1


@pytest.fixture(scope="module")
def worlds():
    """Ten scenes of five classes in two domains: the same scenes, for both are drawn with the same seed."""
    return {name: load_dataset(f"openmoji/tools{tail}", "test", n_images=10) for name, tail in (("color", ""), ("gray", ":gray"))}


def encode(clip, sae, data):
    with torch.no_grad():
        return sae.encode(clip.residual(inputs(clip, data), LAYER))


def test_references_in_every_domain_equal_the_slow_reference(tiny_clip, sae, worlds, monkeypatch):
    monkeypatch.setattr(module, "N_REFERENCES", 4)
    found = cross_domain_references(tiny_clip, sae, worlds, [0, 3, 5], LAYER, pictured=[0, 3, 5])
    table = found.table.set_index(["latent", "domain"])
    assert not found.table.isna().any().any() and list(found.references) == [0, 3, 5]
    first = {}
    for name, data in worlds.items():
        h = encode(tiny_clip, sae, data).double()
        labels = data.labels.numpy()
        for latent in (0, 3, 5):
            mean = h[:, :, latent].mean(1).numpy()
            order = [int(i) for i in np.argsort(-mean.astype(np.float32), kind="stable") if mean[i] > 0][:4]
            reference, row = found.references[latent][name], table.loc[(latent, name)]
            np.testing.assert_allclose(reference.values, mean[order], rtol=1e-4)
            assert sorted(reference.indices.tolist()) == sorted(order)
            assert reference.images.shape == (len(order), 112, 112, 3)
            np.testing.assert_allclose(reference.masks.mean((1, 2)), h[reference.indices, 1:, latent].mean(1), rtol=1e-3, atol=1e-5)
            assert row["frequency"] == pytest.approx((mean > 0).mean())
            first.setdefault(latent, {int(labels[i]) for i in order})
            own = [labels[i] in first[latent] for i in reference.indices.tolist()]
            assert row["same_class"] == pytest.approx(np.mean(own) if own else 0)
            assert row["chance"] == pytest.approx(np.mean([i in first[latent] for i in labels]))


def test_other_data_sets_have_references_but_no_shared_classes(tiny_clip, sae, worlds):
    other = ImageData("noise", "test", ["x"], [0, 0], lambda i: Image.new("RGB", (112, 112), (90 * i,) * 3))
    found = cross_domain_references(tiny_clip, sae, {"color": worlds["color"], "x": other}, [0, 5], LAYER, pictured=[0])
    assert "same_class" not in found.table and list(found.references) == [0]
    assert set(found.references[0]) == {"color", "x"} and set(found.table["latent"]) == {0, 5}
    with pytest.raises(ValueError, match=r"range\(24\)"):
        cross_domain_references(tiny_clip, sae, worlds, [24], LAYER)


def test_word_scenes_show_dark_ink_on_plain_paper_within_the_picture():
    for word in ("ox", "screwdriver", "magnifying glass tilted left"):
        for seed in range(3):
            pixels = np.asarray(word_scene(word, (112, 112), seed)).astype(int)
            assert (pixels[..., 0] == pixels[..., 2]).all() and pixels.max() >= 215 and pixels.min() < 60
            assert 0.01 < (pixels[..., 0] < 128).mean() < 0.5
            paper = pixels[0, 0, 0]
            assert (pixels[[0, -1]] == paper).all() and (pixels[:, [0, -1]] == paper).all()
    assert not np.array_equal(word_scene("ox", seed=0), word_scene("ox", seed=1))
    assert np.array_equal(word_scene("ox", seed=1), word_scene("ox", seed=1))
    assert not np.array_equal(word_scene("ox", seed=0), word_scene("ax", seed=0))
    data = word_scenes(["ox", "hen", "ox"], 2, size=(64, 48))
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data[3].image.size == (64, 48) and data.class_names == ["ox", "hen", "ox"]
    with pytest.raises(ValueError, match="doesn't fit into 20 x 20"):
        word_scene("screwdriver", (20, 20))


def scripted(monkeypatch, thing, word, n_images=2):
    """Replace the models by given activations [C, S] of objects and words."""

    def read(clip, sae, data, layer, progress=None):
        table = torch.tensor(np.asarray(word if data.spec == "words" else thing), dtype=torch.float32)
        for index, label in enumerate(data.labels.tolist()):
            h = torch.zeros(1, 197, table.shape[1])
            h[0, 1:] = table[label]
            h[0, 0] = 1e3  # CLS, which must not be read
            yield torch.tensor([label]), torch.tensor([index]), h

    monkeypatch.setattr(module, "read_latents", read)
    n = len(thing)
    return ImageData("things", "test", [f"c{c}" for c in range(n)], [c for c in range(n) for _ in range(n_images)], lambda i: None)


def words_of(objects):
    return word_scenes(objects.class_names)


class Fake:
    image_size = (112, 112)

    def __init__(self, n):
        self.W_enc = torch.zeros(1, n)

    def check_model(self, clip, layer):
        pass


def test_latents_of_things_and_names_are_told_from_others(monkeypatch):
    """Of 20 classes: latents 0 to 9 answer to a thing and its name, 10 to 19 to the thing and another's name, 20 to the thing alone,
    21 to no thing, 22 to all alike."""
    n = 20
    thing, word = np.zeros((n, 23)), np.zeros((n, 23))
    for s in range(20):
        thing[s, s] = 1 + s
        word[s if s < 10 else (s + 1) % n, s] = 0.5
    thing[4, 20] = 1
    word[2, 21] = 1
    thing[:, 22] = word[:, 22] = 1
    objects = scripted(monkeypatch, thing, word)
    found = text_and_image_latents(Fake(23), Fake(23), objects, words_of(objects), 0)
    table = found.table.set_index("latent")
    assert sorted(table.index) == [*range(21), 22] and not found.table.isna().any().any()
    assert (table.loc[range(10), "p"] == 1 / n).all() and (table.loc[range(10, 23 - 3), "p"] == 1).all()
    assert table.loc[[20, 22], "p"].tolist() == [1, 1] and table.loc[7, "label"] == 7
    assert found.share == pytest.approx(10 / 22) and found.p == pytest.approx(1 / 1001)
    assert found.shuffled.mean() == pytest.approx(20 / 22 / 20, abs=0.01)  # one latent in twenty, by luck


def test_p_is_the_share_of_words_that_reach_the_own_one(monkeypatch):
    monkeypatch.setattr(module, "ALPHA", 0.2)
    rng = np.random.default_rng(0)
    thing, word = rng.exponential(size=(9, 30)), rng.integers(0, 4, (9, 30)).astype(float)  # many ties among words
    objects = scripted(monkeypatch, thing, word)
    found = text_and_image_latents(Fake(30), Fake(30), objects, words_of(objects), 0)
    for row in found.table.itertuples():
        own = thing[:, row.latent].argmax()
        assert row.label == own and row.p == pytest.approx((word[:, row.latent] >= word[own, row.latent]).mean())
    assert found.p > 0.01 and 0 < found.shuffled.mean() <= 0.2  # ties count against a name


def test_classes_without_pictures_stay_out_and_equal_names_stay_two(monkeypatch):
    objects = scripted(monkeypatch, np.eye(4), np.eye(4))
    objects.class_names = ["crane", "crane", "ox", "hen"]
    objects.labels = torch.tensor([0, 1, 1, 3])
    found = text_and_image_latents(Fake(4), Fake(4), objects, words_of(objects), 0)
    assert sorted(found.table["label"]) == [0, 1, 3] and found.table["p"].tolist() == pytest.approx([1 / 3] * 3)
    objects.labels = torch.tensor([1, 1])
    with pytest.raises(ValueError, match="at least two classes"):
        text_and_image_latents(Fake(4), Fake(4), objects, words_of(objects), 0)
    with pytest.raises(ValueError, match="same order"):
        text_and_image_latents(Fake(4), Fake(4), objects, word_scenes(["ox", "hen"]), 0)
