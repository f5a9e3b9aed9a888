"""Files of ``torch.save``, read as data: tensors and plain values come out, and nothing in them can run.

Such a file is a zip archive: ``<name>/data.pkl``, a pickle that says how everything hangs together, and ``<name>/data/<key>``, each
tensor's raw numbers. A pickle is a program for a small stack machine; Python's own machine imports and calls whatever it names. The one
here (:func:`_run`) knows the few instructions that build values. A name is a name to it, and calling one gives a :class:`Record`, unless
it is one of the few constructors of tensors in :data:`_CONSTRUCTORS`.

Sizes are bounded by the file's own: torch never compresses, so an archive that declares more bytes than it has is refused unread.

Source of the instructions: the module ``pickletools`` of Python, which also parses them here; of the archive: ``torch/serialization.py``.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LONGEST = 32 << 20  # bytes of a data.pkl; a checkpoint's has some thousand
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Of Python's own modules, those whose objects settings are made of; they become records too. No other has any business in a checkpoint.
_SETTINGS = {"argparse", "collections", "copyreg", "copy_reg", "datetime", "decimal", "enum", "pathlib", "types", "uuid"}
_PYTHON = sys.stdlib_module_names | {"__builtin__", "commands", "exceptions", "nt", "posix"}
_DIMENSIONS = 8  # of a tensor, at most
_MARK = object()


class Record:
    """An object of a class that is not here: what was stored of it, and no more.

    Attributes
    ----------
    name : str
        The class as the file calls it, e.g. ``src.sae_training.config.ViTSAERunnerConfig``.
    arguments : tuple
        Of its constructor.
    state : dict
        Its attributes.
    """

    def __init__(self, name: str, arguments: tuple = ()):
        self.name, self.arguments = name, arguments
        self.state: dict = {}

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {sorted(map(str, self.state))})"


class _Name(str):
    """A class or function that the pickle names; only ever compared with other names."""


class _Storage:
    """Numbers of one or several tensors, read when the first of them is built."""

    def __init__(self, archive: zipfile.ZipFile, entry: str, dtype: torch.dtype, numel: int):
        size = archive.getinfo(entry).file_size
        if not isinstance(numel, int) or size != numel * dtype.itemsize:
            raise ValueError(f"{entry} holds {size} bytes, where {numel} numbers of {dtype} were announced")
        self._archive, self._entry, self._dtype, self.numel = archive, entry, dtype, numel
        self._values: Tensor | None = None

    def view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > _DIMENSIONS or not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError("a tensor has an offset, a size or strides that make no sense")
        numel = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel > self.numel or (numel and last >= self.numel):
            raise ValueError(f"a tensor of size {size} reaches beyond the {self.numel} numbers stored for it")
        if self._values is None:
            content = bytearray(self._archive.read(self._entry))  # compares its checksum
            self._values = torch.frombuffer(content, dtype=self._dtype) if content else torch.empty(0, dtype=self._dtype)
        return self._values.as_strided(size, stride, offset) if numel else torch.empty(size, dtype=self._dtype)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor is built from {type(storage).__name__}")
    return storage.view(offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a parameter is built from {type(tensor).__name__}")
    return tensor


def _keys(values: Any) -> list[Any]:
    """Values as keys of a dict or a set: plain ones alone, since hashing (or printing) tuples of tuples of ... can take for ever."""
    if not all(isinstance(value, str | int | float | bytes | torch.dtype | None) for value in values):
        raise ValueError("its pickle has a key that is no plain value")
    return list(values)


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(map(str, _keys(parts))),
    "collections.OrderedDict": lambda pairs=(): dict(zip(_keys([key for key, _ in pairs]), [value for _, value in pairs], strict=True)),
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),  # how bytes are written
    "builtins.set": lambda items=(): set(_keys(items)),
    "__builtin__.set": lambda items=(): set(_keys(items)),
    "builtins.frozenset": lambda items=(): frozenset(_keys(items)),
    "__builtin__.frozenset": lambda items=(): frozenset(_keys(items)),
}


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote: tensors (on the CPU), plain values and containers; objects of other classes as :class:`Record`.

    Other bytes may stand before the archive, as in saev's files.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such archive, is damaged, declares more than it holds, or names things of Python's that no checkpoint needs, such as
        ``os.system``. Nothing is run either way.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.stat().st_size)
    except _Refused as error:
        raise ValueError(f"{path} is refused: {error}. Nothing of it was run. Get the weights from a source you trust.") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no archive of torch.save, or is damaged ({error}). A plain pickle, or a file from before torch 1.6, is not read: "
            "it could run code when opened. Where it can be trusted, write its weights anew with torch.save of today, or fill a "
            "SparseAutoencoder and save that."
        ) from error
    except (ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError, RuntimeError, OSError, struct.error) as error:
        raise ValueError(f"{path} is damaged, or not of a kind that is read: {error}. Copy or download it again.") from error


class _Refused(Exception):
    """The file asks for what no checkpoint needs."""


def _read(archive: zipfile.ZipFile, n_bytes: int) -> Any:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise _Refused("it is compressed, which torch.save never does, and could grow without bound")
    declared = sum(entry.file_size for entry in entries)
    if declared > n_bytes:
        raise _Refused(f"it declares {declared:,} bytes of content, and has {n_bytes:,}")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} entries data.pkl, expected 1")
    if pickles[0].file_size > _LONGEST:
        raise _Refused(f"its data.pkl has {pickles[0].file_size:,} bytes; {_LONGEST:,} are plenty for a checkpoint")
    prefix = pickles[0].filename.removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[tuple, _Storage] = {}

    def storage(reference: Any) -> _Storage:
        """``("storage", class, key, device, number of elements)``."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage" and isinstance(reference[2], str)):
            raise ValueError("a reference to a storage makes no sense")
        _, kind, key, _, numel = reference
        dtype = _STORAGES.get(kind.removeprefix("torch.")) if isinstance(kind, _Name) else None
        if dtype is None:
            raise ValueError(f"numbers of a kind that is not read (valid: {', '.join(_STORAGES)})")
        if (key, dtype) not in storages:
            storages[key, dtype] = _Storage(archive, f"{prefix}data/{key}", dtype, numel)
        return storages[key, dtype]

    return _run(archive.read(pickles[0]), storage)


