"""The split of a gain: its parts sum to it, what can't change has no part in it, and slow float64 arithmetic says the same."""

import copy
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import inputs

from patchsae_utils.adaptation import gain
from patchsae_utils.adaptation.gain import CONCEPTS, EXPERIMENTS, MEASURES, PARTS, TOWER_PARTS, explain_gain, owen_values, share_of
from patchsae_utils.adaptation.links import evidence, shared_evidence
from patchsae_utils.adaptation.prompts import CoOp
from patchsae_utils.interventions.attribution import attribute_latents
from patchsae_utils.interventions.tail import dataset_head
from patchsae_utils.sae.model import SparseAutoencoder

LAYER = -2


@pytest.fixture(scope="module")
def found(tiny_clip, tiny_sae, scenes, models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "BATCH", 7)
        return explain_gain(tiny_clip, models, tiny_sae, scenes, LAYER, progress=False)


def gains(analysis, measure="log-probability"):
    return analysis.split.parts(measure).set_index("part")["gain"]


@pytest.mark.parametrize("measure", ["accuracy", "log-probability"])
@pytest.mark.parametrize("name", ["maple", "vpt", "coop"])
def test_parts_sum_to_the_gain_picture_by_picture(found, name, measure):
    values = found[name].split.outcomes[MEASURES.index(measure)]
    np.testing.assert_allclose(sum(owen_values(values).values()), values[1, 1, 1, 1] - values[0, 0, 0, 0], atol=1e-12)
    table = gains(found[name], measure)
    assert sum(table[part] for part in PARTS) == pytest.approx(table["both"], abs=1e-12)
    assert sum(table[concept] for concept in CONCEPTS) == pytest.approx(table["both"], abs=1e-12)
    assert sum(table[part] for part in TOWER_PARTS) == pytest.approx(table["image tower"], abs=1e-12)


def test_faults_d16_the_parts_are_those_of_the_crossed_towers_and_heads(compared, found):
    """With the tower's parts put together it is the Shapley value of two players, tower and head; the head's parts are template and learning."""
    bb, ba, ab, aa = (compared["maple"].right(tower, head).mean() for tower in ("base", "adapted") for head in ("base", "adapted"))
    table = gains(found["maple"], "accuracy")
    expected = {"image tower": (ab - bb + aa - ba) / 2, "text head": (ba - bb + aa - ab) / 2, "both": aa - bb}
    assert table[list(expected)].to_dict() == pytest.approx(expected, abs=1e-12)
    assert table["template"] + table["learning"] == pytest.approx(table["text head"], abs=1e-12)


def test_faults_d16_before_its_first_step_a_prompted_head_differs_by_its_template_alone(tiny_clip, tiny_sae, scenes, found):
    """CLIP's head is a mean over templates, that of learned prompts has one; an adapter without text prompts keeps CLIP's."""
    adapted = {"coop": CoOp(tiny_clip)}
    table = gains(explain_gain(tiny_clip, adapted, tiny_sae, scenes, LAYER, progress=False)["coop"])
    assert table["learning"] == pytest.approx(0, abs=1e-6) and table["template"] == pytest.approx(table["both"], abs=1e-6)
    assert abs(table["template"]) > 1e-3
    assert gains(found["vpt"])["template"] == gains(found["vpt"])["learning"] == 0 != gains(found["coop"])["learning"]


def test_a_model_without_a_change_gains_nothing_anywhere(found):
    for measure in ("accuracy", "log-probability"):
        table = found["itself"].split.parts(measure)
        assert (table[["gain", "low", "high"]] == 0).all(axis=None) and table["share"].isna().all()


def test_coop_has_no_new_concepts_at_all(found):
    table = gains(found["coop"])
    assert (table[list(TOWER_PARTS)] == 0).all() and table["new concepts"] == table["retuning"] == table["interaction"] == 0
    assert table["text head"] == pytest.approx(table["both"], rel=1e-12) and table["both"] != 0


def test_visual_prompts_leave_the_head_without_a_part(found):
    table = gains(found["vpt"])
    assert table["text head"] == table["interaction"] == 0
    assert table["image tower"] == pytest.approx(table["both"], rel=1e-12) and table["both"] != 0  # a sum of three parts, in floats
    assert table["existing latents"] != 0 and table["outside the dictionary"] != 0 and table["later blocks"] != 0


def everything(width: int, silent: bool = False) -> SparseAutoencoder:
    """A dictionary that says all of every token: latents are its positive and negative coordinates."""
    sae = SparseAutoencoder(width, 2 * width).requires_grad_(False)
    sae.W_dec.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
    sae.W_enc.copy_(0 * sae.W_dec.T if silent else sae.W_dec.T)
    return sae


