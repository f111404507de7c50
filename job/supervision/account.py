"""What one attempt says of itself: its status, its line of the ledger, its log, its last word to the pod."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from job import layout
from job.exits import ExitCode
from job.status import Status
from job.storage.store import Store
from job.storage.transfer import put_proven
from job.supervision.announce import Announcer, leave_word, log_to
from job.supervision.courier import copied
from job.supervision.ledger import record_attempt
from job.workdir import WorkDir

JOB = "TUNEJOB_JOB"
"""Environment variable: name of the Kubernetes Job this attempt is a pod of; absent elsewhere."""
POD = "TUNEJOB_POD"
"""Environment variable: name of the pod."""


class Account:
    """Begins with the attempt. Nothing is written to a store but by its owner's call."""

    def __init__(self, run: str, workdir: WorkDir) -> None:
        """
        Args:
            run: the run's id, or its folder's name.
        """
        self.status = Status(run=run, attempt=1, phase="preflight")
        self.announcer = Announcer(lambda: self.status)
        self.seconds: dict[str, float] = {}
        """Spent in each phase that is over."""
        self.manifest_sha256: str | None = None
        """Of the manifest that is published."""
        self.brought: Callable[[], int] = int
        """Bytes of the inputs that are here and proven."""
        self._workdir = workdir
        self._began, self._started = time.monotonic(), _now()
        self._log_handler: logging.Handler | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the attempt began."""
        return time.monotonic() - self._began

    def note(self, **known: Any) -> None:
        """Takes what is known anew of the status."""
        self.status = replace(self.status, **known)

    def note_committed(self, step: int) -> None:
        """Takes the newest commit of this attempt."""
        if step > self.status.committed:
            self.note(committed=step, step=max(step, self.status.step))

    @property
    def kept(self) -> str:
        """What is committed, for messages."""
        if not self.status.committed:
            return "nothing was trained yet"
        return f"the newest committed checkpoint is of step {self.status.committed}"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names a phase, and times it if it ends well."""
        self.note(phase=name)
        self.tell()
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def tell(self) -> None:
        """Shows the phase; to be called a few times a second where nothing else is shown."""
        self.announcer.phase(self.status.phase)

    def dump(self) -> bytes:
        """The status as the store holds it."""
        seconds = {name: round(value, 3) for name, value in list(self.seconds.items())}
        return replace(self.status, seconds=seconds, elapsed=round(self.elapsed, 3)).dump()

    def write_status(self, store: Store) -> None:
        """Puts the status into the store."""
        store.write(layout.STATUS, self.dump())

    def write_line(self, store: Store, generation: int | None) -> None:
        """This attempt's line of the ledger: at its start without an end, at its end with one."""
        status = self.status
        record = {
            "attempt": status.attempt,
            "generation": generation,
            "started": self._started,
            "ended": None if status.exit_code is None else _now(),
            "seconds": round(self.elapsed, 3),
            "exit_code": status.exit_code,
            "message": status.message,
            "committed": status.committed,
            "brought": self.brought(),
            "job": os.environ.get(JOB, ""),
            "pod": os.environ.get(POD, ""),
        }
        record_attempt(store, status.attempt, record)

    def begin_log(self) -> None:
        """From here on every log line is kept for the run's log."""
        self._log_handler = log_to(self._workdir.log)

    def push_log(self, store: Store, generation: int, prove: Callable[[], None]) -> None:
        """The log so far, for the next attempt and, while there is no result, for people.

        Args:
            prove: see ``job.storage.transfer.publish``: a manifest may list the log that people read.
        """
        if self._log_handler is None:
            return
        self._log_handler.flush()
        copy = copied(self._workdir.log, self._workdir.outgoing)
        store.put(copy, layout.so_far(layout.TRAINING_LOG, generation))
        put_proven(store, copy, layout.TRAINING_LOG, prove)

    def end_log(self) -> None:
        """Lets the log's file go."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()

    def end(self, code: ExitCode, message: str) -> None:
        """Takes how the attempt ended."""
        self.announcer.close()
        self.note(exit_code=int(code), message=message)

    def leave_word(self) -> None:
        """The last word to the pod."""
        leave_word(self.status, self.manifest_sha256, self.elapsed)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
