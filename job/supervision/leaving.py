"""The request to leave: when it came, how long there is, and an end to it whatever still holds us up."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from job.errors import Interrupted
from job.exits import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Leaving:
    """Set by SIGTERM, SIGINT or SIGHUP, however often they come; the grace period counts from the first."""

    def __init__(
        self, grace_seconds: float, on_asked: Callable[[float], None], on_late: Callable[[], ExitCode]
    ) -> None:
        """
        Args:
            grace_seconds: from the request to the kill.
            on_asked: gets the moment (``time.monotonic``) by which everything should be done; called in another thread.
            on_late: called just before this process is ended because the grace period is over, and says with which
                code; in another thread.
        """
        self._grace = grace_seconds
        self._on_asked, self._on_late = on_asked, on_late
        self._asked = threading.Event()
        self._over = threading.Event()
        self._asked_at = float("inf")

    @property
    def is_asked(self) -> bool:
        """Whether the request came."""
        return self._asked.is_set()

    @property
    def seconds_since(self) -> float:
        """Seconds since the request; 0 if there was none."""
        return time.monotonic() - self._asked_at if self.is_asked else 0.0

    @property
    def leave_by(self) -> float:
        """The moment (``time.monotonic``) by which everything should be done; never, unless asked."""
        return self._asked_at + self._grace - min(5.0, self._grace / 3)

    def check(self, what: str) -> None:
        """Raises Interrupted, ``what`` in its sentence, if we were asked to leave."""
        if self.is_asked:
            raise Interrupted(f"asked to leave {what}")

    def check_time(self, what: str) -> None:
        """Raises Interrupted if we were asked to leave and the time for what is under way is over."""
        if time.monotonic() > self.leave_by:
            raise Interrupted(f"asked to leave {what}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the block runs. After it they change nothing: how it ended is said."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        threading.Thread(target=self._watch, daemon=True, name="grace").start()
        try:
            yield
        finally:
            self._over.set()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _ask(self, *_: object) -> None:
        if not self.is_asked:
            self._asked_at = time.monotonic()
            self._asked.set()

    def _watch(self) -> None:
        # Not in the handler: it may interrupt code that holds the very lock a callback wants.
        self._asked.wait()
        with suppress(Exception):  # it only makes leaving quicker
            self._on_asked(self.leave_by)
        last_moment = self._asked_at + self._grace - min(2.0, self._grace / 5)
        if not self._over.wait(max(0.0, last_moment - time.monotonic())):
            code = ExitCode.INTERRUPTED
            try:  # without a line of log: nobody may be reading them, and then they hold us up
                code = self._on_late()
            finally:
                os._exit(code)
