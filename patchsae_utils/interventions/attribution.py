"""Which latents a class logit depends on: gradient times activation, and the exact effect of turning single latents off.

Counting where a latent is active says what it sees, not what CLIP uses. Its attribution estimates what the logit would lose without it:
the tail is differentiated once an image, and every latent's share is its activation times its decoder row times that gradient. The
estimate is first order; :func:`ablate_latents` runs the tail for each latent and gives the exact number for a few of them.

Dimension letters: B batch, T tokens (CLS, then patches), D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip.model import ClipModel, Residual
from ..data import batches
from .tail import PLACES, Active, check_models, dataset_head, decoder_of, network_tail

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

TARGETS = ("logit", "margin")


class Attribution(NamedTuple):
    """How much each class's logit depends on each latent, on average over images of the class."""

    scores: Tensor
    """[C, S] mean over the class's images of gradient times activation: about what the logit loses when the latent is turned off."""
    class_images: Tensor
    """[C] images of the class; a class without images has scores 0."""
    class_names: tuple[str, ...]
    """By class index."""
    target: str
    """What was differentiated: a key of ``TARGETS``."""

    def top(self, k: int) -> Tensor:
        """Each class's k latents of highest score, best first: LongTensor [C, k]."""
        if not 1 <= k <= self.scores.shape[1]:
            raise ValueError(f"k must lie between 1 and the number of latents, {self.scores.shape[1]}; got {k}.")
        return self.scores.argsort(dim=1, descending=True, stable=True)[:, :k]


@torch.no_grad()
def attribute_latents(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    layer: int = -2,
    *,
    head: Tensor | None = None,
    target: str = "logit",
    where: str = "all",
    batch_size: int = 32,
    progress: bool = True,
) -> Attribution:
    """Attribute each class's logit to latents, over images of the class.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are no latents and get nothing.
    sae : SparseAutoencoder
    dataset : ImageData or OpenMojiData
        The *train* split: its labels are read, and masks ranked by the outcome are to be judged on other images.
    layer : int
        The block whose output the SAE reads.
    head : Tensor [C, d_embed], optional
        By default from the data set's class names and templates.
    target : {"logit", "margin"}
        What is differentiated: the logit of the image's class, or that logit minus the log of the summed exponentials of the others, so
        that a latent which raises all classes alike counts for nothing.
    where : {"all", "cls", "patches"}
        Over which tokens a latent's share is summed.
    batch_size : int
    progress : bool

    Returns
    -------
    Attribution

    Raises
    ------
    ValueError
        For an unknown target or place, or models that don't fit together.

    Source: gradient times activation, the first-order estimate of an ablation's effect (Molchanov et al., ICLR 2017, section 2.2; for
    latents of SAEs Marks et al., ICLR 2025, section 3.1).
    """
    check_models(clip, sae, layer)
    if where not in PLACES:
        raise ValueError(f"Unknown where={where!r}. Valid: {', '.join(PLACES)}.")
    n_classes = len(dataset.class_names)
    head = dataset_head(clip, dataset) if head is None else head
    decoder, tail = decoder_of(sae), None
    sums = torch.zeros(n_classes, sae.d_sae, device=clip.device)
    for batch in batches(dataset, clip.preprocess, batch_size, progress="attribution" if progress else None):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        labels = batch.labels.to(clip.device)
        gradient = logit_gradient(clip, tail, residual, head, labels, target)
        active = _within(Active.of(sae.encode(residual.tokens)), where)
        share = active.project(gradient, decoder.rows)
        sums.view(-1).index_add_(0, labels[active.image] * sae.d_sae + active.latent, share)
    images = torch.bincount(torch.as_tensor(dataset.labels), minlength=n_classes)
    scores = sums.cpu() / images.clamp_min(1)[:, None]
    return Attribution(scores, images, tuple(dataset.class_names), target)


@torch.no_grad()
def image_attribution(
    clip: ClipModel,
    sae: SparseAutoencoder,
    images: Tensor | Residual,
    head: Tensor,
    classes: Tensor | Sequence[int] | None = None,
    layer: int = -2,
    *,
    target: str = "logit",
    where: str = "all",
    h: Tensor | None = None,
) -> Tensor:
    """Gradient times activation of each latent in each image: [B, S].

    Parameters
    ----------
    clip, sae, layer, target, where
        As for :func:`attribute_latents`.
    images : Tensor [B, 3, H, W] or Residual
    head : Tensor [C, d_embed]
    classes : LongTensor [B], optional
        Whose logit; by default the class that the model predicts.
    h : Tensor [B, T, S], optional
        The images' latents, where they are known already: with many latents that is most of the work.
    """
    check_models(clip, sae, layer)
    residual = images if isinstance(images, Residual) else clip.run_to(images, layer)
    tail = network_tail(clip, layer, residual)
    classes = clip.logits(tail(residual), head).argmax(1) if classes is None else torch.as_tensor(classes, device=clip.device)
    gradient = logit_gradient(clip, tail, residual, head, classes, target)
    active = _within(Active.of(sae.encode(residual.tokens) if h is None else h.to(clip.device)), where)
    scores = torch.zeros(len(residual.tokens), sae.d_sae, device=clip.device)
    scores.view(-1).index_add_(0, active.image * sae.d_sae + active.latent, active.project(gradient, decoder_of(sae).rows))
    return scores


