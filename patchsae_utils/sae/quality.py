"""How good an SAE is: what it reconstructs, how sparsely, and what CLIP still knows after its residual stream went through it.

Everything is measured on all images given, by token type (CLS, patches, all), with 95 % intervals from a bootstrap over images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import batches, templates_for
from ..run.intervals import bootstrap
from .losses import normalized_squared_error
from .model import SparseAutoencoder

TOKEN_TYPES = {"cls": slice(0, 1), "patch": slice(1, None), "all": slice(None)}
RECONSTRUCTION_METRICS = ("mse", "l1", "l0", "explained_variance", "dead_fraction")
CLASSIFICATION_METRICS = ("contrastive_loss", "zero_shot_top1", "zero_shot_change")
_ENOUGH_IMAGES = 8  # to know their tokens' mean and spread
_CHUNK = 3 << 20  # (token, latent) pairs encoded at once


@torch.no_grad()
def evaluate_sae(
    clip,
    sae: SparseAutoencoder | Mapping[str, SparseAutoencoder],
    dataset,
    layer: int,
    templates: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure SAEs on a labelled data set that they were not trained on.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model: how well does the SAE read *its* residual stream?
    sae : SparseAutoencoder or mapping of name to SparseAutoencoder
        Several are measured on the same images, in one pass of the model.
    dataset : ImageData or OpenMojiData
    layer : int
        Block whose output goes through the SAE.
    templates : sequence of str, optional
        Of the class prompts; default: those of the data set.
    batch_size, workers : int
    n_bootstrap : int
        Resamples of the images.
    seed : int
        Of the bootstrap.
    progress : bool

    Returns
    -------
    DataFrame, tidy
        Columns ``sae`` (its name; "SAE" if only one is given), ``variant``, ``tokens``, ``metric``, ``value``, ``low``, ``high`` (95 %
        interval; NaN for ``dead_fraction``).

        ``variant`` is what went into the blocks behind ``layer``: ``raw``, the ``reconstruction``, or the reconstruction with its error
        added back (``error_kept``: it must equal raw, and says that the splice itself is exact). ``tokens``: which tokens are measured,
        and which were replaced (``none`` for raw).

        With x a token of that type, x_hat its reconstruction, h its latents, and sums over all N of them in the data set:

        - ``mse`` = 1 / (N D) sum_x sum_d (x_hat_d - x_d)^2 / ||x||, as in the paper's loss, whatever the variant's.
        - ``l1`` = 1 / N sum_x sum_s h_s; ``l0`` = 1 / N sum_x #{s: h_s > 0}.
        - ``explained_variance`` = 1 - sum_x ||x - x_hat||^2 / sum_x ||x - m||^2, m = 1 / N sum_x x: centred, so that the mean explains
          nothing, and of each type of token by its own mean.
        - ``dead_fraction`` = 1 / S #{s: h_s = 0 for all x}; :func:`~patchsae_utils.dead_latents.dead_causes` says why.

        And with an image's logits l over the class prompts (cosine times CLIP's temperature) and its class c:

        - ``contrastive_loss``: mean over images of log sum_j exp(l_j) - l_c, in nats.
        - ``zero_shot_top1``: share of images with argmax l = c; ``zero_shot_change``: that share minus the raw one, on the same images.
          Rows with ``tokens == "all"`` have the SAE spliced in at all tokens, CLS and patches.

    Raises
    ------
    ValueError
        If an SAE reads another width or layer, or was trained on normalised activations that these don't resemble (told from the first
        batch, if it has eight images), or the data set is empty.
    """
    layer = clip.layer_index(layer)
    saes = {"SAE": sae} if isinstance(sae, SparseAutoencoder) else dict(sae)
    for each in saes.values():
        each.check_model(clip, layer)
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.spec!r} ({dataset.split}) is empty: there is nothing to evaluate on.")
    head = clip.zero_shot_head(dataset.class_names, templates or templates_for(dataset.spec)).to(clip.device)
    tallies, first = {name: _Tally(each) for name, each in saes.items()}, True

    for batch in batches(dataset, clip.preprocess, batch_size, workers, progress="evaluating the SAE" if progress else None):
        residual = clip.run_to(batch.images, layer)

        def outcome(tokens, residual=residual, labels=batch.labels):
            logits = clip.logits(clip.finish(residual._replace(tokens=tokens), layer), head).cpu()
            return torch.stack([F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).float()], 1)

        if first and len(batch.images) >= _ENOUGH_IMAGES:
            for each in saes.values():
                each.check_statistics(residual.tokens.to(each.W_enc.device), f"the activations of {clip.name!r} on {dataset.spec!r}")
        first = False
        raw = outcome(residual.tokens)
        for tally in tallies.values():
            tally.add(residual.tokens, raw, outcome)
    rows = [(name, *row) for name, tally in tallies.items() for row in tally.rows(n_bootstrap, seed)]
    return pd.DataFrame(rows, columns=["sae", "variant", "tokens", "metric", "value", "low", "high"])


