"""The explorers in two layers: their traits in Python, and their page in headless Chromium with a fake model. No Jupyter in either."""

import dataclasses
import io
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from explorer_pages import BAD, IMAGE, SEARCH, check_that_it_fits, enter, figure_text, picture_file, pixels, place, wire
from PIL import Image

from patchsae_utils.data import load_dataset
from patchsae_utils.explorer import AdaptationView, LatentExplorer, PatchExplorer, SteeringPanel, cards, point, pointing, widgets
from patchsae_utils.explorer.gallery import export_gallery
from patchsae_utils.explorer.sliders import latent_slider, slider
from patchsae_utils.explorer.widgets import link
from patchsae_utils.interventions import attribute_latents, one_latent_off, sweep_masks
from patchsae_utils.latents import activation_levels, reference_images
from patchsae_utils.latents.reading import latent_masks
from patchsae_utils.plots import heat as heat_map
from patchsae_utils.sae.model import SparseAutoencoder


def test_heat_maps_travel_as_one_byte_a_patch_and_come_back_close():
    heats = np.random.default_rng(0).exponential(2, (3, 14, 14)).astype(np.float32)
    data, scale = cards.encode_heats(heats)
    assert len(data) == 3 * 196 and scale == heats.max()
    back = scale * (np.frombuffer(data, np.uint8).reshape(-1, 14, 14) / np.float32(255)) ** 2  # what the page does with the bytes
    assert np.abs(np.sqrt(back) - np.sqrt(heats)).max() <= 0.51 / 255 * np.sqrt(scale)


def test_overlay_hides_what_is_not_above_the_threshold():
    heat = np.array([[0.0, 0.2], [0.21, 1.0]])
    colors = heat_map.overlay(heat, 1.0, 0.2, 1.0, "heat")[..., 3]
    assert (colors > 0).tolist() == [[False, False], [True, True]]
    spot = heat_map.overlay(heat, 1.0, 0.2, 1.0, "spotlight")[..., 3]
    assert spot[0, 0] == spot[0, 1] == 255 and spot[1, 1] == 0 < spot[1, 0] < 255
    with pytest.raises(ValueError, match="spotlight, heat"):
        heat_map.overlay(heat, 1.0, 0.2, 1.0, "rainbow")


def test_heat_maps_agree_with_latent_masks(tiny_clip, tiny_sae, tiny_dataset, tiny_images):
    reader = cards.Reader(tiny_clip, tiny_sae, tiny_dataset)
    expected = latent_masks(tiny_clip, tiny_sae, tiny_images, [7], -2)[:, 0]
    np.testing.assert_allclose(reader.heats(range(8), 7), expected, atol=1e-5)
    np.testing.assert_allclose(reader.latents(2)[1:, 7].reshape(14, 14), expected[2], atol=1e-5)


def test_names_come_in_several_forms():
    frame = pd.DataFrame({"latent": [4, 6], "name": ["red", "unnamed"], "kind": ["color", "unnamed"], "score": [0.5, 0.1]})
    assert cards.read_names(frame, 8) == {4: cards.Name("red", "color", 0.5)}
    assert str(cards.read_names(frame, 8)[4]) == "red (color)"
    assert cards.read_names({4: "red"}, 8) == {4: cards.Name("red")} == cards.read_names(["", "", "", "", "red"], 8)
    assert cards.read_names(None, 8) == {}
    with pytest.raises(ValueError, match="latents 0 to 7"):
        cards.read_names({9: "red"}, 8)
    with pytest.raises(ValueError, match="'name'"):
        cards.read_names(frame.drop(columns="name"), 8)


def test_distinctive_latents_are_those_that_few_images_activate(summary):
    weights = cards.distinctiveness(summary)
    alive = ~summary.dead.numpy()
    assert (weights >= 0).all() and (weights[~alive] == 0).all()
    assert weights[alive][summary.frequency.numpy()[alive].argmin()] == weights.max()


def test_pointing_needs_no_ground_truth(tiny_clip, tiny_sae, summary, tiny_dataset):
    class Plain:  # a data set that knows labels only
        labels, class_names, spec, split = tiny_dataset.labels // 2, tiny_dataset.class_names, "plain", "test"
        __len__ = lambda self: len(tiny_dataset)  # noqa: E731
        __getitem__ = lambda self, i: tiny_dataset[i]  # noqa: E731

    frame = point(tiny_clip, tiny_sae, summary, Plain())
    assert list(frame["kind"].unique()) == ["class"]
    assert (frame["chance"] <= 1).all()
    Plain.labels = tiny_dataset.labels  # one image of each class
    assert "nothing can be followed" in pointing.pointing_sentence(point(tiny_clip, tiny_sae, summary, Plain()))


