"""The autoencoder: a wide, sparse dictionary over CLIP's residual stream, one vector a token.

Dimension letters: B batch, T tokens, N tokens of any images, D d_in, S d_sae. Inputs may have any leading dimensions: [N, D] or [B, T, D].

Sources: the paper's ReLU autoencoder: Lim et al., "Sparse autoencoders reveal selective remapping of visual concepts during adaptation",
ICLR 2025, section 3.1. TopK: Gao et al., "Scaling and evaluating sparse autoencoders", 2024. BatchTopK: Bussmann, Leask and Nanda,
"BatchTopK sparse autoencoders", 2024. JumpReLU: Rajamanoharan et al., "Jumping ahead", 2024. Gated: Rajamanoharan et al., "Improving
dictionary learning with gated sparse autoencoders", 2024. Matryoshka: Bussmann et al., "Learning multi-level features with Matryoshka
sparse autoencoders", 2025.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nonlinearities import centre_product, jump_relu, keep_batch_topk, keep_entries, keep_topk, smallest_positive
from .normalization import check_statistics, set_normalization
from .sources import KNOWN, check_source

if TYPE_CHECKING:
    from .sparse import SparseLatents

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
_TOP = ("topk", "batchtopk", "matryoshka")  # need k
_BATCH = ("batchtopk", "matryoshka")  # select within a batch while training, by a threshold afterwards
_BANDWIDTH = 0.03
_THRESHOLD_RATE = 0.01  # of the running mean of the smallest activation a batch keeps


class SaeOutput(NamedTuple):
    """What one forward pass of the autoencoder gives."""

    reconstruction: Tensor
    """[..., D] x as the latents say it: latents @ W_dec + b_dec."""
    latents: Tensor | SparseLatents
    """[..., S] activations, not negative, mostly 0; :class:`~patchsae_utils.sparse.SparseLatents` [N, S] on the sparse path."""
    pre_activations: Tensor | None
    """[..., S] before the activation function (``gated``: of the gate). None on the sparse path, which never holds all of them: ask
    :meth:`SparseAutoencoder.pre_activations` for single latents."""
    near: SparseLatents | None = None
    """Pre-activations above their threshold or within half a bandwidth below it; ``jumprelu`` on the sparse path alone."""


class SparseAutoencoder(nn.Module):
    """pre = (x - b_dec) W_enc + b_enc; latents = activation(pre); reconstruction = latents W_dec + b_dec.

    Fresh weights are Kaiming-uniform (fan counted as torch does for a [rows, columns] tensor: the columns), the decoder's rows scaled
    to unit norm, both biases 0. :func:`~patchsae_utils.training.train_sae` moves ``b_dec`` to the data's geometric median first.

    The activations, with z = pre:

    - ``relu``: max(z, 0), the paper's.
    - ``topk``: each token's ``k`` largest positive z.
    - ``batchtopk``: the ``k`` N largest positive z of a batch of N tokens, in :meth:`forward` while the module is in training mode.
      Meanwhile ``threshold`` follows the running mean of the smallest z that was kept; :meth:`encode`, and :meth:`forward` after
      ``eval()``, keep what exceeds it, so that a token's latents don't depend on its neighbours.
    - ``matryoshka``: as ``batchtopk``; the loss asks each prefix of ``groups`` for a reconstruction of its own.
    - ``jumprelu``: z where it exceeds its latent's learned ``threshold``.
    - ``gated``: max(exp(r_mag) (x - b_dec) W_enc + b_mag, 0) where the gate z is positive.

    Parameters
    ----------
    d_in : int
        Width of the activations, D.
    d_sae : int
        Number of latents, S.
    activation : {"relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"}
    k : int, optional
        Latents kept a token (``topk``), or on average over a batch (``batchtopk``, ``matryoshka``).
    groups : sequence of int, optional
        Sizes of the nested dictionaries of ``matryoshka``, rising, the last d_sae; by default a sixteenth, an eighth, ... and all of it.
    bandwidth : float, optional
        Width of the kernel through which ``jumprelu`` learns its thresholds, and their start; 0.03 by default: a thousandth of the norm
        of a token whose dimensions have unit variance at D = 768, as in the source.
    metadata : mapping, optional
        What the SAE reads and where it came from: ``model_name``, ``layer``, ``tokens``, ... Plain JSON values; saved with the weights.
    seed : int
        Of the fresh weights.

    Attributes
    ----------
    W_enc : Parameter [D, S]
    b_enc : Parameter [S]
        For ``gated``: the gate's, ``b_gate`` in the source and in files.
    W_dec : Parameter [S, D]
    b_dec : Parameter [D]
    threshold : Parameter [S] (``jumprelu``), buffer [] (``batchtopk``, ``matryoshka``; 0 until trained), or None
    b_mag, r_mag : Parameter [S]
        Of ``gated`` alone.
    input_mean : buffer [D]
    input_scale : buffer []
        0 and 1, unless :meth:`set_normalization` was called.

    Raises
    ------
    ValueError
        If a size is not positive, the activation is unknown, or ``k``, ``groups`` or ``bandwidth`` don't fit it.
    """

    threshold: Tensor
    input_mean: Tensor
    input_scale: Tensor
    input_norm: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: str = "relu",
        *,
        k: int | None = None,
        groups: Sequence[int] | None = None,
        bandwidth: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got d_in={d_in}, d_sae={d_sae}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}. Valid: {', '.join(ACTIVATIONS)}.")
        if activation in _TOP and not (k and 0 < k <= d_sae):
            raise ValueError(f"activation={activation!r} needs k between 1 and d_sae={d_sae}, got k={k}.")
        for name, value, users in (("k", k, _TOP), ("groups", groups, ("matryoshka",)), ("bandwidth", bandwidth, ("jumprelu",))):
            if value is not None and activation not in users:
                valid = " or ".join(map(repr, users))
                raise ValueError(f"{name}={value} has no meaning for activation={activation!r}; leave it out, or use activation={valid}.")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
        self.d_in, self.d_sae, self.activation, self.k = d_in, d_sae, activation, k
        self.groups = _checked_groups(groups, d_sae) if activation == "matryoshka" else None
        self.bandwidth = (bandwidth or _BANDWIDTH) if activation == "jumprelu" else None
        self.metadata: dict[str, Any] = dict(metadata or {})
        generator = torch.Generator().manual_seed(seed)
        W_enc, W_dec = torch.empty(d_in, d_sae), torch.empty(d_sae, d_in)
        nn.init.kaiming_uniform_(W_enc, generator=generator)
        nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        if activation == "gated":
            self.b_mag, self.r_mag = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_sae))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((d_sae,), self.bandwidth))
        else:
            self.register_buffer("threshold", torch.zeros(()) if activation in _BATCH else None)
        self.register_buffer("input_mean", torch.zeros(d_in))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_norm", torch.zeros(()))  # root mean square of ||x - input_mean||; 0: not known
        self.normalize_decoder()

    def extra_repr(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in ("k", "groups", "bandwidth") if getattr(self, name))
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation!r}{options}"

    # -- the equations ------------------------------------------------------------------------------------------------

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """(x - b_dec) W_enc + b_enc: [..., D] -> [..., S], or [..., n] for the n ``latents`` whose numbers are given."""
        self.check_width(x)
        if latents is not None:
            W_enc, b_enc = self.W_enc.index_select(1, latents), self.b_enc.index_select(0, latents)
            return F.linear(x - self.b_dec.detach(), W_enc.T, b_enc - centre_product(self.b_dec, W_enc))
        # The centre moves into the bias for the backward pass alone (its value there is 0): b_dec then gets its gradient from one vector
        # instead of a [N, S] x [S, D] product that nothing else needs.
        centre = self.b_dec.detach()
        bias = self.b_enc - (self.b_dec - centre) @ self.W_enc
        return F.linear(x - centre, self.W_enc.T, bias)

    def activate(self, pre_activations: Tensor, latents: Tensor | None = None) -> Tensor:
        """The activation function, of one token: [..., S] -> [..., S].

        ``latents`` says which columns are given, where not all are; ``topk`` then has nothing to choose from, and refuses.
        """

        def of(weights: Tensor) -> Tensor:
            return weights if latents is None else weights.index_select(0, latents)

        if self.activation == "topk":
            if latents is not None:
                raise ValueError("activation='topk' compares all latents of a token: activate all of them, then choose.")
            return keep_topk(torch.relu(pre_activations), self.k)
        if self.activation == "jumprelu":
            return jump_relu(pre_activations, of(self.threshold), self.kernel_width)
        if self.activation == "gated":
            magnitude = torch.exp(of(self.r_mag)) * (pre_activations - of(self.b_enc)) + of(self.b_mag)
            return torch.where(pre_activations > 0, torch.relu(magnitude), 0)
        if self.activation in _BATCH:
            return torch.where(pre_activations > self.threshold, pre_activations, 0)
        return torch.relu(pre_activations)

    def encode(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Residual activations to latents: [..., D] -> [..., S], or [..., n] for the n ``latents`` whose numbers are given."""
        if latents is not None and self.activation == "topk":
            return self.encode(x).index_select(-1, latents)
        return self.activate(self.pre_activations(x, latents), latents)

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Latents to residual activations: [..., S] -> [..., D]."""
        if isinstance(latents, Tensor):
            return latents @ self.W_dec + self.b_dec
        from . import sparse

        return sparse.decode(latents, self.W_dec, self.b_dec)

    def decode_prefixes(self, latents: Tensor | SparseLatents, groups: Sequence[int] | None = None) -> Tensor:
        """What each nested dictionary reconstructs, from the latents before its end: [..., S] -> [G, ..., D]; G = len(groups)."""
        groups = self.groups if groups is None else groups
        if not isinstance(latents, Tensor):
            from . import sparse

            return sparse.decode(latents, self.W_dec, self.b_dec, groups=groups)
        starts = (0, *groups[:-1])
        parts = [latents[..., start:end] @ self.W_dec[start:end] for start, end in zip(starts, groups, strict=True)]
        return torch.stack(parts).cumsum(0) + self.b_dec

    def forward(self, x: Tensor, sparse: bool = False) -> SaeOutput:
        """Encode and decode: [..., D] -> :class:`SaeOutput`.

        In training mode, ``batchtopk`` and ``matryoshka`` choose latents within the batch, and move their threshold.

        Parameters
        ----------
        x : Tensor [..., D]
        sparse : bool
            Compute with active latents alone (:mod:`patchsae_utils.sae.sparse`): the same function and gradients, faster where few are
            active. Under autocast the active are found in bfloat16. ``gated`` has no such path, and ignores this.
        """
        if sparse and self.activation != "gated":
            return self._forward_sparse(x)
        pre_activations = self.pre_activations(x)
        if self.training and self.activation in _BATCH:
            latents = keep_batch_topk(torch.relu(pre_activations), self.k)
            if torch.is_grad_enabled():
                self._follow(latents)
        else:
            latents = self.activate(pre_activations)
        return SaeOutput(self.decode(latents), latents, pre_activations)

    def _forward_sparse(self, x: Tensor) -> SaeOutput:
        from . import sparse

        self.check_width(x)
        in_batch = self.training and self.activation in _BATCH
        if self.activation == "topk":
            select: Any = sparse.TopK(self.k)
        elif in_batch:
            select = sparse.BatchTopK(self.k)
        elif self.activation == "jumprelu":
            select = (self.threshold - self.kernel_width / 2).detach()
        else:
            select = None if self.activation == "relu" else self.threshold
        centre = self.b_dec.detach()
        bias = self.b_enc - centre_product(self.b_dec, self.W_enc)
        precision = "bfloat16" if torch.is_autocast_enabled(x.device.type) else "float32"
        latents, near = sparse.encode((x - centre).reshape(-1, self.d_in), self.W_enc, bias, select, precision=precision), None
        if self.activation == "jumprelu":
            near = latents
            numbers = near.indices.long()
            latents = near._replace(values=jump_relu(near.values, self.threshold[numbers], self.kernel_width))
        reconstruction = self.decode(latents).reshape(x.shape)
        if in_batch and torch.is_grad_enabled():
            self._follow(latents.values)
        if near is not None:  # those below their threshold were there for its gradient alone
            latents = keep_entries(latents, latents.values > 0)
        return SaeOutput(reconstruction, latents, None, near)

    @property
    def kernel_width(self) -> Tensor:
        """Scalar: ``bandwidth`` in units of the residual stream."""
        return self.bandwidth * self.input_scale

    @torch.no_grad()
    def _follow(self, kept: Tensor) -> None:
        """Move the threshold towards the smallest activation of a batch: a running mean, which the first batch starts.

        Source: Bussmann et al., 2024, eq. 5 (the expectation over batches).
        """
        smallest = smallest_positive(kept).to(self.threshold)
        moved = torch.where(self.threshold == 0, smallest, self.threshold.lerp(smallest, _THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    def check_width(self, x: Tensor) -> None:
        """Refuse activations of another width than D."""
        if x.shape[-1] != self.d_in:
            self.check_source(d_in=x.shape[-1], source="the given tensor")

    # -- what training keeps true ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the decoder's rows to unit norm, in place. Otherwise L1 is cheated by small latents and large rows.

        Thresholds of ``jumprelu`` that a step has pushed below 0 return to 0.
        """
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny))
        if self.activation == "jumprelu":
            self.threshold.clamp_min_(0)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient the part along each (unit) row, which the next normalisation would undo."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient.sub_(self.W_dec * (gradient * self.W_dec).sum(1, keepdim=True))

    # -- the input's statistics -----------------------------------------------------------------------------------------

    @property
    def normalizes(self) -> bool:
        """Whether :meth:`set_normalization` has set a mean or a scale."""
        return bool(self.input_scale != 1) or bool(self.input_mean.any())

    def set_normalization(self, x: Tensor, kind: str = "mean_and_norm") -> None:
        """Train as if on (x - mean) / scale of these tokens [N, D]; see :func:`patchsae_utils.sae.normalization.set_normalization`."""
        set_normalization(self, x, kind)

    def check_statistics(self, x: Tensor, source: str = "these activations") -> None:
        """Refuse tokens [N, D] unlike those of :meth:`set_normalization`; see :func:`patchsae_utils.sae.normalization.check_statistics`."""
        check_statistics(self, x, source)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of sizes, activation, weights and what else the outputs or the objective depend on."""
        options = [value for value in (self.groups, self.bandwidth) if value is not None]
        digest = hashlib.sha256(json.dumps([self.d_in, self.d_sae, self.activation, self.k, *options]).encode())
        tensors: list[Tensor] = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        if self.activation == "gated":
            tensors += [self.b_mag, self.r_mag]
        if self.threshold is not None:
            tensors.append(self.threshold)
        if self.normalizes:
            tensors += [self.input_mean, self.input_scale]
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def check_source(self, *, d_in: int, source: str = "this store", **known: Any) -> None:
        """Refuse activations of another kind than those of training; see :func:`patchsae_utils.sae.sources.check_source`."""
        check_source(self, d_in=d_in, source=source, **known)

    def check_store(self, store: Any) -> None:
        """:meth:`check_source` of an activation store, or a token stream, by all that its metadata says."""
        self.check_source(d_in=store.d_in, **{name: getattr(store.metadata, name, None) for name in KNOWN})

    def check_model(self, clip: Any, layer: int | None = None) -> None:
        """:meth:`check_source` of a model's residual stream; an adapted model counts as its base, whose blocks it shares, here and in training."""
        base, trained_on = getattr(clip, "base", clip), self.metadata.get("weights_hash")
        same_base = trained_on and trained_on.partition("+")[0] == base.weights_hash
        self.check_source(
            d_in=clip.width,
            model_name=base.name,
            layer=None if layer is None else clip.layer_index(layer),
            weights_hash=trained_on if same_base or not trained_on else base.weights_hash,
            source=f"the residual stream of {clip.name!r}",
        )

    def save(self, directory: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` (SAELens v6 form) and return the folder.

        See :func:`patchsae_utils.sae.files.save_sae`.
        """
        from .files import save_sae

        return save_sae(self, directory)


def _checked_groups(groups: Sequence[int] | None, d_sae: int) -> tuple[int, ...]:
    """Sizes of nested prefixes, rising up to ``d_sae``."""
    if groups is None:
        groups = sorted({d_sae // part for part in (16, 8, 4, 2, 1)} - {0})
    groups = tuple(int(size) for size in groups)
    if not groups or groups[0] < 1 or any(a >= b for a, b in zip(groups, groups[1:], strict=False)) or groups[-1] != d_sae:
        raise ValueError(f"groups must be sizes that rise from at least 1 to d_sae={d_sae}, got {groups}.")
    return groups
