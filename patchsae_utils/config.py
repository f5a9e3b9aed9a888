"""Profiles: the settings of one reproduction, read from a small TOML file (of ``patchsae_utils/profiles``, or one's own) and checked.

``PATCHSAE_PROFILE`` chooses the profile, ``PATCHSAE_SET="data.n_train_images=500; training.n_tokens=20000"`` changes settings of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_PROFILE = "openmoji"

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {  # of settings, by name; None passes all
    **dict.fromkeys(
        "n_train_images n_statistics_images n_evaluation_images expansion_factor k bandwidth n_tokens lr batch_tokens log_every "
        "checkpoint_every target_l0 n_shots epochs batch_size n_ctx depth rank".split(),
        (lambda value: value > 0, "positive"),
    ),
    **dict.fromkeys(
        "seed workers warmup_steps l1_coefficient l1_warmup_steps cls_coefficient dead_after_tokens clip_gradient".split(),
        (lambda value: value >= 0, "0 or more"),
    ),
    **dict.fromkeys(("max_broken", "lr_end"), (lambda value: 0 <= value <= 1, "a share, between 0 and 1")),
    **dict.fromkeys(
        "name train statistics evaluation tasks activation path kind template seeds".split(),
        (lambda value: bool(value) and not (isinstance(value, tuple) and "" in value), "given, not empty"),
    ),
}
_CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "start": ("random", "data", "kmeans"),
    "b_dec_start": ("median", "mean", "zero"),
    "tokens": ("all", "patches", "cls"),
    "normalize": ("none", "mean", "mean_and_norm", "token_norm"),
    "constraint": ("none", "frozen_decoder", "soft_decoder", "frozen_encoder", "archetypal"),
    "precision": ("float32", "bfloat16"),
    "sparse": ("auto", "never", "always"),
}


class _Section:
    """Settings whose values are checked by their types, :data:`_RULES` and :data:`_CHOICES`, however they were made."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            value = _typed(getattr(self, name), hint, name)
            object.__setattr__(self, name, value)  # plain numbers, which checkpoints and JSON can hold
            holds, words = _RULES.get(name, (lambda _: True, ""))
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {words}, got {value!r}.")
            for choice in value if isinstance(value, tuple) else (value,):
                if name in _CHOICES and choice not in _CHOICES[name]:
                    raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {choice!r}.")


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which CLIP is studied, and where its residual stream is read."""

    name: str = "ViT-B-16-quickgelu"
    """``openmoji`` (ours, shipped with the package) or any vision transformer of open_clip."""
    pretrained: str | None = None
    """open_clip's name of the weights, or a local file; ``None`` for the shipped model."""
    layer: int = -2
    """Block whose output is read; -2 is the paper's, ``resblocks[-2]``."""
    precision: str = "float32"
    """Of the image tower's products: ``float32``, or ``bfloat16`` (autocast), several times as fast on a GPU; checks by hand in notebooks expect the first."""


