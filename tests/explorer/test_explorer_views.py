"""What the explorers do beyond looking: search, several patches, uploads of strangers, two models side by side, and the gallery file."""

import json
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_pages import BAD, IMAGE, UNLABELLED, enter, figure_text, picture_file, pixels, place, wait_for_pixels, wire

from patchsae_utils.explorer import LatentExplorer, cards, export_gallery, reader
from patchsae_utils.interventions.tail import dataset_head
from patchsae_utils.plots.heat import blend


def test_neighbours_are_the_nearest_decoder_directions(latents, tiny_sae):
    latents.latent = 3
    rows = torch.nn.functional.normalize(tiny_sae.W_dec, dim=1)
    cosine = (rows @ rows[3]).detach()
    cosine[3] = -2
    assert [i for i, _ in latents.card.neighbors] == cosine.topk(6).indices.tolist()
    assert latents.card.neighbors[0][1] == pytest.approx(float(cosine.max()), abs=1e-5)
    assert [row[0] for row in latents.shown["neighbors"]] == cosine.topk(6).indices.tolist()


def test_latents_can_be_sorted_by_what_was_given_only(latents, tiny_clip, tiny_sae, summary, tiny_dataset):
    latents.sort = "score"
    assert np.frombuffer(latents.order, np.uint32)[:3].tolist() == [7, 3, 5]
    with pytest.raises(ValueError, match="likeness="):
        latents.sort = "monosemanticity"
    assert latents.sort == "score"
    scores = np.linspace(0, 1, 64)
    table = pd.DataFrame({"dictionary": ["SAE"] * 64 + ["random directions"], "score": [*scores, 9.0]})
    likeness = SimpleNamespace(table=table, embeddings=torch.ones(24, 16))
    view = LatentExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, likeness=likeness, sort="monosemanticity")
    assert np.frombuffer(view.order, np.uint32)[0] == np.flatnonzero(~summary.dead.numpy())[-1]
    view.latent = 9
    assert ["Monosemanticity", f"{scores[9]:.2f}"] in view.shown["facts"]
    likeness.table = table[:9]
    with pytest.raises(ValueError, match="has 64"):
        LatentExplorer(tiny_clip, tiny_sae, summary, tiny_dataset, likeness=likeness)


def test_a_contour_is_drawn_at_the_threshold_and_nowhere_else():
    picture = np.full((56, 56, 3), 120, np.uint8)
    heat = np.zeros((14, 14), np.float32)
    heat[3:6, 4:9] = 1.0
    plain, lined = (blend(picture, heat, 1.0, 0.5, 0.0, size=448, contour=contour) for contour in (False, True))
    changed = np.argwhere((plain != lined).any(-1))
    assert changed.min(0) == pytest.approx([3 * 32, 4 * 32], abs=3)
    assert changed.max(0) == pytest.approx([6 * 32, 9 * 32], abs=3)
    assert not (plain != lined)[4 * 32 + 8 : 5 * 32 - 8, 5 * 32 : 8 * 32].any()


def test_what_a_stranger_sends_is_ignored(latents, patches):
    for view in (latents, patches):
        before = view.shown
        for content in (None, 3, [], {}, {"kind": "prefetch"}, {"kind": "prefetch", "latent": "4"}, {"kind": "upload"}, {"kind": "rm"}):
            view._receive(content, [])
        assert view.shown is before


def test_several_patches_are_listed_by_their_mean(patches, tiny_clip, tiny_sae, tiny_images):
    patches.set_state({"image": 2, "patches": [100, 20], "patch": 20})
    h = tiny_sae.encode(tiny_clip.residual(tiny_images[2:3], -2))[0, [101, 21]].mean(0)
    assert [entry["latent"] for entry in patches.shown["patch_latents"]] == h.topk(8).indices.tolist()
    assert patches.patches == [20, 100] and patches.patch == 20
    patches.patch = 7
    assert patches.patches == [7]
    patches.patch = -1
    assert patches.patches == []
    patches.patches = [4, 9]
    assert patches.patch == 9


@pytest.mark.parametrize("kind", reader.FORMATS)
def test_uploads_of_every_kind_are_read(kind):
    picture, name = reader.read_upload(picture_file(kind), "a\nb\x00" + "c" * 200)
    assert picture.mode == "RGB" and picture.size == (60, 40)
    assert np.abs(np.asarray(picture)[20, 30].astype(int) - (200, 30, 30)).max() < 12
    assert len(name) == 80 and name.isprintable()


