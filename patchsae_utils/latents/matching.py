"""Do the same latents come back when an SAE is trained again? Dictionaries matched one to one, with a random baseline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
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

    The baseline is matched likewise to directions drawn from the normal distribution with the second decoder's mean and covariance.
    Source: Paulo and Belrose, "Sparse autoencoders trained on the same data learn different features", 2025.
    """
    if sae_a.d_in != sae_b.d_in:
        raise ValueError(f"The SAEs read different widths, {sae_a.d_in} and {sae_b.d_in}: their directions can't be compared.")
    saes = (sae_a, alive_a), (sae_b, alive_b)
    kept = [torch.arange(len(sae.W_dec)) if alive is None else alive.cpu().nonzero().flatten() for sae, alive in saes]
    if not 0 < min(map(len, kept)) <= MAX_LATENTS:
        raise ValueError(f"Matches 1 to {MAX_LATENTS:,} latents, got {len(kept[0]):,} and {len(kept[1]):,}. Choose some as alive.")
    rows = [F.normalize(sae.W_dec.detach().double().cpu()[which], dim=1) for (sae, _), which in zip(saes, kept, strict=True)]
    centre = rows[1].mean(0)
    left, scale, _ = torch.linalg.svd((rows[1] - centre).T, full_matrices=False)
    noise = torch.randn(len(rows[1]), len(scale), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = F.normalize(centre + noise * scale / len(rows[1]) ** 0.5 @ left.T, dim=1)
    (i, j, cosine), (_, _, by_luck) = _assign(rows[0], rows[1]), _assign(rows[0], random)
    return MatchedCosine(kept[0].numpy()[i], kept[1].numpy()[j], cosine, by_luck, mean_interval(cosine, "latents"))


def stability(saes: Mapping[Any, Any], alive: Mapping[Any, Tensor] | None = None, *, threshold: float = 0.7) -> pd.DataFrame:
    """:func:`matched_cosine` of SAEs by name, of all latents or of those alive (bool [S]).

    A row a pair: a, b, n (pairs of latents), cosine, low, high (mean, 95 % over latents), random (mean of the baseline), found,
    found_random (shares above the threshold).
    """
    rows = []
    for a, b in combinations(saes, 2):
        found = matched_cosine(saes[a], saes[b], *((alive[a], alive[b]) if alive else (None, None)))
        mean = dict(zip(("cosine", "low", "high"), found.mean, strict=False))
        shares = {"found": float((found.cosine > threshold).mean()), "found_random": float((found.random > threshold).mean())}
        rows.append({"a": a, "b": b, "n": len(found.a), **mean, "random": found.random_mean, **shares})
    return pd.DataFrame(rows)


def _assign(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cosine = (a @ b.T).numpy()
    i, j = linear_sum_assignment(cosine, maximize=True)
    return i, j, cosine[i, j]
