"""Make .venv when it is missing, and install the package into it when pyproject.toml has changed since the last time.

    python3 tools/install.py [extra ...]        # extras of pyproject.toml, e.g. test

Runs on the standard library alone, under the Python that the virtual environment will have. What was installed is noted in
``.venv/installed.json`` once the installation has ended well, and not before.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

OLDEST = (3, 11)
ASK = "import importlib.util, json, sys; print(json.dumps([sys.version_info[:2], sys.prefix, bool(importlib.util.find_spec('pip'))]))"


def main(extras):
    """Do what is left to do; return what went wrong, or None."""
    root = Path(__file__).resolve().parents[1]
    folder, here = root / ".venv", ".".join(map(str, sys.version_info[:2]))
    if sys.version_info[:2] < OLDEST:
        return f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is {here}. Name one: make ... PYTHON=python3.12"
    if not os.path.lexists(folder):
        make(folder)
    remedy = f"Remove it (rm -rf {folder}) and run the same command again"
    found = version(folder)
    if found is None:
        return f"{folder} is there, but is not usable: its making was interrupted, or the Python that made it is gone. {remedy}."
    if found != here:
        return (
            f"{folder} was made by Python {found}; {sys.executable} is {here}. {remedy}, or name its Python: make ... PYTHON=python{found}"
        )
    key = hashlib.sha256(b"\0".join([(root / "pyproject.toml").read_bytes(), str(root).encode(), here.encode()])).hexdigest()
    stamp = folder / "installed.json"
    done = read(stamp)
    if done.get("key") == key and set(extras) <= set(done["extras"]):
        return None
    extras = sorted({*extras, *done.get("extras", [])})
    stamp.unlink(missing_ok=True)
    command = [*installer(folder), *shlex.split(os.environ.get("PIP_ARGS", "")), "-e", f".[{','.join(extras)}]" if extras else "."]
    print(f"Installing into {folder} (the first time: a few minutes, about 6 GB)\n{shlex.join(command)}", file=sys.stderr, flush=True)
    if subprocess.call(command, cwd=root) != 0:
        return "The installation did not end well; pip says why, above. Run the same command again."
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "extras": extras}) + "\n")
    temporary.replace(stamp)
    return None


def make(folder):
    """A new virtual environment, or none at all."""
    print(f"Making {folder} with {sys.executable}", file=sys.stderr, flush=True)
    try:
        venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):  # Debian keeps ensurepip in a package of its own
            sys.exit(f"error: {sys.executable} cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv")
        raise


def version(folder):
    """Version of a virtual environment's Python, e.g. "3.11"; None where it doesn't run, or can't install anything."""
    try:
        answer = subprocess.run([folder / "bin" / "python", "-c", ASK], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    numbers, prefix, pip = json.loads(answer)
    usable = Path(prefix).resolve() == folder.resolve() and (pip or shutil.which("uv"))
    return ".".join(map(str, numbers)) if usable else None


def installer(folder):
    """The command that installs: uv where there is one (quicker), else the environment's own pip."""
    python, uv = str(folder / "bin" / "python"), shutil.which("uv")
    return [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "--disable-pip-version-check"]


def read(path):
    """The note of an earlier installation; empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    problem = main(sys.argv[1:])
    sys.exit(f"error: {problem}" if problem else 0)
