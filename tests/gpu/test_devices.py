"""Every stage gives on a GPU what it gives on the processor: on CUDA where there is one, and always on a device that only says it is elsewhere.

The latter (:mod:`other_device`) finds what would fail on any GPU: tensors of two devices in one operation, and ``.numpy()`` of one that isn't here.
"""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from other_device import DEVICE, OtherDevice
from tiny import loud, random_clip

import patchsae_utils as ps
from patchsae_utils.activations.streaming import TokenStream
from patchsae_utils.adaptation.fit import ADAPTERS
from patchsae_utils.adaptation.prompts import CoOp, MaPLe, VisualPrompt
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.concepts import detection
from patchsae_utils.config import AdapterConfig, TrainConfig
from patchsae_utils.data import load_dataset
from patchsae_utils.explorer.reader import Reader
from patchsae_utils.latents.likeness import Likeness, LikenessObserver
from patchsae_utils.sae.variants import VARIANTS

cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])
LAYER = -2


@pytest.fixture(scope="module", params=[DEVICE, cuda])
def device(request):
    return request.param


def world(device, folder):
    """A model, an SAE and scenes, and where their artifacts go."""
    clip = random_clip()
    clip = ClipModel(clip.model, clip.preprocess, clip._tokenizer, "tiny", device=device)
    sae = ps.SparseAutoencoder(clip.width, 64, seed=0).requires_grad_(False)
    with torch.no_grad():
        sae.b_enc.sub_(0.5)
    data, few = (load_dataset("openmoji/tools", "test", n_images=n) for n in (8, 2))
    pictures = torch.stack([clip.preprocess(data[i].image) for i in range(3)])
    made = SimpleNamespace(clip=clip, sae=sae.to(device), data=data, few=few, pictures=pictures, folder=folder)
    made.store = ps.extract_activations(clip, data, LAYER, folder / "store", n_per_shard=5, progress=False)
    made.summary = ps.summarize_latents(clip, made.sae, data, LAYER, progress=False)
    return made


@pytest.fixture(scope="module")
def worlds(device, tmp_path_factory):
    """The same on the processor and on the device."""
    with OtherDevice() if device == DEVICE else nullcontext():
        yield [world(name, tmp_path_factory.mktemp("world")) for name in ("cpu", device)]


