"""Where a store's files lie: a folder of this machine, or any URL that fsspec can write (``s3://``, ``gs://``, ``hf://``, ``memory://``, ...)."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import fsspec

from ..data.artwork import cache_folder
from ..run.artifacts import atomic_file, folder_lock


def is_url(place: str | Path) -> bool:
    """Whether a place is named by a URL; ``file://`` counts as a folder of this machine."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


class Folder:
    """A folder here or behind a URL, which needs fsspec's package for it (``s3fs``, ...); a file is written as a whole or not at all."""

    def __init__(self, place: str | Path):
        self.name = str(place).removeprefix("file://").rstrip("/") or "/"
        self.local = None if is_url(place) else Path(self.name)
        if self.local is not None:
            self.system, self.root = fsspec.filesystem("file"), str(self.local.absolute())
            return
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.name)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}. Give a folder, or a URL that fsspec knows, such as s3://bucket/folder.") from error

    def __str__(self) -> str:
        return self.name

    @property
    def cache(self) -> Path:
        """The folder of this machine where files of this URL are kept; under ``$PATCHSAE_CACHE``, else in the user's cache folder."""
        return cache_folder() / "stores" / hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self.system.info(f"{self.root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        self.system.invalidate_cache()
        try:
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self.system.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return self.system.cat_file(f"{self.root}/{name}")

    def path(self, name: str, *, anew: bool = False) -> Path:
        """A file on this machine; one behind a URL is fetched when it is not kept here yet, or ``anew``."""
        if self.local is not None:
            return self.local / name
        with folder_lock(self.cache, wait=True):
            options = {"cache_storage": str(self.cache), "same_names": True, "expiry_time": 0, "skip_instance_cache": True}
            kept = fsspec.filesystem("filecache", fs=self.system, **options)
            if anew:
                with contextlib.suppress(FileNotFoundError):
                    kept.pop_from_cache(f"{self.root}/{name}")
            with kept.open(f"{self.root}/{name}") as file:
                return Path(file.name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole: object stores show it once its last byte is there."""
        if self.local is not None:
            with atomic_file(self.local / name) as temporary:
                temporary.write_bytes(content)
            return
        self.system.makedirs(self.root, exist_ok=True)
        self.system.pipe_file(f"{self.root}/{name}", content)
        self.system.invalidate_cache()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.size(name) is not None:
            self.system.rm_file(f"{self.root}/{name}")

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes away; object stores have no locks: of a URL, those of this machine."""
        return folder_lock(self.cache.with_suffix(".writing") if self.local is None else self.local)
