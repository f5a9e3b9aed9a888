"""Do the same latents come back when an SAE is trained again? Dictionaries matched one to one, with a random baseline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..run.intervals import Interval, mean_interval

MAX_LATENTS = 12_288  # that are matched one to one: the assignment takes cubic time and a [S, S] matrix


class MatchedCosine(NamedTuple):
    """Latents of two SAEs, paired so that the sum of their decoder rows' cosines is largest; each at most once."""

    a: np.ndarray
    """int64 [n] latents of the first SAE, ascending."""
    b: np.ndarray
    """int64 [n] their partners in the second."""
    cosine: np.ndarray
    """float64 [n] cosine of each pair's decoder rows."""
    random: np.ndarray
    """float64 [n] the same after the second decoder was replaced by random directions of its mean and covariance."""
    mean: Interval
    """Of ``cosine``, with a bootstrap over latents."""

    @property
    def random_mean(self) -> float:
        return float(self.random.mean())


def matched_cosine(sae_a, sae_b, alive_a: Tensor | None = None, alive_b: Tensor | None = None) -> MatchedCosine:
    """Match the latents of two SAEs of one width, or those that are alive (bool [S]), by the Hungarian method.

    Matching thousands of directions finds high cosines by luck, the more so when all share a mean direction. The baseline is matched in
    the same way to directions drawn from the normal distribution with the second decoder's mean and covariance.
    Source: the matching by Paulo and Belrose, "Sparse autoencoders trained on the same data learn different features", 2025.
    """
    if sae_a.d_in != sae_b.d_in:
        raise ValueError(f"The SAEs read different widths, {sae_a.d_in} and {sae_b.d_in}: their directions can't be compared.")
    kept = [_kept(sae, alive) for sae, alive in ((sae_a, alive_a), (sae_b, alive_b))]
    if min(map(len, kept)) == 0 or min(map(len, kept)) > MAX_LATENTS:
        raise ValueError(f"Matches 1 to {MAX_LATENTS:,} latents, got {len(kept[0]):,} and {len(kept[1]):,}. Choose some as alive.")
    rows = [F.normalize(sae.W_dec.detach().double().cpu()[which], dim=1) for sae, which in zip((sae_a, sae_b), kept, strict=True)]
    centre = rows[1].mean(0)
    left, scale, _ = torch.linalg.svd((rows[1] - centre).T, full_matrices=False)
    noise = torch.randn(len(rows[1]), len(scale), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = F.normalize(centre + noise * scale / len(rows[1]) ** 0.5 @ left.T, dim=1)
    (i, j, cosine), (_, _, by_luck) = _assign(rows[0], rows[1]), _assign(rows[0], random)
    return MatchedCosine(kept[0].numpy()[i], kept[1].numpy()[j], cosine, by_luck, mean_interval(cosine, "latents"))


def stability(saes: Mapping[Any, Any], alive: Mapping[Any, Tensor] | None = None, *, threshold: float = 0.7) -> pd.DataFrame:
    """How alike SAEs of several seeds are, pair by pair: their latents matched one to one by the cosine of their decoder rows.

    Parameters
    ----------
    saes : mapping of name to SparseAutoencoder
        At least two, e.g. by seed.
    alive : mapping of name to bool Tensor [S], optional
        Latents to match, at most 12,288, e.g. ``~summary.dead``: dead ones stay near their random start. Default: all.
    threshold : float
        Cosine above which a pair counts as the same latent.

    Returns
    -------
    DataFrame
        One row for each pair: a, b, n (pairs of latents), cosine, low, high (mean and its 95 % interval over latents), random (mean of the
        baseline: random directions of the second's mean and covariance), found, found_random (shares above the threshold).
    """
    rows = []
    for a, b in itertools.combinations(saes, 2):
        found = matched_cosine(saes[a], saes[b], *((alive[a], alive[b]) if alive else (None, None)))
        mean = dict(zip(("cosine", "low", "high"), found.mean, strict=False))
        shares = {"found": float((found.cosine > threshold).mean()), "found_random": float((found.random > threshold).mean())}
        rows.append({"a": a, "b": b, "n": len(found.a), **mean, "random": found.random_mean, **shares})
    return pd.DataFrame(rows)


def _kept(sae, alive: Tensor | None) -> Tensor:
    return (torch.ones(len(sae.W_dec), dtype=torch.bool) if alive is None else alive.cpu()).nonzero().flatten()


def _assign(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cosine = (a @ b.T).numpy()
    i, j = linear_sum_assignment(cosine, maximize=True)
    return i, j, cosine[i, j]
