"""The trainer: Adam on the PatchSAE objective over a store of activations, resumable bit for bit.

Per step: the decoder's rows are scaled to unit norm, the loss is taken on a batch of tokens mixed from many images, the gradient
loses its part along the decoder's rows, Adam moves. Rate: linear warm-up, then constant. Recipe: Lim et al., ICLR 2025, appendix A.
"""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .artifacts import fingerprint, is_current, write_json
from .checkpoints import CONFIG, WEIGHTS, load_sae
from .config import TrainConfig
from .losses import geometric_median, patchsae_loss
from .sae import SparseAutoencoder

LOG, CHECKPOINT, MANIFEST = "training_log.csv", "checkpoint.pt", "manifest.json"
LOG_COLUMNS = ("step", "tokens", "lr", "loss", "mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "tokens_per_second")
_FORMAT = 1
_ORIGIN = ("model_name", "weights_hash", "layer", "tokens", "grid", "preprocessing", "dataset", "split", "seed", "n_images")
# Latents of so many (token, latent) pairs are computed at once: on a CPU what stays in its cache is twice as fast; either way memory is bounded.
_CHUNK_CPU, _CHUNK_GPU = 3 << 20, 1 << 28


class TokenStore(Protocol):
    """What the trainer needs of a store; an :class:`~patchsae_utils.activations.ActivationStore` has it."""

    d_in: int
    fingerprint: str
    metadata: Any

    def tokens(self, batch_size: int, *, seed: int, epochs: int | None, start_step: int, positions: bool): ...


class _Sums(NamedTuple):
    """A batch's terms, summed over its chunks."""

    loss: float
    mse: float
    l1: float
    ghost: float
    l0: float
    residual: float


def train_sae(
    sae: SparseAutoencoder,
    store: TokenStore,
    config: TrainConfig,
    out: str | Path,
    resume: bool = True,
    progress: bool = True,
) -> SparseAutoencoder:
    """Train an SAE on stored activations, or open it when it is there already.

    Parameters
    ----------
    sae : SparseAutoencoder
        Fresh: ``b_dec`` at 0 is moved to the geometric median of the first batch. It is trained in place, on the device it is on.
    store : ActivationStore
    config : TrainConfig
    out : str or Path
        Folder for ``cfg.json``, ``sae_weights.safetensors``, ``training_log.csv``, ``manifest.json``; while training, ``checkpoint.pt``.
    resume : bool
        Open the finished SAE of the same inputs, or go on from its checkpoint. False trains anew whatever is there.
    progress : bool
        Show a bar with loss, L0, explained variance and the share of dead latents.

    Returns
    -------
    SparseAutoencoder
        Trained, decoder rows at unit norm, ``metadata`` saying what it reads.

    Raises
    ------
    ValueError
        If the store's activations are not those the SAE reads, the loss stops being finite, or a checkpoint is damaged.
    """
    out = Path(out)
    sae.check_source(d_in=store.d_in, model_name=store.metadata.model_name, layer=store.metadata.layer)
    key = fingerprint(stage="sae", format=_FORMAT, sae=sae.fingerprint, training=config, store=store.fingerprint)
    if resume and is_current(out, key):
        return load_sae(out, device=sae.W_enc.device)
    out.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, CONFIG, WEIGHTS):  # another run's; what lies here from now on is not finished
        (out / name).unlink(missing_ok=True)
    sae.metadata = _origin(store) | sae.metadata
    run = _Run(sae, store, config, out, key)
    if resume:
        run.restore()
    run.train(progress)
    sae.normalize_decoder()
    sae.metadata |= {"n_training_tokens": run.n_steps * config.batch_tokens, "l1_coefficient": config.l1_coefficient}
    sae.save(out)
    last = training_log(out).iloc[-1]
    final = {name: float(last[name]) for name in ("loss", "mse", "l0", "explained_variance", "dead_fraction")}
    write_json(
        out / MANIFEST, {"format": _FORMAT, "fingerprint": key, "complete": True, "steps": run.n_steps, "training": config, "final": final}
    )
    (out / CHECKPOINT).unlink(missing_ok=True)
    return sae


