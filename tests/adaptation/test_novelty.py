"""Which latents are new: each measure against slow float64 arithmetic, its known traps by construction, and planted rare features."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from patchsae_utils.adaptation import novelty
from patchsae_utils.adaptation.joint import JointDictionary, norm_difference, train_joint
from patchsae_utils.adaptation.novelty import BEFORE, NEW, UNDECIDED, verdicts
from patchsae_utils.data import load_dataset
from patchsae_utils.sae.model import SparseAutoencoder

D = 24


def world(shares=(), strength=3.0, changed=1.0, seed=0, n=160, n_tokens=48, n_features=40):
    """Streams [n, T, 2, D] of forty sparse features, of which the first has another strength in the second model; what is planted there alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(n_features + len(shares), D, generator=generator), dim=1)
    rates = torch.tensor([0.06] * n_features + list(shares))
    f = (torch.rand(n, n_tokens, len(rows), generator=generator) < rates) * (0.5 + torch.rand(n, n_tokens, len(rows), generator=generator))
    f[..., n_features:] += strength * (f[..., n_features:] > 0)
    second = f.clone()
    second[..., 0] *= changed
    f[..., n_features:] *= 0
    noise = 0.02 * torch.randn(n, n_tokens, 2, D, generator=generator)
    return torch.stack([f @ rows, second @ rows], 2) + noise, second[..., n_features:], rows


def by_hand(W_dec):
    """A joint dictionary of given decoder rows [2, S, D], which reads both streams along them; centred at 0, in units of 1."""
    joint = JointDictionary(torch.randn(50, 2, W_dec.shape[2]), W_dec.shape[1], k=1).requires_grad_(False)
    joint.W_dec.copy_(W_dec)
    joint.W_enc.copy_(W_dec.transpose(1, 2))
    joint.mean.zero_()
    joint.scale.fill_(1)
    return joint


@pytest.mark.parametrize("options", [{"k": 3}, {"k": None, "l1_coefficient": 0.3}])
def test_the_losses_in_slow_float64(options):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(12, 2, 5, generator=generator)
    joint = JointDictionary(tokens, 9, **options).requires_grad_(False)
    joint.W_dec.copy_(torch.randn(2, 9, 5, generator=generator))
    joint.b_enc.copy_(0.1 * torch.randn(9, generator=generator))
    x = ((tokens - joint.mean) / joint.scale).double().numpy()
    W_enc, W_dec, b = (p.double().numpy() for p in (joint.W_enc, joint.W_dec, joint.b_enc))
    f = np.array([[max(sum(x[n, m] @ W_enc[m][:, s] for m in range(2)) + b[s], 0) for s in range(9)] for n in range(12)])
    sizes = np.array([sum(np.linalg.norm(W_dec[m, s]) for m in range(2)) for s in range(9)])
    smallest = np.sort((f * sizes).ravel())[::-1][3 * 12 - 1] if options["k"] else 0
    f[f * sizes < smallest] = 0
    expected = np.mean([sum(((x[n, m] - f[n] @ W_dec[m]) ** 2).sum() for m in range(2)) for n in range(12)])
    expected += options.get("l1_coefficient", 0) * (f * sizes).sum(1).mean()
    loss, found = joint.loss(tokens)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and float(found) == pytest.approx(smallest, rel=1e-5)
    difference = norm_difference(joint)
    for s in range(9):
        first, second = (np.linalg.norm(W_dec[m, s]) for m in range(2))
        assert float(difference[s]) == pytest.approx(0.5 * ((second - first) / max(first, second) + 1), rel=1e-5)


def test_a_token_is_read_for_itself_and_back_in_its_own_units():
    streams, _, _ = world(n=20)
    joint = train_joint(5 + 3 * streams.flatten(0, 1), 64, k=4, n_tokens=100_000, progress=False)
    x = 5 + 3 * streams[:2].flatten(0, 1)
    torch.testing.assert_close(joint.encode(x)[7:8], joint.encode(x[7:8]))
    assert 1 < (joint.encode(x) > 0).sum(1).float().mean() < 8
    error = (x - joint.decode(joint.encode(x))).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5


