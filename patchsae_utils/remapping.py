"""CLIP against adapted CLIP, read by one dictionary: are there new concepts, or is it a new mapping of old ones?

An adapter can raise accuracy in two places. The *image tower* may show other latents for the same picture: latents that were
silent on a class light up, others fade (``low-to-high``, ``high-to-low``). Or the towers agree on what is in the picture, and
the *text head* reads it differently: a new mapping from the same latents to the classes. :func:`compare_models` measures both:
latents by class-level counts, the gain by crossing {base, adapted image tower} x {base, adapted text head}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .clip import ClipModel
from .data import batches
from .interventions import bootstrap_mean, check_models, dataset_head
from .latents import latent_chunks
from .prompts import model_tail

GROUPS = ("high", "high-to-low", "low-to-high")
FORMS = ("raw", "reconstructed", "error kept")
RANKS = ("count", "specific")
SIDES = ("base", "adapted")
COMPARISONS = (
    "CLIP and adapted",
    "CLIP twice, other pictures",
    "CLIP and adapted, other class",
    "CLIP and adapted, random latents",
)
N_BOOTSTRAP = 1000


class Reading(NamedTuple):
    """One image tower, read by the dictionary over a data set."""

    counts: Tensor
    """[2, C, S] tokens a picture with h > tau, for the pictures of each class at even and at odd turns."""
    class_images: Tensor
    """[2, C] how many pictures those are."""
    right: dict[tuple[str, str], np.ndarray]
    """(head, form) -> bool [N]: which pictures are classified rightly."""
    reconstruction: dict[str, float]
    """explained_variance (centred), normalized_mse, l0."""

    @property
    def mean_counts(self) -> Tensor:
        """[C, S] tokens a picture with h > tau: a_c over the number of pictures."""
        weights = self.class_images / self.class_images.sum(0).clamp_min(1)
        return (self.counts * weights[..., None]).sum(0)


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
        (what unrelated pictures look like), and as many random active latents instead of the top ones.

        Returns
        -------
        DataFrame
            comparison, measure (a group or "jaccard"), value, low, high; the interval is over classes.
        """
        base, adapted = self.base.mean_counts, self.adapted.mean_counts
        rng = np.random.default_rng(seed)
        settings = {"top_k": top_k, "low": low, "rank": rank}
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
        tables[COMPARISONS[3]] = count_groups(base, adapted, **settings, members=drawn).assign(jaccard=np.nan)
        records = []
        for comparison, table in tables.items():
            for measure in (*GROUPS, "jaccard"):
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


class _Reader:
    """Sums over batches of one image tower, for :class:`Reading`."""

    def __init__(self, clip: ClipModel, sae: torch.nn.Module, layer: int, heads: Mapping[str, Tensor], n_classes: int, tau: float):
        check_models(clip, sae, layer)
        self.clip, self.sae, self.layer, self.heads, self.n_classes, self.tau = clip, sae, layer, heads, n_classes, tau
        self.counts = torch.zeros(2 * n_classes, sae.d_sae, dtype=torch.float64, device=clip.device)
        self.seen = torch.zeros(2 * n_classes, dtype=torch.long)
        self.right: dict[tuple[str, str], list[Tensor]] = {(head, form): [] for head in heads for form in FORMS}
        self.sums = dict.fromkeys(("error", "square", "active", "tokens"), 0.0)
        self.total = torch.zeros(clip.width, dtype=torch.float64, device=clip.device)
        self.tail = None

    def read(self, images: Tensor, labels: Tensor) -> None:
        clip, sae = self.clip, self.sae
        residual = clip.run_to(images, self.layer)
        self.tail = self.tail or model_tail(clip, self.layer, residual)
        tokens, decoded = residual.tokens, torch.empty_like(residual.tokens)
        counts = torch.empty(len(labels), sae.d_sae, dtype=torch.float64, device=clip.device)
        for rows, h in latent_chunks(sae, tokens):
            decoded[rows] = sae.decode(h)
            counts[rows] = (h > self.tau).sum(1).double()
            self.sums["active"] += (h > 0).sum().item()
        self.counts.index_add_(0, self._turns(labels).to(clip.device), counts)
        self.sums["error"] += (tokens - decoded).square().sum(dtype=torch.float64).item()
        self.sums["square"] += tokens.square().sum(dtype=torch.float64).item()
        self.sums["tokens"] += tokens.shape[0] * tokens.shape[1]
        self.total += tokens.sum((0, 1), dtype=torch.float64)
        for form, edited in zip(FORMS, (tokens, decoded, decoded + (tokens - decoded)), strict=True):
            features = self.tail(residual._replace(tokens=edited))
            for head, matrix in self.heads.items():
                self.right[head, form].append(clip.logits(features, matrix).argmax(1).cpu() == labels)

    def _turns(self, labels: Tensor) -> Tensor:
        """Rows of the counts: pictures of a class go to its two halves by turns, so that these are two samples of one thing."""
        rows = torch.empty_like(labels)
        for i, label in enumerate(labels.tolist()):
            rows[i] = label + self.n_classes * int(self.seen[label] > self.seen[label + self.n_classes])
            self.seen[rows[i]] += 1
        return rows

    def reading(self) -> Reading:
        variance = self.sums["square"] - self.total.square().sum().item() / self.sums["tokens"]
        return Reading(
            counts=(self.counts.cpu() / self.seen.clamp_min(1)[:, None]).view(2, self.n_classes, -1).float(),
            class_images=self.seen.view(2, self.n_classes),
            right={key: torch.cat(parts).numpy() for key, parts in self.right.items()},
            reconstruction={
                "explained_variance": 1 - self.sums["error"] / variance,
                "normalized_mse": self.sums["error"] / self.sums["square"],
                "l0": self.sums["active"] / self.sums["tokens"],
            },
        )


