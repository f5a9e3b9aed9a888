"""The steering panel in two layers: its traits in Python, and its page in headless Chromium with a fake model."""

import numpy as np
import pytest
import torch
from explorer_pages import BAD, SEARCH, enter, figure_text, picture_file, pixels, place
from tiny import owed

import patchsae_utils as ps
from patchsae_utils.explorer import SteeringPanel
from patchsae_utils.explorer.reader import read_upload
from patchsae_utils.interventions import Edit, steer


def test_moving_a_slider_steers_the_image(panel, tiny_clip, tiny_sae, tiny_images, tiny_dataset, head):
    panel.set_state({"image": 2})
    panel.set_state({"edits": [{"latent": 3, "op": "scale", "value": 0}, {"latent": 9, "op": "add", "value": 5.0}]})
    expected = steer(tiny_clip, tiny_sae, tiny_images[2:3], [Edit(3), Edit(9, "add", 5.0)], -2, head)
    torch.testing.assert_close(panel.steered.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    shown = {name: (before, after) for name, before, after in panel.shown["bars"]}
    for name, (before, after) in shown.items():
        c = tiny_dataset.class_names.index(name)
        assert before == pytest.approx(float(expected.probabilities_before[0, c]), abs=1e-5)
        assert after == pytest.approx(float(expected.probabilities[0, c]), abs=1e-5)
    assert tiny_dataset.class_names[int(expected.probabilities[0].argmax())] in shown
    assert [slider["edited"] for slider in panel.shown["sliders"]] == [True, False, True]


@pytest.mark.parametrize(("where", "place"), [("all", None), ("cls", "cls"), ("patches", "patches"), ("selected", [4, 90])])
def test_edits_act_where_the_panel_says(panel, where, place):
    panel.patches, panel.where = [90, 4, 4], where
    panel.edits = [{"latent": 5, "op": "scale", "value": 2.0}]
    assert panel.to_edits() == [Edit(5, "scale", 2.0, place)]
    assert panel.selection["patches"] == [4, 90] and panel.shown["where"] == where


def test_a_selection_is_kept_and_set_again(panel):
    chosen = {"image": 6, "latents": [9, 3], "latent": 3, "patches": [4, 90], "where": "selected", "batch": [1, 2]}
    chosen["edits"] = [{"latent": 3, "op": "scale", "value": 2.0}]
    panel.selection = dict(reversed(chosen.items()))  # another image takes edits back: the order of setting is the panel's
    assert panel.selection == chosen and panel.shown["image"] == 6 and panel.to_edits() == [Edit(3, "scale", 2.0, [4, 90])]
    panel.edits, panel.patches, panel.where = [], [], "all"
    panel.selection = chosen
    assert panel.selection == chosen
    with pytest.raises(ValueError, match="no choice 'color'; valid are image, latents, latent, patches, where, edits, batch"):
        panel.selection = {"color": 3}


def test_the_line_of_python_is_the_edit(panel, tiny_clip, tiny_sae, tiny_dataset, head):
    panel.image, panel.where, panel.patches = 6, "selected", [7, 8]
    panel.edits = [{"latent": 5, "op": "scale", "value": 3.0}, {"latent": 3, "op": "add", "value": -0.25}]
    names = {"ps": ps, "clip": tiny_clip, "sae": tiny_sae, "dataset": tiny_dataset, "head": head}
    steered = eval(panel.code, names)  # noqa: S307 (our own line)
    torch.testing.assert_close(steered.logits, panel.steered.logits, rtol=0, atol=1e-5)
    assert panel.shown["code"] == panel.code and "\n" not in panel.code


def test_another_image_starts_afresh(panel, tiny_clip, tiny_sae, tiny_dataset, head):
    panel.edits = [{"latent": 5, "op": "scale", "value": 2.0}]
    panel.image = 4
    assert panel.edits == [] and panel.latents == [3, 5, 9] and panel.shown["image"] == 4  # latents that were given stay
    free = SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, head=head, image=1)
    for image in (1, 3):
        free.image = image
        residual = tiny_clip.run_to(tiny_clip.preprocess(tiny_dataset[image].image)[None], -2)
        scores = owed(tiny_clip, tiny_sae, residual, head)[0]
        assert free.latents == scores.topk(5).indices.tolist()
    free.latents = [0, 1]
    free.image = 5
    assert free.latents == [0, 1]


