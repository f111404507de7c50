"""The courier: training never waits for the store, and nothing sealed is lost while the store is away."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job import layout
from job.errors import AccessDenied, Fenced, IntegrityFailure, Interrupted, JobError, TemporaryFailure
from job.storage import transfer
from job.storage.directory import DirectoryStore
from job.supervision import courier
from job.supervision.courier import Courier
from job.supervision.own import Ownership, claim
from job.workdir import WorkDir


class Moody(DirectoryStore):
    """A store that can be told to fail for a while."""

    mood: Callable[[], JobError] | None = None

    def write(self, key: str, data: bytes, **condition: Any) -> str:
        if self.mood is not None:
            raise self.mood()
        return super().write(key, data, **condition)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "_WAITS", (0.02, 0.02))


@pytest.fixture
def store(tmp_path: Path) -> Moody:
    return Moody(tmp_path / "store", "file:out")


@pytest.fixture
def workdir(tmp_path: Path) -> WorkDir:
    work = WorkDir(tmp_path / "work")
    work.root.mkdir()
    work.log.write_text("a line\n")
    work.metrics.write_text('{"step": 1}\n')
    return work


def seal(workdir: WorkDir, *steps: int, eval_loss: float | None = None) -> None:
    for step in steps:
        folder = workdir.checkpoints / layout.checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
        state = {"step": step, "spec_digest": "abc", "eval_loss": eval_loss}
        (folder / layout.CHECKPOINT_STATE).write_text(json.dumps(state))


def made(store: DirectoryStore, workdir: WorkDir, keep: Any = 2) -> tuple[Courier, Ownership]:
    ownership = claim(store, "abc", heartbeat=False)
    return Courier(store, ownership, workdir, keep, lambda: b'{"phase": "train"}', 0.05), ownership


def steps(store: DirectoryStore) -> list[int]:
    return [commit.step for commit in transfer.committed(store)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_sealed_is_committed_and_leaves_the_disk(store: Moody, workdir: WorkDir) -> None:
    carrier, _ = made(store, workdir)
    carrier.start()
    seal(workdir, 2, 4, 6)
    wait_until(lambda: carrier.committed == 6)
    wait_until(lambda: steps(store) == [6, 4])
    carrier.stop()
    assert not list(workdir.checkpoints.iterdir())
    assert (store.root / layout.so_far(layout.METRICS, 1)).read_text() == '{"step": 1}\n'
    assert json.loads((store.root / layout.STATUS).read_text()) == {"phase": "train"}


def test_while_the_store_is_away_checkpoints_queue_up_and_are_committed_when_it_is_back(
    store: Moody, workdir: WorkDir
) -> None:
    carrier, _ = made(store, workdir)
    store.mood = lambda: TemporaryFailure("away")
    carrier.start()
    seal(workdir, 2, 4)
    time.sleep(0.2)
    carrier.check()
    assert carrier.committed == 0
    seal(workdir, 6, 8, 10)

    def is_short() -> bool:
        carrier.check()
        return len(list(workdir.checkpoints.iterdir())) <= courier.QUEUED + 1

    wait_until(is_short)  # bounded, because the disk is
    store.mood = None
    wait_until(lambda: carrier.committed == 10)
    carrier.stop()
    assert steps(store) == [10, 8]


def test_a_status_that_cannot_be_written_holds_no_checkpoint_up(store: Moody, workdir: WorkDir) -> None:
    class Slow(Moody):
        def write(self, key: str, data: bytes, **condition: Any) -> str:
            while key == layout.STATUS and not released.is_set():
                time.sleep(0.01)
            return super().write(key, data, **condition)

    released = threading.Event()
    carrier, _ = made(Slow(store.root, "file:out"), workdir)
    carrier.start()
    seal(workdir, 2)
    carrier.finish()
    assert steps(store) == [2]
    released.set()
    carrier.stop()


def test_all_checkpoints_queue_up_where_all_are_to_be_kept(store: Moody, workdir: WorkDir) -> None:
    carrier, _ = made(store, workdir, "all")
    store.mood = lambda: TemporaryFailure("away")
    carrier.start()
    seal(workdir, 2, 4, 6, 8, 10)
    time.sleep(0.2)
    store.mood = None
    carrier.finish()
    carrier.stop()
    assert steps(store) == [10, 8, 6, 4, 2]


def test_the_best_is_kept_besides_the_newest(store: Moody, workdir: WorkDir) -> None:
    carrier, _ = made(store, workdir, 1)
    for step, loss in ((2, 1.5), (4, 1.0), (6, 2.0), (8, 1.1)):
        seal(workdir, step, eval_loss=loss)
        carrier.finish()
    assert steps(store) == [8, 4]


@pytest.mark.parametrize("kind", [Fenced, IntegrityFailure])
def test_what_time_does_not_cure_ends_the_attempt(kind: type[JobError], store: Moody, workdir: WorkDir) -> None:
    carrier, _ = made(store, workdir)
    store.mood = lambda: kind("no")
    carrier.start()
    seal(workdir, 2)
    with pytest.raises(kind):
        wait_until(lambda: carrier.check() is not None)
    carrier.stop()


def test_a_refusal_is_borne_for_a_while(store: Moody, workdir: WorkDir, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier, _ = made(store, workdir)
    store.mood = lambda: AccessDenied("expired")
    carrier.start()
    seal(workdir, 2)
    time.sleep(0.2)
    carrier.check()
    monkeypatch.setattr(courier, "REFUSALS_SECONDS", 0.0)
    with pytest.raises(AccessDenied):
        wait_until(lambda: carrier.check() is not None)
    carrier.stop()


def test_nothing_is_committed_once_another_owns_the_run(store: Moody, workdir: WorkDir) -> None:
    carrier, ownership = made(store, workdir)
    ownership.release("INTERRUPTED")
    claim(store, "abc", heartbeat=False)
    seal(workdir, 2)
    with pytest.raises(Fenced):
        carrier.finish()
    assert steps(store) == []


def test_a_store_that_stays_away_at_the_end_is_a_temporary_failure(store: Moody, workdir: WorkDir) -> None:
    carrier, _ = made(store, workdir)
    store.mood = lambda: TemporaryFailure("away")
    seal(workdir, 2)
    with pytest.raises(TemporaryFailure):
        carrier.finish()
    assert [path.name for path in workdir.checkpoints.iterdir()] == ["checkpoint-2"]


def test_what_is_sent_aside_holds_no_checkpoint_up_and_may_fail(
    store: Moody, workdir: WorkDir, caplog: pytest.LogCaptureFixture
) -> None:
    carrier, _ = made(store, workdir)
    carrier.start()
    began, go_on = threading.Event(), threading.Event()

    def send(check: Callable[[], None], tick: Callable[[], None]) -> None:
        began.set()
        go_on.wait(30)
        raise TemporaryFailure("the store is away")

    carrier.send_aside("prepared rows", send)
    assert began.wait(30)
    seal(workdir, 2)
    wait_until(lambda: carrier.committed == 2)
    go_on.set()
    wait_until(lambda: "prepared rows: not kept in the store (the store is away)" in caplog.text)
    carrier.check()
    carrier.stop()


def test_what_is_sent_aside_ends_with_the_courier_and_not_in_a_run_that_is_lost(store: Moody, workdir: WorkDir) -> None:
    carrier, ownership = made(store, workdir)
    ended: list[JobError] = []

    def until_it_raises(call: Callable[[], None]) -> None:
        try:
            while True:
                call()
                time.sleep(0.01)
        except JobError as error:
            ended.append(error)

    def send(check: Callable[[], None], tick: Callable[[], None]) -> None:
        until_it_raises(tick)
        until_it_raises(check)

    ownership.release("INTERRUPTED")
    claim(store, "abc", heartbeat=False)
    carrier.send_aside("prepared rows", send)
    carrier.stop_aside(30)
    assert [type(error) for error in ended] == [Interrupted, Fenced]
