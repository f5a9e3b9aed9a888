"""Which classes CLIP takes for which, and what adaptation made of it: confusion matrices of both models and the fate of each mistake.

An accuracy says how many pictures were gained, not where. Read with :mod:`patchsae_utils.adaptation.links`, a resolved confusion says which two classes were told
apart anew; a mistake that stays the same points at what neither head can read from the residual stream.

Source: the comparison of confusion matrices follows Lim et al., ICLR 2025, Fig. 21.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from ..run.intervals import bootstrap_mean
from .compare import N_BOOTSTRAP, SIDES, Remapping

FATES = ("right in both", "resolved", "same mistake", "another mistake", "broken")
"""What becomes of a picture: ``resolved`` and ``broken`` are right in the adapted model alone and in CLIP alone."""


class Confusions(NamedTuple):
    """How often each model takes pictures of one class for another."""

    class_names: list[str]
    base: np.ndarray
    """int [C, C]: CLIP's pictures by true class (row) and predicted class (column)."""
    adapted: np.ndarray
    """int [C, C]: the adapted model's."""

    @property
    def change(self) -> np.ndarray:
        """[C, C] adapted minus base, as shares of each true class's pictures: rows sum to 0; NaN for classes without pictures."""
        with np.errstate(invalid="ignore"):
            return (self.adapted - self.base) / self.base.sum(1, keepdims=True)

    @property
    def order(self) -> np.ndarray:
        """[C] classes from the one that gained most accuracy to the one that lost most; ties in their own order."""
        return np.argsort(-np.nan_to_num(self.change.diagonal()), kind="stable")

    def pairs(self, n: int | None = None) -> pd.DataFrame:
        """Confusions that changed, those that adaptation resolved most first.

        Parameters
        ----------
        n : int, optional
            So many; by default all.

        Returns
        -------
        DataFrame
            class_name, taken_for, pictures (of the class), base, adapted (how many of them each model takes so), change.
        """
        rows, columns = np.nonzero((self.base != self.adapted) & ~np.eye(len(self.base), dtype=bool))
        table = pd.DataFrame(
            {
                "class_name": [self.class_names[i] for i in rows],
                "taken_for": [self.class_names[i] for i in columns],
                "pictures": self.base.sum(1)[rows],
                "base": self.base[rows, columns],
                "adapted": self.adapted[rows, columns],
            }
        )
        table["change"] = table["adapted"] - table["base"]
        return table.sort_values("change", kind="stable", ignore_index=True).head(n)


def confusions(remapping: Remapping, form: str = "raw") -> Confusions:
    """Confusion matrices of CLIP and of the adapted model, each with its own text head.

    Parameters
    ----------
    remapping : Remapping
    form : {"raw", "reconstructed", "error kept"}
    """
    labels = range(len(remapping.class_names))
    matrices = [confusion_matrix(reading.labels, reading.predicted[side, form], labels=labels) for side, reading in _sides(remapping)]
    return Confusions(remapping.class_names, *matrices)


def fates(remapping: Remapping, form: str = "raw", n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> pd.DataFrame:
    """What became of each picture: fate (see :data:`FATES`), share of all pictures, low, high; intervals over pictures."""
    (side, base), (other_side, adapted) = _sides(remapping)
    before, after, labels = base.predicted[side, form], adapted.predicted[other_side, form], base.labels
    was, is_ = before == labels, after == labels
    rows = [was & is_, ~was & is_, ~was & (after == before), ~was & ~is_ & (after != before), was & ~is_]
    share, low, high = bootstrap_mean(np.stack(rows), n_bootstrap, seed)
    return pd.DataFrame({"fate": FATES, "share": share, "low": low, "high": high})


def _sides(remapping: Remapping):
    return list(zip(SIDES, (remapping.base, remapping.adapted), strict=True))
