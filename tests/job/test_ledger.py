"""The ledger: every attempt has a line, also one that vanished."""

from pathlib import Path

import pytest

from job.layout import STATUS, attempt_key
from job.ledger import attempts, complete, record_attempt, seconds_spent
from job.status import Status
from job.store import DirectoryStore


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


@pytest.mark.parametrize("status_of", [1, 3])
def test_the_status_of_another_attempt_completes_nothing(store: DirectoryStore, status_of: int) -> None:
    record_attempt(store, 2, {"attempt": 2, "exit_code": None, "seconds": 0.1})
    store.write(STATUS, Status(run="r", attempt=status_of, phase="train", elapsed=25.5).dump())
    ledger = attempts(store)
    complete(store, ledger)
    assert ledger == [{"attempt": 2, "exit_code": None, "seconds": 0.1}]
