"""The ledger of a run's attempts: when each began, how it ended, and what it cost."""

import logging
from collections.abc import Sequence
from typing import Any

from job.errors import IntegrityFailure
from job.layout import ATTEMPTS, STATUS, attempt_key
from job.status import parse_status
from job.store import Store, from_json, to_json

log = logging.getLogger(__name__)


def record_attempt(store: Store, number: int, record: dict[str, Any]) -> None:
    """Writes one attempt's line of the ledger (numbered from 1), replacing an earlier one of that number."""
    store.write(attempt_key(number), to_json(record))


def attempts(store: Store) -> list[dict[str, Any]]:
    """The ledger, oldest attempt first. A record that cannot be understood is left out with a warning."""
    records = []
    for entry in store.list(ATTEMPTS):
        found = store.read(entry.key)
        try:
            if found is not None:
                records.append(from_json(found[0], f"{store.uri}/{entry.key}"))
        except IntegrityFailure as error:
            log.warning("%s; left out of the ledger", error)
    return records


def complete(store: Store, ledger: Sequence[dict[str, Any]]) -> None:
    """Adds to the last line, if that attempt vanished, what its status had to say last; the store and ``ledger``."""
    if not ledger or ledger[-1].get("exit_code") is not None:
        return
    found = store.read(STATUS)
    last = parse_status(found[0]) if found else None
    if last is not None and last.attempt == ledger[-1]["attempt"]:
        ledger[-1].update(seconds=round(last.elapsed, 3), committed=last.committed, message="vanished")
        record_attempt(store, last.attempt, ledger[-1])


def seconds_spent(ledger: Sequence[dict[str, Any]]) -> float:
    """Seconds of all attempts together."""
    return float(sum(line.get("seconds", 0.0) for line in ledger))
