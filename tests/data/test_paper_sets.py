"""The paper's eleven data sets: found in CoOp's layout and in torchvision's, split and named as CoOp does; CoOp's split files; the hub's streams."""

import json
import pickle
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from patchsae_utils.data import load_dataset, templates_for
from patchsae_utils.data.paper_sets import PAPER_SETS, paper_name


def draw(path, red):
    """A flat picture whose red level tells it apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path, quality=100)


def red(data, i):
    return data[i].image.getpixel((0, 0))[0]


def split_file(path, base, names, per_class=(2, 1, 1)):
    """CoOp's file over new pictures; class c's have red levels 20 c, 20 c + 1, ..."""
    content = {}
    for start, n, split in ((0, per_class[0], "train"), (10, per_class[1], "val"), (15, per_class[2], "test")):
        content[split] = [[f"{c}/{start + i}.png", c, name] for c, name in enumerate(names) for i in range(n)]
        for file, c, _ in content[split]:
            draw(base / file, 20 * c + int(file.split("/")[1].split(".")[0]))
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "folder", "images"), [
    ("caltech101", "caltech-101", "101_ObjectCategories"), ("oxford_pets", "oxford_pets", "images"), ("stanford_cars", "stanford_cars", ""),
    ("flowers102", "oxford_flowers", "jpg"), ("food101", "food-101", "images"), ("sun397", "sun397", "SUN397"), ("dtd", "dtd", "images"),
    ("eurosat", "eurosat", "2750"), ("ucf101", "ucf101", "UCF-101-midframes"),
])  # fmt: skip
def test_coops_split_files_are_followed(tmp_path, monkeypatch, name, folder, images):
    base = tmp_path / folder
    split_file((base / images).mkdir(parents=True) or base / f"split_zhou_{name}.json", base / images, ["crane", "blue_jay", "crane"])
    for spec in (f"{name}?root={tmp_path}", str(base)):
        parts = {split: load_dataset(spec, split) for split in ("train", "val", "test")}
        assert {split: len(data) for split, data in parts.items()} == {"train": 6, "val": 3, "test": 3}
        for data in parts.values():
            assert data.class_names == ["crane", "blue jay", "crane"], "two of one name stay two"
            assert [red(data, i) // 20 for i in range(len(data))] == data.labels.tolist()
        assert red(parts["test"], 0) == 15
    monkeypatch.setenv("PATCHSAE_DATA", str(tmp_path))
    novel = load_dataset(name, "test", half="novel")
    assert (novel.class_names, red(novel, 0), novel.name) == (["crane"], 55, name)
    assert templates_for(name) == templates_for(f"{name}?root=/x") == templates_for(f"torchvision:{PAPER_SETS[name].torchvision}")
    assert templates_for(name) == (PAPER_SETS[name].template,) == templates_for(str(base))


@pytest.mark.parametrize(("content", "message"), [
    ({"train": []}, "must hold an object with train, val and test"), ({"train": 5, "val": [], "test": []}, "must hold an object with train"),
    ({"train": [["0/0.png", -1, "a"], ["1/0.png", 0, "b"]], "val": [], "test": []}, r"without gaps; there is none numbered \[1\]"),
    ({"train": [["a.png", "0", "crane"]], "val": [], "test": []}, r"train: expected \[path, label, class name\], got"),
    ({"train": [["0/0.png", 0, "crane"], ["1/0.png", 0, "jay"]], "val": [], "test": []}, "class 0 is called 'crane' and 'jay'"),
    ({"train": [["0/0.png", 1, "crane"]], "val": [], "test": []}, r"without gaps; there is none numbered \[0\]"),
    ({"train": [["0/0.png", 0, "crane"]], "val": [], "test": []}, "names the image '0/0.png', which is neither in"),
    ({"train": [], "val": [["0/0.png", 0, "crane"]], "test": []}, "has no images for split 'train'"),
])  # fmt: skip
def test_a_wrong_split_file_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "split_zhou_X.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset(str(tmp_path), "train")
    (tmp_path / "split_zhou_Y.json").write_text("{}")
    with pytest.raises(ValueError, match="2 files split_zhou"):
        load_dataset(str(tmp_path), "train")


def fill(base, names, form="{0}/{1}.jpg"):
    """Ten pictures of each class; class c's have the red level 20 c."""
    for c, name in enumerate(names):
        for i in range(10):
            draw(base / form.format(name, i, i + 1), 20 * c)


def caltech(root):
    names = ("BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse")
    fill(root / "caltech101" / "101_ObjectCategories", names, "{0}/image_{2:04d}.jpg")
    (root / "caltech101" / "Annotations").mkdir()
    return ["face", "airplane", "sea horse"], (15, 6, 9), [20, 60, 80]


