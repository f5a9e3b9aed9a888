"""Masks and edits: exact, blind to labels, and the same for adapted models.

Traps of PAPER.md section 4 that belong here, and their tests:

1  masking an adapted model crashes            test_traps_1_and_4_adapted_models_run_and_their_prompts_are_left_alone
2  a constant bias is added in masking         test_trap_2_masking_adds_no_constant
3  oracle masks leak the label                 test_trap_3_only_the_oracle_reads_evaluation_labels
4  prompt tokens leak into means and counts    test_traps_1_and_4_..., test_the_sae_never_sees_prompt_tokens
12 averaged text features not renormalised     test_trap_12_the_head_is_renormalised_after_averaging_templates
16 accuracies only with the reconstruction     test_trap_16_raw_reconstructed_and_error_kept_stand_side_by_side

Trap 13 (classes keyed by name): test_rows_for_each_class_keep_equal_names_apart.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchsae_utils.clip.model import Residual
from patchsae_utils.data import load_dataset
from patchsae_utils.interventions.effects import (
    concept_latents,
    dose_response,
    object_patches,
    rank_latents,
    remove_objects,
    specificity,
    summarize_effects,
    two_object_scenes,
)
from patchsae_utils.interventions.masks import CHOICES, bootstrap_mean, dataset_head, match_by_weight, network_tail, sweep_masks
from patchsae_utils.interventions.steering import Edit, steer

LAYER = -2


@pytest.fixture(scope="module")
def counts(tiny_dataset, tiny_sae):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 50, (len(tiny_dataset.class_names), tiny_sae.d_sae), generator=generator).float()


@pytest.fixture(scope="module")
def head(tiny_clip, tiny_dataset):
    return dataset_head(tiny_clip, tiny_dataset)


@pytest.fixture(scope="module")
def sae(tiny_sae):
    """With a bias on either side, so that forgetting one shows."""
    from patchsae_utils.sae.model import SparseAutoencoder

    sae = SparseAutoencoder(tiny_sae.d_in, tiny_sae.d_sae, seed=0)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(sae.d_in, generator=torch.Generator().manual_seed(1)))
        sae.b_enc.copy_(0.1 * torch.randn(sae.d_sae, generator=torch.Generator().manual_seed(2)))
    return sae


@pytest.fixture(scope="module")
def maple(tiny_clip):
    from patchsae_utils.adaptation.adapters import MaPLe

    return MaPLe(tiny_clip, n_ctx=2, depth=2)


class Relabelled:
    """A data set with other labels on the same pictures."""

    def __init__(self, dataset, labels):
        self.dataset, self.labels = dataset, torch.as_tensor(labels)
        self.class_names, self.spec, self.split = dataset.class_names, dataset.spec, dataset.split

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]._replace(label=int(self.labels[i]))


class Recorder:
    """A model that remembers every residual stream it is asked to finish."""

    def __init__(self, clip):
        self._clip, self.seen = clip, []

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def finish(self, residual, layer):
        self.seen.append(residual)
        return self._clip.finish(residual, layer)


def images_of(clip, dataset):
    return torch.stack([clip.preprocess(dataset[i].image) for i in range(len(dataset))])


def sweep(clip, sae, dataset, ks, **options):
    return sweep_masks(clip, sae, dataset, ks, n_bootstrap=50, progress=False, **{"layer": LAYER, **options})


def row(table, **where):
    chosen = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(chosen) == 1
    return chosen.iloc[0]


# -- exactness --------------------------------------------------------------------------------------------------------


def test_sparse_edits_equal_dense_masks(tiny_clip, sae, tiny_dataset, counts, head):
    """Every k, mode, place and error setting, against masks multiplied in full and a dense decode."""
    ks = [0, 1, 7, 30, sae.d_sae]
    table = sweep(
        tiny_clip, sae, tiny_dataset, ks, choose=["oracle", "dataset"], class_counts=counts, head=head,
        keep_error=[True, False], where=["all", "cls", "patches"], batch_size=10,
    )  # fmt: skip
    z = tiny_clip.residual(images_of(tiny_clip, tiny_dataset), LAYER)
    with torch.no_grad():
        h = sae.encode(z)
        error = z - sae.decode(h)
        for choose in ("oracle", "dataset"):
            order = (counts[tiny_dataset.labels] if choose == "oracle" else counts.sum(0).expand(len(z), -1)).argsort(
                dim=1, descending=True, stable=True
            )
            for k in ks:
                top = torch.zeros(len(z), sae.d_sae).scatter_(1, order[:, :k], 1.0)[:, None]
                for mode, mask in (("on", top), ("off", 1 - top)):
                    for where, places in (("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))):
                        masked = h.clone()
                        masked[:, places] *= mask
                        for keep in (True, False):
                            tokens = sae.decode(masked) + (error if keep else 0)
                            logits = tiny_clip.logits(tiny_clip.finish(tokens, LAYER), head).gather(1, tiny_dataset.labels[:, None])
                            found = row(table, choose=choose, mode=mode, k=k, where=where, error="kept" if keep else "dropped")
                            assert found["logit"] == pytest.approx(logits.mean().item(), abs=2e-3)


@pytest.mark.parametrize("kind", ["base", "maple"])
def test_identity_mask_with_the_error_kept_changes_no_logit(kind, tiny_clip, maple, sae, tiny_images, head):
    clip = maple if kind == "maple" else tiny_clip
    steered = steer(clip, sae, tiny_images, [], LAYER, head, keep_error=True)
    torch.testing.assert_close(steered.logits, clip.logits(clip.encode_image(tiny_images), head), rtol=0, atol=1e-5)
    identity = steer(clip, sae, tiny_images, [Edit(4, "scale", 1.0), Edit(9, "add", 0.0)], LAYER, head)
    torch.testing.assert_close(identity.logits, steered.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [-2, -3])
@pytest.mark.parametrize("kind", ["base", "maple-1", "maple-2", "maple-3", "coop", "vpt-1", "vpt-3"])
def test_identity_is_exact_for_every_model_and_adapter(kind, layer, tiny_clip, sae, tiny_dataset, tiny_images, head):
    """Every logit of every image: nothing masked with the error kept, everything kept on, and a steer without edits."""
    from patchsae_utils.adaptation.adapters import CoOp, MaPLe, VisualPrompt

    name, _, depth = kind.partition("-")
    kinds = {
        "maple": lambda: MaPLe(tiny_clip, 2, int(depth)),
        "coop": lambda: CoOp(tiny_clip, 2),
        "vpt": lambda: VisualPrompt(tiny_clip, 3, int(depth)),
    }
    clip = Recorder(kinds[name]() if depth or name == "coop" else tiny_clip)
    counts = torch.rand(len(head), sae.d_sae, generator=torch.Generator().manual_seed(0))
    options = {"choose": "dataset", "class_counts": counts, "head": head, "keep_error": True, "layer": layer, "batch_size": 8}
    logits = []
    clip_logits = clip._clip.logits
    clip.logits = lambda features, rows: logits.append(clip_logits(features, rows)) or logits[-1]
    sweep(clip, sae, _First(tiny_dataset, 8), [0, sae.d_sae], **options)
    raw, _, error_kept, on_0, off_0, on_all, off_all = logits
    expected = clip_logits(clip.encode_image(tiny_images), head)
    for found in (raw, error_kept, off_0):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * clip.logit_scale)
    torch.testing.assert_close(on_all, expected, rtol=0, atol=2e-4 * clip.logit_scale)
    torch.testing.assert_close(on_0, off_all, rtol=0, atol=2e-4 * clip.logit_scale)
    assert (on_0 - expected).abs().max() > 0.1
    assert torch.equal(
        steer(clip._clip, sae, tiny_images, [], layer, head).logits_before, steer(clip._clip, sae, tiny_images, [], layer, head).logits
    )


class _First:
    """The first images of a data set."""

    def __init__(self, dataset, n):
        self._dataset, self.labels, self._n = dataset, dataset.labels[:n], n
        self.class_names, self.spec, self.split = dataset.class_names, dataset.spec, dataset.split

    def __len__(self):
        return self._n

    def __getitem__(self, i):
        return self._dataset[i]


@pytest.mark.parametrize("kind", ["base", "maple"])
def test_extreme_masks(kind, tiny_clip, maple, sae, tiny_dataset, counts):
    """off-0 is the identity; on-all is the reconstruction, and the identity where the error is kept."""
    clip = maple if kind == "maple" else tiny_clip
    table = sweep(clip, sae, tiny_dataset, [0, sae.d_sae], choose=["predicted", "dataset"], class_counts=counts, keep_error=[True, False])
    for choose in ("predicted", "dataset"):
        for error, reference in (("kept", "raw"), ("dropped", "reconstructed")):
            expected = row(table, mode=reference)["logit"]
            assert row(table, choose=choose, mode="off", k=0, error=error)["logit"] == pytest.approx(expected, abs=1e-4)
            assert row(table, choose=choose, mode="on", k=sae.d_sae, error=error)["logit"] == pytest.approx(expected, abs=1e-3)


def test_trap_2_masking_adds_no_constant(tiny_clip, sae, tiny_dataset, counts, head):
    """With all latents off and the error dropped, b_dec remains and nothing else."""
    clip = Recorder(tiny_clip)
    sweep(clip, sae, tiny_dataset, [0], choose="dataset", class_counts=counts, head=head, modes="on", layer=-3)
    masked = clip.seen[3].tokens  # after raw, reconstructed, error kept
    torch.testing.assert_close(masked, sae.b_dec.detach().expand_as(masked), rtol=0, atol=1e-5)


def test_trap_16_raw_reconstructed_and_error_kept_stand_side_by_side(tiny_clip, sae, tiny_dataset, head):
    table = sweep(tiny_clip, sae, tiny_dataset, [1], choose="random", head=head)
    assert table["mode"].head(3).tolist() == ["raw", "reconstructed", "error_kept"]
    z = tiny_clip.residual(images_of(tiny_clip, tiny_dataset), LAYER)
    labels = tiny_dataset.labels[:, None]
    with torch.no_grad():
        raw, rebuilt = (
            tiny_clip.logits(tiny_clip.finish(t, LAYER), head).gather(1, labels).mean().item() for t in (z, sae(z).reconstruction)
        )
    assert row(table, mode="raw")["logit"] == pytest.approx(raw, abs=1e-4)
    assert row(table, mode="reconstructed")["logit"] == pytest.approx(rebuilt, abs=1e-4)
    assert row(table, mode="error_kept")["logit"] == pytest.approx(raw, abs=1e-4)
    assert abs(raw - rebuilt) > 0.1


# -- which latents ----------------------------------------------------------------------------------------------------


def test_trap_3_only_the_oracle_reads_evaluation_labels(tiny_clip, sae, tiny_dataset, counts, head):
    """The same pictures under other labels get the same masks, whatever is chosen, except by the oracle."""
    streams = []
    for dataset in (tiny_dataset, Relabelled(tiny_dataset, tiny_dataset.labels.flip(0))):
        clip = Recorder(tiny_clip)
        sweep(clip, sae, dataset, [10], choose=CHOICES, class_counts=counts, head=head, layer=-3, modes="off", n_random=1)
        streams.append([residual.tokens for residual in clip.seen[3:]])  # after raw, reconstructed, error kept: one a choice
    for choose, first, second in zip(CHOICES, *streams, strict=True):
        assert torch.equal(first, second) == (choose != "oracle"), choose


def test_wrong_is_never_the_predicted_class(tiny_clip, sae, tiny_dataset, counts, head):
    """Class c ranks latent c first, so the latent that disappears tells whose mask it was."""
    clip = Recorder(tiny_clip)
    ranked = torch.eye(*counts.shape)
    predicted = tiny_clip.logits(tiny_clip.encode_image(images_of(tiny_clip, tiny_dataset)), dataset_head(tiny_clip, tiny_dataset)).argmax(
        1
    )
    sweep(clip, sae, tiny_dataset, [1], choose=["predicted", "wrong"], class_counts=ranked, modes="off", keep_error=True, layer=-3)
    z, by_predicted, by_wrong = (clip.seen[i].tokens for i in (0, 3, 4))
    with torch.no_grad():
        parts = sae.encode(z)[..., : len(ranked), None] * sae.W_dec[: len(ranked)]  # [B, T, C, D]
    for image, label in enumerate(predicted.tolist()):
        torch.testing.assert_close(z[image] - by_predicted[image], parts[image, :, label], rtol=0, atol=1e-5)
        distance = (parts[image] - (z[image] - by_wrong[image])[:, None]).abs().amax((0, 2))
        others = [c for c in range(len(ranked)) if c != label]
        assert distance[others].min() < 1e-5
        if parts[image, :, label].abs().max() > 1e-3:
            assert distance[label] > 1e-4


def test_random_latents_are_alive(tiny_clip, sae, tiny_dataset, counts, head):
    """Latents that no train image activates are never drawn: turning 'all' random ones off leaves the dead ones on."""
    counts = counts.clone()
    counts[:, 10:] = 0
    clip = Recorder(tiny_clip)
    options = {"class_counts": counts, "head": head, "n_random": 1, "modes": "off", "keep_error": True, "layer": -3}
    sweep(clip, sae, tiny_dataset, [sae.d_sae], choose="random", **options)
    z = clip.seen[0].tokens
    with torch.no_grad():
        expected = z - sae.encode(z)[..., :10] @ sae.W_dec[:10]
    torch.testing.assert_close(clip.seen[3].tokens, expected, rtol=0, atol=1e-4)


def test_matched_latents_are_others_of_similar_activation():
    rng = np.random.default_rng(0)
    weights = np.linspace(0, 1, 200)
    targets, pool = np.arange(50, 60), np.setdiff1d(np.arange(200), np.arange(50, 60))
    pairs = dict(match_by_weight(targets, pool, weights, rng))
    assert list(pairs) == targets.tolist()
    assert len(set(pairs.values())) == 10 and not set(pairs.values()) & set(targets.tolist())
    assert max(abs(weights[a] - weights[b]) for a, b in pairs.items()) < 0.15
    assert len(list(match_by_weight(targets, pool[:4], weights, rng))) == 4


def test_controls_match_in_activation_and_frequency():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(400, 2)) * [1, 10]  # the second column must not drown the first
    targets, pool = np.arange(20), np.arange(20, 400)
    pairs = dict(match_by_weight(targets, pool, weights, rng))
    assert list(pairs) == targets.tolist() and len(set(pairs.values())) == 20 and min(pairs.values()) >= 20
    distance = np.array([np.abs((weights[a] - weights[b]) / weights.std(0)) for a, b in pairs.items()])
    assert np.median(distance[:, 0]) < 0.25 and np.median(distance[:, 1]) < 0.25
    assert np.median(np.abs(weights[targets] - weights[pool[:20]]) / weights.std(0)) > 0.4
    assert len(dict(match_by_weight(targets, pool[:4], weights, rng))) == 4


def test_matched_masks_read_the_train_splits_frequency(tiny_clip, sae, tiny_dataset, counts, head):
    """Another frequency, with everything else the same, gives other partners."""
    options = {"choose": "matched", "modes": "off", "keep_error": True, "head": head}
    tables = []
    for seed in (0, 1):
        frequency = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(seed)) + 0.01
        summary = SimpleNamespace(class_counts=counts, frequency=frequency, class_names=tiny_dataset.class_names)
        tables.append(sweep(tiny_clip, sae, tiny_dataset, [5], class_counts=summary, **options)["logit"].iloc[3])
    summary.class_names = ["another", *tiny_dataset.class_names[1:]]
    with pytest.raises(
        ValueError, match="The classes of class_counts are not those of the evaluated data set: make it from the train split"
    ):
        sweep(tiny_clip, sae, tiny_dataset, [5], class_counts=summary, **options)
    assert abs(tables[0] - tables[1]) > 1e-4


# -- where ------------------------------------------------------------------------------------------------------------


def test_chosen_patches_as_a_grid_one_an_image_or_a_function(tiny_clip, sae, tiny_dataset, counts, head):
    grids = torch.rand(len(tiny_dataset), 14, 14, generator=torch.Generator().manual_seed(0)) < 0.3
    where = {
        "all": "all", "one": grids[0], "flat": grids[0].flatten().numpy(), "each": grids, "computed": lambda i: grids[i].numpy(),
        "none": torch.zeros(14, 14, dtype=torch.bool), "every": torch.ones(196, dtype=torch.bool), "patches": "patches",
    }  # fmt: skip
    options = {"choose": "oracle", "class_counts": counts, "head": head, "keep_error": [True, False], "batch_size": 7}
    table = sweep(tiny_clip, sae, tiny_dataset, [6], where=where, **options)
    logit = table[table["choose"] != "none"].set_index(["mode", "error", "where"])["logit"].sort_index()
    for mode in ("on", "off"):
        for error, reference in (("kept", "raw"), ("dropped", "reconstructed")):
            part = logit[mode, error]
            assert part["one"] == pytest.approx(part["flat"], abs=1e-5) and part["each"] == pytest.approx(part["computed"], abs=1e-5)
            assert part["every"] == pytest.approx(part["patches"], abs=1e-5)
            assert part["none"] == pytest.approx(row(table, mode=reference)["logit"], abs=1e-4)
            assert abs(part["one"] - part["each"]) > 1e-4 and abs(part["each"] - part["all"]) > 1e-4
    # The error kept, off, on the grids of each image: against steer.
    top = counts[tiny_dataset.labels].argsort(dim=1, descending=True, stable=True)[:, :6]
    expected = []
    for i in range(len(tiny_dataset)):
        image = tiny_clip.preprocess(tiny_dataset[i].image)[None]
        edits = [Edit(latent, "scale", 0.0, grids[i].flatten()) for latent in top[i].tolist()]
        expected.append(float(steer(tiny_clip, sae, image, edits, LAYER, head).logits[0, tiny_dataset.labels[i]]))
    assert logit["off", "kept", "each"] == pytest.approx(np.mean(expected), abs=1e-3)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"here": torch.ones(14, 14)}, "boolean grid"),
        ({"here": torch.ones(5, 196, dtype=torch.bool)}, "one for each of the 24 images"),
        ({"here": lambda i: np.ones(5, dtype=bool)}, "196 patches"),
        ({"cls": torch.ones(14, 14, dtype=torch.bool)}, "'cls' is taken"),
        ({"here": "corner"}, "Valid: all, cls, patches"),
        ({}, "mapping from names"),
    ],
)
def test_places_that_do_not_exist_are_refused(where, message, tiny_clip, sae, tiny_dataset, counts, head):
    with pytest.raises(ValueError, match=message):
        sweep(tiny_clip, sae, tiny_dataset, [1], choose="dataset", class_counts=counts, head=head, where=where)


def test_seeds_and_batch_sizes(tiny_clip, sae, tiny_dataset, counts, head):
    def run(seed, batch_size):
        return sweep(tiny_clip, sae, tiny_dataset, [2, 8], choose=CHOICES, class_counts=counts, head=head, seed=seed, batch_size=batch_size)

    first, again, other = run(0, 32), run(0, 7), run(1, 32)
    np.testing.assert_allclose(first["logit"], again["logit"], atol=1e-3)
    assert not np.allclose(first.query("choose == 'random'")["logit"], other.query("choose == 'random'")["logit"], atol=1e-3)
    np.testing.assert_allclose(first.query("choose == 'oracle'")["logit"], other.query("choose == 'oracle'")["logit"], atol=1e-3)


# -- models and tails -------------------------------------------------------------------------------------------------


def test_traps_1_and_4_adapted_models_run_and_their_prompts_are_left_alone(maple, sae, tiny_dataset, counts):
    """199 tokens: the SAE reads 197 of them, and the two prompts come out as they went in."""
    clip = Recorder(maple)
    table = sweep(clip, sae, tiny_dataset, [4], choose=CHOICES, class_counts=counts, layer=-3)
    before = maple.run_to(images_of(maple, tiny_dataset), -3)
    assert before.tokens.shape[1] == maple.n_tokens == 197
    for residual in clip.seen:
        assert residual.tokens.shape[1] == 197
        assert residual.extra is None if before.extra is None else torch.equal(residual.extra, before.extra)
    assert table["accuracy"].between(0, 1).all()
    steered = steer(maple, sae, before, [Edit(3, "set", 2.0)], -3)
    assert steered.residual.tokens.shape == before.tokens.shape


def test_the_sae_never_sees_prompt_tokens(maple, sae, tiny_dataset, counts):
    seen = []
    sae_encode = sae.encode
    sae.encode = lambda x: seen.append(tuple(x.shape)) or sae_encode(x)
    try:
        sweep(maple, sae, tiny_dataset, [4], choose="predicted", class_counts=counts)
    finally:
        del sae.encode
    assert {shape[1] for shape in seen} == {197}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tail_equals_finish(depth, tiny_clip, tiny_images):
    """The one-query tail, and where it does not hold (prompts of the last block's own) the whole block."""
    from patchsae_utils.adaptation.adapters import MaPLe, VisualPrompt

    for clip in (tiny_clip, MaPLe(tiny_clip, 2, depth), VisualPrompt(tiny_clip, 3, depth)):
        for layer in (-2, -3):
            sample = clip.run_to(tiny_images, layer)
            tail = network_tail(clip, layer, sample)
            edited = sample._replace(
                tokens=sample.tokens + 0.3 * torch.randn(sample.tokens.shape, generator=torch.Generator().manual_seed(0))
            )
            with torch.no_grad():
                torch.testing.assert_close(tail(edited), clip.finish(edited, layer), rtol=1e-4, atol=1e-5)
    assert network_tail(tiny_clip, -2, tiny_clip.run_to(tiny_images, -2)).__name__ == "class_token_alone"
    assert network_tail(tiny_clip, -3, tiny_clip.run_to(tiny_images, -3)).__name__ == "whole"


def test_trap_12_the_head_is_renormalised_after_averaging_templates(tiny_clip, tiny_dataset, head):
    from patchsae_utils.data import templates_for

    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)), rtol=0, atol=1e-5)
    templates = templates_for(tiny_dataset.spec)
    with torch.no_grad():
        prompts = F.normalize(tiny_clip.encode_text([t.format(tiny_dataset.class_names[5]) for t in templates]), dim=-1)
    assert prompts.mean(0).norm() < 1 - 1e-4  # so that forgetting it would show
    torch.testing.assert_close(head[5], F.normalize(prompts.mean(0), dim=0), rtol=0, atol=1e-5)


