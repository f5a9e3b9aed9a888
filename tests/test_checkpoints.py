"""SAE folders: what is written is what is read, and everything else is refused by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsae_utils.checkpoints import CONFIG, WEIGHTS, load_sae
from patchsae_utils.sae import SparseAutoencoder

METADATA = {"model_name": "openmoji", "layer": 4, "tokens": "all", "grid": [14, 14]}


@pytest.fixture
def folder(tmp_path):
    sae = SparseAutoencoder(6, 20, metadata=METADATA, seed=1)
    with torch.no_grad():
        sae.b_enc.add_(0.1)
        sae.b_dec.add_(torch.arange(6.0))
    return sae, sae.save(tmp_path / "an SAE é")


def change(directory, **entries):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 3}])
def test_round_trip_gives_identical_outputs(tmp_path, options):
    sae = SparseAutoencoder(6, 20, metadata=METADATA, seed=1, **options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loaded = load_sae(sae.save(tmp_path / "sae"))
    x = torch.randn(30, 6)
    for before, after in zip(sae(x), loaded(x), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert loaded.fingerprint == sae.fingerprint
    assert {name: loaded.metadata[name] for name in METADATA} == METADATA
    assert loaded.fingerprint == load_sae(loaded.save(tmp_path / "again")).fingerprint


def test_the_folder_is_saelens_v6(folder):
    sae, directory = folder
    config = json.loads((directory / CONFIG).read_text())
    assert {key: config[key] for key in config if key != "metadata"} == {
        "architecture": "standard", "d_in": 6, "d_sae": 20, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    assert config["metadata"]["sae_lens_version"] >= "6"
    assert config["metadata"]["model_name"] == "openmoji"
    assert config["metadata"]["hook_name"] == "visual.transformer.resblocks.4"
    shapes = {name: tuple(value.shape) for name, value in load_file(directory / WEIGHTS).items()}
    assert shapes == {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, WEIGHTS]  # no temporary file left


def test_topk_adds_its_keys(tmp_path):
    config = json.loads((SparseAutoencoder(6, 20, "topk", k=3).save(tmp_path / "sae") / CONFIG).read_text())
    assert (config["architecture"], config["k"], config["rescale_acts_by_decoder_norm"]) == ("topk", 3, False)


def test_half_precision_files_are_read(folder):
    _, directory = folder
    tensors = load_file(directory / WEIGHTS)
    save_file({name: value.half() for name, value in tensors.items()}, directory / WEIGHTS)
    change(directory, metadata={"sae_lens_version": "6.0.0"})  # another program's file has no checksum
    assert load_sae(directory).W_enc.dtype == torch.float32


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated'. Valid: standard, topk"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input=False"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ({"architecture": "topk"}, "needs k between"),
        ({"d_in": 7}, "don't belong together"),
        ({"d_in": "six"}, "positive integers"),
    ],
)
def test_configs_that_would_give_wrong_latents_are_refused(folder, entries, message):
    _, directory = folder
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
    (directory / WEIGHTS).write_bytes(content[:40])
    with pytest.raises(ValueError, match="no valid safetensors"):
        load_sae(directory)
    (directory / CONFIG).write_text('{"architecture": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_sae(directory)
    (directory / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="needs the entries architecture, d_in, d_sae"):
        load_sae(directory)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    sae = SparseAutoencoder(6, 20)
    sae.b_dec.data[0] = torch.nan
    with pytest.raises(ValueError, match="b_dec holds NaN"):
        load_sae(sae.save(tmp_path))


def test_missing_things_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="expected a folder with cfg.json and sae_weights.safetensors"):
        load_sae(tmp_path / "nowhere")
    _, directory = folder
    (directory / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="holds no sae_weights.safetensors.*found: cfg.json"):
        load_sae(directory)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap was sprung"), "w"))

    path = tmp_path / "sae.pt"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is a pickle"):
        load_sae(path)
    assert not (tmp_path / "trap was sprung").exists()
