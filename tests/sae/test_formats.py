"""Other programs' SAEs: files written here by hand, as each version of a program writes them, give the latents of that program's own equation.

The equations stand in this file alone, straight from the programs' sources; nothing of the package computes what is expected.
"""

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


def drawn():
    """Weights by our names, no row of the decoder at unit norm."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"W_enc": (D, S), "b_enc": S, "W_dec": (S, D), "b_dec": D, "b_mag": S, "r_mag": S}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


W = drawn()
NORMS, THRESHOLD, COUNT = W["W_dec"].norm(dim=1), torch.linspace(0.1, 2, S), torch.tensor(K, dtype=torch.int)
FOUR = {name: W[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
GATED = {name: W[name] for name in ("W_enc", "W_dec", "b_dec", "b_mag", "r_mag")} | {"b_gate": W["b_enc"]}
LINEAR = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"].T}

# The equations, as the programs' sources have them
CENTRED, PLAIN = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"], X @ W["W_enc"] + W["b_enc"]


def top(pre, k=K):
    values, places = torch.relu(pre).topk(k)
    return torch.zeros_like(pre).scatter(1, places, values)


def above(pre, threshold):
    return torch.where(pre > threshold, pre, 0)


def gate(x):
    inside = x @ W["W_enc"]
    return (inside + W["b_enc"] > 0) * torch.relu(inside * W["r_mag"].exp() + W["b_mag"])


def saelens(folder, state=FOUR, **config):
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": S, "dtype": "float32"} | config))
    return folder


def with_config(weights, state, settings, folder):
    torch.save(state, folder / weights)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


PRISMA = {
    "d_in": D, "expansion_factor": 4, "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {},
    "normalize_activations": "none", "model_name": "open-clip:laion/CLIP-ViT-B-32", "hook_point_layer": 7, "layer_subtype": "hook_resid_post",
    "is_transcoder": False, "transcoder_with_skip_connection": True, "out_hook_point_layer": 9, "d_out": 768, "_device": "cuda",
    "_dtype": "torch.float32", "b_dec_init_method": "geometric_median", "initialization_method": "independent", "max_grad_norm": 1.0, "lp_norm": 1,
    "dead_feature_threshold": 1e-8, "num_workers": 16, "context_size": 50, "use_ghost_grads": True, "lr_warm_up_steps": 500, "verbose": True,
    "n_checkpoints": 10, "wandb_log_frequency": 10, "model_class_name": "HookedViT", "cached_activations_path": "a/b",
}  # fmt: skip


def prisma(folder, state=FOUR, **changes):
    settings = {key: value for key, value in (PRISMA | changes).items() if value != "left out"}
    return with_config("weights.pt", state, settings, folder)


def saev(folder, header, state=FOUR):
    with open(folder / "sae.pt", "wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    return folder / "sae.pt"


def schema(n, cls, **params):
    """A header of schemas 2 to 5; before them, nested settings were written plainly."""
    sparsity = {"coeff": 4e-4} if n < 5 else {"cls": "L1Sparsity", "params": {"coeff": 4e-4, "key": "l1-sparsity"}}
    activation = {"cls": cls, "params": {"sparsity": sparsity, ("kind" if n < 5 else "key"): "x", **params}}
    sizes = {"d_model": D, "d_sae": S, "reinit_blend": 0.8, "reinit_enc_dec_tranpose": True}
    return {"schema": n, "cfg": {**sizes, "remove_parallel_grads": True, "normalize_w_dec": True, "activation": activation}, "lib": "0.1"}


def sparsify(folder, state=None, **changes):
    state = state or {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "sae.safetensors")
    config = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K, "multi_topk": True, "d_in": D} | changes
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))
    return folder


def dictionary(folder, kind, state, io="out", **trainer):
    settings = {
        "trainer": {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-70m", **trainer},
        "buffer": {"d_submodule": D, "io": io},
    }
    return with_config("ae.pt", state, settings, folder)


GATED_DL = {"encoder.weight": W["W_enc"].T, "decoder.weight": W["W_dec"].T, "decoder_bias": W["b_dec"], "gate_bias": W["b_enc"]}
GATED_DL |= {"mag_bias": W["b_mag"], "r_mag": W["r_mag"]}
LATE = {"lr": 1e-4, "steps": 100, "seed": 0, "warmup_steps": 10, "submodule_name": None, "sparsity_warmup_steps": 5, "decay_start": None}
BATCH_DL = {"b_dec": W["b_dec"], "k": COUNT, "threshold": torch.tensor(1.5)}


def visaebench(folder, state=None, **settings):
    simple = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"], "decoder.bias": W["b_dec"]}
    return with_config("sae.pt", simple | (state or {}), {"input_dim": D, "hidden_dim": S, **settings}, folder)


FINAL = "encoder.final_block.0."
OVERCOMPLETE = {FINAL + "weight": W["W_enc"].T, FINAL + "bias": W["b_enc"], "dictionary.multiplier": torch.tensor(0.5)}
ROWS = {"dictionary._weights": W["W_dec"]}


def overcomplete(folder, state, **settings):
    return with_config("sae.pt", OVERCOMPLETE | state, settings, folder)


POINTS = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
MIXTURE = torch.rand(S, 30, generator=torch.Generator().manual_seed(2)) - 0.3  # before it is made row-stochastic
SHIFT = 0.2 * torch.randn(S, D, generator=torch.Generator().manual_seed(3))

OLD_SAELENS = {
    "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "hook_point_head_index": None, "normalize_activations": False,
    "activation_fn_kwargs": {}, "finetuning_scaling_factor": False, "l1_coefficient": 5, "prepend_bos": True, "model_name": "gpt2-small",
    "noise_scale": 0.1, "decoder_orthogonal_init": True, "normalize_sae_decoder": False, "dead_feature_threshold": 1e-8, "lr_end": 1e-5,
    "scale_sparsity_penalty_by_decoder_norm": True, "mse_loss_normalization": "dense_batch", "init_encoder_as_decoder_transpose": True,
    "act_store_device": "cpu", "n_eval_batches": 10, "use_ghost_grads": True, "seqpos_slice": [None], "jumprelu_init_threshold": 0.001,
}  # fmt: skip
READ = {
    # SAELens: version 6, and before it what its own defaulting makes of files that lack or rename entries (FAULTS B4)
    "saelens 6 encoder not centred": (lambda f: saelens(f, apply_b_dec_to_input=False), torch.relu(PLAIN)),
    "saelens 6 topk by norms": (
        lambda f: saelens(f, architecture="topk", k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False), top(PLAIN * NORMS)),
    "saelens 6 jumprelu": (  # as Gemma Scope's
        lambda f: saelens(f, FOUR | {"threshold": THRESHOLD}, architecture="jumprelu", apply_b_dec_to_input=False), above(PLAIN, THRESHOLD)),
    "saelens 6 gated": (lambda f: saelens(f, GATED, architecture="gated", apply_b_dec_to_input=False), gate(X)),
    "saelens 2 FAULTS B4": (lambda f: saelens(f, FOUR | {"scaling_factor": torch.ones(S)}, architecture=None, **OLD_SAELENS), torch.relu(CENTRED)),
    "saelens 3 FAULTS B4": (
        lambda f: saelens(f, activation_fn="topk", activation_fn_kwargs={"k": K}, normalize_activations=None, hook_name="blocks.8.hook_resid_pre"),
        top(CENTRED)),
    "saelens 5 FAULTS B4": (
        lambda f: saelens(f, activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations="none", sae_lens_version="5.10.5"),
        top(CENTRED)),
    "saelens 5 topk by its architecture": (
        lambda f: saelens(f, architecture="topk", activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations="none"), top(CENTRED)),
    "saelens 6 topk, k a float": (lambda f: saelens(f, architecture="topk", k=3.0, metadata={"sae_lens_version": "6.18.0"}), top(CENTRED)),
    "saelens 6 jumprelu with topk's norms": (  # which SAELens reads of topk alone
        lambda f: saelens(f, FOUR | {"threshold": THRESHOLD}, architecture="jumprelu", rescale_acts_by_decoder_norm=True), above(CENTRED, THRESHOLD)),
    # ViT-Prisma
    "prisma relu": (lambda f: prisma(f), torch.relu(CENTRED)),
    "prisma topk": (lambda f: prisma(f, activation_fn_str="topk", activation_fn_kwargs={"k": K}), top(CENTRED)),
    "prisma gated": (lambda f: prisma(f, GATED | {"b_enc": torch.ones(S)}, architecture="gated"), gate(X - W["b_dec"])),
    # saev: no version's loader of today subtracts b_dec (FAULTS B1)
    "saev before schemas FAULTS B1": (
        lambda f: saev(f, {"d_vit": D, "exp_factor": 4, "sparsity_coeff": 4e-4, "n_reinit_samples": 9, "ghost_grads": True, "seed": 1}), torch.relu(PLAIN)),
    "saev 1 TopK FAULTS B1": (lambda f: saev(f, {"schema": 1, "cls": "TopK", "cfg": {"d_model": D, "exp_factor": 4, "top_k": K}}), top(PLAIN)),
    "saev 1 Relu FAULTS B1": (lambda f: saev(f, {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D, "exp_factor": 4, "seed": 2}}), torch.relu(PLAIN)),
    "saev 1 BatchTopK FAULTS B1": (lambda f: saev(f, {"schema": 1, "cls": "BatchTopK", "cfg": {"d_model": D, "top_k": K}}), top(PLAIN)),
    "saev 1, later FAULTS B1": (lambda f: saev(f, schema(1, "TopK", top_k=K) | {"cls": "SparseAutoencoderConfig"}), top(PLAIN)),
    "saev 2 Relu": (lambda f: saev(f, schema(2, "Relu")), torch.relu(PLAIN)),
    "saev 3 TopK": (lambda f: saev(f, schema(3, "TopK", top_k=K)), top(PLAIN)),
    "saev 4 BatchTopK": (
        lambda f: saev(f, schema(4, "BatchTopK", top_k=K, momentum=0.1), FOUR | {"activation.threshold": torch.tensor(1.5)}), above(PLAIN, 1.5)),
    "saev 5 BatchTopK, new": (
        lambda f: saev(f, schema(5, "BatchTopK", top_k=K), FOUR | {"activation.threshold": torch.tensor(-0.5)}), torch.relu(PLAIN)),
    # sparsify
    "sparsify": (lambda f: sparsify(f, activation="topk", transcode=False, skip_connection=False), top(CENTRED)),
    "sparsify 2024": (lambda f: sparsify(f, signed=False, num_latents=S), top(CENTRED)),
    # dictionary_learning: where the decoder's norms count, and since when (FAULTS B3)
    "dictionary_learning AutoEncoder FAULTS B3": (
        lambda f: dictionary(f, "AutoEncoder", LINEAR | {"bias": W["b_dec"]}, **LATE, l1_penalty=0.1), torch.relu(CENTRED) * NORMS),
    "dictionary_learning AutoEncoderNew": (lambda f: dictionary(f, "AutoEncoderNew", LINEAR | {"decoder.bias": W["b_dec"]}), torch.relu(PLAIN)),
    "dictionary_learning JumpReLU FAULTS B3": (
        lambda f: dictionary(f, "JumpReluAutoEncoder", FOUR | {"threshold": THRESHOLD}, trainer_class="JumpReluTrainer", bandwidth=1e-3, **LATE),
        above(PLAIN, THRESHOLD)),
    "dictionary_learning JumpReLU 2024 FAULTS B3": (
        lambda f: dictionary(f, "JumpReluAutoEncoder", FOUR | {"threshold": THRESHOLD}, trainer_class="TrainerJumpRelu", lr=7e-5, steps=9),
        above(PLAIN, THRESHOLD) * NORMS),
    "dictionary_learning gated FAULTS B3": (
        lambda f: dictionary(f, "GatedAutoEncoder", GATED_DL, trainer_class="GatedSAETrainer", **LATE), gate(X - W["b_dec"])),
    "dictionary_learning gated 2024 FAULTS B3": (
        lambda f: dictionary(f, "GatedAutoEncoder", GATED_DL, trainer_class="GatedSAETrainer", warmup_steps=9), gate(X - W["b_dec"]) * NORMS),
    "dictionary_learning TopK": (
        lambda f: dictionary(f, "AutoEncoderTopK", LINEAR | BATCH_DL, k=K, threshold_beta=0.999, auxk_alpha=0.03, **LATE), top(CENTRED)),
    "dictionary_learning TopK 2024": (lambda f: dictionary(f, "AutoEncoderTopK", LINEAR | {"b_dec": W["b_dec"]}, k=K), top(CENTRED)),
    "dictionary_learning BatchTopK": (lambda f: dictionary(f, "BatchTopKSAE", LINEAR | BATCH_DL, top_k_aux=9), above(CENTRED, 1.5)),
    "dictionary_learning BatchTopK, new": (
        lambda f: dictionary(f, "BatchTopKSAE", LINEAR | BATCH_DL | {"threshold": torch.tensor(-1.0)}), torch.relu(CENTRED)),
    "dictionary_learning Matryoshka": (
        lambda f: dictionary(f, "MatryoshkaBatchTopKSAE", FOUR | BATCH_DL | {"group_sizes": torch.tensor([5, 5, 10])}, group_weights=[1, 1, 1]),
        above(CENTRED, 1.5)),
    "dictionary_learning Matroyshka, as it was spelt": (
        lambda f: dictionary(f, "MatroyshkaBatchTopKSAE", FOUR | BATCH_DL | {"group_sizes": torch.tensor([5, 15])}, weights_temperature=1.0),
        above(CENTRED, 1.5)),
    # VISAEBench, and overcomplete's own tensors: at least the threshold, and no bias is subtracted
    "visaebench topk": (lambda f: visaebench(f, activation="topk", k=K, expansion_factor=4, backbone="clip_vitb16"), top(PLAIN)),
    "visaebench batchtopk": (lambda f: visaebench(f, sae_type="BatchTopK", k=K, threshold=1.5, fvu=0.2), above(PLAIN, 1.5)),
    "visaebench batchtopk, k of a whole batch": (lambda f: visaebench(f, activation="batchtopk", top_k=4096, threshold=1.5), above(PLAIN, 1.5)),
    "visaebench batchtopk at a latent": (  # that equals the threshold
        lambda f: visaebench(f, {"encoder.bias": W["b_enc"]}, activation="batchtopk", threshold=float(PLAIN[0].max())),
        torch.where(PLAIN >= PLAIN[0].max(), PLAIN, 0)),
    "visaebench running threshold": (
        lambda f: visaebench(f, {"_running_threshold": torch.tensor(1.5)}, activation="batchtopk", k=K, threshold=None), above(PLAIN, 1.5)),
    "visaebench jumprelu": (lambda f: visaebench(f, {"jump_thresholds": THRESHOLD}, architecture="jumprelu"), above(PLAIN, THRESHOLD)),
    "visaebench jumprelu by its default": (lambda f: visaebench(f, activation="jumprelu"), above(PLAIN, 0.01)),
    "overcomplete topk": (lambda f: overcomplete(f, ROWS, activation="topk", k=K), top(PLAIN)),
    "overcomplete jumprelu": (lambda f: overcomplete(f, ROWS | {"thresholds": THRESHOLD.log(), "bandwidth": torch.tensor(1e-3)}, activation="jumprelu"),
                              above(PLAIN, THRESHOLD)),
    "overcomplete archetypal": (
        lambda f: overcomplete(f, {"dictionary.W": MIXTURE, "dictionary.C": POINTS, "dictionary.Relax": SHIFT}, activation="topk", top_k=K), top(PLAIN)),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_files_give_the_latents_of_their_program(tmp_path, case):
    """FAULTS B1, B3, B4, and each version of each program that is read."""
    write, expected = READ[case]
    found = (sae := load_sae(write(tmp_path))).encode(X)
    if "at a latent" in case:  # rounding decides on equality: elsewhere nothing may differ
        found, expected = (torch.where((latents - PLAIN[0].max()).abs() < 1e-5, 0, latents) for latents in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert not sae.training and (expected.count_nonzero() > 100 or "at a latent" in case)
    rows, bias = W["W_dec"], W["b_dec"]
    if case.startswith("overcomplete"):
        rows, bias = rows * torch.tensor(0.5).exp(), torch.zeros(D)
    if "archetypal" in case:
        mixture = torch.relu(MIXTURE)
        rows = (mixture / mixture.sum(1, keepdim=True) @ POINTS + SHIFT) * torch.tensor(0.5).exp()
    if "2024" in case and "sparsify" not in case and "TopK" not in case or "AutoEncoder FAULTS" in case or "by norms" in case:
        rows = rows / NORMS[:, None]
    torch.testing.assert_close(sae(X).reconstruction, sae.encode(X) @ rows + bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", ["cfg", "config"])
@pytest.mark.parametrize("pickled", [True, False])
def test_official_patchsae(tmp_path, elsewhere, key, pickled):
    settings = {
        "d_in": D, "expansion_factor": 4, "model_name": "openai/clip-vit-base-patch16", "block_layer": -2, "module_name": "resid",
        "dtype": torch.float32, "device": torch.device("cuda:0"), "l1_coefficient": 8e-5, "dataset_path": "evanarlian/imagenet_1k_resized_256",
        "class_token": False, "gated_sae": False, "custom_clip_ckpt_path": None, "image_key": "image", "use_cached_activations": False,
        "max_batch_size_for_vit_forward_pass": 1024, "b_dec_init_method": "geometric_median", "feature_sampling_method": "anthropic",
        "dead_feature_threshold": 1e-8, "mse_cls_coefficient": 1.0, "n_checkpoints": 3, "run_name": "x", "total_training_tokens": 9,
    }  # fmt: skip
    if pickled:
        settings = elsewhere("src.sae_training.config", "ViTSAERunnerConfig", **settings)
    torch.save({key: settings, "state_dict": torch.nn.ParameterDict(FOUR).state_dict()}, tmp_path / "sae.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]
    for path in (tmp_path / "sae.pt", tmp_path):
        sae = load_sae(path)
        torch.testing.assert_close(sae.encode(X), torch.relu(CENTRED), rtol=0, atol=1e-5)
    assert sae.metadata["model_name"] == "ViT-B-16-quickgelu" and sae.metadata["pretrained"] == "openai"
    assert sae.metadata["layer"] == 10 and sae.metadata["l1_coefficient"] == 8e-5 and sae.metadata["tokens"] == "all"
    assert sae.metadata["converted_from"] == "patchsae"
    with pytest.raises(ValueError, match=r"of 'ViT-B-16-quickgelu', layer 10; this store holds .*'openmoji', layer 4"):
        sae.check_store(SimpleNamespace(d_in=D, metadata=SimpleNamespace(model_name="openmoji", layer=4)))


@pytest.fixture
def elsewhere(monkeypatch):
    """Classes of another package, which is there while a file is written, and gone when it is read."""

    def make(module, name, **attributes):
        for i in range(module.count(".") + 1):
            package = ".".join(module.split(".")[: i + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, type(name, (), {"__module__": module}))
        thing = getattr(sys.modules[module], name)()
        thing.__dict__.update(attributes)
        return thing

    return make


def test_early_vit_prisma(tmp_path, elsewhere):
    settings = elsewhere("vit_prisma.sae.config", "VisionModelSAERunnerConfig", **PRISMA)
    torch.save({"cfg": settings, "state_dict": FOUR}, tmp_path / "n_images_520028.pt")
    sae = load_sae(tmp_path / "n_images_520028.pt")
    torch.testing.assert_close(sae.encode(X), torch.relu(CENTRED), rtol=0, atol=1e-5)
    assert sae.metadata["converted_from"] == "prisma" and sae.metadata["layer"] == 7


def patchsae(folder, state=FOUR, **settings):
    torch.save({"cfg": {"d_in": D, "model_name": "m", **settings}, "state_dict": state}, folder / "sae.pt")
    return folder


REFUSED = [
    (saelens, {"normalize_activations": "layer_norm"}, "says normalize_activations='layer_norm'; only 'none' is read"),
    (saelens, {"normalize_activations": "constant_norm_rescale"}, "normalize_activations='constant_norm_rescale'"),
    (saelens, {"normalize_activations": True}, "normalize_activations='expected_average_only_in'"),
    (saelens, {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    (saelens, {"hook_name": "blocks.3.attn.hook_z"}, "reshape_activations='hook_z'"),
    (saelens, {"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
    (saelens, {"activation_fn": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
    (saelens, {"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True; .*would give wrong latents"),
    (saelens, {"state": FOUR | {"scaling_factor": THRESHOLD}}, "scaling_factor other than 1"),
    (saelens, {"architecture": "skip_transcoder"}, "architecture 'skip_transcoder'. Valid: standard, topk, jumprelu, gated"),
    (saelens, {"architecture": "matryoshka_batchtopk"}, "states of training"),
    (saelens, {"architecture": "abstopk", "k": 3}, "architecture 'abstopk'"),
    (saelens, {"input_shift": 3.0}, "says input_shift=3.0, a setting that is not known"),
    (saelens, {"apply_b_dec_to_input": None}, "says apply_b_dec_to_input=None; only True or False is read"),
    (patchsae, {"gated_sae": True}, "says gated_sae=True; only False is read: any other decides by a gate"),
    (patchsae, {"module_name": "mlp"}, "module_name='mlp'"),
    (patchsae, {"custom_clip_ckpt_path": "maple.pt"}, "custom_clip_ckpt_path='maple.pt'.*adapted CLIP"),
    (patchsae, {"state": FOUR | {"r_mag": THRESHOLD}}, "holds the weights r_mag"),
    (patchsae, {"state": FOUR | {"scale": 2.0}}, "holds the weights scale"),
    (patchsae, {"input_scale": torch.tensor(2.0)}, r"says input_scale=tensor\(2.\), a setting that is not known"),
    (patchsae, {"d_sae": 99}, "holds an SAE 6 -> 20; its settings, in sae.pt, say d_sae=99. The two don't belong together"),
    (prisma, {"normalize_activations": "layer_norm"}, "says normalize_activations='layer_norm'; only 'none' is read"),
    (prisma, {"is_transcoder": True}, "is_transcoder=True"),
    (prisma, {"architecture": "jumprelu"}, "architecture 'jumprelu' with 'relu'. Valid: standard or gated, relu or topk"),
    (prisma, {"activation_fn_str": "tanh-relu"}, "Valid: standard or gated, relu or topk"),
    (prisma, {"activation_fn_str": "topk"}, "needs k between 1 and d_sae=20, got k=None"),
    (prisma, {"normalize_activations": "left out"}, "layer_norm"),  # that program's default, of all versions
    (prisma, {"activation_fn_str": "left out"}, "with None"),  # its default has changed between versions
    (prisma, {"state": GATED, "architecture": "gated", "activation_fn_str": "topk"}, "'gated' with 'topk'.*largest magnitudes"),
    (prisma, {"state": GATED | {"b_enc": W["b_enc"]}, "architecture": "left out"}, "holds the weights b_gate, b_mag, r_mag"),
    (saev, {"header": schema(6, "TopK")}, "schema=6"),
    (saev, {"header": schema(5, "Sigmoid")}, "activation 'Sigmoid'. Valid: Relu, TopK, BatchTopK"),
    (saev, {"header": {"schema": 4, "cfg": {"d_model": D}}}, "activation None"),
    (saev, {"header": schema(5, "Relu"), "state": FOUR | {"W_skip": W["W_dec"]}}, "holds the weights W_skip"),
    (sparsify, {"num_latents": 99}, "in cfg.json, say num_latents=99"),
    (sparsify, {"signed": True}, "says signed=True; .*changes which latents are active"),
    (sparsify, {"activation": "groupmax"}, "says activation='groupmax'"),
    (sparsify, {"transcode": True}, "says transcode=True"),
    (sparsify, {"skip_connection": True}, "says skip_connection=True"),
    (sparsify, {"k": "left out"}, "k between 1 and d_sae=20, got k=32"),  # its default
    (dictionary, {"kind": "JumpReluAutoEncoder", "state": FOUR | {"threshold": THRESHOLD}, "io": "in_and_out"}, "says io='in_and_out'; only 'out'"),
    (dictionary, {"kind": "CrossCoder", "state": FOUR}, "dict_class='CrossCoder'. Valid: AutoEncoder, .*JumpReluAutoEncoder"),
    (dictionary, {"kind": "AutoEncoderTopK", "state": LINEAR | BATCH_DL, "k": 9}, "keeps k=3 latents, its config.json k=9"),
    (dictionary, {"kind": "BatchTopKSAE", "state": LINEAR | {"b_dec": W["b_dec"], "k": COUNT}}, "lacks the weights threshold"),
    (visaebench, {"activation": "relu"}, "activation 'relu'. Valid: topk, batchtopk, jumprelu"),
    (visaebench, {"activation": "topk"}, "needs k between"),
    (visaebench, {"activation": "topk", "k": K, "encoder_module": "mlp_ln_1"}, "encoder_module='mlp_ln_1'"),
    (visaebench, {"activation": "topk", "k": K, "normalize_input": True}, "normalize_input=True"),
    (visaebench, {"activation": "topk", "k": K, "standardize": True}, "standardize=True"),
    (overcomplete, {"activation": "topk", "k": K, "state": ROWS | {"encoder.final_block.1.weight": THRESHOLD}}, "weights encoder.final_block.1.weight"),
    (overcomplete, {"activation": "topk", "k": K, "state": ROWS | {"encoder.mlp_blocks.0.0.weight": W["W_enc"]}}, "encoder.mlp_blocks.0.0.weight"),
    (prisma, {"state": {name: W[name] for name in ("W_enc", "W_dec", "b_dec")}}, r"lacks the weights b_enc; it holds .*'W_dec': \(20, 6\)"),
    (prisma, {"state": FOUR | {"W_enc": W["W_enc"][0]}}, r"holds no matrix W_enc \[d_in, d_sae\]; it holds .*'W_enc': \(20,\)"),
    (prisma, {"state": FOUR | {"W_dec": W["W_dec"].T}}, "an SAE of activation 'relu' has"),
    (prisma, {"state": FOUR | {"b_dec": torch.full((D,), torch.nan)}}, "b_dec holds NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize("write, changes, message", REFUSED, ids=[f"{write.__name__} {message[:40]}" for write, _, message in REFUSED])
def test_what_would_give_wrong_latents_is_refused_by_name(tmp_path, write, changes, message):
    """FAULTS B2, B7 and their kind."""
    with pytest.raises(ValueError, match=message):
        load_sae(write(tmp_path, **changes))


def test_places_and_tokens_are_kept(tmp_path):
    """FAULTS B7: an SAE of CLS tokens, or of another place than a block's output."""
    kept = {
        (("cls_token_only", True), ("use_patches_only", False)): ("tokens", "cls"),
        (("cls_token_only", False), ("use_patches_only", True)): ("tokens", "patches"),
        (("layer_subtype", "hook_resid_pre"),): ("layer", 6),
        (("layer_subtype", "hook_mlp_out"),): ("hook_name", "blocks.7.hook_mlp_out"),
        (("layer_subtype", "hook_resid_pre"), ("hook_point_layer", 0)): ("hook_name", "blocks.0.hook_resid_pre"),
        (("hook_point_head_index", 3),): ("hook_name", "blocks.7.hook_resid_post.3"),
        (("layer_subtype", "left out"),): ("layer", None),
    }
    for changes, (name, value) in kept.items():
        assert load_sae(prisma(tmp_path, **dict(changes))).metadata.get(name) == value
    cls = load_sae(prisma(tmp_path, cls_token_only=True))
    with pytest.raises(ValueError, match="tokens cls; this store holds .*tokens patches"):
        cls.check_store(SimpleNamespace(d_in=D, metadata=SimpleNamespace(tokens="patches")))
    (tmp_path / "bench").mkdir()
    bench = load_sae(visaebench(tmp_path / "bench", activation="topk", k=K, backbone="clip_vitb16", layer=11)).metadata
    assert (bench["model_name"], bench["layer"], bench["tokens"]) == ("ViT-B-16-quickgelu", 11, "patches")
    old = load_sae(saelens(tmp_path, **OLD_SAELENS)).metadata
    assert (old["layer"], old["model_name"], old["hook_name"]) == (7, "gpt2-small", "blocks.8.hook_resid_pre")


