"""The site is built without a warning, and the examples of its pages run."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_of_the_reference_shows_its_folder_and_an_example_that_runs(page):
    text = page.read_text()
    assert f"::: patchsae_utils.{page.stem}\n" in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(example, {}, page.stem, str(page), 0)
    assert len(test.examples) >= 3 and doctest.DocTestRunner().run(test).failed == 0


def test_every_folder_has_a_page():
    folders = {path.parent.name for path in (ROOT / "patchsae_utils").glob("*/__init__.py")}
    assert {page.stem for page in PAGES} == folders - {"run"}  # no public names


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs_jupyter"), reason="needs pip install -e '.[docs]'")
def test_the_site_is_built_strictly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stderr
    for page in ("index", "notebooks/01_activation_extraction", "docs/formats", "docs/api/sae"):
        assert (tmp_path / f"{page}.html").exists()
    assert "evaluate_sae" in (tmp_path / "docs/api/sae.html").read_text()
