"""Adapters: MaPLe is MaPLe, prompts never reach tokens, nothing loads that does not fit."""

import builtins
import contextlib
import dataclasses
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae_utils.adaptation import fit
from patchsae_utils.adaptation.fit import ADAPTERS, RECIPES, fit_adapter, fresh_adapter, load_adapter, random_crops, save_adapter
from patchsae_utils.adaptation.models import FineTuned, LinearHead
from patchsae_utils.adaptation.prompts import CoOp, MaPLe, VisualPrompt
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.config import AdapterConfig
from patchsae_utils.data import load_dataset
from patchsae_utils.run import artifacts

NAMES = ["hammer", "french_horn", "accordion"]
KINDS = list(ADAPTERS)
CONFIG = AdapterConfig(tasks=("openmoji/tools",), n_shots=1, epochs=2, batch_size=6, depth=2)


@pytest.fixture(scope="module")
def maple(tiny_clip):
    return MaPLe(tiny_clip, n_ctx=2, depth=2, seed=3)


@pytest.fixture(scope="module")
def few():
    return load_dataset("openmoji/tools", "train", n_images=18, half="base")


def attention_block(block, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One pre-norm transformer block from its weights: [T, d] -> [T, d]."""
    n_heads, d = block.attn.num_heads, x.shape[1]
    y = F.layer_norm(x, (d,), block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
    q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
    heads = []
    for h in range(n_heads):
        part = slice(h * d // n_heads, (h + 1) * d // n_heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d // n_heads)
        heads.append((scores if mask is None else scores + mask).softmax(-1) @ v[:, part])
    x = x + torch.cat(heads, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    y = F.layer_norm(x, (d,), block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
    y = block.mlp.gelu(y @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    return x + y @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def reference_image(model, prompts: dict[str, Tensor], image: Tensor, depth: int) -> Tensor:
    """Image features of one image, by the description in the MaPLe paper."""
    v = model.visual
    n_ctx, patch = len(prompts["ctx"]), v.patch_size[0]
    patches = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    x = torch.cat([v.class_embedding[None], patches @ v.conv1.weight.flatten(1).T]) + v.positional_embedding
    x = torch.cat([x, prompts["ctx"] @ prompts["proj.weight"].T + prompts["proj.bias"]])
    x = F.layer_norm(x, x.shape[1:], v.ln_pre.weight, v.ln_pre.bias, v.ln_pre.eps)
    for i, block in enumerate(v.transformer.resblocks):
        if 1 <= i < depth:
            deep, name = prompts[f"compound_prompts_text.{i - 1}"], f"compound_prompt_projections.{i - 1}"
            x = torch.cat([x[:-n_ctx], deep @ prompts[f"{name}.weight"].T + prompts[f"{name}.bias"]])
        x = attention_block(block, x)
    return F.layer_norm(x[0], x.shape[1:], v.ln_post.weight, v.ln_post.bias, v.ln_post.eps) @ v.proj


def reference_text(model, prompts: dict[str, Tensor], tokens: Tensor, depth: int) -> Tensor:
    """Unit text feature of one prompt, likewise."""
    n_ctx = len(prompts["ctx"])
    x = model.token_embedding.weight[tokens]
    x = torch.cat([x[:1], prompts["ctx"], x[1 + n_ctx :]]) + model.positional_embedding
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for i, block in enumerate(model.transformer.resblocks):
        if 1 <= i < depth:
            x = torch.cat([x[:1], prompts[f"compound_prompts_text.{i - 1}"], x[1 + n_ctx :]])
        x = attention_block(block, x, mask)
    x = F.layer_norm(x[tokens.argmax()], x.shape[1:], model.ln_final.weight, model.ln_final.bias, model.ln_final.eps)
    return F.normalize(x @ model.text_projection, dim=-1)


def assert_is_maple(adapted: MaPLe, images: Tensor) -> None:
    prompts = adapted.learned.state_dict()
    with torch.no_grad():
        expected = torch.stack([reference_image(adapted.model, prompts, image, adapted.depth) for image in images])
        torch.testing.assert_close(adapted.encode_image(images), expected, rtol=0, atol=1e-5)
        expected = torch.stack([reference_text(adapted.model, prompts, tokens, adapted.depth) for tokens in adapted.class_tokens(NAMES)])
        torch.testing.assert_close(adapted.zero_shot_head(NAMES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n_ctx", [1, 2, 4])
def test_maple_is_what_the_paper_describes(tiny_clip, tiny_images, n_ctx, depth):
    adapted = MaPLe(tiny_clip, n_ctx=n_ctx, depth=depth, seed=n_ctx)
    for parameter in adapted.learned.parameters():
        parameter.mul_(5)  # the initial ones are small
    assert_is_maple(adapted, tiny_images[:2])


@pytest.fixture(scope="module")
def vit_b_16():
    """Random weights: the size is what matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    return ClipModel(model, preprocess=None, tokenizer=open_clip.get_tokenizer("ViT-B-16-quickgelu"), name="ViT-B-16-quickgelu")


def test_on_vit_b_16_maple_has_the_papers_size_and_the_papers_forward_pass(vit_b_16):
    adapted = MaPLe(vit_b_16)
    assert (adapted.depth, adapted.n_ctx, adapted.n_parameters) == (9, 2, 3_555_072)
    assert_is_maple(adapted, torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))


