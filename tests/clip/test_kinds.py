"""Every kind of image tower that open_clip and timm know, built small: read, split, finished and edited as its own forward pass, or refused by name."""

import contextlib
import copy
import json
import logging
import re

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from patchsae_utils import interventions
from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.adaptation import CoOp
from patchsae_utils.clip.loading import load_clip
from patchsae_utils.clip.model import ClipModel, NoText
from patchsae_utils.clip.timm_models import TimmModel
from patchsae_utils.concepts.baselines import random_clip
from patchsae_utils.interventions.tail import network_tail
from patchsae_utils.latents.reading import latent_masks
from patchsae_utils.sae.model import SparseAutoencoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CREATE = timm.create_model


def shrunk(name: str) -> dict:
    """open_clip's configuration of a model with few narrow layers and a small text tower."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["text_cfg"] = TEXT | {key: text[key] for key in ("embed_cls", "output_tokens", "pool_type", "no_causal_mask") if key in text}
    if isinstance(vision.get("layers"), int):
        size = 2 * vision["patch_size"]
        vision |= {"layers": 3, "width": 32, "head_width": 16, "image_size": size, "mlp_ratio": 2.0, "attn_pooler_heads": 2}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = TEXT | {"width": config["embed_dim"], "heads": 2, "attn_pooler_heads": 2}
    return config


def kinds() -> list[str]:
    """One name for each configuration that differs when it is small; sizes of one of timm's towers count as one."""
    found: dict[str, str] = {}
    for name in open_clip.list_models():
        config = shrunk(name)
        vision, tower = config["vision_cfg"], config["vision_cfg"].get("timm_model_name", "")
        if tower:
            kind = re.sub(r"_(tiny|small|base|large2?|giant(opt)?|enormous|gigantic|xlarge|so400m)|_?\d+", "", tower)
        elif isinstance(vision["layers"], list):
            kind = "resnet"
        else:
            kind = json.dumps(vision | {"image_size": 0, "patch_size": 0})
        found.setdefault(f"{kind}, {config.get('quick_gelu')}, {'multimodal_cfg' in config}", name)
    return list(found.values())


@pytest.fixture(scope="module", autouse=True)
def small():
    """Models as load_clip makes them by name, with few and narrow layers."""
    configs = {name: shrunk(name) for name in open_clip.list_models()}

    def create(name, **options):
        for fewer in ({"depth": 3, "embed_dim": 48, "num_heads": 4}, {"depth": 3}, {}):
            try:
                return CREATE(name, **options, **({} if name.startswith("test_") else fewer))
            except (TypeError, AssertionError):  # towers that know no such setting, or whose stem has its own width
                if not fewer:
                    raise

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
        patch.setattr(timm, "create_model", create)
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


def images_for(clip: ClipModel) -> torch.Tensor:
    return torch.randn(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(1))