@pytest.mark.parametrize("knows", [True, False])
def test_pointing_counts_a_latent_that_knows_one_background(tiny_clip, tiny_sae, summary, tiny_dataset, monkeypatch, knows):
    seen, shown = [], pointing._shown  # what the drawn images show, in their order
    monkeypatch.setattr(pointing, "_shown", lambda *a: seen.append(shown(*a)) or seen[-1])

    def select(sae, tokens, latents):
        background = np.stack([kinds["background"] for kinds in seen])
        one = knows * (background == background.max())
        return torch.from_numpy(one.astype(np.float32))[:, :, None].expand(-1, -1, len(latents))

    monkeypatch.setattr(pointing, "select_latents", select)
    frame = pointing.point(tiny_clip, tiny_sae, summary, tiny_dataset)
    assert "object" not in set(frame["kind"])  # no class was drawn twice: there is none to find
    of_images = np.array([kinds["background"].max() for kinds in seen])
    right = (of_images == of_images.max()) & ((of_images == of_images.max()).sum() > 1) & knows
    assert np.allclose(frame.query("kind == 'background'")["hits"], right[of_images >= 0].mean())
    if not knows:  # active nowhere else: finds nothing
        assert (frame["hits"] == 0).all()


WRONG = [
    ("latents", "latent", 64, "latent"), ("latents", "latent", -2, "latent"), ("latents", "image", 24, "image"), ("latents", "opacity", 1.5, "opacity"),
    ("latents", "tau", -1.0, "tau"), ("adaptation", "patch", 196, "no patch 196"), ("patches", "patches", [4, 196], "0 to 195"),
    ("panel", "image", 24, "no image 24"), ("panel", "latents", [64], "no latent 64"), ("panel", "batch", [24], "no image 24"),
    ("panel", "patches", [196], "0 to 195"), ("panel", "edits", [{"latent": 64, "op": "scale", "value": 1.0}], "no latent 64"),
    ("panel", "edits", [{"latent": 3, "op": "set", "value": 1.0}], "scale"), ("panel", "edits", [{"latent": 3, "op": "scale", "value": -1.0}], "0 or more"),
    ("panel", "edits", [{"latent": 3, "op": "add", "value": "many"}], "finite"), ("panel", "edits", [{"latent": 3}], "An edit is"),
    ("panel", "edits", [{"latent": 3, "op": "add", "value": float("nan")}], "finite"),
    ("panel", "edits", [{"latent": 3, "op": "add", "value": 1e38}], "up to 1e"),  # made probabilities of NaN
    ("panel", "edits", [{"latent": 3, "op": "scale", "value": 10**400}], "up to 1e"),
    ("panel", "edits", [{"latent": True, "op": "add", "value": 1.0}], "no latent True"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "trait", "value", "message"), WRONG)
def test_choices_that_do_not_exist_are_refused_and_change_nothing(request, kind, trait, value, message):
    view = request.getfixturevalue(kind)
    before = getattr(view, trait)
    with pytest.raises(ValueError, match=message):
        setattr(view, trait, value)
    with pytest.raises(ValueError, match=message):
        view.set_state({trait: value})
    assert getattr(view, trait) == before


def test_without_a_summary_patches_are_listed_by_activation_only(tiny_clip, tiny_sae, tiny_dataset):
    view = PatchExplorer(tiny_clip, tiny_sae, None, tiny_dataset, patch=3)
    assert view.shown["patch_latents"]
    with pytest.raises(ValueError, match="summary"):
        view.rank = "distinctive"
    assert view.ranks == ["activation", "contrast", "prediction"]


def test_linked_explorers_share_their_choices_until_parted(latents, patches):
    latents.latent = 3
    links = link(patches, latents)
    assert patches.latent == latents.latent == 3  # the one that has a choice sets it
    patches.latent = 9
    assert latents.latent == 9 and latents.shown["latent"] == 9
    latents.image = 5
    assert patches.image == 5 and patches.shown["image"] == 5
    for one in links:
        one.unlink()
    patches.latent = 10
    assert latents.latent == 9
    with pytest.raises(ValueError, match="two explorers"):
        link(latents)


