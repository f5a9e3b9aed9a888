"""SAEs on the Hugging Face hub: fetched by :func:`patchsae_utils.load_sae`, and pushed with a model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run.artifacts import shortened
from .files import save_sae
from .model import SparseAutoencoder

_FILES = ("*.json", "*.safetensors", "*.pt")  # what an SAE may consist of


def fetch(spec: str) -> Path:
    """Download an SAE, or take it from the hub's cache on this machine.

    Parameters
    ----------
    spec : str
        ``hf:<owner>/<repository>[/<folder>][@<revision>]``.

    Returns
    -------
    Path
        The local folder.

    Raises
    ------
    ValueError
        If the spec is not of that form.
    FileNotFoundError
        If there is no such repository, revision or folder, or the hub can't be reached and the cache has nothing.
    """
    name, _, revision = spec.removeprefix("hf:").partition("@")
    owner, _, rest = name.strip("/").partition("/")
    repository, _, folder = rest.partition("/")
    if not owner or not repository or ".." in Path(folder).parts:
        raise ValueError(
            f"An SAE on the hub is named hf:<owner>/<repository>, hf:<owner>/<repository>/<folder> or ...@<revision>, got {spec!r}."
        )
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in _FILES]
    try:
        found = Path(
            snapshot_download(
                f"{owner}/{repository}", revision=revision or None, allow_patterns=patterns, endpoint=os.environ.get("HF_ENDPOINT") or None
            )
        )
    except Exception as error:  # the client's errors come from several libraries
        raise FileNotFoundError(
            f"{spec} could not be fetched ({type(error).__name__}: {shortened(error)}). Check the name and the network; a private "
            "repository needs HF_TOKEN. Without a network, copy the files and give their folder."
        ) from error
    if not (found / folder).is_dir():
        raise FileNotFoundError(f"hf:{owner}/{repository} has no folder {folder!r} with files {', '.join(_FILES)}.")
    return found / folder


def push_sae(
    sae: SparseAutoencoder,
    repository: str,
    *,
    metrics: Mapping[str, float] | None = None,
    licence: str = "mit",
    folder: str | None = None,
    private: bool = False,
) -> str:
    """Upload an SAE, with a model card, to the hub; ``load_sae("hf:<repository>")`` and SAELens open it from there.

    The token is the one of ``huggingface-cli login``, or ``$HF_TOKEN``.

    Parameters
    ----------
    sae : SparseAutoencoder
    repository : str
        ``<owner>/<name>``; made when missing.
    metrics : mapping, optional
        Name -> number for the card, e.g. of :func:`patchsae_utils.evaluate_sae`; default: those that training left in the metadata.
    licence : str
        The hub's short name of it.
    folder : str, optional
        Folder within the repository, for several SAEs in one; the card then stays as the repository has it.
    private : bool
        Of a repository that is made.

    Returns
    -------
    str
        Its address.

    Raises
    ------
    ValueError
        If the repository's name is no ``<owner>/<name>``.
    ConnectionError
        If the hub can't be reached, or doesn't let this token write there.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"A repository is named <owner>/<name>, got {repository!r}.")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    with tempfile.TemporaryDirectory() as temporary:
        save_sae(sae, temporary)
        if folder is None:
            (Path(temporary) / "README.md").write_text(model_card(sae, repository, metrics, licence), encoding="utf-8")
        try:
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            api.upload_folder(repo_id=repository, folder_path=temporary, path_in_repo=folder, commit_message="Upload a sparse autoencoder")
        except Exception as error:  # the client's errors come from several libraries
            raise ConnectionError(
                f"{repository} could not be written on the hub ({type(error).__name__}: {shortened(error)}). Check the owner's name and the network, and "
                "log in with a token that may write: `hf auth login`, or HF_TOKEN."
            ) from error
    return address


def model_card(sae: SparseAutoencoder, repository: str, metrics: Mapping[str, float] | None = None, licence: str = "mit") -> str:
    """The README.md of an SAE's repository: what it reads, what it was trained on, how good it is, how to use it.

    Parameters as of :func:`push_sae`. What the metadata doesn't say, the card says is not known.
    """
    known = sae.metadata
    metrics = known.get("metrics") if metrics is None else metrics
    facts = {
        "Model": _of(known, "model_name", "pretrained"),
        "SHA-256 of its weights": _of(known, "weights_hash"),
        "Layer (block whose output is read, from 0)": _of(known, "layer"),
        "Tokens": _of(known, "tokens"),
        "Training data": _of(known, "dataset", "split") + (f", {known['n_images']:,} images" if known.get("n_images") else ""),
        "Training tokens": f"{known['n_training_tokens']:,}" if known.get("n_training_tokens") else "not known",
        "Activation": f"{sae.activation}" + (f", k = {sae.k}" if sae.k else ""),
        "Size": f"{sae.d_in} → {sae.d_sae:,} latents",
        "Input": "normalised in training; the statistics are folded into the weights" if sae.normalizes else "the residual stream as it is",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in (metrics or {}).items() if isinstance(value, int | float))
    credit = (
        "\nTrained on scenes of OpenMoji artwork (https://openmoji.org), CC BY-SA 4.0.\n"
        if str(known.get("dataset", "")).startswith("openmoji")
        else ""
    )
    return f"""---
library_name: saelens
license: {licence}
tags:
- sparse-autoencoder
- saelens
- patchsae
- clip
- interpretability
---

# {repository.partition("/")[2]}

A sparse autoencoder over the residual stream of a CLIP vision transformer: each latent is a visual concept with a place in the image.

| | |
|---|---|
{table}

## How good it is

{f"| | |{chr(10)}|---|---|{chr(10)}{numbers}" if numbers else "Not measured."}

## How to use it

```python
import patchsae_utils as ps

sae = ps.load_sae("hf:{repository}")
clip = ps.load_clip({known.get("model_name", "...")!r}, {known.get("pretrained")!r})
residual = clip.residual(images, layer={known.get("layer", "...")})    # [B, 1+P, d]: CLS, then the patches
latents = sae.encode(residual)                  # [B, 1+P, {sae.d_sae}]
```

The files `cfg.json` and `sae_weights.safetensors` are SAELens's (v6): `sae_lens.SAE.load_from_disk(folder)` opens them too.
{credit}"""


def _of(known: Mapping[str, Any], *names: str) -> str:
    """Values of the metadata, in words."""
    values = [str(known[name]) for name in names if known.get(name) is not None]
    return ", ".join(values) or "not known"
