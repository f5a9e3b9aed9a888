"""Localisation against definitions written out for one latent and one concept at a time."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score, jaccard_score

from patchsae_utils.concepts import places
from patchsae_utils.concepts.detection import Activations, ConceptPatches
from patchsae_utils.concepts.places import concept_matrix, localize
from patchsae_utils.run.intervals import resamples
from patchsae_utils.sae.dictionary import Dictionary

PER_IMAGE = 8


def scenes(seed: int, n_images: int = 80) -> ConceptPatches:
    """Ten features, not negative: 0 finds object:a, 1 object:b of category:pet but for object:c, 2 object:c, 3 most of object:a's patches, 4 is dead,
    5 has many ties, the rest noise."""
    rng = np.random.default_rng(seed)
    n = n_images * PER_IMAGE
    images = np.repeat(np.arange(n_images), PER_IMAGE)
    show = rng.integers(0, 4, n_images)[images]  # each image shows a, b, c or nothing
    on = rng.random(n) < 0.5
    a, b, c = ((show == i) & on for i in range(3))
    masks = np.stack([a, b, c, a | b | c, np.zeros(n)], 1).astype(np.float32)
    x = rng.random((n, 10)) * (rng.random((n, 10)) < 0.3)
    strength = 1 + rng.random(n)
    x[:, 0] = a * strength
    x[:, 1] = (a | b) * strength
    x[:, 2] = c * strength
    x[:, 3] = a * (rng.random(n) < 0.65) * strength
    x[:, 4] = 0
    x[:, 5] = rng.integers(0, 3, n)
    names = ("object:a", "object:b", "object:c", "category:pet", "color:none")
    families = {"category:pet": ["object:a", "object:b", "object:c"], "category:empty": ["object:d"]}
    return ConceptPatches(torch.from_numpy(x).float(), images, sparse.csr_matrix(masks), names, families)


FEATURES = Dictionary("features", 10, lambda x, columns: x if columns is None else x[:, columns])


@pytest.fixture(scope="module")
def worlds():
    return scenes(0), scenes(1)


@pytest.fixture(scope="module")
def found(worlds):
    return localize(FEATURES, *worlds)


def test_matrix_is_scikit_learns_for_every_pair(worlds):
    data = worlds[0]
    matrix = concept_matrix(Activations(FEATURES, data))
    truth = data.masks.toarray() > 0
    assert np.isnan(matrix.ap[:, 4]).all() and (matrix.iou[:, 4] == 0).all()
    for s in range(10):
        h = data.tokens[:, s].numpy()
        for k in range(4):
            assert matrix.ap[s, k] == pytest.approx(average_precision_score(truth[:, k], h), abs=1e-6), (s, k)
            tried = {t: (truth[:, k] & (h >= t)).sum() / (truth[:, k] | (h >= t)).sum() for t in np.unique(h[h > 0])}
            best = max(tried.values(), default=0)
            assert matrix.iou[s, k] == pytest.approx(best, abs=1e-6), (s, k)
            if best > 0:
                assert jaccard_score(truth[:, k], h >= matrix.threshold[s, k]) == pytest.approx(best)
            else:
                assert np.isinf(matrix.threshold[s, k])


def test_thresholds_come_from_one_set_and_numbers_from_the_other(worlds, found):
    choose, report = worlds
    rows = found.concepts.set_index("concept")
    assert rows.index.tolist() == ["object:a", "object:b", "object:c", "category:pet"]
    assert rows.loc["object:a", ["latent", "ap", "pointing"]].tolist() == [0, 1, 1]
    assert 0.8 < rows.loc["object:a", "iou"] <= 1  # the threshold is the other scenes'
    assert rows.loc["category:pet", "latent"] == 1
    truth = report.masks.toarray() > 0
    for k, concept in enumerate(rows.index):
        row = rows.loc[concept]
        assert row["iou"] == pytest.approx(jaccard_score(truth[:, k], report.tokens[:, int(row["iou_latent"])].numpy() >= row["threshold"]))
        assert row["iou_choose"] == pytest.approx(
            jaccard_score(choose.masks.toarray()[:, k] > 0, choose.tokens[:, int(row["iou_latent"])].numpy() >= row["threshold"]), abs=1e-6
        )
        assert row["ap"] == pytest.approx(average_precision_score(truth[:, k], report.tokens[:, int(row["latent"])].numpy()))


def test_pointing_game_by_hand(worlds, found):
    report = worlds[1]
    for k, row in enumerate(found.concepts.itertuples()):
        h, mask = report.tokens[:, row.latent].numpy().reshape(-1, PER_IMAGE), report.masks.toarray()[:, k].reshape(-1, PER_IMAGE) > 0
        points, areas = [], []
        for scores, shown in zip(h, mask, strict=True):
            if shown.any():
                top = scores == scores.max()
                points.append((top & shown).sum() / top.sum() if scores.max() > 0 else 0)
                areas.append(shown.mean())
        assert row.pointing == pytest.approx(np.mean(points)) and row.pointing_chance == pytest.approx(np.mean(areas))


def test_intervals_are_of_weighted_images(worlds, found):
    """IoU and pointing when images are drawn again, written out image by image in float64."""
    report = worlds[1]
    (weights,) = resamples(report.n_images)
    truth = report.masks.toarray() > 0
    draws = {"iou": [], "pointing": []}
    for k, row in enumerate(found.concepts.itertuples()):
        marked = (report.tokens[:, row.iou_latent].numpy() >= row.threshold).reshape(-1, PER_IMAGE)
        shown = truth[:, k].reshape(-1, PER_IMAGE)
        h = report.tokens[:, row.latent].numpy().reshape(-1, PER_IMAGE)
        top = (h == h.max(1, keepdims=True)) & (h > 0)
        hit = (top & shown).sum(1) / np.maximum(top.sum(1), 1)
        draws["iou"].append((weights @ (marked & shown).sum(1)) / (weights @ (marked | shown).sum(1)))
        draws["pointing"].append((weights @ (hit * shown.any(1))) / (weights @ shown.any(1)))
    every = found.table().set_index("kind").loc["all"]
    for metric, values in draws.items():
        mean = np.nanmean(values, 0)
        low, high = np.percentile(mean, [2.5, 97.5]) + every[metric] - mean.mean()
        assert every[f"{metric}_low"] == pytest.approx(low) and every[f"{metric}_high"] == pytest.approx(high)
    assert f"IoU {every['iou']:.2f}" in found.sentence()


def test_a_class_that_its_categorys_latent_skips_is_absorbed(found, monkeypatch):
    frame = found.absorption().set_index("object")
    assert frame["skipped"].tolist() == [False, False, True] and frame.loc["c", "recall"] == 0
    assert frame.loc["c", "absorbed"] and frame.loc["c", "object_latent"] == 2 and not frame.loc["a", "absorbed"]
    assert frame["found"].tolist() == [True, True, False]
    assert (
        "1 of 1 categories have a latent of their own. Of their 3 classes it skips 1; another latent stands for 1 of these"
        in found.sharing()
    )
    monkeypatch.setattr(places, "MIN_SPECIAL_AP", 1.01)
    assert not found.absorption()["absorbed"].any() and found.absorption()["skipped"].sum() == 1
    monkeypatch.setattr(places, "MIN_RECALL", 1.01)
    assert not found.absorption()[["found", "skipped", "absorbed"]].any().any()


def test_matching_uses_each_latent_once_and_is_the_best_sum(found):
    match = found.matching()
    assert match["latent"].is_unique and match["concept"].tolist() == found.concepts["concept"].tolist()
    rows, columns = linear_sum_assignment(-found.matrix.ap)
    assert match["ap_choose"].sum() == pytest.approx(found.matrix.ap[rows, columns].sum())
    assert match.set_index("concept")["latent"].loc[["object:a", "object:c"]].tolist() == [0, 2]
    assert (match["ap_choose"] <= found.concepts["ap_choose"] + 1e-6).all()
