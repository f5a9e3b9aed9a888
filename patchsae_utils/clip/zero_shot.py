"""Zero-shot classification: which images a CLIP names rightly, and how often, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from ..data import batches, openmoji, templates_for
from ..data.splits import require_labels
from ..run.intervals import mean_interval, percent


@torch.no_grad()
def zero_shot_predictions(clip, dataset, *, progress: bool = True) -> pd.DataFrame:
    """What a CLIP says about every image, by the templates that suit the data set.

    Parameters
    ----------
    clip : ClipModel with a text tower; ``NoText`` without
    dataset, progress : ImageData or OpenMojiData, and whether to show a bar

    Returns one row per image: ``dataset``, ``index``, ``label``, ``prediction``, ``correct``, ``n_classes``; ``domain``, ``task`` and ``tier``
    of the image's class; ``correct_in_task`` with ``n_in_task``: the answer among the classes of its task alone. Outside the embedded world
    the data set is its own domain and task, and all classes are of tier "all".
    """
    require_labels(dataset)
    head = clip.zero_shot_head(dataset.class_names, templates_for(dataset.spec))
    known = hasattr(dataset, "class_ids")
    classes = openmoji.class_table().iloc[dataset.class_ids].reset_index(drop=True) if known else None
    task = torch.from_numpy(classes["task"].factorize()[0]) if known else torch.zeros(len(dataset.class_names), dtype=torch.int64)
    parts = []
    for batch in batches(dataset, clip.preprocess, progress=f"zero-shot on {dataset.name}" if progress else None):
        logits = clip.logits(clip.encode_image(batch.images), head).cpu()
        of_its_task = logits.masked_fill(task[None] != task[batch.labels][:, None], -torch.inf)
        parts.append((batch.indices, batch.labels, logits.argmax(1), of_its_task.argmax(1)))
    indices, labels, predicted, within = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    kinds = classes.iloc[labels].reset_index(drop=True)[["task", "half", "tier"]] if known else {"task": dataset.name, "tier": "all"}
    frame = pd.DataFrame({"dataset": dataset.name, "index": indices, "label": labels, "prediction": predicted})
    return frame.assign(
        correct=predicted == labels,
        n_classes=len(dataset.class_names),
        domain=getattr(dataset, "domain", dataset.name),
        **kinds,
        correct_in_task=within == labels,
        n_in_task=torch.bincount(task)[task[labels]].numpy(),
    )


def accuracy_table(predictions: pd.DataFrame, by: str | Sequence[str] = (), *, correct: str = "correct") -> pd.DataFrame:
    """Accuracy, 95% interval over resampled images, and chance level of each group of images.

    Parameters
    ----------
    predictions : DataFrame of :func:`zero_shot_predictions`; several may be concatenated
    by : str or sequence of str, columns to group by; none: one row
    correct : {"correct", "correct_in_task"}; among all classes of the data set, or among those of the image's task

    Returns the grouping columns, ``n`` (images), ``accuracy``, ``low``, ``high``, ``chance``; shares, not per cent.
    """
    by = [by] if isinstance(by, str) else list(by)
    choices = "n_in_task" if correct == "correct_in_task" else "n_classes"
    rows = []
    for key, group in predictions.groupby(by, sort=False, observed=True) if by else [((), predictions)]:
        share = mean_interval(group[correct].to_numpy(), "images")
        rows.append([*key, len(group), share.value, share.low, share.high, float((1 / group[choices]).mean())])
    return pd.DataFrame(rows, columns=[*by, "n", "accuracy", "low", "high", "chance"])


def accuracy_sentence(predictions: pd.DataFrame) -> str:
    """Zero-shot accuracy in words: of the first domain, of its tiers, of the other domains.

    Parameters
    ----------
    predictions : DataFrame of :func:`zero_shot_predictions`
    """
    first, *others = accuracy_table(predictions, "domain").itertuples()
    tiers = [*accuracy_table(predictions[predictions["domain"] == first.domain].sort_values("tier"), "tier").itertuples()]
    said = percent(first.accuracy, first.low, first.high)
    words = f"CLIP classifies {said} of {first.n:,} unseen pictures correctly (guessing: {first.chance:.1%})."
    for groups, what in ((tiers if len(tiers) > 1 else [], "How often captions named the class"), (others, "Other domains")):
        each = ", ".join(f"{row[1]} {percent(row.accuracy, row.low, row.high)}" for row in groups)
        words += f" {what}: {each}." if each else ""
    return words


def domains_of(spec: str) -> list[str]:
    """The specs that show the same classes under a shift: the embedded world's four domains, the given one first; else the spec alone.

    Parameters
    ----------
    spec : str, as of :func:`patchsae_utils.load_dataset`
    """
    if not spec.startswith("openmoji/"):
        return [spec]
    task, _, given = spec.partition(":")
    return [spec, *(task if domain == "color" else f"{task}:{domain}" for domain in openmoji.DOMAINS if domain != (given or "color"))]
