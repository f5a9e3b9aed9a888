"""Statistics, reference images, masks and levels of latents, each against a slow float64 reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from patchsae_utils.data import ImageData
from patchsae_utils.latents import reading as module
from patchsae_utils.latents.measures import (
    contrasting_latents,
    label_entropy,
    label_std,
    mean_interval,
    merge_keys,
    pack_top,
    shuffled_label_entropy,
    unpack_top,
)
from patchsae_utils.latents.pictures import activation_levels, level_overlap, reference_images, seen_image, upsample_masks
from patchsae_utils.latents.reading import LatentSummary, latent_chunks, latent_masks, summarize_latents
from patchsae_utils.run.artifacts import read_checked_json, write_checked_json
from patchsae_utils.sae.dictionary import select_latents
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder

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
    """Twelve small pictures, two of them alike; two classes of equal name, one with a single image, one with none."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) // (1 + i % 3) for i in range(12)]
    pixels[5] = pixels[2]
    labels = [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    return ImageData("noise", "test", ["missile", "crane", "crane", "empty"], labels, lambda i: Image.fromarray(pixels[i]))


@pytest.fixture(scope="module")
def summary(tiny_clip, sae, data):
    return summarize_latents(tiny_clip, sae, data, LAYER, k=4, tau=0.2, batch_size=5, progress=False)


@pytest.fixture(scope="module")
def all_latents(tiny_clip, sae, data):
    """[12, 197, 24] in float64, all at once."""
    inputs = torch.stack([tiny_clip.preprocess(data[i].image) for i in range(len(data))])
    with torch.no_grad():
        return sae.encode(tiny_clip.residual(inputs, LAYER)).double()


# -- plain functions ------------------------------------------------------------------------------------------------------


def slow_entropy(values, labels):
    total = sum(values)
    if total == 0:
        return math.nan
    mass = {}
    for value, label in zip(values, labels, strict=True):
        if value > 0:
            mass[label] = mass.get(label, 0) + value / total
    return -sum(p * math.log(p) for p in mass.values())


def test_label_entropy_equals_the_slow_reference():
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.exponential(size=(30, 6)), axis=1)
    values[3] = 0  # dead
    values[4, 1:] = 0  # one reference image
    values[5] = 1  # ties
    labels = rng.integers(0, 5, (30, 6))
    labels[values == 0] = -1  # padding is no class
    found = label_entropy(torch.from_numpy(values), torch.from_numpy(labels), 5)
    expected = [slow_entropy(v, i) for v, i in zip(values, labels, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert math.isnan(found[3]) and found[4] == 0


def test_label_entropy_is_log_n_for_equal_shares_and_zero_for_one_class():
    values = torch.ones(2, 4)
    assert label_entropy(values, torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2]]), 4).tolist() == pytest.approx([math.log(4), 0])


def test_label_std_counts_each_reference_image_once_and_no_padding():
    values = torch.tensor([[3.0, 2.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 1.0, 0.0]])
    labels = torch.tensor([[1, 5, 9], [7, -1, -1], [-1, -1, -1], [10, 20, -1]])
    found = label_std(values, labels)
    assert found[:2].tolist() == pytest.approx([np.std([1, 5, 9]), 0])
    assert math.isnan(found[2]) and found[3] == pytest.approx(5)


