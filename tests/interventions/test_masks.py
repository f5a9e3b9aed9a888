"""Masks: exact, blind to labels, the same for adapted models, and beside controls that are what they say."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from patchsae_utils.adaptation import CoOp, MaPLe, VisualPrompt
from patchsae_utils.interventions import CHOICES, Edit, steer, sweep_masks
from patchsae_utils.interventions.choosing import NONE_LEFT, SILENT, matched_latents

LAYER = -2


class Changed:
    """A data set's first pictures, perhaps with other labels or class names."""

    def __init__(self, dataset, n=None, labels=None, class_names=None):
        self._dataset, self.labels = dataset, (dataset.labels if labels is None else labels)[:n]
        self.class_names, self.spec, self.split = class_names or dataset.class_names, dataset.spec, dataset.split

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self._dataset[i]._replace(label=int(self.labels[i]))


class Recorder(tiny.Changed):
    """A model that remembers every residual stream it is asked to finish: raw, reconstructed, error kept, then on and off of each choice."""

    def __init__(self, clip):
        super().__init__(clip, seen=[])

    def finish(self, residual, layer):
        self.seen.append(residual)
        return self.original.finish(residual, layer)


def row(table, **where):
    chosen = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_sparse_edits_equal_dense_masks(tiny_clip, sae, tiny_dataset, counts, head):
    """Every k, mode, place and error setting, against masks multiplied in full and a dense decode."""
    ks = [0, 1, 7, 30, sae.d_sae]
    table = sweep_masks(
        tiny_clip, sae, tiny_dataset, ks, choose=["oracle", "dataset"], class_counts=counts, head=head,
        keep_error=[True, False], where=["all", "cls", "patches"], batch_size=10,
    )  # fmt: skip
    z = tiny_clip.residual(tiny.inputs(tiny_clip, tiny_dataset), LAYER)
    h = sae.encode(z)
    error = z - sae.decode(h)
    for choose in ("oracle", "dataset"):
        scores = counts[tiny_dataset.labels] if choose == "oracle" else counts.sum(0).expand(len(z), -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        for k in ks:
            top = torch.zeros(len(z), sae.d_sae).scatter_(1, order[:, :k], 1.0)[:, None]
            top *= (scores > 0)[:, None] if k < sae.d_sae else 1  # k = S means all
            for mode, mask in (("on", top), ("off", 1 - top)):
                for where, places in (("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))):
                    masked = h.clone()
                    masked[:, places] *= mask
                    for keep in (True, False):
                        tokens = sae.decode(masked) + (error if keep else 0)
                        logits = tiny_clip.logits(tiny_clip.finish(tokens, LAYER), head).gather(1, tiny_dataset.labels[:, None])
                        found = row(table, choose=choose, mode=mode, k=k, where=where, error="kept" if keep else "dropped")
                        assert found["logit"] == pytest.approx(logits.mean().item(), abs=2e-3)


@pytest.mark.parametrize("layer", [-2, -3])
@pytest.mark.parametrize("kind", ["base", "maple-1", "maple-2", "maple-3", "coop", "vpt-1", "vpt-3"])
def test_identity_is_exact_for_every_model_and_adapter(kind, layer, tiny_clip, sae, tiny_dataset, tiny_images, counts, head):
    """Every logit of every image: nothing masked with the error kept, everything kept on, and a steer without edits, or edits to what is."""
    name, _, depth = kind.partition("-")
    kinds = {
        "base": lambda: tiny_clip,
        "maple": lambda: MaPLe(tiny_clip, 2, int(depth)),
        "coop": lambda: CoOp(tiny_clip, 2),
        "vpt": lambda: VisualPrompt(tiny_clip, 3, int(depth)),
    }
    model = kinds[name]()
    clip, logits = Recorder(model), []
    clip.logits = lambda features, rows: logits.append(model.logits(features, rows)) or logits[-1]
    sweep_masks(clip, sae, Changed(tiny_dataset, 8), [0, sae.d_sae], "dataset", True, layer, class_counts=counts, head=head)
    raw, _, error_kept, on_0, off_0, on_all, off_all = logits
    expected = model.logits(model.encode_image(tiny_images), head)
    for found in (raw, error_kept, off_0):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * clip.logit_scale)
    torch.testing.assert_close(on_all, expected, rtol=0, atol=2e-4 * clip.logit_scale)
    torch.testing.assert_close(on_0, off_all, rtol=0, atol=2e-4 * clip.logit_scale)
    assert (on_0 - expected).abs().max() > 0.1
    for edits in ([], [Edit(4, "scale", 1.0), Edit(9, "add", 0.0)]):
        steered = steer(model, sae, tiny_images, edits, layer, head)
        assert torch.equal(steered.logits_before, steered.logits)
        torch.testing.assert_close(steered.logits, expected, rtol=0, atol=1e-5 * clip.logit_scale)


def test_trap_2_masking_adds_no_constant(tiny_clip, sae, tiny_dataset, counts, head):
    """With all latents off and the error dropped, b_dec remains and nothing else."""
    clip = Recorder(tiny_clip)
    sweep_masks(clip, sae, tiny_dataset, [0], "dataset", class_counts=counts, head=head, layer=-3)
    masked = clip.seen[3].tokens
    torch.testing.assert_close(masked, sae.b_dec.expand_as(masked), rtol=0, atol=1e-5)


def test_trap_16_raw_reconstructed_and_error_kept_stand_side_by_side(tiny_clip, sae, tiny_dataset, head):
    table = sweep_masks(tiny_clip, sae, tiny_dataset, [1], "random", head=head)
    assert table["mode"].head(3).tolist() == ["raw", "reconstructed", "error_kept"]
    z, labels = tiny_clip.residual(tiny.inputs(tiny_clip, tiny_dataset), LAYER), tiny_dataset.labels[:, None]
    raw, rebuilt = (tiny_clip.logits(tiny_clip.finish(t, LAYER), head).gather(1, labels).mean().item() for t in (z, sae(z).reconstruction))
    assert table["logit"].head(3).tolist() == pytest.approx([raw, rebuilt, raw], abs=1e-4)
    assert abs(raw - rebuilt) > 0.1


def test_trap_3_only_the_oracle_reads_evaluation_labels(tiny_clip, sae, tiny_dataset, counts, head):
    """The same pictures under other labels get the same masks, whatever is chosen, except by the oracle."""
    streams = []
    for dataset in (tiny_dataset, Changed(tiny_dataset, labels=tiny_dataset.labels.flip(0))):
        clip = Recorder(tiny_clip)
        sweep_masks(clip, sae, dataset, [10], CHOICES, class_counts=counts, head=head, layer=-3, n_random=1)
        streams.append([residual.tokens for residual in clip.seen[4::2]])  # off, of each choice
    for choose, first, second in zip(CHOICES, *streams, strict=True):
        assert torch.equal(first, second) == (choose != "oracle"), choose


def test_wrong_is_never_the_predicted_class(tiny_clip, sae, tiny_dataset, counts, head):
    """Class c ranks latent c first, so the latent that disappears tells whose mask it was."""
    clip, ranked = Recorder(tiny_clip), torch.eye(*counts.shape)
    predicted = tiny_clip.logits(tiny_clip.encode_image(tiny.inputs(tiny_clip, tiny_dataset)), head).argmax(1)
    sweep_masks(clip, sae, tiny_dataset, [1], ["predicted", "wrong"], True, -3, class_counts=ranked, head=head)
    z, by_predicted, by_wrong = (clip.seen[i].tokens for i in (0, 4, 6))
    parts = sae.encode(z)[..., : len(ranked), None] * sae.W_dec[: len(ranked)]  # [B, T, C, D]
    for image, label in enumerate(predicted.tolist()):
        torch.testing.assert_close(z[image] - by_predicted[image], parts[image, :, label], rtol=0, atol=1e-5)
        distance = (parts[image] - (z[image] - by_wrong[image])[:, None]).abs().amax((0, 2))
        assert distance[[c for c in range(len(ranked)) if c != label]].min() < 1e-5
        if parts[image, :, label].abs().max() > 1e-3:
            assert distance[label] > 1e-4


def test_random_latents_are_alive(tiny_clip, sae, tiny_dataset, counts, head):
    """Latents that no train image activates are never drawn: turning 'all' random ones off leaves the dead ones on."""
    clip, counts = Recorder(tiny_clip), counts.clone()
    counts[:, 10:] = 0
    sweep_masks(clip, sae, tiny_dataset, [sae.d_sae], "random", True, -3, class_counts=counts, head=head, n_random=1)
    z = clip.seen[0].tokens
    torch.testing.assert_close(clip.seen[4].tokens, z - sae.encode(z)[..., :10] @ sae.W_dec[:10], rtol=0, atol=1e-4)


def test_a_latent_that_is_silent_on_a_class_is_in_none_of_its_masks(tiny_clip, sae, tiny_dataset, counts, head):
    """The kind of FAULTS D10: behind the last latent that fired, ties put the first silent ones into the mask, and asked for their controls."""
    counts = counts * (torch.arange(sae.d_sae) % 4 == 0)  # at most 16 latents a class
    few, many = (
        sweep_masks(tiny_clip, sae, tiny_dataset, [k], ["oracle", "dataset", "matched"], True, class_counts=counts, head=head)
        for k in (16, 40)
    )
    np.testing.assert_array_equal(few["logit"], many["logit"])
    activation, indices = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)) + 0.1, torch.arange(1)
    found = matched_latents(torch.tensor([[3, SILENT]]), activation, indices)
    assert found[0, 1] == SILENT and torch.equal(found[:, :1], matched_latents(torch.tensor([[3]]), activation, indices))