# -- the table --------------------------------------------------------------------------------------------------------


def test_table_has_a_row_for_every_condition_with_an_interval(tiny_clip, sae, tiny_dataset, counts, head):
    groups = [name[0] for name in tiny_dataset.class_names]
    options = {"choose": ["predicted", "random"], "where": ["cls", "patches"], "class_counts": counts, "head": head}
    table = sweep(tiny_clip, sae, tiny_dataset, [1, 5], groups=groups, **options)
    total = table[table["group"] == "all"]
    assert len(total) == 3 + 2 * 2 * 2 * 2 and not total.duplicated(["choose", "mode", "k", "where", "error"]).any()
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    assert (total["n"] == len(tiny_dataset)).all()
    np.testing.assert_allclose(total["change"], total["accuracy"] - row(total, mode="raw")["accuracy"], atol=1e-12)
    assert row(total, mode="error_kept")[["change", "change_low", "change_high"]].tolist() == [0, 0, 0]
    by_group = table[table["group"] != "all"]
    assert len(by_group) == len(total) * len({tiny_dataset.class_names[label][0] for label in tiny_dataset.labels.tolist()})
    weighted = (
        by_group.assign(right=by_group["accuracy"] * by_group["n"])
        .groupby(["choose", "mode", "k", "where", "error"], sort=False)[["right", "n"]]
        .sum()
    )
    np.testing.assert_allclose(weighted["right"] / weighted["n"], total["accuracy"], atol=1e-9)


