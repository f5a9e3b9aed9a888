"""Every figure draws from a small made-up table of the right columns, is saved, and can be read at 900 pixels' width."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from patchsae_utils import plots
from patchsae_utils.adaptation.compare import COMPARISONS
from patchsae_utils.plots.drawing import interval_panels
from patchsae_utils.tables import frontier

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
WORDS = [
    "bell", "camcorder", "bathroom scale", "guitar", "crossed swords", "fire extinguisher", "harp", "magnet", "film projector", "lawn mower",
]  # fmt: skip


def grid(value: str, width: float = 0.06, top: float = 1.0, **columns) -> pd.DataFrame:
    """A row for each combination, with a value and its interval."""
    table = pd.DataFrame(product(*columns.values()), columns=list(columns))
    middle = RNG.uniform(0.1, 0.85, len(table)) * top
    return table.assign(**{value: middle, "low": middle - width * top, "high": middle + width * top, "n": 100})


def effects(names: list[str], **columns) -> pd.DataFrame:
    """A table of ``summarize_effects``."""
    table = pd.DataFrame(product(*columns.values()), columns=list(columns)).assign(n=80)
    for name in names:
        middle = RNG.normal(-1, 2, len(table))
        table = table.assign(**{name: middle, f"{name}_low": middle - 0.3, f"{name}_high": middle + 0.3})
    return table


def sweep(groups=("all",), choose=("oracle", "predicted", "matched", "random"), ranks=("count",), errors=("kept",)) -> pd.DataFrame:
    masked = grid("accuracy", choose=choose, rank=ranks, mode=["on", "off"], k=[1, 5, 20, 100], where=["all"], error=errors, group=groups)
    masked.loc[masked["choose"] == "random", "rank"] = "none"
    masked = masked.drop_duplicates(["choose", "rank", "mode", "k", "error", "group"])
    modes = ["raw", "reconstructed", "error_kept"]
    unmasked = grid("accuracy", choose=["none"], rank=["none"], mode=modes, k=[0], where=["all"], error=["kept"], group=groups)
    return pd.concat([unmasked, masked], ignore_index=True)


def pictures(n: int) -> torch.Tensor:
    return torch.from_numpy(np.kron(RNG.integers(60, 255, (n, 14, 14, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8))


def masks(n: int) -> torch.Tensor:
    return torch.from_numpy(RNG.exponential(1.0, (n, 14, 14))).float() * (torch.rand(n, 14, 14) > 0.6)


def references(n: int, latent: int = 0) -> SimpleNamespace:
    return SimpleNamespace(latent=latent, images=pictures(n), masks=masks(n))


def steered() -> SimpleNamespace:
    moved = pd.DataFrame({"class": WORDS[:5], "before": [0.9, 0.02, 0, 0, 0], "after": [0.0, 0.1, 0.05, 0.2, 0.5]})
    return SimpleNamespace(activations=torch.randn(1, 197, 3), activations_before=torch.zeros(1, 197, 3), moved=lambda names, n: moved)


def comparison() -> pd.DataFrame:
    roles = {"SAE": "sae", "PCA": "baseline", "k-means, cosine": "baseline", "single dimensions": "baseline", "linear probe": "ceiling"}
    kinds = ["object", "category", "color", "background", "outline", "all"]
    table = grid("ap", kind=kinds, dictionary=list(roles)).assign(n_concepts=34, chance=0.03)
    return table.assign(role=table["dictionary"].map(roles))


def made(n: int, **columns) -> pd.DataFrame:
    """Rows at random: one of a list, or a number between two ends."""
    return pd.DataFrame({name: RNG.choice(each, n) if isinstance(each, list) else RNG.uniform(*each, n) for name, each in columns.items()})


def changed_concepts() -> SimpleNamespace:
    numbers = effects(["change", "control"], kind=["appeared", "vanished", "new"], class_name=WORDS[:2], model=["CLIP", "adapted"])
    shots = {model: (pictures(n).numpy(), masks(n).numpy()) for model, n in (("CLIP", 3), ("adapted", 2))}
    return SimpleNamespace(table=numbers.assign(latent=1234, name="mostly bathroom scale"), pictures=[shots] * 6)


def planted() -> pd.DataFrame:
    table = grid("recall", control=["nonce names", "nothing changed", "a sign, 2%"], method=["combined", "scaling", "random"])
    table = table.rename(columns={"low": "recall_low", "high": "recall_high"})
    for name in ("precision", "new_share"):
        table = table.assign(**{name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6})
    return table


TASKS = ["instruments", "tools", "animals (gray)", "vehicles (line)"]
KINDS = ["object", "category", "color", "background"]
ABLATIONS = pd.read_csv(ROOT / "experiments" / "results" / "ablations.csv")
QUANTILES = {f"{name}_q{q}": q / 50 for name in ("log_frequency", "log_mean_activation", "label_entropy") for q in (10, 25, 50, 75, 90)}


def figures(world) -> dict:
    """Name of a figure -> its arguments."""
    log = pd.DataFrame({"tokens": np.arange(1, 60) * 4e4, "loss": 0.06, "mse": 0.02, "l1": 0.04, "ghost": 0.01, "l0": 33.0})
    log = log.assign(explained_variance=np.linspace(0.3, 0.92, 59), dead_fraction=0.02)
    quality = pd.concat([
        grid("value", 0.02, sae=["PatchSAE", "random directions"], metric=["explained_variance", "zero_shot_top1"], variant=["reconstruction"], tokens=["cls", "patch", "all"]),
        grid("value", 0.02, sae=["PatchSAE"], metric=["zero_shot_top1"], variant=["raw", "error_kept"], tokens=["all"]),
    ])  # fmt: skip
    seen = dict(image=pictures(1)[0], truth=masks(1)[0] > 0, activation=masks(1)[0])
    examples = [SimpleNamespace(concept=f"object:{word}", latent=7, ap=0.5, **seen) for word in WORDS[:3]]
    rows = [(level, 10 * i + j % 3, 9 - j) for i, level in enumerate(["patch", "image", "class", "data set"]) for j in range(8)]
    table = pd.DataFrame(rows, columns=["level", "latent", "value"])
    shown = dict(zip(table["latent"], masks(32), strict=True))
    levels = SimpleNamespace(table=table, patch=(2, 9), class_name="bat", image=pictures(1)[0], masks=shown)
    elsewhere = grid("frequency", latent=[3, 5], domain=["color", "line", "gray"]).assign(same_class=0.4)
    found = {i: {d: references(3 * (d != "line")) for d in ("color", "line", "gray")} for i in (3, 5)}
    domains = SimpleNamespace(table=elsewhere, references=found)
    words = SimpleNamespace(table=elsewhere, share=0.017, shuffled=RNG.normal(0.012, 0.002, 300), p=0.05, alpha=0.05)
    agreed = [
        ["labels", "text", 1820, 285, 175, 0.07, 0.0, 0.09, 0.01], ["labels", "ground truth", 1820, 1489, 0, np.nan, 0.0, np.nan, 0.01],
        ["text", "ground truth", 285, 1489, 155, 0.57, 0.02, 0.65, 0.03],
    ]  # fmt: skip
    named = pd.DataFrame(agreed, columns=["a", "b", "n_a", "n_b", "n_both", "agreement", "chance", "related", "related_chance"])
    scores = made(600, dictionary=["SAE", "random directions", "single dimensions"], score=(0.1, 0.8), n_images=[*range(1, 3000)])
    concepts = made(200, kind=KINDS, ap=(0, 1), iou=(0, 1), pointing=(0, 1), pointing_chance=(0, 1))
    states = {"removed_before": 0.5, "stays_before": 0.2, "removed_after": 0.1, "stays_after": 0.6}
    removal = [{"index": i, "kind": "own", "removed": i + which, **states} for i in world.pairs for which in (0, 1)]
    logs = made(400, frequency=(-3.5, 0), mean_activation=(-2, 0))
    latents = (10**logs).assign(latent=range(400), label_entropy=RNG.uniform(0, 2.3, 400))
    groups = ["high", "high-to-low", "low-to-high"]
    links = made(40, base=(0, 0.3), adapted=(0, 0.3), link=["stayed", "vanished", "appeared"])
    links = links.assign(**{"class": np.repeat(range(10), 4), "class_name": np.repeat(WORDS, 4)}, latent=range(40))
    scatter = made(300, task=TASKS, base=(0, 60), adapted=(0, 60), group=groups).assign(**{"class": RNG.integers(0, 9, 300)})
    masked = pd.concat([sweep(WORDS, ("oracle",)).assign(model=model) for model in ("CLIP", "CLIP, adapted head", "adapted")])
    masked = masked.assign(**{"class": masked["group"].map(WORDS.index)})
    layers = pd.DataFrame({"layer": range(6), "main": [i == 4 for i in range(6)], **QUANTILES})
    layers = layers.assign(object_ap=0.3, object_ap_low=0.2, object_ap_high=0.4)
    parts = ["text head", "later blocks", "existing latents", "outside the dictionary", "both"]
    experiments = ["CLIP", "existing latents' part only", "outside part only", "text head", "adapted, without the outside part", "adapted"]
    series = dict(task=TASKS, model=["CLIP", "MaPLe"], form=["raw", "reconstructed", "error kept"])
    measures = ["high", "high-to-low", "low-to-high", "jaccard", "rbo"]
    swap = effects(["sees_target", "object_change"], kind=["own", "control"], dose=[0.5, 1, 2, 3])
    doses = effects(["own"], scenes=["show it", "show another"], **{"class": range(6)}, dose=[0, 1, 2, 4]).assign(others=0.1)
    overall = effects(["own", "others"], kind=["own", "control"], concept_kind=KINDS)
    by_concept = effects(["own", "others"], kind=["own", "control"], concept_kind=KINDS, concept=range(12))
    by_concept["concept"] = by_concept["concept_kind"] + by_concept["concept"].astype(str)
    return {
        "method": ("training",),
        "embedded_world": ([(world, i) for i in range(5)],),
        "zero_shot_accuracy": (
            grid("accuracy", domain=["color", "line"], tier=["common", "rare"]).assign(chance=0.01),
            grid("accuracy", task=["openmoji/birds_sea", "tools", "meals"], domain=["color", "line"]).assign(chance=0.05),
        ),
        "residual_norms": (grid("median", top=60, layer=range(6), token=["CLS", "patch"]), torch.rand(6, 40, 197) * 20 + 30, 4, (14, 14)),
        "residual_pca": (pictures(3).numpy(), torch.rand(6, 3, 14, 14, 3), torch.rand(6, 3) / 5),
        "patch_probe": (grid("accuracy", layer=range(6), token=["CLS", "patch"]).assign(control=0.02), 360, 4),
        "training_curves": (log,),
        "reconstruction_quality": (quality,),
        "firing_rates": ({"PatchSAE": 10 ** torch.randn(500).clamp(-3, 1) / 100, "random directions": torch.rand(500) / 50 * (torch.rand(500) > 0.1)}, 100_000),
        "patch_maps": ([Image.fromarray(each.numpy()) for each in pictures(6)], masks(6), masks(6)),
        "ablation_effects": (ABLATIONS,),
        "reconstruction_frontier": (frontier(ABLATIONS),),
        "step_costs": (json.loads((ROOT / "benchmarks" / "results" / "sae_step.json").read_text()),),
        "latent_statistics": (latents, {5: "one class", 70: "everywhere"}),
        "monosemanticity": (scores, 0.15),
        "concept_families": (comparison(),),
        "coverage_curves": (grid("share", dictionary=["SAE", "PCA"], role=["sae"], threshold=np.linspace(0, 1, 11)).assign(n_concepts=9),),
        "concept_masks": (examples,),
        "localization": (concepts,),
        "reference_images": ([references(5), references(0), references(3)], ["best object: 3 crossed swords", "dead", "random: 7 unnamed"]),
        "name_agreement": (named,),
        "levels": (levels, {10: "crossed swords"}),
        "cross_domain": (domains,),
        "text_and_image": (words,),
        "by_axis": (layers,),
        "twins": (pd.read_csv(ROOT / "experiments" / "results" / "twin.csv"),),
        "mask_curves": (sweep(errors=("dropped", "kept")),),
        "mask_tasks": (sweep(["all", "animals", "birds sea", "clothing", "home", "instruments", "meals", "tools"], ("oracle", "predicted", "wrong", "matched", "random")),),
        "steered": (pictures(2).numpy(), [steered(), steered()], WORDS, ["hedgehog's latents off", "and computer mouse's added"]),
        "concept_specificity": (by_concept, overall),
        "dose_response": (doses, WORDS),
        "color_swap": ({"patches": swap, "patches and CLS": swap},),
        "object_removal": (pd.DataFrame(removal), effects(["removed_change", "stays_change"], kind=["own", "control"]), world, world.pairs),
        "adaptation_accuracy": (grid("accuracy", **series, half=["base", "novel", "harmonic mean"]),),
        "class_scatter": (scatter,),
        "latent_groups": (grid("value", task=TASKS, comparison=COMPARISONS, measure=measures),),
        "prediction_heat": (masked,),
        "gain_parts": (grid("gain", task=TASKS, adapter=["MaPLe", "fine-tuning"], part=parts),),
        "gain_experiments": (grid("value", task=TASKS, experiment=experiments),),
        "class_links": (links,),
        "remapped_concepts": (changed_concepts(),),
        "planted_controls": (planted(),),
        "adapter_table": (pd.read_csv(ROOT / "experiments" / "results" / "adaptation.csv").query("kind != 'maple, shuffled labels'"),),
        "pointing": (grid("hits", kind=KINDS, answer=["distinctive", "strongest", "random"]).assign(chance=0.05),),
    }  # fmt: skip


OPTIONS = {"residual_pca": {"credit": True}, "steered": {"grid": (14, 14)}}


@pytest.fixture(scope="module")
def inputs():
    from patchsae_utils.data import load_dataset

    world = load_dataset("openmoji/scenes", "test", n_images=60)
    pairs = [i for i in range(60) if len(world.truth(i).class_ids) > 1][:3]
    world.pairs = pairs
    return figures(world)


def test_every_figure_is_drawn_here(inputs):
    assert set(inputs) == set(plots.__all__) - {"figure", "save"}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path / "notebooks")
    yield tmp_path
    plt.close("all")


def test_a_figure_is_saved_with_its_credit_and_the_committed_ones_stay(repository, monkeypatch):
    fig, _ = plots.figure(height=1)
    assert plots.save(fig, None) is fig and not (repository / "runs").exists() and not fig.texts
    plots.save(fig, "00_test", credit=True)
    assert [p.name for p in (repository / "runs/openmoji/figures").iterdir()] == ["00_test.png"]
    assert any("OpenMoji, CC BY-SA 4.0" in text.get_text() for text in fig.texts)
    monkeypatch.setenv("PATCHSAE_SET", "name=quick")
    plots.save(fig, "00_test")
    assert (repository / "runs/quick/figures/00_test.png").exists() and not (repository / "figures").exists()


def check_readable(fig) -> None:
    """No letters under 6.5 points, no legend over axes' labels, no tick label over its neighbour."""
    fig.canvas.draw()
    for text in fig.findobj(plt.Text):
        assert not text.get_text() or not text.get_visible() or text.get_fontsize() >= 6.5, text
    for axis in [axis for ax in fig.findobj(plt.Axes) if ax.get_visible() and ax.axison for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        shown = [label for label, at in zip(axis.get_ticklabels(), axis.get_majorticklocs(), strict=False) if low <= at <= high]
        boxes = [label.get_window_extent().shrunk(0.9, 0.8) for label in shown if label.get_visible() and label.get_text().strip()]
        assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False)), [label.get_text() for label in shown]
    for legend in fig.legends:
        for ax in fig.axes:
            assert not ax.get_visible() or not legend.get_window_extent().overlaps(ax.get_window_extent()), legend


