"""The gallery: one HTML file with many latents, their reference images and heat maps, that opens without a server and can be searched."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..plots.heat import palette
from ..run.artifacts import atomic_file
from .cards import ORDERS, Reader, encode_heats, latent_card, living, read_names
from .latent_explorer import latent_facts
from .widgets import is_openmoji, measures_of, module, styles

N_IMAGES, SIDE = 6, 112  # reference images per latent, and their largest width in pixels


def export_gallery(
    path: str | Path, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, *, n: int = 200,
    order: str = "frequency", title: str = "Latents of a sparse autoencoder",
) -> Path:  # fmt: skip
    """Write the first latents of an order, with their reference images, as one HTML file that needs no server and makes no request.

    The reader can search by name, number or class, sort, and set opacity, threshold and contour of the heat maps.

    Parameters
    ----------
    path : path
        Where to write, usually ending in ``.html``.
    clip, sae, summary, dataset, names, layer
        As for :class:`LatentExplorer`.
    n : int
        Latents; fewer where fewer are alive.
    order : str
        ``"frequency"``, ``"mean_activation"``, ``"label_entropy"``, or ``"score"`` where names have scores: which come in, and the first order.
    title : str
        Heading of the page; any text.

    Returns
    -------
    Path
        The file. 200 latents with six images of 112 pixels take about 5 MB; an image that several latents share is held once.

    Raises
    ------
    ValueError
        For an unknown order, or ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    reader, known = Reader.shared(clip, sae, dataset, layer), read_names(names, sae.W_enc.shape[1])
    summary.check(sae, dataset)
    chosen = living(summary, order, measures_of(known, None, reader.d_sae))[:n]
    pictures: dict[int, str] = {}
    entries = []
    for latent in tqdm(chosen.tolist(), desc="gallery"):
        card = latent_card(reader, summary, latent, known, k=N_IMAGES, n_classes=3, n_neighbors=0)
        pictures |= {i: _jpeg(picture) for i, picture in zip(card.images.tolist(), card.pictures, strict=True) if i not in pictures}
        heats, scale = encode_heats(card.heats)
        sorts = {name: getattr(card, name) for name in ORDERS} | {"score": card.name.score if card.name else None}
        entries.append({
            "latent": latent, "name": str(card.name or ""), "facts": latent_facts(card), "classes": [name for name, _ in card.classes],
            "images": [[int(i), label, f"{v:.3g}"] for i, label, v in zip(card.images, card.labels, card.values, strict=True)],
            "heats": base64.b64encode(heats).decode(), "scale": scale,
            "sorts": {name: None if value is None or np.isnan(value) else float(value) for name, value in sorts.items()},
        })  # fmt: skip
    data = {
        "latents": entries, "pictures": pictures, "grid": list(reader.grid), "palette": base64.b64encode(palette()).decode(),
        "tau": float(summary.tau), "order": order, "ascending": [name for name, largest_first in ORDERS.items() if not largest_first],
    }  # fmt: skip
    note = f"{len(entries)} of {int((~summary.dead).sum())} living latents, strongest images of {summary.n_images} first."
    note += " Artwork: OpenMoji, CC BY-SA 4.0." if is_openmoji(dataset) else ""
    # As JSON in a script element: "<" is the one character that could end it.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.format(title=html.escape(title), note=html.escape(note), css=styles("gallery.css"), data=text, js=module("gallery.js"))
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _jpeg(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main><h1>{title}</h1><p id="note">{note}</p><div id="gallery"></div></main>
<script type="application/json" id="data">{data}</script>
<script type="module">{js}</script>
</body>
</html>
"""