@dataclass(frozen=True)
class DataConfig(_Section):
    """Which images are used, and how many. A spec is what :func:`patchsae_utils.load_dataset` takes."""

    train: str
    """Images on whose tokens the SAE is trained (split ``train``)."""
    statistics: str
    """Labelled images for the latents' statistics and reference images (split ``train``)."""
    evaluation: str
    """Labelled images, unseen by the SAE, on which accuracies are measured (split ``test``)."""
    tasks: tuple[str, ...]
    """Label sets that are compared with each other."""
    n_train_images: int | None = None
    """Images in ``train``; ``None`` ("all" in a file) takes every image of a folder."""
    n_statistics_images: int | None = None
    """Images in ``statistics``."""
    n_evaluation_images: int | None = None
    """Images in ``evaluation``."""
    seed: int = 0
    """Draws the scenes, or the subset of a folder's images."""
    workers: int | None = None
    """Processes that open images; ``None`` ("auto" in a file): one a spare processor where a GPU computes, else 0: the computing one opens them."""
    max_broken: float = 0.01
    """Largest share of unreadable images: looked for beforehand, left out and reported. 0: none is looked for, the first one met stops the run."""

    def choice(self) -> dict[str, Any]:
        """The settings that choose images, without those that say how they are opened: what an artifact's fingerprint may hold."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in ("workers", "max_broken")}


@dataclass(frozen=True)
class SaeConfig(_Section):
    """Shape of the sparse autoencoder that is trained, or which one is taken instead."""

    path: str | None = None
    """An SAE to study in place of training one: whatever :func:`patchsae_utils.load_sae` opens, ``hf:<owner>/<repository>`` included."""
    expansion_factor: int = 64
    """d_sae / d_in; the paper's is 64."""
    activation: str = "relu"
    """The latents' nonlinearity; the paper's is ``relu``."""
    k: int | None = None
    """Latents kept per token: of each (``topk``), or on average over a batch (``batchtopk``, ``matryoshka``)."""
    groups: tuple[int, ...] = ()
    """Sizes of the nested dictionaries, rising, the last d_sae itself; for ``matryoshka`` alone, where empty means its default."""
    bandwidth: float | None = None
    """Width of the kernel through which ``jumprelu`` learns its thresholds; ``None`` for its default."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of :class:`~patchsae_utils.sae.SparseAutoencoder` beside its sizes, those that are set."""
        given = {"activation": self.activation, "k": self.k, "groups": self.groups or None, "bandwidth": self.bandwidth}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class TrainConfig(_Section):
    """How an SAE is trained. Defaults are the paper's."""

    n_tokens: int = 516_000_000
    """Tokens in the whole run; the paper's 2,621,440 images have 197 each."""
    lr: float = 4e-4
    """Adam's learning rate after warm-up."""
    warmup_steps: int = 500
    """Steps over which the rate rises linearly from 0."""
    schedule: str = "constant"
    """The rate after warm-up: ``constant``, or falling along a line (``linear``) or half a cosine (``cosine``) until the last step."""
    lr_end: float = 0.0
    """Share of ``lr`` at which a falling schedule ends."""
    clip_gradient: float = 0.0
    """Largest norm of the gradient of all weights together, longer ones are shortened to it; 0 leaves it as it is."""
    batch_tokens: int = 4096
    """Tokens a step, mixed from many images."""
    l1_coefficient: float = 8e-5
    """Weight of the latents' sum: what makes them sparse."""
    l1_warmup_steps: int = 0
    """Steps over which that weight rises linearly from 0."""
    target_l0: float | None = None
    """Active latents per token at which ``relu``, ``jumprelu`` and ``gated`` should end: that weight is then moved for four fifths of the run, and kept."""
    cls_coefficient: float = 1.0
    """Weight of the CLS token's squared error."""
    start: str = "random"
    """Fresh weights: ``random`` (the paper's Kaiming-uniform), or every latent at a token (``data``) or at a centroid of tokens (``kmeans``)."""
    b_dec_start: str = "median"
    """Where a fresh b_dec of 0 is moved: the first batch's geometric ``median`` (the paper's) or its ``mean``; or left at ``zero``."""
    dead_after_tokens: int = 1_613_824
    """A latent that has not fired for more than so many tokens is dead and gets ghost gradients; the paper's is 64 steps of 128 images."""
    ghost: bool = True
    """Whether dead latents get a gradient at all: the ghost term of ``relu``, the auxiliary loss of ``topk`` and its kin."""
    restart_dead: bool = False
    """Every ``dead_after_tokens``, in the first 80% of the run, dead latents start anew at tokens that are badly reconstructed."""
    tokens: str = "all"
    """Train on all tokens of the store, its ``patches`` or its ``cls`` tokens alone."""
    normalize: str = "none"
    """Units of training: the stream's own (``none``), less its ``mean``, of unit size on average (``mean_and_norm``) or each (``token_norm``)."""
    constraint: str = "none"
    """The decoder stays at its start, near it (cosine 0.8), or in the hull of k-means centroids (``archetypal``); or the encoder stays."""
    log_every: int = 10
    """Steps between two rows of the training log."""
    checkpoint_every: int = 200
    """Steps between two checkpoints, from which an interrupted run goes on."""
    precision: str = "float32"
    """Of the matrix products: ``float32``, or ``bfloat16`` (autocast; weights stay float32), about 1.7 times as fast on two CPU cores."""
    sparse: str = "auto"
    """Compute with active latents alone: ``always``, ``never``, or ``auto``: when that is faster, from 8,192 latents on."""
    seed: int = 0
    """Initial weights and the order of the tokens."""


