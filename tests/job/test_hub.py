"""The hub, spoken to over real HTTP: a small server on this machine that knows the few routes a download needs."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from job.storage.hub import commit_of, looks_like_hub_id

REPOSITORY = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    """Status and error code with which every question is answered."""
    wrong_bytes: dict[str, list[bytes]] = field(default_factory=dict)
    """What the next downloads of a file bring instead."""
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def listing(self) -> list[dict[str, Any]]:
        """Each file as the hub lists it: large ones with SHA-256, small ones with git's SHA-1."""
        entries = []
        for name, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": name, "rfilename": name, "size": len(data)}
            entry |= {"oid": blob, "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 130}
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.refusal:
            status, code = self.hub.refusal
            return self.send(status, b"{}", body, {"X-Error-Code": code} if code else {})
        if path.startswith("/api/models/org/tiny/tree/"):
            return self.send(200, json.dumps(self.hub.listing()).encode(), body)
        if path.startswith("/api/models/org/tiny"):
            revision = path.removeprefix("/api/models/org/tiny").removeprefix("/revision/")
            if revision not in ("", "main", COMMIT):
                return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": self.hub.listing(), "tags": []}
            return self.send(200, json.dumps(info).encode(), body)
        if path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            return self.send_file(path.rpartition("/")[2], body)
        return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str, body: bool) -> None:
        wrong = self.hub.wrong_bytes.get(name, [])
        data = (wrong.pop(0) if body else wrong[0]) if wrong else self.hub.files[name]
        entry = next(entry for entry in self.hub.listing() if entry["path"] == name)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        self.send(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    there = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"{}",
            "model.safetensors": os.urandom(100_000),
            "pytorch_model.bin": b"pickle",
            "modeling_tiny.py": b"raise SystemExit",
            "model.gguf": b"gguf",
            "tf_model.h5": b"h5",
            "README.md": b"# tiny",
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfThisTest", (Handler,), {"hub": there}))
    there.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield there
    server.shutdown()
    server.server_close()


PULL = """
import json, sys
from pathlib import Path
from job.errors import JobError
from job.storage.hub import pull
name, revision, to, patience = sys.argv[1:]
try:
    folder, commit = pull(name, revision or None, Path(to), patience_seconds=float(patience))
    print(json.dumps({"folder": str(folder), "commit": commit}))
except JobError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass
class Puller:
    """Pulls in a process of its own: the library reads its environment when it is imported."""

    home: Path
    to: Path
    stderr: str = ""

    def __call__(self, port: int, name: str = "org/tiny", revision: str = "", **environment: str) -> dict[str, str]:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PULL, name, revision, str(self.to), "0"],
            cwd=REPOSITORY,
            env=os.environ | settings | environment,
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
        self.stderr = done.stderr
        assert done.returncode == 0, done.stderr
        result: dict[str, str] = json.loads(done.stdout)
        return result


@pytest.fixture
def pull(tmp_path: Path) -> Puller:
    return Puller(tmp_path / "hf", tmp_path / "pulled")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_model_is_brought_with_the_files_a_run_reads_and_its_commit(hub: Hub, pull: Puller) -> None:
    result = pull(hub.port)
    assert result["commit"] == COMMIT
    folder = Path(result["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert folder.is_relative_to(pull.to)
    assert commit_of(folder) == COMMIT
    assert "%|" not in pull.stderr  # no progress bar


def test_pickled_weights_are_brought_only_where_there_are_no_others(hub: Hub, pull: Puller) -> None:
    del hub.files["model.safetensors"]
    names = {path.name for path in Path(pull(hub.port)["folder"]).iterdir()}
    assert "pytorch_model.bin" in names
    assert "modeling_tiny.py" not in names


def test_a_second_pull_downloads_nothing(hub: Hub, pull: Puller) -> None:
    pull(hub.port)
    hub.asked.clear()
    assert pull(hub.port)["commit"] == COMMIT
    assert [line for line in hub.asked if "/resolve/" in line] == []


def test_a_commit_may_be_named(hub: Hub, pull: Puller) -> None:
    assert pull(hub.port, revision=COMMIT)["commit"] == COMMIT


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        ((404, "RepoNotFound"), "InputMissing", ["no folder 'org/tiny' here either", "check the spelling"]),
        ((404, ""), "InputMissing", ["not on the hub"]),
        ((403, "GatedRepo"), "AccessDenied", ["gated", "ask for access at http://127.0.0.1", "/org/tiny", "HF_TOKEN"]),
        ((401, "GatedRepo"), "AccessDenied", ["gated", "HF_TOKEN"]),
        ((401, "RepoNotFound"), "AccessDenied", ["401", "private, does not exist", "/org/tiny"]),
        ((403, ""), "AccessDenied", ["403", "HF_TOKEN"]),
        ((503, ""), "TemporaryFailure", ["cannot reach the hub at 127.0.0.1", "answers 503", "name its folder"]),
        ((429, ""), "TemporaryFailure", ["answers 429"]),
    ],
)
def test_a_refusal_says_what_it_means(
    refusal: tuple[int, str], error: str, words: list[str], hub: Hub, pull: Puller
) -> None:
    hub.refusal = refusal
    result = pull(hub.port)
    assert result.get("error") == error, result
    assert [word for word in words if word not in result["message"]] == [], result["message"]
    assert result["message"].startswith("model org/tiny: ")
    assert "\n" not in result["message"]


def test_an_unknown_model_is_missing(hub: Hub, pull: Puller) -> None:
    result = pull(hub.port, name="org/other")
    assert result["error"] == "InputMissing"
    assert "org/other" in result["message"]


def test_an_unknown_revision_is_named(hub: Hub, pull: Puller) -> None:
    result = pull(hub.port, revision="v7")
    assert result["error"] == "InputMissing"
    assert "no revision 'v7'" in result["message"]


def test_a_model_without_weights_is_missing_before_anything_is_brought(hub: Hub, pull: Puller) -> None:
    hub.files = {name: data for name, data in hub.files.items() if "model." not in name}
    result = pull(hub.port)
    assert result["error"] == "InputMissing"
    assert "no safetensors" in result["message"]


def test_an_unreachable_hub_is_a_temporary_failure_that_names_the_way_out(closed_port: int, pull: Puller) -> None:
    result = pull(closed_port)
    assert result["error"] == "TemporaryFailure"
    assert f"cannot reach the hub at 127.0.0.1:{closed_port}" in result["message"]
    assert "name its folder" in result["message"]


def fill_cache(hub: Hub, pull: Puller) -> None:
    """As other programs on a laptop do."""
    code = "from huggingface_hub import snapshot_download; snapshot_download('org/tiny')"
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(pull.home), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | settings, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub_does_not_matter_when_the_cache_has_the_model(
    offline: str, hub: Hub, closed_port: int, pull: Puller
) -> None:
    fill_cache(hub, pull)
    result = pull(closed_port, HF_HUB_OFFLINE=offline)
    assert result.get("commit") == COMMIT, result
    assert Path(result["folder"]).is_relative_to(pull.home)


def test_offline_without_the_model_is_missing(closed_port: int, pull: Puller) -> None:
    result = pull(closed_port, HF_HUB_OFFLINE="1")
    assert result["error"] == "InputMissing"
    assert "HF_HUB_OFFLINE" in result["message"]


def test_what_the_machines_cache_holds_is_not_downloaded_again(hub: Hub, pull: Puller) -> None:
    fill_cache(hub, pull)
    hub.asked.clear()
    assert Path(pull(hub.port)["folder"]).is_relative_to(pull.home)
    assert [line for line in hub.asked if "/resolve/" in line] == []


def test_a_cache_whose_bytes_changed_is_not_believed(hub: Hub, pull: Puller) -> None:
    fill_cache(hub, pull)
    (weights,) = pull.home.rglob("model.safetensors")
    blob = weights.resolve()
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(hub.files["model.safetensors"])))
    folder = Path(pull(hub.port)["folder"])
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_file_damaged_once_is_downloaded_again(hub: Hub, pull: Puller) -> None:
    good = hub.files["model.safetensors"]
    hub.wrong_bytes["model.safetensors"] = [bytes(len(good))]
    folder = Path(pull(hub.port)["folder"])
    assert (folder / "model.safetensors").read_bytes() == good


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["bytes", "size"])
def test_a_file_damaged_twice_is_an_integrity_failure(name: str, change: str, hub: Hub, pull: Puller) -> None:
    good = hub.files[name]
    bad = bytes(len(good)) if change == "bytes" else good[:-10]
    hub.wrong_bytes[name] = [bad] * 6
    result = pull(hub.port)
    assert result.get("error") == "IntegrityFailure", result
    assert f"{name} is not what the hub says" in result["message"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("a/b", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("~/name", False),
        ("org/name/more", False),
        ("org/na me", False),
        ("org/name.git", False),
        ("org/..", False),
        ("../name", False),
        ("s3://org/name", False),
        ("org/", False),
        ("", False),
    ],
)
def test_a_hub_id_has_the_form_org_name(text: str, expected: bool) -> None:
    assert looks_like_hub_id(text) is expected


def test_a_folder_of_ones_own_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
