"""The explorers: widgets that join cards (what is shown) to the page (``explorer.js``, which draws it).

A choice is a trait: set ``explorer.latent = 12`` in Python, or move the slider; either way Python looks up one card and sends it.
A heat map costs one byte a patch and is coloured in the page, so that opacity and threshold need no Python at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets as t
from matplotlib.figure import Figure

from .cards import ORDERS, LatentCard, PatchCard, Reader, array, distinctiveness, latent_card, living, patch_card, read_names
from .render import MODES, encode_heats, encode_picture, palette

HERE = Path(__file__).parent
SHARED = ("latent", "image", "patch")
"""Choices that :func:`link` joins."""


class SelectionError(t.TraitError, ValueError):
    """A choice that does not exist. The widget keeps its last one."""


class _View(anywidget.AnyWidget):
    """What every explorer has: the choices that can be linked, and how heat maps look."""

    _esm = HERE / "explorer.js"
    _css = HERE / "explorer.css"

    kind = t.Unicode().tag(sync=True)
    latent = t.Int(-1, help="The chosen latent; -1 for none.").tag(sync=True)
    image = t.Int(-1, help="The chosen image, by its index in the data set; -1 for none.").tag(sync=True)
    tau = t.Float(0.2, help="Activations up to it are not shown.").tag(sync=True)
    opacity = t.Float(0.75, help="Of the heat map, in [0, 1].").tag(sync=True)
    mode = t.Enum(MODES, MODES[0], help="spotlight: the rest of the picture darkened; heat: colours over it.").tag(sync=True)
    grid = t.Tuple(t.Int(), t.Int()).tag(sync=True)
    n_latents = t.Int().tag(sync=True)
    has_summary = t.Bool().tag(sync=True)
    palette = t.Bytes().tag(sync=True)
    shown = t.Dict(help="The card that the page draws.").tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        if summary is not None and summary.n_images != len(dataset):
            raise ValueError(
                f"The summary was made from {summary.n_images} images, but {dataset.spec!r} ({dataset.split}) has {len(dataset)}. "
                f"Pass the data set that summarize_latents was given, so that its image indices mean the same."
            )
        self._reader = Reader(clip, sae, dataset, layer)
        self._names = read_names(names, self._reader.d_sae)
        self._summary = summary
        if summary is not None:
            traits.setdefault("tau", summary.tau)
        fixed = {"grid": self._reader.grid, "n_latents": self._reader.d_sae, "has_summary": summary is not None, "palette": palette()}
        super().__init__(**fixed, **traits)

    @property
    def dataset(self) -> Any:
        """The data set whose images are shown."""
        return self._reader.dataset

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={getattr(self, name)}" for name in SHARED if self.has_trait(name))
        return f"{type(self).__name__}({chosen})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data:
            data["text/plain"] = f"{self!r}: open the notebook in Jupyter to use it."
        return bundle

    @t.validate("latent")
    def _check_latent(self, proposal: Any) -> int:
        return self._within("latent", proposal["value"], self._reader.d_sae)

    @t.validate("image")
    def _check_image(self, proposal: Any) -> int:
        return self._within("image", proposal["value"], len(self.dataset))

    @t.validate("opacity", "tau")
    def _check_look(self, proposal: Any) -> float:
        name, value = proposal["trait"].name, proposal["value"]
        if not (0 <= value <= 1 if name == "opacity" else 0 <= value < float("inf")):
            raise SelectionError(f"{name} must be {'in [0, 1]' if name == 'opacity' else '0 or more'}, got {value}.")
        return value

    @staticmethod
    def _within(what: str, value: int, n: int) -> int:
        if not -1 <= value < n:
            raise SelectionError(f"There is no {what} {value}; valid are 0 to {n - 1}, or -1 for none.")
        return value

    def _look(self) -> dict[str, Any]:
        return {"tau": self.tau, "opacity": self.opacity, "mode": self.mode}


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
    **traits
        First choices: ``latent``, ``image``, ``sort``, ``tau``, ``opacity``, ``mode``.

    Attributes
    ----------
    latent, image : int
        The chosen latent, and the reference image that was clicked; -1 for none.
    sort : {"frequency", "mean_activation", "label_entropy"}
        Order of the slider, which runs over living latents.
    tau, opacity, mode
        Threshold, opacity and kind of the heat maps: "spotlight" or "heat".

    Raises
    ------
    ValueError
        If SAE, model, summary and data set don't fit together, or a choice does not exist.
    """

    sort = t.Enum(tuple(ORDERS), "frequency").tag(sync=True)
    order = t.Bytes(help="uint32: living latents in the slider's order.").tag(sync=True)
    points = t.Bytes(help="Two bytes a latent, log frequency and log mean activation, 1 to 255; 0 0 for dead latents.").tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        super().__init__(clip, sae, summary, dataset, names, layer, kind="latent", points=scatter_points(summary), **traits)
        self._sort()
        order = np.frombuffer(self.order, np.uint32)
        if self.latent < 0 and len(order):
            self.latent = int(order[0])
        self._show()
        self.observe(lambda _: self._sort(), "sort")
        self.observe(lambda _: self._show(), "latent")

    @property
    def card(self) -> LatentCard | None:
        """What is shown, as arrays; None when no latent is chosen."""
        return None if self.latent < 0 else latent_card(self._reader, self._summary, self.latent, self._names)

    def figure(self, save: str | None = None) -> Figure:
        """A static picture of what is on screen.

        Parameters
        ----------
        save : str, optional
            Name of a file in ``figures/``, without ending.

        Raises
        ------
        ValueError
            If no latent is chosen.
        """
        from ..plots.explorer import latent_explorer

        if self.card is None:
            raise ValueError("No latent is chosen: set .latent first.")
        return latent_explorer(self.card, self._summary, **self._look(), credit=is_openmoji(self.dataset), save=save)

    def _sort(self) -> None:
        self.order = living(self._summary, self.sort).astype(np.uint32).tobytes()

    def _show(self) -> None:
        self.shown = latent_message(self.card)


