"""The trainer: Adam on an SAE's objective over activations, in one process or several, resumable bit for bit.

The token stream is a function of seed and step; so a checkpoint holds weights, Adam's moments, counters of silent latents and the log."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.store import ActivationStore
from ..activations.streaming import TokenStream
from ..config import TrainConfig
from ..run.artifacts import disk_errors, fingerprint, folder_lock, read_checked_json, with_checksum, write_json
from ..run.memory import out_of_memory
from ..run.processes import Processes
from .files import CONFIG, WEIGHTS, load_sae
from .model import SparseAutoencoder
from .sparse.adam import learning_rate
from .starts import Archetypes, Normalization
from .steps import TERMS, Steps

Tokens = ActivationStore | TokenStream
CHECKPOINT, MANIFEST, LOG, SUMMARY = "checkpoint.pt", "manifest.json", "training_log.csv", "summary.json"
LOG_COLUMNS = ("step", "tokens", "lr", "loss", "mse", "l1", "ghost", "l0", "explained_variance", "dead_fraction", "tokens_per_second")
_SHOWN = ("loss", "l0", "explained_variance", "dead_fraction", "tokens_per_second")  # in the bar
_FORMAT = 4
_ORIGIN = ("model_name", "weights_hash", "layer", "tokens", "grid", "preprocessing", "dataset", "split", "seed", "n_images")


def train_sae(
    sae: SparseAutoencoder | Sequence[SparseAutoencoder], store: Tokens, config: TrainConfig | Sequence[TrainConfig], out: Any,
    resume: bool = True, progress: bool = True,
) -> Any:  # fmt: skip
    """Train an SAE on activations, or open it when it is there already; or several, which read each batch once.

    Under ``accelerate launch`` every process calls this alike, and takes its share of each batch (``batchtopk`` and ``matryoshka`` select
    within it).

    Parameters
    ----------
    sae : SparseAutoencoder, or a sequence of them
        Trained in place, on the GPU it is on, else on accelerate's, else on the CPU. An object that a run into ``out`` has moved still
        names that run: it opens, or goes on.
    store : ActivationStore or TokenStream
    config : TrainConfig, or one for each SAE
        Those of equal ``batch_tokens``, ``seed`` and ``tokens`` share their batches, and come out as if trained one after the other.
    out : str or Path, or one for each SAE
        Folder for the SAE, ``training_log.csv``, ``manifest.json``, ``summary.json`` (last row, wall time, tokens/s), ``checkpoint.pt``.
    resume : bool
        Open the finished SAE of the same inputs, or go on from its checkpoint. False trains these weights anew and replaces what is there.
    progress : bool

    Returns
    -------
    SparseAutoencoder, or a list of them
        Trained, in evaluation mode, decoder rows at unit norm, ``metadata`` saying what it reads.

    Raises
    ------
    ValueError
        If the store's activations aren't those the SAE reads, or lack the tokens wanted; the folder holds another run, a broken checkpoint,
        or is in use; a start would overwrite weights that were loaded or trained; ``target_l0`` is asked of a variant with ``k``; loss or
        weights stop being finite (the checkpoint before stays); or SAEs, configs and folders are not as many, or the same.
    """
    if isinstance(sae, SparseAutoencoder):
        return train_sae([sae], store, config, [out], resume, progress)[0]
    configs = [config] * len(sae) if isinstance(config, TrainConfig) else config
    if isinstance(out, str | Path) or not len(sae) == len(configs) == len(out):
        n_out = "one folder" if isinstance(out, str | Path) else f"{len(out)} folders"
        raise ValueError(f"Each of several SAEs needs a folder and a config: got {len(sae)} SAEs, {len(configs)} configs, {n_out}.")
    jobs = [(each, own, Path(folder)) for each, own, folder in zip(sae, configs, out, strict=True)]
    if len({id(each) for each in sae}) < len(jobs):
        raise ValueError("Several SAEs are trained in place: give each as an object of its own.")
    orders = [(own.batch_tokens, own.seed, own.tokens) for _, own, _ in jobs]
    trained: dict[int, SparseAutoencoder] = {}
    for order in dict.fromkeys(orders):
        group = [i for i, other in enumerate(orders) if other == order]
        trained |= zip(group, _train_together([jobs[i] for i in group], store, resume, progress), strict=True)
    return [trained[i] for i in range(len(jobs))]


def _train_together(jobs: Sequence[tuple], store: Tokens, resume: bool, progress: bool) -> list[SparseAutoencoder]:
    """Train SAEs that read the same batches in the same order; one that was interrupted later waits for the others."""
    config, done, at = jobs[0][1], dict[int, SparseAutoencoder](), dict[int, int]()  # at: the step whose batch a run waits for
    draw = cache(lambda n: next(_tokens(store, config, n, config.seed + 1))[0])  # of another order than the training's
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(_run(sae, own, out, store, resume, progress, draw))) for sae, own, out in jobs]

        def advance(i: int, batch: Any = None) -> None:
            try:
                at[i] = runs[i].send(batch)
            except StopIteration as finished:
                at.pop(i, None)
                done[i] = finished.value

        for i in range(len(runs)):
            advance(i)
        draw.cache_clear()
        if at:
            first = min(at.values())
            # A stream computes where its model is, and its processes exchange tokens: it can't be read beside the step.
            where = {"device": jobs[0][0].W_enc.device} if isinstance(store, ActivationStore) else {}
            for step, batch in enumerate(_tokens(store, config, config.batch_tokens, config.seed, start_step=first, **where), first):
                for i in [i for i, waits_for in at.items() if waits_for == step]:
                    advance(i, batch)
                if not at:
                    break
    return [done[i] for i in range(len(runs))]


def _tokens(store: Tokens, config: TrainConfig, batch_size: int, seed: int, start_step: int = 0, **options: Any) -> Iterator[Any]:
    options |= {"tokens": kept} if (kept := _kept_tokens(config, store)) else {}
    return store.tokens(batch_size, seed=seed, epochs=None, start_step=start_step, positions=True, **options)


def _run(
    sae: SparseAutoencoder, config: TrainConfig, out: Path, store: Tokens, resume: bool, progress: bool, draw: Callable
) -> Generator[int, Any, SparseAutoencoder]:
    """One run of :func:`train_sae`: yields the step whose batch it waits for, returns the SAE."""
    kept = _kept_tokens(config, store)
    sae.check_store(store)
    processes = Processes()
    device = sae.W_enc.device if processes.number == 1 and sae.W_enc.device.type != "cpu" else processes.device
    before, after = sae.trained_in.get(out.resolve(), (None, None))
    start = before if resume and sae.fingerprint == after else sae.fingerprint  # what a run has made of these weights still names it
    said = dataclasses.asdict(config)
    recipe = {name: value for name, value in said.items() if value != getattr(TrainConfig, name)}
    inputs = {"sae": start, "training": recipe, "store": store.fingerprint}

    def opened() -> SparseAutoencoder:
        trained = load_sae(out, device=device)
        trained.trained_in[out.resolve()] = (start, trained.fingerprint)
        return trained

    if processes.on_main(lambda: resume and _finished(out, inputs)):
        return opened()
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(folder_lock(out)))
        if processes.on_main(lambda: resume and _finished(out, inputs)):  # by another process, meanwhile
            return opened()
        overwrites = {"start": "random", "constraint": "none", "normalize": config.normalize if config.normalize != "token_norm" else None}
        wrong = [f"{name}={getattr(config, name)!r}" for name, keeps in overwrites.items() if getattr(config, name) != keeps]
        if (wrong or sae.token_norm) and not sae.is_fresh and not (resume and (out / CHECKPOINT).exists()):
            what = f"{' and '.join(wrong) or 'Training'} would overwrite the weights of this SAE, which were loaded, trained or set."
            raise ValueError(f"{what} Use start='random' on the stream's own units, which keeps them, or give a fresh SparseAutoencoder.")
        if config.target_l0 is not None and sae.k is not None:
            raise ValueError(f"target_l0={config.target_l0} has no meaning for activation={sae.activation!r}, whose k={sae.k} sets it.")
        if config.start != "random" or config.constraint == "archetypal":
            n_tokens = len(store) if kept is None else store.n_images if kept == "cls" else len(store) - store.n_images
            if n_tokens < sae.d_sae:
                needs = f"start={config.start!r}, constraint={config.constraint!r} need a token for each of {sae.d_sae} latents; there are {n_tokens}."
                raise ValueError(f"{needs} Extract more images, take fewer latents, or start='random' without that constraint.")
        for name in (MANIFEST, SUMMARY, CONFIG, WEIGHTS, *(() if resume else (CHECKPOINT,))):  # what lies there now is not finished
            processes.on_main(partial((out / name).unlink, missing_ok=True))
        values = {name: getattr(store.metadata, name) for name in _ORIGIN}
        origin = {**values, "grid": list(values["grid"]), "store_fingerprint": store.fingerprint}
        sae.metadata = origin | ({"tokens": kept} if kept else {}) | sae.metadata
        run = Training(sae.to(device), config, out, inputs, processes)
        try:
            run.restore()
            with out_of_memory(f"training steps of {config.batch_tokens} tokens", "training.batch_tokens or sae.expansion_factor lower"):
                yield from run.train(draw, progress and processes.main)
            run.fold()
            sae.eval()
            weight = config.l1_coefficient * run.l1_factor
            sae.metadata |= {"n_training_tokens": run.n_steps * config.batch_tokens, "l1_coefficient": weight}
            processes.on_main(run.finish)
        finally:
            run.fold()  # also where it was interrupted: nobody else knows of other units
            if (moved := sae.fingerprint) != start:
                sae.trained_in[out.resolve()] = (start, moved)
    return sae


def training_log(out: str | Path) -> pd.DataFrame:
    """The log that :func:`train_sae` wrote into a folder.

    Parameters
    ----------
    out : str or Path

    Returns
    -------
    DataFrame
        One row every ``log_every`` steps, columns as in ``LOG_COLUMNS``, of the training batch before the step; ``explained_variance`` is
        centred; ``dead_fraction`` counts latents that have not fired for more than ``dead_after_tokens`` tokens.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    path = Path(out) / LOG
    if not path.exists():
        raise FileNotFoundError(f"No {LOG} in {out}: train an SAE there first, by train_sae(sae, store, config, {str(out)!r}).")
    return pd.read_csv(path)


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
        runs = (there, inputs["training"])
        pairs = {name: [run.get(name, getattr(TrainConfig, name, None)) for run in runs] for name in there | inputs["training"]}
        differing += [f"{name} ({then!r} there, {here!r} here)" for name, (then, here) in pairs.items() if then != here]
        what = f"another run, which differs in {', '.join(differing)}"
    raise ValueError(f"{out} holds {what}. Choose another folder, or delete this one; resume=False replaces what is there.")


