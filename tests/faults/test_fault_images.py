"""Pictures as people have them: every kind opens as it looks, and a broken one is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.data import ImageData, dataset_fingerprint, describe_dataset, few_shot, load_dataset
from patchsae_utils.data.pictures import open_image
from patchsae_utils.latents.reading import summarize_latents


def pixel(path, place=(0, 0)):
    image = open_image(path)
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


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for ending in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"deep.{ending}")
        found = np.asarray(open_image(tmp_path / f"deep.{ending}"))[..., 0]
        np.testing.assert_allclose(found, np.arange(256).reshape(16, 16), atol=1)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: left comes to the top
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png")
    assert found.size == (20, 40) and found.getpixel((10, 2)) == (255, 0, 0) and found.getpixel((10, 30)) == (0, 0, 0)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 250, 0))]
    for ending in ("gif", "webp", "png"):
        frames[0].save(
            tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {})
        )
        assert pixel(tmp_path / f"moving.{ending}")[0] > 240


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "Bilder mit Lücken"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (25 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (3000, 2)])
def test_pictures_of_any_shape_reach_the_model(tiny_clip, tmp_path, size):
    Image.new("RGB", size, (9, 99, 199)).save(tmp_path / "odd.png")
    images = tiny_clip.preprocess(open_image(tmp_path / "odd.png"))[None]
    assert tiny_clip.residual(images, -2).isfinite().all()


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut in half"])
def test_a_broken_picture_is_named_and_may_be_replaced(tiny_clip, folder, tmp_path, content):
    victim = folder / "b" / "7.png"
    rows = [load_dataset(str(folder), "train")[i] for i in range(2)]
    assert len(rows) == 2
    whole = victim.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(victim)
    victim.write_bytes(victim.read_bytes()[:4000] if content is None else content)
    for path in folder.rglob("*.png"):  # all into train, so that the victim is among them
        target = folder / "train" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    (folder / "val").mkdir()
    data = load_dataset(str(folder), "train")
    extract = lambda: extract_activations(tiny_clip, data, -2, tmp_path / "store", n_per_shard=4, batch_size=4, progress=False)  # noqa: E731
    with pytest.raises(ValueError, match=r"b/7\.png \([\d,]+ bytes\) can't be read as an image.*Replace it or take it away"):
        extract()
    assert len(list((tmp_path / "store").glob("shard-*"))) == 4
    (folder / "train" / "b" / "7.png").write_bytes(whole)
    assert extract().n_images == 20


def test_an_empty_class_keeps_its_number(folder):
    (folder / "aa").mkdir()
    data = load_dataset(str(folder), "train")
    assert data.class_names == ["a", "aa", "b"] and data.labels.unique().tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"Class 1 \('aa'\).*has 0 train examples; 2 shots"):
        few_shot(data, 2)


def test_an_empty_data_set_is_said_by_every_stage(tiny_clip, tiny_sae, tmp_path):
    from patchsae_utils.interventions.masks import sweep_masks

    nothing = load_dataset("openmoji/tools", "test", n_images=0)
    for call, message in (
        (lambda: extract_activations(tiny_clip, nothing, -2, tmp_path / "store"), "is empty: there is nothing to extract"),
        (lambda: summarize_latents(tiny_clip, tiny_sae, nothing, -2), "is empty: no statistics can be made"),
        (
            lambda: sweep_masks(tiny_clip, tiny_sae, nothing, [1], "random"),
            r"'openmoji/tools' \(test\) is empty: there is nothing to measure",
        ),
        (lambda: few_shot(nothing, 1), r"Class 0 \('axe'\).*has 0 test examples; 1 shots"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb.png \([\d,]+ bytes\) can't be read as an image: Image size .* could be decompression bomb"):
        open_image(tmp_path / "bomb.png")


def test_one_image_goes_through_extraction_and_statistics(tiny_clip, tiny_sae, tmp_path):

    (tmp_path / "train" / "only").mkdir(parents=True)
    Image.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "train" / "only" / "1.png")
    data = load_dataset(str(tmp_path), "train")
    store = extract_activations(tiny_clip, data, -2, tmp_path / "store", progress=False)
    assert (store.n_images, len(next(store.tokens(1000, epochs=1)))) == (1, 197)
    summary = summarize_latents(tiny_clip, tiny_sae, data, -2, progress=False)
    assert summary.n_images == 1 and summary.frequency.max() == 1
    with pytest.raises(FileNotFoundError, match="train holds no images for split 'test'"):
        load_dataset(str(tmp_path), "test")
    assert torch.isfinite(summary.mean_activation).all()


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