def test_all_views_open_on_one_named_latent_where_it_is_strongest(tiny_clip, tiny_sae, summary, tiny_dataset, named, show):
    parts = tiny_clip, tiny_sae, summary, tiny_dataset, named
    latents, patches, panel = LatentExplorer(*parts), PatchExplorer(*parts), SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, named)
    assert latents.latent == patches.latent == 7  # the surest name of an object, not the one of a color
    assert latents.image == patches.image == int(summary.top_images[7, 0])
    assert patches.card.heat.flat[patches.patch] == patches.card.heat.max() > 0
    link(latents, patches, panel)
    assert (panel.latent, panel.image) == (7, latents.image) and panel.card["heat"].max() > 0
    page = show(latents)
    page.wait_for_selector("h3:has-text('Latent 7 · redwood (object)')")
    assert page.get_attribute(".psx-ref >> nth=0", "aria-pressed") == "true"
    unnamed = LatentExplorer(*parts[:-1])  # no names: whose reference images share their class most
    assert summary.label_entropy[unnamed.latent] < summary.label_entropy.nanmedian()


def test_views_of_the_same_things_share_what_they_have_read(tiny_clip, tiny_sae, summary, tiny_dataset, monkeypatch):
    parts = tiny_clip, tiny_sae, summary, tiny_dataset
    views = [PatchExplorer(*parts), PatchExplorer(*parts), SteeringPanel(tiny_clip, tiny_sae, tiny_dataset)]
    views.append(AdaptationView(tiny_clip, {"tools": tiny_clip}, tiny_sae, datasets={"tools": tiny_dataset}))
    likeness = SimpleNamespace(embeddings=torch.ones(24, 16), table=pd.DataFrame({"dictionary": ["SAE"] * 64, "score": 0.0}))
    words = [LatentExplorer(*parts, likeness=likeness) for _ in range(2)]
    assert len({id(view._reader) for view in views + words}) == 1 and len({id(reader) for reader in views[-1]._open("tools")}) == 1
    assert words[0]._find is words[1]._find
    read, run_to = [], tiny_clip.run_to
    monkeypatch.setattr(tiny_clip, "run_to", lambda images, layer: read.append(len(images)) or run_to(images, layer))
    for view in views:
        view.image = 17
    assert sum(read) <= 1  # once for all
    views[0].upload(picture_file(), "mine.png")
    assert views[1].uploaded == "" and views[1].image >= 0
    with pytest.raises(ValueError, match="No picture 'mine.png'"):
        views[1].uploaded = "mine.png"


def test_a_view_is_saved_as_png_and_svg(show, latents, patches):
    patches.patch, patches.latent = 20, 3
    for view, kind, start in ((latents, "png", b"\x89PNG"), (patches, "svg", b"<?xml")):
        page, others = show(view), plt.get_fignums()
        with page.expect_download(timeout=180_000) as saved:
            page.click(f"text=Save as {kind.upper()}")
        assert saved.value.suggested_filename == f"{view.kind}.{kind}" and Path(saved.value.path()).read_bytes().startswith(start)
        assert plt.get_fignums() == others
    view._receive({"kind": "export", "format": "py"}, [])
    assert view.notice and not {"py"} & set(view.exported)


def test_page_tells_of_every_error(show, latents):
    page = show(latents)
    with pytest.raises(ValueError, match="latent 64"):
        latents.set_state({"latent": 64})
    page.evaluate("text => window.update({ notice: text })", latents.notice)
    page.wait_for_selector("[role=alert]:has-text('There is no latent 64')")
    latents.set_state({"latent": 3})
    assert latents.notice == ""
    page.evaluate(
        "card => window.update({ latent: card.latent, notice: '', shown: card })",
        {**wire(latents.shown), "images": [{"index": 9999, "jpeg": wire(b"no")}]},
    )
    page.wait_for_selector("[role=alert]:has-text('could not be drawn')")


