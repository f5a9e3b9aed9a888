"""Run the notebooks in order, in place on the default profile, else into ``runs/<profile>/notebooks``: what ``make reproduce`` calls.

A notebook that has run with the same code and settings is skipped, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat.v4 import new_output
from nbstripout import strip_output
from tqdm import tqdm

from .config import DEFAULT_PROFILE, Profile, figures_folder, load_profile, repository_root
from .data.loader import has_truth
from .run.artifacts import atomic_file, file_sha256, fingerprint, read_json, write_json
from .run.notebooks import cells_for

NOISE = "metadata.widgets cell.metadata.execution cell.metadata.papermill metadata.papermill metadata.language_info.version"
WIDGET = "application/vnd.jupyter.widget-view+json"
_BAR = re.compile(r"\[\d\d:\d\d[<,]")  # "30%|###   | 3/10 [00:01<00:02, 2.9it/s]"
_CELL_FILE = re.compile(r"[^\s\"']*[/\\]ipykernel_\d+[/\\]\d+\.py")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end; the message names the notebook, the cell and the error."""


class _ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class _Client(NotebookClient):
    @asynccontextmanager
    async def async_setup_kernel(self, **options):
        async with super().async_setup_kernel(**options):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # nbclient's takes Ctrl-C for a dead kernel
            yield


def given_by(profile: Profile) -> set[str]:
    """Which needs of cells (:data:`~patchsae_utils.run.notebooks.NEEDS`) a profile meets."""
    data = profile.data
    met = {
        "openmoji": all(spec.startswith("openmoji/") for spec in (data.train, data.statistics, data.evaluation)),
        "truth": has_truth(data.train),
        "words": not profile.model.name.startswith("timm:"),
    }
    return {need for need, holds in met.items() if holds}


