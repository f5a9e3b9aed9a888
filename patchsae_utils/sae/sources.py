"""Where activations come from: what an SAE was trained on against what it is given."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import SparseAutoencoder

KNOWN = ("model_name", "layer", "weights_hash", "tokens", "preprocessing")
"""What metadata says of the source of activations, beside their width."""


def check_source(sae: SparseAutoencoder, *, d_in: int, source: str = "this store", **known: Any) -> None:
    """Refuse activations of another width, model, layer, kind of tokens or preprocessing than an SAE was trained on.

    Parameters
    ----------
    sae : SparseAutoencoder
        Its ``metadata`` says what it reads.
    d_in : int
        Width of the activations at hand.
    source : str
        How the message calls them: "this store", "this model", ...
    **known
        Of :data:`KNOWN`, where they come from; compared only where both sides know it. The hash of the weights decides on the model where
        it is known: equal weights may have two names, and one name several weights. CLS tokens alone and patches alone don't fit each
        other; either fits ``all``.

    Raises
    ------
    ValueError
        Naming both sides and what to do.
    """
    own = {name: sae.metadata.get(name) for name in KNOWN}
    given = {name: known.pop(name, None) for name in KNOWN}
    if known:
        raise TypeError(f"check_source knows no {', '.join(known)}. Valid: d_in, source, {', '.join(KNOWN)}.")
    wrong = {name for name in ("layer", "tokens") if None not in (own[name], given[name]) and own[name] != given[name]}
    if "all" in (own["tokens"], given["tokens"]):
        wrong.discard("tokens")
    if not same_model(own, given):
        wrong.add("weights_hash" if own["model_name"] == given["model_name"] else "model_name")
    prints = [preprocessing_fingerprint(side["preprocessing"]) for side in (own, given) if side["preprocessing"] is not None]
    if len(set(prints)) > 1:
        wrong.add("preprocessing")
    if d_in == sae.d_in and not wrong:
        return
    names = {"weights_hash": "weights", "tokens": "tokens", "preprocessing": "preprocessing"}
    sides = [
        described(side["model_name"], side["layer"], **{word: side[name] for name, word in names.items() if name in wrong})
        for side in (own, given)
    ]
    where = "over" if own["layer"] is None else f"with layer={own['layer']}"
    raise ValueError(
        f"The SAE reads {sae.d_in}-dimensional activations{sides[0]}; {source} holds {d_in}-dimensional ones{sides[1]}. "
        f"Extract again {where} from the model the SAE was trained on, or load the SAE that was trained on these."
    )


def described(model_name: str | None, layer: int | None, **more: Any) -> str:
    """The words " of 'model', layer 3, weights 1a2b", or as many of them as are known."""
    words = ("" if model_name is None else f" of {model_name!r}") + ("" if layer is None else f", layer {layer}")
    return words + "".join(f", {name} {' '.join(str(value).split())}" for name, value in more.items() if value is not None)


def preprocessing_fingerprint(preprocessing: str) -> str:
    """First 8 hex digits of the SHA-256 of a preprocessing's description, without what differs between two processes."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", preprocessing).encode()).hexdigest()[:8]


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two descriptions can be of one model: by the hashes of its weights where both are known, else by name.

    "ViT-B-16" with OpenAI's weights is what open_clip also calls "ViT-B-16-quickgelu": by name alone these two pass.
    """
    if a.get("weights_hash") and b.get("weights_hash"):
        return a["weights_hash"] == b["weights_hash"]
    names = [str(each["model_name"]).removesuffix("-quickgelu") for each in (a, b) if each.get("model_name")]
    return len(set(names)) < 2
