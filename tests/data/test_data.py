"""Data sets: balanced, disjoint, keyed by index; unknown names answered with the valid ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture_folder

from patchsae_utils.data import ImageData, batches, few_shot, load_dataset, openmoji, templates_for
from patchsae_utils.data.splits import half_of_classes


@pytest.fixture
def folder(tmp_path):
    return picture_folder(tmp_path, tabby_cat=10, dog=10)


@pytest.mark.parametrize("task", ["all", *openmoji.tasks()])
def test_scenes_are_balanced_over_classes(task):
    data, table = load_dataset(f"openmoji/{task}", "test"), openmoji.class_table()
    assert len(data) == 20 * len(data.class_names) and torch.bincount(data.labels).unique().tolist() == [20]
    assert data.class_names == table["name"][data.class_ids].tolist()
    assert task == "all" or set(table["task"][data.class_ids]) == {task}


def test_the_label_is_the_main_object():
    for spec in ("openmoji/all", "openmoji/vehicles:line"):
        data = load_dataset(spec, "val", n_images=20)
        for i in range(20):
            example = data[i]
            assert example.index == i and example.label == int(data.labels[i]) == i % len(data.class_names)
            assert data.truth(i).class_ids[-1] == data.class_ids[example.label]
            assert (example.image.mode, example.image.size) == ("RGB", (112, 112))


def test_pretraining_scenes_know_their_main_class():
    data = load_dataset("openmoji/scenes", "train", n_images=60)
    scenes = [data.scene(i) for i in range(60)]
    assert all(data.class_ids[data.labels[i]] in data.truth(i).class_ids for i in range(60))
    assert {scene.domain for scene in scenes} >= {"color", "gray"} and {len(scene.placements) for scene in scenes} >= {1, 2, 3}
    for index in (60, -1):
        with pytest.raises(IndexError, match="has 60 images"):
            data[index]


def test_more_images_extend_the_data_set():
    few, many = load_dataset("openmoji/meals", "test", n_images=5), load_dataset("openmoji/meals", "test", n_images=50)
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(few[i].image), np.asarray(many[i].image))


def test_halves_share_the_classes_and_no_class_is_in_both():
    assert [half_of_classes(5, half) for half in ("base", "novel", None)] == [[0, 1, 2], [3, 4], [0, 1, 2, 3, 4]]
    whole = load_dataset("openmoji/tools", "train")
    base, novel = (load_dataset("openmoji/tools", "train", half=half) for half in ("base", "novel"))
    assert base.class_names + novel.class_names == whole.class_names
    assert len(base.class_names) - len(novel.class_names) in (0, 1)
    assert int(novel.labels.min()) == 0 and int(novel.labels.max()) == len(novel.class_names) - 1
    assert novel.truth(0).class_ids[-1] == novel.class_ids[0] != base.class_ids[0]


def test_a_subset_is_drawn_by_its_seed(folder):
    def draw(seed):
        data = load_dataset(folder, "train", n_images=6, seed=seed)
        return [data[i].image.getpixel((0, 0)) for i in range(len(data))]

    assert len(draw(0)) == 6 and draw(0) == draw(0) != draw(1)


def test_a_missing_or_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected .*train/<class>/<image>"):
        load_dataset(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        load_dataset(str(tmp_path), "train")


def test_classes_are_keyed_by_index_not_by_name():
    """ImageNet has two classes called "missile": they must not merge."""
    data = ImageData("twins", "test", ["missile", "sunglasses", "missile"], [2, 0, 1, 0, 2], lambda i: Image.new("RGB", (8, 8), (i, 0, 0)))
    assert data.labels.tolist() == [2, 0, 1, 0, 2]
    assert few_shot(data, 1, seed=0)[0] in (1, 3) and few_shot(data, 1, seed=0)[2] in (0, 4)
    novel = ImageData("twins", "test", ["missile", "sunglasses", "missile"], [2, 0, 1, 0, 2], data.opener, half="novel")
    assert (novel.class_names, novel.labels.tolist()) == (["missile"], [0, 0])
    assert [novel[i].image.getpixel((0, 0))[0] for i in range(2)] == [0, 4]


def test_few_shot_takes_the_same_number_of_each_class():
    data = load_dataset("openmoji/sports", "train")
    chosen = few_shot(data, 4, seed=1)
    assert len(set(chosen)) == 4 * len(data.class_names) and torch.bincount(data.labels[chosen]).unique().tolist() == [4]
    assert chosen == few_shot(data, 4, seed=1) != few_shot(data, 4, seed=2)
    with pytest.raises(ValueError, match="21 shots were asked for"):
        few_shot(data, 21)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_places(tiny_clip, workers):
    data = load_dataset("openmoji/home", "test", n_images=9)
    found = list(batches(data, tiny_clip.preprocess, 4, workers, indices=[8, 0, 3, 3, 5]))
    assert [len(batch.images) for batch in found] == [4, 1]
    assert torch.cat([batch.indices for batch in found]).tolist() == [8, 0, 3, 3, 5]
    assert torch.cat([batch.labels for batch in found]).tolist() == data.labels[[8, 0, 3, 3, 5]].tolist()
    images = torch.stack([tiny_clip.preprocess(data[i].image) for i in (8, 0, 3, 3, 5)])
    assert torch.equal(torch.cat([batch.images for batch in found]), images)


def test_unknown_names_are_answered_with_the_valid_ones(folder):
    for spec, split, half, message in (
        ("openmoji/insects", "train", None, "Unknown task 'insects'.*animals.*vehicles"),
        ("openmoji/tools:sketch", "train", None, "Unknown domain 'sketch'.*color, line, gray, night"),
        ("openmoji/scenes:line", "test", None, "openmoji/scenes:line does not exist"),
        ("openmoji/tools", "dev", None, "Unknown split 'dev'.*train, val, test"),
        ("openmoji/tools", "train", "old", "Unknown half 'old'.*base, novel"),
        (str(folder), "dev", None, "Unknown split 'dev'.*train, val, test"),
        ("torchvision:Imaginary", "train", None, "no data set 'Imaginary'.*CIFAR10"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(spec, split, half=half)


def test_templates_suit_the_data_set():
    assert len(templates_for("openmoji/animals:line")) == 8
    assert len(templates_for("torchvision:Imagenette")) == len(templates_for("/data/imagenet")) == 80
    assert templates_for("torchvision:DTD") == ("{} texture.",)
    for spec in ("openmoji/all", "torchvision:EuroSAT", "hf:somebody/pictures"):
        assert all(template.count("{}") == 1 for template in templates_for(spec))