def test_rows_for_each_class_keep_equal_names_apart(tiny_clip, sae, tiny_dataset, head):
    twins = _First(tiny_dataset, 12)
    twins.class_names = ["missile", "missile", *tiny_dataset.class_names[2:]]
    table = sweep(tiny_clip, sae, twins, [3], choose="random", head=head, groups="class", modes="off")
    each = table[table["class"] >= 0]
    assert sorted(each["class"].unique()) == sorted(set(twins.labels.tolist()))
    assert set(each.loc[each["group"] == "missile", "class"]) == {0, 1} & set(twins.labels.tolist())
    raw = each[each["mode"] == "raw"]
    assert (raw["accuracy"] * raw["n"]).sum() / raw["n"].sum() == pytest.approx(row(table[table["class"] < 0], mode="raw")["accuracy"])
    with pytest.raises(ValueError, match="or 'class'"):
        sweep(tiny_clip, sae, twins, [3], choose="random", head=head, groups="task")


def test_bootstrap_mean():
    values = np.random.default_rng(0).normal(2.0, 1.0, (3, 400))
    mean, low, high = bootstrap_mean(values)
    np.testing.assert_allclose(mean, values.mean(1))
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.2)
    assert all(np.array_equal(a, b) for a, b in zip(bootstrap_mean(values), (mean, low, high), strict=True))
    assert bootstrap_mean(np.ones(5)) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="empty"):
        bootstrap_mean([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choose": "best"}, "choose=.*Valid: oracle"),
        ({"modes": "half"}, "modes=.*Valid: on, off"),
        ({"where": "corner"}, "where=.*Valid: all, cls, patches"),
        ({"ks": [65]}, "d_sae=64"),
        ({"ks": []}, "1 to 254 numbers"),
        ({"class_counts": None}, "summarize_latents"),
        ({"class_counts": torch.zeros(3, 64)}, r"\[3, 64\]"),
        ({"groups": ["a", "b"]}, "got 2 names"),
        ({"layer": 7}, "no layer 7"),
    ],
)
def test_bad_input_to_sweep(options, message, tiny_clip, sae, tiny_dataset, counts, head):
    with pytest.raises(ValueError, match=message):
        sweep(tiny_clip, sae, tiny_dataset, **{"ks": [1], "choose": "predicted", "class_counts": counts, "head": head, **options})


