"""The steering panel: sliders for a few latents of one image, and what the network then says.

The sliders are a trait, ``panel.edits``: with every change one tail of the network runs; the network up to the hook runs once per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import traitlets as t
from torch import Tensor

from ..interventions.steering import Edit, Steered, steer
from ..run.intervals import mean_interval
from .cards import encode_heats, encode_picture, reference_message
from .widgets import SelectionError, _ImageView, module

OPERATIONS = ("scale", "add")
WHERE = ("all", "cls", "patches", "selected")
N_CLASSES = 6  # classes with bars: the most probable ones before and after
N_SLIDERS = 5  # unless latents are given
N_BATCH = 10  # other images that the page asks for at once
MOST = 1e6  # of an edit's value: far beyond, float32 ends, and probabilities are no numbers


class BatchCard(NamedTuple):
    """What the same edits do to other images. The followed class is the image's own, or, without a label, the one predicted before."""

    images: list[int]
    labels: list[str]  # [n] their followed classes
    before: np.ndarray  # [n] probability of the followed class
    after: np.ndarray
    kept: np.ndarray  # [n, 2] whether it is predicted, before and after
    pictures: list[np.ndarray]
    heats: np.ndarray  # [n, H, W] the chosen latent, as edited

    @property
    def values(self) -> list[str]:
        return [f"{before:.0%} → {after:.0%}" for before, after in zip(self.before, self.after, strict=True)]


