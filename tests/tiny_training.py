"""A toy source of tokens, and what tests of training ask of a trained SAE."""

from types import SimpleNamespace

import torch

from patchsae_utils.config import TrainConfig
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.trainer import train_sae

CONFIG = TrainConfig(
    n_tokens=40 * 64, batch_tokens=64, lr=3e-3, warmup_steps=5, l1_coefficient=1e-3, dead_after_tokens=4 * 64, log_every=3,
    checkpoint_every=7, seed=0,
)  # fmt: skip


METADATA = SimpleNamespace(
    model_name="toy", weights_hash="0", layer=1, tokens="all", grid=(2, 2), preprocessing="", dataset="toy", split="train", seed=0,
    n_images=200,
)  # fmt: skip


class Store:
    """Sparse combinations of 12 directions in 8 dimensions around a far centre; ``stop_at`` plays the power cut before that step."""

    d_in = 8
    metadata = METADATA

    def __init__(self, stop_at=None, fingerprint="toy", cls=0.2):
        self.stop_at, self.fingerprint, self.cls = stop_at, fingerprint, cls
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
        self.asked = []

    def __len__(self):
        return 10**9

    def tokens(self, batch_size, *, seed, epochs, start_step, positions):
        assert epochs is None and positions
        self.asked.append((batch_size, seed, start_step))
        step = start_step
        while True:
            if step == self.stop_at:
                raise KeyboardInterrupt
            generator = torch.Generator().manual_seed(1000 * seed + step)
            active = torch.rand(batch_size, 12, generator=generator) < 0.2
            x = 5 + (active * torch.rand(batch_size, 12, generator=generator) * 4) @ self.directions
            yield x, (torch.rand(batch_size, generator=generator) > self.cls).long()
            step += 1


def fresh(**options):
    return SparseAutoencoder(8, 32, seed=0, **options)


def run(out, config=CONFIG, store=None, **options):
    """A fresh SAE trained on the toy tokens into ``out``."""
    return train_sae(fresh(**options), store or Store(), config, out, progress=False)


def cut_off(out, config, *stops, store=Store, **options):
    """Such runs, one after the other, each interrupted before a step."""
    for stop in stops:
        try:
            run(out, config, store(stop_at=stop), **options)
        except KeyboardInterrupt:
            continue
        raise AssertionError(f"the run was to end before step {stop}")


def weights(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_same(left, right):
    """Of two SAEs or their weights, every bit."""
    left, right = (each if isinstance(each, dict) else weights(each) for each in (left, right))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)
