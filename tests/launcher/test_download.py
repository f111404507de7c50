"""Proving and fetching what a run published: nothing damaged, nothing outside the folder, nothing overwritten."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunejob
from job import layout
from job.errors import JobError, TemporaryFailure
from job.storage.directory import DirectoryStore
from launcher import remote, results
from launcher.codes import Code, NoResult, Refused, RunFailed
from launcher.download import fetch, verify
from launcher.profile import Profile
from launcher.runs import of
from tests.launcher.standin import kube_job, pod

ADAPTER = {
    layout.ADAPTER_CONFIG: b'{"r": 4}',
    layout.ADAPTER_SAFETENSORS: bytes(range(256)) * 40,
    layout.EVAL_RESULTS: b'{"run": "toy"}',
}
CHECKPOINT = "checkpoints/checkpoint-2/"


def listing(files: dict[str, bytes]) -> bytes:
    """What a manifest or a marker says of files."""
    records = [{"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()]
    return json.dumps({"version": 1, "files": records}).encode()


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """A published run with a checkpoint and a ledger."""
    store = DirectoryStore(tmp_path / "run", "file:run")
    weights = {layout.ADAPTER_SAFETENSORS: b"weights of step 2"}
    for key, data in {
        **ADAPTER,
        layout.MANIFEST: listing(ADAPTER),
        **{CHECKPOINT + name: data for name, data in weights.items()},
        CHECKPOINT + layout.COMMIT: listing(weights),
        "checkpoints/checkpoint-4/half.bin": b"never committed",
        layout.attempt_key(1): b'{"attempt": 1}',
        layout.STATUS: b'{"run": "toy", "attempt": 1, "phase": "publish"}',
    }.items():
        store.write(key, data)
    return store


def there(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_published_and_whole_is_verified(store: DirectoryStore) -> None:
    found = verify(store, hashlib.sha256(listing(ADAPTER)).hexdigest())
    assert [file.name for file in found.files] == list(ADAPTER)
    assert str(found).startswith("file:run: 3 files (10.0 KiB) verified, manifest ")


def alter(key: str, data: bytes) -> Callable[[DirectoryStore], object]:
    return lambda store: store.write(key, data)


@pytest.mark.parametrize(
    ("damage", "digest", "words"),
    [
        (alter(layout.ADAPTER_CONFIG, b'{"r": 8}'), "", "adapter_config.json is altered"),
        (lambda store: store.delete(layout.ADAPTER_CONFIG), "", "adapter_config.json is gone"),
        (lambda store: store.delete(layout.MANIFEST), "", "nothing is published"),
        (alter(layout.MANIFEST, b"[]"), "", "no list of files"),
        (alter(layout.MANIFEST, b'{"files": [{"name": "a"}]}'), "", "no list of files"),
        (alter(layout.MANIFEST, listing({"../out": b""})), "", "no list of files"),
        (lambda store: None, "0" * 64, "but the run's pod said 000000000000"),
    ],
)
def test_what_is_not_as_it_was_published_is_named(
    damage: Callable[[DirectoryStore], object], digest: str, words: str, store: DirectoryStore
) -> None:
    damage(store)
    with pytest.raises(NoResult, match=words) as caught:
        verify(store, digest)
    assert caught.value.exit_code == Code.NO_RESULT


def test_the_adapter_is_fetched_with_its_manifest_and_is_a_run_again(store: DirectoryStore, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    paths = fetch(store, folder)
    assert there(folder) == {**ADAPTER, layout.MANIFEST: listing(ADAPTER)}
    assert paths == sorted(folder / name for name in there(folder))
    assert results.load(str(folder)).name == "toy"


def test_python_verifies_and_fetches_as_the_command_does(store: DirectoryStore, tmp_path: Path) -> None:
    fetched = tunejob.results(tmp_path / "run", download=tmp_path / "here", everything=True)
    assert (fetched.uri, fetched["run"]) == (str(tmp_path / "here"), "toy")
    assert there(tmp_path / "here").keys() > {layout.ADAPTER_SAFETENSORS, layout.attempt_key(1)}
    store.write(layout.ADAPTER_CONFIG, b"altered")
    assert tunejob.results(tmp_path / "run")["run"] == "toy"
    with pytest.raises(NoResult, match="altered"):
        tunejob.results(tmp_path / "run", verify=True)


def test_everything_is_all_that_is_committed_or_recorded(store: DirectoryStore, tmp_path: Path) -> None:
    prepared = f"{layout.prepared_prefix('k1')}train/data.arrow"  # the user's data, of a run that is not published
    store.write(prepared, b"tokens")
    fetch(store, tmp_path / "here", everything=True)
    left_out = {"checkpoints/checkpoint-4/half.bin", "run/.lock", prepared}
    assert there(tmp_path / "here") == {k: v for k, v in there(tmp_path / "run").items() if k not in left_out}


def test_fetching_again_keeps_what_is_there_and_brings_what_is_missing(store: DirectoryStore, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    fetch(store, folder)
    kept, lost = folder / layout.ADAPTER_SAFETENSORS, folder / layout.ADAPTER_CONFIG
    before = kept.stat().st_mtime_ns
    lost.rename(folder / f"{layout.ADAPTER_CONFIG}.part")  # as a fetch that was cut off leaves it
    fetch(store, folder)
    assert kept.stat().st_mtime_ns == before
    assert there(folder) == {**ADAPTER, layout.MANIFEST: listing(ADAPTER)}


@pytest.mark.parametrize("name", [layout.ADAPTER_CONFIG, layout.MANIFEST])
def test_another_file_in_the_way_is_refused_before_anything_is_fetched(
    name: str, store: DirectoryStore, tmp_path: Path
) -> None:
    mine = tmp_path / "here" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(Refused, match="is another than that of the run"):
        fetch(store, tmp_path / "here")
    assert there(tmp_path / "here") == {name: b"mine"}


def test_a_damaged_file_never_takes_its_place(store: DirectoryStore, tmp_path: Path) -> None:
    store.write(layout.ADAPTER_CONFIG, b"damaged!")
    with pytest.raises(NoResult, match="not the bytes that were published"):
        fetch(store, tmp_path / "here")
    assert layout.ADAPTER_CONFIG not in there(tmp_path / "here")
    assert not list((tmp_path / "here").rglob("*.part"))


@pytest.mark.parametrize("name", ["C:evil", "sub/nul", "aux.txt", "trailing.", "a:stream"])
def test_a_name_that_means_something_else_on_another_system_is_refused(name: str, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "run")
    store.write(name, b"x")
    store.write(layout.MANIFEST, listing({name: b"x"}))
    with pytest.raises(Refused, match="nothing was fetched"):
        fetch(store, tmp_path / "here")


def test_a_link_out_of_the_folder_is_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "here"
    outside.mkdir()
    folder.mkdir()
    os.symlink(outside, folder / "run")
    with pytest.raises(Refused, match="would be written outside"):
        fetch(store, folder)
    assert there(outside) == {}


@pytest.mark.parametrize(
    ("job", "published", "error"),
    [
        (kube_job("Complete"), False, NoResult),
        (kube_job("Failed"), False, RunFailed),
        (kube_job(), False, Refused),
        (kube_job("Complete"), True, None),
        (kube_job(), True, None),
    ],
)
def test_the_manifest_decides_whether_a_run_has_results(
    job: dict[str, Any], published: bool, error: type[JobError] | None, store: DirectoryStore
) -> None:
    run = of(job, [pod("p-1")])
    if not published:
        store.delete(layout.MANIFEST)
    if error is None:
        assert results.read(store, run)["run"] == "toy"
    else:
        with pytest.raises(error, match=run.id):
            results.read(store, run)


def test_a_store_tells_status_and_ledger_and_an_empty_one_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    store.write(layout.attempt_key(2), b"\xff not json")
    told = remote.told(store)
    assert told is not None
    status, ledger = told
    assert status is not None
    assert (status.phase, [line["attempt"] for line in ledger]) == ("publish", [1])
    assert remote.told(DirectoryStore(tmp_path / "empty")) is None


def profile(**store: Any) -> Profile:
    """A profile with a store."""
    return Profile.model_validate({"image": "x", "store": {"output": "s3://bucket/runs", **store}})


@pytest.mark.parametrize(
    ("store", "settings"),
    [
        ({}, {}),
        ({"endpoint": "http://minio:9000"}, {"AWS_ENDPOINT_URL_S3": "http://minio:9000"}),
        (
            {"endpoint": "http://minio:9000", "client_endpoint": "https://minio.example", "region": "eu-1"},
            {"AWS_ENDPOINT_URL_S3": "https://minio.example", "AWS_REGION": "eu-1"},
        ),
        (
            {"addressing": "virtual", "checksums": "when_required"},
            {
                "TUNEJOB_S3_ADDRESSING": "virtual",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            },
        ),
    ],
)
def test_the_store_is_reached_as_the_profile_says(store: dict[str, Any], settings: dict[str, str]) -> None:
    assert remote.settings_of(profile(**store)) == settings


def test_a_store_that_does_not_answer_is_one_sentence_that_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(8))
    with pytest.raises(TemporaryFailure, match=r"store\.client_endpoint in the profile.*port-forward") as caught:
        remote.open_run("s3://bucket/runs/toy", profile(endpoint="http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)
    assert "cannot be reached" in str(caught.value)