def test_a_dictionary_that_says_everything_leaves_nothing_new_and_a_silent_one_nothing_old(tiny_clip, scenes, models):
    one = {"maple": models["maple"]}
    whole = explain_gain(tiny_clip, one, everything(tiny_clip.width), scenes, LAYER, progress=False)["maple"]
    assert abs(gains(whole)["outside the dictionary"]) < 1e-4 < abs(gains(whole)["existing latents"])
    silent = explain_gain(tiny_clip, one, everything(tiny_clip.width, silent=True), scenes, LAYER, progress=False)["maple"]
    assert gains(silent)["existing latents"] == 0 != gains(silent)["outside the dictionary"]


def test_experiments_start_with_clip_and_end_with_the_adapted_model(tiny_clip, models, scenes, found):
    table = found["maple"].split.experiments().set_index("experiment")
    for name, model in (("CLIP", tiny_clip), ("adapted", models["maple"])):
        head = dataset_head(model, scenes)
        right = (
            (model.logits(model.encode_image(inputs(tiny_clip, scenes)), head).argmax(1) == torch.as_tensor(scenes.labels)).double().mean()
        )
        assert table.loc[name, "value"] == pytest.approx(right.item())
    assert len(table) == len(EXPERIMENTS) == len(set(EXPERIMENTS.values()))


def test_slow_float64_arithmetic_gives_the_same_split(tiny_clip, tiny_sae, scenes, models, found):
    """Every combination picture by picture in float64 with plain loops, and the Owen value over all orders that keep the tower together."""
    adapted, sae = models["maple"], copy.deepcopy(tiny_sae).double()
    double = copy.deepcopy(tiny_clip.model).double()
    block, visual = double.visual.transformer.resblocks[-1], double.visual
    heads = [dataset_head(model, scenes).double() for model in (tiny_clip, adapted)]
    fast = found["maple"].split.outcomes[1]
    for n in range(0, len(scenes), 9):
        image = tiny_clip.preprocess(scenes[n].image)[None]
        before, after = (model.run_to(image, LAYER) for model in (tiny_clip, adapted))
        z = [residual.tokens.double()[0] for residual in (before, after)]
        said = [sae.decode(sae.encode(tokens)) for tokens in z]
        error = [whole - part for whole, part in zip(z, said, strict=True)]
        extra = adapted.visual_prompts()[-1].double()
        value = {}
        for latents, outside, tail, head in product((0, 1), repeat=4):
            tokens = said[latents] + error[outside]
            x = block(torch.cat([tokens, extra])[None] if tail else tokens[None])[0, 0]
            feature = F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)
            logits = tiny_clip.logit_scale * heads[head] @ feature
            value[latents, outside, tail, head] = logits.log_softmax(0)[scenes.labels[n]].item()
            assert fast[latents, outside, tail, head, n] == pytest.approx(value[latents, outside, tail, head], abs=2e-3)
        slow, orders = dict.fromkeys(PARTS, 0.0), [o for o in permutations(range(4)) if o.index(3) in (0, 3)]
        for order in orders:
            state = [0, 0, 0, 0]
            for part in order:
                start = value[tuple(state)]
                state[part] = 1
                slow[PARTS[part]] += (value[tuple(state)] - start) / len(orders)
        quick = owen_values(fast[..., n])
        assert {part: float(quick[part]) for part in PARTS} == pytest.approx(slow, abs=5e-3)


def test_links_are_attributions(tiny_clip, tiny_sae, scenes, models, found):
    for name in ("maple", "coop", "vpt"):
        links = found[name].links
        for model, scores in ((tiny_clip, links.base), (models[name], links.adapted)):
            slow = attribute_latents(model, tiny_sae, scenes, LAYER)
            torch.testing.assert_close(scores.float(), slow.scores, rtol=1e-3, atol=1e-4)


def test_the_same_models_have_the_same_links(found):
    itself = found["itself"].links
    assert torch.equal(itself.base, itself.adapted) and not torch.equal(found["coop"].links.base, found["coop"].links.adapted)
    assert set(itself.links()["link"]) == {"stayed"}
    reuse = itself.reuse().set_index("comparison")["reuse"]
    assert reuse["CLIP and adapted"] == pytest.approx(1) and reuse["CLIP and adapted, other class"] < 1


def test_what_two_models_share_of_a_class():
    first = torch.tensor([[3.0, 1.0, -5.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 1.0, 2.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    assert evidence(first)[0].tolist() == [0.75, 0.25, 0]
    shared = shared_evidence(first, second)
    assert shared[:2].tolist() == [0.5, 0.0] and shared[2].isnan()
    torch.testing.assert_close(shared[:2], shared_evidence(second, 7 * first)[:2])


def test_resamples_without_a_gain_have_no_share():
    rows, whole = np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([1.0, 0.0])
    found = share_of(rows, whole)  # a quarter of the resamples hold the second picture alone
    assert found.value.tolist() == found.low.tolist() == found.high.tolist() == [1.0, 0.5]
