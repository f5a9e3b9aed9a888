"""Masking latents: zero-shot accuracy with only some of them on, or with them off.

Read the residual stream, change some latents, let the network finish, look at the class logits. Three choices make the outcome
believable, and each differs from the official code:

- *Which* latents: rankings come from another split than the one that is evaluated, and only ``choose="oracle"`` looks at the label of the
  image at hand (the paper's procedure, named for what it is). See :mod:`patchsae_utils.interventions.choosing`.
- *The error term*: an SAE's output differs from its input. Kept (z - z_hat is added back), an edit changes nothing but the chosen latents;
  dropped, every number also carries the reconstruction's cost. Raw, reconstructed and error-kept accuracies stand in every table.
- *Sparse edits*: masks are subtractions of the changed latents' decoder rows from the residual stream, and a whole list of ks costs one
  pass over the active latents. Nothing is multiplied by a mask, so zero latents stay zero and no bias is added.

Dimension letters: B batch, T tokens (CLS, then patches), P patches, D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches
from ..run.intervals import bootstrap_mean
from ..run.memory import out_of_memory
from .choosing import CHOICES, MATCH_WINDOW, RANKINGS, Choosing, match_by_weight
from .tail import PLACES, Active, check_models, dataset_head, decoder_of, network_tail

if TYPE_CHECKING:
    from ..latents.summary import LatentSummary
    from ..sae.model import SparseAutoencoder

__all__ = [
    "CHOICES",
    "MATCH_WINDOW",
    "MODES",
    "PLACES",
    "RANKINGS",
    "bootstrap_mean",
    "check_models",
    "dataset_head",
    "match_by_weight",
    "network_tail",
    "sweep_masks",
]

MODES = ("on", "off")
Place = str | np.ndarray | Tensor | Callable[[int], np.ndarray | Tensor]


@out_of_memory("a sweep over masks", "batch_size lower (sweep_masks(..., batch_size=8))")
@torch.no_grad()
def sweep_masks(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    choose: str | Sequence[str] = ("oracle", "predicted", "random"),
    keep_error: bool | Sequence[bool] = False,
    layer: int = -2,
    *,
    class_counts: LatentSummary | Tensor | None = None,
    attribution: Tensor | None = None,
    rank_by: str | Sequence[str] = "count",
    modes: str | Sequence[str] = MODES,
    where: str | Sequence[str] | Mapping[str, Place] = "all",
    head: Tensor | None = None,
    n_random: int = 3,
    groups: str | Sequence | None = None,
    batch_size: int = 32,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Zero-shot accuracy with only the top k latents left on, or with them turned off.

    The network up to ``layer`` runs once an image; each mask runs its tail alone. Extra prompt tokens of an adapted model are never
    read by the SAE and pass unchanged.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model.
    sae : SparseAutoencoder
    dataset : ImageData or OpenMojiData
        What is evaluated: images that neither ``class_counts`` nor ``attribution`` has seen.
    ks : sequence of int
        Numbers of latents, from 0 to S.
    choose : str or sequence of str
        Which latents are ranked first:

        - ``oracle``: those of the image's *true* class. The paper's mask; it knows the label.
        - ``predicted``: of the class that the unmasked model predicts.
        - ``wrong``: of a random class other than the predicted one.
        - ``dataset``: of all classes together.
        - ``random``: latents that are not dead on the train split, drawn ``n_random`` times.
        - ``matched``: for each ``predicted`` latent another one, not among them, that is about as active in this very image and was
          active in about as many images of the train split.
    keep_error : bool or two bools
        Add z - z_hat back, so that the unmasked latents' part of the residual stream stays exact.
    layer : int
        The block whose output the SAE reads.
    class_counts : LatentSummary or Tensor [C, S], optional
        Activation of every latent on every class, from the *train* split. Needed for all choices but ``random``, where its absence means
        that dead latents are drawn too.
    attribution : Attribution or Tensor [C, S], optional
        What each class's logit owes to every latent, from the *train* split (:func:`patchsae_utils.interventions.attribution.attribute_latents`).
    rank_by : str or sequence of str
        How classes rank their latents: ``count`` (tokens where they are active, the paper's), ``attribution``, or both.
    modes : str or sequence of str
        ``on``: keep only the k latents; ``off``: set them to zero.
    where : str, sequence of str, or mapping
        Which tokens are masked: ``all``, ``cls`` or ``patches``; the others keep all their latents. A mapping gives names of its own to
        such places, to boolean grids [H, W] or [P] (every image's), [n_images, H, W] or [n_images, P] (one an image), or to
        functions from an image's index to a boolean grid.
    head : Tensor [C, d_embed], optional
        Zero-shot head; by default made from the data set's class names and templates.
    n_random : int
        Draws of random latents; their outcomes are averaged image by image.
    groups : sequence of length C, or "class", optional
        A name for each class (its task, its tier): the table then also holds every row for the images of each group alone.
        ``"class"``: for each class; two of the same name stay two.
    batch_size : int
    n_bootstrap : int
        Resamples of the images for the 95 % intervals. All rows share them, so that differences of rows can be compared.
    seed : int
    progress : bool
        Show a bar.

    Returns
    -------
    DataFrame
        Columns ``choose, rank`` ("none" where no ranking counts), ``mode, k, where, error`` ("kept" or "dropped"), ``group`` ("all"
        or a name), ``class`` (its index in rows of ``groups="class"``, else -1), ``accuracy, low, high``, ``change, change_low,
        change_high`` (of the accuracy against raw, paired image by image), ``logit, logit_low, logit_high`` (of the true class), ``n``
        (images). The first three rows of a group (``choose == "none"``) are ``raw``, ``reconstructed`` (no mask, error dropped) and
        ``error_kept`` (no mask, error kept).

    Raises
    ------
    ValueError
        For an unknown choice, ranking, mode or place, a k outside 0..S, class counts or groups of another length than the classes, or an empty
        data set.
    MemoryError
        If a batch doesn't fit the memory; says what to set.

    Source: Lim et al., ICLR 2025, section 4.1 and Fig. 5 (choices ``oracle``, ``dataset``, ``random``; ranked by count).
    """
    choose, modes, rank_by = _names(choose, CHOICES, "choose"), _names(modes, MODES, "modes"), _names(rank_by, RANKINGS, "rank_by")
    errors = [bool(value) for value in (keep_error if isinstance(keep_error, Sequence) else [keep_error])]
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 0 or ks[-1] > sae.d_sae or len(ks) > 254:
        raise ValueError(f"ks must be 1 to 254 numbers between 0 and d_sae={sae.d_sae}, got {ks}.")
    check_models(clip, sae, layer)
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to measure on.")
    places = _places(where, len(dataset), clip.grid)
    scores, frequency = _scores(class_counts, attribution, rank_by, choose, dataset.class_names, sae.d_sae)
    members = _members(groups, dataset)
    head = dataset_head(clip, dataset) if head is None else head
    choosing = Choosing(
        scores, ks, choose, sae, frequency, n_classes=len(head), n_images=len(dataset), n_random=n_random, seed=seed
    )  # fmt: skip
    conditions = [(c, r) for c in choose for r in (rank_by if c != "random" else ["none"])]
    decoder, tail = decoder_of(sae), None
    outcomes: dict[tuple, list[Tensor]] = defaultdict(list)

    for batch in batches(dataset, clip.preprocess, batch_size, progress="masks" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        labels = batch.labels.to(clip.device)
        z = residual.tokens
        h = sae.encode(z)
        active, activation = Active.of(h), h.sum(1) if "matched" in choose else None
        del h  # the largest thing here: T * S numbers an image
        latents_alone = active.decode(decoder.rows)
        z_hat = latents_alone + decoder.offset
        error = z - z_hat
        # off: all of it without the chosen latents; on: what is left without any latent, and the chosen ones.
        starts = {("off", True): z, ("off", False): z_hat, ("on", True): z - latents_alone, ("on", False): decoder.offset.expand_as(z)}
        masks = {name: place(batch.indices.tolist()).to(z.device) for name, place in places.items()}

        def judge(tokens, residual=residual, labels=labels, tail=tail):
            logits = clip.logits(tail(residual._replace(tokens=tokens)), head)
            return logits, torch.stack([(logits.argmax(1) == labels).float(), logits.gather(1, labels[:, None])[:, 0]])

        logits, raw = judge(z)
        outcomes["none", "none", "raw", 0, "all", True].append(raw)
        outcomes["none", "none", "reconstructed", 0, "all", False].append(judge(z_hat)[1])
        outcomes["none", "none", "error_kept", 0, "all", True].append(judge(z_hat + error)[1])

        for choice, ranking in conditions:
            tables = choosing.levels(choice, ranking, logits.argmax(1), labels, batch.indices, activation)
            sums: dict[tuple, Tensor] = {}
            for levels in tables:
                entry = levels[active.image if len(levels) > 1 else torch.zeros_like(active.image), active.latent]
                chosen = torch.zeros_like(z)
                for level, k in enumerate(ks):
                    chosen += active.decode(decoder.rows, (entry == level).nonzero()[:, 0])
                    for mode in modes:
                        for keep in errors:
                            start = starts[mode, keep]
                            everywhere = start - chosen if mode == "off" else start + chosen
                            for name, mask in masks.items():
                                tokens = everywhere if name == "all" else torch.where(mask[..., None], everywhere, starts["off", keep])
                                key = (choice, ranking, mode, k, name, keep)
                                sums[key] = sums.get(key, 0) + judge(tokens)[1]
            for key, total in sums.items():
                outcomes[key].append(total / len(tables))

    values = torch.stack([torch.cat(parts, 1) for parts in outcomes.values()]).double().cpu().numpy()  # [rows, 2, images]
    keys = list(outcomes)
    tables = [_tabulate(keys, values[..., chosen], name, label, n_bootstrap, seed) for name, label, chosen in members]
    return pd.concat(tables, ignore_index=True)


def _tabulate(keys: list[tuple], values: np.ndarray, group, label: int, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """One row a condition from values [rows, 2, images]: whether right, and the true class's logit."""
    mean, low, high = bootstrap_mean(values, n_bootstrap, seed)
    change, change_low, change_high = bootstrap_mean(values[:, 0] - values[0, 0], n_bootstrap, seed)  # the first row is raw
    table = pd.DataFrame(keys, columns=["choose", "rank", "mode", "k", "where", "error"]).assign(group=group, **{"class": label})
    table["error"] = table["error"].map({True: "kept", False: "dropped"})
    table["accuracy"], table["low"], table["high"] = mean[:, 0], low[:, 0], high[:, 0]
    table["change"], table["change_low"], table["change_high"] = change, change_low, change_high
    table["logit"], table["logit_low"], table["logit_high"] = mean[:, 1], low[:, 1], high[:, 1]
    return table.assign(n=values.shape[-1])


def _members(groups, dataset) -> list[tuple[str, int, np.ndarray]]:
    """(name, class or -1, bool [n_images]) of each part of the table."""
    labels, names = np.asarray(dataset.labels), dataset.class_names
    members = [("all", -1, np.ones(len(dataset), dtype=bool))]
    if groups is None:
        return members
    if isinstance(groups, str):
        if groups != "class":
            raise ValueError(f"groups must be a name for each class, or 'class'; got {groups!r}.")
        return members + [(names[label], label, labels == label) for label in np.unique(labels).tolist()]
    if len(groups) != len(names):
        raise ValueError(f"groups must name each of the {len(names)} classes of the evaluated data set, got {len(groups)} names.")
    of_images = np.asarray([groups[label] for label in labels.tolist()])
    return members + [(name, -1, of_images == name) for name in dict.fromkeys(of_images.tolist())]


def _places(where, n_images: int, grid: tuple[int, int]) -> dict[str, Callable[[list[int]], Tensor]]:
    """Name -> function from the images' indices to masked tokens, bool [B or 1, 1 + P]."""
    if not isinstance(where, Mapping):
        where = {name: name for name in _names(where, tuple(PLACES), "where")}
    n_patches = grid[0] * grid[1]

    def named(place: str):
        tokens = torch.zeros(1, 1 + n_patches, dtype=torch.bool)
        tokens[:, PLACES[_names(place, tuple(PLACES), "where")[0]]] = True
        return lambda indices: tokens

    def of_grids(name: str, grids):
        grids = torch.as_tensor(grids)
        if grids.dtype != torch.bool or grids.numel() not in (n_patches, n_images * n_patches):
            raise ValueError(
                f"where={name!r} must be a boolean grid [{grid[0]}, {grid[1]}] or [{n_patches}], or one for each of the {n_images} images; "
                f"got {list(grids.shape)} of {grids.dtype}."
            )
        grids = grids.reshape(-1, n_patches).cpu()
        tokens = torch.cat([torch.zeros(len(grids), 1, dtype=torch.bool), grids], 1)
        return lambda indices: tokens if len(tokens) == 1 else tokens[indices]

    def computed(name: str, function: Callable):
        return lambda indices: torch.cat([of_grids(name, _grid(function(index), name, n_patches))(indices) for index in indices])

    found = {}
    for name, place in where.items():
        if isinstance(place, str):
            found[name] = named(place)
        elif callable(place):
            found[name] = computed(name, place)
        else:
            found[name] = of_grids(name, place)
        if name in PLACES and not (isinstance(place, str) and place == name):
            raise ValueError(f"The name {name!r} is taken by all the tokens of that name; call the chosen patches something else.")
    if not found:
        raise ValueError(f"Unknown where={where}. Valid: {', '.join(PLACES)}, or a mapping from names to places.")
    return found


def _grid(grid, name: str, n_patches: int) -> Tensor:
    """One image's grid, as a function gave it."""
    grid = torch.as_tensor(grid)
    if grid.numel() != n_patches:
        raise ValueError(f"The function of where={name!r} must give a boolean grid of {n_patches} patches, got {list(grid.shape)}.")
    return grid


def _names(value: str | Sequence[str], valid: tuple[str, ...], what: str) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    unknown = [name for name in names if name not in valid]
    if unknown or not names:
        raise ValueError(f"Unknown {what}={unknown or names}. Valid: {', '.join(valid)}.")
    return list(dict.fromkeys(names))


def _scores(counts, attribution, rank_by, choose, class_names, d_sae: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """How high each ranking puts every latent for every class, and how often latents are active on the train split."""
    scores = {}
    for what, table, tensor, made in (
        ("class_counts", counts, "class_counts", "summarize_latents(clip, sae, <train split>, layer)"),
        ("attribution", attribution, "scores", "attribute_latents(clip, sae, <train split>, layer)"),
    ):
        if table is None:
            continue
        if list(getattr(table, "class_names", class_names)) != list(class_names):
            raise ValueError(
                f"The classes of {what} are not those of the evaluated data set: make it from the train split of the same one."
            )
        values = torch.as_tensor(getattr(table, tensor, table))
        if tuple(values.shape) != (len(class_names), d_sae):
            raise ValueError(
                f"{what} must be [{len(class_names)} classes of the evaluated data set, {d_sae} latents], got {list(values.shape)}. "
                f"Make it from the train split of the same data set with the same SAE: {made}."
            )
        scores["count" if what == "class_counts" else "attribution"] = values.float()
    frequency = torch.as_tensor(counts.frequency) if hasattr(counts, "frequency") else None
    frequency = scores["count"].sum(0) if frequency is None and "count" in scores else frequency
    if set(choose) == {"random"}:
        return {}, frequency
    for ranking in rank_by:
        if ranking not in scores:
            given = "class_counts=summarize_latents" if ranking == "count" else "attribution=attribute_latents"
            raise ValueError(
                f"choose={list(choose)} with rank_by={ranking!r} ranks latents by class: give {given}(clip, sae, <train split>, layer). "
                f"Without it only choose='random' is possible."
            )
    return {ranking: scores[ranking] for ranking in rank_by}, frequency
