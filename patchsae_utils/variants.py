"""What the table of ablations says of latents: by layer, by the tokens an SAE was trained on, by variant, by seed.

The table is ``benchmarks/results/ablations.csv``, which ``make ablations`` writes (:mod:`.ablations`): SAEs of one recipe, each changed in one thing.
The counterparts in Lim et al. (ICLR 2025) are Fig. 9 (layers) and Fig. 8 (CLS alone).
"""

from __future__ import annotations

import pandas as pd

from .ablations import QUANTILES, STATISTICS

VARIANTS = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU", "gated": "gated"}
MEASURES = ("object_ap", "object_ap_low", "object_ap_high")


def by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """One row a layer, ascending: the main setting's SAE (its first seed) and those that differ from it in the layer alone.

    Parameters
    ----------
    table : DataFrame
        As :func:`patchsae_utils.ablations.load_ablations` reads it.

    Returns
    -------
    DataFrame
        layer, main (bool), and the table's columns of :data:`STATISTICS` at the :data:`QUANTILES`, and of object AP.

    Raises
    ------
    ValueError
        If the table lacks a column, or the main setting.
    """
    wanted = [f"{name}_q{q}" for name in STATISTICS for q in QUANTILES]
    main = _main(table, [*wanted, *MEASURES])
    rows = pd.concat([main.iloc[:1], table[table["axis"] == "layer"]])
    rows = rows.assign(main=rows["axis"] == "seed").sort_values("layer")
    return rows[["layer", "main", *wanted, *MEASURES]].reset_index(drop=True)


def nearest_variants(table: pd.DataFrame) -> pd.DataFrame:
    """How well latents of each variant find objects, at the sparsity nearest to the main setting's.

    Parameters
    ----------
    table : DataFrame
        As :func:`patchsae_utils.ablations.load_ablations` reads it.

    Returns
    -------
    DataFrame
        dictionary, value (of the row that was taken), l0 (active latents a token), object_ap, object_ap_low, object_ap_high. First the main
        setting, one row a seed; then the variants of :data:`VARIANTS`, each where the ratio of its L0 and the mean of the main setting's is
        closest to 1; then the SAEs of the main setting that were trained on CLS or on patches alone.

    Raises
    ------
    ValueError
        If the table lacks a column, or the main setting.
    """
    main = _main(table, ["value", "l0_all", "tokens", *MEASURES])
    goal = main["l0_all"].mean()
    picked = [(f"PatchSAE, seed {row['value']}", row) for _, row in main.iterrows()]
    for axis, name in VARIANTS.items():
        rows = table[table["axis"] == axis]
        if len(rows):
            distance = (rows["l0_all"].clip(lower=1e-9) / goal).map(lambda ratio: max(ratio, 1 / ratio))
            picked.append((name, rows.loc[distance.idxmin()]))
    names = {"cls": "CLS tokens alone", "patches": "patches alone"}
    picked += [(names.get(row["value"], row["value"]), row) for _, row in table[table["axis"] == "tokens"].iterrows()]
    frame = pd.DataFrame([row for _, row in picked])[["value", "l0_all", *MEASURES]].rename(columns={"l0_all": "l0"})
    frame.insert(0, "dictionary", [name for name, _ in picked])
    return frame.reset_index(drop=True)


def seed_stability(table: pd.DataFrame) -> pd.DataFrame:
    """Mean cosine of latents matched one to one with seed 0's, by seed: value, matched_cosine, its _low and _high, and _random (by chance).

    Raises
    ------
    ValueError
        If the table lacks a column, or the main setting.
    """
    columns = ["matched_cosine", "matched_cosine_low", "matched_cosine_high", "matched_cosine_random"]
    return _main(table, ["value", *columns])[["value", *columns]].dropna().reset_index(drop=True)


def _main(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Rows of the main setting, after a look at the columns."""
    missing = [name for name in ("axis", "layer", *columns) if name not in table]
    if missing or not (table["axis"] == "seed").any():
        lacks = ", ".join(missing) if missing else "any row of axis 'seed', the main setting"
        raise ValueError(f"The table of ablations lacks {lacks}. `make ablations` writes it anew.")
    return table[table["axis"] == "seed"]
