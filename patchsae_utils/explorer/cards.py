"""What an explorer shows, as plain records: one card a latent, one card an image. The page and the static figure draw the same card.

A heat map travels to the page as one byte a patch, 196 bytes on a 14x14 grid, and is coloured and blended there. The code is the square root of the
activation, so that steps are fine near zero, where thresholds are: ``value = scale * (byte / 255) ** 2``. :func:`patchsae_utils.plots.heat.blend` does
in Python what the page does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from ..activations.mixing import TOKENS
from .reader import Reader

ORDERS = {"frequency": True, "mean_activation": True, "label_entropy": False}
"""Sort orders of latents that a summary knows, and whether the largest comes first."""

MEASURES = ("monosemanticity", "score")
"""Sort orders that need more than a summary, the largest first: how alike a latent's images are, and how well its name fits."""


class Name(NamedTuple):
    """What a latent was called."""

    name: str
    kind: str = ""
    """What sort of thing it names: object, color, class, ...; tells the colour orange from the fruit."""
    score: float | None = None
    """How well the name fits; None when not measured."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.kind else self.name


class LatentCard(NamedTuple):
    """One latent: its statistics and reference images. k images, grid H x W."""

    latent: int
    name: Name | None
    dead: bool
    """No image of the data set activates it."""
    frequency: float
    """Share of images where it is active."""
    mean_activation: float
    label_entropy: float
    """In nats; low means that its reference images share few classes."""
    label_std: float
    """Standard deviation of the class indices of its reference images."""
    images: np.ndarray
    """[k] indices of the reference images, strongest first."""
    values: np.ndarray
    """[k] image-level activations."""
    labels: list[str]
    """[k] their classes."""
    pictures: list[np.ndarray]
    """[k] what CLIP saw, uint8 [h, w, 3]."""
    heats: np.ndarray
    """[k, H, W] activations of the patches."""
    classes: list[tuple[str, float]]
    """The classes with most of its tokens above tau, and their share of all such tokens."""
    neighbors: tuple[tuple[int, float], ...] = ()
    """Living latents whose decoder rows point most nearly the same way, and their cosines."""
    monosemanticity: float | None = None
    """Weighted mean cosine of the images it is active in; None when not measured."""


class PatchCard(NamedTuple):
    """One image, one of its patches, and one latent over it. Grid H x W."""

    image: int
    label: str
    picture: np.ndarray
    """What CLIP saw, uint8 [h, w, 3]."""
    grid: tuple[int, int]
    patch: int
    """Counted row by row; -1 when none is chosen."""
    patch_latents: list[tuple[int, float]]
    """The patch's latents and activations, in order; empty without a patch."""
    image_latents: list[tuple[int, float]]
    """The image's latents and mean activations over its tokens, in order."""
    latent: int
    """-1 when none is chosen."""
    heat: np.ndarray
    """[H, W] activations of the chosen latent; zeros without one."""
    cls: float
    """Activation of the chosen latent at CLS, which has no place in the picture."""
    names: dict[int, Name]
    """Names of the latents above, where known."""
    patches: tuple[int, ...] = ()
    """All chosen patches; with several, ``patch_latents`` holds means over them."""
    listed: np.ndarray | None = None
    """[n, H, W] activations of the listed latents: first of ``patch_latents``, then of ``image_latents``."""


def array(values: Any) -> np.ndarray:
    """A tensor, an array or a sequence as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def living(summary: Any, order: str, measures: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Latents that some image activates, sorted."""
    measures = measures or {}
    if order not in ORDERS and order not in measures:
        raise ValueError(f"Unknown sort order {order!r}. Valid: {', '.join((*ORDERS, *measures))}.")
    key = array(getattr(summary, order) if order in ORDERS else measures[order]).astype(float)
    key = np.where(np.isnan(key), np.inf, -key if ORDERS.get(order, True) else key)
    order_of_all = np.argsort(key, kind="stable")
    return order_of_all[~array(summary.dead)[order_of_all].astype(bool)]


def first_sight(summary: Any, names: Mapping[int, Name]) -> int:
    """A latent worth seeing first: of an object by its name, where there are such; else named; else any. -1 when all are dead.

    Of these, the surest name, then the one whose reference images share their class most. Latents that are active in every fifth image tell little.
    """
    frame = summary.to_frame()
    frame = frame[frame["n_reference"] == frame["n_reference"].max()] if len(frame) else frame
    for among in (
        [latent for latent, name in names.items() if name.kind == "object"],
        list(names),
        frame["latent"] if len(frame) else [],
    ):
        found = frame[frame["latent"].isin(among)]
        found = found[found["frequency"] < 0.2] if (found["frequency"] < 0.2).any() else found
        if len(found):
            score = found["latent"].map(lambda latent: -(names[latent].score or 0) if latent in names else 0)
            return int(found.assign(score=score).sort_values(["score", "label_entropy"], kind="stable")["latent"].iloc[0])
    return -1


def read_names(names: Any, d_sae: int) -> dict[int, Name]:
    """Names of latents, whatever form they come in."""
    if names is None:
        return {}
    if hasattr(names, "columns"):
        if "name" not in names.columns:
            has = ", ".join(map(str, names.columns))
            raise ValueError(f"A table of names needs a column 'name'; this one has {has}. Pass the result of label_latents.")
        table = names if "latent" in names.columns else names.assign(latent=names.index)
    else:
        latents, words = (names.keys(), names.values) if hasattr(names, "keys") else (range(len(names)), names)
        table = pd.DataFrame({"latent": list(latents), "name": list(words() if callable(words) else words)})
    if ((table["latent"] < 0) | (table["latent"] >= d_sae)).any():
        raise ValueError(
            f"Names are given for latents {table['latent'].min()} to {table['latent'].max()}; the SAE has latents 0 to {d_sae - 1}."
        )
    rows = table.reindex(columns=["latent", "name", "kind", "score"]).itertuples(index=False)
    return {
        int(latent): Name(word, kind if isinstance(kind, str) else "", float(score) if np.isfinite(score) else None)
        for latent, word, kind, score in rows
        if isinstance(word, str) and word and word != "unnamed"
    }


