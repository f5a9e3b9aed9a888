"""Latents found by words and by marked patches, where the truth was planted; the box in the page."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_utils.data import templates_for
from patchsae_utils.explorer import LatentExplorer
from patchsae_utils.explorer.search import TextSearch

WORDS = ("red wheel", "blue bird", "green leaf")


@pytest.fixture(scope="module")
def likeness(tiny_clip, tiny_dataset, summary):
    """Embeddings in which the reference images of latents 3, 9 and 20 look like one text each, beside what all images share."""
    rng = np.random.default_rng(0)
    texts = tiny_clip.zero_shot_head(WORDS, templates_for(tiny_dataset.spec)).cpu().double().numpy()
    inverse = np.linalg.pinv(texts)  # column w answers to text w alone
    shared = rng.standard_normal(16) + 0.3 * rng.standard_normal((24, 16))
    shared -= shared @ inverse @ texts
    shared[:18] += np.repeat(inverse.T, 6, 0) * 5 / np.linalg.norm(inverse)
    table = pd.DataFrame({"dictionary": "SAE", "latent": range(64), "score": np.linspace(0, 1, 64)})
    embeddings = torch.from_numpy(shared / np.linalg.norm(shared, axis=1, keepdims=True)).float()
    return SimpleNamespace(table=table, embeddings=embeddings)


@pytest.fixture(scope="module")
def planted(summary):
    tops = summary.top_images.clone()
    for place, latent in enumerate((3, 9, 20)):
        tops[latent] = torch.arange(6 * place, 6 * place + 6)
    tops[20, 4:] = -1
    dead = torch.zeros_like(summary.dead)
    dead[5] = True
    tops[5] = tops[3]  # would be as good, but is dead
    return dataclasses.replace(summary, top_images=tops, dead=dead)


def test_words_find_the_latents_whose_images_look_like_them(tiny_clip, tiny_dataset, planted, likeness):
    templates = templates_for(tiny_dataset.spec)
    search = TextSearch(tiny_clip, planted, likeness.embeddings, templates)
    living = [latent for latent in range(64) if latent != 5]
    means = np.array([likeness.embeddings[[i for i in planted.top_images[s].tolist() if i >= 0]].double().mean(0).numpy() for s in living])
    for text, latent in zip(WORDS, (3, 9, 20), strict=True):
        scores = (means - means.mean(0)) @ tiny_clip.zero_shot_head([text], templates)[0].double().cpu().numpy()
        found = search(f"  {text} ", 4)
        assert found[0][0] == latent
        assert [score for _, score in found] == pytest.approx(np.sort(scores)[:-5:-1] / scores.std(), rel=1e-4)
        assert [scores[living.index(s)] / scores.std() for s, _ in found] == pytest.approx([score for _, score in found], rel=1e-4)
    assert search("   ") == []
    with pytest.raises(ValueError, match="embeddings of 9"):
        TextSearch(tiny_clip, planted, likeness.embeddings[:9], templates)


def test_page_finds_latents_by_words(show, tiny_clip, tiny_sae, planted, tiny_dataset, likeness, named):
    view = LatentExplorer(tiny_clip, tiny_sae, planted, tiny_dataset, named, likeness=likeness)
    page = show(view)
    page.fill("input[type=search]", "blue bird")
    page.wait_for_selector("[role=option]:has-text('looks like it')")
    assert page.locator("[role=option]").first.inner_text().startswith("9")
    page.keyboard.press("Enter")
    page.wait_for_selector("h3:has-text('Latent 9')")
    page.fill("input[type=search]", "red")  # names come first, and a latent once
    page.wait_for_selector("[role=option]:has-text('looks like it')")
    numbers = [text.split()[0] for text in page.locator("[role=option]").all_inner_texts()]
    assert numbers[:2] == ["3", "7"] and len(set(numbers)) == len(numbers)
    plain = LatentExplorer(tiny_clip, tiny_sae, planted, tiny_dataset, named)
    plain._receive({"kind": "find", "text": "blue bird"}, [])
    assert plain.hits == {} and not plain.searches
    with pytest.raises(ValueError, match="likeness="):
        plain.find("blue bird")