class _Tally:
    """What one SAE did to the images seen so far."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self.token_sums: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_TYPES}
        self.fired = {name: torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device) for name in TOKEN_TYPES}
        streams = [("raw", "none"), *(("reconstruction", name) for name in TOKEN_TYPES), ("error_kept", "all")]
        self.outcomes: dict[tuple[str, str], list[Tensor]] = {stream: [] for stream in streams}

    def add(self, x: Tensor, raw: Tensor, outcome: Callable[[Tensor], Tensor]) -> None:
        """Count a batch [B, T, D]; ``outcome`` turns tokens into (loss, hit) of each image [B, 2], ``raw`` is that of ``x``."""
        output = read_tokens(self.sae, x)
        self.outcomes["raw", "none"].append(raw)
        self.outcomes["error_kept", "all"].append(outcome(output.reconstruction + (x - output.reconstruction)))
        for name, part in TOKEN_TYPES.items():
            self.token_sums[name].append(_image_sums(x, output, part))
            self.fired[name] |= output.fired[name]
            spliced = x.clone()
            spliced[:, part] = output.reconstruction[:, part]
            self.outcomes["reconstruction", name].append(outcome(spliced))

    def rows(self, n_bootstrap: int, seed: int) -> Iterator[tuple[str, str, str, float, float, float]]:
        """(variant, tokens, metric, value, low, high)."""
        for name, parts in self.token_sums.items():
            for metric, estimate in bootstrap(np.concatenate(parts), _reconstruction_metrics, n_bootstrap, seed).items():
                yield "reconstruction", name, metric, *estimate
            yield "reconstruction", name, "dead_fraction", (~self.fired[name]).double().mean().item(), np.nan, np.nan
        raw = torch.cat(self.outcomes["raw", "none"])[:, 1:]
        for (variant, tokens), parts in self.outcomes.items():
            outcome = torch.cat(parts)
            table = torch.cat([outcome, outcome[:, 1:] - raw], 1).double().numpy()
            for metric, estimate in bootstrap(table, _classification_metrics, n_bootstrap, seed).items():
                if (variant, metric) != ("raw", "zero_shot_change"):
                    yield variant, tokens, metric, *estimate


def evaluation_table(frame: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """What :func:`evaluate_sae` measured, as a table to read: one row an SAE, variant and token type; cells "value [low, high]"."""

    def cell(row) -> str:
        style = f".{digits}g" if row.metric == "mse" else f".{digits}f" if row.metric not in ("l0", "l1") else ".1f"
        value, low, high = (format(number, style) for number in (row.value, row.low, row.high))
        return value if np.isnan(row.low) else f"{value} [{low}, {high}]"

    cells = frame.assign(cell=[cell(row) for row in frame.itertuples()])
    keys = ["sae", "variant", "tokens"]
    table = cells.pivot(index=keys, columns="metric", values="cell")
    columns = [metric for metric in (*RECONSTRUCTION_METRICS, *CLASSIFICATION_METRICS) if metric in table]
    return table.loc[list(dict.fromkeys(frame[keys].itertuples(index=False, name=None))), columns].fillna("")


class TokenReadings(NamedTuple):
    """What an SAE does to each token, without the latents themselves: those would be [B, T, S]."""

    reconstruction: Tensor
    """[B, T, D]."""
    l1: Tensor
    """[B, T] sum of the latents."""
    l0: Tensor
    """[B, T] number of active latents."""
    fired: dict[str, Tensor]
    """Token type -> bool [S]: fired on one of its tokens."""


@torch.no_grad()
def read_tokens(sae: SparseAutoencoder, x: Tensor) -> TokenReadings:
    """Encode and decode images' tokens [B, T, D], CLS first; a few hundred at a time, which stay in a processor's cache."""
    flat = x.reshape(-1, x.shape[-1]).to(sae.W_enc.device)
    is_cls = (torch.arange(len(flat), device=flat.device) % x.shape[1]) == 0
    fired = {name: torch.zeros(sae.d_sae, dtype=torch.bool, device=flat.device) for name in ("cls", "patch")}
    parts = []
    rows = max(1, _CHUNK // sae.d_sae)
    for chunk, chunk_is_cls in zip(flat.split(rows), is_cls.split(rows), strict=True):
        h = sae.encode(chunk)
        parts.append((sae.decode(h), h.sum(1), h.count_nonzero(dim=1)))
        fired["cls"] |= (h[chunk_is_cls] > 0).any(0)
        fired["patch"] |= (h[~chunk_is_cls] > 0).any(0)
    reconstruction, l1, l0 = (torch.cat(part).unflatten(0, x.shape[:2]).to(x.device) for part in zip(*parts, strict=True))
    return TokenReadings(reconstruction, l1, l0, {**fired, "all": fired["cls"] | fired["patch"]})


@torch.no_grad()
def patch_readings(clip, sae: SparseAutoencoder, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Where in a picture an SAE spends its latents, and where it errs.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    images : Tensor [B, 3, H, W]
        As ``clip.preprocess`` makes them.
    layer : int

    Returns
    -------
    l0 : Tensor [B, rows, columns]
        Active latents of each patch.
    error : Tensor [B, rows, columns]
        ||x - x_hat|| / ||x||.
    """
    x = clip.residual(images, layer)
    readings = read_tokens(sae, x)
    error = (x - readings.reconstruction).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)
    return tuple(values[:, 1:].float().unflatten(1, clip.grid) for values in (readings.l0, error))


