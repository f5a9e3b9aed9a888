"""The training objectives: the paper's (Lim et al., ICLR 2025, section 3.1 and appendix A) and the other variants' (:mod:`.variants`).

Letters: B batch, T tokens, N tokens of any images, D d_in, S d_sae. Ghost gradients: Jermyn and Templeton, Transformer Circuits, 2024."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .model import SaeOutput, SparseAutoencoder
from .sparse.kernels import SparseLatents, take_rows
from .variants import step

_EPSILON = 1e-6
_SILENT = 1e-12  # norm below which the dead say nothing
AUXK_COEFFICIENT = 1 / 32  # alpha of the auxiliary loss: Gao et al., 2024, appendix A.2


class SaeLoss(NamedTuple):
    """Terms of an objective; each a scalar tensor. Below: the paper's; :func:`variant_loss` says what others put there."""

    total: Tensor  # mse + l1 + ghost: what the optimiser sees
    mse: Tensor  # squared error over ||x||, mean over batch, tokens and dimensions
    l1: Tensor  # l1_coefficient times the mean over tokens of the latents' sum
    ghost: Tensor  # ghost-gradient term for dead latents; 0 when there are none


def objective(sae: SparseAutoencoder) -> Callable[..., SaeLoss]:
    """The published loss of an SAE's variant, with the signature of :func:`patchsae_loss`."""
    return patchsae_loss if sae.variant.loss == "paper" else variant_loss


def patchsae_loss(
    sae: SparseAutoencoder, x: Tensor, dead: Tensor | None = None, l1_coefficient: float = 8e-5, cls_coefficient: float = 1.0, *,
    is_cls: Tensor | None = None, output: SaeOutput | None = None, ghost: bool = True,
) -> SaeLoss:  # fmt: skip
    """PatchSAE's objective: (z_hat - z)^2 / ||z|| + lambda * L1 + ghost gradients.

    Parameters
    ----------
    sae : SparseAutoencoder, its decoder's rows at unit norm
    x : Tensor [B, T, D] or [N, D]
        Residual activations of whole images with CLS as token 0, or of mixed tokens.
    dead : bool Tensor [S], or LongTensor [n] of numbers, optional; latents that have not fired for long: they receive the ghost term
    l1_coefficient : float, lambda
    cls_coefficient : float, factor of the CLS tokens' squared error
    is_cls : bool Tensor [N], optional
        Which rows of mixed tokens are CLS; not knowing it where ``cls_coefficient`` is not 1 is a ``ValueError``.
    output : SaeOutput, optional; ``sae(x)`` or ``sae(x, sparse=True)``, if it is at hand already
    ghost : bool; False leaves the ghost term out
    """
    output = sae(x) if output is None else output
    error = normalized_squared_error(x, output.reconstruction)
    weights = _token_weights(x, cls_coefficient, is_cls)
    mse = (error if weights is None else error * weights).mean()
    l1 = l1_coefficient * _l1_norm(output.latents)
    ghost_term = mse.new_zeros(())
    if ghost and dead is not None and len(index := _numbers(dead)):
        ghost_term = _ghost_loss(x, output.reconstruction, *_dead_latents(sae, x, output, index), error)
    return SaeLoss(mse + l1 + ghost_term, mse, l1, ghost_term)


def variant_loss(
    sae: SparseAutoencoder, x: Tensor, dead: Tensor | None = None, l1_coefficient: float = 0.0, cls_coefficient: float = 1.0, *,
    is_cls: Tensor | None = None, output: SaeOutput | None = None, ghost: bool = True,
) -> SaeLoss:  # fmt: skip
    """The published objectives of the other variants, by the table's ``loss``; ||x - x_hat||^2 is summed over D, mean over tokens.

    ``auxk``: squared error (Matryoshka: of each nested dictionary) + AuxK, in ``ghost``, and no ``l1_coefficient``. ``l0``: + lambda L0,
    that reaches the thresholds ("Jumping ahead", eq. 9 to 12). ``gate``: + lambda ||ReLU(gate)||_1 + ||x - x_hat_frozen(ReLU(gate))||^2,
    the last in ``ghost``, which ``ghost=False`` doesn't leave out ("Gated sparse autoencoders", eq. 8).
    """
    output = sae(x) if output is None else output
    weights = _token_weights(x, cls_coefficient, is_cls)

    def squared(reconstruction: Tensor) -> Tensor:
        error = (reconstruction - x).square().sum(-1)
        return (error if weights is None else error * weights.squeeze(-1)).mean()

    mse = squared(output.reconstruction)
    sparsity, auxiliary = mse.new_zeros(()), mse.new_zeros(())
    if sae.groups and len(sae.groups) > 1:  # the last prefix is the whole reconstruction
        for part in sae.decode_prefixes(output.latents, sae.groups[:-1]):
            mse = mse + squared(part.reshape(x.shape))
    if sae.variant.loss == "l0":
        sparsity = l1_coefficient * _learning_l0(sae, output)
    elif sae.variant.loss == "gate":
        gate = torch.relu(output.pre_activations)
        sparsity = l1_coefficient * _l1_norm(gate)
        auxiliary = squared(gate @ sae.W_dec.detach() + sae.b_dec.detach())
    if ghost and dead is not None and len(index := _numbers(dead)):
        auxiliary = auxiliary + AUXK_COEFFICIENT * auxk_loss(x, output.reconstruction, *_dead_latents(sae, x, output, index))
    return SaeLoss(mse + sparsity + auxiliary, mse, sparsity, auxiliary)


