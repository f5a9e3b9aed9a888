"""Words for latents: a vocabulary's text embeddings against CLIP's embeddings of a latent's strongest images and of crops around its patches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..clip.zero_shot import embed_images
from ..data import openmoji, templates_for
from ..latents.pictures import seen_image
from ..latents.summary import LatentSummary

TEXTURES = (
    "striped", "dotted", "checkered", "furry", "feathered", "scaly", "smooth", "shiny", "wooden", "metallic", "woven", "wrinkled", "grainy",
    "bumpy", "transparent", "leafy",
)  # fmt: skip


def unique_names(class_names: Sequence[str]) -> np.ndarray:
    """Names that tell classes of equal name apart by their index: "missile (657)"; others stay as they are."""
    count = pd.Series(list(class_names)).value_counts()
    return np.array([f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(class_names)], dtype=object)


class Vocabulary(NamedTuple):
    """Words that may become names."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of each word: object, category, color, ... or "word"."""
    embeddings: Tensor
    """[V, d_embed] unit vectors."""
    class_index: tuple[int, ...]
    """Class of each word in the data set, -1 where it is none."""


class TextScores(NamedTuple):
    """Which word fits each latent, as CLIP's two towers see it."""

    table: pd.DataFrame
    """One row a latent that was scored: latent, name, kind, score, margin, p, runner_up, class_index."""
    scores: np.ndarray
    """[rows of table, V] every word's score: standard deviations above random images and crops."""
    vocabulary: Vocabulary
    n_latents: int
    """S, those not scored included."""


def make_vocabulary(
    clip, words: Sequence[str] | Mapping[str, Sequence[str]] | None = None, dataset=None, templates: Sequence[str] | None = None
) -> Vocabulary:
    """Words to name latents by, with their text embeddings.

    Parameters
    ----------
    clip : ClipModel
    words : sequence of str, or mapping of kind to sequence of str, optional
        Default: the data set's class names; in the embedded world also its categories, palette colours and backgrounds, elsewhere the
        palette's colours and ``TEXTURES``.
    dataset : optional
        Gives class names and templates; needed where ``words`` is not given.
    templates : sequence of str, optional
        Default: those of the data set, else ``"{}"`` alone. Backgrounds of the embedded world are put as its captions say them.

    Raises
    ------
    ValueError
        If there are no words, or neither words nor a data set.
    """
    if words is None and dataset is None:
        raise ValueError("make_vocabulary needs words, or a data set whose class names are words.")
    classes = list(unique_names(dataset.class_names)) if dataset is not None else []
    if words is None:
        words = {"object": classes}
        table = openmoji.class_table()
        if str(dataset.spec).startswith("openmoji"):
            words["category"] = sorted(table["category"].unique())
        words["color"] = list(openmoji.COLORS)
        if str(dataset.spec).startswith("openmoji"):
            words["background"] = list(openmoji.BACKGROUND_KINDS)
        else:
            words["texture"] = list(TEXTURES)
    groups = words if isinstance(words, Mapping) else {"word": list(words)}
    pairs = list(dict.fromkeys((kind, word) for kind, some in groups.items() for word in some))
    if not pairs:
        raise ValueError("The vocabulary is empty: give at least one word.")
    if templates is None:
        templates = templates_for(dataset.spec) if dataset is not None else ("{}",)
    plain = [i for i, (kind, _) in enumerate(pairs) if kind != "background"]
    embeddings = torch.empty(len(pairs), clip.d_embed)
    if plain:
        spoken = [re.sub(r" \(\d+\)$", "", pairs[i][1]) for i in plain]
        embeddings[plain] = clip.zero_shot_head(spoken, templates).cpu()
    behind = [i for i, (kind, _) in enumerate(pairs) if kind == "background"]
    if behind:
        phrases = [openmoji.BACKGROUNDS.get(pairs[i][1], pairs[i][1]) for i in behind]
        embeddings[behind] = clip.zero_shot_head(phrases, ("something {}.", "a picture {}.", "{}")).cpu()
    place = {name: i for i, name in enumerate(classes)}
    index = tuple(place.get(word, -1) if kind in ("object", "word") else -1 for kind, word in pairs)
    return Vocabulary(tuple(w for _, w in pairs), tuple(k for k, _ in pairs), embeddings, index)


