"""Figures of notebook 05: CLIP against adapted CLIP by accuracy, classes and latents, and what a gain is made of."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from ..adaptation.fit import NAMES
from .drawing import clip, colorbar, errors, heat, interval_panels, legend, look, measures, panels, plain_log, pretty
from .heat import blend
from .style import COLORS, drawn, figure, image_axes

_GROUPS = {"high": COLORS["gray"], "high-to-low": COLORS["orange"], "low-to-high": COLORS["blue"]}
_LINKS = {"stayed": COLORS["gray"], "vanished": COLORS["orange"], "appeared": COLORS["blue"]}
_COMPARISONS = {
    "CLIP and adapted": look("blue", "o", "CLIP and adapted, same pictures"), "CLIP and adapted, other pictures": look("sky", "o"),
    "CLIP twice, other pictures": look("gray", "s"), "CLIP and adapted, other class": look("orange", "^"),
    "CLIP and adapted, random latents": look("purple", "D"),
}  # fmt: skip
_MEASURES = {"high": "high in both", "high-to-low": "high to low", "low-to-high": "low to high", "jaccard": "Jaccard", "rbo": "rank-biased"}
_FORMS = {"raw": {"marker": "o"}, "reconstructed": {"marker": "s", "markerfacecolor": "white"}, "error kept": {"marker": "x"}}
_PARTS = {
    "text head": "text head\n(remapping)", "later blocks": "later blocks\n(remapping)", "existing latents": "existing latents\n(retuning)",
    "outside the dictionary": "outside dictionary\n(new concepts)", "both": "whole gain",
}  # fmt: skip
_KINDS = {
    "maple": ("blue", "s"), "coop": ("orange", "^"), "vpt": ("green", "D"), "lora": ("purple", "v"), "finetune": ("red", "P"),
    "linear": ("black", "x"),
}  # fmt: skip
_CHANGES = {"appeared": ("blue", "link appeared"), "vanished": ("orange", "link vanished"), "new": ("green", "new latent")}
_READERS = {"CLIP": "CLIP", "CLIP, adapted head": "CLIP's tower, adapted head", "adapted": "adapted tower and head"}
_MODES = {"on": "only k latents kept", "off": "k latents removed"}
_LINKED = 24  # classes whose latents' numbers still have room beside each other
_SEVERAL = "DataFrame of ``%s``, of several tasks (column ``task``) under each other"


@drawn(table=_SEVERAL % "base_to_novel")
def adaptation_accuracy(table: pd.DataFrame) -> Figure:
    """Accuracy on base and novel classes and their harmonic mean, one panel a task; bars are 95% intervals."""
    table = table.assign(series=table["model"] + ", " + table["form"], half=table["half"].str.replace(" ", "\n"))
    colors = zip(table["model"].unique(), ("gray", "blue", "green", "purple"), strict=False)
    looks = {f"{model}, {form}": look(color, **options) for model, color in colors for form, options in _FORMS.items()}
    words: dict[str, Any] = {"ylabel": "accuracy (%)", "scale": 100, "upright": True, "spread": 0.7}
    fig, axes = interval_panels(table, "task", "half", "accuracy", "series", looks, height=3.1, ncols=3, **words)
    axes[0].set_ylim(0, 103)
    return fig


@drawn(latents=_SEVERAL % "Remapping.latents" + "; the groups' threshold is one half")
def class_scatter(latents: pd.DataFrame) -> Figure:
    """Each class's top latents: on how many tokens per picture they are active in CLIP, and in the adapted model; one panel per task."""
    counts = latents[["base", "adapted"]].to_numpy()
    largest = float(counts.max()) * 1.6
    floor = max(float(counts[counts > 0].min()), largest / 4000)
    titles, line = [*map(pretty, latents["task"].unique())], np.array([floor / 2, largest])
    fig, axes = panels(titles, 3.2, xlabel="CLIP", ylabel="adapted: tokens per picture", sharex=True)
    for ax, (_, rows) in zip(axes, latents.groupby("task", sort=False), strict=True):
        ax.fill_between(line, 2 * line, largest, color=_GROUPS["low-to-high"], alpha=0.08, lw=0)
        ax.fill_between(line, floor / 2, line / 2, color=_GROUPS["high-to-low"], alpha=0.10, lw=0)
        ax.plot(line, line, color=COLORS["black"], lw=0.8, zorder=1)
        for group, color in _GROUPS.items():
            part = rows[rows["group"] == group]
            ax.scatter(part["base"].clip(floor), part["adapted"].clip(floor), s=11, color=color, alpha=0.7, lw=0, label=group)
        for group, (x, y, ha, va) in {"low-to-high": (0.04, 0.78, "left", "top"), "high-to-low": (0.78, 0.05, "right", "bottom")}.items():
            text, bold = f"{(rows['group'] == group).sum() / rows['class'].nunique():.1f} per class", {"fontsize": 9, "fontweight": "bold"}
            ax.text(x, y, text, transform=ax.transAxes, ha=ha, va=va, color=_GROUPS[group], **bold)
        ax.set(xscale="log", yscale="log", xlim=line, ylim=line, box_aspect=1)
        for axis in (ax.xaxis, ax.yaxis):  # over less than a decade matplotlib labels every minor tick, in powers of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 30 * floor else (1,)))
            plain_log(axis)
    legend(fig, axes, ncols=3, markerscale=2)
    return fig


