"""What turns pre-activations into latents, where torch has no function for it: selections of the largest, and straight-through steps.

And two small things that :class:`~patchsae_utils.sae.SparseAutoencoder` needs on its sparse path.

Dimension letters: N tokens of any images, S d_sae.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .sparse import SparseLatents


def keep_topk(latents: Tensor, k: int) -> Tensor:
    """Each token's ``k`` largest latents, the others 0: [..., S] -> [..., S]. Source: Gao et al., 2024, eq. 3."""
    values, indices = latents.topk(k, dim=-1)
    return torch.zeros_like(latents).scatter(-1, indices, values)


def keep_batch_topk(latents: Tensor, k: int) -> Tensor:
    """The ``k`` N largest latents of a batch of N tokens, the others 0: [..., S] -> [..., S]. Source: Bussmann et al., 2024, eq. 3."""
    flat = latents.reshape(-1)
    values, indices = flat.topk(k * (latents.numel() // latents.shape[-1]))
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(latents)


def smallest_positive(values: Tensor) -> Tensor:
    """The least value above 0; infinity where there is none."""
    values = values.detach()
    return torch.where(values > 0, values, torch.inf).amin() if values.numel() else values.new_full((), torch.inf)


def jump_relu(pre_activations: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    """z where it exceeds its threshold, else 0; thresholds learn through a straight-through estimator.

    The derivative in the threshold t is -(t / width) K((z - t) / width) with the rectangle K(u) = 1 for |u| < 1/2; that in z is exact.

    Parameters
    ----------
    pre_activations : Tensor [..., S] or [nnz]
    threshold : Tensor [S] or [nnz]
        Not negative.
    width : scalar
        Of the kernel, in units of the pre-activations.

    Source: Rajamanoharan et al., "Jumping ahead", 2024, eq. 11.
    """
    return _JumpReLU.apply(pre_activations, threshold, width)


def step(pre_activations: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    """1 where z exceeds its threshold, else 0: what L0 counts. Derivative in the threshold: -K((z - t) / width) / width; in z: 0.

    Parameters as in :func:`jump_relu`. Source: Rajamanoharan et al., "Jumping ahead", 2024, eq. 12.
    """
    return _Step.apply(pre_activations, threshold, width)


def centre_product(b_dec: Tensor, W_enc: Tensor) -> Tensor:
    """b_dec @ W_enc around b_dec's present value: zeros [S], through which ``b_dec`` [D] gets its gradient; that of ``W_enc`` is 0."""
    return _CentreProduct.apply(b_dec, W_enc)


def keep_entries(latents: SparseLatents, kept: Tensor) -> SparseLatents:
    """The entries for which ``kept``, bool [nnz], is True."""
    before = F.pad(kept.cumsum(0), (1, 0))
    offsets = before[latents.offsets.long()].to(latents.offsets.dtype)
    return latents._replace(values=latents.values[kept], indices=latents.indices[kept], offsets=offsets)


def _window(pre_activations: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    return (pre_activations - threshold).abs() < width / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold, torch.as_tensor(width))
        # The threshold is not negative, but one that an optimiser's step has just pushed below 0 must not let negative latents through.
        return torch.where(z > threshold.clamp_min(0), z, 0)

    @staticmethod
    def backward(ctx, gradient):
        z, threshold, width = ctx.saved_tensors
        for_z = torch.where(z > threshold.clamp_min(0), gradient, 0)
        for_threshold = gradient * _window(z, threshold, width) * (-threshold / width)
        return for_z, for_threshold.sum_to_size(threshold.shape).to(threshold.dtype), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold, torch.as_tensor(width))
        return (z > threshold.clamp_min(0)).to(torch.promote_types(z.dtype, torch.float32))

    @staticmethod
    def backward(ctx, gradient):
        z, threshold, width = ctx.saved_tensors
        for_threshold = gradient * _window(z, threshold, width) / -width
        return None, for_threshold.sum_to_size(threshold.shape).to(threshold.dtype), None


class _CentreProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b_dec, W_enc):
        ctx.save_for_backward(W_enc)
        return W_enc.new_zeros(W_enc.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        (W_enc,) = ctx.saved_tensors
        return W_enc @ gradient, None
