"""Memory that runs out: batches are halved, once it is said, and nothing changes; where that is impossible, what to set."""

import warnings

import pytest
import torch
from tiny import Changed, assert_same_files
from tiny_training import Store, assert_same, run

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.adaptation import fit
from patchsae_utils.adaptation.fit import fit_adapter
from patchsae_utils.config import AdapterConfig
from patchsae_utils.data import load_dataset
from patchsae_utils.interventions import sweep_masks
from patchsae_utils.latents.likeness import Likeness, LikenessObserver
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.run.memory import out_of_memory
from patchsae_utils.sae import trainer as training

LAYER = -2
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about it")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


class Small(Changed):
    """A model on a device that holds so many images."""

    def __init__(self, clip, holds, error=GPU):
        super().__init__(clip, holds=holds, error=error, sizes=[])

    def run_to(self, images, layer):
        self.sizes.append(len(images))
        if len(images) > self.holds:
            raise self.error
        return self.original.run_to(images, layer)

    def residual(self, images, layer):
        return self.run_to(images, layer).tokens


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()], ids=["gpu", "cpu", "python"])
def test_extraction_halves_a_batch_says_so_once_and_gives_the_same(tiny_clip, tiny_dataset, tmp_path, error):
    small = Small(tiny_clip, 7, error)
    with pytest.warns(UserWarning) as told:
        found = extract_activations(small, tiny_dataset, LAYER, tmp_path / "small", batch_size=16, progress=False)
    assert [str(each.message) for each in told] == [
        "A batch of 16 images doesn't fit the memory of cpu; going on with 4 at a time. Set batch_size=4 to begin with that."
    ]
    assert small.sizes == [16, 8] + [4] * 6, "what fits is remembered"
    expected = extract_activations(tiny_clip, tiny_dataset, LAYER, tmp_path / "whole", batch_size=4, progress=False)
    assert_same_files(found.folder, expected.folder)


def test_statistics_halve_a_batch_and_count_nothing_twice(tiny_clip, tiny_sae, tiny_dataset, tmp_path):
    results = []
    for name, clip, size in (("small", Small(tiny_clip, 5), 16), ("whole", tiny_clip, 4)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            likeness = LikenessObserver(clip, tiny_sae, tiny_dataset, LAYER, tmp_path / name)
            settings = dict(batch_size=size, observers=[likeness], progress=False)
            results.append(summarize_latents(clip, tiny_sae, tiny_dataset, LAYER, tau=0.05, **settings))
        assert len([each for each in told if "going on with 4 at a time" in str(each.message)]) == (name == "small")
    small, whole = results
    assert torch.equal(small.class_counts, whole.class_counts) and torch.equal(small.mean_activation, whole.mean_activation)
    assert torch.equal(small.top_images, whole.top_images) and torch.equal(small.top_patches, whole.top_patches)
    assert torch.equal(Likeness.load(tmp_path / "small").embeddings, Likeness.load(tmp_path / "whole").embeddings)


def test_where_not_even_one_image_fits_it_says_what_to_do(tiny_clip, tiny_sae, tiny_dataset, tmp_path):
    small = Small(tiny_clip, 0)
    for call in (
        lambda: extract_activations(small, tiny_dataset, LAYER, tmp_path / "store", progress=False),
        lambda: summarize_latents(small, tiny_sae, tiny_dataset, LAYER, progress=False),
    ):
        small.sizes.clear()
        message = r"Not even one image fits the memory of cpu\. Free some of it.*device='cpu'.*precision='bf16'"
        with pytest.raises(MemoryError, match=message):
            call()
        assert small.sizes[-1] == 1


def test_other_errors_are_not_taken_for_it(tiny_clip, tiny_dataset, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        extract_activations(Small(tiny_clip, 0, RuntimeError("shapes")), tiny_dataset, LAYER, tmp_path, progress=False)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory("x", "y"):
        raise RuntimeError("shapes")


def test_training_says_which_setting_to_lower_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    """FAULTS D7: not sparse='always', which from random weights takes more."""
    step = training.Training.move

    def full(self, *args):
        if self.step == 16:
            raise GPU
        return step(self, *args)

    monkeypatch.setattr(training.Training, "move", full)
    message = r"training steps of \d+ tokens \(CUDA out of memory.*\)\. Set training\.batch_tokens or sae\.expansion_factor lower"
    with pytest.raises(MemoryError, match=message):
        run(tmp_path / "run")
    monkeypatch.undo()
    ended = run(tmp_path / "run", store=(store := Store()))
    assert store.asked[0][2] == 14, "it goes on from the checkpoint"
    assert_same(ended, run(tmp_path / "whole"))


def test_sweeps_and_adapters_say_which_setting_to_lower(tiny_clip, tiny_sae, tiny_dataset, monkeypatch):
    config = AdapterConfig(tasks=("openmoji/tools",), n_shots=1, epochs=1, depth=2)
    with pytest.raises(MemoryError, match=r"ran out in a sweep over masks \(CUDA out of memory.*\)\. Set batch_size lower"):
        sweep_masks(Small(tiny_clip, 1), tiny_sae, tiny_dataset, [1], "random")

    def full(*_):
        raise CPU

    monkeypatch.setattr(fit.F, "cross_entropy", full)
    with pytest.raises(MemoryError, match=r"ran out in fitting an adapter \(.*can't allocate memory.*\)\. Set adapters.batch_size lower"):
        fit_adapter(tiny_clip, "coop", load_dataset("openmoji/tools", "train", half="novel", n_images=20), config, progress=False)
