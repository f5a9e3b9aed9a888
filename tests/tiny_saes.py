"""SAEs with no weight at its start, of every variant."""

import json

import torch

from patchsae_utils.sae.files import CONFIG
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.starts import Normalization

METADATA = {"model_name": "openmoji", "layer": 4, "tokens": "all", "grid": [14, 14]}


VARIANTS = [
    {}, {"activation": "topk", "k": 3}, {"activation": "batchtopk", "k": 3}, {"activation": "jumprelu", "bandwidth": 0.2},
    {"activation": "gated"}, {"activation": "matryoshka", "k": 3, "groups": (5, 20)},
]  # fmt: skip


TOKENS = 4 + 2 * torch.randn(300, 6, generator=torch.Generator().manual_seed(4))


def trained(options, normalize="none"):
    """An SAE with no weight at its start, and a threshold where there is one."""
    sae = SparseAutoencoder(6, 20, metadata=METADATA, seed=1, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "b_dec":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.b_dec.add_(0.1 * torch.randn(6, generator=generator))
    sae.normalize_decoder()
    Normalization.of(TOKENS, normalize).fold(sae)
    sae(TOKENS)
    return sae


def change(directory, **entries):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **entries}))


def perturbed(d_in=6, d_sae=20, seed=0, **options):
    """An SAE with no parameter left at 0, in float64."""
    sae = SparseAutoencoder(d_in, d_sae, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def dense(latents):
    """Sparse latents [N, S] with zeros filled in; differentiable."""
    d_sae = len(latents.entries.offsets) - 1
    return latents.values.new_zeros(latents.n_tokens, d_sae).index_put((latents.tokens(), latents.indices), latents.values)
