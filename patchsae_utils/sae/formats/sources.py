"""What an SAE reads: what programs call their models and layers, and the one comparison of activations with those of training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...clip.model import preprocessing_fingerprint

SOURCE = "model_name pretrained layer weights_hash tokens preprocessing".split()  # what metadata says of where activations come from


@cache
def _hub_names() -> dict[str, tuple[str, str]]:
    """Hugging Face's names of the models whose weights open_clip knows -> its architecture and tag; quick GELU where both are there."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained

    pairs = sorted(list_pretrained(), key=lambda pair: pair[0].endswith("-quickgelu"))
    names = {str(get_pretrained_cfg(*pair).get("hf_hub", "")).strip("/").lower(): pair for pair in pairs}
    return {name: (str(model), str(tag)) for name, (model, tag) in names.items() if name}


def open_clip_name(name: str) -> tuple[str, str] | None:
    """(architecture, tag) in open_clip of a model's name on Hugging Face, such as ``openai/clip-vit-base-patch16``; None if it has none."""
    name = name.removeprefix("open-clip:").removeprefix("hf-hub:").strip("/").lower()
    if openai := re.fullmatch(r"(?:openai/)?clip-vit-(base|large)-patch(\d+)(?:-(\d+))?", name):
        size, patch, pixels = openai.groups()
        name = f"timm/vit_{size}_patch{patch}_clip_{pixels or 224}.openai"
    return _hub_names().get(name)


def place(name: Any, layer: Any = None, kind: str = "hook_resid_post", **more: Any) -> dict[str, Any]:
    """Model and layer as our metadata says them; another place than a block's output, or a single head's, has a ``hook_name`` and no layer."""
    layer = layer if isinstance(layer, int) and not isinstance(layer, bool) else None
    known: dict[str, Any] = {"model_name": name if isinstance(name, str) else None}
    if isinstance(name, str) and (translated := open_clip_name(name)):
        from open_clip import get_model_config

        known["model_name"], known["pretrained"] = translated
        depth = (get_model_config(translated[0]) or {}).get("vision_cfg", {}).get("layers")
        if layer is not None and isinstance(depth, int):
            layer += depth * (layer < 0)
    if kind == "hook_resid_pre" and layer:
        layer, kind = layer - 1, "hook_resid_post"
    if kind == "hook_resid_post":
        known["layer"] = layer if layer is not None and layer >= 0 else None
    elif kind:
        known["hook_name"] = f"blocks.{layer}.{kind}"
    return {key: value for key, value in (known | more).items() if value is not None}


def layer_and_kind(hook: Any) -> tuple[int | None, str]:
    """What the name of a module or hook says for :func:`place`, such as ``blocks.3.hook_resid_pre``, ``encoder.layers.3``, ``layers.3.mlp``."""
    found = re.fullmatch(r"(?:.*\.)?(?:blocks|resblocks|layers?|h)\.(\d+)(?:\.(.+))?", str(hook))
    return (int(found[1]), found[2] or "hook_resid_post") if found else (None, "")


def check_source(reads: int, own: Mapping[str, Any], d_in: int, source: str, given: Mapping[str, Any]) -> None:
    """Refuse activations that an SAE, which ``reads`` so many dimensions and has metadata ``own``, was not trained on.

    Hashes decide on the model where both are known, else names, translated to open_clip's, else a warning; ``all`` fits any tokens.
    """
    if own.get("hook_name") and own.get("layer") is None and given.get("layer") is not None:
        what = f"The SAE reads {own['hook_name']!r}; {source} is the output of a block{described(given)}. Where that is the same place,"
        raise ValueError(f"{what} say so: sae.metadata['layer'] = {given['layer']}.")
    both: dict[str, tuple[Any, ...]] = {name: (own.get(name), given.get(name)) for name in SOURCE}
    known = {name: pair for name, pair in both.items() if all(value is not None and value != "" for value in pair)}
    hashes, _ = known.pop("weights_hash", None), known.pop("pretrained", None)
    names = tuple(map(str, known.pop("model_name", ("", ""))))
    foreign = "converted_from" in own or ("sae_lens_version" in own and "patchsae_version" not in own)
    (name, tag), (other, _) = _architecture(names[0], foreign), _architecture(names[1], False)
    comparable, same_name = name is not None and other is not None, name == other or names[0] == names[1]
    if "preprocessing" in known:
        known["preprocessing"] = tuple(preprocessing_fingerprint(value) for value in known["preprocessing"])
    wrong = {name for name, pair in known.items() if pair[0] != pair[1] and not (name == "tokens" and "all" in pair)}
    if hashes:
        wrong |= set() if hashes[0] == hashes[1] else {"weights_hash" if same_name else "model_name"}
    elif not same_name and comparable:
        wrong.add("model_name")
    elif not same_name:
        what = f"The SAE was trained on {names[0]!r}, which can't be compared with {names[1]!r}: be sure that it is the same model."
        warnings.warn(what, stacklevel=4)
    elif comparable and name:
        tags = (tag or own.get("pretrained"), given.get("pretrained"))
        from open_clip.pretrained import list_pretrained_tags_by_model

        tags_there = {*list_pretrained_tags_by_model(name), *list_pretrained_tags_by_model(name + "-quickgelu")}
        if tags[0] != tags[1] and {*tags} <= tags_there:
            wrong.add("pretrained")
            own = {**own, "pretrained": tags[0]}
    if d_in == reads and not wrong:
        return
    where = "over" if own.get("layer") is None else f"with layer={own['layer']}"
    what = f"The SAE reads {reads}-dimensional activations{described(own, wrong)}; {source} holds {d_in}-dimensional ones"
    raise ValueError(f"{what}{described(given, wrong)}. Extract again {where} from the model it was trained on, or load these ones' SAE.")


def _architecture(name: str, foreign: bool) -> tuple[str | None, str | None]:
    """Architecture and tag in open_clip of a model's name; the name itself where it is of ours; None where nobody here knows it."""
    translated, tag = open_clip_name(name) or (name, None)
    from open_clip import list_models

    local = name == "openmoji" or name.startswith("timm:") or name in list_models()  # load_clip opens it
    known = tag is not None or local or not ("/" in name or foreign)  # with a slash: Hugging Face's, or a folder
    return (translated.removesuffix("-quickgelu") if known else None), tag  # of OpenAI's "ViT-B-16", open_clip has both names


def described(known: Mapping[str, Any], more: set[str] | frozenset[str] = frozenset()) -> str:
    """The words " of 'model', layer 3, weights 1a2b", or as many of them as are known."""
    words = "" if known.get("model_name") is None else f" of {known['model_name']!r}"
    words += "" if known.get("layer") is None else f", layer {known['layer']}"
    extra = {"pretrained": "pretrained", "weights_hash": "weights", "tokens": "tokens", "preprocessing": "preprocessing"}
    shown = {word: re.sub(r" at 0x[0-9a-f]+", "", str(known.get(name))) for name, word in extra.items() if name in more}
    return words + "".join(f", {word} {' '.join(text.split())}" for word, text in shown.items())
