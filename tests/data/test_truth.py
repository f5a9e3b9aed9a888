"""Ground truth of pictures: masks of COCO's form and label images give what the embedded world itself knows, whatever the crop."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms

from patchsae_utils.concepts.detection import Activations, concept_patches, detect_concepts, precisions
from patchsae_utils.data import BrokenImage, ImageData, dataset_fingerprint, load_dataset, openmoji
from patchsae_utils.data.truth import concept_masks, patch_shares, seen_pixels
from patchsae_utils.sae.dictionary import sae_dictionary

mask = pytest.importorskip("pycocotools.mask")


def rle(pixels):
    """A mask as COCO writes it."""
    encoded = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def coco(path, sizes, annotations, categories):
    """A file of COCO's form: image i is ``<i>.png`` of ``sizes[i]`` (height, width); annotations are (image, category, segmentation)."""
    images = [{"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    entries = [{"id": n, "image_id": 10 + i, "category_id": c, "segmentation": s} for n, (i, c, s) in enumerate(annotations)]
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return f"coco:{path.parent}:{path}"


def eye(size, grid, steps=None):
    """What :func:`concept_masks` asks of a model."""
    resize = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    return SimpleNamespace(grid=grid, image_size=size, preprocess=steps or resize, name="eye")


N = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, their pictures, annotations of COCO's form, and label images of objects."""
    scenes, root = load_dataset("openmoji/scenes", "val", n_images=N), tmp_path_factory.mktemp("world")
    names, table = openmoji.concept_names(), openmoji.class_table()
    categories = [
        {"id": k + 1, "name": name.removeprefix("object:"), "supercategory": table["category"][k] if k < len(table) else ""}
        for k, name in enumerate(names) if not name.startswith("category:")
    ]  # fmt: skip
    annotations = []
    (root / "labels").mkdir()
    for i in range(N):
        scenes[i].image.save(root / f"{i}.png")
        truth, labels = scenes.truth(i), np.zeros((112, 112), np.uint16)
        for concept, pixels in zip(truth.concepts, truth.masks > 0, strict=True):
            if not names[concept].startswith("category:") and names[concept] != "outline":
                annotations.append((i, int(concept) + 1, rle(pixels)))
            if concept < len(table):
                labels[pixels] = concept + 1
        Image.fromarray(labels).save(root / "labels" / f"{i}.png")
    (root / "names.txt").write_text("\n".join(f"{k + 1} {name}" for k, name in enumerate(table["name"])))
    spec = coco(root / "instances.json", [(112, 112)] * N, annotations, categories)
    (root / "pictures").mkdir()
    for i in range(N):
        (root / "pictures" / f"{i}.png").symlink_to(root / f"{i}.png")
    return scenes, {"coco": spec, "masks": f"masks:{root}/pictures:{root}/labels:{root}/names.txt"}


@pytest.mark.parametrize("kind", ["coco", "masks"])
def test_exported_scenes_give_the_average_precisions_of_their_own_truth(world, tiny_clip, tiny_sae, kind):
    """All latents of the exports' concepts, on the same scenes, and what detection makes of it."""
    scenes, specs = world
    own, dictionary = concept_patches(tiny_clip, scenes, -2, progress=False), sae_dictionary(tiny_sae)
    read = {split: load_dataset(specs[kind], split) for split in ("train", "test")}
    assert [len(data) for data in read.values()] == [48, 6] and not read["train"].has_labels
    n_compared = 0
    for data in read.values():
        patches = concept_patches(tiny_clip, data, -2, progress=False)
        order = [int(data.where(i).rsplit("/")[-1].split(".")[0]) for i in range(len(data))]
        rows = (np.array(order)[:, None] * 196 + np.arange(196)).ravel()
        same = own._replace(tokens=own.tokens[rows], images=patches.images, masks=own.masks[rows])
        torch.testing.assert_close(patches.tokens, same.tokens, rtol=0, atol=1e-5)
        shown = [name for name in patches.names if name in own.names and same.masks[:, own.names.index(name)].sum()]
        pairs = np.arange(16).repeat(len(shown)), np.tile(np.arange(len(shown)), 16)
        mine, theirs = ([each.names.index(name) for name in shown] for each in (patches, same))
        (found, expected) = (
            precisions(Activations(dictionary, each), pairs[0], np.array(columns)[pairs[1]])[0]
            for each, columns in ((patches, mine), (same, theirs))
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        n_compared += len(shown)
    kinds = {name.split(":")[0] for name in patches.names}
    assert n_compared > 60 and kinds == ({"object", "category", "color", "background"} if kind == "coco" else {"object"})
    if kind == "coco":
        report = detect_concepts(dictionary, *(concept_patches(tiny_clip, read[split], -2, progress=False) for split in read))
        assert set(own.families) >= set(patches.families)
        assert sorted(own.families["category:bird"]) == sorted(patches.families["category:bird"])
        assert set(report.detection["kind"]) >= {"category", "color"} and report.detection["ap"].between(0, 1).all()


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 16)])
def test_the_embedded_world_knows_itself_on_any_grid(grid):
    data, size = load_dataset("openmoji/scenes", "test", n_images=5), (grid[0] * 16, grid[1] * 16)
    for i in range(5):
        found, truth = concept_masks(data, i, eye(size, grid)), data.truth(i)
        if grid == (14, 14):
            np.testing.assert_array_equal(found, openmoji.concept_masks(truth))
        assert found.shape == (len(data.concept_names), *grid) and set(np.flatnonzero(found.any((1, 2)))) <= set(truth.concepts)


