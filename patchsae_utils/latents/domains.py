"""The same latents elsewhere: in other domains and data sets, at other layers, on CLS alone, and in written words.

Lim et al., ICLR 2025, show these as examples (their Figs. 4, 8, 9, 10 and 13); here each comes with a number and a control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data import ImageData, batches
from ..sae.dictionary import select_latents
from .measures import merge_keys, pack_top, shuffled_label_entropy, unpack_top
from .pictures import References, seen_image
from .reading import latent_masks, read_latents, summarize_latents
from .summary import LatentSummary

# -- other domains and data sets --------------------------------------------------------------------------------------------


class CrossDomain(NamedTuple):
    """Some latents' reference images in several data sets."""

    references: dict[int, dict[str, References]]
    """Latent -> name of the data set -> its reference images there."""
    table: pd.DataFrame
    """latent, domain, frequency, mean_activation; where all data sets have the same classes also ``same_class`` (share of the reference
    images whose class is one of the first data set's references), ``chance`` (share of all images in those classes) and ``correlation``
    (of the classes' mean activations with the first data set's; 0 where either is constant)."""


@torch.no_grad()
def cross_domain_references(
    clip,
    sae,
    datasets: Mapping[str, Any],
    latents: Sequence[int],
    layer: int,
    *,
    k: int = 5,
    pictured: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> CrossDomain:
    """The same latents' reference images in other domains or data sets. Only these latents are computed.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    datasets : mapping of str to data set
        What to call it -> e.g. ``load_dataset("openmoji/all:line", "train")``. The first is compared with.
    latents : sequence of int
    layer : int
    k : int
        Reference images a latent and data set; fewer where fewer are active.
    pictured : sequence of int, optional
        Those of the latents that are in ``references``, whose images are drawn and read once more; the table holds all. Default: all.

    Raises
    ------
    ValueError
        If there are no data sets, one is empty, a latent is outside range(S), or one that is pictured is not among the latents.
    """
    latents = [int(s) for s in latents]
    if not datasets or any(len(data) == 0 for data in datasets.values()):
        raise ValueError(f"Give at least one data set, and none that is empty; got { ({n: len(d) for n, d in datasets.items()}) }.")
    if latents and not (0 <= min(latents) and max(latents) < sae.W_enc.shape[1]):
        raise ValueError(f"Latents must lie in range({sae.W_enc.shape[1]}), got {min(latents)} to {max(latents)}.")
    pictured = latents if pictured is None else [int(s) for s in pictured]
    if unknown := set(pictured) - set(latents):
        raise ValueError(f"Latent {min(unknown)} is to be pictured but not among the latents. Add it.")
    same_classes = len({tuple(data.class_names) for data in datasets.values()}) == 1
    references: dict[int, dict[str, References]] = {latent: {} for latent in pictured}
    records, base = [], None
    for name, data in datasets.items():
        means = torch.empty(len(data), len(latents))
        for batch in batches(data, clip.preprocess, batch_size, progress=name if progress else None):
            tokens = clip.residual(batch.images, layer)[:, : clip.n_tokens]
            means[batch.indices] = select_latents(sae, tokens, latents).mean(1).cpu()
        kept = torch.zeros(len(latents), k, dtype=torch.long)
        merge_keys(kept, pack_top(means.T, torch.arange(len(data)).expand(len(latents), -1)))
        values, images = unpack_top(kept)
        labels, profiles = torch.as_tensor(data.labels), _class_means(means, torch.as_tensor(data.labels), len(data.class_names))
        base = (profiles, images, labels) if base is None else base
        for column, latent in enumerate(latents):
            if latent in references:
                references[latent][name] = _references(clip, sae, data, latent, images[column], values[column], layer)
            active = means[:, column] > 0
            record = {
                "latent": latent,
                "domain": name,
                "frequency": float(active.float().mean()),
                "mean_activation": float(means[active, column].mean()) if active.any() else 0.0,
            }
            if same_classes:
                first = base[2][base[1][column][base[1][column] >= 0]].unique()
                own = labels[images[column][images[column] >= 0]]
                record |= {
                    "same_class": float(torch.isin(own, first).float().mean()) if len(own) else 0.0,
                    "chance": float(torch.isin(labels, first).float().mean()),
                    "correlation": _correlation(base[0][:, column].numpy(), profiles[:, column].numpy()),
                }
            records.append(record)
    return CrossDomain(references, pd.DataFrame(records))


def _references(clip, sae, data, latent: int, images: Tensor, values: Tensor, layer: int) -> References:
    images = images[images >= 0]
    n = len(images)
    if not n:
        nothing = torch.zeros(0, *clip.image_size, 3, dtype=torch.uint8), torch.zeros(0, *clip.grid)
        return References(latent, *nothing, values[:0], images, images)
    examples = [data[int(i)] for i in images]
    inputs = torch.stack([clip.preprocess(example.image) for example in examples])
    masks = latent_masks(clip, sae, inputs, [latent], layer)[:, 0].cpu()
    pictures = torch.stack([seen_image(clip, x) for x in inputs])
    return References(latent, pictures, masks, values[:n], torch.tensor([example.label for example in examples]), images)


def _class_means(values: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Means by class, [N, n] -> [C, n]; 0 for classes without images."""
    sums = torch.zeros(n_classes, values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    return sums / torch.bincount(labels, minlength=n_classes).clamp_min(1)[:, None]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float(a @ b / scale) if scale > 1e-12 else 0.0


# -- layers, and kinds of tokens ----------------------------------------------------------------------------------------------


class GroupStatistics(NamedTuple):
    """Statistics of latents, group by group: layers, SAEs, or kinds of tokens."""

    latents: pd.DataFrame
    """One row a living latent: group, then the columns of ``LatentSummary.to_frame``."""
    table: pd.DataFrame
    """One row a group: group, n_latents, dead, faint (shares); median, low and high (95 % bootstrap over latents) of frequency,
    mean_activation, label_entropy and label_std, as ``<name>``, ``<name>_low``, ``<name>_high``; ``shuffled_entropy``: the median label
    entropy when labels are shuffled."""


def group_statistics(summaries: Mapping[Any, LatentSummary], labels: Tensor, *, n_bootstrap: int = 1000, seed: int = 0) -> GroupStatistics:
    """Compare latents' statistics, e.g. of a CLS-only and an all-token SAE (the paper's Fig. 8), or of the kinds of tokens of one pass.

    Parameters
    ----------
    summaries : mapping of name to LatentSummary
        All of the same data set.
    labels : LongTensor [n_images]
        Of that data set, for the shuffled control.
    n_bootstrap, seed : int

    Raises
    ------
    ValueError
        If there are none, or one of them read another number of images.
    """
    if not summaries or any(summary.n_images != len(labels) for summary in summaries.values()):
        raise ValueError(
            f"Give summaries of one data set with its {len(labels)} labels; they read {[s.n_images for s in summaries.values()]} images."
        )
    names = ("frequency", "mean_activation", "label_entropy", "label_std")
    frames, rows = [], []
    for group, summary in summaries.items():
        frame = summary.to_frame()
        frames.append(frame.assign(group=str(group)))
        row = {"group": str(group), "n_latents": summary.n_latents, "dead": float(summary.dead.float().mean())}
        row["faint"] = float(summary.faint.float().mean())
        rng = np.random.default_rng(seed)
        for name in names:
            values = frame[name].to_numpy(np.float64)
            row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), 0.0)
            if len(values):
                draws = [np.median(values[rng.integers(len(values), size=len(values))]) for _ in range(n_bootstrap)]
                row |= {name: float(np.median(values)), f"{name}_low": float(np.quantile(draws, 0.025))}
                row[f"{name}_high"] = float(np.quantile(draws, 0.975))
        shuffled = shuffled_label_entropy(summary.top_values, summary.top_images, labels, len(summary.class_names), seed)[~summary.dead]
        row["shuffled_entropy"] = float(shuffled.median()) if len(shuffled) else 0.0
        rows.append(row)
    latents = pd.concat(frames, ignore_index=True)
    return GroupStatistics(latents[["group", *latents.columns.drop("group")]], pd.DataFrame(rows))


def layer_statistics(clip, saes: Mapping[int, Any], dataset, *, n_bootstrap: int = 1000, seed: int = 0, **options) -> GroupStatistics:
    """Statistics of the latents of several layers' SAEs over one data set (the paper's Fig. 9).

    Parameters
    ----------
    clip : ClipModel
    saes : mapping of int to SparseAutoencoder
        Layer -> the SAE that was trained on it.
    dataset
    n_bootstrap, seed : int
    **options
        For :func:`patchsae_utils.summarize_latents`: ``k``, ``tau``, ``tokens``, ...

    Raises
    ------
    ValueError
        If an SAE was trained on another layer than the one it is given for.
    """
    summaries = {}
    for layer, sae in saes.items():
        index = clip.layer_index(layer)
        sae.check_source(d_in=clip.width, layer=index, source=f"layer {index} of {clip.name!r}")
        summaries[f"layer {index}"] = summarize_latents(clip, sae, dataset, layer, **options)
    return group_statistics(summaries, torch.as_tensor(dataset.labels), n_bootstrap=n_bootstrap, seed=seed)


# -- written words --------------------------------------------------------------------------------------------------------------


def word_scene(word: str, size: tuple[int, int] = (112, 112), seed: int = 0) -> Image.Image:
    """A word in dark ink on a plain light background, as large as fits; place, shade and ink are drawn with ``seed``.

    Parameters
    ----------
    word : str
        Broken into lines at spaces where that makes it larger.
    size : (width, height)
        In pixels.
    seed : int
    """
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


def word_scenes(class_names: Sequence[str], n_per_word: int = 4, size: tuple[int, int] = (112, 112), seed: int = 0) -> ImageData:
    """A data set of written words, with the classes of the things that they name: see :func:`word_scene`."""
    labels = [c for c in range(len(class_names)) for _ in range(n_per_word)]
    names = list(class_names)
    return ImageData("words", "test", names, labels, lambda i: word_scene(names[labels[i]], size, seed * n_per_word + i % n_per_word))


class TextAndImage(NamedTuple):
    """Which latents answer to a thing and to its written name."""

    table: pd.DataFrame
    """One row a latent that is active on things: latent, label and class_name (the class on whose pictures it is strongest), object and
    other_objects (mean activation on that class's pictures, and on the others'), word and other_words (the same on written words), p
    (share of all words on which it is at least as active as on its own: 1/C at best), score (the smaller of the two excesses in standard
    deviations over classes; 0 where either is not positive). Best score first."""
    share: float
    """Of these latents, with p <= alpha."""
    shuffled: np.ndarray
    """[R] the same share when names are dealt to the words at random, all latents alike."""
    p: float
    """Share of the shuffles that reach ``share``: (1 + hits) / (1 + R)."""
    alpha: float


@torch.no_grad()
def text_and_image_latents(
    clip,
    sae,
    objects,
    layer: int,
    *,
    words=None,
    alpha: float = 0.05,
    n_shuffles: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> TextAndImage:
    """Latents that answer to text in an image and to the thing itself (the paper's Fig. 13), with a control.

    A latent's class is chosen on pictures alone: where its mean activation is largest. On pictures of written words it is then asked
    whether the name of that class moves it more than the names of all others do. Under the null names are exchangeable, so the rank of
    its own is uniform; ties count against it.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    objects
        Data set of things: at least two classes with images.
    layer : int
    words : optional
        Data set of written words with the same class names; default: ``word_scenes(objects.class_names)`` at the model's size.
    alpha : float
        Level of a single latent's test.
    n_shuffles, seed : int

    Raises
    ------
    ValueError
        If the class names differ, or fewer than two classes have images in both.
    """
    words = word_scenes(objects.class_names, size=clip.image_size[::-1], seed=seed) if words is None else words
    if list(words.class_names) != list(objects.class_names):
        raise ValueError(
            "The words must have the class names of the objects, in the same order: word_scenes(objects.class_names) makes them."
        )
    thing, n_things = _activation_by_class(clip, sae, objects, layer, batch_size, "objects" if progress else None)
    word, n_words = _activation_by_class(clip, sae, words, layer, batch_size, "words" if progress else None)
    present = ((n_things > 0) & (n_words > 0)).nonzero().flatten()
    if len(present) < 2:
        raise ValueError(f"Needs at least two classes with pictures and with written words, got {len(present)}.")
    thing, word = thing[present].numpy(), word[present].numpy()
    n_classes = len(present)
    alive = np.flatnonzero(thing.max(0) > 0)
    thing, word = thing[:, alive], word[:, alive]
    own, columns = thing.argmax(0), np.arange(len(alive))

    ascending = np.sort(word, axis=0)
    reached = np.stack([n_classes - np.searchsorted(ascending[:, j], word[:, j], "left") for j in columns], 1) if len(alive) else word
    rank = reached / n_classes  # share of the words that reach each word's activation, itself included
    excess = []
    for values in (thing, word):
        others = (values.sum(0) - values[own, columns]) / (n_classes - 1)
        spread = values.std(0)
        excess.append((np.divide(values[own, columns] - others, spread, out=np.zeros(len(alive)), where=spread > 1e-12), others))
    p = rank[own, columns]
    rng = np.random.default_rng(seed)
    shuffled = (
        np.array([(rank[rng.permutation(n_classes)[own], columns] <= alpha).mean() for _ in range(n_shuffles)])
        if len(alive)
        else np.zeros(0)
    )
    share = float((p <= alpha).mean()) if len(alive) else 0.0
    labels = present.numpy()[own]
    table = pd.DataFrame(
        {
            "latent": alive,
            "label": labels,
            "class_name": [objects.class_names[c] for c in labels],
            "object": thing[own, columns],
            "other_objects": excess[0][1],
            "word": word[own, columns],
            "other_words": excess[1][1],
            "p": p,
            "score": np.minimum(excess[0][0], excess[1][0]).clip(0),
        }
    )
    table = table.sort_values(["score", "latent"], ascending=[False, True], ignore_index=True)
    return TextAndImage(table, share, shuffled, float((1 + (shuffled >= share).sum()) / (1 + len(shuffled))), alpha)


def _activation_by_class(clip, sae, data, layer: int, batch_size: int, progress: str | None) -> tuple[Tensor, Tensor]:
    """Mean over images of the mean over patches, float64 [C, S], and the images of each class. CLS reads no place, so it stays out."""
    sums = torch.zeros(len(data.class_names), sae.W_enc.shape[1], dtype=torch.float64, device=sae.W_enc.device)
    for labels, _, h in read_latents(clip, sae, data, layer, batch_size, progress=progress):
        sums.index_add_(0, labels, h[:, 1:].mean(1).double())
    n = torch.bincount(torch.as_tensor(data.labels), minlength=len(sums))
    return sums.cpu() / n.clamp_min(1)[:, None], n


class TextExample(NamedTuple):
    """A latent on a thing, on its written name, and on another name."""

    latent: int
    titles: tuple[str, str, str]
    images: Tensor
    """[3, H, W, 3] uint8, as CLIP saw them."""
    masks: Tensor
    """[3, rows, columns] activations on the patch grid."""


@torch.no_grad()
def text_and_image_examples(
    clip, sae, objects, layer: int, found: TextAndImage, latents: Sequence[int], *, seed: int = 0
) -> list[TextExample]:
    """Pictures for some latents of :func:`text_and_image_latents`: the first picture of the latent's class, its name, another class's name.

    Raises
    ------
    ValueError
        If a latent is not in the table.
    """
    rows = found.table.set_index("latent")
    labels = torch.as_tensor(objects.labels)
    rng = np.random.default_rng(seed)
    examples = []
    for latent in map(int, latents):
        if latent not in rows.index:
            raise ValueError(f"Latent {latent} is active on none of the pictures; the table holds {len(rows)} latents.")
        label = int(rows.loc[latent, "label"])
        names = [objects.class_names[label], str(rng.choice([n for c, n in enumerate(objects.class_names) if c != label]))]
        size = clip.image_size[::-1]
        pictures = [objects[int((labels == label).nonzero()[0])].image, *(word_scene(name, size, seed) for name in names)]
        inputs = torch.stack([clip.preprocess(picture) for picture in pictures])
        masks = latent_masks(clip, sae, inputs, [latent], layer)[:, 0].cpu()
        titles = (names[0], f"“{names[0]}”", f"“{names[1]}”")
        examples.append(TextExample(latent, titles, torch.stack([seen_image(clip, x) for x in inputs]), masks))
    return examples
