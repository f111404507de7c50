"""The ledger: every attempt has a line, also one that vanished."""

from pathlib import Path
from typing import Any

import pytest

from job.errors import NoProgress
from job.layout import STATUS, attempt_key
from job.status import Status
from job.storage.directory import DirectoryStore
from job.supervision.ledger import attempts, complete, record_attempt, require_progress, seconds_spent


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path, "file:out")


def test_the_ledger_is_read_in_order_without_what_cannot_be_understood(store: DirectoryStore) -> None:
    for number in (10, 2, 1):
        record_attempt(store, number, {"attempt": number, "exit_code": 143})
    store.write(attempt_key(3), b"{half")
    assert [record["attempt"] for record in attempts(store)] == [1, 2, 10]


def test_an_attempt_is_recorded_again_when_it_ends(store: DirectoryStore) -> None:
    record_attempt(store, 1, {"exit_code": None})
    record_attempt(store, 1, {"exit_code": 0})
    assert attempts(store) == [{"exit_code": 0}]


def test_an_attempt_that_vanished_is_completed_from_its_last_status(store: DirectoryStore) -> None:
    record_attempt(store, 1, {"attempt": 1, "exit_code": 143, "seconds": 10.0})
    record_attempt(store, 2, {"attempt": 2, "exit_code": None, "seconds": 0.1})
    store.write(STATUS, Status(run="r", attempt=2, phase="train", committed=40, elapsed=25.5).dump())
    ledger = attempts(store)
    complete(store, ledger)
    assert (ledger[1]["message"], ledger[1]["committed"]) == ("vanished", 40)
    assert attempts(store) == ledger
    assert seconds_spent(ledger) == 35.5


def test_a_commit_that_the_status_did_not_tell_of_counts(store: DirectoryStore) -> None:
    record_attempt(store, 1, {"attempt": 1, "exit_code": None, "seconds": 0.1})
    store.write(STATUS, Status(run="r", attempt=1, phase="train", committed=40, elapsed=25.5).dump())
    ledger = attempts(store)
    complete(store, ledger, newest=80)
    assert ledger[0]["committed"] == 80


@pytest.mark.parametrize("status_of", [1, 3])
def test_the_status_of_another_attempt_completes_nothing(store: DirectoryStore, status_of: int) -> None:
    record_attempt(store, 2, {"attempt": 2, "exit_code": None, "seconds": 0.1})
    store.write(STATUS, Status(run="r", attempt=status_of, phase="train", elapsed=25.5).dump())
    ledger = attempts(store)
    complete(store, ledger)
    assert ledger == [{"attempt": 2, "exit_code": None, "seconds": 0.1}]


def test_an_attempt_that_vanished_is_put_down_to_memory_only_at_the_limit(store: DirectoryStore) -> None:
    for attempt, share in ((1, 0.94), (2, 0.97)):
        record_attempt(store, attempt, {"attempt": attempt, "exit_code": None})
        store.write(STATUS, Status(run="r", attempt=attempt, phase="train", memory=share).dump())
        complete(store, attempts(store))
    assert [line["exit_code"] for line in attempts(store)] == [None, 137]
    assert "97%" in attempts(store)[1]["message"]


def line(exit_code: int | None, committed: int = 0, job: str = "toy-1", brought: int = 0) -> dict[str, Any]:
    return {"exit_code": exit_code, "committed": committed, "job": job, "brought": brought, "message": "why"}


@pytest.mark.parametrize(
    ("ledger", "refused"),
    [
        ([], False),
        ([line(75)] * 2, False),
        ([line(75)] * 3, True),
        ([line(75), line(137), line(1)], True),
        ([line(143)] * 19, False),
        ([line(143)] * 20, True),
        ([line(None)] * 20, True),
        ([line(143)] * 19 + [line(75)] * 2, False),
        ([line(75)] * 2 + [line(75, committed=10)], False),
        ([line(75, committed=10)] * 3, False),
        ([line(75, committed=10)] * 4, True),
        ([line(75), line(75, brought=5), line(75, brought=9), line(75, brought=9)], False),
        ([line(75, job="toy-0")] * 5, False),
        ([line(75, job="toy-0")] * 5 + [line(75)] * 3, True),
        ([line(75, job="toy-0", committed=10)] + [line(75, committed=5)] * 3, True),
    ],
)
def test_a_job_that_commits_nothing_new_is_refused_another_attempt(ledger: list[dict[str, Any]], refused: bool) -> None:
    if refused:
        with pytest.raises(NoProgress, match=r"Job toy-1 .* said: why"):
            require_progress(ledger, "toy-1")
    else:
        require_progress(ledger, "toy-1")


def test_a_person_may_try_as_often_as_they_like() -> None:
    require_progress([line(75, job="")] * 50, "")
