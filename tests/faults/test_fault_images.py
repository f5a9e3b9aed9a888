"""Pictures as people have them: every kind opens as it looks, and a broken one is named."""

import io
import warnings

import datasets
import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from timm.data import ImageNetInfo
from tiny import picture_folder

from patchsae_utils import stages
from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.config import load_profile
from patchsae_utils.data import ImageData, batches, dataset_fingerprint, few_shot, hub_sets, load_dataset, loader
from patchsae_utils.data.dataset import describe_dataset
from patchsae_utils.data.loader import has_truth, without_broken
from patchsae_utils.data.pictures import open_picture
from patchsae_utils.data.splits import class_names
from patchsae_utils.explorer.reader import read_upload
from patchsae_utils.latents.reading import summarize_latents


def pixel(path, place=(0, 0)):
    image = open_picture(path)
    assert image.mode == "RGB"
    return image.getpixel(place)


def test_every_kind_of_picture_opens_as_it_looks(tmp_path):
    red = Image.new("RGB", (30, 20), (200, 10, 20))
    for mode in ("L", "P", "CMYK", "RGBA", "1", "LA"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        red.convert(mode).save(path)
        color = pixel(path)
        assert color == red.convert(mode).convert("RGB").getpixel((0, 0)), mode
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.array(pixel(tmp_path / "cmyk.jpg")) - (200, 10, 20)).max() < 12


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: left comes to the top
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_picture(tmp_path / "turned.png")
    assert found.size == (20, 40) and found.getpixel((10, 2)) == (255, 0, 0) and found.getpixel((10, 30)) == (0, 0, 0)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 250, 0))]
    for ending in ("gif", "webp", "png"):
        options = {"lossless": True} if ending == "webp" else {}
        frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:], **options)
        assert pixel(tmp_path / f"moving.{ending}")[0] > 240


@pytest.fixture
def folder(tmp_path):
    return picture_folder(tmp_path / "Bilder mit Lücken", a=10, b=10)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (3000, 2)])
def test_pictures_of_any_shape_reach_the_model(tiny_clip, tmp_path, size):
    Image.new("RGB", size, (9, 99, 199)).save(tmp_path / "odd.png")
    images = tiny_clip.preprocess(open_picture(tmp_path / "odd.png"))[None]
    assert tiny_clip.residual(images, -2).isfinite().all()


def test_an_empty_class_keeps_its_number(folder):
    (folder / "aa").mkdir()
    data = load_dataset(str(folder), "train")
    assert data.class_names == ["a", "aa", "b"] and data.labels.unique().tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"Class 1 \('aa'\).*has 0 train examples; 2 shots"):
        few_shot(data, 2)


