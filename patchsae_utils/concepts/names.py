"""Names for latents, from three sources that know nothing of each other (labels, text, ground truth), and how far they agree.

The decoder's row is never compared with text: it lies in the residual stream, not in CLIP's output space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..data import openmoji, templates_for
from ..data.splits import require_labels
from ..latents.pictures import seen_image
from ..latents.summary import LatentSummary
from .report import ConceptReport

UNNAMED = "unnamed"
NO_NAME = {"name": UNNAMED, "kind": UNNAMED, "score": 0.0, "margin": 0.0, "p": 1.0, "runner_up": "", "class_index": -1}
N_IMAGES, N_CROPS = 10, 3  # of a latent, that words are compared with
N_RANDOM_CROPS, N_PERMUTATIONS = 600, 2000  # what scores are compared with
CROP_MARGIN = 2  # patches around the strongest one on every side
TEXTURES = (
    "striped", "dotted", "checkered", "furry", "feathered", "scaly", "smooth", "shiny", "wooden", "metallic", "woven", "wrinkled", "grainy",
    "bumpy", "transparent", "leafy",
)  # fmt: skip


def unique_names(class_names: Sequence[str]) -> np.ndarray:
    """Names that tell classes of equal name apart by their index: "missile (657)"; others stay as they are."""
    count = pd.Series(list(class_names)).value_counts()
    return np.array([f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(class_names)], dtype=object)


def label_latents(
    summary: LatentSummary, report: ConceptReport | None = None, *, text: pd.DataFrame | None = None, max_p: float = 0.01
) -> pd.DataFrame:
    """Name latents, with a score, a margin and "unnamed" where nothing stands out.

    With a report (*ground truth*) the name is the concept whose mask the latent correlates with most; the score is that correlation on
    held-out scenes (at least 0.1), p the share of latents active in about as many images that reach it when pictures are shuffled. With
    ``text`` it is the word that :func:`score_words` found (at least half a standard deviation). With neither (*labels*) it is the class in
    whose images the latent is active most above the base rate; the score is that lift (at least 2), p the binomial tail times the number of
    classes. Names from text are judged by q, p after the correction of Benjamini and Hochberg (1995) over the living latents.

    Parameters
    ----------
    summary : LatentSummary
    report : ConceptReport, optional
        Of the same SAE.
    text : DataFrame, optional
        Of :func:`score_words`, for the same SAE.
    max_p : float
        Names less certain than that become "unnamed".

    Returns
    -------
    DataFrame
        One row a latent: latent, name, kind ("dead", "unnamed", or of the name), score, margin, p, q, runner_up, class_index (-1 where the
        name is no class), n_images (where it is active), frequency.
    """
    if report is not None and text is not None:
        raise ValueError("Names come from ground truth (report) or from text, not from both: call twice, and compare by name_agreement.")
    if report is not None and (len(report.latents) != summary.n_latents or summary.sae and report.sae and summary.sae != report.sae):
        of = f"The summary ({summary.n_latents} latents, {summary.sae}) and the report ({len(report.latents)} latents, {report.sae})"
        raise ValueError(f"{of} are of different SAEs.")
    if text is not None and len(text) and (last := text["latent"].max()) >= summary.n_latents:
        raise ValueError(f"The summary has {summary.n_latents} latents, the text scores latent {last}: they are of different SAEs.")
    dead = summary.dead.numpy()
    if report is not None:
        kind = report.latents["concept"].str.partition(":")
        frame, least = report.latents[["latent", "score", "margin", "p", "runner_up"]].assign(kind=kind[0], class_index=-1), 0.1
        frame.insert(1, "name", kind[2].where(kind[2] != "", kind[0]))
    elif text is not None:
        frame = pd.DataFrame({"latent": np.arange(summary.n_latents)}).merge(text, on="latent", how="left")
        frame, least = frame.fillna(NO_NAME).astype({"class_index": int})[["latent", *NO_NAME]], 0.5
    else:
        frame, least = _names_from_labels(summary), 2.0
    judged = ~dead if text is None else np.isin(frame["latent"], text["latent"]) & ~dead
    frame["q"] = 1.0
    if judged.any():
        frame.loc[judged, "q"] = stats.false_discovery_control(frame.loc[judged, "p"])
    frame["n_images"] = summary.class_hits.sum(0).long().numpy()
    frame["frequency"] = summary.frequency.numpy()
    weak = ((frame["p"] if text is None else frame["q"]) > max_p) | (frame["score"] < least)
    frame.loc[weak | dead, ["name", "kind", "class_index"]] = [UNNAMED, UNNAMED, -1]
    frame.loc[dead, ["kind", "score", "margin", "p", "q", "runner_up"]] = ["dead", 0.0, 0.0, 1.0, 1.0, ""]
    return frame


def say_names(names: pd.DataFrame) -> str:
    """How many living latents got a name, by kind, in words: of a table of :func:`label_latents`.

    Parameters
    ----------
    names : DataFrame
    """
    share = names.loc[names["kind"] != "dead", "kind"].value_counts(normalize=True)
    kinds = share.drop(UNNAMED, errors="ignore")
    return f"{kinds.sum():.0%} of the living latents get a name ({', '.join(f'{kind} {value:.1%}' for kind, value in kinds.items())})"


def _names_from_labels(summary: LatentSummary) -> pd.DataFrame:
    """Columns of :func:`label_latents` from the lift of each class."""
    require_labels(summary)
    hits, per_class = summary.class_hits.double().numpy(), summary.class_images.double().numpy()
    active = hits.sum(0)
    base = per_class / max(per_class.sum(), 1)
    expected = np.outer(base, active)
    lift = np.divide(hits, expected, out=np.zeros_like(hits), where=expected > 0)
    order = np.argsort(-lift, axis=0, kind="stable")[:2]
    columns = np.arange(lift.shape[1])
    best = order[0]
    tail = stats.binom.sf(hits[best, columns] - 1, active, base[best]) * len(base)
    second = lift[order[1], columns] if len(order) > 1 else 0.0
    names, score = unique_names(summary.class_names), lift[best, columns]
    said = {"latent": columns, "name": names[best], "kind": "class", "score": score, "margin": score - second, "p": np.minimum(tail, 1.0)}
    said |= {"runner_up": names[order[1]] if len(order) > 1 else "", "class_index": best}
    return pd.DataFrame(said)


class Vocabulary(NamedTuple):
    """Words that may become names."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]  # of each word: object, category, color, background or texture
    embeddings: Tensor  # [V, d_embed] unit vectors
    class_index: tuple[int, ...]  # class of each word in the data set, -1 where it is none


