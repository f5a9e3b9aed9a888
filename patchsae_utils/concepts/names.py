"""Names for latents, from three sources that know nothing of each other, and how far they agree.

*Labels*: the class in whose images a latent is active most above the base rate. *Text*: the word whose CLIP text embedding is closest to a
latent's strongest images and to crops around its strongest patches, compared with random ones. *Ground truth*: the concept whose mask its
activation correlates with (:mod:`.concepts`). Each gives a score, a margin over the runner-up and a p-value; where nothing stands out a
latent stays "unnamed". The decoder's row is never compared with text: it lies in the residual stream, not in CLIP's output space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from ..clip.zero_shot import embed_images
from ..data import openmoji
from ..latents.summary import LatentSummary
from .vocabulary import TextScores, Vocabulary, embed_crops, make_vocabulary, score_words, unique_names

if TYPE_CHECKING:
    from .detection import ConceptReport

__all__ = [
    "UNNAMED",
    "TextScores",
    "Vocabulary",
    "adjust_p_values",
    "embed_crops",
    "embed_images",
    "label_latents",
    "make_vocabulary",
    "name_agreement",
    "related_names",
    "score_words",
    "unique_names",
]

UNNAMED = "unnamed"


# -- all sources --------------------------------------------------------------------------------------------------------------


def label_latents(
    summary: LatentSummary,
    report: ConceptReport | None = None,
    *,
    text: TextScores | None = None,
    max_p: float = 0.01,
    min_score: float | None = None,
    min_margin: float = 0.0,
) -> pd.DataFrame:
    """Name latents, with a score, a margin and "unnamed" where nothing stands out.

    With a report (*ground truth*), a latent's name is the concept whose mask its activation correlates with most; the score is that
    correlation on held-out scenes, the margin its lead over the second concept where both were chosen, and p the share of living
    latents that reach the score when pictures and masks are shuffled. With ``text``, the name is the word that :func:`score_words` found,
    and p is corrected for the number of words. With neither (*labels*), it is the class in whose images the latent is active most above the
    base rate; the score is that lift, the margin its lead over the second class, and p the binomial tail of so many active images, times
    the number of classes.

    Every p holds for one latent. Among thousands some are small by chance: ``q`` is p after the correction of Benjamini and Hochberg (1995)
    over the living latents, the share of names so certain that would be false. Names from text are judged by q, the other two by p, whose
    false names a reader can count: ``max_p`` times the latents.

    Parameters
    ----------
    summary : LatentSummary
    report : ConceptReport, optional
        Of the same SAE.
    text : TextScores, optional
        Of the same SAE; latents that it leaves out are unnamed.
    max_p : float
        Names less certain than that become "unnamed".
    min_score : float, optional
        So do names that score less. Default: correlation 0.1, lift 2, or half a standard deviation for text.
    min_margin : float
        And names that lead the runner-up by less.

    Returns
    -------
    DataFrame
        latent, name, kind, score, margin, p, q, runner_up, class_index (-1 where the name is no class), n_images (where it is active),
        frequency; from labels also ``entropy`` of the classes of its reference images (nats; log C for the dead). One row a latent; dead
        latents are unnamed, of kind "dead", with score and margin 0 and p 1.

    Raises
    ------
    ValueError
        If both sources are given, or one has another number of latents than the summary.
    """
    if report is not None and text is not None:
        raise ValueError("Names come from ground truth (report) or from text, not from both: call twice, and compare by name_agreement.")
    if report is not None and len(report.latents) != summary.n_latents:
        raise ValueError(f"The summary has {summary.n_latents} latents, the report {len(report.latents)}: they are of different SAEs.")
    if text is not None and text.n_latents != summary.n_latents:
        raise ValueError(f"The summary has {summary.n_latents} latents, the text scores {text.n_latents}: they are of different SAEs.")
    dead = summary.dead.numpy()
    if report is not None:
        frame, least = _names_from_truth(report), 0.1
    elif text is not None:
        frame, least = _names_from_text(text), 0.5
    else:
        frame, least = _names_from_labels(summary), 2.0
    judged = ~dead if text is None else np.isin(frame["latent"], text.table["latent"]) & ~dead
    frame["q"] = 1.0
    frame.loc[judged, "q"] = adjust_p_values(frame.loc[judged, "p"].to_numpy())
    frame["n_images"] = summary.class_hits.sum(0).long().numpy()
    frame["frequency"] = summary.frequency.numpy()
    certainty = frame["p"] if text is None else frame["q"]
    weak = (certainty > max_p) | (frame["score"] < (least if min_score is None else min_score)) | (frame["margin"] < min_margin)
    frame.loc[weak, ["name", "kind", "class_index"]] = [UNNAMED, UNNAMED, -1]
    frame.loc[dead, ["name", "kind", "class_index", "score", "margin", "p", "q", "runner_up"]] = [
        UNNAMED,
        "dead",
        -1,
        0.0,
        0.0,
        1.0,
        1.0,
        "",
    ]
    return frame


def adjust_p_values(p: np.ndarray) -> np.ndarray:
    """False discovery rates: p-values after the step-up correction of Benjamini and Hochberg (1995).

    Parameters
    ----------
    p : float array [n]

    Returns
    -------
    float array [n]
        q, not smaller than p, in the same order of size.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[::-1]
    steps = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(steps), 1.0)
    return q


