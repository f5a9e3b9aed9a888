"""SAEs opened and given away: from disk in any program's form, and from and to the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import tempfile
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..run.artifacts import read_json, shortened
from ..run.pickles import Record, is_torch_archive, read_torch
from ..run.processes import default_device
from .formats import FORMATS, write
from .formats.weights import SIZES, Weights, check_settings, shapes
from .model import SparseAutoencoder

CONFIG, WEIGHTS = FORMATS["saelens"].config, FORMATS["saelens"].weights
SHIPPED = Path(__file__).parent / "openmoji_sae"  # the default profile's SAE
_HUB_FILES = ("*.json", "*.yaml", "*.yml", "*.safetensors", "*.pt")  # what an SAE may consist of


def save_sae(sae: SparseAutoencoder, directory: str | Path, format: str = "saelens") -> Path:
    """Write an SAE as SAELens's folder, which is also ours, or in another program's form; returns what :func:`load_sae` opens.

    Latents stay what they are, decoder rows too, at whatever norm (:meth:`SparseAutoencoder.save` brings them to 1).

    Parameters
    ----------
    sae : SparseAutoencoder
    directory : str or Path
        Made when missing. PatchSAE's and saev's forms are single files: a path that ends in ``.pt``, or ``sae.pt`` in this folder.
    format : {"saelens", "patchsae", "prisma", "saev", "sparsify", "dictionary_learning", "visaebench"}
        ``overcomplete`` is another name of the last. One that is unknown, or can't say this SAE's activation, is a ``ValueError``.
    """
    return write(sae.to_weights(), Path(directory), format)


def load_sae(path: str | Path, device: str | torch.device | None = None) -> SparseAutoencoder:
    """Open an SAE of this package, SAELens, PatchSAE, ViT-Prisma, saev, sparsify, dictionary_learning or VISAEBench; it detects the format.

    It comes in our equations, with the same latents, in ``eval()`` mode.

    Parameters
    ----------
    path : str or Path
        A folder, a file, ``hf:<owner>/<repository>[/<folder or file>][@<revision>]`` on the hub, or ``"openmoji"``, which ships.
    device : str or torch.device, optional; a GPU when there is one, else the CPU, as of ``load_clip``

    Raises
    ------
    FileNotFoundError, ValueError
        If nothing is there, or files are missing in the folder; if it is of another format or architecture, damaged, or holds code, or a setting
        changes the equation to one that is not known here.
    """
    return read(path)[0].to(default_device() if device is None else device)


def read(path: str | Path) -> tuple[SparseAutoencoder, str, dict[str, Any], list[str]]:
    """As :func:`load_sae`: an SAE, its format, settings that matter as the program completes them, and names of those that don't."""
    path = SHIPPED if str(path) == "openmoji" and not Path(path).exists() else path
    path = _fetch(str(path)) if str(path).startswith("hf:") else Path(path)
    form, file = find(path)
    this = FORMATS[form]
    config = _beside(file) if form == "visaebench" else file.parent / (this.config or file.name)
    config = config if config is not None and config.is_file() else file  # where the settings come from
    settings, state = _open(form, file, config)
    settings = this.defaults(settings)
    understood, ignored = check_settings(settings, config, this.reads.split(), this.allowed, this.harmless, this.documented)
    try:
        weights: Weights = this.read(settings, state, file)
    except ValueError:
        raise
    except Exception as error:  # values of other kinds than programs write
        raise ValueError(f"{config} can't be read: {type(error).__name__}: {shortened(error)}") from error
    if form != "saelens":
        weights = weights._replace(metadata={**weights.metadata, "converted_from": form})
        understood = {name: value for name, value in understood.items() if name != "patchsae" and value is not None}
    sae = SparseAutoencoder.from_weights(weights, path).eval()
    for name, size in SIZES.items():
        if settings.get(name) not in (None, 0, getattr(sae, size)):
            what = f"{file} holds an SAE {sae.d_in} -> {sae.d_sae}; its settings, in {config.name}, say {name}={settings[name]!r}."
            raise ValueError(f"{what} The two don't belong together.")
    return sae, form, understood, ignored


