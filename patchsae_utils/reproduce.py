"""Run the notebooks in order, into ``runs/<profile>/notebooks``, and say whether their numbers are the committed ones: ``make reproduce``.

A notebook that has run with the same code and settings is skipped, so an interrupted run goes on where it stopped. The repository stays as it is,
but for ``--refresh``, which commits what a run of the default profile left: notebooks, figures and the numbers that texts quote.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import re
import resource
import shutil
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

from .config import DEFAULT_PROFILE, Profile, load_profile, repository_root
from .data.loader import has_truth
from .run.artifacts import atomic_file, file_sha256, fingerprint, read_json, write_json, write_table
from .run.notebooks import cells_for
from .run.results import beside_committed, duration, measured_anew
from .stages import has_classes

NUMBERS = "numbers.json"  # beside the notebooks
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
        "labels": has_classes(profile),
    }
    return {need for need, holds in met.items() if holds}


def run_notebook(source: Path, target: Path, failed: Path, given: set[str]) -> None:
    """Execute the cells that ``given`` allows, and save them as ``target``, or as far as they came as ``failed``."""
    notebook, number = cells_for(nbformat.read(source, as_version=4), given), 0
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
                why = _COLOR.sub("", f"{error.ename}: {error.evalue}")
            _save(tidy(notebook), failed)
            raise NotebookFailed(f"{source.stem}, cell {number}: {why}\nThe notebook up to there: {failed}") from error
    _save(tidy(notebook), target)
    failed.unlink(missing_ok=True)


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


def _kept(stamp: Path, source: Path, target: Path, profile: Profile, given: set[str]) -> bool:
    """Whether the notebook has run with this code and these settings, and all it left is still there; then its text is the source's of today."""
    if not stamp.exists() or not target.exists():
        return False
    note = read_json(stamp)
    if note["key"] != run_key(source, profile) or not all(Path(profile.root, path).exists() for path in note["files"]):
        return False
    notebook, ran = cells_for(nbformat.read(source, as_version=4), given), nbformat.read(target, as_version=4)
    code, executed = ([cell for cell in cells if cell.cell_type == "code"] for cells in (notebook.cells, ran.cells))
    if [cell.source for cell in code] != [cell.source for cell in executed]:  # other cells are left out now
        return False
    for cell, done in zip(code, executed, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    notebook.metadata = ran.metadata
    _save(notebook, target)
    return True


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
    parser.add_argument("--refresh", action="store_true", help="then take notebooks, figures and quoted numbers over into the repository")
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
    if options.refresh and not profile.is_default:
        raise ValueError(
            f"--refresh is for the default profile as it is, which the repository shows; these are the settings of {profile.name!r}."
        )
    folder = (options.notebooks or repository_root() / "notebooks").resolve()
    notebooks, chosen = choose(folder, options.only)
    given = given_by(profile)
    for source in chosen:
        label = f"[{notebooks.index(source) + 1}/{len(notebooks)}] {source.stem} ..."
        target = profile.folder("notebooks") / source.name
        stamp = profile.folder("stamps") / f"{source.stem}.json"
        if not options.force and _kept(stamp, source, target, profile, given):
            print(f"{label} up to date", file=sys.stderr)
            continue
        for path in (stamp, *_figures(profile, source)):
            path.unlink(missing_ok=True)
        key, start = run_key(source, profile), time.monotonic()
        print(label, end=" ", file=sys.stderr, flush=True)
        try:
            run_notebook(source, target, profile.folder("failed") / source.name, given)
        except BaseException:
            print("did not end", file=sys.stderr)
            raise
        print(duration(time.monotonic() - start), file=sys.stderr)
        left = [profile.folder("results") / f"{source.stem}.json", *_figures(profile, source)]
        write_json(stamp, {"key": key, "files": [os.path.relpath(path, profile.root) for path in left if path.exists()]})
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if peak:
        print(f"Peak memory of a notebook: {peak / 1e9:.1f} GB", file=sys.stderr)
    if options.refresh:
        _refresh(profile, folder, chosen)
    elif profile.is_default and (folder / NUMBERS).exists():
        _compare(profile, folder, [source.stem for source in chosen])
    return 0


def _figures(profile: Profile, source: Path) -> list[Path]:
    """What a notebook has drawn."""
    return sorted(profile.folder("figures").glob(f"{source.stem[:2]}_*.png"))


def _compare(profile: Profile, folder: Path, notebooks: Sequence[str]) -> None:
    """Print each number that texts quote beside this run's, and keep the table."""
    table = beside_committed([entry for entry in read_json(folder / NUMBERS) if entry["notebook"] in notebooks], profile.folder("results"))
    write_table(profile.folder("results") / "reproduction.csv", table)
    print(table.drop(columns="notebook").to_string(index=False, float_format="{:.3f}".format))
    print(f"{(table['inside'] == 'yes').sum()} of {len(table)} numbers lie inside their committed 95% intervals.")
    print(f"Notebooks, figures and numbers of this run: {profile.root}")


def _refresh(profile: Profile, folder: Path, chosen: Sequence[Path]) -> None:
    """Take over what notebooks have left: themselves, their figures, and the numbers that texts quote."""
    figures = folder.parent / "figures"
    figures.mkdir(exist_ok=True)
    for source in chosen:
        shutil.copyfile(profile.folder("notebooks") / source.name, source)
        drawn = _figures(profile, source)
        for path in drawn:
            shutil.copyfile(path, figures / path.name)
        for path in set(figures.glob(f"{source.stem[:2]}_*.png")) - {figures / path.name for path in drawn}:
            path.unlink()  # no longer drawn
    if (folder / NUMBERS).exists():
        made, lost = measured_anew(read_json(folder / NUMBERS), profile.folder("results"))
        write_json(folder / NUMBERS, made)
        if lost:
            raise ValueError(
                f"Notebooks and figures are taken over. Mend in {folder / NUMBERS}, which names what is in no results: {'; '.join(lost)}."
            )


if __name__ == "__main__":
    sys.exit(main())