def paper_recipe(width: int) -> dict[str, Any]:
    """Overrides of a profile by which an SAE of a stream of ``width`` dimensions is trained as the paper's was, scaled to small runs.

    The error is a mean over dimensions and the L1 term a sum over latents: lambda keeps its balance as 768 / width times the paper's.
    """
    return {
        "sae.activation": "relu", "sae.k": None, "training.l1_coefficient": TrainConfig.l1_coefficient * 768 / width, "training.target_l0": None,
        "training.start": "random", "training.normalize": "none", "training.lr": 1.5e-3, "training.schedule": "constant",
        "training.ghost": True, "training.restart_dead": False, "training.dead_after_tokens": 204_800, "training.n_tokens": 1_000_000,
    }  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig(_Section):
    """How CLIP is adapted to a task. Defaults are MaPLe's, for ViT-B/16."""

    tasks: tuple[str, ...]
    """Data sets that CLIP is adapted to, one adapter each."""
    kind: str = "maple"
    """Which adapter."""
    n_shots: int = 16
    """Training images a base class."""
    epochs: int = 5
    """Passes over those images."""
    lr: float | None = None
    """Learning rate after the warm-up epoch; ``None`` ("auto" in a file): that of the kind's recipe."""
    batch_size: int = 4
    """Images a step."""
    n_ctx: int = 2
    """Learned context vectors in the text, and prompt tokens in the image."""
    template: str = "a photo of a {}."
    """Prompt whose first ``n_ctx`` tokens are learned."""
    depth: int = 9
    """Blocks, counted from the input, that get prompts of their own."""
    rank: int = 4
    """Rank of LoRA's changes."""
    random_crop: bool = False
    """Fit on random crops of 8 to 100% of a picture's area, as MaPLe does; small objects are often lost in them."""
    seeds: tuple[int, ...] = (1,)
    """One adapter is trained for each: which shots, and their order."""


@dataclass(frozen=True)
class Profile:
    """All settings of one reproduction, and where its artifacts lie."""

    name: str
    """Also the name of its folder under ``runs/``."""
    model: ModelConfig
    data: DataConfig
    sae: SaeConfig
    training: TrainConfig
    adapters: AdapterConfig
    root: Path = field(compare=False)
    """``runs/<name>`` in the repository (or in the current folder, outside a repository); made by whoever writes into it."""

    def folder(self, stage: str) -> Path:
        """Folder of one stage's artifacts, e.g. ``folder("activations")`` -> ``runs/openmoji/activations``; not created here."""
        return self.root / stage

    @property
    def is_default(self) -> bool:
        """Whether these are the very settings that the committed notebooks and figures show."""
        return self == _build_profile(DEFAULT_PROFILE, _read(DEFAULT_PROFILE))


