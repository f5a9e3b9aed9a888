"""Dictionaries to compare an SAE's latents with, fitted without labels on patches of the training scenes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA, FastICA, MiniBatchNMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from ..activations.extraction import extract_activations
from ..clip.model import ClipModel
from ..clip.timm_models import clip_of
from ..data import dataset_fingerprint
from ..run.artifacts import fingerprint, is_current, write_json
from ..sae.dictionary import Dictionary
from ..sae.files import load_sae
from ..sae.model import SparseAutoencoder
from ..sae.trainer import train_sae

N_SLOW = 20_000  # tokens that ICA and NMF are fitted on at most


def sample_patches(store, n: int = 60_000) -> Tensor:
    """Patch tokens drawn at random from a store of whole images (CLS left out): [n, D], fewer where the store holds fewer."""
    if store.metadata.tokens == "cls":
        raise ValueError("The store holds CLS tokens alone; the dictionaries are fitted on patches. Extract with tokens='all'.")
    first = 1 if store.metadata.tokens == "all" else 0
    per_image = store.n_tokens - first
    n = min(n, store.n_images * per_image)
    wanted = torch.from_numpy(np.sort(np.random.default_rng(0).choice(store.n_images * per_image, n, replace=False)))
    image, patch = wanted // per_image, wanted % per_image + first
    images, at = image.unique(return_inverse=True)
    found, done = torch.empty(n, store.d_in), 0
    for tokens, _, _ in store.images(images):
        here = (at >= done) & (at < done + len(tokens))
        found[here] = tokens[at[here] - done, patch[here]].float()
        done += len(tokens)
    return found


def projections(name: str, directions: np.ndarray, mean: np.ndarray, *, cosine: bool = False, relu: bool = False) -> Dictionary:
    """Features (x - mean) . d for directions [m, D]; ``cosine`` divides by ||x - mean||, ``relu`` cuts negative values off."""
    W, centre = torch.from_numpy(np.asarray(directions)).float(), torch.from_numpy(np.asarray(mean)).float()

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        z = x - centre.to(x)
        h = z @ (W if columns is None else W[torch.as_tensor(columns)]).to(x).T
        if cosine:
            h /= z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return h.relu_() if relu else h

    return Dictionary(name, len(W), encode)


def pca_dictionary(x: Tensor) -> Dictionary:
    """All principal components, both signs of each: 2 D features."""
    fit = PCA(random_state=0).fit(x.numpy())
    return projections("PCA", np.concatenate([fit.components_, -fit.components_]), fit.mean_)


def ica_dictionary(x: Tensor) -> Dictionary:
    """As many independent components (FastICA, log cosh) as dimensions, both signs of each: 2 D features."""
    fit = FastICA(whiten="unit-variance", max_iter=200, tol=1e-3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterate is a good baseline
        fit.fit(x[:N_SLOW].numpy())
    return projections("ICA", np.concatenate([fit.components_, -fit.components_]), fit.mean_)


def kmeans_dictionary(x: Tensor, n: int) -> Dictionary:
    """Lengths of centred tokens along unit directions to the centroids of k-means, 0 where they are negative: n features."""
    if len(x) < n:
        raise ValueError(f"k-means needs a token for each of the {n} centroids, got {len(x)}. Sample more patches.")
    mean = x.mean(0)
    fit = MiniBatchKMeans(n, init="random", n_init=1, batch_size=8192, max_iter=10, random_state=0).fit((x - mean).numpy())
    sizes = np.maximum(np.linalg.norm(fit.cluster_centers_, axis=1, keepdims=True), 1e-12)
    return projections("k-means", fit.cluster_centers_ / sizes, mean.numpy(), relu=True)


def nmf_dictionary(x: Tensor) -> Dictionary:
    """Non-negative matrix factorisation of the two signs of x - mean apart, 2 D dimensions: D features, not negative."""
    mean, n = x.mean(0), x.shape[1]
    fit = MiniBatchNMF(n, init="nndsvda", batch_size=2048, max_iter=10, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(split_signs(x[:N_SLOW] - mean).numpy())

    def encode(tokens: Tensor, columns: np.ndarray | None) -> Tensor:
        z = split_signs(tokens.cpu() - mean)
        codes = torch.cat([torch.from_numpy(fit.transform(part.numpy())) for part in z.split(16_384)])
        return codes if columns is None else codes[:, torch.as_tensor(columns)]

    return Dictionary("NMF", n, encode)


def split_signs(x: Tensor) -> Tensor:
    """[N, D] -> [N, 2 D]: positive parts, then the negative parts' sizes."""
    return torch.cat([x.clamp_min(0), (-x).clamp_min(0)], 1)


def random_clip(clip: ClipModel) -> ClipModel:
    """The same architecture with random weights in the image tower: layers as torch starts them, all else as open_clip does."""
    control = copy.copy(clip)
    control.model = copy.deepcopy(clip.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in (modules := list(control.visual.modules())):
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in modules:
            if not isinstance(module, nn.MultiheadAttention) and not hasattr(module, "reset_parameters"):
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(clip.width**-0.5 * torch.randn(parameter.shape))
    name, where = f"{clip.name}, random weights", {"device": clip.device, "precision": clip.precision}
    return clip_of(control.model, clip.preprocess, clip._tokenizer, name, **where)


def random_weights_sae(
    clip: ClipModel, dataset, layer: int, sae: SparseAutoencoder, config, out: str | Path
) -> tuple[ClipModel, SparseAutoencoder]:
    """An SAE of the same size and recipe, trained under ``out`` on :func:`random_clip`, which must read its scenes."""
    control, out = random_clip(clip), Path(out)
    key = fingerprint(
        stage="random-weights SAE", version=1, clip=control.fingerprint, data=dataset_fingerprint(dataset), layer=clip.layer_index(layer),
        training=config, sizes=[sae.d_in, sae.d_sae, sae.activation, sae.k],
    )  # fmt: skip
    if is_current(out / "sae", key, "random_weights.json"):
        return control, load_sae(out / "sae").requires_grad_(False)
    store = extract_activations(control, dataset, layer, out / "activations")
    fresh = SparseAutoencoder(sae.d_in, sae.d_sae, sae.activation, k=sae.k, groups=sae.groups, bandwidth=sae.bandwidth, seed=config.seed)
    trained = train_sae(fresh, store, config, out / "sae")
    write_json(out / "sae" / "random_weights.json", {"fingerprint": key, "complete": True})
    return control, trained.requires_grad_(False)
