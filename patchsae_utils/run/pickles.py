"""Files of ``torch.save`` (a zip of a pickle and of tensors' raw numbers), read as data: nothing in them can run.

``torch.load(weights_only=True)`` reads them; classes that torch doesn't allow become inert records. What torch leaves open is refused before:
archives that unpack to more than they have, checksums that don't fit, tensors larger than their numbers, pickles that take for ever.
Sources: ``torch/serialization.py``, ``torch/_weights_only_unpickler.py``; Python's ``pickletools``.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_LONGEST = 32 << 20  # bytes of a data.pkl; a checkpoint's has some thousand
_LARGEST_TUPLE = 10_000  # parts, and parts of parts
# Of Python's own modules, those whose objects settings are made of. No other has any business in a checkpoint.
_SETTINGS = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "pathlib", "types", "uuid"}
_PYTHON = sys.stdlib_module_names | {"__builtin__", "commands", "exceptions", "nt", "posix"}
_CONTAINERS = {"builtins.frozenset": frozenset, "builtins.list": list, "builtins.dict": dict, "collections.defaultdict": lambda *_: {}}
_ALLOWED = {*_CONTAINERS, "builtins.set", "builtins.bytearray", "builtins.complex", "_codecs.encode"}  # the latter by torch itself
_SCALARS = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"  # older and newer


class Record:
    """What was stored of an object of a class that is not here: the class's name in the file, its constructor's arguments, its attributes."""

    name = ""
    arguments: tuple
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> Record:
        record = super().__new__(cls)
        record.__dict__.update(arguments=arguments, state={})
        return record

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # a tuple: attributes, and those in slots
            if isinstance(part, dict):
                self.state.update(part)

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {sorted(map(str, self.state))})"


def _number(kind: Record, data: bytes) -> Any:
    """A number or text of numpy's as a plain one."""
    return np.frombuffer(data, kind.arguments[0])[0].item() if kind.arguments[0][0] in "biufcU" else Record(kind, data)


_CONTAINERS |= dict.fromkeys(_SCALARS, _number)


class _Refused(Exception):
    """The file asks for what no checkpoint needs."""


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote: tensors (on the CPU), plain values and containers; objects of other classes as :class:`Record`.

    Other bytes may stand before the archive, as in saev's files. What can't be read as data, or is damaged, is a ``ValueError``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return _read_archive(path) if zipfile.is_zipfile(path) else _read_older(path)
    except _Refused as error:
        raise ValueError(f"{path} is refused: {error}. Nothing of it was run. Get the weights from a source you trust.") from None
    except MemoryError:
        raise
    except Exception as error:
        # Before these words, torch advises to let it run.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise ValueError(
            f"{path} is no archive of torch.save, or is damaged ({reason.partition(chr(10))[0]}). A plain pickle, or one of another "
            "protocol than torch's own, is not read: it could run code when opened. Copy or download the file again; where it can be trusted, "
            "write its weights anew with torch.save of today."
        ) from error


def is_torch_archive(path: Path) -> bool:
    """Whether a file begins as ``torch.save`` begins it."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        start = _check_archive(archive, path)
    with open(path, "rb") as whole:
        whole.seek(start)
        file = io.BytesIO(whole.read()) if start else whole
        names = get_unsafe_globals_in_checkpoint(file)
        stubs: list[Any] = [(_CONTAINERS.get(name, type("Record", (Record,), {"name": name})), name) for name in names]
        file.seek(0)
        with safe_globals(stubs):  # for classes that torch doesn't allow
            return torch.load(file, map_location="cpu", weights_only=True)


def _read_older(path: Path) -> Any:
    """A file from before torch 1.6: some pickles in a row, then numbers."""
    with open(path, "rb") as file:
        for _ in range(4):  # a magic number, a version, the machine's sizes, the content
            _check_pickle(file)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> int:
    """Refuse an archive that lies about itself; returns where it begins in its file."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise _Refused(
            "it is a TorchScript archive, a program with its weights, as OpenAI publishes its CLIPs. Wanted is a file of the weights alone: "
            "safetensors, or torch.save of the state dict (the tag 'openai' of open_clip fetches OpenAI's)"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise _Refused("it is compressed, which torch.save never does, and could grow without bound")
    if (declared := sum(entry.file_size for entry in entries)) > (n_bytes := path.stat().st_size):
        raise _Refused(f"it declares {declared:,} bytes of content, and has {n_bytes:,}")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len(set(names)) < len(names):
        raise ValueError(f"it holds {len(pickles)} entries data.pkl, expected 1, and no name twice")
    if pickles[0].file_size > _LONGEST:
        raise _Refused(f"its data.pkl has {pickles[0].file_size:,} bytes; {_LONGEST:,} are plenty for a checkpoint")
    if (damaged := archive.testzip()) is not None:  # torch itself compares no checksums
        raise ValueError(f"its entry {damaged} is not what was written")
    _check_pickle(io.BytesIO(archive.read(pickles[0])))
    return min(entry.header_offset for entry in entries)


class _Name(str):
    """A class or function that a pickle names."""


class _Tuple(tuple):
    """A tuple, with the number of its parts and theirs."""

    weight: int


class _Storage:
    """So many numbers."""

    def __init__(self, reference: Any):
        if not isinstance(reference, tuple) or [type(part) for part in reference[:5]] != [str, _Name, str, str, int]:
            raise ValueError("a reference to a storage makes no sense")
        self.numel = reference[4]


def _check_pickle(file: BinaryIO) -> None:
    """Follow a pickle without building anything: refuse what torch would take for ever to build, hash or print, or would blow up."""
    marks: list[list[Any]] = []
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for instruction, argument, _ in pickletools.genops(file):
        name, before = instruction.name, instruction.stack_before
        if name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle is of protocol {argument}, torch.save's is 2")
        if name == "MARK":
            marks.append(stack)
            stack = []
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        else:
            items: list[Any] = []
            if pickletools.markobject in before:
                items, stack = stack, marks.pop()
            n = len([part for part in before if part not in (pickletools.markobject, pickletools.stackslice)])
            if n > len(stack):
                raise ValueError("its pickle takes more than it has")
            items = stack[len(stack) - n :] + items
            del stack[len(stack) - n :]
            if instruction.stack_after:
                stack.append(_result(name, argument, items))


def _result(name: str, argument: Any, items: list[Any]) -> Any:
    """What stands on the stack after an instruction."""
    if "TUPLE" in name:
        made = _Tuple(items)
        made.weight = 1 + sum(getattr(item, "weight", 1) for item in items)
        if made.weight > _LARGEST_TUPLE:
            raise _Refused(f"its pickle has a tuple of more than {_LARGEST_TUPLE:,} parts, which no checkpoint needs")
        return made
    if name == "GLOBAL":
        called = argument.replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        if called not in _ALLOWED and called.partition(".")[0] in _PYTHON - _SETTINGS:
            raise _Refused(f"its pickle names {called}, which no checkpoint needs")
        return _Name(called)
    if name == "BINPERSID":
        return _Storage(items[0])
    if name in ("REDUCE", "NEWOBJ"):
        function, arguments = items
        if not isinstance(function, _Name):
            raise _Refused(f"its pickle calls a {type(function).__name__}")
        if isinstance(arguments, tuple) and len(arguments) > 2 and isinstance(arguments[0], _Storage):
            size = arguments[2]
            if isinstance(size, tuple) and all(type(n) is int for n in size) and math.prod(size) > arguments[0].numel:
                raise _Refused(f"a tensor of size {[*size]} reaches beyond the {arguments[0].numel} numbers stored for it")
        return None
    return items[0] if items else argument
