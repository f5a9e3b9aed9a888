"""Which latents f of a joint dictionary are new in an adapted model? Five measures on pictures that no dictionary saw, and one verdict.

d: decoder row in the adapted model. Sources: Minder et al., 2025, section 3 (Latent Scaling; here a latent's own row is left out of CLIP's
reconstruction); Kondapaneni et al., 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import ClipModel
from ..data import batches
from ..interventions.tail import check_same_tower
from ..run.intervals import Interval, interval
from ..sae.model import SparseAutoencoder
from .joint import JointDictionary, norm_difference, train_joint

NEW, BEFORE, UNDECIDED = "new", "as before", "undecided"
RATIOS = (0.2, 0.5)  # below them, on error and reconstruction, Latent Scaling calls a latent the adapted model's own
RELATED = 0.5  # correlation above which a latent has a partner; share of it that CLIP's stream must predict
NORMS = (0.1, 0.9)  # bounds of the relative norm difference: beyond them it is one model's alone
RIDGE = 1e-3  # of the mean variance of the stream's dimensions
_PICTURES = 8  # read at once


@torch.no_grad()
def read_streams(base: ClipModel, adapted: ClipModel, dataset: Any, layer: int, *, progress: bool = True) -> Tensor:
    """The residual streams of two models after a block, at the same tokens: [N, T, 2, D]."""
    check_same_tower(base, adapted)
    pictures = batches(dataset, base.preprocess, progress=f"reading {dataset.name} twice" if progress else None)
    return torch.cat([torch.stack([model.residual(batch.images, layer) for model in (base, adapted)], 2) for batch in pictures])


def norms(joint: JointDictionary) -> pd.DataFrame:
    """Relative norm difference of each latent; it has no interval over pictures."""
    score = norm_difference(joint).cpu().double().numpy()
    nothing = np.full(len(score), np.nan)
    return _table(Interval(score, nothing, nothing), score > NORMS[1], (score > NORMS[0]) & (score < NORMS[1]))


@torch.no_grad()
def scaling(joint: JointDictionary, streams: Tensor) -> pd.DataFrame:
    """Latent Scaling: CLIP's beta = d . (Y^T f) / (|d|^2 |f|^2) over the adapted one's; Y: what others leave, or the reconstruction."""
    d, own = joint.rows(1), [(joint.rows(1) * joint.rows(model)).sum(1) for model in range(2)]
    sums = []
    for x, f in read(joint, streams):
        said, square = joint.decode(f), f.square().sum(1)
        errors, rebuilt = (
            [(f * (y[:, :, model] @ d.T)).sum(1) + square * add[model] for model in range(2)]
            for y, add in ((x - said, own), (said - joint.mean, (0, 0)))
        )
        sums.append(torch.stack([*errors, rebuilt[0] - square * own[0], rebuilt[1]]))
    totals = torch.cat(sums, 1).double().cpu().numpy()  # [4, N, S]
    ratio = [interval(partial(_ratio, *totals[i : i + 2]), totals.shape[1], "images") for i in (0, 2)]
    new = (ratio[0].high < RATIOS[0]) & (ratio[1].high < RATIOS[1])
    before = (ratio[0].low > RATIOS[0]) | (ratio[1].low > RATIOS[1])
    return _table(ratio[0], new, before).assign(reconstruction=ratio[1].value)


def matched(dictionary: JointDictionary, streams: Tensor, rows: Tensor, encode: Callable[[Tensor], Tensor]) -> pd.DataFrame:
    """Correlation with the latent of CLIP's dictionary, reading CLIP, whose decoder row is most like d.

    ``dictionary`` is that of both models or of the adapted one alone; ``rows`` [S, D] and ``encode`` are of CLIP's.
    """
    return _with_partner(dictionary, streams, rows, lambda x: encode(x[:, :, 0]))


def difference(joint: JointDictionary, streams: Tensor, changes: JointDictionary) -> pd.DataFrame:
    """Correlation with the latent of a dictionary of the streams' difference whose row is most like d; "new": the change writes it."""
    table = _with_partner(joint, streams, changes.rows(0), lambda x: changes.encode((x[:, :, 1] - x[:, :, 0])[:, :, None]))
    return table.assign(evidence=table["evidence"].map({NEW: BEFORE, BEFORE: NEW, UNDECIDED: UNDECIDED}))


