"""Behind the hook: batches read up to it, the network's tail for many calls, sums of decoder rows over the few active latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import ClipModel, Residual
from ..data import batches, templates_for
from ..data.splits import require_labels
from .choosing import NONE_LEFT

BATCH = 32  # images at a time, where no caller says otherwise
PRODUCT_BYTES = 64 * 2**20  # of the largest block of gathered decoder rows
Tail = Callable[[Residual], Tensor]  # residual -> image features [B, d_embed], not normalised


class Read(NamedTuple):
    """A batch of a data set, read up to the hook: labels [B] on the model's device, places in the data set [B]."""

    labels: Tensor
    indices: Tensor
    residual: Residual
    tail: Tail

    def some(self, images: Tensor | slice) -> Residual:
        """The residual streams of some images."""
        return Residual(*(None if part is None else part[images] for part in self.residual))

    def features(self, tokens: Tensor, images: Tensor | slice = slice(None)) -> Tensor:
        """Image features [b, d_embed] of an edited stream [b, T, D] of some images; prompt tokens pass unchanged."""
        return self.tail(self.some(images)._replace(tokens=tokens))


def read_batches(clip: ClipModel, dataset: Any, layer: int, progress: str | None, **options: Any) -> Iterator[Read]:
    """Batches up to the hook; ``options`` are those of ``data.batches``."""
    tail = None
    for batch in batches(dataset, clip.preprocess, progress=progress, **{"batch_size": BATCH, **options}):
        residual = clip.run_to(batch.images, layer)
        tail = tail or network_tail(clip, layer, residual)
        yield Read(batch.labels.to(clip.device), batch.indices, residual, tail)


def network_tail(clip: ClipModel, layer: int, sample: Residual) -> Tail:
    """The rest of the network after ``layer``, for many calls; differentiable.

    One block before the end the image feature reads CLS alone: keys fold into its one query and values into its output, T * D operations a
    head instead of T * D * D. Used only where it gives the features of ``clip.finish`` on the first of ``sample``; else this is
    ``clip.finish``.
    """

    def whole(residual: Residual) -> Tensor:
        return clip.finish(residual, layer)

    base, prompts = clip.tail_inputs(layer)
    visual: Any = base.visual
    block: Any = base.blocks[-1]
    attention = getattr(block, "attn", None)
    packed = isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None and attention.in_proj_bias is not None
    pooled = getattr(visual, "proj", None) is None or getattr(visual, "attn_pool", None) is not None  # CoCa's pooling reads all tokens
    if not packed or pooled or base.layer_index(layer) != base.n_layers - 2 or clip.precision != "fp32":
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


def dataset_head(clip: ClipModel, dataset: Any, head: Tensor | None = None) -> Tensor:
    """The zero-shot head [C, d_embed] of a data set's classes, by its own templates or an adapted model's learned prompts.

    Parameters
    ----------
    clip, dataset : ClipModel, and ImageData or OpenMojiData
    head : Tensor, optional; one that is at hand: another size than of these classes and this model is a ``ValueError``
    """
    require_labels(dataset)
    if head is None:
        return clip.zero_shot_head(dataset.class_names, templates_for(dataset.spec))
    if tuple(head.shape) != (len(dataset.class_names), clip.d_embed):
        wanted = f"[{len(dataset.class_names)}, {clip.d_embed}], a row for each class of {dataset.spec!r}"
        raise ValueError(f"The head must be {wanted}, got {list(head.shape)}. dataset_head(clip, dataset) makes one.")
    return head


class Active(NamedTuple):
    """The positive latents of a batch, token by token: places in the flattened [B * T], latents and values, each [N]; shape is (B, T)."""

    token: Tensor
    latent: Tensor
    value: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, h: Tensor) -> Active:
        """Those of latents [B, T, S]."""
        flat = h.flatten(0, 1)
        token, latent = flat.nonzero(as_tuple=True)
        return cls(token, latent, flat[token, latent], (h.shape[0], h.shape[1]))

    def decode(self, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Sum of value times decoder row over some of the entries (their places; None: all): [B, T, D], without b_dec."""
        token, latent, value = (part if chosen is None else part[chosen] for part in self[:3])
        n_images, n_tokens = self.shape
        ends = torch.bincount(token, minlength=n_images * n_tokens).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return F.embedding_bag(latent, rows, starts, mode="sum", per_sample_weights=value).view(n_images, n_tokens, -1)

    def project(self, direction: Tensor, rows: Tensor) -> Tensor:
        """Each entry's contribution along a direction of its token ([B, T, D]): value * (row . direction), [N]."""
        flat, step = direction.flatten(0, 1), max(1, PRODUCT_BYTES // (4 * rows.shape[1]))
        chunks = zip(*(part.split(step) for part in self[:3]), strict=True)
        return torch.cat([(rows[latent] * flat[token]).sum(1) * value for token, latent, value in chunks])


def contribution(rows: Tensor, h: Tensor, latents: Tensor) -> Tensor:
    """What each image's latents [B, k] add to the stream, given activations [B, T, S]: [B, T, D]; ``SILENT`` adds 0, ``NONE_LEFT`` NaN."""
    latents = latents.to(h.device)
    values = h.gather(2, latents.clamp_min(0)[:, None].expand(-1, h.shape[1], -1))
    values = torch.where((latents >= 0)[:, None], values, torch.where(latents == NONE_LEFT, torch.nan, 0.0)[:, None])
    return values @ rows[latents.clamp_min(0)]


def check_same_tower(base: ClipModel, adapted: ClipModel) -> None:
    """Refuse two models whose image towers differ in shape."""
    if (base.width, base.n_layers, base.grid) != (adapted.width, adapted.n_layers, adapted.grid):
        raise ValueError(f"Image towers differ: {base!r} and {adapted!r}. Give the model that the adapter was fitted to.")
