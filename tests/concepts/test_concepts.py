"""Ground truth: average precision as scikit-learn's, choice and report on different scenes, names with controls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import average_precision_score

from patchsae_utils.concepts import detection as module
from patchsae_utils.concepts.detection import (
    UNNAMED,
    detect_concepts,
    label_latents,
    load_report,
    measure_concepts,
    save_report,
    unique_names,
)
from patchsae_utils.concepts.grounding import ConceptPatches, average_precision, bootstrap_precision, concept_patches, concept_sums
from patchsae_utils.concepts.places import concept_examples
from patchsae_utils.data import load_dataset, openmoji
from patchsae_utils.latents.summary import LatentSummary
from patchsae_utils.sae.dictionary import Dictionary, dimensions, random_sae, sae_dictionary
from patchsae_utils.sae.model import ACTIVATIONS, SparseAutoencoder

LAYER = 1
PER_IMAGE = 10


def planted(seed: int, n_images: int = 60) -> ConceptPatches:
    """Twelve features: 0 finds object:a, 1 color:red with noise, 2 object:b on seed 0 and 3 elsewhere, 4 is dead, the rest noise."""
    rng = np.random.default_rng(seed)
    n = n_images * PER_IMAGE
    images = np.repeat(np.arange(n_images), PER_IMAGE)
    masks = np.zeros((n, 4), np.float32)
    for column, share in enumerate((0.3, 0.25, 0.4)):  # a concept is in some images, on half of their patches
        masks[:, column] = rng.permutation(np.arange(n_images) < share * n_images)[images] & (rng.random(n) < 0.5)
    masks[0, 3] = 1  # a concept in one image alone
    x = rng.random((n, 12)) * (rng.random((n, 12)) < 0.3)
    x[:, 0] = masks[:, 0] * (1 + rng.random(n))
    x[:, 1] = masks[:, 2] * 1.5 + rng.random(n)
    x[:, 2 if seed == 0 else 3] = masks[:, 1] * (1 + rng.random(n))
    x[:, 4] = 0
    names = ("object:a", "object:b", "color:red", "outline")
    return ConceptPatches(torch.from_numpy(x).float(), images, sparse.csr_matrix(masks), names)


IDENTITY = Dictionary("identity", 12, lambda x, columns: x if columns is None else x[:, columns])


# -- average precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "ties", "constant", "negative"])
@pytest.mark.parametrize("n_positive", [1, 7, 150])
def test_average_precision_is_scikit_learns(kind, n_positive):
    rng = np.random.default_rng(n_positive)
    scores = {
        "dense": rng.normal(size=400),
        "sparse": rng.exponential(size=400) * (rng.random(400) < 0.1),
        "ties": rng.integers(0, 4, 400).astype(float),
        "constant": np.zeros(400),
        "negative": -rng.integers(0, 4, 400).astype(float),
    }[kind]
    positive = rng.choice(400, n_positive, replace=False)
    truth = np.isin(np.arange(400), positive)
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_average_precision_without_positives_is_nan():
    assert np.isnan(average_precision(np.arange(5.0), np.array([], int)))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_weighted_precision_is_that_of_repeated_images(kind):
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(20), PER_IMAGE)
    scores = rng.normal(size=200) if kind == "dense" else rng.integers(0, 5, 200) * (rng.random(200) < 0.3) * 1.0
    positive = rng.choice(200, 31, replace=False)
    truth = np.isin(np.arange(200), positive)
    weights = np.stack([np.ones(20), *rng.multinomial(20, np.full(20, 0.05), 4)], 1).astype(float)
    found = bootstrap_precision(scores, positive, images, weights)
    expected = [average_precision_score(truth, scores, sample_weight=w[images]) for w in weights.T]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    coarse = bootstrap_precision(scores, positive, images, weights, n_levels=16)
    np.testing.assert_allclose(coarse, expected, atol=0.06)


def test_weights_that_hold_no_positive_give_nan():
    weights = np.array([[0.0, 1.0], [1.0, 1.0]])
    found = bootstrap_precision(np.array([1.0, 0.0]), np.array([0]), np.array([0, 1]), weights)
    assert np.isnan(found[0]) and found[1] == 1


# -- sums -------------------------------------------------------------------------------------------------------------------


def test_correlation_equals_numpys_and_is_zero_for_dead_latents():
    data = planted(0)
    sums, none = concept_sums(data, IDENTITY, chunk_rows=77)
    assert none is None
    dense = data.masks.toarray()
    for concept in range(4):
        for feature in range(12):
            expected = 0 if feature == 4 else np.corrcoef(dense[:, concept], data.tokens[:, feature])[0, 1]
            assert sums.correlation()[concept, feature] == pytest.approx(expected, abs=1e-6)


def test_shuffled_sums_pair_images_with_the_masks_of_others():
    data = planted(0)
    order = np.random.default_rng(0).permutation(data.n_images)
    _, shuffled = concept_sums(data, IDENTITY, shuffled=order, chunk_rows=77)
    moved = data.masks.toarray().reshape(data.n_images, PER_IMAGE, 4)[order].reshape(-1, 4)
    np.testing.assert_allclose(shuffled.am, moved.T @ data.tokens.numpy(), rtol=1e-5)


def test_dimensions_have_both_signs():
    x = torch.randn(5, 3)
    both = dimensions(3)
    torch.testing.assert_close(both.encode(x, None), torch.cat([x, -x], 1))
    torch.testing.assert_close(both.encode(x, np.array([4, 0])), torch.stack([-x[:, 1], x[:, 0]], 1))


def test_random_sae_has_the_size_but_not_the_weights(tiny_sae):
    control = random_sae(tiny_sae, seed=3)
    assert (control.d_in, control.d_sae) == (tiny_sae.d_in, tiny_sae.d_sae)
    torch.testing.assert_close(control.W_enc.norm(dim=0), torch.ones(control.d_sae))
    torch.testing.assert_close(control.b_dec.data, tiny_sae.b_dec.data)
    assert torch.equal(control.W_enc, random_sae(tiny_sae, seed=3).W_enc) and not torch.equal(
        control.W_enc, random_sae(tiny_sae, seed=4).W_enc
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_random_sae_is_as_sparse_as_the_sae_on_the_tokens_given(activation):
    sae = SparseAutoencoder(16, 64, activation, k=5 if activation in ("topk", "batchtopk", "matryoshka") else None, seed=1).requires_grad_(
        False
    )
    x = 3 * torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) + 1
    sae.b_dec.fill_(1.0)
    if activation in ("batchtopk", "matryoshka", "jumprelu"):
        sae.threshold.fill_(2.0)
    elif activation != "topk":
        sae.b_enc.fill_(-2.0)
    control = random_sae(sae, seed=3, tokens=x)
    ours, theirs = ((each.encode(x) > 0).float().sum(1).mean().item() for each in (sae, control))
    assert 0 < ours < 16 and theirs == pytest.approx(ours, rel=1e-3)
    assert control.activation == activation and (control.encode(x) >= 0).all()
    if activation in ("batchtopk", "matryoshka", "jumprelu", "gated"):
        with pytest.raises(ValueError, match=f"{activation!r} needs a threshold of its own: give tokens"):
            random_sae(sae)
        projections = (x - 1) @ control.W_enc
        active = control.encode(x) > 0
        torch.testing.assert_close(control.encode(x)[active], projections[active], rtol=1e-4, atol=1e-4)  # a threshold moves no value
    else:
        assert (random_sae(sae, seed=3).b_enc == 0).all()
    with pytest.raises(ValueError, match=r"tokens \[N, D\]"):
        random_sae(SparseAutoencoder(16, 64), tokens=x[:0])


def test_a_random_sae_of_a_silent_sae_is_silent():
    sae = SparseAutoencoder(6, 12, "jumprelu").requires_grad_(False)
    sae.threshold.fill_(1e6)
    x = torch.randn(50, 6)
    assert not random_sae(sae, tokens=x).encode(x).any()


@pytest.mark.parametrize("activation, k", [("relu", None), ("topk", 3)])
def test_a_dictionary_reads_single_latents_as_all_of_them(activation, k):
    sae = SparseAutoencoder(6, 20, activation, k=k).requires_grad_(False)
    x, read = torch.randn(9, 6), sae_dictionary(sae)
    torch.testing.assert_close(read.encode(x, np.array([7, 2])), read.encode(x, None)[:, [7, 2]])


# -- detection --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    return detect_concepts([IDENTITY, dimensions(12)], planted(0), planted(1), n_bootstrap=50, progress=False)


def test_the_latent_is_chosen_on_one_split_and_reported_on_the_other(report):
    mine = report.detection[report.detection["dictionary"] == "identity"].set_index("concept")
    assert mine.loc["object:a", ["latent", "ap", "ap_choose"]].tolist() == [0, 1, 1]
    assert mine.loc["object:b", "latent"] == 2 and mine.loc["object:b", "ap_choose"] == 1
    assert mine.loc["object:b", "ap"] < 0.4  # on the reported scenes feature 3 would have been perfect
    data = planted(1)
    rows = data.masks[:, [1]].nonzero()[0]
    assert mine.loc["object:b", "ap"] == pytest.approx(average_precision(data.tokens[:, 2].numpy(), rows))
    assert mine.loc["object:b", "chance"] == pytest.approx(len(rows) / len(data.tokens))
    assert mine.loc["object:b", "n_patches"] == len(rows) and mine.loc["object:b", "n_images"] == len(np.unique(data.images[rows]))


def test_concepts_in_too_few_images_are_left_out(report):
    assert "outline" not in set(report.detection["concept"])
    with pytest.raises(ValueError, match="No concept is shown by 50 images"):
        detect_concepts([IDENTITY], planted(0), planted(1), min_images=50, progress=False)


def test_a_few_candidates_find_what_all_would():
    choose, held_out = planted(0), planted(1)
    few, every = (detect_concepts([IDENTITY], choose, held_out, n_candidates=n, n_bootstrap=2, progress=False) for n in (3, 12))
    assert few.detection["latent"].tolist() == every.detection["latent"].tolist()
    for row in every.detection.itertuples():
        rows = choose.masks[:, [choose.names.index(row.concept)]].nonzero()[0]
        best = max(average_precision(choose.tokens[:, f].numpy(), rows) for f in range(12))
        assert row.ap_choose == pytest.approx(best)


def test_table_and_ratio_hold_the_means_and_intervals_around_them(report):
    table = report.table().set_index(["dictionary", "kind"])
    objects = report.detection.query("dictionary == 'identity' and kind == 'object'")
    assert table.loc[("identity", "object"), "ap"] == pytest.approx(objects["ap"].mean())
    assert table.loc[("identity", "object"), "n_concepts"] == 2
    assert (table["low"] <= table["ap"] + 1e-9).all() and (table["high"] >= table["ap"] - 1e-9).all()
    ratio = report.ratio("object")
    assert ratio["baseline"] == "single dimensions"
    assert (
        ratio["ratio"] == pytest.approx(1) and ratio["low"] == pytest.approx(1) and ratio["high"] == pytest.approx(1)
    )  # the same features


def test_headline_holds_the_ratio(report):
    found = report.headline("object")
    assert found["mean_object_ap_best_dimension"] == pytest.approx(found["mean_object_ap_identity"])
    assert found["ap_ratio_to_best_baseline"] == pytest.approx(report.ratio("object")["ratio"])


def test_coverage_counts_concepts_that_are_found(report):
    mine = report.coverage(0.5).set_index("dictionary").loc["identity"]
    expected = (report.detection.query("dictionary == 'identity'")["ap"] > 0.5).mean()
    assert (
        mine["n_concepts"] == 3
        and mine["share"] == expected == pytest.approx(2 / 3)
        and mine["low"] - 1e-9 <= expected <= mine["high"] + 1e-9
    )


def test_report_survives_the_disk(report, tmp_path):
    save_report(report, tmp_path / "r", "abc")
    again = load_report(tmp_path / "r")
    pd.testing.assert_frame_equal(again.detection, report.detection)
    pd.testing.assert_frame_equal(again.latents, report.latents)
    np.testing.assert_array_equal(again.replicates, report.replicates)
    (tmp_path / "r" / "latents.csv").unlink()
    with pytest.raises(FileNotFoundError, match="latents.csv missing"):
        load_report(tmp_path / "r")


# -- the embedded world -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return [load_dataset("openmoji/tools", split, n_images=76) for split in ("val", "test")]


def test_patches_carry_the_ground_truth(tiny_clip, scenes):
    patches = concept_patches(tiny_clip, scenes[0], LAYER, batch_size=7, progress=False)
    assert patches.tokens.shape == (76 * 196, tiny_clip.width) and patches.n_images == 76
    for i in (0, 13):
        rows = slice(i * 196, (i + 1) * 196)
        expected = openmoji.concept_masks(scenes[0].truth(i)).reshape(len(patches.names), -1).T
        np.testing.assert_array_equal(patches.masks[rows].toarray() > 0, expected)
        residual = tiny_clip.residual(tiny_clip.preprocess(scenes[0][i].image)[None], LAYER)[0, 1:]
        torch.testing.assert_close(patches.tokens[rows], residual, rtol=1e-4, atol=1e-4)


def test_data_without_ground_truth_is_refused(tiny_clip):
    bare = type("Bare", (), {"spec": "my/photos"})()
    with pytest.raises(ValueError, match="'my/photos' has no ground truth"):
        concept_patches(tiny_clip, bare, LAYER)


def test_measurement_on_scenes(tiny_clip, tiny_sae, scenes, tmp_path, monkeypatch):
    settings = {"n_bootstrap": 10, "progress": False, "out": tmp_path / "r"}
    concept_patches_of_before = module.concept_patches
    found = measure_concepts(tiny_clip, tiny_sae, *scenes, LAYER, **settings)
    assert set(found.detection["dictionary"]) == {"SAE", "single dimensions", "random SAE"}
    assert {"object", "background", "color", "outline"} <= set(found.detection["kind"])
    assert found.detection["ap"].between(0, 1).all() and found.replicates.shape == (len(found.detection), 10)
    monkeypatch.setattr(module, "concept_patches", lambda *_, **__: pytest.fail("the scenes were read again"))
    again = measure_concepts(tiny_clip, tiny_sae, *scenes, LAYER, **settings)
    pd.testing.assert_frame_equal(again.detection, found.detection)
    patches = [concept_patches_of_before(tiny_clip, each, LAYER, progress=False) for each in scenes]
    alone = measure_concepts(tiny_clip, tiny_sae, *scenes, LAYER, baselines=False, patches=patches, n_bootstrap=10, progress=False)
    mine = found.detection[found.detection["dictionary"] == "SAE"]
    pd.testing.assert_frame_equal(alone.detection, mine, check_dtype=False)
    pd.testing.assert_frame_equal(alone.latents, found.latents)
    with pytest.raises(ValueError, match="read these scenes"):
        measure_concepts(tiny_clip, tiny_sae, *scenes, LAYER, patches=[patches[0], planted(0)], progress=False)
    wanted = ["outline", found.detection["concept"].iloc[0]]
    for example in concept_examples(tiny_clip, tiny_sae, scenes[1], LAYER, found, wanted):
        column = openmoji.concept_names().index(example.concept)
        most = max(openmoji.concept_masks(scenes[1].truth(i))[column].sum() for i in range(76))
        assert example.truth.sum() == most and example.activation.shape == (14, 14) and example.image.shape == (112, 112, 3)
    with pytest.raises(ValueError, match="no concept 'object:unicorn rider'"):
        concept_examples(tiny_clip, tiny_sae, scenes[1], LAYER, found, ["object:unicorn rider"])


def test_choosing_and_reporting_on_the_same_scenes_is_refused(tiny_clip, tiny_sae, scenes):
    with pytest.raises(ValueError, match="Give two splits"):
        measure_concepts(tiny_clip, tiny_sae, scenes[0], load_dataset("openmoji/all", "val", n_images=8), LAYER)


# -- names --------------------------------------------------------------------------------------------------------------------


def summary_of(hits: np.ndarray, class_images: list[int], class_names: list[str]) -> LatentSummary:
    hits = torch.as_tensor(hits, dtype=torch.float32)
    n = hits.shape[1]
    active = hits.sum(0)
    zeros = torch.zeros(n, 2)
    return LatentSummary(
        frequency=active / sum(class_images), mean_activation=(active > 0).float(), label_entropy=zeros[:, 0], label_std=zeros[:, 0],
        top_images=zeros.long() - 1, top_values=zeros, top_labels=zeros.long() - 1, class_counts=hits * 3, class_hits=hits,
        class_images=torch.tensor(class_images), dead=active == 0, class_names=tuple(class_names), tau=0.2, tokens="all",
    )  # fmt: skip


def test_names_from_ground_truth(report):
    hits = np.ones((2, 12))
    hits[:, 4] = 0
    names = label_latents(summary_of(hits, [5, 5], ["x", "y"]), report, max_p=0.1).set_index("latent")
    assert names.loc[0, ["name", "kind"]].tolist() == ["a", "object"] and names.loc[0, "score"] == pytest.approx(0.93, abs=0.1)
    assert names.loc[1, ["name", "kind"]].tolist() == ["red", "color"]
    assert names.loc[2, "name"] == UNNAMED  # it found object:b on the first scenes only
    assert names.loc[4, ["name", "kind", "score", "p"]].tolist() == [UNNAMED, "dead", 0, 1]
    assert not names.isna().any().any() and (names.loc[5:, "name"] == UNNAMED).mean() >= 0.8
    assert names.loc[0, "margin"] > 0.5


def test_a_report_of_another_sae_is_refused(report):
    with pytest.raises(ValueError, match="3 latents, the report 12"):
        label_latents(summary_of(np.ones((2, 3)), [5, 5], ["x", "y"]), report)


def test_names_from_labels_are_lift_over_the_base_rate():
    class_images = [10, 10, 1, 19]
    hits = np.array([
        # own class, everywhere, one-image class, dead, weak
        [9, 10, 0, 0, 2],
        [0, 10, 0, 0, 1],
        [0, 1, 1, 0, 0],
        [1, 19, 0, 0, 1],
    ])  # fmt: skip
    names = label_latents(summary_of(hits, class_images, ["missile", "crane", "dog", "crane"])).set_index("latent")
    assert names.loc[0, ["name", "kind", "class_index"]].tolist() == ["missile", "class", 0]
    assert names.loc[0, "score"] == pytest.approx((9 / 10) / (10 / 40)) and names.loc[0, "margin"] == pytest.approx(
        3.6 - (1 / 10) / (19 / 40)
    )
    assert names.loc[1, "name"] == UNNAMED  # active in every image: lift 1
    assert names.loc[2, "name"] == UNNAMED  # one image of one: a lift of 40 that chance gives often
    assert names.loc[3, "kind"] == "dead" and names.loc[4, "name"] == UNNAMED
    assert not names.isna().any().any()


def test_a_single_class_has_no_runner_up():
    names = label_latents(summary_of(np.array([[3, 0]]), [4], ["only"]))
    assert names["name"].tolist() == [UNNAMED, UNNAMED] and (names["runner_up"] == "").all()


def test_classes_of_equal_name_are_told_apart():
    assert unique_names(["missile", "dog", "missile"]).tolist() == ["missile (0)", "dog", "missile (2)"]
    hits = np.array([[0, 9], [9, 0], [0, 0]])
    names = label_latents(summary_of(hits, [10, 10, 10], ["crane", "crane", "dog"]))
    assert names["name"].tolist() == ["crane (1)", "crane (0)"]