def test_latent_scaling_in_slow_float64():
    """Each beta is the least-squares factor on the latent's own contribution, one regression each."""
    streams, _, _ = world(n=6, n_tokens=10)
    joint = by_hand(0.5 * torch.randn(2, 7, D, generator=torch.Generator().manual_seed(3)))
    table = novelty.scaling(joint, streams)
    x, f = streams.flatten(0, 1).double(), joint.encode(streams).flatten(0, 1).double()
    rows = joint.W_dec.double()
    for s in range(7):
        contribution = (f[:, s, None] * rows[1, s]).flatten()
        others = [f @ rows[m] - f[:, s, None] * rows[m, s] for m in range(2)]
        wanted = {
            "error_base": x[:, 0] - others[0], "error_adapted": x[:, 1] - others[1],
            "reconstruction_base": others[0], "reconstruction_adapted": f @ rows[1],
        }  # fmt: skip
        betas = {name: float(contribution @ y.flatten() / (contribution @ contribution)) for name, y in wanted.items()}
        for column, part in (("score", "error"), ("reconstruction", "reconstruction")):
            if betas[f"{part}_adapted"] > 0:
                assert table.loc[s, column] == pytest.approx(betas[f"{part}_base"] / betas[f"{part}_adapted"], rel=1e-3, abs=1e-3)
    assert (table["low"] <= table["score"] + 1e-9)[table["score"].notna()].all()


def test_shrunken_and_decoupled_latents_only_look_new_and_an_undertrained_one_only_looks_old():
    """One feature a dimension. Norms alone take the first two for new and the third for old; Latent Scaling sees through all."""
    generator = torch.Generator().manual_seed(0)
    f = (torch.rand(40, 20, 4, generator=generator) < 0.2) * (1 + torch.rand(40, 20, 4, generator=generator))
    base = torch.stack([f[..., 0], f[..., 1], 0 * f[..., 2], 0 * f[..., 3]], -1)  # holds the first two features
    streams = torch.stack([base, f], 2)
    eye = torch.eye(4)
    shrunken, decoupled, undertrained, new = eye
    first = torch.stack([0 * shrunken, 0 * decoupled, undertrained, 0 * new, decoupled])
    second = torch.stack([*eye, 0 * decoupled])  # the last latent says in CLIP what the second does in the other
    joint = by_hand(torch.stack([first, second]))
    joint.W_enc.zero_()
    joint.W_enc[1, range(4), range(4)] = 1  # the latents are the features
    joint.W_enc[0, 1, 4] = 1
    by_norm, by_scaling = (table["evidence"].tolist()[:4] for table in (novelty.norms(joint), novelty.scaling(joint, streams)))
    assert by_norm == [NEW, NEW, BEFORE, NEW] and by_scaling == [BEFORE, BEFORE, NEW, NEW]


def test_correlations_and_ridge_in_slow_float64():
    """Of what the adapted model's own stream says of a latent, how much does CLIP's?"""
    streams, _, rows = world((0.05,), n=24)
    joint = by_hand(torch.stack([rows[-6:], rows[-6:]]))
    train, test = streams[::2], streams[1::2]
    table = novelty.predicted(joint, test, train)
    f, f_test = (joint.encode(part).flatten(0, 1).double().numpy() for part in (train, test))
    found = []
    for m in range(2):
        x, x_test = (part[:, :, m].flatten(0, 1).double().numpy() for part in (train, test))
        model = Ridge(alpha=novelty.RIDGE * ((x - x.mean(0)) ** 2).sum(0).mean()).fit(x, f)
        found.append([np.corrcoef(each, own)[0, 1] for each, own in zip(model.predict(x_test).T, f_test.T, strict=True)])
    np.testing.assert_allclose(table["score"], np.divide(*found), atol=1e-4)
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()
    assert found[1][-1] > 0.5 and table["evidence"].iloc[-1] == NEW  # the planted one
    alone = novelty.correlations((joint.encode(x), x[:, :, 1, :6]) for x in test.split(5))
    expected = [np.corrcoef(f_test[:, s], test[:, :, 1, s].flatten())[0, 1] for s in range(6)]
    np.testing.assert_allclose(alone.value, expected, atol=1e-6)


@pytest.fixture(scope="module")
def planted():
    """Four features of the adapted model alone, on 0.3 to 2% of the tokens, and a dictionary that CLIP's own features make."""
    streams, new, rows = world((0.003, 0.005, 0.01, 0.02), changed=2.5)
    train, test = streams[::2].contiguous(), streams[1::2].contiguous()
    tokens = train.flatten(0, 1)
    joint = train_joint(tokens, 96, k=6, n_tokens=300_000, progress=False)
    changes = train_joint(tokens[:, 1:] - tokens[:, :1], 16, k=1, n_tokens=100_000, progress=False)
    sae = SparseAutoencoder(D, 40).requires_grad_(False)
    sae.W_dec.copy_(rows[:40])
    sae.W_enc.copy_(torch.linalg.pinv(rows[:40]))
    sae.b_enc.fill_(-0.2)
    tables = {
        "norms": novelty.norms(joint), "difference": novelty.difference(joint, test, changes), "scaling": novelty.scaling(joint, test),
        "matched": novelty.matched(joint, test, sae.W_dec, sae.encode), "predicted": novelty.predicted(joint, test, train),
    }  # fmt: skip
    f = torch.cat([joint.encode(test).flatten(0, 1), new[1::2].flatten(0, 1)], 1)
    best = torch.corrcoef(f.T)[:96, 96:].nan_to_num().max(0)
    assert (best.values > 0.9).all()  # the dictionary holds them
    return tables, best.indices.tolist(), f[:, :96]


