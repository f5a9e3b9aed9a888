"""What the tables of adaptation say, in sentences; tables of several data sets have a column ``task``, of several models ``adapter``."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .compare import APART, OTHER, SAME, TWICE
from .concepts import RemappedConcepts
from .fit import NAMES

WHOLE = "both"  # the whole gain, among its parts
COLUMNS = {"remapping": "remapping", "retuning": "retuning", "new concepts": "new concepts", WHOLE: "whole gain"}


def _span(values: pd.Series, form: str = "{:+.0f}") -> str:
    """The least and the largest of some numbers."""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"


def accuracy_sentence(accuracy: pd.DataFrame) -> str:
    """What an adapter gains on base and novel classes, as it is and through the reconstruction; from ``base_to_novel``."""
    table = accuracy.set_index(["form", "half", "task", "model"])["accuracy"].unstack()
    name = next(column for column in table if column != "CLIP")
    gain, means = 100 * (table[name] - table["CLIP"]), table.loc["raw", "harmonic mean"].mean()
    return (
        f"On base classes {name} changes the accuracy by {_span(gain['raw', 'base'])} points, on novel classes by {_span(gain['raw', 'novel'])}; "
        f"the mean over tasks of the harmonic mean goes from {means['CLIP']:.0%} to {means[name]:.0%}. When both models read the "
        f"dictionary's reconstruction instead of the residual stream, {_span(gain['reconstructed', 'base'])} points remain on base "
        "classes; what is lost of the gain uses what the dictionary leaves out."
    )


def protocol_table(table: pd.DataFrame, kinds: Sequence[str] = ("zero-shot", "maple", "finetune")) -> pd.DataFrame:
    """Accuracy in per cent on base and novel classes and their harmonic mean, one row a task (Lim et al., Table 1)."""
    rows = table[(table["form"] == "raw") & table["kind"].isin(list(kinds))].assign(accuracy=lambda rows: 100 * rows["accuracy"])
    rows = rows.assign(task=rows["task"].str.removeprefix("openmoji/"), kind=rows["kind"].map(lambda kind: NAMES.get(kind, kind)))
    return rows.pivot_table(index="task", columns=["half", "kind"], values="accuracy", sort=False).round(1)


def protocol_sentence(table: pd.DataFrame) -> str:
    """Harmonic means over the tasks of the committed table, and where MaPLe does not gain."""
    rows = table[table["form"] == "raw"]
    average = rows[(rows["task"] == "average") & (rows["half"] == "harmonic mean")].set_index("kind")
    base = rows[(rows["half"] == "base") & (rows["task"] != "average")].pivot(index="task", columns="kind", values="accuracy")
    means = [f"{NAMES.get(kind, kind)} {row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]" for kind, row in average.iterrows()]
    gain = base["maple"] - base["zero-shot"]
    return (
        f"Harmonic mean over the {len(set(table['task'])) - 1 - gain.index.str.contains(':').sum()} tasks in color: {'; '.join(means)} "
        f"({average['n_seeds'].max():.0f} seeds; zero-shot CLIP has none). On base classes MaPLe is above CLIP on {(gain > 0).sum()} of "
        f"{len(gain)} tasks. Tasks on which CLIP was already good gain less: over tasks, the gain and CLIP's accuracy correlate by "
        f"{gain.corr(base['zero-shot']):.2f}."
    )


def overlap_sentence(groups: pd.DataFrame) -> str:
    """How many of a class's own latents two models share, beside what chance and another class leave; from ``comparisons()``."""
    mean = groups.groupby(["comparison", "measure"])["value"].mean().unstack()
    jaccard = mean["jaccard"]
    return (
        f"On the same pictures the two models share {jaccard[SAME]:.0%} of the union of a class's ten own latents. On different pictures "
        f"they share {jaccard[APART]:.0%}, while CLIP shares {jaccard[TWICE]:.0%} with itself, and two different classes share "
        f"{jaccard.get(OTHER, float('nan')):.0%}. Per class, {mean.loc[SAME, 'low-to-high']:.1f} latents doubled and {mean.loc[SAME, 'high-to-low']:.1f} "
        "halved."
    )


def parts_table(parts: pd.DataFrame) -> pd.DataFrame:
    """The parts of each gain in points of accuracy with 95% intervals over pictures, one row a task and adapter."""
    rows = parts[parts["part"].isin(list(COLUMNS))]
    told = [f"{x:+z.0f} [{a:+z.0f}, {b:+z.0f}]" for x, a, b in (100 * rows[["gain", "low", "high"]]).itertuples(index=False)]
    table = rows.assign(told=told).pivot(index=["task", "adapter"], columns="part", values="told")
    return table[list(COLUMNS)].rename(columns=COLUMNS)


def parts_sentence(parts: pd.DataFrame) -> str:
    """Mean parts of each adapter's gain over its tasks."""
    means = 100 * parts.groupby(["adapter", "part"], sort=False)["gain"].mean().unstack()
    told = [
        f"{name} gains {row[WHOLE]:+.0f} points: {row['remapping']:+.1f} by remapping, {row['retuning']:+.1f} by retuning, {row['new concepts']:+.1f} "
        "by new concepts"
        for name, row in means.iterrows()
    ]
    return f"On average over the tasks shown, {'; '.join(told)}."


