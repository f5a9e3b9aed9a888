"""The trainer: Adam on an SAE's objective over activations, in one process or several, resumable bit for bit.

Per step: the decoder's rows are scaled to unit norm, the loss is taken on a batch of tokens mixed from many images, the gradient
loses its part along the decoder's rows, Adam moves. Where few latents are active, all of that touches those alone. Recipe: Lim et al., ICLR 2025, appendix A.

A run depends on its settings, its seed and the step alone: no random number is drawn outside the token stream, a function of seed and step. So
a checkpoint holds weights, Adam's moments, counters of silent latents and what the log knows. The first is written before the first step.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.store import ActivationStore
from ..activations.streaming import TokenStream
from ..config import TrainConfig
from ..run.artifacts import disk_errors, fingerprint, folder_lock, read_checked_json, write_checked_json, write_json
from ..run.memory import out_of_memory
from ..run.processes import Processes
from .files import CONFIG, WEIGHTS, load_sae
from .losses import objective
from .model import SparseAutoencoder
from .sparse import worthwhile
from .sparse_adam import DeferredGradients, l1_weight, learning_rate, n_steps
from .starts import SOFT_COSINE, Archetypes, Normalization, centroids, start_bias, start_from

Tokens = ActivationStore | TokenStream
CHECKPOINT, MANIFEST, LOG, SUMMARY = "checkpoint.pt", "manifest.json", "training_log.csv", "summary.json"
LOG_COLUMNS = ("step", "tokens", "lr", "loss", "mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "tokens_per_second")
_TERMS = ("loss", "mse", "l1", "ghost", "l0", "residual")  # of a batch, summed over its chunks
_SHOWN = ("loss", "l0", "explained_variance", "dead_fraction", "tokens_per_second")  # in the bar
_FORMAT = 3
_ORIGIN = ("model_name", "weights_hash", "layer", "tokens", "grid", "preprocessing", "dataset", "split", "seed", "n_images")
# So many (token, latent) pairs are computed at once, which on a CPU stay in its cache, but so many tokens at least: each chunk adds to all gradients.
_CHUNK_CPU, _CHUNK_GPU, _CHUNK_TOKENS = 3 << 20, 1 << 28, 512
_CLUSTERED = 60_000  # tokens that k-means sees, at least
_CHUNK_DEAD = 1 << 26  # on the sparse path only the dead latents' pre-activations are computed whole, for the term that wakes them
# sparse="auto": a smaller dictionary's dense step is short, and stays dense. Density is the mean over so many rows of the log.
_SPARSE_FROM, _DENSITY_ROWS = 8192, 5
_THRESHOLD_RATE = 10  # of ``jumprelu``'s thresholds, times the others'
_CONTROL, _CONTROL_SHARE = 0.02, 2 / 3  # the weight of sparsity follows a target L0 by so much a step, for this share of the run


def train_sae(
    sae: SparseAutoencoder, store: Tokens, config: TrainConfig, out: str | Path, resume: bool = True, progress: bool = True
) -> SparseAutoencoder:
    """Train an SAE on activations, or open it when it is there already.

    Under ``accelerate launch`` every process calls this alike, and takes its share of each batch: the loss curve is that of one process
    (``batchtopk`` and ``matryoshka`` select within each share). Only the main process writes.

    Parameters
    ----------
    sae : SparseAutoencoder
        Trained in place, on the GPU it is on, else on the one that accelerate gives this process, else on the CPU. A ``b_dec`` of 0 is moved
        to the middle of the first batch first. An object that a run into ``out`` has moved still names that run: it opens, or goes on.
    store : ActivationStore or TokenStream
    config : TrainConfig
    out : str or Path
        Folder for ``cfg.json``, ``sae_weights.safetensors``, ``training_log.csv``, ``manifest.json``, ``summary.json`` (the last row of the
        log, wall time, tokens/s); while training, ``checkpoint.pt``.
    resume : bool
        Open the finished SAE of the same inputs, or go on from its checkpoint. False trains these weights anew and replaces what is there.
    progress : bool
        Show a bar with loss, L0, explained variance, the share of dead latents and tokens/s.

    Returns
    -------
    SparseAutoencoder
        Trained, in evaluation mode, decoder rows at unit norm, ``metadata`` saying what it reads.

    Raises
    ------
    ValueError
        If the store's activations are not those the SAE reads, or lack the tokens wanted; the folder holds another run, or another process
        trains into it; a start or ``token_norm`` would overwrite weights that were loaded or trained; ``target_l0`` is asked of a variant with
        ``k``; loss or weights stop being finite (the checkpoint before stays); or a checkpoint is damaged.
    ImportError
        If a tracker's package is missing.
    """
    out, kept = Path(out), _kept_tokens(config, store)
    sae.check_store(store)
    processes = Processes(config.trackers, out)
    device = sae.W_enc.device if processes.number == 1 and sae.W_enc.device.type != "cpu" else processes.device
    before, after = sae.trained_in.get(out.resolve(), (None, None))
    start = sae.fingerprint
    start = before if resume and start == after else start  # what a run into this folder has made of these weights still names it
    recipe = {
        name: value for name, value in dataclasses.asdict(config).items() if name != "trackers" and value != getattr(TrainConfig, name)
    }
    inputs = {"sae": start, "training": recipe, "store": store.fingerprint}

    def finished() -> bool:
        return resume and _finished(out, inputs)

    def opened() -> SparseAutoencoder:
        trained = load_sae(out, device=device)
        trained.trained_in[out.resolve()] = (start, trained.fingerprint)
        return trained

    if processes.on_main(finished):
        return opened()
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(folder_lock(out)))
        if processes.on_main(finished):  # by another process, meanwhile
            return opened()
        overwrites = {"start": "random", "constraint": "none", "normalize": config.normalize if config.normalize != "token_norm" else None}
        wrong = [f"{name}={getattr(config, name)!r}" for name, keeps in overwrites.items() if getattr(config, name) != keeps]
        if (wrong or sae.token_norm) and not sae.is_fresh and not (resume and (out / CHECKPOINT).exists()):
            what = f"{' and '.join(wrong) or 'Training'} would overwrite the weights of this SAE, which were loaded, trained or set."
            raise ValueError(f"{what} Use start='random' on the stream's own units, which keeps them, or give a fresh SparseAutoencoder.")
        if config.target_l0 is not None and sae.k is not None:
            raise ValueError(f"target_l0={config.target_l0} has no meaning for activation={sae.activation!r}, whose k={sae.k} sets it.")
        processes.on_main(lambda: _clear(out, MANIFEST, SUMMARY, CONFIG, WEIGHTS, *(() if resume else (CHECKPOINT,))))
        sae.metadata = _origin(store) | ({"tokens": kept} if kept else {}) | sae.metadata
        run = Training(sae.to(device), store, config, out, inputs, processes)
        try:
            run.restore()
            with out_of_memory(f"training steps of {config.batch_tokens} tokens", "training.batch_tokens or sae.expansion_factor lower"):
                run.train(progress and processes.main)
            run.fold()
            sae.eval()
            sae.metadata |= {
                "n_training_tokens": run.n_steps * config.batch_tokens,
                "l1_coefficient": config.l1_coefficient * run.l1_factor,
            }
            processes.on_main(run.finish)
        finally:
            run.fold()  # also where it was interrupted: nobody else knows of other units
            if (moved := sae.fingerprint) != start:
                sae.trained_in[out.resolve()] = (start, moved)
    return sae


def training_log(out: str | Path) -> pd.DataFrame:
    """The log that :func:`train_sae` wrote.

    Parameters
    ----------
    out : str or Path
        Its folder.

    Returns
    -------
    DataFrame
        One row every ``log_every`` steps, columns as in ``LOG_COLUMNS``. ``l0`` and ``explained_variance`` (centred) are of the training batch,
        before the step; ``dead_fraction`` counts latents that have not fired for more than ``dead_after_tokens`` tokens.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    path = Path(out) / LOG
    if not path.exists():
        raise FileNotFoundError(f"No {LOG} in {out}: train an SAE there first, by train_sae(sae, store, config, {str(out)!r}).")
    return pd.read_csv(path)


