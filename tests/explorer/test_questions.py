"""Latents found by words, by marked patches and by a prediction; what they do; links that open it again."""

import dataclasses
import json
from types import SimpleNamespace
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_pages import shoot
from tiny import Changed, inputs, loud, owed

import patchsae_utils as ps
from patchsae_utils.adaptation.prompts import VisualPrompt
from patchsae_utils.data import load_dataset, templates_for
from patchsae_utils.explorer import AdaptationView, LatentExplorer, SteeringPanel
from patchsae_utils.explorer.reader import EDGES
from patchsae_utils.explorer.search import TextSearch

WORDS = ("red wheel", "blue bird", "green leaf")


@pytest.fixture(scope="module")
def likeness(tiny_clip):
    """Embeddings in which the reference images of latents 3, 9 and 20 look like one text each, beside what all images share."""
    rng = np.random.default_rng(0)
    texts = tiny_clip.zero_shot_head(WORDS, ["a {}."]).cpu().double().numpy()
    inverse = np.linalg.pinv(texts)  # column w answers to text w alone
    shared = rng.standard_normal(16) + 0.3 * rng.standard_normal((24, 16))
    shared -= shared @ inverse @ texts
    shared[:18] += np.repeat(inverse.T, 6, 0) * 5 / np.linalg.norm(inverse)
    table = pd.DataFrame({"dictionary": "SAE", "latent": range(64), "score": np.linspace(0, 1, 64)})
    embeddings = torch.from_numpy(shared / np.linalg.norm(shared, axis=1, keepdims=True)).float()
    return SimpleNamespace(table=table, embeddings=embeddings)


@pytest.fixture(scope="module")
def planted(summary):
    tops = summary.top_images.clone()
    for place, latent in enumerate((3, 9, 20)):
        tops[latent] = torch.arange(6 * place, 6 * place + 6)
    tops[20, 4:] = -1
    dead = torch.zeros_like(summary.dead)
    dead[5] = True
    tops[5] = tops[3]  # would be as good, but is dead
    return dataclasses.replace(summary, top_images=tops, dead=dead)


def test_words_find_the_latents_whose_images_look_like_them(tiny_clip, tiny_dataset, planted, likeness):
    templates = templates_for(tiny_dataset.spec)
    search = TextSearch(tiny_clip, planted, likeness.embeddings, templates)
    assert search.templates == ["a {}."]
    living = [latent for latent in range(64) if latent != 5]
    means = np.array([likeness.embeddings[[i for i in planted.top_images[s].tolist() if i >= 0]].double().mean(0).numpy() for s in living])
    for text, latent in zip(WORDS, (3, 9, 20), strict=True):
        scores = (means - means.mean(0)) @ tiny_clip.zero_shot_head([text], search.templates)[0].double().cpu().numpy()
        found = search(f"  {text} ", 4)
        assert found[0][0] == latent
        assert [score for _, score in found] == pytest.approx(np.sort(scores)[:-5:-1] / scores.std(), rel=1e-4)
        assert [scores[living.index(s)] / scores.std() for s, _ in found] == pytest.approx([score for _, score in found], rel=1e-4)
    assert search("   ") == []
    with pytest.raises(ValueError, match="embeddings of 9"):
        TextSearch(tiny_clip, planted, likeness.embeddings[:9], templates)


def test_page_finds_latents_by_words(show, tiny_clip, tiny_sae, planted, tiny_dataset, likeness, named):
    view = LatentExplorer(tiny_clip, tiny_sae, planted, tiny_dataset, named, likeness=likeness)
    page = show(view)
    page.fill("input[type=search]", "blue bird")
    page.wait_for_selector("[role=option]:has-text('looks like it')")
    assert page.locator("[role=option]").first.inner_text().startswith("9")
    page.keyboard.press("Enter")
    page.wait_for_selector("h3:has-text('Latent 9')")
    page.fill("input[type=search]", "red")  # names come first, and a latent once
    page.wait_for_selector("[role=option]:has-text('looks like it')")
    numbers = [text.split()[0] for text in page.locator("[role=option]").all_inner_texts()]
    assert numbers[:2] == ["3", "7"] and len(set(numbers)) == len(numbers)
    plain = LatentExplorer(tiny_clip, tiny_sae, planted, tiny_dataset, named)
    plain._receive({"kind": "find", "text": "blue bird"}, [])
    assert plain.hits == {} and not plain.searches
    with pytest.raises(ValueError, match="likeness="):
        plain.find("blue bird")


