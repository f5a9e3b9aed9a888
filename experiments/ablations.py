"""Why this recipe? A grid of SAEs, each of which differs from the profile's own in one thing, and the variants over a range of sparsities.

The counterpart of Table 2 of Lim et al. (ICLR 2025), with dead latents, seeds, and how well latents find concepts. ``make ablations``
(an hour or two on two CPU cores; it goes on where it was stopped) writes ``experiments/results/ablations.csv``, one row an SAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchsae_utils import stages
from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.concepts.comparison import compare, sae_competitor
from patchsae_utils.concepts.detection import ConceptPatches, concept_patches
from patchsae_utils.config import Profile, load_profile, paper_recipe
from patchsae_utils.interventions import one_latent_off, summarize_effects
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae.files import load_sae
from patchsae_utils.sae.quality import evaluate_sae
from patchsae_utils.sae.trainer import train_sae, training_log
from patchsae_utils.tables import QUANTILES, STATISTICS

from . import grid
from .matching import matched_cosine

N_TEST, N_STATISTICS = 720, 1080
KS = {"topk": (2, 4, 8, 16, 32, 64), "batchtopk": (8, 16, 32), "matryoshka": (8, 32)}
L0S = {"relu": (10, 20, 40), "jumprelu": (10, 40), "gated": (10, 40)}  # active latents per token that those without a k are trained for
ONE_OFF = ("seed", "layer", "expansion", "paper", "start", "topk")  # axes of which it is measured what turning one latent off changes
_ENDS = {"": "value", "_low": "low", "_high": "high"}


class Cell(NamedTuple):
    """One SAE of the grid: what is varied, its value as a figure shows it, and the changes to the profile, by dotted name."""

    axis: str
    value: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.axis}-{self.value}".replace(" ", "_").replace("/", "-")


def cells(profile: Profile, n_layers: int, width: int) -> list[Cell]:
    """One thing varied at a time around the profile's recipe, the variants by that recipe at many sparsities, and the paper's recipe."""
    main_layer, paper = profile.model.layer % n_layers, paper_recipe(width)
    weight = paper["training.l1_coefficient"]
    found = [("seed", str(seed), {"training.seed": seed}) for seed in (0, 1, 2)]
    found += [("layer", str(layer), {"model.layer": layer}) for layer in range(n_layers) if layer != main_layer]
    found += [("expansion", f"x{n}", {"sae.expansion_factor": n}) for n in (8, 32, 64) if n != profile.sae.expansion_factor]
    found += [("paper", f"lambda x{factor:g}", paper | {"training.l1_coefficient": factor * weight}) for factor in (1, 4)]
    found += [
        ("start", "tokens", {"training.start": "data"}),
        ("start", "random weights", {"training.start": "random"}),
        ("dead", "AuxK", {"training.restart_dead": False, "training.ghost": True}),
        ("dead", "no help", {"training.restart_dead": False}),
        ("units", "as they are", {"training.normalize": "none"}),
        ("units", "one scale for all", {"training.normalize": "mean_and_norm"}),
        ("rate", "1.5e-3", {"training.lr": 1.5e-3}),
        ("tokens", "cls", {"training.tokens": "cls"}),
        ("tokens", "patches", {"training.tokens": "patches"}),
        ("constraint", "archetypal", {"training.constraint": "archetypal", "training.restart_dead": False}),
    ]
    for activation, ks in KS.items():
        found += [(activation, f"k {k}", {"sae.activation": activation, "sae.k": k}) for k in ks if k != profile.sae.k]
    for activation, l0s in L0S.items():
        own = {"sae.activation": activation, "sae.k": None}
        found += [(activation, f"L0 {l0}", own | {"training.target_l0": float(l0)}) for l0 in l0s]
    return [Cell(axis, value, tuple(settings.items())) for axis, value, settings in found]


class Ablations:
    """Trains and measures cells, and keeps what several cells share: the model, and the patches of one layer."""

    def __init__(self, profile: Profile, clip: ClipModel, progress: bool = True):
        self.profile, self.clip, self.progress = profile, clip, progress
        self.folder = profile.folder("ablations")
        self.cells = cells(profile, clip.n_layers, clip.width)
        data = profile.data
        self.test = stages.open_data(profile, data.evaluation, "test", min(N_TEST, data.n_evaluation_images or N_TEST))
        self.labelled = stages.open_data(profile, data.statistics, "train", min(N_STATISTICS, data.n_statistics_images or N_STATISTICS))
        self._patches: tuple[int, list[ConceptPatches] | None] = (-1, None)

    def _profile(self, settings: Mapping[str, Any]) -> tuple[Profile, int]:
        """The profile with settings changed, and its layer."""
        profile = self.profile
        for name, value in settings.items():
            section, _, setting = name.partition(".")
            profile = dataclasses.replace(profile, **{section: dataclasses.replace(getattr(profile, section), **{setting: value})})
        return profile, self.clip.layer_index(profile.model.layer)

    def inputs(self, cell: Cell) -> dict[str, Any]:
        profile, layer = self._profile(dict(cell.settings))
        return {
            "what": "ablations", "format": 7, "clip": self.clip.fingerprint, "data": profile.data.choice(), "sae": profile.sae,
            "training": profile.training, "layer": layer,
        }  # fmt: skip

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        profile, layer = self._profile(dict(cell.settings))
        sae = self._train(cell)
        row = {
            "axis": cell.axis, "value": cell.value, "layer": layer, "expansion": profile.sae.expansion_factor, "activation": profile.sae.activation,
            "k": profile.sae.k, "l1_coefficient": profile.training.l1_coefficient, "tokens": profile.training.tokens,
            "seed": profile.training.seed, "n_training_tokens": profile.training.n_tokens, **self._quality(sae, layer), **self._concepts(sae, layer),
            **self._statistics(sae, layer, profile.training.tokens, cell.axis in ONE_OFF),
        }  # fmt: skip
        if cell.axis == "seed" and cell.value != "0":
            found = matched_cosine(load_sae(self.folder / "seed-0", sae.W_enc.device), sae)
            row |= {f"matched_cosine{end}": getattr(found.mean, column) for end, column in _ENDS.items()}
            row["matched_cosine_random"] = found.random_mean
        return row | {"dead_in_training": float(training_log(folder)["dead_fraction"].iloc[-1])}

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        return {"ablations": pd.DataFrame(list(measured.values()))}

    def _train(self, cell: Cell):
        """The SAE of a cell; those of its axis that read the same layer are trained at once, on the same batches where their seed is the same."""
        profile, layer = self._profile(dict(cell.settings))
        if layer == self.clip.layer_index(self.profile.model.layer):
            store = stages.training_store(self.profile, self.clip)
        else:
            store = extract_activations(self.clip, stages.training_data(profile), layer, self.folder / "activations" / f"layer-{layer}")
        found = [(each, *self._profile(dict(each.settings))) for each in self.cells if each.axis == cell.axis]
        names, profiles = zip(*((each.name, other) for each, other, its_layer in found if its_layer == layer), strict=True)
        fresh = [stages.fresh_sae(each, self.clip) for each in profiles]
        folders = [self.folder / name for name in names]
        return train_sae(fresh, store, [each.training for each in profiles], folders, progress=self.progress)[names.index(cell.name)]

    def _quality(self, sae, layer: int) -> dict[str, float]:
        table = evaluate_sae(self.clip, sae, self.test, layer, progress=False)
        found = table[table["variant"] == "reconstruction"].set_index(["tokens", "metric"])
        keys = {f"{metric}_{tokens}": (tokens, metric) for tokens in ("all", "cls", "patch") for metric in ("explained_variance", "l0")}
        keys |= {metric: ("all", metric) for metric in ("mse", "l1", "dead_fraction", "contrastive_loss", "zero_shot_change")}
        row = {f"{name}{end}": float(found.loc[key, column]) for name, key in keys.items() for end, column in _ENDS.items()}
        return {name: value for name, value in row.items() if name not in ("dead_fraction_low", "dead_fraction_high")}

    def _statistics(self, sae, layer: int, tokens: str, one_off: bool) -> dict[str, float]:
        """Quantiles over alive latents of the paper's scatter, and, if wanted, what turning one off changes; of the tokens it was trained on."""
        summary = summarize_latents(self.clip, sae, self.labelled, layer, tokens=tokens, progress=False)
        alive = ~summary.dead
        if not alive.any():
            return {}
        row = {}
        if one_off and tokens == "all" and self.clip.has_text and list(summary.class_names) == list(self.test.class_names):
            found = summarize_effects(one_latent_off(self.clip, sae, self.test, summary, layer), ["change", "flip"]).set_index("kind")
            row = {f"one_latent_{name}{end}": float(found.loc["own", f"{name}{end}"]) for name in ("change", "flip") for end in _ENDS}
        values = (summary.frequency[alive].log10(), summary.mean_activation[alive].log10(), summary.label_entropy[alive])
        found = {name: np.percentile(each.double().cpu().numpy(), QUANTILES) for name, each in zip(STATISTICS, values, strict=True)}
        return row | {f"{name}_q{q}": float(value) for name, each in found.items() for q, value in zip(QUANTILES, each, strict=True)}

    def _concepts(self, sae, layer: int) -> dict[str, float]:
        if self._patches[0] != layer:
            scenes = [stages.concept_scenes(self.profile, split) for split in ("val", "test")]
            patches = None if None in scenes else [concept_patches(self.clip, each, layer, progress=False) for each in scenes]
            self._patches = (layer, patches)
        if self._patches[1] is None:
            return {}
        found = compare([sae_competitor(sae)], *self._patches[1], min_patches=1)
        table = found.table().set_index("kind").drop(index="all")
        ends = {"ap": "ap", "ap_low": "low", "ap_high": "high"}
        return {f"{kind}_{name}": float(values[column]) for kind, values in table.iterrows() for name, column in ends.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train and measure the grid of a profile."""
    parser = grid.parser("ablations", __doc__)
    parser.add_argument("--axis", action="append", help="measure only cells of this axis; may be given several times")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    every = cells(profile, clip.n_layers, clip.width)
    axes = list(dict.fromkeys(cell.axis for cell in every))
    if unknown := set(options.axis or ()) - set(axes):
        parser.error(f"unknown axis {sorted(unknown)[0]!r}; valid: {', '.join(axes)}")
    chosen = [cell for cell in every if not options.axis or cell.axis in options.axis]
    for number, (_, row, _) in enumerate(grid.run(Ablations(profile, clip), chosen, options.out), 1):
        print(
            f"[{number}/{len(chosen)}] {row['axis']} {row['value']}: EV {row['explained_variance_all']:.3f}, L0 {row['l0_all']:.1f}, "
            f"dead {row['dead_fraction']:.1%}, object AP {row.get('object_ap', float('nan')):.3f} ({row['seconds']:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