@pytest.mark.parametrize(
    "values, labels, message",
    [
        (torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.long), "both be"),
        (-torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.long), "negative"),
        (torch.ones(1, 2), torch.tensor([[0, 4]]), r"range\(4\), got 0 to 4"),
    ],
)
def test_label_entropy_says_what_is_wrong(values, labels, message):
    with pytest.raises(ValueError, match=message):
        label_entropy(values, labels, 4)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_merging_keeps_the_first_of_equal_images_whatever_the_batch_size(batch):
    rng = np.random.default_rng(1)
    all_values = torch.from_numpy(rng.integers(0, 4, (20, 7)).astype(np.float32))  # many ties, many zeros
    all_values[:, 2] = 0
    kept = torch.zeros(7, 5, dtype=torch.long)
    for start in range(0, 20, batch):
        new = all_values[start : start + batch].T
        merge_keys(kept, pack_top(new, torch.arange(start, start + new.shape[1]).expand(7, -1)))
    values, images = unpack_top(kept)
    for latent in range(7):
        order = sorted((i for i in range(20) if all_values[i, latent] > 0), key=lambda i: (-all_values[i, latent].item(), i))[:5]
        assert images[latent].tolist() == order + [-1] * (5 - len(order))
        assert values[latent].tolist() == [all_values[i, latent].item() for i in order] + [0] * (5 - len(order))


def test_keys_order_any_floats_and_come_back_unchanged():
    values = torch.tensor([3e38, 1e-38, 1e-45, 0.0, -1.0, float("nan"), 2.5, 2.5])
    places = torch.tensor([0, 2**32 - 1, 7, 1, 2, 3, 9, 4])
    keys = pack_top(values, places)
    found, at = unpack_top(keys)
    assert found.tolist() == [*values[:3].tolist(), 0, 0, 0, 2.5, 2.5] and at.tolist() == [0, 2**32 - 1, 7, -1, -1, -1, 9, 4]
    assert keys.argsort(descending=True, stable=True)[:5].tolist() == [0, 7, 6, 1, 2]


def test_shuffled_labels_make_the_entropy_of_random_images():
    values, images = torch.ones(200, 10), torch.arange(10).repeat(200, 1) + 10 * (torch.arange(200)[:, None] % 20)
    values[0], images[0] = 0, -1
    labels = torch.arange(200) // 10  # each latent's ten images are one class
    assert label_entropy(values[1:], labels[images[1:]], 20).abs().max() < 1e-6
    shuffled = shuffled_label_entropy(values, images, labels, 20, seed=1)
    assert math.isnan(shuffled[0]) and shuffled[1:].min() > 1
    assert torch.equal(shuffled[1:], shuffled_label_entropy(values, images, labels, 20, seed=1)[1:])


def test_mean_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values)
    assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert str(mean_interval([1, 1])) == "1.00 [1.00, 1.00]"
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_contrasting_latents_differ(summary):
    chosen = contrasting_latents(summary.to_frame())
    assert list(chosen.values()) == ["one class", "related classes", "everywhere", "seldom, mixed"] and len(chosen) == 4
    frame = summary.to_frame().set_index("latent")
    full = frame[~frame["faint"]]
    full = full[full["n_reference"] == full["n_reference"].max()]
    assert frame.loc[next(iter(chosen)), "label_entropy"] == full["label_entropy"].min()


# -- summary --------------------------------------------------------------------------------------------------------------


def test_summary_equals_the_slow_reference(summary, all_latents, data):
    labels = data.labels.tolist()
    mean = all_latents.mean(1).numpy()
    count = (all_latents > 0.2).sum(1).numpy()
    for latent in range(24):
        active = [i for i in range(12) if mean[i, latent] > 0]
        assert summary.frequency[latent].item() == pytest.approx(len(active) / 12)
        assert summary.mean_activation[latent].item() == pytest.approx(np.mean(mean[active, latent]) if active else 0, rel=1e-5)
        top = sorted(active, key=lambda i: (-np.float32(mean[i, latent]), i))[:4]
        n = len(top)
        np.testing.assert_allclose(summary.top_values[latent, :n], mean[top, latent], rtol=1e-5)
        assert (summary.top_images[latent, n:] == -1).all() and (summary.top_values[latent, n:] == 0).all()
        assert summary.top_labels[latent].tolist() == [labels[i] for i in summary.top_images[latent, :n]] + [-1] * (4 - n)
        np.testing.assert_allclose(summary.label_entropy[latent], slow_entropy(mean[top, latent], [labels[i] for i in top]), atol=1e-5)
        np.testing.assert_allclose(summary.label_std[latent], np.std([labels[i] for i in top]) if top else math.nan, atol=1e-5)
        for c in range(4):
            members = [i for i in range(12) if labels[i] == c]
            assert summary.class_counts[c, latent] == count[members, latent].sum()
            assert summary.class_hits[c, latent] == sum(mean[i, latent] > 0 for i in members)
    assert summary.dataset_counts.tolist() == count.sum(0).tolist()
    assert summary.n_images == 12 and summary.class_images.tolist() == [6, 5, 1, 0]


