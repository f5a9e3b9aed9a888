"""How fast the explorers answer: from the input event in the page to what it changes on screen, through Voila and a kernel.

Three linked explorers in Chromium are used as a visitor would, from an event's time stamp until an animation frame finds other pixels,
another list or other bars: of the default profile, and of a ViT-B/16 of random weights with 49,152 latents. Then memory over 1,000 interactions,
and in JupyterLab over ten re-runs of the cell that makes them.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import playwright.sync_api
import psutil

from benchmarks.browser import chromium, jupyterlab, run_in_lab, voila
from benchmarks.common import parser, report

# Medians, for the default profile; the large world may take twice as long. What has no target is measured beside them.
TARGETS_MS = {"heat map": 20, "patch latents": 20, "steering step": 60, "text search": 100, "attribution of an image": 300}
FIRST_USE_MS = 2000  # of an image that was never shown, with 49,152 latents
GROWTH = 0.05  # share by which memory may exceed its half-way value at the end: what garbage collection leaves to chance
PAUSE_MS = 700  # between interactions: a visitor looks, and meanwhile Python looks ahead

WORLDS = {
    "openmoji": """
profile = ps.load_profile("openmoji")
clip, layer = ps.stages.load_world(profile)
sae = ps.stages.trained_sae(profile, clip)
summary, data = ps.stages.latent_summary(profile, clip, sae), ps.stages.statistics_data(profile)
names, likeness = ps.label_latents(summary, ps.stages.concept_report(profile, clip, sae)), ps.stages.latent_likeness(profile, clip, sae)
""",
    "random": """
import pandas as pd
from types import SimpleNamespace
from benchmarks.summary import world
clip, sae, data = world(settings)
layer, names = -2, None
with torch.no_grad():  # activations as large as a trained SAE's: heat maps leave out what is below tau
    h = sae.encode(clip.residual(clip.preprocess(data[0].image)[None], layer))
    gain = 2 / h[h > 0].median()
    sae.W_enc.mul_(gain), sae.b_enc.mul_(gain)