_KNOWN_FORMS = """PatchSAE's .pt, ViT-Prisma's weights.pt with config.json, saev's sae.pt, sparsify's cfg.json with sae.safetensors, \
dictionary_learning's ae.pt with config.json, VISAEBench's sae.pt or model.safetensors with config.json or config.yaml"""
_PAIRS = {form: (each.config, each.weights) for form, each in FORMATS.items() if each.config and form != "visaebench"}
_NAMES = [name for each in FORMATS.values() for name in (each.config, each.weights) if name]
_VISAEBENCH = ("sae.pt", "model.safetensors", "model.pt"), ("config.json", "config.yaml", "config.yml")


def find(path: Path) -> tuple[str, Path]:
    """The form of an SAE on disk, and its weights' file; refuses what is none."""
    folder = path if path.is_dir() else path.parent
    pairs = {form: folder / names[1] for form, names in _PAIRS.items() if all((folder / name).is_file() for name in names)}
    if path.is_dir():
        files = [file.name for file in pairs.values()] + ["sae.pt"] * (path / "sae.pt").is_file()
        if len(files) > 1:
            warnings.warn(f"{path} holds the SAEs of several programs, {', '.join(files)}; the first is opened. Name a file.", stacklevel=4)
        if pairs:
            return next(iter(pairs.items()))
        for name in _VISAEBENCH[0]:
            if (path / name).is_file() and (name == "sae.pt" or _beside(path / name) is not None):
                return find(path / name)
        found = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
        inside = sorted({file.parent.name for name in _NAMES for file in path.glob(f"*/{name}")})
        found += f"; an SAE may lie in its folders {', '.join(inside[:12])}" if inside else ""
        missing = " and no ".join(name for name in _PAIRS["saelens"] if not (path / name).is_file())
        what = f"{path} holds no {missing}, so it is no SAE folder of ours or of SAELens v6 (found: {found})."
        raise FileNotFoundError(f"{what} Other forms that are read: {_KNOWN_FORMS}.")
    if not path.is_file():
        what = f"No SAE at {path}: expected a folder with cfg.json and sae_weights.safetensors, as train_sae writes it, or one of:"
        raise FileNotFoundError(f"{what} {_KNOWN_FORMS}.")
    for form, file in pairs.items():
        if path.name in _PAIRS[form]:
            return form, file
    if path.name in _VISAEBENCH[1]:
        return find(next((path.parent / name for name in _VISAEBENCH[0] if (path.parent / name).is_file()), path.parent))
    with open(path, "rb") as file:
        if file.read(1) == b"{":
            return "saev", path
    config = _beside(path)
    if path.suffix == ".safetensors" and config is not None:
        return "visaebench", path
    if not is_torch_archive(path):
        what = f"{path} is no SAE of a form that is read. If it is a pickle, it could run code when opened: write its weights anew with"
        raise ValueError(f"{what} torch.save (1.6 or later), or fill a SparseAutoencoder and save that. Forms: {_KNOWN_FORMS}.")
    if config is not None and "activation_fn_str" in _object(config):
        return "prisma", path
    content = read_torch(path)
    settings = _settings_within(content)
    if settings is None and config is not None and isinstance(content, dict) and any(str(name).startswith("encoder.") for name in content):
        return "visaebench", path
    if settings is None:
        what = f"a {type(content).__name__}"
        if isinstance(content, dict):
            tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
            what = f"tensors {shapes(tensors)}" if tensors else f"entries {sorted(map(str, content))[:12]}"
        what = f"{path} holds {what}, and nothing that says how to use it: the activation, the place of b_dec."
        raise ValueError(f"{what} Put the config.json that was written with it beside it. Forms that are read: {_KNOWN_FORMS}.")
    return "prisma" if "activation_fn_str" in settings else "patchsae", path  # early ViT-Prisma's, which has more settings


