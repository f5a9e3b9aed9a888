"""CLIP against an adapted CLIP, both read by one dictionary: do the same latents answer to a class, and what is classified correctly?"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import hmean
from torch import Tensor

from ..clip.model import ClipModel
from ..interventions.masks import sweep_masks
from ..interventions.tail import check_same_tower, dataset_head, read_batches
from ..latents.classes import class_scores, top_latents
from ..latents.passes import latent_chunks
from ..latents.reading import summarize_latents
from ..run.intervals import mean_interval, resamples
from ..sae.model import SparseAutoencoder

GROUPS = ("high", "high-to-low", "low-to-high")
OVERLAPS = ("jaccard", "rbo")
TOP_K = 10
LOW = 0.5  # a latent must fall below so much of its count to leave *high*; the paper states no threshold, this one is ours
PERSISTENCE = 0.9  # p: the chance that a reader who has seen one more place reads on
FORMS = ("raw", "reconstructed", "error kept")
SAME, APART, TWICE = "CLIP and adapted", "CLIP and adapted, other pictures", "CLIP twice, other pictures"
OTHER, RANDOM = "CLIP and adapted, other class", "CLIP and adapted, random latents"
# The second and third read half of a class's pictures with each model, so they compare with each other, and not with the first.
COMPARISONS = (SAME, APART, TWICE, OTHER, RANDOM)
BATCH = 64
TAU = 0.2  # a token counts where h > tau (the paper's)
MODELS = ("CLIP", "CLIP, adapted head", "adapted")
KS = (1, 3, 10, 30, 100)


class Reading(NamedTuple):
    """One image tower, read by the dictionary over a data set."""

    counts: Tensor  # [2, C, S] tokens per picture with h > tau, for the pictures of each class at even and at odd turns
    class_images: Tensor  # [2, C] how many pictures those are
    labels: np.ndarray  # int [N]: each picture's class
    predicted: dict[tuple[str, str], np.ndarray]  # (head, form) -> int [N]: the class that each picture is taken for
    reconstruction: dict[str, float]  # explained_variance (centred), l0

    @property
    def mean_counts(self) -> Tensor:
        """[C, S] tokens per picture with h > tau: a_c over the number of pictures."""
        return mean_of_halves(self.counts, self.class_images)


def turns(labels: Tensor, seen: Tensor) -> Tensor:
    """0 or 1 for each picture, counted in ``seen`` [2, C]: those of a class go to two halves by turns."""
    earlier = torch.tensor(pd.Series(labels).groupby(labels.numpy()).cumcount().tolist())
    found = (seen.sum(0)[labels] + earlier) % 2
    seen.index_put_((found, labels), torch.ones_like(labels), accumulate=True)
    return found


def mean_of_halves(halves: Tensor, images: Tensor) -> Tensor:
    """Mean over all pictures [C, S] from the means over two halves [2, C, S] and their sizes [2, C]."""
    return (halves * (images / images.sum(0).clamp_min(1))[..., None]).sum(0)


@dataclass(frozen=True)
class Remapping:
    """CLIP and adapted CLIP on one data set: readings of the two image towers, each with both text heads."""

    name: str
    adapter: str
    class_names: list[str]
    base: Reading
    adapted: Reading

    def right(self, tower: str, head: str, form: str = "raw") -> np.ndarray:
        """Which pictures one crossing of image tower and text head classifies correctly: bool [N]."""
        return getattr(self, tower).predicted[head, form] == getattr(self, tower).labels

    def latents(self, top_k: int = TOP_K) -> pd.DataFrame:
        """Top latents of each class in either model and their group: class, class_name, latent, base, adapted (counts per picture), group."""
        table = latent_groups(self.base.mean_counts, self.adapted.mean_counts, top_k=top_k)
        table.insert(1, "class_name", [self.class_names[i] for i in table["class"]])
        return table

    def comparisons(self) -> pd.DataFrame:
        """What became of each class's top latents, mean over classes: comparison, measure (a group, "jaccard", "rbo"), value, low, high.

        Classes without pictures, or with one where others are compared, are left out; NaN where that leaves none. Latents are ranked by how
        far their count on the class exceeds the mean over classes. Of as many random active latents, groups have one draw for both models,
        overlaps a draw and an order for each.
        """
        images, rank, rng = self.base.class_images, "specific", np.random.default_rng(0)
        some = images.sum(0) > 0
        base, adapted = self.base.mean_counts[some], self.adapted.mean_counts[some]
        first, second = self.base.counts[:, some], self.adapted.counts[:, some]
        pairs = {SAME: (base, adapted), APART: (first[0], second[1]), TWICE: tuple(first)}
        if len(base) > 1:
            shift = int(rng.integers(1, len(base)))  # every class meets another one
            pairs[OTHER] = (base, adapted.roll(shift, 0))
        tables = {name: count_groups(*pair, rank=rank) for name, pair in pairs.items()}
        for name in (APART, TWICE):
            tables[name] = tables[name][(images[:, some] > 0).all(0).numpy()]  # a single picture of a class has no others
        active = (base > 0) | (adapted > 0)
        union = top_of_either(base, adapted, rank=rank)
        lottery = torch.from_numpy(rng.random(tuple(active.shape))) * active
        drawn = (lottery.argsort(1, descending=True).argsort(1) < union.sum(1, keepdim=True)) & active
        again = torch.from_numpy(rng.random(tuple(active.shape))) * active
        by_luck = overlaps(ranked_latents(lottery), ranked_latents(again))
        tables[RANDOM] = count_groups(base, adapted, rank=rank, members=drawn).assign(**by_luck)
        values = {(name, measure): table[measure].dropna() for name, table in tables.items() for measure in (*GROUPS, *OVERLAPS)}
        records = [(*key, *(mean_interval(found, "classes")[:3] if len(found) else (np.nan,) * 3)) for key, found in values.items()]
        return pd.DataFrame(records, columns=["comparison", "measure", "value", "low", "high"])

    def reconstruction(self) -> pd.DataFrame:
        """Is the dictionary still valid on adapted activations: tower, explained_variance, l0."""
        return pd.DataFrame([{"tower": side, **getattr(self, side).reconstruction} for side in ("base", "adapted")])


@torch.no_grad()
def compare_models(
    base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int, *, progress: bool = True
) -> Remapping:
    """Compare a CLIP with an adapted one through a dictionary that was trained on the former.

    Parameters
    ----------
    base, adapted, sae, layer : models, and an SAE that was trained on ``base`` and reads this block's output
    dataset : data set of labelled pictures that neither the SAE nor the adapter has seen
    progress : bool
    """
    check_same_tower(base, adapted)
    for model in (base, adapted):
        sae.check_model(model, layer)
    heads = {"base": dataset_head(base, dataset), "adapted": dataset_head(adapted, dataset)}  # both go with both image towers
    readings = [_read_tower(model, sae, dataset, layer, heads, progress) for model in (base, adapted)]
    return Remapping(dataset.name, type(adapted).__name__, list(dataset.class_names), *readings)


def _read_tower(clip: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int, heads: Mapping[str, Tensor], progress: bool) -> Reading:
    counts = torch.zeros(2 * len(dataset.class_names), sae.d_sae, dtype=torch.float64, device=clip.device)
    seen = torch.zeros(2, len(dataset.class_names), dtype=torch.long)
    total = torch.zeros(clip.width, dtype=torch.float64, device=clip.device)
    error, square, active, n = 0.0, 0.0, 0, 0  # tensors soon: a GPU is waited for once, at the end
    labels, predicted = [], defaultdict(list)
    for read in read_batches(clip, dataset, layer, f"comparing on {dataset.name}" if progress else None, batch_size=BATCH):
        tokens, decoded = read.residual.tokens, torch.empty_like(read.residual.tokens)
        labels.append(read.labels.cpu())
        place = turns(labels[-1], seen) * seen.shape[1] + labels[-1]
        for rows, h in latent_chunks(sae, tokens):
            decoded[rows] = sae.decode(h)
            counts.index_add_(0, place[rows].to(clip.device), (h > TAU).sum(1).double())
            active += (h > 0).sum()
        error += (tokens - decoded).square().sum(dtype=torch.float64)
        square += tokens.square().sum(dtype=torch.float64)
        total += tokens.sum((0, 1), dtype=torch.float64)
        n += tokens.shape[0] * tokens.shape[1]
        for form, edited in zip(FORMS, (tokens, decoded, decoded + (tokens - decoded)), strict=True):
            features = read.features(edited)
            for head, matrix in heads.items():
                predicted[head, form].append(clip.logits(features, matrix).argmax(1).cpu())
    counts = (counts.cpu().view(2, seen.shape[1], -1) / seen.clamp_min(1)[..., None]).float()
    predicted = {key: torch.cat(parts).numpy() for key, parts in predicted.items()}
    explained = 1 - float(error / (square - total.square().sum() / n))
    return Reading(counts, seen, torch.cat(labels).numpy(), predicted, {"explained_variance": explained, "l0": float(active) / n})


def masked_predictions(
    base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, train: Any, test: Any, layer: int, *, progress: bool = True
) -> pd.DataFrame:
    """Accuracy of each class with only its k most specific latents, or without them, in CLIP and in an adapted model.

    The latents are chosen once, on CLIP's train split, for all models. A picture's mask is that of its true class, which tells the label,
    so compare accuracies at one k with each other and with random latents, not with unmasked ones. Source: Lim et al., ICLR 2025, Fig. 6.

    Parameters
    ----------
    base, adapted, sae, layer : models, and an SAE that was trained on ``base`` and reads this block's output
    train, test : data sets of the same classes: CLIP's latents are ranked on the first, the second is classified
    progress : bool

    Returns
    -------
    DataFrame
        model (``MODELS``) and the columns of :func:`patchsae_utils.sweep_masks`, with rows for each class.
    """
    check_same_tower(base, adapted)
    summary = summarize_latents(base, sae, train, layer, progress=progress)
    ranking = dataclasses.replace(summary, class_counts=class_scores(summary, "specific"))
    tables = []
    for name, tower, reader in zip(MODELS, (base, base, adapted), (base, adapted, adapted), strict=True):
        table = sweep_masks(
            tower, sae, test, [k for k in KS if k <= sae.d_sae], ("oracle", "random"), layer=layer, class_counts=ranking,
            head=dataset_head(reader, test), n_random=1, groups="class", batch_size=60,
        )  # fmt: skip
        tables.append(table.assign(model=name))
    return pd.concat(tables, ignore_index=True)


def base_to_novel(base: Remapping, novel: Remapping) -> pd.DataFrame:
    """The base-to-novel table: CLIP and the adapted model on both halves of the classes, and the harmonic mean.

    Parameters
    ----------
    base, novel : Remapping, on the classes that the adapter was fitted to, and on those that it never saw

    Returns
    -------
    DataFrame
        model, form, half ("base", "novel", "harmonic mean"), accuracy, low, high; pictures are resampled apart in the two halves.
    """
    records = []
    for name, side in (("CLIP", "base"), (base.adapter, "adapted")):
        for form in FORMS:
            halves = [remap.right(side, side, form) for remap in (base, novel)]
            found = with_harmonic_mean([values.mean() for values in halves], [resampled_means(x, seed=i) for i, x in enumerate(halves)])
            records += [(name, form, half, *numbers) for half, numbers in found.items()]
    return pd.DataFrame(records, columns=["model", "form", "half", "accuracy", "low", "high"])


def resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Mean of the values in each resample of them."""
    return np.concatenate([weights @ values / len(values) for weights in resamples(len(values), seed=seed)])


