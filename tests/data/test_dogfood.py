"""Data as people have it, from disk and from the package ``datasets``, through the statistics of a tiny CLIP and SAE."""

import os
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture_folder

from patchsae_utils import plots
from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.clip.zero_shot import zero_shot_predictions
from patchsae_utils.concepts.names import label_latents
from patchsae_utils.data import few_shot, load_dataset
from patchsae_utils.data.loader import without_broken
from patchsae_utils.explorer import LatentExplorer, PatchExplorer, point
from patchsae_utils.interventions import sweep_masks
from patchsae_utils.latents import contrasting_latents, cross_domain_references, latent_masks
from patchsae_utils.latents.pictures import activation_levels, reference_images
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.latents.summary import LatentSummary
from patchsae_utils.sae.quality import evaluate_sae
from patchsae_utils.stages import latent_names


def pictures(n, mode="RGB"):
    return [Image.new("RGB", (12, 9), (20 * i, 200 - 20 * i, 90)).convert(mode) for i in range(n)]


def splits(root):
    picture_folder(root / "train", a=4, b=4), picture_folder(root / "val", a=2, b=2), picture_folder(root / "test", b=2)


def flat(root):
    picture_folder(root, **{".": 10}), (root / "notes.txt").write_text("none")


def flat_splits(root):
    picture_folder(root / "train", **{".": 8}), picture_folder(root / "val", **{".": 2}), picture_folder(root / "test", **{".": 2})


def odd(root):
    """Kinds and names of every sort, a folder in a folder, and links that lead nowhere and round."""
    for c, name in enumerate(("Ährenfeld 麦", "b_c")):
        (root / name).mkdir(parents=True)
        for i, mode in enumerate(("RGB", "CMYK", "P", "LA", "L", "1", "RGBA", "I;16", "F")):
            ending = {"CMYK": "JPG", "F": "TIFF"}.get(mode, "PNG")
            image = Image.new("RGB", (9, 7), (90 * c, 9 * i, 3))
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
            image.save(root / name / f"ß{i}.{ending}")
        pictures(1)[0].save(root / name / "moving.GIF", save_all=True, append_images=pictures(3)[1:])
        (root / name / "round").symlink_to(root), (root / name / "self").symlink_to(root / name / "self")
    (root / "again").symlink_to(root)


