"""Figures: written where they belong, credited where they show OpenMoji's artwork."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from patchsae_utils import plots


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path / "notebooks")
    yield tmp_path
    plt.close("all")


def test_a_figure_is_saved_beside_the_notebooks_with_its_credit(repository):
    fig, axes = plots.figure(height=1)
    axes.plot([0, 1])
    assert plots.save(fig, "00_test", credit=True) is fig
    assert [p.name for p in (repository / "figures").iterdir()] == ["00_test.png"]
    assert any("OpenMoji, CC BY-SA 4.0" in text.get_text() for text in fig.texts)
    assert Image.open(repository / "figures" / "00_test.png").width > 500


def test_no_name_writes_nothing(repository):
    fig, _ = plots.figure(height=1)
    plots.save(fig, None)
    assert not (repository / "figures").exists() and not fig.texts


def test_other_profiles_leave_the_committed_figures_alone(repository, monkeypatch):
    monkeypatch.setenv("PATCHSAE_SET", "name=quick")
    fig, _ = plots.figure(height=1)
    plots.save(fig, "00_test")
    assert (repository / "runs" / "quick" / "figures" / "00_test.png").exists() and not (repository / "figures").exists()


def test_an_unknown_figure_is_named():
    with pytest.raises(AttributeError, match="no_such_figure"):
        plots.no_such_figure  # noqa: B018
