"""The hub, played by a small server of ours that speaks the client's protocol: what is pushed is what is loaded."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from tiny_saes import TOKENS, trained

from patchsae_utils.sae.files import load_sae, push_sae, save_sae


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as create_repo, upload_folder and snapshot_download ask for."""

    def do_GET(self, body=True):
        _, kind, *rest = self.path.partition("?")[0].split("/")
        repository = "/".join(rest[:2]) if kind == "api" and (rest := rest[1:]) else f"{kind}/{rest[0]}"
        held, commit = self.server.files.get(repository), f"{self.server.n_commits:040x}"
        if held is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if kind == "api" and rest[2:3] == ["tree"]:
            return self.answer([{"type": "file", "path": name, "size": len(data), "oid": commit} for name, data in held.items()])
        if kind == "api":
            about = {"id": repository, "modelId": repository, "sha": commit, "private": False, "tags": [], "downloads": 0}
            return self.answer(about | {"siblings": [{"rfilename": name} for name in held]})
        data = held.get("/".join(rest[3:]))  # <owner>/<name>/resolve/<revision>/<file>
        self.server.fetched.add("/".join(rest[3:]))
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_POST(self):
        sent, host = self.rfile.read(int(self.headers.get("Content-Length") or 0)), f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            wanted = json.loads(sent)
            if wanted["organization"] == "others":
                return self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.files.setdefault(name, {})
            return self.answer({"url": f"{host}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repository, act = re.match(r"/api/models/(\w+/\w+)/(preupload|commit)/", self.path).groups()
        if act == "preupload":
            told = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": file["path"], **told} for file in json.loads(sent)["files"]]})
        self.server.n_commits += 1
        for entry in map(json.loads, sent.splitlines()):
            if entry["key"] == "file":
                self.server.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = f"{self.server.n_commits:040x}"
        return self.answer({"commitUrl": f"{host}/{repository}/commit/{commit}", "commitOid": commit, "success": True})

    def answer(self, content, status=200, headers=(), body=True):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.n_commits, server.fetched = {}, 0, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_pushed_is_what_is_loaded(hub):
    sae = trained({"activation": "jumprelu"}, "mean_and_norm").eval()
    sae.metadata["metrics"] = {"explained_variance": 0.87654}
    address = push_sae(sae, "somebody/animals")
    names = ["README.md", "cfg.json", "sae_weights.safetensors"]
    assert address.endswith("/somebody/animals") and sorted(hub.files["somebody/animals"]) == names
    loaded = load_sae("hf:somebody/animals")
    assert loaded.fingerprint == sae.fingerprint
    torch.testing.assert_close(loaded.encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=0)
    card = hub.files["somebody/animals"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["license"]) == ("saelens", "mit") and "patchsae" in front["tags"]
    assert "| explained_variance | 0.8765 |" in card and 'ps.load_sae("hf:somebody/animals")' in card and "layer=4" in card
    assert load_sae("hf:somebody/animals@main").fingerprint == sae.fingerprint


def test_other_programs_sae_is_loaded_from_the_hub(hub, tmp_path):
    sae = trained({})
    path = save_sae(sae, tmp_path / "sae.pt", format="patchsae")
    hub.files["author/patchsae"] = {"sae.pt": path.read_bytes(), "notes.txt": b"x"}
    torch.testing.assert_close(load_sae("hf:author/patchsae").encode(TOKENS), sae.encode(TOKENS), rtol=0, atol=1e-6)


def test_nothing_but_the_named_folder_is_fetched(hub, tmp_path, monkeypatch):
    """FAULTS B6: `*.pt` also matched what lies in other folders, so the whole repository came, and was then refused."""
    few = trained({"activation": "topk", "k": 3}).eval()
    path = save_sae(few, tmp_path / "sae", format="visaebench")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    folders = [f"batchtopk_{size}x_k{k}" for size in (8, 16, 32) for k in (64, 128, 192, 256)]
    hub.files["bench/clip"] = {f"{folder}/{name}": data for folder in folders for name, data in files.items()}
    hub.files["bench/clip"] |= {"README.md": b"x", "batchtopk_8x_k64/deeper/sae.pt": b"x", "batchtopk_8x_k64/notes.txt": b"x"}
    for spec in ("batchtopk_8x_k64", "batchtopk_8x_k64/sae.pt"):
        torch.testing.assert_close(load_sae(f"hf:bench/clip/{spec}").encode(TOKENS), few.encode(TOKENS), rtol=0, atol=1e-5)
        assert hub.fetched == {"batchtopk_8x_k64/sae.pt", "batchtopk_8x_k64/config.json"}
    with pytest.raises(FileNotFoundError, match="bench/clip holds no SAE in its root. Folders that hold weights: .*batchtopk_16x_k128, "):
        load_sae("hf:bench/clip")
    assert len(hub.fetched) == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what was fetched stays at hand
    assert load_sae("hf:bench/clip/batchtopk_8x_k64").k == 3


def test_what_is_not_there_is_said(hub):
    with pytest.raises(FileNotFoundError, match="hf:nobody/nothing could not be fetched .*Check the name"):
        load_sae("hf:nobody/nothing")
    hub.files["a/b"] = {"cfg.json": b"{}"}
    with pytest.raises(FileNotFoundError, match="has no folder 'c'"):
        load_sae("hf:a/b/c")
    for spec in ("hf:alone", "hf:", "hf:a/b/../../x"):
        with pytest.raises(ValueError, match="is named hf:<owner>/<repository>"):
            load_sae(spec)
    with pytest.raises(ValueError, match="is named <owner>/<name>"):
        push_sae(trained({}), "alone")
    with pytest.raises(ConnectionError, match="others/sae could not be written on the hub .*403.*log in with a token that may write"):
        push_sae(trained({}), "others/sae")