LAYOUTS = [
    (lambda root: picture_folder(root, a=5, b=5), (6, 2), ["a", "b"]), (splits, (8, 2), ["a", "b"]), (flat, (8, 1), []), (flat_splits, (8, 2), []),
    (lambda root: picture_folder(root / "train", a=5, b=5), (6, 2), ["a", "b"]), (odd, (16, 2), ["b c", "Ährenfeld 麦"]),
    (lambda root: (picture_folder(root / "test", a=2, b=2), picture_folder(root / "TRAIN", **{".": 7})), (7, 4), []),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sizes", "names"), LAYOUTS)
def test_each_layout_of_folders_is_read_and_summarised(tiny_clip, tiny_sae, tmp_path, make, sizes, names):
    """FAULTS A3 to A8 and pictures without classes."""
    make(tmp_path / "set")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?!.*(no class folder|no label))")
        train, test = (load_dataset(str(tmp_path / "set"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == sizes and train.class_names == names and train.has_labels == bool(names)
    places = {train.where(i) for i in range(len(train))}
    assert len(places) == len(train) and not places & {test.where(i) for i in range(len(test))}
    assert without_broken(train, tmp_path / "report.json", progress=False) is train
    summary = summarize_latents(tiny_clip, tiny_sae, train, -2, out=tmp_path / "summary", progress=False)
    assert summary.n_images == len(train) and summary.class_names == tuple(names) and summary.frequency.max() == 1
    assert LatentSummary.load(tmp_path / "summary").n_images == len(train)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' files have names in UTF-8 alone")
def test_names_that_are_not_utf8_are_written_and_read_again(tiny_clip, tmp_path):
    name = os.fsdecode(b"caf\xe9_noir")
    picture_folder(tmp_path / "set", **{f"train/{name}": 5, "train/b": 5, "val/b": 1})
    data = load_dataset(str(tmp_path / "set"), "train")
    stores = [extract_activations(tiny_clip, data, -2, tmp_path / "store", progress=False) for _ in range(2)]
    assert data.class_names[1] == name.replace("_", " ") and stores[0].fingerprint == stores[1].fingerprint
    (tmp_path / "set" / "train" / name / "0\udce9.png").write_bytes(b"broken")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 11 images .* can't be read"):
            assert len(without_broken(load_dataset(str(tmp_path / "set"), "train"), tmp_path / "report.json", 1, progress=False)) == 10


def test_pictures_without_classes_are_data_and_what_needs_labels_says_so(tiny_clip, tiny_sae, tmp_path):
    flat(tmp_path / "set")
    data = load_dataset(str(tmp_path / "set"), "train")
    assert data.labels.tolist() == [-1] * 8 and data[3].label == -1 and not data.has_labels
    assert extract_activations(tiny_clip, data, -2, tmp_path / "store", progress=False).n_images == 8
    labelled = picture_folder(tmp_path / "labelled", a=10) and load_dataset(str(tmp_path / "labelled"), "train")
    summary, same = (summarize_latents(tiny_clip, tiny_sae, each, -2, progress=False) for each in (data, labelled))
    assert summary.label_entropy.isnan().all() and (summary.top_labels == -1).all() and torch.equal(summary.class_counts, same.class_counts)
    for name in ("frequency", "mean_activation", "top_values", "top_patches", "dead", "dataset_counts"):
        assert torch.equal(getattr(summary, name), getattr(same, name)), name
    latent = int(summary.frequency.argmax())
    assert len(reference_images(tiny_clip, tiny_sae, data, summary, [latent], -2)[0].images) == 5
    levels = activation_levels(tiny_clip, tiny_sae, data, 0, -2, summary)
    assert levels.class_name == "" and "class" not in set(levels.table["level"]) and len(plots.levels(levels, {}).axes) == 6
    explorer = LatentExplorer(tiny_clip, tiny_sae, summary, data)
    assert explorer.card.classes == [] and "entropy" not in str([ax.get_title() for ax in explorer.figure().axes])
    assert PatchExplorer(tiny_clip, tiny_sae, summary, data) and (latent_names(summary, None)["kind"].isin(["unnamed", "dead"])).all()
    chosen = contrasting_latents(summary.to_frame())
    assert (
        list(chosen.values()) == ["strongest", "everywhere", "seldom"]
        and len(plots.latent_statistics(summary.to_frame(), chosen).axes) == 1
    )
    assert set(evaluate_sae(tiny_clip, tiny_sae, data, -2, progress=False)["variant"]) == {"reconstruction"}
    assert "same_class" not in cross_domain_references(tiny_clip, tiny_sae, {"here": data}, [latent], -2).table
    for call in (
        lambda: few_shot(data, 1), lambda: load_dataset(str(tmp_path / "set"), "train", half="base"), lambda: label_latents(summary),
        lambda: zero_shot_predictions(tiny_clip, data), lambda: sweep_masks(tiny_clip, tiny_sae, data, [1], "random", layer=-2),
        lambda: point(tiny_clip, tiny_sae, summary, data),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="has no labels, which are needed here"):
            call()


def test_a_list_file_names_pictures(tmp_path):
    picture_folder(tmp_path / "Bilder", **{"a": 6, "ü b": 4})
    paths = sorted((tmp_path / "Bilder").rglob("*.png"))
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "all.txt"
    lines = [f"../{path.relative_to(tmp_path)}" for path in paths[:5]] + [str(path) for path in paths[5:]]
    file.write_bytes("\r\n".join(["\ufeff" + lines[0], "", *lines[1:], lines[2]]).encode())
    parts = [load_dataset(spec, split) for spec, split in ((str(file), "train"), (f"list:{file}", "val"), (f"list:{file}", "test"))]
    assert [len(data) for data in parts] == [8, 1, 1] and (parts[0].name, parts[0].class_names) == ("all", [])
    assert {data[i].image.tobytes() for data in parts for i in range(len(data))} == {Image.open(path).tobytes() for path in paths}
    file.write_text("../Bilder/a/0.png\nnowhere.png\n")
    with pytest.raises(FileNotFoundError, match=r"all.txt, line 2: there is no file .*lists/nowhere.png'; 1 of 2 are missing"):
        load_dataset(str(file), "train")
    with pytest.raises(FileNotFoundError, match="There is no file .*none.txt'; expected a text file"):
        load_dataset(f"list:{tmp_path}/none.txt", "train")


def test_masks_of_a_single_picture(tiny_clip, tiny_sae, tmp_path):
    pictures(3)[2].save(path := tmp_path / "one.png")
    wanted = latent_masks(tiny_clip, tiny_sae, tiny_clip.preprocess(pictures(3)[2])[None], [0, 5], -2)
    pixels = np.asarray(pictures(3)[2])
    for given in (path, str(path), path.read_bytes(), Image.open(path), pixels, pixels / 255, [path], pixels[None]):
        torch.testing.assert_close(latent_masks(tiny_clip, tiny_sae, given, [0, 5], -2), wanted)
    assert len(latent_masks(tiny_clip, tiny_sae, [path, pictures(1)[0]], [0], -2)) == 2
    with pytest.raises(ValueError, match="nowhere.png can't be read as an image"):
        latent_masks(tiny_clip, tiny_sae, "nowhere.png", [0], -2)


PICTURE, TEXT = datasets.Image(), datasets.Value("string")
COLUMNS = [
    ({"image": PICTURE, "label": datasets.ClassLabel(names=["apple_pie", "b"])}, [0, 1] * 5, ["apple pie", "b"], [0, 1]),
    ({"image": PICTURE, "label": TEXT}, ["cat", "a_dog"] * 5, ["a dog", "cat"], [1, 0]),
    ({"image": PICTURE, "label": datasets.Value("int32")}, [7, 12] * 5, ["7", "12"], [0, 1]),
    ({"image": PICTURE, "label": datasets.Value("bool")}, [True, False] * 5, ["False", "True"], [1, 0]),
    ({"image": PICTURE, "label": datasets.Value("float32")}, [2.0, 1.0] * 5, ["1", "2"], [1, 0]),
    ({"image": PICTURE, "caption": TEXT}, ["some", "words"] * 5, [], [-1, -1]),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no label column")
@pytest.mark.parametrize(("features", "values", "names", "first"), COLUMNS)
def test_each_kind_of_label_of_the_hub(hub, tiny_clip, tiny_sae, features, values, names, first):
    """FAULTS A1, A10: classes of ``datasets``, texts, numbers; none at all."""
    name = list(features)[1]
    rows = {"train": {"image": pictures(10), name: values}, "test": {"image": pictures(4), name: values[:4]}}
    hub.update(features=features, rows=rows)
    data, test = load_dataset("hf:a/b", "train"), load_dataset("hf:a/b", "test")
    assert data.class_names == test.class_names == names and data.labels.tolist() == first * 5 and len(test) == 4
    assert summarize_latents(tiny_clip, tiny_sae, data, -2, progress=False).n_images == 10
    plain = names and not hasattr(features["label"], "names")
    with pytest.warns(UserWarning, match="classes in column 'label' are not known beforehand") if plain else warnings.catch_warnings():
        stream = load_dataset("hf-stream:a/b", "train", n_images=6)
    assert len(stream) == 6 and stream.class_names == ([] if plain else names)
    assert summarize_latents(tiny_clip, tiny_sae, stream, -2, progress=False).n_images == 6


def test_classes_of_plain_columns_are_those_of_all_splits_and_gaps_are_left_out(hub):
    """FAULTS A1, A3: a split that lacks a class; None, empty and -1."""
    rows = {"train": {"image": pictures(3), "label": ["a", "c", None]}, "test": {"image": pictures(2), "label": ["b", ""]}}
    hub.update(features={"image": PICTURE, "label": TEXT}, rows=rows)
    with pytest.warns(UserWarning, match="1 of . rows .* have no label"):
        train, test = load_dataset("hf:a/b", "train"), load_dataset("hf:a/b", "test")
    assert train.class_names == test.class_names == ["a", "b", "c"] and (train.labels.tolist(), test.labels.tolist()) == ([0, 2], [1])
    for kind, value in (("float32", 0.5), ("float32", float("nan"))):
        hub.update(features={"image": PICTURE, "label": datasets.Value(kind)}, rows={"train": {"image": pictures(1), "label": [value]}})
        with pytest.raises(ValueError, match=r"column 'label' holds (0.5|nan), which names no class. Choose another by \?label=<column>"):
            load_dataset("hf:a/b", "train")


def test_of_several_columns_one_is_chosen_and_said(hub):
    features = {
        "mask": PICTURE, "image": PICTURE, "fine": datasets.ClassLabel(names=["x", "y"]), "coarse": datasets.ClassLabel(names=["z"]),
    }  # fmt: skip
    columns = {"mask": [Image.new("L", (4, 4))] * 3, "image": pictures(3), "fine": [0, 1, 1], "coarse": [0, 0, 0]}
    hub.update(features=features, rows={"train": columns, "test": columns})
    with pytest.warns(UserWarning) as said:
        data = load_dataset("hf:a/b", "train")
    assert data.class_names == ["x", "y"] and data[1].image.getpixel((0, 0))[0] == 20
    assert any("image columns mask, image; 'image' is read. Choose by ?image=<column>" in str(w.message) for w in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset("hf:a/b?image=mask&label=coarse", "train")
    assert (data.class_names, data.name, data[1].image.getpixel((0, 0))) == (["z"], "b", (0, 0, 0))
    for spec, message in (
        ("?label=none", "has no column 'none' for its label; it has mask, image, fine, coarse"), ("?image=fine", "needs a column of images"),
        ("?picture=mask", r"unknown option 'picture'; expected \?image=<column>&label=<column>"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_dataset(f"hf:a/b{spec}", "train")
