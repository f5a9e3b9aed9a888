"""SAEs on disk, in the forms of seven programs: one table, read both ways, on plain tensors; ``docs/formats.md`` has all of it.

What is neither read, nor allowed, nor harmless is refused by name. ``saelens`` is also ours: its folder alone keeps everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...run.artifacts import atomic_file, file_sha256, write_json
from ..variants import VARIANTS
from . import programs
from .weights import Allowed, Weights


class Format(NamedTuple):
    """One program's files."""

    config: str | None  # file with the settings; None where they lie with the weights in one file
    weights: str
    activations: tuple[str, ...]  # what it has a word for
    read: Callable[[dict[str, Any], Mapping[str, Any], Path], Weights]  # (settings, tensors by its names, file to name in errors)
    write: Callable[[Weights], tuple[dict[str, Any], dict[str, Tensor]]]
    reads: str  # settings that the reader uses, and ours
    allowed: Mapping[str, Allowed]
    harmless: str = ""  # pattern of settings that say nothing about the equation, beside those of training and data
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict  # the settings as today's version of the program completes them
    documented: bool = True  # whether all settings that it writes are known; else names that don't touch the equation are passed over


_SCALES = "scales or shifts each token before the encoder, which our equations can't say"
_OTHER_PLACE = "reads another place than the residual stream"
_TRANSCODER = "predicts something else than its input"
_NO_SKIP = Allowed((False, None), "adds a linear path around the latents")

FORMATS = {
    "saelens": Format(
        "cfg.json", "sae_weights.safetensors", tuple(VARIANTS), programs.read_saelens, programs.write_saelens,
        "architecture d_in d_sae k metadata",
        {
            **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"), Allowed((True, False), "is no answer")),
            "normalize_activations": Allowed(("none",), _SCALES), "reshape_activations": Allowed(("none",), _OTHER_PLACE),
            "finetuning_scaling_factor": Allowed((False, None), "scales latents before they are decoded"),
            "activation_fn_str": Allowed(("relu", None), "is another function than relu"),
            "activation_fn": Allowed(("relu", None), "is another function than relu"),
        },
        "activation_fn_kwargs|hook_.*|dead_feature_threshold|normalize_sae_decoder|mse_loss_normalization|noise_scale|prepend_bos|expansion_factor|"
        "(decoder|init_encoder)_.*(init|transpose).*|scale_sparsity_.*|.*cached_activations.*|log_activations.*|jumprelu_.*|.*_path|"
        "lp_norm|begin_sequence_token|feature_probability|exclude_special_tokens|use_ghost_grads|use_sparse_activations|n_(?!layers).*",
        programs.saelens_defaults,
    ),
    "patchsae": Format(
        None, "sae.pt", ("relu",), programs.read_patchsae, programs.write_patchsae, "d_in d_sae expansion_factor model_name block_layer class_token patchsae",
        {
            "gated_sae": Allowed((False, None), "decides by a gate which latents are active"),
            "module_name": Allowed(("resid", None), _OTHER_PLACE),
            "custom_clip_ckpt_path": Allowed((None, ""), "reads the tokens of an adapted CLIP"),
        },
        "image_(key|width|height)|label_.*|.*cached_activations.*|n_(?!layers).*|max_.*|create_.*|b_dec_init_method|feature_.*|dead_.*|log_to_.*|from_pretrained_path|use_ghost_grads|"
        "hook_point.*|unique_id",
    ),
    "prisma": Format(
        "config.json", "weights.pt", ("relu", "topk", "gated"), programs.read_prisma, programs.write_prisma,
        "architecture d_in d_sae expansion_factor activation_fn_str activation_fn_kwargs model_name hook_point_layer layer_subtype hook_point_head_index "
        "cls_token_only use_patches_only",
        {"normalize_activations": Allowed(("none", None), _SCALES), "is_transcoder": Allowed((False, None), _TRANSCODER)},
        "model_.*|vit_model_cfg|.*cached_activations.*|image_size|transcoder_with_skip_connection|out_hook_.*|layer_out_subtype|d_out|hook_point|"
        "b_dec_init_method|from_pretrained_path|max_grad_norm|lp_norm|dead_.*|n_(?!layers).*|min_.*|return_out_only|is_training|_custom_.*|total_.*|use_ghost_grads|"
        "context_size",
        lambda settings: {"normalize_activations": "layer_norm", **settings},
    ),
    "saev": Format(
        None, "sae.pt", ("relu", "topk", "batchtopk", "matryoshka"), programs.read_saev, programs.write_saev,
        "activation top_k d_model d_vit d_sae exp_factor patchsae",
        {"schema": Allowed((5, 4, 3, 2, 1), "was written by a version of saev that is not known here")},
        "normalize_w_dec|reinit_.*|remove_parallel_grads|n_reinit_samples|n_prefixes|ghost_grads|use_ghost_grads|key",
        programs.saev_defaults,
    ),
    "sparsify": Format(
        "cfg.json", "sae.safetensors", ("topk",), programs.read_sparsify, programs.write_sparsify, "k d_in num_latents expansion_factor patchsae",
        {
            "activation": Allowed(("topk",), "keeps other latents than the k largest"), "transcode": Allowed((False, None), _TRANSCODER),
            "skip_connection": _NO_SKIP, "signed": Allowed((False, None), "changes which latents are active: the k largest by absolute value"),
        },
        "normalize_decoder|multi_topk",
        lambda settings: {"k": 32, **settings},
    ),
    "dictionary_learning": Format(
        "config.json", "ae.pt", tuple(VARIANTS), programs.read_dictionary_learning, programs.write_dictionary_learning,
        "dict_class k layer lm_name submodule_name activation_dim dict_size patchsae",
        {"io": Allowed(("out", None), "reads what enters a submodule, or predicts what leaves it")},
        "trainer_class|threshold_(beta|start_step)|group_.*|top_k_aux|p_.*|n_sparsity_updates|target_l0|anneal_.*|initial_.*|.*_penalty|weights_temperature",
        programs.dictionary_learning_defaults,
    ),
    "visaebench": Format(
        "config.json", "sae.pt", ("topk", "batchtopk", "jumprelu"), programs.read_visaebench, programs.write_visaebench,
        "activation input_dim hidden_dim k threshold delta model_name backbone backbone_name layer patchsae",
        {
            "encoder_module": Allowed(("linear", None), "puts layers before the encoder's matrix"),
            "hidden_activation": Allowed((None, "relu"), "puts layers before the encoder's matrix"),
            "normalization": Allowed((None, "none", "identity", "l2", "max_l2", "l1", "max_l1"), "is none of the decoder's rows"),
        },
        "top_k|dictionary_params|use_multiplier|kernel|threshold_momentum|input_shape",
        programs.visaebench_defaults, documented=False,
    ),
}  # fmt: skip
ALIASES = {"overcomplete": "visaebench"}


