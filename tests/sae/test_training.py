"""The trainer: what a step does, what is saved, and that a killed run goes on bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, Store, assert_same, cut_off, fresh, run, weights

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.config import TrainConfig
from patchsae_utils.sae import steps
from patchsae_utils.sae import trainer as training
from patchsae_utils.sae.files import load_sae
from patchsae_utils.sae.losses import patchsae_loss
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.starts import geometric_median
from patchsae_utils.sae.trainer import LOG_COLUMNS, train_sae, training_log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return weights(run(out)), training_log(out)


def test_a_kill_while_the_checkpoint_is_written_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    real, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half of a check")
            raise KeyboardInterrupt
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    store = Store()
    assert_same(run(tmp_path, store=store), uninterrupted[0])
    assert store.asked[0][2] == 7
    assert not list(tmp_path.glob(".*")), "nothing is left lying about"


def test_a_checkpoint_of_numpys_numbers_is_read(tmp_path):
    """A sweep over ``np.logspace`` kept numbers that torch refuses to read: an interrupted run was lost."""
    config = TrainConfig(**vars(CONFIG) | {"l1_coefficient": np.logspace(-3, -2, 2)[0], "batch_tokens": np.int64(64), "seed": 0.0})
    assert config == CONFIG and type(config.l1_coefficient) is float and type(config.seed) is int
    numpys = SparseAutoencoder(np.int64(8), np.int64(32), "topk", k=np.int64(3))
    assert numpys.fingerprint == fresh(activation="topk", k=3).fingerprint
    with pytest.raises(KeyboardInterrupt):
        train_sae(fresh(), Store(stop_at=20), config, tmp_path / "cut", progress=False)
    again = train_sae(fresh(), store := Store(), CONFIG, tmp_path / "cut", progress=False)
    assert store.asked[0][2] == 14 and again.trained_in


def test_an_object_that_its_run_has_moved_still_names_that_run(tmp_path, uninterrupted):
    """FAULTS D1: called again with the same object, training opens what is finished, and goes on from a checkpoint of whatever step."""
    sae = fresh()
    for stop in (3, 20):  # before the first checkpoint on the way, and after it
        with pytest.raises(KeyboardInterrupt):
            train_sae(sae, Store(stop_at=stop), CONFIG, tmp_path, progress=False)
        assert not torch.equal(sae.W_enc, fresh().W_enc)
        with pytest.raises(FileNotFoundError):
            load_sae(tmp_path)  # unfinished: nothing that looks finished
    store = Store()
    assert_same(train_sae(sae, store, CONFIG, tmp_path, progress=False), uninterrupted[0])
    assert store.asked == [(64, 0, 14)]
    for _ in range(3):  # what was trained, and then what was opened
        store = Store(stop_at=0)
        sae = train_sae(sae, store, CONFIG, tmp_path, progress=False)
        assert_same(sae, uninterrupted[0])
        assert store.asked == []
    further = train_sae(sae, Store(), CONFIG, tmp_path / "further", progress=False)  # in another folder it is a start like any other
    assert not torch.equal(further.W_enc, load_sae(tmp_path).W_enc)


OTHERS = {
    "lr \\(0.003 there, 0.001 here\\)": lambda: (fresh(), Store(), dataclasses.replace(CONFIG, lr=1e-3)),
    "activations": lambda: (fresh(), Store(fingerprint="other"), CONFIG),
    "initial weights": lambda: (SparseAutoencoder(8, 32, seed=1), Store(), CONFIG),
}


@pytest.mark.parametrize("stop", [None, 20, 3])
def test_a_folder_of_another_run_is_never_deleted(tmp_path, stop):
    """FAULTS D1: whether that run has finished, been interrupted, or was no run of ours."""
    run(tmp_path) if stop is None else cut_off(tmp_path, CONFIG, stop)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for message, make in OTHERS.items():
        with pytest.raises(ValueError, match=f"holds another run, which differs in {message}. Choose another folder"):
            train_sae(*make(), tmp_path, progress=False)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    fresh().save(tmp_path / "own")
    with pytest.raises(ValueError, match="holds an SAE that no run of train_sae has left there"):
        run(tmp_path / "own")


@pytest.mark.parametrize("start", ["data", "kmeans"])
def test_a_start_from_data_leaves_loaded_and_trained_weights_alone(tmp_path, start):
    """FAULTS D2."""
    config = dataclasses.replace(CONFIG, start=start)
    trained = run(tmp_path / "one", config)
    for sae in (load_sae(tmp_path / "one"), trained):
        with pytest.raises(ValueError, match=f"start='{start}' would overwrite the weights of this SAE"):
            train_sae(sae, Store(), config, tmp_path / "two", progress=False)
        assert_same(sae, load_sae(tmp_path / "one"))
        assert not (tmp_path / "two" / "cfg.json").exists()
    tuned = train_sae(load_sae(tmp_path / "one"), Store(), dataclasses.replace(CONFIG, n_tokens=64), tmp_path / "tuned", progress=False)
    assert (tuned.W_dec - trained.W_dec).abs().max() < 0.01
    with pytest.raises(KeyboardInterrupt):
        train_sae(sae := fresh(), Store(stop_at=20), config, tmp_path / "cut", progress=False)
    assert_same(train_sae(sae, Store(), config, tmp_path / "cut", progress=False), trained)  # not once more


@pytest.mark.parametrize("log_every", [1, 3, 40])
def test_what_is_no_number_is_never_kept(tmp_path, uninterrupted, log_every):
    """FAULTS D3: a NaN between two logged rows stops the run before a checkpoint; from the last good one it can go on."""

    class Broken(Store):
        def tokens(self, *args, **kwargs):
            start = kwargs["start_step"]
            for i, (x, positions) in enumerate(super().tokens(*args, **kwargs), start):
                yield (x * torch.nan if i == 10 else x), positions

    config = dataclasses.replace(CONFIG, log_every=log_every)
    for _ in range(2):
        with pytest.raises(ValueError, match="(The loss is nan at step|Weights are NaN or infinite after step 1).*lower lr"):
            run(tmp_path, config, Broken())
        state = torch.load(tmp_path / training.CHECKPOINT, weights_only=True)
        assert state["step"] == 7 and all(torch.isfinite(value).all() for value in state["sae"].values())
    assert_same(run(tmp_path, config), uninterrupted[0])


def test_without_resume_everything_is_done_again(tmp_path, uninterrupted):
    run(tmp_path)
    store = Store()
    assert_same(train_sae(fresh(), store, CONFIG, tmp_path, resume=False, progress=False), uninterrupted[0])
    assert store.asked == [(64, 0, 0)]


@pytest.mark.parametrize("cls_coefficient", [1.0, 4.0])
def test_one_step_is_adam_on_the_projected_gradient_of_the_loss(tmp_path, cls_coefficient):
    """Against a step written out with plain Adam; the batch is split in chunks, which must not matter."""
    config = dataclasses.replace(CONFIG, n_tokens=64, warmup_steps=0, cls_coefficient=cls_coefficient)
    sae = run(tmp_path, config)
    expected = fresh()
    x, positions = next(Store().tokens(64, seed=0, epochs=None, start_step=0, positions=True))
    expected.b_dec.data.copy_(geometric_median(x))
    expected.normalize_decoder()
    patchsae_loss(expected, x, None, config.l1_coefficient, cls_coefficient, is_cls=positions == 0).total.backward()
    row = torch.nn.functional.normalize(expected.W_dec.detach(), dim=1)
    expected.W_dec.grad -= row * (row * expected.W_dec.grad).sum(1, keepdim=True)
    for parameter in expected.parameters():
        g = parameter.grad  # Adam's first step: m_hat = g, v_hat = g^2
        parameter.data -= config.lr * g / (g.square().sqrt() + 1e-8)
    expected.normalize_decoder()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(sae)[name], value, rtol=1e-4, atol=1e-5)


def test_chunks_do_not_matter(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(steps, "_CHUNK_TOKENS", 1)
    monkeypatch.setattr(SparseAutoencoder, "tokens_at_once", 10)
    chunked = weights(run(tmp_path))
    assert not torch.equal(chunked["W_enc"], uninterrupted[0]["W_enc"]), "sums in another order round another way: there were chunks"
    for name, value in chunked.items():
        torch.testing.assert_close(value, uninterrupted[0][name], rtol=1e-2, atol=1e-3)
    log = training_log(tmp_path)
    np.testing.assert_allclose(log["explained_variance"], uninterrupted[1]["explained_variance"], atol=1e-3)
    np.testing.assert_allclose(log["l0"], uninterrupted[1]["l0"], rtol=1e-2)


def test_the_log_has_its_rows_and_columns(uninterrupted):
    log = uninterrupted[1]
    assert tuple(log.columns) == LOG_COLUMNS
    assert log["step"].tolist() == [*range(0, 40, 3)]
    assert log["tokens"].tolist() == [64 * (step + 1) for step in range(0, 40, 3)]
    assert np.isfinite(log.to_numpy()).all()
    np.testing.assert_allclose(log["loss"], log["mse"] + log["l1"] + log["ghost"], rtol=1e-4)


def test_the_logged_explained_variance_is_centred(tmp_path):
    """At step 0, before any update: 1 - residual / variance of the very batch."""
    run(tmp_path, dataclasses.replace(CONFIG, n_tokens=64))
    log_row = training_log(tmp_path).iloc[0]
    sae = fresh()
    x, _ = next(Store().tokens(64, seed=0, epochs=None, start_step=0, positions=True))
    sae.b_dec.data.copy_(geometric_median(x))
    residual = (x - sae(x).reconstruction).square().sum()
    assert log_row["explained_variance"] == pytest.approx((1 - residual / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    assert log_row["l0"] == pytest.approx((sae(x).latents > 0).sum(1).float().mean().item(), rel=1e-4)


def test_ghost_gradients_wake_the_dead_and_never_make_nan(tmp_path):
    silent = {}
    for name, ghost in (("with", True), ("without", False)):
        sae = fresh()
        with torch.no_grad():
            sae.b_enc[:16] = -3  # half the dictionary is dead from the start
            sae.b_enc[0] = -1e5  # exp underflows: beyond help, but no reason for NaN
        config = dataclasses.replace(CONFIG, n_tokens=300 * 64, lr=5e-3, ghost=ghost)
        sae = train_sae(sae, Store(), config, tmp_path / name, progress=False)
        log = training_log(tmp_path / name)
        assert np.isfinite(log.to_numpy()).all()
        assert all(torch.isfinite(value).all() for value in weights(sae).values())
        assert (log["ghost"] > 0).any() == (name == "with")
        x = torch.cat([next(Store().tokens(64, seed=9, epochs=None, start_step=i, positions=True))[0] for i in range(20)])
        silent[name] = (sae.encode(x) == 0).all(0)[:16].sum().item()
    assert silent["with"] <= 6 < 11 <= silent["without"]


def test_dead_means_silent_for_more_than_the_given_tokens(tmp_path):
    sae = fresh()
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    train_sae(sae, Store(), dataclasses.replace(CONFIG, n_tokens=8 * 64, log_every=1, dead_after_tokens=4 * 64), tmp_path, progress=False)
    log = training_log(tmp_path)
    assert log["dead_fraction"].gt(0).tolist() == [False] * 4 + [True] * 4  # after step 4 it has been silent for five
    assert log["ghost"].gt(0).tolist() == [False] * 5 + [True] * 3


def test_a_store_on_disk_trains_and_names_its_source(tmp_path, tiny_clip, tiny_dataset):
    store = extract_activations(tiny_clip, tiny_dataset, -2, tmp_path / "store", progress=False)
    config = dataclasses.replace(CONFIG, n_tokens=20 * 512, batch_tokens=512, cls_coefficient=2.0)
    sae = train_sae(SparseAutoencoder(32, 64), store, config, tmp_path / "sae", progress=False)
    assert (sae.metadata["model_name"], sae.metadata["layer"], sae.metadata["tokens"]) == ("tiny", 1, "all")
    assert load_sae(tmp_path / "sae").metadata.items() >= sae.metadata.items()
    other = extract_activations(tiny_clip, tiny_dataset, 0, tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="layer 0"):
        train_sae(sae, other, config, tmp_path / "x", progress=False)


class Counting(Store):
    """Counts the batches that are read."""

    n_read = 0

    def tokens(self, *args, **kwargs):
        for batch in super().tokens(*args, **kwargs):
            self.n_read += 1
            yield batch


def test_several_dictionaries_read_each_batch_once_and_are_those_trained_one_after_the_other(tmp_path):
    """Of other sizes, weights, lengths, starts and seeds; over interruptions at steps that differ."""
    configs = [CONFIG, *(dataclasses.replace(CONFIG, **change) for change in (
        {"l1_coefficient": 1e-2}, {"n_tokens": 20 * 64, "start": "kmeans"}, {"start": "data", "normalize": "mean_and_norm", "sparse": "always"},
        {"checkpoint_every": 5}, {"seed": 1},
    ))]  # fmt: skip

    def several():
        return [SparseAutoencoder(8, size, seed=seed) for size, seed in ((32, 0), (32, 0), (32, 1), (24, 0), (48, 2), (32, 3))]

    jobs = zip(several(), configs, folders(tmp_path, "one"), strict=True)
    single = [train_sae(sae, Store(), config, out, progress=False) for sae, config, out in jobs]
    store = Counting()
    together = train_sae(several(), store, configs, folders(tmp_path, "all"), progress=False)
    assert store.n_read == 2 * 40 + 2, "two orders; k-means and data draw once each"
    for stop in (18, 33):
        with pytest.raises(KeyboardInterrupt):
            train_sae(several(), Store(stop_at=stop), configs, folders(tmp_path, "cut"), progress=False)
    store = Counting()
    resumed = train_sae(several(), store, configs, folders(tmp_path, "cut"), progress=False)
    assert store.n_read == 40 - 28 + 40 and store.asked[0][2] == 28
    outs = (folders(tmp_path, name) for name in ("one", "all", "cut"))
    for one, other, third, *logs in zip(single, together, resumed, *outs, strict=True):
        assert_same(one, other)
        assert_same(one, third)
        found = [training_log(out).drop(columns="tokens_per_second") for out in logs]
        assert found[0].equals(found[1]) and found[0].equals(found[2])
    with pytest.raises(ValueError, match="each as an object of its own"):
        train_sae([single[0]] * 2, Store(), CONFIG, folders(tmp_path, "x")[:2], progress=False)
    for outs, said in ((str(tmp_path), "one folder"), (tmp_path, "one folder"), (folders(tmp_path, "x")[:2], "2 folders")):
        with pytest.raises(ValueError, match=f"needs a folder .*got 6 SAEs, 6 configs, {said}"):
            train_sae(several(), Store(), CONFIG, outs, progress=False)


def folders(parent, name):
    return [parent / name / str(i) for i in range(6)]
