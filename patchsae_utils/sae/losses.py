"""The training objective as plain functions of tensors, and the measures that go with it.

Every function takes the activations ``x`` and what an SAE made of them, and returns a tensor; none keeps state. Latents may be dense
tensors or :class:`~patchsae_utils.sparse.SparseLatents`. :func:`objective` names the published loss of an SAE's variant; those of other
variants than the paper's are in :mod:`patchsae_utils.sae.variant_losses`.

An SAE that normalises (:meth:`~patchsae_utils.sae.SparseAutoencoder.set_normalization`) is judged in the units of its normalised input:
``x``, reconstruction, latents and pre-activations below are then (x - mean) / scale, and so on.

Dimension letters: B batch, T tokens, N tokens of any images, D d_in, S d_sae.

Source of the objective: Lim et al., ICLR 2025, section 3.1 and appendix A; ghost gradients: Jermyn and Templeton, "Ghost grads",
Transformer Circuits, January 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .model import SaeOutput, SparseAutoencoder

if TYPE_CHECKING:
    from .sparse import SparseLatents

_EPSILON = 1e-6


_SILENT = 1e-12  # norm below which the dead say nothing


class SaeLoss(NamedTuple):
    """Terms of an objective; each a scalar tensor. Below: the paper's; :mod:`patchsae_utils.sae.variant_losses` says what others put there."""

    total: Tensor
    """mse + l1 + ghost: what the optimiser sees."""
    mse: Tensor
    """Squared error over ||x||, mean over batch, tokens and dimensions."""
    l1: Tensor
    """l1_coefficient times the mean over tokens of the latents' sum."""
    ghost: Tensor
    """Ghost-gradient term for dead latents; 0 when there are none."""


def objective(sae: SparseAutoencoder) -> Callable[..., SaeLoss]:
    """The published loss of the SAE's variant; all have the signature of :func:`patchsae_loss`."""
    from . import variant_losses

    return {
        "relu": patchsae_loss,
        "topk": variant_losses.topk_loss,
        "batchtopk": variant_losses.topk_loss,
        "jumprelu": variant_losses.jumprelu_loss,
        "gated": variant_losses.gated_loss,
        "matryoshka": variant_losses.matryoshka_loss,
    }[sae.activation]


def patchsae_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    dead: Tensor | None = None,
    l1_coefficient: float = 8e-5,
    cls_coefficient: float = 1.0,
    *,
    is_cls: Tensor | None = None,
    output: SaeOutput | None = None,
    ghost: bool = True,
) -> SaeLoss:
    """PatchSAE's objective: (z_hat - z)^2 / ||z|| + lambda * L1 + ghost gradients.

    Parameters
    ----------
    sae : SparseAutoencoder
        Its decoder's rows are expected at unit norm.
    x : Tensor [B, T, D] or [N, D]
        Residual activations; whole images with CLS as token 0, or tokens of mixed images.
    dead : bool Tensor [S], optional
        Latents that have not fired for long: they receive the ghost term. None or all False: the term is 0.
    l1_coefficient : float
        lambda.
    cls_coefficient : float
        Factor of the CLS tokens' squared error.
    is_cls : bool Tensor [N], optional
        Which rows of mixed tokens are CLS; needed there when ``cls_coefficient`` is not 1.
    output : SaeOutput, optional
        ``sae(x)`` or ``sae(x, sparse=True)``, if it is at hand already.
    ghost : bool
        False leaves the ghost term out.

    Returns
    -------
    SaeLoss

    Raises
    ------
    ValueError
        If shapes don't fit, or ``cls_coefficient`` can't be applied because it is not known which tokens are CLS.
    """
    if output is None:
        output = sae(x)
    z, z_hat = in_units(sae, x), in_units(sae, output.reconstruction)
    error = normalized_squared_error(z, z_hat)
    if cls_coefficient != 1.0:
        error = error * token_weights(x, cls_coefficient, is_cls)
    mse = error.mean()
    l1 = l1_coefficient * (l1_norm(output.latents) / sae.input_scale)
    if ghost and dead is not None and bool(dead.any()):
        index = dead.nonzero().squeeze(-1)
        ghost_term = ghost_loss(z, z_hat, dead_pre_activations(sae, x, output, index), sae.W_dec.index_select(0, index), error)
    else:
        ghost_term = mse.new_zeros(())
    return SaeLoss(mse + l1 + ghost_term, mse, l1, ghost_term)