summary = ps.summarize_latents(clip, sae, data, layer, k=10, batch_size=8, progress=False)
width = clip.encode_image(clip.preprocess(data[0].image)[None]).shape[1]
unit = lambda n: torch.nn.functional.normalize(torch.randn(n, width), dim=1)
likeness = SimpleNamespace(embeddings=unit(len(data)), table=pd.DataFrame({"dictionary": ["SAE"] * sae.d_sae, "score": 0.0}))
reader = ps.explorer.reader.Reader.shared(clip, sae, data, layer)
reader.head = unit(settings["classes"])  # a thousand classes' texts take minutes
""",
}

VIEWS = """
latents = ps.LatentExplorer(clip, sae, summary, data, names, layer, likeness=likeness)
patches = ps.PatchExplorer(clip, sae, summary, data, names, layer)
panel = ps.SteeringPanel(clip, sae, data, names, layer)
links = ps.explorer.link(latents, patches, panel)
patches.image = 0  # the next ones are new
display(latents, patches, panel)
"""

# In the page: `watch` notes how things look; the first event after it starts the clock, and the frame in which all of them look different stops it.
PAGE = """
(() => {
  const small = document.createElement('canvas');
  small.width = small.height = 32;
  const context = small.getContext('2d', { willReadFrequently: true });
  const looks = {
    pixels: (selector) => {
      context.drawImage(document.querySelector(selector), 0, 0, 32, 32);
      return context.getImageData(0, 0, 32, 32).data.join();
    },
    text: (selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent).join(''),
    bars: (selector) => [...document.querySelectorAll(selector)].map((bar) => bar.style.getPropertyValue('--share')).join(),
  };
  window.watch = ([kind, selectors, events, patience]) => {
    const before = selectors.map(looks[kind]);
    const changed = () => selectors.every((selector, i) => looks[kind](selector) !== before[i]);
    const until = performance.now() + patience;
    let start = null;
    const begin = (event) => (start ??= event.timeStamp);
    for (const name of events) addEventListener(name, begin, true);
    window.measured = new Promise((done) => {
      const frame = () => {
        const now = performance.now();
        const seen = start !== null && changed();
        if (!seen && now < until) return requestAnimationFrame(frame);
        for (const name of events) removeEventListener(name, begin, true);
        done(seen ? now - start : null);
      };
      requestAnimationFrame(frame);
    });
  };
})()
"""

# A bool: Playwright's handle of an element would keep all that hangs on it.
SHOWN = """!!document.querySelector('.psx-patch:not([data-old]) .psx-pick') && !!document.querySelector('.psx-steering:not([data-old]) .psx-odds li')
  || document.body.innerText.includes('Traceback (most recent call last)')"""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    command = parser(__doc__)
    command.set_defaults(repeats=30)
    command.add_argument("--interactions", type=int, default=1000, help="for the memory; 0 leaves it out")
    command.add_argument("--reruns", type=int, default=10, help="of the views' cell in JupyterLab, for the memory; 0 leaves it out")
    both = ["openmoji", "large"]
    command.add_argument("--worlds", nargs="+", choices=both, default=both, help="the memory is that of the first")
    for name, default in {"--model": "ViT-B-16", "--d-sae": 49_152, "--images": 48, "--classes": 1000}.items():
        command.add_argument(name, type=type(default), default=default, help="of the large world, whose weights are random")
    command.add_argument("--timeout", type=float, default=900, help="seconds that a world may take to be shown")
    options = command.parse_args(arguments)
    if options.images < options.repeats + 2:
        least = options.repeats + 2
        command.error(f"--images must be at least {least}: every repetition shows an image for the first time; got {options.images}")
    large = {name: getattr(options, name) for name in ("model", "d_sae", "images", "classes", "device")}
    large["l0"] = min(150, options.d_sae // 4)
    rows, memory = [], []
    for place, world in enumerate(options.worlds):
        settings = large if world == "large" else {}
        interactions, reruns = (options.interactions, options.reruns) if place == 0 else (0, 0)
        try:
            found, grown = measure(world, settings, options.repeats, options.threads, interactions, reruns, options.timeout)
        except RuntimeError as error:  # what other worlds showed is reported all the same
            found, grown = [{"failed": str(error), "within_target": False}], []
        rows += [{"world": world, **settings, **entry} for entry in found]
        memory += grown
    return report(
        "explorer", rows, None, path=options.json, memory=memory, within_targets=all(entry["within_target"] for entry in rows + memory),
        targets={"milliseconds": TARGETS_MS, "large_world": "twice these", "first_use_milliseconds": FIRST_USE_MS, "memory_growth_in_second_half": GROWTH},
    )  # fmt: skip


def measure(
    world: str, settings: dict[str, Any], repeats: int, threads: int, interactions: int, reruns: int, timeout: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One world's rows, and what memory did over ``interactions`` and ``reruns``, where there are any."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        context = stack.enter_context(chromium(width=1280, height=2600))
        notebook = write_notebook(folder, world, settings, threads)
        with voila(notebook) as address:
            page = opened(context, timeout)
            page.goto(address)
            wait_for_views(page, timeout)
            page.evaluate(PAGE)
            visitor = Visitor(page)
            rows = [row(what, visitor.times(act, repeats), world) for what, act in ACTS.items()]
            memory = [memory_over(visitor, interactions, int((folder / "kernel.pid").read_text()))] if interactions else []
            page.close()
        if reruns:
            with jupyterlab(notebook) as address:
                page = opened(context, timeout)
                run_in_lab(page, address, timeout)
                memory.append(memory_over_reruns(page, reruns, folder, timeout))
                page.close()
    return rows, memory


def opened(context: Any, timeout: float) -> Any:
    page = context.new_page()
    page.set_default_timeout(1000 * timeout)
    return page


def wait_for_views(page: Any, timeout: float) -> None:
    """Until all three are drawn that were not there before."""
    try:
        page.wait_for_function(SHOWN)
        page.locator(".psx-latent:not([data-old]) .psx-ref").first.wait_for(timeout=30_000)
    except playwright.sync_api.Error as error:
        raise RuntimeError(f"The explorers were not shown in {timeout:.0f} s. The page says: {page.inner_text('body')[-3000:]}") from error


def write_notebook(folder: Path, world: str, settings: dict[str, Any], threads: int) -> Path:
    """Kernels run in ``folder``: the profile's artifacts are found from the repository, which is where the first cell goes."""
    root = Path(__file__).resolve().parent.parent
    first = f"""
import os, pathlib, torch
pathlib.Path("kernel.pid").write_text(str(os.getpid()))
os.chdir({str(root)!r})
import patchsae_utils as ps
torch.set_num_threads({threads})
settings = {settings!r}
"""
    cells = [first, WORLDS["random" if world == "large" else world], VIEWS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "explorer.ipynb")
    return folder / "explorer.ipynb"