def test_an_empty_data_set_is_said_by_every_stage(tiny_clip, tiny_sae, tmp_path):
    from patchsae_utils.interventions import sweep_masks

    nothing = load_dataset("openmoji/tools", "test", n_images=0)
    for call, message in (
        (lambda: extract_activations(tiny_clip, nothing, -2, tmp_path / "store"), "is empty: there is nothing to extract"),
        (lambda: summarize_latents(tiny_clip, tiny_sae, nothing, -2), "is empty: no statistics can be made"),
        (lambda: sweep_masks(tiny_clip, tiny_sae, nothing, [1], "random"), r"\(test\) is empty: there is nothing to measure"),
        (lambda: few_shot(nothing, 1), r"Class 0 \('axe'\).*has 0 test examples; 1 shots"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb.png \([\d,]+ bytes\) can't be read as an image: Image size .* could be decompression bomb"):
        open_picture(tmp_path / "bomb.png")


def test_one_image_goes_through_extraction_and_statistics(tiny_clip, tiny_sae, tmp_path):
    (tmp_path / "train" / "only").mkdir(parents=True)
    (tmp_path / "val").mkdir()  # so that train is taken whole
    Image.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "train" / "only" / "1.png")
    data = load_dataset(str(tmp_path), "train")
    store = extract_activations(tiny_clip, data, -2, tmp_path / "store", progress=False)
    assert (store.n_images, len(next(store.tokens(1000, epochs=1)))) == (1, 197)
    summary = summarize_latents(tiny_clip, tiny_sae, data, -2, progress=False)
    assert summary.n_images == 1 and summary.frequency.max() == 1 and torch.isfinite(summary.mean_activation).all()
    with pytest.raises(FileNotFoundError, match="val holds no images for split 'test'"):
        load_dataset(str(tmp_path), "test")


def test_A11_replaced_files_make_what_was_made_of_them_stale(tiny_clip, tiny_sae, folder, tmp_path):
    """FAULTS A11: other pictures under the same names, equal in number, are other data."""
    make = lambda data: extract_activations(tiny_clip, data, -2, tmp_path / "store", progress=False)  # noqa: E731
    count = lambda data: summarize_latents(tiny_clip, tiny_sae, data, -2, out=tmp_path / "summary", progress=False)  # noqa: E731
    data = load_dataset(str(folder), "train")
    before, name = make(data), dataset_fingerprint(data)
    tokens, summary = next(before.images(batch_size=99))[0], count(data)
    assert dataset_fingerprint(load_dataset(str(folder), "train")) == name and make(data).fingerprint == before.fingerprint
    for path in folder.rglob("*.png"):
        Image.new("RGB", (20, 20), (7, 200, 90)).save(path)
    after = make(load_dataset(str(folder), "train"))
    assert dataset_fingerprint(data) != name and after.fingerprint != before.fingerprint
    assert not torch.equal(next(after.images(batch_size=99))[0], tokens)
    assert not torch.equal(count(load_dataset(str(folder), "train")).mean_activation, summary.mean_activation)


def test_A11_a_data_set_says_what_is_not_known_of_it(folder):
    """FAULTS A11: names, sizes and times of files are known; what lies behind a function is not, and that is said."""
    opened = ImageData("mine", "test", ["a"], [0, 0], lambda i: Image.new("RGB", (8, 8)))
    assert describe_dataset(opened)["contents"].startswith("not known: if pictures are exchanged")
    one, two = load_dataset(str(folder), "train"), load_dataset(str(folder), "train").without([0])
    assert len({describe_dataset(each)["contents"] for each in (one, two, two.without([1]), one.without([1]))}) == 4
    assert "OpenMoji" in describe_dataset(load_dataset("openmoji/tools", "test"))["contents"]


# -- data sets as people have them: FAULTS section A -----------------------------------------------------------------------------


def opened(i):
    return Image.new("RGB", (8, 8), (20 * i, 0, 0))


def test_A1_rows_without_label_are_left_out():
    """FAULTS A1: -1 is no label, and not the last class."""
    with pytest.warns(UserWarning, match=r"2 of 4 rows of x \(test\) have no label and are left out"):
        data = ImageData("x", "test", ["cat", "dog"], [0, -1, 1, -1], opened)
    assert data.labels.tolist() == [0, 1] and [data[i].image.getpixel((0, 0))[0] for i in range(2)] == [0, 40]
    with pytest.raises(ValueError, match=r"No row of x \(test\) has a label"):
        ImageData("x", "test", ["cat", "dog"], [-1, -1], opened)


@pytest.mark.parametrize("wrong", [2, -2, None, 0.5, 1.0, float("nan"), "cat", "1", [0, 1], torch.tensor([0, 1]), np.eye(2), 2**70])
@pytest.mark.parametrize("half", [None, "base"])
def test_A1_a_wrong_label_is_named_with_its_row(wrong, half):
    """FAULTS A1: what is no class is no class of any half."""
    with pytest.raises(ValueError, match=r"x \(test\), row 1 has the label .*expected a whole number in range\(2\)"):
        ImageData("x", "test", ["cat", "dog"], [0, wrong, 1], opened, half)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), np.array([0, 1], np.uint8), [torch.tensor(0), np.array(1)], [False, np.True_]])
