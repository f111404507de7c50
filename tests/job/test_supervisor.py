"""The supervisor at the moments that a whole run meets too rarely: about to publish, overtaken, refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from job import layout
from job.errors import TemporaryFailure
from job.exits import ExitCode
from job.files import write_json
from job.spec import JobSpec, digest, dump
from job.storage import transfer
from job.storage.directory import DirectoryStore
from job.storage.store import to_json
from job.supervision.own import claim, read_owner
from job.supervision.supervisor import Attempt


@pytest.fixture
def spec(tiny_llama: Path, tmp_path: Path) -> JobSpec:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    return JobSpec.model_validate({"name": "toy", "model": str(tiny_llama), "data": {"train": str(data)}})


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "out", str(tmp_path / "out"))


@pytest.fixture
def attempt(spec: JobSpec, store: DirectoryStore, tmp_path: Path) -> Iterator[Attempt]:
    """An attempt that has done its preflight."""
    made = Attempt(spec, store.uri, tmp_path / "work")
    made.workdir.root.mkdir(parents=True)
    made._store = store
    yield made
    made.close(ExitCode.FENCED, "the test is over")


def publish(store: DirectoryStore, spec: JobSpec, folder: Path) -> None:
    """What another attempt publishes meanwhile."""
    folder.mkdir()
    files = {}
    for name in (layout.ADAPTER_SAFETENSORS, layout.TRAINING_LOG, layout.METRICS):
        (folder / name).write_text(f"{name} of the other attempt")
        files[name] = folder / name
    (folder / "spec").write_text(dump(spec))
    transfer.publish(store, files | {layout.TRAINING_CONFIG: folder / "spec"}, {"spec_digest": digest(spec)})


def is_whole(store: DirectoryStore) -> bool:
    manifest = transfer.read_manifest(store)
    assert manifest is not None
    transfer.verify_manifest(store, manifest)
    return True


def ready_to_publish(attempt: Attempt) -> None:
    work = attempt.workdir
    for path in (work.evaluation, work.data_report, work.verification):
        write_json(path, {"skipped": "nothing to evaluate on"})
    write_json(work.performance, {"phases": {"load": 1.0, "train": 1.0}, "peak_bytes": {}})
    attempt._seconds["worker"] = 3.0
    work.adapter.mkdir()
    (work.adapter / layout.ADAPTER_SAFETENSORS).write_text("weights")
    work.metrics.write_text('{"step": 1}\n')


def test_a_result_whose_publication_was_not_heard_of_is_left_as_it_is(
    attempt: Attempt, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest landed, the reply was lost, and the store was away too long: 75, and a whole result."""
    assert attempt._own(store)
    ready_to_publish(attempt)
    write = DirectoryStore.write

    def lose_reply(self: DirectoryStore, key: str, data: bytes, **condition: object) -> str:
        etag = write(self, key, data, **condition)  # type: ignore[arg-type]
        if key == layout.MANIFEST:
            raise TemporaryFailure("the reply was lost")
        return etag

    monkeypatch.setattr(DirectoryStore, "write", lose_reply)
    monkeypatch.setattr("job.supervision.supervisor.model_card", lambda *_: "card")
    monkeypatch.setattr("job.supervision.supervisor.eval_results", lambda *_: {})
    inputs = attempt._survey(store)[0].inputs
    with pytest.raises(TemporaryFailure):
        attempt._publish(store, inputs)
    monkeypatch.setattr(DirectoryStore, "write", write)
    attempt.close(ExitCode.TEMPFAIL, "the reply was lost")
    assert is_whole(store)
    assert json.loads((store.root / layout.attempt_key(1)).read_text())["exit_code"] == 75


def test_an_attempt_that_lost_the_run_unaware_writes_nothing_more(
    attempt: Attempt, store: DirectoryStore, spec: JobSpec, tmp_path: Path
) -> None:
    assert attempt._own(store)
    found = read_owner(store)
    assert found is not None
    successor = replace(found[0], generation=2, nonce="b" * 32)
    store.write(layout.OWNER, to_json(successor.record()), if_match=found[1])
    (store.root / layout.TRAINING_CONFIG).unlink()
    publish(store, spec, tmp_path / "other")
    if attempt._courier is not None:
        attempt._courier.stop()
    before = {entry.key: entry.etag for entry in store.list("")}
    attempt.close(ExitCode.INTERRUPTED, "asked to leave")
    assert {entry.key: entry.etag for entry in store.list("")} == before
    assert is_whole(store)


def test_a_run_that_is_published_while_a_newcomer_waits_is_a_no_op_for_it(
    attempt: Attempt, store: DirectoryStore, spec: JobSpec, tmp_path: Path
) -> None:
    first = claim(store, digest(spec), heartbeat=False)
    assert not attempt._already_published(store)
    publish(store, spec, tmp_path / "other")
    first.release("OK")
    assert attempt._own(store) is False
    attempt.close(ExitCode.OK, "")
    assert is_whole(store)
    assert not list(store.list(layout.ATTEMPTS))
    owner = read_owner(store)
    assert owner is not None
    assert owner[0].ended == "OK"


def test_a_refused_attempt_leaves_the_owner_s_downloads(
    attempt: Attempt, store: DirectoryStore, spec: JobSpec, tmp_path: Path
) -> None:
    owner = claim(store, digest(spec), heartbeat=False)
    brought = attempt._brought / "model"
    brought.mkdir(parents=True)
    attempt.close(ExitCode.CONFLICT, "the inputs changed")
    assert brought.exists()
    owner.release("OK")


def test_the_number_of_an_attempt_is_above_every_one_before(attempt: Attempt, store: DirectoryStore) -> None:
    store.write(layout.attempt_key(7), b"{half")
    assert attempt._own(store)
    assert attempt._status.attempt == 8
