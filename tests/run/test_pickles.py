"""Files of torch.save are read as data: what torch wrote comes out; whatever else a pickle asks for, nothing runs."""

import builtins
import io
import os
import pickle
import random
import subprocess
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from patchsae_utils.run.pickles import Record, read_torch
from patchsae_utils.sae.files import load_sae


class Settings(SimpleNamespace):
    """A class that a reader may know or not; it doesn't matter."""


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path):
    """A file that appears when anything runs."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists(), "something was run"


def archive(path, code, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", code)
        file.writestr("x/version", "3\n")
        for name, content in entries.items():
            file.writestr(f"x/data/{name.removeprefix('n')}", content)
    return path


# -- what torch wrote ---------------------------------------------------------------------------------------------------------


def test_tensors_and_plain_values_come_out_as_they_were(tmp_path):
    a = torch.arange(12.0).reshape(3, 4)
    content = {
        "tensors": [a, a.T, a[1:, ::2], torch.tensor(3), torch.zeros(0, 5), a.half(), a.bfloat16(), a > 3, a.long()],
        "parameter": torch.nn.Parameter(a.clone()), "state": torch.nn.Linear(3, 2).state_dict(),
        "values": [None, True, -5, 2**80, 1.5, "é", b"\xff\x00", (1, (2, 3)), {"a": {1: 2}}, {1, 2}, frozenset({"x"})],
        "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "size": a.shape, "ordered": OrderedDict(b=1, a=2),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    for before, after in zip(content["tensors"], found["tensors"], strict=True):
        assert before.dtype == after.dtype
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(found["parameter"], content["parameter"].detach(), rtol=0, atol=0)
    torch.testing.assert_close(found["state"], dict(content["state"]), rtol=0, atol=0)
    assert found["values"] == content["values"] and found["dtype"] is torch.bfloat16 and found["device"] == torch.device("cuda:1")
    assert found["size"] == (3, 4) and list(found["ordered"]) == ["b", "a"]


def test_objects_of_any_class_come_out_as_records(tmp_path):
    settings = Settings(d_in=768, path=PurePosixPath("a/b"), inner=Settings(x=[1, 2]), of=defaultdict(list, a=[1]))
    scalars = [np.float64(0.5), np.float32(1.5), np.int64(-2), np.bool_(True), np.str_("é"), np.datetime64("2020-01-01")]
    torch.save({"cfg": settings, "args": Namespace(lr=0.1), "loss": scalars, "rng": np.arange(3)}, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    record = found["cfg"]
    assert isinstance(record, Record) and record.name.endswith(".Settings")
    assert record.state["d_in"] == 768 and record.state["inner"].state == {"x": [1, 2]} and record.state["of"] == {"a": [1]}
    assert record.state["path"].arguments == ("a", "b")
    assert found["args"].state == {"lr": 0.1}
    assert [found[name].name.partition(".")[0] for name in ("args", "rng")] == ["argparse", "numpy"]
    assert found["loss"][:-1] == [0.5, 1.5, -2, True, "é"] and [*map(type, found["loss"])] == [float, float, int, bool, str, Record]


def test_files_from_before_the_archive_are_read_as_far_as_they_are_plain(tmp_path):
    for content, expected in (
        ({"w": torch.arange(3.0), "n": 3}, None),
        ({"cfg": Settings(a=1)}, "Settings"),
        ({"x": Calls(os.getcwd)}, "getcwd"),
    ):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        if expected is None:
            torch.testing.assert_close(read_torch(tmp_path / "x.pt"), content, rtol=0, atol=0)
            continue
        with pytest.raises(ValueError, match=expected) as refusal:
            read_torch(tmp_path / "x.pt")
        assert "weights_only" not in str(refusal.value), "torch's advice to let it run is not passed on"


# -- what others might write ----------------------------------------------------------------------------------------------------


ATTACKS = {
    "os.system": lambda trap: Calls(os.system, f"touch '{trap}'"),
    "eval": lambda trap: Calls(builtins.eval, f"open({str(trap)!r}, 'w')"),
    "exec": lambda trap: Calls(builtins.exec, f"open({str(trap)!r}, 'w')"),
    "open": lambda trap: Calls(open, str(trap), "w"),
    "subprocess": lambda trap: Calls(subprocess.Popen, ["touch", str(trap)]),
    "nested reduce": lambda trap: Calls(getattr, Calls(__import__, "os"), "system"),
    "a call of what a call gave": lambda trap: Calls(Calls(getattr, Calls(__import__, "pathlib"), "Path"), str(trap)),
    "pickle in pickle": lambda trap: Calls(pickle.loads, pickle.dumps(Calls(open, str(trap), "w"))),
    "torch.load": lambda trap: Calls(torch.load, str(trap)),
}


@pytest.mark.parametrize("place", ["alone", "as settings", "among weights"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_pickles_run_nothing(tmp_path, trap, attack, place):
    thing = ATTACKS[attack](trap)
    w = {"W_enc": torch.zeros(2, 3), "b_enc": torch.zeros(3), "W_dec": torch.zeros(3, 2), "b_dec": torch.zeros(2)}
    content = {
        "alone": thing,
        "as settings": {"cfg": {"x": thing}, "state_dict": w},
        "among weights": {"cfg": {}, "state_dict": w | {"x": thing}},
    }
    data = io.BytesIO()
    pickler = pickle._Pickler if attack == "a call of what a call gave" else pickle.Pickler  # the C pickler wants a callable

    class Module:
        Pickler, dump = pickler, staticmethod(pickle.dump)

    try:
        torch.save(content[place], data, pickle_module=Module)
    except pickle.PicklingError:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("x/data.pkl", b"cbuiltins\ngetattr\n(cos\nsystem\nVx\ntR(Vtouch\ntR.")
    (tmp_path / "sae.pt").write_bytes(data.getvalue())
    if attack == "torch.load" and place != "alone":
        load_sae(tmp_path / "sae.pt")  # an inert record, which nobody looks at
        return
    with pytest.raises(ValueError, match="refused: its pickle|holds a Record"):
        load_sae(tmp_path / "sae.pt")


def test_what_is_refused_is_named(tmp_path):
    archive(tmp_path / "x.pt", b"cos\nsystem\n(Vtouch x\ntR.")
    with pytest.raises(ValueError, match="names os.system, which no checkpoint needs.*Nothing of it was run"):
        read_torch(tmp_path / "x.pt")
    archive(tmp_path / "x.pt", b"cos.path\njoin\n.")
    with pytest.raises(ValueError, match="names os.path.join"):
        read_torch(tmp_path / "x.pt")


def test_a_plain_pickle_is_not_opened(tmp_path, trap):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Calls(open, str(trap), "w")))
    with pytest.raises(ValueError, match="no archive of torch.save.*could run code"):
        read_torch(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_sae(tmp_path / "x.pt")


def test_a_compressed_bomb_is_not_unpacked(tmp_path):
    archive(tmp_path / "x.pt", b"]." + bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match="compressed, which torch.save never does"):
        read_torch(tmp_path / "x.pt")


def test_a_bomb_of_declared_size_is_not_believed(tmp_path):
    path = archive(tmp_path / "x.pt", b"].", n0=bytes(100))
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02")  # the last entry of the directory: its two sizes are 100
    for sizes in ((20, 24), (24,)):
        bomb = bytearray(content)
        for offset in sizes:
            bomb[place + offset : place + offset + 4] = (4_000_000_000).to_bytes(4, "little")
        path.write_bytes(bomb)
        with pytest.raises(ValueError, match="declares 4,000,000,.*|could grow without bound"):
            read_torch(path)


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ%s%s%s\x89NtR."


def number(n):
    return b"J" + n.to_bytes(4, "little", signed=True)


def tensor_pickle(numel, offset, size, stride):
    parts = [b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (size, stride)]
    return TENSOR % (number(numel), number(offset), *parts)


def test_a_tensor_is_not_larger_than_its_numbers(tmp_path):
    numbers = torch.arange(6.0)
    path = archive(tmp_path / "x.pt", tensor_pickle(6, 1, (2, 2), (3, 1)), n0=numbers.numpy().tobytes())
    torch.testing.assert_close(read_torch(path), numbers.as_strided((2, 2), (3, 1), 1), rtol=0, atol=0)
    for numel, offset, size, stride, message in (
        (1_000_000_000, 0, (6,), (1,), "24 bytes.*4000000000"),
        (6, 0, (1_000_000, 1_000_000), (0, 0), "reaches beyond the 6 numbers"),
        (6, 4, (3,), (1,), "not resizable"),
        (6, -2, (3,), (1,), "invalid storage offset"),
        (6, 0, (2,), (-1,), "overflowed"),
    ):
        archive(path, tensor_pickle(numel, offset, size, stride), n0=numbers.numpy().tobytes())
        with pytest.raises(ValueError, match=message):
            read_torch(path)


@pytest.mark.parametrize(("code", "message"), [
    (b"ctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x00aK\x00))tR.", "_rebuild_tensor_v2"),
    (b"ctorch._utils\n_rebuild_parameter\n(K\x01tR.", "_rebuild_parameter"),
    (b"K\x01Q.", "a reference to a storage makes no sense"),
    (tensor_pickle(6, 0, (6,), (1,)).replace(b"FloatStorage", b"DoubleStorage"), "24 bytes.*48 bytes"),
    (b"K\x01K\x02a.", "append to lists, but got .*int"),
    (b"K\x01}b.", "build Tensor.*but got .*int"),
    (b"K\x01)R.", "calls a int.*Nothing of it was run"),
    (b"K\x01", "pickle exhausted before seeing STOP"),
])  # fmt: skip
def test_pickles_that_make_no_sense_are_named(tmp_path, code, message):
    path = archive(tmp_path / "x.pt", code, n0=bytes(24))
    with pytest.raises(ValueError, match=rf"x.pt is (refused|no archive of torch.save, or is damaged).*{message}"):
        read_torch(path)


def test_pickles_that_grow_in_memory_do_not(tmp_path, monkeypatch):
    laughs = b"\x80\x02)q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(100))
    for code, message in (
        (laughs + b"}h\x64K\x01s.", "tuple of more than 10,000 parts"),  # hashing it would take 2^100 steps
        (b"\x80\x02]r\xff\xff\xff\x7f.", None),  # a memo of 2^31 places in Python's own machine
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),  # a bytearray of 2^63 bytes
        (b"\x80\x02" + b"(" * 100_000 + b".", "damaged"),
    ):
        archive(tmp_path / "x.pt", code)
        if message is None:
            assert read_torch(tmp_path / "x.pt") == []
            continue
        with pytest.raises(ValueError, match=message):
            read_torch(tmp_path / "x.pt")
    path = archive(tmp_path / "x.pt", b"].")
    monkeypatch.setattr("patchsae_utils.run.pickles._LONGEST", 1)
    with pytest.raises(ValueError, match="its data.pkl has 2 bytes; 1 are plenty for a checkpoint"):
        read_torch(path)


def test_random_pickles_end_in_a_value_or_a_documented_error(tmp_path):
    """Bytes of real pickles, cut and shuffled."""
    draw = random.Random(1)
    sources = [
        pickle.dumps(value, protocol)
        for protocol in (2, 4)
        for value in ([1, (2, "x")], {"a": Settings(b=1)}, {1, 2}, b"abc", Calls(os.system, "true"))
    ]
    for _ in range(300):
        code = bytearray(draw.choice(sources))
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(code))
            if draw.random() < 0.5:
                code[place] = draw.randrange(256)
            else:
                code[place:place] = draw.choice(sources)[: draw.randrange(12)]
        archive(tmp_path / "x.pt", bytes(code))
        try:
            read_torch(tmp_path / "x.pt")
        except ValueError:
            pass
