"""The dictionary that ships: small, whole, and that of a fresh run."""

import dataclasses

import pandas as pd
import pytest
import torch

import patchsae_utils as ps
from patchsae_utils.concepts import shipped
from patchsae_utils.config import load_profile
from patchsae_utils.latents.likeness import Likeness
from patchsae_utils.sae import files


@pytest.fixture(scope="module")
def parts(tiny_sae, summary):
    names = pd.DataFrame([(3, "red", "color", 0.51234), (5, "unnamed", "unnamed", 0.1)], columns=["latent", "name", "kind", "score"])
    table = pd.DataFrame({"dictionary": ["SAE"] * 64 + ["single dimensions"], "latent": [*range(64), 0], "score": torch.rand(65).numpy()})
    return shipped.Shipped(tiny_sae, summary, names, Likeness(table, {"clip": torch.rand(24, 16)}))


def test_what_ships_comes_back(parts, tmp_path, monkeypatch):
    folder = tmp_path / "sae"
    assert shipped.open_shipped(folder) is None
    megabytes = shipped.ship(parts, "tiny", folder)
    assert set(megabytes) == {"README.md", "cfg.json", "latents.safetensors", "names.csv", "sae_weights.safetensors"}
    back = shipped.open_shipped(folder)
    for field in dataclasses.fields(parts.summary):
        value, again = getattr(parts.summary, field.name), getattr(back.summary, field.name)
        if field.name == "sae":  # of the rounded weights
            value = back.sae.fingerprint
        same = torch.equal(value.nan_to_num(-1), again.nan_to_num(-1)) if isinstance(value, torch.Tensor) else value == again
        assert same and type(value) is type(again), field.name
        assert not isinstance(value, torch.Tensor) or value.dtype == again.dtype
    for name, value in parts.sae.state_dict().items():
        torch.testing.assert_close(back.sae.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert back.names.to_dict("records") == [{"latent": 3, "name": "red", "kind": "color", "score": 0.5123}]
    torch.testing.assert_close(back.likeness.embeddings, parts.likeness.embeddings, rtol=1e-3, atol=1e-6)
    assert back.likeness.table["score"].tolist() == pytest.approx(parts.likeness.table["score"][:64].tolist())
    assert "python -m patchsae_utils ship" in (folder / "README.md").read_text()
    monkeypatch.setattr(files, "SHIPPED", folder)
    torch.testing.assert_close(ps.load_sae("openmoji").W_dec, back.sae.W_dec)
    monkeypatch.setattr(shipped, "LIMIT_MB", 0.001)
    with pytest.raises(ValueError, match="at most 0.001 MB"):
        shipped.ship(parts, "tiny", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_explorers_need_no_training_where_it_ships(parts, tmp_path, monkeypatch, tiny_clip):
    profile = dataclasses.replace(load_profile("openmoji"), root=tmp_path)
    monkeypatch.setattr(ps.stages, "open_shipped", lambda: parts)
    found = ps.stages.explorable(profile, tiny_clip)
    assert found is parts and ps.stages.explorers_ship(profile)
    assert "ships with the package" in ps.stages.missing_artifacts(profile)[0]


def test_what_ships_is_what_a_fresh_run_makes():
    """Where both are there. On another number of cores sums round otherwise, and latents that start anew do so in another order."""
    profile, found = load_profile("openmoji"), shipped.open_shipped()
    if found is None or not all(map(ps.stages.is_made, (profile.folder("sae"), profile.folder("latents") / "statistics"))):
        pytest.skip("needs the shipped dictionary and runs/openmoji")
    fresh = ps.load_sae(profile.folder("sae"))
    assert (fresh.d_in, fresh.d_sae, fresh.activation) == (found.sae.d_in, found.sae.d_sae, found.sae.activation)
    cosine, same = (fresh.W_dec @ found.sae.W_dec.T).max(1)  # the latent that a fresh one is here
    assert (cosine > 0.99).float().mean() > 0.9
    summary, here = ps.LatentSummary.load(profile.folder("latents") / "statistics"), same[cosine > 0.99]
    frequency, strongest = summary.frequency[cosine > 0.99], summary.top_images[cosine > 0.99, :1]
    assert (found.summary.frequency[here] - frequency).abs().quantile(0.9) < 0.01
    assert (found.summary.top_images[here] == strongest).any(1).float().mean() > 0.9
