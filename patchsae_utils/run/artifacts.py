"""Artifacts of a run on disk: written under a temporary name and renamed, described by a manifest, recognised by a fingerprint."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import torch

from .memory import is_out_of_memory


def fingerprint(**inputs: Any) -> str:
    """Name a set of inputs (what :func:`plain` knows): the first 16 hex digits of the SHA-256 of their canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _again(path: str | Path) -> str:
    return f"Delete {Path(path).parent} and run the stage that writes it again."


def read_json(path: str | Path, content: bytes | None = None) -> Any:
    """Read a JSON file, or its bytes; a damaged one is a ``ValueError`` that names it."""
    try:
        return json.loads((Path(path).read_bytes() if content is None else content).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). If a stage wrote it, delete it and run that stage again.") from error


MANIFEST = "manifest.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left", "os error 28", "os error 27", "os error 122", "File too large", "failed writing file", "unexpected pos")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Say of a disk that filled up which file was being written and what to do, whichever library's error it was: always an ``OSError``."""
    try:
        yield
    except Exception as error:  # safetensors and torch raise their own
        number = getattr(error, "errno", None)
        if number not in _FULL and not any(text in str(error) for text in _FULL_TEXTS):
            raise
        number = number if number in _FULL else errno.ENOSPC
        remedy = "free some space, or move the folder to a larger disk, and run the same again; it goes on from there"
        text = f"{os.strerror(number)}, while this file was being written. What was whole before is kept: {remedy}"
        raise OSError(number, text, str(path)) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and disappears when it doesn't; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with disk_errors(path):
        temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        with disk_errors(path):
            yield temporary
        _let_read(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON by :func:`atomic_file`; NaN and infinities, which JSON doesn't know, become null."""
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV by :func:`atomic_file`, numbers to six digits, without its index."""
    with atomic_file(path) as temporary:
        table.round(6).to_csv(temporary, index=False)


@contextmanager
def atomic_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that replaces it when the block ends well, unless files of others were lost, and disappears when it doesn't."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(out)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666
    try:
        with disk_errors(out):
            yield temporary
        for path in filter(Path.is_file, temporary.rglob("*")):
            _let_read(path, mode)
        _refuse_others(out, [path.name for path in temporary.iterdir()])
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_others(folder: Path, own: Iterable[str]) -> None:
    """An error if a folder that would be replaced holds what is none of one's ``own`` files."""
    if folder.is_dir() and (others := sorted({path.name for path in folder.glob("[!.]*")} - set(own))):
        what = f"{folder} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, which would be lost"
        raise ValueError(f"{what}: what is written there replaces the whole folder. Choose a folder of its own, or delete this one.")


def _beside(path: Path) -> Path:
    """A name that nobody else takes. Not from :mod:`tempfile`, which makes what the owner alone may read: runs are shared on clusters."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")


def _let_read(path: Path, mode: int) -> None:
    """Give a file the mode that the umask asks for: safetensors makes its files for their owner alone."""
    if path.stat().st_mode & 0o777 != mode & 0o777:
        path.chmod(mode & 0o777)


_LOCKLESS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what file systems without locks answer


@contextmanager
def folder_lock(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Keep others from writing into a folder while the block runs: a ``ValueError`` if one does, unless told to ``wait`` for its end."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    timeout = -1 if wait else 0
    # The system's lock ends with the process that holds it. Where a file system has none, a file is the lock.
    lock: filelock.BaseFileLock = filelock.FileLock(folder / ".lock", timeout=timeout, thread_local=False)
    try:
        try:
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, filelock.Timeout) or getattr(error, "errno", errno.ENOSYS) not in _LOCKLESS:
                raise
            lock = filelock.SoftFileLock(folder / ".lock-held", timeout=timeout, thread_local=False)
            lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{folder} is being written by another process, or by this one already. Wait until it has finished, stop it, or choose another folder."
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who opened it meanwhile finds it gone, and opens anew
        lock.release()


def with_checksum(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself, by which :func:`read_checked_json` finds it whole or damaged."""
    entries = as_json(entries)
    return {**entries, "checksum": fingerprint(**entries)}


def read_checked_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object :func:`with_checksum`, without it; a ``ValueError`` if it is another object than was written."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}. {_again(path)}")
    if found.pop("checksum", None) not in (None, fingerprint(**found)):
        raise ValueError(f"{path} is damaged: it is not what was written there. {_again(path)}")
    return found


def write_folder_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` into a finished folder: the entries, and under ``files`` the SHA-256 of every file that lies there."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    write_json(folder / MANIFEST, with_checksum({**entries, "files": files}))


def read_folder_manifest(folder: Path) -> dict[str, Any]:
    """Read what :func:`write_folder_manifest` wrote; a missing or damaged file is an error that names it."""
    manifest = read_checked_json(folder / MANIFEST)
    with damage_named(folder / MANIFEST):
        files = dict(manifest.get("files", {}).items())
    for name, checksum in files.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {MANIFEST} names. {_again(folder / name)}")
        if file_sha256(folder / name) != checksum:
            raise ValueError(f"{folder / name} is damaged: its checksum is not the manifest's. {_again(folder / name)}")
    return manifest


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Around the use of a manifest's entries: one that is missing, or of another type, is a ``ValueError`` that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged: it doesn't say what it should ({type(error).__name__}: {error}). {_again(path)}") from error


def shortened(error: Exception, length: int = 240) -> str:
    """An error's text on one line."""
    text = " ".join(str(error).split()) or "it ends too early"
    return text if len(text) <= length else f"{text[:length]} ..."


def is_current(folder: str | Path, fp: str, name: str = MANIFEST, holds: str | None = None) -> bool:
    """Whether a folder holds the finished artifact of these inputs; one that is to be replaced, and doesn't ``hold`` its file alone, is refused."""
    path = Path(folder) / name
    manifest = read_checked_json(path) if path.exists() else {}
    current = manifest.get("fingerprint") == fp and manifest.get("complete", True)
    if holds is not None and not current:
        with damage_named(path):
            files = {**manifest.get("files", {})}
        _refuse_others(Path(folder), {name, *files} if holds in files else ())
    return current


def as_json(value: Any) -> Any:
    """A value as JSON holds it: see :func:`plain`; NaN and infinities as None."""
    return json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)


def plain(value: Any) -> Any:
    """A data class, table, tensor, array, mapping, path or set as plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, pd.DataFrame):
        return value.reset_index(drop=True).to_dict("records")
    if hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"Cannot write a {type(value).__name__} as JSON: {value!r}")
