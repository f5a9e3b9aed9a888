"""Do the measures of new latents find what is new? Controls whose answer is known, and what each measure says of them.

``python -m experiments.novelty`` (about forty minutes on one CPU core; it goes on where it was stopped) writes
``experiments/results/novelty.csv``, one row for each control and method. All controls are fitted to as many pictures. A latent belongs to a
planted feature if its activation lies on the feature's tokens (of signs and objects: on pictures that show them) for at least half of what
lies between a share by chance and 1. Recall: features to which a latent that is called new belongs; precision: such latents that belong to
one. Intervals are Wilson's, over features or latents: percentiles of a bootstrap have no width where all are found.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from scipy.stats import binomtest
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from patchsae_utils import stages
from patchsae_utils.adaptation.fit import RECIPES, fit_adapter
from patchsae_utils.adaptation.gain import explain_gain
from patchsae_utils.adaptation.joint import train_joint
from patchsae_utils.adaptation.models import FineTuned
from patchsae_utils.adaptation.novelty import NEW, fires, judge, matched, read, read_streams
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.config import Profile, load_profile
from patchsae_utils.data import dataset_fingerprint, load_dataset
from patchsae_utils.sae.model import SparseAutoencoder

from . import grid
from .train_openmoji_clip import PretrainingScenes, normalise

N_FIT = 300  # training pictures of each control; a class of 18 has 16 shots
N_PICTURES, N_SPLIT = 400, 240  # test pictures: half of the first train the dictionaries; on the second number the gain is split
SIZE = {"d_sae": 768, "k": 16, "n_tokens": 150_000}  # of each dictionary
DIRECTIONS = {0.005: 4, 0.02: 4, 0.1: 4}  # share of pictures -> how many planted directions they show, each on six of a picture's tokens
METHODS = {"joint dictionary's norms": "norms_evidence", "Latent Scaling": "scaling_evidence", "two ridges": "predicted_evidence"}
SPLIT = "split of the gain"


class Control(NamedTuple):
    """A model, how it came from CLIP, the pictures, and whether something in it is new ("null", "new", "useless": shown, and no help)."""

    name: str
    kind: str
    how: str
    spec: str


CONTROLS = (
    Control("CLIP itself", "null", "itself", "openmoji/animals"),
    Control("CLIP, trained further", "null", "further", "openmoji/animals"),
    Control("planted directions", "new", "planted", "openmoji/animals"),
    Control("CoOp", "null", "coop", "openmoji/instruments"),
    Control("nonce names", "null", "finetune", "openmoji/animals:nonce"),
    Control("relabelled", "null", "finetune", "openmoji/animals:relabelled"),
    Control("unseen objects", "new", "finetune", "openmoji/unseen"),
    Control("line drawings", "new", "finetune", "openmoji/vehicles:line"),
    Control("sign, 2%", "new", "finetune", "openmoji/sign-2"),
    Control("sign, 10%", "new", "finetune", "openmoji/sign-10"),
    Control("sign, 50%", "new", "finetune", "openmoji/sign-50"),
    Control("useless sign", "useless", "finetune", "openmoji/animals:sign-10"),
)


class Cell(NamedTuple):
    """One control, and what is asked of it: "latents", which needs no SAE, or "split"."""

    control: Control
    what: str

    @property
    def name(self) -> str:
        return f"{_slug(self.control.name)}-{self.what}"


class Novelty:
    """Makes and measures controls."""

    def __init__(
        self, profile: Profile, clip: ClipModel, *, n_fit: int = N_FIT, n_pictures: int = N_PICTURES,
        size: Mapping[str, int] = SIZE, progress: bool = True,
    ):  # fmt: skip
        self.profile, self.clip, self.size = profile, clip, dict(size)
        self.n_fit, self.n_pictures, self.progress = n_fit, n_pictures, progress
        self.layer, self.folder = clip.layer_index(profile.model.layer), profile.folder("adapters") / "controls"

    @cached_property
    def sae(self) -> SparseAutoencoder:
        """Opened, or trained, when the first split asks for it."""
        return stages.trained_sae(self.profile, self.clip)

    def data(self, control: Control, split: str, n_images: int) -> Any:
        half = None if "/sign" in control.spec else "base"
        return load_dataset(control.spec, split, n_images=n_images, half=half, seed=self.profile.data.seed)

    def inputs(self, cell: Cell) -> dict[str, Any]:
        tests = self.data(cell.control, "test", self.n_pictures if cell.what == "latents" else N_SPLIT)
        return {
            "what": "novelty", "format": {"latents": 3, "split": 1}[cell.what], "clip": self.clip.fingerprint, "layer": self.layer, "cell": cell, "n_fit": self.n_fit,
            "settings": self.profile.adapters, "recipe": RECIPES.get(cell.control.how), "tests": dataset_fingerprint(tests),
            **({"size": self.size, "directions": list(DIRECTIONS.items())} if cell.what == "latents" else {"sae": self.sae.fingerprint}),
        }  # fmt: skip

    def model(self, control: Control) -> ClipModel:
        """The control's model: CLIP, adapted or not."""
        if control.how == "itself":
            return self.clip
        if control.how in ("further", "planted"):
            return self._further
        data = self.data(control, "train", 4 * self.n_fit)
        config = dataclasses.replace(self.profile.adapters, n_shots=max(1, self.n_fit // len(data.class_names)))
        out = self.folder / f"{_slug(control.name)}-model"
        return fit_adapter(self.clip, control.how, data, config, out, precision=stages.ADAPTER_PRECISION, progress=self.progress)

    @cached_property
    def _further(self) -> FineTuned:
        config = self.profile.adapters
        return trained_further(self.clip, config.epochs * -(-self.n_fit // config.batch_size), config.batch_size)

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """``rows``: the table's, without seconds."""
        model = self.model(cell.control)
        if cell.what == "split":
            tests = self.data(cell.control, "test", N_SPLIT)
            split = explain_gain(self.clip, {"": model}, self.sae, tests, self.layer, progress=self.progress)[""].split
            return {"rows": [{"method": SPLIT, **split_shares(split.parts("log-probability"))}]}
        tests = self.data(cell.control, "test", self.n_pictures)
        streams = read_streams(self.clip, model, tests, self.layer, progress=self.progress)
        planted = getattr(tests, "planted", torch.zeros(len(tests), 0, dtype=torch.bool))[:, None]
        if cell.control.how == "planted":
            streams, planted = plant(streams)
        found = called_new(streams[::2].contiguous(), streams[1::2].contiguous(), planted[1::2], **self.size, progress=self.progress)
        return {"rows": [{"method": method, **scores(*each)} for method, each in found.items()]}

    def tables(self, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
        """Columns: control, kind, method, those of :func:`scores`, in rows of :data:`SPLIT` those of :func:`split_shares`, seconds, commit."""
        rows = [
            {"control": cell.control.name, "kind": cell.control.kind, **part, "seconds": row["seconds"], "commit": row["commit"]}
            for cell, row in measured.items() for part in row["rows"]
        ]  # fmt: skip
        return {"novelty": pd.DataFrame(rows)}

    @staticmethod
    def merged(before: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
        """The table, with rows of controls that it doesn't measure, in the order of :data:`CONTROLS`."""
        place = {control.name: i for i, control in enumerate(CONTROLS)}
        cells = [list(zip(rows["control"], rows["method"] == SPLIT, strict=True)) for rows in (before, table)]
        kept = before[[cell not in cells[1] and cell[0] in place for cell in cells[0]]]
        rows = pd.concat([kept.astype(object), table.astype(object)])
        return rows.sort_values("control", key=lambda names: names.map(place), kind="stable")


def trained_further(clip: ClipModel, n_steps: int, batch_size: int) -> FineTuned:
    """CLIP after more steps on its own training mixture, with its own loss between pictures and captions; the text tower stays."""
    adapted, recipe = FineTuned(clip), RECIPES["finetune"]
    optimizer = torch.optim.AdamW(adapted.learned.requires_grad_(True).parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    scenes = PretrainingScenes(1, 0, n_steps * batch_size, lambda words: clip.tokenize(words).cpu())  # a seed that it has not seen
    for pictures, texts, _, _ in DataLoader(scenes, batch_size):
        with torch.no_grad():
            said = clip.encode_text(texts.to(clip.device), normalize=True)
        seen = F.normalize(adapted.encode_image(normalise(pictures.to(clip.device))), dim=-1)
        loss = ClipLoss()(seen, said, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.learned.requires_grad_(False)
    return adapted


def plant(streams: Tensor, per_picture: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Streams [N, T, 2, D] whose second model also holds random directions, and where: bool [N, T, F].

    They are as long as the streams' mean distance from their mean; at least three pictures of each half (even, odd) show each.
    """
    n, n_tokens, _, width = streams.shape
    generator, streams = Generator().manual_seed(seed), streams.clone()
    size = (streams[:, :, 0] - streams[:, :, 0].mean((0, 1))).norm(dim=-1).mean()
    shares = [share for share, many in DIRECTIONS.items() for _ in range(many)]
    planted = torch.zeros(n, n_tokens, len(shares), dtype=torch.bool)
    for i, share in enumerate(shares):
        for half in range(2):
            pictures = 2 * torch.randperm(n // 2, generator=generator)[: max(3, round(share * n / 2))] + half
            for picture in pictures.tolist():
                planted[picture, torch.randperm(n_tokens, generator=generator)[:per_picture], i] = True
    rows = F.normalize(torch.randn(len(shares), width, generator=generator), dim=1) * size.cpu()
    streams[:, :, 1] += (planted.float() @ rows).to(streams)
    return streams, planted


@torch.no_grad()
def called_new(
    train: Tensor, streams: Tensor, planted: Tensor, *, d_sae: int, k: int, n_tokens: int, progress: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """What each method calls new on ``streams`` [N, T, 2, D]: bool [candidates], and to which of what is ``planted`` [N, T or 1, F] each
    candidate belongs, bool [candidates, F].

    The methods are asked of the joint dictionary's latents, "two ridges" of the difference's as well ("difference dictionary"); "combined": the
    verdict on both dictionaries. Beside them: a dictionary of the adapted model alone, each latent of which is new that has no partner in one
    of CLIP; all latents of the two ("any latent"), as many random ones as are called new, or planted; and as many principal components of the
    streams' difference as are planted.
    """
    tokens, options = train.flatten(0, 1), {"k": k, "n_tokens": n_tokens, "progress": progress}
    with torch.enable_grad():
        base, own = (train_joint(tokens[:, model : model + 1].contiguous(), d_sae, **options) for model in range(2))
    encode = lambda x: base.encode(x[:, :, None])  # noqa: E731
    both, table = judge(train, streams, base.rows(0), encode, d_sae=d_sae, **options)
    inside = belongs((f for _, f in read(both, streams)), planted)[table["latent"]]
    change = (table["dictionary"] == "the change").to_numpy()
    found = {name: ((table[column] == NEW).to_numpy()[~change], inside[~change]) for name, column in METHODS.items()}
    new = (table["verdict"] == NEW).to_numpy()
    found |= {"difference dictionary": (new[change], inside[change]), "combined": (new, inside)}
    alive = fires(own, streams)
    unmatched = (matched(own, streams, base.rows(0), encode)["evidence"] == NEW).to_numpy()
    found["own dictionary"] = (unmatched[alive], belongs((f for _, f in read(own, streams)), planted)[alive])
    many = max(1, planted.shape[2], int(new.sum()))
    drawn = np.isin(np.arange(len(inside)), np.random.default_rng(0).permutation(len(inside))[:many])
    found |= {"any latent": (np.ones(len(inside), bool), inside), "random latents": (drawn, inside)}
    change, n_components = tokens[:, 1] - tokens[:, 0], max(1, planted.shape[2])
    axes = torch.linalg.svd((change - change.mean(0)).T @ (change - change.mean(0)))[0][:, :n_components]
    projected = ((x[:, :, 1] - x[:, :, 0] - change.mean(0)) @ axes for x in streams.split(8))
    signed = (torch.cat([along.relu(), (-along).relu()], 2) for along in projected)
    found["PCA of the difference"] = (np.ones(2 * n_components, bool), belongs(signed, planted))
    return found


def belongs(activations: Iterable[Tensor], planted: Tensor) -> np.ndarray:
    """bool [S, F]: whether the activation of latents [B, T, S] lies on what is planted [N, T or 1, F], by a share half-way from chance to 1."""
    total, on, start = 0.0, 0.0, 0
    for f in activations:
        shown = planted[start : start + len(f)].to(f).expand(-1, f.shape[1], -1)
        total, on, start = total + f.sum((0, 1)), on + torch.einsum("bts,btf->sf", f, shown), start + len(f)
    chance = planted.float().mean((0, 1)).to(total)
    return ((on / total[:, None] - chance) / (1 - chance) >= 0.5).cpu().numpy()


def scores(called: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    """Recall and precision of what is called new, its share of the candidates, and their intervals; None where there is nothing to count."""
    n_planted, n_called = inside.shape[1], int(called.sum())
    found, right = (int(inside[called].any(axis).sum()) for axis in (0, 1))
    row = {"planted": n_planted, "found": found, "called": n_called, "candidates": len(called)}
    row |= _share("recall", found, n_planted) | _share("precision", right, n_called if n_planted else 0)
    return row | _share("new_share", n_called, len(called))


def _share(name: str, part: int, whole: int) -> dict[str, float | None]:
    found = binomtest(part, whole) if whole else None
    numbers = (None,) * 3 if found is None else (found.statistic, *found.proportion_ci(method="wilson"))
    return dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))


def split_shares(parts: pd.DataFrame) -> dict[str, Any]:
    """The "new concepts" part of a gain: its share, in nats, and the whole gain."""
    rows = parts.set_index("part").astype(object).where(lambda table: table.notna(), None)
    new, gain = rows.loc["new concepts"], rows.loc["both"]
    ends = {"": "gain", "_low": "low", "_high": "high"}
    nats = {f"{name}_nats{end}": row[column] for name, row in (("new", new), ("gain", gain)) for end, column in ends.items()}
    return {f"new_share{end}": new[f"share{end}"] for end in ends} | nats


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def main(arguments: list[str] | None = None) -> None:
    """Make and measure the controls."""
    parser = grid.parser("novelty", __doc__)
    parser.add_argument("--control", action="append", choices=[each.name for each in CONTROLS], help="only this one; may be given again")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    clip, _ = stages.load_world(profile)
    chosen = [Cell(c, what) for what in ("latents", "split") for c in CONTROLS if not options.control or c.name in options.control]
    chosen = [cell for cell in chosen if cell.what == "latents" or cell.control.how not in ("itself", "planted")]
    for number, (cell, row, _) in enumerate(grid.run(Novelty(profile, clip), chosen, options.out), 1):
        print(f"[{number}/{len(chosen)}] {cell.control.name}, {cell.what} ({row['seconds']:.0f} s)")
        print(pd.DataFrame(row["rows"]).set_index("method").to_string(), flush=True)


if __name__ == "__main__":
    main()