def test_A1_whole_numbers_of_any_kind_are_labels(labels):
    assert ImageData("x", "test", ["cat", "dog"], labels, opened).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="row 0 has the label 0.5"):
        ImageData("x", "test", ["cat", "dog"], torch.tensor([0.5, 1]), opened)


@pytest.mark.parametrize("wrong", [0.5, "1", torch.zeros(3), (0, 1)])
def test_A1_labels_of_torchvision_are_checked_and_not_rounded(monkeypatch, wrong):
    class Odd(list):
        def __init__(self, root, train):
            super().__init__([(opened(0), 0), (opened(1), wrong)])

    monkeypatch.setattr("torchvision.datasets.Odd", Odd, raising=False)
    with pytest.raises(ValueError, match=r"torchvision:Odd \(train\), row 1 has the label .*; expected a whole number"):
        load_dataset("torchvision:Odd", "train")


def test_A1_a_labelled_split_of_the_hub_is_preferred(hub, tmp_path):
    """FAULTS A1: imagenet-1k's test has no labels, its validation has."""
    labelled = hub["rows"]["train"]
    hub["rows"] = {"train": labelled, "validation": labelled[:6], "test": [{**row, "species": -1} for row in labelled]}
    for kind in ("hf", "hf-stream"):
        with pytest.warns(UserWarning, match="'test' has a label") if kind == "hf" else warnings.catch_warnings():
            assert len(load_dataset(f"{kind}:somebody/birds", "test")) == 6
    (tmp_path / "images" / "test").mkdir(parents=True)
    picture_folder(tmp_path / "images" / "train", a=1, b=2), picture_folder(tmp_path / "images" / "val", a=1, b=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "test" / "1.png")
    with pytest.warns(UserWarning, match="test has no class folders; .*val is read instead"):
        assert len(load_dataset(str(tmp_path / "images"), "test")) == 3


def places(data):
    return {data.where(i) for i in range(len(data))}


def test_A2_missing_splits_are_made_up_for_in_one_way(hub, tmp_path, monkeypatch):
    """FAULTS A2: val and test stand in for each other; a source of one part is split 80/10/10 within each class. Folders, hub, torchvision alike."""

    class Whole(list):
        def __init__(self, root):
            super().__init__((Image.new("L", (8, 8)), i % 2) for i in range(20))

    class Parted(Whole):
        def __init__(self, root, split):
            super().__init__(root)
            if split in ("val", "valid", "validation"):
                raise ValueError("Unknown value 'val' for argument split. Valid values are {'train', 'test'}.")

    for kind in (Whole, Parted):
        monkeypatch.setattr(f"torchvision.datasets.{kind.__name__}", kind, raising=False)
    twenty = [{"picture": Image.new("RGB", (8, 8), (i, 0, 0)), "species": i % 2} for i in range(20)]
    for name, n in {"one": 10, "two/train": 10, "two/test": 3, "loud/Training": 3, "loud/VALIDATION": 1}.items():
        picture_folder(tmp_path / name, a=n, b=n)
    for whole in (str(tmp_path / "one"), "hf:somebody/birds", "torchvision:Whole"):
        hub["rows"] = {"train": twenty}
        parts = [load_dataset(whole, split) for split in ("train", "val", "test")]
        assert [torch.bincount(data.labels).tolist() for data in parts] == [[8, 8], [1, 1], [1, 1]], whole
        assert len(set.union(*map(places, parts))) == (20 if "one" in whole else 16 + 2 + 2)
    for parted in (str(tmp_path / "two"), "hf:somebody/birds", "torchvision:Parted"):
        hub["rows"] = {"train": twenty, "test": twenty[:6]}
        train, val, test = (load_dataset(parted, split) for split in ("train", "val", "test"))
        assert (len(train), len(val)) == (20, len(test))
        assert [val[i].image.tobytes() for i in range(6)] == [test[i].image.tobytes() for i in range(6)]
    assert [len(load_dataset(str(tmp_path / "loud"), split)) for split in ("train", "val", "test")] == [6, 2, 2]
    picture_folder(tmp_path / "dev" / "train", a=3, b=3), picture_folder(tmp_path / "dev" / "Dev", a=1)
    hub["rows"] = {"train": twenty, "dev": twenty[:1]}
    for spec, n in ((str(tmp_path / "dev"), 6), ("hf:somebody/birds", 20)):
        assert [len(load_dataset(spec, split)) for split in ("train", "val", "test")] == [n, 1, 1]
    hub["rows"] = {"train": twenty, "holdout": twenty}
    with pytest.warns(UserWarning, match="no split val or test: train is split 80/10/10. Not read: holdout"):
        assert len(load_dataset("hf:somebody/birds", "val")) == 2
    hub["rows"] = {"test": twenty}
    message = "hf:somebody/birds has no split 'train'; it has test. Where a source has no split val, its test serves"
    with pytest.raises(ValueError, match=message):
        load_dataset("hf:somebody/birds", "train")