def normalized_squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """(x_hat - x)^2 / ||x||, elementwise [..., D]; the norm is not squared, so the value grows with the scale of ``x``."""
    return (reconstruction - x).square() / x.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)


def auxk_loss(x: Tensor, reconstruction: Tensor, pre_activations: Tensor, rows: Tensor) -> Tensor:
    """||e - e_hat||^2 per token; e = x - x_hat, e_hat = relu(topk(pre[dead])) W_dec[dead]. Source: Gao et al., 2024, section 2.4."""
    k = min(auxk_size(x.shape[-1]), pre_activations.shape[-1])
    positive = torch.relu(pre_activations).clamp_max(torch.finfo(pre_activations.dtype).max ** 0.25)
    values, places = positive.topk(k, dim=-1)
    guess = torch.zeros_like(positive).scatter(-1, places, values) @ rows
    return ((x - reconstruction).detach() - guess).square().sum(-1).mean()


def auxk_size(d_in: int) -> int:
    """The power of two nearest to D / 2, on a logarithmic scale: 512 for 768, as in the source."""
    return 2 ** max(0, round(math.log2(d_in / 2)))


def _ghost_loss(x: Tensor, reconstruction: Tensor, pre_activations: Tensor, rows: Tensor, error: Tensor) -> Tensor:
    """(g - r)^2 / ||r||, r = x - x_hat, g = exp(pre[dead]) W_dec[dead] scaled to half of ||r||; a constant makes it equal to ``error``.

    It must read *pre*-activations: after the ReLU exp(0) = 1, and the gradient drives every dead row to one direction.
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


def _numbers(which: Tensor) -> Tensor:
    """Numbers of the latents that a mask [S] names; a GPU is waited for, unless they are given already."""
    return which.nonzero().squeeze(-1) if which.dtype == torch.bool else which


def _dead_latents(sae: SparseAutoencoder, x: Tensor, output: SaeOutput, index: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations [..., n] of some latents, read from ``output`` or computed; and their decoder rows [n, D]."""
    if output.pre_activations is None:
        return sae.pre_activations(x, latents=index), take_rows(sae.W_dec, index)
    return output.pre_activations.index_select(-1, index), sae.W_dec.index_select(0, index)


def _l1_norm(latents: Tensor | SparseLatents) -> Tensor:
    """Mean over tokens of the latents' sum: [..., S] -> scalar, summed in float32 at least."""
    if not isinstance(latents, Tensor):
        return latents.values.sum(dtype=torch.promote_types(latents.values.dtype, torch.float32)) / latents.n_tokens
    return latents.sum(-1, dtype=torch.promote_types(latents.dtype, torch.float32)).mean()


def _learning_l0(sae: SparseAutoencoder, output: SaeOutput) -> Tensor:
    """Mean L0 whose gradient reaches the thresholds."""
    if (near := output.near) is None:
        return step(output.pre_activations, sae.threshold, sae.bandwidth).sum(-1).mean()
    return step(near.values, sae.threshold[near.indices.long()], sae.bandwidth).sum() / near.n_tokens


def _token_weights(x: Tensor, cls_coefficient: float, is_cls: Tensor | None) -> Tensor | None:
    """Factor of each token's error, [..., 1]: ``cls_coefficient`` for CLS, 1 for patches; None where that is 1, too."""
    if cls_coefficient == 1.0:
        return None
    if is_cls is None:
        if x.ndim != 3:
            what = f"cls_coefficient={cls_coefficient} needs to know which tokens are CLS: give x as [B, T, D] with CLS as token 0,"
            raise ValueError(f"{what} or pass is_cls for x of shape {tuple(x.shape)}.")
        is_cls = (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[:2])  # token 0 of every image, not image 0
    if is_cls.shape != x.shape[:-1]:
        raise ValueError(f"is_cls has shape {tuple(is_cls.shape)}, but x has tokens {tuple(x.shape[:-1])}.")
    return torch.where(is_cls, cls_coefficient, 1.0).to(x.dtype).unsqueeze(-1)
