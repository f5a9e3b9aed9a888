"""The dictionary that ships with the package: the default profile's SAE, and its statistics, names and embeddings, in a few megabytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..latents.likeness import Likeness
from ..latents.summary import LatentSummary
from ..run.artifacts import atomic_folder, file_sha256, read_json, write_json
from ..sae.files import SHIPPED, load_sae, save_sae
from ..sae.model import SparseAutoencoder

LIMIT_MB = 8  # of all files together
_WHOLE = (torch.uint8, torch.int16, torch.int32)
_CARD = """# PatchSAE of the embedded world

A sparse autoencoder of the residual stream of our small CLIP (`model.name = "openmoji"`), trained by the default profile: {size}, `{activation}`.
Weights are rounded to float16. `ps.load_sae("openmoji")` opens it; `make explore` shows it where nothing was trained.

- `cfg.json`, `sae_weights.safetensors`: the SAE, in SAELens's form.
- `latents.safetensors`: statistics and reference images of its latents over {n_images} images, and CLIP's embeddings of these.
- `names.csv`: names of {n_named} latents by ground truth, with their scores.

Made by `python -m patchsae_utils ship` from `runs/{profile}`. Metrics: {metrics}. Licence: as the package; artwork of the training images: OpenMoji, CC BY-SA 4.0.
"""


class Shipped(NamedTuple):
    """What the explorers need."""

    sae: SparseAutoencoder
    summary: LatentSummary
    names: pd.DataFrame  # latent, name, kind, score of the latents that have a name
    likeness: Likeness  # monosemanticity of the SAE's latents alone; embeddings by CLIP alone


def ship(found: Shipped, profile: str, folder: Path = SHIPPED) -> dict[str, Any]:
    """Write it, small, with a card; ValueError if it takes more than ``LIMIT_MB``. Returns each file's megabytes."""
    sae, summary, names, likeness = found
    named = names.loc[~names["kind"].isin(["dead", "unnamed"]), ["latent", "name", "kind", "score"]]
    fields = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    tensors = {name: _small(value) for name, value in fields.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in fields.items() if name not in tensors}
    kinds = {name: str(fields[name].dtype).removeprefix("torch.") for name in tensors}
    scores = likeness.table.loc[likeness.table["dictionary"] == "SAE", "score"].to_numpy("float32")
    tensors |= {"likeness": torch.from_numpy(scores), "embeddings": likeness.embeddings.half()}
    with atomic_folder(folder) as temporary:
        weights = save_sae(sae, temporary) / "sae_weights.safetensors"
        save_file({name: value.half().contiguous() for name, value in load_file(weights).items()}, weights)
        settings = read_json(temporary / "cfg.json")
        settings["metadata"]["weights_sha256"] = file_sha256(weights)
        write_json(temporary / "cfg.json", settings)
        save_file(tensors, temporary / "latents.safetensors", {"fields": json.dumps(plain), "kinds": json.dumps(kinds)})
        named.round({"score": 4}).to_csv(temporary / "names.csv", index=False)
        metrics = ", ".join(
            f"{name} {value:.4g}" for name, value in sae.metadata.get("metrics", {}).items() if isinstance(value, int | float)
        )
        size = f"{sae.d_in} -> {sae.d_sae}"
        told = {"n_images": summary.n_images, "n_named": len(named), "metrics": metrics or "none", "profile": profile}
        (temporary / "README.md").write_text(_CARD.format(size=size, activation=sae.activation, **told), encoding="utf-8")
        megabytes = {path.name: round(path.stat().st_size / 1e6, 2) for path in sorted(temporary.iterdir())}
        if sum(megabytes.values()) > LIMIT_MB:
            raise ValueError(
                f"What ships with the package takes at most {LIMIT_MB} MB, and this takes {sum(megabytes.values()):.1f}: {megabytes}."
            )
    return megabytes


def open_shipped(folder: Path = SHIPPED) -> Shipped | None:
    """What :func:`ship` wrote; None where nothing is."""
    if not (folder / "latents.safetensors").is_file():
        return None
    with safe_open(folder / "latents.safetensors", "pt") as file:
        plain, kinds = (json.loads(file.metadata()[name]) for name in ("fields", "kinds"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    embeddings, scores = tensors.pop("embeddings").float(), tensors.pop("likeness").numpy()
    plain["class_names"] = tuple(plain["class_names"])
    sae, tensors = load_sae(folder), {name: value.to(getattr(torch, kinds[name])) for name, value in tensors.items()}
    summary = LatentSummary(**plain | {"sae": sae.fingerprint}, **tensors)  # of these weights, as they were before they were rounded
    table = pd.DataFrame({"dictionary": "SAE", "latent": range(len(scores)), "score": scores})
    return Shipped(sae, summary, pd.read_csv(folder / "names.csv", keep_default_na=False), Likeness(table, {"clip": embeddings}))


def _small(values: Tensor) -> Tensor:
    """The same numbers in the smallest type that holds all of them."""
    for kind in _WHOLE if values.dtype != torch.bool else ():
        if torch.equal(values.to(kind).to(values.dtype), values):
            return values.to(kind).contiguous()
    return values.contiguous()
