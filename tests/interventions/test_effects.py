"""Effects in scenes whose every patch is known: concepts of all kinds, swapped colours. (Classes, doses, removal: test_interventions.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchsae_utils.data import load_dataset, openmoji
from patchsae_utils.interventions import concept_effects, scene_effects
from patchsae_utils.interventions.concept_effects import concept_head, concept_prompts
from patchsae_utils.interventions.effects import concept_specificity, rank_concepts, summarize_effects, swap_colors
from patchsae_utils.interventions.scene_effects import color_swap_scenes, object_patches
from patchsae_utils.interventions.steering import Edit, steer

LAYER = -2


@pytest.fixture(scope="module")
def quick_head(tiny_clip):
    """Concept heads from random directions, the same for the same concept: the tiny text tower takes seconds and knows nothing."""

    def head(clip, concepts):
        seeds = [openmoji.concept_names().index(concept) for concept in concepts]
        return F.normalize(torch.stack([torch.randn(clip.d_embed, generator=torch.Generator().manual_seed(s)) for s in seeds]), dim=1)

    return head


@pytest.fixture(autouse=True)
def _quick(monkeypatch, quick_head):
    for module in (concept_effects, scene_effects):
        monkeypatch.setattr(module, "concept_head", quick_head)
    monkeypatch.setattr(scene_effects, "dataset_head", lambda clip, d: quick_head(clip, [f"object:{name}" for name in d.class_names]))


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("openmoji/tools", "train", n_images=16)


def test_prompts_name_the_concept():
    assert len(openmoji.concept_names()) > 100
    for concept in ("object:hammer", "category:tool", "color:red", "background:sand"):
        prompts = concept_prompts(concept)
        assert len(prompts) > 1 and all(concept.split(":")[1] in prompt for prompt in prompts)
    for unknown in ("color:beautiful", "outline", "hammer"):
        with pytest.raises(ValueError, match="Unknown concept"):
            concept_prompts(unknown)


def test_concept_head_has_unit_rows(tiny_clip):
    head = concept_head(tiny_clip, ["color:red", "color:green"])
    torch.testing.assert_close(head.norm(dim=1), torch.ones(2))
    with torch.no_grad():
        each = F.normalize(tiny_clip.encode_text(concept_prompts("color:green")), dim=1)
    torch.testing.assert_close(head[1], F.normalize(each.mean(0), dim=0), rtol=0, atol=1e-5)


def test_ranking_by_activity_equals_a_loop_over_patches(tiny_clip, tiny_sae, scenes):
    found = rank_concepts(tiny_clip, tiny_sae, scenes, LAYER, kinds=["color", "background"], k=4, batch_size=5, progress=False)
    names = openmoji.concept_names()
    sums, counts = np.zeros((len(found.concepts), 64)), np.zeros(len(found.concepts))
    cls_sums, n_scenes = np.zeros_like(sums), np.zeros(len(counts))
    for i in range(len(scenes)):
        with torch.no_grad():
            h = tiny_sae.encode(tiny_clip.residual(tiny_clip.preprocess(scenes[i].image)[None], LAYER))[0].double().numpy()
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
        score = rate[rows] ** 2 / rate[rows].sum(0)
        for row, values in zip(rows, score, strict=True):
            if counts[row]:
                np.testing.assert_allclose(np.sort(values)[::-1][:4], values[found.latents[row]], rtol=1e-4)
                np.testing.assert_allclose(found.levels[row], rate[row, found.latents[row]], rtol=1e-3)
                np.testing.assert_allclose(found.cls_levels[row], cls_rate[row, found.latents[row]], rtol=1e-3, atol=1e-5)
    some = found.mapping("color", 2, min_patches=1)
    assert some and all(concept.startswith("color:") and len(latents) == 2 for concept, latents in some.items())


def test_ranking_by_attribution_is_the_margins_gradient_in_the_latents(tiny_clip, tiny_sae, scenes, quick_head):
    one = type(scenes)("tools", "train", n_images=1)
    found = rank_concepts(tiny_clip, tiny_sae, one, LAYER, kinds=["color", "background"], k=64, by="attribution", progress=False)
    residual = tiny_clip.run_to(tiny_clip.preprocess(one[0].image)[None], LAYER)
    with torch.no_grad():
        h = tiny_sae.encode(residual.tokens)
        error = residual.tokens - tiny_sae.decode(h)
    concept = f"background:{openmoji.BACKGROUND_KINDS[one.truth(0).background]}"
    backgrounds = [name for name in found.concepts if name.startswith("background")]
    h = h.requires_grad_(True)
    logits = tiny_clip.logits(tiny_clip.finish(tiny_sae.decode(h) + error, LAYER), quick_head(tiny_clip, backgrounds))[0]
    own = backgrounds.index(concept)
    margin = logits[own] - torch.cat([logits[:own], logits[own + 1 :]]).logsumexp(0)
    expected = (torch.autograd.grad(margin, h)[0] * h).sum((0, 1)).detach()
    ranked = found.latents[found.concepts.index(concept)]
    np.testing.assert_allclose(expected[ranked], expected.sort(descending=True).values, rtol=0, atol=1e-3)


def test_concept_specificity_measures_what_steer_does(tiny_clip, tiny_sae, scenes, quick_head):
    shown = openmoji.BACKGROUND_KINDS[scenes.truth(0).background]
    others = [f"background:{name}" for name in openmoji.BACKGROUND_KINDS if name != shown]
    latents = {f"background:{shown}": [7, 11], others[0]: [3, 4], "color:red": [5, 6]}
    frame = concept_specificity(tiny_clip, tiny_sae, scenes, latents, LAYER, ks=[1, 2], n_images=3, progress=False)
    assert set(frame["kind"]) == {"own", "control"} and set(frame["k"]) == {1, 2}
    head = quick_head(tiny_clip, list(latents))
    for k, edits in ((1, [Edit(7)]), (2, [Edit(7), Edit(11)])):
        row = frame.query(f"kind == 'own' and k == {k} and index == 0 and concept_kind == 'background'").iloc[0]
        steered = steer(tiny_clip, tiny_sae, tiny_clip.preprocess(scenes[0].image)[None], edits, LAYER, head)
        change = (steered.logits - steered.logits_before)[0]
        assert row["own"] == pytest.approx(float(change[0]), abs=1e-4)
        assert row["others"] == pytest.approx(float(change[1]), abs=1e-4)  # the other background, not the colour
        assert row["gap"] == pytest.approx(row["own"] - row["others"])
    table = summarize_effects(frame, ["own", "gap"], by=["kind", "k"], over="concept", n_bootstrap=20)
    assert len(table) == 4 and (table["own_low"] <= table["own_high"]).all()
    again = concept_specificity(tiny_clip, tiny_sae, scenes, latents, LAYER, ks=[1, 2], n_images=3, batch_size=2, progress=False)
    keys = ["kind", "k", "concept", "index"]
    merged = frame.merge(again, on=keys, suffixes=("", "_again"))
    assert len(merged) == len(frame)
    np.testing.assert_allclose(merged["own"], merged["own_again"], atol=1e-4)


def test_color_swap_scenes_have_a_dominant_colour(scenes):
    found = color_swap_scenes(scenes, 5)
    for index, (source, target) in found.items():
        truth = scenes.truth(index)
        fill = (truth.color_share * object_patches(truth, -1).numpy().reshape(14, 14)).sum((1, 2))
        assert openmoji.COLORS[int(fill.argmax())] == source != target
        assert fill.max() >= 0.6 * fill.sum()
    source = next(iter(found.values()))[0]
    assert {pair for pair in color_swap_scenes(scenes, 1, [(source, "green" if source != "green" else "red")]).values()}
    with pytest.raises(ValueError, match="two different colours"):
        color_swap_scenes(scenes, 1, [("red", "red")])
    with pytest.raises(ValueError, match="hold"):
        color_swap_scenes(scenes, 99)


@pytest.mark.parametrize("edit_cls", [False, True])
def test_swapped_colours_are_edits_of_steer(edit_cls, tiny_clip, tiny_sae, scenes, quick_head, monkeypatch):
    """Source latents off, target latents at their level, on the object's patches (and CLS): the same as a sequence of edits."""
    ranked = rank_concepts(tiny_clip, tiny_sae, scenes, LAYER, kinds=["color"], k=2, progress=False)
    # Latents of their own for each colour, so that the order of the edits doesn't matter.
    own = torch.arange(2 * len(ranked.concepts)).view(-1, 2)
    levels = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    ranked = ranked._replace(latents=own, levels=levels, cls_levels=levels.flip(0))
    frame = swap_colors(tiny_clip, tiny_sae, scenes, ranked, LAYER, k=2, doses=[1.5], edit_cls=edit_cls, n_scenes=4, progress=False)
    assert len(frame) == 8 and frame["target_change"].abs().max() > 1e-4
    names = [concept.split(":")[1] for concept in ranked.concepts]
    head = quick_head(tiny_clip, list(ranked.concepts))
    for row in frame[frame["kind"] == "own"].itertuples():
        s, t = names.index(row.source), names.index(row.target)
        patches = object_patches(scenes.truth(row.index), -1)
        places = [(patches, levels)] + ([("cls", levels.flip(0))] if edit_cls else [])
        edits = [Edit(int(latent), "scale", 0.0, place) for place, _ in places for latent in own[s]]
        edits += [Edit(int(own[t, j]), "set", 1.5 * float(level[t, j]), place) for place, level in places for j in range(2)]
        steered = steer(tiny_clip, tiny_sae, tiny_clip.preprocess(scenes[row.index].image)[None], edits, LAYER, head)
        change = (steered.probabilities - steered.probabilities_before)[0]
        assert row.target_change == pytest.approx(float(change[t]), abs=1e-4)
        assert row.source_change == pytest.approx(float(change[s]), abs=1e-4)
        assert row.sees_target == (int(steered.logits[0].argmax()) == t)


def test_what_they_cannot_do_is_refused(tiny_clip, tiny_sae, scenes):
    class Plain:
        spec, split, class_names, labels = "plain", "test", scenes.class_names, scenes.labels

    with pytest.raises(ValueError, match="no ground truth"):
        rank_concepts(tiny_clip, tiny_sae, Plain(), LAYER)
    with pytest.raises(ValueError, match="Valid: object, category"):
        rank_concepts(tiny_clip, tiny_sae, scenes, LAYER, kinds=["shape"])
    with pytest.raises(ValueError, match="activity, attribution"):
        rank_concepts(tiny_clip, tiny_sae, scenes, LAYER, by="beauty")
    with pytest.raises(ValueError, match="the same number for each"):
        concept_specificity(tiny_clip, tiny_sae, scenes, {"color:red": [1], "color:green": [1, 2]}, LAYER)
    with pytest.raises(ValueError, match="shows none"):
        concept_specificity(tiny_clip, tiny_sae, type(scenes)("tools", "train", n_images=1), {"object:dog": [1]}, LAYER)