@drawn(comparisons=_SEVERAL % "Remapping.comparisons")
def latent_groups(comparisons: pd.DataFrame) -> Figure:
    """Latents per class in each group, and the overlap of top latents, beside the controls; bars are 95% intervals over classes."""
    height, panel = 1.1 + 0.62 * comparisons["task"].nunique(), {"measure": _MEASURES}
    fig, axes = interval_panels(comparisons, panel, "task", "value", "comparison", _COMPARISONS, height=height, ncols=2)
    for ax, measure in zip(axes, _MEASURES, strict=True):
        overlap = measure in ("jaccard", "rbo")
        ax.set(xlabel="overlap" if overlap else "latents per class", xlim=(-0.02 * ax.get_xlim()[1], 1.04 if overlap else None))
    return fig


@drawn(table="DataFrame of ``masked_predictions`` of one data set")
def prediction_heat(table: pd.DataFrame) -> Figure:
    """Accuracy of each class from its top k latents: one column a model, one row a mode; under each k the mean over classes."""
    table = table[(table["choose"] == "oracle") & (table["class"] >= 0)]
    heats = {key: 100 * rows.pivot(index="group", columns="k", values="accuracy") for key, rows in table.groupby(["mode", "model"])}
    pairs, order = list(product(_MODES, _READERS)), heats["on", "adapted"].mean(axis=1).sort_values(ascending=False, kind="stable").index
    titles = [_READERS[model] if mode == "on" else "" for mode, model in pairs]
    fig, axes = panels(titles, 0.9 + np.clip(0.155 * len(order), 1.2, 6), 3, size=9.5)
    for ax, (mode, model) in zip(axes, pairs, strict=True):
        rows = heats[mode, model].loc[order].rename(pretty)  # best read from few latents first
        ticks = [f"{k}\n{mean:.0f}%" for k, mean in rows.mean().items()]
        heat(ax, rows, xticklabels=ticks, yticklabels=True if len(order) < 40 else "auto")
        ax.set(xlabel="", ylabel=_MODES[mode] if model == "CLIP" else "")
        ax.tick_params(labelsize=8)
        ax.tick_params("x", rotation=0)
    fig.supxlabel("latents k of the true class; below, the mean accuracy over classes", fontsize=10)
    colorbar(fig, axes, "accuracy (%)", shrink=0.6)
    return fig


@drawn(parts="DataFrame of ``GainSplit.parts()``, of several models (columns ``task``, ``adapter``) under each other")
def gain_parts(parts: pd.DataFrame) -> Figure:
    """The parts of each gain in points of accuracy, one panel a task, the adapters beside each other, with 95% intervals over pictures."""
    parts, reach = parts[parts["part"].isin([*_PARTS])], 100 * max(parts["high"].max(), 0.05)
    looks = {name: look(color) for name, color in zip(parts["adapter"].unique(), ("blue", "orange", "green", "gray"), strict=False)}
    return interval_panels(
        parts, "task", "part", "gain", "adapter", looks, height=3.6, xlim=(min(-2.0, 100 * parts["low"].min()), 1.2 * reach),
        xlabel="points over zero-shot CLIP", zero=True, bars=True, scale=100, text="{:+z.0f}", order=_PARTS,
    )[0]  # fmt: skip


