"""One training step at the paper's size: ours against a textbook dense float32 step of the same loss, and against installable peers.

    python -m benchmarks.sae_step [--images 8 32] [--d-sae 49152] [--l0 150] [--peers-python PATH] [--json PATH]

Every side is the whole step: forward, loss, backward, projection of the decoder's gradient, fused Adam, unit-norm rows. Same tokens, same
weights: random, with one encoder bias set so that about ``--l0`` latents a token fire; each side prints its first loss, and ours and the
textbook's must agree. Peers train a TopK autoencoder of the same size with their own forward pass and loss and the same Adam; ours at
TopK stands beside them. A peer that is not installed says so in its row. Rows: the headline pairs, the peers, and how the step's cost
grows with d_sae, tokens and density. ``ratio`` is the textbook's seconds over ours at the first ``--images``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .common import in_subprocess, matmul_peak, parser, peak_memory, report, set_l0, timed

L1, LR = 8e-5, 1e-7  # a rate so small that L0 stays where it was set
TARGETS = {"dead ratio at 8 images": 8.0, "dead ratio at 32 images": 9.0, "peak memory at 8 images, share of the textbook's": 0.5}
DEAD = 20  # in the rows of "dead" every such latent, 5%, never fires, and the step has the ghost term
PEERS = {"overcomplete": "overcomplete", "sparsify": "eai-sparsify", "sae_lens": "sae-lens"}


class Step(NamedTuple):
    """One side: what takes one step and returns the loss and L0 before it, and what that trains."""

    step: Callable[[], tuple[Tensor, Tensor]]
    weights: nn.Module


def tokens(n: int, d_in: int, device: str) -> Tensor:
    """Random activations [N, D] around a common mean, as a residual stream has one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d_in, generator=generator).add_(torch.randn(d_in, generator=generator)).to(device)


class Textbook(nn.Module):
    """The paper's autoencoder as one would write it: dense, float32, autograd."""

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).normal_(std=d_in**-0.5, generator=generator).T.contiguous())
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in).normal_(generator=generator))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        self.normalize()

    @torch.no_grad()
    def normalize(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def project(self) -> None:
        self.W_dec.grad.addcmul_(self.W_dec, torch.linalg.vecdot(self.W_dec.grad, self.W_dec)[:, None], value=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # b_dec's part in the encoder is folded into the bias: its gradient would otherwise cost a [N, S] x [S, D] product of its own.
        centre = self.b_dec.detach()
        bias = self.b_enc - (self.b_dec - centre) @ self.W_enc.detach()
        latents = torch.relu(torch.addmm(bias, x - centre, self.W_enc))
        return torch.addmm(self.b_dec, latents, self.W_dec), latents


def adam(module: nn.Module) -> torch.optim.Adam:
    """The same for all sides."""
    return torch.optim.Adam(module.parameters(), lr=LR, fused=True)


def ghost(x: Tensor, reconstruction: Tensor, pre: Tensor, rows: Tensor, error: Tensor) -> Tensor:
    """The paper's term for dead latents, as one would write it."""
    residual = (x - reconstruction).detach()
    norm, guess = residual.norm(dim=1, keepdim=True), torch.exp(pre) @ rows
    squared = (guess * (norm / (1e-6 + 2 * guess.norm(dim=1, keepdim=True))).detach() - residual).square() / norm
    return ((error / (squared + 1e-6)).detach() * squared).mean()


def textbook(x: Tensor, weights: Textbook, l0: int, dead: bool = False) -> Step:
    """Dense, float32."""
    index = torch.arange(0, weights.W_dec.shape[0], DEAD, device=x.device)
    weights.to(x.device)
    optimizer = adam(weights)

    def step():
        reconstruction, latents = weights(x)
        error = (reconstruction - x).square() / x.norm(dim=1, keepdim=True)
        loss = error.mean() + L1 * latents.sum(1).mean()
        if dead:
            pre = (x - weights.b_dec.detach()) @ weights.W_enc[:, index] + weights.b_enc[index]
            loss = loss + ghost(x, reconstruction, pre, weights.W_dec[index], error)
        optimizer.zero_grad(set_to_none=True)
        active = latents.detach().count_nonzero() / len(x)
        del latents
        loss.backward()
        weights.project()
        optimizer.step()
        weights.normalize()
        return loss.detach(), active

    return Step(step, weights)


def ours(x: Tensor, weights: Textbook, l0: int, activation: str = "relu", precision: str = "bfloat16", dead: bool = False) -> Step:
    """Sparse kernels, gradients summed within Adam's pass over the weights."""
    from patchsae_utils.sae.losses import objective
    from patchsae_utils.sae.model import SparseAutoencoder
    from patchsae_utils.sae.sparse.adam import DeferredGradients

    d_in, d_sae = weights.W_enc.shape
    with torch.device("meta"):
        sae = SparseAutoencoder(d_in, d_sae, activation, k=l0 if activation == "topk" else None)
    sae.to_empty(device="cpu")
    for name, parameter in weights.named_parameters():
        getattr(sae, name).data = parameter.data
    if activation == "topk":
        sae.b_enc.data.zero_()  # k decides how many fire
    sae.input_mean.zero_(), sae.input_norm.zero_()
    sae.to(x.device)
    loss_of, optimizer, deferred = objective(sae), adam(sae), DeferredGradients(sae)
    silent = (torch.arange(d_sae, device=x.device) % DEAD == 0) if dead else None

    def step():
        with deferred, torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = sae(x, sparse=True)
            loss = loss_of(sae, x, silent, l1_coefficient=L1, output=output).total
        loss.backward()
        deferred.step(optimizer)
        return loss.detach(), output.latents.counts().float().mean()

    return Step(step, sae)


def overcomplete(x: Tensor, weights: Textbook, l0: int) -> Step:
    """overcomplete's TopKSAE; it normalises its dictionary itself, in each forward pass."""
    from overcomplete.sae import TopKSAE

    d_in, d_sae = weights.W_enc.shape
    sae = TopKSAE(d_in, nb_concepts=d_sae, top_k=l0, device=str(x.device))
    optimizer = adam(sae)

    def step():
        _, latents, reconstruction = sae(x)
        loss = (reconstruction - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        active = latents.detach().count_nonzero() / len(x)
        loss.backward()
        optimizer.step()
        return loss.detach(), active

    return Step(step, sae)


def sparsify(x: Tensor, weights: Textbook, l0: int) -> Step:
    """eai-sparsify's SparseCoder, with its own normalisation and projection."""
    if x.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # as its code suggests where there is no GPU
    from sparsify import SparseCoder, SparseCoderConfig

    d_in, d_sae = weights.W_enc.shape
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=l0), device=x.device)
    optimizer = adam(sae)

    def step():
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x)
        optimizer.zero_grad(set_to_none=True)
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        return output.fvu.detach(), (output.latent_acts.detach() > 0).sum() / len(x)

    return Step(step, sae)


