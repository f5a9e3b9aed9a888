"""Which latents a class logit depends on: gradient times activation, and the exact effect of turning single latents off.

A latent's share is its activation times its decoder row times the gradient in its token: to first order what the logit loses without it.
Source: Molchanov et al., ICLR 2017, section 2.2; for latents of SAEs Marks et al., ICLR 2025, section 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..sae.model import SparseAutoencoder
from .tail import Active, Tail, dataset_head, read_batches

N_CHECKED = 20  # latents of each image


class Attribution(NamedTuple):
    """What each class's margin loses, about, when a latent is turned off: mean over images of the class [C, S]; 0 where it has none."""

    scores: Tensor
    class_names: tuple[str, ...]
    sae: str = ""  # its fingerprint

    def top(self, k: int) -> Tensor:
        """Each class's k latents of highest score, best first: LongTensor [C, k]."""
        return self.scores.argsort(dim=1, descending=True, stable=True)[:, :k]


@torch.no_grad()
def attribute_latents(clip: ClipModel, sae: SparseAutoencoder, dataset: Any, layer: int = -2, *, head: Tensor | None = None) -> Attribution:
    """Attribute each class's margin to latents, over images of the class.

    The margin is the class's logit minus the log of the summed exponentials of the others: what raises all classes alike counts for
    nothing.

    Parameters
    ----------
    clip, sae, layer
    dataset : ImageData or OpenMojiData
        The *train* split: its labels are read, so masks ranked by the outcome are to be judged on other images.
    head : Tensor [C, d_embed], by default of the data set's classes
    """
    sae.check_model(clip, layer)
    head = dataset_head(clip, dataset, head)
    sums = torch.zeros(len(dataset.class_names), sae.d_sae, device=clip.device)
    for read in read_batches(clip, dataset, layer, "attribution"):
        sums.index_add_(0, read.labels, latent_shares(clip, sae, read.tail, read.residual, head, read.labels, all_others(head)))
    images = torch.bincount(torch.as_tensor(dataset.labels), minlength=len(sums))
    return Attribution(sums.cpu() / images.clamp_min(1)[:, None], tuple(dataset.class_names), sae.fingerprint)


def latent_shares(
    clip: ClipModel, sae: SparseAutoencoder, tail: Tail, residual: Residual, head: Tensor, classes: Tensor, peers: Tensor | None = None,
    h: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient times activation of each latent, summed over the tokens of each image: [B, S]."""
    gradient = logit_gradient(clip, tail, residual, head, classes, peers)
    active = Active.of(sae.encode(residual.tokens) if h is None else h.to(clip.device))
    shares = torch.zeros(len(gradient), sae.d_sae, device=clip.device)
    image = active.token // active.shape[1]
    shares.view(-1).index_add_(0, image * sae.d_sae + active.latent, active.project(gradient, sae.W_dec))
    return shares


def logit_gradient(clip: ClipModel, tail: Tail, residual: Residual, head: Tensor, classes: Tensor, peers: Tensor | None = None) -> Tensor:
    """Gradient of each image's class logit, or of its margin over the class's peers (bool [C, C]), in its tokens: [B, T, D]."""
    with torch.enable_grad():
        tokens = residual.tokens.detach().clone().requires_grad_(True)  # run_to may have run without a graph
        logits = clip.logits(tail(residual._replace(tokens=tokens)), head)
        value = logits.gather(1, classes[:, None])[:, 0]
        if peers is not None:
            others = logits.masked_fill(~peers.to(head.device)[classes], -torch.inf).logsumexp(1)
            value = value - others.clamp_min(-1e4)  # a class may have no peers
        return torch.autograd.grad(value.sum(), tokens)[0]


def all_others(head: Tensor) -> Tensor:
    """bool [C, C]: the peers of each class, if all other classes are."""
    return ~torch.eye(len(head), dtype=torch.bool, device=head.device)


@torch.no_grad()
def attribution_check(clip: ClipModel, sae: SparseAutoencoder, dataset: Any, head: Tensor, layer: int = -2) -> dict[str, np.ndarray]:
    """What the predicted class's logit loses without a latent, by ``estimate`` and ``exact``, each [N].

    Twenty latents of each image, drawn among its active ones, half of them the highest attributed.

    Parameters
    ----------
    clip, sae, layer
    dataset : ImageData or OpenMojiData
    head : Tensor [C, d_embed]
    """
    sae.check_model(clip, layer)
    head = dataset_head(clip, dataset, head)
    rng, parts = np.random.default_rng(0), [np.zeros((2, 0), np.float32)]
    for read in read_batches(clip, dataset, layer, "attribution's check", batch_size=1):
        before = clip.logits(read.tail(read.residual), head)
        label = before.argmax(1)
        estimate = latent_shares(clip, sae, read.tail, read.residual, head, label)[0].cpu().numpy()
        active = estimate.nonzero()[0]
        best = active[np.argsort(-estimate[active])][: N_CHECKED // 2]
        rest = np.setdiff1d(active, best)
        if not len(active):
            continue
        drawn = np.concatenate([best, rng.choice(rest, min(len(rest), N_CHECKED - len(best)), replace=False)]).astype(int)
        tokens, columns = read.residual.tokens, torch.from_numpy(drawn).to(clip.device)
        h = sae.encode(tokens)[0, :, columns]
        edited = tokens - h.T[..., None] * sae.W_dec[columns, None]  # [n, T, D]: one latent less in each copy of the image
        after = clip.logits(read.features(edited, torch.zeros(len(drawn), dtype=torch.long)), head)
        parts.append(np.stack([estimate[drawn], (before - after)[:, int(label)].cpu().numpy()]))
    return dict(zip(("estimate", "exact"), np.concatenate(parts, 1), strict=True))
