"""What a gain in accuracy is made of: reuse, remapping, new concepts, as quantities that can be measured.

A model sees a picture in four steps: the image tower up to the hook writes a residual stream z; the dictionary reads z as latents
h, and leaves an error e (z = decode(h) + e); the later blocks make a feature of z; the text head makes logits of the feature. Adaptation
may change each step, and nothing else, so its gain in accuracy has exactly four parts:

- ``existing latents``: concepts of CLIP's own dictionary answer differently (decode(h_b) becomes decode(h_a));
- ``outside the dictionary``: what no latent of CLIP stands for changes (e_b becomes e_a);
- ``later blocks``: the image tower behind the hook reads the same residual stream differently (weights or prompt tokens);
- ``text head``: the same image features are read differently.

From these the three words of the question:

- **new concepts**: the part of the gain that comes from *outside the dictionary*. Exactly zero where the image tower can't change.
- **remapping**: the part that comes from *later blocks* and *text head*: the concepts at the hook are as they were, their mapping to classes is
  new. *Existing latents* stand between the two, known concepts that answer more or less than before, and are reported apart as **retuning**.
- **reuse**: how much of the evidence for a class rests on the same latents as before; see :mod:`patchsae_utils.adaptation.links`.

It is an experiment, not a correlation: every picture is classified with each of the 16 combinations of old and new parts, for example with the
base model's residual stream plus only the dictionary's part of its change. A part's share of the gain is its *Owen value*: first image tower
and text head are crossed, both orders averaged (their Shapley value); then, within the image tower, all orders of its three parts
are averaged. So the parts sum to the gain, picture by picture, and the three parts of the tower to the tower's.

"Outside the dictionary" is an upper bound of what is new: the dictionary misses a part of *any* change. :meth:`GainSplit.change` reports how large a
share it misses of this one, of the change from one picture to the next, and of a change in a random direction.

Sources: Shapley, "A value for n-person games" (1953); Owen, "Values of games with a priori unions" (1977). The question is that of Lim et al.,
ICLR 2025, section 4.2; the definition is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from ..clip.model import ClipModel, Residual
from ..data import batches
from ..interventions.tail import Active, check_same_tower, dataset_head, network_tail
from ..latents.passes import latent_chunks
from ..run.intervals import bootstrap, bootstrap_mean
from .links import ClassLinks, LinkSums, Reader

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

TOWER_PARTS = ("existing latents", "outside the dictionary", "later blocks")
PARTS = (*TOWER_PARTS, "text head")
"""The players, in the order of the axes of ``GainSplit.outcomes``."""
CONCEPTS = {"retuning": ("existing latents",), "new concepts": ("outside the dictionary",), "remapping": ("later blocks", "text head")}
"""What each part of the gain is called in the question."""
MEASURES = ("accuracy", "log-probability")
CHANGES = ("adaptation", "another picture", "random direction")
N_BOOTSTRAP = 1000

EXPERIMENTS = {
    "CLIP": (0, 0, 0, 0),
    "existing latents' part only": (1, 0, 0, 0),
    "outside part only": (0, 1, 0, 0),
    "whole change at the hook": (1, 1, 0, 0),
    "image tower": (1, 1, 1, 0),
    "text head": (0, 0, 0, 1),
    "remapping only": (0, 0, 1, 1),
    "adapted, without the outside part": (1, 0, 1, 1),
    "adapted, without the latents' part": (0, 1, 1, 1),
    "adapted": (1, 1, 1, 1),
}
"""Name -> which parts are the adapted model's."""


