"""Files as disks and people treat them: flipped bits, cut ends, NaN, two writers, no permission, odd names. What is damaged is named."""

import contextlib
import dataclasses
import random

import numpy as np
import pandas as pd
import pytest
import tiny_training
import torch
from tiny import Changed, loud
from tiny_saes import TOKENS, trained

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.activations.store import ActivationStore
from patchsae_utils.activations.streaming import TokenStream
from patchsae_utils.adaptation.fit import ADAPTERS, load_adapter, save_adapter
from patchsae_utils.concepts.report import ComparisonReport, ConceptReport
from patchsae_utils.latents.likeness import Likeness, LikenessObserver
from patchsae_utils.latents.reading import summarize_latents
from patchsae_utils.latents.summary import LatentSummary
from patchsae_utils.run import artifacts
from patchsae_utils.run.artifacts import folder_lock
from patchsae_utils.sae.files import CONFIG, WEIGHTS, load_sae, save_sae
from patchsae_utils.sae.formats import FORMATS


def flipped(content: bytes, place: int, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", "shard-00001.safetensors"])
def test_every_flipped_bit_and_cut_end_of_a_store_is_noticed(tiny_store, name):
    """In every region of every file: header, names, checksums, numbers."""
    store = tiny_store.folder
    path, draw = store / name, random.Random(0)
    whole = path.read_bytes()
    try:
        for i in range(100):
            start = i * len(whole) // 100
            path.write_bytes(flipped(whole, draw.randrange(start, max(start + 1, (i + 1) * len(whole) // 100)), draw))
            with pytest.raises(ValueError, match="damaged|not valid JSON|not the manifest|format version|unfinished|JSON object"):
                ActivationStore.open(store).verify()
        for share in (0.0, 0.001, 0.3, 0.999):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=rf"{name} is (damaged.*only this file is written anew|not valid JSON)"):
                next(ActivationStore.open(store).tokens(64, epochs=1, shuffle=False))
                ActivationStore.open(store).verify()
    finally:
        path.write_bytes(whole)
    ActivationStore.open(store).verify()


@pytest.fixture(scope="module")
def artifacts_of_all_kinds(tiny_clip, tiny_sae, tiny_dataset, tmp_path_factory):
    """Folder -> what opens it, for everything that is kept beside stores and SAEs."""
    root = tmp_path_factory.mktemp("artifacts")
    likeness = LikenessObserver(tiny_clip, tiny_sae, tiny_dataset, -2, root / "likeness")
    summarize_latents(tiny_clip, tiny_sae, tiny_dataset, -2, out=root / "statistics", observers=[likeness], progress=False)
    save_adapter(loud(ADAPTERS["coop"], tiny_clip), root / "adapter")
    few = pd.DataFrame({"concept": ["red", "blue"], "ap": [0.5, 0.25]})
    ConceptReport(few, np.eye(2), few).save(root / "concepts")
    ComparisonReport(few, np.eye(2)).save(root / "comparison")
    return {
        root / "statistics": LatentSummary.load,
        root / "likeness": Likeness.load,
        root / "adapter": lambda folder: load_adapter(folder, tiny_clip),
        root / "concepts": ConceptReport.load,
        root / "comparison": ComparisonReport.load,
    }


def test_every_flipped_bit_and_cut_end_of_other_artifacts_is_noticed(artifacts_of_all_kinds):
    """But for those in the word "checksum", without which a manifest counts as one of before it had any."""
    draw = random.Random(4)
    for folder, opened in artifacts_of_all_kinds.items():
        opened(folder)
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            word = whole.find(b'"checksum"') if path.suffix == ".json" else -1
            places = [i * len(whole) // 40 + draw.randrange(max(1, len(whole) // 40)) for i in range(40)]
            for place in [each for each in places if not (word >= 0 and word <= each < word + 10)]:
                path.write_bytes(flipped(whole, place, draw))
                with pytest.raises((ValueError, FileNotFoundError), match="damaged|not valid JSON|JSON object|is missing|format version"):
                    opened(folder)
            for content in (b"", b"[]", b"{}", whole[: len(whole) // 2]):
                path.write_bytes(content)
                message = "damaged|not valid JSON|JSON object|format version|describes None"
                with pytest.raises((ValueError, FileNotFoundError), match=message):
                    opened(folder)
            path.write_bytes(whole)


def test_artifacts_of_before_checksums_are_read(artifacts_of_all_kinds):
    for folder, opened in artifacts_of_all_kinds.items():
        path = folder / "manifest.json"
        whole = path.read_bytes()
        manifest = artifacts.read_checked_json(path)
        manifest.pop("files", None)
        artifacts.write_json(path, manifest)
        opened(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["statistics", "likeness", "adapter", "concepts", "comparison"])
def test_a_manifest_that_makes_no_sense_ends_in_a_documented_error(artifacts_of_all_kinds, kind):
    """Without a checksum, as somebody might write one by hand: whatever stands in place of an entry."""
    (folder, opened) = next(item for item in artifacts_of_all_kinds.items() if item[0].name == kind)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    manifest = artifacts.read_checked_json(path)
    values = (None, True, -1, 2.5, "x", [], [1, "x"], {}, {"x": 1}, {"x": None})
    changed = [manifest | {name: value} for name in manifest for value in values]
    for content in changed + [{key: manifest[key] for key in manifest if key != name} for name in manifest]:
        artifacts.write_json(path, content)
        try:
            opened(folder)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error)) > 40
    path.write_bytes(whole)


@pytest.mark.parametrize("options", [{"activation": "jumprelu"}, {"activation": "batchtopk", "k": 3}], ids=["jumprelu", "batchtopk"])
def test_a_flipped_bit_of_an_sae_is_noticed_or_changes_no_latent(tmp_path, options):
    sae = trained(options).eval()
    draw, latents = random.Random(1), sae.encode(TOKENS)
    for path in (sae.save(tmp_path) / WEIGHTS, tmp_path / CONFIG):
        whole = path.read_bytes()
        for _ in range(250):
            path.write_bytes(flipped(whole, draw.randrange(len(whole)), draw))
            with pytest.raises(ValueError, match="damaged") if path.name == WEIGHTS else contextlib.suppress(ValueError):
                torch.testing.assert_close(load_sae(tmp_path).encode(TOKENS), latents, rtol=0, atol=0)
        path.write_bytes(whole)


@pytest.mark.parametrize("form", ["patchsae", "prisma", "saev", "sparsify", "dictionary_learning"])
def test_flipped_bits_of_other_programs_files_end_in_a_documented_error(tmp_path, form):
    """They carry no checksum of the whole; no other kind of error comes out."""
    options = {"activation": "topk", "k": 3} if "relu" not in FORMATS[form].activations else {}
    path = save_sae(trained(options), tmp_path / "sae", format=form)
    files, draw = [path] if path.is_file() else sorted(path.iterdir()), random.Random(3)
    for file in files:
        whole = file.read_bytes()
        for _ in range(60):
            file.write_bytes(flipped(whole, draw.randrange(len(whole)), draw))
            with contextlib.suppress(ValueError, FileNotFoundError):
                load_sae(path)
        file.write_bytes(whole)


def spoiled(clip, value):
    """A model one of whose activations is no number."""

    def run_to(images, layer):
        stream = clip.run_to(images, layer)
        tokens = stream.tokens.clone()
        tokens[0, 3, 5] = value
        return stream._replace(tokens=tokens)

    return Changed(clip, run_to=run_to, residual=lambda images, layer: run_to(images, layer).tokens)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_no_numbers_are_neither_stored_nor_counted(tiny_clip, tiny_sae, tiny_dataset, tmp_path, value):
    message = "don't fit bfloat16. The model itself gives NaN or infinity.*1 of 24, at places 0 in the data set"
    with pytest.raises(ValueError, match=message):
        extract_activations(spoiled(tiny_clip, value), tiny_dataset, -2, tmp_path / "store", progress=False)
    assert not list((tmp_path / "store").glob("shard-*"))
    stream = TokenStream(spoiled(tiny_clip, value), tiny_dataset, -2, batch_size=24, buffer_bytes=1 << 30)
    with pytest.raises(ValueError, match=message):
        next(stream.tokens(100, shuffle=False))
    message = r"'tiny' after layer -2 holds NaN or infinity in 1 of 7 images of a batch \(places 0 in the data set\)"
    with pytest.raises(ValueError, match=message):
        summarize_latents(spoiled(tiny_clip, value), tiny_sae, tiny_dataset, -2, out=tmp_path / "s", batch_size=7, progress=False)
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_no_numbers_are_not_learned(tmp_path, value):
    class Bad(tiny_training.Store):
        def tokens(self, *args, **kwargs):
            for i, (x, positions) in enumerate(super().tokens(*args, **kwargs)):
                yield x.masked_fill(torch.full_like(x, i == 3, dtype=torch.bool), value), positions

    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step 3. Look for NaN or infinite activations in the store"):
        tiny_training.run(tmp_path, dataclasses.replace(tiny_training.CONFIG, log_every=1), Bad())


def test_two_runs_in_one_folder_are_not_mixed(tiny_clip, tiny_sae, tiny_dataset, tmp_path):
    with folder_lock(tmp_path), pytest.raises(ValueError, match="is being written by"):
        extract_activations(tiny_clip, tiny_dataset, -2, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    call = lambda: summarize_latents(tiny_clip, tiny_sae, tiny_dataset, -2, out=tmp_path / "s", progress=False)  # noqa: E731
    folder = tmp_path / ".s-unfinished"
    with folder_lock(folder), pytest.raises(ValueError, match="is being written by"):
        call()
    assert not folder.exists() or list(folder.iterdir()) == []
    call()
    assert not (folder / ".lock").exists()
    with folder_lock(folder):
        call()  # what is finished is opened


@pytest.mark.parametrize("name", ["mit Leerzeichen", "ünïcödé", "日本語", "a'b\"c", "100%", "-x"])
def test_names_of_any_kind(tmp_path, name):
    sae = trained({})
    for form in ("saelens", "patchsae"):
        assert load_sae(save_sae(sae, tmp_path / name / form, format=form)).W_enc.equal(sae.W_enc)
