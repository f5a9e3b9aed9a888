"""The autoencoder's variants: what each needs and does, and how pre-activations become latents. Letters: N tokens, D d_in, S d_sae.

Sources: relu: Lim et al., ICLR 2025, section 3.1. topk: Gao et al., "Scaling and evaluating sparse autoencoders", 2024. batchtopk: Bussmann
et al., 2024. jumprelu: Rajamanoharan et al., "Jumping ahead", 2024. gated: Rajamanoharan et al., "Improving dictionary learning with gated
sparse autoencoders", 2024. matryoshka: Bussmann et al., "Learning multi-level features with Matryoshka sparse autoencoders", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """What tells one variant from the others."""

    architecture: str  # SAELens's name of what it is once trained: how it is saved
    loss: str  # its published objective, see losses.objective: paper, auxk, l0 or gate
    options: tuple[str, ...] = ()  # arguments beside the sizes; k is needed, others have defaults
    competes: str | None = None  # among whose latents the largest are chosen: those of a token, or in training of a batch
    threshold: str | None = None  # what a pre-activation must exceed: a running mean for all latents (one), or a learned value of each
    gate: bool = False  # whether a gate decides on activity, and a second bias on size
    control: str = "threshold"  # where random_sae sets the sparsity: threshold, encoder bias, or nowhere (k)


VARIANTS = {
    "relu": Variant("standard", "paper", control="bias"),
    "topk": Variant("topk", "auxk", ("k",), competes="token", control="k"),
    "batchtopk": Variant("jumprelu", "auxk", ("k",), competes="batch", threshold="one"),
    "jumprelu": Variant("jumprelu", "l0", ("bandwidth",), threshold="each"),
    "gated": Variant("gated", "gate", gate=True, control="bias"),
    "matryoshka": Variant("jumprelu", "auxk", ("k", "groups"), competes="batch", threshold="one"),
}


def nested_groups(groups: Sequence[int] | None, d_sae: int) -> tuple[int, ...]:
    """Sizes of nested prefixes, rising up to ``d_sae``."""
    if groups is None:
        groups = sorted({d_sae // part for part in (16, 8, 4, 2, 1)} - {0})
    groups = tuple(int(size) for size in groups)
    if not groups or groups[0] < 1 or any(a >= b for a, b in zip(groups, groups[1:], strict=False)) or groups[-1] != d_sae:
        raise ValueError(f"groups must be sizes that rise from at least 1 to d_sae={d_sae}, got {groups}.")
    return groups


def keep_topk(latents: Tensor, k: int) -> Tensor:
    """Each token's ``k`` largest latents, the others 0: [..., S] -> [..., S]. Source: Gao et al., 2024, eq. 3."""
    values, indices = latents.topk(k, dim=-1)
    return torch.zeros_like(latents).scatter(-1, indices, values)


def keep_batch_topk(latents: Tensor, k: int) -> Tensor:
    """The ``k`` N largest latents of a batch of N tokens, the others 0: [..., S] -> [..., S]. Source: Bussmann et al., 2024, eq. 3."""
    flat = latents.reshape(-1)
    values, indices = flat.topk(k * (latents.numel() // latents.shape[-1]))
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(latents)


def normalize_rows(rows: Tensor) -> None:
    """Scale rows [n, D] to unit norm, in place."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))


def _window(pre_activations: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    return (pre_activations - threshold).abs() < width / 2


class _JumpReLU(torch.autograd.Function):
    """z above its threshold t, else 0; d/dt: -(t / width) K((z - t) / width), K(u) = [|u| < 1/2]. Source: "Jumping ahead", eq. 11."""

    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold, torch.as_tensor(width, dtype=threshold.dtype))
        # A threshold that an optimiser's step has just pushed below 0 must not let negative latents through.
        return torch.where(z > threshold.clamp_min(0), z, 0)

    @staticmethod
    def backward(ctx, gradient):
        z, threshold, width = ctx.saved_tensors
        for_z = torch.where(z > threshold.clamp_min(0), gradient, 0)
        for_threshold = gradient * _window(z, threshold, width) * (-threshold / width)
        return for_z, for_threshold.sum_to_size(threshold.shape).to(threshold.dtype), None


class _Step(torch.autograd.Function):
    """1 where z exceeds its threshold, else 0: what L0 counts. Derivative in t: -K((z - t) / width) / width; in z: 0. Source: eq. 12."""

    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold, torch.as_tensor(width, dtype=threshold.dtype))
        return (z > threshold.clamp_min(0)).to(torch.promote_types(z.dtype, torch.float32))

    @staticmethod
    def backward(ctx, gradient):
        z, threshold, width = ctx.saved_tensors
        for_threshold = gradient * _window(z, threshold, width) / -width
        return None, for_threshold.sum_to_size(threshold.shape).to(threshold.dtype), None


class _CentreProduct(torch.autograd.Function):
    """b_dec @ W_enc around b_dec's present value: zeros [S], through which ``b_dec`` [D] gets its gradient; that of ``W_enc`` is 0."""

    @staticmethod
    def forward(ctx, b_dec, W_enc):
        ctx.save_for_backward(W_enc)
        return W_enc.new_zeros(W_enc.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        (W_enc,) = ctx.saved_tensors
        return W_enc @ gradient, None


jump_relu, step, centre_product = _JumpReLU.apply, _Step.apply, _CentreProduct.apply