def bomb():
    """A PNG of a few bytes that says it has 900 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "message"), [
    (b"", "empty"),
    (b"GIF89a but no picture", "can't be read"),
    (b"%PDF-1.4", "can't be read"),
    (picture_file()[:60], "can't be read"),
    (picture_file("TIFF"), "can't be read"),
    (bytes(reader.MAX_BYTES + 1), "at most 8 MB"),
    (bomb(), "million"),
    (picture_file(size=(8000, 6000)), "48 million"),
])  # fmt: skip
def test_bad_uploads_are_told_and_change_nothing(patches, data, message):
    with pytest.raises(reader.UploadError, match=message):
        patches.upload(data, BAD)
    before = patches.shown
    patches._receive({"kind": "upload", "name": BAD}, [memoryview(data)])
    assert message in patches.notice and patches.shown is before and patches.uploaded == ""


def test_an_uploaded_picture_is_read_like_any_other(patches, tiny_clip, tiny_sae):
    data = picture_file(color=(20, 40, 200))
    patches.upload(data, "mine.png")
    assert patches.shown["uploaded"] == "mine.png" == patches.card.label
    picture = tiny_clip.preprocess(reader.read_upload(data)[0])[None]
    h = tiny_sae.encode(tiny_clip.residual(picture, -2))[0]
    assert patches.shown["image_latents"][0]["latent"] == int(h.mean(0).argmax())
    first = patches.shown
    patches.upload(picture_file(color=(250, 250, 0)), "mine.png")  # another of the same name
    assert patches.shown["jpeg"] != first["jpeg"]
    patches.image = 3
    assert patches.uploaded == "" and patches.shown["image"] == 3
    with pytest.raises(ValueError, match="No picture 'other'"):
        patches.uploaded = "other"


def test_groups_say_what_halved_and_what_doubled(adaptation, tiny_clip, tiny_sae, tiny_images):
    adaptation.image = 2
    card = adaptation.card
    base = tiny_sae.encode(tiny_clip.residual(tiny_images[2:3], -2))[0].mean(0).detach()
    adapted = tiny_sae.encode(adaptation._adapters["tools"].residual(tiny_images[2:3], -2)[:, :197])[0].mean(0).detach()
    assert card.groups["base"] or card.groups["adapted"]
    assert all(adapted[i] <= base[i] / 2 for i in card.groups["base"])
    assert all(base[i] <= adapted[i] / 2 for i in card.groups["adapted"])
    assert card.groups["common"] and all(0.5 < adapted[i] / base[i] < 2 for i in card.groups["common"])
    place = card.listed.index(card.groups["common"][0])
    np.testing.assert_allclose(card.values[place], [float(base[card.listed[place]]), float(adapted[card.listed[place]])], atol=1e-5)


def test_a_patch_is_read_by_both_models(show, adaptation, tiny_clip, tiny_sae, tiny_images):
    adaptation.selection = {"image": 2, "patch": 31}
    card = adaptation.card
    models = (tiny_clip, adaptation._adapters["tools"])
    base, adapted = (tiny_sae.encode(model.residual(tiny_images[2:3], -2))[0, 32].detach() for model in models)
    np.testing.assert_allclose(card.values, torch.stack([base, adapted], 1)[card.listed], atol=1e-5)
    assert card.groups["base"] and all(base[i] > 0 and adapted[i] <= base[i] / 2 for i in card.groups["base"])
    page = show(adaptation)
    page.wait_for_selector("text=Row 3, column 4: latents by their activation there")
    page.mouse.click(*place(page, 2, 5))
    page.wait_for_selector("text=Row 3, column 6")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("text=Row 4, column 6")
    assert adaptation.patch == 3 * 14 + 5
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Latents by their mean activation")


def test_probabilities_are_those_of_each_model(adaptation, tiny_clip, tiny_images, tiny_dataset):
    for side, model in ((1, tiny_clip), (2, adaptation._adapters["tools"])):
        p = model.logits(model.encode_image(tiny_images[:1]), dataset_head(model, tiny_dataset)).softmax(-1)[0]
        for row in adaptation.card.bars:
            assert row[side] == pytest.approx(float(p[tiny_dataset.class_names.index(row[0])]), abs=1e-5)


def test_figure_of_two_models(adaptation):
    adaptation.task, adaptation.latent = "more", 3
    text = figure_text(adaptation)
    assert all(words in text for words in ("CLIP", "VPT", "latent 3 · red", "in both", "Artwork"))


def test_page_finds_latents_by_name(show, latents):
    page = show(latents)
    page.fill("input[type=search]", "RED")
    page.wait_for_selector("[role=option]")
    assert [text.split()[0] for text in page.locator("[role=option]").all_inner_texts()] == ["3", "7"]  # the whole word first
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("h3:has-text('Latent 7 · redwood (object)')")
    page.fill("input[type=search]", "onerror")
    page.locator("[role=option]").click()
    page.wait_for_selector("h3:has-text('Latent 5')")
    assert latents.latent == 5
    assert page.locator(".psx-find img, h3 img").count() == 0 and page.title() == ""


def test_page_keeps_stars_names_and_notes_in_a_file(show, tiny_clip, tiny_sae, summary, tiny_dataset, named, tmp_path):
    parts, file = (tiny_clip, tiny_sae, summary, tiny_dataset), tmp_path / "notes.csv"
    page = show(LatentExplorer(*parts, named, latent=3, notes=file))
    page.click("[aria-label='Star this latent']")
    page.wait_for_selector("[aria-label='Star this latent'][aria-pressed=true]")
    page.fill("[aria-label='Your name for this latent']", f"my {BAD}, at last")
    page.keyboard.press("Tab")
    page.wait_for_selector("h3:has-text('my <img')")
    page.fill("[aria-label='Note on this latent']", 'a "quoted"\nnote')
    page.fill("input[type=search]", "at last")  # the field is left: the note is kept, and the new name is found
    page.wait_for_selector("[role=option]:has-text('3')")
    page.fill("input[type=search]", "*")
    assert page.locator("[role=option]").count() == 1 and page.locator(".psx h3 img, .psx-find img").count() == 0
    table = pd.read_csv(file, keep_default_na=False)
    assert table.to_dict("records") == [{"latent": 3, "star": True, "name": f"my {BAD}, at last", "note": 'a "quoted"\nnote'}]
    again = LatentExplorer(*parts, named, latent=3, notes=file)
    assert again.kept["3"]["star"] and again.card.name == cards.Name(f"my {BAD}, at last") and again._names[7].name == "redwood"
    again.keep(7, note="wood")
    assert list(pd.read_csv(file)["latent"]) == [3, 7]
    assert LatentExplorer(*parts, pd.read_csv(file), latent=3).card.name.name.startswith("my <img")
    again._receive({"kind": "keep", "latent": 64, "note": "none"}, [])
    assert set(again.kept) == {"3", "7"}


def test_page_takes_the_next_step_before_python_answers(show, latents):
    order = np.frombuffer(latents.order, np.uint32)
    latents.latent = int(order[0])
    page = show(latents)
    for latent in order[[1, 2]].tolist():  # the page asks for one card after the other; a fake model brings the last one only
        latents._receive({"kind": "prefetch", "latent": latent}, [])
        page.evaluate("([card]) => window.update({ ahead: card })", [wire(latents.ahead)])
    before = pixels(page, ".psx-ref canvas")
    page.evaluate("void (window.answer = window.python, window.python = async () => '{}')")
    page.focus("input[aria-label='Latent, in the chosen order']")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"h3:has-text('Latent {order[1]}')")
    assert (pixels(page, ".psx-ref canvas") != before).any() and latents.latent == order[0]
    page.evaluate("void (window.python = window.answer)")
    page.keyboard.press("ArrowRight")  # two steps ahead was here, too; what Python answers to it changes nothing
    page.wait_for_selector(f"h3:has-text('Latent {order[2]}')")
    page.wait_for_function(f"window.model.get('shown').latent === {order[2]}")
    assert f"Latent {order[2]}" in page.inner_text("h3")


def test_page_paints_a_listed_latent_before_python_answers(show, patches):
    patches.patch = 100
    page = show(patches)
    page.wait_for_selector(".psx-pick")
    before = pixels(page, ".psx-stage")
    page.evaluate("window.python = async () => '{}'")  # Python never answers
    page.locator(".psx-pick").first.click()
    page.wait_for_selector(".psx-pick[aria-pressed='true']")
    assert np.abs(pixels(page, ".psx-stage").astype(int) - before).mean() > 3


def test_page_lists_the_patch_under_the_pointer_and_several_chosen_ones(show, patches):
    page = show(patches)
    page.wait_for_selector(".psx-pick")
    page.evaluate("window.asked = 0; const to = window.python; window.python = (m) => { window.asked++; return to(m); }; null")
    box = page.locator(".psx-stage").bounding_box()
    at = lambda row, column: {"x": box["width"] * (column + 0.5) / 14, "y": box["height"] * (row + 0.5) / 14}  # noqa: E731
    page.hover(".psx-stage", position=at(3, 3))
    page.wait_for_selector("text=Patch under the pointer")
    assert page.evaluate("window.asked") == 0
    page.click(".psx-stage", position=at(3, 3))
    page.click(".psx-stage", position=at(3, 4), modifiers=["Shift"])
    page.wait_for_selector("text=2 chosen patches, mean")
    page.wait_for_function("window.model.get('shown').patches.length === 2")
    assert patches.patches == [45, 46]
    page.focus(".psx-stage")
    page.keyboard.press("Shift+ArrowDown")
    page.wait_for_function("window.model.get('shown').patches.length === 3")
    assert patches.patches == [45, 46, 60]


def test_page_takes_uploads_as_text_and_tells_of_broken_ones(show, patches):
    page = show(patches)
    page.wait_for_selector(".psx-pick")
    before = pixels(page, ".psx-stage")
    page.set_input_files("input[type=file]", {"name": BAD, "mimeType": "image/png", "buffer": picture_file()})
    page.wait_for_selector("h3:has-text('Your image')")
    assert "onerror" in page.inner_text("h3 >> nth=0")
    assert page.locator("h3 img").count() == 0 and page.title() == ""
    assert np.abs(pixels(page, ".psx-stage").astype(int) - before).mean() > 3
    page.set_input_files("input[type=file]", {"name": BAD, "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("[role=alert]:has-text('can\\'t be read')")
    assert page.locator("[role=alert] img").count() == 0
    drop = """([name, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name));
      document.querySelector('.psx').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, ["big.png", reader.MAX_BYTES + 1])  # made there: to send it takes a busy machine longer than the page waits
    page.wait_for_selector("[role=alert]:has-text('at most 8 MB')")
    page.evaluate(drop, ["dropped.png", list(picture_file(color=(0, 200, 0)))])
    page.wait_for_selector("h3:has-text('dropped.png')")
    assert patches.uploaded == "dropped.png"
    enter(page, IMAGE, "3")
    page.wait_for_selector("h3:has-text('Image 3 ·')")
    assert patches.uploaded == ""


