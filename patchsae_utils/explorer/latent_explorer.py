"""The latent explorer: one latent after the other, with its statistics, classes, reference images and nearest latents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import traitlets as t

from ..data import templates_for
from ..run.artifacts import atomic_file, folder_lock
from .cards import (
    ORDERS,
    EffectCard,
    LatentCard,
    Name,
    PlaceCard,
    effect_card,
    first_sight,
    latent_card,
    living,
    place_card,
    reference_message,
)
from .reader import EDGES, Reader
from .search import TextSearch
from .widgets import SelectionError, _View, encode_names, measures_of, module

# Sort orders beyond a summary's, the largest first: how alike a latent's images are, and how well its name fits.
MEASURES = ("monosemanticity", "score")
NOTES = ("latent", "star", "name", "note")  # columns of the file of one's own words


class LatentExplorer(_View):
    """Look through an SAE's latents: statistics, reference images with heat maps, classes.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
        Trained on ``clip``'s residual stream after ``layer``.
    summary : LatentSummary
    dataset : data set of ``Example``
        The one that ``summary`` was made from.
    names : DataFrame, mapping or sequence, optional
        Names of latents, such as ``label_latents`` returns.
    layer : int
    likeness : Likeness, optional
        Of the same SAE and images, as ``ps.stages.latent_likeness`` opens it: latents can then be sorted by monosemanticity, and the box finds
        them by words ("red wheel") whether or not they have names.
    elsewhere : mapping, optional
        Name -> another data set, or a pair of another model and a data set: where the same latent's strongest images are shown as well, such as
        ``{"line drawings": lines, "MaPLe": (adapted, dataset)}``.
    notes : path, optional
        CSV of one's own stars, names and notes: read if it is there, written with every change. ``pandas.read_csv`` of it can be given as ``names``.
    **traits
        First choices: ``latent``, ``image``, ``sort``, ``tau``, ``opacity``, ``mode``, ``contour``.
    """

    _esm = module("latent.js")

    sort = t.Enum((*ORDERS, *MEASURES), "frequency", help="Order of the slider, which runs over living latents.").tag(sync=True)
    sorts = t.List(t.Unicode(), help="The orders that there are data for.").tag(sync=True)
    order = t.Bytes(help="uint32: living latents in the slider's order.").tag(sync=True)
    ahead = t.Dict(help="A card that a next step would show: the page keeps it, and needs no answer then.").tag(sync=True)
    searches = t.Bool(help="Whether latents can be found by words that are no names.").tag(sync=True)
    hits = t.Dict(help="What was asked last, and the latents that fit it best: number, name, score.").tag(sync=True)
    effect = t.Dict(help="What a latent does, once the page has asked.").tag(sync=True)
    places = t.List(t.Unicode(), help="The names of ``elsewhere``.").tag(sync=True)
    place = t.Dict(help="The latent in one of these, once the page has asked.").tag(sync=True)
    kept = t.Dict(help="One's own words: latent, as text -> star, name, note.").tag(sync=True)
    points = t.Bytes(help="Two bytes per latent, log frequency and log mean activation, 1 to 255; 0 0 for dead latents.").tag(sync=True)

    def __init__(
        self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, *, likeness: Any = None,
        elsewhere: Mapping[str, Any] | None = None, notes: str | Path | None = None, **traits: Any,
    ):  # fmt: skip
        self._measures: dict[str, np.ndarray] | None = None  # known once there are names
        super().__init__(clip, sae, summary, dataset, names, layer, kind="latent", points=scatter_points(summary), **traits)
        pairs = {name: value if isinstance(value, tuple) else (clip, value) for name, value in (elsewhere or {}).items()}
        self._elsewhere = {name: Reader.shared(model, sae, data, layer) for name, (model, data) in pairs.items()}
        self.places = list(self._elsewhere)
        self._notes, self._given = None if notes is None else Path(notes), self._names
        if self._notes is not None and self._notes.exists():
            self._take(read_notes(self._notes, self._reader.d_sae))
        self._measures = measures_of(self._names, likeness, self._reader.d_sae)
        searches = likeness is not None and clip.has_text
        self._find = TextSearch.shared(clip, summary, likeness.embeddings, templates_for(dataset.spec)) if searches else None
        self.searches = searches
        self.sorts = [*ORDERS, *self._measures]
        self._check_known(self.sort)
        self._sort()
        if self.latent < 0:
            self.latent = first_sight(summary, self._names)
            if self.image < 0 and self.card is not None and len(self.card.images):
                self.image = int(self.card.images[0])  # linked views show the latent, too
        self._show()
        self.observe(lambda _: self._sort(), "sort")
        self.observe(lambda _: self._show(), "latent")

    @property
    def card(self) -> LatentCard | None:
        """What is shown, as arrays; None when no latent is chosen."""
        return None if self.latent < 0 else self._card_of(self.latent)

    @property
    def does(self) -> EffectCard | None:
        """What the latent does beyond its strongest images, as arrays; the first one reads a sample of the data set."""
        return None if self.latent < 0 else effect_card(self._reader, self._summary, self.latent)

    @property
    def elsewhere(self) -> dict[str, PlaceCard]:
        """The latent in the other data sets and models; the first one reads a sample of each."""
        return {name: place_card(reader, self._reader, self.latent) for name, reader in self._elsewhere.items() if self.latent >= 0}

    def find(self, text: str) -> list[tuple[int, float]]:
        """The latents whose reference images look most like any words, and how far above the mean latent, in standard deviations."""
        if self._find is None:
            raise SelectionError("Finding latents by words needs likeness=, and a model with a text tower.")
        return self._find(text)

    def keep(self, latent: int, **words: Any) -> None:
        """Keep ``star`` (bool), ``name`` (which replaces the latent's in this view) or ``note``, and write them to the file of ``notes``."""
        (latent,), notes = self._known([latent]), self._notes
        with contextlib.nullcontext() if notes is None else folder_lock(notes.parent, wait=True):
            written = notes is not None and notes.exists()  # by others, too
            kept = read_notes(notes, self._reader.d_sae) if written else self.kept
            row: dict[str, Any] = {"star": False, "name": "", "note": "", **kept.get(str(latent), {})}
            row |= {name: value for name, value in words.items() if name in row}
            name, note = (str(row[word]).encode(errors="replace").decode() for word in ("name", "note"))  # a page may send half a character
            kept = {**kept, str(latent): {"star": bool(row["star"]), "name": " ".join(name.split())[:80], "note": note.strip()[:2000]}}
            if notes is not None:
                table = pd.DataFrame([{"latent": int(latent), **row} for latent, row in kept.items()], columns=list(NOTES))
                with atomic_file(notes) as temporary:
                    table.sort_values("latent").to_csv(temporary, index=False)
        self._take(kept)
        self._show()

    def _take(self, kept: dict[str, dict[str, Any]]) -> None:
        """One's own words; a name of one's own stands before the one that was given."""
        self.kept = kept
        self._names = self._given | {int(latent): Name(row["name"]) for latent, row in kept.items() if row["name"]}
        self.names = encode_names(self._names)

    def _look(self) -> dict[str, Any]:
        return super()._look() | {"summary": self._summary}

    @t.validate("sort")
    def _check_sort(self, proposal: Any) -> str:
        return self._check_known(proposal["value"])

    def _check_known(self, sort: str) -> str:
        if self._measures is not None and sort not in ORDERS and sort not in self._measures:
            needs = "likeness=" if sort == "monosemanticity" else "names with scores, as label_latents gives them"
            raise SelectionError(f"Latents can't be sorted by {sort!r}: this explorer was made without {needs}.")
        return sort

    def _card_of(self, latent: int) -> LatentCard:
        return latent_card(self._reader, self._summary, latent, self._names, monosemanticity=self._measures.get("monosemanticity"))

    def _sort(self) -> None:
        self.order = living(self._summary, self.sort, self._measures).astype(np.uint32).tobytes()

    def _show(self) -> None:
        self.shown = latent_message(self.card, self._names)

    def _on_keep(self, content: Mapping, buffers: list) -> None:
        self.keep(**{name: value for name, value in content.items() if name in NOTES})

    def _on_find(self, content: Mapping, buffers: list) -> None:
        found = self.find(content["text"])
        self.hits = {"text": content["text"], "latents": [[i, str(self._names.get(i) or ""), score] for i, score in found]}

    def _on_does(self, content: Mapping, buffers: list) -> None:
        (latent,) = self._known([content["latent"]])
        self.effect = effect_message(effect_card(self._reader, self._summary, latent), self._names)

    def _on_elsewhere(self, content: Mapping, buffers: list) -> None:
        (latent,), reader = self._known([content["latent"]]), self._elsewhere[content["place"]]
        card = place_card(reader, self._reader, latent)
        said = "" if card.correlation is None else f" Image by image, as here: r = {card.correlation:.2f}."
        message = reference_message(card, own=reader.dataset is self.dataset)
        note = f"Active in {card.n_active} of {card.n_images} sampled images.{said}"
        self.place = message | {"latent": latent, "place": content["place"], "note": note}

    def _on_prefetch(self, content: Mapping, buffers: list) -> None:
        """The page is idle: look up what a next step would show. One at a time, so that a click meanwhile waits for no other."""
        self.ahead = latent_message(self._card_of(*self._known([content["latent"]])), self._names)


def read_notes(path: Path, d_sae: int) -> dict[str, dict[str, Any]]:
    """What :meth:`LatentExplorer.keep` wrote: latent, as text -> star, name, note; each of these may be missing."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        latents, table = table["latent"].astype(float), table.reindex(columns=list(NOTES), fill_value="")
        if not latents.between(0, d_sae - 1).all() or (latents % 1).any():
            raise ValueError(f"there are latents 0 to {d_sae - 1}")
    except Exception as error:  # whatever pandas makes of a damaged file
        raise ValueError(f"{path} holds no notes, columns {', '.join(NOTES)}: {error}. Mend it, or name another file.") from error
    rows = zip(latents.astype(int), table["star"].str.lower().isin(["true", "1", "1.0"]), table["name"], table["note"], strict=True)
    return {str(latent): {"star": bool(star), "name": name, "note": note} for latent, star, name, note in rows}


def latent_message(card: LatentCard | None, names: Mapping[int, Name]) -> dict[str, Any]:
    """A card as the page wants it: texts, JPEG bytes, one byte a patch. ``names`` are for its nearest latents."""
    if card is None:
        return {"latent": -1, "name": "", "facts": [], "classes": [], "neighbors": [], **reference_message(None)}
    return {
        "latent": card.latent, "name": str(card.name or ""), "facts": latent_facts(card), **reference_message(card),
        "classes": [[name, share] for name, share in card.classes],
        "neighbors": [[latent, str(names.get(latent) or ""), cosine] for latent, cosine in card.neighbors],
    }  # fmt: skip


def effect_message(card: EffectCard, names: Mapping[int, Name]) -> dict[str, Any]:
    """The same of what a latent does."""
    said = f"Active in {card.n_active} of {card.n_images} sampled images."
    return {
        "latent": card.latent, "counts": card.counts.tolist(), "edges": EDGES.tolist(), **reference_message(card), "note": said,
        "pushes": [[name, *found[:3]] for name, found in card.pushes],
        "together": [[latent, str(names.get(latent) or ""), r] for latent, r in card.together],
    }  # fmt: skip


def latent_facts(card: LatentCard) -> list[list[str]]:
    """A latent's statistics as pairs of texts."""
    if card.dead:
        return [["State", "dead: active in no image"]]
    facts = [] if card.name is None or card.name.score is None else [["Score of its name", f"{card.name.score:.2f}"]]
    facts += [["Active in", f"{100 * card.frequency:.3g}% of images"], ["Mean activation", f"{card.mean_activation:.3g}"]]
    if not np.isnan(card.label_entropy):
        facts += [["Label entropy", f"{card.label_entropy:.2f} nats"], ["Label std", f"{card.label_std:.1f}"]]
    return facts + ([] if card.monosemanticity is None else [["Monosemanticity", f"{card.monosemanticity:.2f}"]])


def scatter_points(summary: Any) -> bytes:
    """Where latents lie in the scatter of log frequency (x) and log mean activation (y): two bytes each, 1 to 255; 0 0 for the dead."""
    dead = np.asarray(summary.dead)
    points = np.zeros((len(dead), 2), np.uint8)
    for axis, values in enumerate((summary.frequency, summary.mean_activation)):
        alive = np.log10(np.maximum(np.asarray(values)[~dead].astype(float), 1e-9))
        if len(alive):
            low, high = alive.min(), alive.max()
            points[~dead, axis] = np.round(1 + 254 * (alive - low) / max(high - low, 1e-9))
    return points.tobytes()
