"""What an explorer shows, as plain records: one card a latent, one card an image. The page and the static figure draw the same card.

A heat map travels to the page as one byte a patch, the square root of the activation: steps are fine near zero, where thresholds are.
``value = scale * (byte / 255) ** 2``; :func:`patchsae_utils.plots.heat.blend` does in Python what the page does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from ..activations.mixing import TOKENS
from ..interventions.steering import Edit, steer
from ..run.intervals import Interval, mean_interval
from .reader import Reader

# Sort orders of latents that a summary knows, and whether the largest comes first.
ORDERS = {"frequency": True, "mean_activation": True, "label_entropy": False}


class Name(NamedTuple):
    """What a latent was called."""

    name: str
    kind: str = ""  # what sort of thing it names: object, color, class, ...; tells the color orange from the fruit
    score: float | None = None  # how well the name fits; None when not measured

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.kind else self.name


class LatentCard(NamedTuple):
    """One latent: its statistics and reference images. k images, grid H x W."""

    latent: int
    name: Name | None
    dead: bool  # no image of the data set activates it
    frequency: float  # share of images where it is active
    mean_activation: float
    label_entropy: float  # in nats; low means that its reference images share few classes
    label_std: float  # standard deviation of the class indices of its reference images
    images: np.ndarray  # [k] indices of the reference images, strongest first
    values: np.ndarray  # [k] image-level activations
    labels: list[str]  # [k] their classes
    pictures: list[np.ndarray]  # [k] what CLIP saw, uint8 [h, w, 3]
    heats: np.ndarray  # [k, H, W] activations of the patches
    classes: list[tuple[str, float]]  # the classes with most of its tokens above tau, and their share of all such tokens
    neighbors: tuple[tuple[int, float], ...]  # living latents whose decoder rows point most nearly the same way, and their cosines
    monosemanticity: float | None  # weighted mean cosine of the images it is active in; None when not measured


class EffectCard(NamedTuple):
    """What a latent does, beyond its strongest images."""

    latent: int
    counts: np.ndarray  # active tokens of the sample by activation, between ``reader.EDGES``
    n_active: int  # images of the sample where it is active
    n_images: int  # of the sample
    images: np.ndarray  # up to three images of middling activation, then up to three of weak
    values: np.ndarray  # their image-level activations
    labels: list[str]
    pictures: list[np.ndarray]
    heats: np.ndarray
    pushes: list[tuple[str, Interval]]  # classes whose logit it raises most, then those that it lowers most: mean over its reference images
    together: list[tuple[int, float]]  # latents active in the same images of the sample, and their correlation


class PlaceCard(NamedTuple):
    """A latent elsewhere: in another data set, or as another model has it."""

    n_active: int  # images of the sample there where it is active
    n_images: int  # of the sample
    correlation: float | None  # with the latent here, image by image; None for other images
    images: np.ndarray  # [k] the strongest of the sample
    values: np.ndarray
    labels: list[str]
    pictures: list[np.ndarray]
    heats: np.ndarray


class PatchCard(NamedTuple):
    """One image, its chosen patches, and one latent over it. Grid H x W."""

    image: int
    label: str
    picture: np.ndarray  # what CLIP saw, uint8 [h, w, 3]
    grid: tuple[int, int]
    patch: int  # counted row by row; -1 when none is chosen
    patch_latents: list[tuple[int, float]]  # the patches' latents and mean activations over them, in order; empty without a patch
    image_latents: list[tuple[int, float]]  # the image's latents and mean activations over its tokens, in order
    latent: int  # -1 when none is chosen
    heat: np.ndarray  # [H, W] activations of the chosen latent; zeros without one
    cls: float  # activation of the chosen latent at CLS, which has no place in the picture
    names: dict[int, Name]  # of the latents above, where known
    patches: tuple[int, ...]  # all chosen patches
    listed: np.ndarray  # [n, H, W] activations of the listed latents: first of patch_latents, then of image_latents


def living(summary: Any, order: str, measures: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Latents that some image activates, sorted."""
    known = {name: getattr(summary, name) for name in ORDERS} | dict(measures or {})
    if order not in known:
        raise ValueError(f"Unknown sort order {order!r}. Valid: {', '.join(known)}.")
    key = np.asarray(known[order]).astype(float)
    ranked = np.argsort(np.where(np.isnan(key), np.inf, -key if ORDERS.get(order, True) else key), kind="stable")
    return ranked[~np.asarray(summary.dead)[ranked]]


