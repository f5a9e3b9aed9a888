"""Monosemanticity against the sum over pairs, localisation against definitions written out for one latent and one concept at a time."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score, jaccard_score

from patchsae_utils.concepts.grounding import ConceptPatches
from patchsae_utils.concepts.names import embed_images
from patchsae_utils.concepts.places import absorption, concept_matrix, localize, match_latents, splitting
from patchsae_utils.data import load_dataset
from patchsae_utils.latents import reading as latents
from patchsae_utils.latents.likeness import Likeness, LikenessPass, monosemanticity, monosemanticity_scores, stream_scores
from patchsae_utils.latents.reading import read_latents, summarize_latents
from patchsae_utils.sae.dictionary import Dictionary, random_sae

PER_IMAGE = 8


def by_pairs(a: np.ndarray, e: np.ndarray) -> float:
    """The definition: all ordered pairs of different images, in float64."""
    above = below = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            if i != j:
                above += a[i] * a[j] * (e[i] @ e[j])
                below += a[i] * a[j]
    return above / below if below > 0 else np.nan


def unit(rng, n, d=5):
    e = rng.normal(size=(n, d))
    return e / np.linalg.norm(e, axis=1, keepdims=True)


# -- the score --------------------------------------------------------------------------------------------------------------


def test_score_is_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    a, e = rng.exponential(size=(20, 9)) * (rng.random((20, 9)) < 0.5), unit(rng, 20)
    a[:, 0] = 0  # dead
    a[1:, 1], a[0, 1] = 0, 2.0  # one image alone
    a[:, 2] = 1.0  # always, equally
    found = monosemanticity_scores(torch.from_numpy(a), torch.from_numpy(e)).numpy()
    expected = np.array([by_pairs(a[:, s], e) for s in range(9)])
    assert np.isnan(found[:2]).all() and not np.isnan(found[2:]).any()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_score_does_not_depend_on_scale_or_batches():
    rng = np.random.default_rng(1)
    a, e = torch.from_numpy(rng.random((30, 6))).float(), torch.from_numpy(unit(rng, 30)).float()
    whole = monosemanticity_scores(a, e)
    torch.testing.assert_close(monosemanticity_scores(a * 1e3, e), whole, rtol=1e-5, atol=1e-6)
    (parts,) = stream_scores(zip(a.split(7), e.split(7), strict=True))
    torch.testing.assert_close(parts, whole)


def test_one_kind_of_image_scores_one_and_a_tiny_second_image_decides_nothing():
    e = torch.eye(3)[[0, 0, 1, 2]]
    a = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 1e-13], [0.0, 0.0]])
    found = monosemanticity_scores(a, e)
    assert float(found[0]) == pytest.approx(1) and bool(found[1].isnan())


def test_bad_input_is_refused():
    good, e = torch.ones(3, 2), torch.eye(3)
    with pytest.raises(ValueError, match="unit norm"):
        monosemanticity_scores(good, 2 * e)
    with pytest.raises(ValueError, match="not be negative"):
        monosemanticity_scores(-good, e)
    with pytest.raises(ValueError, match="same images"):
        monosemanticity_scores(good, e[:2])
    with pytest.raises(ValueError, match="got none"):
        stream_scores([])


def test_over_a_data_set_with_a_shuffled_control(tiny_clip, tiny_sae, tiny_dataset):
    embeddings = embed_images(tiny_clip, tiny_dataset, progress=False)
    frame = monosemanticity(tiny_clip, tiny_sae, tiny_dataset, 1, embeddings=embeddings, batch_size=7, progress=False)
    h = torch.cat([h for _, _, h in read_latents(tiny_clip, tiny_sae, tiny_dataset, 1)]).mean(1).detach().double().numpy()
    order = np.random.default_rng(0).permutation(len(tiny_dataset))
    e = embeddings.double().numpy()
    for s in range(0, tiny_sae.d_sae, 9):
        np.testing.assert_allclose(
            frame.loc[s, ["score", "shuffled"]].astype(float), [by_pairs(h[:, s], e), by_pairs(h[:, s], e[order])], atol=1e-6
        )
    assert frame["n_images"].tolist() == (h > 0).sum(0).tolist()
    with pytest.raises(ValueError, match="24 images need as many"):
        monosemanticity(tiny_clip, tiny_sae, tiny_dataset, 1, embeddings=embeddings[:3])
    with pytest.raises(ValueError, match="Unknown pooling"):
        monosemanticity(tiny_clip, tiny_sae, tiny_dataset, 1, pooling="sum")


def test_a_planted_concept_scores_above_its_shuffle():
    rng = np.random.default_rng(2)
    centre = np.eye(8)[rng.integers(0, 4, 200)]
    e = centre + 0.2 * rng.normal(size=centre.shape)
    e = torch.from_numpy(e / np.linalg.norm(e, axis=1, keepdims=True))
    a = torch.from_numpy(np.stack([centre[:, 0], rng.random(200)], 1))
    real, control = stream_scores([(a, e, e[torch.from_numpy(rng.permutation(200))])])
    assert real[0] > control[0] + 0.4 and abs(real[1] - control[1]) < 0.05


def test_the_statistics_pass_scores_latents_and_controls(tiny_clip, tiny_sae, tiny_dataset, tmp_path, monkeypatch):
    """Every kind of feature against all pairs of images in float64, from one pass over the images; the summary is what it is without."""
    sae = copy.deepcopy(tiny_sae).requires_grad_(False)
    sae.b_enc.fill_(-0.5)
    sae.b_enc[[3, 9]] = -1e6  # dead
    settings = dict(batch_size=7, progress=False)
    plain = summarize_latents(tiny_clip, sae, tiny_dataset, 1, **settings)
    summary = summarize_latents(tiny_clip, sae, tiny_dataset, 1, likeness=tmp_path / "l", **settings)
    assert torch.equal(plain.top_images, summary.top_images) and torch.equal(plain.class_counts, summary.class_counts)
    found = Likeness.load(tmp_path / "l")
    torch.testing.assert_close(found.embeddings, embed_images(tiny_clip, tiny_dataset, progress=False), rtol=1e-4, atol=1e-5)
    e = found.embeddings.double().numpy()
    tokens = torch.stack([tiny_clip.residual(tiny_clip.preprocess(example.image)[None], 1)[0] for example in tiny_dataset]).detach()
    control = random_sae(sae, 0, tokens[:7].flatten(0, 1))
    centred = tokens - sae.b_dec
    means = {
        "SAE": sae.encode(tokens), "random directions": control.encode(tokens), "single dimensions": torch.cat([centred, -centred], -1).relu(),
    }  # fmt: skip
    assert found.table["dictionary"].unique().tolist() == list(means)
    for name, h in means.items():
        a, rows = h.double().mean(1).numpy(), found.table[found.table["dictionary"] == name].reset_index(drop=True)
        assert rows["latent"].tolist() == list(range(a.shape[1])) and rows["n_images"].tolist() == (a > 0).sum(0).tolist()
        for s in [*range(0, a.shape[1], 9), 3]:
            assert rows.loc[s, "score"] == pytest.approx(by_pairs(a[:, s], e), abs=1e-5, nan_ok=True), (name, s)
    assert found.table.query("dictionary == 'SAE'")["score"].isna().to_numpy()[[3, 9]].all()
    assert found.chance == pytest.approx(by_pairs(np.ones(len(e)), e))  # every pair alike
    monkeypatch.setattr(latents, "batches", lambda *_, **__: pytest.fail("the images were read again"))
    with pytest.raises(pytest.fail.Exception):
        summarize_latents(tiny_clip, sae, tiny_dataset, 1, likeness=tmp_path / "l", **settings)  # the summary itself was not kept


def test_what_was_made_before_is_opened_and_what_is_missing_made_alone(tiny_clip, tiny_sae, tiny_dataset, tmp_path, monkeypatch):
    settings = dict(out=tmp_path / "s", batch_size=7, progress=False)
    first = summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, **settings)
    with pytest.raises(FileNotFoundError, match="lacks monosemanticity.csv"):
        Likeness.load(tmp_path / "l")
    again = summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, likeness=tmp_path / "l", **settings)
    assert torch.equal(first.top_images, again.top_images) and len(Likeness.load(tmp_path / "l").embeddings) == 24
    monkeypatch.setattr(latents, "batches", lambda *_, **__: pytest.fail("the images were read again"))
    summarize_latents(tiny_clip, tiny_sae, tiny_dataset, 1, likeness=tmp_path / "l", **settings)


def test_images_that_were_not_read_are_missed(tiny_clip, tiny_sae, tiny_images):
    watch = LikenessPass(tiny_clip, tiny_sae, 1, 9)
    with torch.no_grad():
        watch.read(tiny_clip.run_to(tiny_images, 1), torch.arange(8))
    with pytest.raises(ValueError, match="1 of 9 images were not read"):
        watch.finish()


# -- localisation -------------------------------------------------------------------------------------------------------------


def scenes(seed: int, n_images: int = 40) -> ConceptPatches:
    """Ten features, not negative: 0 finds object:a, 1 object:b of category:pet but for object:c, 2 object:c, 3 half of object:a's patches, 4 is dead,
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
    x[:, 3] = a * (rng.random(n) < 0.5) * strength
    x[:, 4] = 0
    x[:, 5] = rng.integers(0, 3, n)
    names = ("object:a", "object:b", "object:c", "category:pet", "color:none")
    return ConceptPatches(torch.from_numpy(x).float(), images, sparse.csr_matrix(masks), names)