@torch.no_grad()
def score_words(
    clip,
    dataset,
    summary: LatentSummary,
    vocabulary: Vocabulary,
    latents: Sequence[int] | None = None,
    *,
    embeddings: Tensor | None = None,
    n_images: int = 10,
    n_crops: int = 5,
    crop_margin: int = 2,
    n_random_crops: int = 1000,
    n_permutations: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> TextScores:
    """Score every word for each latent by what CLIP sees in its strongest images and around its strongest patches.

    A word's similarity to a picture is the cosine of their embeddings, as standard deviations from its mean over all images of the data
    set (crops: over random crops), so that words which fit every picture gain nothing. Its score is the mean over the latent's images and
    that over its crops, averaged. p asks how often as many random images and crops give *some* word as high a score: the maximum over
    words is compared with the maximum over words (Westfall and Young, 1993), so the size of the vocabulary is accounted for.

    Parameters
    ----------
    clip : ClipModel
    dataset
        The one that ``summary`` was made from.
    summary : LatentSummary
        Crops need ``top_patches`` (tokens "all" or "patches"); without them images alone count.
    vocabulary : Vocabulary
        See :func:`make_vocabulary`.
    latents : sequence of int, optional
        Default: all that are neither dead nor faint.
    embeddings : Tensor [n_images of the data set, d_embed], optional
        Unit vectors of all images (:func:`embed_images`); computed when not given.
    n_images, n_crops : int
        Reference images and patches a latent, at most as many as the summary keeps; ``n_crops=0`` does without.
    crop_margin : int
        Patches around the strongest one on every side.
    n_random_crops, n_permutations : int
        Size of the comparison.
    batch_size : int
    seed : int
    progress : bool

    Returns
    -------
    TextScores

    Raises
    ------
    ValueError
        If the summary was made from another data set, a number is out of range, or a latent is.
    """
    if summary.n_images != len(dataset):
        raise ValueError(f"The summary read {summary.n_images} images, this data set has {len(dataset)}: give the one that was summarised.")
    if n_images < 1 or n_crops < 0 or n_permutations < 1 or n_random_crops < 2:
        raise ValueError(
            f"n_images and n_permutations must be positive, n_crops at least 0, n_random_crops at least 2; got {n_images}, {n_permutations}, "
            f"{n_crops}, {n_random_crops}."
        )
    living = (~summary.dead & ~summary.faint).nonzero().flatten()
    latents = living if latents is None else torch.tensor([int(s) for s in latents], dtype=torch.long)
    if len(latents) and not (0 <= int(latents.min()) and int(latents.max()) < summary.n_latents):
        raise ValueError(f"Latents must lie in range({summary.n_latents}), got {int(latents.min())} to {int(latents.max())}.")
    rng = np.random.default_rng(seed)
    if embeddings is None:
        embeddings = embed_images(clip, dataset, batch_size=batch_size, progress=progress)
    pool = _standardized(embeddings.cpu().float() @ vocabulary.embeddings.T)
    rows = summary.top_images[latents, :n_images].numpy()
    parts, nulls = [_means(pool[0], rows)], [(pool[0], rows)]
    if n_crops and summary.top_patches is not None:
        n_patches = clip.grid[0] * clip.grid[1]
        some = torch.stack([summary.top_patch_images[latents, :n_crops], summary.top_patches[latents, :n_crops]], -1).numpy()
        chance = np.stack([rng.integers(len(dataset), size=n_random_crops), rng.integers(n_patches, size=n_random_crops)], 1)
        wanted = np.concatenate([chance, some[some[..., 0] >= 0].reshape(-1, 2)])
        places, back = np.unique(wanted, axis=0, return_inverse=True)
        seen = embed_crops(clip, dataset, places, crop_margin, batch_size=batch_size, progress=progress) @ vocabulary.embeddings.T
        back = back.reshape(-1)
        random_crops, mean, std = _standardized(seen[back[:n_random_crops]])
        cut = np.full(some.shape[:2], -1)
        cut[some[..., 0] >= 0] = np.arange(len(wanted) - n_random_crops)
        parts.append(_means(((seen[back[n_random_crops:]] - mean) / std), cut))
        nulls.append((random_crops, cut))
    scores = np.mean(parts, 0)
    p = _permutation_p(scores.max(1), nulls, n_permutations, rng)
    return TextScores(_word_table(latents.numpy(), scores, p, vocabulary), scores, vocabulary, summary.n_latents)


@torch.no_grad()
def embed_crops(clip, dataset, places: np.ndarray, margin: int = 2, *, batch_size: int = 64, progress: bool = True) -> Tensor:
    """Unit image features of crops around patches, each enlarged to a whole image: [n, d_embed].

    Parameters
    ----------
    clip : ClipModel
    dataset
    places : int array [n, 2]
        Image, and patch (row * columns + column). Images are loaded once where equal ones follow each other.
    margin : int
        Patches around it on every side; at the border the crop moves inwards.
    batch_size : int
    progress : bool

    Raises
    ------
    ValueError
        If the crop would be larger than the image.
    """
    rows, columns = clip.grid
    side = 2 * margin + 1
    if margin < 0 or side > min(rows, columns):
        raise ValueError(f"margin must be 0 to {(min(rows, columns) - 1) // 2} on a grid of {rows} x {columns}, got {margin}.")
    height, width = clip.image_size[0] // rows, clip.image_size[1] // columns
    found, inputs, last, picture = torch.empty(len(places), clip.d_embed), [], None, None
    for i, (image, patch) in enumerate(tqdm(places.tolist(), desc="embedding crops", disable=not progress)):
        if image != last:
            last, picture = image, seen_image(clip, dataset[image].image).numpy()
        row, column = divmod(patch, columns)
        top, left = min(max(row - margin, 0), rows - side) * height, min(max(column - margin, 0), columns - side) * width
        inputs.append(clip.preprocess(Image.fromarray(picture[top : top + side * height, left : left + side * width])))
        if len(inputs) == batch_size or i + 1 == len(places):
            found[i + 1 - len(inputs) : i + 1] = F.normalize(clip.encode_image(torch.stack(inputs)).float(), dim=-1).cpu()
            inputs = []
    return found


def _standardized(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns at mean 0 and standard deviation 1, and what they had; a constant column becomes 0."""
    mean, std = similarity.mean(0), similarity.std(0, correction=0).clamp_min(1e-12)
    return (similarity - mean) / std, mean, std


def _means(values: Tensor, rows: np.ndarray) -> np.ndarray:
    """Mean of some rows of [N, V] for each set [n, k] of them; -1 is padding, an empty set gives 0."""
    values, real = values.double().numpy(), rows >= 0
    total = np.zeros((len(rows), values.shape[1]))
    for column in range(rows.shape[1]):
        total += values[rows[:, column]] * real[:, [column]]
    return total / np.maximum(real.sum(1), 1)[:, None]


def _permutation_p(
    observed: np.ndarray, nulls: list[tuple[Tensor, np.ndarray]], n_permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Share of random sets, of the same numbers of images and crops, whose best word scores at least as high; the set itself counts as one."""
    sizes = np.stack([(rows >= 0).sum(1) for _, rows in nulls], 1)
    sums = []
    for pool, rows in nulls:
        values = pool.double().numpy()
        size = min(rows.shape[1], len(values))
        drawn = np.array([rng.choice(len(values), size, replace=False) for _ in range(n_permutations)]).reshape(n_permutations, size)
        sums.append((values, drawn))
    p = np.ones(len(observed))
    for size in np.unique(sizes, axis=0):
        if not size.any():
            continue
        null = np.mean([_means(torch.from_numpy(values), drawn[:, :n]) for (values, drawn), n in zip(sums, size, strict=True)], 0)
        ordered = np.sort(null.max(1))
        same = (sizes == size).all(1)
        p[same] = (1 + len(ordered) - np.searchsorted(ordered, observed[same], "left")) / (1 + len(ordered))
    return p


def _word_table(latents: np.ndarray, scores: np.ndarray, p: np.ndarray, vocabulary: Vocabulary) -> pd.DataFrame:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    at = np.arange(len(scores))
    words, kinds, index = (np.array(part, dtype=object) for part in (vocabulary.words, vocabulary.kinds, vocabulary.class_index))
    second = scores[at, order[:, 1]] if order.shape[1] > 1 else np.zeros(len(at))
    return pd.DataFrame(
        {
            "latent": latents, "name": words[order[:, 0]], "kind": kinds[order[:, 0]], "score": scores[at, order[:, 0]],
            "margin": scores[at, order[:, 0]] - second, "p": p,
            "runner_up": words[order[:, 1]] if order.shape[1] > 1 else "", "class_index": index[order[:, 0]].astype(int),
        }
    )  # fmt: skip
