"""Why a latent never fires: what can be measured of the causes, latent by latent.

Dimension letters: N tokens of any images, D d_in, S d_sae.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor

from .model import SparseAutoencoder
from .quality import limited_tokens

CAUSES = ("alive", "train_only", "bias", "outcompeted", "starved")


@torch.no_grad()
def dead_causes(
    sae: SparseAutoencoder, train: Iterable[Tensor], test: Iterable[Tensor], n_tokens: int = 200_000, chunk: int = 3 << 20
) -> pd.DataFrame:
    """Whether each latent fires, on tokens it was trained on and on others, and if it never does, what keeps it from it.

    With z = (x - b_dec) w + b the pre-activation of a token x, w the latent's encoder column, b its encoder bias:

    - ``alive``: it fires on a test token.
    - ``train_only``: on train tokens, but on no test token. Dead on this data; more of it, or other data, may show it.
    - ``bias``: on neither, and none as long as the longest token seen could make it: ||w|| max ||x - b_dec|| + b <= t, by the
      Cauchy-Schwarz inequality, where t is what a z must exceed (its ``threshold``; 0 for ``relu``, ``topk`` and the gate of ``gated``).
      The bias lies below any projection.
    - ``outcompeted``: on neither, though z was positive on some token: below its threshold (``jumprelu``, ``batchtopk``, ``matryoshka``),
      never among the k largest (``topk``), or with a magnitude of 0 (``gated``). It gets no gradient, yet stands for something.
    - ``starved``: on neither, z was never positive, yet a token of the right direction would do: the data hold nothing of the kind.

    Parameters
    ----------
    sae : SparseAutoencoder
    train, test : iterable of Tensor [n, D]
        E.g. ``store.tokens(4096)`` of the training images, and of others.
    n_tokens : int
        Of each, the first so many.
    chunk : int
        (token, latent) pairs computed at once.

    Returns
    -------
    DataFrame, one row a latent
        ``cause``, one of ``CAUSES``; ``train_rate`` and ``test_rate``: share of tokens on which it fires; ``largest``: the largest z seen,
        minus t; ``bound``: ||w|| max ||x - b_dec|| + b - t. ``frame["cause"].value_counts(normalize=True)`` sums it up.

    Raises
    ------
    ValueError
        If there are no train or no test tokens.
    """
    device = sae.W_enc.device
    largest = torch.full((sae.d_sae,), -torch.inf, device=device)
    longest, rates = torch.zeros((), device=device), []
    for name, tokens in (("train", train), ("test", test)):
        fired, seen = torch.zeros(sae.d_sae, dtype=torch.long, device=device), 0
        for x in limited_tokens(tokens, n_tokens, max(1, chunk // sae.d_sae)):
            x = x.to(device)
            pre_activations = sae.pre_activations(x)
            fired += (sae.activate(pre_activations) > 0).sum(0)
            largest = torch.maximum(largest, pre_activations.amax(0))
            longest = torch.maximum(longest, (x - sae.b_dec).norm(dim=1).amax())
            seen += len(x)
        if seen == 0:
            raise ValueError(f"dead_causes got no {name} tokens.")
        rates.append((fired.double() / seen).cpu().numpy())
    needed = torch.zeros((), device=device) if sae.threshold is None else sae.threshold
    bound = (sae.W_enc.norm(dim=0) * longest + sae.b_enc - needed).cpu().numpy()
    frame = pd.DataFrame(
        {
            "cause": "starved",
            "train_rate": rates[0],
            "test_rate": rates[1],
            "largest": (largest - needed).cpu().numpy(),
            "bound": bound,
        }
    )
    # from the weakest statement to the strongest
    frame.loc[largest.cpu().numpy() > 0, "cause"] = "outcompeted"
    frame.loc[bound <= 0, "cause"] = "bias"
    frame.loc[frame["train_rate"] > 0, "cause"] = "train_only"
    frame.loc[frame["test_rate"] > 0, "cause"] = "alive"
    frame.index.name = "latent"
    return frame
