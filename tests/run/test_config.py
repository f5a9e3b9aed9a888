"""Profiles: what they hold, how they are changed, and what bad input gets."""

import dataclasses
import re
import tomllib
from importlib import resources

import pytest

from patchsae_utils import config
from patchsae_utils.config import load_profile, parse_settings, profile_names, repository_root


@pytest.fixture
def image_folders(tmp_path, monkeypatch):
    """The variables that profiles other than the default need name a folder."""
    for name in ("PATCHSAE_IMAGENET", "PATCHSAE_IMAGES"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def write(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return path


def packaged(name):
    return (resources.files("patchsae_utils") / "profiles" / f"{name}.toml").read_text()


def test_default_profile_is_the_embedded_world():
    profile = load_profile()
    assert profile == load_profile("openmoji") and profile.is_default
    assert profile.model.name == "openmoji" and profile.model.layer == -2
    assert profile.data.train == "openmoji/scenes"
    assert profile.root == repository_root() / "runs" / "openmoji"
    assert profile.folder("activations") == profile.root / "activations"
    assert load_profile(overrides={"name": "quick"}).root == repository_root() / "runs" / "quick"


@pytest.mark.parametrize("name", profile_names())
def test_packaged_profiles_say_what_is_loaded(name, image_folders):
    profile, written = load_profile(name), tomllib.loads(packaged(name))
    for section in config._SECTIONS:
        for setting, value in written[section].items():
            if not (isinstance(value, (str, list)) and "$" in str(value)):
                shown = getattr(getattr(profile, section), setting)
                assert shown == (None if value in ("all", "auto") else tuple(value) if isinstance(value, list) else value)


def test_every_setting_is_documented():
    for cls in (*config._SECTIONS.values(), config.Profile):
        source = resources.files("patchsae_utils").joinpath("config.py").read_text()
        body = source[source.index(f"class {cls.__name__}") :].partition("\n\n\n")[0]
        for item in dataclasses.fields(cls):
            if cls is config.Profile and item.name in config._SECTIONS:
                continue
            assert re.search(rf'^    {item.name}: .*\n    """.+"""', body, re.M), f"{cls.__name__}.{item.name} has no docstring"


def test_imagenet_is_the_papers_recipe(image_folders):
    profile = load_profile("imagenet")
    assert (profile.model.name, profile.model.pretrained, profile.model.layer) == ("ViT-B-16-quickgelu", "openai", -2)
    assert profile.sae.expansion_factor == 64
    training = profile.training
    assert (training.lr, training.l1_coefficient, training.warmup_steps) == (4e-4, 8e-5, 500)
    assert training.n_tokens == 2_621_440 * 197 and training.batch_tokens == 128 * 197
    assert (profile.adapters.depth, profile.adapters.n_ctx, profile.adapters.seeds) == (9, 2, (1, 2, 3))
    assert profile.adapters.random_crop and not load_profile("openmoji").adapters.random_crop
    assert profile.data.train == str(image_folders) and profile.data.n_train_images is None


@pytest.mark.parametrize("name", ["imagefolder", "dinov2"])
def test_profiles_of_ones_own_images_need_no_luck(name, image_folders):
    """FAULTS D5: lambda from random weights began at 3,000 active latents of 6,144; sparsity is set, and latents start at the data."""
    profile = load_profile(name)
    assert (profile.sae.activation, profile.sae.k) == ("topk", 32)
    assert profile.training.start != "random" and profile.training.normalize != "none"


@pytest.mark.parametrize("name, variable", [("imagenet", "PATCHSAE_IMAGENET"), ("imagefolder", "PATCHSAE_IMAGES")])
def test_missing_images_are_an_error_that_says_what_to_provide(name, variable, monkeypatch, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load_profile(name)
    assert variable in str(error.value) and "It is not set" in str(error.value)
    assert "<" in str(error.value), "the form of the folder is shown"
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere', which is not a folder"):
        load_profile(name)


def test_environment_chooses_and_changes(monkeypatch, image_folders):
    monkeypatch.setenv("PATCHSAE_PROFILE", "imagenet")
    assert load_profile().name == "imagenet"
    assert load_profile("openmoji").name == "openmoji", "an argument wins"
    monkeypatch.setenv("PATCHSAE_PROFILE", "")
    monkeypatch.setenv("PATCHSAE_SET", "data.n_train_images=500; training.n_tokens=2e4; adapters.tasks=openmoji/tools, openmoji/meals")
    profile = load_profile(overrides={"training.n_tokens": 10, "training.lr": 1})
    assert profile.data.n_train_images == 500 and profile.training.lr == 1.0 and not profile.is_default
    assert profile.data.n_statistics_images == load_profile("openmoji").data.n_statistics_images
    assert profile.training.n_tokens == 10, "an argument wins"
    assert load_profile().training.n_tokens == 20_000
    assert profile.adapters.tasks == ("openmoji/tools", "openmoji/meals")


def test_settings_as_text():
    assert parse_settings("") == {}
    assert parse_settings("a.b=1;c.d=x/y ; e.f=[1, 2];g.h=true;") == {"a.b": 1, "c.d": "x/y", "e.f": [1, 2], "g.h": True}
    text = "training.ghost=false; sae.activation=matryoshka; sae.k=4; sae.groups=[8, 16]"
    profile = load_profile(overrides=parse_settings(text))
    assert profile.training.ghost is False and profile.sae.groups == (8, 16) and profile.sae.bandwidth is None


@pytest.mark.parametrize(("overrides", "message"), [
    ({"data.n_images": 3}, r"section \[data\]: unknown setting 'n_images'. Valid: train, .*n_train_images"),
    ({"dat.seed": 3}, "unknown section 'dat'. Valid: name, needs, model"),
    ({"speed": 3}, "unknown section 'speed'"),
    ({"data.n_train_images": 0}, r"section \[data\]: n_train_images must be positive, got 0"),
    ({"data.n_train_images": 2.5}, "n_train_images must be of type int, got 2.5"),
    ({"training.lr": -1}, "lr must be positive, got -1.0"),
    ({"training.lr": True}, "lr must be of type float, got True"),
    ({"training.warmup_steps": -1}, "warmup_steps must be 0 or more"),
    ({"training.ghost": 1}, "ghost must be of type bool, got 1"),
    ({"training.n_tokens": float("inf")}, "n_tokens must be of type int, got inf"),
    ({"training.schedule": "step"}, "schedule must be one of constant, linear, cosine, got 'step'"),
    ({"model.name": ""}, "name must be given, not empty"),
    ({"data.workers": -1}, "workers must be 0 or more"),
    ({"data.max_broken": 1.5}, "max_broken must be a share"),
    ({"adapters.seeds": []}, "seeds must be given, not empty"),
    ({"name": "../elsewhere"}, "folder's name"),
])  # fmt: skip
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_profile(overrides=overrides)


@pytest.mark.parametrize("given", ["imagenett", "nowhere.toml", "/tmp"])
def test_unknown_profile_names_the_valid_ones(given):
    with pytest.raises(ValueError, match="Valid: dinov2, imagefolder, imagenet, openmoji, or the path of an existing .toml file"):
        load_profile(given)


@pytest.mark.parametrize(("old", "new", "message"), [
    (b"[sae]", b"[autoencoder]", "unknown section 'autoencoder'. Valid: name, needs, model, data, sae, training, adapters"),
    (b"lr = ", b"learning_rate = ", "unknown setting 'learning_rate'. Valid: n_tokens, lr"),
    (b'train = "openmoji/scenes"', b"", "train must be given"),
    (b"[sae]", b"[sae", "not valid TOML"),
    (b"[sae]", b'name = "\xff"', "not valid TOML: 'utf-8' codec can't decode"),
    (b"[model]", b"needs = 3\n[model]", r"\[needs\] must be a section with settings, got needs = 3"),
    (b"[model]", b"name = [3]\n[model]", r"A profile's name is a folder's name of letters.*got '\[3\]'"),
])  # fmt: skip
def test_bad_file_is_named(tmp_path, old, new, message):
    (tmp_path / "mine.toml").write_bytes(packaged("openmoji").encode().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_profile(tmp_path / "mine.toml")
    assert "mine.toml" in str(error.value) or "[3]" in new.decode(errors="ignore")


def test_repository_and_own_files_are_found_from_a_folder_within_it(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    assert repository_root(tmp_path / "notebooks") == tmp_path / "notebooks", "no repository: the folder itself"
    (tmp_path / "pyproject.toml").touch()
    assert repository_root(tmp_path / "notebooks") == tmp_path
    monkeypatch.chdir(tmp_path / "notebooks")
    assert load_profile().root == tmp_path / "runs" / "openmoji"
    write(tmp_path, packaged("openmoji").replace("n_tokens = ", "n_tokens = 1"))
    own = load_profile("mine.toml")
    assert own.root == tmp_path / "runs" / "mine" and own.training.n_tokens == int(f"1{load_profile().training.n_tokens}")
    assert load_profile(write(tmp_path, f'name = "other"\n{packaged("openmoji")}')).name == "other"
    assert {path.name for path in tmp_path.iterdir()} == {"notebooks", "pyproject.toml", "mine.toml"}, "loading makes no folder"