_SECTIONS = {"model": ModelConfig, "data": DataConfig, "sae": SaeConfig, "training": TrainConfig, "adapters": AdapterConfig}


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("patchsae_utils") / "profiles"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_profile(name_or_path: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read a profile, apply changes to it, and check it.

    Parameters
    ----------
    name_or_path : str or path, optional
        A name from :func:`profile_names`, or the path of a ``.toml`` file. Default: ``$PATCHSAE_PROFILE``, else ``openmoji``.
    overrides : mapping, optional
        Settings to change, by dotted name: ``{"data.n_train_images": 500}``. They are applied after those of ``$PATCHSAE_SET``
        ("data.n_train_images=500; training.n_tokens=20000"). ``{"name": "quick"}`` gives the changed profile a folder of its own under ``runs/``.

    Raises
    ------
    ValueError, FileNotFoundError
        For an unknown profile or setting (naming the valid ones), or a value of the wrong type or range; if the profile needs a folder that an
        environment variable should name, and that is not set or not there.
    """
    given = os.environ.get("PATCHSAE_PROFILE") or DEFAULT_PROFILE if name_or_path is None else name_or_path
    settings = _read(given)
    for key, value in (parse_settings(os.environ.get("PATCHSAE_SET", "")) | dict(overrides or {})).items():
        section, _, name = key.rpartition(".")
        within = settings.setdefault(section, {}) if section else settings
        if isinstance(within, dict):  # else it is refused below
            within[name] = value
    return _build_profile(str(given), settings)


def parse_settings(text: str) -> dict[str, Any]:
    """Changes written as ``"section.key=value; section.key=value"``; values as in TOML, strings without quotes."""
    changes = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals):
            raise ValueError(f"A setting is written section.key=value (several are separated by ';'), got {item!r}.")
        try:
            changes[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key] = value
    return changes


def repository_root(start: str | os.PathLike | None = None) -> Path:
    """The nearest folder, from ``start`` (the current one) upwards, that holds ``pyproject.toml`` and ``notebooks``; else ``start``."""
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return start


def _read(given: str | os.PathLike) -> dict[str, Any]:
    """What a profile's file says."""
    file: Any = next((path for path in (Path(given), repository_root() / given) if path.suffix == ".toml" and path.is_file()), None)
    if str(given) in profile_names():
        file = resources.files("patchsae_utils") / "profiles" / f"{given}.toml"
    elif file is None:  # a path is looked for from here, and from the repository's root: notebooks run in a folder of it
        raise ValueError(f"Unknown profile {str(given)!r}. Valid: {', '.join(profile_names())}, or the path of an existing .toml file.")
    try:
        return {"name": Path(file.name).stem} | tomllib.loads(file.read_bytes().decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Profile {str(given)!r} is not valid TOML: {error}.") from error


def _build_profile(label: str, settings: Mapping[str, Any]) -> Profile:
    """Check a profile's settings and fill the classes."""
    name, needs = str(settings["name"]), settings.get("needs", {})
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"A profile's name is a folder's name of letters, digits, '.', '_' and '-', got {name!r}.")
    if unknown := sorted(set(settings) - {"name", "needs", *_SECTIONS}):
        raise ValueError(f"Profile {label!r}: unknown section {unknown[0]!r}. Valid: name, needs, {', '.join(_SECTIONS)}.")
    if other := next((key for key in ("needs", *_SECTIONS) if not isinstance(settings.get(key, {}), Mapping)), None):
        raise ValueError(f"Profile {label!r}: [{other}] must be a section with settings, got {other} = {settings[other]!r}.")
    parts: dict[str, Any] = {}
    for key, cls in _SECTIONS.items():
        values, where = _expanded(settings.get(key, {}), label, needs), f"Profile {label!r}, section [{key}]"
        fields = dataclasses.fields(cls)
        if unknown := sorted(set(values) - {f.name for f in fields}):
            raise ValueError(f"{where}: unknown setting {unknown[0]!r}. Valid: {', '.join(f.name for f in fields)}.")
        if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]:
            raise ValueError(f"{where}: {', '.join(missing)} must be given.")
        try:
            parts[key] = cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Profile(name=name, root=repository_root() / "runs" / name, **parts)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """The value as the annotated type, where that loses nothing (numpy's numbers, too); "all" and "auto" are None."""
    value = value.item() if isinstance(value, np.generic) else value
    if typing.get_origin(hint) is types.UnionType:
        if value is None or value in ("all", "auto"):
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return tuple(_typed(part, typing.get_args(hint)[0], name) for part in (items if isinstance(items, (list, tuple)) else [items]))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (hint is float or (hint is int and float(value).is_integer())):
        return hint(value)  # 2e6 tokens
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}.")


def _expanded(value: Any, label: str, needs: Mapping[str, str]) -> Any:
    """Settings with ``$VARIABLE`` replaced in strings; one that is not set, or names no folder, is an error that says what belongs there."""
    if isinstance(value, Mapping):
        return {name: _expanded(item, label, needs) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_expanded(item, label, needs) for item in value)
    if not (isinstance(value, str) and "$" in value):
        return value
    for variable in re.findall(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", value):
        folder = os.environ.get(variable, "")
        if not folder or not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(
                f"Profile {label!r} needs the environment variable {variable}: {needs.get(variable, 'a folder')}. "
                + (f"It names {folder!r}, which is not a folder. " if folder else "It is not set. ")
                + f"Set it, e.g. `export {variable}=/path/to/folder`, or give other data by "
                'PATCHSAE_SET="data.train=...; data.statistics=...; data.evaluation=...; data.tasks=...; adapters.tasks=...".'
            )
    return os.path.expanduser(os.path.expandvars(value))