def assert_split_is_whole(clip: ClipModel) -> None:
    """At every layer: the residual's shape, the rest of the network, what an edit of a patch does, the quick tail."""
    images = images_for(clip)
    whole = clip.visual(images)
    whole = whole[0] if isinstance(whole, tuple) else whole  # CoCa gives its tokens, too
    torch.testing.assert_close(clip.encode_image(images), whole, rtol=1e-4, atol=1e-5)
    if clip.has_text:
        told = clip.model.encode_image(images)
        torch.testing.assert_close(clip.encode_image(images), told if isinstance(clip, TimmModel) else whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (2, clip.d_embed)
    for layer in range(clip.n_layers):
        residual = clip.run_to(images, layer)
        assert residual.tokens.shape == (2, 1 + clip.grid[0] * clip.grid[1], clip.width) == (2, clip.n_tokens, clip.width)
        torch.testing.assert_close(clip.finish(residual, layer), whole, rtol=1e-4, atol=1e-5)
    layer = clip.n_layers - 2
    residual = clip.run_to(images, layer)
    block = clip.blocks[layer]
    seen = []
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    clip.visual(images)
    handle.remove()
    torch.testing.assert_close(residual.tokens[:, -1], seen[0][:, -1], rtol=1e-4, atol=1e-5)  # the last patch is the network's last token
    changed = residual._replace(
        tokens=residual.tokens + 0.3 * torch.randn(residual.tokens.shape, generator=torch.Generator().manual_seed(2))
    )
    assert (clip.finish(changed, layer) - whole).norm() > 1e-3 * whole.norm()
    torch.testing.assert_close(network_tail(clip, layer, residual)(changed), clip.finish(changed, layer), rtol=1e-3, atol=1e-4)


REFUSED = ("convnext", "RN", "swin", "MobileCLIP-S", "MobileCLIP2-S")


@pytest.mark.parametrize("name", kinds())
def test_every_model_of_open_clip_is_its_own_forward_pass_or_refused_by_name(name):
    """Poolings by class token, mean and attention, no norm before, CoCa, SigLIP, EVA, PE, ViTamin, QuickGELU, output_tokens, a final norm after pooling."""
    if name.startswith(REFUSED):
        with pytest.raises(
            ValueError, match=f"'{name}' has a .* as image tower. Read are the patch tokens of vision transformers.*'ViT-B-16'"
        ):
            load_clip(name, "random", "cpu")
        return
    clip = load_clip(name, "random", "cpu")
    assert_split_is_whole(clip)
    assert clip.has_text and clip.name == name and clip.logits(torch.ones(1, clip.d_embed), torch.ones(3, clip.d_embed)).shape == (1, 3)


TIMM = {
    "class token": ("vit_tiny_patch16_224", 1),
    "registers": ("vit_small_patch14_reg4_dinov2", 5),
    "mean of patches": ("vit_base_patch16_gap_224", 0),
    "one register, no class token": ("vit_little_patch16_reg1_gap_256", 1),
    "attention pooling": ("vit_base_patch16_siglip_224", 0),
    "another size": ("vit_base_patch16_siglip_224@96", 0),
    "positions of another grid": ("vit_small_patch14_dinov2@98", 1),
    "rotary positions": ("vit_small_patch16_dinov3", 5),
    "relative positions": ("beit_base_patch16_224", 1),
    "shared relative positions": ("vit_relpos_medium_patch16_rpn_224", 0),
    "distilled": ("deit_tiny_distilled_patch16_224", 2),
    "convolutional stem": ("vit_tiny_r_s16_p8_224", 1),
    "parallel blocks": ("vit_small_patch16_36x1_224", 1),
    "EVA": ("eva02_tiny_patch14_224", 1),
}


@pytest.mark.parametrize(("name", "prefix"), TIMM.values(), ids=TIMM)
def test_every_kind_of_timms_vision_transformers(name, prefix):
    clip = load_clip(f"timm:{name}", "random", "cpu")
    assert_split_is_whole(clip)
    residual = clip.run_to(images_for(clip), 0)
    n_extra = prefix - clip.has_class_token
    assert (residual.extra.shape[1] if n_extra else residual.extra) == (n_extra or None)
    assert clip.preprocess(Image.new("RGB", (50, 40))).shape[1:] == clip.image_size
    if n_extra:  # FAULTS C2: registers are no patches
        with pytest.raises(ValueError, match=f"{n_extra} register tokens"):
            clip.finish(residual.tokens, 0)
    if "@" in name:
        assert clip.image_size == (int(name.partition("@")[2]),) * 2
    with pytest.raises(NoText):
        clip.encode_text("a dog")


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_tiny", "cait_xxs24_224", "xcit_nano_12_p16_224", "hiera_tiny_224"]
)
def test_other_networks_of_timm_are_refused_by_name(name):
    """Some by what they lack, some because blocks, norm and head are not all that they do."""
    with pytest.raises(ValueError, match=f"'timm:{name}' has a .* as image tower.*'timm:vit_small_patch14_dinov2.lvd142m'"):
        load_clip(f"timm:{name}", "random", "cpu")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32"])
def test_another_image_size_resamples_the_positions_of_a_weight_file(name, tmp_path):
    own = load_clip(name, "random", "cpu")
    save_file({key: value.clone().half() for key, value in own.model.state_dict().items()}, tmp_path / "half.safetensors")
    again = load_clip(name, str(tmp_path / "half.safetensors"), "cpu")
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    torch.testing.assert_close(again.encode_image(images_for(own)), own.encode_image(images_for(own)), rtol=0.05, atol=0.02)
    size = 96 if isinstance(own, TimmModel) else 3 * 32
    larger = load_clip(f"{name}@{size}", str(tmp_path / "half.safetensors"), "cpu")
    assert larger.image_size == larger.preprocess(Image.new("RGB", (50, 40))).shape[1:] == (size, size)
    assert larger.grid != own.grid and larger.n_tokens != own.n_tokens
    assert_split_is_whole(larger)