def latent_card(
    reader: Reader,
    summary: Any,
    latent: int,
    names: Mapping[int, Name] | None = None,
    k: int = 10,
    n_classes: int = 6,
    n_neighbors: int = 6,
    monosemanticity: np.ndarray | None = None,
) -> LatentCard:
    """Look a latent up."""
    images, values = array(summary.top_images[latent])[:k], array(summary.top_values[latent])[:k]
    real = (images >= 0) & (values > 0)  # the rest is padding
    images, values = images[real].astype(int), values[real].astype(float)
    heats = reader.heats(images, latent)
    counts = array(summary.class_counts[:, latent]).astype(float)
    top = [c for c in np.argsort(-counts, kind="stable")[:n_classes] if counts[c] > 0]
    return LatentCard(
        latent=latent,
        name=(names or {}).get(latent),
        dead=bool(summary.dead[latent]),
        frequency=float(summary.frequency[latent]),
        mean_activation=float(summary.mean_activation[latent]),
        label_entropy=float(summary.label_entropy[latent]),
        label_std=float(summary.label_std[latent]),
        images=images,
        values=values,
        labels=[reader.label(i) for i in images],
        pictures=[reader.picture(i) for i in images],
        heats=heats,
        classes=[(summary.class_names[c], float(counts[c] / counts.sum())) for c in top if summary.class_names],
        neighbors=tuple(reader.nearest(latent, n_neighbors, array(summary.dead).astype(bool))) if n_neighbors else (),
        monosemanticity=None if monosemanticity is None or np.isnan(monosemanticity[latent]) else float(monosemanticity[latent]),
    )


def patch_card(
    reader: Reader,
    image: int,
    patches: Sequence[int] = (),
    latent: int = -1,
    names: Mapping[int, Name] | None = None,
    weights: np.ndarray | None = None,
    tokens: str = "all",
    n: int = 8,
) -> PatchCard:
    """Look an image up, and its chosen patches, the last one last."""
    n_patches = reader.grid[0] * reader.grid[1]
    patches = list(patches)
    h = reader.latents(image)
    here = _strongest(h[[1 + patch for patch in patches]].mean(0), weights, n) if patches else []
    whole = _strongest(h[TOKENS[tokens]].mean(0), weights, n)
    heat = h[:, latent].numpy() if latent >= 0 else np.zeros(1 + n_patches, np.float32)
    shown = {i for i, _ in here + whole} | {latent}
    return PatchCard(
        image=image,
        label=reader.label(image),
        picture=reader.picture(image),
        grid=reader.grid,
        patch=patches[-1] if patches else -1,
        patch_latents=here,
        image_latents=whole,
        latent=latent,
        heat=heat[1:].reshape(reader.grid),
        cls=float(heat[0]),
        names={i: name for i, name in (names or {}).items() if i in shown},
        patches=tuple(patches),
        listed=h[1:, [i for i, _ in here + whole]].T.reshape(-1, *reader.grid).numpy(),
    )


def patch_tops(reader: Reader, image: int, weights: np.ndarray | None = None, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The strongest latents of every patch of an image, for lists that follow the pointer."""
    h = reader.latents(image)[1:]
    score = h if weights is None else h * torch.as_tensor(weights, dtype=h.dtype)
    top = score.topk(min(n, h.shape[1]), dim=1).indices
    return top.numpy().astype(np.uint32), h.gather(1, top).numpy()


def _strongest(h: Tensor, weights: np.ndarray | None, n: int) -> list[tuple[int, float]]:
    score = h if weights is None else h * torch.as_tensor(weights, dtype=h.dtype)
    top = score.topk(min(n, len(score))).indices
    return [(int(i), float(h[i])) for i in top if h[i] > 0]


def distinctiveness(summary: Any) -> np.ndarray:
    """Weights that favour latents which few images activate: log(1 / frequency), float32 [S]; dead latents get 0.

    The inverse document frequency of text retrieval (Sparck Jones, 1972), with images for documents: a latent that fires
    everywhere says little about this patch.
    """
    frequency = array(summary.frequency).astype(float)
    return -np.log(np.clip(frequency, 1e-6, 1), where=frequency > 0, out=np.zeros(len(frequency))).astype(np.float32)


def encode_picture(picture: np.ndarray, quality: int = 92) -> bytes:
    """A picture, uint8 [H, W, 3], as JPEG without chroma subsampling: crisp edges, a few kilobytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_heats(heats: np.ndarray) -> tuple[bytes, float]:
    """Heat maps [n, H, W] as one byte a patch, and the activation that byte 255 stands for: 1 when nothing is active."""
    heats = np.asarray(heats, np.float32)
    if heats.ndim != 3:
        raise ValueError(f"Heat maps have shape [n, rows, columns], got {list(heats.shape)}.")
    if not np.isfinite(heats).all() or (heats < 0).any():
        raise ValueError("Heat maps hold activations: finite and not negative. Pass latents after the SAE's nonlinearity.")
    scale = float(heats.max(initial=0.0)) or 1.0
    return np.round(255 * np.sqrt(heats / scale)).astype(np.uint8).tobytes(), scale
