"""Zero-shot classification: which images a CLIP names rightly, and how often, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import batches, openmoji, templates_for
from ..run.intervals import bootstrap_share


def zero_shot_accuracy(
    clip,
    dataset,
    templates: Sequence[str] | None = None,
    *,
    by: str | Sequence[str] = (),
    batch_size: int = 64,
    workers: int | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Zero-shot accuracy of a CLIP over a data set, or over parts of it.

    Parameters
    ----------
    clip : ClipModel
    dataset : ImageData or OpenMojiData
    templates : sequence of str, optional
        Default: those that suit the data set (:func:`patchsae_utils.templates_for`).
    by : str or sequence of str
        Columns of :func:`zero_shot_predictions` to split by, e.g. ``"tier"``; none: one row over all images.
    batch_size, workers : int
    n_bootstrap, seed : int
        Resamples of the images for the interval, and what draws them.
    progress : bool

    Returns
    -------
    DataFrame
        As :func:`accuracy_table` makes it.
    """
    predictions = zero_shot_predictions(clip, dataset, templates, batch_size=batch_size, workers=workers, progress=progress)
    return accuracy_table(predictions, by, n_bootstrap=n_bootstrap, seed=seed)


@torch.no_grad()
def zero_shot_predictions(
    clip,
    dataset,
    templates: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What a CLIP says about every image.

    Returns
    -------
    DataFrame
        One row an image: ``dataset``, ``index``, ``label``, ``prediction``, ``correct``, ``n_classes``; ``domain``, ``task`` and ``tier``
        of the image's class; ``correct_in_task`` with ``n_in_task``: the answer among the classes of its task alone. Classes are keyed by
        label, so equal names stay two classes. Outside the embedded world the data set is its own domain and task, and all classes are of
        tier "all".
    """
    templates = templates_for(dataset.spec) if templates is None else templates
    head = clip.zero_shot_head(dataset.class_names, templates)
    groups = _tasks(dataset)
    indices, labels, predicted, within = [], [], [], []
    label = f"zero-shot on {dataset.name}" if progress else None
    for batch in batches(dataset, clip.preprocess, batch_size, workers, progress=label):
        logits = clip.logits(clip.encode_image(batch.images), head).cpu()
        indices.append(batch.indices)
        labels.append(batch.labels)
        predicted.append(logits.argmax(1))
        if groups is not None:
            other = groups[None] != groups[batch.labels][:, None]
            within.append(logits.masked_fill(other, -torch.inf).argmax(1))
    indices, labels, predicted = (torch.cat(parts).numpy() for parts in (indices, labels, predicted))
    frame = pd.DataFrame(
        {"dataset": dataset.name, "index": indices, "label": labels, "prediction": predicted, "correct": predicted == labels}
    )
    frame["n_classes"] = len(dataset.class_names)
    if groups is None:
        return frame.assign(
            domain=dataset.name, task=dataset.name, tier="all", correct_in_task=frame["correct"], n_in_task=frame["n_classes"]
        )
    rows = openmoji.class_table().iloc[dataset.class_ids[labels]].reset_index(drop=True)
    return frame.assign(
        domain=getattr(dataset, "domain", dataset.name),
        task=rows["task"],
        half=rows["half"],
        tier=rows["tier"],
        correct_in_task=torch.cat(within).numpy() == labels,
        n_in_task=torch.bincount(groups)[groups[labels]].numpy(),
    )


def accuracy_table(
    predictions: pd.DataFrame,
    by: str | Sequence[str] = (),
    *,
    correct: str = "correct",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy, 95 % interval and chance level of each group of images.

    Parameters
    ----------
    predictions : DataFrame
        Of :func:`zero_shot_predictions`; several may be concatenated.
    by : str or sequence of str
        Columns to group by.
    correct : {"correct", "correct_in_task"}
        Among all classes of the data set, or among those of the image's task.
    n_bootstrap, seed : int

    Returns
    -------
    DataFrame
        The grouping columns, ``n`` (images), ``accuracy``, ``low``, ``high``, ``chance``; shares, not per cent.

    Raises
    ------
    ValueError
        If a column is missing.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = [name for name in (*by, correct) if name not in predictions]
    if missing:
        raise ValueError(f"The predictions have no column {missing[0]!r}. Valid: {', '.join(predictions.columns)}.")
    choices = "n_in_task" if correct == "correct_in_task" else "n_classes"
    rows = []
    for key, group in predictions.groupby(by, sort=False, observed=True) if by else [((), predictions)]:
        mean, low, high = bootstrap_share(group[correct].to_numpy(), n_bootstrap=n_bootstrap, seed=seed)
        rows.append([*key, len(group), mean, low, high, float((1 / group[choices]).mean())])
    return pd.DataFrame(rows, columns=[*by, "n", "accuracy", "low", "high", "chance"])


def domains_of(spec: str) -> list[str]:
    """The specs that show the same classes under a shift: the embedded world's four domains, the given one first; else the spec alone."""
    if not spec.startswith("openmoji/"):
        return [spec]
    task, _, given = spec.partition(":")
    given = given or "color"
    return [spec, *(task if domain == "color" else f"{task}:{domain}" for domain in openmoji.DOMAINS if domain != given)]


def _tasks(dataset) -> Tensor | None:
    """LongTensor [C]: the task of each class, in the embedded world."""
    if not hasattr(dataset, "class_ids"):
        return None
    tasks = openmoji.class_table()["task"].to_numpy()[dataset.class_ids]
    return torch.from_numpy(np.unique(tasks, return_inverse=True)[1])


@torch.no_grad()
def embed_images(clip, dataset, *, batch_size: int = 64, workers: int | None = None, progress: bool = True) -> Tensor:
    """CLIP's unit image features of a whole data set, in its order: [N, d_embed]."""
    found = torch.empty(len(dataset), clip.d_embed)
    for batch in batches(dataset, clip.preprocess, batch_size, workers, progress="embedding images" if progress else None):
        found[batch.indices] = F.normalize(clip.encode_image(batch.images).float(), dim=-1).cpu()
    return found
