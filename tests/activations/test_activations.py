"""The activation store: what is written is read, damage is named, an interruption costs one shard, shuffling is a seeded permutation."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from other_device import DEVICE, OtherDevice
from tiny import Changed

from patchsae_utils.activations import extraction, mixing
from patchsae_utils.activations.extraction import extract_activations, plan_shards
from patchsae_utils.activations.store import ActivationStore
from patchsae_utils.data import batches, load_dataset

LAYER = -2


class Watched(Changed):
    """A data set that counts which images are asked for, and can break off at one of them."""

    def __init__(self, dataset, stop_at=None):
        super().__init__(dataset, stop_at=stop_at, asked=[])

    def __len__(self):
        return len(self.original)

    def __getitem__(self, index):
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(index)
        return self.original[index]


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("openmoji/tools", "test", n_images=21)


@pytest.fixture(scope="module")
def residual(tiny_clip, dataset):
    """The truth: [21, 197, 32]."""
    with torch.no_grad():
        return torch.cat([tiny_clip.residual(batch.images, LAYER) for batch in batches(dataset, tiny_clip.preprocess, 8)])


@pytest.fixture(scope="module")
def store(tiny_clip, dataset, tmp_path_factory):
    """Four shards of 6, 6, 6 and 3 images."""
    return extract(tiny_clip, dataset, tmp_path_factory.mktemp("store"))


def extract(clip, dataset, out, **options):
    return extract_activations(clip, dataset, LAYER, out, **{"n_per_shard": 6, "batch_size": 4, "progress": False, **options})


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_images_come_back_to_the_precision_of_the_dtype(tiny_clip, dataset, residual, tmp_path, dtype, precision):
    store = extract(tiny_clip, dataset, tmp_path, dtype=dtype)
    assert store.labels.tolist() == dataset.labels.tolist() and store.indices.tolist() == list(range(21))
    for asked, rows in ((None, list(range(21))), ([20, 0, 7, 7, 13], [20, 0, 7, 7, 13])):
        tokens, labels, indices = (torch.cat(parts) for parts in zip(*store.images(asked, batch_size=2), strict=True))
        torch.testing.assert_close(tokens, residual[rows], rtol=precision, atol=1e-5)
        assert tokens.dtype == torch.float32 and labels.tolist() == dataset.labels[rows].tolist() and indices.tolist() == rows


@pytest.mark.parametrize(("tokens", "kept"), [("cls", slice(0, 1)), ("patches", slice(1, None))])
def test_only_the_chosen_tokens_are_stored(tiny_clip, dataset, residual, tmp_path, tokens, kept):
    store = extract(tiny_clip, dataset, tmp_path, tokens=tokens)
    found = torch.cat([batch[0] for batch in store.images()])
    torch.testing.assert_close(found, residual[:, kept], rtol=2**-8, atol=1e-5)
    places = torch.cat([place for _, place in store.tokens(50, positions=True)])
    assert sorted(set(places.tolist())) == list(range(197))[kept]


def test_metadata_says_what_the_activations_are(store, tiny_clip, dataset):
    m = store.metadata
    assert (m.model_name, m.weights_hash, m.layer, m.tokens, m.grid) == ("tiny", tiny_clip.weights_hash, 1, "all", (14, 14))
    assert (m.dataset, m.split, m.n_images, m.n_tokens, m.d_in, m.dtype) == ("openmoji/tools", "test", 21, 197, 32, "bfloat16")
    assert m.class_names == dataset.class_names and "Normalize" in m.preprocessing
    assert (store.n_images, store.n_tokens, store.d_in, len(store)) == (21, 197, 32, 21 * 197)
    assert "4 shards" in store.describe()["on disk"]


def test_every_shard_has_its_own_images_however_many_there_are():
    """FAULTS D13: names were read back by five digits, so that shard 100,000 got shard 10,000's images."""
    shards = plan_shards(200_005, 2)
    assert len(shards) == 100_003 and [row for rows in shards.values() for row in rows] == list(range(200_005))
    assert shards["shard-100000.safetensors"] == range(200_000, 200_002)
    assert extraction._LEFTOVER.fullmatch("shard-100000.safetensors")


