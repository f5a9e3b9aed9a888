"""The autoencoder: a wide, sparse dictionary over the residual stream of a vision transformer, one vector per token.

Letters: B batch, T tokens, N tokens of any images, D d_in, S d_sae. Variants: :mod:`.variants`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import write
from .formats.sources import SOURCE, check_source, described
from .formats.weights import STATISTICS, Weights, shapes, unit_rows
from .sparse import kernels as sparse_kernels
from .sparse.kernels import SparseLatents, take_rows
from .variants import VARIANTS, centre_product, jump_relu, keep_batch_topk, keep_topk, nested_groups, normalize_rows

ACTIVATIONS = tuple(VARIANTS)
_BANDWIDTH = 0.03
_THRESHOLD_RATE = 0.01  # of the running mean of the smallest activation a batch keeps
_PAIRS_CPU, _PAIRS_GPU = 3 << 20, 1 << 28  # (token, latent) pairs that are computed at once: on a CPU they stay in its cache
_MISFIT = 2.0  # activations whose spread differs by more than this factor, or whose mean lies a whole spread away, don't fit
_UNIT = 1e-5  # how far from 1 a float32 row's norm may be


class SaeOutput(NamedTuple):
    """What one forward pass of the autoencoder gives."""

    reconstruction: Tensor  # [..., D] latents @ W_dec + b_dec
    latents: Tensor | SparseLatents  # [..., S] activations, not negative, mostly 0
    pre_activations: Tensor | None  # [..., S] before the activation function (gated: of the gate); None on the sparse path
    near: SparseLatents | None = None  # sparse jumprelu: pre-activations above their threshold or within half a bandwidth below it


class SparseAutoencoder(nn.Module):
    """pre = (x - b_dec) W_enc + b_enc; latents = activation(pre); reconstruction = latents W_dec + b_dec.

    Fresh weights are Kaiming-uniform, the decoder's rows at unit norm, both biases 0. With z = pre, the activations:

    - ``relu``: max(z, 0), the paper's; ``topk``: each token's ``k`` largest positive z.
    - ``batchtopk``: the ``k`` N largest positive z of a batch of N tokens, in :meth:`forward` in training mode, where ``threshold`` follows
      the running mean of the smallest that was kept; all else keeps what exceeds it. ``matryoshka``: the same, with nested ``groups``.
    - ``jumprelu``: z above its latent's ``threshold``; ``gated``: max(exp(r_mag) (x - b_dec) W_enc + b_mag, 0) where z is positive.

    Parameters
    ----------
    d_in, d_sae : int, width D of the activations, and number S of latents
    activation : {"relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"}
    k : int, optional; latents kept per token (``topk``), or on average over a batch (``batchtopk``, ``matryoshka``)
    groups : sequence of int, optional
        Sizes of the nested dictionaries of ``matryoshka``, rising, the last d_sae; by default a sixteenth, an eighth, ... and all of it.
    bandwidth : float, optional
        Width of the kernel through which ``jumprelu`` learns its thresholds, and their start; 0.03 by default, as in the source at D = 768.
    metadata : mapping, optional; what the SAE reads: ``model_name``, ``layer``, ``tokens``, ... Plain JSON values; saved with the weights
    seed : int, of the fresh weights

    Attributes
    ----------
    W_enc, b_enc, W_dec, b_dec : Parameter [D, S], [S], [S, D], [D]; ``b_enc`` of ``gated`` is the gate's, ``b_gate`` in the source and in files
    b_mag, r_mag : Parameter [S], of ``gated`` alone
    threshold : Parameter [S] (``jumprelu``), buffer [] (``batchtopk``, ``matryoshka``; 0 until trained), or None
    token_norm : bool
        Whether each token is brought to length sqrt(D) around ``b_dec`` before it is encoded, and its latents get its own length back.
    input_mean, input_norm : buffer [D], []
        Mean of the tokens that training saw, and the root mean square of their distance to it; 0 where that is not known.
    """

    threshold: Tensor
    input_mean: Tensor
    input_norm: Tensor

    def __init__(
        self, d_in: int, d_sae: int, activation: str = "relu", *, k: int | None = None, groups: Sequence[int] | None = None,
        bandwidth: float | None = None, metadata: Mapping[str, Any] | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        d_in, d_sae, k = int(d_in), int(d_sae), None if k is None else int(k)  # numpy's numbers are no JSON
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got d_in={d_in}, d_sae={d_sae}.")
        if activation not in VARIANTS:
            raise ValueError(f"Unknown activation {activation!r}. Valid: {', '.join(VARIANTS)}.")
        options = VARIANTS[activation].options
        if "k" in options and not (isinstance(k, Integral) and k is not True and 0 < k <= d_sae):
            raise ValueError(f"activation={activation!r} needs k between 1 and d_sae={d_sae}, got k={k}.")
        for name, value in (("k", k), ("groups", groups), ("bandwidth", bandwidth)):
            if value is not None and name not in options:
                valid = " or ".join(repr(other) for other, variant in VARIANTS.items() if name in variant.options)
                raise ValueError(f"{name}={value} has no meaning for activation={activation!r}; leave it out, or use activation={valid}.")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
        self.d_in, self.d_sae, self.activation, self.k, self.variant = d_in, d_sae, activation, k, VARIANTS[activation]
        self.groups = nested_groups(groups, d_sae) if "groups" in options else None
        self.bandwidth = (bandwidth or _BANDWIDTH) if "bandwidth" in options else None
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.trained_in: dict[Path, tuple[str, str]] = {}  # folder of a run -> fingerprints of these weights before and after it
        self._loaded = self.token_norm = False
        generator = torch.Generator().manual_seed(seed)
        W_enc, W_dec = torch.empty(d_in, d_sae), torch.empty(d_sae, d_in)
        nn.init.kaiming_uniform_(W_enc, generator=generator)
        nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        if self.variant.gate:
            self.b_mag, self.r_mag = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_sae))
        if self.variant.threshold == "each":
            self.threshold = nn.Parameter(torch.full((d_sae,), self.bandwidth))
        else:
            self.register_buffer("threshold", torch.zeros(()) if self.variant.threshold == "one" else None)
        self.register_buffer("input_mean", torch.zeros(d_in))
        self.register_buffer("input_norm", torch.zeros(()))
        self.normalize_decoder()

    def extra_repr(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in ("k", "groups", "bandwidth") if getattr(self, name))
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation!r}{options}"

    def sizes(self, x: Tensor) -> Tensor:
        """||x - b_dec|| / sqrt(D) of each token, [..., 1]: what ``token_norm`` divides it by."""
        return (x - self.b_dec).norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / self.d_in**0.5

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """(x - b_dec) W_enc + b_enc: [..., D] -> [..., S], or [..., n] for the n ``latents`` given by number; of unit-size tokens if ``token_norm``."""
        self.check_width(x)
        centre = self.b_dec if self.token_norm else self.b_dec.detach()
        centred = (x - centre) / self.sizes(x) if self.token_norm else x - centre
        # Else the centre moves into the bias for the backward pass alone (its value there is 0): b_dec's gradient then costs no [N, S] x [S, D] product.
        if latents is None:
            return F.linear(centred, self.W_enc.T, self.b_enc - (self.b_dec - centre) @ self.W_enc)
        W_enc = take_rows(self.W_enc.T, latents)
        return F.linear(centred, W_enc, self.b_enc.index_select(0, latents) - centre_product(self.b_dec - centre, W_enc.T))

    def activate(self, pre_activations: Tensor, latents: Tensor | None = None) -> Tensor:
        """The activation function, of one token: [..., S] -> [..., S]; ``latents`` says which columns are given, where not all are."""

        def of(weights: Tensor) -> Tensor:
            return weights if latents is None else weights.index_select(0, latents)

        if self.variant.competes == "token":  # all are given
            return keep_topk(torch.relu(pre_activations), self.k)
        if self.variant.threshold == "each":
            return jump_relu(pre_activations, of(self.threshold), self.bandwidth)
        if self.variant.gate:
            magnitude = torch.exp(of(self.r_mag)) * (pre_activations - of(self.b_enc)) + of(self.b_mag)
            return torch.where(pre_activations > 0, torch.relu(magnitude), 0)
        if self.variant.threshold == "one":
            return torch.where(pre_activations > self.threshold, pre_activations, 0)
        return torch.relu(pre_activations)

    def encode(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Residual activations to latents: [..., D] -> [..., S], or [..., n] for the n ``latents`` whose numbers are given."""
        if latents is not None and self.variant.competes == "token":
            return self.encode(x).index_select(-1, latents)
        activations = self.activate(self.pre_activations(x, latents), latents)
        return activations * self.sizes(x) if self.token_norm else activations

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Latents to residual activations: [..., S] -> [..., D]."""
        if isinstance(latents, Tensor):
            return latents @ self.W_dec + self.b_dec
        return sparse_kernels.decode(latents, self.W_dec, self.b_dec)

    def decode_prefixes(self, latents: Tensor | SparseLatents, groups: Sequence[int]) -> Tensor:
        """What each nested dictionary reconstructs, from the latents before its end: [..., S] -> [G, ..., D]; G = len(groups)."""
        if not isinstance(latents, Tensor):
            return sparse_kernels.decode(latents, self.W_dec, self.b_dec, groups=groups)
        starts = (0, *groups[:-1])
        parts = [latents[..., start:end] @ self.W_dec[start:end] for start, end in zip(starts, groups, strict=True)]
        return torch.stack(parts).cumsum(0) + self.b_dec

    def forward(self, x: Tensor, sparse: bool = False) -> SaeOutput:
        """Encode and decode: [..., D] -> :class:`SaeOutput`; ``sparse``: by active latents alone (:mod:`.sparse`; ``gated`` ignores it)."""
        if sparse and not self.variant.gate:
            return self._forward_sparse(x)
        pre_activations = self.pre_activations(x)
        if self.training and self.variant.competes == "batch":
            latents = keep_batch_topk(torch.relu(pre_activations), self.k)
            if torch.is_grad_enabled():
                self._follow(latents)
        else:
            latents = self.activate(pre_activations)
        latents = latents * self.sizes(x) if self.token_norm else latents
        return SaeOutput(self.decode(latents), latents, pre_activations)

    def _forward_sparse(self, x: Tensor) -> SaeOutput:
        self.check_width(x)
        variant, in_batch = self.variant, self.training and self.variant.competes == "batch"
        select: sparse_kernels.Select = self.threshold  # None for ``relu``
        if variant.competes == "token" or in_batch:
            select = (sparse_kernels.BatchTopK if in_batch else sparse_kernels.TopK)(self.k)
        elif variant.threshold == "each":
            select = (self.threshold - self.bandwidth / 2).detach()
        centre = self.b_dec if self.token_norm else self.b_dec.detach()
        centred, sizes = x - centre, self.sizes(x) if self.token_norm else None
        bias = self.b_enc - centre_product(self.b_dec - centre, self.W_enc)
        precision = "bfloat16" if torch.is_autocast_enabled(x.device.type) else "float32"
        flat = (centred if sizes is None else centred / sizes).reshape(-1, self.d_in)
        latents = sparse_kernels.encode(flat, self.W_enc, bias, select, precision=precision)
        near = latents if variant.threshold == "each" else None
        if near is not None:
            latents = near._replace(values=jump_relu(near.values, self.threshold[near.indices], self.bandwidth))
        if sizes is not None:
            latents = latents._replace(values=latents.values * sizes.flatten()[latents.tokens()])
        reconstruction = self.decode(latents).reshape(x.shape)
        if in_batch and torch.is_grad_enabled():
            self._follow(latents.values)
        if near is not None:  # those below their threshold were there for its gradient alone
            latents = latents.kept(latents.values > 0)
        return SaeOutput(reconstruction, latents, None, near)

    @torch.no_grad()
    def _follow(self, kept: Tensor) -> None:
        """Move the threshold towards the smallest activation of a batch: a running mean. Source: Bussmann et al., 2024, eq. 5."""
        smallest = (torch.where(kept > 0, kept, torch.inf).amin() if kept.numel() else kept.new_full((), torch.inf)).to(self.threshold)
        moved = torch.where(self.threshold == 0, smallest, self.threshold.lerp(smallest, _THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the decoder's rows to unit norm, in place; thresholds below 0 return to 0."""
        normalize_rows(self.W_dec)
        if self.variant.threshold == "each":
            self.threshold.clamp_min_(0)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient the part along each (unit) row, which the next normalisation would undo."""
        if (gradient := self.W_dec.grad) is not None:
            gradient.sub_(self.W_dec * (gradient * self.W_dec).sum(1, keepdim=True))

    @property
    def is_fresh(self) -> bool:
        """Whether the weights are still those that were drawn: neither loaded nor trained, biases at 0."""
        return not (self._loaded or self.trained_in or self.b_enc.any() or self.b_dec.any())

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of any module; the weights then no longer count as fresh."""
        self._loaded = True
        return super().load_state_dict(*args, **options)

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose latents are computed at once, where there are more."""
        return max(1, (_PAIRS_CPU if self.W_enc.device.type == "cpu" else _PAIRS_GPU) // self.d_sae)

    @property
    def normalizes(self) -> bool:
        """Whether training normalised its tokens; the weights say so by themselves, but for ``token_norm``."""
        return bool(self.input_norm)

    @property
    def reads_unit_tokens(self) -> bool:
        """Whether it was trained on tokens of unit size, so that a token's own size only scales its latents."""
        return self.normalizes and (self.token_norm or (self.variant.competes == "token" and not self.b_enc.any()))

    def check_statistics(self, x: Tensor, source: str = "these activations") -> None:
        """Refuse tokens [N, D] that can't be of the kind that training saw: another spread by a factor of 2, or another mean."""
        self.check_width(x)
        if not self.input_norm:
            return
        centred = x.reshape(-1, self.d_in).double() - self.input_mean.double()
        norm, shift = centred.square().sum(1).mean().sqrt().item(), centred.mean(0).norm().item()
        expected = self.input_norm.item()
        if expected / _MISFIT <= norm <= expected * _MISFIT and shift <= expected:
            return
        what = f"The SAE was trained on activations {expected:.3g} away from their mean (root mean square){described(self.metadata)};"
        what += f" {source} are {norm:.3g} away from that mean, and their own mean {shift:.3g}. Give residual activations of the model,"
        raise ValueError(f"{what} layer and token types it was trained on, not scaled or centred, or train an SAE on these.")

    def check_width(self, x: Tensor) -> None:
        """Refuse activations of another width than D."""
        if x.shape[-1] != self.d_in:
            check_source(self.d_in, self.metadata, x.shape[-1], "the given tensor", {})

    def check_store(self, store: Any) -> None:
        """Refuse a store or stream of activations of another width, model, layer, kind of tokens or preprocessing than those of training."""
        check_source(self.d_in, self.metadata, store.d_in, "this store", {name: getattr(store.metadata, name, None) for name in SOURCE})

    def check_model(self, clip: Any, layer: int, tokens: str = "all") -> None:
        """Refuse a residual stream that training didn't see, as far as both sides know it; an adapted model counts as its base.

        So are ``tokens`` of a kind that training didn't see, but for the one CLS token among all patches.
        """
        base, trained_on = getattr(clip, "base", clip), self.metadata.get("weights_hash")
        read = None if tokens == "all" and self.metadata.get("tokens") == "patches" else tokens
        same_base = trained_on and trained_on.partition("+")[0] == base.weights_hash
        given = {
            "model_name": base.name, "pretrained": base.pretrained, "layer": clip.layer_index(layer), "tokens": "cls and patches" if read == "all" else read,
            "preprocessing": repr(base.preprocess), "weights_hash": trained_on if same_base or not trained_on else base.weights_hash,
        }  # fmt: skip
        check_source(self.d_in, self.metadata, clip.width, f"the residual stream of {clip.name!r}", given)

    def check_own(self, what: str, fingerprint: str) -> None:
        """ValueError if ``what`` was made with another SAE, by that one's fingerprint; an empty one is not known."""
        if fingerprint not in ("", self.fingerprint):
            raise ValueError(f"{what} is of another SAE ({fingerprint}) than this one ({self.fingerprint}). Make it with this one.")

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of sizes, activation, weights and what else the outputs or the objective depend on."""
        options = [value for value in (self.groups, self.bandwidth, self.token_norm or None) if value is not None]
        digest = hashlib.sha256(json.dumps([self.d_in, self.d_sae, self.activation, self.k, *options]).encode())
        names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["b_mag", "r_mag"] * self.variant.gate + ["threshold"] * (self.threshold is not None)
        for name in names:
            digest.update(getattr(self, name).detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def save(self, directory: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` (SAELens v6), rows at unit norm; see :func:`~patchsae_utils.save_sae`."""
        norms = (weights := self.to_weights()).tensors["W_dec"].double().norm(dim=1)
        if not ((norms - 1).abs() <= _UNIT).all():
            if self.k is not None:
                what = f"The decoder's rows have norms from {norms.min():.4g} to {norms.max():.4g}, and {self.activation!r} keeps the"
                raise ValueError(f"{what} largest latents: they would change which. Call sae.normalize_decoder() before saving.")
            weights = weights._replace(tensors=unit_rows(weights.tensors))
        return write(weights, Path(directory), "saelens")

    def to_weights(self) -> Weights:
        """This SAE as plain float32 tensors."""
        tensors = {name: value.detach().float().cpu() for name, value in self.state_dict().items() if name not in STATISTICS}
        statistics: dict[str, Any] = {name: getattr(self, name).tolist() for name in STATISTICS} if self.input_norm else {}
        statistics |= {"token_norm": True} if self.token_norm else {}
        return Weights(tensors, self.activation, {name: getattr(self, name) for name in self.variant.options}, self.metadata, statistics)

    @classmethod
    def from_weights(cls, weights: Weights, path: Path) -> SparseAutoencoder:
        """An SAE of these weights, checked; ``path`` is named in errors."""
        tensors = {name: value.detach().float().contiguous() for name, value in weights.tensors.items()}
        if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
            raise ValueError(f"{path} holds no matrix W_enc [d_in, d_sae]; it holds {shapes(tensors)}.")
        try:
            d_in, d_sae = tensors["W_enc"].shape
            sae = cls(d_in, d_sae, weights.activation, **weights.options, metadata=weights.metadata)
            own = {name: value for name, value in sae.state_dict().items() if name not in STATISTICS}
            sae.token_norm = bool(weights.statistics.get("token_norm", False))
            for name in set(STATISTICS) & set(weights.statistics):
                buffer = getattr(sae, name)
                buffer.copy_(torch.tensor(weights.statistics[name], dtype=torch.float32).reshape(buffer.shape))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        if shapes(own) != shapes(tensors):
            raise ValueError(f"{path} holds {shapes(tensors)}; an SAE of activation {weights.activation!r} has {shapes(own)}.")
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{path}: {name} holds NaN or infinite values. Train or copy it again.")
        sae.load_state_dict(tensors, strict=False)  # the input's statistics are set already
        return sae