def train(w, activation, sparse, **settings):
    options = {"k": 4} if activation in ("topk", "batchtopk", "matryoshka") else {}
    sae = ps.SparseAutoencoder(w.clip.width, 64, activation, **options).to(w.clip.device)
    size = {"n_tokens": 1200, "batch_tokens": 240, "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1, "dead_after_tokens": 240}
    name = "-".join([activation, sparse, *settings.values()])
    trained = ps.train_sae(sae, w.store, TrainConfig(sparse=sparse, **size, **settings), w.folder / name, progress=False)
    return {"log": ps.sae.training_log(w.folder / name).drop(columns="tokens_per_second"), "norm": trained.W_dec.norm().item()}


def adapt(w, kind):
    config = AdapterConfig(tasks=("openmoji/tools",), n_shots=1, epochs=1, batch_size=8, depth=2, template="a picture of a {}.")
    base = load_dataset("openmoji/tools", "train", half="base", n_images=40)
    return [row["loss"] for row in ps.fit_adapter(w.clip, kind, base, config, seed=1, progress=False).log]


def compare(w):
    half, adapted = load_dataset("openmoji/tools", "test", n_images=8, half="base"), loud(MaPLe, w.clip)
    remapping = ps.compare_models(w.clip, adapted, w.sae, half, LAYER, progress=False)
    gain = ps.explain_gain(w.clip, {"MaPLe": adapted}, w.sae, half, LAYER, progress=False)["MaPLe"].split
    masked = ps.adaptation.masked_predictions(w.clip, adapted, w.sae, half, half, LAYER, progress=False)
    return [remapping.latents(), remapping.comparisons(), gain.outcomes, masked[["accuracy"]]]


def concepts(w):
    patches = detection.concept_patches(w.clip, w.data, LAYER, progress=False)
    return detection.detect_concepts(ps.sae.sae_dictionary(w.sae), patches, patches).latents[["score"]].fillna(-2)


def likeness(w):
    observer = LikenessObserver(w.clip, w.sae, w.data, LAYER, w.folder / "likeness")
    ps.summarize_latents(w.clip, w.sae, w.data, LAYER, out=w.folder / "statistics", observers=[observer], progress=False)
    return Likeness.load(w.folder / "likeness").table[["score"]].fillna(-2)


def read(w):
    view = Reader(w.clip, w.sae, w.data, LAYER)
    return [view.residual([0, 1]).tokens.cpu(), view.heats([0, 2], 3), view.latents(1), view.nearest(2, 3, np.zeros(64, bool))]


def sweep(w):
    choose = ["oracle", "predicted", "random", "matched"]
    return ps.sweep_masks(w.clip, w.sae, w.data, [2, 8], choose, [True, False], LAYER, class_counts=w.summary)[["accuracy", "logit"]]


EDITS = [ps.Edit(3, "add", 2.0), ps.Edit(5, "scale", 0.0, "patches")]
STAGES = {
    "store": lambda w: next(iter(w.store.tokens(64))),
    "stream": lambda w: next(iter(TokenStream(w.clip, w.data, LAYER, batch_size=4).tokens(64))),
    "zero-shot": lambda w: ps.clip.zero_shot_predictions(w.clip, w.data, progress=False)[["prediction", "correct"]],
    "layers": lambda w: ps.activations.norm_table(ps.activations.survey_residuals(w.clip, w.data, progress=False)),
    "components": lambda w: ps.activations.patch_components(w.clip.residuals(w.pictures), w.clip.grid)[1],
    **{f"training {name}, sparse {how}": partial(train, activation=name, sparse=how) for name in VARIANTS for how in ("never", "always")},
    "training from centroids": partial(train, activation="topk", sparse="never", start="kmeans", normalize="token_norm"),
    "training from tokens": partial(train, activation="relu", sparse="never", start="data", normalize="mean_and_norm"),
    "training, archetypal": partial(train, activation="topk", sparse="never", start="kmeans", constraint="archetypal"),
    "evaluation": lambda w: ps.evaluate_sae(w.clip, w.sae, w.few, LAYER, progress=False)[["value"]],
    "dead latents": lambda w: ps.sae.dead_causes(w.sae, w.store.tokens(512), w.store.tokens(512))[["largest"]],
    "random SAE": lambda w: ps.sae.random_sae(w.sae, next(iter(w.store.tokens(512)))).b_enc,
    "statistics": lambda w: w.summary.to_frame(),
    "likeness": likeness,
    "latent masks": lambda w: ps.latent_masks(w.clip, w.sae, w.pictures, [1, 5], LAYER),
    "references": lambda w: [r.masks for r in ps.latents.reference_images(w.clip, w.sae, w.data, w.summary, [1, 5], LAYER)],
    "concepts": concepts,
    "sweep": sweep,
    "attribution": lambda w: ps.interventions.attribute_latents(w.clip, w.sae, w.data, LAYER).scores,
    "steering": lambda w: ps.steer(w.clip, w.sae, w.pictures, EDITS, LAYER, ps.interventions.dataset_head(w.clip, w.data)).probabilities,
    "one latent off": lambda w: ps.interventions.one_latent_off(w.clip, w.sae, w.data, w.summary, LAYER)[["change"]].fillna(-2),
    **{f"fitting {kind}": partial(adapt, kind=kind) for kind in ADAPTERS},
    "adapted features": lambda w: [loud(kind, w.clip).encode_image(w.pictures) for kind in (MaPLe, CoOp, VisualPrompt)],
    "comparison": compare,
    "explorer's reader": read,
}


def numbers(value):
    """Every number of a result, in order."""
    if isinstance(value, pd.DataFrame | pd.Series):
        frame = pd.DataFrame(value)
        value = [frame[name].to_numpy() for name in frame if frame[name].dtype.kind in "fib"]
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return np.concatenate([numbers(each) for each in value] or [np.zeros(0)])
    return np.asarray([] if value is None or isinstance(value, str) else value, np.float64).flatten()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_on_every_device_what_it_gives_on_the_processor(stage, worlds, device):
    if device == DEVICE and stage.endswith("sparse always"):
        pytest.skip("the sparse kernels are the processor's own or CUDA's")
    here, there = (numbers(STAGES[stage](one)) for one in worlds)
    assert len(here), "there is something to compare"
    trained = stage.startswith(("training", "fitting"))  # another order of sums, and one of 240 tokens more or less fires a latent
    np.testing.assert_allclose(there, here, rtol=2e-2 if trained else 1e-3, atol=1e-2 if trained else 1e-4)


def test_the_other_device_refuses_what_a_gpu_refuses():
    with OtherDevice():
        x = torch.randn(3, 4, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[x[0].long()]
        with pytest.raises(TypeError, match="cpu"):
            x.numpy()
        torch.testing.assert_close((2 * x)[torch.tensor([1])].cpu(), 2 * x.cpu()[[1]])
        assert x.sum().item() == pytest.approx(float(x.cpu().sum()))
