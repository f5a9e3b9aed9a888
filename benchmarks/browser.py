"""Chromium and the notebook servers, started and ended for sure: what the explorers' benchmark and their tests stand on."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

# What the browser is called on Debian, on older Ubuntu, and by Google. Playwright's own download is not needed.
NAMES = ("chromium", "chromium-browser", "google-chrome")

# No sandbox: build machines often run as root. The rest keeps the browser from calling anybody.
FLAGS = (
    "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium(folder: str | Path | None = None, width: int = 1000, height: int = 800) -> Iterator[Any]:
    """Playwright's context of a headless Chromium with a profile of its own, in ``folder`` or one that is removed again; sizes in CSS pixels."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise FileNotFoundError(f"None of {', '.join(NAMES)} is installed (Debian: apt-get install chromium).")
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        driver = stack.enter_context(sync_playwright())
        view = {"width": width, "height": height}
        context = driver.chromium.launch_persistent_context(folder, executable_path=path, headless=True, args=list(FLAGS), viewport=view)
        stack.callback(context.close)
        yield context


@contextlib.contextmanager
def voila(notebook: Path, *options: str, paths: Sequence[Path] = ()) -> Iterator[str]:
    """Voila on one notebook: what ``make explore`` runs. Yields the page's address; the kernel starts when the page is opened."""
    port = free_port()
    command = ["voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--show_tracebacks=True", *options]
    with server(command, notebook.parent, port, paths):
        yield f"http://127.0.0.1:{port}/"


@contextlib.contextmanager
def jupyterlab(notebook: Path, *, paths: Sequence[Path] = ()) -> Iterator[str]:
    """JupyterLab on a notebook's folder. Yields the notebook's address, in a workspace that nobody has used."""
    port, token = free_port(), secrets.token_hex(16)
    command = ["jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--expose-app-in-browser"]
    with server([*command, f"--IdentityProvider.token={token}"], notebook.parent, port, paths):
        yield f"http://127.0.0.1:{port}/lab/workspaces/{token[:8]}/tree/{notebook.name}?token={token}&reset"


def run_in_lab(page: Any, address: str, timeout: float = 120) -> None:
    """Open a notebook in JupyterLab and run all of it, once the command is there and its kernel connected and idle: before, it would be lost."""
    page.goto(address)
    ready = """() => {
      const context = globalThis.jupyterapp?.shell?.currentWidget?.sessionContext;
      const kernel = context?.isReady ? context.session?.kernel : null;
      return kernel?.connectionStatus === 'connected' && kernel.status === 'idle' && jupyterapp.commands.hasCommand('notebook:run-all-cells');
    }"""  # no promise: Playwright would take it for true
    page.wait_for_function(ready, timeout=1000 * timeout)
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")  # returning its promise would wait for ever


@contextlib.contextmanager
def server(command: Sequence[str], folder: Path, port: int, paths: Sequence[Path] = (), timeout: float = 120) -> Iterator[subprocess.Popen]:
    """Run ``python -m <command>`` in ``folder``, with kernels that can also import ``paths``, until the block ends; its kernels end with it.

    A ``RuntimeError`` with the end of its log if it ends, or does not answer on ``port`` within ``timeout`` seconds.
    """
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "RUNTIME")}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    own["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel is this Python, whatever else is registered
    path = folder / "server.log"
    with path.open("w") as log:
        program, env = [sys.executable, "-m", *command], os.environ | own
        process = subprocess.Popen(program, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + timeout
        while not answers(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not answer:\n{path.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen, patience: float = 10) -> None:
    """End a process and all that it has started: politely, then not. Kernels have sessions of their own, no signal to a group reaches them."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=patience / 5)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    """A port that nobody listens on, just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