def _kept_tokens(config: TrainConfig, store: Tokens) -> str | None:
    """``config.tokens`` where the store holds more than those, else None."""
    if config.tokens in ("all", store.metadata.tokens):
        return None
    if store.metadata.tokens != "all":
        what = f"tokens={config.tokens!r} can't be had from a store of {store.metadata.tokens!r} tokens."
        raise ValueError(f"{what} Extract with tokens={config.tokens!r} or 'all'.")
    return config.tokens


class Training(Steps):
    """One training run: the loop, its log and its checkpoints."""

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, out: Path, inputs: dict[str, Any], processes: Processes):
        super().__init__(sae, config, processes)
        self.out, self.inputs, self.restored = out, inputs, False
        self.seconds, self.n_starts = 0.0, 0  # wall time until the last checkpoint, starts

    def save(self) -> None:
        """Everything that the rest of the run depends on, under a temporary name first; the tokens' order follows from seed and step."""
        state = {
            "format": _FORMAT, "inputs": self.inputs, "step": self.step, "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(), "silent_for": self.silent_for, "rows": self.rows, "unit_rows": self.unit_rows,
            "effort": [self.seconds, self.n_starts, self.n_sparse], "control": [self.l1_factor, self.off_target, self.trend], "normalization": list(self.normalization),
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
        self.hold(archetypes, state["anchor"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("silent_for", "step", "rows", "unit_rows"):
            setattr(self, name, state[name])
        self.l1_factor, self.off_target, self.trend = state["control"]
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
        write_json(self.out / MANIFEST, with_checksum(manifest))
        for name in (CHECKPOINT, f".{CHECKPOINT}.tmp"):
            (self.out / name).unlink(missing_ok=True)

    def train(self, draw: Callable[[int], Tensor], progress: bool) -> Generator[int, Any, None]:
        """From where the run stands to its last step; yields a step's number, and is sent its batch."""
        config, processes = self.config, self.processes
        self.sae.train()
        processes.everywhere(lambda: None)  # all have looked for a checkpoint
        if not self.restored:
            self.begin(draw)
            if processes.main:
                self.save()
        started, before, tokens = time.perf_counter(), self.seconds, 0
        self.n_starts += 1
        with ExitStack() as stack:
            if processes.main:
                _write_rows(self.rows, temporary := self.out / f".{LOG}.tmp")  # those a checkpoint knows: none is there twice
                os.replace(temporary, self.out / LOG)
            bar = tqdm(total=self.n_steps, initial=self.step, desc="training the SAE", unit="step", disable=not progress)
            stack.callback(bar.close)
            while self.step < self.n_steps:
                x, positions = yield self.step
                x = self.normalization.apply(x.to(self.device))
                tokens += len(x)
                last = self.step + 1 == self.n_steps
                logged = self.step % config.log_every == 0 or last
                sums = self.move(x, positions == 0, logged or config.target_l0 is not None)
                if logged:
                    row = self._row(x, sums, tokens / (time.perf_counter() - started))
                    if processes.main:
                        _write_rows([row], self.out / LOG, mode="a", header=False)
                    bar.set_postfix({name: f"{row[name]:.4g}" for name in _SHOWN})
                self.step += 1
                bar.update()
                self.seconds = before + time.perf_counter() - started
                if self.step % config.checkpoint_every == 0 or last:
                    finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.sae.parameters())
                    self._check_finite(finite, f"Weights are NaN or infinite after step {self.step - 1}.")
                    if processes.main and not last:
                        self.save()

    def _row(self, x: Tensor, sums: dict[str, float], speed: float) -> dict[str, Any]:
        """A row of the log; stops the run when the loss is no number."""
        self._check_finite(math.isfinite(sums["loss"]), f"The loss is {sums['loss']} at step {self.step}.")
        variance = (x - x.mean(0)).double().square().sum().item()
        row = {"step": self.step, "tokens": (self.step + 1) * self.config.batch_tokens, "lr": learning_rate(self.step, self.config)}
        row |= {name: sums[name] for name in TERMS[:-1]}
        row["explained_variance"] = 1 - sums["residual"] / variance if variance else math.nan
        row["dead_fraction"] = (self.silent_for > self.config.dead_after_tokens).double().mean().item()
        row["tokens_per_second"] = round(speed)
        self.rows.append(row)
        return row

    def _check_finite(self, finite: bool, reason: str) -> None:
        """Stop the run before a checkpoint could keep what is no number."""
        if not finite:
            what = f"{reason} Look for NaN or infinite activations in the store; if there are none, lower lr (now {self.config.lr}) or"
            raise ValueError(f"{what} raise warmup_steps (now {self.config.warmup_steps}). The last checkpoint is from before.")


def _write_rows(rows: list[dict[str, Any]], path: Path, **options: Any) -> None:
    """Rows of the log as CSV."""
    with disk_errors(path):
        pd.DataFrame(rows, columns=LOG_COLUMNS).to_csv(path, index=False, float_format="%.6g", **options)
