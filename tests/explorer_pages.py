"""Explorers' pages in headless Chromium without Jupyter: a fake model stands between the page and a widget in this process."""

import base64
import io
import json
import shutil
import subprocess
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from benchmarks.browser import ROOT, chromium, find_chromium

FRONTEND = ROOT / "tests" / "explorer" / "frontend"
"""What npm installs, and how eslint and tsc are set: for tests only."""
SHOTS = ROOT / "runs" / "screenshots"
"""Kept by the build machine."""

FAKE_MODEL = """
const revive = (v) => {
  if (Array.isArray(v)) return v.map(revive);
  if (v && v.$bytes !== undefined) return new DataView(Uint8Array.from(atob(v.$bytes), (c) => c.charCodeAt(0)).buffer);
  if (v && typeof v === 'object') return Object.fromEntries(Object.entries(v).map(([k, x]) => [k, revive(x)]));
  return v;
};
window.start = async (code, state) => {
  const module = await import('data:text/javascript;base64,' + code);
  const calls = {};
  const emit = (k) => (calls[`change:${k}`] ?? []).forEach((call) => call());
  let changed = {};
  const values = revive(state);
  window.model = {
    get: (k) => values[k],
    set: (k, v) => { if (values[k] !== v) { values[k] = changed[k] = v; emit(k); } },
    save_changes: () => {
      const sent = JSON.stringify(changed);
      changed = {};
      window.python(sent).then((got) => window.update(JSON.parse(got)));
    },
    send: async (content, callbacks, buffers = []) => {
      const packed = buffers.map((b) => btoa(Array.from(new Uint8Array(b), (c) => String.fromCharCode(c)).join('')));
      window.update(JSON.parse(await window.message(JSON.stringify([content, packed]))));
    },
    on: (name, call) => (calls[name] ??= []).push(call),
    off: (name, call) => (calls[name] = calls[name].filter((c) => c !== call)),
    lose: () => (calls.comm_live_update ?? []).forEach((call) => call()), // as Jupyter does when the kernel has ended
    count: () => Object.values(calls).flat().length,
  };
  window.update = (got) => {
    const news = Object.entries(revive(got));
    for (const [k, v] of news) values[k] = v;
    for (const [k] of news) emit(k);
  };
  window.stop = module.default.render({ model: window.model, el: document.body });
};
"""


# Jupyter's dark theme, as far as the page asks for it.
DARK = """body {
  background: #111; --jp-layout-color1: #111; --jp-layout-color2: #212121;
  --jp-ui-font-color1: #fff; --jp-ui-font-color2: #bbb; --jp-border-color2: #555;
}"""


def wire(value):
    if isinstance(value, bytes | memoryview):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {k: wire(v) for k, v in value.items()}
    return [wire(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session")
def node_modules():
    """The tools of ``frontend/package.json``, installed once by npm; or a skip that says what is missing."""
    npm, home = shutil.which("npm"), ROOT / ".cache" / "frontend"
    if npm is None:
        pytest.skip("the modules are checked by tools of node, which is not installed (Debian: apt-get install nodejs npm)")
    home.mkdir(parents=True, exist_ok=True)
    package = (FRONTEND / "package.json").read_text()
    done = (home / "node_modules" / ".package-lock.json").exists()  # which npm writes last
    if not done or (home / "package.json").read_text() != package:
        shutil.rmtree(home / "node_modules", ignore_errors=True)
        (home / "package.json").write_text(package)
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(home / "node_modules", ignore_errors=True)
            pytest.skip(f"npm could not install the tools that check the modules: {done.stderr.strip()[-300:]}")
    shutil.copy(FRONTEND / "eslint.config.mjs", home)  # it imports from node_modules beside it
    return home / "node_modules"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, or a skip that says what is missing. Closed after each module: Playwright's event loop would meet nbval's kernels."""
    pytest.importorskip("playwright.sync_api", reason="the page is tested with Playwright: pip install playwright")
    if find_chromium() is None:
        pytest.skip("the page is tested in Chromium, which is not installed (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("chromium")) as context:
        context.set_default_timeout(30_000)
        yield context


@pytest.fixture
def show(browser):
    """Open a widget's page: what it sets arrives in Python, and what Python answers arrives in the page."""
    pages = []

    def open_page(widget, dark=False, fragment=""):
        page = browser.new_page()
        pages.append(page)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        keys = [k for k in widget.keys if not k.startswith("_") and k not in ("layout", "tabbable", "tooltip")]

        def state(names):
            return {k: wire(getattr(widget, k)) for k in names}

        def answer(act):
            before = {k: getattr(widget, k) for k in keys}
            act()
            return json.dumps(state([k for k in keys if getattr(widget, k) != before[k]]))

        def message(text):
            content, buffers = json.loads(text)
            return answer(lambda: widget._receive(content, [base64.b64decode(b) for b in buffers]))

        page.expose_function("message", message)
        page.expose_function("python", lambda text: answer(lambda: widget.set_state(json.loads(text))))
        if fragment:
            page.evaluate("fragment => void (location.hash = fragment)", fragment)
        page.set_content("<body style='margin:12px'></body>")
        if dark:
            page.evaluate("document.body.dataset.jpThemeLight = 'false'")
            page.add_style_tag(content=DARK)
        page.add_style_tag(content=str(widget._css))
        page.add_script_tag(content=FAKE_MODEL)
        code = base64.b64encode(str(widget._esm).encode()).decode()
        page.evaluate("([code, state]) => window.start(code, state)", [code, state(keys)])
        page.wait_for_selector("h3:not(:empty)")
        return page

    yield open_page
    for page in pages:
        assert page.errors == []
        page.close()


SEARCH, IMAGE = "input[type=search]", "input[aria-label='Image, by its index']"


def enter(page, field, text):
    page.fill(field, text)
    page.keyboard.press("Enter")


def place(page, row, column):
    """Where the middle of a patch lies on the page."""
    box = page.locator(".psx-stage").last.bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / 14, box["y"] + box["height"] * (row + 0.5) / 14


def figure_text(view):
    """All words of a view's figure."""
    fig = view.figure()
    plt.close(fig)
    return " ".join(text.get_text() for text in fig.findobj(plt.Text))


UNLABELLED = """[...document.querySelectorAll('input, select, button, [role]:not([role=alert])')]
  .filter((e) => !(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.querySelector('img[alt]')))
  .map((e) => e.outerHTML)"""


def pixels(page, selector):
    """What a canvas shows: uint8 [H, W, 3]."""
    url = page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def wait_for_pixels(page, selector, before, seconds=30):
    """Wait until a canvas shows something else than it did."""
    until = time.monotonic() + seconds
    while (pixels(page, selector) == before).all():
        assert time.monotonic() < until, f"{selector} still shows the same"
        page.wait_for_timeout(50)


def check_that_it_fits(page, view, dark):
    """Nothing sticks out, on a telephone or on a desk, and every control has a label; pictures of it are kept."""
    for width in (420, 800, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shoot(page, f"{view.kind}_{'dark' if dark else 'light'}_{width}")
    assert page.evaluate(UNLABELLED) == []


def shoot(page, name):
    """Keep a picture of a page, for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


BAD = "<img src=x onerror=document.title='bad'>.png"


def picture_file(kind="PNG", size=(60, 40), color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()