def _beside(file: Path) -> Path | None:
    """The settings in the same folder, where they are a file of their own."""
    return next((file.parent / name for name in _VISAEBENCH[1] if (file.parent / name).is_file()), None)


def _open(form: str, file: Path, config: Path) -> tuple[dict[str, Any], Any]:
    """Settings and tensors as they lie in a program's files."""
    if form == "saev":
        try:
            with open(file, "rb") as opened:
                header = json.loads(opened.readline(1 << 20))
            if "d_vit" not in header or "schema" in header:  # before schemas, the header was the settings
                header["cfg"].get("activation")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} begins with no header of saev ({type(error).__name__}): a line of JSON with schema, cfg.") from error
        return header, read_torch(file)
    beside = {} if config == file else _object(config)
    if file.suffix == ".safetensors":
        try:
            return beside, load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: no valid safetensors file ({error}). Train or copy it again.") from error
    content = read_torch(file)
    within = _settings_within(content)
    return (beside, content) if within is None else (within, content["state_dict"])


def _settings_within(content: Any) -> dict[str, Any] | None:
    """The settings in ``{"cfg" or "config": a record or a dict, "state_dict"}``."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    settings = content.get("cfg", content.get("config"))
    settings = settings.state if isinstance(settings, Record) else settings
    return settings if isinstance(settings, dict) else None


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.suffix == ".json" else _yaml(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def _yaml(path: Path) -> Any:
    from huggingface_hub import RepoCard  # its reader of the YAML before a text

    try:
        return RepoCard(f"---\n{path.read_text(encoding='utf-8')}\n---\n").data.to_dict()
    except Exception as error:  # PyYAML's are many
        raise ValueError(f"{path} is not valid YAML ({shortened(error)}).") from error


def _fetch(spec: str) -> Path:
    """The local copy of an SAE on the hub, downloaded or from the hub's cache: ``hf:<owner>/<repository>[/<folder or file>][@<revision>]``."""
    name, _, revision = spec.removeprefix("hf:").partition("@")
    owner, _, rest = name.strip("/").partition("/")
    repository, _, inside = rest.partition("/")
    if not owner or not repository or ".." in Path(inside).parts:
        raise ValueError(f"An SAE on the hub is named hf:<owner>/<repository>[/<folder>][@<revision>], got {spec!r}.")
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    name, revision, endpoint = f"{owner}/{repository}", revision or None, os.environ.get("HF_ENDPOINT") or None
    try:
        files = HfApi(endpoint=endpoint).list_repo_files(name, revision=revision)
        files = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in _HUB_FILES)]
        folder = PurePosixPath(inside).parent if inside in files else PurePosixPath(inside)
        near = [file for file in files if PurePosixPath(file).parent == folder]
        wanted = [file for file in near if inside not in files or file == inside or _is_settings(file)]
        if wanted:
            patterns = [glob.escape(file) for file in wanted]
            found = Path(snapshot_download(name, revision=revision, endpoint=endpoint, allow_patterns=patterns))
    except Exception as error:  # the client's errors come from several libraries; without a network, its cache may have the files
        at_hand = [try_to_load_from_cache(name, str(PurePosixPath(inside) / part), revision=revision) for part in ("", *_NAMES)]
        if cached := [Path(path) for path in at_hand if isinstance(path, str)]:
            return cached[0] if at_hand[0] else cached[0].parent
        what = f"{spec} could not be fetched ({type(error).__name__}: {shortened(error)}). Check the name and the network; a private"
        raise FileNotFoundError(f"{what} repository needs HF_TOKEN. Without a network, copy the files and give their folder.") from error
    if all(_is_settings(file) for file in wanted):  # say where there are weights
        holding = sorted({str(PurePosixPath(file).parent) for file in files if not _is_settings(file)} - {"."})
        what = "holds no SAE in its root" if not inside else f"has no folder {inside!r} with files {', '.join(_HUB_FILES)}"
        hint = f" Folders that hold weights: {', '.join(holding[:20])}{', ...' if len(holding) > 20 else ''}." if holding else ""
        raise FileNotFoundError(f"hf:{name} {what}.{hint}")
    return found / inside