def test_controls_are_other_latents_about_as_active_in_the_image():
    activation = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    activation[:, 150:] = 0
    own = torch.tensor([[4, 160, 9], [7, 8, 199], [0, 1, 2]])
    found = matched_latents(own, activation, torch.arange(3))
    assert torch.equal(found == SILENT, activation.gather(1, own) == 0)
    for i in range(3):
        here = found[i] != SILENT
        assert not set(found[i, here].tolist()) & set(own[i].tolist())
        assert (activation[i, found[i, here]] - activation[i, own[i, here]]).abs().max() < 0.15
    with pytest.warns(UserWarning, match="Controls of 100 latents: in some images too few others are active"):
        found = matched_latents(torch.arange(100)[None], activation[:1], torch.arange(1))
    assert int((found == NONE_LEFT).sum()) == 50 and set(found[found >= 0].tolist()) == set(range(100, 150))


def test_faults_d9_each_k_has_controls_of_its_own(tiny_clip, sae, tiny_dataset, counts, head):
    """FAULTS D9: controls at k = 5 left out all that ranked within the largest k; near "all" they ended early, and nobody was told."""

    def sweep(ks):
        return sweep_masks(tiny_clip, sae, tiny_dataset, ks, ["predicted", "matched"], True, class_counts=counts, head=head, groups="class")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = sweep([5])
    with pytest.warns(UserWarning, match="Controls of 64 latents.*is NaN"):
        several = sweep([5, 64])
    five, all_of_them = several[several["k"] == 5].reset_index(drop=True), several[several["k"] == 64]
    assert five.equals(alone[alone["k"] == 5].reset_index(drop=True))
    told = ["accuracy", "low", "high", "change", "change_low", "change_high", "logit", "logit_low", "logit_high"]
    assert all_of_them.loc[all_of_them["choose"] == "matched", told].isna().all(axis=None)
    assert several.loc[several["choose"] != "matched", told].notna().all(axis=None) and five[told].notna().all(axis=None)


