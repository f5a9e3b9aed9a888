"""A tiny world for the tests: random weights, a few scenes, seconds instead of minutes."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the notebooks' kernels inherit it

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import random_clip  # noqa: E402

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
    """``tiny.random_clip``: 112 px, patch 8, grid 14x14, 197 tokens; width 32, 3 blocks, embedding 16."""
    return random_clip()


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
def tiny_store(tiny_clip, tiny_dataset, tmp_path_factory):
    """The scenes' activations after layer -2, in three shards; who changes a file puts it back."""
    from patchsae_utils.activations.extraction import extract_activations

    folder = tmp_path_factory.mktemp("store") / "mit Lücke und ß"
    return extract_activations(tiny_clip, tiny_dataset, -2, folder, n_per_shard=8, progress=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """As much of the package ``datasets`` as is used here: eight pictures of two classes, whole or as a stream."""
    from tools_for_hub import fake_datasets

    module, served = fake_datasets()
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("PATCHSAE_DATA", str(tmp_path))
    return served


@pytest.fixture(scope="session")
def tiny_sae(tiny_clip):
    """An untrained SAE on ``tiny_clip``'s residual stream: 32 -> 64."""
    from patchsae_utils.sae.model import SparseAutoencoder

    return SparseAutoencoder(tiny_clip.width, 2 * tiny_clip.width, seed=0)