def make_vocabulary(clip, dataset) -> Vocabulary:
    """Words to name latents by: class names, colors, and in the embedded world categories and backgrounds, elsewhere textures.

    Parameters
    ----------
    clip : ClipModel
    dataset : gives class names and templates
    """
    classes = list(unique_names(dataset.class_names))
    words = {"object": classes}
    if not classes:  # of pictures whose ground truth has names
        words["object"] = [name.removeprefix("object:") for name in getattr(dataset, "concept_names", ()) if name.startswith("object:")]
    if str(dataset.spec).startswith("openmoji"):
        words["category"] = sorted(openmoji.class_table()["category"].unique())
        words |= {"color": list(openmoji.COLORS), "background": list(openmoji.BACKGROUND_KINDS)}
    else:
        words |= {"color": list(openmoji.COLORS), "texture": list(TEXTURES)}
    embeddings = []
    for kind, some in (words := {kind: some for kind, some in words.items() if some}).items():
        if kind == "background":
            spoken, templates = [openmoji.BACKGROUNDS.get(word, word) for word in some], ("something {}.", "a picture {}.", "{}")
        else:
            spoken, templates = [re.sub(r" \(\d+\)$", "", word) for word in some], templates_for(dataset.spec)
        embeddings.append(clip.zero_shot_head(spoken, templates).cpu())
    kinds = [kind for kind, some in words.items() for _ in some]
    index = [*range(len(classes)), *[-1] * (len(kinds) - len(classes))]
    return Vocabulary(tuple(word for some in words.values() for word in some), tuple(kinds), torch.cat(embeddings), tuple(index))