def test_matched_masks_read_the_train_splits_frequency(tiny_clip, sae, tiny_dataset, counts, head):
    """Another frequency, with everything else the same, gives other partners."""
    tables = []
    for seed in (0, 1):
        frequency = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(seed)) + 0.01
        summary = SimpleNamespace(class_counts=counts, frequency=frequency, class_names=tiny_dataset.class_names)
        tables.append(sweep_masks(tiny_clip, sae, tiny_dataset, [5], "matched", True, class_counts=summary, head=head)["logit"].iloc[4])
    assert abs(tables[0] - tables[1]) > 1e-4
    summary.class_names = ["another", *tiny_dataset.class_names[1:]]
    with pytest.raises(ValueError, match="of other classes. Make it from the train split"):
        sweep_masks(tiny_clip, sae, tiny_dataset, [5], "matched", class_counts=summary, head=head)


def test_batch_sizes_change_nothing(tiny_clip, sae, tiny_dataset, counts, head):
    first, again = (
        sweep_masks(tiny_clip, sae, tiny_dataset, [2, 8], CHOICES, class_counts=counts, head=head, batch_size=n)["logit"] for n in (32, 7)
    )
    np.testing.assert_allclose(first, again, atol=1e-3)


def test_traps_1_and_4_adapted_models_run_and_their_prompts_are_left_alone(maple, sae, tiny_dataset, counts, monkeypatch):
    """199 tokens: the SAE reads 197 of them, and the two prompts come out as they went in."""
    clip, read, encode = Recorder(maple), [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: read.append(x.shape[1]) or encode(x))
    table = sweep_masks(clip, sae, tiny_dataset, [4], CHOICES, class_counts=counts, layer=-3)
    before = maple.run_to(tiny.inputs(maple, tiny_dataset), -3)
    assert before.extra.shape[1] == 2 and set(read) == {maple.n_tokens} == {197}
    assert all(residual.tokens.shape[1] == 197 and torch.equal(residual.extra, before.extra) for residual in clip.seen)
    assert table["accuracy"].between(0, 1).all()


