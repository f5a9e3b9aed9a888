"""The explorers end to end: a kernel, Voila's or JupyterLab's server, Chromium. Skipped, with the reason, where one of them is missing."""

import os
from pathlib import Path

import nbformat
import pytest
from explorer_pages import BAD, IMAGE, SEARCH, enter, picture_file, pixels, shoot

from benchmarks.browser import jupyterlab, run_in_lab, voila

pytest.importorskip("playwright", reason="the pages are tested with Playwright: pip install playwright")
from benchmarks import explorer  # noqa: E402

PATIENCE = 120
"""Seconds for one step: as long as a starved machine may need to import torch."""

WORLD = """
from types import SimpleNamespace
import pandas as pd
import torch
import patchsae_utils as ps
from tiny import random_clip
from patchsae_utils.adaptation.prompts import VisualPrompt

clip, data = random_clip(), ps.load_dataset("openmoji/tools", "test", n_images=24)
sae = ps.SparseAutoencoder(clip.width, 64, seed=0)
summary = ps.summarize_latents(clip, sae, data, -2, k=6, progress=False)
frog = int(sae.encode(clip.residual(clip.preprocess(data[2].image)[None], -2))[0, 101].argmax())  # the strongest on a patch
others = [latent for latent in range(64) if latent != frog]
likeness = SimpleNamespace(embeddings=torch.randn(24, 16), table=pd.DataFrame({"dictionary": ["SAE"] * 64, "score": 0.0}))
words = {"names": {frog: "frog"}, "likeness": likeness, "notes": "notes.csv"}
adapted = VisualPrompt(clip, 2, 1, seed=1)
latents = ps.LatentExplorer(clip, sae, summary, data, latent=others[0], elsewhere={"VPT": (adapted, data)}, **words)
patches = ps.PatchExplorer(clip, sae, summary, data, words["names"], latent=others[0])
panel = ps.SteeringPanel(clip, sae, data, words["names"], latents=others[1:3])
adaptation = ps.AdaptationView(clip, {"tools": adapted}, sae, summary=summary, datasets={"tools": data})
links = ps.explorer.link(latents, patches, panel, adaptation)
"""
VIEWS = ("latents", "patches", "panel", "adaptation")


@pytest.fixture
def notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in (WORLD, *VIEWS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "explorer.ipynb")
    return tmp_path / "explorer.ipynb"


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 3600})  # JupyterLab draws the outputs that are in view
    yield page
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("front", ["voila", "jupyterlab"])
def test_explorers_answer(front, notebook, page):
    pytest.importorskip(front, reason=f"this test needs {front}: pip install -e .[explore]")
    serve = {"voila": voila, "jupyterlab": jupyterlab}[front]
    with serve(notebook, paths=[Path(__file__).parents[1]]) as address:
        page.goto(address) if front == "voila" else run_in_lab(page, address, PATIENCE)
        use(page, front)
        walk(page, front)
        if front == "voila":
            measure(page)
        page.close()  # before its server ends


def use(page, front):
    """What a visitor does, and what they must then see."""
    for drawn in (".psx-latent .psx-ref", ".psx-patch .psx-pick", ".psx-steering .psx-odds li", ".psx-adaptation .psx-odds li"):
        page.wait_for_selector(drawn)

    # A patch is clicked, and its latents are listed; one is chosen, and lights up; the linked view shows the same one.
    page.click(".psx-patch .psx-stage", position={"x": 100, "y": 100})
    page.wait_for_selector(".psx-patch h4:has-text('Chosen patch')")
    page.wait_for_selector(".psx-patch [aria-label='Chosen patch'] .psx-pick")
    before = pixels(page, ".psx-patch .psx-stage")
    page.locator(".psx-patch .psx-pick").nth(1).click()
    chosen = page.wait_for_selector(".psx-patch h3:has-text('Latent ')").inner_text()
    assert (pixels(page, ".psx-patch .psx-stage") != before).mean() > 0.1
    page.wait_for_selector(f".psx-latent h3:has-text('{chosen}')")

    # The slider of a latent is moved, and the probabilities change.
    odds = page.inner_text(".psx-steering .psx-odds")
    page.focus(".psx-sliders input[type=range]")
    page.keyboard.press("End")
    page.wait_for_function("odds => document.querySelector('.psx-steering .psx-odds').innerText !== odds", arg=odds)

    # The next image, seen by two models.
    page.click(".psx-adaptation [aria-label='Next image']")
    page.wait_for_selector(".psx-adaptation h3:has-text('Image 1 ·')")

    # An image of one's own, whose name is only text.
    before = pixels(page, ".psx-patch .psx-stage")
    page.set_input_files(".psx-patch input[type=file]", {"name": BAD, "mimeType": "image/png", "buffer": picture_file()})
    page.wait_for_selector(".psx-patch h3:has-text('Your image')")
    assert (pixels(page, ".psx-patch .psx-stage") != before).mean() > 0.5
    assert page.locator(".psx h3 img").count() == 0
    assert "Traceback" not in page.inner_text("body")
    shoot(page, f"end_to_end_{front}")


