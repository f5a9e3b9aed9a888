"""Other programs' SAEs: files written here by hand, as each program writes them, give the latents that its own equations give."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_saes import METADATA, TOKENS, VARIANTS, change, trained

from patchsae_utils.sae.files import CONFIG, WEIGHTS, load_sae, save_sae
from patchsae_utils.sae.formats import FORMATS

D, S, K = 6, 20, 3
X = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
NAMES = [options.get("activation", "relu") for options in VARIANTS]


def some_weights(unit=True):
    generator = torch.Generator().manual_seed(5)
    w = {
        name: torch.randn(shape, generator=generator) for name, shape in (("W_enc", (D, S)), ("b_enc", S), ("W_dec", (S, D)), ("b_dec", D))
    }
    if unit:
        w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    return w


def assert_latents(path, expected, reconstruction=None):
    sae = load_sae(path)
    torch.testing.assert_close(sae.encode(X), expected, rtol=0, atol=1e-5)
    assert expected.count_nonzero() > 200 and not sae.training
    if reconstruction is not None:
        torch.testing.assert_close(sae(X).reconstruction, reconstruction, rtol=0, atol=1e-4)
    return sae


def topk(pre, k=K):
    values, places = torch.relu(pre).topk(k)
    return torch.zeros_like(pre).scatter(1, places, values)


@pytest.fixture
def elsewhere(monkeypatch):
    """Classes of another package, which is there while a file is written, and gone when it is read."""

    def make(module, name, **attributes):
        kind = type(name, (), {"__module__": module})
        for i in range(module.count(".") + 1):
            package = ".".join(module.split(".")[: i + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, kind)
        thing = kind()
        thing.__dict__.update(attributes)
        return thing

    return make


@pytest.mark.parametrize("key", ["cfg", "config"])
@pytest.mark.parametrize("pickled", [True, False])
def test_official_patchsae(tmp_path, elsewhere, key, pickled):
    w = some_weights()
    settings = {
        "d_in": D, "expansion_factor": 4, "model_name": "openai/clip-vit-base-patch16", "block_layer": -2, "module_name": "resid",
        "dtype": torch.float32, "device": torch.device("cuda:0"), "l1_coefficient": 8e-5, "dataset_path": "evanarlian/imagenet_1k_resized_256",
    }  # fmt: skip
    if pickled:
        settings = elsewhere("src.sae_training.config", "ViTSAERunnerConfig", **settings)
    state = torch.nn.ParameterDict(w).state_dict()
    torch.save({key: settings, "state_dict": state}, tmp_path / "sae.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]
    expected = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    for path in (tmp_path / "sae.pt", tmp_path):
        sae = assert_latents(path, expected, expected @ w["W_dec"] + w["b_dec"])
    assert sae.metadata["model_name"] == "ViT-B-16-quickgelu" and sae.metadata["pretrained"] == "openai"
    assert sae.metadata["layer"] == 10 and sae.metadata["l1_coefficient"] == 8e-5
    assert sae.metadata["converted_from"] == "patchsae"
    with pytest.raises(ValueError, match=r"of 'ViT-B-16-quickgelu', layer 10; this store holds .*'openmoji', layer 4"):
        sae.check_store(SimpleNamespace(d_in=D, metadata=SimpleNamespace(model_name="openmoji", layer=4)))


PRISMA = {
    "d_in": D, "expansion_factor": 4, "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {},
    "normalize_activations": "none", "model_name": "open-clip:laion/CLIP-ViT-B-32", "hook_point_layer": 7, "layer_subtype": "hook_resid_post",
    "is_transcoder": False, "_device": "cuda", "_dtype": "torch.float32",
}  # fmt: skip


def prisma(folder, state, **changes):
    torch.save(state, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in (PRISMA | changes).items() if value is not None}))
    return folder


def test_vit_prisma(tmp_path):
    w = some_weights(unit=False)
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    assert_latents(prisma(tmp_path, w), torch.relu(pre), torch.relu(pre) @ w["W_dec"] + w["b_dec"])
    assert_latents(tmp_path / "weights.pt", torch.relu(pre))
    sae = assert_latents(prisma(tmp_path, w, activation_fn_str="topk", activation_fn_kwargs={"k": K}), topk(pre))
    assert (sae.metadata["layer"], sae.metadata["model_name"]) == (7, "open-clip:laion/CLIP-ViT-B-32")
    assert "layer" not in load_sae(prisma(tmp_path, w, layer_subtype="hook_mlp_out")).metadata, "it reads another place of the block"


def test_vit_prisma_gated(tmp_path):
    w = some_weights()
    w |= {"b_gate": w.pop("b_enc"), "b_mag": torch.linspace(-1, 1, S), "r_mag": torch.linspace(-0.5, 0.5, S)}
    inside = (X - w["b_dec"]) @ w["W_enc"]
    expected = (inside + w["b_gate"] > 0) * torch.relu(inside * w["r_mag"].exp() + w["b_mag"])
    assert_latents(prisma(tmp_path, w, architecture="gated"), expected, expected @ w["W_dec"] + w["b_dec"])


def test_early_vit_prisma(tmp_path, elsewhere):
    w = some_weights()
    settings = elsewhere("vit_prisma.sae.config", "VisionModelSAERunnerConfig", **PRISMA)
    torch.save({"cfg": settings, "state_dict": w}, tmp_path / "n_images_520028.pt")
    sae = assert_latents(tmp_path / "n_images_520028.pt", torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    assert sae.metadata["converted_from"] == "prisma" and sae.metadata["layer"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "says normalize_activations='layer_norm'; only 'none' is read"),
        ({"is_transcoder": True}, "is_transcoder=True"),
        ({"architecture": "jumprelu"}, "architecture 'jumprelu' with 'relu'. Valid: standard or gated, relu or topk"),
        ({"activation_fn_str": "tanh-relu"}, "Valid: standard or gated, relu or topk"),
        ({"activation_fn_str": "topk"}, "needs k between 1 and d_sae=20, got k=None"),
        ({"normalize_activations": None}, "layer_norm"),  # left out: its default has changed between versions
        ({"activation_fn_str": None}, "with None"),
    ],
)
def test_vit_prisma_that_would_give_wrong_latents(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_sae(prisma(tmp_path, some_weights(), **changes))


def saev(path, state, activation, schema=5):
    header = {"schema": schema, "cfg": {"d_model": D, "d_sae": S, "activation": activation}, "commit": "abc", "lib": "0.1"}
    with open(path, "wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    return path


def test_saev_does_not_subtract_b_dec(tmp_path):
    w, path = some_weights(), tmp_path / "sae.pt"
    pre = X @ w["W_enc"] + w["b_enc"]
    assert_latents(saev(path, w, {"cls": "Relu", "params": {}}), torch.relu(pre), torch.relu(pre) @ w["W_dec"] + w["b_dec"])
    assert_latents(saev(path, w, {"cls": "TopK", "params": {"top_k": K}}), topk(pre))
    with_threshold = w | {"activation.threshold": torch.tensor(1.5)}
    assert_latents(saev(path, with_threshold, {"cls": "BatchTopK", "params": {"top_k": K}}), torch.where(pre > 1.5, pre, 0))
    sae = assert_latents(saev(path, w, {"cls": "BatchTopK", "params": {"top_k": K}}, schema=2), topk(pre))
    assert sae.activation == "topk", "before it had a threshold"
    with pytest.raises(ValueError, match="activation 'Sigmoid'. Valid: Relu, TopK, BatchTopK"):
        load_sae(saev(path, w, {"cls": "Sigmoid", "params": {}}))


def test_sparsify(tmp_path):
    w = some_weights()
    state = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file(state, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 4, "k": K, "multi_topk": False, "transcode": False, "d_in": D}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    expected = topk((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    for path in (tmp_path, tmp_path / "sae.safetensors", tmp_path / "cfg.json"):
        assert_latents(path, expected, expected @ w["W_dec"] + w["b_dec"])
    for name, value in {"activation": "groupmax", "transcode": True, "skip_connection": True}.items():
        (tmp_path / "cfg.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"says {name}={value!r}"):
            load_sae(tmp_path)


def dictionary(folder, kind, state):
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-70m"}}))
    return folder


def linear(w, **more):
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, **more}


def test_dictionary_learning(tmp_path):
    w = some_weights()
    pre, whole = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], torch.tensor(K, dtype=torch.int)
    decode = lambda h: h @ w["W_dec"] + w["b_dec"]  # noqa: E731
    sae = assert_latents(dictionary(tmp_path, "AutoEncoder", linear(w, bias=w["b_dec"])), torch.relu(pre), decode(torch.relu(pre)))
    assert (sae.metadata["layer"], sae.metadata["model_name"]) == (8, "EleutherAI/pythia-70m")
    plain = torch.relu(X @ w["W_enc"] + w["b_enc"])
    assert_latents(dictionary(tmp_path, "AutoEncoderNew", linear(w) | {"decoder.bias": w["b_dec"]}), plain, decode(plain))
    few = topk(pre)
    assert_latents(
        dictionary(tmp_path, "AutoEncoderTopK", linear(w, b_dec=w["b_dec"], k=whole, threshold=torch.tensor(-1.0))), few, decode(few)
    )
    high = torch.where(pre > 1.5, pre, 0)
    state = {"b_dec": w["b_dec"], "k": whole, "threshold": torch.tensor(1.5)}
    sae = assert_latents(dictionary(tmp_path, "BatchTopKSAE", linear(w) | state), high, decode(high))
    assert (sae.activation, sae.k) == ("batchtopk", K)
    sae = assert_latents(dictionary(tmp_path, "MatryoshkaBatchTopKSAE", w | state | {"group_sizes": torch.tensor([5, 5, 10])}), high)
    assert (sae.activation, sae.groups) == ("matryoshka", (5, 10, 20))
    assert_latents(dictionary(tmp_path, "BatchTopKSAE", linear(w) | state | {"threshold": torch.tensor(-1.0)}), torch.relu(pre))
    with pytest.raises(ValueError, match="dict_class='CrossCoder'. Valid: AutoEncoder, .*JumpReluAutoEncoder"):
        load_sae(dictionary(tmp_path, "CrossCoder", w))


@pytest.mark.parametrize("unit", [True, False])
def test_dictionary_learning_multiplies_some_latents_by_their_rows_norms(tmp_path, unit):
    w = some_weights(unit)
    pre, threshold = X @ w["W_enc"] + w["b_enc"], torch.linspace(0.1, 2, S)
    f = torch.where(pre > threshold, pre, 0)
    assert_latents(dictionary(tmp_path, "JumpReluAutoEncoder", w | {"threshold": threshold}), f, f @ w["W_dec"] + w["b_dec"])
    inside, r_mag, mag_bias = (X - w["b_dec"]) @ w["W_enc"], torch.linspace(-0.5, 0.5, S), torch.linspace(-1, 1, S)
    f = (inside + w["b_enc"] > 0) * torch.relu(r_mag.exp() * inside + mag_bias)
    state = linear(w, decoder_bias=w["b_dec"], gate_bias=w["b_enc"], mag_bias=mag_bias, r_mag=r_mag)
    del state["encoder.bias"]
    assert_latents(dictionary(tmp_path, "GatedAutoEncoder", state), f, f @ w["W_dec"] + w["b_dec"])


def saelens(folder, w, **config):
    save_file({name: value.contiguous() for name, value in w.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": S, **config}))
    return folder


def test_saelens_with_other_switches(tmp_path):
    w = some_weights(unit=False)
    pre, norms = X @ w["W_enc"] + w["b_enc"], w["W_dec"].norm(dim=1)
    assert_latents(saelens(tmp_path, w, apply_b_dec_to_input=False), torch.relu(pre), torch.relu(pre) @ w["W_dec"] + w["b_dec"])
    few = topk(pre * norms)
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    assert_latents(saelens(tmp_path, w, **config), few, (few / norms) @ w["W_dec"] + w["b_dec"])
    jump = {"threshold": torch.linspace(0.1, 2, S)}
    folder = saelens(tmp_path, w | jump, architecture="jumprelu", apply_b_dec_to_input=False)  # as Gemma Scope's
    assert_latents(folder, torch.where(pre > jump["threshold"], pre, 0))
    gated = w | {"b_gate": w["b_enc"], "b_mag": torch.linspace(-1, 1, S), "r_mag": torch.linspace(-0.5, 0.5, S)}
    del gated["b_enc"]
    inside = X @ w["W_enc"]
    expected = (inside + gated["b_gate"] > 0) * torch.relu(inside * gated["r_mag"].exp() + gated["b_mag"])
    assert_latents(saelens(tmp_path, gated, architecture="gated", apply_b_dec_to_input=False), expected)


def test_saelens_before_version_6(tmp_path):
    w = some_weights()
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_name": "blocks.8.hook_resid_pre"}
    assert_latents(saelens(tmp_path, w, **old), topk((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    for wrong in ({"activation_fn_str": "tanh-relu"}, {"finetuning_scaling_factor": True}):
        with pytest.raises(ValueError, match="is not read|would give wrong latents"):
            load_sae(saelens(tmp_path, w, **wrong))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_what_is_written_gives_the_same_latents(tmp_path, form, options, unit):
    sae = trained(options).eval()
    if not unit:
        sae.W_dec.data.mul_(torch.linspace(0.5, 2, S)[:, None])
    if form != "saelens" and sae.activation not in FORMATS[form].activations:
        with pytest.raises(ValueError, match=rf"can't say activation='{sae.activation}'.* For this SAE: saelens"):
            save_sae(sae, tmp_path / "sae", format=form)
        assert not (tmp_path / "sae").exists()
        return
    path = save_sae(sae, tmp_path / "an SAE é", format=form, unit_norm=unit)
    loaded = load_sae(path)
    torch.testing.assert_close(loaded.encode(TOKENS), sae.encode(TOKENS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(TOKENS).reconstruction, sae(TOKENS).reconstruction, rtol=0, atol=1e-4)
    kept = METADATA if form != "prisma" else {name: METADATA[name] for name in ("model_name", "layer")}
    assert loaded.metadata.items() >= kept.items()
    if form not in ("saelens", "saev") or sae.activation != "matryoshka":
        assert (loaded.activation, loaded.k) == (sae.activation, sae.k)
    assert not [file for file in path.parent.rglob(".*")], "no temporary file is left"


def test_files_have_the_names_that_the_programs_look_for(tmp_path):
    sae, top = trained({}), trained(VARIANTS[1])
    assert save_sae(sae, tmp_path / "a", format="patchsae") == tmp_path / "a" / "sae.pt"
    assert save_sae(sae, tmp_path / "b" / "mine.pt", format="saev") == tmp_path / "b" / "mine.pt"
    for form, names in {"prisma": ["config.json", "weights.pt"], "dictionary_learning": ["ae.pt", "config.json"]}.items():
        assert sorted(path.name for path in save_sae(sae, tmp_path / form, format=form).iterdir()) == names
    folder = save_sae(top, tmp_path / "sparsify", format="sparsify")
    assert sorted(load_file(folder / "sae.safetensors")) == ["W_dec", "b_dec", "encoder.bias", "encoder.weight"]
    content = torch.load(tmp_path / "a" / "sae.pt", weights_only=True)
    assert sorted(content["state_dict"]) == ["W_dec", "W_enc", "b_dec", "b_enc"] and content["cfg"]["block_layer"] == 4
    with pytest.raises(ValueError, match="Unknown format 'onnx'. Valid: saelens, patchsae, prisma"):
        save_sae(sae, tmp_path / "c", format="onnx")


def test_weights_without_a_word_on_their_use_are_refused(tmp_path):
    torch.save(some_weights(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds tensors .*W_enc.*nothing that says how to use it.*config.json"):
        load_sae(tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds a list, and nothing that says"):
        load_sae(tmp_path / "weights.pt")
    (tmp_path / "sae.pt").write_bytes(b'{"schema": 5}\nrest')
    with pytest.raises(ValueError, match="no header of saev"):
        load_sae(tmp_path / "sae.pt")


def test_shapes_and_values_are_checked(tmp_path):
    w = some_weights()
    with pytest.raises(ValueError, match=r"lacks the weights b_enc; it holds .*'W_dec': \(20, 6\)"):
        load_sae(prisma(tmp_path, {name: w[name] for name in ("W_enc", "W_dec", "b_dec")}))
    with pytest.raises(ValueError, match=r"holds no matrix W_enc \[d_in, d_sae\]; it holds .*'W_enc': \(20,\)"):
        load_sae(prisma(tmp_path, w | {"W_enc": w["W_enc"][0]}))
    with pytest.raises(ValueError, match="an SAE of activation 'relu' has"):
        load_sae(prisma(tmp_path, w | {"W_dec": w["W_dec"].T}))
    with pytest.raises(ValueError, match="b_dec holds NaN or infinite"):
        load_sae(prisma(tmp_path, w | {"b_dec": torch.full((D,), torch.nan)}))


@pytest.mark.parametrize("normalize", ["none", "mean_and_norm"])
@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_saelens_opens_ours_and_we_open_theirs(tmp_path, options, normalize):
    sae_lens = pytest.importorskip("sae_lens", reason="the package sae-lens is not installed (extra: bench)")
    sae = trained(options, normalize).eval()
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "ours"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(TOKENS), sae(TOKENS).reconstruction, rtol=0, atol=1e-4)
    theirs.save_model(tmp_path / "theirs")
    again = load_sae(tmp_path / "theirs")
    torch.testing.assert_close(again.encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=1e-5)
    assert again.metadata["model_name"] == METADATA["model_name"] and again.metadata["layer"] == METADATA["layer"]


def test_weights_that_saelens_has_changed_are_not_called_damaged(tmp_path):
    """It copies our metadata, checksum included, and adds a version of its own."""
    folder = trained({}).save(tmp_path / "ours")
    w = load_file(folder / WEIGHTS)
    save_file(w | {"b_dec": w["b_dec"] + 1}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="damaged"):
        load_sae(folder)
    metadata = json.loads((folder / CONFIG).read_text())["metadata"]
    change(folder, metadata=metadata | {"sae_lens_training_version": "6.54.0"})
    again = load_sae(load_sae(folder).save(tmp_path / "again"))
    torch.testing.assert_close(again.b_dec, w["b_dec"] + 1, rtol=0, atol=0)
    assert "sae_lens_training_version" not in again.metadata


def test_sparsify_itself_opens_ours(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="the package eai-sparsify is not installed (extra: bench)")
    sae = trained(VARIANTS[1]).eval()
    theirs = sparsify.SparseCoder.load_from_disk(save_sae(sae, tmp_path, format="sparsify"))
    with torch.no_grad():
        values, places, _ = theirs.encode(TOKENS)
        latents = torch.zeros(len(TOKENS), S).scatter(1, places, values)
        torch.testing.assert_close(latents, sae.encode(TOKENS), rtol=0, atol=1e-5)
    theirs.save_to_disk(tmp_path / "theirs")
    torch.testing.assert_close(load_sae(tmp_path / "theirs").encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=1e-5)
