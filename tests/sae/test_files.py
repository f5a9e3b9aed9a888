"""SAE folders: what is written is what is read, and everything else is refused by name."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_saes import METADATA, TOKENS, VARIANTS, change, trained

from patchsae_utils.sae.files import CONFIG, WEIGHTS, load_sae
from patchsae_utils.sae.losses import objective
from patchsae_utils.sae.model import SparseAutoencoder


@pytest.fixture
def folder(tmp_path):
    sae = SparseAutoencoder(6, 20, metadata=METADATA, seed=1)
    with torch.no_grad():
        sae.b_enc.add_(0.1)
        sae.b_dec.add_(torch.arange(6.0))
    return sae, sae.save(tmp_path / "an SAE é")


@pytest.mark.parametrize("normalize", ["none", "mean", "mean_and_norm"])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options.get("activation", "relu"))
def test_round_trip_gives_identical_outputs(tmp_path, options, normalize):
    sae = trained(options, normalize)
    loaded = load_sae(sae.save(tmp_path / "sae"))
    x = TOKENS[:30]
    assert not loaded.training
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0, atol=0)
    for mode in (False, True):  # and ready to be trained further
        for before, after in zip(sae.train(mode)(x), loaded.train(mode)(x), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0)
    terms = [objective(each)(each, x, torch.ones(20, dtype=torch.bool), 0.1) for each in (sae, loaded)]
    torch.testing.assert_close(terms[1], terms[0], rtol=0, atol=0)
    assert loaded.fingerprint == sae.fingerprint and repr(loaded) == repr(sae)
    assert {name: loaded.metadata[name] for name in METADATA} == METADATA
    assert "patchsae" not in loaded.metadata
    assert loaded.fingerprint == load_sae(loaded.save(tmp_path / "again")).fingerprint
    if normalize != "none":
        with pytest.raises(ValueError, match="trained on activations"):
            loaded.check_statistics(10 * x)


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3], VARIANTS[4]], ids=["relu", "jumprelu", "gated"])
def test_rows_are_saved_at_unit_norm_with_the_same_reconstruction(tmp_path, options):
    sae = trained(options).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 3, 20)[:, None])
        sae.W_dec[7] = 0
    directory = sae.save(tmp_path)
    assert (load_file(directory / WEIGHTS)["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6
    loaded, x = load_sae(directory), TOKENS.double()
    torch.testing.assert_close(loaded.double()(x).reconstruction, sae(x).reconstruction, rtol=1e-4, atol=1e-4)
    assert not loaded.encode(x)[:, 7].any()


@pytest.mark.parametrize("options", [VARIANTS[1], VARIANTS[2], VARIANTS[5]], ids=["topk", "batchtopk", "matryoshka"])
def test_rows_that_would_change_what_is_kept_are_not_saved(tmp_path, options):
    sae = trained(options)
    sae.W_dec.data *= 2
    with pytest.raises(ValueError, match=r"norms from 2 to 2.*normalize_decoder\(\) before saving"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_another_programs_jumprelu_is_read_as_one(tmp_path):
    directory = trained(VARIANTS[2]).save(tmp_path)
    sae = load_sae(directory)
    change(directory, metadata={})
    other = load_sae(directory)
    assert (sae.activation, other.activation, tuple(other.threshold.shape)) == ("batchtopk", "jumprelu", (20,))
    torch.testing.assert_close(other.encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=0)


OWN = [
    ({"activation": "gated"}, "'gated' is not saved as architecture 'jumprelu'"),
    ({"activation": "tanh"}, "'tanh' is not saved as"),
    ({"activation": "batchtopk"}, "needs k between"),
    ({"activation": "batchtopk", "k": "three"}, "can't be read"),
    ({"activation": "batchtopk", "k": 3}, "thresholds that differ between latents"),
    ({"activation": "matryoshka", "k": 3, "groups": [30]}, "rise from at least 1"),
    ({"activation": "jumprelu", "input_mean": [1.0, 2.0]}, "can't be read"),
    (["batchtopk"], "can't be read"),
]
CONFIGS = [
    ({"architecture": "gated"}, "don't belong together"),
    ({"architecture": "topk"}, "needs k between"),
    ({"d_in": 7}, "don't belong together"),
    ({"d_in": "six"}, "don't belong together"),
    ({"d_in": 1_000_000_000}, "don't belong together"),
    ({"metadata": "none"}, "metadata must be an object, got a str"),
]


@pytest.mark.parametrize(
    ("options", "entries", "message"),
    [(VARIANTS[2 + ("differ" in message)], {"metadata": {"patchsae": own}}, message) for own, message in OWN]
    + [({}, *rest) for rest in CONFIGS],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, options, entries, message):
    directory = trained(options).save(tmp_path)
    change(directory, **entries)
    with pytest.raises(ValueError, match=message):
        load_sae(directory)


def test_damage_is_noticed(folder):
    _, directory = folder
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="damaged.*SHA-256"):
        load_sae(directory)
    change(directory, metadata={})
    (directory / WEIGHTS).write_bytes(content[:200])
    with pytest.raises(ValueError, match="no valid safetensors"):
        load_sae(directory)
    for config, message in (
        ('{"architecture": ', "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
    ):
        (directory / CONFIG).write_text(config)
        with pytest.raises(ValueError, match=message):
            load_sae(directory)
    (directory / CONFIG).write_text("{}")
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="lacks the entries architecture, d_in, d_sae"):
        load_sae(directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="holds no sae_weights.safetensors.*found: cfg.json"):
        load_sae(directory)
    with pytest.raises(FileNotFoundError, match="expected a folder with cfg.json and sae_weights.safetensors"):
        load_sae(directory / "nowhere")


KNOWN_NAMES = [  # FAULTS B5: as other programs call them; open_clip's architecture and tag
    ("openai/clip-vit-base-patch16", "ViT-B-16", "openai"),
    ("openai/clip-vit-base-patch16", "ViT-B-16-quickgelu", "openai"),
    ("openai/clip-vit-large-patch14-336", "ViT-L-14-336", "openai"),
    ("open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "ViT-B-32", "datacomp_xl_s13b_b90k"),
    ("open-clip:timm/vit_base_patch32_clip_224.openai", "ViT-B-32", "openai"),
    ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L-14", "laion2b_s32b_b82k"),
    ("ViT-B-16", "ViT-B-16", None),
]


def model(name, pretrained=None):
    return SimpleNamespace(name=name, pretrained=pretrained, width=6, weights_hash="x", preprocess=None, layer_index=lambda layer: layer)


@pytest.mark.parametrize(("name", "architecture", "tag"), KNOWN_NAMES)
def test_models_are_known_by_all_their_names(name, architecture, tag):
    """FAULTS B5: the right model was refused."""
    sae = SparseAutoencoder(6, 20, metadata={"model_name": name, "layer": 3, "sae_lens_version": "6.0.0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pretrained in {tag, None, "random", "weights.pt"}:
            sae.check_model(model(architecture, pretrained), 3)
        for other in (model("ViT-H-14", tag), model("openmoji"), model("timm:vit_small_patch14_dinov2")):
            with pytest.raises(ValueError, match="The SAE reads 6-dimensional activations of"):
                sae.check_model(other, 3)
        if tag and "336" not in name:  # of which there is one alone
            with pytest.raises(ValueError, match=f"pretrained {tag}; .*pretrained laion400m_e32"):
                sae.check_model(model(architecture, "laion400m_e32"), 3)


@pytest.mark.parametrize("metadata", [{"model_name": "facebook/dinov2-small"}, {"model_name": "dino", "converted_from": "saev"}])
def test_a_name_that_nobody_knows_cant_be_compared(metadata):
    """FAULTS B5: a warning, where it was refused."""
    sae = SparseAutoencoder(6, 20, metadata=metadata | {"layer": 3})
    for given in ("timm:vit_small_patch14_dinov2", "ViT-B-16"):
        with pytest.warns(UserWarning, match=f"trained on '{metadata['model_name']}', which can't be compared with '{given}'"):
            sae.check_model(model(given), 3)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="layer 3; .*layer 4"):
        sae.check_model(model("ViT-B-16"), 4)