# -- what a folder holds ---------------------------------------------------------------------------------------------------


def _finished(out: Path, inputs: dict[str, Any]) -> bool:
    """Whether a folder holds the finished run of these inputs; refuses one that holds something else."""
    if (out / MANIFEST).exists():
        _refuse_others(out, inputs, read_checked_json(out / MANIFEST).get("inputs"))
        return True
    if (out / CONFIG).exists() and not (out / CHECKPOINT).exists():
        _refuse_others(out, inputs, None)
    return False


def _refuse_others(out: Path, inputs: dict[str, Any], found: Any) -> None:
    """An error that says what differs between the run in a folder and the one that is wanted."""
    if found == inputs:
        return
    what = "an SAE that no run of train_sae has left there"
    if isinstance(found, dict) and all(isinstance(found.get(name), type(value)) for name, value in inputs.items()):
        differing = [word for name, word in (("sae", "initial weights"), ("store", "activations")) if found[name] != inputs[name]]
        there = found["training"]
        pairs = {
            name: [run.get(name, getattr(TrainConfig, name, None)) for run in (there, inputs["training"])]
            for name in there | inputs["training"]
        }
        differing += [f"{name} ({then!r} there, {here!r} here)" for name, (then, here) in pairs.items() if then != here]
        what = f"another run, which differs in {', '.join(differing)}"
    raise ValueError(f"{out} holds {what}. Choose another folder, or delete this one; resume=False replaces what is there.")


