"""CLIP, and adapters of every kind whose prompts are loud enough to matter."""

import pytest
from tiny import loud

from patchsae_utils.adaptation.prompts import CoOp, MaPLe, VisualPrompt


@pytest.fixture(scope="package")
def models(tiny_clip):
    kinds = {"maple": MaPLe, "coop": CoOp, "vpt": VisualPrompt}
    return {"itself": tiny_clip, **{name: loud(kind, tiny_clip) for name, kind in kinds.items()}}
