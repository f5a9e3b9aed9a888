"""Effects in scenes whose every patch is known: concepts, doses, swapped colors, removed objects; each is what ``steer`` does."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_TEXT, TINY_VISION

from patchsae_utils.activations import survey_residuals
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.data import load_dataset, openmoji
from patchsae_utils.interventions import Edit, concept_latents, effects, rank_concepts, steer
from patchsae_utils.interventions.choosing import SILENT
from patchsae_utils.interventions.concept_latents import ConceptLatents, concept_head, concept_prompts
from patchsae_utils.interventions.effects import object_patches
from patchsae_utils.latents.classes import class_scores
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.sae import readings_by_place

LAYER = -2


def quick_head(clip, concepts):
    """Concept heads from random directions, the same for the same concept: the tiny text tower takes seconds and knows nothing."""
    seeds = [openmoji.concept_names().index(concept) for concept in concepts]
    return F.normalize(torch.stack([torch.randn(clip.d_embed, generator=torch.Generator().manual_seed(s)) for s in seeds]), dim=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for module in (concept_latents, effects):
        monkeypatch.setattr(module, "concept_head", quick_head)
    own_head = lambda clip, d, head=None: quick_head(clip, [f"object:{name}" for name in d.class_names]) if head is None else head  # noqa: E731
    monkeypatch.setattr(effects, "dataset_head", own_head)


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "train", n_images=16)


def steered(clip, sae, dataset, index, edits, head):
    """Change of the logits of one scene."""
    found = steer(clip, sae, clip.preprocess(dataset[index].image)[None], edits, LAYER, head)
    return (found.logits - found.logits_before)[0]


def test_prompts_name_the_concept_and_heads_are_their_unit_means(tiny_clip):
    assert len(openmoji.concept_names()) > 100
    for concept in ("object:hammer", "category:tool", "color:red", "background:sand"):
        prompts = concept_prompts(concept)
        assert len(prompts) > 1 and all(concept.split(":")[1] in prompt for prompt in prompts)
    for unknown in ("color:beautiful", "outline", "hammer"):
        with pytest.raises(ValueError, match="Unknown concept"):
            concept_prompts(unknown)
    head = concept_head(tiny_clip, ["color:red", "color:green"])
    with torch.no_grad():
        each = F.normalize(tiny_clip.encode_text(concept_prompts("color:green")), dim=1)
    torch.testing.assert_close(head[1], F.normalize(each.mean(0), dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(head.norm(dim=1), torch.ones(2))


def test_ranking_by_activity_equals_a_loop_over_patches(tiny_clip, sae, scenes):
    found = rank_concepts(tiny_clip, sae, scenes, LAYER, kinds=["color", "background"])
    names = openmoji.concept_names()
    sums, counts = np.zeros((len(found.concepts), 64)), np.zeros(len(found.concepts))
    cls_sums, n_scenes = np.zeros_like(sums), np.zeros(len(counts))
    for i in range(len(scenes)):
        h = sae.encode(tiny_clip.residual(tiny_clip.preprocess(scenes[i].image)[None], LAYER))[0].double().numpy()
        masks = openmoji.concept_masks(scenes.truth(i)).reshape(len(names), -1)
        for row, concept in enumerate(found.concepts):
            mask = masks[names.index(concept)]
            sums[row] += h[1:][mask].sum(0)
            counts[row] += mask.sum()
            cls_sums[row] += h[0] * (mask.sum() >= 4)
            n_scenes[row] += mask.sum() >= 4
    rate, cls_rate = sums / np.maximum(counts, 1)[:, None], cls_sums / np.maximum(n_scenes, 1)[:, None]
    assert found.n_patches.tolist() == counts.astype(int).tolist()
    for kind in ("color", "background"):
        rows = [i for i, concept in enumerate(found.concepts) if concept.startswith(kind)]
        score = rate[rows] ** 2 / np.maximum(rate[rows].sum(0), 1e-30)  # a latent may be silent
        for row, values in zip(rows, score, strict=True):
            if counts[row]:
                np.testing.assert_allclose(np.sort(values)[::-1][:10], values[found.latents[row]], rtol=1e-4)
                np.testing.assert_allclose(found.levels[row], rate[row, found.latents[row]], rtol=1e-3)
                np.testing.assert_allclose(found.cls_levels[row], cls_rate[row, found.latents[row]], rtol=1e-3, atol=1e-5)
    some = found.mapping()
    assert set(some) == {c for c, n in zip(found.concepts, counts, strict=True) if n >= 20}
    assert {len(each) for each in some.values()} == {10}
    assert (found.latents[counts == 0] == SILENT).all()  # ties of nothing are no latents: the kind of FAULTS D10
    assert not found.levels[counts == 0].any() and (counts == 0).any()


def test_ranking_by_attribution_is_the_margins_gradient_in_the_latents(tiny_clip, sae, scenes):
    one = type(scenes)("tools", "train", n_images=1)
    found = rank_concepts(tiny_clip, sae, one, LAYER, kinds=["color", "background"], by="attribution")
    residual = tiny_clip.run_to(tiny_clip.preprocess(one[0].image)[None], LAYER)
    h = sae.encode(residual.tokens)
    error = residual.tokens - sae.decode(h)
    concept = f"background:{openmoji.BACKGROUND_KINDS[one.truth(0).background]}"
    backgrounds = [name for name in found.concepts if name.startswith("background")]
    h = h.requires_grad_(True)
    logits = tiny_clip.logits(tiny_clip.finish(sae.decode(h) + error, LAYER), quick_head(tiny_clip, backgrounds))[0]
    own = backgrounds.index(concept)
    margin = logits[own] - torch.cat([logits[:own], logits[own + 1 :]]).logsumexp(0)
    expected = (torch.autograd.grad(margin, h)[0] * h).sum((0, 1)).detach()
    ranked = found.latents[found.concepts.index(concept)]
    np.testing.assert_allclose(expected[ranked], expected.sort(descending=True).values[:10], rtol=0, atol=1e-3)


def test_clearest_latents_give_each_latent_to_one_class(monkeypatch):
    monkeypatch.setattr(effects, "class_scores", lambda scores: scores)
    scores = torch.tensor([[9.0, 0.0, 1.0], [3.0, 0.0, 0.5], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    assert effects.clearest_latents(scores, 5) == {0: 0, 2: 1} and effects.clearest_latents(scores, 1) == {0: 0}


def test_concept_specificity_measures_what_steer_does(tiny_clip, sae, scenes):
    shown = openmoji.BACKGROUND_KINDS[scenes.truth(0).background]
    other = next(name for name in openmoji.BACKGROUND_KINDS if name != shown)
    latents = {f"background:{shown}": [7, 11], f"background:{other}": [3, 4], "color:red": [5, 6]}
    frame = effects.concept_specificity(tiny_clip, sae, scenes, latents, LAYER, n_images=3)
    assert set(frame["kind"]) == {"own", "control"} and frame.notna().all(axis=None)
    row = frame.query("kind == 'own' and index == 0 and concept_kind == 'background'").iloc[0]
    change = steered(tiny_clip, sae, scenes, 0, [Edit(7), Edit(11)], quick_head(tiny_clip, list(latents)))
    assert row["own"] == pytest.approx(float(change[0]), abs=1e-4)
    assert row["others"] == pytest.approx(float(change[1]), abs=1e-4)  # the other background, not the color
    table = effects.summarize_effects(frame, ["own", "others"], over="concept")
    assert table["own"].tolist() == pytest.approx(
        [frame.query("kind == @k").groupby("concept")["own"].mean().mean() for k in table["kind"]]
    )


def test_summarize_effects_resamples_what_it_is_told():
    frame = pd.DataFrame(
        {"kind": ["a"] * 4 + ["b"] * 4, "class": [0, 0, 0, 1] * 2, "index": [0, 1, 2, 3] * 2, "own": [1.0, 1, 1, 5, 0, 0, np.nan, 0]}
    )
    by_image, by_class = effects.summarize_effects(frame, ["own"]), effects.summarize_effects(frame, ["own"], over="class")
    assert by_image["own"].tolist() == [2.0, 0.0] and by_class["own"].tolist() == [3.0, 0.0]
    assert by_image["n"].tolist() == [4, 3] and by_class["n"].tolist() == [2, 2]  # what has no control is left out
    assert by_class.loc[0, ["own_low", "own_high"]].tolist() == [1.0, 5.0]
    assert effects.summarize_effects(frame.assign(own=np.nan), ["own"])[["own", "own_low"]].isna().all(axis=None)


def test_dose_response_is_zero_at_the_untouched_image_and_steers_elsewhere(tiny_clip, sae, tiny_dataset, head):
    table = effects.dose_response(tiny_clip, sae, tiny_dataset, {0: 11, 4: 7, 9: 3}, LAYER, head=head)
    assert len(table) == 3 * 2 * len(effects.DOSES)
    for scenes, dose in (("show it", 1.0), ("show another", 0.0)):
        untouched = table[(table["scenes"] == scenes) & (table["dose"] == dose)]
        np.testing.assert_allclose(untouched[["own", "others"]], 0, atol=1e-5)
    of_class = np.flatnonzero(np.asarray(tiny_dataset.labels) == 4)[:12]
    for dose in (0, 3):
        row = table[(table["scenes"] == "show it") & (table["dose"] == dose) & (table["class"] == 4)].iloc[0]
        changes = torch.stack([steered(tiny_clip, sae, tiny_dataset, int(i), [Edit(7, "scale", float(dose))], head) for i in of_class])
        assert row["own"] == pytest.approx(float(changes[:, 4].mean()), abs=1e-4) and row["n"] == len(of_class)
        assert row["others"] == pytest.approx(float((changes.sum(1) - changes[:, 4]).mean()) / (len(head) - 1), abs=1e-4)


def test_faults_d22_one_latent_off_is_an_edit_of_steer(tiny_clip, sae, tiny_dataset, head):
    """FAULTS D22: how little the best latent of a class carries stands beside every dictionary."""
    summary = summarize_latents(tiny_clip, sae, tiny_dataset, LAYER, progress=False)
    table = effects.one_latent_off(tiny_clip, sae, tiny_dataset, summary, LAYER)
    assert len(table) == 2 * len(tiny_dataset) and set(table["kind"]) == {"own", "control"}
    best = class_scores(summary).argmax(1)
    head = effects.dataset_head(tiny_clip, tiny_dataset)
    own = table[(table["kind"] == "own") & (table["index"] < 4)].rename(columns={"index": "image", "class": "label"})
    for row in own.itertuples():
        assert row.latent == best[row.label] and row.label == tiny_dataset.labels[row.image]
        found = steer(tiny_clip, sae, tiny_clip.preprocess(tiny_dataset[row.image].image)[None], [Edit(row.latent)], LAYER, head)
        change = (found.probabilities - found.probabilities_before)[0, row.label]
        assert row.change == pytest.approx(float(change), abs=1e-5)
        assert row.flip == (found.logits.argmax() != found.logits_before.argmax())
    merged = table.pivot(index="index", columns="kind", values="latent")
    assert (merged["own"] != merged["control"]).all()
    with pytest.raises(ValueError, match="must be of the"):
        effects.one_latent_off(tiny_clip, sae, load_dataset("openmoji/meals", "test", n_images=2), summary, LAYER)


@pytest.mark.parametrize("edit_cls", [False, True])
def test_swapped_colors_are_edits_of_steer(edit_cls, tiny_clip, sae, scenes):
    """Source latents off, target latents at their level, on the object's patches (and CLS): the same as a sequence of edits."""
    names = openmoji.COLORS
    # Latents of their own for each color, so that the order of the edits doesn't matter.
    own = torch.arange(2 * len(names)).view(-1, 2)
    levels = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    ranked = ConceptLatents(tuple(f"color:{name}" for name in names), own, levels, levels.flip(0), torch.full((len(names),), 50))
    frame = effects.swap_colors(tiny_clip, sae, scenes, ranked, LAYER, doses=[1.5], edit_cls=edit_cls, n_scenes=4)
    assert len(frame) == 8 and frame["target_change"].abs().max() > 1e-4 and (frame["source"] != frame["target"]).all()
    head = quick_head(tiny_clip, list(ranked.concepts))
    for row in frame[frame["kind"] == "own"].itertuples():
        s, t = names.index(row.source), names.index(row.target)
        places = [(object_patches(scenes.truth(row.index), -1), levels)] + ([("cls", levels.flip(0))] if edit_cls else [])
        edits = [Edit(int(latent), "scale", 0.0, place) for place, _ in places for latent in own[s]]
        edits += [Edit(int(own[t, j]), "set", 1.5 * float(level[t, j]), place) for place, level in places for j in range(2)]
        found = steer(tiny_clip, sae, tiny_clip.preprocess(scenes[row.index].image)[None], edits, LAYER, head)
        change = (found.probabilities - found.probabilities_before)[0]
        assert row.target_change == pytest.approx(float(change[t]), abs=1e-4)
        assert row.source_change == pytest.approx(float(change[s]), abs=1e-4)
        assert row.sees_target == (int(found.logits[0].argmax()) == t)