def pets(root):
    base = root / "oxford-iiit-pet"
    names = ("Abyssinian", "american_bulldog")
    fill(base / "images", names, "{0}_{1}.jpg")
    lines = [f"{name}_{i} {c + 1} 1 1" for c, name in enumerate(names) for i in range(10)]
    (base / "annotations").mkdir()
    for split in ("trainval", "test"):
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return ["abyssinian", "american bulldog"], (16, 4, 20), [0, 20]


def cars(root):
    base = root / "stanford_cars"
    kind = [("fname", object), ("class", object)]
    for split in ("train", "test"):
        fill(base / f"cars_{split}", range(2), "{0}{1}.jpg")
        (base / "devkit").mkdir(exist_ok=True)
        rows = np.array([(f"{c}{i}.jpg", c + 1) for c in range(2) for i in range(5)], dtype=kind)
        path = base / "devkit" / "cars_train_annos.mat" if split == "train" else base / "cars_test_annos_withlabels.mat"
        scipy.io.savemat(path, {"annotations": rows})
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return ["2000 AM General Hummer SUV", "2012 Acura RL Sedan"], (8, 2, 10), [0, 20]


def food(root):
    files = {name: [f"{name}/{i}" for i in range(10)] for name in ("apple_pie", "ramen")}
    fill(root / "food-101" / "images", files)
    (root / "food-101" / "meta").mkdir()
    for split in ("train", "test"):
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(files))
    return ["apple pie", "ramen"], (16, 4, 20), [0, 20]


def aircraft(root, base=None):
    base = base or root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "Cessna 172"]
    for c in range(2):
        for split in range(3):
            draw(base / "images" / f"{c}{split}.jpg", 20 * c)
    (base / "variants.txt").write_text("\n".join(names) + "\n")
    for i, split in enumerate(("train", "val", "test")):
        (base / f"images_variant_{split}.txt").write_text("".join(f"{c}{i} {name}\n" for c, name in enumerate(names)))
    return names, (2, 2, 2), [0, 20]


def sun(root):
    fill(root / "SUN397", ("a/abbey", "a/apse/indoor", "b/beach_house"), "{0}/sun_{1}.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n/b/beach_house\n")
    return ["abbey", "indoor apse", "beach house"], (15, 6, 9), [0, 20, 40]


def textures(root):
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test")):
        for c, name in enumerate(("banded", "bumpy")):
            draw(base / "images" / name / f"{name}_{i}.jpg", 20 * c)
        (base / "labels" / f"{split}1.txt").write_text(f"banded/banded_{i}.jpg\nbumpy/bumpy_{i}.jpg\n")
    return ["banded", "bumpy"], (2, 2, 2), [0, 20]


def satellite(root):
    fill(root / "eurosat" / "2750", ("AnnualCrop", "River"), "{0}/{0}_{1}.jpg")
    return ["Annual Crop Land", "River"], (10, 4, 6), [0, 20]


def imagenet(root):
    for split in ("train", "val"):
        for c, wnid in enumerate(("n01440764", "n01443537")):
            draw(root / "imagenet" / split / wnid / "1.JPEG", 20 * c)
    (root / "imagenet" / "classnames.txt").write_text("n01440764 crane\nn01443537 crane\nn09999999 another\n")
    return ["crane", "crane"], (2, 2, 2), [0, 20]