@torch.no_grad()
def score_words(clip, dataset, summary: LatentSummary, vocabulary: Vocabulary, latents: Sequence[int], embeddings: Tensor) -> pd.DataFrame:
    """Score every word for each latent by what CLIP sees in its strongest images and around its strongest patches.

    A word's similarity to a picture is the cosine of their embeddings, in standard deviations from its mean over all images (crops: over
    random crops); its score is the mean over the latent's images and that over its crops, averaged. p: how often as many random images and
    crops of these give *some* word as high a score (Westfall and Young, 1993). Returns latent, name, kind, score, margin, p, runner_up,
    class_index.

    Parameters
    ----------
    clip : ClipModel
    dataset : the one that ``summary`` was made from
    summary : LatentSummary; without ``top_patches`` images alone count
    vocabulary : Vocabulary
    latents : sequence of int
    embeddings : Tensor [n_images, d_embed], unit vectors of all images (``Likeness.embeddings``)
    """
    if summary.n_images != len(dataset):
        raise ValueError(f"The summary read {summary.n_images} images, this data set has {len(dataset)}: give the one that was summarised.")
    latents = torch.tensor([int(s) for s in latents], dtype=torch.long)
    if len(latents) and not (0 <= int(latents.min()) and int(latents.max()) < summary.n_latents):
        raise ValueError(f"Latents must lie in range({summary.n_latents}), got {int(latents.min())} to {int(latents.max())}.")
    rng = np.random.default_rng(0)
    pool = _standardized(embeddings.cpu().float() @ vocabulary.embeddings.T)[0]
    rows = summary.top_images[latents, :N_IMAGES].numpy()
    parts, nulls = [_means(pool, rows)], [(pool, rows)]
    if summary.top_patches is not None:
        some = torch.stack([summary.top_patch_images[latents, :N_CROPS], summary.top_patches[latents, :N_CROPS]], -1).numpy()
        n_patches, real = clip.grid[0] * clip.grid[1], some[..., 0] >= 0
        chance = np.stack([rng.integers(len(dataset), size=N_RANDOM_CROPS), rng.integers(n_patches, size=N_RANDOM_CROPS)], 1)
        places, back = np.unique(np.concatenate([chance, some[real]]), axis=0, return_inverse=True)
        seen = (embed_crops(clip, dataset, places) @ vocabulary.embeddings.T)[back.reshape(-1)]
        random_crops, mean, std = _standardized(seen[:N_RANDOM_CROPS])
        cut = np.full(real.shape, -1)
        cut[real] = np.arange(real.sum())
        parts.append(_means((seen[N_RANDOM_CROPS:] - mean) / std, cut))
        images, first = np.unique(chance[:, 0], return_index=True)  # a latent's crops are of its own images: so are the null's
        nulls = [(pool[images], rows), (random_crops[first], cut)]
    scores = np.mean(parts, 0)
    p = _permutation_p(scores.max(1), nulls, rng)
    order, at = np.argsort(-scores, axis=1, kind="stable")[:, :2], np.arange(len(scores))
    words, kinds, index = (np.array(part, dtype=object) for part in (vocabulary.words, vocabulary.kinds, vocabulary.class_index))
    first, second = order[:, 0], order[:, 1]
    said = {"latent": latents.numpy(), "name": words[first], "kind": kinds[first], "score": scores[at, first]}
    said |= {"margin": scores[at, first] - scores[at, second], "p": p, "runner_up": words[second]}
    return pd.DataFrame({**said, "class_index": index[first].astype(int)})


