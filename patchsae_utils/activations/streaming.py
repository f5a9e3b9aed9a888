"""Tokens straight from the model, with no store: for data whose activations would not fit the disk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data import batches
from ..run.artifacts import fingerprint
from ..run.memory import HalvedBatches
from .extraction import check_fits, describe_activations
from .mixing import TokenMixer, choose_tokens
from .store import DTYPES, StoreMetadata


class TokenStream:
    """The residual stream after one block over a data set, computed while it is read; has what training needs of an ``ActivationStore``.

    A buffer is filled with the tokens of as many images as fit, drawn in an order of the epoch's own, permuted, and emptied batch by batch;
    then the next one is filled. The order follows from seed and step: a run that starts at step k skips whole buffers without running the
    model, fills the one that holds step k, and gets the batches that it would have got.

    Under several processes (``accelerate launch``) each runs the model on its share of the buffer's images and all exchange what they
    found: all must read alike, as :func:`~patchsae_utils.train_sae` does.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are left out.
    dataset : ImageData or OpenMojiData
    layer : int
        Block whose output is read; -2 is the paper's.
    tokens : {"all", "cls", "patches"}
    dtype : {"bfloat16", "float16"}
        Of the buffer. Batches are float32.
    batch_size : int
        Images per forward pass; halved, with a warning, where so many don't fit the memory.
    buffer_bytes : int
        Of the buffer, on the model's device; it holds at least one forward pass.

    Raises
    ------
    ValueError
        For an unknown layer, tokens or dtype (naming the valid ones), or an empty data set.

    Examples
    --------
    >>> stream = TokenStream(clip, load_dataset("hf:owner/pictures", "train"), layer=-2)
    >>> sae = train_sae(SparseAutoencoder(stream.d_in, 16 * stream.d_in), stream, TrainConfig(), "runs/mine/sae")
    """

    def __init__(
        self,
        clip,
        dataset,
        layer: int = -2,
        *,
        tokens: str = "all",
        dtype: str = "bfloat16",
        batch_size: int = 64,
        buffer_bytes: int = 2**31,
    ):
        if batch_size < 1 or buffer_bytes < 1:
            raise ValueError(f"batch_size and buffer_bytes must be at least 1, got {batch_size} and {buffer_bytes}.")
        self._inputs = describe_activations(clip, dataset, layer, tokens, dtype)
        self.clip, self.dataset = clip, dataset
        self.n_images, self.n_tokens, self.d_in = self._inputs["shape"]
        self.metadata = StoreMetadata.of(self._inputs)
        self.fingerprint: str = fingerprint(stage="stream", batch_size=batch_size, buffer_bytes=buffer_bytes, **self._inputs)
        """Names everything that the batches depend on."""
        self._batch_size, self._buffer_bytes = batch_size, buffer_bytes
        self._fitting = HalvedBatches(clip.device)

    def __len__(self) -> int:
        """Tokens of an epoch: ``n_images * n_tokens``."""
        return self.n_images * self.n_tokens

    def __repr__(self) -> str:
        m = self.metadata
        return f"TokenStream({m.n_images:,} images of {m.dataset!r} x {m.n_tokens} tokens x {m.d_in}, {m.model_name!r} layer {m.layer})"

    def tokens(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        start_step: int = 0,
        positions: bool = False,
        tokens: str = "all",
    ) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:
        """Batches of single tokens, mixed from many images, on the model's device: as :meth:`ActivationStore.tokens`."""
        kept = choose_tokens(self.metadata.tokens, tokens)
        n = len(range(self.n_tokens)[kept])
        first = kept.start + (self.metadata.tokens == "patches")
        mixer = TokenMixer(n, first, batch_size, shuffle, seed, epochs, start_step, positions)
        per_buffer = max(self._batch_size, self._buffer_bytes // (2 * n * self.d_in))
        inside = slice(first, first + n)
        return mixer.batches(np.ones(self.n_images, np.int64), per_buffer, lambda images: self._fill(images, inside))

    def _residual(self, images: Tensor, rows: slice) -> Tensor:
        return self.clip.residual(images[rows], self.metadata.layer)

    @torch.no_grad()
    def _fill(self, images: np.ndarray, kept: slice) -> Tensor:
        """Tokens [n, T, d] of some images; each process computes every so-many-th and gets the others' from them."""
        launched = torch.distributed.is_available() and torch.distributed.is_initialized()
        number, index = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if launched else (1, 0)
        share = -(-len(images) // number)  # equal shares: the last images may be computed twice
        own = images[(np.arange(share) * number + index) % len(images)]
        dtype = DTYPES[self.metadata.dtype]
        buffer = torch.empty(share, kept.stop - kept.start, self.d_in, dtype=dtype, device=self.clip.device)
        row = 0
        for batch in batches(self.dataset, self.clip.preprocess, self._batch_size, indices=own.tolist()):
            for _, x in self._fitting.run(len(batch.images), partial(self._residual, batch.images)):
                buffer[row : row + len(x)] = x[:, kept].to(dtype)
                row += len(x)
        check_fits(buffer, own, self._inputs, self.metadata.dataset, self.metadata.model_name)
        if number == 1:
            return buffer
        parts = [torch.empty_like(buffer) for _ in range(number)]
        torch.distributed.all_gather([part.view(torch.uint8) for part in parts], buffer.view(torch.uint8))
        return torch.stack(parts, 1).flatten(0, 1)[: len(images)]
