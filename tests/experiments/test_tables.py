"""The tables of the experiments, read: which rows are compared, on made-up tables; the figures."""

import re

import pandas as pd
import pytest

from patchsae_utils import tables
from patchsae_utils.config import load_profile
from patchsae_utils.tables import QUANTILES, STATISTICS, at_matched_l0, by_axis, frontier, load_benchmark, load_table, planted_and_found


def row(axis: str, value: str, l0: float = 30.0, ap: float = 0.3, layer: int = 4, **other) -> dict:
    numbers = {
        "axis": axis, "value": value, "layer": layer, "activation": axis if axis in ("topk", "jumprelu") else "relu", "tokens": "all",
        "l0_all": l0,
    }  # fmt: skip
    numbers |= {"object_ap": ap, "object_ap_low": ap - 0.02, "object_ap_high": ap + 0.03}
    numbers |= {f"{name}_q{q}": layer + q / 100 for name in STATISTICS for q in QUANTILES}
    return numbers | other


@pytest.fixture
def table():
    rows = [row("seed", "0", 28.0), row("seed", "1", 30.0), row("seed", "2", 32.0)]
    rows += [row("layer", str(layer), layer=layer, ap=0.1 + 0.05 * layer) for layer in (0, 1, 2, 3, 5)]
    rows += [row("tokens", "cls", 80.0, 0.05, tokens="cls"), row("tokens", "patches", 31.0, 0.35, tokens="patches")]
    rows += [row("expansion", "x32", 30.0, 0.9)]
    return pd.DataFrame(rows)


def test_an_axis_is_the_main_setting_once_and_what_differs_in_it_alone(table):
    rows = by_axis(table, "layer")
    assert rows["layer"].tolist() == [0, 1, 2, 3, 4, 5] and rows["main"].tolist() == [False] * 4 + [True, False]
    assert rows.loc[5, "object_ap"] == pytest.approx(0.35) and rows.loc[4, "object_ap"] == 0.3
    assert rows.loc[2, "label_entropy_q75"] == 2.75
    assert by_axis(table, "tokens")[["tokens", "main"]].values.tolist() == [["all", True], ["cls", False], ["patches", False]]


def test_the_committed_tables_and_benchmarks_are_found():
    assert len(load_table(load_profile(), "ablations")) > 20 and load_benchmark("sae_step")
    assert set(load_table(load_profile(), "adaptation")["kind"]) > {"zero-shot", "maple"}
    assert load_table(load_profile(overrides={"training.seed": 3, "name": "another"}), "ablations") is None


def test_the_frontier_compares_like_with_like():
    row = {"activation": "topk", "l0_all": 10.0, "axis": "seed", "value": "0"}
    others = [{"axis": "seed", "value": "1"}, {"axis": "layer"}, {"axis": "units"}, {"axis": "paper", "activation": "relu", "l0_all": 90.0},
              {"axis": "topk", "l0_all": 4.0}, {"axis": "relu", "activation": "relu", "l0_all": 20.0}]  # fmt: skip
    rows = frontier(pd.DataFrame([row, *({**row, **other} for other in others)]))
    assert list(zip(rows["variant"], rows["l0_all"], strict=True)) == [("paper", 90.0), ("relu", 20.0), ("topk", 4.0), ("topk", 10.0)]


def test_variants_are_compared_where_they_are_as_sparse():
    rows = [("relu", 10, 0.5), ("relu", 40, 0.7), ("topk", 16, 0.8), ("topk", 32, 0.9), ("gated", 50, 0.9)]
    table = pd.DataFrame(rows, columns=["variant", "l0_all", "object_ap"]).assign(explained_variance_all=1.0)
    found = at_matched_l0(table, 20)["object_ap"]
    assert found["relu"] == pytest.approx(0.6)  # 20 is half-way between 10 and 40 on a logarithmic scale
    assert 0.8 < found["topk"] < 0.9 and pd.isna(found["gated"])
    said = tables.frontier_sentence(table.assign(dead_fraction=[0.1, 0.3, 0.0, 0.0, 0.2], dead_in_training=[0.0, 0.2, 0.0, 0.0, 0.1]), 20)
    assert "are: topk 100.0% and 0.83, relu 100.0% and 0.60. Of all, topk with 32 latents finds objects best (0.90, at 100%" in said
    assert said.endswith("are: topk 0% to 0% (0% to 0%), gated 10% to 10% (20% to 20%), relu 0% to 20% (10% to 30%).")


def test_what_planted_features_say_over_controls():
    """Counts are pooled, not shares averaged."""
    columns = ["kind", "method", "planted", "found", "called", "precision", "candidates"]
    rows = [("new", "combined", 12, 9, 10, 0.9, 500), ("new", "combined", 1, 1, 10, 0.1, 500), ("null", "combined", 0, 0, 5, None, 500),
            ("null", "combined", 0, 0, 0, None, 300), ("new", "combined", 0, 0, 70, None, 500), ("useless", "combined", 1, 1, 9, 1.0, 500),
            ("new", "any latent", 20, 17, 400, 0.1, 500)]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns).assign(control=["planted directions", *["another"] * (len(rows) - 1)])
    found = planted_and_found(table)
    assert found == pytest.approx({"planted_recall": 10 / 13, "planted_precision": 0.5, "null_new_share": 5 / 800})
    shares = pd.DataFrame([("null", 0.0), ("null", 0.3), ("new", 0.4)], columns=["kind", "new_share"]).assign(method="split of the gain")
    said = tables.novelty_sentence(pd.concat([table, shares]))
    for words in (
        "finds 75%, and 90% of what",
        "calls 0.6% of the latents",
        "learned it finds 100% (85% have",
        "lie 0% to 30% of",
        "40% to 40%",
    ):
        assert words in said


def test_what_is_said_of_a_clip_and_its_twin():
    table = load_table(load_profile("openmoji"), "twin")
    rows = table.set_index(["clip", "measure", "of"])["value"].unstack("clip")
    said = tables.twin_sentence(table)
    for name in ("patches taught", "captions alone"):
        probe = rows.loc[("token probe", "patch"), name]
        latents, control = (rows.loc[("AP", f"{of}, object"), name] for of in ("SAE", "random SAE"))
        mine = said[said.lower().index(name) :].split(". ")[0]
        assert f"the object from {probe:.0%}"[:-1] in mine
        found = re.findall(r"objects with an AP of (\S+) .*?, a random SAE's with (\S+) ", said[said.lower().index(name) :])[0]
        assert found == (f"{latents:.2f}", f"{control:.2f}")
    assert said.startswith("Patches taught: CLIP classifies ") and said.count("CLIP classifies") == 2