@torch.no_grad()
def embed_crops(clip, dataset, places: np.ndarray) -> Tensor:
    """Unit image features of enlarged crops around patches (image, row * columns + column), within the image: [n, 2] -> [n, d_embed]."""
    rows, columns = clip.grid
    margin = min(CROP_MARGIN, (min(rows, columns) - 1) // 2)
    side = 2 * margin + 1
    height, width = clip.image_size[0] // rows, clip.image_size[1] // columns
    found, inputs, last, picture = [], [], None, None
    for i, (image, patch) in enumerate(tqdm(places.tolist(), desc="embedding crops")):
        if image != last:
            last, picture = image, seen_image(clip, dataset[image].image).numpy()
        row, column = divmod(patch, columns)
        top, left = min(max(row - margin, 0), rows - side) * height, min(max(column - margin, 0), columns - side) * width
        inputs.append(clip.preprocess(Image.fromarray(picture[top : top + side * height, left : left + side * width])))
        if len(inputs) == 64 or i + 1 == len(places):
            found.append(F.normalize(clip.encode_image(torch.stack(inputs)).float(), dim=-1).cpu())
            inputs = []
    return torch.cat(found)


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


def _permutation_p(observed: np.ndarray, nulls: list[tuple[Tensor, np.ndarray]], rng: np.random.Generator) -> np.ndarray:
    """Share of random sets of images, with as many crops of the first of them, whose best word scores at least as high; it counts as one.

    The pools have a row for each image: of itself, and of a crop of it.
    """
    sizes = np.stack([(rows >= 0).sum(1) for _, rows in nulls], 1)
    n, most = len(nulls[0][0]), max(rows.shape[1] for _, rows in nulls)
    drawn = np.array([rng.choice(n, min(most, n), replace=False) for _ in range(N_PERMUTATIONS)])
    p = np.ones(len(observed))
    for size in np.unique(sizes, axis=0):
        if not size.any():
            continue
        null = np.mean([_means(pool, drawn[:, :n]) for (pool, _), n in zip(nulls, size, strict=True)], 0)
        ordered = np.sort(null.max(1))
        same = (sizes == size).all(1)
        p[same] = (1 + len(ordered) - np.searchsorted(ordered, observed[same], "left")) / (1 + len(ordered))
    return p


def name_agreement(sources: Mapping[str, pd.DataFrame], related: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """How often sources of names agree, over the latents that both name.

    Parameters
    ----------
    sources : mapping of str to DataFrame of :func:`label_latents`
    related : mapping of str to sequence of str, optional
        Names that are no contradiction, as "dog" and "animal" (see :func:`related_names`).

    Returns one row a pair: a, b, n_a, n_b (latents each names), n_both, agreement, low, high (95%, Wilson, 1927), chance (one source's names
    shuffled), p (share of shuffles that agree as often), related, related_chance (names equal or related); NaN without a common latent.
    """
    named = {source: frame[frame["name"] != UNNAMED].set_index("latent")["name"] for source, frame in sources.items()}
    plain = {source: names.str.replace(r" \(\d+\)$", "", regex=True) for source, names in named.items()}
    rng, n_shuffles = np.random.default_rng(0), 1000
    pairs, rows = {(a, b) for a, some in (related or {}).items() for b in some}, []
    for a, b in combinations(plain, 2):
        both = plain[a].index.intersection(plain[b].index)
        row = {"a": a, "b": b, "n_a": len(plain[a]), "n_b": len(plain[b]), "n_both": len(both)}
        if len(both):
            codes, names = pd.factorize(np.concatenate([plain[a][both].to_numpy(object), plain[b][both].to_numpy(object)]))
            x, y = codes[: len(both)], codes[len(both) :]
            fits = np.array([[m == n or (m, n) in pairs or (n, m) in pairs for n in names] for m in names], bool)
            drawn = np.array([rng.permutation(y) for _ in range(n_shuffles)])
            equal, share = (x == drawn).mean(1), (x == y).mean()
            low, high = stats.binomtest(int((x == y).sum()), len(both)).proportion_ci(method="wilson")
            row |= {
                "agreement": share, "low": low, "high": high, "chance": equal.mean(), "p": (1 + (equal >= share).sum()) / (1 + n_shuffles),
                "related": fits[x, y].mean(), "related_chance": fits[x, drawn].mean(),
            }  # fmt: skip
        rows.append(row)
    columns = ["a", "b", "n_a", "n_b", "n_both", "agreement", "low", "high", "chance", "p", "related", "related_chance"]
    return pd.DataFrame(rows, columns=columns)


def related_names() -> dict[str, list[str]]:
    """Names in the embedded world that are no contradiction: an object's category and its main color."""
    table = openmoji.class_table()
    return {name: [category, color] for name, category, color in zip(table["name"], table["category"], openmoji.main_colors(), strict=True)}
