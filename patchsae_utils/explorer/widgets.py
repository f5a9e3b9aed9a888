"""What the explorers share: widgets that join cards (what is shown) to the page (``explorer.js``, which draws it), and links between them.

A choice is a trait: set ``explorer.latent = 12`` in Python, or move the slider; either way Python looks up one card and sends it.
A heat map costs one byte a patch and is colored in the page, so that opacity, threshold and contour need no Python at all.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets as t
from matplotlib.figure import Figure

from ..plots import explorer as stills
from ..plots.heat import MODES, palette
from .cards import Name, read_names
from .reader import Reader, read_upload

HERE = Path(__file__).parent
_IMPORT = r"(?m)^import \{([^}]*)\} from \"\./(\w+\.js)\";\n"


class SelectionError(t.TraitError, ValueError):
    """A choice that does not exist. The widget keeps its last one."""


def module(file: str) -> str:
    """An ES module of this folder with those that it imports, each in a scope of its own: one file, without a build step."""
    parts, text = [], (HERE / file).read_text(encoding="utf-8")
    for names, other in re.findall(_IMPORT, text):
        exported = re.findall(r"^export (?:async )?(?:function|const) (\w+)", (HERE / other).read_text(encoding="utf-8"), re.M)
        body = re.sub(r"^export ", "", module(other), flags=re.M)
        parts.append(f"const {{{names}}} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();\n")
    return "".join(parts) + re.sub(_IMPORT, "", text)


def styles(*files: str) -> str:
    """The style sheet that all views share, and others behind it."""
    return "".join((HERE / file).read_text(encoding="utf-8") for file in ("explorer.css", *files))


def encode_names(names: Mapping[int, Name]) -> bytes:
    """Names as UTF-8 lines "latent, tab, name", the best-fitting first: sent once, searched in the page."""
    order = sorted(names, key=lambda latent: -(names[latent].score or 0))
    return "\n".join(f"{latent}\t{' '.join(str(names[latent]).split())}" for latent in order).encode(errors="replace")


class _View(anywidget.AnyWidget):
    """What every explorer has: the choices that can be linked, and how heat maps look."""

    LINKED: tuple[str, ...] = ("latent", "image", "patch", "patches")  # choices that link joins, where a view has them
    CHOICES: tuple[str, ...] = LINKED  # what ``selection`` holds, where a view has it
    TAKES = "clip, sae, summary, dataset, names"  # what it is made of, before the layer
    ALSO = ""  # and behind it
    IN_TURN = False  # choices are set one after the other, since the first changes what the next may be; otherwise with one message

    _css = styles()

    kind = t.Unicode().tag(sync=True)
    latent = t.Int(-1, help="The chosen latent; -1 for none.").tag(sync=True)
    image = t.Int(-1, help="The chosen image, by its index in the data set; -1 for none.").tag(sync=True)
    tau = t.Float(0.2, help="Activations up to it are not shown.").tag(sync=True)
    opacity = t.Float(0.75, help="Of the heat map, in [0, 1].").tag(sync=True)
    mode = t.Enum(MODES, MODES[0], help="spotlight: the rest of the picture darkened; heat: colors over it.").tag(sync=True)
    contour = t.Bool(False, help="Whether a line goes around the patches above tau.").tag(sync=True)
    grid = t.Tuple(t.Int(), t.Int()).tag(sync=True)
    n_latents = t.Int().tag(sync=True)
    names = t.Bytes(help="Names of latents, as encode_names writes them.").tag(sync=True)
    palette = t.Bytes().tag(sync=True)
    shown = t.Dict(help="The card that the page draws.").tag(sync=True)
    call = t.Unicode(help="Python that makes this view, up to its choices.").tag(sync=True)
    choices = t.List(t.Unicode(), help="What a link and that line of Python hold.").tag(sync=True)
    exported = t.Dict(help="A file for the page to save: its name and bytes.").tag(sync=True)
    notice = t.Unicode("", help="What went wrong last, for the person at the page.").tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        self._reader = Reader.shared(clip, sae, dataset, layer)
        self._names = read_names(names, self._reader.d_sae)
        self._summary = summary
        if summary is not None:
            summary.check(sae, dataset)
            traits.setdefault("tau", summary.tau)
        super().__init__(
            grid=self._reader.grid, n_latents=self._reader.d_sae, palette=palette(), names=encode_names(self._names),
            call=f"ps.{type(self).__name__}({self.TAKES}, {self._reader.layer}{self.ALSO}", choices=[c for c in self.CHOICES if self.has_trait(c)],
            **traits,
        )  # fmt: skip
        self.on_msg(lambda _, content, buffers: self._receive(content, buffers))

    def set_state(self, sync_data: dict) -> None:
        """What the page chose. What can't be done is told there, and the page gets the last choice back."""
        try:
            super().set_state(sync_data)
            self.notice = ""
        except Exception as error:
            self._tell(error)
            self.send_state([name for name in sync_data if self.has_trait(name)])
            raise

    def _tell(self, error: Exception) -> None:
        self.notice = ""  # the same sentence again is news, too
        self.notice = str(error) if isinstance(error, ValueError | t.TraitError) else f"{type(error).__name__}: {error}"

    @property
    def dataset(self) -> Any:
        """The data set whose images are shown."""
        return self._reader.dataset

    @property
    def selection(self) -> dict[str, Any]:
        """What is chosen, by the traits' names; set it to choose several things at once."""
        return {name: getattr(self, name) for name in self.CHOICES if self.has_trait(name)}

    @selection.setter
    def selection(self, chosen: Mapping[str, Any]) -> None:
        known = list(self.selection)
        if unknown := [name for name in chosen if name not in known]:
            raise SelectionError(f"There is no choice {unknown[0]!r}; valid are {', '.join(known)}.")
        with contextlib.nullcontext() if self.IN_TURN else self.hold_trait_notifications():
            for name in known:
                if name in chosen:
                    setattr(self, name, chosen[name])

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={getattr(self, name)}" for name in ("latent", "image", "patch") if self.has_trait(name))
        return f"{type(self).__name__}({chosen})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data:
            data["text/plain"] = f"{self!r}: open the notebook in Jupyter to use it."
        return bundle

    @t.validate("latent")
    def _check_latent(self, proposal: Any) -> int:
        return self._within("latent", proposal["value"], self._reader.d_sae)

    @t.validate("image")
    def _check_image(self, proposal: Any) -> int:
        image = self._within("image", proposal["value"], len(self.dataset))
        return max(0, image) if self.has_trait("n_images") else image  # these views always show one

    @t.validate("patch")
    def _check_patch(self, proposal: Any) -> int:
        return self._within("patch", proposal["value"], self.grid[0] * self.grid[1])

    @t.validate("patches")
    def _check_patches(self, proposal: Any) -> list[int]:
        n, patches = self.grid[0] * self.grid[1], sorted(set(proposal["value"]))
        if patches and not 0 <= patches[0] <= patches[-1] < n:
            raise SelectionError(f"Patches are counted from 0 to {n - 1}, got {patches}.")
        return patches

    @t.validate("opacity", "tau")
    def _check_look(self, proposal: Any) -> float:
        name, value = proposal["trait"].name, proposal["value"]
        if not (0 <= value <= 1 if name == "opacity" else 0 <= value < float("inf")):
            raise SelectionError(f"{name} must be {'in [0, 1]' if name == 'opacity' else '0 or more'}, got {value}.")
        return value

    @staticmethod
    def _within(what: str, value: int, n: int) -> int:
        if not -1 <= value < n:
            raise SelectionError(f"There is no {what} {value}; valid are 0 to {n - 1}, or -1 for none.")
        return value

    def _known(self, latents: Sequence[Any]) -> list[int]:
        """Latents that exist, each once."""
        for latent in latents:
            if isinstance(latent, bool) or not isinstance(latent, int | np.integer) or not 0 <= latent < self._reader.d_sae:
                raise SelectionError(f"There is no latent {latent!r}; valid are 0 to {self._reader.d_sae - 1}.")
        return list(dict.fromkeys(int(latent) for latent in latents))

    def figure(self, save: str | None = None) -> Figure:
        """A static picture of what is on screen; ``save`` names a file in ``runs/<profile>/figures``, without ending."""
        if self.card is None:
            raise ValueError("No latent is chosen: set .latent first.")
        return getattr(stills, self.kind)(self.card, **self._look(), credit=is_openmoji(self.dataset), save=save)

    def _look(self) -> dict[str, Any]:
        return {"tau": self.tau, "opacity": self.opacity, "mode": self.mode, "contour": self.contour}

    def _receive(self, content: Any, buffers: list) -> None:
        """A message of the page that is no trait: ``_on_<kind>`` does it. Anybody may have sent it, so what is wrong is told and nothing else."""
        kind = content.get("kind") if isinstance(content, Mapping) else None
        if isinstance(kind, str) and (handler := getattr(self, f"_on_{kind}", None)):
            try:
                handler(content, buffers)
            except Exception as error:
                self._tell(error)

    def _on_export(self, content: Mapping, buffers: list) -> None:
        """What :meth:`figure` draws, as a file: PNG or SVG."""
        kind = {"png": "png", "svg": "svg"}[content["format"]]
        figure, file = self.figure(), io.BytesIO()
        figure.savefig(file, format=kind, bbox_inches="tight", dpi=200)
        plt.close(figure)
        self.exported = {}  # the same file again is news, too
        self.exported = {"name": f"{self.kind}.{kind}", "bytes": file.getvalue()}

    def _on_open(self, content: Mapping, buffers: list) -> None:
        """A link was followed."""
        self.selection = {name: value for name, value in content["selection"].items() if name in self.choices}