def test_equal_images_keep_their_order(summary):
    for row in summary.top_images.tolist():
        if 2 in row and 5 in row:
            assert row.index(2) + 1 == row.index(5)
    assert any(2 in row and 5 in row for row in summary.top_images.tolist())


def test_dead_latents_are_marked_and_frames_hold_no_nan(summary):
    dead = summary.dead.nonzero().flatten().tolist()
    assert {3, 7} <= set(dead)
    assert (summary.mean_activation[dead] == 0).all() and (summary.top_images[dead] == -1).all()
    assert summary.label_entropy[dead].isnan().all() and not summary.label_entropy[~summary.dead].isnan().any()
    frame = summary.to_frame()
    assert not frame.isna().any().any() and not set(dead) & set(frame["latent"])
    every = summary.to_frame(dead=True)
    assert torch.equal(summary.faint, ~summary.dead & (summary.class_counts == 0).all(0))
    assert len(every) == 24 and every.loc[dead, "dead"].all() and (every.loc[dead, "top_class"] == -1).all()


def test_classes_of_equal_name_stay_two(summary, all_latents):
    assert summary.class_names.count("crane") == 2
    lonely = (all_latents[2] > 0.2).sum(0)
    assert summary.class_counts[2].tolist() == lonely.tolist() and summary.class_counts[1].sum() > lonely.sum()


@pytest.mark.parametrize("per_image", [1, 2, 50])
def test_top_patches_equal_the_slow_reference(tiny_clip, sae, data, all_latents, per_image):
    found = summarize_latents(tiny_clip, sae, data, LAYER, k=6, patches_per_image=per_image, batch_size=5, progress=False)
    patches = all_latents[:, 1:].float().numpy()
    for latent in range(24):
        candidates = []
        for image in range(12):  # the strongest patches of each image, then the strongest of those
            own = sorted((-patches[image, p, latent], image, p) for p in range(196) if patches[image, p, latent] > 0)
            candidates += own[:per_image]
        expected = sorted(candidates)[:6]
        n = len(expected)
        # Rounding may order two nearly equal patches otherwise, so values are compared, and each place must hold its value.
        np.testing.assert_allclose(found.top_patch_values[latent, :n], [-v for v, _, _ in expected], rtol=1e-4)
        assert (found.top_patch_images[latent, n:] == -1).all() and (found.top_patches[latent, n:] == -1).all()
        assert (found.top_patch_values[latent, n:] == 0).all()
        images, places = found.top_patch_images[latent, :n].numpy(), found.top_patches[latent, :n].numpy()
        np.testing.assert_allclose(patches[images, places, latent], found.top_patch_values[latent, :n], rtol=1e-4)
        assert len({*zip(images.tolist(), places.tolist(), strict=True)}) == n
        assert n == 0 or np.bincount(images).max() <= per_image