def test_page_of_two_models(show, adaptation):
    page = show(adaptation)
    page.wait_for_selector(".psx-adaptation .psx-pick")
    before = [pixels(page, f".psx-pair > div:nth-child({i}) canvas") for i in (1, 2)]
    assert (before[0] == before[1]).all()  # one picture, no latent yet
    page.evaluate("window.asked = window.python; window.python = async () => '{}'")  # masks need no answer
    page.locator(".psx-adaptation .psx-pick").last.click()
    page.wait_for_selector(".psx-pick[aria-pressed='true']")
    after = [pixels(page, f".psx-pair > div:nth-child({i}) canvas") for i in (1, 2)]
    assert (after[0] != after[1]).any()
    page.evaluate("void (window.python = window.asked)")
    page.select_option("label:has-text('Task') select", "more")
    page.wait_for_function("window.model.get('shown').task === 'more'")
    page.click("[aria-label='Next image']")
    page.wait_for_selector("h3:has-text('Image 1 ·')")
    assert adaptation.image == 1 and adaptation.task == "more"
    page.evaluate("window.stop()")
    assert page.evaluate("window.model.count()") == 0


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, tiny_clip, tiny_sae, summary, tiny_dataset):
    path = tmp_path_factory.mktemp("gallery") / "page.html"
    names = {3: "red", 5: "</script><img src=x onerror=document.title='bad'>"}
    return export_gallery(path, tiny_clip, tiny_sae, summary, tiny_dataset, names, n=20, title="<b>Mine</b>", order="frequency")


