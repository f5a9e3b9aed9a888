"""The command line: a model folder and a folder of pictures go through the stages; errors are sentences, with the exit status that says so."""

import json
import runpy
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_TEXT, TINY_VISION, picture_folder
from tiny_saes import trained

from patchsae_utils import doctor
from patchsae_utils.activations import extraction
from patchsae_utils.cli import _text, main
from patchsae_utils.sae.files import load_sae, save_sae
from patchsae_utils.sae.formats import FORMATS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP of random weights on disk, and 4 classes of 52 pictures, their colors by class; one of them is broken."""
    root = tmp_path_factory.mktemp("eine Welt für sich")
    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": TINY_VISION | {"image_size": 32}, "text_cfg": TINY_TEXT}
    (root / "clip").mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), root / "clip" / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (root / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    pictures = picture_folder(root / "pictures", **dict.fromkeys(("red_fox", "grüner Frosch", "blue jay", "kiwi"), 52))
    (pictures / "blue jay" / "0.png").write_bytes(b"no picture")
    (root / "mine.toml").write_text(f"""
[model]
name = "{root / "clip"}"
[data]
train = "{pictures}"
statistics = "{pictures}"
evaluation = "{pictures}"
tasks = ["{pictures}"]
[sae]
expansion_factor = 2
[training]
n_tokens = 2000
batch_tokens = 100
warmup_steps = 5
[adapters]
kind = "coop"
tasks = ["{pictures}"]
n_shots = 2
epochs = 1
depth = 2
""")
    return root


@pytest.fixture
def run(world, monkeypatch, capsys):
    monkeypatch.chdir(world)

    def call(*words, profile=True):
        chosen = ["mine.toml"] if words[0] == "doctor" else ["--profile", "mine.toml"]
        status = main([words[0], *(chosen if profile else []), *words[1:], "--json"])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return call


def test_all_stages_by_commands(run, world):
    status, found, _ = run("extract")
    assert status == 0 and "mine" in found["store"] and found["width"] == "32"
    reports = [json.loads(path.read_text()) for path in (world / "runs" / "mine" / "images").glob("*.json")]
    assert [(each["split"], each["images_broken"], each["images_checked"]) for each in reports] == [("train", 1, 42 * 4)]
    assert "0.png (10 bytes)" in reports[0]["broken"][0]["image"] and "167 images" in found["data set"]
    status, found, _ = run("train")
    assert status == 0 and load_sae(found["sae"]).fingerprint == found["fingerprint"] and found["l0"] > 0
    status, small, _ = run("train", "--set", "sae.expansion_factor=1", "--set", "name=small; training.n_tokens=300")
    assert status == 0 and small["size"] == "32 -> 32" and small["sae"].endswith("runs/small/sae")
    status, found, _ = run("summarize")
    assert status == 0 and found["latents"] == 64 and 0 < found["alive"] <= 64
    assert len((world / "runs" / "mine" / "results" / "latents.csv").read_text().splitlines()) == found["alive"] + 1
    status, found, _ = run("sweep", "--ks", "1,8", "--choose", "predicted")
    assert status == 0 and {row["k"] for row in found["rows"]} >= {1, 8}
    status, found, _ = run("adapt")
    assert status == 0 and found["adapters"][0]["kind"] == "coop"
    status, found, _ = run("info", "runs/mine/activations/train", profile=False)
    assert status == 0 and found["what"] == "activation store" and found["files"].startswith("all whole")
    status, found, _ = run("info", "runs/mine/sae", profile=False)
    assert status == 0 and found["reads"]["layer"] == 1 and found["reads"]["metrics"]["l0"] > 0
    assert found["reads"]["dataset"].endswith("pictures") and len(found["reads"]["weights_hash"]) == 16


def test_the_doctor_says_what_is_there_and_how_long_it_takes_and_leaves_nothing(run, world):
    status, found, _ = run("doctor", "--set", "name=ill")
    assert status == 0 and found["missing"] == [] and "block 1 of 3, 4 x 4 patches" in found["model"]
    data = [(row["data"], row["images"], row["classes"]) for row in found["data"]]
    assert data == [("train", 168, 4), ("statistics", 168, 4), ("evaluation", 20, 4)]
    takes = {row["stage"]: (row["is"], row["takes"]) for row in found["stages"]}
    timed = {"activations", "SAE", "statistics of the latents"}
    assert set(takes) == {*timed, f"adapter of {world / 'pictures'}", f"fine-tuned model of {world / 'pictures'}"}
    assert all(takes[stage][0] == "not made" and takes[stage][1].startswith("about ") for stage in timed)
    needs = {row["stage"]: row["needs"] for row in found["stages"]}
    assert needs["activations"] == "0.0 GB of disk" and needs["SAE"] == "0.0 GB of memory"
    assert not (world / "runs" / "ill").exists()


def test_the_doctor_knows_what_a_run_of_the_papers_size_takes():
    """388 GB of activations for ImageNet-1k (docs/scaling.md), and four times the weights of 768 x 49,152 in float32, encoder and decoder."""
    profile = SimpleNamespace(sae=SimpleNamespace(expansion_factor=64))
    sets = {"train": range(1_281_167), "statistics": SimpleNamespace(class_names=range(1000))}
    needs = doctor._needs(profile, SimpleNamespace(width=768, n_tokens=197), sets)
    assert round(needs["activations"] / 1e9) == 388 and round(needs["SAE"] / 1e6) == 1208
    assert round(needs["statistics of the latents"] / 1e6) == 393


@pytest.mark.parametrize(("change", "said"), [
    ("data.train=/nowhere/at/all", "data.train: There is no folder '/nowhere/at/all'"),
    ("model.name=ViT-B-16", "model: 'ViT-B-16' needs weights"),
    ("sae.path=/no/sae", "sae.path: No SAE at /no/sae"),
    ("sae.expansion_factor=4000000000", "memory: training 128,000,000,000 latents takes"),
    ("data.train=elsewhere; data.n_train_images=3", "data.train: "),
])  # fmt: skip
def test_the_doctor_says_what_is_missing(run, monkeypatch, change, said):
    monkeypatch.setattr(doctor, "_trial", lambda *_: {})
    status, found, _ = run("doctor", "--set", change)
    assert status == 1 and len(found["missing"]) == 1 and found["missing"][0].startswith(said)


def test_the_doctor_warns_of_a_store_that_the_disk_does_not_hold(run, monkeypatch):
    monkeypatch.setattr(doctor, "_trial", lambda *_: {})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e5))
    status, found, _ = run("doctor", "--set", "name=ill")
    assert status == 1 and "activations of 168 images take 0 GB, 0 are free: set data.n_train_images lower" in found["missing"][0]


@pytest.mark.parametrize("form", FORMATS)
def test_info_and_convert_know_every_format(run, tmp_path, form):
    sae = trained({} if "relu" in FORMATS[form].activations else {"activation": "topk", "k": 3})
    path = save_sae(sae, tmp_path / "sae", format=form)
    status, found, _ = run("info", str(path), profile=False)
    assert status == 0 and (found["what"], found["format"], found["d_sae"]) == ("sparse autoencoder", form, 20)
    status, found, _ = run("convert", str(path), str(tmp_path / "ours"), profile=False)
    assert status == 0 and found["written"] == str(tmp_path / "ours")
    x = torch.randn(20, 6)
    torch.testing.assert_close(load_sae(tmp_path / "ours").encode(x), sae.eval().encode(x), rtol=0, atol=1e-5)


def test_info_says_what_was_understood_and_what_ignored(run, tmp_path):
    path = save_sae(trained({}), tmp_path / "sae", format="prisma")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"lr": 0.1, "wandb_project": "x"}))
    status, found, _ = run("info", str(path), profile=False)
    assert status == 0 and found["understood"]["normalize_activations"] == "none" and found["ignored"] == "lr, wandb_project"
    (path / "config.json").write_text(json.dumps(settings | {"normalize_activations": "layer_norm"}))
    status, found, _ = run("convert", str(path), str(tmp_path / "ours"), profile=False)
    assert status == 1 and "normalize_activations='layer_norm'" in found["error"]


@pytest.mark.parametrize(("words", "message"), [
    (("train", "--set", "training.speed=3"), "unknown setting 'speed'. Valid: "),
    (("train", "--set", "data.train=/nowhere/at/all", "--set", "name=x"), "There is no folder '/nowhere/at/all'"),
    (("train", "--set", "lr"), "A setting is written section.key=value"),
    (("sweep", "--ks", "few"), "--ks takes numbers with commas"),
    (("sweep", "--choose", "random,magic"), "--choose takes words with commas between them, of oracle, predicted"),
    (("adapt", "--kind", "magic"), "magic"),
])  # fmt: skip
def test_errors_are_sentences_and_status_1(run, words, message):
    status, found, err = run(*words)
    assert status == 1 and message in found["error"] and err.strip().endswith(f"error: {found['error']}"[-40:])
    assert "Traceback" not in err


def test_info_of_nothing(run, tmp_path):
    status, found, _ = run("info", str(tmp_path / "nothing"), profile=False)
    assert status == 1 and found["error"].startswith("No SAE at")
    (tmp_path / "manifest.json").write_text('{"kind": "something", "long": ' + json.dumps(list(range(99))) + "}")
    status, found, _ = run("info", str(tmp_path), profile=False)
    assert status == 0 and found == {"what": "artifact", "kind": "something", "long": "99 entries"}
    assert run("info", str(tmp_path / "manifest.json"), profile=False)[1] == found
    (tmp_path / "manifest.json").write_text("[1]")
    status, found, _ = run("info", str(tmp_path), profile=False)
    assert status == 1 and "manifest.json must hold a JSON object, got a list. Delete" in found["error"]


def test_people_get_lines_and_tables():
    out = _text({"what": "x", "rows": [{"k": 1, "accuracy": 0.5}], "reads": {"layer": 4}}).splitlines()
    assert out[0] == "what: x" and out[2].split() == ["k", "accuracy"] and out[3].split() == ["1", "0.5"] and out[-1] == "  layer: 4"


def test_an_interrupted_command_says_that_it_goes_on_and_its_store_is_called_unfinished(run, monkeypatch, capsys):
    write = extraction._write

    def stops(folder, name, tensors):
        if name == "shard-00000.safetensors":
            raise KeyboardInterrupt
        return write(folder, name, tensors)

    monkeypatch.setattr(extraction, "_write", stops)
    assert main(["extract", "--profile", "mine.toml", "--set", "name=cut"]) == 130
    assert "The same command goes on from here" in capsys.readouterr().err
    status, found, _ = run("info", "runs/cut/activations/train", profile=False)
    assert status == 0 and found["what"] == "activation store, unfinished"


def test_the_module_is_a_command_that_teaches(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["patchsae_utils", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("patchsae_utils", run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "Exit status" in shown and "--profile imagenet" in shown
    for command in ("doctor", "extract", "train", "summarize", "sweep", "adapt", "info", "convert", "notebooks"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert command in shown and end.value.code == 0 and len(capsys.readouterr().out.splitlines()) > 8
    with pytest.raises(SystemExit) as end:
        main(["dance"])
    assert end.value.code == 2 and "invalid choice: 'dance'" in capsys.readouterr().err