def test_marked_patches_list_latents_that_are_active_there_and_not_elsewhere(patches):
    """Planted: latent 9 lights the marked patches alone, latent 3 all patches, and more."""
    h = torch.zeros(197, 64)
    h[:, 3], h[[8, 9], 9], h[40:60, 20] = 5.0, 1.0, 2.0
    patches._reader._latents[patches.image] = h
    patches.selection = {"rank": "contrast", "patches": [7, 8], "patch": 8}
    assert patches.card.patch_latents == [(9, 1.0)]
    patches.rank = "activation"
    assert patches.card.patch_latents == [(3, 5.0), (9, 1.0)]


def test_a_prediction_is_owed_to_latents_with_their_signs(tiny_clip, tiny_sae, tiny_dataset, patches):
    """Against finite differences of the logit in float64, and the sums over tokens that ``latent_shares`` gives."""
    patches.selection = {"image": 2, "patches": [30], "patch": 30, "rank": "prediction"}
    head, layer = patches._reader.head, -2
    residual = tiny_clip.run_to(tiny_clip.preprocess(tiny_dataset[2].image)[None], layer)
    sums = owed(tiny_clip, tiny_sae, residual, head)[0]
    order = sums.abs().argsort(descending=True)[:8].tolist()
    assert [latent for latent, _ in patches.card.image_latents] == order
    assert [value for _, value in patches.card.image_latents] == pytest.approx(sums[order].tolist(), rel=1e-3, abs=1e-5)
    name, probability = patches.prediction
    p = tiny_clip.logits(tiny_clip.finish(residual, layer), head).softmax(-1)[0]
    assert name == tiny_dataset.class_names[int(p.argmax())] and probability == pytest.approx(float(p.max()), abs=1e-5)
    target = 7
    patches.target = target
    latent, share = patches.card.patch_latents[0]
    h = tiny_sae.encode(residual.tokens)[0, 31, latent].detach()
    steps = []
    for sign in (1, -1):
        tokens = residual.tokens.detach().clone()
        tokens[0, 31] += sign * 0.02 * h * tiny_sae.W_dec[latent].detach()
        steps.append(float(tiny_clip.logits(tiny_clip.finish(residual._replace(tokens=tokens), layer), head)[0, target]))
    assert share == pytest.approx((steps[0] - steps[1]) / 0.04, rel=0.05, abs=2e-3)
    assert patches.shown["said"].startswith(tiny_dataset.class_names[target])
    with pytest.raises(ValueError, match="target"):
        patches.target = 99


def test_what_a_latent_does_is_counted_over_the_images(tiny_clip, tiny_sae, tiny_dataset, tiny_inputs, summary, latents):
    latents.latent = 3
    card = latents.does
    h = tiny_sae.encode(tiny_clip.residual(tiny_inputs, -2)).detach().double()
    column = h[..., 3].flatten()
    assert card.counts.sum() == (column > 0).sum() and card.n_images == 24 and card.n_active == (h[..., 3].mean(1) > 0).sum()
    np.testing.assert_array_equal(card.counts, np.histogram(column[column > 0].clamp(EDGES[0], EDGES[-1] - 1e-6), EDGES)[0])
    means = h.mean(1).numpy()
    ranked = np.argsort(-means[:, 3], kind="stable")
    assert card.images[0] == ranked[round(0.5 * card.n_active) - 1] and means[card.images[-1], 3] < means[card.images[0], 3]
    alike = np.nan_to_num([0 if s == 3 else np.corrcoef(means[:, s], means[:, 3])[0, 1] for s in range(64)])
    assert [s for s, _ in card.together] == [s for s in np.argsort(-alike)[:6] if alike[s] > 0.05]
    assert [r for _, r in card.together] == pytest.approx([alike[s] for s, _ in card.together], abs=1e-4)

    shown = [int(i) for i in summary.top_images[3] if i >= 0]
    residual = tiny_clip.run_to(tiny_inputs[shown], -2)
    without = residual._replace(tokens=residual.tokens - h[shown][..., 3:4].float() * tiny_sae.W_dec[3].detach())
    both = [tiny_clip.logits(tiny_clip.finish(r, -2), latents._reader.head).detach().double() for r in (residual, without)]
    effect = both[0] - both[1]
    mean = (effect - effect.mean(1, keepdim=True)).mean(0)
    classes = tiny_dataset.class_names
    assert [card.pushes[i][0] for i in (0, -1)] == [classes[int(mean.argmax())], classes[int(mean.argmin())]]
    for name, found in card.pushes:
        assert found.value == pytest.approx(float(mean[classes.index(name)]), abs=1e-4) and found.low <= found.value <= found.high


