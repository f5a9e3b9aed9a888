"""Tasks of the embedded world whose answer is known: what, if anything, is new to the CLIP that was trained on it?

Nothing, but names: classes under invented words (``nonce``), or each under the name of the next (``relabelled``). Something: ``unseen`` objects, and
a sign that no scene ever held, which tells two classes apart (``sign-<per cent>``) or says nothing (``<task>:sign-<per cent>``).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from . import artwork, openmoji
from .dataset import Example
from .splits import half_of_classes

# Name -> OpenMoji's code point; nothing of the class table looks like them.
UNSEEN = {
    "alien": "1F47D", "anchor": "2693", "barber pole": "1F488", "bone": "1F9B4", "brain": "1F9E0", "brick wall": "1F9F1", "carousel": "1F3A0",
    "chain": "26D3", "cloud": "2601", "coffin": "26B0", "crystal ball": "1F52E", "disco ball": "1FAA9", "double helix": "1F9EC",
    "dragon": "1F409", "ear": "1F442", "envelope": "2709", "evil eye": "1F9FF", "feather": "1FAB6", "ferris wheel": "1F3A1",
    "floppy disk": "1F4BE", "fuel pump": "26FD", "gear": "2699", "ghost": "1F47B", "globe": "1F30D", "headstone": "1FAA6",
    "jack-o'-lantern": "1F383", "lightning": "26A1", "log": "1FAB5", "lungs": "1FAC1", "microbe": "1F9A0", "moai": "1F5FF",
    "mousetrap": "1FAA4", "newspaper": "1F4F0", "pill": "1F48A", "rainbow": "1F308", "robot": "1F916", "skull": "1F480", "snowflake": "2744",
    "snowman": "26C4", "spool": "1F9F5", "statue": "1F5FD", "tooth": "1F9B7", "tornado": "1F32A", "traffic light": "1F6A5", "unicorn": "1F984",
    "volcano": "1F30B", "yarn": "1F9F6",
}  # fmt: skip
SIGN_SHARES = {f"sign-{percent}": percent / 100 for percent in (2, 10, 50)}
NAMINGS = ("nonce", "relabelled")
SIGN_SIZE = 24
_STARTS = ("bli", "da", "wu", "to", "fe", "gor", "zi", "mo", "pel", "kri", "nu", "sha", "tev", "lu", "hup", "vi", "ja", "rau", "que", "yo")
_ENDS = ("cket", "x", "g", "ma", "p", "vin", "dle", "sk", "bo", "nt", "ree", "zu", "lk", "mp", "ster", "chi", "f", "gle")
_FORMAT = 1  # of the sign's drawing


class ControlData(Dataset):
    """Scenes of the embedded world, drawn on demand; further arguments as of :class:`OpenMojiData`.

    ``task``: ``"unseen"``, a sign (``"sign-10"``: a tenth of the pictures of one of two classes shows it), or one of the world with a ``variant``:
    ``"nonce"``, ``"relabelled"``, or a sign (a tenth of all pictures shows it).
    """

    has_labels = True
    workers: int | None = None

    def __init__(self, task: str, variant: str, split: str, half: str | None = None, n_images: int | None = None, seed: int = 0):
        self.spec, self.name = f"openmoji/{task}" + f":{variant}" * bool(variant), f"{task} ({variant})" if variant else task
        self.split, self.half, self.seed, self.task, self.contents = split, half, seed, task, f"{artwork.version()}, controls {_FORMAT}"
        names, table = nonce_words(2) if task in SIGN_SHARES else list(UNSEEN), openmoji.class_table()
        n = 20 * len(half_of_classes(len(names), half)) if n_images is None and not variant else n_images
        self._world = openmoji.OpenMojiData(task if variant else "all", split, "color", half if variant else None, n, seed)
        ids = self._world.class_ids
        if variant == "nonce":
            self.class_names = [nonce_words(len(table))[i] for i in ids]
        elif variant == "relabelled":
            self.class_names = table.groupby(["task", "half"])["name"].transform(lambda own: np.roll(own, -1))[ids].tolist()
        else:
            self.class_names = self._world.class_names if variant else [names[i] for i in half_of_classes(len(names), half)]
        draws = np.array([openmoji.scene_rng(seed, split, i, stream=2).random(4) for i in range(len(self._world))]).reshape(-1, 4)
        self._places = (draws[:, 2:] * (openmoji.IMAGE_SIZE - SIGN_SIZE)).astype(int)
        self.labels = self._world.labels if variant else torch.arange(len(draws)) % len(self.class_names)
        self.planted = F.one_hot(self.labels, len(self.class_names)).bool()  # [N, F]: which new things each picture shows
        if task in SIGN_SHARES:
            self.labels = torch.from_numpy((draws[:, 0] < 0.5).astype(np.int64))
        if signs := SIGN_SHARES.get(variant or task):
            self.planted = torch.from_numpy(draws[:, 1:2] < signs) & ((self.labels == 1)[:, None] | bool(variant))
        elif variant:
            self.planted = self.planted[:, :0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        scene, sheet = self._world.scene(index), openmoji.sprites()
        if self.task == "unseen":
            *others, main = scene.placements
            place = list(UNSEEN).index(self.class_names[self.labels[index]])
            scene, sheet = scene._replace(placements=(*others, main._replace(class_id=len(openmoji.class_table()) + place))), _all_sprites()
        picture = openmoji.render(scene, sheet)
        if self.task != "unseen" and self.planted[index].any():
            x, y = self._places[index]
            spot = picture[y : y + SIGN_SIZE, x : x + SIGN_SIZE]
            inside, paint = sign()
            spot[inside] = paint[inside]
        return Example(Image.fromarray(picture), int(self.labels[index]), index)


def is_control(task: str, variant: str) -> bool:
    """Whether ``openmoji/<task>:<variant>`` is one of these tasks."""
    return variant in (*NAMINGS, *SIGN_SHARES) or (not variant and task in ("unseen", *SIGN_SHARES))


def nonce_words(n: int) -> list[str]:
    """Invented words, at most 360; neighbours begin and end differently."""
    words = ["".join(parts) for parts in product(_STARTS, _ENDS)]
    return [words[37 * i % len(words)] for i in range(n)]


def sign() -> tuple[np.ndarray, np.ndarray]:
    """A disc of rings in two colors that are not OpenMoji's: what it covers, bool [24, 24], and its paint, uint8 [24, 24, 3]."""
    y, x = np.mgrid[:SIGN_SIZE, :SIGN_SIZE] - (SIGN_SIZE - 1) / 2
    rings = ((radius := np.hypot(x, y)) // 3 % 2 == 0)[..., None]
    return radius < SIGN_SIZE / 2, np.where(rings, (255, 0, 255), (0, 255, 160)).astype(np.uint8)


@lru_cache
def _all_sprites() -> artwork.Sprites:
    """Those of the class table, then those of :data:`UNSEEN`."""
    sheets = openmoji.sprites(), artwork.load_sprites(tuple(UNSEEN.values()))
    return artwork.Sprites(*([np.concatenate(level) for level in zip(*kinds, strict=True)] for kinds in zip(*sheets, strict=True)))