@torch.no_grad()
def compare_models(
    base: ClipModel,
    adapted: ClipModel,
    sae: torch.nn.Module,
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
    if (base.width, base.n_layers, base.grid) != (adapted.width, adapted.n_layers, adapted.grid):
        raise ValueError(
            f"Both models must have the same image tower; got {base!r} and {adapted!r}. Give the model that the adapter was fitted to."
        )
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} is empty: there is nothing to compare.")
    # Both text heads go with both image towers.
    heads = {side: dataset_head(model, dataset) for side, model in zip(SIDES, (base, adapted), strict=True)}
    readers = [_Reader(model, sae, layer, heads, len(dataset.class_names), tau) for model in (base, adapted)]
    for batch in batches(dataset, base.preprocess, batch_size, progress=f"comparing on {dataset.name}" if progress else None):
        for reader in readers:
            reader.read(batch.images, batch.labels)
    return Remapping(dataset.name, type(adapted).__name__, list(dataset.class_names), *(reader.reading() for reader in readers))


# -- latents ----------------------------------------------------------------------------------------------------------


def top_latents(counts: Tensor, top_k: int = 10, rank: str = "count") -> Tensor:
    """Which latents are each class's top ones: bool [C, S].

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
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(counts, dtype=torch.bool).scatter_(1, order, True) & (score > 0)


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
        One row a class: class, high, high-to-low, low-to-high, jaccard (of the top latents; NaN where neither model has any).
    """
    table = latent_groups(base, adapted, top_k=top_k, low=low, rank=rank, members=members)
    counts = pd.crosstab(table["class"], table["group"]).reindex(index=range(len(base)), columns=list(GROUPS), fill_value=0)
    first, second = top_latents(base, top_k, rank), top_latents(adapted, top_k, rank)
    jaccard = (first & second).sum(1) / (first | second).sum(1)  # 0/0 = NaN
    return pd.DataFrame({"class": range(len(base)), **{name: counts[name].to_numpy() for name in GROUPS}, "jaccard": jaccard.numpy()})


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
            samples = [_resampled(values, n_bootstrap, seed + i) for i, values in enumerate(halves)]
            points = [values.mean() for values in halves]
            for half, point, sample in zip(
                ("base", "novel", "harmonic mean"), [*points, _harmonic(*points)], [*samples, _harmonic(*samples)], strict=True
            ):
                low, high = np.quantile(sample, [0.025, 0.975])
                records.append(
                    {"model": name, "form": form, "half": half, "accuracy": float(point), "low": float(low), "high": float(high)}
                )
    return pd.DataFrame(records)


def _resampled(values: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    n = len(values)
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap) @ values / n


def _harmonic(a, b):
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