class _ImageView(_View):
    """A view that always shows an image: of the data set, or one's own."""

    uploaded = t.Unicode("", help="Name of the uploaded picture that is shown; empty for none.").tag(sync=True)
    n_images = t.Int().tag(sync=True)

    def __init__(self, clip: Any, sae: Any, summary: Any, dataset: Any, names: Any = None, layer: int = -2, **traits: Any):
        if not len(dataset):
            raise ValueError(f"{dataset.spec!r} ({dataset.split}) holds no images.")
        self._upload = (-1, "")  # the picture of one's own: its index for the reader, its name
        super().__init__(clip, sae, summary, dataset, names, layer, n_images=len(dataset), **traits)
        self.image = max(0, self.image)
        self.observe(lambda _: setattr(self, "uploaded", ""), "image")

    def upload(self, data: bytes, name: str = "") -> None:
        """Show a picture that is not in the data set, from the bytes of a PNG, JPEG, WebP, GIF or BMP file.

        One that is too large or can't be read is an ``UploadError``; the view then shows what it showed before.
        """
        picture, name = read_upload(data, name)
        self._upload = (self._reader.upload(picture, name, self._upload[0]), name)
        self.notice = ""
        self._trait_values["uploaded"] = ""  # another picture of the same name is news, too
        self.uploaded = name

    @property
    def _shown_image(self) -> int:
        return self._upload[0] if self.uploaded else self.image

    @t.validate("uploaded")
    def _check_uploaded(self, proposal: Any) -> str:
        if proposal["value"] and proposal["value"] != self._upload[1]:
            raise SelectionError(f"No picture {proposal['value']!r} was uploaded: drop it on the view, or call .upload(data, name).")
        return proposal["value"]

    def _on_upload(self, content: Mapping, buffers: list) -> None:
        self.upload(buffers[0], str(content.get("name", "")))


