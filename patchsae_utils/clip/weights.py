"""Weight files of models that people bring along: whatever is wrong with one becomes a sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..run.artifacts import shortened


@contextmanager
def weights_from(place: str | Path, model: str) -> Iterator[None]:
    """Around the loading of a file, or of a model's folder.

    Raises
    ------
    ValueError
        In place of what the libraries raise for damaged files, pickles and weights of another model: ``SafetensorError``, ``UnpicklingError``,
        ``KeyError``, ``EOFError``, ``RuntimeError``, ... Names the file and the model, and says what to do.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise  # nothing is wrong with the file
    except Exception as error:
        place = Path(place)
        size = f" ({place.stat().st_size:,} bytes)" if place.is_file() else ""
        described = " It must fit the folder's open_clip_config.json." if place.is_dir() else " Or name the model that it belongs to."
        raise ValueError(
            f"{place}{size} can't be loaded as weights of {model!r} ({type(error).__name__}: {shortened(error)}). A weight file must be whole, hold "
            f"nothing but tensors, and be of this very architecture: copy or download it again.{described}"
        ) from error