@torch.no_grad()
def predicted(joint: JointDictionary, streams: Tensor, train: Tensor) -> pd.DataFrame:
    """Correlation with a ridge regression from CLIP's stream at the same token, over that with one from the adapted model's own stream.

    Both are fitted on the pictures ``train`` [N', T, 2, D]. No sparse latent is linear in a stream: the second is what the first could reach.
    """
    centre = train[:, :, :2].mean((0, 1))
    square, product = train.new_zeros(2, *centre.shape[1:] * 2), train.new_zeros(*centre.shape, len(joint.b_enc))
    for x, f in read(joint, train):
        z = (x[:, :, :2] - centre).flatten(0, 1).transpose(0, 1)
        square += z.transpose(1, 2) @ z
        product += z.transpose(1, 2) @ f.flatten(0, 1)
    for each in square:
        each.diagonal().add_(RIDGE * each.diagonal().mean())
    weights = torch.linalg.solve(square.double(), product.double()).to(product)
    return _related(correlations((f, *torch.einsum("btmd,mds->mbts", x[:, :, :2] - centre, weights)) for x, f in read(joint, streams)))


def correlations(parts: Iterator[tuple[Tensor, ...]]) -> Interval:
    """Pearson correlation over tokens of f and g [B, T, S], by latent, resampling pictures; NaN where one is constant.

    Of tuples (f, g, h): over that of f and h.
    """

    def sums(f: Tensor, g: Tensor) -> Tensor:
        f, g = f.double(), g.double()  # float32 squares hide the spread of a latent that is always active
        return torch.stack([f.sum(1), g.sum(1), (f * f).sum(1), (g * g).sum(1), (f * g).sum(1), torch.full_like(f[:, 0], f.shape[1])])

    moments = torch.cat([torch.stack([sums(f, g) for g in others]) for f, *others in parts], 2).cpu().numpy()  # [1 or 2, 6, N, S]

    def pearson(weights: np.ndarray, of: np.ndarray) -> np.ndarray:
        f, g, ff, gg, fg, n = (weights @ each for each in of)
        with np.errstate(invalid="ignore"):
            return _over(fg - f * g / n, np.sqrt((ff - f * f / n).clip(0) * (gg - g * g / n).clip(0)))

    ratio = lambda w: _over(*(pearson(w, of) for of in moments)) if len(moments) > 1 else pearson(w, moments[0])  # noqa: E731
    return interval(ratio, moments.shape[2], "images")


@torch.no_grad()
def _with_partner(joint: JointDictionary, streams: Tensor, rows: Tensor, encode: Callable[[Tensor], Tensor]) -> pd.DataFrame:
    cosine = F.normalize(joint.rows(-1), dim=1) @ F.normalize(rows, dim=1).T
    partner = cosine.argmax(1)
    return _related(correlations((f, encode(x)[..., partner]) for x, f in read(joint, streams)))


def read(dictionary: JointDictionary, streams: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some pictures' streams [B, T, 2, D] and their latents [B, T, S]; a dictionary of one model reads the adapted one."""
    return ((x, dictionary.encode(x[:, :, -len(dictionary.mean) :])) for x in streams.split(_PICTURES))


def fires(dictionary: JointDictionary, streams: Tensor) -> np.ndarray:
    """bool [S]: latents that fire on some picture."""
    return torch.stack([(f > 0).flatten(0, 1).any(0) for _, f in read(dictionary, streams)]).any(0).cpu().numpy()


def _related(found: Interval) -> pd.DataFrame:
    """A latent with a partner was there before."""
    return _table(found, found.high < RELATED, found.low > RELATED)


def _table(found: Interval, new: np.ndarray, before: np.ndarray) -> pd.DataFrame:
    """latent, score, low, high, evidence."""
    evidence = np.select([new, before], [NEW, BEFORE], UNDECIDED)
    return pd.DataFrame({"latent": range(len(new)), "score": found.value, "low": found.low, "high": found.high, "evidence": evidence})


def _ratio(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _over(weights @ above, weights @ below)


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), np.nan), where=below > 0)


