"""The ledger of a run's attempts: when each began, how it ended, and what it cost."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from job.errors import IntegrityFailure, NoProgress
from job.exits import ExitCode
from job.layout import ATTEMPTS, STATUS, attempt_key, attempt_number
from job.status import parse_status
from job.storage.store import Store, from_json, to_json
from job.supervision.container import FULL

log = logging.getLogger(__name__)

ENDED_BY_THEMSELVES = 3
CUT_OFF = 20
"""Attempts of one Job without progress, by how they ended, after which there is no further one."""


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


def complete(store: Store, ledger: Sequence[dict[str, Any]], newest: int = 0) -> None:
    """Adds to the last line, if that attempt vanished, what is known of it; in the store and in ``ledger``.

    Args:
        newest: step of the newest committed checkpoint; the status may not have told of it any more.
    """
    if not ledger or ledger[-1].get("exit_code") is not None:
        return
    found = store.read(STATUS)
    last = parse_status(found[0]) if found else None
    if last is not None and last.attempt == ledger[-1]["attempt"]:
        committed = max(last.committed, newest)
        ledger[-1].update(seconds=round(last.elapsed, 3), committed=committed, message="vanished")
        if last.memory is not None and last.memory >= FULL:
            message = f"vanished with the container's memory at {last.memory:.0%} of its limit"
            ledger[-1].update(exit_code=int(ExitCode.MEMORY), message=message)
        record_attempt(store, last.attempt, ledger[-1])


def require_progress(ledger: Sequence[Mapping[str, Any]], job: str) -> None:
    """Refuses a further attempt of a Job whose attempts commit nothing new: one that is ignored would go on for ever.

    A checkpoint that is new, and verified bytes of the inputs that stayed for the next attempt, count as progress.

    Args:
        ledger: all attempts before this one.
        job: name of the Kubernetes Job; attempts of another are not held against this one. Empty: never refuse, a
            person starts these attempts.

    Raises:
        NoProgress: three of its attempts ended by themselves without progress, or twenty were interrupted or vanished.
    """
    by_themselves = cut_off = committed = brought = 0
    for line in ledger:
        progressed = line.get("committed", 0) > committed or line.get("brought", 0) > brought
        committed = max(committed, line.get("committed", 0))
        brought = max(brought, line.get("brought", 0))
        if progressed:
            by_themselves = cut_off = 0
        elif line.get("job") == job:
            was_cut_off = line.get("exit_code") in (None, ExitCode.INTERRUPTED, ExitCode.PEER)
            cut_off += was_cut_off
            by_themselves += not was_cut_off
    if job and (by_themselves >= ENDED_BY_THEMSELVES or cut_off >= CUT_OFF):
        last = next((str(line["message"]) for line in reversed(ledger) if line.get("message")), "nothing")
        raise NoProgress(
            f"{by_themselves} attempts of Job {job} ended by themselves and {cut_off} were interrupted or vanished "
            f"without a new checkpoint (the newest is of step {committed}); the last one said: {last}. Mend the cause, "
            "then start it anew under another Job name (raise restart)"
        )


def next_number(store: Store) -> int:
    """Number of the next attempt: above every key of the ledger, readable or not."""
    return max((attempt_number(entry.key) for entry in store.list(ATTEMPTS)), default=0) + 1


def seconds_spent(ledger: Sequence[dict[str, Any]]) -> float:
    """Seconds of all attempts together."""
    return float(sum(line.get("seconds", 0.0) for line in ledger))