def test_the_same_edits_on_other_images_say_how_their_classes_fare(panel, tiny_clip, tiny_sae, tiny_images, tiny_dataset, head):
    panel.edits, panel.latent = [{"latent": 3, "op": "scale", "value": 4.0}], 3
    assert panel.others == {}
    panel.batch = [2, 5, 2]
    expected = steer(tiny_clip, tiny_sae, tiny_images[[2, 5]], [Edit(3, "scale", 4.0)], -2, head)
    card, rows, own = panel.batch_card, [0, 1], [tiny_dataset.labels[i] for i in (2, 5)]
    assert card.images == [2, 5] and card.labels == [tiny_dataset.class_names[c] for c in own]
    np.testing.assert_allclose(card.before, expected.probabilities_before[rows, own], atol=1e-5)
    np.testing.assert_allclose(card.after, expected.probabilities[rows, own], atol=1e-5)
    assert card.kept.tolist() == [[int(p[i].argmax()) == own[i] for p in (expected.logits_before, expected.logits)] for i in rows]
    h = tiny_sae.encode(tiny_clip.residual(tiny_images[[2, 5]], -2)).detach()
    np.testing.assert_allclose(card.heats.reshape(2, -1), 4 * h[:, 1:, 3], rtol=1e-4, atol=1e-5)
    change = 100 * (card.after - card.before).mean()
    assert f"{change:+.0f} points on average" in panel.others["note"]
    panel.latent = 9  # not edited: as it is
    np.testing.assert_allclose(panel.batch_card.heats.reshape(2, -1), h[:, 1:, 9], atol=1e-5)


def test_a_picture_of_ones_own_is_steered(panel, tiny_clip, tiny_sae, tiny_dataset, head):
    panel.edits = [{"latent": 5, "op": "scale", "value": 2.0}]
    panel.upload(picture_file(), BAD)
    assert panel.edits == [] and panel.shown["uploaded"] == BAD  # another picture starts afresh
    panel.edits = [{"latent": 5, "op": "add", "value": 3.0}]
    names = {"ps": ps, "clip": tiny_clip, "sae": tiny_sae, "head": head, "picture": read_upload(picture_file())[0]}
    torch.testing.assert_close(eval(panel.code, names).logits, panel.steered.logits, rtol=0, atol=1e-4)  # noqa: S307
    first = panel.shown["jpeg"]
    panel.upload(picture_file(color=(20, 40, 200)), BAD)
    assert panel.shown["jpeg"] != first and panel.edits == []
    panel.image = 1
    assert panel.uploaded == "" and panel.shown["image"] == 1 and panel.shown["label"] == tiny_dataset.class_names[tiny_dataset.labels[1]]


def test_page_steers_uploads_and_other_images(show, panel):
    page = show(panel)
    page.set_input_files("input[type=file]", {"name": BAD, "mimeType": "image/png", "buffer": picture_file()})
    page.wait_for_selector("h3:has-text('Your image')")
    assert page.locator("h3 img").count() == 0 and page.locator(".psx-ref").count() == 0
    page.click("[aria-label='Next image']")
    page.wait_for_selector("h3:has-text('Image 1 ·')")
    page.click("[aria-label^='Turn off latent 3']")
    page.select_option("[aria-label='Images that the edits act on']", "any")
    page.wait_for_selector(".psx-ref:has-text('→')")
    assert page.locator(".psx-ref").count() == len(panel.batch) == 10 and 1 not in panel.batch
    page.click("[aria-label^='Turn off latent 9']")
    page.wait_for_function("window.model.get('edits').length === 2")
    assert panel.others["note"] in page.wait_for_selector(f"text={panel.others['note']}").inner_text()
    page.select_option("[aria-label='Images that the edits act on']", "class")  # each class has one image here
    page.wait_for_selector(".psx-refs", state="hidden")
    assert panel.batch == [] and panel.edits


def test_figure_shows_what_is_on_screen(panel):
    panel.where, panel.patches, panel.latent = "selected", [3, 4], 3
    panel.edits = [{"latent": 3, "op": "scale", "value": 2.5}]
    text = figure_text(panel)
    assert all(words in text for words in ("a wheel", "×2.5", "2 selected patches", "Artwork", panel.shown["bars"][0][0]))
    assert repr(panel).startswith("SteeringPanel(") and len(panel._repr_mimebundle_()[0]["text/plain"]) < 120


def strength(latent):
    return f".psx-sliders input[aria-label^='Strength of latent {latent}']"