def test_a_finished_store_is_opened_without_looking_at_an_image(store, tiny_clip, dataset):
    again = extract(tiny_clip, watched := Watched(dataset), store.folder)
    assert watched.asked == [] and again.fingerprint == store.fingerprint


@pytest.mark.parametrize("n_per_shard", [8, 6])  # batches of 4 divide a shard, or become smaller
def test_an_interrupted_extraction_goes_on_behind_the_last_whole_shard(tiny_clip, dataset, store, tmp_path, n_per_shard):
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_clip, Watched(dataset, stop_at=18), tmp_path, n_per_shard=n_per_shard)
    with pytest.raises(ValueError, match="unfinished.*goes on"):
        ActivationStore.open(tmp_path)
    resumed = extract(tiny_clip, watched := Watched(dataset), tmp_path, n_per_shard=n_per_shard)
    assert watched.asked == list(range(18 // n_per_shard * n_per_shard, 21))
    ours, whole = (torch.cat([batch[0] for batch in each.images()]) for each in (resumed, store))
    torch.testing.assert_close(ours, whole, rtol=2**-7, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_a_killed_process_leaves_a_store_that_goes_on(tiny_clip, dataset, tmp_path):
    """SIGKILL while a shard is being written: the temporary file is swept away and whole shards are kept."""
    code = f"""
import os, signal, sys
sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(os.path.dirname(__file__))!r}]
import patchsae_utils.activations.extraction as activations, test_activations as tests, tiny
from patchsae_utils.data import load_dataset
real, written = os.replace, []
def replace(source, target):
    if str(target).endswith("shard-00002.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
clip = tiny.random_clip()
tests.extract(clip, load_dataset("openmoji/tools", "test", n_images=21), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert list(tmp_path.glob(".shard-*.tmp"))
    extract(tiny_clip, watched := Watched(dataset), tmp_path).verify()
    assert watched.asked == list(range(12, 21)) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "index.safetensors"])
def test_a_damaged_file_is_named_and_can_be_made_again_alone(tiny_clip, dataset, tmp_path, name):
    extract(tiny_clip, dataset, tmp_path)
    before = shard_bytes(tmp_path)
    damaged = bytearray(before[name])
    damaged[-5] ^= 1
    (tmp_path / name).write_bytes(damaged)

    store = ActivationStore.open(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*Delete this file and call extract_activations again"):
        list(store.images())
    with pytest.raises(ValueError, match=name):
        store.verify()

    (tmp_path / name).unlink()
    extract(tiny_clip, watched := Watched(dataset), tmp_path).verify()
    assert watched.asked == (list(range(12, 18)) if name.startswith("shard") else [])
    assert {key: value for key, value in shard_bytes(tmp_path).items() if key != name} == {k: v for k, v in before.items() if k != name}
    (tmp_path / "shard-00000.safetensors").write_bytes(before["shard-00000.safetensors"][:1000])
    extract(tiny_clip, watched, tmp_path).verify()
    assert watched.asked[-6:] == list(range(6)), "a truncated shard is written again without asking"
    (tmp_path / "shard-00003.safetensors").unlink()
    opened = ActivationStore.open(tmp_path)
    assert next(opened.images([0, 17]))[0].shape == (2, 197, 32), "whole shards are read although another is missing"
    with pytest.raises(FileNotFoundError, match="shard-00003.*only this file"):
        next(opened.images([20]))


CHANGES = {
    "layer": {"layer": 0}, "tokens": {"tokens": "cls"}, "dtype": {"dtype": "float16"}, "data": {"spec": "openmoji/tools:gray"}, "seed": {"seed": 1},
    "n_per_shard": {}, "weights": {"fingerprint": "other"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_replace_the_store_and_nothing_else(tiny_clip, tmp_path, change):
    changes, name = dict(CHANGES[change]), tiny_clip.fingerprint
    old = extract(tiny_clip, load_dataset("openmoji/tools", "test", n_images=7), tmp_path, n_per_shard=2)
    (tmp_path / "notes.txt").write_text("mine")
    data = load_dataset(changes.pop("spec", "openmoji/tools"), "test", n_images=7, seed=changes.pop("seed", 0))
    clip = Changed(tiny_clip, **dict.fromkeys(("weights_hash", "fingerprint"), changes.pop("fingerprint", name)))
    new = extract_activations(clip, data, changes.pop("layer", LAYER), tmp_path, n_per_shard=4, batch_size=4, progress=False, **changes)
    new.verify()
    assert new.fingerprint != old.fingerprint and len(list(tmp_path.glob("shard-*"))) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unknown_choices_name_the_valid_ones(tiny_clip, dataset, store, tmp_path):
    for message, call in (
        ("Unknown tokens 'patch'. Valid: all, cls, patches", lambda: extract(tiny_clip, dataset, tmp_path, tokens="patch")),
        ("Unknown dtype 'int8'. Valid: bfloat16, float16", lambda: extract(tiny_clip, dataset, tmp_path, dtype="int8")),
        ("no layer 3. Valid: 0 to 2, or -3 to -1", lambda: extract_activations(tiny_clip, dataset, 3, tmp_path)),
        ("at least 1", lambda: extract(tiny_clip, dataset, tmp_path, n_per_shard=0)),
        ("images 0 to 20; got indices from 3 to 21", lambda: next(store.images([3, 21]))),
        ("start_step >= 0", lambda: store.tokens(8, start_step=-1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    patches = extract(tiny_clip, dataset, tmp_path / "patches", tokens="patches")
    with pytest.raises(ValueError, match="no tokens 'cls' here, only 'patches'"):
        patches.tokens(10, tokens="cls")
    assert [path.name for path in tmp_path.iterdir()] == ["patches"]


def test_a_folder_that_is_no_store_is_refused(tiny_clip, dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    for refused in (lambda: ActivationStore.open(tmp_path), lambda: extract(tiny_clip, dataset, tmp_path)):
        with pytest.raises(ValueError, match="not the manifest of an activation store"):
            refused()
    (tmp_path / "manifest.json").write_text('{"format": "patchsae_utils activations", "format_version": 1}')
    with pytest.raises(ValueError, match="format version 1; this package reads 2. Extract again: extract_activations replaces it"):
        ActivationStore.open(tmp_path)
    extract(tiny_clip, dataset, tmp_path).verify()


def test_values_that_the_dtype_cannot_hold_are_refused(tiny_clip, dataset, tmp_path):
    loud = Changed(tiny_clip, residual=lambda images, layer: tiny_clip.residual(images, layer) * 1e6)
    with pytest.raises(ValueError, match="don't fit float16. Use dtype='bfloat16'"):
        extract(loud, dataset, tmp_path, dtype="float16")


def test_unshuffled_tokens_are_the_images_in_order(store, residual):
    tokens = torch.cat(list(store.tokens(100, shuffle=False)))
    torch.testing.assert_close(tokens, residual.flatten(0, 1), rtol=2**-8, atol=1e-5)


ONE_SHARD = 6 * 197 * 32 * 2  # bytes


def with_buffer(store, n_bytes):
    opened = ActivationStore.open(store.folder)
    opened.buffer_bytes = n_bytes
    return opened


@pytest.mark.parametrize("buffer_bytes", [1, 2 * ONE_SHARD, 2**31])
def test_an_epoch_of_shuffled_tokens_is_a_permutation(store, buffer_bytes):
    stored = torch.cat([batch[0] for batch in store.images()]).flatten(0, 1)
    shuffled = torch.cat(list(with_buffer(store, buffer_bytes).tokens(100, seed=3)))
    assert not torch.equal(shuffled, stored)

    def in_order(tokens):
        return sorted(map(tuple, tokens.tolist()))

    assert in_order(shuffled) == in_order(stored)
    same, other = (next(with_buffer(store, buffer_bytes).tokens(100, seed=seed)) for seed in (3, 4))
    assert torch.equal(same, shuffled[:100]) and not torch.equal(other, shuffled[:100]), "the order is the seed's alone"


@pytest.mark.parametrize("start_step", [0, 7, 30])
def test_batches_on_a_device_are_those_of_the_processor_bit_for_bit(store, start_step):
    small = with_buffer(store, 2 * ONE_SHARD)
    options = {"seed": 3, "epochs": 2, "start_step": start_step, "positions": True}
    here = list(small.tokens(100, **options))
    with OtherDevice():
        there = list(small.tokens(100, **options, device=torch.device(DEVICE)))
        assert len(there) == len(here) and all(part.device.type == DEVICE for batch in there for part in batch)
        there = [[part.cpu() for part in batch] for batch in there]
    assert all(torch.equal(a, b) for left, right in zip(here, there, strict=True) for a, b in zip(left, right, strict=True))


def test_the_next_buffer_is_read_while_one_is_emptied_and_no_more():
    began, events = [], [threading.Event() for _ in range(3)]

    def buffers():
        for number, event in enumerate(events):
            began.append(number)
            event.set()
            yield torch.full((4, 2), float(number)), torch.arange(4)
        raise OSError("the disk is gone")

    ahead = mixing._ahead(buffers(), torch.device("cpu"))
    for number in range(2):
        assert next(ahead)[0].unique().tolist() == [number]
        assert events[number + 1].wait(60) and began == list(range(number + 2)), "read without being asked for, and not the one behind"
    next(ahead)
    with pytest.raises(OSError, match="disk is gone"):
        next(ahead)


def test_epochs_differ_and_batches_run_across_them(store):
    two = list(store.tokens(1000, epochs=2))
    assert [len(batch) for batch in two] == [1000] * 8 + [274]
    tokens = torch.cat(two)
    assert not torch.equal(tokens[: len(store)], tokens[len(store) :])
    endless = store.tokens(1000, epochs=None)
    for batch in two[:-1]:
        assert torch.equal(next(endless), batch)


@pytest.mark.parametrize("buffer_bytes", [1, 2 * ONE_SHARD, 2**31])
def test_a_restart_at_step_k_continues(store, buffer_bytes):
    options, store = {"seed": 2, "epochs": 3, "positions": True}, with_buffer(store, buffer_bytes)
    whole = list(store.tokens(300, **options))
    for k in (0, 1, 5, 13, 14, 30, len(whole) - 1, len(whole), len(whole) + 1):
        rest = list(store.tokens(300, start_step=k, **options))
        assert len(rest) == max(0, len(whole) - k)
        for (x, place), (y, other) in zip(rest, whole[k:], strict=True):
            assert torch.equal(x, y) and torch.equal(place, other)


def test_a_batch_mixes_many_images(store):
    """With one buffer, a batch of 210 tokens draws on each of the 21 images about ten times."""
    stored = torch.cat([batch[0] for batch in store.images()])
    owner = {tuple(row): i for i, image in enumerate(stored.tolist()) for row in image}
    batch, places = next(store.tokens(210, seed=1, positions=True))
    counts = torch.bincount(torch.tensor([owner[tuple(row)] for row in batch.tolist()]), minlength=21)
    assert (counts > 0).all() and counts.max() < 30
    assert len(places.unique()) > 100
    # With the smallest buffer it can only mix the images of one shard.
    batch = next(with_buffer(store, 1).tokens(210, seed=1))
    images = {owner[tuple(row)] for row in batch.tolist()}
    assert len({image // 6 for image in images}) <= 2 and len(images) >= 3


def test_positions_are_places_in_the_sequence(store):
    stored = torch.cat([batch[0] for batch in store.images()])
    cls = {tuple(row) for row in stored[:, 0].tolist()}
    for batch, places in store.tokens(500, positions=True):
        assert [tuple(row) in cls for row in batch.tolist()] == (places == 0).tolist()
