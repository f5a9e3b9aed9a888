"""Masking latents: zero-shot accuracy with only some of them on, or with them off.

Read the residual stream, change some latents, let the network finish, look at the class logits. Three choices make the outcome
believable, and each differs from the official code:

- *Which* latents: rankings come from another split than the one that is evaluated, and only ``choose="oracle"`` looks at the label of the
  image at hand (the paper's procedure, named for what it is).
- *The error term*: an SAE's output differs from its input. Kept (z - z_hat is added back), an edit changes nothing but the chosen latents;
  dropped, every number also carries the reconstruction's cost. Raw, reconstructed and error-kept accuracies stand in every table.
- *Sparse edits*: masks are subtractions of the changed latents' decoder rows from the residual stream, and a whole list of ks costs one
  pass over the active latents. Nothing is multiplied by a mask, so zero latents stay zero and no bias is added.

Dimension letters: B batch, T tokens (CLS, then patches), D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import ClipModel, Residual
from .data import batches, templates_for

CHOICES = ("oracle", "predicted", "wrong", "dataset", "random", "matched")
MODES = ("on", "off")
PLACES = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}
MATCH_WINDOW = 4
"""A control is drawn among so many latents on either side of the one it replaces, in order of activation."""


# -- masking ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sweep_masks(
    clip: ClipModel,
    sae: nn.Module,
    dataset,
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    choose: str | Sequence[str] = ("oracle", "predicted", "random"),
    keep_error: bool | Sequence[bool] = False,
    layer: int = -2,
    *,
    class_counts: Tensor | None = None,
    modes: str | Sequence[str] = MODES,
    where: str | Sequence[str] = "all",
    head: Tensor | None = None,
    n_random: int = 3,
    groups: Sequence | None = None,
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
        What is evaluated: images that ``class_counts`` has not seen.
    ks : sequence of int
        Numbers of latents, from 0 to S.
    choose : str or sequence of str
        Which latents are ranked first:

        - ``oracle``: the most active ones on the image's *true* class. The paper's mask; it knows the label.
        - ``predicted``: on the class that the unmasked model predicts.
        - ``wrong``: on a random class other than the predicted one.
        - ``dataset``: on all classes together.
        - ``random``: latents that are not dead on the train split, drawn ``n_random`` times.
        - ``matched``: for each ``predicted`` latent another one, not among them, that is about as active in this very image.
    keep_error : bool or two bools
        Add z - z_hat back, so that the unmasked latents' part of the residual stream stays exact.
    layer : int
        The block whose output the SAE reads.
    class_counts : Tensor [C, S], optional
        Activation of every latent on every class, from the *train* split: a ``LatentSummary``, or its ``class_counts``. Needed for all
        choices but ``random``, where its absence means that dead latents are drawn too.
    modes : str or sequence of str
        ``on``: keep only the k latents; ``off``: set them to zero.
    where : str or sequence of str
        Which tokens are masked: ``all``, ``cls`` or ``patches``. The others keep all their latents.
    head : Tensor [C, d_embed], optional
        Zero-shot head; by default made from the data set's class names and templates.
    n_random : int
        Draws of random latents; their outcomes are averaged image by image.
    groups : sequence of length C, optional
        A name for each class (its task, its tier, itself): the table then also holds every row for the images of each group alone.
    batch_size : int
    n_bootstrap : int
        Resamples of the images for the 95 % intervals. All rows share them, so that differences of rows can be compared.
    seed : int
    progress : bool
        Show a bar.

    Returns
    -------
    DataFrame
        Columns ``choose, mode, k, where, error`` ("kept" or "dropped"), ``group`` ("all" or a name), ``accuracy, low, high``,
        ``change, change_low, change_high`` (of the accuracy against raw, paired image by image), ``logit, logit_low, logit_high`` (of
        the true class), ``n`` (images). The first three rows of a group (``choose == "none"``) are ``raw``, ``reconstructed`` (no mask,
        error dropped) and ``error_kept`` (no mask, error kept).

    Raises
    ------
    ValueError
        For an unknown choice, mode or place, a k outside 0..S, or class counts or groups of another length than the classes.

    Source: Lim et al., ICLR 2025, section 4.1 and Fig. 5 (choices ``oracle``, ``dataset``, ``random``).
    """
    choose, modes, places = _names(choose, CHOICES, "choose"), _names(modes, MODES, "modes"), _names(where, tuple(PLACES), "where")
    errors = [bool(value) for value in (keep_error if isinstance(keep_error, Sequence) else [keep_error])]
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 0 or ks[-1] > sae.d_sae or len(ks) > 254:
        raise ValueError(f"ks must be 1 to 254 numbers between 0 and d_sae={sae.d_sae}, got {ks}.")
    check_models(clip, sae, layer)
    counts = _checked_counts(class_counts, choose, dataset.class_names, sae.d_sae)
    if groups is not None and len(groups) != len(dataset.class_names):
        raise ValueError(
            f"groups must name each of the {len(dataset.class_names)} classes of the evaluated data set, got {len(groups)} names."
        )
    head = dataset_head(clip, dataset) if head is None else head
    ranking = _Ranking(counts, ks, choose, sae, len(head), n_images=len(dataset), n_random=n_random, seed=seed)
    tail = None
    outcomes: dict[tuple, list[Tensor]] = defaultdict(list)

    for batch in batches(dataset, clip.preprocess, batch_size, progress="masks" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        labels = batch.labels.to(clip.device)
        z = residual.tokens
        h = sae.encode(z)
        z_hat = sae.decode(h)
        active = _Active.of(h)

        def judge(tokens, residual=residual, labels=labels, tail=tail):
            logits = clip.logits(tail(residual._replace(tokens=tokens)), head)
            return logits, torch.stack([(logits.argmax(1) == labels).float(), logits.gather(1, labels[:, None])[:, 0]])

        logits, raw = judge(z)
        outcomes["none", "raw", 0, "all", True].append(raw)
        outcomes["none", "reconstructed", 0, "all", False].append(judge(z_hat)[1])
        outcomes["none", "error_kept", 0, "all", True].append(judge(z_hat + (z - z_hat))[1])

        for choice in choose:
            tables = ranking.levels(choice, logits.argmax(1), labels, batch.indices, h)
            sums: dict[tuple, Tensor] = {}
            for levels in tables:
                chosen = torch.zeros_like(z)
                for level, k in enumerate(ks):
                    chosen += active.decode(sae.W_dec, levels, level)
                    for mode in modes:
                        removed = chosen if mode == "off" else z_hat - sae.b_dec - chosen
                        for place in places:
                            for keep in errors:
                                tokens = (z if keep else z_hat).clone()
                                tokens[:, PLACES[place]] -= removed[:, PLACES[place]]
                                key = (choice, mode, k, place, keep)
                                sums[key] = sums.get(key, 0) + judge(tokens)[1]
            for key, total in sums.items():
                outcomes[key].append(total / len(tables))

    values = torch.stack([torch.cat(parts, 1) for parts in outcomes.values()]).double().cpu().numpy()  # [rows, 2, images]
    members = {"all": np.ones(len(dataset), dtype=bool)}
    if groups is not None:
        names = np.asarray([groups[label] for label in dataset.labels.tolist()])
        members |= {name: names == name for name in dict.fromkeys(names.tolist())}
    return pd.concat(
        [_tabulate(list(outcomes), values[..., chosen], name, n_bootstrap, seed) for name, chosen in members.items()], ignore_index=True
    )


def bootstrap_mean(values, n_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis with a percentile bootstrap interval; rows share the resamples.

    Parameters
    ----------
    values : array [..., N]
        One value an image (or scene, or concept): what is resampled.
    n_resamples : int
    seed : int
    level : float
        Coverage of the interval.

    Returns
    -------
    mean, low, high : arrays [...]

    Raises
    ------
    ValueError
        If there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.shape[-1]
    if n == 0:
        raise ValueError("There is nothing to resample: the last axis is empty.")
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    means = values @ weights.T
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return values.mean(-1), low, high


class _Active(NamedTuple):
    """The positive latents of a batch, listed token by token."""

    token: Tensor
    """[N] place in the flattened [B * T], rising."""
    latent: Tensor
    """[N]"""
    value: Tensor
    """[N]"""
    shape: tuple[int, int]
    """(B, T)"""

    @classmethod
    def of(cls, h: Tensor) -> _Active:
        flat = h.flatten(0, 1)
        token, latent = flat.nonzero(as_tuple=True)
        return cls(token, latent, flat[token, latent], tuple(h.shape[:2]))

    def decode(self, W_dec: Tensor, levels: Tensor, level: int) -> Tensor:
        """Sum of value times decoder row over the latents of one level ([B, S] or [1, S]): [B, T, D], without b_dec."""
        n_images, n_tokens = self.shape
        image = self.token // n_tokens if len(levels) > 1 else torch.zeros_like(self.token)
        chosen = (levels[image, self.latent] == level).nonzero()[:, 0]
        ends = torch.bincount(self.token[chosen], minlength=n_images * n_tokens).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rows = F.embedding_bag(self.latent[chosen], W_dec, starts, mode="sum", per_sample_weights=self.value[chosen])
        return rows.view(n_images, n_tokens, -1)


class _Ranking:
    """For each way to choose latents: at which entry of ks each latent comes in (its level; ``len(ks)``: at none of them).

    Labels are read for ``oracle`` alone.
    """

    def __init__(self, counts, ks, choose, sae, n_classes, *, n_images, n_random, seed):
        self.ks, self.seed, device = ks, seed, sae.W_dec.device
        rng = np.random.default_rng(seed)
        self.wrong = torch.from_numpy(rng.integers(1, max(n_classes, 2), n_images)).to(device)  # steps from the predicted class
        self.n_classes = n_classes
        if set(choose) - {"random", "dataset"}:
            self.classes = self._levels(counts.argsort(dim=1, descending=True, stable=True)).to(device)
        if "dataset" in choose:
            self.dataset = self._levels(counts.sum(0).argsort(dim=0, descending=True, stable=True)[None]).to(device)
        if "random" in choose:
            alive = np.arange(sae.d_sae) if counts is None else (counts.sum(0) > 0).nonzero()[:, 0].cpu().numpy()
            self.random = [self._levels(torch.from_numpy(rng.permutation(alive))[None], sae.d_sae).to(device) for _ in range(n_random)]

    def _levels(self, order: Tensor, n_latents: int | None = None) -> Tensor:
        """Rankings [R, n] to levels [R, S], bytes."""
        levels = torch.full((len(order), n_latents or order.shape[1]), len(self.ks), dtype=torch.uint8, device=order.device)
        for level in reversed(range(len(self.ks))):
            levels.scatter_(1, order[:, : self.ks[level]], level)
        return levels

    def levels(self, choice: str, predicted: Tensor, labels: Tensor, indices: Tensor, h: Tensor) -> list[Tensor]:
        """Tables [B, S] or [1, S] of levels: one, or for ``random`` one a draw."""
        match choice:
            case "oracle":
                return [self.classes[labels]]
            case "predicted":
                return [self.classes[predicted]]
            case "wrong":
                return [self.classes[(predicted + self.wrong[indices.to(predicted.device)]) % self.n_classes]]
            case "dataset":
                return [self.dataset]
            case "random":
                return self.random
        return [self._matched(self.classes[predicted], indices, h.sum(1))]

    def _matched(self, levels: Tensor, indices: Tensor, activation: Tensor) -> Tensor:
        """Hand each image's levels on to other latents of about the same activation ([B, S], summed over tokens) in the same image."""
        matched = np.full(levels.shape, len(self.ks), np.uint8)
        levels, activation = levels.cpu().numpy(), activation.cpu().numpy()
        for i, index in enumerate(indices.tolist()):
            targets = np.flatnonzero((levels[i] < len(self.ks)) & (activation[i] > 0))
            pool = np.flatnonzero((levels[i] == len(self.ks)) & (activation[i] > 0))
            targets = targets[np.argsort(levels[i, targets], kind="stable")]
            for target, partner in match_by_weight(targets, pool, activation[i], np.random.default_rng([self.seed, index])):
                matched[i, partner] = levels[i, target]
        return torch.from_numpy(matched).to(self.classes.device)


def match_by_weight(targets: np.ndarray, pool: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Pairs (target, partner): for each target in turn a random one of the pool's members that are nearest in weight, none twice.

    Ends early when the pool is exhausted.
    """
    partners = pool[np.argsort(weights[pool], kind="stable")].tolist()
    keys = weights[partners].tolist()
    for target in targets.tolist():
        if not partners:
            return
        place = bisect_left(keys, weights[target])
        low = max(0, min(place - MATCH_WINDOW, len(keys) - 2 * MATCH_WINDOW))
        chosen = int(rng.integers(low, min(len(keys), low + 2 * MATCH_WINDOW)))
        keys.pop(chosen)
        yield target, partners.pop(chosen)


def _tabulate(keys: list[tuple], values: np.ndarray, group, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """One row a condition from values [rows, 2, images]: whether right, and the true class's logit."""
    mean, low, high = bootstrap_mean(values, n_bootstrap, seed)
    change, change_low, change_high = bootstrap_mean(values[:, 0] - values[0, 0], n_bootstrap, seed)  # the first row is raw
    table = pd.DataFrame(keys, columns=["choose", "mode", "k", "where", "error"]).assign(group=group)
    table["error"] = table["error"].map({True: "kept", False: "dropped"})
    table["accuracy"], table["low"], table["high"] = mean[:, 0], low[:, 0], high[:, 0]
    table["change"], table["change_low"], table["change_high"] = change, change_low, change_high
    table["logit"], table["logit_low"], table["logit_high"] = mean[:, 1], low[:, 1], high[:, 1]
    return table.assign(n=values.shape[-1])


# -- shared with steering and effects ---------------------------------------------------------------------------------


def network_tail(clip: ClipModel, layer: int, sample: Residual) -> Callable[[Residual], Tensor]:
    """The rest of the network after ``layer``, for many calls.

    One block before the end the image feature reads CLS alone, so that only one query is needed: keys fold into it and values into its
    output, which costs T * D operations a head instead of T * D * D. Used only where it gives the same features as ``clip.finish``
    on ``sample``; otherwise this is ``clip.finish`` (other layers, other poolings, adapters that act in the last block).

    Returns
    -------
    callable
        Residual -> image features [B, d_embed].
    """

    def whole(residual: Residual) -> Tensor:
        return clip.finish(residual, layer)

    if clip.layer_index(layer) != clip.n_layers - 2 or clip.precision != "fp32" or clip.visual.proj is None:
        return whole
    block, visual = clip.blocks[-1], clip.visual
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None or attention.in_proj_bias is None:
        return whole
    heads, width = attention.num_heads, attention.embed_dim
    W_q, W_k, W_v = attention.in_proj_weight.chunk(3)
    b_q, _, b_v = attention.in_proj_bias.chunk(3)  # the keys' bias adds the same to every score: softmax doesn't see it
    W_k, W_v = W_k.view(heads, -1, width), W_v.view(heads, -1, width)

    def class_token_alone(residual: Residual) -> Tensor:
        x = residual.tokens if residual.extra is None else torch.cat([residual.tokens, residual.extra], 1)
        y = block.ln_1(x)
        query = F.linear(y[:, 0], W_q, b_q).view(len(x), heads, -1) * (width // heads) ** -0.5
        scores = torch.einsum("bhe,hed->bhd", query, W_k) @ y.transpose(1, 2)
        mean = scores.softmax(-1) @ y
        value = torch.einsum("bhd,hed->bhe", mean, W_v).flatten(1) + b_v
        cls = x[:, 0] + block.ls_1(attention.out_proj(value))
        cls = cls + block.ls_2(block.mlp(block.ln_2(cls)))
        return visual.ln_post(cls) @ visual.proj

    with torch.no_grad():
        fast, slow = (F.normalize(run(sample), dim=-1) for run in (class_token_alone, whole))
    return class_token_alone if torch.allclose(fast, slow, rtol=0, atol=1e-4) else whole


def dataset_head(clip: ClipModel, dataset) -> Tensor:
    """The zero-shot head [C, d_embed] of a data set's classes, by its own templates (or an adapted model's learned prompts)."""
    return clip.zero_shot_head(dataset.class_names, templates_for(dataset.spec))


def check_models(clip: ClipModel, sae: nn.Module, layer: int) -> None:
    """Refuse an SAE of another width or on another device than the model, and an unknown layer."""
    clip.layer_index(layer)
    if sae.d_in != clip.width:
        raise ValueError(
            f"The SAE reads {sae.d_in}-dimensional activations; {clip.name!r} has width {clip.width}. Load the SAE that was trained on it."
        )
    if sae.W_dec.device.type != clip.device.type:
        raise ValueError(f"The SAE is on {sae.W_dec.device}, the model on {clip.device}. Move it: sae.to(clip.device).")


def _names(value: str | Sequence[str], valid: tuple[str, ...], what: str) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    unknown = [name for name in names if name not in valid]
    if unknown or not names:
        raise ValueError(f"Unknown {what}={unknown or names}. Valid: {', '.join(valid)}.")
    return list(dict.fromkeys(names))


def _checked_counts(counts, choose: Sequence[str], class_names: Sequence[str], d_sae: int) -> Tensor | None:
    if list(getattr(counts, "class_names", class_names)) != list(class_names):
        raise ValueError("The summary's classes are not those of the evaluated data set: summarise the train split of the same data set.")
    counts = getattr(counts, "class_counts", counts)
    if counts is None:
        if set(choose) == {"random"}:
            return None
        raise ValueError(
            f"choose={list(choose)} ranks latents by class: give class_counts=summarize_latents(clip, sae, <train split>, layer). "
            f"Without it only choose='random' is possible."
        )
    counts = torch.as_tensor(counts)
    if tuple(counts.shape) != (len(class_names), d_sae):
        raise ValueError(
            f"class_counts must be [{len(class_names)} classes of the evaluated data set, {d_sae} latents], got {list(counts.shape)}. "
            f"Summarise the train split of the same data set with the same SAE."
        )
    return counts.float()