class SteeringPanel(_ImageView):
    """Steer one image by a few latents, and see the class probabilities before and after.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model.
    sae : SparseAutoencoder
    dataset : data set of ``Example``
        Whose images are shown.
    names, layer
        As for :class:`LatentExplorer`.
    head : Tensor [C, d_embed], optional
        By default from the data set's class names and templates.
    latents : sequence of int, optional
        Those with sliders. By default, and whenever the image changes, the ones to which the predicted class owes most in this image
        (gradient times activation).
    **traits
        First choices: ``image``, ``edits``, ``where``, ``patches``, ``batch``, ``latent``, ``tau``, ``opacity``, ``mode``.
    """

    CHOICES = ("image", "latents", "latent", "patches", "where", "edits", "batch")  # another image takes edits and patches back
    TAKES = "clip, sae, dataset, names"
    IN_TURN = True

    _esm = module("steering.js")

    latents = t.List(t.Int(), help="The latents with sliders.").tag(sync=True)
    edits = t.List(t.Dict(), help='One a slider that was moved: {"latent": 3, "op": "scale" or "add", "value": 0.0}.').tag(sync=True)
    where = t.Enum(WHERE, WHERE[0], help="The tokens that all edits act on.").tag(sync=True)
    patches = t.List(t.Int(), help="Selected patches, counted row by row.").tag(sync=True)
    batch = t.List(t.Int(), help="Other images that the same edits act on.").tag(sync=True)
    others = t.Dict(help="What the network says of these.").tag(sync=True)

    def __init__(
        self, clip: Any, sae: Any, dataset: Any, names: Any = None, layer: int = -2, *, head: Tensor | None = None,
        latents: Sequence[int] | None = None, **traits: Any,
    ):  # fmt: skip
        self._ready = False
        super().__init__(clip, sae, None, dataset, names, layer, kind="steering", **{"mode": "heat", **traits})
        self._head = self._reader.head if head is None else head
        if self._head is None:
            raise ValueError("Without a text tower, or classes, there is nothing to say of an image: give head=.")
        if len(self._head) != len(dataset.class_names):
            raise ValueError(f"head must have a row for each of the {len(dataset.class_names)} classes, got {len(self._head)}.")
        self._own = latents is not None
        self.latents = self._known(latents) if self._own else self._suggested()
        self._ready, self._seen = True, self._shown_image
        self._show()
        self.observe(self._new_image, ["image", "uploaded"])
        self.observe(self._new_latents, "latents")
        self.observe(lambda _: self._show(), ["edits", "where", "patches", "latent", "batch"])

    @t.validate("latents")
    def _check_latents(self, proposal: Any) -> list[int]:
        return self._known(proposal["value"])

    @t.validate("edits")
    def _check_edits(self, proposal: Any) -> list[dict[str, Any]]:
        edits: dict[int, dict[str, Any]] = {}
        for edit in proposal["value"]:
            if not isinstance(edit, Mapping) or set(edit) != {"latent", "op", "value"} or edit["op"] not in OPERATIONS:
                known = " or ".join(map(repr, OPERATIONS))
                raise SelectionError(f'An edit is {{"latent": number, "op": {known}, "value": number}}, got {edit!r}.')
            latent, op, value = self._known([edit["latent"]])[0], edit["op"], edit["value"]
            if not isinstance(value, int | float) or not abs(value) <= MOST or (op == "scale" and value < 0):
                raise SelectionError(f"{op!r} takes a finite number up to {MOST:g}{', 0 or more' if op == 'scale' else ''}; got {value!r}.")
            edits[latent] = {"latent": latent, "op": op, "value": float(value)}
        return list(edits.values())

    @t.validate("batch")
    def _check_batch(self, proposal: Any) -> list[int]:
        return [self._within("image", image, self.n_images) for image in dict.fromkeys(proposal["value"]) if image >= 0]

    def to_edits(self) -> list[Edit]:
        """The sliders' edits, for :func:`~patchsae_utils.interventions.steering.steer`."""
        places: str | list[int] | None = list(self.patches) if self.where == "selected" else None if self.where == "all" else self.where
        return [Edit(edit["latent"], edit["op"], edit["value"], places) for edit in self.edits]

    @property
    def code(self) -> str:
        """The edit as a line of Python; a picture of one's own is called ``picture`` in it."""
        places = {"all": "", "cls": ', "cls"', "patches": ', "patches"', "selected": f", {list(self.patches)}"}[self.where]
        edits = ", ".join(f'ps.Edit({e["latent"]}, "{e["op"]}", {e["value"]:.4g}{places})' for e in self.edits)
        picture = "picture" if self.uploaded else f"dataset[{self.image}].image"
        return f"ps.steer(clip, sae, clip.preprocess({picture})[None], [{edits}], layer={self._reader.layer}, head=head)"

    @property
    def steered(self) -> Steered:
        """What the network says, before and after."""
        return self._steer([self._shown_image])

    def _steer(self, images: list[int]) -> Steered:
        reader, edits = self._reader, self.to_edits()
        known = torch.stack([reader.activations(images, edit.latent) for edit in edits], -1) if edits else None  # one edit a latent
        return steer(reader.clip, reader.sae, reader.residual(images), edits, reader.layer, self._head, known=known, tail=reader.tail)

    def _heats(self, images: list[int], steered: Steered) -> np.ndarray:
        """The chosen latent over images, as edited: [B, H, W]."""
        edited = [edit["latent"] for edit in self.edits]
        if self.latent in edited:
            return steered.activations[:, 1:, edited.index(self.latent)].float().cpu().numpy().reshape(-1, *self.grid)
        return self._reader.heats(images, self.latent) if self.latent >= 0 else np.zeros((len(images), *self.grid), np.float32)

    def _on_batch(self, content: Mapping, buffers: list) -> None:
        """More images, spread over those of the shown one's class or over all, for the same edits."""
        labels = np.asarray(self.dataset.labels)
        among = np.flatnonzero(labels == labels[self.image]) if content["of"] == "class" else np.arange(len(labels))
        among = among[among != self.image] if content["of"] else among[:0]
        self.batch = np.unique(among[np.linspace(0, max(len(among) - 1, 0), min(N_BATCH, len(among))).astype(int)]).tolist()

    def _on_add_here(self, content: Mapping, buffers: list) -> None:
        """A slider for the latent that is strongest on the selected patches (without any: in the image) and has none yet."""
        h = self._reader.latents(self._shown_image)
        values = h[[1 + patch for patch in self.patches] or slice(None)].mean(0)
        values[self.latents] = 0
        if not values.any():
            raise SelectionError("No other latent is active there.")
        self.latents, self.latent = [*self.latents, int(values.argmax())], int(values.argmax())

    @property
    def card(self) -> dict[str, Any]:
        """What is shown, as plain values: picture, heat, sliders (a dict each), bars (class, before, after), code."""
        image, steered = self._shown_image, self.steered
        h = self._reader.latents(image)
        before, after = steered.probabilities_before[0].cpu().numpy(), steered.probabilities[0].cpu().numpy()
        first, then = (np.argsort(-p, kind="stable").tolist() for p in (before, after))
        top = list(dict.fromkeys(first[: N_CLASSES // 2] + then[:N_CLASSES]))[:N_CLASSES]
        top = sorted(top, key=lambda c: -max(before[c], after[c]))
        edits, usual = {edit["latent"]: edit for edit in self.edits}, float(h.max()) / 4
        sliders = [{
            "latent": latent, "name": str(self._names.get(latent) or ""), "op": "scale", "value": 1.0, **edits.get(latent, {}),
            "edited": latent in edits, "most": float(h[1:, latent].max()), "cls": float(h[0, latent]),
            "limit": max(float(h[:, latent].max()), usual, 1e-3),
        } for latent in self.latents]  # fmt: skip
        return {
            "image": self.image, "label": self._reader.label(image), "picture": self._reader.picture(image), "grid": self.grid,
            "uploaded": self.uploaded, "latent": self.latent, "name": str(self._names.get(self.latent) or ""), "where": self.where,
            "patches": list(self.patches),
            "heat": self._heats([image], steered)[0], "sliders": sliders, "edited": self.latent in edits,
            "bars": [(self.dataset.class_names[c], float(before[c]), float(after[c])) for c in top], "code": self.code,
        }  # fmt: skip

    @property
    def batch_card(self) -> BatchCard:
        """The same of the images of ``batch``, as arrays."""
        steered, names, labels = self._steer(self.batch), self.dataset.class_names, np.asarray(self.dataset.labels)[self.batch]
        before, after = (p.float().cpu().numpy() for p in (steered.probabilities_before, steered.probabilities))
        followed = np.where(labels >= 0, labels, before.argmax(1))
        rows = np.arange(len(followed))
        return BatchCard(
            self.batch, [names[c] for c in followed], before[rows, followed], after[rows, followed],
            np.stack([before.argmax(1) == followed, after.argmax(1) == followed], 1), [self._reader.picture(i) for i in self.batch],
            self._heats(self.batch, steered),
        )  # fmt: skip

    def _suggested(self) -> list[int]:
        scores = self._reader.owed(self._shown_image, head=self._head)[0].sum(0)
        top = scores.topk(min(N_SLIDERS, len(scores)))
        return [int(i) for i, score in zip(top.indices, top.values, strict=True) if score > 0] or top.indices[:1].tolist()

    def _new_image(self, _: Any) -> None:
        if self._seen == self._shown_image:
            return
        self._ready, self._seen = False, self._shown_image  # one picture for all that changes
        self.edits, self.patches = [], []
        if not self._own:
            self.latents = self._suggested()
        self._ready = True
        self._show()

    def _new_latents(self, _: Any) -> None:
        if self._ready:
            self._own = True
            self.edits = [edit for edit in self.edits if edit["latent"] in self.latents]
            self._show()

    def _show(self) -> None:
        if self._ready:
            self.shown = steering_message(self.card)
            self.others = batch_message(self.batch_card) if self.batch else {}


def steering_message(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card as the page wants it: JPEG bytes, one byte a patch, texts."""
    heat, scale = encode_heats(card["heat"][None])
    plain = {name: card[name] for name in ("image", "uploaded", "label", "latent", "name", "where", "patches", "sliders", "edited", "code")}
    return plain | {"jpeg": encode_picture(card["picture"]), "heat": heat, "scale": scale, "bars": [list(bar) for bar in card["bars"]]}


def batch_message(card: BatchCard) -> dict[str, Any]:
    """The same of a batch."""
    change = mean_interval(100 * (card.after - card.before), "images")
    before, after = card.kept.sum(0)
    note = f"Probability of the images' classes: {change.value:+.0f} points on average [{change.low:+.0f}, {change.high:+.0f}]; "
    return reference_message(card, own=False) | {"note": f"{note}predicted in {before} of {len(card.images)} before, in {after} now."}
