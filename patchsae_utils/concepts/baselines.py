"""Dictionaries to compare an SAE's latents with, all read through :class:`~patchsae_utils.grounding.Dictionary`.

Fitted without labels on patches of the training scenes: principal and independent components, non-negative factors, k-means centroids, all by
scikit-learn; an SAE with random directions (:func:`~patchsae_utils.grounding.random_sae`); an SAE trained on a CLIP with random weights.
The comparison itself, with a supervised probe as its ceiling, is in :mod:`.comparison`.
"""

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
from ..data.dataset import dataset_fingerprint
from ..run.artifacts import fingerprint, is_current, write_json
from ..sae.dictionary import Dictionary
from ..sae.files import load_sae
from ..sae.model import SparseAutoencoder
from ..sae.trainer import train_sae


def sample_patches(store, n: int = 60_000, seed: int = 0) -> Tensor:
    """Patch tokens drawn at random from a store of whole images (CLS left out): [n, D], fewer where the store holds fewer.

    Parameters
    ----------
    store : ActivationStore
        Of all tokens, or of patches.
    n : int
    seed : int

    Raises
    ------
    ValueError
        If the store holds CLS alone.
    """
    if store.metadata.tokens == "cls":
        raise ValueError("The store holds CLS tokens alone; the dictionaries are fitted on patches. Extract with tokens='all'.")
    first = 1 if store.metadata.tokens == "all" else 0
    per_image = store.n_tokens - first
    n = min(n, store.n_images * per_image)
    wanted = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(store.n_images * per_image, n, replace=False)))
    image, patch = wanted // per_image, wanted % per_image + first
    images, at = image.unique(return_inverse=True)
    found, done = torch.empty(n, store.d_in), 0
    for tokens, _, _ in store.images(images):
        here = (at >= done) & (at < done + len(tokens))
        found[here] = tokens[at[here] - done, patch[here]].float()
        done += len(tokens)
    return found


# -- linear read-outs ---------------------------------------------------------------------------------------------------------


def projections(
    name: str, directions: np.ndarray, mean: np.ndarray, *, signs: bool = True, cosine: bool = False, relu: bool = False
) -> Dictionary:
    """Features that are products with fixed directions: (x - mean) . d.

    Parameters
    ----------
    name : str
    directions : float array [m, D]
    mean : float array [D]
    signs : bool
        Both signs of each direction: 2 m features.
    cosine : bool
        Divided by ||x - mean||, for directions of unit norm.
    relu : bool
        Negative values become 0.
    """
    W = torch.from_numpy(np.concatenate([directions, -directions]) if signs else np.asarray(directions)).float()
    centre = torch.from_numpy(np.asarray(mean)).float()

    def encode(x: Tensor, columns: np.ndarray | None) -> Tensor:
        some = (W if columns is None else W[torch.as_tensor(columns, dtype=torch.long)]).to(x)
        z = x - centre.to(x)
        h = z @ some.T
        if cosine:
            h /= z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return h.relu_() if relu else h

    return Dictionary(name, len(W), encode)


def pca_dictionary(x: Tensor, seed: int = 0) -> Dictionary:
    """All principal components, both signs of each: 2 D features."""
    fit = PCA(random_state=seed).fit(x.numpy())
    return projections("PCA", fit.components_, fit.mean_)


