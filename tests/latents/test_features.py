"""The sparse feature store: what is written is what was encoded, however it is asked for, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from patchsae_utils.data import ImageData
from patchsae_utils.latents import feature_store as module
from patchsae_utils.latents.features import FeatureStore, FeatureWriter, write_features
from patchsae_utils.latents.reading import latent_masks, summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = 1


@pytest.fixture(scope="module")
def sae(tiny_clip):
    """32 -> 24 with sparse latents; latents 3 and 7 can never be active."""
    sae = SparseAutoencoder(tiny_clip.width, 24, seed=1).requires_grad_(False)
    sae.b_enc.fill_(-1.0)
    sae.b_enc[[3, 7]] = -1e6
    return sae


@pytest.fixture(scope="module")
def data():
    """Ten pictures; two classes of equal name, one with a single image, one with none."""
    pixels = np.random.default_rng(0).integers(0, 255, (10, 112, 112, 3), dtype=np.uint8)
    labels = [0, 1, 2, 0, 1, 0, 1, 0, 1, 0]
    return ImageData("noise", "test", ["missile", "crane", "crane", "empty"], labels, lambda i: Image.fromarray(pixels[i]))


@pytest.fixture(scope="module")
def h(tiny_clip, sae, data):
    """[10, 197, 24], all at once; the same batch as the writer's, so that rounding is the same."""
    inputs = torch.stack([tiny_clip.preprocess(data[i].image) for i in range(10)])
    with torch.no_grad():
        return sae.encode(tiny_clip.residual(inputs, LAYER))


@pytest.fixture(scope="module")
def store(tiny_clip, sae, data, tmp_path_factory):
    return write(tiny_clip, sae, data, tmp_path_factory.mktemp("features") / "f", dtype="float32")


def write(clip, sae, data, out, **options):
    return write_features(clip, sae, data, LAYER, out, **{"shard_images": 4, "progress": False, **options})


# -- round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, part", [("all", slice(None)), ("patches", slice(1, None)), ("cls", slice(0, 1))])
def test_float32_without_threshold_is_the_dense_encoding(tiny_clip, sae, data, h, tmp_path, tokens, part):
    store = write(tiny_clip, sae, data, tmp_path / "f", dtype="float32", tokens=tokens)
    torch.testing.assert_close(store.dense(range(10)), h[:, part], rtol=0, atol=0)
    assert store.n_entries == int((h[:, part] > 0).sum()) and store.tokens == tokens
    assert len(list((tmp_path / "f").glob("shard-*"))) == 3  # 4 + 4 + 2 images


def test_float16_rounds_and_loses_nothing_else(tiny_clip, sae, data, h, tmp_path):
    found = write(tiny_clip, sae, data, tmp_path / "f").dense(range(10))
    torch.testing.assert_close(found, h.half().float(), rtol=0, atol=0)
    normal = h > 6.2e-5
    assert ((found - h).abs()[normal] <= h[normal] * 2**-11).all() and (found - h).abs()[~normal].max() <= 3.1e-8


def test_a_threshold_drops_what_is_below(tiny_clip, sae, data, h, tmp_path):
    store = write(tiny_clip, sae, data, tmp_path / "f", dtype="float32", tau=0.5)
    torch.testing.assert_close(store.dense(range(10)), torch.where(h > 0.5, h, 0), rtol=0, atol=0)
    with pytest.raises(ValueError, match="above 0.5; it can't count those above 0.2"):
        store.class_counts(0.2)


def test_prompt_tokens_of_adapted_models_are_not_written(tiny_clip, sae, data, store, tmp_path):
    class Prompted:
        def __getattr__(self, name):
            return getattr(tiny_clip, name)

        def residual(self, images, layer):
            tokens = tiny_clip.residual(images, layer)
            return torch.cat([tokens, 100 * torch.ones(len(tokens), 2, tokens.shape[2])], 1)

    found = write(Prompted(), sae, data, tmp_path / "f", dtype="float32")
    assert found.n_tokens == 197 and torch.equal(found.dense(range(10)), store.dense(range(10)))


def test_the_statistics_pass_writes_the_same_store(tiny_clip, sae, data, store, tmp_path):
    summary = summarize_latents(tiny_clip, sae, data, LAYER, features=tmp_path / "f", progress=False)
    same = FeatureStore.open(tmp_path / "f")
    torch.testing.assert_close(same.dense(range(10)), store.dense(range(10)).half().float(), rtol=0, atol=0)
    # The other way round: the statistics are on disk already, the store is not.
    first = summarize_latents(tiny_clip, sae, data, LAYER, out=tmp_path / "s", progress=False)
    summarize_latents(tiny_clip, sae, data, LAYER, out=tmp_path / "s", features=tmp_path / "g", progress=False)
    assert torch.equal(FeatureStore.open(tmp_path / "g").dense([3]), same.dense([3])) and torch.equal(first.top_images, summary.top_images)


