"""CLIP, and adapters of every kind whose prompts are loud enough to matter."""

import pytest
from tiny import loud

from patchsae_utils.adaptation import compare_models
from patchsae_utils.adaptation.prompts import CoOp, MaPLe, VisualPrompt
from patchsae_utils.data import load_dataset


@pytest.fixture(scope="package")
def models(tiny_clip):
    kinds = {"maple": MaPLe, "coop": CoOp, "vpt": VisualPrompt}
    return {"itself": tiny_clip, **{name: loud(kind, tiny_clip) for name, kind in kinds.items()}}


@pytest.fixture(scope="package")
def scenes():
    return load_dataset("openmoji/tools", "test", n_images=36, half="base")


@pytest.fixture(scope="package")
def compared(tiny_clip, tiny_sae, scenes, models):
    kinds = ("itself", "maple", "coop")
    return {name: compare_models(tiny_clip, models[name], tiny_sae, scenes, -2, progress=False) for name in kinds}
