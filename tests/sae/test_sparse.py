"""Sparse kernels and the Adam that reads their gradients, against dense float64 autograd and the usual calls one by one."""

import pytest
import torch
from tiny_saes import dense
from torch.utils._python_dispatch import TorchDispatchMode

from patchsae_utils.sae.losses import patchsae_loss
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.sparse import kernels as sparse
from patchsae_utils.sae.sparse.adam import DeferredGradients
from patchsae_utils.sae.sparse.kernels import BatchTopK, TopK, decode, encode

N, D, S = 13, 8, 40


def weights(seed=0, columns=False, dtype=torch.float64, n=N, d=D, s=S, bias=-0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    W_enc = draw(s, d).T
    parts = [draw(n, d), W_enc if columns else W_enc.contiguous(), 0.3 * draw(s) + bias, draw(s, d), draw(d)]
    return [part.detach().requires_grad_() for part in parts]


def batch_topk_mask(pre, k):
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[pre.flatten().topk(k * len(pre)).indices] = True
    return mask.view_as(pre)


LEVELS = torch.linspace(-0.2, 0.6, S, dtype=torch.float64)
SELECTIONS = {
    "relu": (None, lambda pre: pre > 0),
    "one for all": (torch.tensor(0.3, dtype=torch.float64), lambda pre: pre > 0.3),
    "one per latent": (LEVELS, lambda pre: pre > LEVELS),
    "topk": (TopK(4), lambda pre: torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(4, 1).indices, True) & (pre > 0)),
    "batchtopk": (BatchTopK(3), lambda pre: batch_topk_mask(pre, 3) & (pre > 0)),
    "nothing": (torch.full((S,), 99.0, dtype=torch.float64), lambda pre: pre > 99),
    "everything": (torch.full((S,), -99.0, dtype=torch.float64), lambda pre: pre > -99),
}


def dense_step(parts, mask_of):
    x, W_enc, bias, W_dec, b_dec = parts
    pre = x @ W_enc + bias
    latents = pre * mask_of(pre)
    return latents, latents @ W_dec + b_dec


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("piece", [8 << 20, 5 * S])
@pytest.mark.parametrize("select,mask_of", SELECTIONS.values(), ids=SELECTIONS)
def test_values_and_all_gradients_are_those_of_dense_autograd(select, mask_of, piece, columns, monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK_CPU", 16)  # so that blocks, the last one smaller, are met at this size
    monkeypatch.setattr(sparse, "_PIECE_CPU", piece)
    monkeypatch.setattr(sparse, "_TOKENS_CPU", piece)
    parts = weights(columns=columns)
    latents = encode(*parts[:3], select)
    reconstruction = decode(latents, *parts[3:])
    expected_latents, expected = dense_step(parts, mask_of)
    torch.testing.assert_close(dense(latents), expected_latents)
    torch.testing.assert_close(reconstruction, expected)
    towards = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = (reconstruction * towards).sum() + dense(latents).sum(1).square().sum() + latents.values.pow(3).sum()
    theirs = (expected * towards).sum() + expected_latents.sum(1).square().sum() + expected_latents.pow(3).sum()
    for got, want in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(theirs, parts), strict=True):
        torch.testing.assert_close(got, want)


def test_indices_ascend_within_tokens_and_the_summaries_are_those_of_the_dense_latents():
    latents = encode(*weights()[:3])
    whole = dense(latents)
    assert latents.n_tokens == N
    assert torch.equal(whole.nonzero(), torch.stack([latents.tokens(), latents.indices], 1))
    assert torch.equal(latents.counts(), whole.count_nonzero(1))
    assert torch.equal(latents.fired(), (whole > 0).any(0))


def big(dtype=torch.float32, n=96, d=64, s=4096, l0=40):
    x, W_enc, bias, W_dec, b_dec = weights(columns=True, dtype=dtype, n=n, d=d, s=s)
    with torch.no_grad():
        W_enc /= d**0.5
        pre = x @ W_enc
        bias.fill_(-float(pre.flatten().kthvalue(pre.numel() - l0 * n).values))
    return x, W_enc, bias, W_dec, b_dec


@pytest.mark.parametrize("select", [None, TopK(40), BatchTopK(40)], ids=["relu", "topk", "batchtopk"])
def test_bfloat16_finds_the_latents_and_float32_gives_their_values(select):
    parts = big()
    exact, found = (dense(encode(*parts[:3], select, precision=precision)) for precision in ("float32", "bfloat16"))
    both = (exact > 0) & (found > 0)
    torch.testing.assert_close(found[both], exact[both], rtol=1e-5, atol=1e-5)
    missed = (exact > 0) ^ (found > 0)
    assert missed.sum() < 0.02 * both.sum()
    if select is None:  # what rounding hides is hardly active at all
        assert exact[missed].max() < 0.01 * exact.max()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("select", [None, TopK(40), BatchTopK(40)], ids=["relu", "topk", "batchtopk"])
