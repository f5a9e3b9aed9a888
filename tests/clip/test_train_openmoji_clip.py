"""The small CLIP's training: its schedule, its patch terms, and that the shipped weights are the ones the log describes."""

import csv

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from experiments import train_openmoji_clip as train
from patchsae_utils.clip.loading import EMBEDDED
from patchsae_utils.data import openmoji


def test_the_shipped_weights_are_those_of_the_logs_last_row():
    path = EMBEDDED / "open_clip_model.safetensors"
    assert path.stat().st_size <= 20e6
    with (EMBEDDED / "training_log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    with safe_open(path, "pt") as weights:
        assert weights.metadata()["scenes"] == last["scenes"] == str(sum(phase.scenes for phase in train.PHASES))
        assert set(weights.keys()) == set(train.build_model().state_dict())


def test_balanced_owner_loss_weighs_objects_by_themselves():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    owner = torch.tensor([0, 4, 5, 6, 5, 6, 5, -100, -100])  # classes 0 to 4, backgrounds 5 and 6, mixed
    objects, backgrounds = F.cross_entropy(logits[:2], owner[:2]), F.cross_entropy(logits[2:7], owner[2:7])
    expected = objects + train.BACKGROUND_WEIGHT * backgrounds
    torch.testing.assert_close(train.owner_loss(logits, owner, 5, balanced=True), expected)
    torch.testing.assert_close(train.owner_loss(logits, owner, 5, balanced=False), F.cross_entropy(logits[:7], owner[:7]))


def test_captions_are_seeded_and_name_by_tier():
    table = openmoji.class_table()
    named = {tier: [] for tier in train.NAMED_SHARE}
    for index in range(600):
        drawn = openmoji.draw_scene(openmoji.scene_rng(0, "train", index), index % len(table))
        text = train.caption(drawn, openmoji.scene_rng(0, "train", index, stream=1))
        assert text == train.caption(drawn, openmoji.scene_rng(0, "train", index, stream=1))
        assert text.endswith(".")
        row = table.iloc[index % len(table)]
        named[row["tier"]].append(row["name"] in text)
    common, occasional, rare = (np.mean(named[tier]) for tier in ("common", "occasional", "rare"))
    assert common > 0.9 and 0.3 < occasional < 0.65 and rare < 0.15
