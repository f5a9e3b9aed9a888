"""Predictions over k: what CLIP and an adapted model make of the same k latents of each class.

Only a class's top k latents are kept, or they are removed, and each model classifies what is left. If adapting is a new mapping of old concepts, the
adapted head must read more from *the same few latents of CLIP's dictionary*. So the latents are chosen once, on CLIP's train split, and are the same for
all models; between them stands CLIP's image tower under the adapted head, where nothing but the reading has changed.

The mask of a picture is that of its true class, which tells the label: accuracies at one k can be compared with each other and with as many random
latents, not with unmasked ones. Source: the heat maps of Lim et al., ICLR 2025, Fig. 6.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from ..clip.model import ClipModel
from ..interventions.masks import sweep_masks
from ..interventions.tail import check_same_tower, dataset_head
from ..latents.classes import class_scores
from ..latents.reading import summarize_latents
from ..sae.model import SparseAutoencoder

MODELS = ("CLIP", "CLIP, adapted head", "adapted")
KS = (1, 3, 10, 30, 100, 300)


def masked_predictions(
    base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, train: Any, test: Any, layer: int, *, progress: bool = True
) -> pd.DataFrame:
    """Accuracy of each class with only its k most specific latents, or without them, in CLIP and in an adapted model.

    Parameters
    ----------
    base, adapted : ClipModel
    sae : SparseAutoencoder
        Trained on ``base``.
    train : data set
        Labelled pictures of the same classes: CLIP's latents on them are ranked.
    test : data set
        Pictures that are classified.
    layer : int
        Block whose output the SAE reads.
    progress : bool
        Show a bar.

    Returns
    -------
    DataFrame
        model ("CLIP", "CLIP, adapted head", "adapted") and the columns of :func:`patchsae_utils.sweep_masks`, with rows for each class;
        ``choose`` is "oracle" (the class's latents), "random", or "none" (unmasked).

    Raises
    ------
    ValueError
        If the models have different shapes, or as :func:`patchsae_utils.sweep_masks`.
    """
    check_same_tower(base, adapted)
    summary = summarize_latents(base, sae, train, layer, progress=progress)
    ranking = dataclasses.replace(summary, class_counts=class_scores(summary, "specific"))
    tables = []
    for name, tower, reader in zip(MODELS, (base, base, adapted), (base, adapted, adapted), strict=True):
        table = sweep_masks(
            tower, sae, test, [k for k in KS if k <= sae.d_sae], ("oracle", "random"), layer=layer, class_counts=ranking,
            head=dataset_head(reader, test), n_random=1, groups="class", batch_size=60,
        )  # fmt: skip
        tables.append(table.assign(model=name))
    return pd.concat(tables, ignore_index=True)


def class_heat(table: pd.DataFrame, model: str, mode: str) -> pd.DataFrame:
    """Accuracy by class (rows, in their order) and k (columns) of one model, with the classes' own latents kept or removed."""
    rows = table[(table["model"] == model) & (table["mode"] == mode) & (table["choose"] == "oracle") & (table["class"] >= 0)]
    return rows.pivot(index="class", columns="k", values="accuracy").rename(index=dict(zip(rows["class"], rows["group"], strict=True)))