def first_sight(summary: Any, names: Mapping[int, Name]) -> int:
    """A latent worth seeing first: of an object by its name, where there are such; else named; else any. -1 when all are dead.

    Of these, the surest name, then the one whose reference images share their class most. Latents that are active in every fifth image tell little.
    """
    frame = summary.to_frame()
    frame = frame[frame["n_reference"] == frame["n_reference"].max()] if len(frame) else frame
    objects = [latent for latent, name in names.items() if name.kind == "object"]
    for among in (objects, list(names), frame["latent"] if len(frame) else []):
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
        pairs = names.items() if hasattr(names, "items") and hasattr(names, "keys") else enumerate(names)
        table = pd.DataFrame(list(pairs), columns=["latent", "name"])
    low, high = table["latent"].min(), table["latent"].max()
    if low < 0 or high >= d_sae:
        raise ValueError(f"Names are given for latents {low} to {high}; the SAE has latents 0 to {d_sae - 1}.")
    rows = table.reindex(columns=["latent", "name", "kind", "score"]).itertuples(index=False)
    return {
        int(latent): Name(word, kind if isinstance(kind, str) else "", float(score) if np.isfinite(score) else None)
        for latent, word, kind, score in rows
        if isinstance(word, str) and word and word != "unnamed"
    }


def latent_card(
    reader: Reader, summary: Any, latent: int, names: Mapping[int, Name], k: int = 10, n_classes: int = 6, n_neighbors: int = 6,
    monosemanticity: np.ndarray | None = None,
) -> LatentCard:  # fmt: skip
    """Look a latent up."""
    images, values = np.asarray(summary.top_images[latent])[:k], np.asarray(summary.top_values[latent])[:k]
    real = (images >= 0) & (values > 0)  # the rest is padding
    images, values = images[real].astype(int), values[real].astype(float)
    counts = np.asarray(summary.class_counts[:, latent]).astype(float)
    top = [c for c in np.argsort(-counts, kind="stable")[:n_classes] if counts[c] > 0]
    score = np.nan if monosemanticity is None else monosemanticity[latent]
    return LatentCard(
        latent, names.get(latent), bool(summary.dead[latent]),
        float(summary.frequency[latent]), float(summary.mean_activation[latent]), float(summary.label_entropy[latent]),
        float(summary.label_std[latent]), images, values, labels=[reader.label(i) for i in images],
        pictures=[reader.picture(i) for i in images], heats=reader.heats(images, latent),
        classes=[(summary.class_names[c], float(counts[c] / counts.sum())) for c in top if summary.class_names],
        neighbors=tuple(reader.nearest(latent, n_neighbors, np.asarray(summary.dead))) if n_neighbors else (),
        monosemanticity=None if np.isnan(score) else float(score),
    )  # fmt: skip


def effect_card(reader: Reader, summary: Any, latent: int, n: int = 6) -> EffectCard:
    """Look up what a latent does: over the reader's sample, and on the classes' logits of its reference images."""
    sample = reader.sample
    column = sample.means[:, latent]
    active = column.nonzero().flatten()
    ranked = active[column[active].argsort(descending=True)].tolist()
    middle, weak = (max(0, round(share * len(ranked)) - 1) for share in (0.5, 0.9))
    some = list(dict.fromkeys([*ranked[middle : middle + 3], *ranked[weak : weak + 3]]))
    images = sample.images[some]
    centred = sample.means - sample.means.mean(0)
    alike = (centred.T @ centred[:, latent]) / (centred.norm(dim=0) * centred[:, latent].norm()).clamp_min(1e-12)
    alike[latent] = -1
    top = alike.topk(min(n, len(alike)))
    return EffectCard(
        latent, sample.counts[latent].numpy(), len(active), len(sample.images), images, column[some].numpy(),
        [reader.label(i) for i in images], [reader.picture(i) for i in images], reader.heats(images, latent), _pushes(reader, summary, latent),
        [(int(i), float(r)) for r, i in zip(*top, strict=True) if r > 0.05],
    )  # fmt: skip


def place_card(reader: Reader, here: Reader, latent: int, k: int = 5) -> PlaceCard:
    """Look a latent up elsewhere, over the sample of another reader."""
    sample = reader.sample
    column = sample.means[:, latent].numpy()
    some = [i for i in np.argsort(-column, kind="stable")[:k] if column[i] > 0]
    images, both = sample.images[some], None
    if reader.dataset is here.dataset:
        both = np.stack([column, here.sample.means[:, latent].numpy()])
    known = both is not None and both.std(1).min() > 0
    return PlaceCard(
        int((column > 0).sum()), len(column), float(np.corrcoef(both)[0, 1]) if known else None, images, column[some],
        [reader.label(i) for i in images], [reader.picture(i) for i in images], reader.heats(images, latent),
    )  # fmt: skip


def _pushes(reader: Reader, summary: Any, latent: int, n: int = 4) -> list[tuple[str, Interval]]:
    """How much of each class's logit, less the mean over classes, goes when the latent is turned off in its reference images."""
    images = [int(i) for i in summary.top_images[latent] if i >= 0]
    if reader.head is None or not images:
        return []
    steered = steer(reader.clip, reader.sae, reader.residual(images), [Edit(latent)], reader.layer, reader.head)
    effect = (steered.logits_before - steered.logits).float().cpu()
    value, low, high, unit = mean_interval((effect - effect.mean(1, keepdim=True)).T, "images")
    order = np.argsort(-value, kind="stable")
    chosen = [c for c in order[:n] if value[c] > 0] + [c for c in order[-n:] if value[c] < 0]
    return [(reader.dataset.class_names[c], Interval(float(value[c]), float(low[c]), float(high[c]), unit)) for c in chosen]


