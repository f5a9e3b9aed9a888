"""Statistics of latents, each against a slow float64 reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import Changed

from patchsae_utils.data import ImageData
from patchsae_utils.latents import passes
from patchsae_utils.latents.measures import contrasting_latents, label_entropy, merge_keys, pack_top, shuffled_label_entropy, unpack_top
from patchsae_utils.latents.passes import latent_chunks
from patchsae_utils.latents.reading import latent_masks, summarize_latents
from patchsae_utils.latents.summary import LatentSummary, RunningSummary
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = 1


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


def test_shuffled_labels_make_the_entropy_of_random_images():
    values, images = torch.ones(200, 10), torch.arange(10).repeat(200, 1) + 10 * (torch.arange(200)[:, None] % 20)
    values[0], images[0] = 0, -1
    labels = torch.arange(200) // 10  # each latent's ten images are one class
    assert label_entropy(values[1:], labels[images[1:]], 20).abs().max() < 1e-6
    shuffled = shuffled_label_entropy(values, images, labels, 20)
    assert math.isnan(shuffled[0]) and shuffled[1:].min() > 1
    assert torch.equal(shuffled[1:], shuffled_label_entropy(values, images, labels, 20)[1:])


def test_contrasting_latents_differ(summary):
    chosen = contrasting_latents(summary.to_frame())
    assert list(chosen.values()) == ["one class", "related classes", "everywhere", "seldom, mixed"] and len(chosen) == 4
    frame = summary.to_frame().set_index("latent")
    full = frame[~frame["faint"]]
    full = full[full["n_reference"] == full["n_reference"].max()]
    assert frame.loc[next(iter(chosen)), "label_entropy"] == full["label_entropy"].min()


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


def test_dead_latents_are_marked_and_frames_hold_no_nan(summary):
    """PAPER.md, trap 11."""
    dead = summary.dead.nonzero().flatten().tolist()
    assert {3, 7} <= set(dead)
    assert (summary.mean_activation[dead] == 0).all() and (summary.top_images[dead] == -1).all()
    assert summary.label_entropy[dead].isnan().all() and not summary.label_entropy[~summary.dead].isnan().any()
    frame = summary.to_frame()
    assert not frame.isna().any().any() and not set(dead) & set(frame["latent"])
    assert torch.equal(summary.faint, ~summary.dead & (summary.class_counts == 0).all(0))
    assert len(frame) == 24 - len(dead) and (summary.top_labels[dead] == -1).all()
    for name in ("frequency", "mean_activation", "top_values", "top_patch_values", "class_counts", "class_hits"):
        assert not getattr(summary, name).isnan().any()


def test_classes_of_equal_name_stay_two_and_frequencies_count_images(summary, all_latents):
    """PAPER.md, traps 8 and 13: of images over images none is above 1; tokens would give up to 197."""
    assert summary.frequency.max() <= 1
    assert summary.class_names.count("crane") == 2
    lonely = (all_latents[2] > 0.2).sum(0)
    assert summary.class_counts[2].tolist() == lonely.tolist() and summary.class_counts[1].sum() > lonely.sum()


def test_top_patches_equal_the_slow_reference(tiny_clip, sae, data, all_latents):
    found = summarize_latents(tiny_clip, sae, data, LAYER, k=6, batch_size=5, progress=False)
    patches = all_latents[:, 1:].float().numpy()
    for latent in range(24):
        candidates = []
        for image in range(12):  # the strongest patch of each image, then the strongest of those
            own = sorted((-patches[image, p, latent], image, p) for p in range(196) if patches[image, p, latent] > 0)
            candidates += own[:1]
        expected = sorted(candidates)[:6]
        n = len(expected)
        # Rounding may order two nearly equal patches otherwise, so values are compared, and each place must hold its value.
        np.testing.assert_allclose(found.top_patch_values[latent, :n], [-v for v, _, _ in expected], rtol=1e-4)
        assert (found.top_patch_images[latent, n:] == -1).all() and (found.top_patches[latent, n:] == -1).all()
        assert (found.top_patch_values[latent, n:] == 0).all()
        images, places = found.top_patch_images[latent, :n].numpy(), found.top_patches[latent, :n].numpy()
        np.testing.assert_allclose(patches[images, places, latent], found.top_patch_values[latent, :n], rtol=1e-4)
        assert len({*zip(images.tolist(), places.tolist(), strict=True)}) == n
        assert n == 0 or np.bincount(images).max() == 1


def test_dense_latents_make_no_key_for_every_patch(tiny_clip, sae, data, monkeypatch):
    """FAULTS D20: a key for each patch of each latent that beats its tenth one made dense latents many times slower."""
    from patchsae_utils.latents import summary as module

    sizes = []
    monkeypatch.setattr(module, "pack_top", lambda values, places: sizes.append(values.numel()) or pack_top(values, places))
    summarize_latents(tiny_clip, sae, data, LAYER, batch_size=12, progress=False)
    assert max(sizes) <= 12 * 24


def test_equal_patches_keep_their_order(tiny_clip, data):
    """A latent that is equally active everywhere: reference patches are the first ones, by image, then row by row."""
    flat = SparseAutoencoder(tiny_clip.width, 2).requires_grad_(False)
    flat.W_enc.zero_()
    flat.b_enc.copy_(torch.tensor([1.5, -1.0]))
    one = summarize_latents(tiny_clip, flat, data, LAYER, k=3, batch_size=7, progress=False)
    assert one.top_patch_images[0].tolist() == [0, 1, 2] and one.top_patches[0].tolist() == [0, 0, 0]
    assert one.top_images[0].tolist() == [0, 1, 2] and one.top_values[0].tolist() == [1.5] * 3
    assert one.dead.tolist() == [False, True] and one.top_patches[1].tolist() == [-1] * 3 and one.top_patch_values[1].tolist() == [0] * 3


@pytest.mark.parametrize("tokens, part", [("patches", slice(1, None)), ("cls", slice(0, 1))])
def test_statistics_of_patches_or_cls_alone(tiny_clip, sae, data, all_latents, tokens, part):
    """PAPER.md, trap 6: CLS is token 0 of every image, not image 0."""
    found = summarize_latents(tiny_clip, sae, data, LAYER, tokens=tokens, progress=False)
    np.testing.assert_allclose(found.dataset_counts, (all_latents[:, part] > 0.2).sum((0, 1)))
    np.testing.assert_allclose(found.frequency, (all_latents[:, part].mean(1) > 0).float().mean(0), rtol=1e-6)


def test_prompt_tokens_of_adapted_models_do_not_count(tiny_clip, sae, data, summary):
    """PAPER.md, trap 4."""

    def residual(images, layer):
        tokens = tiny_clip.residual(images, layer)
        return torch.cat([tokens, 100 * torch.ones(len(tokens), 2, tokens.shape[2])], 1)

    prompted = Changed(tiny_clip, residual=residual)
    found = summarize_latents(prompted, sae, data, LAYER, k=4, batch_size=12, progress=False)
    assert torch.equal(found.class_counts, summary.class_counts)
    torch.testing.assert_close(found.mean_activation, summary.mean_activation)
    assert torch.equal(found.top_patches, summary.top_patches) and found.top_patch_values.max() == summary.top_patch_values.max()
    masks = latent_masks(prompted, sae, tiny_clip.preprocess(data[0].image)[None], [0], LAYER)
    assert masks.shape == (1, 1, 14, 14)


def test_a_whole_pass_never_encodes_more_than_a_chunk(tiny_clip, data, monkeypatch):
    largest = []

    class Watched(SparseAutoencoder):
        def encode(self, x):
            largest.append(x.shape[:-1].numel())
            return super().encode(x)

    monkeypatch.setattr(passes, "CHUNK_BYTES", 3 * 197 * 24 * 4)
    watched = Watched(tiny_clip.width, 24)
    found = summarize_latents(tiny_clip, watched, data, LAYER, batch_size=12, progress=False)
    assert largest == [3 * 197] * 4 and found.n_images == 12
    assert len(list(latent_chunks(watched, torch.randn(6, 400, tiny_clip.width)))) == 6  # one image is the smallest chunk


def test_summary_survives_the_disk_and_is_not_made_twice(tiny_clip, sae, data, tmp_path, monkeypatch):
    first = summarize_latents(tiny_clip, sae, data, LAYER, k=4, out=tmp_path / "s", progress=False)
    monkeypatch.setattr(passes, "batches", lambda *_, **__: pytest.fail("the images were read again"))
    again = summarize_latents(tiny_clip, sae, data, LAYER, k=4, out=tmp_path / "s", progress=False)
    for name in ("frequency", "top_images", "class_counts", "dead"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert again.class_names == first.class_names and again.tau == 0.2
    with pytest.raises(pytest.fail.Exception):  # other inputs, another summary
        summarize_latents(tiny_clip, sae, data, LAYER, k=4, tau=0.5, out=tmp_path / "s", progress=False)


def test_large_tables_are_written_sparse_and_come_back_whole(summary, tmp_path):
    counts = torch.zeros(4, 24)
    counts[1, 5], counts[3, 0] = 7, 2
    for table, name in ((counts, "class_counts.places"), (counts + 1, "class_counts")):
        dataclasses.replace(summary, class_counts=table).save(tmp_path / name)
        names = set(load_file(tmp_path / name / "latents.safetensors"))
        assert names & {"class_counts", "class_counts.places"} == {name}
        assert torch.equal(LatentSummary.load(tmp_path / name).class_counts, table)


def test_unknown_tokens_name_the_valid_ones(tiny_clip, sae, data):
    with pytest.raises(ValueError, match="Valid: all, cls, patches"):
        summarize_latents(tiny_clip, sae, data, LAYER, tokens="image")


def test_counts_go_on_beyond_the_whole_numbers_of_float32(tiny_clip):
    """A float32 to which ones are added stands still at 2**24 = 16.8 million tokens: 85,000 images without labels, for a latent that is always on."""
    data = ImageData("x", "test", [], [-1] * 8, None)
    running = RunningSummary(tiny_clip, SparseAutoencoder(tiny_clip.width, 2), data, 1, 0.2, "all", None, "")
    for name in ("class_counts", "class_hits"):
        running.sums[name][0, 0] = 2**24
    h = torch.zeros(8, 197, 2)
    h[:, 0, 0] = 1.0
    for image in range(8):  # one at a time
        running.add(h[image : image + 1], torch.tensor([-1]), torch.tensor([image]))
    found = running.summary()
    assert found.class_counts[0].tolist() == [2**24 + 8, 0] == found.class_hits[0].tolist()