def training_log(out: str | Path) -> pd.DataFrame:
    """The log that :func:`train_sae` wrote into ``out``: one row every ``log_every`` steps, columns as in ``LOG_COLUMNS``.

    ``l0`` and ``explained_variance`` (centred) are of the training batch, before the step; ``dead_fraction`` counts latents that have not
    fired for more than ``dead_after_steps`` steps.
    """
    path = Path(out) / LOG
    if not path.exists():
        raise FileNotFoundError(f"No {LOG} in {out}: train an SAE there first, by train_sae(sae, store, config, {str(out)!r}).")
    return pd.read_csv(path)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Adam's rate at a step, counted from 0: linear up to ``config.lr`` over ``warmup_steps``, then constant."""
    return config.lr * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else config.lr


@torch.no_grad()
def start_from_data(sae: SparseAutoencoder, x: Tensor, rate: float = 0.01) -> None:
    """Start every latent at a token, instead of at random: k-means is started from data points for the same reason (Forgy, 1965).

    ``b_dec`` is the geometric median of the tokens; decoder row i points from there to token i; encoder column i is parallel to it, with the
    bias at which the latent fires on the share ``rate`` of the tokens; one common gain, the least-squares one, fits the sizes. From random
    weights half of all latents fire on every token, the L1 term silences most before they have found anything to stand for, and
    what is rare (here: each single object) is left to a few.

    Parameters
    ----------
    sae : SparseAutoencoder
        Changed in place.
    x : Tensor [N, D]
        At least as many tokens as latents, of many images.
    rate : float
        Share of tokens on which a latent fires at first.

    Raises
    ------
    ValueError
        If there are fewer tokens than latents.
    """
    x = x.to(sae.W_dec)
    if len(x) < sae.d_sae:
        raise ValueError(
            f"start='data' needs a token for each of the {sae.d_sae} latents; got {len(x)}. Extract more images, or use start='random'."
        )
    sae.b_dec.copy_(geometric_median(x[:4096]))
    sae.W_dec.copy_(x[: sae.d_sae] - sae.b_dec)
    sae.normalize_decoder()
    centred = x[-4096:] - sae.b_dec
    projections = centred @ sae.W_dec.T
    thresholds = projections.kthvalue(max(1, int(len(projections) * (1 - rate))), dim=0).values
    guess = torch.relu(projections - thresholds) @ sae.W_dec
    gain = (centred * guess).sum() / guess.square().sum().clamp_min(torch.finfo(guess.dtype).tiny)
    sae.W_enc.copy_(gain * sae.W_dec.T)
    sae.b_enc.copy_(-gain * thresholds)


