"""Is the explorer's answer to be trusted? Ask a patch of an unseen image for a latent, and look what that latent finds in other images."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data import openmoji
from ..data.splits import require_labels
from ..data.truth import patch_shares
from ..run.intervals import interval, percent
from ..sae.dictionary import select_latents
from .cards import Reader, distinctiveness

N_CLASSES, PER_CLASS = 40, 4  # so many images of so many classes are drawn: every class comes back, so that it can be found
LEAST_SHARE = 0.5  # of a patch's pixels that an object or a color must fill to be what the patch shows


def point(clip: Any, sae: Any, summary: Any, dataset: Any, layer: int = -2) -> pd.DataFrame:
    """How often a patch's latent finds the same thing elsewhere: the latent is followed to the patch of *another* image where it is most active.

    Where the data set knows its ground truth, two patches of each image are asked: the one that the main object fills most, for object,
    category and color; and one of background alone, for the background. Elsewhere the patch in the middle is asked for the image's class.
    Object and class are asked for only where a second image of the class was drawn.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    summary : LatentSummary
        Says how frequent latents are.
    dataset : data set of ``Example``
        Images that neither the SAE nor ``summary`` has seen.
    layer : int

    Returns
    -------
    DataFrame
        Columns ``kind`` ("object", "category", "color", "background"; or "class"), ``answer`` ("distinctive": the latent of largest activation
        times log(1 / frequency); "strongest": of largest activation; "random": any active one), ``hits`` (share of asked patches), ``low``,
        ``high``, ``chance`` (that a random patch of another image shows the same), ``n`` (patches asked). Empty where no
        class has two images.

    Raises
    ------
    ValueError
        If the data set has fewer than two images, or no labels.
    """
    if len(dataset) < 2:
        raise ValueError(f"Pointing compares images: {dataset.spec!r} ({dataset.split}) has {len(dataset)}; give two or more.")
    require_labels(dataset)
    rng = np.random.default_rng(0)
    labels = np.asarray(dataset.labels)
    classes = rng.permutation(np.unique(labels))[:N_CLASSES]
    images = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:PER_CLASS] for c in classes]).tolist()
    reader = Reader(clip, sae, dataset, layer)
    summary.check(sae)
    tokens = reader.residual(images).tokens[:, 1:]
    shown = [_shown(dataset, image, clip) for image in images]
    drawn = np.bincount(labels[images])

    weights = torch.from_numpy(distinctiveness(summary))
    asked = []  # (place among the images, patch, kinds it is asked about, latent by answer)
    for place, kinds in enumerate(shown):
        alone = {"object", "class"} if drawn[labels[images[place]]] == 1 else set()
        for patch, about in _questions(kinds, reader.grid):
            about = [kind for kind in about if kind not in alone]
            here = sae.encode(tokens[place, patch].to(sae.W_enc.device)).detach().float().cpu()
            active = here.nonzero().flatten().numpy()
            if len(active):
                found = int((here * weights).argmax()), int(here.argmax()), int(rng.choice(active))
                asked.append((place, patch, about, dict(zip(("distinctive", "strongest", "random"), found, strict=True))))

    latents = sorted({latent for *_, answers in asked for latent in answers.values()})
    h = select_latents(sae, tokens, latents).detach().float().cpu().numpy()
    values = {kind: np.stack([kinds[kind] for kinds in shown]) for kind in shown[0]}
    records = []
    for place, patch, about, answers in asked:
        for answer, latent in answers.items():
            elsewhere = h[:, :, latents.index(latent)].copy()
            elsewhere[place] = 0
            other = np.unravel_index(elsewhere.argmax(), elsewhere.shape)
            for kind in about:
                same = values[kind] == values[kind][place, patch]
                hit = bool(same[other]) and elsewhere[other] > 0
                records.append((kind, answer, place, hit, np.delete(same, place, axis=0).mean()))
    return _summarise(pd.DataFrame(records, columns=["kind", "answer", "place", "hit", "chance"]), len(images))


def pointing_sentence(answers: pd.DataFrame) -> str:
    """How often the most distinctive latent of a patch finds the same elsewhere, in words, beside the controls.

    Parameters
    ----------
    answers : DataFrame
        Of :func:`point`.
    """
    if answers.empty:
        return "No two of the pictures show the same class: nothing can be followed from one to another."
    said = {(row.kind, row.answer): percent(row.hits, row.low, row.high) for row in answers.itertuples()}
    chance = answers.groupby("kind", sort=False)["chance"].mean()
    each = [
        f"{kind} in {said[kind, 'distinctive']} (the strongest: {said[kind, 'strongest']}; any active latent: {said[kind, 'random']}; any patch: "
        f"{share:.1%})"
        for kind, share in chance.items()
    ]
    return f"Followed to another image, the most distinctive latent of a patch finds the same {', the same '.join(each)}."


def _share_of_hits(places: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights[:, places] * hits).sum(1) / weights[:, places].sum(1)


def _summarise(records: pd.DataFrame, n_images: int) -> pd.DataFrame:
    rows = []
    for (kind, answer), part in records.groupby(["kind", "answer"], sort=False):
        places, hits = part["place"].to_numpy(), part["hit"].to_numpy()
        with np.errstate(invalid="ignore"):
            found = interval(partial(_share_of_hits, places, hits), n_images, "images")
        rows.append((kind, answer, found.value, found.low, found.high, part["chance"].mean(), len(part)))
    return pd.DataFrame(rows, columns=["kind", "answer", "hits", "low", "high", "chance", "n"])


def _shown(dataset: Any, image: int, clip: Any) -> dict[str, np.ndarray]:
    """What every patch shows, by kind: int [P], -1 where it shows nothing of the kind."""
    label = int(dataset.labels[image])
    if not hasattr(dataset, "class_ids"):  # no scenes of the embedded world
        return {"class": np.full(clip.n_tokens - 1, label)}
    truth, table = dataset.truth(image), openmoji.class_table()
    shares, colors, bare = (patch_shares(each, clip) for each in (truth.object_share, truth.color_share, truth.background_share[None]))
    objects = _most(shares, np.asarray(truth.class_ids))
    categories = pd.factorize(table["category"], sort=True)[0]
    return {
        "object": objects,
        "category": np.where(objects < 0, -1, categories[objects]),
        "color": _most(colors, np.arange(len(colors))),
        "background": np.where(bare.ravel() == 1, truth.background, -1),
        "main": (shares * (truth.class_ids == dataset.class_ids[label])[:, None, None]).sum(0).ravel(),
    }


def _most(shares: np.ndarray, ids: np.ndarray) -> np.ndarray:
    shares = shares.reshape(len(shares), -1)
    return np.where(shares.max(0) >= LEAST_SHARE, ids[shares.argmax(0)], -1)


def _questions(kinds: dict[str, np.ndarray], grid: tuple[int, int]) -> list[tuple[int, list[str]]]:
    """The patches that are asked, and about what; of several that would do, the most central."""
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    off_center = ((rows - (grid[0] - 1) / 2) ** 2 + (columns - (grid[1] - 1) / 2) ** 2).ravel()
    if "main" not in kinds:
        return [(int(off_center.argmin()), ["class"])]
    patch = int((kinds["main"] - 1e-4 * off_center).argmax())
    questions = [(patch, [kind for kind in ("object", "category", "color") if kinds[kind][patch] >= 0])]
    bare = kinds["background"] >= 0
    if bare.any():
        questions.append((int(np.where(bare, off_center, np.inf).argmin()), ["background"]))
    return questions
