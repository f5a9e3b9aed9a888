"""Where a store's files lie: a folder of this machine, or any URL that fsspec can write (``s3://``, ``gs://``, ``hf://``, ``memory://``, ...).

Both write a file as a whole or not at all. A URL needs fsspec's package for it (``s3fs``, ``gcsfs``, ...) and its credentials as that package
takes them.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import platformdirs

from ..run.artifacts import atomic_file, folder_lock, parse_json


def is_url(place: str | Path) -> bool:
    """Whether a place is named by a URL; ``file://`` counts as a folder of this machine."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def open_folder(place: str | Path) -> LocalFolder | RemoteFolder:
    """The folder of a path or a URL.

    Raises
    ------
    ValueError
        If fsspec knows no such kind of URL.
    ImportError
        If it does, and its package is not installed.
    """
    return RemoteFolder(str(place)) if is_url(place) else LocalFolder(str(place).removeprefix("file://"))


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.path / name
        return path.stat().st_size if path.exists() else None

    def names(self) -> list[str]:
        """Files in the folder, in order."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole."""
        with atomic_file(self.path / name) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def lock(self) -> AbstractContextManager[None]:
        """See :func:`~patchsae_utils.artifacts.folder_lock`."""
        return folder_lock(self.path)


class RemoteFolder:
    """A folder behind a URL. Object stores have no locks: :meth:`lock` keeps apart only the processes of this machine."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise ImportError(f"{url} needs a package that is not installed: {error}.") from error
        except ValueError as error:
            raise ValueError(
                f"{url} can't be opened: {error}. Give a folder, or a URL that fsspec knows, such as s3://bucket/folder."
            ) from error
        self.root = self.root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def cache(self) -> Path:
        """The folder of this machine where files of this URL are kept; under ``$PATCHSAE_CACHE``, else in the user's cache folder."""
        base = os.environ.get("PATCHSAE_CACHE") or platformdirs.user_cache_path("patchsae_utils")
        return Path(base) / "stores" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self.system.info(f"{self.root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Files in the folder, in order."""
        self.system.invalidate_cache()
        try:
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self.system.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return self.system.cat_file(f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole: object stores show it once its last byte is there."""
        self.system.makedirs(self.root, exist_ok=True)
        self.system.pipe_file(f"{self.root}/{name}", content)
        self.system.invalidate_cache()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.size(name) is not None:
            self.system.rm_file(f"{self.root}/{name}")

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes of this machine away."""
        return folder_lock(self.cache)


def read_object(folder: LocalFolder | RemoteFolder, name: str) -> Any:
    """A JSON file of a folder; a damaged one is a ``ValueError`` that names it."""
    return parse_json(folder.read(name), f"{folder}/{name}")
