"""Rates are compared on the same pictures, and the recipes are what the committed table says."""

import dataclasses

import numpy as np
import pytest

from experiments import grid
from experiments.rates import HALVES, TASKS, Cell, Rates, cells
from patchsae_utils.adaptation.fit import ADAPTERS
from patchsae_utils.config import load_profile
from patchsae_utils.tables import load_table


def test_rates_are_compared_on_the_same_pictures(tiny_clip, tmp_path):
    profile = load_profile(overrides={"adapters.n_shots": 1, "adapters.epochs": 2, "adapters.depth": 2})
    rates = Rates(dataclasses.replace(profile, root=tmp_path), tiny_clip, n_images=18, progress=False)
    chosen = [Cell(TASKS[0], "linear", factor) for factor in (1.0, 3.0)]
    measured = {cell: row for cell, row, _ in grid.run(rates, chosen)}
    table = rates.tables(measured)["rates"].set_index("factor")
    bits = {cell.factor: np.array([int(bit) for half in HALVES for bit in row["right"][half]]) for cell, row in measured.items()}
    assert all(len(found) == 36 for found in bits.values())
    assert table.loc[1.0, ["gain", "low", "high"]].eq(0).all() and table.loc[3.0, "lr"] == 3 * table.loc[1.0, "lr"]
    assert table.loc[3.0, "gain"] == pytest.approx((bits[3.0] - bits[1.0]).mean())
    assert table.loc[3.0, [*HALVES]].mean() == pytest.approx(bits[3.0].mean())


def test_validation_tasks_stand_in_no_table_and_no_other_rate_is_surely_better():
    profile = load_profile("openmoji")
    assert not {*TASKS} & {*profile.data.tasks, *profile.adapters.tasks}
    table = load_table(profile, "rates")
    assert table is None or (table["low"] <= 0).all()
    assert {cell.kind for cell in cells(list(ADAPTERS)) if cell.random_crop} == {"maple"}