def test_an_sae_of_another_width_is_refused(tiny_clip, tiny_images):
    from patchsae_utils.sae.model import SparseAutoencoder

    with pytest.raises(ValueError, match="16-dimensional.*width 32"):
        steer(tiny_clip, SparseAutoencoder(16, 8), tiny_images, [])


# -- steering ---------------------------------------------------------------------------------------------------------


def edited_latents(clip, sae, images, edits, keep_error=True):
    """What the edits did to the residual stream."""
    before = clip.run_to(images, LAYER).tokens
    return before, steer(clip, sae, images, edits, LAYER, keep_error=keep_error).residual.tokens


@pytest.mark.parametrize(
    ("op", "value", "change"),
    [
        ("scale", 0.0, lambda h: -h),
        ("scale", 3.0, lambda h: 2 * h),
        ("set", 1.5, lambda h: 1.5 - h),
        ("add", -0.2, lambda h: (h - 0.2).clamp_min(0) - h),
    ],
)
def test_edits_move_the_stream_along_the_latents_row(op, value, change, tiny_clip, sae, tiny_images):
    before, after = edited_latents(tiny_clip, sae, tiny_images, [Edit(7, op, value)])
    with torch.no_grad():
        expected = change(sae.encode(before)[..., 7])[..., None] * sae.W_dec[7]
    torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-5)