def _names_from_truth(report: ConceptReport) -> pd.DataFrame:
    kind = report.latents["concept"].str.partition(":")
    frame = report.latents[["latent", "score", "margin", "p", "runner_up"]].copy()
    frame.insert(1, "name", kind[2].where(kind[2] != "", kind[0]))
    frame.insert(2, "kind", kind[0])
    frame["class_index"] = -1
    return frame


def _names_from_labels(summary: LatentSummary) -> pd.DataFrame:
    hits, per_class = summary.class_hits.double().numpy(), summary.class_images.double().numpy()
    active = hits.sum(0)
    base = per_class / max(per_class.sum(), 1)
    expected = np.outer(base, active)
    lift = np.divide(hits, expected, out=np.zeros_like(hits), where=expected > 0)
    order = np.argsort(-lift, axis=0, kind="stable")[: min(2, len(lift))]
    columns = np.arange(lift.shape[1])
    best = order[0]
    tail = stats.binom.sf(hits[best, columns] - 1, active, base[best]) * len(base)
    second = lift[order[1], columns] if len(order) > 1 else np.zeros(len(columns))
    names = unique_names(summary.class_names)
    return pd.DataFrame(
        {
            "latent": columns, "name": names[best], "kind": "class", "score": lift[best, columns], "margin": lift[best, columns] - second,
            "p": np.minimum(tail, 1.0), "runner_up": names[order[1]] if len(order) > 1 else "", "class_index": best,
            "entropy": summary.label_entropy.nan_to_num(float(np.log(len(base)))).numpy(),
        }
    )  # fmt: skip


def _names_from_text(text: TextScores) -> pd.DataFrame:
    frame = pd.DataFrame({"latent": np.arange(text.n_latents)})
    frame = frame.merge(text.table, on="latent", how="left")
    empty = {"name": UNNAMED, "kind": UNNAMED, "score": 0.0, "margin": 0.0, "p": 1.0, "runner_up": "", "class_index": -1}
    return frame.fillna(empty).astype({"class_index": int})[["latent", *empty]]


# -- agreement ----------------------------------------------------------------------------------------------------------------


def name_agreement(
    sources: Mapping[str, pd.DataFrame],
    related: Mapping[str, Sequence[str]] | None = None,
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How often sources of names agree, over the latents that both name.

    Parameters
    ----------
    sources : mapping of str to DataFrame
        Tables of :func:`label_latents`.
    related : mapping of str to sequence of str, optional
        Names that are no contradiction: what is named "dog" may also be called "animal" (see :func:`related_names`).
    n_permutations : int
        Shuffles of one source's names over those latents: the level that their frequencies alone give.
    seed : int

    Returns
    -------
    DataFrame
        One row a pair: a, b, n_a, n_b (latents each names), n_both, agreement, low, high (95 %, Wilson, 1927), chance, p (share of shuffles
        that agree at least as often; the observed order counts as one), related and related_chance (names equal or related). NaN
        without a common latent. Equal class names that were told apart by an index count as equal.

    Raises
    ------
    ValueError
        If there are fewer than two sources or a table lacks a column.
    """
    if len(sources) < 2:
        raise ValueError(f"Agreement needs two sources of names or more, got {len(sources)}.")
    for source, frame in sources.items():
        if missing := {"latent", "name"} - set(frame.reset_index().columns):
            raise ValueError(f"The table {source!r} has no column {sorted(missing)[0]!r}. Pass results of label_latents.")
    plain = {source: _plain_names(frame) for source, frame in sources.items()}
    rng = np.random.default_rng(seed)
    pairs = {(a, b) for a, some in (related or {}).items() for b in some}
    rows = []
    for a, b in combinations(plain, 2):
        both = plain[a].index.intersection(plain[b].index)
        codes, names = pd.factorize(np.concatenate([plain[a][both].to_numpy(object), plain[b][both].to_numpy(object)]))
        x, y = codes[: len(both)], codes[len(both) :]
        fits = np.array([[m == n or (m, n) in pairs or (n, m) in pairs for n in names] for m in names], bool).reshape(
            len(names), len(names)
        )
        drawn = [rng.permutation(y) for _ in range(n_permutations)] if len(both) else []
        equal = [(x == other).mean() for other in drawn]
        share = (x == y).mean() if len(both) else np.nan
        interval = stats.binomtest(int((x == y).sum()), len(both)).proportion_ci(method="wilson") if len(both) else (np.nan, np.nan)
        rows.append(
            {
                "a": a, "b": b, "n_a": len(plain[a]), "n_b": len(plain[b]), "n_both": len(both), "agreement": share, "low": interval[0],
                "high": interval[1], "chance": np.mean(equal) if drawn else np.nan,
                "p": (1 + np.sum(np.array(equal) >= share)) / (1 + n_permutations) if drawn else np.nan,
                "related": fits[x, y].mean() if len(both) else np.nan,
                "related_chance": np.mean([fits[x, other].mean() for other in drawn]) if drawn else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def related_names() -> dict[str, list[str]]:
    """Names in the embedded world that are no contradiction: an object's category and its main colour."""
    table = openmoji.class_table()
    return {name: [category, color] for name, category, color in zip(table["name"], table["category"], openmoji.main_colors(), strict=True)}


def _plain_names(frame: pd.DataFrame) -> pd.Series:
    frame = frame if "latent" in frame.columns else frame.reset_index()
    named = frame[frame["name"] != UNNAMED].set_index("latent")["name"]
    return named.str.replace(r" \(\d+\)$", "", regex=True)