def sae_lens(x: Tensor, weights: Textbook, l0: int) -> Step:
    """sae-lens' TopKTrainingSAE and its training forward pass."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    d_in, d_sae = weights.W_enc.shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=l0, device=str(x.device)))
    optimizer = adam(sae)
    newer = {"n_training_steps": 0, "is_logging_step": False}
    options = {name: value for name, value in newer.items() if name in TrainStepInput.__annotations__}

    def step():
        output = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, **options))
        optimizer.zero_grad(set_to_none=True)
        latents = output.feature_acts.detach()
        active = (latents._values() if latents.is_sparse else latents).count_nonzero() / len(x)
        output.loss.backward()
        optimizer.step()
        return output.loss.detach(), active

    return Step(step, sae)


SIDES: dict[str, Callable[..., Step]] = {
    "textbook": textbook, "ours": ours, "overcomplete": overcomplete, "sparsify": sparsify, "sae_lens": sae_lens,
    "ours float32": lambda x, weights, l0: ours(x, weights, l0, precision="float32"),
    "textbook dead": lambda x, weights, l0: textbook(x, weights, l0, dead=True),
    "ours dead": lambda x, weights, l0: ours(x, weights, l0, dead=True),
    "ours topk": lambda x, weights, l0: ours(x, weights, l0, activation="topk"),
}  # fmt: skip


def prepare(side: str, settings: dict) -> Callable[[], Step]:
    """Tokens and weights of a size, ready to become a side's step."""
    x = tokens(settings["tokens"], settings["d_in"], settings["device"])
    weights = Textbook(settings["d_in"], settings["d_sae"])
    set_l0(weights, x, settings["l0"])
    if "dead" in side:
        weights.b_enc.data[::DEAD] -= 5  # five times a pre-activation's spread
    return lambda: SIDES[side](x, weights, settings["l0"])


def measure(side: str, settings: dict) -> dict:
    """Seconds, memory, first loss and L0 of one side, in this process."""
    device = settings["device"]
    if device == "cpu":
        torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32 = True  # the dense side's float32 on a GPU
    prepare(side, settings | {"tokens": 16, "d_in": 8, "d_sae": 64, "l0": 4})().step()  # imports, thread pools: no part of the step
    before = peak_memory(device)
    this, first = prepare(side, settings)(), []

    def step():
        result = this.step()
        if not first:
            first.append(float(result[0]))
        first[1:] = [float(result[1])]

    seconds = timed(step, repeats=settings["repeats"], warmup=2, device=device)
    peak = peak_memory(device)
    return {
        "seconds": seconds["best"], "median_seconds": seconds["median"], "tokens_per_second": settings["tokens"] / seconds["best"],
        "peak_memory_gb": peak / 1e9, "step_memory_gb": (peak - before) / 1e9,  # the latter without what loading torch takes
        "first_loss": first[0], "l0": first[1],
    }  # fmt: skip


