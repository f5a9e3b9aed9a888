"""Do the same latents come back when an SAE is trained again? Dictionaries matched one to one, with a random baseline."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from patchsae_utils.run.intervals import Interval, mean_interval

MAX_LATENTS = 12_288  # that are matched one to one: the assignment takes cubic time and a [S, S] matrix


class MatchedCosine(NamedTuple):
    """Latents of two SAEs, paired so that the sum of their decoder rows' cosines is largest; each at most once."""

    a: np.ndarray  # int64 [n] latents of the first SAE, ascending
    b: np.ndarray  # int64 [n] their partners in the second
    cosine: np.ndarray  # float64 [n] cosine of each pair's decoder rows
    random: np.ndarray  # float64 [n] the same after the second decoder was replaced by random directions of its mean and covariance
    mean: Interval  # of cosine, with a bootstrap over latents

    @property
    def random_mean(self) -> float:
        return float(self.random.mean())


def matched_cosine(sae_a, sae_b) -> MatchedCosine:
    """Match the latents of two SAEs of one width by the Hungarian method.

    The baseline is matched likewise to directions drawn from the normal distribution with the second decoder's mean and covariance.
    Source: Paulo and Belrose, "Sparse autoencoders trained on the same data learn different features", 2025.
    """
    if sae_a.d_in != sae_b.d_in:
        raise ValueError(f"The SAEs read different widths, {sae_a.d_in} and {sae_b.d_in}: their directions can't be compared.")
    rows = [F.normalize(sae.W_dec.detach().double().cpu(), dim=1) for sae in (sae_a, sae_b)]
    if min(map(len, rows)) > MAX_LATENTS:
        raise ValueError(f"Matches up to {MAX_LATENTS:,} latents one to one, got {len(rows[0]):,} and {len(rows[1]):,}.")
    centre = rows[1].mean(0)
    left, scale, _ = torch.linalg.svd((rows[1] - centre).T, full_matrices=False)
    noise = torch.randn(len(rows[1]), len(scale), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = F.normalize(centre + noise * scale / len(rows[1]) ** 0.5 @ left.T, dim=1)
    (i, j, cosine), (_, _, by_luck) = _assign(rows[0], rows[1]), _assign(rows[0], random)
    return MatchedCosine(i, j, cosine, by_luck, mean_interval(cosine, "latents"))


def _assign(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cosine = (a @ b.T).numpy()
    i, j = linear_sum_assignment(cosine, maximize=True)
    return i, j, cosine[i, j]
