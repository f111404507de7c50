"""Asking S3, and asking again: how long what may pass is borne."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, wait_random_exponential

from job.storage.s3_client import Link, connection
from job.storage.s3_errors import Hope, Question, Verdict, judge

T = TypeVar("T")

DAMAGES = 3
"""Tries until bytes that never arrive whole are believed to be so."""


@dataclass(frozen=True)
class Patience:
    """How long to bear what may pass. Seconds, counted from an operation's first failure."""

    control_seconds: float = 120.0
    """For small objects and questions."""
    bulk_seconds: float = 900.0
    """For files."""
    settle_seconds: float = 20.0
    """For a refusal before anything was ever granted: new rights take a while to be known everywhere."""
    first_wait: float = 1.0
    longest_wait: float = 20.0
    """Between two tries; the wait is random between 0 and a bound that doubles from the first to the longest."""
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    sdk_attempts: int = 3
    """Tries that the SDK makes by itself, each time."""
    late_seconds: float = 15.0
    """Once it is clear when to leave: until a silent server is given up, with two tries of the SDK."""


HASTY = Patience(
    control_seconds=6.0,
    bulk_seconds=60.0,
    settle_seconds=0.0,
    longest_wait=2.0,
    connect_seconds=4.0,
    read_seconds=20.0,
    sdk_attempts=1,
)
"""For a person who waits for the answer."""


class Asker:
    """Asks one place of one store. Any number of threads may use it."""

    def __init__(self, patience: Patience, settings: Mapping[str, str]) -> None:
        self.patience, self._settings = patience, settings
        self.was_granted = False
        """Whether anything was ever answered with a yes."""
        self._leave_by = float("inf")
        self._hurried = threading.Condition()

    def ask(self, question: Question, call: Callable[[Link], T], *, is_bulk: bool = False) -> T:
        """The answer, once there is one.

        Args:
            is_bulk: a file is moved; it is worth more patience.

        Raises:
            JobError: what the last failure means.
        """
        tries = _Tries(self, self.patience.bulk_seconds if is_bulk else self.patience.control_seconds)

        def once() -> T:
            link = None
            try:
                link = self._link(tries.refused)
                answer = call(link)
            except Exception as error:
                verdict = judge(error, question, link)
                tries.note(verdict, link)
                if verdict is None or verdict.error is error:
                    raise
                raise verdict.error from error
            self.was_granted = True
            return answer

        wait = wait_random_exponential(multiplier=self.patience.first_wait, max=self.patience.longest_wait)
        again = retry_if_exception(lambda _: tries.is_worth_it)
        return Retrying(retry=again, wait=wait, sleep=self._pause, reraise=True)(once)

    def hurry(self, until: float) -> None:
        """From this moment (``time.monotonic``) on nothing is asked again, and no transfer waited for. Never later."""
        with self._hurried:
            self._leave_by = min(self._leave_by, until)
            self._hurried.notify_all()

    def is_late(self) -> bool:
        """Whether that moment has come."""
        return time.monotonic() >= self._leave_by

    def _link(self, refused: Link | None) -> Link:
        limit, attempts = float("inf"), self.patience.sdk_attempts
        if self._leave_by < limit:
            limit, attempts = self.patience.late_seconds, min(attempts, 2)
        connect, read = min(self.patience.connect_seconds, limit / 3), min(self.patience.read_seconds, limit)
        return connection(connect, read, attempts, instead_of=refused, settings=self._settings)

    def _pause(self, seconds: float) -> None:
        """Waits; a call of ``hurry`` cuts it short."""
        with self._hurried:
            self._hurried.wait(min(seconds, max(0.0, self._leave_by - time.monotonic())))


class _Tries:
    """Whether one question is worth asking again."""

    def __init__(self, asker: Asker, seconds: float) -> None:
        self._asker, self._seconds = asker, seconds
        self._failed_at: float | None = None
        self._damages = 0
        self.refused: Link | None = None
        """The connection that was refused; credentials are read again instead of it."""
        self.is_worth_it = False

    def note(self, verdict: Verdict | None, link: Link | None) -> None:
        """Takes a failure in."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        hope = verdict.hope if verdict else Hope.NONE
        self.is_worth_it = self._is_left(hope, now - self._failed_at) and not self._asker.is_late()
        if hope is Hope.REFUSED:
            self.refused = link

    def _is_left(self, hope: Hope, seconds: float) -> bool:
        if hope is Hope.DAMAGED:
            self._damages += 1
            return self._damages < DAMAGES
        if hope is Hope.REFUSED:
            settles = not self._asker.was_granted and seconds < self._asker.patience.settle_seconds
            return self.refused is None or settles
        return hope is Hope.LATER and seconds < self._seconds
