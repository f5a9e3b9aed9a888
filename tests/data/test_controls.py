"""Control tasks: the same pictures under other names, objects that were never shown, and a sign that does or doesn't tell two classes apart."""

import numpy as np
import pytest
import torch

from patchsae_utils.data import controls, dataset_fingerprint, few_shot, load_dataset, openmoji


def pixels(data, i):
    return np.asarray(data[i].image).astype(int)


@pytest.mark.parametrize("half", [None, "base", "novel"])
def test_other_names_change_no_picture_and_no_label(half):
    known = load_dataset("openmoji/animals", "test", half=half)
    nonce, relabelled = (load_dataset(f"openmoji/animals:{kind}", "test", half=half) for kind in controls.NAMINGS)
    for data in (nonce, relabelled):
        assert torch.equal(data.labels, known.labels) and data.planted.shape == (len(known), 0)
        assert len(set(data.class_names)) == len(known.class_names) and dataset_fingerprint(data) != dataset_fingerprint(known)
        np.testing.assert_array_equal(pixels(data, 3), pixels(known, 3))
    assert not set(controls.nonce_words(360)) & set(openmoji.class_table()["name"])
    assert set(relabelled.class_names) == set(known.class_names)
    assert all(new != old for new, old in zip(relabelled.class_names, known.class_names, strict=True))


def test_names_are_the_same_in_halves_and_whole():
    for kind in controls.NAMINGS:
        whole, *halves = (load_dataset(f"openmoji/tools:{kind}", "test", half=half).class_names for half in (None, "base", "novel"))
        assert halves[0] + halves[1] == whole
    assert len(set(controls.nonce_words(360))) == 360


def test_unseen_objects_are_in_no_scene_of_the_world():
    table, data = openmoji.class_table(), load_dataset("openmoji/unseen", "test", half="base", n_images=60)
    assert len(data.class_names) == 24 and len(controls.UNSEEN) >= 30
    assert not set(controls.UNSEEN) & set(table["name"]) and not set(controls.UNSEEN.values()) & set(table["codepoint"])
    assert data.planted.sum(1).eq(1).all() and torch.equal(data.planted.int().argmax(1), data.labels)
    sheet = controls._all_sprites()
    for i in (0, 30):  # the main object alone differs from the world's scene of the same index
        scene = data._world.scene(i)
        place = list(controls.UNSEEN).index(data.class_names[data.labels[i]])
        main = scene.placements[-1]._replace(class_id=len(table) + place)
        np.testing.assert_array_equal(pixels(data, i), openmoji.render(scene._replace(placements=(*scene.placements[:-1], main)), sheet))
    np.testing.assert_array_equal(sheet.color[0][: len(table)], openmoji.sprites().color[0])


def test_a_sign_tells_two_classes_apart_as_often_as_it_says():
    data = load_dataset("openmoji/sign-10", "train", n_images=4000)
    shown, label = data.planted[:, 0], data.labels
    assert not shown[label == 0].any() and abs(shown[label == 1].float().mean() - 0.1) < 0.03
    assert len(few_shot(data, 16)) == 32 and len(data.class_names) == 2
    inside = controls.sign()[0]
    with_sign, without = int(shown.nonzero()[0]), int((~shown).nonzero()[0])
    np.testing.assert_array_equal(pixels(data, without), openmoji.render(data._world.scene(without)))
    changed = (pixels(data, with_sign) != openmoji.render(data._world.scene(with_sign))).any(-1)
    assert 0.9 * inside.sum() < changed.sum() <= inside.sum()
    again = load_dataset("openmoji/sign-10", "train", n_images=4100)
    assert torch.equal(again.planted[:4000], data.planted) and torch.equal(again.labels[:4000], data.labels)


def test_a_useless_sign_is_as_frequent_in_every_class():
    data, known = (load_dataset(f"openmoji/animals{kind}", "train", half="base", n_images=3800) for kind in (":sign-10", ""))
    assert data.class_names == known.class_names and torch.equal(data.labels, known.labels)
    shares = [data.planted[data.labels == c].float().mean().item() for c in range(19)]
    assert abs(np.mean(shares) - 0.1) < 0.02 and max(shares) < 0.2 and min(shares) > 0.03


def test_unknown_controls_name_the_valid_tasks():
    for spec, unknown in (("animals:unseen", "domain"), ("sign-3", "task"), ("unseen:nonce", "task")):
        with pytest.raises(ValueError, match=f"Unknown {unknown}"):
            load_dataset(f"openmoji/{spec}", "test")
