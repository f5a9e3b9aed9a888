"""The statistics of every latent over a data set: what they are, how they are kept on disk, and how they grow batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..activations.mixing import TOKENS
from ..run.artifacts import atomic_folder, damage_named, is_current, read_folder_manifest, write_folder_manifest
from .measures import label_entropy, label_std, merge_keys, pack_top, unpack_top
from .passes import Observer

FORMAT_VERSION = 3

_COUNTS = ("class_counts", "class_hits")  # [C, S]: written sparse where that is smaller


@dataclasses.dataclass(frozen=True)
class LatentSummary:
    """What every latent does over a data set.

    The *mean activation* of an image is the mean of h over its tokens; it is active where that is positive, and reference images are those
    where it is largest. Its *count* a_i is its number of tokens with h > tau; a_c and a_D are the sums (Lim et al., ICLR 2025, section 3).
    """

    frequency: Tensor
    """[S] share of images where the latent is active: images, not tokens."""
    mean_activation: Tensor
    """[S] mean of the images' mean activations over active images; 0 for dead latents."""
    label_entropy: Tensor
    """[S] see :func:`label_entropy`; NaN for dead latents."""
    label_std: Tensor
    """[S] see :func:`label_std`; NaN for dead latents."""
    top_images: Tensor
    """[S, k] data-set indices of the reference images, strongest first; -1 where there are fewer than k."""
    top_values: Tensor
    """[S, k] their mean activations; 0 where there are fewer than k."""
    top_labels: Tensor
    """[S, k] their classes; -1 where there are fewer than k."""
    class_counts: Tensor
    """[C, S] a_c: sum over the class's images of a_i; whole numbers."""
    class_hits: Tensor
    """[C, S] images of the class where the latent is active."""
    class_images: Tensor
    """[C] images of the class; without classes these three have one row."""
    dead: Tensor
    """[S] bool: active in no image."""
    class_names: tuple[str, ...]
    """By class index. Empty for pictures without labels: then labels are -1, entropy and spread NaN."""
    tau: float
    """Threshold of the counts."""
    tokens: str
    """Tokens that were read: a key of ``TOKENS``."""
    sae: str = ""
    """The SAE's fingerprint; empty where it is not known."""
    top_patch_images: Tensor | None = None
    """[S, k] images of the strongest patches, each image once, strongest first; -1 is padding. None with ``tokens="cls"``."""
    top_patches: Tensor | None = None
    """[S, k] places of those patches, ``row * columns + column`` on the grid."""
    top_patch_values: Tensor | None = None
    """[S, k] their activations; 0 is padding."""

    @property
    def n_images(self) -> int:
        return int(self.class_images.sum())

    @property
    def n_latents(self) -> int:
        return len(self.frequency)

    def check(self, sae: Any, dataset: Any = None) -> None:
        """ValueError unless the summary is of this SAE and, where one is given, of a data set of this size."""
        sae.check_own("The summary", self.sae)
        if self.n_latents != sae.d_sae:
            raise ValueError(
                f"The summary has {self.n_latents} latents, this SAE {sae.d_sae}: make it with this one, by summarize_latents."
            )
        if dataset is not None and self.n_images != len(dataset):
            read = f"The summary was made from {self.n_images} images, but {dataset.spec!r} ({dataset.split}) has {len(dataset)}. "
            raise ValueError(read + "Give the data set that summarize_latents was given, so that its image indices mean the same.")

    @property
    def dataset_counts(self) -> Tensor:
        """[S] a_D: sum over all images of a_i."""
        return self.class_counts.sum(0, dtype=torch.float64)

    @property
    def faint(self) -> Tensor:
        """[S] bool: alive, but above tau on less than one token in a hundred images."""
        return ~self.dead & (self.dataset_counts < self.n_images / 100)

    def to_frame(self) -> pd.DataFrame:
        """A row a living latent: latent, frequency, mean_activation, label_entropy, label_std, top_class, n_reference, faint."""
        columns = {name: getattr(self, name) for name in ("frequency", "mean_activation", "label_entropy", "label_std")}
        columns |= {"top_class": self.top_labels[:, 0], "n_reference": (self.top_images >= 0).sum(1), "faint": self.faint}
        frame = pd.DataFrame({"latent": range(self.n_latents), **{name: values.numpy() for name, values in columns.items()}})
        return frame[~self.dead.numpy()].reset_index(drop=True)

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write ``latents.safetensors`` and ``manifest.json``, atomically; [C, S] tables as places and values where that is smaller."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in fields.items() if name not in tensors}
        for name in _COUNTS:
            flat = tensors[name].flatten()
            if 3 * int(flat.count_nonzero()) < len(flat):  # 12 bytes an entry against 4
                places = flat.nonzero().flatten()
                del tensors[name]
                tensors |= {f"{name}.places": places, f"{name}.values": flat[places]}
        with atomic_folder(folder) as temporary:
            path = temporary / "latents.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            write_folder_manifest(temporary, {"format_version": FORMAT_VERSION, "fingerprint": fp, "complete": True, **plain})

    @classmethod
    def load(cls, folder: str | Path) -> LatentSummary:
        """Read what :meth:`save` wrote; FileNotFoundError where nothing is, ValueError for another format version or damage."""
        folder = Path(folder)
        manifest = open_manifest(folder, FORMAT_VERSION, f"summarize_latents(..., out={str(folder)!r})")
        with damage_named(folder / "manifest.json"):
            fields = {"sae": "", **load_file(folder / "latents.safetensors"), **manifest, "class_names": tuple(manifest["class_names"])}
            for name in _COUNTS:
                if f"{name}.places" in fields:
                    table = torch.zeros(len(fields["class_images"]), len(fields["frequency"]))
                    table.view(-1)[fields[f"{name}.places"]] = fields[f"{name}.values"]
                    fields[name] = table
            return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