@pytest.fixture
def elsewhere(tiny_clip, tiny_sae, summary, tiny_dataset):
    line = load_dataset("openmoji/tools:line", "test", n_images=12)
    adapted = loud(VisualPrompt, tiny_clip)
    places = {"line": line, "adapted": (adapted, tiny_dataset)}
    view = LatentExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, elsewhere=places, latent=3)
    return view, places | {"line": (tiny_clip, line)}


def test_a_latent_is_followed_to_other_images_and_models(elsewhere, tiny_sae, latents):
    view, places = elsewhere
    here = view._reader.sample.means[:, 3].double().numpy()
    for name, (model, data) in places.items():
        h = tiny_sae.encode(model.residual(inputs(model, data), -2)).detach().double()[..., 3]
        card, means = view.elsewhere[name], h.mean(1).numpy()
        assert (card.n_active, card.n_images) == ((means > 0).sum(), len(data))
        order = np.argsort(-means)[:5]
        assert card.images.tolist() == order.tolist() and card.labels == [data.class_names[data.labels[i]] for i in order]
        np.testing.assert_allclose(card.values, means[order], atol=1e-5)
        np.testing.assert_allclose(card.heats.reshape(5, -1), h[order, 1:], atol=1e-5)
        expected = None if name == "line" else np.corrcoef(means, here)[0, 1]
        assert card.correlation == (expected if expected is None else pytest.approx(expected, abs=1e-4))
    assert latents.elsewhere == {} and latents.places == []


def test_page_shows_a_latent_elsewhere(show, elsewhere):
    page = show(elsewhere[0])
    page.click("summary")
    page.wait_for_selector("[aria-label='Elsewhere: adapted'] .psx-ref")
    assert page.is_disabled("[aria-label='Elsewhere: line'] .psx-ref >> nth=0")  # images of another data set
    page.click("[aria-label='Elsewhere: adapted'] .psx-ref >> nth=1")
    page.wait_for_selector("[aria-label='Elsewhere: adapted'] .psx-ref[aria-pressed=true]")
    assert elsewhere[0].image == elsewhere[0].elsewhere["adapted"].images[1]
    shoot(page, "latent_elsewhere")


def test_page_tells_what_a_latent_does(show, latents):
    latents.latent = 3
    page = show(latents)
    page.click("summary")
    page.wait_for_selector(".psx-does .psx-ref")
    assert page.locator(".psx-hist div").count() == len(EDGES) - 1
    assert page.locator(".psx-does .psx-odds li").count() == len(latents.does.pushes) > 0
    before = page.inner_text(".psx-does")
    page.locator(".psx-does .psx-chips .psx-pick").first.click()
    page.wait_for_function(
        "before => document.querySelector('.psx-does').innerText !== before && model.get('effect').latent === model.get('latent')",
        arg=before,
    )
    assert latents.effect["latent"] == latents.latent != 3
    shoot(page, "latent_does")


def test_a_link_opens_what_was_shown_and_python_makes_it_again(show, tiny_clip, tiny_sae, summary, tiny_dataset, named, patches):
    panel = SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, named, latents=[3, 5])
    chosen = {"image": 6, "latents": [9, 3], "latent": 3, "patches": [4, 90], "where": "selected"}
    panel.selection = chosen | {"edits": [{"latent": 3, "op": "scale", "value": 2.0}]}
    page = show(panel)
    page.evaluate("navigator.clipboard ??= {}; navigator.clipboard.writeText = async (text) => void (window.copied = text)")
    page.click("text=Copy as Python")
    page.wait_for_function("window.copied")
    names = {"ps": ps, "clip": tiny_clip, "sae": tiny_sae, "summary": summary, "dataset": tiny_dataset, "names": named}
    assert eval(page.evaluate("window.copied"), names).selection == panel.selection  # noqa: S307 (our own line)
    page.click("text=Copy link")
    page.wait_for_function("window.copied.includes('#psx=')")
    fragment = json.loads(unquote(page.evaluate("window.copied").split("#psx=")[1]))
    assert fragment == {"steering": panel.selection}
    again = SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, named)
    page = show(again, fragment="psx=" + quote(json.dumps(fragment)))
    page.wait_for_selector("h3:has-text('Image 6')")
    assert again.selection == panel.selection
    again._receive({"kind": "open", "selection": {"image": 999, "notice": "mine"}}, [])
    assert "no image 999" in again.notice and again.image == 6
    patches.selection = {"image": 3, "patches": [7], "patch": 7, "latent": 9, "rank": "prediction", "target": 2}
    page = show(patches)
    page.click("text=Copy as Python")  # no leave to write: told in the page
    text = page.wait_for_selector("[role=alert]:has-text('ps.PatchExplorer')").inner_text()
    assert eval(text, names).selection == patches.selection  # noqa: S307