def walk(page, front):
    """Search a latent by its name, read what it does, keep it, open its link on a new page, and steer it from a patch."""
    enter(page, ".psx-latent " + SEARCH, "frog")
    frog = page.wait_for_selector(".psx-latent h3:has-text('· frog')").inner_text()
    page.click(".psx-latent summary")
    page.wait_for_selector(".psx-does .psx-odds li")
    page.wait_for_selector("[aria-label='Elsewhere: VPT'] .psx-ref")
    page.click("[aria-label='Star this latent']")
    page.wait_for_selector("[aria-label='Star this latent'][aria-pressed=true]")
    page.fill("[aria-label='Your name for this latent']", "tree frog")
    page.keyboard.press("Tab")
    page.wait_for_selector(".psx-latent h3:has-text('· tree frog')")
    if front == "voila":  # JupyterLab takes an address's end for its own
        page.evaluate("navigator.clipboard.writeText = async (text) => void (window.copied = text)")
        page.click(".psx-latent button:has-text('Copy link')")
        page.wait_for_function("window.copied")
        follow(page, page.evaluate("window.copied"), frog)

    enter(page, ".psx-steering " + IMAGE, "2")
    page.wait_for_selector(".psx-steering h3:has-text('Image 2 ·')")
    stage = page.locator(".psx-steering .psx-stage")
    box = stage.bounding_box()
    stage.click(position={"x": box["width"] * 2.5 / 14, "y": box["height"] * 7.5 / 14})  # patch 100
    page.click("text=Add the patches' latent")
    number = frog.split()[1]
    page.wait_for_selector(f".psx-sliders [aria-label='Strength of latent {number}, frog']")
    shares = "[...document.querySelectorAll('.psx-steering .psx-after')].map((bar) => bar.style.getPropertyValue('--share')).join()"
    before = page.evaluate(shares)
    page.click(f"[aria-label='Turn off latent {number}, frog']")  # on one patch: too little, perhaps, for the percentages
    page.wait_for_function(f"before => {shares} !== before", arg=before)
    page.wait_for_selector(".psx-steering .psx-status:has-text('as edited')")
    page.click(".psx-steering button:has-text('Reset')")  # edits act on all tokens again


def follow(page, link, frog):
    """On a new page, with a kernel of its own, the latent is open, starred and named."""
    other = page.context.new_page()
    other.set_default_timeout(1000 * PATIENCE)
    other.goto(link)
    other.wait_for_selector(f".psx-latent h3:has-text('{frog.split(' · ')[0]} · tree frog')")
    other.wait_for_selector("[aria-label='Star this latent'][aria-pressed=true]")
    other.close()


def measure(page):
    """The benchmark's visitor sees each of its interactions end, and says how long it took and what memory did."""
    page.evaluate(explorer.PAGE)
    visitor = explorer.Visitor(page, PATIENCE)
    for what, act in explorer.ACTS.items():
        assert 0 < act(visitor) < 1000 * PATIENCE, what
    memory = explorer.memory_over(visitor, 5, os.getpid())
    assert memory["end"].keys() == {"js_heap_mb", "dom_nodes", "listeners", "kernel_mb"} and min(memory["start"].values()) > 0