FEATURES = Dictionary("features", 10, lambda x, columns: x if columns is None else x[:, columns])


@pytest.fixture(scope="module")
def worlds():
    return scenes(0), scenes(1)


@pytest.fixture(scope="module")
def found(worlds):
    return localize(FEATURES, *worlds, min_patches=5, n_bootstrap=60)


def test_matrix_is_scikit_learns_for_every_pair(worlds):
    data = worlds[0]
    matrix = concept_matrix(data, FEATURES, block=3)
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


def test_negative_features_are_refused(worlds):
    with pytest.raises(ValueError, match="negative activations"):
        concept_matrix(worlds[0], Dictionary("minus", 10, lambda x, c: -x if c is None else -x[:, c]))


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


def test_resamples_are_the_statistics_of_weighted_images(worlds, found):
    """IoU and pointing under the bootstrap's weights, written out image by image in float64."""
    report = worlds[1]
    weights = np.random.default_rng(0).standard_exponential((report.n_images, 60))
    truth = report.masks.toarray() > 0
    for k, row in enumerate(found.concepts.itertuples()):
        marked = (report.tokens[:, row.iou_latent].numpy() >= row.threshold).reshape(-1, PER_IMAGE)
        shown = truth[:, k].reshape(-1, PER_IMAGE)
        h = report.tokens[:, row.latent].numpy().reshape(-1, PER_IMAGE)
        for r in (0, 17, 59):
            both = either = hits = seen = 0.0
            for image, weight in enumerate(weights[:, r]):
                both += weight * (marked[image] & shown[image]).sum()
                either += weight * (marked[image] | shown[image]).sum()
                if shown[image].any():
                    top = (h[image] == h[image].max()) & (h[image] > 0)
                    hits += weight * ((top & shown[image]).sum() / top.sum() if top.any() else 0)
                    seen += weight
            assert found.replicates["iou"][k, r] == pytest.approx(both / either)
            assert found.replicates["pointing"][k, r] == pytest.approx(hits / seen)