def link(*views: _View) -> list[t.link]:
    """Join the choices of explorers: a latent chosen in one is chosen in all, and so are images and patches of a common data set.

    Parameters
    ----------
    *views : LatentExplorer, PatchExplorer, SteeringPanel or AdaptationView
        On one SAE. The first that has made a choice sets it for all.

    Returns
    -------
    list of traitlets.link
        Call ``.unlink()`` on each to part them again.

    Raises
    ------
    ValueError
        If there are fewer than two, or their SAEs have different numbers of latents.
    """
    if len(views) < 2:
        raise ValueError(f"link joins two explorers or more, got {len(views)}.")
    if len({view.n_latents for view in views}) > 1:
        sizes = ", ".join(str(view.n_latents) for view in views)
        raise ValueError(f"These explorers show different SAEs, with {sizes} latents: a latent of one means nothing in another.")
    links = []
    for name in dict.fromkeys(name for view in views for name in view.LINKED):
        groups: dict[Any, list[_View]] = {}
        for view in views:
            if name in view.LINKED and view.has_trait(name):
                images = None if name == "latent" else (view.dataset.spec, view.dataset.split, len(view.dataset))
                groups.setdefault(images, []).append(view)
        for members in groups.values():
            chosen = [view for view in members if getattr(view, name) not in (-1, [])]
            source = chosen[0] if chosen else members[0]
            links += [t.link((source, name), (view, name)) for view in members if view is not source]
    return links


def is_openmoji(dataset: Any) -> bool:
    """Whether pictures of a data set show OpenMoji artwork, which figures must credit."""
    return str(dataset.spec).startswith("openmoji/")


def measures_of(names: Mapping[int, Name], likeness: Any, d_sae: int) -> dict[str, np.ndarray]:
    """What latents can be sorted by beside a summary's statistics: float arrays [S], NaN where unknown."""
    measures = {}
    if likeness is not None:
        measures["monosemanticity"] = likeness.table.loc[likeness.table["dictionary"] == "SAE", "score"].to_numpy(float)
        if len(measures["monosemanticity"]) != d_sae:
            raise ValueError(f"The likeness is of {len(measures['monosemanticity'])} latents, the SAE has {d_sae}: give that of this SAE.")
    if any(name.score is not None for name in names.values()):
        measures["score"] = np.array([names[i].score if i in names else None for i in range(d_sae)], float)
    return measures
