"""The autoencoder: a wide, sparse dictionary over CLIP's residual stream, one vector a token.

Dimension letters: B batch, T tokens, D d_in, S d_sae. Inputs may have any leading dimensions: [N, D] or [B, T, D].

Source: Lim et al., "Sparse autoencoders reveal selective remapping of visual concepts during adaptation", ICLR 2025, section 3.1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("relu", "topk")


class SaeOutput(NamedTuple):
    """What one forward pass of the autoencoder gives."""

    reconstruction: Tensor
    """[..., D] x as the latents say it: latents @ W_dec + b_dec."""
    latents: Tensor
    """[..., S] activations, not negative, mostly 0."""
    pre_activations: Tensor
    """[..., S] before the activation function; ghost gradients need them."""


class SparseAutoencoder(nn.Module):
    """pre = (x - b_dec) W_enc + b_enc; latents = activation(pre); reconstruction = latents W_dec + b_dec.

    Fresh weights are Kaiming-uniform (fan counted as torch does for a [rows, columns] tensor: the columns), the decoder's rows scaled
    to unit norm, both biases 0. :func:`~patchsae_utils.training.train_sae` moves ``b_dec`` to the data's geometric median first.

    Parameters
    ----------
    d_in : int
        Width of the activations, D.
    d_sae : int
        Number of latents, S.
    activation : {"relu", "topk"}
        The paper's ReLU, or only the ``k`` largest of each token (Gao et al., 2024).
    k : int, optional
        Latents kept a token; for ``topk`` alone.
    metadata : mapping, optional
        What the SAE reads and where it came from: ``model_name``, ``layer``, ``tokens``, ... Plain JSON values; saved with the weights.
    seed : int
        Of the fresh weights.

    Attributes
    ----------
    W_enc : Parameter [D, S]
    b_enc : Parameter [S]
    W_dec : Parameter [S, D]
    b_dec : Parameter [D]

    Raises
    ------
    ValueError
        If a size is not positive, the activation is unknown, or ``k`` doesn't fit it.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: str = "relu",
        *,
        k: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got d_in={d_in}, d_sae={d_sae}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}. Valid: {', '.join(ACTIVATIONS)}.")
        if activation == "topk" and not (k and 0 < k <= d_sae):
            raise ValueError(f"activation='topk' needs k between 1 and d_sae={d_sae}, got k={k}.")
        if activation != "topk" and k is not None:
            raise ValueError(f"k={k} has no meaning for activation={activation!r}; leave it out, or use activation='topk'.")
        self.d_in, self.d_sae, self.activation, self.k = d_in, d_sae, activation, k
        self.metadata: dict[str, Any] = dict(metadata or {})
        generator = torch.Generator().manual_seed(seed)
        W_enc, W_dec = torch.empty(d_in, d_sae), torch.empty(d_sae, d_in)
        nn.init.kaiming_uniform_(W_enc, generator=generator)
        nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        self.normalize_decoder()

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation!r}" + (f", k={self.k}" if self.k else "")

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x - b_dec) W_enc + b_enc: [..., D] -> [..., S]."""
        if x.shape[-1] != self.d_in:
            self.check_source(d_in=x.shape[-1], source="the given tensor")
        # The centre moves into the bias for the backward pass alone (its value there is 0): b_dec then gets its gradient from one vector
        # instead of a [N, S] x [S, D] product that nothing else needs.
        centre = self.b_dec.detach()
        bias = self.b_enc - (self.b_dec - centre) @ self.W_enc
        return F.linear(x - centre, self.W_enc.T, bias)

    def activate(self, pre_activations: Tensor) -> Tensor:
        """The activation function: [..., S] -> [..., S]."""
        latents = torch.relu(pre_activations)
        if self.activation == "topk":
            values, indices = latents.topk(self.k, dim=-1)
            latents = torch.zeros_like(latents).scatter(-1, indices, values)
        return latents

    def encode(self, x: Tensor) -> Tensor:
        """Residual activations to latents: [..., D] -> [..., S]."""
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to residual activations: [..., S] -> [..., D]."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode: [..., D] -> :class:`SaeOutput`."""
        pre_activations = self.pre_activations(x)
        latents = self.activate(pre_activations)
        return SaeOutput(self.decode(latents), latents, pre_activations)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the decoder's rows to unit norm, in place. Otherwise L1 is cheated by small latents and large rows."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient the part along each (unit) row, which the next normalisation would undo."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient.sub_(self.W_dec * (gradient * self.W_dec).sum(1, keepdim=True))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of sizes, activation and weights."""
        digest = hashlib.sha256(json.dumps([self.d_in, self.d_sae, self.activation, self.k]).encode())
        for parameter in (self.W_enc, self.b_enc, self.W_dec, self.b_dec):
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def check_source(self, *, d_in: int, model_name: str | None = None, layer: int | None = None, source: str = "this store") -> None:
        """Refuse activations of another width, model or layer than the SAE was trained on.

        Parameters
        ----------
        d_in : int
            Width of the activations at hand.
        model_name, layer : optional
            Where they come from; compared only where both sides know it.
        source : str
            How the message calls them: "this store", "this model", ...

        Raises
        ------
        ValueError
            Naming both sides and what to do.
        """
        own_name, own_layer = self.metadata.get("model_name"), self.metadata.get("layer")
        wrong_name = None not in (model_name, own_name) and model_name != own_name
        wrong_layer = None not in (layer, own_layer) and layer != own_layer
        if d_in == self.d_in and not wrong_name and not wrong_layer:
            return

        def of(name, at):
            return ("" if name is None else f" of {name!r}") + ("" if at is None else f", layer {at}")

        where = "over" if own_layer is None else f"with layer={own_layer}"
        raise ValueError(
            f"The SAE reads {self.d_in}-dimensional activations{of(own_name, own_layer)}; "
            f"{source} holds {d_in}-dimensional ones{of(model_name, layer)}. "
            f"Extract again {where} from the model the SAE was trained on, or load the SAE that was trained on these."
        )

    def save(self, directory: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` (SAELens v6 form) and return the folder.

        See :func:`patchsae_utils.checkpoints.save_sae`.
        """
        from .checkpoints import save_sae

        return save_sae(self, directory)