def test_remove_objects_edits_the_objects_patches_alone(tiny_clip, sae):
    scenes = load_dataset("openmoji/scenes", "test", n_images=40)
    latents = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[: 5 - i % 2].tolist() for i in range(len(scenes.class_names))]
    frame = effects.remove_objects(tiny_clip, sae, scenes, latents, LAYER, n_scenes=3)
    assert len(frame) == 3 * 2 * 2 and (frame["removed"] != frame["stays"]).all() and frame.notna().all(axis=None)
    head = effects.dataset_head(tiny_clip, scenes)
    for row in frame[frame["kind"] == "own"].itertuples():
        truth = scenes.truth(row.index)
        place = object_patches(truth, list(truth.class_ids).index(row.removed))
        change = steered(tiny_clip, sae, scenes, row.index, [Edit(i, "scale", 0.0, place) for i in latents[row.removed]], head)
        assert row.removed_change == pytest.approx(float(change[row.removed]), abs=1e-4)
        assert row.stays_change == pytest.approx(float(change[row.stays]), abs=1e-4)


def test_a_model_of_any_grid_meets_the_scenes_truth(tiny_clip, sae, scenes):
    """Scenes know their own 14 x 14 patches: models of other patches ended in errors of shapes, from the survey of norms on."""
    model = open_clip.CLIP(16, TINY_VISION | {"patch_size": 16}, TINY_TEXT)
    coarse = ClipModel(model, tiny_clip.preprocess, tiny_clip._tokenizer, "coarse")
    assert coarse.grid == (7, 7)
    found = rank_concepts(coarse, sae, scenes, LAYER)
    halves = [openmoji.scene_truth(scenes.scene(i)) for i in range(len(scenes))]
    names, shown = openmoji.concept_names(), np.zeros(len(openmoji.concept_names()), int)
    for truth in halves:
        shown[truth.concepts] += (truth.masks.reshape(-1, 7, 16, 7, 16).mean((2, 4)) >= 0.5).sum((1, 2))
    assert found.n_patches.tolist() == [shown[names.index(concept)] for concept in found.concepts]
    share = halves[0].object_share.reshape(-1, 7, 2, 7, 2).mean((2, 4))
    assert torch.equal(object_patches(halves[0], -1, coarse), torch.from_numpy(share[-1].ravel() >= 0.5))
    survey = survey_residuals(coarse, scenes, progress=False)
    covered = {int(scenes.class_ids[label]) for label in survey.patch_labels[0].tolist() if label >= 0}
    assert covered <= {int(c) for c, each in zip(halves[0].class_ids, share, strict=True) if (each >= 0.5).any()}
    pairs = load_dataset("openmoji/scenes", "test", n_images=40)
    assert effects.remove_objects(coarse, sae, pairs, [[1]] * len(pairs.class_names), LAYER, n_scenes=1)["removed_change"].notna().any()
    assert len(effects.swap_colors(coarse, sae, scenes, rank_concepts(coarse, sae, scenes, LAYER, kinds=["color"]), LAYER, n_scenes=1)) == 2
    assert set(readings_by_place(coarse, sae, scenes, LAYER)["place"]) == {"object", "background"}


