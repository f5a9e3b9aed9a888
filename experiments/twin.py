"""Which findings about patches are due to the heads that taught the embedded CLIP's patches? The same measures of it and of its twin.

The twin has the same shape and learned from the same scenes and captions, with no term on patches:
``python -m experiments.train_openmoji_clip --patch-weight 0 --color-weight 0 --out runs/openmoji_twin/clip``. Then ``python -m
experiments.twin`` trains an SAE on either by the profile's recipe, and writes ``experiments/results/twin.csv``: a row a model and measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from patchsae_utils import stages
from patchsae_utils.activations.layers import probe_layers, survey_residuals
from patchsae_utils.clip.loading import EMBEDDED
from patchsae_utils.clip.zero_shot import accuracy_table, zero_shot_predictions
from patchsae_utils.concepts.comparison import compare, kmeans_competitor, plain_competitor, sae_competitor
from patchsae_utils.concepts.probes import fit_probes
from patchsae_utils.config import Profile, load_profile
from patchsae_utils.run.artifacts import read_json
from patchsae_utils.sae.dictionary import random_sae
from patchsae_utils.sae.quality import evaluate_sae

from . import grid

N_PROBED = 1080, 360  # pictures whose tokens train and test the probes of single tokens: as in notebook 01
N_QUALITY = 720
_ENDS = ["value", "low", "high"]


class Cell(NamedTuple):
    """One of the two models."""

    name: str
    profile: Profile


class Twins:
    """Measures both models in the same ways."""

    def __init__(self, profile: Profile):
        self.profile, self.folder = profile, profile.folder("twin")

    def inputs(self, cell: Cell) -> dict[str, Any]:
        clip, layer = stages.load_world(cell.profile)
        same = {"data": cell.profile.data.choice(), "sae": cell.profile.sae, "training": cell.profile.training, "layer": layer}
        return {"what": "twin", "format": 2, "clip": clip.fingerprint} | same

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        profile = cell.profile
        clip, layer = stages.load_world(profile)
        evaluation, training = stages.evaluation_data(profile), stages.training_data(profile)
        store, sae, patches = stages.training_store(profile, clip), stages.trained_sae(profile, clip), stages.concept_patches(profile, clip)
        zero_shot = accuracy_table(zero_shot_predictions(clip, evaluation, progress=False)).rename(columns={"accuracy": "value"})
        probed = zip((profile.data.statistics, profile.data.evaluation), ("train", "test"), N_PROBED, strict=True)
        surveys = [survey_residuals(clip, stages.open_data(profile, *each), progress=False) for each in probed]
        probes = probe_layers(*surveys, len(evaluation.class_names)).query("layer == @layer").rename(columns={"accuracy": "value"})
        tested = stages.open_data(profile, profile.data.evaluation, "test", N_QUALITY)
        quality = evaluate_sae(clip, sae, tested, layer, progress=False).query("variant == 'reconstruction' and tokens == 'all'")
        quality = quality[quality["metric"].isin(["l0", "explained_variance", "zero_shot_change", "dead_fraction"])]
        x = next(store.tokens(400_000, seed=1)).float()
        ceiling = plain_competitor(fit_probes(store, training, patches[0], profile.folder("latents") / "probes", clip), "ceiling")
        by_chance = sae_competitor(random_sae(sae, x), "random SAE", "baseline")
        compared = compare([sae_competitor(sae), by_chance, kmeans_competitor(x, sae.d_sae), ceiling], *patches).table()
        ap = compared.assign(of=compared["dictionary"] + ", " + compared["kind"]).rename(columns={"ap": "value"})
        parts = {
            "zero-shot": zero_shot.assign(of="classes"), "token probe": probes.rename(columns={"token": "of"}),
            "token probe, permuted labels": probes.assign(value=probes["control"], low=None, high=None).rename(columns={"token": "of"}),
            "SAE": quality.rename(columns={"metric": "of"}), "AP": ap,
        }  # fmt: skip
        rows = [table.assign(measure=name)[["measure", "of", *_ENDS]] for name, table in parts.items()]
        return {"rows": pd.concat(rows).astype({"value": float, "low": float, "high": float}).to_dict("records")}

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        rows = [{"clip": cell.name, **row, "commit": found["commit"]} for cell, found in measured.items() for row in found["rows"]]
        return {"twin": pd.DataFrame(rows)}


def main(arguments: list[str] | None = None) -> None:
    """Measure both."""
    parser = grid.parser("twin", __doc__)
    parser.add_argument("--twin", type=Path, help="folder of the twin's weights (default: runs/<profile>_twin/clip)")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    name = f"{profile.name}_twin"
    weights = options.twin or profile.root.parent / name / "clip"
    if read_json(weights / "open_clip_config.json") != read_json(EMBEDDED / "open_clip_config.json"):
        parser.error(f"{weights} holds a model of another shape than the embedded one.")
    twin = load_profile(options.profile, {"name": name, "model.name": str(weights)})
    for cell, row, _ in grid.run(Twins(profile), [Cell("patches taught", profile), Cell("captions alone", twin)], options.out):
        print(cell.name, f"({row['seconds']:.0f} s)")
        print(pd.DataFrame(row["rows"]).to_string(), flush=True)


if __name__ == "__main__":
    main()
