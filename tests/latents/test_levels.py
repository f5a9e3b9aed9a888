"""Levels, and masks over pictures: counts against a slow reference, and masks where CLIP really looked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from patchsae_utils.data import ImageData
from patchsae_utils.latents.features import write_features
from patchsae_utils.latents.pictures import activation_levels, count_levels, reference_patches, seen_image
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = 1


@pytest.fixture(scope="module")
def sae(tiny_clip):
    sae = SparseAutoencoder(tiny_clip.width, 24, seed=1).requires_grad_(False)
    sae.b_enc.fill_(-1.0)
    sae.b_enc[[3, 7]] = -1e6
    return sae


@pytest.fixture(scope="module")
def data():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 112, 112, 3), dtype=np.uint8)
    return ImageData("noise", "test", ["a", "b"], [0, 1, 0, 1, 0, 0], lambda i: Image.fromarray(pixels[i]))


# -- levels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_levels_are_sums_of_the_level_below(tau):
    h = torch.from_numpy(np.random.default_rng(0).exponential(0.3, (7, 5, 4))).float()
    h[:, :, 3] = 0  # dead
    h[2, 1, 0] = tau  # exactly tau is not above it
    labels = torch.tensor([0, 2, 0, 3, 2, 2, 0])  # class 1 has no image, class 3 one
    found = count_levels(h, labels, 4, tau)
    for s in range(4):
        for c in range(4):
            expected = sum(h[i, j, s].item() > np.float32(tau) for i in range(7) if labels[i] == c for j in range(5))
            assert found.classes[c, s] == expected
    assert not found.tokens[2, 1, 0]
    assert torch.equal(found.images, found.tokens.sum(1)) and torch.equal(found.dataset, found.classes.sum(0))
    assert (found.dataset[3] == 0) and (found.classes[1] == 0).all()
    assert torch.equal(found.classes[3], found.images[3])
    with pytest.raises(ValueError, match=r"range\(3\)"):
        count_levels(h, labels, 3)
    with pytest.raises(ValueError, match="tau >= 0"):
        count_levels(h, labels, 4, -1)


def test_levels_at_another_tau_come_from_the_store(tiny_clip, sae, data, tmp_path):
    summary = summarize_latents(tiny_clip, sae, data, LAYER, progress=False)
    store = write_features(tiny_clip, sae, data, LAYER, tmp_path / "f", dtype="float32", progress=False)
    other = summarize_latents(tiny_clip, sae, data, LAYER, tau=0.7, progress=False)
    direct = activation_levels(tiny_clip, sae, data, 2, LAYER, other, patch=(3, 4))
    stored = activation_levels(tiny_clip, sae, data, 2, LAYER, summary, patch=(3, 4), tau=0.7, features=store)
    assert stored.table.equals(direct.table) and stored.tau == direct.tau == 0.7
    assert not stored.table.equals(activation_levels(tiny_clip, sae, data, 2, LAYER, summary, patch=(3, 4)).table)
    with pytest.raises(ValueError, match=r"above 0.2. For tau=0.7 give features=write_features"):
        activation_levels(tiny_clip, sae, data, 2, LAYER, summary, tau=0.7)
    cls = write_features(tiny_clip, sae, data, LAYER, tmp_path / "c", tokens="cls", progress=False)
    with pytest.raises(ValueError, match="was not written from the data set and tokens"):
        activation_levels(tiny_clip, sae, data, 2, LAYER, summary, tau=0.7, features=cls)


# -- reference patches ----------------------------------------------------------------------------------------------------------


def test_reference_patches_show_the_strongest_patches(tiny_clip, sae, data):
    summary = summarize_latents(tiny_clip, sae, data, LAYER, k=4, progress=False)
    living = int((~summary.dead).nonzero()[0])
    strong, dead = reference_patches(tiny_clip, data, summary, [living, 3], k=3, margin=2)
    assert strong.crops.shape[1:] == (40, 40, 3) and dead.crops.shape == (0, 40, 40, 3) and len(dead.values) == 0
    assert torch.equal(strong.values, summary.top_patch_values[living, : len(strong.crops)])
    for crop, box, image, patch in zip(strong.crops, strong.boxes.tolist(), strong.images.tolist(), strong.patches.tolist(), strict=True):
        top, left, height, width = box
        row, column = divmod(patch, 14)
        whole = seen_image(tiny_clip, data[image].image)
        assert torch.equal(crop[top : top + height, left : left + width], whole[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8])
    with pytest.raises(ValueError, match="margin must be 0 to 6"):
        reference_patches(tiny_clip, data, summary, [living], margin=7)
    cls = summarize_latents(tiny_clip, sae, data, LAYER, tokens="cls", progress=False)
    with pytest.raises(ValueError, match="CLS alone"):
        reference_patches(tiny_clip, data, cls, [living])


# -- masks over pictures --------------------------------------------------------------------------------------------------------


class Cropping:
    """A CLIP's preprocessing: the shorter side to 112 pixels, then the middle."""

    preprocess = transforms.Compose(
        [transforms.Resize(112), transforms.CenterCrop(112), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )


@pytest.fixture
def scene():
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    mask = np.zeros((14, 14), np.float32)
    mask[4:9, 4:9] = 0.5
    mask[6, 6] = 2.0
    return picture, mask