def test_A2_nothing_is_opened_before_it_is_known_to_have_a_ground_truth(monkeypatch):
    """FAULTS A2: that pictures have none is known from their spec."""
    monkeypatch.setattr(stages, "load_dataset", lambda *_, **__: pytest.fail("opened"))
    profile = load_profile(overrides={"data.train": "hf:somebody/birds"})
    assert stages.concept_scenes(profile, "val") is stages.concept_patches(profile, None) is None
    assert stages.concept_report(profile, None, None) is stages.concept_comparison(profile, None, None) is None
    assert has_truth("openmoji/scenes") and not has_truth("./openmoji")


def test_A3_classes_are_those_of_all_splits(tmp_path):
    """FAULTS A3: a class that one split lacks shifts no label, and halves are of the same classes."""
    picture_folder(tmp_path / "train", ant=2, bee=2, cat=2, dog=2), picture_folder(tmp_path / "test", bee=1, dog=1, eel=1)
    train, test = load_dataset(str(tmp_path), "train"), load_dataset(str(tmp_path), "test")
    assert train.class_names == test.class_names == ["ant", "bee", "cat", "dog", "eel"]
    assert test.labels.tolist() == [1, 3, 4] and train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(load_dataset(str(tmp_path), split, half="novel").class_names == ["dog", "eel"] for split in ("train", "test"))


@pytest.mark.parametrize("n", range(1, 13))
def test_A4_every_split_has_an_image_of_each_class_or_it_is_said(tmp_path, n):
    """FAULTS A4: a share never rounds to none; under three images a class can't be split."""
    picture_folder(tmp_path, a=n, b=20)
    if n < 3:
        with pytest.raises(ValueError, match=f"too few images a class to split: 'a' has {n}; at least 3 are needed, one a split"):
            load_dataset(str(tmp_path), "train")
        return
    parts = [load_dataset(str(tmp_path), split) for split in ("train", "val", "test")]
    counts = [int((data.labels == 0).sum()) for data in parts]
    assert sum(counts) == n and min(counts) >= 1 and len(set.union(*map(places, parts))) == n + 20
    assert [int((data.labels == 1).sum()) for data in parts] == [16, 2, 2]