def open_manifest(folder: Path, version: int, made_by: str) -> dict[str, Any]:
    """The manifest of what a pass wrote; FileNotFoundError or ValueError says what is missing, damaged or old."""
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(f"{folder} holds nothing (manifest.json is missing). Make it: {made_by}.")
    manifest = read_folder_manifest(folder)
    if (found := manifest.get("format_version")) != version:
        raise ValueError(f"{folder} has format version {found}, expected {version}. Delete the folder and make it again: {made_by}.")
    return manifest


_COARSE, _FINE = 2.0**20, 2.0**50  # a float32 is a whole number of 2**-20, and what is left one of 2**-50, to 2**-51


def exact_sums(values: Tensor) -> Tensor:
    """Column sums of float32 [b, S] in any order: whole numbers of 2**-20 and of 2**-50, float64 [2, S].

    Exact, and so are sums of them, while there are fewer than 2**24 terms and they sum to less than 2**33.
    """
    values = values.double()
    coarse = (values * _COARSE).round()
    return torch.stack([coarse.sum(0), ((values - coarse / _COARSE) * _FINE).round().sum(0)])


class RunningSummary(Observer):
    """A :class:`LatentSummary` that grows chunk by chunk: sums of whole numbers and largest keys, the same in any order of the images."""

    def __init__(self, clip, sae, dataset, k: int, tau: float, tokens: str, out: str | Path | None, key: str):
        self.labels, self.class_names = torch.as_tensor(dataset.labels, dtype=torch.long), tuple(dataset.class_names)
        self.tau, self.tokens, self.n_patches, self.out, self.key, self.sae = tau, tokens, clip.n_tokens - 1, out, key, sae.fingerprint
        n_classes, n_latents, device = max(1, len(self.class_names)), sae.W_enc.shape[1], sae.W_enc.device
        self.sums = {
            "sum_mean": torch.zeros(2, n_latents, dtype=torch.float64, device=device),
            **{name: torch.zeros(n_classes, n_latents, dtype=torch.int32, device=device) for name in _COUNTS},  # float32: to 2**24
            "class_images": torch.zeros(n_classes, dtype=torch.long, device=device),
        }
        kinds = ("top",) if tokens == "cls" else ("top", "top_patches")
        self.tops = {kind: torch.zeros(n_latents, k, dtype=torch.long, device=device) for kind in kinds}

    def is_complete(self) -> bool:
        return self.out is not None and is_current(self.out, self.key, holds="latents.safetensors")

    def add(self, h: Tensor, labels: Tensor, places: Tensor) -> None:
        h, labels = h[:, TOKENS[self.tokens]], labels.clamp_min(0)
        means = h.mean(1)
        counts = (h > self.tau).to(h.dtype).sum(1).int()  # faster than summing booleans, and exact
        self.sums["sum_mean"] += exact_sums(means)
        self.sums["class_counts"].index_add_(0, labels, counts)
        self.sums["class_hits"].index_add_(0, labels, (means > 0).int())
        self.sums["class_images"] += torch.bincount(labels, minlength=len(self.sums["class_images"]))
        merge_keys(self.tops["top"], pack_top(means.T, places.expand(means.shape[1], -1)))
        if "top_patches" in self.tops:
            self._add_patches(h if self.tokens == "patches" else h[:, 1:], places)

    def _add_patches(self, patches: Tensor, places: Tensor) -> None:
        """Only where an image's strongest patch beats a latent's k-th one, which soon is rare, is its place looked up."""
        kept = self.tops["top_patches"]
        image, latent = (patches.amax(1) > unpack_top(kept[:, -1])[0]).nonzero(as_tuple=True)
        if not len(image):
            return
        peak, at = patches[image, :, latent].max(1)  # the first of equal ones
        latents, row = latent.unique(return_inverse=True)
        fresh = torch.zeros(len(latents), len(patches), dtype=torch.long, device=patches.device)
        fresh[row, image] = pack_top(peak, places[image] * self.n_patches + at)
        some = kept[latents]
        merge_keys(some, fresh)
        kept[latents] = some

    def state(self) -> dict[str, Tensor]:
        return {**self.sums, **self.tops}

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        super().absorb({name: value for name, value in state.items() if name in self.sums})
        for name in self.tops.keys() & state.keys():
            merge_keys(self.tops[name], state[name].to(self.tops[name].device))

    def finish(self) -> None:
        if self.out is not None:
            self.summary().save(self.out, self.key)

    def summary(self) -> LatentSummary:
        counted = {name: value.cpu() for name, value in self.state().items()}
        values, images = unpack_top(counted["top"])
        top_labels = self.labels[images.clamp_min(0)].masked_fill(images < 0, -1)
        active = counted["class_hits"].sum(0, dtype=torch.float64)
        unlabelled = torch.full(active.shape, float("nan"))
        total = counted["sum_mean"][0] / _COARSE + counted["sum_mean"][1] / _FINE
        peaks = of = at = None
        if "top_patches" in counted:
            peaks, places = unpack_top(counted["top_patches"])
            of, at = (part.masked_fill(places < 0, -1) for part in (places // self.n_patches, places % self.n_patches))
        return LatentSummary(
            frequency=(active / counted["class_images"].sum()).float(), mean_activation=(total / active.clamp_min(1)).float(),
            label_entropy=label_entropy(values, top_labels, len(self.class_names)) if self.class_names else unlabelled.clone(),
            label_std=label_std(values, top_labels) if self.class_names else unlabelled,
            top_images=images, top_values=values, top_labels=top_labels, dead=active == 0,
            **{name: counted[name].float() for name in _COUNTS}, class_images=counted["class_images"],
            class_names=self.class_names, tau=self.tau, tokens=self.tokens, sae=self.sae,
            top_patch_images=of, top_patches=at, top_patch_values=peaks,
        )  # fmt: skip
