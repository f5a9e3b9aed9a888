"""Hooks of mkdocs: pages keep their places in the repository, so that links work on the site as they do there."""

import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/api/*.md", "notebooks/0*.ipynb", "figures/*.png", "patchsae_utils/profiles/*.toml",
    "patchsae_utils/clip/openmoji_clip/README.md", "patchsae_utils/clip/openmoji_clip/training_log.csv",
    "experiments/results/*.csv",
)  # fmt: skip


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files, config):
    paths = [path.relative_to(ROOT).as_posix() for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]
    return Files([File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths])


def on_page_content(html, page, config, files):
    """Docstrings name things by roles of Sphinx."""
    return re.sub(r":(?:func|class|mod|meth|data|attr):(?=<code>)", "", html)