def test_equal_patches_keep_their_order(tiny_clip, data):
    """A latent that is equally active everywhere: reference patches are the first ones, by image, then row by row."""
    flat = SparseAutoencoder(tiny_clip.width, 2).requires_grad_(False)
    flat.W_enc.zero_()
    flat.b_enc.copy_(torch.tensor([1.5, -1.0]))
    one = summarize_latents(tiny_clip, flat, data, LAYER, k=3, batch_size=7, progress=False)
    assert one.top_patch_images[0].tolist() == [0, 1, 2] and one.top_patches[0].tolist() == [0, 0, 0]
    assert one.top_images[0].tolist() == [0, 1, 2] and one.top_values[0].tolist() == [1.5] * 3
    many = summarize_latents(tiny_clip, flat, data, LAYER, k=3, patches_per_image=3, progress=False)
    assert many.top_patch_images[0].tolist() == [0, 0, 0] and many.top_patches[0].tolist() == [0, 1, 2]
    assert one.dead.tolist() == [False, True] and one.top_patches[1].tolist() == [-1] * 3 and one.top_patch_values[1].tolist() == [0] * 3


def test_no_value_is_ever_nan(summary):
    for name in ("frequency", "mean_activation", "top_values", "top_patch_values", "class_counts", "class_hits"):
        assert not getattr(summary, name).isnan().any()
    assert summary.frequency.max() <= 1  # images over images: tokens would give up to 197


def test_several_kinds_of_tokens_take_one_pass(tiny_clip, sae, data, tmp_path, monkeypatch):
    alone = {kind: summarize_latents(tiny_clip, sae, data, LAYER, tokens=kind, progress=False) for kind in ("all", "patches", "cls")}
    passes = []
    real = module.read_latents
    monkeypatch.setattr(module, "read_latents", lambda *args: passes.append(1) or real(*args))
    together = summarize_latents(tiny_clip, sae, data, LAYER, tokens=["all", "patches", "cls"], out=tmp_path / "s", progress=False)
    assert len(passes) == 1 and list(together) == ["all", "patches", "cls"]
    for kind, found in together.items():
        for field in dataclasses.fields(LatentSummary):
            mine, other = getattr(found, field.name), getattr(alone[kind], field.name)
            if isinstance(mine, torch.Tensor):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
            else:
                assert mine == other
    assert together["cls"].top_patches is None and together["patches"].top_patches is not None
    both = together["patches"].class_counts + together["cls"].class_counts
    assert torch.equal(together["all"].class_counts, both)
    again = summarize_latents(tiny_clip, sae, data, LAYER, tokens=["cls", "all"], out=tmp_path / "s", progress=False)
    assert len(passes) == 1 and torch.equal(again["cls"].top_images, together["cls"].top_images)


def test_images_may_be_read_in_any_batches(tiny_clip, sae, data, summary):
    other = summarize_latents(tiny_clip, sae, data, LAYER, k=4, batch_size=1, progress=False)
    assert torch.equal(other.top_images, summary.top_images) and torch.equal(other.class_counts, summary.class_counts)


def test_an_empty_data_set_is_refused(tiny_clip, sae):
    empty = ImageData("noise", "test", ["a"], torch.zeros(0, dtype=torch.long), lambda i: Image.new("RGB", (112, 112)))
    with pytest.raises(ValueError, match="empty"):
        summarize_latents(tiny_clip, sae, empty, LAYER, progress=False)


@pytest.mark.parametrize("tokens, part", [("patches", slice(1, None)), ("cls", slice(0, 1))])
def test_statistics_of_patches_or_cls_alone(tiny_clip, sae, data, all_latents, tokens, part):
    found = summarize_latents(tiny_clip, sae, data, LAYER, tokens=tokens, progress=False)
    np.testing.assert_allclose(found.dataset_counts, (all_latents[:, part] > 0.2).sum((0, 1)))
    np.testing.assert_allclose(found.frequency, (all_latents[:, part].mean(1) > 0).float().mean(0), rtol=1e-6)


