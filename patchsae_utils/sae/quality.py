"""How good an SAE is: what it reconstructs, how sparsely, what CLIP still knows after its stream went through it, and why latents are dead.

Letters: B batch, T tokens, N tokens of any images, D d_in, S d_sae.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import batches, templates_for
from ..data.truth import patch_shares
from ..run.intervals import Interval, interval, percent
from .losses import normalized_squared_error
from .model import SparseAutoencoder

TOKEN_TYPES = {"cls": slice(0, 1), "patch": slice(1, None), "all": slice(None)}
RECONSTRUCTION_METRICS = ("mse", "l1", "l0", "explained_variance", "dead_fraction")
CLASSIFICATION_METRICS = ("contrastive_loss", "zero_shot_top1", "zero_shot_change")
_ENOUGH_IMAGES = 8  # to know their tokens' mean and spread


@torch.no_grad()
def evaluate_sae(
    clip, sae: SparseAutoencoder | Mapping[str, SparseAutoencoder], dataset, layer: int, *, batch_size: int = 64, progress: bool = True
) -> pd.DataFrame:
    """Measure SAEs on a data set that they were not trained on.

    Parameters
    ----------
    clip : ClipModel, or an adapted model: how well does the SAE read *its* residual stream?
    sae : SparseAutoencoder or mapping of name to SparseAutoencoder; several are measured on the same images, in one pass of the model
    dataset : ImageData or OpenMojiData
    layer : int, the block whose output goes through the SAE
    batch_size, progress : int, bool

    Returns
    -------
    DataFrame, tidy
        ``sae``, ``variant``, ``tokens``, ``metric``, ``value``, ``low``, ``high`` (95% over images; NaN for ``dead_fraction``). ``variant``
        is what went into the blocks behind ``layer``: ``raw``, the ``reconstruction``, or that with its error added back (``error_kept``);
        ``tokens`` which tokens were replaced (``none`` for raw). Of N tokens x of a type, x_hat their reconstructions, h their latents:

        - ``mse`` = 1 / (N D) sum_x ||x_hat - x||^2 / ||x||, as in the paper's loss; ``l1``, ``l0``: means of sum_s h_s and #{s: h_s > 0}.
        - ``explained_variance`` = 1 - sum_x ||x - x_hat||^2 / sum_x ||x - m||^2, m the mean of x.
        - ``dead_fraction`` = 1 / S #{s: h_s = 0 for all x}.
        - With a text tower, and labels, of an image's logits over the class prompts: ``contrastive_loss``, the mean cross-entropy in nats;
          ``zero_shot_top1``, the share of hits; ``zero_shot_change``, that share minus the raw one.

    An SAE of another width, layer or model, activations unlike those of training, and an empty data set raise ``ValueError``.
    """
    layer, saes = clip.layer_index(layer), {"SAE": sae} if isinstance(sae, SparseAutoencoder) else dict(sae)
    for each in saes.values():
        each.check_model(clip, layer, each.metadata.get("tokens") or "all")  # kinds of tokens are told apart
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to evaluate on.")
    head = clip.zero_shot_head(dataset.class_names, templates_for(dataset.spec)) if clip.has_text and dataset.class_names else None
    tallies, first = {name: _Tally(each) for name, each in saes.items()}, True

    for batch in batches(dataset, clip.preprocess, batch_size, progress="evaluating the SAE" if progress else None):
        residual = clip.run_to(batch.images, layer)

        def outcome(tokens, residual=residual, labels=batch.labels):
            if head is None:
                return torch.zeros(len(tokens), 0)
            logits = clip.logits(clip.finish(residual._replace(tokens=tokens), layer), head).cpu()
            return torch.stack([F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).float()], 1)

        if first and len(batch.images) >= _ENOUGH_IMAGES:
            for each in saes.values():
                each.check_statistics(residual.tokens.to(each.W_enc.device), f"the activations of {clip.name!r} on {dataset.spec!r}")
        first = False
        raw = outcome(residual.tokens)
        for tally in tallies.values():
            tally.add(residual.tokens, raw, outcome)
    rows = [(name, *row) for name, tally in tallies.items() for row in tally.rows()]
    return pd.DataFrame(rows, columns=["sae", "variant", "tokens", "metric", "value", "low", "high"])


class _Tally:
    """What one SAE did to the images seen so far."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self.fired = {name: torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device) for name in TOKEN_TYPES}
        self.token_sums, self.outcomes = defaultdict[str, list[np.ndarray]](list), defaultdict[tuple[str, str], list[Tensor]](list)

    def add(self, x: Tensor, raw: Tensor, outcome: Callable[[Tensor], Tensor]) -> None:
        """Count a batch [B, T, D]; ``outcome`` turns tokens into (loss, hit) of each image [B, 2], ``raw`` is that of ``x``."""
        output = read_tokens(self.sae, x)
        self.outcomes["raw", "none"].append(raw)
        for name, part in TOKEN_TYPES.items():
            self.token_sums[name].append(_image_sums(x, output, part))
            self.fired[name] |= output.fired[name]
            spliced = x.clone()
            spliced[:, part] = output.reconstruction[:, part]
            self.outcomes["reconstruction", name].append(outcome(spliced))
        self.outcomes["error_kept", "all"].append(outcome(output.reconstruction + (x - output.reconstruction)))

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """(variant, tokens, metric, value, low, high)."""
        for name, parts in self.token_sums.items():
            for metric, *estimate in _estimates(RECONSTRUCTION_METRICS[:4], _reconstruction_metrics, np.concatenate(parts)):
                yield "reconstruction", name, metric, *estimate
            yield "reconstruction", name, "dead_fraction", (~self.fired[name]).double().mean().item(), np.nan, np.nan
        raw = torch.cat(self.outcomes["raw", "none"])[:, 1:]
        if not raw.numel():
            return  # a model without words, or images without labels
        for (variant, tokens), parts in self.outcomes.items():
            outcome = torch.cat(parts)
            table = torch.cat([outcome, outcome[:, 1:] - raw, torch.ones(len(outcome), 1)], 1).double().numpy()
            for metric, *estimate in _estimates(CLASSIFICATION_METRICS, lambda total: (total[:, :3] / total[:, 3:]).T, table):
                if (variant, metric) != ("raw", "zero_shot_change"):
                    yield variant, tokens, metric, *estimate