def experiments_sentence(experiments: pd.DataFrame) -> str:
    """How far a few exchanges of parts alone go, as shares of the gain."""
    gain = experiments.pivot_table(index="task", columns="experiment", values="gain", sort=False)
    share = gain.div(gain["adapted"], axis=0)[gain["adapted"].abs() > 0.005]
    if share.empty:
        return "No task shows a gain of which these could be shares."
    return (
        f"CLIP's residual stream, read by the adapted model's later blocks and text head, reaches {_span(share['remapping only'], '{:.0%}')} "
        f"of the gain; the whole change of the stream, read by CLIP, reaches {_span(share['whole change of the stream'], '{:.0%}')}."
    )


def reuse_sentence(reuse: pd.DataFrame, links: pd.DataFrame) -> str:
    """How much of a class's evidence rests on the same latents, and what became of the strongest links."""
    mean, fate = reuse.groupby("comparison")["reuse"].mean(), links["link"].value_counts(normalize=True)
    return (
        f"On the same pictures {mean[SAME]:.0%} of a class's evidence rests on the same latents in both models. On different pictures the "
        f"models share {mean[APART]:.0%}, CLIP shares {mean[TWICE]:.0%} with itself, and two classes share {mean.get(OTHER, float('nan')):.0%}. "
        f"Of the strongest links {fate.get('stayed', 0):.0%} stayed, {fate.get('appeared', 0):.0%} appeared and {fate.get('vanished', 0):.0%} "
        "vanished."
    )


def prediction_sentence(table: pd.DataFrame) -> str:
    """What the adapted head reads from a class's own latents, from random ones and from all."""
    rows = table[table["group"] == "all"]
    kept = rows[(rows["mode"] == "on") & (rows["k"] >= 10)].groupby(["choose", "model"])["accuracy"].mean().unstack()
    whole = rows[rows["mode"] == "reconstructed"].set_index("model")["accuracy"]
    more, less, every = (100 * (part["CLIP, adapted head"] - part["CLIP"]) for part in (kept.loc["oracle"], kept.loc["random"], whole))
    return (
        f"With CLIP's image tower unchanged, the adapted head changes the accuracy by {more:+.1f} points where only 10 to 100 latents of the "
        f"true class are kept, by {less:+.1f} where as many random ones are, and by {every:+.1f} where all are."
    )


def order_sentence(nats: pd.DataFrame, adapter: str = "fine-tuning") -> str:
    """How much new concepts bring where CLIP had the features, and where it lacked them."""
    rows = nats[(nats["part"] == "new concepts") & (nats["adapter"] == adapter)]
    told = [
        f"{r.task} {r.gain:.2f} nats [{r.low:.2f}, {r.high:.2f}], {r.share:.0%} of the gain [{r.share_low:.0%}, {r.share_high:.0%}]"
        for r in rows.itertuples()
    ]
    apart = "don't overlap" if rows["low"].iloc[-1] > rows["high"].iloc[0] else "overlap"
    compared = f" The intervals of the first and the last task in nats {apart}." if len(rows) > 1 else ""
    return f"New concepts of {adapter}: {'; '.join(told)}.{compared}"


def conclusion(parts: pd.DataFrame, groups: pd.DataFrame, reuse: pd.DataFrame, concepts: RemappedConcepts) -> str:
    """Five sentences, each with its experiment and what it does not say, as a Markdown list."""
    gain = 100 * parts.groupby(["adapter", "part"])["gain"].mean().unstack()
    overlap, shared = groups.groupby(["comparison", "measure"])["value"].mean(), reuse.groupby("comparison")["reuse"].mean()
    maple, tuned = gain.loc["MaPLe"], gain.loc["fine-tuning"]
    sentences = (
        f"*Exchanging parts:* {maple['remapping']:+.1f} of MaPLe's {maple[WHOLE]:+.1f} points come from later blocks and the text head. "
        "This includes what they read from the SAE's error.",
        f"*Counting latents:* on other pictures MaPLe shares {overlap[APART, 'jaccard']:.0%} of a class's top latents with CLIP, and CLIP "
        f"shares {overlap[TWICE, 'jaccard']:.0%} with itself. Counts say nothing of how a latent is read.",
        f"*Links:* on other pictures {shared[APART]:.0%} of a class's evidence rests on the same latents in both models, and "
        f"{shared[TWICE]:.0%} in CLIP twice. A link is a gradient, so it is exact for small changes alone.",
        f"*Fine-tuning:* {tuned['retuning']:+.1f} of {tuned[WHOLE]:+.1f} points come from retuning and {tuned['new concepts']:+.1f} from "
        f"outside the dictionary, which bounds what is new neither above nor below.",
        f"*Single concepts turned off:* {concepts.sentence()[0].lower()}{concepts.sentence()[1:-1]}. These are a few concepts of one "
        "task, the links chosen for their size.",
    )  # fmt: skip
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))