def run_notebook(source: Path, target: Path, failed: Path, given: set[str]) -> str:
    """Execute the cells that ``given`` allows, save them as ``target``, or as far as they came as ``failed``; why no text tower ended it early, or ""."""
    notebook, why, number = cells_for(nbformat.read(source, as_version=4), given), "", 0
    notebook = strip_output(notebook, keep_output=False, keep_count=False, keep_id=True)

    def begin(cell, cell_index: int) -> None:
        nonlocal number
        bar.update(cell_index + 1 - number)
        number = cell_index + 1

    with tqdm(total=len(notebook.cells), unit="cell", leave=False, disable=None) as bar:
        client = _Client(
            notebook, timeout=None, record_timing=False, store_widget_state=False, kernel_manager_class=_ThisPython,
            resources={"metadata": {"path": str(source.parent)}}, on_cell_start=begin,
        )  # fmt: skip
        try:
            client.execute()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except (CellExecutionError, DeadKernelError) as error:
            why = "the kernel died, most often because memory ran out (or somebody ended the run)"
            if isinstance(error, CellExecutionError):
                why = _COLOR.sub("", error.evalue if error.ename == "NoText" else f"{error.ename}: {error.evalue}")
            if getattr(error, "ename", "") != "NoText":
                _save(tidy(notebook), failed)
                raise NotebookFailed(f"{source.stem}, cell {number}: {why}\nThe notebook up to there: {failed}") from error
    _save(tidy(notebook), target)
    failed.unlink(missing_ok=True)
    return why


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what differs between two runs or two machines; in a widget's place stays a line that says what it is."""
    notebook = strip_output(notebook, keep_output=True, keep_count=True, keep_id=True, extra_keys=NOISE.split())
    notebook.metadata["kernelspec"] = nbformat.from_dict({"display_name": "Python 3", "language": "python", "name": "python3"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = [output for output in map(_tidy_output, cell.outputs) if output is not None]
            cell.outputs = []
            for is_stream, group in itertools.groupby(outputs, lambda output: output.output_type == "stream"):
                pieces = list(group)
                for name in ("stderr", "stdout") if is_stream else ():  # their order is a matter of timing: one piece each
                    text = "".join(piece.text for piece in pieces if piece.name == name)
                    cell.outputs += [new_output("stream", name=name, text=text)] if text else []
                cell.outputs += [] if is_stream else pieces
    return notebook


def _tidy_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        if output.name == "stderr" and _BAR.search(output.text):
            return None
        output.text = _without_paths(output.text)
    elif output.output_type == "error":
        output.traceback = [_without_paths(line) for line in output.traceback]
    else:
        plain = output.data.get("text/plain", "")
        if output.data.pop(WIDGET, None) is not None:
            if _BAR.search(plain):
                return None
            plain = f"{plain.partition('(')[0].strip() or 'A widget'}: run this notebook to use it."
            output.data["text/plain"] = plain
        for kind in ("text/plain", "text/markdown", "text/html"):
            if kind in output.data:
                output.data[kind] = _without_paths(output.data[kind])
    return output


def _without_paths(text: str) -> str:
    text = _CELL_FILE.sub("<cell>", text)
    for folder, name in ((repository_root(), "."), (Path.home(), "~")):
        text = text.replace(f"{folder}{os.sep}", f"{name}{os.sep}") if folder.name else text
    return text


def _save(notebook: nbformat.NotebookNode, path: Path) -> None:
    with atomic_file(path) as temporary:
        nbformat.write(notebook, temporary)


def run_key(source: Path, profile: Profile) -> str:
    """Names everything a notebook's outputs depend on: its code, the package's files (weights included), the settings."""
    package, kinds = Path(__file__).parent, (".py", ".toml", ".csv", ".json", ".js", ".css", ".safetensors")
    files = sorted(path for path in package.rglob("*") if path.suffix in kinds and path.is_file())
    code = {path.relative_to(package).as_posix(): file_sha256(path) for path in files}
    cells = [cell.source for cell in nbformat.read(source, as_version=4).cells if cell.cell_type == "code"]
    settings = {item.name: getattr(profile, item.name) for item in dataclasses.fields(profile) if item.name != "root"}
    return fingerprint(cells=cells, package=code, settings=settings)


def _is_up_to_date(stamp: Path, source: Path, target: Path, profile: Profile) -> bool:
    """Whether the notebook has run with this code and these settings, and all it left is still there."""
    if not stamp.exists() or not target.exists():
        return False
    note, cells = read_json(stamp), nbformat.read(target, as_version=4).cells
    ran = any(cell.cell_type == "code" and cell.execution_count for cell in cells)  # not so after `make notebooks-clean`
    return note["key"] == run_key(source, profile) and ran and all(Path(profile.root, path).exists() for path in note["files"])


def choose(folder: Path, only: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
    """The notebooks of a folder in order, and those of them that ``only`` names by number or name."""
    notebooks = sorted(folder.glob("0*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"No notebooks 0*.ipynb in {folder}. Run this in the repository, or give their folder by --notebooks.")
    for name in only:
        if not any(path.stem.startswith(name) for path in notebooks):
            raise ValueError(f"There is no notebook {name!r}. Valid: {', '.join(path.stem for path in notebooks)}, or their numbers.")
    return notebooks, [path for path in notebooks if not only or any(path.stem.startswith(name) for name in only)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m patchsae_utils.reproduce", description="Run the notebooks in order.")
    parser.add_argument("--profile", help="name or .toml file of the settings (default: $PATCHSAE_PROFILE, else openmoji)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting; may be repeated")
    parser.add_argument("--only", action="append", default=[], metavar="NN", help="only this notebook, by number or name; may be repeated")
    parser.add_argument("--force", action="store_true", help="run notebooks that are up to date too")
    parser.add_argument("--notebooks", type=Path, metavar="FOLDER", help="default: the repository's")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (NotebookFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    changes = "; ".join(filter(None, [os.environ.get("PATCHSAE_SET", ""), *options.set]))
    name = options.profile or os.environ.get("PATCHSAE_PROFILE") or DEFAULT_PROFILE
    # The notebooks' kernels, which run in another folder, inherit both.
    os.environ["PATCHSAE_PROFILE"] = str(Path(name).resolve()) if name.endswith(".toml") else name
    os.environ["PATCHSAE_SET"] = changes
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # beside a busy program, threads that spin at barriers cost five to ten times
    profile = load_profile()
    folder = (options.notebooks or repository_root() / "notebooks").resolve()
    notebooks, chosen = choose(folder, options.only)
    for source in chosen:
        label = f"[{notebooks.index(source) + 1}/{len(notebooks)}] {source.stem} ..."
        target = source if profile.is_default else profile.folder("notebooks") / source.name
        stamp = profile.folder("stamps") / f"{source.stem}.json"
        if not options.force and _is_up_to_date(stamp, source, target, profile):
            print(f"{label} up to date", file=sys.stderr)
            continue
        stamp.unlink(missing_ok=True)
        key, start = run_key(source, profile), time.monotonic()
        print(label, end=" ", file=sys.stderr, flush=True)
        try:
            why = run_notebook(source, target, profile.folder("failed") / source.name, given_by(profile))
        except BaseException:
            print("did not end", file=sys.stderr)
            raise
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        taken = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        print(taken, *([f"(left out from there: {why})"] if why else []), file=sys.stderr)
        left = [profile.folder("results") / f"{source.stem}.json", *sorted(figures_folder(profile).glob(f"{source.stem[:2]}_*.png"))]
        write_json(stamp, {"key": key, "files": [os.path.relpath(path, profile.root) for path in left if path.exists()]})
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if peak:
        print(f"Peak memory of a notebook: {peak / 1e9:.1f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
