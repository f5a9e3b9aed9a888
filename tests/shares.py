"""Run by test_processes.py, by a launcher or alone: extracts and summarises the same data in however many processes there are."""

import os
import sys
from pathlib import Path
from unittest import mock

import tiny
import torch
import two_processes

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.data import load_dataset
from patchsae_utils.latents import likeness, passes
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.model import SparseAutoencoder

BAD = 16
"""A picture that the interrupted runs can't open."""


class Pictures(torch.utils.data.Dataset):
    """Scenes of the embedded world, one of which may be broken."""

    def __init__(self, bad: int | None = None):
        self._scenes, self._bad, self.read = load_dataset("openmoji/tools", "test", n_images=23), bad, []

    def __getattr__(self, name):
        return getattr(self.__dict__["_scenes"], name)

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        if index == self._bad:
            raise ValueError(f"picture {index} is broken")
        self.read.append(index)
        return self._scenes[index]


def models():
    clip = tiny.random_clip()
    return clip, SparseAutoencoder(clip.width, 2 * clip.width, seed=0).requires_grad_(False)


def store(out: Path, data: Pictures):
    return extract_activations(models()[0], data, -2, out / "store", n_per_shard=4, batch_size=3, progress=False)


def statistics(out: Path, data: Pictures):
    clip, sae = models()
    observer = likeness.LikenessObserver(clip, sae, data, -2, out / "likeness")
    with mock.patch.object(likeness, "CONTROL_IMAGES", 2):
        settings = dict(k=3, tau=0.05, batch_size=2, observers=[observer], progress=False)
        return summarize_latents(clip, sae, data, -2, out=out / "statistics", **settings)


STAGES = {"store": store, "statistics": statistics}


def main(out: Path) -> None:
    rank = os.environ.get("RANK", "0")
    for name, stage in STAGES.items():
        data = Pictures()
        stage(out / "whole", data)
        stage(out / "whole", data)  # opened
        (out / f"read-{name}-{rank}").write_text(" ".join(map(str, data.read)))
    passes.SAVE_SECONDS = 0.0
    for name, stage in STAGES.items():
        try:
            stage(out / "cut", Pictures(BAD))
        except ValueError as error:
            (out / f"error-{name}-{rank}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    if os.environ.get("WORLD_SIZE") == "2":
        two_processes.main(Path(sys.argv[1]) / "trained")