def test_edits_act_in_turn_and_only_where_they_should(tiny_clip, sae, tiny_images):
    mask = torch.zeros(196, dtype=torch.bool)
    mask[[3, 50]] = True
    for patches, tokens in ((None, range(197)), ("cls", [0]), ("patches", range(1, 197)), ([0, 195], [1, 196]), (mask, [4, 51])):
        before, after = edited_latents(tiny_clip, sae, tiny_images, [Edit(7, "set", 5.0), Edit(7, "scale", 2.0, patches)])
        with torch.no_grad():
            level = torch.full((197,), 5.0)
            level[list(tokens)] = 10.0
            expected = (level - sae.encode(before)[..., 7])[..., None] * sae.W_dec[7]
        torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-4)


def test_a_mask_of_its_own_for_each_image(tiny_clip, sae, tiny_images):
    masks = torch.zeros(len(tiny_images), 196, dtype=torch.bool)
    masks[torch.arange(len(tiny_images)), torch.arange(len(tiny_images))] = True
    before, after = edited_latents(tiny_clip, sae, tiny_images, [Edit(7, "set", 5.0, masks)])
    moved = (after - before).abs().sum(-1) > 1e-6
    assert torch.equal(moved[:, 1:], masks) and not moved[:, 0].any()


def test_dropping_the_error_edits_the_reconstruction(tiny_clip, sae, tiny_images):
    before, after = edited_latents(tiny_clip, sae, tiny_images, [Edit(7)], keep_error=False)
    with torch.no_grad():
        h = sae.encode(before)
        h[..., 7] = 0
        torch.testing.assert_close(after, sae.decode(h), rtol=0, atol=1e-5)


