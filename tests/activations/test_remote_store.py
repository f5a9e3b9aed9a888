"""Stores behind URLs: written, gone on with, read and checked as those in folders are."""

import json

import fsspec
import pytest
import torch

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.activations.folders import Folder, is_url
from patchsae_utils.activations.store import ActivationStore
from patchsae_utils.cli import main
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.trainer import TrainConfig, train_sae

URL = "memory://bucket/Füße und Hände/store"
OPTIONS = {"n_per_shard": 8, "progress": False}


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An object store in memory, and the folder where fetched files are kept."""
    monkeypatch.setenv("PATCHSAE_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def store(memory, tiny_clip, tiny_dataset):
    return extract_activations(tiny_clip, tiny_dataset, -2, URL, **OPTIONS)


def name_of(file: str) -> str:
    return f"{Folder(URL).root}/{file}"


def test_the_files_are_those_of_a_folder_and_reading_gives_the_same(memory, store, tiny_store, tmp_path, capsys):
    assert store.folder == URL and URL in repr(store)
    for path in tiny_store.folder.iterdir():
        assert memory.cat_file(name_of(path.name)) == path.read_bytes()
    for one, two in zip(store.tokens(100, seed=1), tiny_store.tokens(100, seed=1), strict=True):
        assert torch.equal(one, two)
    tokens, labels, indices = next(store.images([20, 3]))
    assert torch.equal(tokens, next(tiny_store.images([20, 3]))[0]) and indices.tolist() == [20, 3]
    assert torch.equal(labels, tiny_store.labels[[20, 3]])
    assert store.fingerprint == tiny_store.fingerprint
    store.verify()
    assert main(["info", URL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == "activation store" and found["fingerprint"] == store.fingerprint
    config = TrainConfig(n_tokens=640, batch_tokens=64, warmup_steps=2)
    assert train_sae(SparseAutoencoder(store.d_in, 64), store, config, tmp_path / "sae", progress=False).metadata["store_fingerprint"]


def test_only_what_is_read_is_fetched_and_kept(memory, store, monkeypatch):
    fetched = []
    get = type(memory).get_file
    noted = lambda self, path, *rest, **options: fetched.append(path) or get(self, path, *rest, **options)  # noqa: E731
    monkeypatch.setattr(type(memory), "get_file", noted)
    opened = ActivationStore.open(URL)
    assert fetched == []
    next(opened.images([9])), next(opened.images([10])), next(ActivationStore.open(URL).images([11]))
    assert [path.rsplit("/", 1)[-1] for path in fetched] == ["shard-00001.safetensors", "index.safetensors"]


def test_an_interrupted_upload_goes_on(memory, tiny_clip, tiny_dataset, monkeypatch):
    pipe = type(memory).pipe_file

    def breaks(self, path, content, *rest, **options):
        if path.endswith("shard-00002.safetensors"):
            raise ConnectionError("the network is gone")
        return pipe(self, path, content, *rest, **options)

    monkeypatch.setattr(type(memory), "pipe_file", breaks)
    with pytest.raises(ConnectionError):
        extract_activations(tiny_clip, tiny_dataset, -2, URL, **OPTIONS)
    with pytest.raises(ValueError, match="memory://.* is unfinished. Call extract_activations again"):
        ActivationStore.open(URL)
    monkeypatch.undo()
    get = type(tiny_dataset).__getitem__
    monkeypatch.setattr(type(tiny_dataset), "__getitem__", lambda self, i: get(self, i) if i > 15 else pytest.fail())
    assert extract_activations(tiny_clip, tiny_dataset, -2, URL, **OPTIONS).n_images == 24


def test_damage_there_is_named_and_damage_here_is_mended(memory, store):
    content = bytearray(memory.cat_file(name_of("shard-00000.safetensors")))
    next(store.images([0]))
    kept = Folder(URL).cache / "shard-00000.safetensors"
    kept.unlink()  # a file that is mapped into memory is not written into
    kept.write_bytes(bytes(100))
    assert torch.equal(next(ActivationStore.open(URL).images([0]))[0], next(store.images([0]))[0])
    content[-1] ^= 1
    memory.pipe_file(name_of("shard-00000.safetensors"), bytes(content))
    Folder(URL).path("shard-00000.safetensors", anew=True)
    with pytest.raises(ValueError, match="memory://.*shard-00000.safetensors is damaged"):
        next(ActivationStore.open(URL).images([0]))
    memory.pipe_file(name_of("manifest.json"), b"{")
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        ActivationStore.open(URL)


def test_what_is_not_there_and_what_is_no_url(memory):
    with pytest.raises(FileNotFoundError, match="memory://nothing holds no activation store"):
        ActivationStore.open("memory://nothing")
    with pytest.raises(ValueError, match="gopher://hole: Protocol not known.*such as s3://bucket/folder"):
        ActivationStore.open("gopher://hole/")
    assert not is_url("a/b") and not is_url("file:///a") and is_url("s3://a")


def test_what_is_kept_of_another_store_in_the_same_place_is_fetched_anew(memory, store, tiny_clip, tiny_dataset):
    next(store.images([0]))
    other = extract_activations(tiny_clip, tiny_dataset, 0, URL, **OPTIONS)
    expected = tiny_clip.residual(tiny_clip.preprocess(tiny_dataset[0].image)[None], 0)
    torch.testing.assert_close(next(other.images([0]))[0], expected, rtol=2**-8, atol=1e-5)


def test_file_urls_are_folders(tiny_store, tiny_clip, tiny_dataset, tmp_path):
    assert ActivationStore.open(f"file://{tiny_store.folder}").folder == tiny_store.folder
    assert extract_activations(tiny_clip, tiny_dataset, -2, f"file://{tmp_path}/new", **OPTIONS).folder == tmp_path / "new"