def test_what_they_cannot_do_is_refused(tiny_clip, sae, scenes):
    plain = SimpleNamespace(spec="plain", split="test", class_names=scenes.class_names, labels=scenes.labels)
    pairs, one = load_dataset("openmoji/scenes", "test", n_images=2), type(scenes)("tools", "train", n_images=1)
    colors = tuple(f"color:{name}" for name in openmoji.COLORS)
    own = torch.arange(5 * len(colors)).view(-1, 5) % 64
    every = ConceptLatents(colors, own, torch.ones(own.shape), torch.ones(own.shape), own[:, 0] + 50)
    uneven = {"color:red": [1], "color:green": [64, 2]}
    for call, message in (
        (lambda: rank_concepts(tiny_clip, sae, plain, LAYER), "no ground truth"),
        (lambda: effects.concept_specificity(tiny_clip, sae, scenes, uneven), "the same number for each"),
        (lambda: effects.concept_specificity(tiny_clip, sae, scenes, {"color:red": [64]}), "There is no latent 64"),
        (lambda: effects.dose_response(tiny_clip, sae, scenes, {0: 1, 1: -1}, head=torch.eye(1)), "There is no latent -1"),
        (lambda: effects.remove_objects(tiny_clip, sae, pairs, [[1], [64]]), "There is no latent 64"),
        (lambda: effects.remove_objects(tiny_clip, sae, pairs, [[1]]), f"each of the {len(pairs.class_names)} classes .*, got 1"),
        (lambda: effects.concept_specificity(tiny_clip, sae, one, {"object:dog": [1]}), "shows none"),
        (lambda: effects.swap_colors(tiny_clip, sae, scenes, every, LAYER, n_scenes=1), "5 latents of no color: of 64 there are 0"),
        (lambda: effects.dose_response(tiny_clip, sae, scenes, {0: 1}, head=torch.eye(1)), "two classes"),
        (lambda: effects.remove_objects(tiny_clip, sae, pairs, [[1]] * len(pairs.class_names), n_scenes=5), "hold [012]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