def test_a_tower_without_class_token_goes_through_the_stages(tiny_dataset, tmp_path):
    """SigLIP: the mean patch stands where CLS would, is read like it, and what is written there changes nothing."""
    clip = load_clip("ViT-B-16-SigLIP@64", "random", "cpu")
    sae = SparseAutoencoder(clip.width, 96).requires_grad_(False)
    images = torch.stack([clip.preprocess(tiny_dataset[i].image) for i in range(2)])
    residual = clip.run_to(images, -2)
    torch.testing.assert_close(residual.tokens[:, 0], residual.tokens[:, 1:].mean(1))
    moved = residual.tokens.clone()
    moved[:, 0] += 1
    assert torch.equal(clip.finish(moved, -2), clip.finish(residual, -2))
    assert latent_masks(clip, sae, images, [0, 5], -2).shape == (2, 2, 4, 4)
    head = F.normalize(torch.randn(len(tiny_dataset.class_names), clip.d_embed), dim=1)
    table = interventions.sweep_masks(clip, sae, tiny_dataset, [3], "random", head=head, keep_error=True)
    exact = table.set_index("mode")["logit"]
    assert exact["raw"] == pytest.approx(exact["error_kept"], abs=1e-3)
    assert extract_activations(clip, tiny_dataset, -2, tmp_path / "s", tokens="patches", progress=False).n_tokens == 16
    for call in (
        lambda: extract_activations(clip, tiny_dataset, -2, tmp_path / "t", tokens="cls", progress=False),
        lambda: interventions.sweep_masks(clip, sae, tiny_dataset, [3], "random", head=head, where="cls"),
        lambda: interventions.steer(clip, sae, images, [interventions.Edit(0, patches="cls")]),
    ):
        with pytest.raises(ValueError, match="has no class token.*Choose 'patches' or 'all'"):
            call()


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "timm:beit_base_patch16_224"])
def test_bfloat16_is_near_whatever_blocks_are_given(name):
    own = load_clip(name, "random", "cpu")
    fast = type(own)(own.model, own.preprocess, None, name, precision="bf16")
    expected, found = (clip.encode_image(images_for(own)) for clip in (own, fast))
    assert found.dtype == torch.float32 and fast.fingerprint != own.fingerprint and 0 < (found - expected).norm() < 0.03 * expected.norm()


def test_adapters_of_a_timm_tower_are_refused_by_name():
    with pytest.raises(ValueError, match="Adapters change open_clip's own VisionTransformer.*'ViT-B-16-SigLIP' has a tower of timm"):
        CoOp(load_clip("ViT-B-16-SigLIP", "random", "cpu"))


def test_the_random_control_of_a_timm_tower_keeps_nothing_learned():
    for model in ("ViT-B-16-SigLIP", "timm:vit_small_patch14_reg4_dinov2"):
        clip = load_clip(model, "random", "cpu")
        with torch.no_grad():
            for parameter in clip.visual.parameters():
                parameter.fill_(0.123)  # what training left
        control = random_clip(clip)
        matrices = {name: p for name, p in control.visual.named_parameters() if p.ndim > 1}
        assert not [name for name, p in matrices.items() if (p == 0.123).all()]
        assert control.residual(images_for(clip), -1).isfinite().all()


def test_weights_trained_with_quickgelu_open_the_model_that_has_it(monkeypatch):
    """open_clip only warned, and features of ``ViT-B-16``, ``openai`` were silently others than OpenAI's."""
    asked = []

    def fetch(name, **options):
        asked.append((name, options["pretrained"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fetch)
    opened = {("ViT-B-16", "openai"): "ViT-B-16-quickgelu", ("ViT-B-16", "laion2b_s34b_b88k"): "ViT-B-16"}
    opened |= {("ViT-L-14@336", "metaclip_400m"): "ViT-L-14-quickgelu", ("ViT-B-32-quickgelu", "openai"): "ViT-B-32-quickgelu"}
    for model, tag in opened:
        with pytest.raises(FileNotFoundError):
            load_clip(model, tag, "cpu")
    assert [name for name, _ in asked] == list(opened.values())


def test_pictures_for_a_weight_file_are_prepared_as_for_the_published_weights(tmp_path):
    """SigLIP's want mean and deviation 0.5 and a squashed picture; for a file they got OpenAI's numbers and a crop, silently."""
    for model, mean, warns in (("ViT-B-16-SigLIP", 0.5, False), ("ViT-B-32", 0.48145466, False), ("ViT-L-14", 0.48145466, True)):
        file = tmp_path / f"{model}.safetensors"
        save_file({key: value.clone() for key, value in load_clip(model, "random", "cpu").model.state_dict().items()}, file)
        with pytest.warns(UserWarning, match="laion2b_s32b_b82k, give that tag instead") if warns else contextlib.nullcontext():
            clip = load_clip(model, str(file), "cpu")
        normalize = clip.preprocess.transforms[-1]
        assert normalize.mean[0] == pytest.approx(mean)
        assert ("CenterCrop" in repr(clip.preprocess)) == (mean != 0.5)