def test_steer_reports_probabilities_and_what_moved(tiny_clip, sae, tiny_images, tiny_dataset, head):
    steered = steer(tiny_clip, sae, tiny_clip.run_to(tiny_images, LAYER), [Edit(7, "set", 20.0)], LAYER, head)
    torch.testing.assert_close(steered.probabilities.sum(1), torch.ones(8))
    moved = steered.moved(tiny_dataset.class_names, image=2, n=4)
    assert len(moved) == 4 and moved["change"].abs().is_monotonic_decreasing
    np.testing.assert_allclose(moved["after"] - moved["before"], moved["change"], atol=1e-6)
    with pytest.raises(ValueError, match="zero-shot head"):
        _ = steer(tiny_clip, sae, tiny_images, [], LAYER).probabilities


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(0, "turn"), "Valid: scale, set, add, swap, transplant"),
        (lambda: Edit(0, "scale", -1.0), "not negative"),
        (lambda: Edit(0, "add", float("nan")), "finite"),
        (lambda: Edit(0, patches="corner").apply(torch.ones(1, 5)), "Valid: None"),
        (lambda: Edit(0, patches=[4]).apply(torch.ones(1, 5)), "between 0 and 3"),
        (lambda: Edit(0, patches=torch.ones(2, 4, dtype=torch.bool)).apply(torch.ones(3, 5)), r"\[3, 4\]"),
    ],
)
def test_bad_edits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_latent_that_does_not_exist(tiny_clip, sae, tiny_images):
    with pytest.raises(ValueError, match="latents 0 to 63"):
        steer(tiny_clip, sae, tiny_images, [Edit(64)])