@dataclass(frozen=True)
class GainSplit:
    """CLIP and an adapted model on one data set, with every combination of old and new parts."""

    name: str
    """Name of the data set."""
    adapter: str
    """Name of the adapter."""
    outcomes: np.ndarray
    """[2 measures, 2, 2, 2, 2, N]: whether picture n is classified rightly, and the log-probability of its class (nats), with each part of
    ``PARTS`` as in CLIP (0) or as in the adapted model (1)."""
    squares: np.ndarray
    """[N, 3, 2]: for each of ``CHANGES`` the squared norm of the change outside the dictionary, and of the whole change, summed over tokens."""

    def parts(self, measure: str = "accuracy", n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
        """Each part of the gain, with its 95 % interval over pictures.

        Parameters
        ----------
        measure : {"accuracy", "log-probability"}
        n_bootstrap, seed : int

        Returns
        -------
        DataFrame
            part (those of ``PARTS``, then the sums "image tower", "retuning", "new concepts", "remapping", then "both" and
            "interaction"), gain, low, high, and share, share_low, share_high of the whole gain: NaN where the gain's interval holds 0.
            The interaction of tower and head, A(a,a) - A(a,b) - A(b,a) + A(b,b), is no further part: each side got half of it.
        """
        values = self._measured(measure)
        parts = owen_values(values)
        parts["image tower"] = cast(np.ndarray, sum(parts[name] for name in TOWER_PARTS))
        parts |= {name: cast(np.ndarray, sum(parts[part] for part in members)) for name, members in CONCEPTS.items()}
        tower, base, head, both = values[1, 1, 1, 0], values[0, 0, 0, 0], values[0, 0, 0, 1], values[1, 1, 1, 1]
        parts |= {"both": both - base, "interaction": both - tower - head + base}
        rows = np.stack(list(parts.values()))
        gain, low, high = bootstrap_mean(rows, n_bootstrap, seed)
        table = pd.DataFrame({"part": list(parts), "gain": gain, "low": low, "high": high})
        whole = list(parts).index("both")
        if low[whole] <= 0 <= high[whole]:
            return table.assign(share=np.nan, share_low=np.nan, share_high=np.nan)
        shares = gain / gain[whole]
        share_low, share_high = _ratio_interval(rows, rows[whole], n_bootstrap, seed)
        return table.assign(share=shares, share_low=share_low, share_high=share_high)

    def experiments(self, measure: str = "accuracy", n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
        """The combinations that a reader would ask for: experiment, value, low, high, and the gain over CLIP with its interval."""
        values = self._measured(measure)
        rows = np.stack([values[parts] for parts in EXPERIMENTS.values()])
        value, low, high = bootstrap_mean(rows, n_bootstrap, seed)
        gain, gain_low, gain_high = bootstrap_mean(rows - rows[0], n_bootstrap, seed)
        return pd.DataFrame(
            {"experiment": list(EXPERIMENTS), "value": value, "low": low, "high": high, "gain": gain, "gain_low": gain_low, "gain_high": gain_high}
        )  # fmt: skip

    def change(self, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
        """How much of a change of the residual stream the dictionary misses: change, outside, low, high.

        ``outside`` is the squared norm of the part outside the dictionary over that of the whole change (0: the dictionary says all of
        it; the two parts needn't be orthogonal, so it may pass 1); NaN where nothing changed. Beside the adaptation's change stand two
        yardsticks: from one picture to the next, and in a random direction of the same size at each token.
        """
        records = []
        for i, name in enumerate(CHANGES):
            outside, low, high = (np.nan,) * 3
            if self.squares[:, i, 1].sum() > 0:
                with np.errstate(invalid="ignore"):  # a resample in which no picture changed
                    found = bootstrap(self.squares[:, i], lambda sums, n: {"outside": sums[..., 0] / sums[..., 1]}, n_bootstrap, seed)
                outside, low, high = found["outside"]
            records.append({"change": name, "outside": outside, "low": low, "high": high})
        return pd.DataFrame(records)

    def _measured(self, measure: str) -> np.ndarray:
        if measure not in MEASURES:
            raise ValueError(f"Unknown measure {measure!r}. Valid: {', '.join(MEASURES)}.")
        return self.outcomes[MEASURES.index(measure)]


def _ratio_interval(rows: np.ndarray, whole: np.ndarray, n_bootstrap: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of sums of rows [R, N] over the sum of ``whole`` [N]; resamples in which that is 0 have no ratio and are left out."""
    n = len(whole)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    totals = drawn @ whole
    drawn, totals = drawn[totals != 0], totals[totals != 0]
    return tuple(np.quantile(drawn @ rows.T / totals[:, None], [0.025, 0.975], axis=0))


def owen_values(values: np.ndarray) -> dict[str, np.ndarray]:
    """Each part's Owen value: the image tower's three parts are one union, the text head another.

    Parameters
    ----------
    values : array [2, 2, 2, 2, ...]
        The outcome with each of ``PARTS`` old (0) or new (1).

    Returns
    -------
    dict
        Part -> array [...]; they sum to ``values[1, 1, 1, 1] - values[0, 0, 0, 0]``.

    Source: Owen, 1977.
    """
    orders = list(permutations(range(len(TOWER_PARTS))))
    found = {name: np.zeros(values.shape[len(PARTS) :]) for name in PARTS}
    for head in (0, 1):
        for order in orders:
            state = [0] * len(TOWER_PARTS) + [head]
            for part in order:
                before = values[tuple(state)]
                state[part] = 1
                found[PARTS[part]] += (values[tuple(state)] - before) / (2 * len(orders))
    for tower in (0, 1):
        towers = (tower,) * len(TOWER_PARTS)
        found["text head"] += (values[(*towers, 1)] - values[(*towers, 0)]) / 2
    return found


class GainAnalysis(NamedTuple):
    """What :func:`explain_gain` found."""

    split: GainSplit
    links: ClassLinks


@overload
def explain_gain(base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int, **options: Any) -> GainAnalysis: ...
@overload
def explain_gain(
    base: ClipModel, adapted: Mapping[str, ClipModel], sae: SparseAutoencoder, dataset: Any, layer: int, **options: Any
) -> dict[str, GainAnalysis]: ...
@torch.no_grad()  # type: ignore[misc]  # the overloads leave out what doesn't matter to the result's type
def explain_gain(
    base: ClipModel,
    adapted: ClipModel | Mapping[str, ClipModel],
    sae: SparseAutoencoder,
    dataset: Any,
    layer: int,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> GainAnalysis | dict[str, GainAnalysis]:
    """Split the gain of an adapted model into its parts, and compare what classes rest on; one pass up to the hook for each model.

    Parameters
    ----------
    base : ClipModel
    adapted : ClipModel, or mapping of name to ClipModel
        Several share the base model's pass.
    sae : SparseAutoencoder
        Trained on ``base``.
    dataset : data set
        Labelled pictures that neither the SAE nor the adapter has seen.
    layer : int
        Block whose output the SAE reads.
    batch_size : int
    seed : int
        Of the random directions.
    progress : bool

    Returns
    -------
    GainAnalysis, or dict of name to GainAnalysis

    Raises
    ------
    ValueError
        If the models have different shapes, the SAE does not fit, or there are no pictures.
    """
    models = dict(adapted) if isinstance(adapted, Mapping) else {type(adapted).__name__: adapted}
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} is empty: there is nothing to explain.")
    sae.check_model(base, layer)
    for model in models.values():
        check_same_tower(base, model)
    names, heads = list(dataset.class_names), {name: dataset_head(model, dataset) for name, model in models.items()}
    tails: dict = {}
    base_head, base_tail = dataset_head(base, dataset), None
    sums = {name: LinkSums(names, sae.W_dec.detach()) for name in models}
    outcomes: dict[str, list[Tensor]] = {name: [] for name in models}
    squares: dict[str, list[Tensor]] = {name: [] for name in models}
    generator = Generator().manual_seed(seed)
    for batch in batches(dataset, base.preprocess, batch_size, progress=f"explaining {dataset.name}" if progress else None):
        labels = batch.labels.to(base.device)
        before = base.run_to(batch.images, layer)
        base_tail = base_tail or network_tail(base, layer, before)
        active_before, decoded_before = _read(sae, before.tokens)
        noise = torch.randn(before.tokens.shape, generator=generator).to(base.device)
        for name, model in models.items():
            after = model.run_to(batch.images, layer)
            tails[name] = tails.get(name) or network_tail(model, layer, after)
            active_after, decoded_after = _read(sae, after.tokens)
            readers = Reader(base, base_tail, base_head), Reader(model, tails[name], heads[name])
            streams = _streams(before.tokens, after.tokens, decoded_after - decoded_before)
            outcomes[name].append(_outcomes(readers, (before, after), streams, labels))
            squares[name].append(_squares(sae, before.tokens, after.tokens, decoded_before, decoded_after, noise))
            sums[name].add(readers, (before, after), (active_before, active_after), labels)
    found = {
        name: GainAnalysis(
            GainSplit(dataset.name, name, torch.cat(outcomes[name], -1).numpy(), torch.cat(squares[name]).numpy()), sums[name].links()
        )
        for name in models
    }
    return found if isinstance(adapted, Mapping) else next(iter(found.values()))


def _read(sae: SparseAutoencoder, tokens: Tensor) -> tuple[Active, Tensor]:
    """The positive latents of a batch, and its reconstruction [B, T, D]."""
    parts, decoded = [], torch.empty_like(tokens)
    for rows, h in latent_chunks(sae, tokens):
        part = Active.of(h)
        parts.append(part._replace(token=part.token + rows.start * tokens.shape[1]))
        decoded[rows] = sae.decode(h)
    token, latent, value = (torch.cat(pieces) for pieces in zip(*(part[:3] for part in parts), strict=True))
    return Active(token, latent, value, (tokens.shape[0], tokens.shape[1])), decoded


def _streams(before: Tensor, after: Tensor, latents: Tensor) -> dict[tuple[int, int], Tensor]:
    """The residual stream with the latents' part of its change, the rest of it, both or neither: (latents, outside) -> [B, T, D]."""
    return {(0, 0): before, (1, 0): before + latents, (0, 1): after - latents, (1, 1): after}


def _outcomes(
    readers: tuple[Reader, Reader], residuals: tuple[Residual, Residual], streams: Mapping[tuple[int, int], Tensor], labels: Tensor
) -> Tensor:
    """Rightness and log-probability of every combination for a batch: [2, 2, 2, 2, 2, B]."""
    found = torch.empty(2, 2, 2, 2, 2, len(labels), dtype=torch.float64)
    for tail, (reader, residual) in enumerate(zip(readers, residuals, strict=True)):
        for (latents, outside), tokens in streams.items():
            # Prompt tokens belong to the blocks that made them and read them: they go with the tail.
            features = reader.tail(residual._replace(tokens=tokens))
            for head, owner in enumerate(readers):
                logits = owner.clip.logits(features, owner.head)
                found[0, latents, outside, tail, head] = (logits.argmax(1) == labels).double().cpu()
                found[1, latents, outside, tail, head] = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0].cpu()
    return found


def _squares(sae: SparseAutoencoder, before: Tensor, after: Tensor, decoded_before: Tensor, decoded_after: Tensor, noise: Tensor) -> Tensor:
    """Squared norms [B, 3, 2] of each of ``CHANGES``: outside the dictionary, and whole."""
    change = after - before
    random = noise * (change.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    decoded_random = _read(sae, before + random)[1] if change.any() else decoded_before
    pairs = [
        (change, decoded_after - decoded_before),
        (before.roll(1, 0) - before, decoded_before.roll(1, 0) - decoded_before),
        (random, decoded_random - decoded_before),
    ]
    return (
        torch.stack([torch.stack([(whole - said).square().sum((1, 2)), whole.square().sum((1, 2))], 1) for whole, said in pairs], 1)
        .double()
        .cpu()
    )