def test_plain_sliders_show_what_a_function_draws(tiny_clip, tiny_sae, summary, tiny_dataset, named):
    draw = lambda k, drawn: plt.figure(figsize=(k, 1)) if drawn else np.full((4, k, 3), 9, np.uint8)  # noqa: E731
    others = plt.get_fignums()  # which tests before this one may have left open
    box = slider(draw, k=[3, 5], drawn=[("no", 0), ("yes", 1)])
    size = lambda: Image.open(io.BytesIO(box.children[-1].value)).size  # noqa: E731
    assert size() == (3, 4)
    box.children[0].value = 5
    assert size() == (5, 4)
    box.children[1].value = 1
    assert size()[0] > 20 and plt.get_fignums() == others
    latents, picture = latent_slider(tiny_clip, tiny_sae, summary, tiny_dataset, named).children
    assert (latents.value, latents.label) == (7, "7 redwood (object)")
    before = np.asarray(Image.open(io.BytesIO(picture.value)))
    latents.value = 3
    after = np.asarray(Image.open(io.BytesIO(picture.value)))
    assert before.shape == after.shape == (150, 900, 3) and (before != after).any()


def test_modules_are_joined_each_in_its_own_scope():
    for name in ("latent", "patch", "steering", "adaptation", "gallery"):
        code = widgets.module(f"{name}.js")
        assert not re.search(r"^(import|export (?!default))", code, re.M) and code.count("export default") == (name != "gallery")


@pytest.mark.parametrize(
    "sae, message", [(SparseAutoencoder(8, 16), "dimensional"), (SparseAutoencoder(32, 64, metadata={"layer": 0}), "layer 0")]
)
def test_an_sae_of_another_width_or_layer_is_refused_by_every_view(tiny_clip, tiny_dataset, summary, sae, message):
    """FAULTS C8."""
    for view in (
        lambda: LatentExplorer(tiny_clip, sae, summary, tiny_dataset),
        lambda: PatchExplorer(tiny_clip, sae, None, tiny_dataset),
        lambda: SteeringPanel(tiny_clip, sae, tiny_dataset),
        lambda: AdaptationView(tiny_clip, {"tools": tiny_clip}, sae, datasets={"tools": tiny_dataset}),
    ):
        with pytest.raises(ValueError, match=message):
            view()


def test_a_summary_of_other_images_or_another_sae_is_refused(tiny_clip, tiny_sae, tiny_dataset, summary, tmp_path):
    """FAULTS C8: an SAE of equal size has other latents by the same numbers."""
    fewer = load_dataset("openmoji/tools", "test", n_images=10)
    for view in (LatentExplorer, latent_slider):
        with pytest.raises(ValueError, match="24 images"):
            view(tiny_clip, tiny_sae, summary, fewer)
    other, attribution = SparseAutoencoder(tiny_sae.d_in, tiny_sae.d_sae, seed=9), attribute_latents(tiny_clip, tiny_sae, tiny_dataset)
    shown, sweep = (tiny_clip, other, summary, tiny_dataset), (tiny_clip, other, tiny_dataset, [1], "oracle")
    for view in (
        *(
            partial(view, *shown)
            for view in (LatentExplorer, PatchExplorer, latent_slider, partial(export_gallery, tmp_path / "gallery"), point)
        ),
        lambda: reference_images(tiny_clip, other, tiny_dataset, summary, [0], -2),
        lambda: activation_levels(tiny_clip, other, tiny_dataset, 0, -2, summary),
        lambda: one_latent_off(tiny_clip, other, tiny_dataset, summary),
        lambda: sweep_masks(*sweep, class_counts=summary),
        lambda: sweep_masks(*sweep, attribution=attribution, rank_by="attribution"),
    ):
        with pytest.raises(ValueError, match="another SAE"):
            view()


def test_figures_show_what_is_on_screen(latents, patches):
    latents.latent = 3
    patches.patch, patches.latent = 20, 3
    assert "red (color)" in figure_text(latents) and "This patch" in figure_text(patches)
    latents.latent = -1
    with pytest.raises(ValueError, match="latent"):
        latents.figure()


def test_page_slider_and_box_choose_a_latent(show, latents):
    order = np.frombuffer(latents.order, np.uint32)
    latents.latent = int(order[0])
    page = show(latents)
    page.focus("input[aria-label='Latent, in the chosen order']")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"h3:has-text('Latent {order[1]}')")
    assert latents.latent == order[1]
    enter(page, SEARCH, "3")
    page.wait_for_selector("h3:has-text('Latent 3 · red (color)')")
    enter(page, SEARCH, "9999")  # there is none: nothing happens
    assert latents.latent == 3
    page.keyboard.press("Escape")
    page.select_option("label:has-text('Sort by') select", "label_entropy")
    rank = cards.living(latents._summary, "label_entropy").tolist().index(3)
    page.wait_for_function(f"document.querySelector('output').textContent.startsWith('{rank + 1} of')")
    page.click(".psx-scatter canvas", position={"x": 20, "y": 20})
    page.wait_for_function("!document.querySelector('h3').textContent.startsWith('Latent 3 ')")