@pytest.mark.parametrize("hook", [
    "blocks.3.hook_resid_post", "blocks.4.hook_resid_pre", "vision_model.encoder.layers.3", "blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "tokens",
])  # fmt: skip
def test_an_sae_of_another_place_does_not_fit_a_blocks_output(tmp_path, hook):
    """FAULTS B7, C8: widths agree, so nothing else would notice; through Prisma's form, too."""
    sae = load_sae(saelens(tmp_path, metadata={"sae_lens_version": "6.18.0", "hook_name": hook, "model_name": "ViT-B-16"}))
    store = SimpleNamespace(d_in=D, metadata=SimpleNamespace(layer=3, model_name="ViT-B-16"))
    if sae.metadata.get("layer") is not None:
        return sae.check_store(store)
    for each in (sae, load_sae(save_sae(sae, tmp_path / "prisma", format="prisma"))) if "." in hook else (sae,):
        with pytest.raises(ValueError, match=f"The SAE reads '{hook}'; this store is the output of a block of 'ViT-B-16', layer 3"):
            each.check_store(store)


def test_places_that_other_programs_name(tmp_path):
    for folder, layer, hook in (("layers.3", 3, None), ("layers.3.mlp", None, "blocks.3.mlp"), ("mine", None, None)):
        (tmp_path / folder).mkdir()
        metadata = load_sae(sparsify(tmp_path / folder)).metadata
        assert (metadata.get("layer"), metadata.get("hook_name")) == (layer, hook)
    state = LINEAR | {"decoder.bias": W["b_dec"]}
    for submodule, layer in (("resid_post_layer_8", 8), ("", 8), ("mlp_out_layer_8", None), ("resid_pre_layer_8", None)):
        assert load_sae(dictionary(tmp_path, "AutoEncoderNew", state, submodule_name=submodule)).metadata.get("layer") == layer