def test_A5_pictures_that_lie_deeper_are_counted(tmp_path):
    """FAULTS A5: class folders that hold folders."""
    picture_folder(tmp_path / "train", cat=4, **{"dog/puppy": 3, "dog/old/very": 2}), picture_folder(tmp_path / "test", cat=1)
    (tmp_path / "train" / "loose.jpg").write_bytes(b"")
    message = r"6 images of \S+train lie in no class folder or deeper than one \(.*dog/puppy.*\) and are left out; .*there are 4"
    with pytest.warns(UserWarning, match=message):
        data = load_dataset(str(tmp_path), "train")
    assert len(data) == 4 and data.class_names == ["cat", "dog"]
    beside = picture_folder(tmp_path / "beside", **{"train/a": 2, "val/a": 1, "valid/a": 1, "more/b/.old": 3, "more/b": 2, ".": 1})
    with pytest.warns(UserWarning, match=r"4 images of \S+train lie in .* \(.., ../more, ../valid\) and are left out"):
        load_dataset(str(beside), "train")
    phone = picture_folder(tmp_path / "phone", cat=3, dog=0)
    (phone / "cat" / "a.HEIC").write_bytes(b"heic"), (phone / "dog" / "b.heic").write_bytes(b"heic")
    with pytest.warns(UserWarning, match=r"2 images of \S+phone are of a kind that Pillow can't open \(image/heic\) and are left out"):
        assert load_dataset(str(phone), "train").class_names == ["cat"]
    picture_folder(tmp_path / "deep", **{"animals/cat": 3})
    with pytest.raises(FileNotFoundError, match=r"holds no images for split 'train': expected .*3 images of .*\(animals/cat\)"):
        load_dataset(str(tmp_path / "deep"), "train")


def test_A6_hidden_files_and_other_kinds_are_no_pictures(tmp_path):
    """FAULTS A6: what macOS, archives and other programs leave is no picture and no class."""
    picture_folder(tmp_path, cat=3, dog=3, **{"__MACOSX": 3, "#recycle": 1, ".cache": 3, "__MACOSX/cat": 3, "notes": 0})
    (tmp_path / "notes" / "readme.txt").write_text("no class")
    for name in (".DS_Store", "._0.png", ".hidden.jpg", "paper.pdf", "tokens.h5", "notes.txt", "figure.eps", "film.mpeg", "Thumbs.db"):
        (tmp_path / "cat" / name).write_bytes(b"no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset(str(tmp_path), "train")
    assert data.class_names == ["cat", "dog"] and sum(len(load_dataset(str(tmp_path), split)) for split in ("train", "val", "test")) == 6


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(("values", "ending"), [
    (RAMP.astype(np.float32), "tiff"), ((RAMP * 1.02 - 0.01).astype(np.float32), "tiff"), ((RAMP * 255).astype(np.float32), "tiff"),
    ((RAMP * 255).round().astype(np.int32), "tiff"), ((RAMP * 65535).astype(np.int32), "tiff"), ((RAMP * 65535).astype(np.uint16), "png"),
    ((RAMP * 4095).astype(np.int32), "tiff"), ((RAMP * 1023).astype(np.float32), "tiff"),
    ((RAMP * 65535).astype(np.uint16), "tiff"), ((RAMP * 65535).astype(np.float32), "tiff"), ((RAMP * 255).round().astype(np.uint8), "png"),
])  # fmt: skip
def test_A7_A8_numbers_of_any_depth_are_scaled_everywhere_alike(tmp_path, values, ending):
    """FAULTS A7, A8: floats, whole numbers and 16 bits, in a folder, from memory and as an upload."""
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray(values).save(path)
    arrays = values, values[..., None], np.stack([values] * 3, -1)
    found = [open_picture(given) for given in (path, path.read_bytes(), Image.open(path), lambda: Image.fromarray(values), *arrays)]
    found += [read_upload(path.read_bytes())[0]] if ending == "png" else []
    for image in found:
        np.testing.assert_allclose(np.asarray(image)[..., 0], (255 * RAMP).round(), atol=3)


@pytest.mark.parametrize("values", [RAMP - 0.5, RAMP * 1e6, RAMP * np.nan, RAMP + np.inf])
def test_A7_numbers_of_no_known_range_are_refused(tmp_path, values):
    """FAULTS A7: what can't be told is said, and not made black."""
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "odd.tiff")
    for given in (tmp_path / "odd.tiff", values, np.stack([values] * 3, -1)):
        with pytest.raises(ValueError, match="its values lie between .*fractions from 0 to 1 are read"):
            open_picture(given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((3, 8, 9)), r"it is an array of shape \[3, 8, 9\]; expected \[H, W\]"), (np.zeros((0, 8)), "it is an array of shape"),
        (torch.zeros(3, 8, 8), "it is a Tensor; expected a path, bytes, a PIL image or an array"), ([[0]], "it is a list; expected a path"),
        (b"", "cannot identify image file. Replace it"), ("none.png", "No such file or directory. Replace it"),
    ],
)  # fmt: skip
def test_A7_what_is_no_picture_is_refused_by_its_kind(given, reason):
    with pytest.raises(ValueError, match=f"can't be read as an image: {reason}"):
        open_picture(given)