# -- queries ----------------------------------------------------------------------------------------------------------------


def test_queries_by_latent_image_and_patch_agree_with_the_dense_tensor(store, h):
    for latent in range(24):
        found = store.latent(latent)
        images, tokens = h[:, :, latent].nonzero(as_tuple=True)
        assert found.images.tolist() == images.tolist() and found.tokens.tolist() == tokens.tolist()
        np.testing.assert_array_equal(found.values, h[images, tokens, latent].numpy())
    assert len(store.latent(3).values) == 0  # dead
    for image in (0, 3, 4, 9):
        found = store.image(image)
        tokens, latents = h[image].nonzero(as_tuple=True)
        assert found.tokens.tolist() == tokens.tolist() and found.latents.tolist() == latents.tolist()
        np.testing.assert_array_equal(found.values, h[image, tokens, latents].numpy())
    latents, values = store.patch(5, 2, 3)
    row = h[5, 1 + 2 * 14 + 3]
    assert (np.diff(values) <= 0).all() and sorted(latents.tolist()) == row.nonzero().flatten().tolist()
    np.testing.assert_array_equal(values, row[latents].numpy())


def test_places_of_a_patch_store_count_from_cls(tiny_clip, sae, data, h, tmp_path):
    store = write(tiny_clip, sae, data, tmp_path / "f", dtype="float32", tokens="patches")
    images, patches = h[:, 1:, 5].nonzero(as_tuple=True)
    assert store.latent(5).tokens.tolist() == (patches + 1).tolist() and store.latent(5).images.tolist() == images.tolist()
    assert store.image(1).tokens.min() >= 1
    latents, values = store.patch(1, 0, 0)
    np.testing.assert_array_equal(values, h[1, 1, latents].numpy())


def test_class_counts_are_those_of_the_statistics_at_any_tau(tiny_clip, sae, data, store):
    for tau in (0.0, 0.2, 0.9):
        summary = summarize_latents(tiny_clip, sae, data, LAYER, tau=tau, progress=False)
        assert torch.equal(store.class_counts(tau), summary.class_counts)
        for label in range(4):  # two of them are called "crane", one has one image, one none
            np.testing.assert_array_equal(store.of_class(label, tau), summary.class_counts[label].double())
    assert store.class_counts(0.2)[3].sum() == 0 and store.class_counts(0.2)[2].sum() > 0


def test_masks_are_latent_masks(tiny_clip, sae, data, store):
    inputs = torch.stack([tiny_clip.preprocess(data[i].image) for i in (7, 2)])
    expected = latent_masks(tiny_clip, sae, inputs, [0, 9, 0], LAYER)
    torch.testing.assert_close(store.masks([7, 2], [0, 9, 0]), expected, rtol=1e-4, atol=1e-5)


def test_asking_for_what_is_not_there(tiny_clip, sae, data, store, tmp_path):
    with pytest.raises(ValueError, match="no latent 24; the store holds latents 0 to 23"):
        store.latent(24)
    with pytest.raises(ValueError, match="no image -1"):
        store.image(-1)
    with pytest.raises(ValueError, match="classes 0 to 3"):
        store.of_class(4)
    with pytest.raises(ValueError, match="grid of 14 x 14"):
        store.patch(0, 14, 0)
    cls = write(tiny_clip, sae, data, tmp_path / "f", tokens="cls")
    for ask in (lambda: cls.patch(0, 0, 0), lambda: cls.masks([0], [0])):
        with pytest.raises(ValueError, match="CLS alone"):
            ask()


def test_no_shard_is_read_before_it_is_asked_for(store, monkeypatch):
    read = []
    monkeypatch.setattr(module, "_map", lambda path, real=module._map: read.append(path.name) or real(path))
    fresh = FeatureStore.open(store.folder)
    assert read == [] and fresh.n_entries > 0
    fresh.image(5)
    assert read == ["shard-00001.safetensors"]
    fresh.latent(1), fresh.image(5)
    assert sorted(read) == [f"shard-0000{i}.safetensors" for i in range(3)]


def test_the_description_says_what_it_holds(store):
    text = " ".join(store.describe())
    assert "10 images" in text and f"{store.n_entries:,}" in text and "float32" in text
    assert "24 latents" in repr(store)


