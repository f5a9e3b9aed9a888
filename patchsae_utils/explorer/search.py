"""Latents found by words: CLIP's text tower is asked which latents' reference images look like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

MAX_LETTERS = 200


class TextSearch:
    """Finds latents whose reference images a text describes: ``search("red wheel")``.

    A latent's score is the dot product of the text's embedding with the mean embedding of its reference images, less the mean over living
    latents, in standard deviations over them. ``embeddings`` [N, d_embed] are unit image features of the images of ``summary``. The text stands
    in the shortest of the templates: in all eighty of ImageNet's it would take seconds.
    """

    _shared: WeakValueDictionary[tuple, TextSearch] = WeakValueDictionary()

    @classmethod
    def shared(cls, *parts: Any) -> TextSearch:
        """The one of these parts: 100 MB, at 49,152 latents."""
        return cls._shared.get(tuple(map(id, parts))) or cls._shared.setdefault(tuple(map(id, parts)), cls(*parts))

    def __init__(self, clip: Any, summary: Any, embeddings: Tensor, templates: Sequence[str]):
        if len(embeddings) != summary.n_images:
            n = len(embeddings)
            raise ValueError(f"The summary read {summary.n_images} images, and there are embeddings of {n}: give those of its data set.")
        self._parts = clip, summary, embeddings, templates  # held, so that no id is given again
        self.clip, self.templates = clip, [min(templates, key=len)]
        self.living = (~summary.dead).nonzero().flatten()
        images = summary.top_images[self.living]
        total = torch.zeros(len(images), embeddings.shape[1])
        for column in images.T:  # one after the other: there may be fifty thousand latents
            total += embeddings[column.clamp_min(0)].float() * (column >= 0)[:, None]
        means = total / (images >= 0).sum(1, keepdim=True).clamp_min(1)
        self.vectors = means - means.mean(0)

    @torch.no_grad()
    def __call__(self, text: str, n: int = 8) -> list[tuple[int, float]]:
        """The n latents that fit a text best, with their scores; none for an empty text."""
        if not (text := " ".join(text.split())[:MAX_LETTERS]) or not len(self.living):
            return []
        scores = self.vectors @ self.clip.zero_shot_head([text], self.templates)[0].float().cpu()
        top = (scores / scores.std(correction=0).clamp_min(1e-12)).topk(min(n, len(scores)))
        return [(int(self.living[i]), float(score)) for score, i in zip(*top, strict=True)]