def _is_settings(file: str) -> bool:
    return not file.endswith((".safetensors", ".pt"))


def push_sae(sae: SparseAutoencoder, repository: str) -> str:
    """Upload an SAE, with a model card, to the hub, by the token of ``hf auth login`` or ``$HF_TOKEN``; returns its address.

    A hub that can't be reached, or doesn't let this token write there, is a ``ConnectionError``.

    Parameters
    ----------
    sae : SparseAutoencoder; the card shows the metrics that training left in its metadata
    repository : str, ``<owner>/<name>``; made when missing
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"A repository is named <owner>/<name>, got {repository!r}.")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    with tempfile.TemporaryDirectory() as temporary:
        sae.save(temporary)
        _model_card(sae, repository).save(Path(temporary) / "README.md")
        try:
            address = str(api.create_repo(repository, exist_ok=True))
            api.upload_folder(repo_id=repository, folder_path=temporary, commit_message="Upload a sparse autoencoder")
        except Exception as error:  # the client's errors come from several libraries
            what = f"{repository} could not be written on the hub ({type(error).__name__}: {shortened(error)}). Check the owner's name"
            raise ConnectionError(f"{what} and the network, log in with a token that may write: `hf auth login`, or HF_TOKEN.") from error
    return address


_CARD = """---
{header}
---

# {name}

A sparse autoencoder over the residual stream of a CLIP vision transformer: each latent is a visual concept with a place in the image.

| | |
|---|---|
{facts}

## How good it is

{numbers}

## How to use it

```python
import patchsae_utils as ps

sae = ps.load_sae("hf:{repository}")
clip = ps.load_clip({model!r}, {pretrained!r})
residual = clip.residual(images, layer={layer})    # [B, 1+P, d]: CLS, then the patches
latents = sae.encode(residual)                  # [B, 1+P, {d_sae}]
```

The files `cfg.json` and `sae_weights.safetensors` are SAELens's (v6): `sae_lens.SAE.load_from_disk(folder)` opens them too.
{credit}"""


def _model_card(sae: SparseAutoencoder, repository: str):
    """What an SAE reads, what it was trained on, how good it is, how to use it."""
    from huggingface_hub import ModelCard, ModelCardData

    known = sae.metadata

    def of(*names: str) -> str:
        return ", ".join(str(known[name]) for name in names if known.get(name) is not None) or "not known"

    facts = {
        "Model": of("model_name", "pretrained"), "SHA-256 of its weights": of("weights_hash"),
        "Layer (block whose output is read, from 0)": of("layer"), "Tokens": of("tokens"),
        "Training data": of("dataset", "split") + (f", {known['n_images']:,} images" if known.get("n_images") else ""),
        "Training tokens": f"{known['n_training_tokens']:,}" if known.get("n_training_tokens") else "not known",
        "Activation": sae.activation + (f", k = {sae.k}" if sae.k else ""), "Size": f"{sae.d_in} → {sae.d_sae:,} latents",
        "Input": "normalised in training; the statistics are folded into the weights" if sae.normalizes else "the residual stream as it is",
    }  # fmt: skip
    numbers = [f"| {name} | {value:.4g} |" for name, value in (known.get("metrics") or {}).items() if isinstance(value, int | float)]
    tags = ["sparse-autoencoder", "saelens", "patchsae", "clip", "interpretability"]
    credit = "\nTrained on scenes of OpenMoji artwork (https://openmoji.org), CC BY-SA 4.0.\n"
    return ModelCard(_CARD.format(
        header=ModelCardData(library_name="saelens", license="mit", tags=tags).to_yaml(), name=repository.partition("/")[2],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        numbers="\n".join(["| | |", "|---|---|", *numbers]) if numbers else "Not measured.", repository=repository,
        model=known.get("model_name", "..."), pretrained=known.get("pretrained"), layer=known.get("layer", "..."), d_sae=sae.d_sae,
        credit=credit if str(known.get("dataset", "")).startswith("openmoji") else "",
    ))  # fmt: skip
