"""The statistics of every latent over a data set: what they are, how they are kept on disk, and how they grow batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..run.artifacts import atomic_folder, damage_named, file_sha256, read_folder_manifest, write_folder_manifest
from ..run.processes import OneProcess, Processes
from .measures import label_entropy, label_std, merge_keys, pack_top, unpack_top

FORMAT_VERSION = 2

TOKENS = {"all": slice(None), "patches": slice(1, None), "cls": slice(0, 1)}
"""Which tokens of [CLS, patch 1, ..., patch P] a statistic reads."""

_COUNTS = ("class_counts", "class_hits")  # [C, S]: written sparse where that is smaller


@dataclasses.dataclass(frozen=True)
class LatentSummary:
    """What every latent does over a data set.

    Two image-level activations are used. The *mean activation* of an image is the mean of h over its tokens; an image is active where
    that is positive, and reference images are those where it is largest. The *count* a_i of an image is its number of tokens with
    h > tau; class counts a_c and data-set counts a_D are its sums (Lim et al., ICLR 2025, section 3).
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
    """[C] images of the class."""
    dead: Tensor
    """[S] bool: active in no image."""
    class_names: tuple[str, ...]
    """By class index; equal names stay two classes."""
    tau: float
    """Threshold of the counts."""
    tokens: str
    """Tokens that were read: a key of ``TOKENS``."""
    top_patch_images: Tensor | None = None
    """[S, k] data-set indices of the images that hold the strongest patches, strongest first; -1 where there are fewer than k. None where no
    patches were read (``tokens="cls"``)."""
    top_patches: Tensor | None = None
    """[S, k] places of those patches, ``row * columns + column`` on the grid; -1 where there are fewer than k."""
    top_patch_values: Tensor | None = None
    """[S, k] their activations; 0 where there are fewer than k."""

    @property
    def n_images(self) -> int:
        """Images that were read."""
        return int(self.class_images.sum())

    @property
    def n_latents(self) -> int:
        """S."""
        return len(self.frequency)

    @property
    def dataset_counts(self) -> Tensor:
        """[S] a_D: sum over all images of a_i."""
        return self.class_counts.sum(0, dtype=torch.float64)

    @property
    def faint(self) -> Tensor:
        """[S] bool: alive, but above tau on less than one token in a hundred images."""
        return ~self.dead & (self.dataset_counts < self.n_images / 100)

    def to_frame(self, dead: bool = False) -> pd.DataFrame:
        """One row a latent: latent, frequency, mean_activation, label_entropy, label_std, top_class, n_reference, dead, faint.

        Parameters
        ----------
        dead : bool
            Whether dead latents get a row. Theirs has frequency and mean activation 0, entropy and std NaN, and no top class (-1);
            without them the frame holds no NaN.
        """
        frame = pd.DataFrame(
            {
                "latent": torch.arange(self.n_latents).numpy(),
                "frequency": self.frequency.numpy(),
                "mean_activation": self.mean_activation.numpy(),
                "label_entropy": self.label_entropy.numpy(),
                "label_std": self.label_std.numpy(),
                "top_class": self.top_labels[:, 0].numpy(),
                "n_reference": (self.top_images >= 0).sum(1).numpy(),
                "dead": self.dead.numpy(),
                "faint": self.faint.numpy(),
            }
        )
        return frame if dead else frame[~frame["dead"]].reset_index(drop=True)

    def save(self, folder: str | Path, fp: str = "") -> None:
        """Write ``latents.safetensors`` and ``manifest.json`` into a folder, atomically.

        The [C, S] tables are mostly 0 when there are many classes and latents. Where that saves space they are written as
        ``<name>.places`` (int64 [n], ``class * S + latent``) and ``<name>.values`` (float32 [n]).
        """
        tensors: dict[str, Tensor] = {}
        plain: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            (tensors if isinstance(value, Tensor) else plain)[field.name] = value
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
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If the folder holds no summary.
        ValueError
            If it was written by another format version or is damaged.
        """
        folder = Path(folder)
        path = folder / "latents.safetensors"
        for name in ("manifest.json", path.name):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder} holds no latent summary ({name} is missing). Make one: summarize_latents(..., out={str(folder)!r})."
                )
        manifest = read_folder_manifest(folder)
        remedy = "Delete the folder and call summarize_latents again."
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {manifest.get('format_version')}; this package reads version {FORMAT_VERSION}. {remedy}"
            )
        if "files" not in manifest and file_sha256(path) != manifest.get("sha256"):  # as it was written before
            raise ValueError(f"{path} is damaged: its checksum is not the manifest's. {remedy}")
        with damage_named(folder / "manifest.json"):
            fields = {**load_file(path), **manifest, "class_names": tuple(manifest["class_names"])}
            for name in _COUNTS:
                if f"{name}.places" in fields:
                    table = torch.zeros(len(fields["class_names"]), len(fields["frequency"]))
                    table.view(-1)[fields[f"{name}.places"]] = fields[f"{name}.values"]
                    fields[name] = table
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]
        if missing:
            raise ValueError(f"{folder} is damaged: {', '.join(missing)} missing. {remedy}")
        return cls(**{name: fields[name] for name in names if name in fields})


_COARSE, _FINE = 2.0**20, 2.0**50  # a float32 is a whole number of 2**-20, and what is left one of 2**-50, to 2**-51


def exact_sums(values: Tensor) -> Tensor:
    """Column sums that don't depend on the order of their terms.

    Parameters
    ----------
    values : Tensor [b, S]
        float32.

    Returns
    -------
    Tensor [2, S], float64
        Sums of whole numbers of 2**-20 and of 2**-50, in these units. They are exact, and so are sums of such sums, while there are fewer
        than 2**24 terms and they sum to less than 2**33; beyond, they are as good as any float64.
    """
    values = values.double()
    coarse = (values * _COARSE).round()
    return torch.stack([coarse.sum(0), ((values - coarse / _COARSE) * _FINE).round().sum(0)])


class RunningSummary:
    """A :class:`LatentSummary` that grows chunk by chunk; holds 16 bytes a (latent, reference) and 8 a (class, latent).

    Everything in it is a sum of whole numbers or a set of largest keys, so the order in which images come does not matter, and several that
    counted different images make one (:meth:`absorb`), bit for bit.

    Parameters
    ----------
    n_latents, n_classes, n_patches : int
    k : int
        Reference images and reference patches of a latent.
    tau : float
    tokens : str
        A key of ``TOKENS``.
    patches_per_image : int
        Reference patches that one image may give a latent.
    device : torch.device
    """

    def __init__(
        self, n_latents: int, n_classes: int, n_patches: int, k: int, tau: float, tokens: str, patches_per_image: int, device: torch.device
    ):
        self.tau, self.tokens, self.n_patches = tau, tokens, n_patches
        self.patches_per_image = min(patches_per_image, k, n_patches)
        self.sum_mean = torch.zeros(2, n_latents, dtype=torch.float64, device=device)
        self.top = torch.zeros(n_latents, k, dtype=torch.long, device=device)
        self.top_patches = None if tokens == "cls" else self.top.clone()
        self.class_counts = torch.zeros(n_classes, n_latents, device=device)
        self.class_hits = torch.zeros(n_classes, n_latents, device=device)
        self.class_images = torch.zeros(n_classes, dtype=torch.long, device=device)

    def update(self, h: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Count some images.

        Parameters
        ----------
        h : Tensor [b, 1+P, S]
            Latent activations at CLS and the patches.
        labels, indices : LongTensor [b]
            Classes, and places in the data set.
        """
        h = h[:, TOKENS[self.tokens]]
        means = h.mean(1)
        counts = (h > self.tau).to(h.dtype).sum(1)  # faster than summing booleans, and exact
        self.sum_mean += exact_sums(means)
        self.class_counts.index_add_(0, labels, counts)
        self.class_hits.index_add_(0, labels, (means > 0).to(h.dtype))
        self.class_images += torch.bincount(labels, minlength=len(self.class_images))
        merge_keys(self.top, pack_top(means.T, indices.expand(means.shape[1], -1)))
        if self.top_patches is not None:
            self._update_patches(h if self.tokens == "patches" else h[:, 1:], indices)

    def _update_patches(self, patches: Tensor, indices: Tensor) -> None:
        """Only where an image's strongest patch beats a latent's k-th one, which soon is rare, are places looked up."""
        peaks = patches.amax(1)
        image, latent = (peaks > unpack_top(self.top_patches[:, -1])[0]).nonzero(as_tuple=True)
        if not len(image):
            return
        places = indices[image, None] * self.n_patches + torch.arange(self.n_patches, device=patches.device)
        best = pack_top(patches[image, :, latent], places).topk(self.patches_per_image, dim=1).values
        latents, row = latent.unique(return_inverse=True)
        fresh = torch.zeros(len(latents), len(patches), self.patches_per_image, dtype=torch.long, device=best.device)
        fresh[row, image] = best
        some = self.top_patches[latents]
        merge_keys(some, fresh.flatten(1))
        self.top_patches[latents] = some

    _SUMS = ("sum_mean", "class_counts", "class_hits", "class_images")
    _TOPS = ("top", "top_patches")

    def state(self) -> dict[str, Tensor]:
        """All that was counted."""
        return {name: getattr(self, name) for name in (*self._SUMS, *self._TOPS) if getattr(self, name) is not None}

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add what another has counted on other images (its :meth:`state`): exactly as if this had counted them."""
        for name in self._SUMS:
            getattr(self, name).add_(state[name].to(self.sum_mean.device))
        for name in self._TOPS:
            if getattr(self, name) is not None:
                merge_keys(getattr(self, name), state[name].to(self.sum_mean.device))

    def merge(self, processes: Processes | OneProcess) -> None:
        """Have, in every process, what all have counted."""
        for name in self._SUMS:
            processes.add_up(getattr(self, name))
        for name in self._TOPS:
            if getattr(self, name) is not None:
                for other in processes.others(getattr(self, name)):
                    merge_keys(getattr(self, name), other)

    def finish(self, labels: Tensor, class_names: Sequence[str]) -> LatentSummary:
        """The summary of everything that was counted.

        Parameters
        ----------
        labels : LongTensor [n_images]
            By place in the data set.
        class_names : sequence of str
        """
        values, images = unpack_top(self.top)
        top_labels = labels[images.clamp_min(0)].masked_fill(images < 0, -1)
        active = self.class_hits.sum(0, dtype=torch.float64)
        patches = {}
        if self.top_patches is not None:
            peaks, places = unpack_top(self.top_patches)
            of, at = (part.masked_fill(places < 0, -1) for part in (places // self.n_patches, places % self.n_patches))
            patches = {"top_patch_images": of.cpu(), "top_patches": at.cpu(), "top_patch_values": peaks.cpu()}
        return LatentSummary(
            frequency=(active / self.class_images.sum()).float().cpu(),
            mean_activation=((self.sum_mean[0] / _COARSE + self.sum_mean[1] / _FINE) / active.clamp_min(1)).float().cpu(),
            label_entropy=label_entropy(values, top_labels, len(class_names)).cpu(),
            label_std=label_std(values, top_labels).cpu(),
            top_images=images.cpu(),
            top_values=values.cpu(),
            top_labels=top_labels.cpu(),
            class_counts=self.class_counts.cpu(),
            class_hits=self.class_hits.cpu(),
            class_images=self.class_images.cpu(),
            dead=(active == 0).cpu(),
            class_names=tuple(class_names),
            tau=self.tau,
            tokens=self.tokens,
            **patches,
        )