def readings_by_place(
    clip,
    sae: SparseAutoencoder,
    dataset,
    layer: int,
    *,
    batch_size: int = 64,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """:func:`patch_readings` on objects and on bare background, where the data set knows which is which.

    Parameters
    ----------
    clip : ClipModel
    sae : SparseAutoencoder
    dataset : OpenMojiData
        Or any with ``truth(i).background_share`` [rows, columns]: the share of each patch that no object covers.
    layer, batch_size, n_bootstrap, seed, progress

    Returns
    -------
    DataFrame, tidy
        ``place`` (``object``: at least half covered; ``background``: at least 90 % bare), ``metric`` (``l0`` or ``error``), ``value``,
        ``low``, ``high``: means over patches, 95 % intervals over images.
    """
    sums = []
    for batch in batches(dataset, clip.preprocess, batch_size, progress="readings" if progress else None):
        readings = torch.stack(patch_readings(clip, sae, batch.images, layer), 1).double().numpy()
        bare = np.stack([dataset.truth(int(i)).background_share for i in batch.indices])
        for place in (bare <= 0.5, bare >= 0.9):
            sums.append(np.column_stack([place.sum((1, 2)), (readings * place[:, None]).sum((2, 3))]))
    sums = np.concatenate([np.concatenate(sums[0::2]), np.concatenate(sums[1::2])], 1)
    columns: dict[Any, tuple[int, int]] = {
        ("object", "l0"): (1, 0),
        ("object", "error"): (2, 0),
        ("background", "l0"): (4, 3),
        ("background", "error"): (5, 3),
    }
    estimates = bootstrap(
        sums, lambda total, n: {name: total[..., i] / total[..., j] for name, (i, j) in columns.items()}, n_bootstrap, seed
    )
    return pd.DataFrame([(*name, *estimate) for name, estimate in estimates.items()], columns=["place", "metric", "value", "low", "high"])


@torch.no_grad()
def firing_rates(sae: SparseAutoencoder, tokens: Iterable[Tensor], n_tokens: int = 200_000) -> Tensor:
    """Share of tokens on which each latent fires.

    Parameters
    ----------
    sae : SparseAutoencoder
    tokens : iterable of Tensor [N, D]
        E.g. ``store.tokens(4096)``.
    n_tokens : int
        Stop after so many.

    Returns
    -------
    Tensor [S], in [0, 1]; 0 for latents that never fired
    """
    counts, seen = torch.zeros(sae.d_sae, dtype=torch.float64), 0
    for chunk in limited_tokens(tokens, n_tokens, max(1, _CHUNK // sae.d_sae)):
        counts += (sae.encode(chunk.to(sae.W_enc.device)) > 0).sum(0).cpu()
        seen += len(chunk)
    if seen == 0:
        raise ValueError("firing_rates got no tokens.")
    return (counts / seen).float()


@torch.no_grad()
def random_control(sae: SparseAutoencoder, x: Tensor, seed: int = 0) -> SparseAutoencoder:
    """An SAE that learned nothing but has every fair chance: same size, centre, sparsity and scale, random directions.

    Decoder rows are random unit vectors and the encoder is their transpose. One threshold for all latents makes its L0 on ``x`` that of
    ``sae``; one gain makes its reconstruction of ``x`` the best in least squares.

    Parameters
    ----------
    sae : SparseAutoencoder
    x : Tensor [N, D]
        A few thousand tokens.
    seed : int

    Returns
    -------
    SparseAutoencoder
        With ReLU.
    """
    x = x.to(sae.W_enc.device)
    control = SparseAutoencoder(sae.d_in, sae.d_sae, metadata={**sae.metadata, "control": "random directions"}, seed=seed).to(x.device)
    directions = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed)).to(x.device)
    directions = F.normalize(directions, dim=1)
    l0 = torch.cat([(sae.encode(chunk) > 0).sum(1) for chunk in x.split(512)]).double().mean().item()
    scores = ((x - sae.b_dec) @ directions.T).flatten()
    n_active = min(max(1, round(l0 * len(x))), scores.numel() - 1)
    threshold = scores.kthvalue(scores.numel() - n_active).values
    latents = torch.relu(scores.view(len(x), -1) - threshold)
    guess = latents @ directions
    gain = ((x - sae.b_dec) * guess).sum() / guess.square().sum()
    control.W_dec.copy_(directions)
    control.W_enc.copy_(gain * directions.T)
    control.b_enc.fill_(-gain * threshold)
    control.b_dec.copy_(sae.b_dec)
    return control


def _image_sums(x: Tensor, output: TokenReadings, part: slice) -> np.ndarray:
    """What each image adds to the sums of one token type: [B, 6 + D] = tokens, error/norm, L1, L0, ||error||^2, ||x||^2, x."""
    x, reconstruction = x[:, part], output.reconstruction[:, part]
    terms = [
        torch.full((len(x),), float(x.shape[1]), device=x.device),
        normalized_squared_error(x, reconstruction).mean(-1).sum(1),
        output.l1[:, part].sum(1),
        output.l0[:, part].sum(1),
        (x - reconstruction).double().square().sum((1, 2)),
        x.double().square().sum((1, 2)),
    ]
    return torch.cat([torch.stack([term.double() for term in terms], 1), x.double().sum(1)], 1).cpu().numpy()


def _reconstruction_metrics(total: np.ndarray, n_images: np.ndarray) -> dict[str, np.ndarray]:
    n, mse, l1, l0, error, square = (total[..., i] for i in range(6))
    variance = square - (total[..., 6:] ** 2).sum(-1) / n
    explained = 1 - np.divide(error, variance, out=np.full_like(variance, np.nan), where=variance > 0)
    return {"mse": mse / n, "l1": l1 / n, "l0": l0 / n, "explained_variance": explained}


def _classification_metrics(total: np.ndarray, n_images: np.ndarray) -> dict[str, np.ndarray]:
    return {name: total[..., i] / n_images for i, name in enumerate(CLASSIFICATION_METRICS)}


def limited_tokens(tokens: Iterable[Tensor], n_tokens: int, rows: int) -> Iterator[Tensor]:
    """The first ``n_tokens`` tokens of batches [n, D], ``rows`` at a time."""
    for batch in tokens:
        yield from batch[:n_tokens].split(rows)
        n_tokens -= len(batch)
        if n_tokens <= 0:
            return
