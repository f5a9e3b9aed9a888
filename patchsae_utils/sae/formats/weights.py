"""An SAE as plain tensors, and the check of settings that decides whether a file is read. Letters: D d_in, S d_sae."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

STATISTICS = ("input_mean", "input_norm")
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", "none", [], {}, ())  # values by which a setting says that it does nothing


class Weights(NamedTuple):
    """An SAE as plain tensors, in our equations and by our names."""

    tensors: dict[str, Tensor]  # W_enc [D, S], b_enc [S], W_dec [S, D], b_dec [D], and the variant's own
    activation: str = "relu"
    options: Mapping[str, Any] = {}  # k, groups, bandwidth, as far as the variant has them
    metadata: Mapping[str, Any] = {}
    statistics: Mapping[str, Any] = {}  # STATISTICS, where known; and token_norm, which our own folder alone can say


_TRANSPOSED = ("encoder.weight", "decoder.weight")  # torch.nn.Linear's: [out, in]


def renamed(state: Any, names: Mapping[str, str], file: Path, unused: Iterable[str] = (), transposed=_TRANSPOSED) -> dict[str, Tensor]:
    """A state dict's tensors by our names. Those in ``unused`` don't take part in the equation; any other is refused, for it may."""
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{file} lacks the weights {', '.join(missing)}; it holds {shapes(tensors)}.")
    numbers = {str(name) for name, value in state.items() if isinstance(value, int | float)}
    if more := sorted({*tensors, *numbers} - {*names, *unused}):
        what = f"{file} holds the weights {', '.join(more[:8])}, for which an SAE of the kind that its settings name has no use."
        raise ValueError(f"{what} What they change is not known here, so such an SAE would give wrong latents.")
    return {ours: tensors[name].T if name in transposed else tensors[name] for name, ours in names.items()}


def named(tensors: Mapping[str, Tensor], names: Mapping[str, str], transposed: Iterable[str] = _TRANSPOSED) -> dict[str, Tensor]:
    """The way back: our tensors by a program's names."""
    return {name: (tensors[ours].T if name in transposed else tensors[ours]).contiguous() for name, ours in names.items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, for messages and comparisons."""
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def centred(tensors: dict[str, Tensor], sign: int = 1) -> dict[str, Tensor]:
    """From encoders that don't subtract b_dec to ours: x W + b = (x - b_dec) W + (b + b_dec W), rounded once; -1: back. Gated: both biases."""
    shift = sign * tensors["b_dec"].double() @ tensors["W_enc"].double()
    moved = {"b_enc": (tensors["b_enc"].double() + shift).float()}
    if "b_mag" in tensors:
        moved["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift).float()
    return tensors | moved


def unit_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows at unit norm, each norm moved into its latent: the same reconstruction. Latents of rows of zeros are silenced."""
    norms = tensors["W_dec"].double().norm(dim=1)
    rows = tensors["W_dec"].double() / norms.where(norms > 0, 1.0)[:, None]
    rows[norms == 0, 0] = 1
    changed = {"W_dec": rows}
    if "r_mag" in tensors:
        changed |= {name: tensors[name].double() * (norms > 0) for name in ("W_enc", "b_enc")}
        changed |= {"r_mag": tensors["r_mag"].double() + norms.where(norms > 0, 1.0).log(), "b_mag": tensors["b_mag"].double() * norms}
    else:
        changed |= {name: tensors[name].double() * norms for name in ("W_enc", "b_enc", "threshold") if name in tensors}
    return tensors | {name: value.float() for name, value in changed.items()}


# Words of settings that say how, on what and where an SAE was trained, and not what it computes; unless the name holds one of the second.
_TRAINING = set(
    "adam alpha anneal autocast aux auxk bandwidth batch batches beta beta1 beta2 bf16 bos buffer buffers cache checkpoint checkpoints "
    "coeff coefficient column commit compilation compile context cycles data dataloader dataset dead decay device dir dtype early entity "
    "epochs eval evals exclude files finetuning fraction frequency from ghost grad grads hf id image images init initialization is jumprelu "
    "key l0 l1 label length lib lm llm log logging loss lp lr metrics min model momentum mse name neuronpedia optimizer p path penalty "
    "precision prepend proc project queue reinit repo resample resume revision run runs sampling save schedule scheduler schema seed "
    "seqpos separator shard shards shuffle shuffles size sparsity split start steps store stop streaming submodule target time timestamp "
    "tokenized tokenizer tokens train trainer training trust update updates val validation verbose version wandb warm warmup window workers".split()
)
_TOUCHING = re.compile(
    r"activation|bias|cent(er|re)|clamp|decoder|encoder|gat(e|ing)|layers|\bln_|mean|norm|offset|post|relu|rescal|reshap|scal|shift|sign|skip|standard|std|subtract|temperature|thresh|tie|top_?k|transcod|whiten|z_?score"
)


SIZES = dict.fromkeys("d_in d_model d_vit activation_dim input_dim".split(), "d_in")  # settings that say them, and our names
SIZES |= dict.fromkeys("d_sae num_latents dict_size hidden_dim".split(), "d_sae")


class Allowed(NamedTuple):
    """Values of a setting that are read, its default first, and what any other would change."""

    values: tuple[Any, ...]
    changes: str


def check_settings(
    settings: Mapping[str, Any], file: Path, read: Iterable[str], allowed: Mapping[str, Allowed], harmless: str, documented: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Refuse by name what would change the equation; returns what was understood, and the names of what says nothing about it."""
    understood, ignored = {}, []
    for name, value in settings.items():
        if name in allowed:
            values, changes = allowed[name]
            if not any(type(value) is type(valid) and value == valid for valid in values):
                valid = " or ".join(repr(valid) for valid in values if valid is not None)
                what = f"{file} says {name}={value!r}; only {valid} is read: any other {changes}."
                raise ValueError(f"{what} Such an SAE would give wrong latents here.")
        elif name not in read:
            words = set(re.split(r"[_.]+", name.strip("_").lower()))
            opaque = not isinstance(value, str | int | float | list | dict)
            known = (words & _TRAINING or opaque or not documented) and not _TOUCHING.search(name.lower()) or re.fullmatch(harmless, name)
            if not known and not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL):
                what = f"{file} says {name}={value!r}, a setting that is not known here. If it changes the equation, the SAE would give"
                raise ValueError(f"{what} wrong latents; if it is about training alone, take it out of the settings.")
            ignored.append(name)
            continue
        understood[name] = value
    return understood, ignored


def plain(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those settings that are there, as far as they are plain values."""
    return {name: settings[name] for name in names if isinstance(settings.get(name), str | int | float)}