# -- experiments ------------------------------------------------------------------------------------------------------


def summary_of(counts, images=(10, 10), level=1.0):
    """A summary of tokens above tau, all equally strong."""
    counts = torch.tensor(counts)
    strength = counts.sum(0) * level
    return SimpleNamespace(
        class_counts=counts, class_images=torch.tensor(images), mean_activation=strength, frequency=torch.ones(counts.shape[1])
    )


def test_rank_latents_prefers_the_specific_to_the_ubiquitous():
    counts = [[9.0, 10.0, 0.5, 0.0], [0.0, 10.0, 0.0, 8.0]]
    assert rank_latents(summary_of(counts)).tolist() == [[0], [3]]
    assert rank_latents(summary_of(counts), 2).tolist() == [[0, 1], [3, 1]]
    doubled = [[2 * n for n in counts[0]], counts[1]]
    assert rank_latents(summary_of(doubled, (20, 10)), 2).tolist() == [[0, 1], [3, 1]]
    faint = summary_of(counts, level=torch.tensor([0.01, 1.0, 1.0, 1.0]))
    assert rank_latents(faint).tolist() == [[1], [3]]
    with pytest.raises(ValueError, match="number of latents, 4"):
        rank_latents(summary_of(counts), 5)


def test_concept_latents_gives_each_first_latent_to_one_class():
    summary = summary_of([[9.0, 0.0, 1.0], [3.0, 0.0, 0.5], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]], [10] * 4)
    assert concept_latents(summary) == {0: [0], 2: [1]}
    assert concept_latents(summary, 1, k=2) == {0: [0, 2]}