def write(weights: Weights, path: Path, form: str) -> Path:
    """Write an SAE's files under temporary names first; returns what :func:`read` opens, the folder or the file."""
    form = ALIASES.get(form, form)
    if form not in FORMATS:
        raise ValueError(f"Unknown format {form!r}. Valid: {', '.join(FORMATS)}.")
    this = FORMATS[form]
    if weights.activation not in this.activations:
        fitting = ", ".join(name for name, each in FORMATS.items() if weights.activation in each.activations)
        what = f"The format {form!r} can't say activation={weights.activation!r}; it knows {', '.join(this.activations)}."
        raise ValueError(f"{what} For this SAE: {fitting}.")
    if weights.statistics.get("token_norm") and form != "saelens":
        what = f"This SAE brings each token to one length before it encodes it, which the format {form!r} can't say; our own folder can."
        raise ValueError(f"{what} Or train it with normalize='mean_and_norm', or as topk, whose weights say it by themselves.")
    settings, tensors = this.write(weights)
    file = path if this.config is None and path.suffix == ".pt" else path / this.weights
    with atomic_file(file) as temporary:
        if file.suffix == ".safetensors":
            save_file(tensors, temporary)
        else:
            with temporary.open("wb") as opened:
                opened.write((json.dumps(settings) + "\n").encode() if form == "saev" else b"")
                torch.save({"cfg": settings, "state_dict": tensors} if form == "patchsae" else tensors, opened)
        if form == "saelens":
            settings["metadata"]["weights_sha256"] = file_sha256(temporary)
        if this.config is not None:
            write_json(path / this.config, settings)  # before the weights are in place: where it fails, both stay as they were
    return file if this.config is None else path