def test_gallery_holds_everything_and_each_picture_once(gallery, summary):
    text = gallery.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert text.count("</script>") == 2 and "<b>" not in text and "&lt;b&gt;Mine" in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert [entry["latent"] for entry in data["latents"]] == cards.living(summary, "frequency")[:20].tolist()
    used = {image for entry in data["latents"] for image, *_ in entry["images"]}
    assert {int(i) for i in data["pictures"]} == used
    assert len(text) < 15e6 / 200 * 20
    assert "OpenMoji" in text


def test_gallery_opens_from_a_file_and_is_searched(gallery, browser):
    page = browser.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(gallery.as_uri())
    page.wait_for_selector("li[data-drawn]")
    assert page.locator(".psx-cards li").count() == 20
    before = pixels(page, ".psx-cards canvas")
    page.fill("label:has-text('Threshold') input", "1000")
    wait_for_pixels(page, ".psx-cards canvas", before)
    assert pixels(page, ".psx-cards canvas").mean() < before.mean()
    word = json.loads(page.inner_text("#data") or page.text_content("#data"))["latents"][0]["classes"][0]
    page.fill("input[type=search]", word)
    page.wait_for_function("document.querySelectorAll('.psx-cards li').length < 20")
    assert all(word in text for text in page.locator(".psx-cards li").all_inner_texts())
    first = page.evaluate("JSON.parse(document.getElementById('data').textContent).latents[7].latent")
    page.fill("input[type=search]", str(first))
    page.wait_for_selector(f"h3:has-text('Latent {first}')")
    assert page.locator(".psx-cards li").count() == 1
    assert page.locator(".psx-cards img").count() == 0 and page.title() == "<b>Mine</b>"
    assert page.evaluate(UNLABELLED) == []
    assert asked == [gallery.as_uri()] and errors == []
    page.close()