@pytest.mark.parametrize("size", [(48, 80), (97, 41), (224, 224), (20, 30)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_masks_take_the_way_of_the_picture(size, mode):
    """The picture is its own mask: what the model sees bright, the mask shows, to the width of the resampling's blur."""
    steps = image_transform((64, 64), is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.stack([x < size[1] // 2, y > size[0] // 3, (x - size[1] / 2) ** 2 + (y - size[0] / 2) ** 2 < (min(size) / 3) ** 2])
    found = patch_shares(masks, eye((64, 64), (8, 8), steps))
    for each, shares in zip(masks, found, strict=True):
        seen = steps(Image.fromarray(np.uint8(255 * each)).convert("RGB"))[0].clamp(0, 1).reshape(8, 8, 8, 8).mean((1, 3))
        assert np.abs(shares - seen.numpy()).max() < 0.16 and np.abs(shares - seen.numpy()).mean() < 0.02
    assert len(np.unique(seen_pixels(steps, size))) > 1


def test_steps_that_are_not_understood_are_refused():
    odd = transforms.Compose([lambda image: image.resize((64, 64)), transforms.ToTensor()])
    with pytest.raises(ValueError, match=r"makes 20 x 30 pixels of a mask, 'eye' reads 64 x 64: its steps are not understood"):
        patch_shares(np.ones((1, 20, 30)), eye((64, 64), (8, 8), odd))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [False, True])
def test_masks_are_turned_with_their_photograph(tmp_path, orientation, stored):
    """Of the upright picture or, where its size says so, of the pixels as stored."""
    pixels = np.zeros((20, 40), np.uint8)
    pixels[3:9, 2:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    upright = np.asarray(ImageData("x", "test", [], [-1], lambda _: tmp_path / "0.png")[0].image)[..., 0] > 0
    given = pixels > 0 if stored and orientation >= 5 else upright
    for i in (1, 2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    spec = coco(tmp_path / "c.json", [given.shape, (20, 40), (20, 40)], [(0, 1, rle(given))], [{"id": 1, "name": "it"}])
    data = next(each for each in (load_dataset(spec, split) for split in ("train", "val", "test")) if each.rows.tolist() == [0])
    np.testing.assert_array_equal(data.truth(0).masks[0], upright)


def blank(root, n, size=(16, 16)):
    for i in range(n):
        Image.new("RGB", size[::-1]).save(root / f"{i}.png")


def only(spec, row):
    """The split and the place of a row, and its masks on a grid of 4 x 4."""
    data = next(each for each in (load_dataset(spec, split) for split in ("train", "val", "test")) if row in each.rows.tolist())
    return data, concept_masks(data, data.rows.tolist().index(row), eye((16, 16), (4, 4)))


def test_crowds_polygons_overlaps_and_empty_pictures(tmp_path):
    blank(tmp_path, 4)
    crowd = {"size": [16, 16], "counts": [0, 128, 128]}  # the left half, not compressed
    left, top, corner = [[0, 0, 8, 0, 8, 16, 0, 16]], [[0, 0, 16, 0, 16, 8, 0, 8]], [[8, 8, 16, 8, 16, 16, 8, 16]]
    annotations = [(0, 1, crowd), (0, 1, corner), (0, 2, top), (1, 2, [*top, *corner]), (2, 1, left), (2, 1, left)]
    categories = [{"id": 1, "name": "traffic_light", "supercategory": "outdoor"}, {"id": 2, "name": "sky", "isthing": 0}]
    spec = coco(tmp_path / "c.json", [(16, 16)] * 4, annotations, categories)
    data, first = only(spec, 0)
    assert data.concept_names == ("object:traffic light", "category:outdoor", "stuff:sky")
    assert first[0].tolist() == [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2 and (first[0] == first[1]).all()
    assert first[2].tolist() == [[1] * 4] * 2 + [[0] * 4] * 2, "concepts may overlap"
    assert only(spec, 1)[1][2].tolist() == [[1] * 4] * 2 + [[0, 0, 1, 1]] * 2, "parts of one annotation"
    assert only(spec, 2)[1][0].tolist() == [[1, 1, 0, 0]] * 4, "what lies over itself counts once"
    assert not only(spec, 3)[1].any(), "a picture that shows nothing is data"


def test_a_thousand_categories_in_two_files(tmp_path):
    blank(tmp_path, 3)
    whole = [[0, 0, 16, 0, 16, 16, 0, 16]]
    many = [{"id": c, "name": f"thing {c}", "supercategory": f"kind {c % 7}"} for c in range(1, 1001)]
    spec = coco(tmp_path / "a.json", [(16, 16)] * 3, [(0, 1000, whole), (1, 1, whole)], many)
    coco(tmp_path / "b.json", [(16, 16)] * 3, [(0, 2001, whole)], [{"id": 2001, "name": "wall"}, {"id": 2002, "name": "thing 5"}])
    data, shown = only(f"{spec}:{tmp_path}/b.json", 0)
    assert len(data.concept_names) == 1008 and {data.concept_names[k] for k in np.flatnonzero(shown.all((1, 2)))} == {
        "object:thing 1000", "category:kind 6", "object:wall"
    }  # fmt: skip
    before = dataset_fingerprint(data)
    (tmp_path / "b.json").write_text((tmp_path / "b.json").read_text() + " ")
    assert dataset_fingerprint(data) != before, "other annotations are other data"


def test_label_images_in_every_form(tmp_path):
    for split in ("training", "validation"):
        (tmp_path / "images" / split / "a").mkdir(parents=True), (tmp_path / "labels" / split / "a").mkdir(parents=True)
    values = np.repeat(np.array([0, 1, 2, 255], np.uint8), 4)[None].repeat(16, 0)
    forms = {"L": Image.fromarray(values), "P": Image.fromarray(values).convert("P"), "deep": Image.fromarray(values.astype(np.uint16))}
    forms["P"].putdata(values.ravel().tolist())
    for name, image in forms.items():
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "training" / "a" / f"{name}.jpg")
        image.save(tmp_path / "labels" / "training" / "a" / f"{name}.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "validation" / "alone.jpg")
    spec = f"masks:{tmp_path}/images:{tmp_path}/labels"
    for text, names in (
        (None, {1: "object:1", 2: "object:2"}), ("wall\nfloor_lamp", {1: "object:wall", 2: "object:floor lamp"}),
        ("background\nwall\nsky", {1: "object:wall", 2: "object:sky"}), ("2: color:red\n1: dog, domestic dog", {1: "object:dog", 2: "color:red"}),
        ("Idx\tRatio\tName\n1\t0.16\twall\n2\t0.1\tsky", {1: "object:wall", 2: "object:sky"}),
        ("1 a\n2 b\n255 c", {1: "object:a", 2: "object:b", 255: "object:c"}),
    ):  # fmt: skip
        (tmp_path / "names.txt").write_text(text or "")
        data = load_dataset(spec + (f":{tmp_path}/names.txt" if text else ""), "train")
        assert len(data) == 3
        for i in range(3):
            shown = concept_masks(data, i, eye((16, 16), (4, 4)))
            found = {data.concept_names[k]: np.flatnonzero(shown[k].all(0)).tolist() for k in np.flatnonzero(shown.any((1, 2)))}
            assert found == {name: [{1: 1, 2: 2, 255: 3}[value]] for value, name in names.items()}, text
    for text, message in (
        ("wall", "holds the value 2, for which there is no name"),
        ("1 wall\nsky", "'sky' has no number, other lines have"),
    ):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_dataset(f"{spec}:{tmp_path}/names.txt", "train").truth(0)
    whole = (tmp_path / "labels" / "training" / "a" / "L.png").read_bytes()
    (tmp_path / "labels" / "training" / "a" / "L.png").write_bytes(whole[:-30])
    with pytest.raises(BrokenImage, match=r"labels/training/a/L.png \(\d+ bytes\) can't be read as an image"):
        load_dataset(spec, "train").truth(0)
    with pytest.raises(FileNotFoundError, match="Label images of .*validation: none of 1 is there"):
        load_dataset(spec, "val")


def test_what_is_wrong_with_annotations_is_said(tmp_path):
    blank(tmp_path, 3)
    categories, whole = [{"id": 1, "name": "a"}], [[0, 0, 9, 0, 9, 9]]
    for given, sizes, message in (
        ([(0, 9, whole)], 3, "annotation 0 is of an image or a category that the file does not list"), ([(0, 1, [])], 3, "holds boxes alone"),
        ([(0, 1, whole)], 900, "images are left out"),
    ):  # fmt: skip
        spec = coco(tmp_path / "c.json", [(16, 16)] * sizes, given, categories)
        with pytest.raises(ValueError, match=message) if sizes == 3 else pytest.warns(UserWarning, match=message):
            load_dataset(spec, "train")
    data, _ = only(coco(tmp_path / "d.json", [(16, 16)] * 3, [(0, 1, whole)], categories), 1)
    Image.new("RGB", (30, 40)).save(data.where(data.rows.tolist().index(1)))
    with pytest.raises(ValueError, match="1.png has 30 x 40 pixels, its ground truth 16 x 16"):
        data.truth(data.rows.tolist().index(1))
    spec = coco(tmp_path / "e.json", [(16, 16)] * 3, [(i, 1, [[0, 0, 4, 4]]) for i in range(3)], categories)
    (tmp_path / "e.json").write_text((tmp_path / "e.json").read_text(), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"e.json: \[\[0, 0, 4, 4\]\] is no mask: neither polygons"):
        load_dataset(spec, "train").truth(0)
    (tmp_path / "p.json").write_text(json.dumps({"images": [], "categories": [], "annotations": [{"segments_info": []}]}))
    for spec, error, message in (
        (f"coco:{tmp_path}:{tmp_path}/p.json", ValueError, "panoptic form"), (f"coco:{tmp_path}", ValueError, "not of the form coco:"),
        (f"masks:{tmp_path}:{tmp_path}/nowhere", FileNotFoundError, "there is no .*nowhere"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            load_dataset(spec, "train")