@pytest.mark.parametrize("name", sorted(set(plots.__all__) - {"figure", "save"}))
def test_a_figure_is_drawn_saved_and_readable(name, inputs, repository):
    fig = getattr(plots, name)(*inputs[name], **OPTIONS.get(name, {}), save=f"00_{name}")
    assert Image.open(repository / f"runs/openmoji/figures/00_{name}.png").width > 700
    check_readable(fig)


def test_figures_of_500_classes_are_readable_and_fit_a_page():
    names = [f"{color} {thing}" for color in ("deep crimson", "pale yellow", "green", "blue", "white") for thing in range(100)]
    rows = made(4000, base=(0, 0.3), adapted=(0, 0.3), link=["stayed", "vanished", "appeared"], latent=[*range(9000)])
    links = rows.assign(**{"class": np.repeat(range(500), 8), "class_name": np.repeat(names, 8)})
    masked = pd.concat([sweep(names, ("oracle",)).assign(model=model) for model in ("CLIP", "CLIP, adapted head", "adapted")])
    masked = masked.assign(**{"class": masked["group"].map(names.index)})
    latents = made(5000, base=(0, 60), adapted=(0, 60), group=["high", "high-to-low", "low-to-high"]).assign(task="a folder")
    latents = latents.assign(**{"class": np.repeat(range(500), 10)})
    for fig in (plots.class_links(links), plots.prediction_heat(masked), plots.class_scatter(latents)):
        check_readable(fig)
        assert fig.get_figheight() < 15
    plt.close("all")