def _estimates(names: tuple[str, ...], measure: Callable[[np.ndarray], Any], sums: np.ndarray) -> Iterator[tuple[str, float, float, float]]:
    """(name, value, low, high) of measures of each image's sums [n, ...]; ``measure`` takes their totals [R, ...] and returns them by name."""
    found = interval(lambda weights: np.stack(list(measure(weights @ sums)), 1), len(sums), "images")
    yield from zip(names, found.value, found.low, found.high, strict=True)


def evaluation_table(frame: pd.DataFrame) -> pd.DataFrame:
    """What :func:`evaluate_sae` measured (``frame``): a row for each SAE, variant and token type; cells "value [low, high]".

    Parameters
    ----------
    frame : DataFrame
    """

    def cell(row) -> str:
        style = ".3g" if row.metric == "mse" else ".3f" if row.metric not in ("l0", "l1") else ".1f"
        value, low, high = (format(number, style) for number in (row.value, row.low, row.high))
        return value if np.isnan(row.low) else f"{value} [{low}, {high}]"

    cells = frame.assign(cell=[cell(row) for row in frame.itertuples()])
    keys = ["sae", "variant", "tokens"]
    table = cells.pivot(index=keys, columns="metric", values="cell")
    columns = [metric for metric in (*RECONSTRUCTION_METRICS, *CLASSIFICATION_METRICS) if metric in table]
    return table.loc[list(dict.fromkeys(frame[keys].itertuples(index=False, name=None))), columns].fillna("")


def evaluation_sentence(frame: pd.DataFrame) -> str:
    """What :func:`evaluate_sae` measured on all tokens, in words, SAE by SAE.

    Parameters
    ----------
    frame : DataFrame
    """
    rows = frame[(frame["variant"] == "reconstruction") & (frame["tokens"] == "all")].set_index(["sae", "metric"])[["value", "low", "high"]]
    said = []
    for name in frame["sae"].unique():
        of = rows.loc[name]
        value, low, high = of.loc["explained_variance"]
        said.append(f"{name} {percent(value, low, high, 1)} of the variance with {of.value['l0']:.0f} latents per token")
        if "zero_shot_change" in of.index:
            said[-1] += f", CLIP's accuracy changed by {Interval(*100 * of.loc['zero_shot_change'])} points"
    return f"Explained on unseen pictures: {'; '.join(said)}."


def places_sentence(places: pd.DataFrame) -> str:
    """What :func:`readings_by_place` measured, in words.

    Parameters
    ----------
    places : DataFrame
    """
    at = places.set_index(["place", "metric"])[["value", "low", "high"]]
    objects, bare = (
        f"{Interval(*at.loc[(place, 'l0')])} latents and an error of {percent(*at.loc[(place, 'error')])} of its norm"
        for place in ("object", "background")
    )
    return f"A patch of an object has {objects}; a patch of bare background {bare}."


