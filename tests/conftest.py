"""A tiny world for the tests: random weights, a few scenes, seconds instead of minutes."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY_TEXT, TINY_VISION

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _default_settings():
    """The tests describe the default profile, whatever the shell that runs them has set."""
    patch = pytest.MonkeyPatch()  # the fixture monkeypatch lives a test, not a session
    for name in ("PATCHSAE_PROFILE", "PATCHSAE_SET"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_clip():
    """A CLIP of random weights with our world's shapes: 112 px, patch 8, grid 14x14, 197 tokens; width 32, 3 blocks, embedding 16."""
    import open_clip
    from torchvision import transforms

    from patchsae_utils.clip import ClipModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=TINY_VISION, text_cfg=TINY_TEXT)
    normalize = transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    preprocess = transforms.Compose([transforms.Resize((112, 112)), transforms.ToTensor(), normalize])
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY_TEXT["context_length"])
    return ClipModel(model, name="tiny", preprocess=preprocess, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tiny_dataset():
    """24 scenes of one task (its first 24 classes, one scene each), 112 px, with ground truth."""
    from patchsae_utils.data import load_dataset

    return load_dataset("openmoji/tools", "test", n_images=24)


@pytest.fixture(scope="session")
def tiny_images(tiny_clip, tiny_dataset):
    """The first eight scenes, preprocessed: [8, 3, 112, 112]."""
    return torch.stack([tiny_clip.preprocess(tiny_dataset[i].image) for i in range(8)])


@pytest.fixture(scope="session")
def tiny_sae(tiny_clip):
    """An untrained SAE on ``tiny_clip``'s residual stream: 32 -> 64."""
    from patchsae_utils.sae import SparseAutoencoder

    return SparseAutoencoder(tiny_clip.width, 2 * tiny_clip.width, seed=0)
