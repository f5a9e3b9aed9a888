"""The two explorers of latents and of patches, over one summary, with names that a stranger may have chosen; their pages in Chromium."""

import copy

import pandas as pd
import pytest
import torch
from explorer_pages import BAD, browser, node_modules, show  # noqa: F401 (fixtures)

from patchsae_utils.adaptation.prompts import VisualPrompt
from patchsae_utils.explorer import AdaptationView, LatentExplorer, PatchExplorer, SteeringPanel


@pytest.fixture
def named():
    rows = [(3, "red", "color", 0.5), (5, BAD, "object", 0.4), (7, "redwood", "object", 0.9)]
    return pd.DataFrame(rows, columns=["latent", "name", "kind", "score"])


@pytest.fixture
def latents(tiny_clip, tiny_sae, summary, tiny_dataset, named):
    return LatentExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, named)


@pytest.fixture
def patches(tiny_clip, tiny_sae, summary, tiny_dataset, named):
    return PatchExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, named, image=0)


@pytest.fixture
def panel(tiny_clip, tiny_sae, tiny_dataset, head):
    return SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, {3: "a wheel", 5: BAD}, head=head, latents=[3, 5, 9])


@pytest.fixture
def adaptation(tiny_clip, tiny_sae, tiny_dataset, named, summary):
    other = copy.deepcopy(tiny_clip)  # differs more than a few prompts would make it
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other.visual.positional_embedding += 0.5 * torch.randn_like(other.visual.positional_embedding)
    adapters = {"tools": other, "more": VisualPrompt(tiny_clip, 2, 1, seed=1)}
    datasets = {task: tiny_dataset for task in adapters}
    return AdaptationView(tiny_clip, adapters, tiny_sae, named, summary=summary, datasets=datasets)
