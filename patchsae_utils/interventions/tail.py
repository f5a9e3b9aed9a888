"""Behind the hook: the network's tail for many calls, sparse edits of the residual stream, and what every intervention checks first.

Dimension letters: B batch, T tokens (CLS, then patches), D d_in, S d_sae, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import ClipModel, Residual
from ..data import templates_for

if TYPE_CHECKING:
    from ..sae.model import SparseAutoencoder

PLACES = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}
"""Named tokens of [CLS, patch 1, ..., patch P]."""

PRODUCT_BYTES = 64 * 2**20
"""Size of the largest block of gathered decoder rows."""


# -- the network's tail -----------------------------------------------------------------------------------------------


def network_tail(clip: ClipModel, layer: int, sample: Residual) -> Callable[[Residual], Tensor]:
    """The rest of the network after ``layer``, for many calls.

    One block before the end the image feature reads CLS alone, so that only one query is needed: keys fold into it and values into its
    output, which costs T * D operations a head instead of T * D * D. Used only where it gives the same features as ``clip.finish``
    on the first of ``sample``; otherwise this is ``clip.finish`` (other layers, other poolings).

    Returns
    -------
    callable
        Residual -> image features [B, d_embed]; differentiable.
    """

    def whole(residual: Residual) -> Tensor:
        return clip.finish(residual, layer)

    base, prompts = clip.tail_inputs(layer)
    if base.layer_index(layer) != base.n_layers - 2 or clip.precision != "fp32" or getattr(base.visual, "proj", None) is None:
        return whole
    block: Any = base.blocks[-1]
    visual: Any = base.visual
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None or attention.in_proj_bias is None:
        return whole
    heads, width = attention.num_heads, attention.embed_dim
    W_q, W_k, W_v = attention.in_proj_weight.chunk(3)
    b_q, _, b_v = attention.in_proj_bias.chunk(3)  # the keys' bias adds the same to every score: softmax doesn't see it
    W_k, W_v = W_k.view(heads, -1, width), W_v.view(heads, -1, width)

    def class_token_alone(residual: Residual) -> Tensor:
        behind = residual.extra if prompts is None else prompts.expand(len(residual.tokens), -1, -1)
        x = residual.tokens if behind is None else torch.cat([residual.tokens, behind], 1)
        y = block.ln_1(x)
        query = F.linear(y[:, 0], W_q, b_q).view(len(x), heads, -1) * (width // heads) ** -0.5
        scores = torch.einsum("bhe,hed->bhd", query, W_k) @ y.transpose(1, 2)
        mean = scores.softmax(-1) @ y
        value = torch.einsum("bhd,hed->bhe", mean, W_v).flatten(1) + b_v
        cls = x[:, 0] + block.ls_1(attention.out_proj(value))
        cls = cls + block.ls_2(block.mlp(block.ln_2(cls)))
        return visual.ln_post(cls) @ visual.proj

    one = Residual(*(None if part is None else part[:1] for part in sample))
    with torch.no_grad():
        fast, slow = (F.normalize(run(one), dim=-1) for run in (class_token_alone, whole))
    return class_token_alone if torch.allclose(fast, slow, rtol=0, atol=1e-4) else whole


# -- what latents add to the residual stream --------------------------------------------------------------------------


class Decoder(NamedTuple):
    """What latents add to the residual stream: ``decode(h) = h @ rows + offset``."""

    rows: Tensor
    """[S, D]: the decoder's rows, in units of the residual stream (an SAE may normalise its input and undo that behind the decoder)."""
    offset: Tensor
    """[D]: what the SAE says when no latent is active."""