@drawn(experiments=_SEVERAL % "GainSplit.experiments()")
def gain_experiments(experiments: pd.DataFrame) -> Figure:
    """Accuracy with some parts of the adapted model put into CLIP, or taken out of the adapted model; one panel a task."""
    experiments = experiments.assign(whole=experiments["experiment"].isin(["CLIP", "adapted"]))
    looks, order = {True: look("black"), False: look("blue")}, experiments["experiment"].unique()
    words: dict[str, Any] = {"height": 0.9 + 0.27 * len(order), "ncols": 0, "xlabel": "accuracy (%)", "order": order, "scale": 100}
    fig, axes = interval_panels(experiments, "task", "experiment", "value", "whole", looks, spread=0, **words)
    for ax, (_, rows) in zip(axes, experiments.groupby("task", sort=False), strict=True):
        ax.axvspan(*sorted(100 * rows["value"].iloc[[0, -1]]), color=COLORS["gray"], alpha=0.15, lw=0)
    return fig


@drawn(links="DataFrame of ``ClassLinks.links()`` of one data set")
def class_links(links: pd.DataFrame) -> Figure:
    """The remapping matrix: which latents (columns) each class rests on, and which of these links stayed, vanished or appeared.

    The three strongest of each class are shown, and these latents' other links. A disc's area is the share of the class's evidence,
    in the model that has more of it. Latents stand in the order of the classes that rest on them most. Of many classes, the 24 whose links
    changed most are shown.
    """
    links = links.assign(size=links[["base", "adapted"]].max(axis=1)).sort_values("size", ascending=False)
    change = links["size"].where(links["link"] != "stayed", 0).groupby(links["class"]).sum()
    links = links[links["class"].isin(change.nlargest(_LINKED).index)]
    shown = links[links["latent"].isin(links.groupby("class").head(3)["latent"])]
    owner = shown.drop_duplicates("latent").sort_values(["class", "size"], ascending=[True, False])
    column = {latent: i for i, latent in enumerate(owner["latent"])}
    classes = links.sort_values("class").drop_duplicates("class").set_index("class")["class_name"].map(pretty)
    fig, ax = figure(height=1.5 + 0.24 * len(classes))
    largest, disc, handles = float(shown["size"].max()), {"linestyle": "none", "marker": "o"}, []
    for name, color in _LINKS.items():
        part = shown[shown["link"] == name]
        spots = part["latent"].map(column), part["class"].map(classes.index.get_loc)
        ax.scatter(*spots, s=150 * part["size"] / largest, color=color, lw=0, zorder=3)
        handles.append(Line2D([], [], ms=7, color=color, label=f"{name} ({len(part)})", **disc))
    some = f"; the {_LINKED} of {len(change)} classes whose links changed most" if len(change) > _LINKED else ""
    ax.set(xlabel=f"latent of CLIP's dictionary{some}", xlim=(-0.8, len(column) - 0.2), ylim=(len(classes) - 0.4, -0.6))
    ax.set_yticks(range(len(classes)), classes)
    ax.set_xticks(range(len(column)), list(column), rotation=90, fontsize=7)
    for share in [share for share in (0.5, 0.2, 0.05) if share <= largest] or [largest]:
        size = np.sqrt(150 * share / largest)
        handles.append(Line2D([], [], ms=size, color="#CCCCCC", label=f"{share:.0%} of the class's evidence", **disc))
    fig.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8.5, handletextpad=0.3, columnspacing=1.2)
    return fig


@drawn(table="DataFrame of ``load_protocol``")
def adapter_table(table: pd.DataFrame) -> Figure:
    """Points of raw accuracy that every adapter gains on every task, one panel a half; bars are 95% intervals of its accuracy over pictures."""
    table = table[table["form"] == "raw"]
    zero = table[table["kind"] == "zero-shot"].set_index(["task", "half"])["accuracy"]
    before = zero.reindex(pd.MultiIndex.from_frame(table[["task", "half"]])).to_numpy()
    table = table.assign(**{name: 100 * (table[name] - before) for name in ("accuracy", "low", "high")})
    looks = {kind: look(color, marker, NAMES.get(kind, kind)) for kind, (color, marker) in _KINDS.items()}
    words: dict[str, Any] = {"xlabel": "points over zero-shot CLIP", "zero": True, "spread": 0.8, "ncols": 6, "subplots": {"sharex": True}}
    return interval_panels(table, "half", "task", "accuracy", "kind", looks, height=1.3 + 0.48 * table["task"].nunique(), **words)[0]


