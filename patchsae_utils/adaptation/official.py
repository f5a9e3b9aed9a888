"""Official checkpoints of MaPLe and CoOp. Their ``token_suffix`` tells on what sentence the head must be built (FAULTS C7)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.model import ClipModel
from ..run.pickles import read_torch
from .models import TEMPLATE, AdaptedClip
from .prompts import CoOp, MaPLe, PromptedClip, text_tower

_N_READ = 64  # prompts of a file that are compared
_PROMPT_WORDS = set("a an the this that one some my of in is photo picture image drawing type kind named called showing".split())
_NEAR = 0.05  # of its norm: how far half precision moves a word's embedding


def read_official(path: Path, clip: ClipModel, template: str | None = None) -> AdaptedClip:
    """``prompt_learner/model.pth.tar-*`` of CoOp, or ``MultiModalPromptLearner/model.pth.tar-*`` of MaPLe."""
    state = read_torch(path)
    found = state.get("state_dict") if isinstance(state, dict) else None
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    prefix, bare = "prompt_learner.", ("ctx", "token_prefix", "token_suffix")
    held = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix) or k in bare}
    tensors = {k: v for k, v in held.items() if not k.startswith("token_")}
    # Other prompt learners (PromptSRC, CoCoOp) call their context ctx as well, and learn more elsewhere.
    if "ctx" not in tensors or (len(tensors) > 1 and "proj.weight" not in tensors) or any("VPT" in key for key in state):
        more = [key for key in state if "VPT" in key] or [key for key in tensors if key != "ctx"] or list(state)
        raise ValueError(
            f"{path} holds no prompts of MaPLe (prompt_learner.ctx, prompt_learner.proj.weight, ...) or CoOp (ctx), but {', '.join(more[:5])} ..."
        )
    if tensors["ctx"].ndim != 2:
        raise ValueError(
            f"{path} learned a context for each class ({list(tensors['ctx'].shape)}); one shared by all, [n_ctx, width], is read."
        )
    depth = 1 + sum(bool(re.fullmatch(r"compound_prompts_text\.\d+", key)) for key in tensors)
    cls, n_ctx = MaPLe if "proj.weight" in tensors else CoOp, len(tensors["ctx"])
    adapted: Any = cls(clip, n_ctx, depth, template=template or TEMPLATE)
    if "token_suffix" in held:
        found = _words(adapted, held["token_suffix"])
        sure = _goes_on(adapted, found)
        if template is None and len(found) > 1:
            own = _template(adapted, found)
            adapted = cls(clip, n_ctx, depth, template=own) if own else adapted
            sure = own is not None
        if not sure:
            example = f"as in {_text(adapted, found[0])!r}" if found else "in words that this model's text tower does not know"
            raise ValueError(
                f"The prompts of {path} go on {example} behind {n_ctx} learned vectors; where the class name begins there, {adapted.template!r} "
                f"does not say. Give the prompt it was trained with (template='a photo of the {{}}.'), or the model (clip=)."
            )
    return filled(adapted, tensors, path)


@torch.no_grad()
def _words(adapted: PromptedClip, suffix: Tensor) -> list[list[int]]:
    """Token ids of some prompts behind the learned words, up to the end, from embeddings [C, n, d]; none if they are not this model's."""
    table = text_tower(adapted.model).token_embedding.weight
    if suffix.ndim != 3 or not len(suffix) or suffix.shape[2] != table.shape[1]:
        return []
    some = suffix[:: -(-len(suffix) // _N_READ)].to(table)
    each, places = some.flatten(0, 1).unique(dim=0, return_inverse=True)
    distance, ids = torch.cdist(each, table).min(1)
    ids[distance > _NEAR * each.norm(dim=1)] = -1
    end = int(adapted.tokenize("")[0].max())  # CLIP's end of text is the last of its words
    rows = [row[: row.index(end)] if end in row else row for row in ids[places].view(some.shape[:2]).tolist()]
    return [] if any(-1 in row for row in rows) else [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _goes_on(adapted: PromptedClip, found: Sequence[list[int]]) -> bool:
    """Whether prompts go on as the template does, before the class name and behind it."""
    start, end = (_ids(adapted, text) for text in adapted.template.split("{}"))
    start = start[adapted.n_ctx :]
    fits = [row[: len(start)] == start and row[len(row) - len(end) :] == end and len(row) > len(start) + len(end) for row in found]
    return bool(fits) and all(fits)


def _template(adapted: PromptedClip, found: Sequence[list[int]]) -> str | None:
    """The words around the class names of a file's prompts: those that all share; None where names may share them too."""
    start, end = commonprefix(list(found)), commonprefix([row[::-1] for row in found])[::-1]
    before, behind = [_text(adapted, [i]) for i in start], _text(adapted, end)
    if not _PROMPT_WORDS.issuperset(before) or behind[:1].isalnum() or min(map(len, found)) <= len(start) + len(end):
        return None
    own = " ".join([*["X"] * adapted.n_ctx, *before, "{}"]) + behind
    theirs, ours = (adapted.tokenize(text.format("x"))[0, 1 + adapted.n_ctx :] for text in (own, adapted.template))
    return adapted.template if torch.equal(theirs, ours) else own


def _ids(adapted: PromptedClip, text: str) -> list[int]:
    """Tokens of a text, without start and end."""
    ids = adapted.tokenize(text)[0].tolist()
    return ids[1 : ids.index(max(ids))]


def _text(adapted: PromptedClip, ids: Sequence[int]) -> str:
    tokenizer: Any = adapted._tokenizer
    return tokenizer.decode(list(ids)).strip()


def filled(adapted: AdaptedClip, tensors: Mapping[str, Tensor], path: Path) -> AdaptedClip:
    """The adapter with these weights: all of them, and nothing else."""
    expected = {key: tuple(value.shape) for key, value in adapted.learned.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if given != expected:
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        said = [f"{key} is {given.get(key, 'missing')}, expected {expected.get(key, 'nothing of that name')}" for key in wrong[:4]]
        raise ValueError(f"{path} does not fit {adapted.name!r}: {'; '.join(said)}. Load the model that it was trained on.")
    if wrong := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {', '.join(wrong[:4])} hold NaN or infinite values. Fit it, or copy it, again.")
    adapted.learned.load_state_dict(tensors, strict=True)
    return adapted
