"""The published objectives of the autoencoders that came after ReLU and L1; all with the signature of ``losses.patchsae_loss``.

In each, the squared error is the published one: ||x - x_hat||^2, summed over dimensions, mean over tokens (times ``cls_coefficient`` for CLS
tokens). That is another scale than the paper's mean of (x - x_hat)^2 / ||x||, so a coefficient that suits ``patchsae_loss`` means nothing
here. ``SaeLoss.l1`` holds ``l1_coefficient`` times the variant's own measure of sparsity, ``SaeLoss.ghost`` its auxiliary term.

Dimension letters: D d_in, S d_sae.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .losses import SaeLoss, dead_pre_activations, in_units, token_weights
from .model import SaeOutput, SparseAutoencoder
from .nonlinearities import step

AUXK_COEFFICIENT = 1 / 32
"""alpha of the auxiliary loss. Source: Gao et al., 2024, appendix A.2."""


def topk_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    dead: Tensor | None = None,
    l1_coefficient: float = 0.0,
    cls_coefficient: float = 1.0,
    *,
    is_cls: Tensor | None = None,
    output: SaeOutput | None = None,
    ghost: bool = True,
) -> SaeLoss:
    """||x - x_hat||^2 + AuxK: of TopK (Gao et al., 2024, section 2.3 and appendix A.2) and BatchTopK (Bussmann et al., 2024, section 2).

    ``k`` makes the latents sparse, so there is no such term: ``l1_coefficient`` is there for the common signature and not used.
    ``SaeLoss.ghost`` is :func:`auxk_loss`, left out by ``ghost=False``. Other parameters, and errors, as in ``patchsae_loss``.
    """
    output = sae(x) if output is None else output
    mse = _squared_error(sae, x, output.reconstruction, cls_coefficient, is_cls)
    aux = _auxk(sae, x, output, dead) if ghost else mse.new_zeros(())
    return SaeLoss(mse + aux, mse, mse.new_zeros(()), aux)


def matryoshka_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    dead: Tensor | None = None,
    l1_coefficient: float = 0.0,
    cls_coefficient: float = 1.0,
    *,
    is_cls: Tensor | None = None,
    output: SaeOutput | None = None,
    ghost: bool = True,
) -> SaeLoss:
    """sum over nested dictionaries m of ||x - x_hat_m||^2, + AuxK, where x_hat_m uses the first m latents alone.

    Otherwise as :func:`topk_loss`. ``SaeLoss.mse`` is the sum, so it is as many times larger as there are groups.

    Source: Bussmann et al., "Learning multi-level features with Matryoshka sparse autoencoders", 2025, section 3.
    """
    output = sae(x) if output is None else output
    mse = _squared_error(sae, x, output.reconstruction, cls_coefficient, is_cls)
    if len(sae.groups) > 1:  # the last prefix is the whole reconstruction
        for part in sae.decode_prefixes(output.latents, sae.groups[:-1]):
            mse = mse + _squared_error(sae, x, part.reshape(x.shape), cls_coefficient, is_cls)
    aux = _auxk(sae, x, output, dead) if ghost else mse.new_zeros(())
    return SaeLoss(mse + aux, mse, mse.new_zeros(()), aux)


def jumprelu_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    dead: Tensor | None = None,
    l1_coefficient: float = 1e-3,
    cls_coefficient: float = 1.0,
    *,
    is_cls: Tensor | None = None,
    output: SaeOutput | None = None,
    ghost: bool = True,
) -> SaeLoss:
    """||x - x_hat||^2 + lambda ||latents||_0, with the straight-through gradients of L0 in the thresholds.

    ``l1_coefficient`` is lambda and ``SaeLoss.l1`` lambda times the mean L0. The source has no term for dead latents: ``dead`` and ``ghost``
    are there for the common signature and not used. Other parameters, and errors, as in ``patchsae_loss``.

    Source: Rajamanoharan et al., "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders", 2024, eq. 9 to 12;
    as in those, the kernel reads pre-activations without a ReLU before it.
    """
    output = sae(x) if output is None else output
    mse = _squared_error(sae, x, output.reconstruction, cls_coefficient, is_cls)
    if output.near is None:
        l0 = step(output.pre_activations, sae.threshold, sae.kernel_width).sum(-1).mean()
    else:
        near = output.near
        active = step(near.values, sae.threshold[near.indices.long()], sae.kernel_width)
        l0 = active.sum() / (len(near.offsets) - 1)
    sparsity = l1_coefficient * l0
    return SaeLoss(mse + sparsity, mse, sparsity, mse.new_zeros(()))


def gated_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    dead: Tensor | None = None,
    l1_coefficient: float = 1e-3,
    cls_coefficient: float = 1.0,
    *,
    is_cls: Tensor | None = None,
    output: SaeOutput | None = None,
    ghost: bool = True,
) -> SaeLoss:
    """||x - x_hat||^2 + lambda ||ReLU(gate)||_1 + ||x - x_hat_frozen(ReLU(gate))||^2.

    The last term, in ``SaeLoss.ghost``, reconstructs from the gate's own pre-activations by a decoder that gets no gradient from it. It is
    how the gate learns at all, so ``ghost=False`` does not leave it out, and ``dead`` is not used. Other parameters, and errors, as in
    ``patchsae_loss``.

    Source: Rajamanoharan et al., "Improving dictionary learning with gated sparse autoencoders", 2024, eq. 8.
    """
    output = sae(x) if output is None else output
    mse = _squared_error(sae, x, output.reconstruction, cls_coefficient, is_cls)
    gate = torch.relu(output.pre_activations)
    size = gate.sum(-1, dtype=torch.promote_types(gate.dtype, torch.float32)).mean()
    sparsity = l1_coefficient * (size / sae.input_scale)
    auxiliary = _squared_error(sae, x, gate @ sae.W_dec.detach() + sae.b_dec.detach(), cls_coefficient, is_cls)
    return SaeLoss(mse + sparsity + auxiliary, mse, sparsity, auxiliary)


def auxk_loss(x: Tensor, reconstruction: Tensor, pre_activations: Tensor, rows: Tensor, k: int | None = None) -> Tensor:
    """AuxK: the dead latents with the largest pre-activations predict what the living ones leave over.

    e = x - x_hat, a constant; e_hat = relu(topk(pre[dead])) W_dec[dead]; the term is ||e - e_hat||^2, mean over tokens.

    Parameters
    ----------
    x, reconstruction : Tensor [..., D]
    pre_activations : Tensor [..., n]
        Of the n dead latents.
    rows : Tensor [n, D]
        Their decoder rows.
    k : int, optional
        How many of them; by default the power of two nearest to D / 2, or n if that is less.

    Returns
    -------
    Tensor, scalar
        Finite for any finite pre-activations: they are cut where their square would not be.

    Source: Gao et al., "Scaling and evaluating sparse autoencoders", 2024, section 2.4 and appendix A.2.
    """
    k = min(k or auxk_size(x.shape[-1]), pre_activations.shape[-1])
    positive = torch.relu(pre_activations).clamp_max(torch.finfo(pre_activations.dtype).max ** 0.25)
    values, places = positive.topk(k, dim=-1)
    guess = torch.zeros_like(positive).scatter(-1, places, values) @ rows
    return ((x - reconstruction).detach() - guess).square().sum(-1).mean()


def auxk_size(d_in: int) -> int:
    """The power of two nearest to D / 2, on a logarithmic scale: 512 for 768, as in the source."""
    return 2 ** max(0, round(math.log2(d_in / 2)))


def _auxk(sae: SparseAutoencoder, x: Tensor, output: SaeOutput, dead: Tensor | None) -> Tensor:
    """:func:`auxk_loss` with its coefficient; 0 where nothing is dead."""
    if dead is None or not bool(dead.any()):
        return output.reconstruction.new_zeros(())
    index = dead.nonzero().squeeze(-1)
    pre_activations = dead_pre_activations(sae, x, output, index)
    rows = sae.W_dec.index_select(0, index)
    return AUXK_COEFFICIENT * auxk_loss(in_units(sae, x), in_units(sae, output.reconstruction), pre_activations, rows)


def _squared_error(sae: SparseAutoencoder, x: Tensor, reconstruction: Tensor, cls_coefficient: float, is_cls: Tensor | None) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2, in the loss's units; CLS tokens' times ``cls_coefficient``."""
    error = (in_units(sae, reconstruction) - in_units(sae, x)).square().sum(-1)
    if cls_coefficient != 1.0:
        error = error * token_weights(x, cls_coefficient, is_cls).squeeze(-1)
    return error.mean()