def row(what: str, times: list[float], world: str) -> dict[str, Any]:
    """Median and 90th percentile beside the target (None where none is set)."""
    target = {what: ms * (2 if world == "large" else 1) for what, ms in TARGETS_MS.items()}.get(what)
    if what == FIRST_USE and world == "large":
        target = FIRST_USE_MS
    median, ninth = np.quantile(times, [0.5, 0.9])
    return {
        "interaction": what, "n": len(times), "median_ms": round(float(median), 1), "p90_ms": round(float(ninth), 1),
        "target_ms": target, "within_target": target is None or bool(median <= target),
    }  # fmt: skip


class Visitor:
    """Uses the page, one interaction at a time. Each returns the milliseconds from the first event to what it changed."""

    def __init__(self, page: Any, patience: float = 60):
        self.page, self.patience, self.step = page, patience, 0
        self.sides = {"slider": "ArrowRight", "strength": "ArrowRight", "image": "Next image"}
        self.stage = page.locator(".psx-patch .psx-stage")
        self.box = self.stage.bounding_box()

    def times(self, act: Callable[[Visitor], float], repeats: int) -> list[float]:
        """``repeats`` of them, after one that does not count."""
        act(self)
        return [act(self) for _ in range(repeats)]

    def watched(self, kind: str, selectors: list[str], events: list[str], act: Callable[[], None]) -> float:
        self.page.evaluate("watched => watch(watched)", [kind, selectors, events, 1000 * self.patience])
        act()
        measured = self.page.evaluate("() => measured")
        if measured is None:
            raise RuntimeError(f"Nothing changed in {self.patience:.0f} s: {kind} of {', '.join(selectors)} after {' or '.join(events)}.")
        return measured

    def settle(self) -> None:
        """Until nothing is on its way and Python has looked ahead, as when a person looks at the page."""
        self.page.wait_for_timeout(PAUSE_MS)
        for view in (".psx-latent", ".psx-patch"):
            self.page.wait_for_selector(f"{view} .psx-body:not(.psx-busy)")

    def key(self, name: str, selector: str) -> str:
        """The arrow key that moves a slider on; it turns where the slider ends."""
        self.page.focus(selector)
        value, low, high = self.page.eval_on_selector(selector, "s => [s.value, s.min, s.max].map(Number)")
        if value >= high or value <= low:
            self.sides[name] = "ArrowRight" if value <= low else "ArrowLeft"
        return self.sides[name]

    def spot(self) -> dict[str, float]:
        """Another patch than the last ones."""
        self.step += 1
        row, column = divmod(37 * self.step % 196, 14)
        return {"x": self.box["width"] * (column + 0.5) / 14, "y": self.box["height"] * (row + 0.5) / 14}

    def heat_map(self) -> float:
        """One step of the slider: the next latent's reference images."""
        self.settle()
        key = self.key("slider", SLIDER)
        return self.watched("pixels", [".psx-latent .psx-ref canvas"], ["keydown"], lambda: self.page.keyboard.press(key))

    def far_heat_map(self) -> float:
        """The slider thrown to a latent that nobody could foresee."""
        self.settle()
        self.step += 1
        throw = """(slider, step) => {
          slider.value = (7919 * step) % Number(slider.max);
          slider.dispatchEvent(new Event('input', { bubbles: true }));
        }"""
        act = lambda: self.page.eval_on_selector(SLIDER, throw, self.step)  # noqa: E731
        return self.watched("pixels", [".psx-latent .psx-ref canvas"], ["input"], act)

    def patch_latents(self) -> float:
        """A click on a patch: its list, from the moment that the pointer arrives."""
        self.settle()
        where = self.spot()
        return self.watched("text", [".psx-patch .psx-lists ol"], ["pointermove", "click"], lambda: self.stage.click(position=where))

    def several_patches(self) -> float:
        """Shift and click on a second patch: the list of their mean, which Python makes."""
        self.stage.click(position=self.spot())
        where = self.spot()
        self.stage.hover(position=where)
        self.settle()
        act = lambda: self.stage.click(position=where, modifiers=["Shift"])  # noqa: E731
        return self.watched("text", [".psx-patch p[aria-live]"], ["click"], act)

    def steering_step(self) -> float:
        """One step of a latent's slider: the probabilities."""
        self.settle()
        key = self.key("strength", ".psx-sliders input[type=range]")
        return self.watched("bars", [".psx-steering .psx-after"], ["keydown"], lambda: self.page.keyboard.press(key))

    def next_image(self) -> float:
        """Another image, until the steering panel and the patch explorer, which are linked, have both drawn it."""
        self.settle()
        button = f".psx-steering [aria-label='{self.sides['image']}']"
        if self.page.is_disabled(button):  # the last one
            return self.known_image()
        return self.watched("text", [".psx-steering h3", ".psx-patch h3"], ["click"], lambda: self.page.click(button))

    def text_search(self) -> float:
        """Other words: the latents that look like them."""
        self.step += 1
        words = f"{COLORS[self.step % len(COLORS)]} {THINGS[self.step // len(COLORS) % len(THINGS)]} {self.step}"
        self.page.focus(BOX)
        self.page.fill(BOX, "")
        self.settle()
        type_all = "(box, words) => { box.value = words; box.dispatchEvent(new Event('input', { bubbles: true })); }"
        return self.watched("text", [".psx-latent .psx-find li i"], ["input"], lambda: self.page.eval_on_selector(BOX, type_all, words))

    def attribution(self) -> float:
        """Of an image that was not asked about: the latents that its predicted class owes most to."""
        self.next_image()
        self.settle()
        choose = lambda rank: self.page.select_option(".psx-patch label:has-text('List by') select", rank)  # noqa: E731
        taken = self.watched("text", [".psx-patch .psx-lists > div:last-child h4"], ["input"], lambda: choose("prediction"))
        choose("activation")
        return taken

    def known_image(self) -> float:
        """To and fro between two images."""
        self.sides["image"] = "Previous image" if self.sides["image"] == "Next image" else "Next image"
        return self.next_image()