def run(side: str, kind: str, settings: dict, peaks: dict[str, float], python: str | None = None) -> dict:
    """A row: what was asked, and what a process of its own measured."""
    about = {"kind": kind, "side": side, **{name: settings[name] for name in ("tokens", "d_in", "d_sae")}, "target_l0": settings["l0"]}
    row = about | in_subprocess("benchmarks.sae_step", side, settings, python=python)
    if "seconds" in row:
        # The textbook's five products of [N, D] x [D, S] size are what a dense step can't do without.
        product = 2 * settings["tokens"] * settings["d_in"] * settings["d_sae"]
        row["dense_flops_per_second_over_matmul_peak"] = 5 * product / row["seconds"] / peaks["float32"]
        if side.startswith("ours") and "float32" not in side:
            row["encoder_product_share_of_bfloat16_peak"] = product / row["seconds"] / peaks["bfloat16"]
    print(f"{kind:>9} {side:<14} " + (f"{row['seconds']:.3f} s" if "seconds" in row else row["error"]), file=sys.stderr)
    return row


def main(arguments: Sequence[str] | None = None) -> dict | None:
    """Run the benchmark; see the module's docstring."""
    options_of = parser(__doc__)
    options_of.add_argument("--images", type=int, nargs="+", default=[8, 32], help="of --tokens-per-image each; the first is the headline")
    for name, default in {"--tokens-per-image": 197, "--d-in": 768, "--d-sae": 49_152, "--l0": 150}.items():
        options_of.add_argument(name, type=int, default=default)
    options_of.add_argument("--peers-python", metavar="PATH", help="an interpreter that has the peers installed; default: this one")
    options_of.add_argument("--no-scaling", action="store_true", help="leave out the rows over d_sae, tokens and density")
    options_of.add_argument("--no-peers", action="store_true")
    options_of.add_argument("--side", help=argparse.SUPPRESS)
    options_of.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = options_of.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(options.side, options.settings)))
        return None
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    base = {name: getattr(options, name) for name in ("d_in", "d_sae", "l0", "repeats", "device", "threads")}
    sizes = [n * options.tokens_per_image for n in options.images]
    side = min(3072, max(options.d_in, 256))
    peaks = {str(dtype).removeprefix("torch."): matmul_peak(options.device, dtype, size=side) for dtype in (torch.float32, torch.bfloat16)}

    rows = [run(name, "headline", base | {"tokens": n}, peaks) for n in sizes for name in ("textbook", "ours", "ours float32")]
    pairs = []
    for n in sizes:
        dense, sparse = (next(row for row in rows if row["side"] == name and row["tokens"] == n) for name in ("textbook", "ours"))
        for row in (dense, sparse):
            if "error" in row:
                raise SystemExit(f"{row['side']} at {n} tokens failed: {row['error']}")
        pair = {
            "ratio": dense["seconds"] / sparse["seconds"], "median_ratio": dense["median_seconds"] / sparse["median_seconds"],
            "step_memory_share": sparse["step_memory_gb"] / dense["step_memory_gb"] if dense["step_memory_gb"] else None,
            "peak_memory_share": sparse["peak_memory_gb"] / dense["peak_memory_gb"],
            "loss_difference": abs(sparse["first_loss"] / dense["first_loss"] - 1),
        }  # fmt: skip
        pairs.append({"tokens": n} | pair)
    for pair in pairs:
        dense, sparse = (run(name, "dead", base | {"tokens": pair["tokens"]}, peaks) for name in ("textbook dead", "ours dead"))
        rows += [dense, sparse]
        pair["dead_ratio"] = dense["seconds"] / sparse["seconds"] if "error" not in dense | sparse else None
    if not options.no_peers:
        rows.append(run("ours topk", "peers", base | {"tokens": sizes[0]}, peaks))
        for peer, package in PEERS.items():
            row = run(peer, "peers", base | {"tokens": sizes[0]}, peaks, python=options.peers_python)
            rows.append(row | {"package": package})
    if not options.no_scaling:
        n = sizes[0]
        for d_sae in (options.d_sae // 8, options.d_sae // 4, options.d_sae // 2):
            rows += [run(name, "d_sae", base | {"tokens": n, "d_sae": d_sae}, peaks) for name in ("textbook", "ours")]
        for share in (4, 2):
            rows += [run(name, "tokens", base | {"tokens": max(1, n // share)}, peaks) for name in ("textbook", "ours")]
        for density in (0.001, 0.01, 0.03, 0.1):
            l0 = max(1, round(density * options.d_sae))
            rows += [run(name, "density", base | {"tokens": n, "l0": l0}, peaks) | {"density": density} for name in ("textbook", "ours")]
    more = {"pairs": pairs, "targets": TARGETS, "matmul_peak_flops": peaks, "command": "python -m benchmarks.sae_step"}
    return report("sae_step", rows, pairs[0]["ratio"], path=options.json, **more)


if __name__ == "__main__":
    main()