def test_prompt_tokens_of_adapted_models_do_not_count(tiny_clip, sae, data, summary):
    class Prompted:
        def __getattr__(self, name):
            return getattr(tiny_clip, name)

        def residual(self, images, layer):
            tokens = tiny_clip.residual(images, layer)
            return torch.cat([tokens, 100 * torch.ones(len(tokens), 2, tokens.shape[2])], 1)

    found = summarize_latents(Prompted(), sae, data, LAYER, k=4, batch_size=12, progress=False)
    assert torch.equal(found.class_counts, summary.class_counts)
    torch.testing.assert_close(found.mean_activation, summary.mean_activation)
    assert torch.equal(found.top_patches, summary.top_patches) and found.top_patch_values.max() == summary.top_patch_values.max()
    masks = latent_masks(Prompted(), sae, tiny_clip.preprocess(data[0].image)[None], [0], LAYER)
    assert masks.shape == (1, 1, 14, 14)


def test_no_block_is_larger_than_one_chunk(tiny_clip, data):
    class Watched(SparseAutoencoder):
        largest = 0

        def encode(self, x):
            self.largest = max(self.largest, x.shape[:-1].numel())
            return super().encode(x)

    watched = Watched(tiny_clip.width, 24)
    residual = torch.randn(6, 197, tiny_clip.width)
    blocks = list(latent_chunks(watched, residual, chunk_bytes=2 * 197 * 24 * 4 + 5))
    assert watched.largest == 2 * 197 and [rows.stop - rows.start for rows, _ in blocks] == [2, 2, 2]
    torch.testing.assert_close(torch.cat([h for _, h in blocks]), watched.encode(residual))
    assert len(list(latent_chunks(watched, residual, chunk_bytes=1))) == 6  # one image is the smallest chunk


def test_a_whole_pass_never_encodes_more_than_a_chunk(tiny_clip, data, tmp_path, monkeypatch):
    largest = []

    class Watched(SparseAutoencoder):
        def encode(self, x):
            largest.append(x.shape[:-1].numel())
            return super().encode(x)

    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 197 * 24 * 4)
    watched = Watched(tiny_clip.width, 24)
    found = summarize_latents(tiny_clip, watched, data, LAYER, batch_size=12, features=tmp_path / "f", progress=False)
    assert largest == [3 * 197] * 4 and found.n_images == 12


