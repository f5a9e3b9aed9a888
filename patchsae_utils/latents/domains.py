"""The same latents in other domains and data sets, and in written words (Lim et al., ICLR 2025, Figs. 4, 10 and 13), with controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata

from ..data.dataset import ImageData
from ..sae.dictionary import select_latents
from .measures import merge_keys, pack_top, unpack_top
from .passes import read_latents, read_streams
from .pictures import N_REFERENCES, References, references

ALPHA = 0.05  # level of a single latent's test of whether it reads
N_SHUFFLES = 1000


class CrossDomain(NamedTuple):
    """Some latents' reference images in several data sets."""

    references: dict[int, dict[str, References]]  # latent -> name of the data set -> its reference images there
    # latent, domain, frequency; where all have the same classes also same_class (share of the reference images whose class
    # is one of the first data set's references) and chance (of all images)
    table: pd.DataFrame


@torch.no_grad()
def cross_domain_references(
    clip, sae, datasets: Mapping[str, Any], latents: Sequence[int], layer: int, *, pictured: Sequence[int] = ()
) -> CrossDomain:
    """The same latents' five strongest images in other domains or data sets.

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    datasets : mapping of name to data set; the first is compared with
    latents, pictured : sequence of int; those of the latents whose images are drawn and read once more (the table holds all)
    """
    sae.check_model(clip, layer)
    latents = [int(s) for s in latents]
    classes = {tuple(data.class_names) for data in datasets.values()}
    same_classes = len(classes) == 1 and classes != {()}
    found: dict[int, dict[str, References]] = {int(latent): {} for latent in pictured}
    tables, first = [], None
    for name, data in datasets.items():
        means = torch.empty(len(data), len(latents))
        for _, _, places, stream in read_streams(clip, data, layer, progress=name):
            means[places] = select_latents(sae, stream.tokens[:, : clip.n_tokens], latents).mean(1).cpu()
        kept = torch.zeros(len(latents), N_REFERENCES, dtype=torch.long)
        merge_keys(kept, pack_top(means.T, torch.arange(len(data)).expand(len(latents), -1)))
        values, images = unpack_top(kept)
        for latent in found:
            column = latents.index(latent)
            found[latent][name] = references(clip, sae, data, latent, images[column], values[column], layer)
        table = pd.DataFrame({"latent": latents, "domain": name, "frequency": (means > 0).double().mean(0).numpy()})
        if same_classes:
            labels = torch.as_tensor(data.labels)
            own = [labels[of[of >= 0]] for of in images]  # classes of each latent's references
            first = first or own
            table["same_class"] = [float(torch.isin(a, b).float().mean()) if len(a) else 0.0 for a, b in zip(own, first, strict=True)]
            table["chance"] = [float(torch.isin(labels, each).float().mean()) for each in first]
        tables.append(table)
    return CrossDomain(found, pd.concat(tables, ignore_index=True))


def word_scene(word: str, size: tuple[int, int] = (112, 112), seed: int = 0) -> Image.Image:
    """A word in dark ink on plain light paper, as large as fits ``size`` (width, height), in two lines where that is larger."""
    rng = np.random.default_rng([seed, *size, *word.encode()])
    paper, ink = int(rng.integers(215, 256)), int(rng.integers(0, 60))
    picture = Image.new("RGB", size, (paper,) * 3)
    draw = ImageDraw.Draw(picture)
    for points in range(size[1] // 3, 5, -1):
        font = ImageFont.load_default(points)
        for text in dict.fromkeys((word, word.replace(" ", "\n"))):
            left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, align="center")
            if right - left <= 0.92 * size[0] and bottom - top <= 0.92 * size[1]:
                x = rng.uniform(0.04 * size[0], 0.96 * size[0] - (right - left)) - left
                y = rng.uniform(0.04 * size[1], 0.96 * size[1] - (bottom - top)) - top
                draw.multiline_text((x, y), text, font=font, fill=(ink,) * 3, align="center")
                return picture
    raise ValueError(f"The word {word!r} doesn't fit into {size[0]} x {size[1]} pixels at six points.")