@drawn(credit=True, found="RemappedConcepts")
def remapped_concepts(found: Any) -> Figure:
    """Concepts by row: strongest pictures in CLIP and in the adapted model, dark where the latent is silent, and what its class loses without it.

    Filled dots: the latent is turned off; hollow ones: another latent that is about as active is; bars are 95% intervals over pictures.
    """
    table, n, k = found.table, len(found.pictures), 3
    low, high = float(table[["change_low", "control_low"]].min(axis=None)), float(table[["change_high", "control_high"]].max(axis=None))
    fig, axes = figure(height=0.72 * n + 0.9, nrows=n, ncols=2 * k + 2, width_ratios=[2.5, *[1] * 2 * k, 2.6], squeeze=False)
    for i, (row, pictures) in enumerate(zip(axes, found.pictures, strict=True)):
        pair = table.iloc[2 * i : 2 * i + 2]
        first, (color, words) = pair.iloc[0], _CHANGES[pair.iloc[0]["kind"]]
        image_axes(row[0]).set(xlim=(0, 1), ylim=(0, 1))
        row[0].axvline(0, color=COLORS[color], lw=6)
        texts = clip(first["name"], 26), f"latent {first['latent']}", f"{words}: {pretty(first['class_name'])}"
        for y, text, weight in zip((0.78, 0.45, 0.14), texts, ("bold", "normal", "normal"), strict=True):
            row[0].text(0.05, y, text, va="center", fontsize=8.5, fontweight=weight)
        for side, (images, masks) in enumerate(pictures.values()):
            for ax, image, mask in zip(row[1 + side * k :], images, masks, strict=False):
                image_axes(ax).imshow(blend(image, mask, max(float(masks.max()), 1e-12), 0.0, 0.4, size=160))
            for ax in row[1 + side * k + len(images) : 1 + (side + 1) * k]:
                image_axes(ax)
        ax = row[-1]
        for y, (_, each), dot in zip((1, 0), pair.iterrows(), ("gray", "blue"), strict=True):
            for name, shift, face in (("change", 0.12, COLORS[dot]), ("control", -0.18, "white")):
                length = errors(pair.loc[[each.name]], name)
                ax.errorbar(each[name], y + shift, None, length, fmt="o", ms=4, color=COLORS[dot], mfc=face, elinewidth=1.2)
        ax.axvline(0, color=COLORS["black"], lw=0.8)
        ax.set(xlim=(1.08 * low - 0.05, 1.08 * max(high, 0) + 0.05), ylim=(-0.6, 1.6), yticks=(1, 0), yticklabels=("CLIP", "adapted"))
        ax.tick_params("both", length=0, labelsize=8, labelbottom=i == n - 1)
        ax.grid(False, axis="y")
    axes[0, -1].set_title("log-odds of the class\nwithout it (nats)", fontsize=9)
    for place, title in ((1, "strongest in CLIP"), (1 + k, "strongest in the adapted model")):
        words = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold"}
        axes[0, place].annotate(title, (0, 1), (0, 5), "axes fraction", **words).set_in_layout(False)
    return fig


@drawn(table='DataFrame; the table "controls" of ``load_table``')
def planted_controls(table: pd.DataFrame) -> Figure:
    """Controls whose answer is known: how many planted features each method finds, how many of what it calls new are planted, and the new share."""
    titles = {"recall": "Planted and found (%)", "precision": "Called new and planted (%)", "new_share": "Called new, of all (%)"}
    rows = measures(table, titles).dropna(subset="value")
    panel = {"measure": {name: title for name, title in titles.items() if (rows["measure"] == name).any()}}
    height = 1.2 + 0.12 * rows["method"].nunique() * rows["control"].nunique()
    methods: dict[str, dict] = {method: {} for method in table["method"].unique()}
    return interval_panels(
        rows, panel, "control", "value", "method", methods, height=height, order=table["control"].unique(), scale=100, xlim=(-3, 103), spread=0.7,
    )[0]  # fmt: skip