def test_table_has_means_and_intervals_around_them(found):
    table = found.table().set_index("kind")
    assert table.index.tolist() == ["object", "category", "all"] and table.loc["all", "n_concepts"] == 4
    assert table.loc["object", "iou"] == pytest.approx(found.concepts.query("kind == 'object'")["iou"].mean())
    for metric in ("iou", "pointing"):
        assert (table[f"{metric}_low"] <= table[metric] + 1e-9).all() and (table[metric] <= table[f"{metric}_high"] + 1e-9).all()
    assert table.loc["all", "iou_low"] < table.loc["all", "iou_high"]


def test_splitting_counts_latents_whose_best_concept_it_is(found):
    shared = splitting(found, share=0.55, min_ap=0.2).set_index("concept")["n_latents"]
    assert shared["object:a"] == 2 and shared["object:c"] == 1 and shared["category:pet"] == 1
    assert splitting(found, share=1.0).set_index("concept")["n_latents"]["object:a"] == 1


def test_a_class_that_its_categorys_latent_skips_is_absorbed(worlds, found):
    frame = absorption(found, FEATURES, worlds[1], members={"pet": ["a", "b", "c"], "empty": ["d"]}).set_index("object")
    assert frame["skipped"].tolist() == [False, False, True] and frame.loc["c", "recall"] == 0
    assert frame.loc["c", "absorbed"] and frame.loc["c", "object_latent"] == 2 and not frame.loc["a", "absorbed"]
    assert frame["found"].tolist() == [True, True, False]
    nobody = absorption(found, FEATURES, worlds[1], members={"pet": ["a", "b", "c"]}, min_recall=1.01)
    assert not nobody[["found", "skipped", "absorbed"]].any().any()
    high = absorption(found, FEATURES, worlds[1], members={"pet": ["a", "b", "c"]}, min_ap=1.01)
    assert not high["absorbed"].any() and high["skipped"].sum() == 1


def test_matching_uses_each_latent_once_and_is_the_best_sum(worlds, found):
    match = match_latents(found, FEATURES, worlds[1])
    assert match["latent"].is_unique and match["concept"].tolist() == found.concepts["concept"].tolist()
    rows, columns = linear_sum_assignment(-found.matrix.ap)
    assert match["ap_choose"].sum() == pytest.approx(found.matrix.ap[rows, columns].sum())
    assert match.set_index("concept")["latent"].loc[["object:a", "object:c"]].tolist() == [0, 2]
    assert (match["ap_choose"] <= found.concepts["ap_choose"] + 1e-6).all()


def test_real_scenes_through_an_sae(tiny_clip, tiny_sae):
    from patchsae_utils.concepts.grounding import concept_patches
    from patchsae_utils.sae.dictionary import sae_dictionary

    data = [concept_patches(tiny_clip, load_dataset("openmoji/tools", split, n_images=38), 1, progress=False) for split in ("val", "test")]
    found = localize(sae_dictionary(tiny_sae), *data, min_images=1, n_bootstrap=5)
    assert found.concepts["iou"].between(0, 1).all() and found.concepts["pointing"].between(0, 1).all()
    assert isinstance(absorption(found, sae_dictionary(tiny_sae), data[1]), pd.DataFrame)
    assert match_latents(found, sae_dictionary(tiny_sae), data[1])["latent"].is_unique
    with pytest.raises(ValueError, match="No concept is shown by 99 images"):
        localize(sae_dictionary(tiny_sae), *data, min_images=99)