def with_harmonic_mean(points: Sequence[float], draws: Sequence[np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Of accuracies on base and novel classes and their resamples: half -> value, low, high; "harmonic mean" is the third half."""
    points, draws = [*points, hmean(points)], [*draws, hmean(draws, axis=0)]
    ends = [np.quantile(sample, [0.025, 0.975]) for sample in draws]
    names = ("base", "novel", "harmonic mean")
    return {name: (float(point), float(low), float(high)) for name, point, (low, high) in zip(names, points, ends, strict=True)}


def stack(parts: Mapping[Sequence[str] | str, pd.DataFrame], names: Sequence[str] | str) -> pd.DataFrame:
    """Put tables of several data sets under each other; their keys become the first columns.

    Parameters
    ----------
    parts : mapping of str, or of tuple of str, to DataFrame
    names : str or sequence of str, of the new columns
    """
    names = np.atleast_1d(names).tolist()
    return pd.concat(parts, names=names).reset_index(names).reset_index(drop=True)


def ranked_latents(counts: Tensor, top_k: int = TOP_K, rank: str = "count") -> list[list[int]]:
    """Each class's top latents, best first, from class-level counts [C, S] per picture; ``rank`` as for :func:`class_scores`."""
    return top_latents(class_scores(counts, rank), top_k)


def top_of_either(base: Tensor, adapted: Tensor, top_k: int = TOP_K, rank: str = "count") -> Tensor:
    """Which latents are among a class's top ones in one of the models: bool [C, S]."""
    chosen = torch.zeros_like(base, dtype=torch.bool)
    for counts in (base, adapted):
        for row, latents in zip(chosen, ranked_latents(counts, top_k, rank), strict=True):
            row[latents] = True
    return chosen


def latent_groups(base: Tensor, adapted: Tensor, *, top_k: int = TOP_K, rank: str = "count", members: Tensor | None = None) -> pd.DataFrame:
    """Top latents of a class in either model (or ``members``, bool [C, S]) from counts [C, S]: class, latent, base, adapted, group.

    *high-to-low* where the adapted count is below ``LOW`` times CLIP's, *low-to-high* the reverse, else *high*. Source: Lim et al., Table
    1, Fig. 7.
    """
    members = top_of_either(base, adapted, top_k, rank) if members is None else members
    classes, latents = members.nonzero(as_tuple=True)
    before, after = base[members].numpy(), adapted[members].numpy()
    group = np.select([after < LOW * before, before < LOW * after], GROUPS[1:], GROUPS[0])
    return pd.DataFrame({"class": classes.numpy(), "latent": latents.numpy(), "base": before, "adapted": after, "group": group})


def count_groups(base: Tensor, adapted: Tensor, *, top_k: int = TOP_K, rank: str = "count", members: Tensor | None = None) -> pd.DataFrame:
    """:func:`latent_groups` counted, one row a class: ``GROUPS``; jaccard and rbo of the top latents (NaN: neither has any)."""
    table = latent_groups(base, adapted, top_k=top_k, rank=rank, members=members)
    counts = pd.crosstab(table["class"], table["group"]).reindex(index=range(len(base)), columns=list(GROUPS), fill_value=0)
    return counts.join(overlaps(ranked_latents(base, top_k, rank), ranked_latents(adapted, top_k, rank)))


def overlaps(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> pd.DataFrame:
    """How far rankings agree, pair by pair: columns jaccard, rbo; NaN where both of a pair are empty."""
    pairs = list(zip(first, second, strict=True))
    jaccard = [len({*a} & {*b}) / len({*a, *b}) if a or b else np.nan for a, b in pairs]
    return pd.DataFrame({"jaccard": jaccard, "rbo": [rank_biased_overlap(a, b) for a, b in pairs]})


def rank_biased_overlap(first: Sequence[Hashable], second: Sequence[Hashable], p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of two rankings without repeats, best first, of lengths s <= l; 0 if one is empty, NaN if both are.

    With X_d the number of items that both have among their first d (of the shorter one at most s)::

        RBO = (1-p)/p [ sum_{d=1..l} X_d/d p^d  +  sum_{d=s+1..l} X_s (d-s)/(s d) p^d ]  +  [ (X_l - X_s)/l + X_s/s ] p^l

    Source: Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, equation 32.
    """
    short, long = sorted((first, second), key=len)
    if not len(short):
        return 0.0 if len(long) else float("nan")
    s, n = len(short), len(long)
    x = [len({*short[:d]} & {*long[:d]}) for d in range(1, n + 1)]
    total = sum((x[d - 1] + x[s - 1] * max(d - s, 0) / s) / d * p**d for d in range(1, n + 1))
    return (1 - p) / p * total + ((x[-1] - x[s - 1]) / n + x[s - 1] / s) * p**n