@torch.no_grad()
def ablate_latents(
    clip: ClipModel,
    sae: SparseAutoencoder,
    images: Tensor | Residual,
    latents: Sequence[int] | Tensor,
    head: Tensor,
    layer: int = -2,
    *,
    where: str = "all",
) -> Tensor:
    """Change of every class logit when one latent alone is turned off, the error term kept: exact, a tail run a latent.

    Parameters
    ----------
    clip, sae, layer, where
        As for :func:`attribute_latents`.
    images : Tensor [B, 3, H, W] or Residual
    latents : sequence of int, length n
    head : Tensor [C, d_embed]

    Returns
    -------
    Tensor [B, n, C]

    Raises
    ------
    ValueError
        If a latent doesn't exist.
    """
    check_models(clip, sae, layer)
    latents = [int(latent) for latent in latents]
    if not all(0 <= latent < sae.d_sae for latent in latents):
        raise ValueError(f"The SAE has latents 0 to {sae.d_sae - 1}; got {latents}.")
    residual = images if isinstance(images, Residual) else clip.run_to(images, layer)
    tail = network_tail(clip, layer, residual)
    h, rows = sae.encode(residual.tokens)[..., latents], decoder_of(sae).rows
    before = clip.logits(tail(residual), head)
    changes = []
    for i, latent in enumerate(latents):
        edited = residual.tokens.clone()
        edited[:, PLACES[where]] -= h[:, PLACES[where], i, None] * rows[latent]
        changes.append(clip.logits(tail(residual._replace(tokens=edited)), head) - before)
    return torch.stack(changes, 1) if changes else before.new_zeros(len(before), 0, len(head))


def attribution_check(
    clip: ClipModel,
    sae: SparseAutoencoder,
    dataset,
    head: Tensor,
    layer: int = -2,
    *,
    n_latents: int = 20,
    target: str = "logit",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Estimate and truth side by side: for each image latents drawn among its active ones, half of them the highest attributed.

    Returns
    -------
    dict
        ``estimate`` and ``exact`` [N]: what the logit of the predicted class loses, by gradient times activation and by running the
        tail without the latent; ``image`` and ``latent`` [N].
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list] = {"estimate": [], "exact": [], "image": [], "latent": []}
    for batch in batches(dataset, clip.preprocess, 1):
        residual = clip.run_to(batch.images, layer)
        tail = network_tail(clip, layer, residual)
        with torch.no_grad():
            before = clip.logits(tail(residual), head)
        label = int(before.argmax())
        estimate = image_attribution(clip, sae, residual, head, [label], layer, target=target)[0].cpu()
        active = estimate.nonzero()[:, 0].numpy()
        best = active[np.argsort(-estimate[active].numpy())][: n_latents // 2]
        rest = np.setdiff1d(active, best)
        drawn = np.concatenate([best, rng.choice(rest, min(len(rest), n_latents - len(best)), replace=False)]).astype(int)
        change = ablate_latents(clip, sae, residual, drawn.tolist(), head, layer)[0] + before
        exact = _target(before, torch.tensor([label], device=before.device), target) - _target(
            change, torch.full((len(change),), label, device=change.device), target
        )
        parts["estimate"].append(estimate[drawn].numpy())
        parts["exact"].append(exact.cpu().numpy())
        parts["image"].append(np.full(len(drawn), int(batch.indices[0])))
        parts["latent"].append(drawn)
    return {name: np.concatenate(values) for name, values in parts.items()}


def logit_gradient(
    clip: ClipModel, tail: Callable[[Residual], Tensor], residual: Residual, head: Tensor, classes: Tensor, target: str = "logit"
) -> Tensor:
    """Gradient of each image's class logit (or margin) in its residual stream: [B, T, D]."""
    if target not in TARGETS:
        raise ValueError(f"Unknown target {target!r}. Valid: {', '.join(TARGETS)}.")
    with torch.enable_grad():
        tokens = residual.tokens.detach().clone().requires_grad_(True)  # run_to may have run without a graph
        logits = clip.logits(tail(residual._replace(tokens=tokens)), head)
        return torch.autograd.grad(_target(logits, classes, target).sum(), tokens)[0]


def _target(logits: Tensor, classes: Tensor, target: str) -> Tensor:
    """[B] from logits [B, C]."""
    own = logits.gather(1, classes[:, None])[:, 0]
    if target == "logit" or logits.shape[1] == 1:
        return own
    return own - logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)


def _within(active: Active, where: str) -> Active:
    """Only the entries of some tokens."""
    if where == "all":
        return active
    is_cls = active.token % active.shape[1] == 0
    kept = is_cls if where == "cls" else ~is_cls
    return active._replace(token=active.token[kept], latent=active.latent[kept], value=active.value[kept])