class PatchExplorer(_View):
    """Point at a patch of an image: its latents, the whole image's latents, and where a chosen latent is.

    Parameters
    ----------
    clip, sae, summary, dataset, names, layer
        As for :class:`LatentExplorer`. Without a summary (None), lists are sorted by activation only, and any data set will do.
    **traits
        First choices: ``image``, ``patch``, ``latent``, ``rank``, ``tau``, ``opacity``, ``mode``.

    Attributes
    ----------
    image : int
        The shown image.
    patch : int
        The chosen patch, counted row by row; -1 for none.
    latent : int
        The latent whose heat map is shown; -1 for none.
    rank : {"activation", "distinctive"}
        How lists are sorted: by activation, or by activation times log(1 / frequency).

    Raises
    ------
    ValueError
        If SAE, model, summary and data set don't fit together, or a choice does not exist.
    """

    PAGE = 12
    """Thumbnails on a page."""

    patch = t.Int(-1, help="The chosen patch, counted row by row; -1 for none.").tag(sync=True)
    rank = t.Enum(("activation", "distinctive"), "activation").tag(sync=True)
    page = t.Int(0, help="Which thumbnails are shown.").tag(sync=True)
    n_pages = t.Int().tag(sync=True)
    n_images = t.Int().tag(sync=True)
    thumbs = t.List().tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        n = len(dataset)
        if n == 0:
            raise ValueError(f"{dataset.spec!r} ({dataset.split}) holds no images.")
        super().__init__(clip, sae, summary, dataset, names, layer, kind="patch", n_images=n, n_pages=-(-n // self.PAGE), **traits)
        self.image = max(0, self.image)
        self._find_page()
        self._turn()
        self._show()
        self.observe(lambda _: self._show(), ["image", "patch", "latent", "rank"])
        self.observe(lambda _: self._turn(), "page")
        self.observe(lambda _: self._find_page(), "image")

    @t.validate("image")
    def _check_image(self, proposal: Any) -> int:
        return max(0, self._within("image", proposal["value"], self.n_images))  # there is always an image

    @t.validate("patch")
    def _check_patch(self, proposal: Any) -> int:
        return self._within("patch", proposal["value"], self.grid[0] * self.grid[1])

    @t.validate("page")
    def _check_page(self, proposal: Any) -> int:
        return min(max(0, proposal["value"]), max(0, self.n_pages - 1))

    @t.validate("rank")
    def _check_rank(self, proposal: Any) -> str:
        if proposal["value"] == "distinctive" and self._summary is None:
            raise SelectionError("rank='distinctive' weighs by how many images a latent is active in: it needs a summary.")
        return proposal["value"]

    @property
    def card(self) -> PatchCard:
        """What is shown, as arrays."""
        weights = distinctiveness(self._summary) if self.rank == "distinctive" else None
        tokens = "all" if self._summary is None else self._summary.tokens
        return patch_card(self._reader, self.image, self.patch, self.latent, self._names, weights, tokens)

    @property
    def references(self) -> LatentCard | None:
        """The chosen latent's own card, with five reference images; None without a latent or a summary."""
        if self.latent < 0 or self._summary is None:
            return None
        return latent_card(self._reader, self._summary, self.latent, self._names, k=5)

    def figure(self, save: str | None = None) -> Figure:
        """A static picture of what is on screen; ``save`` names a file in ``figures/``, without ending."""
        from ..plots.explorer import patch_explorer

        return patch_explorer(self.card, **self._look(), credit=is_openmoji(self.dataset), save=save)

    def _show(self) -> None:
        self.shown = patch_message(self.card, self.references)

    def _find_page(self) -> None:
        self.page = self.image // self.PAGE

    def _turn(self) -> None:
        start = self.page * self.PAGE
        images = range(start, min(start + self.PAGE, self.n_images))
        self.thumbs = [{"index": i, "label": self._reader.label(i), "jpeg": encode_picture(self._reader.picture(i), 80)} for i in images]


def link(*views: _View) -> list[t.link]:
    """Join the choices of explorers: a latent chosen in one is chosen in all, and so are images of a common data set and patches.

    Parameters
    ----------
    *views : LatentExplorer or PatchExplorer
        On one SAE. The first that has made a choice sets it for all.

    Returns
    -------
    list of traitlets.link
        Call ``.unlink()`` on each to part them again.

    Raises
    ------
    ValueError
        If there are fewer than two, or their SAEs have different numbers of latents.
    """
    if len(views) < 2:
        raise ValueError(f"link joins two explorers or more, got {len(views)}.")
    if len({view.n_latents for view in views}) > 1:
        sizes = ", ".join(str(view.n_latents) for view in views)
        raise ValueError(f"These explorers show different SAEs, with {sizes} latents: a latent of one means nothing in another.")
    links = []
    for name in SHARED:
        members = [view for view in views if view.has_trait(name)]
        if name == "image":
            same = {(view.dataset.spec, view.dataset.split, len(view.dataset)) for view in members}
            members = members if len(same) == 1 else []
        if len(members) < 2:
            continue
        source = next((view for view in members if getattr(view, name) >= 0), members[0])
        links += [t.link((source, name), (view, name)) for view in members if view is not source]
    return links


def is_openmoji(dataset: Any) -> bool:
    """Whether pictures of a data set show OpenMoji artwork, which figures must credit."""
    return str(dataset.spec).startswith("openmoji/")


# -- cards as messages: what the page gets ----------------------------------------------------------------------------


def latent_message(card: LatentCard | None) -> dict[str, Any]:
    """A card as the page wants it: texts, JPEG bytes, one byte a patch."""
    if card is None:
        return {"latent": -1, "name": "", "facts": [], "classes": [], **reference_message(None)}
    return {
        "latent": card.latent,
        "name": str(card.name or ""),
        "facts": latent_facts(card),
        **reference_message(card),
        "classes": [[name, share] for name, share in card.classes],
    }


def reference_message(card: LatentCard | None) -> dict[str, Any]:
    """Reference images as the page wants them."""
    heats, scale = (b"", 1.0) if card is None else encode_heats(card.heats)
    rows = [] if card is None else zip(card.images, card.labels, card.values, card.pictures, strict=True)
    return {
        "images": [{"index": int(i), "label": label, "value": f"{value:.3g}", "jpeg": encode_picture(p)} for i, label, value, p in rows],
        "heats": heats,
        "scale": scale,
        "note": "Choose a latent." if card is None else "" if len(card.images) else "No image of the data set activates this latent.",
    }


def latent_facts(card: LatentCard) -> list[list[str]]:
    """A latent's statistics as pairs of texts."""
    if card.dead:
        return [["State", "dead: active in no image"]]
    score = [] if card.name is None or card.name.score is None else [["Score of its name", f"{card.name.score:.2f}"]]
    return [
        *score,
        ["Active in", f"{100 * card.frequency:.3g} % of images"],
        ["Mean activation", f"{card.mean_activation:.3g}"],
        ["Label entropy", f"{card.label_entropy:.2f} nats"],
        ["Label std", f"{card.label_std:.1f}"],
    ]


def patch_message(card: PatchCard, references: LatentCard | None = None) -> dict[str, Any]:
    """A card as the page wants it, with the chosen latent's reference images."""
    heat, scale = encode_heats(card.heat[None])

    def entries(latents):
        return [{"latent": i, "name": str(card.names.get(i) or ""), "value": value, "text": f"{value:.3g}"} for i, value in latents]

    return {
        "image": card.image,
        "label": card.label,
        "jpeg": encode_picture(card.picture),
        "patch": card.patch,
        "latent": card.latent,
        "name": str(card.names.get(card.latent) or ""),
        "heat": heat,
        "scale": scale,
        "most": f"{card.heat.max():.3g}",
        "cls": f"{card.cls:.3g}",
        "patch_latents": entries(card.patch_latents),
        "image_latents": entries(card.image_latents),
        "references": reference_message(references),
    }


def scatter_points(summary: Any) -> bytes:
    """Where latents lie in the scatter of log frequency (x) and log mean activation (y): two bytes each, 1 to 255; 0 0 for the dead."""
    dead = array(summary.dead).astype(bool)
    points = np.zeros((len(dead), 2), np.uint8)
    for axis, values in enumerate((summary.frequency, summary.mean_activation)):
        alive = np.log10(np.maximum(array(values)[~dead].astype(float), 1e-9))
        if len(alive):
            low, high = alive.min(), alive.max()
            points[~dead, axis] = np.round(1 + 254 * (alive - low) / max(high - low, 1e-9))
    return points.tobytes()
