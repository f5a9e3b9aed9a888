"""Reference images, masks and levels; masks lie where CLIP really looked."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import inputs
from torchvision import transforms

from patchsae_utils.data import ImageData
from patchsae_utils.latents import pictures as module
from patchsae_utils.latents.pictures import activation_levels, reference_images, seen_image
from patchsae_utils.latents.reading import latent_masks
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = 1


@pytest.mark.parametrize("activation, k", [("relu", None), ("topk", 5)])
def test_latent_masks_are_the_latents_on_the_grid(tiny_clip, data, activation, k):
    sae = SparseAutoencoder(tiny_clip.width, 24, activation, k=k, seed=2)
    images = inputs(tiny_clip, data, range(3))
    masks = latent_masks(tiny_clip, sae, images, [9, 0, 9], LAYER)
    assert masks.shape == (3, 3, 14, 14) and not masks.requires_grad
    with torch.no_grad():
        h = sae.encode(tiny_clip.residual(images, LAYER))
    torch.testing.assert_close(masks[:, 1], h[:, 1:, 0].reshape(3, 14, 14))  # row by row, CLS left out
    torch.testing.assert_close(masks[:, 0], masks[:, 2])
    with pytest.raises(ValueError, match=r"There is no latent 24: latents must lie in range\(24\)"):
        latent_masks(tiny_clip, sae, images, [0, 24], LAYER)


def test_seen_image_is_the_crop_that_clip_saw():
    """PAPER.md, trap 14: a wide picture whose sides are red: after resize and centre crop no red is left, so masks don't lie over it."""

    class Cropping:
        steps = (
            transforms.Resize(112),
            transforms.CenterCrop(112),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        )
        preprocess = transforms.Compose(steps)

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
    strong, dead = reference_images(tiny_clip, sae, data, summary, [living, 3], LAYER)
    n = min(5, int((summary.top_images[living] >= 0).sum()))
    assert strong.images.shape == (n, 112, 112, 3) and strong.masks.shape == (n, 14, 14)
    assert torch.equal(strong.indices, summary.top_images[living, :n])
    assert (strong.images[0] == torch.from_numpy(np.array(data[int(strong.indices[0])].image))).all()
    assert dead.images.shape == (0, 112, 112, 3) and dead.masks.shape == (0, 14, 14) and len(dead.indices) == 0
    shorter = ImageData("noise", "test", ["a"], [0], lambda i: Image.new("RGB", (112, 112)))
    with pytest.raises(ValueError, match="12 images, but 'noise' .test. has 1"):
        reference_images(tiny_clip, sae, shorter, summary, [0], LAYER)


def test_levels_count_what_they_say(tiny_clip, sae, data, summary, all_latents, monkeypatch):
    monkeypatch.setattr(module, "N_LATENTS", 24)
    found = activation_levels(tiny_clip, sae, data, 4, LAYER, summary)
    own = int((summary.class_counts[1] / 5 - summary.dataset_counts / 12).argmax())
    row, column = divmod(int(all_latents[4, 1:, own].argmax()), 14)
    assert found.class_name == "crane" and found.patch == (row, column)
    value = found.table.set_index(["level", "latent"])["value"]
    expected = {
        "patch": all_latents[4, 1 + row * 14 + column],
        "image": (all_latents[4] > 0.2).sum(0),
        "class": summary.class_counts[1] / 5,
        "data set": summary.dataset_counts / 12,
    }
    for level, activation in expected.items():
        for latent in range(24):
            assert value.get((level, latent), 0.0) == pytest.approx(float(activation[latent]), rel=1e-4)
    for _, rows in found.table.groupby("level"):
        assert rows["value"].is_monotonic_decreasing
