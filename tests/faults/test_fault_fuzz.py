"""Settings and file contents at random: only documented errors come out."""

import dataclasses
import json
from importlib import resources

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_saes import trained

from patchsae_utils.activations.store import ActivationStore
from patchsae_utils.config import _SECTIONS, Profile, load_profile
from patchsae_utils.sae.files import CONFIG, load_sae, save_sae

NAMES = [f"{section}.{item.name}" for section, kind in _SECTIONS.items() for item in dataclasses.fields(kind)] + [
    "name", "training.speed", "x.y", "",
]  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
LIGHT = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LIGHT
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_edit_of_a_profile_is_taken_or_refused_in_words(edits):
    try:
        assert isinstance(load_profile("openmoji", edits), Profile)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) > 20


WHOLE = (resources.files("patchsae_utils") / "profiles" / "openmoji.toml").read_bytes()


@LIGHT
@given(
    st.integers(0, len(WHOLE)),
    st.integers(0, 40),
    st.binary(max_size=30) | st.sampled_from([b"[data]", b"sae = 3\n", b'""', b"\n=", b"nan", b"{}"]),
)
def test_any_change_of_a_profiles_bytes_is_taken_or_refused_in_words(tmp_path, start, n_lost, put_in):
    path = tmp_path / "mine.toml"
    path.write_bytes(WHOLE[:start] + put_in + WHOLE[start + n_lost :])
    try:
        assert isinstance(load_profile(path), Profile)
    except ValueError as error:
        assert "mine.toml" in str(error) or "A profile's name" in str(error)
    except FileNotFoundError as error:
        assert "environment variable" in str(error)


ENTRIES = ["architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "normalize_activations", "metadata", "activation_fn_str"]
ENTRIES += ["activation_fn_kwargs", "trainer", "hook_point_layer", "model_name"]


@LIGHT
@given(st.sampled_from(ENTRIES), JSON, st.sampled_from(["saelens", "prisma", "dictionary_learning"]))
def test_any_entry_of_an_saes_config_is_read_or_refused(tmp_path, name, value, form):
    folder = tmp_path / form
    config, whole = folder / (CONFIG if form == "saelens" else "config.json"), tmp_path / f"{form}.json"
    if not folder.exists():
        save_sae(trained({}), folder, format=form)
        whole.write_bytes(config.read_bytes())
    config.write_text(json.dumps(json.loads(whole.read_text()) | {name: value}))
    try:
        load_sae(folder)
    except ValueError as error:
        assert str(folder) in str(error) or (form == "saelens" and CONFIG in str(error))


@LIGHT
@given(JSON)
def test_any_manifest_is_refused(tmp_path, value):
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    try:
        ActivationStore.open(tmp_path)
        raise AssertionError("nothing of this is a store")
    except ValueError as error:
        assert "manifest" in str(error)