@pytest.fixture
def noting(tiny_clip, tiny_sae, summary, tiny_dataset, named, tmp_path):
    return lambda file="notes.csv": LatentExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, named, notes=tmp_path / file)


def test_two_explorers_keep_notes_in_one_file(noting):
    """The second wrote what it knew alone: the first one's notes were gone."""
    first, second = noting(), noting()
    first.keep(1, note="mine", star=True)
    second.keep(2, note="yours")
    second.keep(1, note="both")
    kept = {"1": {"star": True, "name": "", "note": "both"}, "2": {"star": False, "name": "", "note": "yours"}}
    assert second.kept == noting().kept == kept
    first.keep(7, name="my own")
    assert str(first._names[7]) == "my own" == str(noting()._names[7])
    first.keep(7, name="")
    assert first._names[7].name == "redwood" == noting()._names[7].name  # the given name is back


@pytest.mark.parametrize("latent", [-1, 64, 1.5, True, "3", None])
def test_words_on_a_latent_that_does_not_exist_are_not_kept(noting, latent):
    """Once they were, no note could be saved any more, or the file not be opened."""
    explorer = noting()
    for kind in ("keep", "does", "prefetch"):
        explorer._receive({"kind": kind, "latent": latent, "note": "x"}, [])
        assert "There is no latent" in explorer.notice
    explorer.keep(np.int64(3), note="still kept")
    assert list(explorer.kept) == ["3"] == list(noting().kept)


def test_half_a_character_spoils_no_note(noting):
    explorer = noting()
    explorer.keep(3, name="half \ud83d", note="\ud83d\n'\"<b>\U0001f600,")
    explorer.keep(4, note="whole")
    assert noting().kept == explorer.kept and explorer.kept["3"]["note"] == "?\n'\"<b>\U0001f600,"


@pytest.mark.parametrize(
    "text",
    ["", "\x00\x01", "a,b\n1,2\n", "latent;star;name\n3;True;x\n", "latent,name\nabc,x\n", "latent,name\n64,x\n", 'latent,note\n3,"x'],
)
def test_a_file_that_holds_no_notes_is_refused_and_stays(noting, tmp_path, text):
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(ValueError, match="odd.csv holds no notes, columns latent, star, name, note: .*Mend it"):
        noting("odd.csv")
    explorer = noting()
    explorer._notes = tmp_path / "odd.csv"  # spoilt later
    with pytest.raises(ValueError, match="odd.csv holds no notes"):
        explorer.keep(3, note="x")
    assert (tmp_path / "odd.csv").read_text() == text


def test_notes_that_a_spreadsheet_wrote(noting, tmp_path):
    (tmp_path / "sheet.csv").write_text("name,latent,star\nbird,3.0,FALSE\n,4,\nfish,9,1\n", encoding="utf-8-sig")
    explorer = noting("sheet.csv")
    assert {latent: row["star"] for latent, row in explorer.kept.items()} == {"3": False, "4": False, "9": True}
    explorer.keep(4, note="x")
    assert noting("sheet.csv").kept == explorer.kept and str(explorer._names[9]) == "fish"


def test_what_there_is_nothing_of_is_said(tiny_clip, tiny_sae, tiny_dataset, summary):
    silent = dataclasses.replace(summary, dead=torch.ones_like(summary.dead))
    with pytest.raises(ValueError, match="nothing to slide over"):
        ps.explorer.latent_slider(tiny_clip, tiny_sae, silent, tiny_dataset)
    explorer = LatentExplorer(tiny_clip, tiny_sae, silent, tiny_dataset)
    assert explorer.latent == -1
    explorer.latent = 3
    explorer._receive({"kind": "export", "format": "svg"}, [])
    assert explorer.exported["name"] == "latent.svg" and not explorer.notice
    unlabelled = Changed(tiny_dataset, class_names=[], labels=[-1] * len(tiny_dataset))
    with pytest.raises(ValueError, match="no labels"):
        AdaptationView(tiny_clip, {"a": tiny_clip}, tiny_sae, datasets={"a": unlabelled})