def test_a_folder_of_two_saes_says_which_is_opened(tmp_path):
    prisma(saelens(tmp_path))
    with pytest.warns(UserWarning, match=r"several programs, sae_weights.safetensors, weights.pt; the first is opened"):
        load_sae(tmp_path)
    assert load_sae(tmp_path / "weights.pt").metadata["converted_from"] == "prisma"


def test_where_writing_fails_an_older_sae_stays_whole(tmp_path, monkeypatch):
    sae = load_sae(save_sae(trained({}), tmp_path, format="prisma"))
    monkeypatch.setattr("patchsae_utils.sae.formats.write_json", lambda *_: json.loads("no space left"))
    with pytest.raises(ValueError, match="Expecting value"):
        save_sae(trained(VARIANTS[1]), tmp_path, format="prisma")
    assert load_sae(tmp_path).fingerprint == sae.fingerprint and len([*tmp_path.iterdir()]) == 2


def test_yaml_and_other_names_of_visaebenchs_files(tmp_path):
    visaebench(tmp_path, activation="topk", k=K)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text(f"activation: topk\nk: {K}\nthreshold: null\n")
    state = torch.load(tmp_path / "sae.pt")
    for path in (tmp_path, tmp_path / "sae.pt", tmp_path / "config.yaml"):
        torch.testing.assert_close(load_sae(path).encode(X), top(PLAIN), rtol=0, atol=1e-5)
    (tmp_path / "sae.pt").unlink()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_sae(tmp_path).encode(X), top(PLAIN), rtol=0, atol=1e-5)
    (tmp_path / "config.yaml").write_text("activation: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_sae(tmp_path)


def test_a_shift_longer_than_delta_is_cut(tmp_path):
    """RA-SAE: D = exp(m) (W C + Relax) with rows of Relax no longer than delta."""
    state = {"dictionary.W": torch.eye(S, 30), "dictionary.C": POINTS, "dictionary.Relax": SHIFT}
    sae = load_sae(overcomplete(tmp_path, state, activation="topk", k=K, delta=0.1))
    rows = POINTS[:S] + 0.1 * SHIFT / SHIFT.norm(dim=1, keepdim=True).clamp(min=0.1)
    torch.testing.assert_close(sae.W_dec.detach(), rows * torch.tensor(0.5).exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [*FORMATS, "overcomplete"])
@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_what_is_written_gives_the_same_latents(tmp_path, form, options):
    """Rows that are not at unit norm stay as they are."""
    sae = trained(options).eval()
    sae.W_dec.data.mul_(torch.linspace(0.5, 2, S)[:, None])
    if sae.activation not in FORMATS["visaebench" if form == "overcomplete" else form].activations:
        with pytest.raises(ValueError, match=rf"can't say activation='{sae.activation}'.* For this SAE: saelens"):
            save_sae(sae, tmp_path / "sae", format=form)
        assert not (tmp_path / "sae").exists()
        return
    path = save_sae(sae, tmp_path / "an SAE é", format=form)
    loaded = load_sae(path)
    torch.testing.assert_close(loaded.encode(TOKENS), sae.encode(TOKENS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(TOKENS).reconstruction, sae(TOKENS).reconstruction, rtol=0, atol=1e-4)
    kept = METADATA if form != "prisma" else {name: METADATA[name] for name in ("model_name", "layer", "tokens")}
    assert loaded.metadata.items() >= kept.items()
    if form not in ("saelens", "saev") or sae.activation != "matryoshka":
        assert (loaded.activation, loaded.k) == (sae.activation, sae.k)
    assert not [file for file in path.parent.rglob(".*")], "no temporary file is left"


def test_files_have_the_names_that_the_programs_look_for(tmp_path):
    sae, few = trained({}), trained(VARIANTS[1])
    assert save_sae(sae, tmp_path / "a", format="patchsae") == tmp_path / "a" / "sae.pt"
    assert save_sae(sae, tmp_path / "b" / "mine.pt", format="saev") == tmp_path / "b" / "mine.pt"
    for form, names in {"prisma": ["config.json", "weights.pt"], "dictionary_learning": ["ae.pt", "config.json"]}.items():
        assert sorted(path.name for path in save_sae(sae, tmp_path / form, format=form).iterdir()) == names
    folder = save_sae(few, tmp_path / "sparsify", format="sparsify")
    assert sorted(load_file(folder / "sae.safetensors")) == ["W_dec", "b_dec", "encoder.bias", "encoder.weight"]
    content = torch.load(tmp_path / "a" / "sae.pt", weights_only=True)
    assert sorted(content["state_dict"]) == ["W_dec", "W_enc", "b_dec", "b_enc"] and content["cfg"]["block_layer"] == 4
    content = torch.load(save_sae(few, tmp_path / "v", format="visaebench") / "sae.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in content.items()} == {
        "encoder.weight": (S, D), "encoder.bias": (S,), "decoder.weight": (S, D), "decoder.bias": (D,),
    }  # fmt: skip
    with pytest.raises(ValueError, match="Unknown format 'onnx'. Valid: saelens, patchsae, prisma"):
        save_sae(sae, tmp_path / "c", format="onnx")


def test_weights_without_a_word_on_their_use_are_refused(tmp_path):
    for content, what in ((FOUR, "tensors .*W_enc.*nothing that says how to use it.*config"), ([1, 2], "a list, and nothing that says")):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=f"holds {what}"):
            load_sae(tmp_path / "weights.pt")
    (tmp_path / "sae.pt").write_bytes(b'{"schema": 5}\nrest')
    with pytest.raises(ValueError, match="no header of saev"):
        load_sae(tmp_path / "sae.pt")


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
