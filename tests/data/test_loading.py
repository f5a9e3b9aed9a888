"""Worker processes, broken images: the same batches however they are opened; what can't be read is left out, reported, and shifts no label."""

import json
import os
import pickle
import signal
import warnings

import pytest
import torch
from PIL import Image

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.config import load_profile
from patchsae_utils.data import BrokenImage, DeadWorker, ImageData, TooManyBroken, batches, load_dataset
from patchsae_utils.data.loader import automatic_workers, load, without_broken

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def pictures(tmp_path):
    """Three classes of ten pictures; red tells the class, green the number. b/3 is cut in half, c/0 is empty, c/7 is text."""
    root = tmp_path / "pictures"
    (root / "val").mkdir(parents=True)  # so that train is taken whole
    for c, name in enumerate("abc"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (30, 20), (80 * c, 20 * i, 0)).save(root / "train" / name / f"{i}.bmp")
    cut = root / "train" / "b" / "3.bmp"
    cut.write_bytes(cut.read_bytes()[:700])
    (root / "train" / "c" / "0.bmp").write_bytes(b"")
    (root / "train" / "c" / "7.bmp").write_text("no picture")
    return root


def cleaned(data, report, share=0.2, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = without_broken(data, report, share, progress=False, **options)
    return data, [str(w.message) for w in said if "can't be read" in str(w.message)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_and_no_label_shifts(pictures, tmp_path, workers):
    whole = load_dataset(str(pictures), "train")
    data, said = cleaned(whole, tmp_path / "report.json", workers=workers)
    assert (len(whole), len(data), data.class_names) == (30, 27, ["a", "b", "c"])
    for i in range(len(data)):
        r, g, _ = data[i].image.getpixel((0, 0))
        assert data[i].index == i and r == 80 * data[i].label == 80 * int(data.labels[i])
        name = f"{'abc'[data[i].label]}/{g // 20}.bmp"
        assert data.where(i).endswith(name) and name not in ("b/3.bmp", "c/0.bmp", "c/7.bmp")
        assert data.where(i) == whole.where(int(data.rows[i]))
    assert len(said) == 1 and said[0].startswith(f"3 of 30 images of {pictures} (train) can't be read and are left out: ")
    assert "b/3.bmp" in said[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["images_checked"], report["images_broken"]) == (30, 30, 3)
    assert [entry["row"] for entry in report["broken"]] == [13, 20, 27] and all(entry["reason"] for entry in report["broken"])
    assert "c/0.bmp (0 bytes)" in report["broken"][1]["image"]


def test_a_check_is_remembered_shared_by_subsets_and_goes_on(pictures, tmp_path, monkeypatch):
    seen, open_row = [], ImageData.open_row
    monkeypatch.setattr(ImageData, "open_row", lambda self, row, draft: (seen.append(row), open_row(self, row, draft))[1])
    report = tmp_path / "report.json"
    part, _ = cleaned(load_dataset(str(pictures), "train", n_images=12, seed=1), report, 0.9)
    assert len(seen) == 12 and (part.rows.tolist() == sorted(set(seen) - {13, 20, 27}))
    cleaned(load_dataset(str(pictures), "train"), report)
    assert sorted(set(seen)) == list(range(30)) and seen.count(1) == 1
    seen.clear()
    novel, _ = cleaned(load_dataset(str(pictures), "train", half="novel"), report, 0.5)
    assert (len(novel), novel.labels.unique().tolist(), seen) == (8, [0], [13, 20, 27]), "only the broken ones are looked at again"
    Image.new("RGB", (30, 20), (80, 60, 0)).save(pictures / "train" / "b" / "3.bmp")
    repaired, _ = cleaned(load_dataset(str(pictures), "train"), report)
    assert len(repaired) == 28 and json.loads(report.read_text())["images_broken"] == 2
    (pictures / "train" / "a" / "new.bmp").write_bytes((pictures / "train" / "a" / "1.bmp").read_bytes())
    seen.clear()
    assert len(cleaned(load_dataset(str(pictures), "train"), report)[0]) == 29 and len(seen) == 31, "another list of files is checked anew"


def test_more_than_the_allowed_share_stops_the_run(pictures, tmp_path, tiny_dataset):
    data = load_dataset(str(pictures), "train")
    message = r"At least 3 of 30 images.*more than data.max_broken = 0.05.*b/3.bmp.*report.json.*set data.max_broken higher"
    with pytest.raises(TooManyBroken, match=message):
        cleaned(data, tmp_path / "report.json", 0.05)
    assert json.loads((tmp_path / "report.json").read_text())["images_broken"] == 3
    assert len(cleaned(data, tmp_path / "report.json", 0.1)[0]) == 27
    assert cleaned(data, tmp_path / "none.json", 0)[0] is data and not (tmp_path / "none.json").exists()
    assert without_broken(tiny_dataset, tmp_path / "none.json") is tiny_dataset and not (tmp_path / "none.json").exists()


def test_how_images_are_opened_names_no_artifact():
    from patchsae_utils.run.artifacts import fingerprint

    data = load_profile().data
    settings = ("train", "statistics", "evaluation", "tasks", "n_train_images", "n_statistics_images", "n_evaluation_images", "seed")
    assert fingerprint(data=data.choice()) == fingerprint(data={name: getattr(data, name) for name in settings})
    assert load_profile(overrides={"data.workers": "auto"}).data.workers is None
    assert automatic_workers() == 0 if not torch.cuda.is_available() else automatic_workers() <= 16


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_without_a_wall_of_text(tiny_clip, pictures, workers):
    data = load_dataset(str(pictures), "train")
    with pytest.raises(BrokenImage, match=r"^\S+b/3\.bmp \(700 bytes\) can't be read as an image: .*Replace it or take it away") as caught:
        list(batches(data, tiny_clip.preprocess, 4, workers))
    assert "Traceback" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class Dies:
    """Ends its process at item 5, unless it is the main one."""

    def __init__(self, how):
        self.how, self.main = how, os.getpid()

    def __getitem__(self, i):
        if i == 5 and os.getpid() != self.main:
            os._exit(3) if self.how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(i)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_worker_that_dies_is_an_error_that_says_what_to_do(how):
    got = []
    with pytest.raises(DeadWorker, match=r"data.workers = 1\) has ended before its time.*Set data.workers lower, or to 0"):
        for batch in load(Dies(how).__getitem__, 12, 2, workers=1):
            got += batch.tolist()
    assert got == [0, 1, 2, 3][: len(got)]
    assert issubclass(DeadWorker, OSError), "which the command line tells as a sentence"
    assert torch.cat(list(load(Dies(how).__getitem__, 12, 2, workers=0))).tolist() == list(range(12))


def test_extraction_goes_on_after_a_worker_has_died(tiny_clip, pictures, tmp_path):
    data, _ = cleaned(load_dataset(str(pictures), "train"), tmp_path / "report.json")
    opener, main = data.opener, os.getpid()

    class Deadly(type(opener)):
        def __call__(self, i):
            if i == 17 and os.getpid() != main:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(i)

    data.opener, data.workers = Deadly(opener.root, [opener.where(i) for i in range(len(opener))]), 1
    extract = lambda: extract_activations(tiny_clip, data, -2, tmp_path / "store", n_per_shard=4, batch_size=4, progress=False)  # noqa: E731
    with pytest.raises(DeadWorker):
        extract()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("shard-*")}
    assert not list((tmp_path / "store").glob(".shard*")), "nothing is half written"
    data.workers = 0
    store = extract()
    store.verify()
    assert all((tmp_path / "store" / name).stat().st_mtime_ns == time for name, time in kept.items()), "nothing is done twice"
    whole, _ = cleaned(load_dataset(str(pictures), "train"), tmp_path / "report.json")
    plain = extract_activations(tiny_clip, whole, -2, tmp_path / "plain", progress=False)
    assert torch.equal(next(store.images(batch_size=99))[0], next(plain.images(batch_size=99))[0])