def _name(module: str, attribute: str) -> Any:
    """What stands for a class or function: a dtype of torch as it is, everything else a mere name."""
    name = f"{module}.{attribute}"
    if module == "torch" and attribute in _DTYPES:
        return _DTYPES[attribute]
    known = name in _CONSTRUCTORS or name in ("builtins.object", "__builtin__.object")
    if module.partition(".")[0] in _PYTHON and module not in _SETTINGS and not known:
        raise _Refused(f"its pickle names {name}, which no checkpoint needs")
    return _Name(name)


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(code: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """Follow a pickle's instructions; ``storage`` answers its references to numbers outside it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for instruction, argument, _ in pickletools.genops(code):
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = tuple(stack[-_TUPLES[name] :])
            stack[-_TUPLES[name] :] = [items]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "FROZENSET":
            stack.append(frozenset(_keys(since_mark())))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_name(str(module), str(attribute)))
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            _set_state(stack.pop(), stack[-1])
        elif name in ("APPEND", "SETITEM"):
            n = 1 if name == "APPEND" else 2
            items = stack[-n:]
            del stack[-n:]
            _fill(stack[-1], items, pairs=name == "SETITEM")
        elif name in ("APPENDS", "ADDITEMS", "SETITEMS"):
            items = since_mark()
            _fill(stack[-1], items, pairs=name == "SETITEMS")
        elif name == "STOP":
            (value,) = stack
            return value
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {name}, which torch.save doesn't write")
    raise ValueError("its pickle has no end")


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise _Refused(f"its pickle calls a {type(function).__name__} with a {type(arguments).__name__}")
    if function in _CONSTRUCTORS:
        return _CONSTRUCTORS[function](*arguments)
    if function == "copyreg._reconstructor" and arguments and isinstance(arguments[0], _Name):
        return Record(str(arguments[0]))
    return Record(str(function), arguments)


def _set_state(state: Any, target: Any) -> None:
    if isinstance(target, dict):  # attributes of an OrderedDict: a state dict's "_metadata"
        return
    if not isinstance(target, Record):
        raise _Refused(f"its pickle changes a {type(target).__name__}")
    for part in state if isinstance(state, tuple) else (state,):  # a tuple: attributes, and those in slots
        if isinstance(part, dict):
            target.state.update(part)  # its keys are plain already


def _fill(target: Any, items: list[Any], pairs: bool) -> None:
    if isinstance(target, Record):  # of a class of lists or of dicts
        return
    if pairs and isinstance(target, dict):
        target.update(zip(_keys(items[::2]), items[1::2], strict=True))
    elif not pairs and isinstance(target, list):
        target.extend(items)
    elif not pairs and isinstance(target, set):
        target.update(_keys(items))
    else:
        raise ValueError(f"its pickle puts items into a {type(target).__name__}")


def is_torch_archive(path: Path) -> bool:
    """Whether a file begins as ``torch.save`` begins it."""
    with open(path, "rb") as file:
        return os.path.getsize(path) > 4 and file.read(4) == b"PK\x03\x04"
