"""The patch explorer: point at a patch of an image, of the data set or your own, and ask for its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import traitlets as t
from torch import Tensor

from .cards import RANKS, LatentCard, PatchCard, distinctiveness, first_sight, latent_card, patch_card, patch_message, reference_message
from .widgets import SelectionError, _ImageView, module


class PatchExplorer(_ImageView):
    """Point at a patch of an image: its latents, the whole image's latents, and where a chosen latent is.

    Parameters
    ----------
    clip, sae, summary, dataset, names, layer
        As for :class:`LatentExplorer`. Without a summary (None), lists are sorted by activation only, and any data set will do.
    **traits
        First choices: ``image``, ``patch``, ``patches``, ``latent``, ``rank``, ``target``, ``tau``, ``opacity``, ``mode``, ``contour``.
    """

    CHOICES = (*_ImageView.LINKED, "rank", "target")
    _esm = module("patch.js")

    patch = t.Int(-1, help="The chosen patch, counted row by row; -1 for none.").tag(sync=True)
    patches = t.List(t.Int(), help="All chosen patches, sorted.").tag(sync=True)
    tops = t.Dict(help="The strongest latents of every patch.").tag(sync=True)
    found = t.Dict(help="The chosen latent's reference images.").tag(sync=True)
    rank = t.Enum(
        RANKS, RANKS[0], help="distinctive: activation times log(1 / frequency); contrast: here, not on the image's other patches; "
        "prediction: what the logit of `target` owes to a latent, of either sign.",
    ).tag(sync=True)  # fmt: skip
    ranks = t.List(t.Unicode(), help="Those that there are data for.").tag(sync=True)
    target = t.Int(-1, help="The class whose logit is explained; -1 for the predicted one.").tag(sync=True)
    classes = t.List(t.Unicode()).tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        self._last: tuple[Any, ...] | None = None
        self._explained: tuple[Any, Any] = (None, None)
        classes = list(dataset.class_names) if clip.has_text else []
        can = {"distinctive": summary is not None, "prediction": bool(classes)}
        ranks = [rank for rank in RANKS if can.get(rank, True)]
        first = summary is not None and not {"image", "patch", "patches", "latent"} & set(traits)
        super().__init__(clip, sae, summary, dataset, names, layer, kind="patch", classes=classes, ranks=ranks, **traits)
        if first:
            self.latent = first_sight(summary, self._names)  # at its strongest place, as in a LatentExplorer
            if (seen := self.references) is not None and len(seen.images):
                self.image, self.patch = int(seen.images[0]), int(seen.heats[0].argmax())
        self.patches = self.patches or ([self.patch] if self.patch >= 0 else [])
        self.patch = self.patch if self.patch in self.patches else self.patches[-1] if self.patches else -1
        self._show_tops()
        self._show()
        self._show_references()
        self.observe(self._one_patch, "patch")
        self.observe(self._many_patches, "patches")
        self.observe(lambda _: self._show_tops(), ["image", "uploaded", "rank", "target"])
        self.observe(lambda _: self._show(), ["image", "uploaded", "patch", "patches", "latent", "rank", "target"])
        self.observe(lambda _: self._show_references(), "latent")

    @t.validate("rank")
    def _check_rank(self, proposal: Any) -> str:
        if proposal["value"] == "distinctive" and self._summary is None:
            raise SelectionError("rank='distinctive' weighs by how many images a latent is active in: it needs a summary.")
        if proposal["value"] == "prediction" and not self.classes and self.ranks:
            raise SelectionError("rank='prediction' asks for the class in words: it needs a text tower and a data set with classes.")
        return proposal["value"]

    @t.validate("target")
    def _check_target(self, proposal: Any) -> int:
        return self._within("target", proposal["value"], len(self.classes))

    @property
    def card(self) -> PatchCard:
        """What is shown, as arrays."""
        tokens = "all" if self._summary is None else self._summary.tokens
        others = [patch for patch in self.patches if patch != self.patch]
        chosen = [*others, self.patch] if self.patch >= 0 else []
        return patch_card(self._reader, self._shown_image, chosen, self.latent, self._names, self._scores(chosen), tokens, self._signed)

    @property
    def prediction(self) -> tuple[str, float] | None:
        """The explained class and its probability in this image; None where lists are sorted otherwise."""
        _, probabilities, target = self._owed if self._signed else (None, None, -1)
        return None if probabilities is None else (self.classes[target], float(probabilities[target]))

    @property
    def references(self) -> LatentCard | None:
        """The chosen latent's own card, with five reference images; None without a latent or a summary."""
        known = self.latent >= 0 and self._summary is not None
        return latent_card(self._reader, self._summary, self.latent, self._names, k=5) if known else None

    @property
    def _signed(self) -> bool:
        return self.rank == "prediction"

    @property
    def _owed(self) -> tuple[Any, Any, int]:
        key = (self._shown_image, self.target)
        if self._explained[0] != key:
            self._explained = (key, self._reader.owed(*key))
        return self._explained[1]

    def _scores(self, patches: Sequence[int] = ()) -> Tensor:
        """What the lists are sorted by, for each token: [1 + P, S]."""
        h = self._reader.latents(self._shown_image)
        if self._signed:
            return self._owed[0]
        if self.rank == "contrast":
            elsewhere = [1 + patch for patch in range(len(h) - 1) if patch not in patches]
            return h - h[elsewhere].mean(0)
        return h * torch.from_numpy(distinctiveness(self._summary)) if self.rank == "distinctive" else h

    def _show(self) -> None:
        chosen = (self.image, self.uploaded, self._upload, self.patch, tuple(self.patches), self.latent, self.rank, self.target)
        if chosen == self._last:  # several traits change with one click: one card is enough
            return
        self._last = chosen
        said = "" if self.prediction is None else "{} ({:.0%}) owes to".format(*self.prediction)
        self.shown = {**patch_message(self.card, self._signed), "image": self.image, "uploaded": self.uploaded, "said": said}

    def _show_references(self) -> None:
        self.found = reference_message(self.references)

    def _show_tops(self) -> None:
        scores = self._scores()[1:]
        top = (scores.abs() if self._signed else scores).topk(min(8, scores.shape[1]), dim=1).indices
        values = (scores if self._signed else self._reader.latents(self._shown_image)[1:]).gather(1, top)
        self.tops = {"latents": top.numpy().astype(np.uint32).tobytes(), "values": values.numpy().tobytes(), "n": top.shape[1]}

    def _one_patch(self, change: Any) -> None:
        if self.patch not in self.patches:
            self.patches = [self.patch] if self.patch >= 0 else []

    def _many_patches(self, change: Any) -> None:
        if self.patch not in self.patches:
            self.patch = self.patches[-1] if self.patches else -1