def verdicts(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One verdict a latent from tables by measure: latent, verdict, and each measure's score and evidence.

    "new", or "as before": two of ``scaling``, ``matched`` and ``predicted`` say so, and none the contrary; "changed" in place of the second if
    ``difference`` or ``norms`` say that the change writes it; "undecided" where they disagree or don't know.
    """
    presence = [tables[name]["evidence"] for name in ("scaling", "matched", "predicted")]
    new, before = (sum((each == word).to_numpy().astype(int) for each in presence) for word in (NEW, BEFORE))
    moved = np.logical_or.reduce([(tables[name]["evidence"] == NEW).to_numpy() for name in ("difference", "norms") if name in tables])
    was = (before >= 2) & (new == 0)
    verdict = np.select([(new >= 2) & (before == 0), was & moved, was], [NEW, "changed", BEFORE], UNDECIDED)
    scores = {f"{name}{end}": table[column] for name, table in tables.items() for end, column in (("", "score"), ("_evidence", "evidence"))}
    return pd.DataFrame({"latent": range(len(verdict)), "verdict": verdict, **scores})


def new_latents(
    base: ClipModel, adapted: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int, *, d_sae: int, k: int | None = 32,
    l1_coefficient: float = 0.0, n_tokens: int = 600_000, progress: bool = True,
) -> tuple[JointDictionary, pd.DataFrame]:  # fmt: skip
    """Which latents of a joint dictionary are new in an adapted model, changed, or as before: measured five ways.

    Parameters
    ----------
    base, adapted, sae, layer : models, and an SAE that was trained on ``base`` and reads this block's output
    dataset : data set, of which every other picture trains the dictionaries, and the rest is measured on
    d_sae : int, latents of the joint dictionary and of that of the difference
    k : int, optional, latents active per token (BatchTopK); None: an L1 penalty of weight ``l1_coefficient`` in its place
    l1_coefficient : float, of the latents' activations times their summed decoder norms
    n_tokens : int, on which each is trained
    progress : bool

    Returns
    -------
    JointDictionary : of both models, and after its latents those of the difference
    DataFrame : as :func:`verdicts`, with the columns dictionary ("both models" or "the change") and latent; a latent of the change is new or
        "changed" by the measure predicted alone. Latents that fire on no measured picture are left out
    """
    sae.check_model(base, layer)
    sae.check_model(adapted, layer)
    both = read_streams(base, adapted, dataset, layer, progress=progress)
    train, measured = both[::2].contiguous(), both[1::2].contiguous()
    return judge(
        train, measured, sae.W_dec, sae.encode, d_sae=d_sae, k=k, n_tokens=n_tokens, l1_coefficient=l1_coefficient, progress=progress
    )


@torch.no_grad()
def judge(
    train: Tensor, streams: Tensor, rows: Tensor, encode: Callable[[Tensor], Tensor], *, d_sae: int, k: int | None, n_tokens: int,
    l1_coefficient: float = 0.0, progress: bool,
) -> tuple[JointDictionary, pd.DataFrame]:  # fmt: skip
    """:func:`new_latents` of streams [N, T, 2, D], beside a dictionary of CLIP with these decoder rows and this encoder."""
    tokens = train.flatten(0, 1)
    with torch.enable_grad():
        joint, changes = (
            train_joint(each, d_sae, k=k, n_tokens=n_tokens, l1_coefficient=l1_coefficient, progress=progress)
            for each in (tokens, tokens[:, 1:] - tokens[:, :1])
        )
    n, both = len(joint.b_enc), joint.beside(changes)
    ridges = predicted(both, streams, train)
    tables = {
        "norms": norms(joint), "difference": difference(joint, streams, changes), "scaling": scaling(joint, streams),
        "matched": matched(joint, streams, rows, encode), "predicted": ridges[:n],
    }  # fmt: skip
    found = verdicts(tables).assign(dictionary="both models")
    written = ridges[n:].rename(columns={"score": "predicted", "evidence": "predicted_evidence"})
    verdict = written["predicted_evidence"].replace(BEFORE, "changed")
    table = pd.concat([found, written[["latent", "predicted", "predicted_evidence"]].assign(verdict=verdict, dictionary="the change")])
    return both, table[fires(both, streams)].reset_index(drop=True)