def in_units(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """(x - input_mean) / input_scale, of activations or reconstructions [..., D]; to the bit ``x`` where the SAE doesn't normalise."""
    return (x - sae.input_mean) / sae.input_scale  # without asking whether it does: on a GPU the answer costs more than the sum


def dead_pre_activations(sae: SparseAutoencoder, x: Tensor, output: SaeOutput, index: Tensor) -> Tensor:
    """Pre-activations [..., n] of the latents ``index`` [n], in the loss's units: read from ``output``, or computed where it holds none."""
    if output.pre_activations is None:
        pre_activations = sae.pre_activations(x, latents=index)
    else:
        pre_activations = output.pre_activations.index_select(-1, index)
    return pre_activations / sae.input_scale


def normalized_squared_error(x: Tensor, reconstruction: Tensor, centre: Tensor | None = None) -> Tensor:
    """(x_hat - x)^2 / ||x - centre||, elementwise.

    The norm is not squared, so the value grows with the scale of ``x``, and lambda must be chosen for that scale.

    Parameters
    ----------
    x, reconstruction : Tensor [..., D]
    centre : Tensor [D], optional
        Without it, the paper's form: the norm of ``x`` itself, so that a large mean makes errors count less. With the data's mean, what
        counts is the error relative to how far a token is from the average one.

    Returns
    -------
    Tensor [..., D]
    """
    norm = (x if centre is None else x - centre).norm(dim=-1, keepdim=True)
    return (reconstruction - x).square() / norm.clamp_min(_EPSILON)


def l1_norm(latents: Tensor | SparseLatents) -> Tensor:
    """Mean over tokens of the latents' sum: [..., S] -> scalar. Latents are not negative; summed in float32 at least."""
    if not isinstance(latents, Tensor):
        return latents.values.sum(dtype=torch.promote_types(latents.values.dtype, torch.float32)) / (len(latents.offsets) - 1)
    return latents.sum(-1, dtype=torch.promote_types(latents.dtype, torch.float32)).mean()


def l0_norm(latents: Tensor | SparseLatents) -> Tensor:
    """Mean over tokens of the number of active latents: [..., S] -> scalar."""
    if not isinstance(latents, Tensor):
        return latents.counts().float().mean()
    return latents.count_nonzero(dim=-1).float().mean()


def fired(latents: Tensor | SparseLatents) -> Tensor:
    """Which latents are active on any token: [..., S] -> bool [S]."""
    if not isinstance(latents, Tensor):
        return latents.fired()
    return latents.flatten(0, -2).amax(0) > 0


def ghost_loss(x: Tensor, reconstruction: Tensor, pre_activations: Tensor, rows: Tensor, error: Tensor) -> Tensor:
    """A gradient for latents that never fire: let them, exponentially, predict what the living ones leave over.

    r = x - x_hat; g = exp(pre[dead]) W_dec[dead]; g is scaled to half of ||r||, by a constant; the term is (g - r)^2 / ||r||, rescaled
    elementwise by a constant so that its value equals the squared-error term's. It must read *pre*-activations: after the ReLU all dead
    latents are 0, exp(0) = 1, and the gradient drives every dead row to one direction.

    Parameters
    ----------
    x, reconstruction : Tensor [..., D]
    pre_activations : Tensor [..., n]
        Of the dead latents.
    rows : Tensor [n, D]
        Their decoder rows.
    error : Tensor [..., D]
        Elementwise squared-error term, after the CLS coefficient.

    Returns
    -------
    Tensor, scalar
        Finite for any finite pre-activations.
    """
    residual = (x - reconstruction).detach()
    residual_norm = residual.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(residual.dtype).tiny)
    # The scale below cancels a constant factor of g, so a large exponent is taken out first: exp can't overflow.
    shift = pre_activations.detach().amax(-1, keepdim=True).clamp_min(0)
    ghost = torch.exp(pre_activations - shift) @ rows
    size = _EPSILON * torch.exp(-shift) + 2 * ghost.norm(dim=-1, keepdim=True)
    scale = residual_norm / size.clamp_min(_SILENT)
    squared = (ghost * scale.detach() - residual).square() / residual_norm
    ratio = (error / (squared + _EPSILON)).detach()
    return (ratio * squared).mean()


def explained_variance(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Centred explained variance: 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2.

    The mean is over all given tokens, each dimension by itself. Uncentred, a large constant vector would count as explained.

    Parameters
    ----------
    x, reconstruction : Tensor [..., D]

    Returns
    -------
    Tensor, scalar
        At most 1; 0 for the mean as a reconstruction; NaN when all tokens are equal.
    """
    x, reconstruction = x.reshape(-1, x.shape[-1]), reconstruction.reshape(-1, x.shape[-1])
    return 1 - (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()


def geometric_median(x: Tensor, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """The point with the least sum of distances to all tokens, by Weiszfeld's iteration in float64.

    Parameters
    ----------
    x : Tensor [N, D]
    tolerance : float
        Stop when a step moves the point by less than this share of the tokens' mean distance to it.
    max_iterations : int

    Returns
    -------
    Tensor [D], of ``x``'s dtype

    Source: Weiszfeld (1937); as the start of ``b_dec``: Bricken et al., "Towards monosemanticity" (2023).
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"geometric_median needs tokens as [N, D] with N > 0, got shape {tuple(x.shape)}.")
    points = x.double()
    median = points.mean(0)
    for _ in range(max_iterations):
        distance = (points - median).norm(dim=1)
        weight = 1 / distance.clamp_min(1e-12)
        moved = (weight @ points) / weight.sum()
        step = (moved - median).norm()
        median = moved
        if step <= tolerance * distance.mean():
            break
    return median.to(x.dtype)


def token_weights(x: Tensor, cls_coefficient: float, is_cls: Tensor | None = None) -> Tensor:
    """Factor of each token's error, [..., 1]: ``cls_coefficient`` for CLS, 1 for patches."""
    if is_cls is None:
        if x.ndim != 3:
            raise ValueError(
                f"cls_coefficient={cls_coefficient} needs to know which tokens are CLS: give x as [B, T, D] with CLS as token 0, "
                f"or pass is_cls for x of shape {tuple(x.shape)}."
            )
        is_cls = torch.arange(x.shape[1], device=x.device) == 0  # token 0 of every image, not image 0
        is_cls = is_cls.expand(x.shape[:2])
    if is_cls.shape != x.shape[:-1]:
        raise ValueError(f"is_cls has shape {tuple(is_cls.shape)}, but x has tokens {tuple(x.shape[:-1])}.")
    return torch.where(is_cls, cls_coefficient, 1.0).to(x.dtype).unsqueeze(-1)