def test_table_has_a_row_for_every_condition_with_an_interval(tiny_clip, sae, tiny_dataset, counts, head):
    groups = [name[0] for name in tiny_dataset.class_names]
    options = {"choose": ["predicted", "random"], "where": ["cls", "patches"], "class_counts": counts, "head": head}
    options |= {"rank_by": ["count", "attribution"], "attribution": counts.flip(0)}
    table = sweep_masks(tiny_clip, sae, tiny_dataset, [1, 5], groups=groups, **options)
    keys = ["choose", "rank", "mode", "k", "where", "error"]
    total = table[table["group"] == "all"]
    assert total.groupby(["choose", "rank"]).size().to_dict() == {
        ("none", "none"): 3, ("predicted", "count"): 8, ("predicted", "attribution"): 8, ("random", "none"): 8,
    }  # fmt: skip
    assert not total.duplicated(keys).any() and (total["n"] == len(tiny_dataset)).all()
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    np.testing.assert_allclose(total["change"], total["accuracy"] - row(total, mode="raw")["accuracy"], atol=1e-12)
    assert row(total, mode="error_kept")[["change", "change_low", "change_high"]].tolist() == [0, 0, 0]
    by_group = table[table["group"] != "all"]
    assert len(by_group) == len(total) * len({tiny_dataset.class_names[label][0] for label in tiny_dataset.labels.tolist()})
    weighted = by_group.assign(right=by_group["accuracy"] * by_group["n"]).groupby(keys, sort=False)[["right", "n"]].sum()
    np.testing.assert_allclose(weighted["right"] / weighted["n"], total["accuracy"], atol=1e-9)


def test_trap_13_rows_for_each_class_keep_equal_names_apart(tiny_clip, sae, tiny_dataset, head):
    twins = Changed(tiny_dataset, 12, class_names=["missile", "missile", *tiny_dataset.class_names[2:]])
    table = sweep_masks(tiny_clip, sae, twins, [3], "random", head=head, groups="class")
    each = table[table["class"] >= 0]
    assert sorted(each["class"].unique()) == sorted(set(twins.labels.tolist()))
    assert set(each.loc[each["group"] == "missile", "class"]) == {0, 1} & set(twins.labels.tolist())
    raw = each[each["mode"] == "raw"]
    assert (raw["accuracy"] * raw["n"]).sum() / raw["n"].sum() == pytest.approx(row(table[table["class"] < 0], mode="raw")["accuracy"])


@pytest.mark.parametrize(("options", "message"), [
    ({"choose": "best"}, "choose=.*Valid: oracle"),
    ({"ks": [65]}, "d_sae=64"),
    ({"class_counts": None}, "class_counts=summarize_latents"),
    ({"class_counts": torch.zeros(3, 64)}, r"\[3, 64\]"),
    ({"head": torch.ones(3, 16)}, r"The head must be \[\d+, 16\], a row for each class .* got \[3, 16\]"),
    ({"head": torch.ones(35, 8)}, r"got \[35, 8\]"),
    ({"n_random": 0}, "n_random at least 1, got False and 0"),
    ({"groups": ["a", "b"]}, r"each of the .* classes .* got \['a', 'b'\]"),
])  # fmt: skip
def test_bad_input_to_sweep(options, message, tiny_clip, sae, tiny_dataset, counts, head):
    with pytest.raises(ValueError, match=message):
        sweep_masks(tiny_clip, sae, tiny_dataset, **{"ks": [1], "choose": "predicted", "class_counts": counts, "head": head, **options})
