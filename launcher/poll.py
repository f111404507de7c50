"""Looks at one run again and again, and bears a cluster that is away for a while."""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import ClusterUnreachable, Deleted, NotAllowed, NotFound, TimedOut
from launcher.kinds import WORKLOADS
from launcher.runs import Run

T = TypeVar("T")
Say = Callable[[str], None]

PATIENCE_SECONDS = 300.0
"""How long a cluster may be away."""
AWAY_SECONDS = 5.0
"""Between two questions to a cluster that is away."""
POLL_SECONDS = (1.0, 10.0)
"""Between two looks: at first, and when nothing changes."""


class Clock(Protocol):
    """Time; the module ``time`` is one."""

    def monotonic(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float, /) -> None:
        """Returns after so long."""


class Poll:
    """Looks at one run again and again: often while something changes, rarely while nothing does."""

    def __init__(self, cluster: Cluster, run: Run, say: Say, timeout: float | None = None, clock: Clock = time) -> None:
        self.cluster, self.run = cluster, runs.require_run(run)
        self._say, self._clock, self._timeout = say, clock, timeout
        self._until = clock.monotonic() + timeout if timeout is not None else float("inf")
        self._wait = POLL_SECONDS[0]
        self._versions: list[str] = []

    def look(self) -> Run:
        """The run as it is now.

        Raises:
            Deleted: it is gone.
            ClusterUnreachable: the cluster was away for too long.
        """
        found = self.bear(lambda: runs.refreshed(self.cluster, self.run))
        if found is None:
            kept = f"; what it committed is kept below {self.run.output}" if self.run.output else ""
            raise Deleted(
                f"{self.run.job} was deleted meanwhile{kept}, and submitting the spec again goes on from there"
            )
        self.run = found
        versions = [
            str(one["metadata"].get("resourceVersion"))
            for one in (found.kube_job, *(attempt.manifest for attempt in found.pods))
        ]
        self._wait = min(POLL_SECONDS[1], self._wait * 1.5) if versions == self._versions else POLL_SECONDS[0]
        self._versions = versions
        return found

    def is_over(self) -> bool:
        """Whether nothing more is to be expected of the run: it has ended, or Kueue deactivated it."""
        run = self.run
        return run.has_ended or (run.state == "queued" and bool(run.queue) and self.bear(self._is_deactivated))

    def pause(self) -> None:
        """Waits for the next look. Raises TimedOut if the time is over."""
        left = self._until - self._clock.monotonic()
        if left <= 0:
            raise TimedOut(
                f"{self.run.id} is still {self.run.state} after {self._timeout:g} s; it goes on, and tunejob wait "
                f"{self.run.id} waits again"
            )
        self._clock.sleep(min(self._wait, left))

    def hasten(self) -> None:
        """Looks often again."""
        self._wait = POLL_SECONDS[0]

    def bear(self, ask: Callable[[], T]) -> T:
        """An answer of the cluster's, which may be away for a while; that is said once."""
        began: float | None = None
        while True:
            try:
                answer = ask()
            except ClusterUnreachable as error:
                now = self._clock.monotonic()
                if began is None:
                    began = now
                    self._say(f"{error}. {self.run.id} goes on; waiting up to {PATIENCE_SECONDS / 60:g} min for it")
                if now - began >= PATIENCE_SECONDS:
                    raise
                if now >= self._until:
                    raise TimedOut(f"{self.run.id}: the time is over, and the cluster is away ({error})") from None
                self._clock.sleep(AWAY_SECONDS)
            else:
                if began is not None:
                    self._say("the cluster answers again")
                return answer

    def _is_deactivated(self) -> bool:
        """Whether Kueue gave the Job up: it stays suspended then, and no deadline ends it."""
        try:
            workloads = self.cluster.list(WORKLOADS)
        except (NotAllowed, NotFound):  # it is not known then, and the user's own timeout has to end the waiting
            return False
        owned = (
            one
            for one in workloads
            if any(owner["uid"] == self.run.uid for owner in one["metadata"].get("ownerReferences") or [])
        )
        return any(one["spec"].get("active") is False for one in owned)