def test_summary_survives_the_disk_and_is_not_made_twice(tiny_clip, sae, data, tmp_path, monkeypatch):
    first = summarize_latents(tiny_clip, sae, data, LAYER, k=4, out=tmp_path / "s", progress=False)
    monkeypatch.setattr(module, "batches", lambda *_, **__: pytest.fail("the images were read again"))
    again = summarize_latents(tiny_clip, sae, data, LAYER, k=4, out=tmp_path / "s", progress=False)
    for name in ("frequency", "top_images", "class_counts", "dead"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert again.class_names == first.class_names and again.tau == 0.2
    with pytest.raises(pytest.fail.Exception):  # other inputs, another summary
        summarize_latents(tiny_clip, sae, data, LAYER, k=4, tau=0.5, out=tmp_path / "s", progress=False)


def test_large_tables_are_written_sparse_and_come_back_whole(summary, tmp_path):
    from safetensors.torch import load_file

    counts = torch.zeros(4, 24)
    counts[1, 5], counts[3, 0] = 7, 2
    few = dataclasses.replace(summary, class_counts=counts)
    few.save(tmp_path / "s")
    names = set(load_file(tmp_path / "s" / "latents.safetensors"))
    assert "class_counts.places" in names and "class_counts" not in names
    assert torch.equal(LatentSummary.load(tmp_path / "s").class_counts, counts)
    dense = dataclasses.replace(summary, class_counts=counts + 1)
    dense.save(tmp_path / "d")
    assert "class_counts" in load_file(tmp_path / "d" / "latents.safetensors")
    assert torch.equal(LatentSummary.load(tmp_path / "d").class_counts, counts + 1)


def test_a_damaged_summary_is_named(summary, tmp_path):
    summary.save(tmp_path / "s")
    path = tmp_path / "s" / "latents.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="latents.safetensors is damaged"):
        LatentSummary.load(tmp_path / "s")


def test_loading_says_what_is_missing_or_old(summary, tmp_path):
    with pytest.raises(FileNotFoundError, match="summarize_latents"):
        LatentSummary.load(tmp_path)
    summary.save(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    write_checked_json(manifest, read_checked_json(manifest) | {"format_version": 0})
    with pytest.raises(ValueError, match="format version 0"):
        LatentSummary.load(tmp_path / "s")


def test_bad_arguments_are_named(tiny_clip, sae, data):
    with pytest.raises(ValueError, match="Valid: all, patches, cls"):
        summarize_latents(tiny_clip, sae, data, LAYER, tokens="image")
    with pytest.raises(ValueError, match="k must be"):
        summarize_latents(tiny_clip, sae, data, LAYER, k=0)
    with pytest.raises(ValueError, match="dimensional"):
        summarize_latents(tiny_clip, SparseAutoencoder(8, 16), data, LAYER)
    with pytest.raises(ValueError, match=r"range\(24\), got 0 to 24"):
        latent_masks(tiny_clip, sae, torch.zeros(1, 3, 112, 112), [0, 24], LAYER)
    wrong = ImageData("noise", "test", ["one", "two"], [0, 1], lambda i: Image.new("RGB", (112, 112)))
    wrong.class_names = ["one"]
    with pytest.raises(ValueError, match=r"range\(1\)"):
        summarize_latents(tiny_clip, sae, wrong, LAYER, progress=False)


# -- masks and pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation, k", [("relu", None), ("topk", 5)])
def test_latent_masks_are_the_latents_on_the_grid(tiny_clip, data, activation, k):
    sae = SparseAutoencoder(tiny_clip.width, 24, activation, k=k, seed=2)
    images = torch.stack([tiny_clip.preprocess(data[i].image) for i in range(3)])
    masks = latent_masks(tiny_clip, sae, images, [9, 0, 9], LAYER)
    assert masks.shape == (3, 3, 14, 14) and not masks.requires_grad
    with torch.no_grad():
        h = sae.encode(tiny_clip.residual(images, LAYER))
    torch.testing.assert_close(masks[:, 1], h[:, 1:, 0].reshape(3, 14, 14))  # row by row, CLS left out
    torch.testing.assert_close(masks[:, 0], masks[:, 2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_select_latents_are_columns_of_the_encoding(activation, monkeypatch):
    sae = SparseAutoencoder(32, 24, activation, k=5 if "topk" in activation or activation == "matryoshka" else None, seed=2)
    sae.requires_grad_(False).b_enc.add_(0.1)
    x = torch.randn(7, 3, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 32 * 4)  # four tokens at a time
    torch.testing.assert_close(select_latents(sae, x, [4, 1]), sae.encode(x)[..., [4, 1]])
    assert select_latents(sae, x[:0], [4, 1]).shape == (0, 3, 2)


def test_upsampling_covers_the_image(tiny_clip):
    masks = torch.arange(4.0).reshape(1, 1, 2, 2)
    near = upsample_masks(masks, 4)
    assert near[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    smooth = upsample_masks(masks, (6, 8), "bilinear")
    assert smooth.shape == (1, 1, 6, 8) and smooth.min() == 0 and smooth.max() == 3
    with pytest.raises(ValueError, match="nearest, bilinear"):
        upsample_masks(masks, 4, "cubic")


def test_seen_image_is_the_crop_that_clip_saw(tiny_clip):
    """A wide picture whose sides are red: after resize and centre crop no red is left, so masks don't lie over it."""

    class Cropping:
        preprocess = transforms.Compose(
            [
                transforms.Resize(112),
                transforms.CenterCrop(112),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
            ]
        )

    picture = np.zeros((112, 336, 3), np.uint8)
    picture[:, :100, 0] = picture[:, -100:, 0] = 255
    picture[:, 112:224] = (10, 200, 30)
    seen = seen_image(Cropping(), Image.fromarray(picture))
    assert seen.shape == (112, 112, 3) and seen.dtype == torch.uint8
    assert (seen == torch.tensor([10, 200, 30])).all()
    with pytest.raises(ValueError, match="Normalize"):
        seen_image(type("Bare", (), {"preprocess": transforms.ToTensor()})(), Image.fromarray(picture))


def test_reference_images_hold_no_padding(tiny_clip, sae, data, summary):
    living = int((~summary.dead).nonzero()[0])
    strong, dead = reference_images(tiny_clip, sae, data, summary, [living, 3], LAYER, k=3)
    n = min(3, int((summary.top_images[living] >= 0).sum()))
    assert strong.images.shape == (n, 112, 112, 3) and strong.masks.shape == (n, 14, 14)
    assert torch.equal(strong.indices, summary.top_images[living, :n])
    assert (strong.images[0] == torch.from_numpy(np.array(data[int(strong.indices[0])].image))).all()
    assert dead.images.shape == (0, 112, 112, 3) and dead.masks.shape == (0, 14, 14) and len(dead.indices) == 0
    shorter = ImageData("noise", "test", ["a"], [0], lambda i: Image.new("RGB", (112, 112)))
    with pytest.raises(ValueError, match="12 images, this data set has 1"):
        reference_images(tiny_clip, sae, shorter, summary, [0], LAYER)


def test_levels_count_what_they_say(tiny_clip, sae, data, summary, all_latents):
    found = activation_levels(tiny_clip, sae, data, 4, LAYER, summary, patch=(2, 5), k=24)
    assert found.class_name == "crane" and found.patch == (2, 5)
    value = found.table.set_index(["level", "latent"])["value"]
    expected = {
        "patch": all_latents[4, 1 + 2 * 14 + 5],
        "image": (all_latents[4] > 0.2).sum(0),
        "class": summary.class_counts[1] / 5,
        "data set": summary.dataset_counts / 12,
    }
    for level, activation in expected.items():
        for latent in range(24):
            assert value.get((level, latent), 0.0) == pytest.approx(float(activation[latent]), rel=1e-4)
    for _, rows in found.table.groupby("level"):
        assert rows["value"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="outside the grid of 14 x 14"):
        activation_levels(tiny_clip, sae, data, 4, LAYER, summary, patch=(14, 0))
    rows, columns = activation_levels(tiny_clip, sae, data, 4, LAYER, summary).patch
    assert 0 <= rows < 14 and 0 <= columns < 14


def test_overlap_of_levels_counts_shared_latents(summary):
    found = level_overlap(summary, k=3).set_index("class_index")
    tops = {c: set(summary.class_counts[c].topk(3).indices.tolist()) for c in (0, 1, 2)}
    overall = set(summary.dataset_counts.topk(3).indices.tolist())
    assert found.index.tolist() == [0, 1, 2]  # the class without images is left out
    for c in (0, 1, 2):
        assert found.loc[c, "dataset"] == len(tops[c] & overall)
        assert found.loc[c, "other"] == pytest.approx(np.mean([len(tops[c] & tops[o]) for o in (0, 1, 2) if o != c]))
    assert found["chance"].iloc[0] == pytest.approx(9 / int((~summary.dead).sum()))


def test_figures_draw(tiny_clip, sae, data, summary):
    import matplotlib.pyplot as plt

    from patchsae_utils.plots import latents as plots

    living = summary.to_frame()["latent"].tolist()
    plots.latent_statistics(summary.to_frame(), {living[0]: "one", living[1]: "two"})
    plots.reference_images(reference_images(tiny_clip, sae, data, summary, [living[0], 3, living[1]], LAYER), ["a", "dead", "b"])
    plots.levels(activation_levels(tiny_clip, sae, data, 4, LAYER, summary))
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")