def _kept_tokens(config: TrainConfig, store: Tokens) -> str | None:
    """``config.tokens`` where the store holds more than those, else None."""
    if config.tokens in ("all", store.metadata.tokens):
        return None
    if store.metadata.tokens != "all":
        raise ValueError(
            f"tokens={config.tokens!r} can't be had from a store of {store.metadata.tokens!r} tokens. Extract with tokens={config.tokens!r} or 'all'."
        )
    return config.tokens


def _origin(store: Tokens) -> dict[str, Any]:
    """What a store says of its activations, as plain JSON values."""
    values = {name: getattr(store.metadata, name) for name in _ORIGIN}
    return {**values, "grid": list(values["grid"]), "store_fingerprint": store.fingerprint}


def _clear(out: Path, *names: str) -> None:
    """Remove a run's results: what lies in the folder from now on is not finished."""
    for name in names:
        (out / name).unlink(missing_ok=True)


# -- the run -----------------------------------------------------------------------------------------------------------------


class Training:
    """One training run: what a checkpoint must hold, and the loop."""

    def __init__(self, sae: SparseAutoencoder, store: Tokens, config: TrainConfig, out: Path, inputs: dict[str, Any], processes: Processes):
        self.sae, self.store, self.config, self.out, self.inputs, self.processes = sae, store, config, out, inputs, processes
        self.device, self.loss = sae.W_enc.device, objective(sae)
        self.n_steps, self.step, self.restored = n_steps(config), 0, False
        self.silent_for = torch.zeros(sae.d_sae, dtype=torch.long, device=self.device)  # tokens since each latent fired
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.n_starts, self.n_sparse = 0.0, 0, 0  # wall time until the last checkpoint, starts, sparse steps
        self.l1_factor, self.off_target = (
            1.0,
            0.0,
        )  # by which a target L0 has moved the weight of sparsity, and how far the last batch was from it
        self.normalization: Normalization | None = Normalization.of(sae.b_dec[None], "none")
        self.archetypes, self.anchor = None, None
        may_be_sparse = not sae.variant.gate and (config.sparse == "always" or (config.sparse == "auto" and sae.d_sae >= _SPARSE_FROM))
        self.deferred = DeferredGradients(sae) if may_be_sparse else None
        self.unit_rows = False  # whether the last step has left the decoder's rows at unit norm
        held = {"frozen_decoder": ["W_dec"], "frozen_encoder": ["W_enc"]}.get(config.constraint, [])
        if config.normalize == "token_norm":  # without biases that a token's size would have to scale, as far as the variant needs none
            held += ["b_dec"] + ["b_enc"] * (sae.variant.competes == "token")
        self.held = [getattr(sae, name).requires_grad_(False) for name in held]
        own = [sae.threshold] if sae.variant.threshold == "each" else []
        groups = [{"params": [p for p in sae.parameters() if all(p is not other for other in own)]}]
        self.optimizer = torch.optim.Adam(groups + [{"params": own, "rate": _THRESHOLD_RATE}] * len(own), lr=config.lr, fused=True)

    def _hold(self, archetypes: Archetypes | None, anchor: Tensor | None) -> None:
        """What keeps the decoder near the data, or near its start."""
        self.anchor, self.archetypes = anchor, archetypes
        if archetypes is not None:
            self.optimizer.add_param_group({"params": list(archetypes.to(self.device).parameters())})

    @torch.no_grad()
    def fold(self) -> None:
        """Put the units of training into the weights, once."""
        if self.normalization is None:
            return
        self.sae.normalize_decoder()
        self.normalization.fold(self.sae)
        self.normalization = None
        for parameter in self.held:
            parameter.requires_grad_(True)

    def save(self) -> None:
        """Everything that the rest of the run depends on, under a temporary name first; the tokens' order follows from seed and step."""
        state = {
            "format": _FORMAT, "inputs": self.inputs, "step": self.step, "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(), "silent_for": self.silent_for, "rows": self.rows, "unit_rows": self.unit_rows,
            "effort": [self.seconds, self.n_starts, self.n_sparse], "control": [self.l1_factor, self.off_target], "normalization": list(self.normalization),
            "archetypes": None if self.archetypes is None else self.archetypes.state_dict(), "anchor": self.anchor,
        }  # fmt: skip
        temporary = self.out / f".{CHECKPOINT}.tmp"  # one name for all: a killed run leaves one file at most
        try:
            with disk_errors(self.out / CHECKPOINT):
                torch.save(state, temporary)
        except OSError:
            temporary.unlink(missing_ok=True)  # which fills the disk
            raise
        os.replace(temporary, self.out / CHECKPOINT)

    def restore(self) -> None:
        """Go on where the checkpoint ends, if there is one."""
        if not (path := self.out / CHECKPOINT).exists():
            return
        try:
            with zipfile.ZipFile(path) as file:  # torch writes checksums, and doesn't read them
                if damaged := file.testzip():
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["format"] != _FORMAT:
                raise ValueError("it has another format")
            found = state["inputs"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ValueError(f"{path} can't be read ({type(error).__name__}). Delete it to train from the beginning.") from error
        _refuse_others(self.out, self.inputs, found)
        self.sae.load_state_dict(state["sae"])
        self.sae.token_norm, self.normalization = False, Normalization(*state["normalization"])
        archetypes = state["archetypes"] and Archetypes(state["archetypes"]["points"])
        if archetypes:
            archetypes.load_state_dict(state["archetypes"])
        self._hold(archetypes, state["anchor"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("silent_for", "step", "rows", "unit_rows"):
            setattr(self, name, state[name])
        self.l1_factor, self.off_target = state["control"]
        self.seconds, self.n_starts, self.n_sparse = state["effort"]
        self.restored = True

    def finish(self) -> None:
        """Write the SAE and what the run came to."""
        last = training_log(self.out).iloc[-1]
        final = {name: float(last[name]) for name in ("loss", "mse", "l0", "explained_variance", "dead_fraction")}
        self.sae.metadata["metrics"] = final
        self.sae.save(self.out)
        tokens = self.n_steps * self.config.batch_tokens
        summary = {
            "steps": self.n_steps, "tokens": tokens, "final": final, "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds) if self.seconds else None, "starts": self.n_starts, "sparse_steps": self.n_sparse,
            "processes": self.processes.number,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }  # fmt: skip
        write_json(self.out / SUMMARY, summary)
        manifest = {"format": _FORMAT, "fingerprint": fingerprint(**self.inputs), "complete": True, "inputs": self.inputs, "final": final}
        write_checked_json(self.out / MANIFEST, manifest)
        _clear(self.out, CHECKPOINT, f".{CHECKPOINT}.tmp")

    def train(self, progress: bool) -> None:
        """From where the run stands to its last step."""
        config, processes = self.config, self.processes
        self.sae.train()
        processes.everywhere(lambda: None)  # all have looked for a checkpoint
        if not self.restored:
            self._start()
            if processes.main:
                self.save()
        started, before, tokens = time.perf_counter(), self.seconds, 0
        self.n_starts += 1
        stream = self._tokens(config.batch_tokens, config.seed, self.step)
        processes.begin_tracking(dataclasses.asdict(config))
        with ExitStack() as stack:
            stack.callback(processes.end_tracking)
            if processes.main:
                _write_rows(self.rows, temporary := self.out / f".{LOG}.tmp")  # those a checkpoint knows: none is there twice
                os.replace(temporary, self.out / LOG)
            bar = tqdm(total=self.n_steps, initial=self.step, desc="training the SAE", unit="step", disable=not progress)
            stack.callback(bar.close)
            while self.step < self.n_steps:
                x, positions = next(stream)
                x = self.normalization.apply(x.to(self.device))
                tokens += len(x)
                last = self.step + 1 == self.n_steps
                logged = self.step % config.log_every == 0 or last
                sums = self._step(x, positions == 0, logged or config.target_l0 is not None)
                if logged:
                    row = self._row(x, sums, tokens / (time.perf_counter() - started))
                    if processes.main:
                        _write_rows([row], self.out / LOG, mode="a", header=False)
                    processes.log({name: row[name] for name in LOG_COLUMNS[1:]}, self.step)
                    bar.set_postfix({name: f"{row[name]:.4g}" for name in _SHOWN})
                self.step += 1
                bar.update()
                self.seconds = before + time.perf_counter() - started
                if self.step % config.checkpoint_every == 0 or last:
                    finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.sae.parameters())
                    self._check_finite(finite, f"Weights are NaN or infinite after step {self.step - 1}.")
                    if processes.main and not last:
                        self.save()

    def _tokens(self, batch_size: int, seed: int, start_step: int) -> Iterator[Any]:
        options: dict[str, Any] = {"tokens": kept} if (kept := _kept_tokens(self.config, self.store)) else {}
        return self.store.tokens(batch_size, seed=seed, epochs=None, start_step=start_step, positions=True, **options)

    def _start(self) -> None:
        """Before the first step: units, and directions from the data; from tokens of another order than the training's."""
        config, sae = self.config, self.sae
        if config.start != "random" or config.normalize != "none" or config.constraint == "archetypal":
            clusters = config.start == "kmeans" or config.constraint == "archetypal"
            n = max(_CLUSTERED, 4 * sae.d_sae) if clusters else max(20_000, 2 * sae.d_sae)
            x = next(self._tokens(n, config.seed + 1, 0))[0].to(self.device, sae.W_dec.dtype)
            self.normalization = Normalization.of(x, config.normalize)
            if not sae.is_fresh:
                self.normalization.unfold(sae)
            x = self.normalization.apply(x)
            if config.start != "random" and len(x) < sae.d_sae:
                needs = f"start={config.start!r} needs a token for each of the {sae.d_sae} latents; got {len(x)}."
                raise ValueError(f"{needs} Extract more images, or use start='random'.")
            if config.normalize != "token_norm" and (config.start != "random" or clusters):
                start_bias(sae, x[:4096], config.b_dec_start)
            points = centroids(x - sae.b_dec, sae.d_sae, config.seed) if clusters else x[: sae.d_sae] - sae.b_dec
            if config.start != "random":
                start_from(sae, points, x[-4096:])
        if config.constraint != "none":
            sae.normalize_decoder()
            archetypal = Archetypes(points) if config.constraint == "archetypal" else None
            self._hold(archetypal, sae.W_dec.detach().clone() if config.constraint == "soft_decoder" else None)

    def _is_sparse(self) -> bool:
        """Whether this step computes with active latents alone; follows from the settings and from rows of the log that a checkpoint holds."""
        if self.deferred is None:
            return False
        if self.config.sparse == "always":
            return True
        recent = [row["l0"] / self.sae.d_sae for row in self.rows[-_DENSITY_ROWS:]]
        return bool(recent) and worthwhile(sum(recent) / len(recent), self.device)

    def _chunk(self, n: int, n_dead: int, sparse: bool) -> int:
        """Tokens of n that are computed at once."""
        if self.sae.variant.competes == "batch":
            return max(1, n)
        if sparse:
            return max(1, _CHUNK_DEAD // max(1, n_dead))
        return max(_CHUNK_TOKENS, (_CHUNK_CPU if self.device.type == "cpu" else _CHUNK_GPU) // self.sae.d_sae)

    def _step(self, x: Tensor, is_cls: Tensor, logged: bool) -> dict[str, float] | None:
        """One step of Adam on a batch [N, D]; chunk by chunk, since every term is a mean over tokens."""
        sae, config, processes = self.sae, self.config, self.processes
        if self.step == 0 and sae.b_dec.requires_grad:
            start_bias(sae, x, config.b_dec_start)
        rows_of = None if self.archetypes is None else self.archetypes()
        if rows_of is not None:
            sae.W_dec.data.copy_(rows_of.detach())
        elif not self.unit_rows:
            sae.normalize_decoder()
        dead = self.silent_for > config.dead_after_tokens
        n_dead = int(dead.sum()) if config.ghost else 0
        if n_dead and sae.variant.loss != "paper":
            self._forget(dead & (self.silent_for <= config.dead_after_tokens + len(x)))
        dead = dead if n_dead else None
        sparse = self._is_sparse()
        self.n_sparse += sparse
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        sums = torch.zeros(len(_TERMS), dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        own = processes.share(len(x))
        tokens, own_is_cls = x[own], is_cls[own].to(self.device)
        rows = self._chunk(len(tokens), n_dead, sparse)
        with self.deferred if sparse else nullcontext():
            for part, part_is_cls in zip(tokens.split(rows), own_is_cls.split(rows), strict=True):
                share = len(part) / len(x)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    output = sae(part, sparse=True) if sparse else sae(part)
                    weight = l1_weight(self.step, config) * self.l1_factor * math.exp(self.off_target)
                    loss = self.loss(sae, part, dead, weight, config.cls_coefficient, is_cls=part_is_cls, output=output, ghost=config.ghost)
                (loss.total * share).backward()
                with torch.no_grad():
                    latents = output.latents
                    fired |= (latents.amax(0) > 0) if isinstance(latents, Tensor) else latents.fired()
                    if logged:
                        n_active = latents.count_nonzero() if isinstance(latents, Tensor) else latents.counts().sum()
                        residual = (part - output.reconstruction).double().square().sum() / share
                        sums += share * torch.stack([*(term.double() for term in loss), (n_active / len(part)).double(), residual]).cpu()
        self._move(fired, sums, sparse, rows_of)
        self.silent_for = torch.where(fired, 0, self.silent_for + len(x))
        if config.target_l0 is not None:
            self._control(float(sums[_TERMS.index("l0")]))
        return dict(zip(_TERMS, sums.tolist(), strict=True)) if logged else None

    def _forget(self, newly_dead: Tensor) -> None:
        """Adam's moments of latents that have just died: the auxiliary gradients are small beside what they had, and would move nothing for long."""
        if bool(newly_dead.any()):
            for weight in (self.sae.W_enc, self.sae.W_dec, self.sae.b_enc):
                for name in ("exp_avg", "exp_avg_sq") if weight in self.optimizer.state else ():
                    moment = self.optimizer.state[weight][name]
                    (moment.T if weight is self.sae.W_enc else moment)[newly_dead] = 0

    def _control(self, l0: float) -> None:
        """Move the weight of sparsity after the step's L0, at once and for good; at the end of control it stays what it has become."""
        controls = self.step < _CONTROL_SHARE * self.n_steps
        self.off_target = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.config.target_l0))) if controls else 0.0
        self.l1_factor *= math.exp(_CONTROL * self.off_target)

    def _move(self, fired: Tensor, sums: Tensor, sparse: bool, rows_of: Tensor | None) -> None:
        """Gradients of all processes together, projected and clipped, and Adam's step."""
        sae, config = self.sae, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config) * group.get("rate", 1.0)
        self.unit_rows = sparse and self.processes.number == 1 and rows_of is None
        if self.unit_rows:
            self.deferred.step(self.optimizer, max_norm=config.clip_gradient or None)
            self._keep_near()
            return
        if sparse:
            self.deferred.materialize()
        self._add_up(fired, sums)
        sae.remove_parallel_gradient()
        if config.clip_gradient:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_gradient)
        if rows_of is not None:
            self.archetypes.zero_grad()
            rows_of.backward(sae.W_dec.grad)
            sae.W_dec.grad = None
        self.optimizer.step()
        self._keep_near()

    @torch.no_grad()
    def _keep_near(self) -> None:
        """Turn rows of a soft-frozen decoder back until their cosine to where they started is that allowed."""
        if self.anchor is not None:
            rows = self.sae.W_dec
            self.sae.normalize_decoder()
            cosine = (rows * self.anchor).sum(1, keepdim=True)
            aside = torch.nn.functional.normalize(rows - cosine * self.anchor, dim=1)
            rows.copy_(torch.where(cosine < SOFT_COSINE, SOFT_COSINE * self.anchor + (1 - SOFT_COSINE**2) ** 0.5 * aside, rows))

    def _add_up(self, fired: Tensor, sums: Tensor) -> None:
        """Over all processes: gradients, running thresholds, which latents fired, and the log's terms."""
        if self.processes.number == 1:
            return
        for parameter in self.sae.parameters():
            if parameter.grad is None and parameter.requires_grad:  # a share without tokens
                parameter.grad = torch.zeros_like(parameter)
            if parameter.requires_grad:
                self.processes.add_up(parameter.grad)
        if self.sae.variant.competes == "batch":
            self.processes.average(self.sae.threshold)
        counts = torch.cat([fired.double(), sums.to(fired.device)])
        self.processes.add_up(counts)
        fired.copy_(counts[: len(fired)] > 0)
        sums.copy_(counts[len(fired) :])

    def _row(self, x: Tensor, sums: dict[str, float], speed: float) -> dict[str, Any]:
        """A row of the log; stops the run when the loss is no number."""
        self._check_finite(math.isfinite(sums["loss"]), f"The loss is {sums['loss']} at step {self.step}.")
        variance = (x - x.mean(0)).double().square().sum().item()
        row = {"step": self.step, "tokens": (self.step + 1) * self.config.batch_tokens, "lr": learning_rate(self.step, self.config)}
        row |= {name: sums[name] for name in _TERMS[:-1]}
        row["explained_variance"] = 1 - sums["residual"] / variance if variance else math.nan
        row["dead_fraction"] = (self.silent_for > self.config.dead_after_tokens).double().mean().item()
        row["tokens_per_second"] = round(speed)
        self.rows.append(row)
        return row

    def _check_finite(self, finite: bool, reason: str) -> None:
        """Stop the run before a checkpoint could keep what is no number; the loss is looked at where it is logged, weights where they are saved."""
        if not finite:
            raise ValueError(
                f"{reason} Look for NaN or infinite activations in the store; if there are none, lower lr (now {self.config.lr}) or raise "
                f"warmup_steps (now {self.config.warmup_steps}). The last checkpoint is from before."
            )


def _write_rows(rows: list[dict[str, Any]], path: Path, **options: Any) -> None:
    """Rows of the log as CSV."""
    pd.DataFrame(rows, columns=LOG_COLUMNS).to_csv(path, index=False, float_format="%.6g", **options)