BOX = ".psx-latent .psx-find input"
COLORS, THINGS = ("red", "green", "blue", "yellow", "dark", "small"), ("wheel", "frog", "bird", "flower", "hat", "boat", "tree")
SLIDER = ".psx-latent .psx-grow input[type=range]"
FIRST_USE = "first use of an image"
ACTS = {
    FIRST_USE: Visitor.next_image,  # before others' reference images are read
    "heat map": Visitor.heat_map,
    "heat map, of a latent far away": Visitor.far_heat_map,
    "patch latents": Visitor.patch_latents,
    "patch latents, mean of two": Visitor.several_patches,
    "steering step": Visitor.steering_step,
    "text search": Visitor.text_search,
    "attribution of an image": Visitor.attribution,
}


def memory_over(visitor: Visitor, interactions: int, kernel: int) -> dict[str, Any]:
    """Memory of the page and of the kernel's process over interactions of all kinds."""
    used = memory_of(visitor.page, kernel)
    acts = [visitor.heat_map, visitor.patch_latents, visitor.steering_step, visitor.several_patches, visitor.known_image]
    acts.append(visitor.text_search)
    looks = []
    for done in range(interactions):
        if done in (0, interactions // 2):
            looks.append(used())
        acts[done % len(acts)]()
    visitor.settle()
    return growth("interactions", interactions, [*looks, used()])


def memory_over_reruns(page: Any, reruns: int, folder: Path, timeout: float) -> dict[str, Any]:
    """The same over new views in the place of the last ones."""
    wait_for_views(page, timeout)
    used = memory_of(page, int((folder / "kernel.pid").read_text()))
    looks = []
    for done in range(reruns):
        if done in (0, reruns // 2):
            looks.append(used())
        page.evaluate("document.querySelectorAll('.psx').forEach((view) => void (view.dataset.old = true))")
        page.evaluate(RERUN)
        wait_for_views(page, timeout)
        page.wait_for_function("!document.querySelector('[data-old]')")
        page.wait_for_timeout(PAUSE_MS)
    return growth("re-runs of a cell", reruns, [*looks, used()])


RERUN = """() => {
  jupyterapp.shell.currentWidget.content.activeCellIndex = 2;
  jupyterapp.commands.execute('notebook:run-cell');
}"""


def memory_of(page: Any, kernel: int) -> Callable[[], dict[str, float]]:
    """Looks at the memory of a page and a process, when garbage is collected."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def used() -> dict[str, float]:
        devtools.send("HeapProfiler.collectGarbage")
        metrics = {entry["name"]: entry["value"] for entry in devtools.send("Performance.getMetrics")["metrics"]}
        now = {"js_heap_mb": metrics["JSHeapUsedSize"] / 1e6, "dom_nodes": metrics["Nodes"], "listeners": metrics["JSEventListeners"]}
        return now | {"kernel_mb": psutil.Process(kernel).memory_info().rss / 1e6}

    return used


def growth(over: str, n: int, looks: list[dict[str, float]]) -> dict[str, Any]:
    start, middle, end = looks
    grown = {name: end[name] / middle[name] - 1 for name in end}
    return {
        "over": over, "n": n, "start": start, "middle": middle, "end": end, "growth_in_second_half": grown, "growth_allowed": GROWTH,
        "within_target": max(grown.values()) <= GROWTH,
    }  # fmt: skip


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends server and browser, too
    main()