def test_no_tensor_of_all_tokens_and_latents_is_ever_made(select, precision, monkeypatch):
    monkeypatch.setattr(sparse, "_PIECE_CPU", 1 << 16)
    monkeypatch.setattr(sparse, "_TOKENS_CPU", 1 << 16)
    x, *parts = big(n=400)
    with LargestTensor() as largest:
        latents = encode(x.detach(), *parts[:2], select, precision=precision)
        decode(latents, *parts[2:]).square().sum().backward()
    n_weights = parts[0].numel()
    assert largest.size <= n_weights < x.shape[0] * 4096 / 5


def autoencoder(activation="relu", **options):
    sae = SparseAutoencoder(16, 96, activation, seed=3, **options)
    with torch.no_grad():
        sae.b_enc.fill_(-0.05)
        sae.b_dec.copy_(torch.linspace(-0.1, 0.1, 16))
    return sae


def tokens(step, n=48):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(100 + step))


DEAD = torch.arange(96) % 7 == 0


def loss_of(sae, x, output, ghost):
    return patchsae_loss(sae, x, DEAD if ghost else None, 1e-2, output=output).total


def train(sae, optimizer, deferred, ghost=False, max_norm=None, n_steps=4, chunks=1):
    norms = []
    for i in range(n_steps):
        for x in tokens(i).chunk(chunks):
            if deferred is None:
                loss = loss_of(sae, x, sae(x, sparse=True), ghost) / chunks
            else:
                with deferred:
                    loss = loss_of(sae, x, sae(x, sparse=True), ghost) / chunks
            loss.backward()
        if deferred is not None:
            norms.append(deferred.step(optimizer, max_norm=max_norm))
            continue
        sae.remove_parallel_gradient()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
    return norms


def adam(sae, **options):
    return torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True, **options)


@pytest.mark.parametrize("max_norm", [None, 1e-3])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    "activation,options,ghost",
    [("relu", {}, False), ("relu", {}, True), ("topk", {"k": 5}, False), ("batchtopk", {"k": 5}, False), ("jumprelu", {}, False)],
)
def test_one_pass_over_the_weights_equals_the_usual_calls(activation, options, ghost, chunks, max_norm, monkeypatch):
    from patchsae_utils.sae.sparse import adam as sparse_adam

    monkeypatch.setattr(sparse_adam, "_BLOCK_CPU", 40)
    usual, streamed = autoencoder(activation, **options), autoencoder(activation, **options)
    optimizers = adam(usual), adam(streamed)
    expected = train(usual, optimizers[0], None, ghost, max_norm, chunks=chunks)
    norms = train(streamed, optimizers[1], DeferredGradients(streamed), ghost, max_norm, chunks=chunks)
    for name, parameter in usual.named_parameters():
        torch.testing.assert_close(getattr(streamed, name), parameter, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        ours, theirs = (o.state[getattr(s, name)] for o, s in zip(optimizers[::-1], (streamed, usual), strict=True))
        assert ours["step"] == theirs["step"] == 4
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)
    if max_norm is not None:
        torch.testing.assert_close(torch.stack(norms), torch.stack(expected), rtol=1e-4, atol=0)
    torch.testing.assert_close(streamed.W_dec.norm(dim=1), torch.ones(96))
    assert all(parameter.grad is None for parameter in streamed.parameters())


def test_weights_have_no_dense_gradient_while_deferred_and_materialize_gives_it():
    for held in (False, True):  # what grad holds already is added
        sae, reference = autoencoder(), autoencoder()
        deferred, x = DeferredGradients(sae), tokens(0)
        if held:
            for model in (sae, reference):
                (0.1 * model.W_dec.pow(3).sum() + model.W_enc.square().sum()).backward()
        with deferred:
            loss_of(sae, x, sae(x, sparse=True), ghost=False).backward()
        assert held or (sae.W_enc.grad is None and sae.W_dec.grad is None and sae.b_enc.grad is not None)
        loss_of(reference, x, reference(x), ghost=False).backward()
        deferred.materialize()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            torch.testing.assert_close(getattr(sae, name).grad, getattr(reference, name).grad, rtol=1e-4, atol=1e-6)
        assert sae.W_enc.grad.stride() == sae.W_enc.stride()
