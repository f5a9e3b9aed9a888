"""An activation store behind a URL: shards are fetched when they are first read, checked against their hashes, and kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..run.artifacts import atomic_file, file_sha256
from .folders import RemoteFolder, read_object
from .store import MANIFEST, ActivationStore, check_manifest

CACHE_BYTES = 100 * 2**30
"""Of one store's files on this machine; those that were read longest ago go first. ``$PATCHSAE_CACHE`` says where they lie."""


class RemoteStore(ActivationStore):
    """Reads like any :class:`~patchsae_utils.store.ActivationStore`; its ``folder`` is where fetched shards lie. Made by ``ActivationStore.open``."""

    def __init__(self, remote: RemoteFolder, manifest: dict[str, Any]):
        super().__init__(remote.cache / manifest["fingerprint"], manifest)
        self.remote = remote

    @classmethod
    def open(cls, folder: str | Path) -> RemoteStore:
        """Open a finished store.

        Raises
        ------
        FileNotFoundError
            If there is no manifest behind the URL.
        ValueError
            If it is not a store of this format, or unfinished, or fsspec knows no such kind of URL.
        ImportError
            If a package for it is missing.
        """
        remote = RemoteFolder(str(folder))
        if remote.size(MANIFEST) is None:
            raise FileNotFoundError(
                f"{remote} holds no activation store ({MANIFEST} is missing). Make one with extract_activations(clip, dataset, layer, {str(remote)!r})."
            )
        manifest = check_manifest(read_object(remote, MANIFEST), f"{remote}/{MANIFEST}")
        if not manifest["complete"]:
            raise ValueError(
                f"The activation store {remote} is unfinished. Call extract_activations again with the same arguments: it goes on where it stopped."
            )
        return cls(remote, manifest)

    def __repr__(self) -> str:
        return super().__repr__().replace(repr(str(self.folder)), repr(str(self.remote)))

    def _check(self, name: str) -> None:
        path = self.folder / name
        if path.exists() and name not in self._verified and file_sha256(path) != self._manifest["files"][name]["sha256"]:
            path.unlink()  # of a disk that lost something: the original may be whole
        if not path.exists():
            self._verified.discard(name)
            self._fetch(name)
        super()._check(name)
        os.utime(path)

    def _fetch(self, name: str) -> None:
        if self.remote.size(name) is None:
            raise FileNotFoundError(
                f"The activation store lacks {self.remote}/{name}. "
                "Call extract_activations again with the same arguments: only this file is written."
            )
        self._make_room(self._manifest["files"][name]["bytes"])
        with atomic_file(self.folder / name) as temporary:
            self.remote.system.get_file(f"{self.remote.root}/{name}", str(temporary))
        if file_sha256(self.folder / name) != self._manifest["files"][name]["sha256"]:
            (self.folder / name).unlink()
            raise ValueError(
                f"{self.remote}/{name} is damaged: its SHA-256 is not the manifest's. "
                "Delete this file and call extract_activations again with the same arguments: only this file is written anew."
            )

    def _make_room(self, n_bytes: int) -> None:
        """Remove the files that were read longest ago; what is mapped into memory stays readable."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        excess = sum(path.stat().st_size for path in files) + n_bytes - CACHE_BYTES
        for path in files:
            if excess <= 0:
                break
            excess -= path.stat().st_size
            path.unlink()