def test_one_stage_of_the_method_stands_out():
    colored = [{text.get_color() for text in plots.method(stage).axes[0].texts[:5]} for stage in (None, "explorer", "concepts")]
    assert [len(colors) for colors in colored] == [1, 1, 2]
    with pytest.raises(ValueError, match="Unknown stage 'labels'. Valid: extraction, "):
        plots.method("labels")
    plt.close("all")


def test_of_several_rankings_the_first_is_drawn_and_random_latents_have_none():
    for ax in plots.mask_curves(sweep(ranks=("attribution", "count"))).axes:
        assert {"random", "predicted class's", "no mask, raw"} <= set(ax.get_legend_handles_labels()[1])
        assert [len(line.get_xdata()) for line in ax.lines[1:]] == [4] * 4
    plt.close("all")


def test_what_one_panel_lacks_takes_no_color_from_the_others():
    table = grid("value", place=["here", "there"], kind=["a", "b", "c"])
    table = table[(table["place"] == "here") | (table["kind"] != "b")]
    _, axes = interval_panels(table.assign(at="x"), "place", "at", "value", "kind", height=2)
    colors = [{line.get_label(): line[0].get_color() for line in ax.containers} for ax in axes]
    assert len(set(colors[0].values())) == 3 and colors[1].items() < colors[0].items()
