"""The gallery: one HTML file with many latents, their reference images and heat maps, that opens without a server and can be searched."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..plots.heat import palette
from .cards import ORDERS, Reader, latent_card, living, read_names
from .latent_explorer import latent_facts
from .render import encode_heats
from .widgets import is_openmoji, measures_of, script

CREDIT = "Artwork: OpenMoji, CC BY-SA 4.0."


def export_gallery(
    path: str | Path,
    clip: Any,
    sae: Any,
    summary: Any,
    dataset: Any,
    names: Any = None,
    layer: int = -2,
    *,
    n: int = 200,
    order: str = "frequency",
    k: int = 6,
    side: int = 112,
    quality: int = 80,
    title: str = "Latents of a sparse autoencoder",
    progress: bool = True,
) -> Path:
    """Write the first latents of an order, with their reference images, as one HTML file.

    The file holds everything: no server, no library from elsewhere, no request (its content security policy forbids them). The reader
    can search by name, number or class, sort, and set opacity, threshold and contour of the heat maps.

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
    k : int
        Reference images a latent.
    side : int
        Largest width of a picture, in pixels.
    quality : int
        Of the JPEGs.
    title : str
        Heading of the page; any text.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    Path
        The file. 200 latents with six images of 112 pixels take about 5 MB; an image that several latents share is held once.

    Raises
    ------
    ValueError
        For an unknown order, or numbers below 1.
    """
    if min(n, k, side) < 1 or not 1 <= quality <= 95:
        raise ValueError(f"n, k and side must be at least 1, quality in 1 to 95; got n={n}, k={k}, side={side}, quality={quality}.")
    reader, known = Reader(clip, sae, dataset, layer, keep=1024), read_names(names, sae.W_enc.shape[1])
    chosen = living(summary, order, measures_of(known, None, reader.d_sae))[:n]
    pictures: dict[int, str] = {}
    entries = []
    for latent in tqdm(chosen.tolist(), desc="gallery", disable=not progress):
        card = latent_card(reader, summary, latent, known, k=k, n_classes=3, n_neighbors=0)
        for image, picture in zip(card.images.tolist(), card.pictures, strict=True):
            if image not in pictures:
                pictures[image] = _jpeg(picture, side, quality)
        heats, scale = encode_heats(card.heats)
        score = card.name.score if card.name else None
        entropy = None if np.isnan(card.label_entropy) else card.label_entropy
        sorts = {"frequency": card.frequency, "mean_activation": card.mean_activation, "label_entropy": entropy, "score": score}
        entries.append(
            {
                "latent": latent,
                "name": str(card.name or ""),
                "facts": latent_facts(card),
                "classes": [name for name, _ in card.classes],
                "images": [[int(i), label, f"{v:.3g}"] for i, label, v in zip(card.images, card.labels, card.values, strict=True)],
                "heats": base64.b64encode(heats).decode(),
                "scale": scale,
                "sorts": {name: None if value is None else float(value) for name, value in sorts.items()},
            }
        )
    data = {
        "latents": entries,
        "pictures": pictures,
        "grid": list(reader.grid),
        "palette": base64.b64encode(palette()).decode(),
        "tau": float(summary.tau),
        "order": order,
        "ascending": [name for name, largest_first in ORDERS.items() if not largest_first],
    }
    note = f"{len(entries)} of {int((~summary.dead).sum())} living latents, strongest images of {summary.n_images} first."
    page = _PAGE.format(
        title=html.escape(title),
        note=html.escape(note + (" " + CREDIT if is_openmoji(dataset) else "")),
        css=script("gallery.css"),
        # As JSON in a script element: "<" is the one character that could end it.
        data=json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"),
        # An inline module exports nothing.
        js=re.sub(r"^export default", "const widget =", script("gallery.js"), flags=re.M),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _jpeg(picture: np.ndarray, side: int, quality: int) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
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
