"""Zero-shot accuracy: counted rightly, with intervals over images and the chance level beside it."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from patchsae_utils.clip.zero_shot import accuracy_table, domains_of, zero_shot_predictions
from patchsae_utils.data import ImageData, load_dataset


def test_predictions_are_keyed_by_label():
    """Two classes may share a name; image i is red level said[i], and its feature the one-hot of that level."""
    oracle = SimpleNamespace(
        preprocess=lambda image: torch.tensor(image.getpixel((0, 0))),
        encode_image=lambda images: torch.nn.functional.one_hot(images[:, 0].long(), 3).float(),
        zero_shot_head=lambda class_names, templates: torch.eye(3),
        logits=lambda features, head: features @ head.T,
    )
    said, labels = [0, 2, 1, 2, 0], [0, 2, 1, 0, 1]
    data = ImageData("twins", "test", ["missile", "sunglasses", "missile"], labels, lambda i: Image.new("RGB", (4, 4), (said[i], 0, 0)))
    frame = zero_shot_predictions(oracle, data, progress=False)
    assert frame["prediction"].tolist() == said
    assert frame["correct"].tolist() == [True, True, True, False, False]
    assert frame["index"].tolist() == list(range(5))
    table = accuracy_table(frame, "label")
    assert table.set_index("label")["accuracy"].to_dict() == {0: 0.5, 2: 1.0, 1: 0.5}
    assert table["chance"].tolist() == pytest.approx([1 / 3] * 3)


def test_scenes_are_described_by_their_class_and_accuracy_lies_in_its_interval(tiny_clip):
    data = load_dataset("openmoji/all:gray", "test", n_images=30)
    frame = zero_shot_predictions(tiny_clip, data, progress=False)
    assert set(frame["domain"]) == {"gray"} and set(frame["n_classes"]) == {len(data.class_names)}
    assert frame["task"].value_counts().sum() == 30
    assert (frame["correct_in_task"] | ~frame["correct"]).all()  # who is best of all is best of its task
    sizes = load_dataset(f"openmoji/{frame['task'][0]}", "test").class_names
    assert frame["n_in_task"][0] == len(sizes)
    whole = accuracy_table(frame)
    assert len(whole) == 1 and whole["n"][0] == accuracy_table(frame, "half")["n"].sum() == 30
    assert whole["accuracy"][0] == pytest.approx(frame["correct"].mean())
    assert whole["low"][0] <= whole["accuracy"][0] <= whole["high"][0] and whole["chance"][0] == pytest.approx(1 / len(data.class_names))


def test_domains_of_a_task_and_of_anything_else():
    assert domains_of("openmoji/tools:gray") == ["openmoji/tools:gray", "openmoji/tools", "openmoji/tools:line", "openmoji/tools:night"]
    assert domains_of("openmoji/tools")[0] == "openmoji/tools" and len(domains_of("openmoji/tools")) == 4
    assert domains_of("hf:somebody/birds") == ["hf:somebody/birds"]
