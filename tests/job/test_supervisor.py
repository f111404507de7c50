"""The supervisor at the moments that a whole run meets too rarely: about to publish, overtaken, refused."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from job import layout
from job.errors import DataInvalid, DiskFailure, Interrupted, RankLost, TemporaryFailure
from job.exits import ExitCode
from job.files import write_json
from job.spec import JobSpec, digest, dump
from job.storage import transfer
from job.storage.directory import DirectoryStore
from job.storage.store import to_json
from job.supervision.announce import TERMINATION_LOG
from job.supervision.courier import Courier
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
    attempt._account.seconds["worker"] = 3.0
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
    monkeypatch.setattr("job.supervision.publishing.model_card", lambda *_: "card")
    monkeypatch.setattr("job.supervision.publishing.eval_results", lambda *_: {})
    with pytest.raises(TemporaryFailure):
        attempt._publish(store)
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
    brought = attempt._folders.inputs / "model"
    brought.mkdir(parents=True)
    attempt.close(ExitCode.CONFLICT, "the inputs changed")
    assert brought.exists()
    owner.release("OK")


def test_the_number_of_an_attempt_is_above_every_one_before(attempt: Attempt, store: DirectoryStore) -> None:
    store.write(layout.attempt_key(7), b"{half")
    assert attempt._own(store)
    assert attempt._account.status.attempt == 8


def test_a_result_of_an_owner_that_had_lost_the_run_unaware_is_left_as_it_is(
    attempt: Attempt, store: DirectoryStore, spec: JobSpec, tmp_path: Path
) -> None:
    assert attempt._own(store)
    ready_to_publish(attempt)
    (store.root / layout.TRAINING_CONFIG).unlink()
    publish(store, spec, tmp_path / "other")
    before = {entry.key: entry.etag for entry in store.list("adapter")}
    attempt._publish(store)
    assert {entry.key: entry.etag for entry in store.list("adapter")} == before
    assert is_whole(store)


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (None, ExitCode.INTERRUPTED),
        (DataInvalid("row 7"), ExitCode.DATA),
        (RankLost("rank-1"), ExitCode.TEMPFAIL),
        (TemporaryFailure("the store is away"), ExitCode.INTERRUPTED),
    ],
    ids=["nothing but the request", "a cause", "a lost rank", "what time might have cured"],
)
def test_the_end_of_the_grace_period_hides_no_cause_that_is_known(
    cause: Exception | None, code: ExitCode, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "word").touch()
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "word"))
    attempt.leaving._ask()
    attempt._cause = cause
    assert attempt._leave_late() == code
    said = json.loads((tmp_path / "word").read_text())
    assert said["code"] == code
    assert str(cause or "asked to leave") in said["message"]


def test_what_is_settled_stays_settled_if_the_last_words_take_too_long(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "word").touch()
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "word"))
    attempt._account.end(ExitCode.NOINPUT, "no such object")
    attempt.leaving._ask()
    assert attempt._leave_late() == ExitCode.NOINPUT
    assert json.loads((tmp_path / "word").read_text())["message"] == "no such object"


def test_whatever_is_waited_for_a_request_a_full_volume_and_the_progress_are_seen_to(
    attempt: Attempt, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEJOB_LOG", "json")
    attempt._waiting("a checkpoint was brought")()
    assert json.loads(capfd.readouterr().out)["phase"] == "preflight"
    monkeypatch.setattr(attempt._scratch, "_limit", 1)
    monkeypatch.setattr(attempt._scratch, "_looked", -1e9)
    (attempt.workdir.root / "large").write_bytes(b"x" * 10_000)
    with pytest.raises(DiskFailure, match="scratch"):
        attempt._waiting("a checkpoint was brought")()
    attempt.leaving._ask()
    with pytest.raises(Interrupted, match="asked to leave while a checkpoint was brought"):
        attempt._waiting("a checkpoint was brought")()


def test_progress_is_told_while_checkpoints_wait_for_the_store(
    attempt: Attempt, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attempt._own(store)
    told: list[float] = []
    monkeypatch.setattr(attempt._account, "tell", lambda: told.append(time.monotonic()))
    monkeypatch.setattr(Courier, "finish", lambda self: time.sleep(1.0))
    attempt._flush()
    assert len(told) >= 2
