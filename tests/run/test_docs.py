"""docs/formats.md is true: with nothing but it, a reader written from scratch gets the same numbers."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import torch
from tiny_saes import TOKENS, trained

from patchsae_utils.activations.extraction import extract_activations
from patchsae_utils.sae.formats import FORMATS

DOCS = Path(__file__).parents[2] / "docs"


def read_safetensors(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BF16": "<u2"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(body[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def test_an_sae_by_the_book(tmp_path):
    sae = trained({}).eval()
    w = read_safetensors(sae.save(tmp_path) / "sae_weights.safetensors")
    latents = np.maximum((TOKENS.numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(latents, sae.encode(TOKENS).detach().numpy(), atol=1e-5)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["metadata"]["weights_sha256"] == hashlib.sha256((tmp_path / "sae_weights.safetensors").read_bytes()).hexdigest()


def test_a_store_by_the_book(tiny_clip, tiny_dataset, tmp_path):
    store = extract_activations(tiny_clip, tiny_dataset, -2, tmp_path, n_per_shard=10, progress=False)
    raw = (tmp_path / "shard-00001.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    image, token, width = 3, 7, store.d_in
    start = 8 + length + 2 * width * (image * store.n_tokens + token)
    bits = np.frombuffer(raw[start : start + 2 * width], "<u2").astype(np.uint32) << 16  # bfloat16 is the upper half of float32
    tokens, _, _ = next(store.images([10 + image]))
    torch.testing.assert_close(torch.from_numpy(bits.view(np.float32)), tokens[0, token], rtol=0, atol=0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    checksum = manifest.pop("checksum")
    assert checksum == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def test_every_format_and_entry_is_described(tmp_path):
    text = (DOCS / "formats.md").read_text()
    for form in FORMATS:
        assert f"| `{form}` |" in text
    config = json.loads((trained({}).save(tmp_path) / "cfg.json").read_text())
    for name in (set(config) - {"metadata"}) | set(config["metadata"]):
        assert f"`{name}`" in text or f".{name}`" in text, name


def test_the_bytes_of_the_plan_are_right():
    text = (DOCS / "scaling.md").read_text()
    image = 197 * 768 * 2
    assert f"{image:,} bytes" in text
    for n, said in ((100_000, "30 GB"), (1_281_167, "388 GB"), (14.2e6, "4.3 TB"), (400e6, "121 TB")):
        number, unit = said.split()
        assert round(n * image / {"GB": 1e9, "TB": 1e12}[unit], 1 if unit == "TB" and n < 1e8 else 0) == float(number) and said in text
    for n, said in ((100_000, 18e9), (1_281_167, 227e9), (14.2e6, 2.5e12), (400e6, 71e12)):
        assert abs(n * 197 * 150 * 6 / said - 1) < 0.02