@pytest.mark.parametrize(("name", "make"), [
    ("caltech101", caltech), ("oxford_pets", pets), ("stanford_cars", cars), ("food101", food), ("fgvc_aircraft", aircraft),
    ("fgvc_aircraft", lambda root: aircraft(root, root / "fgvc_aircraft")), ("sun397", sun), ("dtd", textures), ("eurosat", satellite), ("imagenet", imagenet),
])  # fmt: skip
def test_torchvisions_layouts_are_read_with_coops_names(tmp_path, monkeypatch, name, make):
    names, sizes, reds = make(tmp_path)
    monkeypatch.setenv("PATCHSAE_DATA", str(tmp_path))
    parts = [load_dataset(name, split, seed=1) for split in ("train", "val", "test")]
    assert [len(data) for data in parts] == list(sizes)
    for data in parts:
        assert data.class_names == names
        assert all(abs(red(data, i) - reds[data.labels[i]]) < 4 for i in range(len(data)))
    disjoint = not PAPER_SETS[name].splits and name != "imagenet"  # the fakes of the others repeat their files
    files = [data.where(i) for data in parts for i in range(len(data))]
    assert not disjoint or len(set(files)) == len(files)
    sent = pickle.loads(pickle.dumps(parts[0]))  # macOS and Windows start processes anew and send them the data set
    assert sent.where(1) == parts[0].where(1) and torch.equal(sent.labels, parts[0].labels)
    alias = load_dataset(f"torchvision:{PAPER_SETS[name].torchvision}?root={tmp_path}", "train", seed=1)
    assert [alias.where(i) for i in range(len(alias))] == files[: sizes[0]]
    if name == "imagenet":
        (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 crane\n")
        with pytest.raises(ValueError, match=r"classnames.txt lacks a name for \['n01443537'\]; take it away to use CLIP's names"):
            load_dataset(name, "train")


@pytest.mark.parametrize(("split", "kept"), [("train", [0, 1, 0, 1]), ("test", [0, 1])])
def test_any_other_set_of_torchvision(tmp_path, monkeypatch, split, kept):
    class Toys(list):
        def __init__(self, root, train):
            if root != tmp_path:
                raise RuntimeError("Dataset not found or corrupted.")
            super().__init__((Image.new("L", (8, 8), 50 * (i % 2)), i % 2) for i in range(4 if train else 2))

    monkeypatch.setattr("torchvision.datasets.Toys", Toys, raising=False)
    data = load_dataset(f"torchvision:Toys?root={tmp_path}", split)
    assert (data.class_names, data.labels.tolist(), red(data, 1)) == (["0", "1"], kept, 50)
    assert data.where(1) == f"torchvision:Toys ({split}), row 1"
    message = r"Toys is not whole under .*\(RuntimeError: Dataset not found.*could not be downloaded.*PATCHSAE_DATA"
    with pytest.raises(FileNotFoundError, match=message):
        load_dataset(f"torchvision:Toys?root={tmp_path}/elsewhere", split)


def test_flowers_are_numbered_by_their_annotations(tmp_path):
    base = tmp_path / "flowers-102"
    for i in range(1, 7):
        draw(base / "jpg" / f"image_{i:05d}.jpg", 20 * i)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": [5, 1, 102, 5, 1, 102]})
    scipy.io.savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    from torchvision.datasets import Flowers102

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flowers102, "_check_integrity", lambda self: True)  # it compares checksums with the real files'
        data = load_dataset(f"flowers102?root={tmp_path}", "val")
    assert data.labels.tolist() == [101, 4] and abs(red(data, 0) - 60) < 4
    assert (data.class_names[0], len(data.class_names)) == ("pink primrose", 102)


def test_a_missing_set_says_where_it_was_sought_and_how_to_get_it(tmp_path, monkeypatch):
    import torchvision.datasets as sets

    def offline(*_, **__):
        raise OSError("no network")

    for kind in {entry.torchvision for entry in PAPER_SETS.values()}:
        monkeypatch.setattr(getattr(sets, kind), "__init__", offline)
    for name, entry in PAPER_SETS.items():
        with pytest.raises(FileNotFoundError) as caught:
            load_dataset(f"{name}?root={tmp_path}", "train")
        for words in (str(tmp_path / entry.folders[0]), entry.page, f"{name}?root=/data", "PATCHSAE_DATA"):
            assert words in str(caught.value)
    assert (paper_name("./dtd"), paper_name("/data/dtd"), paper_name("hf:dtd"), paper_name("dtd")) == (None, None, None, "dtd")


def test_a_stream_is_read_once(hub, monkeypatch):
    data = load_dataset("hf-stream:somebody/birds", "train", n_images=5)
    assert len(data) == 5 and data.class_names == ["crane", "jay"]
    assert [red(data, i) // 10 % 2 for i in range(5)] == data.labels.tolist()
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("read again"))
    again = load_dataset("hf-stream:somebody/birds", "train", n_images=5)
    assert [red(again, i) for i in range(5)] == [red(data, i) for i in range(5)]
    assert pickle.loads(pickle.dumps(again))[4].image.size == (8, 8)


def test_what_the_hub_cannot_give_is_said(hub, tmp_path, monkeypatch):
    module = sys.modules["datasets"]
    with pytest.raises(ValueError, match=r"hf-stream:somebody/birds \(train\) gave no images"):
        load_dataset("hf-stream:somebody/birds", "train", n_images=0)
    assert not list(tmp_path.rglob("000*")), "nothing half written stays"
    monkeypatch.setattr(module, "Image", type("Other", (), {}))
    for kind in ("hf", "hf-stream"):
        with pytest.raises(ValueError, match=f"{kind}:somebody/birds needs a column of images .of datasets.Image.; it has .*picture"):
            load_dataset(f"{kind}:somebody/birds", "train")

    for error in (
        ConnectionError("Couldn't reach\n(LocalEntryNotFoundError)"), RuntimeError("Couldn't reach: a script"),
        module.exceptions.DatasetGenerationError("Couldn't reach"),
    ):  # fmt: skip
        monkeypatch.setattr(module, "load_dataset", Mock(side_effect=error))
        for kind in ("hf", "hf-stream"):
            message = f"{kind}:somebody/birds could not be read .{type(error).__name__}: Couldn't reach.*hf auth login"
            with pytest.raises(FileNotFoundError, match=message):
                load_dataset(f"{kind}:somebody/birds", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for kind in ("hf", "hf-stream"):
        with pytest.raises(ImportError, match=f"{kind}:somebody/birds needs the package `datasets`: pip install datasets"):
            load_dataset(f"{kind}:somebody/birds", "train")
