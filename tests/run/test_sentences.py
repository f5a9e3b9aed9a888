"""Results say themselves: the numbers of the sentences are those of their tables (issue 20.3)."""

import pandas as pd

from patchsae_utils.activations import probe_sentence
from patchsae_utils.clip import accuracy_sentence
from patchsae_utils.explorer import pointing_sentence
from patchsae_utils.sae import evaluation_sentence, places_sentence
from patchsae_utils.tables import ablation_sentence


def test_zero_shot_accuracy():
    predictions = pd.DataFrame({
        "domain": ["color"] * 6 + ["line"] * 2, "tier": ["rare"] * 2 + ["common"] * 4 + ["rare"] * 2, "correct": [True] * 6 + [False] * 2,
        "n_classes": 4, "n_in_task": 2,
    })  # fmt: skip
    words = "CLIP classifies 100% [100, 100] of 6 unseen pictures correctly (guessing: 25.0%)."
    tiers, others = "common 100% [100, 100], rare 100% [100, 100]", "line 0% [0, 0]"
    assert accuracy_sentence(predictions) == f"{words} How often captions named the class: {tiers}. Other domains: {others}."
    assert accuracy_sentence(predictions.query("domain == 'color'").assign(tier="all")) == words


def test_probes():
    rows = [(0, "CLS", 0.1), (0, "patch", 0.2), (4, "CLS", 0.6), (4, "patch", 0.8)]
    probes = pd.DataFrame(
        [(*row, row[2] - 0.05, row[2] + 0.05, 0.01) for row in rows], columns=["layer", "token", "accuracy", "low", "high", "control"]
    )
    assert probe_sentence(probes, 4) == (
        "At layer 4 a probe reads the class from a single patch in 80% [75, 85] of cases (20% at layer 0, 1.0% with permuted labels), "
        "and from CLS in 60% [55, 65]."
    )


def test_quality_of_an_sae_with_and_without_words():
    rows = [("SAE", "explained_variance", 0.9), ("SAE", "l0", 8.0), ("SAE", "zero_shot_change", -0.03)]
    frame = pd.DataFrame([("reconstruction", "all", *row, row[2] - 0.01, row[2] + 0.01) for row in rows])
    frame.columns = ["variant", "tokens", "sae", "metric", "value", "low", "high"]
    kept = "Explained on unseen pictures: SAE 90.0% [89.0, 91.0] of the variance with 8 latents per token"
    assert evaluation_sentence(frame) == f"{kept}, CLIP's accuracy changed by -3.00 [-4.00, -2.00] points."
    assert evaluation_sentence(frame[:2]) == f"{kept}."
    readings = [("object", "l0", 8.0), ("object", "error", 0.3), ("background", "l0", 7.0), ("background", "error", 0.2)]
    places = pd.DataFrame([(*row, row[2], row[2]) for row in readings], columns=["place", "metric", "value", "low", "high"])
    said = places_sentence(places)
    assert said == (
        "A patch of an object has 8.00 [8.00, 8.00] latents and an error of 30% [30, 30] of its norm; "
        "a patch of bare background 7.00 [7.00, 7.00] latents and an error of 20% [20, 20] of its norm."
    )


def test_ablations_name_what_lies_outside_all_seeds():
    rows = [("seed", "0", 0.30, 0.28, 0.32), ("seed", "1", 0.34, 0.32, 0.36), ("layer", "3", 0.1, 0.08, 0.12)]
    rows += [("size", "x32", 0.5, 0.45, 0.55), ("size", "x8", 0.33, 0.31, 0.35)]
    table = pd.DataFrame(rows, columns=["axis", "value", "object_ap", "object_ap_low", "object_ap_high"]).assign(activation="topk")
    other = table.iloc[2:3].assign(activation="relu", axis="relu")
    assert ablation_sentence(pd.concat([table, other])) == (
        "The main setting finds objects with a mean AP of 0.32 (2 seeds: 0.30 to 0.34). Above all of these: size x32 (0.50). Below: layer 3 (0.10)."
    )


def test_pointing():
    rows = [("object", "distinctive", 0.8), ("object", "strongest", 0.7), ("object", "random", 0.2)]
    answers = pd.DataFrame(
        [(*row, row[2] - 0.1, row[2] + 0.1, 0.004) for row in rows], columns=["kind", "answer", "hits", "low", "high", "chance"]
    )
    found = "the same object in 80% [70, 90] (the strongest: 70% [60, 80]; any active latent: 20% [10, 30]; any patch: 0.4%)"
    assert pointing_sentence(answers) == f"Followed to another image, the most distinctive latent of a patch finds {found}."
