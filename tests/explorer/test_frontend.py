"""The pages by their trade's habits: eslint, prettier, tsc and axe-core through npm, which tests alone need; no error is lost, no wait endless."""

import subprocess

import numpy as np
import pytest
from explorer_pages import DARK, FRONTEND, ROOT

MODULES = "patchsae_utils/explorer/*.js"
CHECKS = {
    "eslint": ["--config", ".cache/frontend/eslint.config.mjs", "--max-warnings=0", MODULES],
    "prettier": ["--config", str(FRONTEND / "package.json"), "--check", MODULES],
    "tsc": ["--project", str(FRONTEND)],
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", CHECKS)
def test_modules_pass_the_checks_of_their_trade(node_modules, tool):
    done = subprocess.run([node_modules / ".bin" / tool, *CHECKS[tool]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "patches", "panel", "adaptation"])
def test_axe_finds_nothing_serious_in_a_view_light_or_dark(node_modules, show, request, kind):
    page = show(request.getfixturevalue(kind))
    if kind == "latents":
        page.click("summary")
        page.wait_for_selector(".psx-does .psx-ref")
    page.evaluate("document.documentElement.lang = 'en'")
    page.add_script_tag(path=node_modules / "axe-core" / "axe.min.js")
    for dark in (False, True):
        if dark:
            page.evaluate("document.body.dataset.jpThemeLight = 'false'")
            page.add_style_tag(content=DARK)
        found = page.evaluate("async () => (await axe.run('.psx')).violations")
        serious = [[one["id"], one["help"], one["nodes"][0]["html"]] for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], f"{'dark' if dark else 'light'}: {serious}"


def test_page_tells_what_fails_in_a_click_or_a_promise(show, latents):
    page = show(latents)
    page.evaluate("void (model.send = () => { throw new Error('no wire') })")
    page.click("[aria-label='Star this latent']")
    page.wait_for_selector("[role=alert]:has-text('no wire')")
    page.evaluate("void (model.send = () => {})")
    page.evaluate("card => window.update({ ahead: card })", {"latent": 9, "images": [{"index": 9999, "jpeg": {"$bytes": "bm8="}}]})
    page.wait_for_selector("[role=alert]:has-text('could not be decoded')")


def test_page_waits_for_no_kernel_that_is_gone_or_silent(show, latents):
    page = show(latents)
    page.wait_for_selector(".psx-body:not(.psx-busy)")
    page.evaluate("void (window.python = window.message = async () => '{}')")
    page.evaluate("model.set('latent', 40)")
    page.wait_for_selector(".psx-busy")
    page.evaluate("model.lose()")
    page.wait_for_selector("[role=alert]:has-text('kernel has ended')")
    assert page.locator(".psx-busy").count() == 0
    page.clock.install()
    page.evaluate("model.set('latent', 41)")
    page.wait_for_selector(".psx-busy")
    page.clock.fast_forward(21_000)
    page.wait_for_selector("[role=alert]:has-text('has not answered')")
    assert page.locator(".psx-busy").count() == 0


def test_page_looks_ahead_one_card_at_a_time_and_stops_at_a_click(show, latents):
    order = np.frombuffer(latents.order, np.uint32).tolist()
    latents.latent = order[0]
    page = show(latents)
    page.evaluate("void (window.sent = [], window.told = message, window.message = (text) => (sent.push(JSON.parse(text)[0]), told(text)))")
    page.evaluate(f"sent.length = 0, model.set('latent', {order[12]}), model.save_changes()")
    page.wait_for_function("model.get('ahead').latent === " + str(order[14]))
    assert page.evaluate("sent") == [{"kind": "prefetch", "latent": order[rank]} for rank in (13, 11, 14)]
    page.evaluate(f"sent.length = 0, model.set('latent', {order[30]})")  # while it is not answered, nothing else is asked for
    page.wait_for_timeout(500)
    assert page.evaluate("sent") == []


def test_page_moves_among_the_points_by_keys_and_frees_its_canvases(show, latents):
    points = np.frombuffer(latents.points, np.uint8).reshape(-1, 2).astype(int)
    start = int(np.argsort(points[:, 1])[32])
    latents.latent = start
    page = show(latents)
    page.focus(".psx-scatter")
    for key, axis, sign in (("ArrowUp", 1, 1), ("ArrowLeft", 0, -1)):
        before = latents.latent
        page.keyboard.press(key)
        page.wait_for_function(f"model.get('shown').latent !== {before}")
        assert sign * (points[latents.latent, axis] - points[before, axis]) > 0
    page.evaluate("void (window.canvases = [...document.querySelectorAll('canvas')])")
    page.evaluate("window.stop()")
    assert page.evaluate("canvases.length > 5 && canvases.every((canvas) => canvas.width === 0)") and page.evaluate("model.count()") == 0
