"""What a training run leaves to read: the log, row by row, and a summary."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pandas as pd

LOG, SUMMARY = "training_log.csv", "summary.json"
LOG_COLUMNS = ("step", "tokens", "lr", "loss", "mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "tokens_per_second")


def training_log(out: str | Path) -> pd.DataFrame:
    """The log that :func:`train_sae` wrote into ``out``: one row every ``log_every`` steps, columns as in ``LOG_COLUMNS``.

    ``l0`` and ``explained_variance`` (centred) are of the training batch, before the step; ``dead_fraction`` counts latents that have not
    fired for more than ``dead_after_steps`` steps.
    """
    path = Path(out) / LOG
    if not path.exists():
        raise FileNotFoundError(f"No {LOG} in {out}: train an SAE there first, by train_sae(sae, store, config, {str(out)!r}).")
    return pd.read_csv(path)


class TrainingLog:
    """A CSV that begins with the rows a checkpoint knows, so that a resumed run leaves no row twice; each row is on disk when written.

    Parameters
    ----------
    folder : Path
    rows : list of dict
        Those of the steps before the checkpoint.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        path = folder / LOG
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(_rounded(row) for row in rows)
        os.replace(temporary, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, LOG_COLUMNS)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row with the columns ``LOG_COLUMNS``."""
        self._writer.writerow(_rounded(row))
        self._file.flush()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