def moved(adapted):
    """An adapter whose learned weights are far from where they start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.learned.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def loud(kind: str, clip: ClipModel):
    return moved(fresh_adapter(kind, clip, CONFIG, NAMES, ["a {}."], seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_finish_takes_up_where_run_to_stopped_and_only_what_an_adapter_may_change_changes(tiny_clip, tiny_images, kind):
    adapted = loud(kind, tiny_clip)
    expected = adapted.encode_image(tiny_images)
    for layer in range(-3, 3):
        torch.testing.assert_close(adapted.finish(adapted.run_to(tiny_images, layer), layer), expected, rtol=0, atol=1e-5)
    moved = (adapted.encode_image(tiny_images) - tiny_clip.encode_image(tiny_images)).abs().max()
    assert adapted.changes_images == (kind not in ("coop", "linear")) == (moved > 1e-3)
    moved = (adapted.zero_shot_head(NAMES, ["a {}."]) - tiny_clip.zero_shot_head(NAMES, ["a {}."])).abs().max()
    assert (kind in ("maple", "coop", "linear")) == (moved > 1e-3)


@pytest.mark.parametrize("kind", ["coop", "lora", "finetune", "linear"])
def test_before_its_first_step_it_is_clip(tiny_clip, tiny_images, kind):
    names, templates = ["hammer", "accordion"], [CONFIG.template]
    adapted = fresh_adapter(kind, tiny_clip, CONFIG, names, templates, seed=1)
    torch.testing.assert_close(adapted.encode_image(tiny_images), tiny_clip.encode_image(tiny_images), rtol=0, atol=0)
    torch.testing.assert_close(adapted.zero_shot_head(names, templates), tiny_clip.zero_shot_head(names, templates), rtol=0, atol=1e-6)


def test_lora_is_what_the_paper_describes(tiny_clip, tiny_images):
    """W + B A, for queries and values and for no keys, written into a copy of the weights."""
    adapted, other = loud("lora", tiny_clip), FineTuned(tiny_clip)
    for block, change in zip(other.blocks, adapted.learned, strict=True):
        q, k, v = block.attn.in_proj_weight.chunk(3)
        q += change.B[0] @ change.A[0]
        v += change.B[1] @ change.A[1]
    torch.testing.assert_close(adapted.encode_image(tiny_images), other.encode_image(tiny_images), rtol=0, atol=1e-5)
    assert adapted.n_parameters == 3 * 2 * 2 * 4 * 32
    assert adapted.visual.conv1.weight is tiny_clip.visual.conv1.weight is not other.visual.conv1.weight  # shared, not copied


def test_a_linear_head_keeps_clips_text_for_classes_that_it_does_not_know(tiny_clip):
    adapted = loud("linear", tiny_clip)
    mixed, text = adapted.zero_shot_head(["anvil", NAMES[1]], ["a {}."]), tiny_clip.zero_shot_head(["anvil", NAMES[1]], ["a {}."])
    torch.testing.assert_close(mixed[0], text[0])
    torch.testing.assert_close(mixed[1], adapted.learned.weight[1])


def test_prompt_tokens_never_reach_the_tokens(maple, tiny_clip, tiny_images):
    for layer in range(3):
        residual = maple.run_to(tiny_images, layer)
        assert residual.tokens.shape == (8, tiny_clip.n_tokens, tiny_clip.width)
        assert residual.extra.shape == (8, 2, tiny_clip.width)
        assert maple.residual(tiny_images, layer).shape == residual.tokens.shape


def test_forgotten_prompt_tokens_are_an_error_where_they_matter(maple, tiny_images):
    tokens = maple.residual(tiny_images, 1)
    with pytest.raises(ValueError, match="2 prompt tokens"):
        maple.finish(tokens, 1)
    # Block 1 has prompts of its own, so those after block 0 are thrown away anyway.
    torch.testing.assert_close(maple.finish(maple.residual(tiny_images, 0), 0), maple.encode_image(tiny_images))
    with pytest.raises(ValueError, match="this residual has 1"):
        maple.finish(maple.run_to(tiny_images, 1)._replace(extra=torch.zeros(8, 1, 32)), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_leave_the_base_alone(tiny_clip, tiny_images, few, kind):
    before = tiny_clip.fingerprint, tiny_clip.encode_image(tiny_images), tiny_clip.encode_text(["a hammer."])
    adapted = fit_adapter(tiny_clip, kind, few, CONFIG, progress=False)
    adapted.zero_shot_head(NAMES)
    del tiny_clip.__dict__["fingerprint"], tiny_clip.__dict__["weights_hash"]  # hash the weights again
    assert tiny_clip.fingerprint == before[0] != adapted.fingerprint
    torch.testing.assert_close(tiny_clip.encode_image(tiny_images), before[1], rtol=0, atol=0)
    torch.testing.assert_close(tiny_clip.encode_text(["a hammer."]), before[2], rtol=0, atol=0)


def test_impossible_settings_say_what_is_possible(tiny_clip):
    for call, message in (
        (lambda: MaPLe(tiny_clip, depth=9), "depth must be 1 to 3; got 9"),
        (lambda: fit_adapter(tiny_clip, "bitfit", None, CONFIG), "Valid: maple, coop, vpt, lora, finetune, linear"),
        (lambda: LinearHead(tiny_clip, NAMES, template="a hammer"), "has one '{}'"),
        (lambda: CoOp(tiny_clip, 22), "n_ctx=22 leaves no room for a class name: 'tiny' reads texts of 24 tokens"),
        # The inner one's prompts were left out, silently.
        (lambda: LinearHead(MaPLe(tiny_clip), NAMES), "MaPLe.* is adapted already: give its base"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_image_prompts_leave_the_texts_alone(tiny_clip):
    """More of them than the template has words put placeholders into the text."""
    adapted = VisualPrompt(tiny_clip, 30)
    assert adapted.template == "a photo of a {}."
    torch.testing.assert_close(adapted.zero_shot_head(NAMES), tiny_clip.zero_shot_head(NAMES, ["a photo of a {}."]), rtol=0, atol=0)


def test_the_learning_rate_is_constant_for_an_epoch_and_then_a_cosine(tiny_clip, few):
    config = dataclasses.replace(CONFIG, epochs=5, lr=0.0035, depth=1)
    rates = [epoch["lr"] for epoch in fit_adapter(tiny_clip, "coop", few, config, progress=False).log]
    assert rates == pytest.approx([1e-5, *(0.0035 * 0.5 * (1 + math.cos(epoch * math.pi / 5)) for epoch in range(4))], rel=1e-12)


def test_random_crops_are_those_of_maple():
    """A ramp's slope in a crop tells how wide and high a box was enlarged: Dassl's 8 to 100% of the area, sides 3:4 to 4:3, drawn until it fits."""
    ramp, state = torch.arange(64.0).expand(64, 64), torch.get_rng_state()
    pictures = torch.stack([ramp, ramp.T, torch.zeros(64, 64)]).half().expand(300, -1, -1, -1)
    crops, again = (random_crops(pictures, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(crops, again) and torch.equal(torch.get_rng_state(), state) and crops.shape == pictures.shape
    wide, high = 2 * (crops[:, 0, 32, 48] - crops[:, 0, 32, 16]), 2 * (crops[:, 1, 48, 32] - crops[:, 1, 16, 32])
    share, sides = wide * high / 64**2, wide / high
    rng = np.random.default_rng(0)
    area, side = rng.uniform(0.08, 1, 20_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 20_000) / 2)
    fits = area[np.maximum(side, 1 / side) * np.sqrt(area) <= 1]
    assert 0.075 < share.min() < 0.12 and 0.9 < share.max() < 1.001 and share.mean() == pytest.approx(fits.mean(), abs=0.04)
    assert 0.72 < sides.min() < 0.8 and 1.25 < sides.max() < 1.39


def test_crops_and_loras_rank_are_the_configurations(tiny_clip, few):
    config = dataclasses.replace(CONFIG, rank=2)
    found = {name: fit_adapter(tiny_clip, "lora", few, c, progress=False) for name, c in (("4", CONFIG), ("2", config))}
    assert found["4"].n_parameters == 2 * found["2"].n_parameters
    crops = dataclasses.replace(CONFIG, random_crop=True)
    plain, cropped = (fit_adapter(tiny_clip, "coop", few, config, progress=False) for config in (CONFIG, crops))
    assert plain.log != cropped.log


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_lowers_the_loss_and_repeats_with_the_seed(tiny_clip, few, kind):
    lr = 3e-3 if RECIPES[kind].optimizer == "adamw" else 0.05
    config = dataclasses.replace(CONFIG, epochs=6, lr=lr, batch_size=9, depth=3)
    first, again, other = (fit_adapter(tiny_clip, kind, few, config, seed=seed, progress=False) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.log == again.log
    assert first.log[-1]["loss"] < first.log[0]["loss"]
    assert not any(p.requires_grad for p in (*first.learned.parameters(), *tiny_clip.model.parameters()))


@pytest.mark.parametrize("kind", ["maple", "lora", "linear"])
def test_a_fit_that_was_stopped_goes_on_where_it_was(tiny_clip, few, tmp_path, kind, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=4, random_crop=kind == "linear")
    whole = fit_adapter(tiny_clip, kind, few, config, tmp_path / "whole", progress=False)

    rate_factor, epochs = fit.rate_factor, []

    def stop(epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return rate_factor(epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "rate_factor", stop)
        fit_adapter(tiny_clip, kind, few, config, tmp_path / "stopped", progress=False)
    monkeypatch.setattr(fit, "rate_factor", lambda epoch, *rest: epochs.append(epoch) or rate_factor(epoch, *rest))
    resumed = fit_adapter(tiny_clip, kind, few, config, tmp_path / "stopped", progress=False)
    assert epochs == [2, 3, 4] and resumed.log == whole.log and resumed.fingerprint == whole.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_damaged_or_foreign_unfinished_fit_is_not_gone_on_with(tiny_clip, few, tmp_path):
    whole = fit_adapter(tiny_clip, "coop", few, CONFIG, progress=False)
    (tmp_path / "adapter.unfinished").write_bytes(b"half a file")
    assert fit_adapter(tiny_clip, "coop", few, CONFIG, tmp_path / "adapter", progress=False).fingerprint == whole.fingerprint
    torch.save({"fingerprint": "another", "log": [{}]}, tmp_path / "again.unfinished")
    assert fit_adapter(tiny_clip, "coop", few, CONFIG, tmp_path / "again", progress=False).fingerprint == whole.fingerprint


@pytest.mark.parametrize("kind", ["maple", "lora"])
def test_bfloat16_learns_much_the_same_and_leaves_the_model_in_float32(tiny_clip, few, tiny_images, kind):
    full, half = (fit_adapter(tiny_clip, kind, few, CONFIG, precision=precision, progress=False) for precision in ("fp32", "bf16"))
    assert half.log[-1]["loss"] == pytest.approx(full.log[-1]["loss"], rel=0.05) and half.log != full.log
    assert half.precision == "fp32" and half.visual.transformer.batch_first == tiny_clip.visual.transformer.batch_first
    assert all(p.dtype == torch.float32 for p in half.learned.parameters())
    torch.testing.assert_close(half.encode_image(tiny_images), full.encode_image(tiny_images), rtol=0, atol=0.1)


def test_shuffled_labels_are_the_same_labels_on_other_images(tiny_clip, few, tmp_path):
    right = fit_adapter(tiny_clip, "linear", few, CONFIG, tmp_path / "right", progress=False)
    wrong = fit_adapter(tiny_clip, "linear", few, CONFIG, tmp_path / "wrong", shuffle_labels=True, progress=False)
    assert right.fingerprint != wrong.fingerprint and right.log[0] != wrong.log[0]
    manifests = [artifacts.read_json(tmp_path / name / "manifest.json") for name in ("right", "wrong")]
    assert manifests[0]["fingerprint"] != manifests[1]["fingerprint"] and manifests[1]["recipe"]["shuffle_labels"]
    again = fit_adapter(tiny_clip, "linear", few, CONFIG, shuffle_labels=True, progress=False)
    assert again.log == wrong.log


def test_a_loss_that_is_no_number_stops_a_fit(tiny_clip, few):
    with pytest.raises(ValueError, match=r"The loss of 'coop' on 'openmoji/tools' is nan in epoch \d+: lower lr \(now 1e\+38\)"):
        fit_adapter(tiny_clip, "coop", few, dataclasses.replace(CONFIG, lr=1e38, epochs=3), progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_the_same(tiny_clip, tiny_images, few, tmp_path, kind):
    adapted = fit_adapter(tiny_clip, kind, few, CONFIG, tmp_path / "adapter", progress=False)
    loaded = load_adapter(tmp_path / "adapter", tiny_clip)
    assert type(loaded) is type(adapted) and loaded.fingerprint == adapted.fingerprint and loaded.log == adapted.log
    torch.testing.assert_close(loaded.encode_image(tiny_images), adapted.encode_image(tiny_images), rtol=0, atol=0)
    torch.testing.assert_close(loaded.zero_shot_head(NAMES), adapted.zero_shot_head(NAMES), rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    stamp = (tmp_path / "adapter" / "adapter.safetensors").stat().st_mtime_ns
    for seed, same in ((None, True), (5, False)):
        fit_adapter(tiny_clip, kind, few, CONFIG, tmp_path / "adapter", seed=seed, progress=False)
        assert ((tmp_path / "adapter" / "adapter.safetensors").stat().st_mtime_ns == stamp) == same


def test_another_model_is_an_error(tiny_clip, tmp_path):
    out = tmp_path / "adapter"
    save_adapter(CoOp(tiny_clip), out)
    with pytest.raises(ValueError, match="was fitted to 'tiny'"):
        load_adapter(out, CoOp(tiny_clip))
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapter(tmp_path / "nothing", tiny_clip)


def official(
    adapted, path, template="a photo of a {}.", drop="", names=("french horn", "accordion"), context=24, head="prompt_learner.", **extra
):
    """A file as the official code writes it: prompts among frozen weights, beside the optimiser and its schedule."""
    tokens = F.pad(adapted.tokenize([template.format(name) for name in names]), (0, context - 24))
    embedded = adapted.model.token_embedding(tokens)
    held = adapted.learned.state_dict() | {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + adapted.n_ctx :]}
    state = {f"{head}{key}": value.half() for key, value in held.items() if not (drop and key.startswith(drop))}
    state |= {"image_encoder.proj": torch.zeros(2, 2), "logit_scale": torch.tensor(4.6)} if head else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    torch.save({"state_dict": state, "epoch": 5, "optimizer": optimizer.state_dict(), "scheduler": {"successor": schedule}, **extra}, path)
    return path


@pytest.mark.parametrize("depth", [1, 3])
def test_an_official_checkpoint_loads_with_the_depth_that_it_has(tiny_clip, tiny_images, tmp_path, depth):
    """The official code loads a file of depth 3 into a model of depth 9, where six layers stay random."""
    adapted = MaPLe(tiny_clip, depth=depth, seed=3)
    loaded = load_adapter(official(adapted, tmp_path / "model.pth.tar-5"), tiny_clip)
    assert (loaded.depth, loaded.n_ctx, loaded.template) == (depth, 2, "a photo of a {}.")
    torch.testing.assert_close(loaded.encode_image(tiny_images), adapted.encode_image(tiny_images), rtol=0, atol=1e-2)
    assert all(p.dtype == torch.float32 for p in loaded.learned.parameters())


def test_an_official_checkpoint_that_lacks_a_layer_or_is_of_another_model_or_program_is_an_error(maple, tiny_clip, tmp_path):
    path = official(maple, tmp_path / "model.pth.tar-5", drop="compound_prompt_projections")
    with pytest.raises(ValueError, match="compound_prompt_projections.0.bias is missing, expected"):
        load_adapter(path, tiny_clip)
    official(maple, path)
    wider = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    other = ClipModel(open_clip.CLIP(16, wider, text), preprocess=None, tokenizer=tiny_clip.tokenize, name="wider")
    with pytest.raises(ValueError, match="in words that this model's text tower does not know"):
        load_adapter(path, other)
    official(maple, path, drop="token_")
    with pytest.raises(ValueError, match="does not fit 'wider': .*proj.bias is \\(32,\\), expected \\(48,\\)"):
        load_adapter(path, other)
    with pytest.raises(ValueError, match="give clip="):
        load_adapter(path)
    ctx = {"prompt_learner.ctx": torch.zeros(2, 32)}
    for state, message in (
        ({"conv1.weight": torch.zeros(2)}, "holds no prompts of MaPLe .* or CoOp .*, but conv1.weight"),
        (ctx | {"prompt_learner.meta_net.linear1.weight": torch.zeros(2)}, "but meta_net"),  # CoCoOp
        (ctx | {"image_encoder.transformer.resblocks.1.VPT_shallow": torch.zeros(2)}, "but .*VPT"),  # PromptSRC
        ({"ctx": torch.zeros(3, 2, 32)}, "a context for each class"),
        ({"ctx": [1, 2]}, "holds no prompts"),
        ({"ctx": torch.full((2, 32), torch.nan)}, "ctx hold NaN"),
        *(({"ctx": torch.zeros(2, 32), "token_suffix": torch.zeros(size)}, "does not know") for size in ((0, 3, 32), (3, 32))),
    ):
        torch.save({"state_dict": state}, path)
        with pytest.raises(ValueError, match=message):
            load_adapter(path, tiny_clip)


@pytest.mark.parametrize("kind", ["maple", "coop", "coop alone"])
@pytest.mark.parametrize("template", ["a photo of the {}.", "a photo of a {}", "a photo of {}, in color."])
def test_faults_c7_a_files_head_is_built_on_its_own_sentence(tiny_clip, tmp_path, template, kind):
    """FAULTS C7: whatever the order of its classes, the length of its context, or the program; ``template=`` is held against the file."""
    cls, path = MaPLe if kind == "maple" else CoOp, tmp_path / "model.pth.tar-5"
    adapted = moved(cls(tiny_clip, 2, template=template))
    expected = adapted.zero_shot_head(["french horn"])
    options = {"head": "" if kind == "coop alone" else "prompt_learner."}
    for names, context in ((("french horn", "accordion"), 24), (("accordion", "the harp", "french horn"), 77)):
        official(adapted, path, template, names=names, context=context, **options)
        for given in (None, template):
            loaded = load_adapter(path, tiny_clip, template=given)
            assert type(loaded) is cls
            torch.testing.assert_close(loaded.zero_shot_head(["french horn"]), expected, rtol=0, atol=1e-2)
        with pytest.raises(ValueError, match="as in '.*Give the prompt it was trained with"):
            load_adapter(path, tiny_clip, template="a photo of one {}.")
    official(adapted, path, template, drop="token_", **options)  # nothing to compare with
    assert load_adapter(path, tiny_clip).template == "a photo of a {}."
    loaded = load_adapter(path, tiny_clip, template=template)
    torch.testing.assert_close(loaded.zero_shot_head(["french horn"]), expected, rtol=0, atol=1e-2)


def test_faults_c7_what_may_be_a_name_is_not_guessed(tiny_clip, tmp_path):
    """Classes that all begin or end alike, or a single one: is the word the template's? Sixteen vectors keep how the sentence ends."""
    path, adapted = tmp_path / "model.pth.tar-5", moved(CoOp(tiny_clip, 2))
    for names in (("french horn", "alpine horn"), ("old harp", "old horn")):
        official(adapted, path, names=names)
        with pytest.raises(ValueError, match="where the class name begins there"):
            load_adapter(path, tiny_clip)
        assert load_adapter(path, tiny_clip, template="a photo of a {}.").template == "a photo of a {}."
    assert load_adapter(official(adapted, path, names=("old harp",)), tiny_clip).template == "a photo of a {}."
    adapted = CoOp(tiny_clip, 6, template="a photo of a {}, in color.")
    assert adapted.template == "X X X X X X {}, in color."
    loaded = load_adapter(official(adapted, path, adapted.template), tiny_clip)
    assert torch.equal(loaded.class_tokens(NAMES), adapted.class_tokens(NAMES))


class Malicious:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.patchsae_was_here = True",))


def test_nothing_in_a_checkpoint_is_executed(maple, tiny_clip, tmp_path):
    path = official(maple, tmp_path / "model.pth.tar-5", surprise=Malicious())
    with contextlib.suppress(ValueError):  # refusing is as good as ignoring
        load_adapter(path, tiny_clip)
    assert not hasattr(builtins, "patchsae_was_here")


def test_a_file_that_is_no_checkpoint_is_an_error(tiny_clip, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"not torch")
    with pytest.raises(ValueError, match="weights.bin is no archive of torch.save"):
        load_adapter(tmp_path / "weights.bin", tiny_clip)
