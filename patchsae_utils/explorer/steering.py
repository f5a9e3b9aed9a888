"""The steering panel: sliders for a few latents of one image, and what the network then says.

The sliders are a trait, ``panel.edits``: with every change one tail of the network runs; the network up to the hook runs once per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import traitlets as t
from torch import Tensor

from ..interventions.attribution import image_attribution
from ..interventions.steering import Edit, Steered, steer
from ..interventions.tail import dataset_head
from .cards import encode_heats, encode_picture
from .widgets import SelectionError, _View, module

OPERATIONS = ("scale", "add")
WHERE = ("all", "cls", "patches", "selected")
N_CLASSES = 6  # classes with bars: the most probable ones before and after


class SteeringPanel(_View):
    """Steer one image by a few latents, and see the class probabilities before and after.

    Each choice is a trait with a ``help``: set it in Python or in the page.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model.
    sae : SparseAutoencoder
    dataset : data set of ``Example``
        Whose images are shown.
    names : DataFrame, mapping or sequence, optional
        Names of latents, such as ``label_latents`` returns.
    layer : int
    head : Tensor [C, d_embed], optional
        By default from the data set's class names and templates.
    latents : sequence of int, optional
        Those with sliders. By default, and whenever the image changes, the ones to which the predicted class owes most in this image
        (gradient times activation), ``n_sliders`` of them.
    n_sliders : int
    **traits
        First choices: ``image``, ``edits``, ``where``, ``patches``, ``latent``, ``tau``, ``opacity``, ``mode``.
    """

    CHOICES = ("image", "latents", "latent", "patches", "where", "edits")  # another image takes edits and patches back
    TAKES = "clip, sae, dataset, names"
    IN_TURN = True

    _esm = module("steering.js")

    latents = t.List(t.Int(), help="The latents with sliders.").tag(sync=True)
    edits = t.List(t.Dict(), help='One a slider that was moved: {"latent": 3, "op": "scale" or "add", "value": 0.0}.').tag(sync=True)
    where = t.Enum(WHERE, WHERE[0], help="The tokens that all edits act on.").tag(sync=True)
    patches = t.List(t.Int(), help="Selected patches, counted row by row.").tag(sync=True)
    n_images = t.Int().tag(sync=True)

    def __init__(
        self, clip: Any, sae: Any, dataset: Any, names: Any = None, layer: int = -2, *, head: Tensor | None = None,
        latents: Sequence[int] | None = None, n_sliders: int = 5, **traits: Any,
    ):  # fmt: skip
        if len(dataset) == 0:
            raise ValueError(f"{dataset.spec!r} ({dataset.split}) holds no images.")
        if not 1 <= n_sliders <= 20:
            raise ValueError(f"n_sliders must lie between 1 and 20, got {n_sliders}.")
        self._ready = False
        super().__init__(clip, sae, None, dataset, names, layer, kind="steering", n_images=len(dataset), **{"mode": "heat", **traits})
        self._head = dataset_head(clip, dataset) if head is None else head
        if len(self._head) != len(dataset.class_names):
            raise ValueError(f"head must have a row for each of the {len(dataset.class_names)} classes, got {len(self._head)}.")
        self._n_sliders, self._own = n_sliders, latents is not None
        self._read: tuple[int, Any, Tensor] | None = None
        self.image = max(0, self.image)
        self.latents = self._check(latents) if self._own else self._suggested()
        self._ready = True
        self._show()
        self.observe(self._new_image, "image")
        self.observe(self._new_latents, "latents")
        self.observe(lambda _: self._show(), ["edits", "where", "patches", "latent"])

    @t.validate("latents")
    def _check_latents(self, proposal: Any) -> list[int]:
        return self._check(proposal["value"])

    @t.validate("edits")
    def _check_edits(self, proposal: Any) -> list[dict[str, Any]]:
        edits: dict[int, dict[str, Any]] = {}
        for edit in proposal["value"]:
            if not isinstance(edit, Mapping) or set(edit) != {"latent", "op", "value"} or edit["op"] not in OPERATIONS:
                known = " or ".join(map(repr, OPERATIONS))
                raise SelectionError(f'An edit is {{"latent": number, "op": {known}, "value": number}}, got {edit!r}.')
            latent, op, value = self._check([edit["latent"]])[0], edit["op"], edit["value"]
            if not isinstance(value, int | float) or not np.isfinite(value) or (op == "scale" and value < 0):
                raise SelectionError(f"The value of {op!r} must be a finite number{', 0 or more' if op == 'scale' else ''}; got {value!r}.")
            edits[latent] = {"latent": latent, "op": op, "value": float(value)}
        return list(edits.values())

    def _check(self, latents: Sequence[int]) -> list[int]:
        for latent in latents:
            if not isinstance(latent, int | np.integer) or not 0 <= latent < self._reader.d_sae:
                raise SelectionError(f"There is no latent {latent!r}; valid are 0 to {self._reader.d_sae - 1}.")
        return list(dict.fromkeys(int(latent) for latent in latents))

    def to_edits(self) -> list[Edit]:
        """The sliders' edits, for :func:`~patchsae_utils.interventions.steering.steer`."""
        places: str | list[int] | None = list(self.patches) if self.where == "selected" else None if self.where == "all" else self.where
        return [Edit(edit["latent"], edit["op"], edit["value"], places) for edit in self.edits]

    @property
    def code(self) -> str:
        """The edit as a line of Python."""
        places = {"all": "", "cls": ', "cls"', "patches": ', "patches"', "selected": f", {list(self.patches)}"}[self.where]
        edits = ", ".join(f'ps.Edit({e["latent"]}, "{e["op"]}", {e["value"]:.4g}{places})' for e in self.edits)
        return f"ps.steer(clip, sae, clip.preprocess(dataset[{self.image}].image)[None], [{edits}], layer={self._reader.layer}, head=head)"

    @property
    def steered(self) -> Steered:
        """What the network says, before and after."""
        return steer(self._reader.clip, self._reader.sae, self._reading()[0], self.to_edits(), self._reader.layer, self._head)

    def _on_add_here(self, content: Mapping, buffers: list) -> None:
        """A slider for the latent that is strongest on the selected patches (without any: in the image) and has none yet."""
        h = self._reading()[1]
        values = h[[1 + patch for patch in self.patches] or slice(None)].mean(0)
        values[self.latents] = 0
        if not values.any():
            raise SelectionError("No other latent is active there.")
        self.latents, self.latent = [*self.latents, int(values.argmax())], int(values.argmax())

    def reset(self) -> None:
        """Take all edits back, and the selected patches; edits then act on all tokens again if they acted on selected ones."""
        with self.hold_trait_notifications():
            self.edits, self.patches = [], []
            self.where = "all" if self.where == "selected" else self.where

    @property
    def card(self) -> dict[str, Any]:
        """What is shown, as plain values: picture, heat, sliders (a dict each), bars (class, before, after), code."""
        h, steered = self._reading()[1], self.steered
        before, after = steered.probabilities_before[0].cpu().numpy(), steered.probabilities[0].cpu().numpy()
        first, then = (np.argsort(-p, kind="stable").tolist() for p in (before, after))
        top = list(dict.fromkeys(first[: N_CLASSES // 2] + then[:N_CLASSES]))[:N_CLASSES]
        top = sorted(top, key=lambda c: -max(before[c], after[c]))
        edits = {edit["latent"]: edit for edit in self.edits}
        heat = h[1:, self.latent] if self.latent >= 0 else torch.zeros(len(h) - 1)
        if self.latent in edits:  # the heat map shows the edited state
            heat = steered.activations[0, 1:, list(edits).index(self.latent)].float().cpu()
        sliders = [{
            "latent": latent, "name": str(self._names.get(latent) or ""), "op": "scale", "value": 1.0, **edits.get(latent, {}),
            "edited": latent in edits, "most": float(h[1:, latent].max()), "cls": float(h[0, latent]),
            "limit": max(float(h[:, latent].max()), float(h.max()) / 4, 1e-3),
        } for latent in self.latents]  # fmt: skip
        return {
            "image": self.image, "label": self._reader.label(self.image), "picture": self._reader.picture(self.image), "grid": self.grid,
            "latent": self.latent, "name": str(self._names.get(self.latent) or ""), "where": self.where, "patches": list(self.patches),
            "heat": heat.numpy().reshape(self.grid), "sliders": sliders, "edited": self.latent in edits,
            "bars": [(self.dataset.class_names[c], float(before[c]), float(after[c])) for c in top], "code": self.code,
        }  # fmt: skip

    def _reading(self) -> tuple[Any, Tensor]:
        """The shown image's residual stream and its latents [1 + P, S]; kept until another image is shown."""
        if self._read is None or self._read[0] != self.image:
            reader = self._reader
            with torch.no_grad():
                residual = reader.clip.run_to(reader.inputs([self.image]), reader.layer)
                self._read = (self.image, residual, reader.sae.encode(residual.tokens)[0].float().cpu())
        return self._read[1:]

    def _suggested(self) -> list[int]:
        residual, h = self._reading()
        scores = image_attribution(self._reader.clip, self._reader.sae, residual, self._head, layer=self._reader.layer, h=h[None])[0]
        top = scores.topk(min(self._n_sliders, len(scores)))
        return [int(i) for i, score in zip(top.indices, top.values, strict=True) if score > 0] or top.indices[:1].tolist()

    def _new_image(self, _: Any) -> None:
        self._ready = False  # one picture for all that changes
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


def steering_message(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card as the page wants it: JPEG bytes, one byte a patch, texts."""
    heat, scale = encode_heats(card["heat"][None])
    plain = {name: card[name] for name in ("image", "label", "latent", "name", "where", "patches", "sliders", "edited", "code")}
    return plain | {"jpeg": encode_picture(card["picture"]), "heat": heat, "scale": scale, "bars": [list(bar) for bar in card["bars"]]}