def test_A8_transparent_parts_are_white_everywhere(tmp_path, hub):
    """FAULTS A8: one ground for folders, hub, streams and uploads, whatever the kind of transparency."""
    clear, path = Image.new("RGBA", (8, 8), (200, 0, 0, 0)), tmp_path / "clear.png"
    clear.putpixel((3, 3), (200, 0, 0, 255))
    hub["rows"]["train"] = [{"picture": clear, "species": i % 2} for i in range(6)]
    for mode in ("RGBA", "LA", "P"):
        clear.convert(mode).save(path, **({"transparency": clear.convert("P").getpixel((0, 0))} if mode == "P" else {}))
        for image in (open_picture(path), open_picture(Image.open(path)), read_upload(path.read_bytes())[0]):
            assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255), mode
    assert open_picture(clear).getpixel((3, 3)) == (200, 0, 0)
    for i, feature in enumerate((datasets.Image(), datasets.Image(mode="RGB"), datasets.Image(decode=False))):
        hub["features"] = {"picture": feature, "species": datasets.ClassLabel(names=["crane", "jay"])}
        for kind in ("hf", "hf-stream"):
            data = load_dataset(f"{kind}:somebody/birds", "train", n_images=4, seed=i)
            assert data[0].image.getpixel((0, 0)) == (255, 255, 255), (kind, feature)
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 65535], [300, 300]], np.uint16)).save(deep, "png", transparency=300)
    assert np.asarray(open_picture(deep.getvalue()))[..., 0].tolist() == [[0, 255], [255, 255]]


def test_A9_rows_of_a_stream_without_image_or_label_are_left_out(hub, tmp_path):
    """FAULTS A9: and reported; the stream goes on."""
    rows = hub["rows"]["train"]
    hub["rows"]["train"] = [{**rows[0], "picture": None}, {**rows[1], "species": None}, *rows[2:]]
    message = r"2 rows of hf-stream:somebody/birds \(train\) have no image or no label and are left out: \d, \d"
    with pytest.warns(UserWarning, match=message):
        data = load_dataset("hf-stream:somebody/birds", "train")
    assert sorted(data[i].image.getpixel((0, 0))[0] for i in range(6)) == [20, 30, 40, 50, 60, 70]
    with pytest.warns(UserWarning, match="1 of 8 rows .* have no label"):
        whole = load_dataset("hf:somebody/birds", "train")
    with pytest.warns(UserWarning, match=r"1 of 7 images .* row 0: there is none"):
        assert len(without_broken(whole, tmp_path / "report.json", 0.2, progress=False)) == 6


def test_A9_a_configuration_is_named_or_they_are_listed(hub):
    """FAULTS A9: hf:<repository>:<configuration>."""
    hub["configurations"] = ["large", "small"]
    for kind in ("hf", "hf-stream"):
        for given, message in (("somebody/birds", "has several configurations"), ("somebody/birds:tiny", "has no configuration 'tiny'")):
            message = f"{kind}:{given} {message}. Name one of them, as in {kind}:somebody/birds:large: large, small"
            with pytest.raises(ValueError, match=message):
                load_dataset(f"{kind}:{given}", "train")
        data = load_dataset(f"{kind}:somebody/birds:small", "train")
        assert (len(data), data.name) == (8, "birds")