def test_specificity_measures_what_steer_does(tiny_clip, sae, tiny_dataset, head):
    latents = {0: 11, 4: 7}
    frame = specificity(tiny_clip, sae, tiny_dataset, latents, LAYER, head=head, progress=False)
    own = frame[frame["kind"] == "own"].set_index("index")
    for label, latent in latents.items():
        image = tiny_clip.preprocess(tiny_dataset[label].image)[None]
        steered = steer(tiny_clip, sae, image, [Edit(latent)], LAYER, head)
        change = (steered.logits - steered.logits_before)[0]
        others = (change.sum() - change[label]) / (len(change) - 1)
        assert own.loc[label, "own"] == pytest.approx(change[label].item(), abs=1e-4)
        assert own.loc[label, "others"] == pytest.approx(others.item(), abs=1e-4)
    control = frame[frame["kind"] == "control"].set_index("index")
    np.testing.assert_allclose(control["activation"], own["activation"], rtol=0.5)
    several = specificity(tiny_clip, sae, tiny_dataset, {0: [11, 3]}, LAYER, ks=[1, 2], head=head, progress=False).query("kind == 'own'")
    image = tiny_clip.preprocess(tiny_dataset[0].image)[None]
    steered = steer(tiny_clip, sae, image, [Edit(11), Edit(3)], LAYER, head)
    assert several["k"].tolist() == [1, 2] and several["own"].iloc[0] == pytest.approx(own.loc[0, "own"], abs=1e-4)
    assert several["own"].iloc[1] == pytest.approx((steered.logits - steered.logits_before)[0, 0].item(), abs=1e-4)


def test_summarize_effects_resamples_what_it_is_told():
    import pandas as pd

    frame = pd.DataFrame(
        {"kind": ["a"] * 4 + ["b"] * 4, "class": [0, 0, 0, 1] * 2, "index": [0, 1, 2, 3] * 2, "own": [1.0, 1, 1, 5, 0, 0, 0, 0]}
    )
    by_image = summarize_effects(frame, ["own"])
    by_class = summarize_effects(frame, ["own"], over="class")
    assert by_image["own"].tolist() == [2.0, 0.0] and by_class["own"].tolist() == [3.0, 0.0]
    assert by_image["n"].tolist() == [4, 4] and by_class["n"].tolist() == [2, 2]
    assert by_class.loc[0, ["own_low", "own_high"]].tolist() == [1.0, 5.0]


def test_dose_response_is_zero_at_the_untouched_image(tiny_clip, sae, tiny_dataset, head):
    table = dose_response(tiny_clip, sae, tiny_dataset, {0: 11, 4: 7, 9: 3}, (0, 1, 2), LAYER, head=head, n_bootstrap=20, progress=False)
    assert len(table) == 3 * 2 * 3
    for scenes, dose in (("show it", 1.0), ("show another", 0.0)):
        untouched = table[(table["scenes"] == scenes) & (table["dose"] == dose)]
        np.testing.assert_allclose(untouched[["own", "others"]], 0, atol=1e-5)
    off = table[(table["scenes"] == "show it") & (table["dose"] == 0) & (table["class"] == 4)].iloc[0]
    frame = specificity(tiny_clip, sae, tiny_dataset, {4: 7}, LAYER, head=head, progress=False)
    assert off["own"] == pytest.approx(frame[frame["kind"] == "own"]["own"].mean(), abs=1e-4)


def test_remove_objects_touches_only_the_objects_patches(tiny_clip, sae):
    scenes = load_dataset("openmoji/scenes", "test", n_images=40)
    n_classes = len(scenes.class_names)
    latents = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:5] for i in range(n_classes)])
    head = F.normalize(torch.randn(n_classes, tiny_clip.d_embed, generator=torch.Generator().manual_seed(0)), dim=1)
    clip = Recorder(tiny_clip)
    frame = remove_objects(clip, sae, scenes, latents, -3, head=head, n_scenes=3, progress=False)
    assert len(frame) == 3 * 2 * 2 and (frame["removed"] != frame["stays"]).all()
    chosen = two_object_scenes(scenes, 3)
    z = clip.seen[0].tokens
    for which in range(2):
        for kind in range(2):
            moved = (clip.seen[1 + 2 * which + kind].tokens - z).abs().sum(-1) > 1e-6
            masks = torch.stack([object_patches(scenes.truth(i), which) for i in chosen])
            assert not moved[:, 0].any() and not (moved[:, 1:] & ~masks).any()


def test_experiments_refuse_what_they_cannot_do(tiny_clip, sae, tiny_dataset, head):
    with pytest.raises(ValueError, match="the same number for each"):
        specificity(tiny_clip, sae, tiny_dataset, {0: 64}, LAYER, head=head)
    with pytest.raises(ValueError, match="for each class, 1"):
        specificity(tiny_clip, sae, tiny_dataset, {0: 6}, LAYER, ks=[2], head=head)
    with pytest.raises(ValueError, match="two classes"):
        dose_response(tiny_clip, sae, tiny_dataset, {0: 1}, layer=LAYER, head=head)
    with pytest.raises(ValueError, match="hold 0"):
        two_object_scenes(load_dataset("openmoji/scenes", "test", n_images=2), 5, min_patches=190)


def test_steered_residual_is_a_residual(tiny_clip, sae, tiny_images):
    assert isinstance(steer(tiny_clip, sae, tiny_images, [Edit(1)], LAYER).residual, Residual)