def word_scenes(class_names: Sequence[str], n_per_word: int = 4, size: tuple[int, int] = (112, 112)) -> ImageData:
    """A data set of written words, with the classes of the things that they name: dark ink on plain light paper.

    Parameters
    ----------
    class_names : sequence of str
    n_per_word, size : int, (width, height); pictures of each word, at other places and in other shades
    """
    names, labels = list(class_names), [c for c in range(len(class_names)) for _ in range(n_per_word)]
    return ImageData("words", "test", names, labels, lambda i: word_scene(names[labels[i]], size, i % n_per_word))


class TextAndImage(NamedTuple):
    """Which latents answer to a thing and to its written name.

    The table has a row for each latent active on things: latent, label (class on whose pictures it is strongest), p (share of all words on
    which it is at least as active as on that class's name).
    """

    table: pd.DataFrame
    share: float  # of these latents, with p <= alpha
    shuffled: np.ndarray  # [R] that share when names are dealt to the words at random, all latents alike
    p: float  # share of the shuffles that reach ``share``: (1 + hits) / (1 + R)
    alpha: float = ALPHA


@torch.no_grad()
def text_and_image_latents(clip, sae, objects, words, layer: int) -> TextAndImage:
    """Latents that answer to text in an image and to the thing itself (the paper's Fig. 13), with a control.

    A latent's class is chosen on pictures alone, by its mean activation. Then: does the name of that class move it more than the names of
    all others do? Under the null names are exchangeable, so the rank of its own is uniform; ties count against it.

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    objects, words
        Data sets of things, and of written words with the same class names: ``word_scenes(objects.class_names)``. Other names, or fewer than
        two classes with images in both, are a ``ValueError``.
    """
    sae.check_model(clip, layer)
    if list(words.class_names) != list(objects.class_names):
        raise ValueError("The words must have the objects' class names, in the same order: word_scenes(objects.class_names) makes them.")
    (thing, n_things), (word, n_words) = (_activation_by_class(clip, sae, data, layer) for data in (objects, words))
    present = np.flatnonzero((n_things > 0) & (n_words > 0))
    if len(present) < 2:
        raise ValueError(f"Needs at least two classes with pictures and with written words, got {len(present)}.")
    thing, word = thing[present], word[present]
    alive = np.flatnonzero(thing.max(0) > 0)
    thing, word, n_classes, columns = thing[:, alive], word[:, alive], len(present), np.arange(len(alive))
    own = thing.argmax(0)
    rank = rankdata(-word, method="max", axis=0) / n_classes  # share of the words that reach each word's activation, itself included
    rng = np.random.default_rng(0)
    dealt = [own, *(rng.permutation(n_classes)[own] for _ in range(N_SHUFFLES))]
    share, *by_chance = [float((rank[classes, columns] <= ALPHA).mean()) if len(alive) else 0.0 for classes in dealt]
    shuffled = np.array(by_chance)
    table = pd.DataFrame({"latent": alive, "label": present[own], "p": rank[own, columns]})
    return TextAndImage(table, share, shuffled, float((1 + (shuffled >= share).sum()) / (1 + N_SHUFFLES)))


def _activation_by_class(clip, sae, data, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images of the mean over patches, without CLS, float64 [C, S], and the images of each class."""
    sums = torch.zeros(len(data.class_names), sae.W_enc.shape[1], dtype=torch.float64, device=sae.W_enc.device)
    for labels, _, h in read_latents(clip, sae, data, layer, progress="objects and words"):
        sums.index_add_(0, labels.to(sums.device), h[:, 1:].mean(1).double())
    n = torch.bincount(torch.as_tensor(data.labels), minlength=len(sums))
    return (sums.cpu() / n.clamp_min(1)[:, None]).numpy(), n.numpy()