def test_A10_class_names_of_every_source_are_made_in_one_way(hub, tmp_path):
    """FAULTS A10: no underscores, the first of several synonyms (unless two classes would share it), names for WordNet's ids."""
    hub["names"] = ["apple_pie", "tench, Tinca tinca"]
    picture_folder(tmp_path / "set", apple_pie=3, **{"tench, Tinca tinca": 3})
    for spec in ("hf:somebody/food", "hf-stream:somebody/food", str(tmp_path / "set")):
        assert load_dataset(spec, "train").class_names == ["apple pie", "tench"]
    hub["names"] = ["maillot", "maillot, tank suit"]
    assert load_dataset("hf:somebody/food", "train").class_names == hub["names"]
    picture_folder(tmp_path / "ids", n01440764=3, n01443537=3, n02084071=3)
    assert load_dataset(str(tmp_path / "ids"), "train").class_names == ["tench", "goldfish", "dog"]
    assert class_names(["n01440764", "back_ground"]) == ["tench", "back ground"] and class_names(["_", ", x", "b"]) == ["_", ", x", "b"]
    assert class_names(["hot_dog, food", "hot dog, pup"]) == ["hot dog, food", "hot dog, pup"]
    assert class_names(["hot_dog", "hot dog"]) == ["hot_dog", "hot dog"], "prompts of two classes differ where they can"
    assert class_names(["n00468480", "n03378765"]) == ["football, football game", "football"]
    assert class_names(ImageNetInfo().label_descriptions()) == class_names(ImageNetInfo().label_names()) == list(IMAGENET_CLASSNAMES)


def test_A12_a_stream_gives_as_many_images_as_are_asked_for(hub, monkeypatch):
    """FAULTS A12: also of half the classes; and where no number is given, not all of a set without end."""
    for half, n in ((None, 3), ("base", 4), ("novel", 2)):
        data = load_dataset("hf-stream:somebody/birds", "train", n_images=n, half=half)
        assert len(data) == n and (half is None or len(data.class_names) == 1)
        assert all(data[i].image.getpixel((0, 0))[0] // 10 % 2 == (half == "novel") for i in range(n) if half)
    for spec in ("hf-stream:somebody/birds", "hf:somebody/birds", "openmoji/tools"):
        with pytest.raises(ValueError, match="n_images must be a whole number from 0 on, or None for all, got -1"):
            load_dataset(spec, "train", n_images=-1)
    monkeypatch.setattr(hub_sets, "STREAMED", 5)
    with pytest.warns(UserWarning, match=r"The first 5 images of hf-stream:somebody/birds \(train\) are read; ask for more by n_images"):
        assert len(load_dataset("hf-stream:somebody/birds", "train")) == 5
    assert len(load_dataset("hf-stream:somebody/birds", "train", n_images=8)) == 8


def test_A13_no_workers_means_none(tiny_clip, monkeypatch):
    """FAULTS A13: 0 is none, None asks the data set, and the machine where that says nothing."""
    used = []
    monkeypatch.setattr(loader, "DataLoader", lambda *_, num_workers, **__: used.append(num_workers) or [])
    monkeypatch.setattr(loader, "automatic_workers", lambda: 3)
    data = load_dataset("openmoji/tools", "test", n_images=40)
    for own, given in ((2, 0), (2, None), (2, 1), (None, None), (None, 0), (0, None)):
        data.workers = own
        list(batches(data, tiny_clip.preprocess, 4, given))
    assert used == [0, 2, 1, 3, 0, 0]
    for wrong in (-1, "auto", 1.5):
        with pytest.raises(ValueError, match="workers must be a whole number from 0 on, or None .*, got"):
            list(batches(data, tiny_clip.preprocess, 64, wrong))
