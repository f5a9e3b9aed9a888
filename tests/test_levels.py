"""Levels, and masks over pictures: counts against a slow reference, and masks where CLIP really looked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from patchsae_utils.data import ImageData
from patchsae_utils.features import write_features
from patchsae_utils.latents import summarize_latents
from patchsae_utils.levels import activation_levels, count_levels, reference_patches, seen_image, upsample_masks
from patchsae_utils.overlays import contour, dimmed, heat_map, mask_on_original, seen_box
from patchsae_utils.sae import SparseAutoencoder

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


@pytest.mark.parametrize("size", [(112, 112), (336, 112), (112, 400), (224, 300), (97, 61)])
def test_the_seen_box_is_what_the_crop_shows(size):
    """A picture whose pixels say where they are: after preprocessing, the corners hold the box's coordinates."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    picture = np.stack([255 * x, 255 * y, 0 * x], -1)
    seen = Cropping.preprocess(Image.fromarray(np.round(picture).astype(np.uint8)))[:2] * 0.5 + 0.5
    left, top, right, bottom = seen_box(Cropping.preprocess, size)
    pixel = (right - left) / 112
    across = np.array([left + pixel / 2, right - pixel / 2]) / width
    down = np.array([top + pixel / 2, bottom - pixel / 2]) / height
    np.testing.assert_allclose(seen[0, 56, [0, -1]], across, atol=0.012)
    np.testing.assert_allclose(seen[1, [0, -1], 56], down, atol=0.012)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_mask_lies_over_the_original_where_clip_saw_it(mode):
    """Trap 14: a bright block off the middle of a wide picture; the patch that shows it must cover it, and nothing outside the crop."""
    picture = np.zeros((224, 560, 3), np.uint8)
    picture[32:48, 248:264] = 255  # 16 original pixels are one patch of 8 after halving
    seen = seen_image(Cropping(), Image.fromarray(picture)).float().mean(2)
    mask = seen.view(14, 8, 14, 8).mean((1, 3)) / 255
    row, column = divmod(int(mask.argmax()), 14)
    assert (row, column) == (2, 5) and mask.max() > 0.9
    mask = (mask > 0.5).float()
    over = mask_on_original(Cropping(), mask, (560, 224), mode)
    assert over.shape == (224, 560) and over.max() <= 1
    assert over[40, 256] > 0.85 and (over[:, :168] == 0).all() and (over[:, 392:] == 0).all()
    centre = np.array(np.nonzero(over > 0.5)).mean(1)
    np.testing.assert_allclose(centre, [39.5, 255.5], atol=0.6)
    stretched = upsample_masks(mask[None, None], (224, 560), mode)[0, 0]
    assert stretched[40, 256] < 0.1  # what the official demo shows
    if mode == "nearest":
        assert (over[32:48, 248:264] == 1).all() and over.sum() == 256


def test_inside_the_crop_the_original_agrees_with_upsampling():
    mask = torch.rand(14, 14, generator=torch.Generator().manual_seed(0))
    for mode in ("nearest", "bilinear"):
        over = mask_on_original(Cropping(), mask, (112, 112), mode)
        np.testing.assert_allclose(over, upsample_masks(mask[None, None], 112, mode)[0, 0], atol=1e-5)


def test_steps_that_move_pixels_unknown_ways_are_refused():
    flipping = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    with pytest.raises(ValueError, match="RandomHorizontalFlip.*known: Resize, CenterCrop"):
        seen_box(flipping, (10, 10))


def test_real_preprocessings_are_known():
    import open_clip

    preprocess = open_clip.image_transform(224, is_train=False)
    left, top, right, bottom = seen_box(preprocess, (448, 224))
    assert (left, top, right, bottom) == (112, 0, 336, 224)


@pytest.fixture
def scene():
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    mask = np.zeros((14, 14), np.float32)
    mask[4:9, 4:9] = 0.5
    mask[6, 6] = 2.0
    return picture, mask


def test_dimming_keeps_the_strongest_and_darkens_the_silent(scene):
    picture, mask = scene
    found = dimmed(picture, mask, mode="nearest", darkness=0.8)
    assert (found[12:14, 12:14] == picture[12:14, 12:14]).all()
    np.testing.assert_allclose(found[0, 0], 0.2 * picture[0, 0], atol=0.51)
    np.testing.assert_allclose(found[8, 8], (1 - 0.8 * 0.5) * picture[8, 8], atol=0.51)  # sqrt(0.5 / 2) = 0.5
    assert (dimmed(picture, mask, top=0.5, mode="nearest")[8:18, 8:18] == picture[8:18, 8:18]).all()  # above the top is the top


def test_a_heat_map_leaves_silent_places_alone(scene):
    picture, mask = scene
    found = heat_map(torch.from_numpy(picture), torch.from_numpy(mask), mode="nearest")
    silent = upsample_masks(torch.from_numpy(mask)[None, None], 28)[0, 0].numpy() == 0
    assert (found[silent] == picture[silent]).all() and not (found[12, 12] == picture[12, 12]).all()
    assert (heat_map(picture, np.zeros((14, 14))) == picture).all()  # nothing active: nothing to show, no division by zero
    smooth = heat_map(picture, mask)
    assert (smooth != found).any() and smooth.shape == (28, 28, 3) and smooth.dtype == np.uint8


def test_a_contour_runs_just_inside_the_level_set(scene):
    picture, mask = scene
    color = (1, 2, 3)
    found = contour(picture, mask, 0.2, mode="nearest", width=1, color=color)
    line = (found == color).all(2)
    expected = np.zeros((28, 28), bool)
    expected[8:18, 8:18] = True
    expected[9:17, 9:17] = False
    assert (line == expected).all() and (found[~line] == picture[~line]).all()
    assert (contour(picture, mask, 5.0) == picture).all()
    with pytest.raises(ValueError, match="width must be"):
        contour(picture, mask, 0.2, width=0)


def test_pictures_and_masks_of_the_wrong_form_are_named(scene):
    picture, mask = scene
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        dimmed(picture / 255, mask)
    with pytest.raises(ValueError, match=r"\[rows, columns\]"):
        dimmed(picture, mask[None])
    with pytest.raises(ValueError, match="finite"):
        dimmed(picture, mask * np.nan)
    with pytest.raises(ValueError, match="bilinear, nearest"):
        heat_map(picture, mask, mode="cubic")
