"""A vision transformer without text: its residual stream is timm's own, edits of it finish as they should, and words are refused by name."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from patchsae_utils.adaptation.fit import fit_adapter
from patchsae_utils.cli import main
from patchsae_utils.clip.loading import load_clip
from patchsae_utils.clip.model import NoText
from patchsae_utils.clip.timm_models import TimmModel
from patchsae_utils.clip.zero_shot import zero_shot_predictions
from patchsae_utils.config import load_profile
from patchsae_utils.latents.reading import latent_masks, summarize_latents
from patchsae_utils.plots.training import reconstruction_quality
from patchsae_utils.sae.model import SparseAutoencoder
from patchsae_utils.sae.quality import evaluate_sae, evaluation_table

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


def small(**options):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, **(SMALL | options))
    preprocess = timm.data.create_transform(input_size=(3, 32, 32), is_training=False)
    return TimmModel(network, preprocess, None, "timm:small", "random")


@pytest.fixture(params=[{}, {"reg_tokens": 4}], ids=["plain", "registers"])
def model(request):
    return small(**request.param)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_patches_are_told_from_registers_by_count():
    """FAULTS C2: a change of the last patch of the picture is a change of the last token, however many registers come before."""
    model = small(reg_tokens=4)
    changed = IMAGES.clone()
    changed[:, :, 24:, 24:] += 1
    moved = (model.model.patch_embed(changed) - model.model.patch_embed(IMAGES)).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert moved == [15]
    before, after = (model._split(model._first_tokens(images)).tokens for images in (IMAGES, changed))
    assert (before != after).any(-1).any(0).nonzero().flatten().tolist() == [16]


def test_an_image_size_other_than_the_weights_own_is_seen_by_transform_and_positions(tmp_path, tiny_dataset):
    """FAULTS C1: the transform stayed at the weights' own size, and the first picture failed. The same with weights, and with DINOv2's names."""
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.pt")
    for name, weights, size in (
        ("test_vit@96", str(tmp_path / "w.pt"), 96),
        ("vit_tiny_patch16_224@64", "random", 64),
        ("vit_small_patch14_reg4_dinov2@56", "random", 56),
    ):
        model = load_clip(f"timm:{name}", weights, "cpu")
        picture = model.preprocess(tiny_dataset[0].image)
        assert tuple(picture.shape) == (3, size, size) == (3, *model.image_size)
        assert model.encode_image(picture[None]).shape == (1, model.d_embed)
        assert model.residuals(picture[None]).shape == (model.n_layers, 1, 1 + model.grid[0] * model.grid[1], model.width)


def test_stages_without_words_run_and_words_are_refused_by_name(model, tiny_dataset):
    sae = SparseAutoencoder(24, 48)
    summary = summarize_latents(model, sae, tiny_dataset, -2, progress=False)
    assert summary.n_images == len(tiny_dataset)
    assert latent_masks(model, sae, IMAGES, [0, 5], 1).shape == (3, 2, 4, 4)
    for call in (
        lambda: model.encode_text("a dog"),
        lambda: model.tokenize("a dog"),
        lambda: model.zero_shot_head(["dog"], ["a {}."]),
        lambda: model.logit_scale,
        lambda: zero_shot_predictions(model, tiny_dataset, progress=False),
    ):
        with pytest.raises(NoText, match="'timm:small' has no text tower.*mask sweeps and prompts need a CLIP"):
            call()


def test_an_sae_of_a_model_without_words_is_measured_by_what_it_reconstructs(tiny_dataset):
    """FAULTS C2: notebook 02 died in evaluate_sae, 05 in fit_adapter with an AttributeError."""
    model = small()
    found = evaluate_sae(model, SparseAutoencoder(24, 48), tiny_dataset, 1, progress=False)
    assert set(found["metric"]) == {"mse", "l1", "l0", "explained_variance", "dead_fraction"} and len(evaluation_table(found)) == 3
    assert len(reconstruction_quality(found).axes) == 1
    with pytest.raises(NoText, match="no text tower"):
        fit_adapter(model, "maple", tiny_dataset, load_profile().adapters)


def test_wrong_names_sizes_and_files_are_answered():
    with pytest.raises(ValueError, match=r"'timm:small' reads images \[B, 3, 32, 32\], got \[3, 32, 32\]. Apply clip.preprocess"):
        small().residual(IMAGES[0], 1)
    with pytest.raises(ValueError, match="timm has no model 'vit_dinov9'. Near it: .*dinov2"):
        load_clip("timm:vit_dinov9")
    with pytest.raises(ValueError, match="The image size of 'timm:test_vit@big' is no whole number of pixels"):
        load_clip("timm:test_vit@big")
    with pytest.raises(FileNotFoundError, match="No weight file '/nowhere.safetensors'"):
        load_clip("timm:test_vit", "/nowhere.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: {key: value for key, value in state.items() if "blocks.1" not in key}, "Missing key.*blocks.1"),
    (lambda state: state | {"blocks.99.norm1.weight": torch.ones(3)}, "Unexpected key.*blocks.99.norm1.weight"),
    (lambda state: state | {"norm.weight": torch.ones(3)}, "size mismatch for norm.weight"),
])  # fmt: skip
def test_weights_of_another_model_are_refused_where_timm_would_leave_some_random(tmp_path, change, message):
    network = timm.create_model("test_vit", num_classes=3)
    state, images = network.state_dict(), torch.randn(2, 3, *network.patch_embed.img_size)
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w é.safetensors")
    expected = network.eval().forward_head(network.forward_features(images), pre_logits=True)
    for name in ("w é.safetensors", "w.pt"):  # a classifier is no part of the backbone
        torch.testing.assert_close(load_clip("timm:test_vit", str(tmp_path / name)).encode_image(images), expected, rtol=0, atol=1e-5)
    torch.save(change(state), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"can't be loaded as weights of 'timm:test_vit' .*{message}"):
        load_clip("timm:test_vit", str(tmp_path / "w.pt"))


def test_commands_that_need_words_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATCHSAE_IMAGES", str(tmp_path))
    assert load_profile("dinov2").model.name.startswith("timm:vit_small_patch14_dinov2")
    for command in ("sweep", "adapt"):
        assert main([command, "--profile", "dinov2", "--set", "model.name=timm:test_vit", "--set", "model.pretrained=random"]) == 1
        assert f"{command} needs a text tower, and 'timm:test_vit' has none" in capsys.readouterr().err
