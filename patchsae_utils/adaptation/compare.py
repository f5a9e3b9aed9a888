"""CLIP against adapted CLIP, read by one dictionary: are there new concepts, or is it a new mapping of old ones?

An adapter can raise accuracy in two places. The *image tower* may show other latents for the same picture: latents that were
silent on a class light up, others fade (``low-to-high``, ``high-to-low``). Or the towers agree on what is in the picture, and
the *text head* reads it differently: a new mapping from the same latents to the classes. :func:`compare_models` measures both:
latents by class-level counts, the gain by crossing {base, adapted image tower} x {base, adapted text head}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches
from ..interventions.tail import check_same_tower, dataset_head
from ..run.intervals import bootstrap_mean, resampled_means
from .rank_overlap import overlaps
from .tower_readings import FORMS, Reading, TowerReader

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

GROUPS = ("high", "high-to-low", "low-to-high")
OVERLAPS = ("jaccard", "rbo")
"""Overlap of the two models' top latents: of the sets (Jaccard), and of the rankings (rank-biased; :mod:`patchsae_utils.adaptation.rank_overlap`)."""
RANKS = ("count", "specific")
SIDES = ("base", "adapted")
COMPARISONS = (
    "CLIP and adapted",
    "CLIP twice, other pictures",
    "CLIP and adapted, other class",
    "CLIP and adapted, random latents",
)
N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Remapping:
    """CLIP and adapted CLIP on one data set, read by one dictionary: what adaptation changed, and what it did not."""

    name: str
    """Name of the data set."""
    adapter: str
    """Name of the adapter."""
    class_names: list[str]
    base: Reading
    """CLIP's image tower, with both text heads (named ``base`` and ``adapted``)."""
    adapted: Reading
    """The adapted image tower, likewise."""

    # -- accuracy -----------------------------------------------------------------------------------------------------

    def right(self, tower: str, head: str, form: str = "raw") -> np.ndarray:
        """Which pictures one crossing of image tower and text head classifies rightly: bool [N]."""
        return {"base": self.base, "adapted": self.adapted}[tower].right[head, form]

    def score(self, tower: str, head: str, form: str = "raw") -> float:
        """Its accuracy, in [0, 1]."""
        return float(self.right(tower, head, form).mean())

    def accuracy(self, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
        """Every image tower with every text head, in three forms: tower, head, form, accuracy, low, high."""
        keys = [(tower, head, form) for tower in SIDES for head in SIDES for form in FORMS]
        mean, low, high = bootstrap_mean(np.stack([self.right(*key) for key in keys]), n_bootstrap, seed)
        return pd.DataFrame(keys, columns=["tower", "head", "form"]).assign(accuracy=mean, low=low, high=high)

    @property
    def delta(self) -> float:
        """Share of the base model's errors that adaptation removed: (adapted - base) / (1 - base), raw.

        Source: Lim et al., ICLR 2025, Table 1.
        """
        base, adapted = self.score("base", "base"), self.score("adapted", "adapted")
        return (adapted - base) / (1 - base) if base < 1 else 0.0

    def gain_split(self, form: str = "raw", n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
        """How much of the gain each tower brings: part ("image tower", "text head", "both"), gain, low, high.

        With A(tower, head), the image tower's part is the mean of its gain under the old and under the new head,
        [A(a, b) - A(b, b) + A(a, a) - A(b, a)] / 2, and the text head's likewise (the Shapley value of two players); they sum to
        A(a, a) - A(b, b). Intervals are over pictures.
        """
        bb, ba, ab, aa = (self.right(tower, head, form).astype(float) for tower in SIDES for head in SIDES)
        rows = np.stack([(ab - bb + aa - ba) / 2, (ba - bb + aa - ab) / 2, aa - bb])
        gain, low, high = bootstrap_mean(rows, n_bootstrap, seed)
        return pd.DataFrame({"part": ["image tower", "text head", "both"], "gain": gain, "low": low, "high": high})

    # -- latents ------------------------------------------------------------------------------------------------------

    def latents(self, top_k: int = 10, low: float = 0.5, rank: str = "count") -> pd.DataFrame:
        """:func:`latent_groups` of the two models, with class names."""
        table = latent_groups(self.base.mean_counts, self.adapted.mean_counts, top_k=top_k, low=low, rank=rank)
        table.insert(1, "class_name", [self.class_names[i] for i in table["class"]])
        return table

    def groups(self, top_k: int = 10, low: float = 0.5, rank: str = "count") -> pd.DataFrame:
        """:func:`count_groups` of the two models, with class names."""
        table = count_groups(self.base.mean_counts, self.adapted.mean_counts, top_k=top_k, low=low, rank=rank)
        table.insert(1, "class_name", self.class_names)
        return table

    def comparisons(
        self, top_k: int = 10, low: float = 0.5, rank: str = "count", n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
    ) -> pd.DataFrame:
        """The means of :meth:`groups` over classes, beside three controls.

        The controls: CLIP against itself on other pictures (what sampling does), CLIP against the adapted model on another class
        (what unrelated pictures look like), and as many random active latents instead of the top ones: sorted into groups, one draw for both
        models; for the overlaps, which one draw would make 1, an own draw and order for each.

        Returns
        -------
        DataFrame
            comparison, measure (a group, "jaccard" or "rbo"), value, low, high; the interval is over classes.
        """
        base, adapted = self.base.mean_counts, self.adapted.mean_counts
        rng = np.random.default_rng(seed)
        settings: dict[str, Any] = {"top_k": top_k, "low": low, "rank": rank}
        tables = {
            COMPARISONS[0]: count_groups(base, adapted, **settings),
            COMPARISONS[1]: count_groups(*self.base.counts, **settings),
        }
        if len(base) > 1:
            shift = int(rng.integers(1, len(base)))  # every class meets another one
            tables[COMPARISONS[2]] = count_groups(base, adapted.roll(shift, 0), **settings)
        active = (base > 0) | (adapted > 0)
        union = top_latents(base, top_k, rank) | top_latents(adapted, top_k, rank)
        lottery = torch.from_numpy(rng.random(tuple(active.shape))) * active
        drawn = (lottery.argsort(1, descending=True).argsort(1) < union.sum(1, keepdim=True)) & active
        draws = [ranked_latents(draw, top_k) for draw in (lottery, torch.from_numpy(rng.random(tuple(active.shape))) * active)]
        by_luck = overlaps(draws[0], draws[1])
        tables[COMPARISONS[3]] = count_groups(base, adapted, **settings, members=drawn).assign(**by_luck)
        records = []
        for comparison, table in tables.items():
            for measure in (*GROUPS, *OVERLAPS):
                values = table[measure].dropna().to_numpy(float)
                if len(values):
                    mean, lower, upper = (float(v) for v in bootstrap_mean(values, n_bootstrap, seed))
                    records.append({"comparison": comparison, "measure": measure, "value": mean, "low": lower, "high": upper})
        return pd.DataFrame(records)

    def correlation(self, level: str = "class") -> float:
        """Pearson correlation of the two models' counts over latents active in either: of all a_c ("class") or of a_D ("dataset")."""
        a, b = self.base.mean_counts, self.adapted.mean_counts
        a, b = (a, b) if level == "class" else (a.mean(0), b.mean(0))
        active = (a > 0) | (b > 0)
        x, y = a[active].double().numpy(), b[active].double().numpy()
        return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else float("nan")

    def reconstruction(self) -> pd.DataFrame:
        """Is the dictionary still valid on adapted activations: tower, explained_variance, normalized_mse, l0."""
        return pd.DataFrame(
            [{"tower": name, **reading.reconstruction} for name, reading in zip(SIDES, (self.base, self.adapted), strict=True)]
        )


@torch.no_grad()
def compare_models(
    base: ClipModel,
    adapted: ClipModel,
    sae: SparseAutoencoder,
    dataset: Any,
    layer: int,
    *,
    tau: float = 0.2,
    batch_size: int = 64,
    progress: bool = True,
) -> Remapping:
    """Compare a CLIP with an adapted one through a dictionary that was trained on the former.

    Parameters
    ----------
    base, adapted : ClipModel
    sae : SparseAutoencoder
        Trained on ``base``.
    dataset : data set
        Labelled pictures that neither the SAE nor the adapter has seen.
    layer : int
        Block whose output the SAE reads.
    tau : float
        A token counts where h > tau (the paper's 0.2).
    batch_size : int
    progress : bool

    Returns
    -------
    Remapping

    Raises
    ------
    ValueError
        If the models have different shapes, the SAE does not fit, or there are no pictures.
    """
    check_same_tower(base, adapted)
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} is empty: there is nothing to compare.")
    # Both text heads go with both image towers.
    heads = {side: dataset_head(model, dataset) for side, model in zip(SIDES, (base, adapted), strict=True)}
    readers = [TowerReader(model, sae, layer, heads, len(dataset.class_names), tau) for model in (base, adapted)]
    for batch in batches(dataset, base.preprocess, batch_size, progress=f"comparing on {dataset.name}" if progress else None):
        for reader in readers:
            reader.read(batch.images, batch.labels)
    return Remapping(dataset.name, type(adapted).__name__, list(dataset.class_names), *(reader.reading() for reader in readers))


# -- latents ----------------------------------------------------------------------------------------------------------


def ranked_latents(counts: Tensor, top_k: int = 10, rank: str = "count") -> list[list[int]]:
    """Each class's top latents, best first.

    Parameters
    ----------
    counts : Tensor [C, S]
        Class-level counts a_c.
    top_k : int
        Fewer where fewer are active.
    rank : {"count", "specific"}
        By a_c, or by a_c minus its mean over classes.

    Raises
    ------
    ValueError
        For an unknown rank, or a top_k that is not positive.
    """
    if rank not in RANKS:
        raise ValueError(f"Unknown rank {rank!r}. Valid: {', '.join(RANKS)}.")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    score = counts if rank == "count" else counts - counts.mean(0)
    # Stable: equal scores keep the latents' order, so that two equal models have equal top latents.
    best = score.sort(dim=1, descending=True, stable=True)
    positive = (best.values[:, :top_k] > 0).sum(1).tolist()
    return [order[:n].tolist() for order, n in zip(best.indices, positive, strict=True)]


def top_latents(counts: Tensor, top_k: int = 10, rank: str = "count") -> Tensor:
    """Which latents are each class's top ones: :func:`ranked_latents` as bool [C, S]."""
    chosen = torch.zeros_like(counts, dtype=torch.bool)
    for row, latents in zip(chosen, ranked_latents(counts, top_k, rank), strict=True):
        row[latents] = True
    return chosen


def latent_groups(
    base: Tensor, adapted: Tensor, *, top_k: int = 10, low: float = 0.5, rank: str = "count", members: Tensor | None = None
) -> pd.DataFrame:
    """Sort each class's top latents by what adaptation did to them.

    Over the union of both models' top latents of a class: *high-to-low* where the adapted model's count fell below ``low`` times
    CLIP's, *low-to-high* where CLIP's lies below ``low`` times the adapted one's, *high* where neither (high in both).

    Parameters
    ----------
    base, adapted : Tensor [C, S]
        Class-level counts a_c of CLIP and of the adapted model, per picture.
    top_k : int
    low : float
        Between 0 and 1; with 0.5 a latent must halve or double to leave *high*.
    rank : {"count", "specific"}
        See :func:`top_latents`.
    members : bool Tensor [C, S], optional
        Latents to sort instead of the top ones (for controls).

    Returns
    -------
    DataFrame
        class, latent, base, adapted, group; classes in order, and within them latents.

    Raises
    ------
    ValueError
        If the shapes differ or ``low`` is not between 0 and 1.

    Source: the three regions of Lim et al., ICLR 2025, Table 1 and Figure 7; the paper states no threshold, so this one is ours.
    """
    if base.shape != adapted.shape or base.ndim != 2:
        raise ValueError(f"Both models need counts of one shape [C, S]; got {list(base.shape)} and {list(adapted.shape)}.")
    if not 0 < low < 1:
        raise ValueError(f"low must lie between 0 and 1, got {low}.")
    members = top_latents(base, top_k, rank) | top_latents(adapted, top_k, rank) if members is None else members
    classes, latents = members.nonzero(as_tuple=True)
    before, after = base[members].numpy(), adapted[members].numpy()
    group = np.select([after < low * before, before < low * after], GROUPS[1:], GROUPS[0])
    return pd.DataFrame({"class": classes.numpy(), "latent": latents.numpy(), "base": before, "adapted": after, "group": group})


def count_groups(
    base: Tensor, adapted: Tensor, *, top_k: int = 10, low: float = 0.5, rank: str = "count", members: Tensor | None = None
) -> pd.DataFrame:
    """How many latents of each class fall into each group, and how far the two models' top latents overlap.

    Parameters
    ----------
    base, adapted, top_k, low, rank, members
        As for :func:`latent_groups`.

    Returns
    -------
    DataFrame
        One row a class: class, high, high-to-low, low-to-high; jaccard and rbo of the top latents (NaN where neither model has any).
    """
    table = latent_groups(base, adapted, top_k=top_k, low=low, rank=rank, members=members)
    counts = pd.crosstab(table["class"], table["group"]).reindex(index=range(len(base)), columns=list(GROUPS), fill_value=0)
    shared = overlaps(ranked_latents(base, top_k, rank), ranked_latents(adapted, top_k, rank))
    return pd.DataFrame({"class": range(len(base)), **{name: counts[name].to_numpy() for name in GROUPS}, **shared})


# -- several data sets ------------------------------------------------------------------------------------------------


def base_to_novel(base: Remapping, novel: Remapping, *, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
    """The base-to-novel table: CLIP and the adapted model on both halves of the classes, and the harmonic mean.

    Parameters
    ----------
    base, novel : Remapping
        On the classes that the adapter was fitted to, and on those that it never saw.
    n_bootstrap : int
        Resamples of pictures, drawn apart in the two halves.
    seed : int

    Returns
    -------
    DataFrame
        model, form, half ("base", "novel", "harmonic mean"), accuracy, low, high.
    """
    records = []
    for name, side in (("CLIP", "base"), (base.adapter, "adapted")):
        for form in FORMS:
            halves = [remap.right(side, side, form) for remap in (base, novel)]
            samples = [resampled_means(values, n_bootstrap, seed + i) for i, values in enumerate(halves)]
            points = [values.mean() for values in halves]
            for half, point, sample in zip(
                ("base", "novel", "harmonic mean"), [*points, harmonic_mean(*points)], [*samples, harmonic_mean(*samples)], strict=True
            ):
                low, high = np.quantile(sample, [0.025, 0.975])
                records.append(
                    {"model": name, "form": form, "half": half, "accuracy": float(point), "low": float(low), "high": float(high)}
                )
    return pd.DataFrame(records)


def harmonic_mean(a, b):
    """2ab / (a + b), and 0 where both are."""
    return 2 * a * b / np.maximum(a + b, 1e-12)


def stack(parts: Mapping[Sequence[str] | str, pd.DataFrame], names: Sequence[str] | str) -> pd.DataFrame:
    """Put tables of several data sets under each other; their keys become the first columns.

    Parameters
    ----------
    parts : mapping of key to DataFrame
        A key is one value or a tuple of them.
    names : str or sequence of str
        Names of the new columns.

    Raises
    ------
    ValueError
        If there are no tables.
    """
    if not parts:
        raise ValueError("There are no tables to stack.")
    names = [names] if isinstance(names, str) else list(names)
    frames = []
    for key, frame in parts.items():
        values = [key] if isinstance(key, str) else list(key)
        frames.append(
            pd.concat(
                [
                    pd.DataFrame({name: [value] * len(frame) for name, value in zip(names, values, strict=True)}),
                    frame.reset_index(drop=True),
                ],
                axis=1,
            )
        )
    return pd.concat(frames, ignore_index=True)
