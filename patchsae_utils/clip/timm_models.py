"""Vision transformers without a text tower, through timm: DINOv2 and its kin, with the interface of :class:`~patchsae_utils.clip.ClipModel`.

What needs only images works on them: activations, SAEs, statistics, reference images, masks on the grid. What needs class names in words
(zero-shot heads, mask sweeps, prompts, names from a vocabulary) raises :class:`NoText`, which says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..run.artifacts import shortened
from ..run.processes import default_device
from .model import PRECISIONS, ClipModel, Residual
from .weights import weights_from

PREFIX = "timm:"


class NoText(ValueError):
    """A stage needs a text tower, and the model has none."""


class TimmModel(ClipModel):
    """A frozen vision transformer of timm whose residual stream can be read after any block and replaced.

    Parameters
    ----------
    model : timm.models.vision_transformer.VisionTransformer
        With a class token. Register tokens travel as :attr:`Residual.extra`, and are not read.
    preprocess : callable
        PIL image -> Tensor [3, H, W].
    name : str
    pretrained : str, optional
    device : str or torch.device
    precision : {"fp32", "bf16"}

    Raises
    ------
    ValueError
        If the model is no such transformer, or the precision is unknown.
    """

    has_text = False

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable,
        name: str,
        pretrained: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ):
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer) or model.cls_token is None or model.pos_embed is None:
            raise ValueError(
                f"{name!r} is a {type(model).__name__} without what is read here: timm's VisionTransformer with a class token and learned "
                "positions, such as 'timm:vit_small_patch14_dinov2.lvd142m'."
            )
        if precision not in PRECISIONS:
            raise ValueError(f"Unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess, self.name, self.pretrained = preprocess, name, pretrained
        self.device, self.precision = torch.device(device), precision

    @property
    def visual(self) -> torch.nn.Module:
        return self.model

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        return self.model.blocks

    @property
    def width(self) -> int:
        return self.model.embed_dim

    @property
    def d_embed(self) -> int:
        return self.model.num_features

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.grid_size)

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.img_size)

    @property
    def logit_scale(self) -> float:
        raise self._no_text("logits")

    def run_to(self, images: Tensor, layer: int) -> Residual:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"{self.name!r} reads images [B, 3, {self.image_size[0]}, {self.image_size[1]}], got {list(images.shape)}. Apply clip.preprocess."
            )
        model = self.model
        with self._arithmetic():
            x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images.to(self.device)))))
            for block in self.blocks[: self.layer_index(layer) + 1]:
                x = block(x)
        x, n = x.float(), model.num_prefix_tokens
        return Residual(torch.cat([x[:, :1], x[:, n:]], dim=1), x[:, 1:n] if n > 1 else None)

    def finish(self, residual: Residual | Tensor, layer: int) -> Tensor:
        tokens, extra = (residual, None) if isinstance(residual, Tensor) else residual
        n = self.model.num_prefix_tokens
        if n > 1 and extra is None:
            raise ValueError(
                f"{self.name!r} has {n - 1} register tokens: give finish() the Residual of run_to(), with its tokens replaced."
            )
        x = tokens if extra is None else torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1)
        with self._arithmetic():
            for block in self.blocks[self.layer_index(layer) + 1 :]:
                x = block(x)
            return self.model.forward_head(self.model.norm(x), pre_logits=True).float()

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        raise self._no_text("tokens of texts")

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        raise self._no_text("text features")

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        raise self._no_text("a zero-shot head")

    def _no_text(self, what: str) -> NoText:
        return NoText(
            f"{self.name!r} has no text tower, so there is no such thing as {what}. Extraction, training, statistics and masks work without; "
            "zero-shot accuracy, mask sweeps and prompts need a CLIP."
        )


def load_timm(model: str, pretrained: str | None = None, device: str | None = None, precision: str = "fp32") -> TimmModel:
    """Load a vision transformer of timm; :func:`patchsae_utils.load_clip` calls this for names that begin with ``timm:``.

    Parameters
    ----------
    model : str
        ``timm:<name>``, or ``timm:<name>@<pixels>`` for another image size than the model's own (positions are resampled).
    pretrained : str, optional
        ``"random"``, or a weight file (``.safetensors``, ``.pt``, ``.bin``). Default: timm's own weights, fetched from the hub.
    device, precision : as of :func:`patchsae_utils.load_clip`

    Raises
    ------
    ValueError
        For an unknown model, a size that doesn't fit, a model that is no such transformer, or a weight file that is damaged or of another model.
    FileNotFoundError
        If weights are missing or can't be fetched.
    """
    import timm

    name, _, pixels = model.removeprefix(PREFIX).partition("@")
    if name not in timm.list_models(pretrained=True) and name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:8] or timm.list_models("vit_*dinov2*"))
        raise ValueError(f"timm has no model {name!r}. Near it: {near} (timm.list_models() lists all).")
    if pixels and not pixels.isdigit():
        raise ValueError(f"The image size of {model!r} is no whole number of pixels.")
    options: dict[str, Any] = {"img_size": int(pixels)} if pixels else {}
    own = pretrained not in (None, "random")
    if own and not Path(pretrained).is_file():
        raise FileNotFoundError(f"No weight file {pretrained!r} for {model!r}. Give a file, 'random', or nothing for timm's own weights.")
    try:
        network = timm.create_model(name, pretrained=pretrained is None, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"The weights of {model!r} could not be loaded ({type(error).__name__}: {shortened(error)}). Without a network, "
            'download them elsewhere and give the file: model.pretrained = "/path/to/model.safetensors".'
        ) from error
    if own:
        with weights_from(pretrained, model):
            _fill(network, name, pretrained)
    data = timm.data.resolve_model_data_config(network)
    preprocess = timm.data.create_transform(**data, is_training=False)
    device = device or default_device()
    return TimmModel(network, preprocess, model, pretrained, device, precision)


def _fill(network: torch.nn.Module, name: str, file: str) -> None:
    """Load a weight file: every weight of the model, and nothing else but a classifier's.

    By itself timm takes over what fits, and leaves the rest of the model random.
    """
    from timm.models import load_state_dict, model_entrypoint

    state = load_state_dict(file, weights_only=True)
    adapt = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)  # e.g. positions for another grid
    state = state if adapt is None else adapt(state, network)
    expected = network.state_dict().keys()
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"it lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
    if foreign := sorted(key for key in state.keys() - expected if not key.startswith("head")):
        raise ValueError(f"it also holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}")
    network.load_state_dict({key: state[key] for key in expected})