RANKS = ("activation", "distinctive", "contrast", "prediction")


def patch_card(
    reader: Reader, image: int, patches: Sequence[int], latent: int, names: Mapping[int, Name], scores: Tensor, tokens: str, signed: bool
) -> PatchCard:
    """Look an image up, and its chosen patches, the last one last. ``signed``: the scores are what lists show, of either sign."""
    h = reader.latents(image)
    at = [1 + patch for patch in patches]
    here = _strongest(scores[at].mean(0), None if signed else h[at].mean(0)) if patches else []
    over = scores.sum(0) if signed else scores[TOKENS[tokens]].mean(0)
    whole = _strongest(over, None if signed else h[TOKENS[tokens]].mean(0))
    heat = h[:, latent].numpy() if latent >= 0 else np.zeros(len(h), np.float32)
    listed = [i for i, _ in here + whole]
    return PatchCard(
        image, reader.label(image), reader.picture(image), reader.grid, patches[-1] if patches else -1, here, whole, latent,
        heat=heat[1:].reshape(reader.grid), cls=float(heat[0]), names={i: names[i] for i in {*listed, latent} if i in names},
        patches=tuple(patches), listed=h[1:, listed].T.reshape(-1, *reader.grid).numpy(),
    )  # fmt: skip


def _strongest(scores: Tensor, h: Tensor | None) -> list[tuple[int, float]]:
    """The first latents by score and their activations; without these, by size, and the scores themselves."""
    top = (scores.abs() if h is None else scores).topk(min(8, len(scores))).indices
    return [(int(i), float(scores[i] if h is None else h[i])) for i in top if (scores[i] != 0 if h is None else scores[i] > 0 and h[i] > 0)]


def distinctiveness(summary: Any) -> np.ndarray:
    """Weights log(1 / frequency), float32 [S], 0 for dead latents: inverse document frequency (Sparck Jones, 1972), images for documents."""
    frequency = np.asarray(summary.frequency).astype(float)
    return -np.log(np.clip(frequency, 1e-6, 1), where=frequency > 0, out=np.zeros(len(frequency))).astype(np.float32)


def encode_picture(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H, W, 3], as JPEG without chroma subsampling: crisp edges, a few kilobytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def encode_heats(heats: np.ndarray) -> tuple[bytes, float]:
    """Heat maps [n, H, W] as one byte a patch, and the activation that byte 255 stands for: 1 when nothing is active."""
    heats = np.asarray(heats, np.float32)
    if not np.isfinite(heats).all() or (heats < 0).any():
        raise ValueError("Heat maps hold activations: finite and not negative. Pass latents after the SAE's nonlinearity.")
    scale = float(heats.max(initial=0.0)) or 1.0
    return np.round(255 * np.sqrt(heats / scale)).astype(np.uint8).tobytes(), scale


def reference_message(card: Any, own: bool = True) -> dict[str, Any]:
    """Reference images of a card (or None) as the page wants them; those that are not the view's ``own`` can't be chosen there: -2 or less."""
    heats, scale = (b"", 1.0) if card is None else encode_heats(card.heats)
    rows = [] if card is None else zip(card.images, card.labels, card.values, card.pictures, strict=True)
    return {
        "images": [
            {"index": int(i) if own else -2 - int(i), "label": label, "value": value if isinstance(value, str) else f"{value:.3g}", "jpeg": encode_picture(p)}
            for i, label, value, p in rows
        ],
        "heats": heats, "scale": scale,
        "note": "Choose a latent." if card is None else "" if len(card.images) else "No image of the data set activates this latent.",
    }  # fmt: skip


def patch_message(card: PatchCard, signed: bool) -> dict[str, Any]:
    """A card as the page wants it, with the heat maps of all listed latents: choosing one of them needs no answer from Python."""
    heat, scale = encode_heats(card.heat[None])
    listed = [encode_heats(one[None]) for one in card.listed]

    def entries(latents):
        form = "+.2g" if signed else ".3g"
        return [{"latent": i, "name": str(card.names.get(i) or ""), "value": value, "text": f"{value:{form}}"} for i, value in latents]

    return {name: getattr(card, name) for name in ("image", "label", "patch", "latent")} | {
        "jpeg": encode_picture(card.picture), "name": str(card.names.get(card.latent) or ""), "heat": heat, "scale": scale,
        "most": f"{card.heat.max():.3g}", "cls": f"{card.cls:.3g}", "patches": list(card.patches),
        "patch_latents": entries(card.patch_latents), "image_latents": entries(card.image_latents),
        "listed": [latent for latent, _ in card.patch_latents + card.image_latents],
        "listed_heats": b"".join(codes for codes, _ in listed), "listed_scales": [scale for _, scale in listed],
    }  # fmt: skip