def ica_dictionary(x: Tensor, n_fit: int = 20_000, max_iter: int = 200, seed: int = 0) -> Dictionary:
    """As many independent components (FastICA, log cosh) as dimensions, both signs of each: 2 D features."""
    fit = FastICA(whiten="unit-variance", max_iter=max_iter, tol=1e-3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterate is a good baseline
        fit.fit(x[:n_fit].numpy())
    return projections("ICA", fit.components_, fit.mean_)


def kmeans_dictionary(x: Tensor, n: int, *, cosine: bool = False, batch_size: int = 8192, max_iter: int = 10, seed: int = 0) -> Dictionary:
    """Directions from the mean to the centroids of k-means (MiniBatchKMeans): n features, not negative.

    Parameters
    ----------
    x : Tensor [N, D]
        More than n.
    n : int
        Centroids: as many as the SAE has latents makes the comparison even.
    cosine : bool
        Tokens are centred and scaled to unit norm before, so that centroids are directions (spherical k-means, nearly) and features cosines.
        Without it, features are lengths along the direction.
    batch_size, max_iter, seed
        Of MiniBatchKMeans.

    Raises
    ------
    ValueError
        If there are fewer tokens than centroids.
    """
    if len(x) < n:
        raise ValueError(f"k-means needs a token for each of the {n} centroids, got {len(x)}. Sample more patches.")
    mean = x.mean(0)
    z = x - mean
    if cosine:
        z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    fit = MiniBatchKMeans(n, init="random", n_init=1, batch_size=batch_size, max_iter=max_iter, random_state=seed).fit(z.numpy())
    directions = fit.cluster_centers_ / np.maximum(np.linalg.norm(fit.cluster_centers_, axis=1, keepdims=True), 1e-12)
    return projections("k-means, cosine" if cosine else "k-means", directions, mean.numpy(), signs=False, cosine=cosine, relu=True)


# -- non-negative factors -----------------------------------------------------------------------------------------------------


def nmf_dictionary(
    x: Tensor, n: int | None = None, *, n_fit: int = 20_000, max_iter: int = 10, n_steps: int = 12, seed: int = 0
) -> Dictionary:
    """Non-negative matrix factorisation (MiniBatchNMF): n features, not negative.

    The residual stream has both signs and NMF needs none: x - mean is split into [max(x - mean, 0), max(mean - x, 0)], 2 D non-negative
    dimensions. New tokens are coded by non-negative least squares on the fixed factors (:func:`nonnegative_codes`), as ``transform`` would,
    but in batches of matrix products.

    Parameters
    ----------
    x : Tensor [N, D]
    n : int, optional
        Factors. Default: D.
    n_fit, max_iter, seed
        Tokens and passes of the fit.
    n_steps : int
        Of the solver.
    """
    mean, n = x.mean(0), x.shape[1] if n is None else n
    fit = MiniBatchNMF(n, init="nndsvda", batch_size=2048, max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(split_signs(x[:n_fit] - mean).numpy())
    factors = torch.from_numpy(fit.components_).float()

    def encode(tokens: Tensor, columns: np.ndarray | None) -> Tensor:
        parts = [nonnegative_codes(split_signs(part - mean.to(part)), factors.to(part), n_steps) for part in tokens.split(16_384)]
        codes = torch.cat(parts) if parts else tokens.new_zeros(0, n)
        return codes if columns is None else codes[:, torch.as_tensor(columns, dtype=torch.long)]

    return Dictionary("NMF", n, encode)


def split_signs(x: Tensor) -> Tensor:
    """[N, D] -> [N, 2 D]: positive parts, then the negative parts' sizes."""
    return torch.cat([x.clamp_min(0), (-x).clamp_min(0)], 1)


def nonnegative_codes(x: Tensor, factors: Tensor, n_steps: int = 60) -> Tensor:
    """argmin over codes >= 0 of ||x - codes @ factors||^2, row by row: accelerated projected gradient (Beck and Teboulle, 2009).

    Parameters
    ----------
    x : Tensor [N, D]
    factors : Tensor [n, D]
    n_steps : int

    Returns
    -------
    Tensor [N, n]
    """
    gram, target = factors @ factors.T, x @ factors.T
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12)
    codes = ahead = torch.zeros_like(target)
    t = 1.0
    for _ in range(n_steps):
        new = torch.relu(ahead + step * (target - ahead @ gram))
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead = new + (t - 1) / t_new * (new - codes)
        codes, t = new, t_new
    return codes


# -- a CLIP that knows nothing ------------------------------------------------------------------------------------------------


def random_clip(clip: ClipModel, seed: int = 0) -> ClipModel:
    """The same architecture with fresh random weights in the image tower: what patches and architecture give without any training.

    Layers start as torch starts them; the class token, positions and projection as open_clip does (normal, width ** -0.5). The text tower
    keeps its weights: nothing here reads it.
    """
    model = copy.deepcopy(clip.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.visual.modules():
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        with torch.no_grad():
            for name in ("class_embedding", "positional_embedding", "proj"):
                parameter = getattr(model.visual, name, None)
                if parameter is not None:
                    parameter.copy_(clip.width**-0.5 * torch.randn(parameter.shape))
    return ClipModel(model, clip.preprocess, clip._tokenizer, f"{clip.name}, random weights", device=clip.device, precision=clip.precision)


def random_weights_sae(
    clip: ClipModel, dataset, layer: int, sae: SparseAutoencoder, config, out: str | Path, *, seed: int = 0, progress: bool = True
) -> tuple[ClipModel, SparseAutoencoder]:
    """An SAE of the same size and recipe, trained on the residual stream of :func:`random_clip`.

    Its scenes must be read by the returned model: give :func:`~patchsae_utils.comparison.compare_dictionaries` patches of its own.

    Parameters
    ----------
    clip : ClipModel
    dataset
        Training images.
    layer : int
    sae : SparseAutoencoder
        Gives size and activation.
    config : TrainConfig
        Of the SAE it is compared with. Error and L1 term both have the unit of a norm, so the L1 coefficient fits activations of any
        scale.
    out : path
        Folder for the activations and the SAE; when both are there, they are opened.
    seed : int
        Of the random weights.
    progress : bool

    Returns
    -------
    ClipModel, SparseAutoencoder
    """
    control = random_clip(clip, seed)
    out = Path(out)
    key = fingerprint(
        stage="random-weights SAE", version=1, clip=control.fingerprint, data=dataset_fingerprint(dataset), layer=clip.layer_index(layer),
        training=config, sizes=[sae.d_in, sae.d_sae, sae.activation, sae.k],
    )  # fmt: skip
    if is_current(out / "sae", key, "random_weights.json"):
        return control, load_sae(out / "sae").requires_grad_(False)
    store = extract_activations(control, dataset, layer, out / "activations", progress=progress)
    fresh = SparseAutoencoder(sae.d_in, sae.d_sae, sae.activation, k=sae.k, groups=sae.groups, bandwidth=sae.bandwidth, seed=config.seed)
    trained = train_sae(fresh, store, config, out / "sae", progress=progress)
    write_json(out / "sae" / "random_weights.json", {"fingerprint": key, "complete": True, "seed": seed})
    return control, trained.requires_grad_(False)
