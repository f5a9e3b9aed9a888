"""The explorers end to end: a kernel, Voila's or JupyterLab's server, Chromium. Skipped, with the reason, where one of them is missing."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from explorer_pages import BAD, picture_file, pixels, shoot

from benchmarks.browser import jupyterlab, run_in_lab, voila

pytest.importorskip("playwright", reason="the pages are tested with Playwright: pip install playwright")
from benchmarks import explorer  # noqa: E402

PATIENCE = 120
"""Seconds for one step: as long as a starved machine may need to import torch."""

WORLD = """
import patchsae_utils as ps
from tiny import random_clip
from patchsae_utils.adaptation.prompts import VisualPrompt

clip, data = random_clip(), ps.load_dataset("openmoji/tools", "test", n_images=24)
sae = ps.SparseAutoencoder(clip.width, 64, seed=0)
summary = ps.summarize_latents(clip, sae, data, -2, k=6, progress=False)
latents, patches = ps.LatentExplorer(clip, sae, summary, data), ps.PatchExplorer(clip, sae, summary, data)
panel = ps.SteeringPanel(clip, sae, data, latents=[3, 5])
adaptation = ps.AdaptationView(clip, {"tools": VisualPrompt(clip, 2, 1, seed=1)}, sae, summary=summary, datasets={"tools": data})
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
    here = [Path(__file__).parents[1]]
    if front == "voila":
        with voila(notebook, paths=here) as address:
            page.goto(address)
            use(page, front)
            measure(page)
            page.close()  # before its server ends
    else:
        with jupyterlab(notebook, paths=here) as address:
            run_in_lab(page, address, PATIENCE)
            use(page, front)
            page.close()


def use(page, front):
    """What a visitor does, and what they must then see."""
    for drawn in (".psx-latent .psx-ref", ".psx-patch .psx-pick", ".psx-steering .psx-odds li", ".psx-adaptation .psx-odds li"):
        page.wait_for_selector(drawn)

    # A patch is clicked, and its latents are listed; one is chosen, and lights up; the linked view shows the same one.
    page.click(".psx-patch .psx-stage", position={"x": 100, "y": 100})
    page.wait_for_selector(".psx-patch h4:has-text('Chosen patch')")
    page.wait_for_selector(".psx-patch [aria-label='Latents: chosen patch'] .psx-pick")
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


def measure(page):
    """The benchmark's visitor sees each of its interactions end, and says how long it took and what memory did."""
    page.evaluate(explorer.PAGE)
    visitor = explorer.Visitor(page, PATIENCE)
    for what, act in explorer.ACTS.items():
        assert 0 < act(visitor) < 1000 * PATIENCE, what
    memory = explorer.memory_over(visitor, 5, os.getpid())
    assert memory["end"].keys() == {"js_heap_mb", "dom_nodes", "listeners", "kernel_mb"} and min(memory["start"].values()) > 0
