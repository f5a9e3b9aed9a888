"""A joint dictionary of models m, a crosscoder: f = act(sum_m x_m W_enc^m + b_enc), and x_m (centred, scaled) is read back as f W_dec^m.

BatchTopK: the k N largest f_s n_s of N tokens stay, n_s the summed norms of decoder rows; later those above the running mean of the smallest
that stayed. L1 (``k`` None): all stay, and lambda times the mean sum of f_s n_s is added to the loss. Sources: Lindsey et al., "Sparse
crosscoders", 2024; Minder et al., "Overcoming sparsity artifacts in crosscoders", 2025.
"""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

LR, BATCH = 1e-3, 512
WARMUP, DECAY = 0.05, 0.2  # shares of the steps
_RATE = 0.02  # of the running mean of the threshold


class JointDictionary(nn.Module):
    """Decoder rows start at the directions of some tokens [n, M, D], encoders as their transposes."""

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, tokens: Tensor, d_sae: int, *, k: int | None, l1_coefficient: float = 0.0):
        super().__init__()
        self.k, self.l1_coefficient = k, l1_coefficient
        self.register_buffer("mean", tokens.mean(0))
        scale = (tokens - self.mean).square().mean().sqrt()
        self.register_buffer("scale", scale.clamp_min(1e-12))  # where nothing changed, the difference is 0
        self.register_buffer("threshold", tokens.new_zeros(()))
        drawn = torch.randint(len(tokens), (d_sae,), generator=Generator().manual_seed(0))
        rows = nn.functional.normalize(self._scaled(tokens[drawn.to(tokens.device)]).flatten(1), dim=1).view(d_sae, *tokens.shape[1:])
        self.W_dec = nn.Parameter(rows.transpose(0, 1).contiguous())  # [M, S, D]
        self.W_enc = nn.Parameter(self.W_dec.detach().transpose(1, 2).contiguous())  # [M, D, S]
        self.b_enc = nn.Parameter(tokens.new_zeros(d_sae))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    @property
    def norms(self) -> Tensor:
        """[M, S] norms of the decoder rows."""
        return self.W_dec.norm(dim=2)

    def rows(self, model: int) -> Tensor:
        """[S, D] decoder rows of one model, in the units of its stream."""
        return (self.W_dec[model] * self.scale).detach()

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., S] of tokens [..., M, D], each token's for itself."""
        f = self._positive(x)
        return f * (f * self.norms.sum(0) > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """[..., M, D] what latents say of each stream, in its units."""
        return torch.stack([f @ rows for rows in self.W_dec], -2) * self.scale + self.mean

    def beside(self, changes: JointDictionary) -> JointDictionary:
        """Its latents and, after them, those of a dictionary of the difference of its two models' streams, in one code: the second model alone
        writes these. What :meth:`decode` says then holds the difference twice."""
        both, unit, rows = copy.deepcopy(self), changes.scale / self.scale, changes.W_dec[0] * changes.scale / self.scale
        moved = (self.mean[1] - self.mean[0] - changes.mean[0]) / changes.scale @ changes.W_enc[0]
        parts = {
            "W_enc": (self.W_enc, torch.stack([-changes.W_enc[0], changes.W_enc[0]]) / unit, 2),
            "W_dec": (self.W_dec, torch.stack([torch.zeros_like(rows), rows]), 1), "b_enc": (self.b_enc, changes.b_enc + moved, 0),
        }  # fmt: skip
        for name, (own, other, axis) in parts.items():
            setattr(both, name, nn.Parameter(torch.cat([own, other], axis), requires_grad=False))
        both.threshold = torch.cat([self.threshold.expand_as(self.b_enc), (changes.threshold * unit).expand_as(changes.b_enc)])
        return both

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error on tokens [N, M, D], in units of the scale, plus the L1 penalty; and the smallest product f_s n_s that stayed."""
        f = self._positive(x)
        products, smallest = f * self.norms.sum(0), f.new_zeros(())
        if self.k is not None:
            best = products[products > 0].detach().topk(min(self.k * len(x), int((products > 0).sum()))).values
            smallest = best[-1] if len(best) else smallest
            f = f * (products >= smallest)
        error = self._scaled(x) - torch.stack([f @ rows for rows in self.W_dec], 1)
        return error.square().sum((1, 2)).mean() + self.l1_coefficient * products.sum(1).mean(), smallest

    def _positive(self, x: Tensor) -> Tensor:
        return (self._scaled(x).flatten(-2) @ self.W_enc.flatten(0, 1) + self.b_enc).relu()


def train_joint(
    tokens: Tensor, d_sae: int, *, k: int | None, n_tokens: int, l1_coefficient: float = 0.0, progress: bool = True
) -> JointDictionary:
    """A joint dictionary of tokens [n, M, D], trained on ``n_tokens`` draws of them; Adam, the rate rises at first and falls to 0."""
    joint = JointDictionary(tokens, d_sae, k=k, l1_coefficient=l1_coefficient)
    generator, batch = Generator().manual_seed(0), min(BATCH, len(tokens))
    steps = max(1, n_tokens // batch)
    optimizer = torch.optim.Adam(joint.parameters(), lr=LR)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * steps), (steps - step) / (DECAY * steps)))
    order = tokens.new_zeros(0, dtype=torch.long)
    for step in tqdm(range(steps), desc="joint dictionary", disable=not progress, leave=False):
        if len(order) < batch:
            order = torch.randperm(len(tokens), generator=generator)
        chosen, order = order[:batch], order[batch:]
        loss, smallest = joint.loss(tokens[chosen.to(tokens.device)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(joint.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        joint.threshold.lerp_(smallest, _RATE if step else 1.0)
    return joint.requires_grad_(False)


def norm_difference(joint: JointDictionary) -> Tensor:
    """[S] relative difference of two models' decoder norms: 0 for a latent of the first alone, 1 of the second, 1/2: equal."""
    first, second = joint.norms
    return ((second - first) / torch.maximum(first, second).clamp_min(torch.finfo(first.dtype).tiny) + 1) / 2
