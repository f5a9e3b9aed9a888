"""Tokens straight from the model, with no store: for data whose activations would not fit the disk."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data import batches
from ..run.artifacts import fingerprint
from ..run.memory import HalvedBatches
from .extraction import check_fits, describe_activations
from .mixing import TokenSource


class TokenStream(TokenSource):
    """The residual stream after one block over a data set, computed while it is read; has what training needs of an ``ActivationStore``.

    A buffer is filled with the tokens of many images, permuted, and emptied batch by batch. The order follows from seed and step: a run that starts
    at step k skips whole buffers without running the model. Under several processes all must read alike: each computes its share.

    Parameters
    ----------
    clip : ClipModel
        Or an adapted model; its prompt tokens are left out.
    dataset : ImageData or OpenMojiData
    layer : int
        Block whose output is read; -2 is the paper's.
    batch_size : int
        Images per forward pass; halved, with a warning, where they don't fit the memory.
    buffer_bytes : int
        Of the buffer, in bfloat16 on the model's device; it holds at least one forward pass. Batches are float32.

    Raises
    ------
    ValueError
        For an unknown layer (naming the valid ones), or an empty data set.
    """

    def __init__(self, clip, dataset, layer: int = -2, *, batch_size: int = 64, buffer_bytes: int = 2**31):
        self._inputs = describe_activations(clip, dataset, layer, "all", "bfloat16")
        self.clip, self.dataset = clip, dataset
        super().__init__(self._inputs)
        self.fingerprint: str = fingerprint(stage="stream", batch_size=batch_size, buffer_bytes=buffer_bytes, **self._inputs)
        self.buffer_bytes, self._least_parts = buffer_bytes, batch_size
        self._sizes = np.ones(self.n_images, np.int64)
        self._fitting = HalvedBatches(clip.device)

    @torch.no_grad()
    def _read(self, parts: np.ndarray, places: range) -> Tensor:
        """Tokens [n, T, d] of some images; each process computes every so-many-th and gets the others' from them."""
        launched = torch.distributed.is_available() and torch.distributed.is_initialized()
        number, index = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if launched else (1, 0)
        share = -(-len(parts) // number)  # equal shares: the last images may be computed twice
        own = parts[(np.arange(share) * number + index) % len(parts)]
        buffer = torch.empty(share, len(places), self.d_in, dtype=torch.bfloat16, device=self.clip.device)
        row = 0

        def residual(images: Tensor, rows: slice) -> Tensor:
            return self.clip.residual(images[rows], self.metadata.layer)

        for batch in batches(self.dataset, self.clip.preprocess, self._least_parts, indices=own.tolist()):
            for _, x in self._fitting.run(len(batch.images), partial(residual, batch.images)):
                buffer[row : row + len(x)] = x[:, places.start : places.stop]
                row += len(x)
        check_fits(buffer, own, self._inputs, self.metadata.dataset, self.metadata.model_name)
        if number == 1:
            return buffer
        found = [torch.empty_like(buffer) for _ in range(number)]
        torch.distributed.all_gather([each.view(torch.uint8) for each in found], buffer.view(torch.uint8))
        return torch.stack(found, 1).flatten(0, 1)[: len(parts)]
