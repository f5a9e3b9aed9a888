"""The patch explorer: point at a patch of an image, of the data set or your own, and ask for its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import traitlets as t

from .cards import LatentCard, PatchCard, distinctiveness, encode_heats, encode_picture, first_sight, latent_card, patch_card, patch_tops
from .latent_explorer import reference_message
from .reader import UploadError, read_upload
from .widgets import SelectionError, _View, module


class PatchExplorer(_View):
    """Point at a patch of an image: its latents, the whole image's latents, and where a chosen latent is.

    Each choice is a trait with a ``help``: set it in Python or in the page.

    Parameters
    ----------
    clip, sae, summary, dataset, names, layer
        As for :class:`LatentExplorer`. Without a summary (None), lists are sorted by activation only, and any data set will do.
    **traits
        First choices: ``image``, ``patch``, ``patches``, ``latent``, ``rank``, ``tau``, ``opacity``, ``mode``, ``contour``.
    """

    PAGE = 12  # thumbnails on a page

    _esm = module("patch.js")

    patch = t.Int(-1, help="The chosen patch, counted row by row; -1 for none.").tag(sync=True)
    patches = t.List(t.Int(), help="All chosen patches, sorted.").tag(sync=True)
    uploaded = t.Unicode("", help="Name of the uploaded picture that is shown; empty for none.").tag(sync=True)
    tops = t.Dict(help="The strongest latents of every patch.").tag(sync=True)
    found = t.Dict(help="The chosen latent's reference images.").tag(sync=True)
    rank = t.Enum(("activation", "distinctive"), "activation", help="distinctive: activation times log(1 / frequency).").tag(sync=True)
    page = t.Int(0, help="Which thumbnails are shown.").tag(sync=True)
    n_pages = t.Int().tag(sync=True)
    n_images = t.Int().tag(sync=True)
    thumbs: t.List[dict[str, Any]] = t.List().tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        n = len(dataset)
        self._last: tuple[Any, ...] | None = None
        self._upload = (-1, "")  # the picture of one's own: its index for the reader, its name
        if n == 0:
            raise ValueError(f"{dataset.spec!r} ({dataset.split}) holds no images.")
        super().__init__(clip, sae, summary, dataset, names, layer, kind="patch", n_images=n, n_pages=-(-n // self.PAGE), **traits)
        if summary is not None and not {"image", "patch", "patches", "latent"} & set(traits):
            self.latent = first_sight(summary, self._names)  # at its strongest place, as in a LatentExplorer
            if (seen := self.references) is not None and len(seen.images):
                self.image, self.patch = int(seen.images[0]), int(seen.heats[0].argmax())
        self.image = max(0, self.image)
        self.patches = self.patches or ([self.patch] if self.patch >= 0 else [])
        self.patch = self.patch if self.patch in self.patches else self.patches[-1] if self.patches else -1
        self._find_page()
        self._turn()
        self._show_tops()
        self._show()
        self._show_references()
        self.observe(self._one_patch, "patch")
        self.observe(self._many_patches, "patches")
        self.observe(self._new_image, ["image", "uploaded"])
        self.observe(lambda _: self._show_tops(), ["image", "uploaded", "rank"])
        self.observe(lambda _: self._show(), ["image", "uploaded", "patch", "patches", "latent", "rank"])
        self.observe(lambda _: self._show_references(), "latent")
        self.observe(lambda _: self._turn(), "page")
        self.observe(lambda _: self._find_page(), "image")

    @t.validate("patch")
    def _check_patch(self, proposal: Any) -> int:
        return self._within("patch", proposal["value"], self.grid[0] * self.grid[1])

    @t.validate("uploaded")
    def _check_uploaded(self, proposal: Any) -> str:
        if proposal["value"] and proposal["value"] != self._upload[1]:
            raise SelectionError(f"No picture {proposal['value']!r} was uploaded: drop it on the view, or call .upload(data, name).")
        return proposal["value"]

    @t.validate("page")
    def _check_page(self, proposal: Any) -> int:
        return min(max(0, proposal["value"]), max(0, self.n_pages - 1))

    @t.validate("rank")
    def _check_rank(self, proposal: Any) -> str:
        if proposal["value"] == "distinctive" and self._summary is None:
            raise SelectionError("rank='distinctive' weighs by how many images a latent is active in: it needs a summary.")
        return proposal["value"]

    def upload(self, data: bytes, name: str = "") -> None:
        """Show a picture that is not in the data set.

        Parameters
        ----------
        data : bytes
            A PNG, JPEG, WebP, GIF or BMP file.
        name : str

        Raises
        ------
        UploadError
            If it is too large or can't be read; the view then shows what it showed before.
        """
        picture, name = read_upload(data, name)
        self._upload = (self._reader.upload(picture, name, self._upload[0]), name)
        self.notice = ""
        again = self.uploaded == name
        self.uploaded = name
        if again:  # another picture of the same name
            self._show_tops()
            self._show()

    @property
    def card(self) -> PatchCard:
        """What is shown, as arrays."""
        tokens = "all" if self._summary is None else self._summary.tokens
        others = [patch for patch in self.patches if patch != self.patch]
        chosen = [*others, self.patch] if self.patch >= 0 else []
        return patch_card(self._reader, self._shown_image, chosen, self.latent, self._names, self._weights, tokens)

    @property
    def references(self) -> LatentCard | None:
        """The chosen latent's own card, with five reference images; None without a latent or a summary."""
        if self.latent < 0 or self._summary is None:
            return None
        return latent_card(self._reader, self._summary, self.latent, self._names, k=5)

    @property
    def _shown_image(self) -> int:
        return self._upload[0] if self.uploaded else self.image

    @property
    def _weights(self) -> np.ndarray | None:
        return distinctiveness(self._summary) if self.rank == "distinctive" else None

    def _show(self) -> None:
        chosen = (self.image, self.uploaded, self._upload, self.patch, tuple(self.patches), self.latent, self.rank)
        if chosen == self._last:  # several traits change with one click: one card is enough
            return
        self._last = chosen
        self.shown = {**patch_message(self.card), "image": self.image, "uploaded": self.uploaded}

    def _show_references(self) -> None:
        self.found = reference_message(self.references)

    def _show_tops(self) -> None:
        latents, values = patch_tops(self._reader, self._shown_image, self._weights)
        self.tops = {"latents": latents.tobytes(), "values": values.tobytes(), "n": latents.shape[1]}

    def _one_patch(self, change: Any) -> None:
        if self.patch not in self.patches:
            self.patches = [self.patch] if self.patch >= 0 else []

    def _many_patches(self, change: Any) -> None:
        if self.patch not in self.patches:
            self.patch = self.patches[-1] if self.patches else -1

    def _new_image(self, change: Any) -> None:
        if change["name"] == "image":
            self.uploaded = ""

    def _receive(self, content: Any, buffers: list) -> None:
        if isinstance(content, Mapping) and content.get("kind") == "upload" and buffers:
            try:
                self.upload(buffers[0], str(content.get("name", "")))
            except UploadError as error:
                self._tell(error)

    def _find_page(self) -> None:
        self.page = self.image // self.PAGE

    def _turn(self) -> None:
        start = self.page * self.PAGE
        images = range(start, min(start + self.PAGE, self.n_images))
        self.thumbs = [{"index": i, "label": self._reader.label(i), "jpeg": encode_picture(self._reader.picture(i), 80)} for i in images]


def patch_message(card: PatchCard) -> dict[str, Any]:
    """A card as the page wants it, with the heat maps of all listed latents: choosing one of them needs no answer from Python."""
    heat, scale = encode_heats(card.heat[None])
    listed = [encode_heats(one[None]) for one in card.listed]

    def entries(latents):
        return [{"latent": i, "name": str(card.names.get(i) or ""), "value": value, "text": f"{value:.3g}"} for i, value in latents]

    return {name: getattr(card, name) for name in ("image", "label", "patch", "latent")} | {
        "jpeg": encode_picture(card.picture), "name": str(card.names.get(card.latent) or ""), "heat": heat, "scale": scale,
        "most": f"{card.heat.max():.3g}", "cls": f"{card.cls:.3g}", "patches": list(card.patches),
        "patch_latents": entries(card.patch_latents), "image_latents": entries(card.image_latents),
        "listed": [latent for latent, _ in card.patch_latents + card.image_latents],
        "listed_heats": b"".join(codes for codes, _ in listed), "listed_scales": [scale for _, scale in listed],
    }  # fmt: skip
