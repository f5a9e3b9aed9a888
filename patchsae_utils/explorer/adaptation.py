"""The adaptation view: one image read by CLIP and by an adapted CLIP, side by side: latents, masks, class probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import traitlets as t
from torch import Tensor

from ..activations.mixing import TOKENS
from ..adaptation.fit import NAMES
from ..data.splits import require_labels
from ..interventions.tail import check_same_tower
from .cards import distinctiveness, encode_heats, encode_picture
from .reader import Reader
from .widgets import SelectionError, _View, module

N_CLASSES = 6  # classes with bars: the most probable ones of either model
N_COMMON = 6  # common latents that are listed, and at most half as many of either model alone


class AdaptationCard(NamedTuple):
    """One image, read by two models. L listed latents, grid H x W."""

    task: str
    adapter: str  # what the adapted model is called
    image: int
    patch: int  # -1 for none
    label: str
    picture: np.ndarray  # what both models saw, uint8 [h, w, 3]
    groups: dict[str, list[int]]  # strongest latents of both ("common"); at least halved ("base"), or doubled ("adapted"), by adaptation
    listed: list[int]  # [L] all of these, and the chosen latent
    values: np.ndarray  # [L, 2] activations, of the patch or on average over CLS and the patches: CLIP, adapted
    heats: np.ndarray  # [L, 2, H, W] activations of the patches
    latent: int  # the chosen one; -1 for none
    names: dict[int, str]
    bars: list[tuple[str, float, float]]  # class, its probability by CLIP, and by the adapted model


class AdaptationView(_View):
    """What adaptation changed in one image: latents that both models show, that only one shows, and what each then says.

    Parameters
    ----------
    clip : ClipModel
    adapters : mapping of str to ClipModel
        Task -> ``clip`` adapted to it.
    sae : SparseAutoencoder
        Trained on ``clip``; it reads both.
    names, layer
        As for :class:`LatentExplorer`.
    summary : LatentSummary, optional
        Of ``sae`` on any data set: the strongest latents are then chosen by activation times log(1 / frequency); bars stay activations.
    datasets : mapping of str to data set
        Task -> images, such as the test images of the base classes, to which the adapter was fitted.
    **traits
        First choices: ``task``, ``image``, ``patch``, ``latent``, ``tau``, ``opacity``, ``mode``, ``contour``.
    """

    LINKED = ("latent",)  # images of a task mean nothing in another view
    CHOICES = ("task", "image", "patch", "latent")  # the task first: an image is one of its images
    TAKES = "clip, adapters, sae, names"
    ALSO = ", datasets=datasets, summary=summary"
    IN_TURN = True

    _esm = module("adaptation.js")

    task = t.Unicode(help="Whose images and adapted model are shown; another one begins at image 0.").tag(sync=True)
    tasks = t.List(t.Unicode()).tag(sync=True)
    patch = t.Int(-1, help="The patch that the latents are listed of, counted row by row; -1 for the whole image.").tag(sync=True)
    n_images = t.Int().tag(sync=True)

    def __init__(
        self, clip: Any, adapters: Mapping[str, Any], sae: Any, names: Any = None, layer: int = -2, *,
        datasets: Mapping[str, Any], summary: Any = None, **traits: Any,
    ):  # fmt: skip
        if not adapters or not set(adapters) <= set(datasets):
            raise ValueError(
                "AdaptationView needs for each task an adapted model, {task: stages.adapter(profile, clip, task)}, and images."
            )
        for task, model in adapters.items():
            check_same_tower(clip, model)
            require_labels(datasets[task])
        self._clip, self._adapters, self._datasets, self._layer = clip, dict(adapters), datasets, layer
        self._opened: dict[str, list[Reader]] = {}
        self._sae, self._ready = sae, False  # until all that changes has changed: one picture for all
        self._weights = None if summary is None else torch.from_numpy(distinctiveness(summary))
        traits = {"kind": "adaptation", "tasks": list(adapters), "mode": "heat", "task": next(iter(adapters)), "image": 0, **traits}
        super().__init__(clip, sae, None, datasets[self._check_known(traits["task"])], names, layer, **traits)
        self._ready = True
        self._show()
        self.observe(self._new_task, "task")
        self.observe(lambda _: self._show(), ["image", "patch", "latent"])

    @t.validate("task")
    def _check_task(self, proposal: Any) -> str:
        return self._check_known(proposal["value"])

    def _check_known(self, task: str) -> str:
        if task not in self._adapters:
            raise SelectionError(f"There is no adapted model for {task!r}; valid are {', '.join(map(repr, self._adapters))}.")
        return task

    @property
    def dataset(self) -> Any:
        """The task's images."""
        return self._datasets[self.task]

    @property
    def card(self) -> AdaptationCard:
        """What is shown, as arrays."""
        base, adapted = self._open(self.task)
        h = [reader.latents(self.image) for reader in (base, adapted)]
        means = torch.stack([one[1 + self.patch] if self.patch >= 0 else one[TOKENS["all"]].mean(0) for one in h])
        scores = means if self._weights is None else means * self._weights
        gain = scores[1] - scores[0]
        halved, doubled = (means[0] > 0) & (2 * means[1] <= means[0]), (means[1] > 0) & (2 * means[0] <= means[1])
        both = (means > 0).all(0) & ~halved & ~doubled
        groups = {"common": _largest(scores.min(0).values, both, N_COMMON), "base": _largest(-gain, halved, N_COMMON // 2)}
        groups["adapted"] = _largest(gain, doubled, N_COMMON // 2)
        listed = list(dict.fromkeys([*sum(groups.values(), []), *([self.latent] if self.latent >= 0 else [])]))
        before, after = (self._probabilities(reader) for reader in (base, adapted))
        shown = np.argsort(-np.maximum(before, after), kind="stable")[:N_CLASSES]
        return AdaptationCard(
            self.task, NAMES.get(getattr(adapted.clip, "kind", ""), type(adapted.clip).__name__), self.image, self.patch, base.label(self.image),
            base.picture(self.image), groups, listed, values=means[:, listed].T.numpy(),
            heats=torch.stack([one[1:, listed].T.reshape(-1, *self.grid) for one in h], 1).numpy(), latent=self.latent,
            names={i: str(self._names[i]) for i in listed if i in self._names},
            bars=[(self.dataset.class_names[c], float(before[c]), float(after[c])) for c in shown],
        )  # fmt: skip

    def _probabilities(self, reader: Reader) -> np.ndarray:
        with torch.no_grad():
            return reader.clip.logits(reader.tail(reader.residual([self.image])), reader.head).softmax(-1)[0].float().cpu().numpy()

    def _open(self, task: str) -> list[Reader]:
        """Both models' readers; made when the task is first shown."""
        if task not in self._opened:
            models = (self._clip, self._adapters[task])
            self._opened[task] = [Reader.shared(model, self._sae, self._datasets[task], self._layer) for model in models]
        return self._opened[task]

    def _new_task(self, change: Any) -> None:
        for reader in self._opened.get(change["old"], []):
            reader.forget()  # of eleven tasks the latents would fill the memory
        self._ready = False
        self.image, self.patch = 0, -1
        self._ready = True
        self._show()

    def _show(self) -> None:
        if self._ready:
            self.n_images = len(self.dataset)
            self.shown = adaptation_message(self.card)


def _largest(score: Tensor, among: Tensor, n: int) -> list[int]:
    places = score.masked_fill(~among, -torch.inf).topk(min(n, len(score))).indices
    return [int(i) for i in places if among[i]]


def adaptation_message(card: AdaptationCard) -> dict[str, Any]:
    """A card as the page wants it; both masks of a latent share a scale, so that they can be compared."""
    coded = [encode_heats(pair) for pair in card.heats]
    place = {latent: i for i, latent in enumerate(card.listed)}
    plain = {name: getattr(card, name) for name in ("task", "adapter", "image", "patch", "label", "listed")}
    return plain | {
        "jpeg": encode_picture(card.picture), "heats": b"".join(codes for codes, _ in coded), "scales": [scale for _, scale in coded],
        "groups": {name: [[i, card.names.get(i, ""), *map(float, card.values[place[i]])] for i in some] for name, some in card.groups.items()},
        "bars": [list(bar) for bar in card.bars],
    }  # fmt: skip