class _Run:
    """One training run: what a checkpoint must hold, and the loop."""

    def __init__(self, sae: SparseAutoencoder, store: TokenStore, config: TrainConfig, out: Path, key: str):
        self.sae, self.store, self.config, self.out, self.key = sae, store, config, out, key
        self.device = sae.W_enc.device
        self.n_steps = max(1, round(config.n_tokens / config.batch_tokens))
        self.step = 0
        self.silent_for = torch.zeros(sae.d_sae, dtype=torch.long, device=self.device)  # steps since each latent fired
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        self.rows: list[dict[str, Any]] = []

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Everything that the rest of the run depends on; the order of the tokens follows from seed and step."""
        state = {
            "format": _FORMAT,
            "fingerprint": self.key,
            "step": self.step,
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "silent_for": self.silent_for,
            "rows": self.rows,
        }
        temporary = self.out / f".{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / CHECKPOINT)

    def restore(self) -> None:
        """Go on where the checkpoint of the same inputs ends; without one, or with another run's, start from the beginning."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["fingerprint"] != self.key:
                return
            self.sae.load_state_dict(state["sae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.silent_for, self.step, self.rows = state["silent_for"], state["step"], state["rows"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ValueError(f"{path} can't be read ({type(error).__name__}). Delete it to train from the beginning.") from error

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, progress: bool) -> None:
        config = self.config
        if self.step == 0 and config.start == "data":
            n_tokens = max(20_000, 2 * self.sae.d_sae)
            start_from_data(self.sae, next(self.store.tokens(n_tokens, seed=config.seed + 1, epochs=None, start_step=0, positions=False)))
        stream = self.store.tokens(config.batch_tokens, seed=config.seed, epochs=None, start_step=self.step, positions=True)
        log = _open_log(self.out / LOG, self.rows)
        started, tokens = time.perf_counter(), 0
        with log, tqdm(total=self.n_steps, initial=self.step, desc="training the SAE", unit="step", disable=not progress) as bar:
            while self.step < self.n_steps:
                x, positions = (tensor.to(self.device) for tensor in next(stream))
                tokens += len(x)
                last = self.step + 1 == self.n_steps
                logged = self.step % config.log_every == 0 or last
                sums = self._step(x, positions == 0, logged)
                if logged:
                    row = self._row(x, sums, tokens / (time.perf_counter() - started))
                    log.write(row)
                    bar.set_postfix(
                        loss=f"{row['loss']:.4f}",
                        L0=f"{row['l0']:.0f}",
                        EV=f"{row['explained_variance']:.3f}",
                        dead=f"{row['dead_fraction']:.0%}",
                    )
                self.step += 1
                bar.update()
                if self.step % config.checkpoint_every == 0 and not last:
                    self.save()

    def _step(self, x: Tensor, is_cls: Tensor, logged: bool) -> _Sums | None:
        """One step of Adam on a batch [N, D]; chunk by chunk, since every term is a mean over tokens."""
        sae, config = self.sae, self.config
        if self.step == 0 and not sae.b_dec.detach().any():
            sae.b_dec.data.copy_(geometric_median(x))
        sae.normalize_decoder()
        dead = self.silent_for > config.dead_after_steps
        dead = dead if bool(dead.any()) else None
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        rows = max(1, (_CHUNK_CPU if self.device.type == "cpu" else _CHUNK_GPU) // sae.d_sae)
        sums = torch.zeros(len(_Sums._fields), dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        for part, part_is_cls in zip(x.split(rows), is_cls.split(rows), strict=True):
            share = len(part) / len(x)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                output = sae(part)
                loss = patchsae_loss(sae, part, dead, config.l1_coefficient, config.cls_coefficient, is_cls=part_is_cls, output=output)
            (loss.total * share).backward()
            with torch.no_grad():
                fired |= output.latents.amax(0) > 0
                if logged:
                    residual = (part - output.reconstruction).double().square().sum() / share
                    l0 = output.latents.count_nonzero() / len(part)
                    sums += share * torch.stack([*(term.double() for term in loss), l0.double(), residual]).cpu()
        sae.remove_parallel_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.optimizer.step()
        self.silent_for = torch.where(fired, 0, self.silent_for + 1)
        return _Sums(*sums.tolist()) if logged else None

    def _row(self, x: Tensor, sums: _Sums, speed: float) -> dict[str, Any]:
        """A row of the log; stops the run when the loss is no number, before a checkpoint could keep it."""
        if not math.isfinite(sums.loss):
            raise ValueError(
                f"The loss is {sums.loss} at step {self.step}. Look for NaN or infinite activations in the store; if there are none, lower lr "
                f"(now {self.config.lr}) or raise warmup_steps (now {self.config.warmup_steps})."
            )
        variance = (x - x.mean(0)).double().square().sum().item()
        row = {
            "step": self.step,
            "tokens": (self.step + 1) * self.config.batch_tokens,
            "lr": learning_rate(self.step, self.config),
            **{name: getattr(sums, name) for name in ("loss", "mse", "l1", "ghost", "l0")},
            "explained_variance": 1 - sums.residual / variance if variance else math.nan,
            "dead_fraction": (self.silent_for > self.config.dead_after_steps).double().mean().item(),
            "tokens_per_second": round(speed),
        }
        self.rows.append(row)
        return row


class _open_log:  # noqa: N801 - used as a function
    """A CSV that begins with the rows a checkpoint knows, so that a resumed run leaves no row twice; each row is on disk when written."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]):
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(_rounded(row) for row in rows)
        os.replace(temporary, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, LOG_COLUMNS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow(_rounded(row))
        self._file.flush()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}


def _origin(store: TokenStore) -> dict[str, Any]:
    """What a store says of its activations, as plain JSON values."""
    values = {name: getattr(store.metadata, name) for name in _ORIGIN} | {"store_fingerprint": store.fingerprint}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
