"""A tiny world for the tests: random weights, a few scenes, seconds instead of minutes."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the notebooks' kernels inherit it

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import inputs, random_clip  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of two processes one takes all notebooks, in their order, since each needs what those before it have made; other tests go file by file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "notebooks" if "ipynb" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


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
def tiny_inputs(tiny_clip, tiny_dataset):
    """All scenes, preprocessed: [24, 3, 112, 112]."""
    return inputs(tiny_clip, tiny_dataset)


@pytest.fixture(scope="session")
def tiny_images(tiny_inputs):
    """The first eight of them."""
    return tiny_inputs[:8]


@pytest.fixture(scope="session")
def head(tiny_clip, tiny_dataset):
    """Zero-shot head of the scenes' classes, [C, 16]."""
    from patchsae_utils.interventions import dataset_head

    return dataset_head(tiny_clip, tiny_dataset)


@pytest.fixture(scope="session")
def summary(tiny_clip, tiny_sae, tiny_dataset):
    """What ``tiny_sae`` says of the scenes."""
    from patchsae_utils.latents.reading import summarize_latents

    return summarize_latents(tiny_clip, tiny_sae, tiny_dataset, -2, k=6, progress=False)


@pytest.fixture(scope="module")
def one_thread():
    """As in processes that a test starts: sums are split between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_store(tiny_clip, tiny_dataset, tmp_path_factory):
    """The scenes' activations after layer -2, in three shards; who changes a file puts it back."""
    from patchsae_utils.activations.extraction import extract_activations

    folder = tmp_path_factory.mktemp("store") / "mit Lücke und ß"
    return extract_activations(tiny_clip, tiny_dataset, -2, folder, n_per_shard=8, progress=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub serves, in memory: eight pictures of two classes; tests put other ``rows`` (or columns), ``names`` or ``features`` there."""
    import datasets

    birds = [{"picture": Image.new("RGB", (8, 8), (10 * i, 0, 0)), "species": i % 2} for i in range(8)]
    served = {"rows": {"train": birds, "test": birds}, "names": ["crane", "jay"], "configurations": ["default"]}
    picture, label = datasets.Image(), datasets.ClassLabel

    def check(name):
        if (name or "default") not in served["configurations"]:
            raise ValueError("Config name is missing.")

    def load(_, name=None, *, split, streaming=False):
        check(name)
        features = datasets.Features(served.get("features") or {"picture": picture, "species": label(names=served["names"])})
        rows = served["rows"][split]
        data = datasets.Dataset.from_dict(rows, features) if isinstance(rows, dict) else datasets.Dataset.from_list(rows, features)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _, name=None: check(name) or list(served["rows"]))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _: served["configurations"])
    monkeypatch.setenv("PATCHSAE_DATA", str(tmp_path))
    return served


@pytest.fixture(scope="session")
def tiny_sae(tiny_clip):
    """An untrained SAE on ``tiny_clip``'s residual stream: 32 -> 64."""
    from patchsae_utils.sae.model import SparseAutoencoder

    return SparseAutoencoder(tiny_clip.width, 2 * tiny_clip.width, seed=0)