@pytest.mark.parametrize("mode", heat_map.MODES)
def test_page_blends_as_python_does(show, latents, mode):
    latents.latent, latents.mode = 3, mode
    page = show(latents)
    page.wait_for_selector(".psx-ref")
    card = latents.card
    expected = heat_map.blend(card.pictures[0], card.heats[0], card.heats.max(), latents.tau, latents.opacity, mode, size=160)
    drawn = pixels(page, ".psx-ref canvas")
    assert drawn.shape == expected.shape
    assert np.abs(drawn.astype(int) - expected).mean() < 4


def test_page_needs_no_python_for_opacity_and_threshold(show, latents):
    latents.latent = 3
    page = show(latents)
    page.wait_for_selector(".psx-ref")
    with_heat = pixels(page, ".psx-ref canvas")
    page.evaluate("window.python = async () => '{}'")
    page.fill("label:has-text('Threshold') input", "1000")
    dark = pixels(page, ".psx-ref canvas")  # nothing is above it: no spot is lit
    page.fill("label:has-text('Opacity') input", "0")
    bare = pixels(page, ".psx-ref canvas")
    assert dark.mean() < with_heat.mean() < bare.mean()
    plain = heat_map.blend(latents.card.pictures[0], np.zeros((14, 14)), 1.0, 0.0, 0.0, size=160)
    assert np.abs(plain.astype(int) - bare).mean() < 4


def test_page_says_that_a_latent_is_dead(show, tiny_clip, tiny_sae, summary, tiny_dataset):
    dead, images, values = summary.dead.clone(), summary.top_images.clone(), summary.top_values.clone()
    dead[8], images[8], values[8] = True, -1, 0
    counts = summary.class_counts.clone()
    counts[:, 8] = 0
    entropy = torch.where(dead, torch.nan, summary.label_entropy)
    changed = dataclasses.replace(summary, dead=dead, top_images=images, top_values=values, class_counts=counts, label_entropy=entropy)
    view = LatentExplorer(tiny_clip, tiny_sae, changed, tiny_dataset, latent=8)
    assert 8 not in np.frombuffer(view.order, np.uint32)
    page = show(view)
    page.wait_for_selector("text=No image of the data set activates this latent.")
    assert page.locator(".psx-ref").count() == 0


def test_page_mouse_and_keys_choose_a_patch(show, patches):
    page = show(patches)
    page.wait_for_selector(".psx-pick")
    page.mouse.click(*place(page, 2, 3))
    page.wait_for_function("window.model.get('shown').patch === 31")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    page.wait_for_function("window.model.get('shown').patch === 3")  # the edge holds
    assert patches.patch == 3
    page.wait_for_selector("[aria-live]:has-text('Row 1, column 4')", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_function("window.model.get('shown').patch === -1")
    page.mouse.move(0, 0)
    page.wait_for_selector("text=None yet: point at the image.")


def test_page_steps_through_images(show, patches):
    page = show(patches)
    page.click("[aria-label='Next image']")
    page.wait_for_selector("h3:has-text('Image 1 ·')")
    enter(page, IMAGE, "5")
    page.wait_for_selector("h3:has-text('Image 5 ·')")
    enter(page, IMAGE, "99")
    assert patches.image == 5 and page.input_value(IMAGE) == "5"


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_narrow_and_dark_outputs(show, tiny_clip, tiny_sae, summary, tiny_dataset, dark):
    parts = tiny_clip, tiny_sae, summary, tiny_dataset
    for view in (
        LatentExplorer(*parts, names={latent: f"{latent}_" + 3 * BAD.replace(" ", "_") for latent in range(64)}, latent=3),
        PatchExplorer(*parts, patch=100, latent=3),
        SteeringPanel(tiny_clip, tiny_sae, tiny_dataset, {3: BAD}, latents=[3, 5, 9], latent=3, batch=[3, 4, 5]),
        AdaptationView(tiny_clip, {"tools": tiny_clip}, tiny_sae, summary=summary, datasets={"tools": tiny_dataset}, latent=3, patch=100),
    ):
        page = show(view, dark=dark)
        page.wait_for_selector(".psx-odds li" if view.kind == "adaptation" else ".psx-ref")
        check_that_it_fits(page, view, dark)