def test_norms_alone_miss_planted_rare_features_and_latent_scaling_finds_them(planted):
    tables, latents, _ = planted
    assert (tables["norms"].loc[latents, "evidence"] == NEW).sum() <= 1
    for name, at_least in (("scaling", 4), ("predicted", 4), ("difference", 3)):
        assert (tables[name].loc[latents, "evidence"] == NEW).sum() >= at_least, name


def test_latents_of_the_change_stand_beside_those_of_both_models():
    """One code, as if the two dictionaries were read one after the other; the change writes nothing in CLIP."""
    streams, _, _ = world((0.05,), n=24)
    tokens = streams.flatten(0, 1)
    joint = train_joint(tokens, 24, k=4, n_tokens=20_000, progress=False)
    changes = train_joint(tokens[:, 1:] - tokens[:, :1], 8, k=1, n_tokens=20_000, progress=False)
    both = joint.beside(changes)
    expected = torch.cat([joint.encode(streams), changes.encode((streams[:, :, 1] - streams[:, :, 0])[:, :, None])], 2)
    assert (expected[..., 24:] > 0).any()
    torch.testing.assert_close(both.encode(streams), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.rows(1)[24:], changes.rows(0))
    assert not both.rows(0)[24:].any()


def test_the_verdict_finds_them_and_little_else(planted):
    tables, latents, f = planted
    table = verdicts(tables)
    assert (table.loc[latents, "verdict"] == NEW).all()
    others = set(table.index[table["verdict"] == NEW]) - set(latents)
    carried = torch.corrcoef(f.T).nan_to_num()[:, latents].abs().max(1).values  # a second latent of a planted feature is no false one
    assert sum(float(carried[i]) < 0.3 for i in others) <= 2
    assert (table["verdict"] == BEFORE).sum() + (table["verdict"] == "changed").sum() > len(others)


def test_verdicts_weigh_what_was_there_before_what_moved():
    def table(*evidence):
        return pd.DataFrame({"latent": range(len(evidence)), "score": 0.0, "low": 0.0, "high": 0.0, "evidence": evidence})

    found = verdicts({
        "scaling": table(NEW, NEW, BEFORE, BEFORE, NEW, UNDECIDED, UNDECIDED),
        "matched": table(NEW, UNDECIDED, BEFORE, BEFORE, BEFORE, UNDECIDED, NEW),
        "predicted": table(NEW, NEW, BEFORE, UNDECIDED, NEW, NEW, NEW),
        "difference": table(NEW, BEFORE, NEW, BEFORE, NEW, NEW, NEW),
    })  # fmt: skip
    assert found["verdict"].tolist() == [NEW, NEW, "changed", BEFORE, UNDECIDED, UNDECIDED, NEW]
    assert found.loc[4, "matched_evidence"] == BEFORE


def test_a_model_that_did_not_change_has_nothing_new(tiny_clip, models, tiny_sae):
    """CoOp's image tower is CLIP's; end to end, on pictures."""
    pictures = load_dataset("openmoji/tools", "test", n_images=16)
    joint, table = novelty.new_latents(tiny_clip, models["coop"], tiny_sae, pictures, -2, d_sae=48, k=6, n_tokens=40_000, progress=False)
    assert 0 < len(table) <= 48 and not set(table["verdict"]) & {NEW, "changed"}
    assert (norm_difference(joint) - 0.5).abs().max() < 1e-4
    streams = novelty.read_streams(tiny_clip, models["vpt"], pictures, -2, progress=False)
    expected = models["vpt"].residual(tiny_clip.preprocess(pictures[3].image)[None], -2)[0]
    torch.testing.assert_close(streams[3, :, 1], expected, rtol=0, atol=1e-4)


def test_a_latent_that_is_always_active_has_the_correlation_of_its_changes():
    """A mean 5,000 times the spread: float32 squares made correlations of 1.13 and NaN of it."""
    rng = np.random.default_rng(0)
    f, g = (torch.from_numpy(50 + 0.01 * (noise + rng.normal(size=(6, 40, 3)))).float() for noise in [rng.normal(size=(6, 40, 3))] * 2)
    found = novelty.correlations(iter([(f[:4], g[:4]), (f[4:], g[4:])]))
    slow = [np.corrcoef(f[..., s].double().flatten(), g[..., s].double().flatten())[0, 1] for s in range(3)]
    np.testing.assert_allclose(found.value, slow, atol=1e-6)
