"""What an artifact on disk is: an SAE of any program, an activation store, or anything with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .activations.folders import is_url
from .activations.store import FORMAT, ActivationStore, read_manifest
from .run.artifacts import read_checked_json
from .sae.files import load_sae
from .sae.formats import find

_LONG = 12  # entries of a list that are shown


def describe(path: str | Path) -> dict[str, Any]:
    """Say what lies at a path, in plain values.

    Parameters
    ----------
    path : str or Path
        A folder or a file; ``hf:<owner>/<repository>``; or the URL of an activation store.

    Returns
    -------
    dict
        ``what`` it is, and what it says of itself.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is damaged, or nothing that is known.
    """
    if is_url(path):
        store = ActivationStore.open(path)
        return {"what": "activation store", **store.describe().to_dict(), "files": "checked when they are read"}
    if not str(path).startswith("hf:"):
        path = Path(path)
        if path.name == "manifest.json":
            path = path.parent
        if (path / "manifest.json").is_file() and not (path / "cfg.json").is_file():
            return _manifest(path)
    sae = load_sae(path)
    form = sae.metadata.get("converted_from") if str(path).startswith("hf:") else find(Path(path))[0]
    norms = sae.W_dec.detach().norm(dim=1)
    facts = {
        "what": "sparse autoencoder",
        "format": form or "saelens",
        "activation": sae.activation,
        "k": sae.k,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "decoder_norms": [round(float(norms.min()), 4), round(float(norms.max()), 4)],
        "normalised_input": sae.normalizes,
        "fingerprint": sae.fingerprint,
        "reads": {key: value for key, value in sae.metadata.items() if key != "converted_from"},
    }
    return {name: value for name, value in facts.items() if value is not None}


def _manifest(path: Path) -> dict[str, Any]:
    """An activation store, checked file by file; of other artifacts, the manifest."""
    manifest = read_checked_json(path / "manifest.json")
    if manifest.get("format") == FORMAT:
        if not read_manifest(path / "manifest.json")["complete"]:
            return {
                "what": "activation store, unfinished",
                "files": len(manifest["files"]),
                **_short(manifest, leave=("files", "complete")),
            }
        store = ActivationStore.open(path)
        store.verify()
        return {"what": "activation store", **store.describe().to_dict(), "files": "all whole, by their checksums"}
    return {"what": "artifact", **_short(manifest)}


def _short(manifest: dict[str, Any], leave: tuple[str, ...] = ()) -> dict[str, Any]:
    def shown(value: Any) -> Any:
        if isinstance(value, list) and len(value) > _LONG:
            return f"{len(value)} entries"
        if isinstance(value, dict):
            return f"{len(value)} entries" if len(value) > _LONG else {key: shown(item) for key, item in value.items()}
        return value

    return {key: shown(value) for key, value in manifest.items() if key not in leave}