def test_page_keys_move_a_slider_and_the_bars_follow(show, panel):
    page = show(panel)
    page.wait_for_selector(".psx-odds li")
    before = page.inner_text(".psx-odds")
    page.focus(strength(9))
    page.keyboard.press("End")
    page.wait_for_function("window.model.get('shown').sliders[2].edited")
    assert panel.edits == [{"latent": 9, "op": "scale", "value": 4.0}]
    page.wait_for_function(f"document.querySelector('.psx-odds').innerText !== {before!r}")
    assert page.evaluate("document.activeElement.type") == "range"  # the focus stays where it was
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("window.model.get('edits')[0].value < 4")
    assert panel.edits[0]["value"] == pytest.approx(3.9)
    page.click("text=Reset")
    page.wait_for_function("!window.model.get('shown').sliders[2].edited")
    assert panel.edits == [] and page.inner_text(".psx-odds") == before


def test_page_off_add_and_remove(show, panel):
    page = show(panel)
    page.click("[aria-label^='Turn off latent 3']")
    page.wait_for_function("window.model.get('shown').sliders[0].edited")
    assert panel.edits == [{"latent": 3, "op": "scale", "value": 0.0}]
    page.select_option("select[aria-label^='Multiply or add: latent 9']", "add")
    page.focus(strength(9))
    page.keyboard.press("End")
    page.wait_for_function("window.model.get('shown').sliders[2].value > 0")
    assert {edit["op"] for edit in panel.edits} == {"scale", "add"}
    page.click("[aria-label^='Remove the slider of latent 3']")
    page.wait_for_function("window.model.get('shown').sliders.length === 2")
    assert [edit["latent"] for edit in panel.edits] == [9]
    enter(page, SEARCH, "wheel")  # by name
    page.wait_for_selector(strength(3))
    enter(page, SEARCH, "999")  # there is none: nothing happens
    assert panel.latents == [5, 9, 3]


def test_the_strongest_latent_of_selected_patches_is_added_and_its_edit_seen(show, panel, tiny_clip, tiny_sae, tiny_images):
    h = tiny_sae.encode(tiny_clip.residual(tiny_images[:1], -2))[0].detach()
    here = h[[31, 32]].mean(0)
    here[[3, 5, 9]] = 0
    panel.patches, expected = [30, 31], int(here.argmax())
    page = show(panel)
    page.click("text=Add the patches' latent")
    page.wait_for_selector(strength(expected))
    assert panel.latents == [3, 5, 9, expected] and panel.latent == expected
    before = panel.card["heat"]
    np.testing.assert_allclose(before.ravel(), h[1:, expected], atol=1e-5)
    panel.patches, panel.where = [30], "selected"
    panel.edits = [{"latent": expected, "op": "scale", "value": 3.0}]
    after = panel.card["heat"].ravel()
    assert after[30] == pytest.approx(3 * before.ravel()[30], rel=1e-4) and panel.shown["edited"]
    np.testing.assert_allclose(np.delete(after, 30), np.delete(before.ravel(), 30), atol=1e-5)


def test_page_selects_patches_by_mouse_and_keys(show, panel):
    page = show(panel)
    page.wait_for_selector(".psx-odds li")
    bare = pixels(page, ".psx-stage")
    page.mouse.move(*place(page, 2, 3))
    page.mouse.down()
    page.mouse.move(*place(page, 2, 5), steps=12)
    page.mouse.up()
    page.wait_for_function("window.model.get('shown').patches.length === 3")
    assert panel.patches == [31, 32, 33] and panel.where == "selected"
    assert np.abs(pixels(page, ".psx-stage").astype(int) - bare).sum() > 0
    page.focus(".psx-stage")
    page.keyboard.press("ArrowDown")  # from the last touched patch
    page.keyboard.press(" ")
    page.wait_for_function("window.model.get('shown').patches.length === 4")
    assert panel.patches == [31, 32, 33, 47]
    page.wait_for_selector("[aria-live]:has-text('Row 4, column 6, selected')", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_function("window.model.get('shown').patches.length === 0")


def test_page_shows_a_latents_place_and_its_name_as_text(show, panel):
    page = show(panel)
    page.wait_for_selector(".psx-odds li")
    bare = pixels(page, ".psx-stage")
    page.click("[title^='Show where latent 5']")
    page.wait_for_selector(".psx-pick[aria-pressed='true']")
    assert panel.latent == 5
    assert np.abs(pixels(page, ".psx-stage").astype(int) - bare).mean() > 1
    assert "<img src=x" in page.inner_text(".psx-sliders")
    assert page.locator(".psx-sliders img").count() == 0 and page.title() == ""
