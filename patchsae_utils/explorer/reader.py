"""Images as CLIP and the SAE read them, with the last ones kept: what all explorers look things up in.

Uploads come from strangers: bounded before they are read, decoded by few decoders, and a broken one is told in one sentence.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..clip.model import Residual
from ..data.pictures import as_rgb
from ..interventions.attribution import logit_gradient
from ..interventions.tail import Active, Tail, dataset_head, network_tail
from ..latents.pictures import seen_image
from ..run.memory import give_back
from ..sae.dictionary import select_latents

MAX_BYTES = 8 * 2**20  # of the file; a notebook server's messages end at 10 MiB
MAX_PIXELS = 40_000_000  # of the decoded picture, known from the header before anything is decoded
SIDE = 1024  # longer sides are scaled down to this: CLIP sees 112 to 336 pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # the decoders that may run; Pillow has forty more

SAMPLE = 200  # images, spread over the data set, that tell how a latent is active beyond its strongest images
MEMORY = 100 * 2**20  # bytes of residual streams and pictures that are kept, of at most 256 images
EDGES = 2.0 ** np.arange(-6, 6.5, 0.5)  # of the histograms' bins; the outer ones are open


class Sample(NamedTuple):
    """Images spread over the data set, and how latents are active there."""

    images: np.ndarray  # [N]
    means: Tensor  # [N, S] mean activations over all tokens
    counts: Tensor  # [S, bins] active tokens by their activation


class Reader:
    """Images of a data set, as CLIP and the SAE read them. The last ones stay in memory."""

    _shared: WeakValueDictionary[tuple, Reader] = WeakValueDictionary()

    @classmethod
    def shared(cls, clip: Any, sae: Any, dataset: Any, layer: int = -2) -> Reader:
        """The one reader of these parts: views of the same things keep one memory."""
        key = (id(clip), id(sae), id(dataset), clip.layer_index(layer))  # the reader holds them, so no id is given again while it lives
        return cls._shared.get(key) or cls._shared.setdefault(key, cls(clip, sae, dataset, layer))

    def __init__(self, clip: Any, sae: Any, dataset: Any, layer: int = -2):
        sae.check_model(clip, layer)
        self.clip, self.sae, self.dataset, self.layer = clip, sae, dataset, clip.layer_index(layer)
        self.d_sae, self.grid = sae.W_enc.shape[1], tuple(clip.grid)
        self._keep = min(256, MEMORY // (4 * clip.n_tokens * clip.width + 3 * math.prod(clip.image_size)))
        self._images: OrderedDict[int, tuple[np.ndarray, Residual]] = OrderedDict()
        self._latents: OrderedDict[int, Tensor] = OrderedDict()
        self._activations: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._uploads: dict[int, tuple[Image.Image, str]] = {}
        self._n_uploads = 0
        self._norms = sae.W_dec.detach().norm(dim=1).float().cpu()

    def upload(self, picture: Image.Image, name: str, instead: int = -1) -> int:
        """Keep a picture of one's own, ``instead`` of an earlier one; the index under which it is read: -2 or less."""
        for store in (self._uploads, self._images, self._latents):
            store.pop(instead, None)  # type: ignore[attr-defined]
        self._n_uploads += 1
        self._uploads[-1 - self._n_uploads] = (picture, name)
        return -1 - self._n_uploads

    def label(self, image: int) -> str:
        """The class of an image; the name of an uploaded one."""
        if image in self._uploads:
            return self._uploads[image][1]
        label = int(self.dataset.labels[int(image)])
        return self.dataset.class_names[label] if label >= 0 else f"image {image}"  # of a data set without labels

    def picture(self, image: int) -> np.ndarray:
        """What CLIP saw of an image: uint8 [h, w, 3]. Reads the picture only."""
        if image in self._images:
            return self._images[image][0]
        return seen_image(self.clip, self.inputs([image])[0]).numpy()

    def residual(self, images: Sequence[int] | np.ndarray) -> Residual:
        """The residual stream of images, on the model's device: [B, 1+P, D], and what stands beside it."""
        images = [int(i) for i in images]
        found = {i: self._images[i] for i in images if i in self._images}
        missing = [i for i in dict.fromkeys(images) if i not in found]
        for start in range(0, len(missing), 32):
            part = missing[start : start + 32]
            batch = self.inputs(part)
            with torch.no_grad():
                read = self.clip.run_to(batch, self.layer)
            for k, i in enumerate(part):
                one = Residual(*(None if tokens is None else tokens[k : k + 1].cpu().clone() for tokens in read))
                found[i] = (seen_image(self.clip, batch[k]).numpy(), one)
        for i in images:
            _remember(self._images, i, found[i], self._keep)
        if missing:
            give_back()
        parts = zip(*(found[i][1] for i in images), strict=True)
        return Residual(*(None if part[0] is None else torch.cat(part).to(self.clip.device) for part in parts))

    def activations(self, images: Sequence[int] | np.ndarray, latent: int) -> Tensor:
        """Of one latent on the tokens of images: [B, 1+P]. The last two thousand answers are kept."""
        key = (int(latent), *map(int, images))
        if key not in self._activations:
            with torch.no_grad():
                h = select_latents(self.sae, self.residual(images).tokens, [latent])
            _remember(self._activations, key, h[..., 0].float().cpu(), 2000)
        return self._activations[key]

    def heats(self, images: Sequence[int] | np.ndarray, latent: int) -> np.ndarray:
        """The same on the patches: float32 [B, H, W]."""
        if not len(images):
            return np.zeros((0, *self.grid), np.float32)
        return self.activations(images, latent)[:, 1:].numpy().reshape(-1, *self.grid)

    def latents(self, image: int) -> Tensor:
        """Activations of all latents on an image's CLS and patches: [1+P, S]."""
        if image not in self._latents:
            with torch.no_grad():
                h = self.sae.encode(self.residual([image]).tokens[0].to(self.sae.W_enc.device)).float().cpu()
            _remember(self._latents, image, h, 2)  # 39 MB each, at ViT-B/16 with 49,152 latents
        return self._latents[image]

    def forget(self) -> None:
        """Free what is large."""
        self._latents.clear()

    @cached_property
    def tail(self) -> Tail:
        """The rest of the network."""
        return network_tail(self.clip, self.layer, self.residual([next(reversed(self._images), 0)]))

    @cached_property
    def head(self) -> Tensor | None:
        """The zero-shot head of the data set's classes; None where there are no classes, or no text tower."""
        return dataset_head(self.clip, self.dataset) if self.clip.has_text and len(self.dataset.class_names) else None

    @cached_property
    def sample(self) -> Sample:
        """Read when it is first asked for, which takes seconds."""
        images = np.unique(np.linspace(0, len(self.dataset) - 1, SAMPLE).astype(int))
        means, counts = [], torch.zeros(self.d_sae, len(EDGES) - 1)
        with torch.no_grad():
            for start in range(0, len(images), 16):
                for tokens in self.clip.residual(self.inputs(images[start : start + 16].tolist()), self.layer):
                    h = self.sae.encode(tokens.to(self.sae.W_enc.device)).float().cpu()
                    means.append(h.mean(0))
                    latent = h.nonzero(as_tuple=True)[1]
                    place = torch.bucketize(h[h > 0], torch.from_numpy(EDGES[1:-1]).float(), right=True)
                    counts.view(-1).index_add_(0, latent * counts.shape[1] + place, torch.ones(len(latent)))
        return Sample(images, torch.stack(means), counts)

    def owed(self, image: int, target: int = -1, head: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        """What a class's logit (-1: the predicted one's) owes to each latent on each token [1+P, S], all probabilities [C], and the class."""
        residual, rows, head = self.residual([image]), self.sae.W_dec.detach(), self.head if head is None else head
        with torch.no_grad():
            logits = self.clip.logits(self.tail(residual), head)
        target = int(logits.argmax()) if target < 0 else target
        gradient = logit_gradient(self.clip, self.tail, residual, head, torch.tensor([target], device=logits.device))
        active = Active.of(self.latents(image)[None].to(rows.device))  # few latents are, and their rows alone are read
        shares = torch.zeros(self.latents(image).shape)
        shares[active.token.cpu(), active.latent.cpu()] = active.project(gradient.to(rows.device), rows).float().cpu()
        return shares, logits[0].softmax(-1).float().cpu(), target

    def nearest(self, latent: int, n: int, dead: np.ndarray) -> list[tuple[int, float]]:
        """The latents whose decoder rows point most nearly where this one's does, with their cosines."""
        rows, norms = self.sae.W_dec.detach(), self._norms
        cosine = (rows @ rows[latent]).float().cpu() / (norms * norms[latent]).clamp_min(1e-12)
        cosine[latent] = cosine[torch.as_tensor(dead)] = -torch.inf
        top = cosine.topk(min(n, len(cosine) - 1))
        return [(int(i), float(v)) for v, i in zip(*top, strict=True) if v > -torch.inf]

    def inputs(self, images: Sequence[int]) -> Tensor:
        """Images as CLIP takes them: [B, 3, H, W]."""
        return torch.stack([self.clip.preprocess(self._uploads[i][0] if i < 0 else self.dataset[int(i)].image) for i in images])


def _remember(store: OrderedDict, key: Hashable, value: Any, keep: int) -> None:
    store[key] = value
    store.move_to_end(key)
    while len(store) > keep:
        store.popitem(last=False)


class UploadError(ValueError):
    """An upload that is no picture, or too large. The message is for the person who uploaded it."""


def read_upload(data: bytes | memoryview, name: str = "") -> tuple[Image.Image, str]:
    """Decode an uploaded picture."""
    name = "".join(c if c.isprintable() else " " for c in str(name)).strip()[:80] or "image"
    if not len(data):
        raise UploadError("The file is empty.")
    if len(data) > MAX_BYTES:
        raise UploadError(f"The file has {len(data) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are read.")
    try:
        picture = Image.open(io.BytesIO(bytes(data)), formats=FORMATS)
        width, height = picture.size
        if width * height <= MAX_PIXELS:
            picture.draft("RGB", (SIDE, SIDE))  # JPEG: decodes no more than is needed
            picture = as_rgb(picture)
    except Image.DecompressionBombError:
        raise UploadError(f"The picture is too large; at most {MAX_PIXELS // 10**6} million pixels are read.") from None
    except Exception:  # decoders raise whatever they like on broken files
        raise UploadError(f"This file can't be read as a picture; give one of {', '.join(FORMATS)}.") from None
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels, {width * height / 1e6:.0f} million"
        raise UploadError(f"The picture has {size}; at most {MAX_PIXELS // 10**6} million are read.")
    picture.thumbnail((SIDE, SIDE))
    return picture, name