class TokenReadings(NamedTuple):
    """What an SAE does to each token, without the latents themselves: those would be [B, T, S]."""

    reconstruction: Tensor  # [B, T, D]
    l1: Tensor  # [B, T] sum of the latents
    l0: Tensor  # [B, T] number of active latents
    fired: dict[str, Tensor]  # token type -> bool [S]: fired on one of its tokens


@torch.no_grad()
def read_tokens(sae: SparseAutoencoder, x: Tensor) -> TokenReadings:
    """Encode and decode images' tokens [B, T, D], CLS first, some at a time."""
    flat = x.reshape(-1, x.shape[-1]).to(sae.W_enc.device)
    is_cls = (torch.arange(len(flat), device=flat.device) % x.shape[1]) == 0
    fired = {name: torch.zeros(sae.d_sae, dtype=torch.bool, device=flat.device) for name in ("cls", "patch")}
    parts, rows = [], sae.tokens_at_once
    for chunk, chunk_is_cls in zip(flat.split(rows), is_cls.split(rows), strict=True):
        h = sae.encode(chunk)
        parts.append((sae.decode(h), h.sum(1), h.count_nonzero(dim=1)))
        fires = h > 0
        for name, of_type in (("cls", chunk_is_cls), ("patch", ~chunk_is_cls)):
            fired[name] |= (fires & of_type[:, None]).any(0)
    reconstruction, l1, l0 = (torch.cat(part).unflatten(0, x.shape[:2]).to(x.device) for part in zip(*parts, strict=True))
    return TokenReadings(reconstruction, l1, l0, {**fired, "all": fired["cls"] | fired["patch"]})


@torch.no_grad()
def readings_by_place(clip, sae: SparseAutoencoder, dataset, layer: int) -> pd.DataFrame:
    """Active latents (l0) and errors ||x - x_hat|| / ||x|| of patches on objects and on bare background, by the ground truth.

    Parameters
    ----------
    clip, sae, layer : ClipModel, SparseAutoencoder and int
    dataset : OpenMojiData, or any with ``truth(i).background_share`` [rows, columns]: the share of each patch that no object covers

    Returns ``place`` (``object``: at least half covered; ``background``: at least 90% bare), ``metric`` (``l0`` or ``error``), ``value``,
    ``low``, ``high``: means over patches, 95% intervals over images.
    """
    sae.check_model(clip, layer)
    sums = []
    for batch in batches(dataset, clip.preprocess, 64, progress="readings"):
        read = read_tokens(sae, x := clip.residual(batch.images, layer))
        error = (x - read.reconstruction).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)
        readings = torch.stack([read.l0.float(), error], 1)[..., 1:].unflatten(2, clip.grid).double().cpu().numpy()
        bare = patch_shares(np.stack([dataset.truth(int(i)).background_share for i in batch.indices]), clip)
        places = np.stack([bare <= 0.5, bare >= 0.9], 1)  # [B, places, rows, columns]
        of_readings = (readings[:, None] * places[:, :, None]).sum((3, 4))
        sums.append(np.concatenate([places.sum((2, 3))[..., None], of_readings], 2).reshape(len(bare), -1))
    names = [(place, metric) for place in ("object", "background") for metric in ("l0", "error")]

    def means(total: np.ndarray) -> list[np.ndarray]:
        return [total[:, 3 * place + 1 + metric] / total[:, 3 * place] for place in (0, 1) for metric in (0, 1)]

    rows = [(*name, *row) for name, (_, *row) in zip(names, _estimates(("",) * 4, means, np.concatenate(sums)), strict=True)]
    return pd.DataFrame(rows, columns=["place", "metric", "value", "low", "high"])


@torch.no_grad()
def firing_rates(sae: SparseAutoencoder, tokens: Iterable[Tensor], n_tokens: int = 200_000) -> Tensor:
    """Share of tokens on which each latent fires: Tensor [S] in [0, 1]. No tokens at all are a ``ValueError``.

    Parameters
    ----------
    sae : SparseAutoencoder
    tokens : iterable of Tensor [N, D], e.g. ``store.tokens(4096)``
    n_tokens : int; stop after so many
    """
    return _rates(sae, tokens, n_tokens, "firing_rates got no")[0].float()


