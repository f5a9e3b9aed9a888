"""Stages of a profile: an SAE that somebody brings along is studied as it is, and what is missing is said."""

import dataclasses
import json

import pytest
import torch
from tiny import picture_folder, random_clip

from patchsae_utils import stages
from patchsae_utils.config import load_profile
from patchsae_utils.sae.files import save_sae
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.stages import missing_artifacts

LAYER = 1  # of the tiny model's three blocks: -2


def official(folder, sae, layer):
    """What PatchSAE's own program saves: torch.save of its settings and the weights."""
    settings = {"d_in": sae.d_in, "expansion_factor": 2, "model_name": "tiny", "block_layer": layer, "dtype": torch.float32}
    weights = {name: value.detach().clone() for name, value in sae.state_dict().items() if name[:2] in ("W_", "b_")}
    folder.mkdir()
    torch.save({"cfg": settings, "state_dict": weights}, folder / "clip-vit.pt")
    return folder / "clip-vit.pt"


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = str(picture_folder(tmp_path / "pictures", red=12, blue=12))
    data = dict.fromkeys(("data.train", "data.statistics", "data.evaluation", "data.tasks", "adapters.tasks"), pictures)
    return load_profile(overrides={"name": "own", "model.layer": LAYER, **data})


@pytest.mark.parametrize("form", ["ours", "official", "relative"])
def test_an_sae_that_is_brought_along_is_studied_and_nothing_is_trained(profile, tmp_path, monkeypatch, form):
    clip = random_clip()
    sae = SparseAutoencoder(32, 64, metadata={"model_name": "tiny", "layer": LAYER}, seed=1)
    path = official(tmp_path / "theirs", sae, LAYER) if form == "official" else save_sae(sae, tmp_path / "mine")
    if form == "relative":  # notebooks run in a folder of the repository
        (tmp_path / "notebooks").mkdir()
        (tmp_path / "pyproject.toml").touch()
        monkeypatch.chdir(tmp_path / "notebooks")
        path = "mine"
    monkeypatch.setattr(stages, "train_sae", lambda *_: pytest.fail("trained"))
    own = dataclasses.replace(profile, sae=dataclasses.replace(profile.sae, path=str(path)))
    found = stages.trained_sae(own, clip)
    x = clip.residual(torch.randn(2, 3, 112, 112), LAYER)
    torch.testing.assert_close(found.encode(x), sae.eval().encode(x), rtol=0, atol=1e-5)
    summary = stages.latent_summary(own, clip, found)
    assert summary.n_latents == 64 and summary.n_images == 20
    assert not own.folder("sae").exists() and not own.folder("activations").exists()
    with pytest.raises(ValueError, match="layer 1.*holds 32-dimensional ones.*layer 0"):
        stages.trained_sae(dataclasses.replace(own, model=dataclasses.replace(own.model, layer=0)), clip)


def test_controls_keep_a_part_at_random_and_train_the_rest(profile):
    small = {"n_tokens": 2048, "batch_tokens": 512, "warmup_steps": 1, "start": "data"}
    own = dataclasses.replace(profile, training=dataclasses.replace(profile.training, **small))
    fresh, found = (
        SparseAutoencoder(32, 64, "topk", k=4, seed=0),
        stages.trained_controls(own, random_clip(), SparseAutoencoder(32, 64, "topk", k=4, seed=9)),
    )
    decoder, encoder = (
        {name: torch.allclose(getattr(fresh, part), getattr(sae, part), atol=1e-6) for name, sae in found.items()}
        for part in ("W_dec", "W_enc")
    )
    assert decoder == {"decoder frozen": True, "decoder softly frozen": False, "encoder frozen": False}
    assert encoder == {"decoder frozen": False, "decoder softly frozen": False, "encoder frozen": True}
    cosine = torch.nn.functional.cosine_similarity(fresh.W_dec, found["decoder softly frozen"].W_dec, dim=1)
    assert cosine.min() >= 0.8 - 1e-5 and all(sae.activation == "topk" and sae.k == 4 for sae in found.values())


def test_an_sae_from_the_hub_is_named_by_its_id(profile, monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "load_sae", lambda path: asked.append(path) or SparseAutoencoder(32, 64))
    stages.trained_sae(dataclasses.replace(profile, sae=dataclasses.replace(profile.sae, path="hf:owner/sae")), random_clip())
    assert asked == ["hf:owner/sae"]


def test_a_missing_artifact_names_the_notebook_that_makes_it(tmp_path):
    default = load_profile(overrides={"adapters.tasks": "openmoji/animals:gray"})
    default = dataclasses.replace(default, root=tmp_path)
    told = missing_artifacts(default)
    notebooks = ["02_sae_training", *["03_concept_labeling"] * 2, *["05_adaptation_remapping"] * 2]
    assert len(told) == 5 and all(name in sentence for name, sentence in zip(notebooks, told, strict=True))
    made = [f"adapters/openmoji-animals-gray-{kind}-1" for kind in ("maple", "finetune")]
    for folder in ("sae", "latents/statistics", "latents/concepts", *made):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text(json.dumps({"complete": False}))
        assert len(missing_artifacts(default)) == len(told), "unfinished"
        (tmp_path / folder / "manifest.json").write_text("{}")
        assert len(missing_artifacts(default)) == len(told) - 1
        told = missing_artifacts(default)
    assert told == []
    picture_folder(tmp_path / "flat", **{".": 4})
    flat = load_profile("openmoji", {"data.statistics": str(tmp_path / "flat")})
    assert len(missing_artifacts(dataclasses.replace(flat, root=tmp_path / "new"))) == 3, "no labels, no adapter"
    words = load_profile("openmoji", {"sae.path": "hf:a/b", "model.name": "timm:x"})
    assert len(missing_artifacts(dataclasses.replace(words, root=tmp_path / "new"))) == 2, "no SAE is made, and no adapter"
