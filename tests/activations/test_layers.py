"""What the layers hold: all of them by one pass, norms, components, and linear probes that find what is there and nothing else."""

import pytest
import torch

from patchsae_utils.activations import layers
from patchsae_utils.activations.layers import ResidualSurvey, linear_probe, norm_table, patch_components, probe_layers, survey_residuals
from patchsae_utils.data import ImageData, load_dataset, openmoji


@pytest.fixture(scope="module")
def survey(tiny_clip):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_N_PATCHES", 6)
        return survey_residuals(tiny_clip, load_dataset("openmoji/tools", "test", n_images=10), progress=False)


def test_all_layers_of_one_pass_are_the_layers_one_by_one(tiny_clip, tiny_images):
    stream = tiny_clip.residuals(tiny_images)
    assert stream.shape == (3, 8, 197, 32)
    for layer in range(3):
        torch.testing.assert_close(stream[layer], tiny_clip.residual(tiny_images, layer))


def test_a_survey_keeps_tokens_where_objects_are(survey, tiny_clip):
    data = load_dataset("openmoji/tools", "test", n_images=10)
    assert survey.norms.shape == (3, 10, 197) and survey.cls.shape == (3, 10, 32) and survey.patches.shape == (3, 10, 6, 32)
    for i in range(10):
        truth = data.truth(i)
        residual = tiny_clip.residual(tiny_clip.preprocess(data[i].image)[None], -2)[0]
        torch.testing.assert_close(survey.cls[1, i], residual[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(survey.patches[1, i], residual[1 + survey.places[i]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(survey.norms[1, i], residual.norm(dim=1), rtol=1e-4, atol=1e-5)
        for place, label in zip(survey.places[i].tolist(), survey.patch_labels[i].tolist(), strict=True):
            shares = truth.object_share[:, place // openmoji.GRID, place % openmoji.GRID]
            covering = [int(c) for c, share in zip(truth.class_ids, shares, strict=True) if share >= 0.5]
            assert label in ([data.class_ids.tolist().index(c) for c in covering if c in data.class_ids] or [-1])
    assert (survey.patch_labels >= 0).all()  # a main object always covers six patches
    assert survey.labels.tolist() == data.labels.tolist()


def test_without_ground_truth_patches_have_their_images_label(tiny_clip):
    scenes = load_dataset("openmoji/tools", "test", n_images=4)
    plain = ImageData("plain", "test", scenes.class_names, scenes.labels, lambda i: scenes[i].image)
    survey = survey_residuals(tiny_clip, plain, progress=False)
    assert torch.equal(survey.patch_labels, survey.labels[:, None].expand(-1, 16))


def test_norms_are_summarised_by_layer_and_token(survey):
    norms = survey.norms.clone()
    norms[2, :, 1:], norms[2, :, 0], norms[2, 0, 7] = 1.0, 5.0, 2.5
    table = norm_table(survey._replace(norms=norms)).set_index(["layer", "token"])
    assert len(table) == 6
    assert table.loc[(2, "CLS"), "median"] == 5.0 and table.loc[(2, "CLS"), "outliers"] == 1.0
    assert table.loc[(2, "patch"), "outliers"] == pytest.approx(1 / 1960)
    assert (table["low"] <= table["median"]).all() and (table["median"] <= table["high"]).all()


def test_components_paint_what_varies():
    """Tokens made of three independent maps of falling strength come back as the three colors, at every layer."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 400, 3, generator=generator)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:, :3]
    tokens = (maps * torch.tensor([9.0, 3.0, 1.0])) @ basis.T
    stream = torch.cat([torch.full((2, 1, 8), 50.0), tokens], 1)
    both = torch.stack([stream, -stream]).requires_grad_()  # FAULTS C3: as on a GPU, .numpy() alone would fail
    colors, explained = patch_components(both, (20, 20))
    assert colors.shape == (2, 2, 20, 20, 3) and (colors.min(), colors.max()) == (0, 1)
    torch.testing.assert_close(explained.sum(1), torch.ones(2))
    for channel in range(3):
        pair = torch.stack([colors[0, ..., channel].flatten(), maps[..., channel].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95
    torch.testing.assert_close(colors[0], colors[1])  # signs follow the layer before


def test_a_probe_reads_what_is_linear(monkeypatch):
    monkeypatch.setattr(layers, "_BATCH", 64)
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, 20, generator=generator)
    y = torch.arange(600) % 10
    x = centres[y] + torch.randn(600, 20, generator=generator)
    hits = linear_probe(x[:400], y[:400], x[400:], 10) == y[400:]
    assert hits.float().mean() > 0.95
    noise = torch.randn(600, 20, generator=generator)
    assert (linear_probe(noise[:400], y[:400], noise[400:], 10) == y[400:]).float().mean() < 0.25


def test_layers_are_probed_with_a_control(monkeypatch):
    """Where the label is written into the tokens, the probe reads it, and the permuted control does not; elsewhere both fail."""
    monkeypatch.setattr(layers, "_BATCH", 64)
    n_images, n_classes = 80, 4
    labels = torch.arange(n_images) % n_classes
    signal = 5 * torch.nn.functional.one_hot(labels, 8).float()

    def written(seed):
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randn(3, n_images, 6, 8, generator=generator)
        patches[2] += signal[:, None]
        patch_labels = labels[:, None].repeat(1, 6)
        patch_labels[:, 0] = -1  # nothing to read there
        places = torch.zeros(n_images, 6, dtype=torch.long)
        return ResidualSurvey(
            [0, 1, 2], torch.ones(3, n_images, 17), torch.randn(3, n_images, 8, generator=generator), patches, places, patch_labels, labels
        )

    table = probe_layers(written(0), written(1), n_classes).set_index(["layer", "token"])
    assert table.loc[(2, "patch"), "accuracy"] > 0.95 and table.loc[(2, "patch"), "control"] < 0.5
    assert table.loc[(0, "patch"), "accuracy"] < 0.4 and table.loc[(2, "CLS"), "accuracy"] < 0.5
    assert table.loc[(2, "patch"), "n_train"] == table.loc[(2, "patch"), "n_test"] == 5 * n_images
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