def _rates(sae: SparseAutoencoder, tokens: Iterable[Tensor], n_tokens: int, none: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first tokens: the share on which each latent fires [S], its largest pre-activation [S], the largest ||x - b_dec|| []."""
    device, seen = sae.W_enc.device, 0
    fired, largest = torch.zeros(sae.d_sae, dtype=torch.long, device=device), torch.full((sae.d_sae,), -torch.inf, device=device)
    longest = torch.zeros((), device=device)
    for batch in tokens:
        for x in batch[: n_tokens - seen].to(device).split(sae.tokens_at_once):
            pre_activations = sae.pre_activations(x)
            fired += (sae.activate(pre_activations) > 0).sum(0)
            largest = torch.maximum(largest, pre_activations.amax(0))
            lengths = (x - sae.b_dec).norm(dim=1) / (sae.sizes(x).squeeze(1) if sae.token_norm else 1)
            longest, seen = torch.maximum(longest, lengths.amax()), seen + len(x)
        if seen >= n_tokens:
            break
    if seen == 0:
        raise ValueError(f"{none} tokens.")
    return fired.cpu().double() / seen, largest, longest


@torch.no_grad()
def dead_causes(sae: SparseAutoencoder, train: Iterable[Tensor], test: Iterable[Tensor], n_tokens: int = 200_000) -> pd.DataFrame:
    """Whether each latent fires, on tokens it was trained on and on others, and if it never does, what keeps it from it.

    With z = (x - b_dec) w + b its pre-activation of a token x, and t what z must exceed (its ``threshold``, else 0):

    - ``alive``: it fires on a test token; ``train_only``: on train tokens alone.
    - ``bias``: on neither, and no token as long as the longest could make it: ||w|| max ||x - b_dec|| + b <= t (Cauchy-Schwarz).
    - ``outcompeted``: on neither, though z was positive on some token; ``starved``: z never was, yet a token of the right direction would do.

    Parameters
    ----------
    sae : SparseAutoencoder
    train, test : iterable of Tensor [n, D], e.g. ``store.tokens(4096)`` of the training images, and of others; none is a ``ValueError``
    n_tokens : int; of each, the first so many

    Returns a row a latent: ``cause``; ``train_rate``, ``test_rate``: share of tokens on which it fires; ``largest``: the largest z - t;
    ``bound``: see ``bias``, minus t.
    """
    train_rate, *of_train = _rates(sae, train, n_tokens, "dead_causes got no train")
    test_rate, *of_test = _rates(sae, test, n_tokens, "dead_causes got no test")
    largest, longest = map(torch.maximum, of_train, of_test)
    needed = 0 if sae.threshold is None else sae.threshold
    bound = (sae.W_enc.norm(dim=0) * longest + sae.b_enc - needed).cpu().numpy()
    rates = {"train_rate": train_rate.numpy(), "test_rate": test_rate.numpy()}
    frame = pd.DataFrame({"cause": "starved", **rates, "largest": (largest - needed).cpu().numpy(), "bound": bound})
    frame.loc[largest.cpu().numpy() > 0, "cause"] = "outcompeted"
    frame.loc[bound <= 0, "cause"] = "bias"
    frame.loc[frame["train_rate"] > 0, "cause"] = "train_only"
    frame.loc[frame["test_rate"] > 0, "cause"] = "alive"
    return frame.rename_axis("latent")


def _image_sums(x: Tensor, output: TokenReadings, part: slice) -> np.ndarray:
    """What each image adds to the sums of one token type: [B, 6 + D] = tokens, error/norm, L1, L0, ||error||^2, ||x||^2, x."""
    x, reconstruction = x[:, part], output.reconstruction[:, part]
    terms = [
        torch.full((len(x),), float(x.shape[1]), device=x.device), normalized_squared_error(x, reconstruction).mean(-1).sum(1),
        output.l1[:, part].sum(1), output.l0[:, part].sum(1),
        (x - reconstruction).double().square().sum((1, 2)), x.double().square().sum((1, 2)),
    ]  # fmt: skip
    return torch.cat([torch.stack([term.double() for term in terms], 1), x.double().sum(1)], 1).cpu().numpy()


def _reconstruction_metrics(total: np.ndarray) -> list[np.ndarray]:
    """The first four of ``RECONSTRUCTION_METRICS`` from sums [R, 6 + D]."""
    n, mse, l1, l0, error, square = (total[:, i] for i in range(6))
    variance = square - (total[:, 6:] ** 2).sum(-1) / n
    known = variance > 1e-12 * square  # else rounding would decide
    explained = 1 - np.divide(error, variance, out=np.full_like(variance, np.nan), where=known)
    return [mse / n, l1 / n, l0 / n, explained]