def test_other_programs_can_read_the_bytes(store, h):
    """As the module's description says: a length, a JSON header, raw values."""
    raw = (store.folder / "shard-00001.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    arrays = {}
    for name, kind in {"latent_offsets": "<i8", "latent_tokens": "<i4", "latent_values": "<f4", "offsets": "<i8", "latents": "<i4"}.items():
        low, high = header[name]["data_offsets"]
        arrays[name] = np.frombuffer(body[low:high], kind)
    low, high = arrays["latent_offsets"][9:11]
    image, token = divmod(arrays["latent_tokens"][low:high], 197)
    np.testing.assert_array_equal(arrays["latent_values"][low:high], h[4 + image, token, 9].numpy())
    begin, end = arrays["offsets"][197 * 3 : 197 * 3 + 2]  # CLS of the shard's last image
    assert arrays["latents"][begin:end].tolist() == h[7, 0].nonzero().flatten().tolist()


# -- writing ----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_interrupted_writing_goes_on_and_ends_alike(tiny_clip, sae, data, h, tmp_path, monkeypatch):
    real, added = FeatureWriter.add, []

    def stopping(self, h, indices):
        if added and indices[0] >= 5:
            raise Stop
        added.extend(indices.tolist())
        real(self, h, indices)

    monkeypatch.setattr(FeatureWriter, "add", stopping)
    with pytest.raises(Stop):
        write(tiny_clip, sae, data, tmp_path / "f", dtype="float32", batch_size=5)
    with pytest.raises(ValueError, match="unfinished"):
        FeatureStore.open(tmp_path / "f")
    seen = []
    monkeypatch.setattr(FeatureWriter, "add", lambda self, h, indices: seen.extend(indices.tolist()) or real(self, h, indices))
    store = write(tiny_clip, sae, data, tmp_path / "f", dtype="float32")
    assert seen == [4, 5, 6, 7, 8, 9]  # shard 0 was whole
    torch.testing.assert_close(store.dense(range(10)), h, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "f").glob(".*"))
    seen.clear()
    write(tiny_clip, sae, data, tmp_path / "f", dtype="float32")
    assert seen == []  # complete: nothing is read again
    write(tiny_clip, sae, data, tmp_path / "f", dtype="float32", tau=0.1)
    assert seen == [*range(10)]  # other inputs: another store


def test_damage_is_named_and_repaired(tiny_clip, sae, data, tmp_path):
    whole = write(tiny_clip, sae, data, tmp_path / "f")
    expected, path = whole.dense(range(10)), tmp_path / "f" / "shard-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    damaged = FeatureStore.open(tmp_path / "f")
    damaged.image(0)  # another shard
    for ask in (lambda: damaged.image(5), lambda: damaged.latent(0), damaged.verify):
        with pytest.raises(ValueError, match="shard-00001.safetensors is damaged.*write_features"):
            ask()
    assert torch.equal(write(tiny_clip, sae, data, tmp_path / "f").dense(range(10)), expected)
    path.write_bytes(good[:-5])
    with pytest.raises(ValueError, match="is damaged: it has"):
        FeatureStore.open(tmp_path / "f")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks .*shard-00001"):
        FeatureStore.open(tmp_path / "f")
    assert torch.equal(write(tiny_clip, sae, data, tmp_path / "f").dense(range(10)), expected)
    FeatureStore.open(tmp_path / "f").verify()


def test_opening_says_what_is_wrong(tiny_clip, sae, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="write_features"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "patchsae_utils activations", "format_version": 1}')
    with pytest.raises(ValueError, match="'patchsae_utils activations'"):
        FeatureStore.open(tmp_path)
    with pytest.raises(ValueError, match="holds 'patchsae_utils activations', no feature store. Give write_features a folder of its own"):
        write(tiny_clip, sae, data, tmp_path)


def test_bad_arguments_are_named(tiny_clip, sae, data, tmp_path):
    for options, message in (
        ({"tokens": "image"}, "Valid: all, patches, cls"),
        ({"dtype": "int8"}, "Valid: float16, float32"),
        ({"tau": -1}, "tau >= 0"),
        ({"shard_images": 0}, "shard_images >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tiny_clip, sae, data, tmp_path / "f", **options)
    with pytest.raises(ValueError, match="dimensional"):
        write(tiny_clip, SparseAutoencoder(8, 16), data, tmp_path / "f")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        write(tiny_clip, sae, data, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_what_float16_cannot_hold_is_refused(tiny_clip, data, tmp_path):
    loud = SparseAutoencoder(tiny_clip.width, 4).requires_grad_(False)
    loud.b_enc.fill_(1e5)
    with pytest.raises(ValueError, match="too large for float16.*float32"):
        write(tiny_clip, loud, data, tmp_path / "f")
    assert write(tiny_clip, loud, data, tmp_path / "g", dtype="float32").latent(0).values.max() > 9e4


def test_a_writer_that_missed_images_does_not_finish(tiny_clip, sae, data, tmp_path):
    writer = FeatureWriter.of(tiny_clip, sae, data, LAYER, tmp_path / "f")
    with pytest.raises(ValueError, match="10 of 10 images were not added"):
        writer.finish()
