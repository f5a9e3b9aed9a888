"""Masking latents: zero-shot accuracy with only some of them on, or with them off.

Unlike in the official code, rankings come from another split than the evaluated one, the SAE's error can be kept, and masks subtract
decoder rows from the residual stream, so that a list of ks costs one pass over the active latents and zero latents stay zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..activations.mixing import TOKENS
from ..clip.model import ClipModel
from ..latents.summary import LatentSummary
from ..run.intervals import mean_interval
from ..run.memory import out_of_memory
from ..sae.model import SparseAutoencoder
from .attribution import Attribution
from .choosing import CHOICES, RANKINGS, Choosing
from .tail import Active, dataset_head, read_batches

MODES = ("on", "off")


@out_of_memory("a sweep over masks", "batch_size lower (sweep_masks(..., batch_size=8))")
@torch.no_grad()
def sweep_masks(
    clip: ClipModel, sae: SparseAutoencoder, dataset: Any, ks: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    choose: str | Sequence[str] = ("oracle", "predicted", "random"), keep_error: bool | Sequence[bool] = False, layer: int = -2, *,
    class_counts: LatentSummary | Tensor | None = None, attribution: Attribution | Tensor | None = None,
    rank_by: str | Sequence[str] = "count", where: str | Sequence[str] = "all", head: Tensor | None = None, n_random: int = 3,
    groups: str | Sequence[str] | None = None, batch_size: int = 32,
) -> pd.DataFrame:  # fmt: skip
    """Zero-shot accuracy with only the top k latents left on, or with them turned off; prompt tokens pass unchanged.

    Parameters
    ----------
    clip, sae, layer
    dataset : ImageData or OpenMojiData, of images that neither ``class_counts`` nor ``attribution`` has seen
    ks : sequence of int
        Numbers of latents, from 0 to S. S means all; otherwise a class's mask holds fewer than k where fewer have a positive score.
    choose : str or sequence of str
        Whose latents are ranked first: ``oracle`` (the image's *true* class: the paper's mask, which knows the label), ``predicted`` (the
        class that the unmasked model predicts), ``wrong`` (a random other class), ``dataset`` (all classes), ``random`` (latents not dead
        on the train split, outcomes averaged over ``n_random`` draws), ``matched`` (for each ``predicted`` latent another, about as active
        in this image and as frequent on the train split; NaN, with a warning, for a k of which some image has too few).
    keep_error : bool or two bools, whether the SAE's error z - z_hat is added back
    class_counts : LatentSummary or Tensor [C, S], optional
        Activation of every latent on every class, from the *train* split; without it ``random`` alone can be chosen, dead latents included.
    attribution : Attribution or Tensor [C, S], optional
        What each class's logit owes to every latent, from the *train* split (:func:`patchsae_utils.interventions.attribute_latents`).
    rank_by : ``count`` (tokens where a latent is active, the paper's), ``attribution``, or both
    where : str or sequence of str, the masked tokens: ``all``, ``cls`` or ``patches``
    head : Tensor [C, d_embed], by default of the data set's classes
    groups : sequence of length C, or "class", optional
        A name for each class (its task, its tier): every row also for the images of each group alone. ``"class"``: of each class.
    n_random, batch_size : int

    Returns choose, rank ("none" where no ranking counts), mode ("on": only the k latents are kept; "off": they are set to zero), k, where,
    error ("kept" or "dropped"), group ("all" or a name), class (its index in rows of ``groups="class"``, else -1), accuracy, low, high;
    change (of the accuracy against raw, image by image), logit (of the true class), each with _low and _high; n (images, over which
    intervals are). The first three rows of a group (choose "none") have the modes "raw", "reconstructed" and "error_kept": no mask.

    Source: Lim et al., ICLR 2025, section 4.1 and Fig. 5 (choices ``oracle``, ``dataset``, ``random``; ranked by count).
    """
    choose, rank_by, where = _names(choose, CHOICES, "choose"), _names(rank_by, RANKINGS, "rank_by"), _names(where, tuple(TOKENS), "where")
    errors = [keep_error] if isinstance(keep_error, bool) else list(keep_error)
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 0 or ks[-1] > sae.d_sae or len(ks) > 254:
        raise ValueError(f"ks must be 1 to 254 numbers between 0 and d_sae={sae.d_sae}, got {ks}.")
    if not errors or n_random < 1:
        raise ValueError(f"keep_error must be one or two bools and n_random at least 1, got {keep_error} and {n_random}.")
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to measure on.")
    sae.check_model(clip, layer)
    clip.check_class_token(*where)
    scores, frequency = _rankings(class_counts, attribution, rank_by, choose, dataset.class_names, sae)
    members = _members(groups, dataset)
    head = dataset_head(clip, dataset, head)
    choosing = Choosing(scores, ks, frequency, (len(dataset), len(head), sae.d_sae), n_random)
    conditions = [(c, r) for c in choose for r in (rank_by if c != "random" else ["none"])]
    outcomes: dict[tuple, list[Tensor]] = defaultdict(list)

    for read in read_batches(clip, dataset, layer, "masks", batch_size=batch_size):
        z = read.residual.tokens
        h = sae.encode(z)
        active, activation = Active.of(h), h.sum(1) if "matched" in choose else None
        del h  # the largest thing here: T * S numbers an image
        latents_alone = active.decode(sae.W_dec)
        z_hat = latents_alone + sae.b_dec
        # off: all of it without the chosen latents; on: what is left without any latent, and the chosen ones.
        starts = {("off", True): z, ("off", False): z_hat, ("on", True): z - latents_alone, ("on", False): sae.b_dec.expand_as(z)}
        logits = clip.logits(read.features(z), head)
        outcomes["none", "none", "raw", 0, "all", True].append(_values(logits, read.labels))
        for mode, keep, tokens in (("reconstructed", False, z_hat), ("error_kept", True, z_hat + (z - z_hat))):
            outcomes["none", "none", mode, 0, "all", keep].append(_values(clip.logits(read.features(tokens), head), read.labels))

        for choice, ranking in conditions:
            draws: dict[tuple, list[Tensor]] = defaultdict(list)
            for levels, table, short in choosing.tables(choice, ranking, logits.argmax(1), read.labels, read.indices, activation):
                entry = table.to(z.device).expand(len(z), -1)[active.token // z.shape[1], active.latent]
                chosen = torch.zeros_like(z)
                for level in levels:
                    chosen += active.decode(sae.W_dec, (entry == level).nonzero()[:, 0])
                    for mode in MODES:
                        for keep in errors:
                            start = starts[mode, keep]
                            everywhere = start - chosen if mode == "off" else start + chosen
                            for name in where:
                                tokens = everywhere
                                if name != "all":
                                    tokens = starts["off", keep].clone()
                                    tokens[:, TOKENS[name]] = everywhere[:, TOKENS[name]]
                                values = _values(clip.logits(read.features(tokens), head), read.labels).masked_fill(
                                    short.to(z.device), torch.nan
                                )
                                draws[choice, ranking, mode, ks[level], name, keep].append(values)
            for key, values in draws.items():
                outcomes[key].append(torch.stack(values).mean(0))

    values = torch.stack([torch.cat(parts, 1) for parts in outcomes.values()]).double().cpu().numpy()  # [rows, 2, images]
    keys = pd.DataFrame(list(outcomes), columns=["choose", "rank", "mode", "k", "where", "error"])
    keys["error"] = keys["error"].map({True: "kept", False: "dropped"})
    return pd.concat(
        [_tabulate(keys.assign(group=name, **{"class": label}), values[..., chosen]) for name, label, chosen in members], ignore_index=True
    )


def _values(logits: Tensor, labels: Tensor) -> Tensor:
    """[2, B]: whether the class is right, and the true class's logit."""
    return torch.stack([(logits.argmax(1) == labels).float(), logits.gather(1, labels[:, None])[:, 0]])


def _tabulate(table: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """One row a condition from values [rows, 2, images]; the first row is raw."""
    right, logit = values[:, 0], values[:, 1]
    for name, rows in (("", right), ("change_", right - right[0]), ("logit_", logit)):
        mean, low, high, _ = mean_interval(rows)
        table = table.assign(**{name.rstrip("_") or "accuracy": mean, f"{name}low": low, f"{name}high": high})
    return table.assign(n=values.shape[-1])


def _members(groups: str | Sequence[str] | None, dataset: Any) -> list[tuple[str, int, np.ndarray]]:
    """(name, class or -1, bool [n_images]) of each part of the table."""
    labels, names = np.asarray(dataset.labels), dataset.class_names
    members = [("all", -1, np.ones(len(dataset), dtype=bool))]
    if groups is None:
        return members
    if groups == "class":
        return members + [(names[label], label, labels == label) for label in np.unique(labels).tolist()]
    if isinstance(groups, str) or len(groups) != len(names):
        raise ValueError(f"groups must be 'class', or a name for each of the {len(names)} classes of the data set; got {groups!r}.")
    of_images = np.asarray(groups)[labels]
    return members + [(name, -1, of_images == name) for name in dict.fromkeys(of_images.tolist())]


def _names(value: str | Sequence[str], valid: tuple[str, ...], what: str) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    unknown = [name for name in names if name not in valid]
    if unknown or not names:
        raise ValueError(f"Unknown {what}={unknown or names}. Valid: {', '.join(valid)}.")
    return list(dict.fromkeys(names))


def _rankings(counts, attribution, rank_by, choose, class_names, sae) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each ranking's scores [C, S], and how often latents are active on the train split, [S]."""
    scores = {}
    kinds = (("class_counts", "class_counts", "summarize_latents"), ("attribution", "scores", "attribute_latents"))
    for ranking, table, (name, attribute, made_by) in zip(RANKINGS, (counts, attribution), kinds, strict=True):
        make = f"{name}={made_by}(clip, sae, <train split>, layer)"
        if table is not None:
            values = torch.as_tensor(getattr(table, attribute, table))
            same = list(getattr(table, "class_names", class_names)) == list(class_names)
            if not same or tuple(values.shape) != (len(class_names), sae.d_sae):
                raise ValueError(
                    f"{name} must be of the {len(class_names)} classes of the evaluated data set and {sae.d_sae} latents, got {list(values.shape)}"
                    f"{'' if same else ' of other classes'}. Make it from the train split of the same data set with the same SAE: {make}."
                )
            sae.check_own(name, getattr(table, "sae", ""))
            scores[ranking] = values.float()
        elif ranking in rank_by and set(choose) != {"random"}:
            raise ValueError(f"choose={choose} with rank_by={ranking!r} ranks latents by class: give {make}, or 'random' alone.")
    frequency = getattr(counts, "frequency", None)
    return scores, scores["count"].sum(0) if frequency is None and "count" in scores else frequency
