"""Base and novel halves of the classes, and few-shot subsets."""

from __future__ import annotations

import math

import torch

HALVES = ("base", "novel")


def half_of_classes(n_classes: int, half: str | None) -> list[int]:
    """Labels of a half: the first ceil(n/2) are base, the rest novel; all for None.

    Raises
    ------
    ValueError
        For another half.

    Source: the base-to-novel protocol of CoCoOp (Zhou et al., CVPR 2022), which MaPLe and PatchSAE follow.
    """
    if half is None:
        return list(range(n_classes))
    if half not in HALVES:
        raise ValueError(f"Unknown half {half!r}. Valid: {', '.join(HALVES)}, or None for all classes.")
    middle = math.ceil(n_classes / 2)
    return list(range(middle) if half == "base" else range(middle, n_classes))


def few_shot(dataset, n_shots: int, seed: int = 0) -> list[int]:
    """Indices of ``n_shots`` examples of each class, drawn with ``seed``.

    Raises
    ------
    ValueError
        If a class has fewer examples.
    """
    labels = torch.as_tensor(dataset.labels)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(dataset.class_names):
        members = (labels == label).nonzero().flatten()
        if len(members) < n_shots:
            raise ValueError(
                f"Class {label} ({name!r}) of {dataset.spec!r} has {len(members)} {dataset.split} examples; {n_shots} shots were asked for."
            )
        chosen += members[torch.randperm(len(members), generator=generator)[:n_shots]].tolist()
    return chosen