@torch.no_grad()
def decoder_of(sae: SparseAutoencoder) -> Decoder:
    """An SAE's affine decoder, read off ``sae.decode``.

    Raises
    ------
    ValueError
        If a latent's contribution is no multiple of its row of ``W_dec``.
    """
    probe = sae.W_dec.new_zeros(2, sae.d_sae)
    latent = int(sae.W_dec.norm(dim=1).argmax())
    probe[1, latent] = 1
    offset, one = sae.decode(probe)
    row, moved = sae.W_dec[latent], one - offset
    scale = float((moved @ row) / (row @ row))
    # One subtraction of float32 numbers as large as the offset is between `moved` and the truth.
    slack = 1e-5 * (1 + float(offset.abs().max()) + abs(scale) * float(row.abs().max()))
    if not torch.allclose(moved, scale * row, rtol=0, atol=slack):
        raise ValueError("This SAE's decode() is not h @ W_dec times a number, plus a constant: its latents can't be edited one by one.")
    exact = abs(scale - 1) * float(row.abs().max()) < slack
    return Decoder(sae.W_dec.detach() if exact else scale * sae.W_dec.detach(), offset)


class Active(NamedTuple):
    """The positive latents of a batch, listed token by token."""

    token: Tensor
    """[N] place in the flattened [B * T], rising."""
    latent: Tensor
    """[N]"""
    value: Tensor
    """[N]"""
    shape: tuple[int, int]
    """(B, T)"""

    @classmethod
    def of(cls, h: Tensor) -> Active:
        flat = h.flatten(0, 1)
        token, latent = flat.nonzero(as_tuple=True)
        return cls(token, latent, flat[token, latent], (h.shape[0], h.shape[1]))

    @property
    def image(self) -> Tensor:
        """[N]"""
        return self.token // self.shape[1]

    def decode(self, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Sum of value times decoder row over some of the entries (bool [N]; None: all): [B, T, D], without the offset."""
        token, latent, value = (part if chosen is None else part[chosen] for part in self[:3])
        n_images, n_tokens = self.shape
        ends = torch.bincount(token, minlength=n_images * n_tokens).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return F.embedding_bag(latent, rows, starts, mode="sum", per_sample_weights=value).view(n_images, n_tokens, -1)

    def project(self, direction: Tensor, rows: Tensor) -> Tensor:
        """Each entry's contribution along a direction of its token ([B, T, D]): value * (row . direction), [N]."""
        flat, step = direction.flatten(0, 1), max(1, PRODUCT_BYTES // (4 * rows.shape[1]))
        parts = [
            (rows[self.latent[i : i + step]] * flat[self.token[i : i + step]]).sum(1) * self.value[i : i + step]
            for i in range(0, len(self.token), step)
        ]
        return torch.cat(parts) if parts else self.value


def contribution(rows: Tensor, h: Tensor, latents: Tensor) -> Tensor:
    """What each image's latents ([B] or [B, k]; -1: none) add to the residual stream, given activations [B, T, S]: [B, T, D]."""
    latents = latents.reshape(len(h), -1).to(h.device)
    real = (latents >= 0).to(h.dtype)
    columns = latents.clamp_min(0)
    values = h.gather(2, columns[:, None].expand(-1, h.shape[1], -1)) * real[:, None]
    return values @ rows[columns]


# -- checks and heads -------------------------------------------------------------------------------------------------


def dataset_head(clip: ClipModel, dataset) -> Tensor:
    """The zero-shot head [C, d_embed] of a data set's classes, by its own templates (or an adapted model's learned prompts)."""
    return clip.zero_shot_head(dataset.class_names, templates_for(dataset.spec))


def check_models(clip: ClipModel, sae: SparseAutoencoder, layer: int) -> None:
    """Refuse an SAE of another width or on another device than the model, and an unknown layer."""
    clip.layer_index(layer)
    if sae.d_in != clip.width:
        raise ValueError(
            f"The SAE reads {sae.d_in}-dimensional activations; {clip.name!r} has width {clip.width}. Load the SAE that was trained on it."
        )
    if sae.W_dec.device.type != clip.device.type:
        raise ValueError(f"The SAE is on {sae.W_dec.device}, the model on {clip.device}. Move it: sae.to(clip.device).")


def check_same_tower(base: ClipModel, adapted: ClipModel) -> None:
    """Refuse two models whose image towers differ in shape."""
    if (base.width, base.n_layers, base.grid) != (adapted.width, adapted.n_layers, adapted.grid):
        raise ValueError(
            f"Both models must have the same image tower; got {base!r} and {adapted!r}. Give the model that the adapter was fitted to."
        )
