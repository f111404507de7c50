"""The log of a run: every line of every attempt once, whatever happens to the connection.

A stream's end proves nothing: a proxy, the API server or the kubelet may have ended it. Only a log that
is read to its end once its container is known to have ended is complete.
"""

import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from job.layout import SO_FAR, TRAINING_LOG, newest_so_far
from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import ClusterUnreachable, NotFound
from launcher.poll import Clock
from launcher.runs import Attempt, Run

if TYPE_CHECKING:
    from job.storage.store import Store

LATEST_LINES = 200
"""Lines at the end of a log among which the latest progress is looked for."""
OVERLAP_SECONDS = 2
"""So far back a broken stream is read again: the server counts in seconds, and stdout and stderr of a container may be
stamped a little out of order."""
REOPEN_SECONDS = 1.0
LAST_TRIES = 3
"""Times that the log of a container which has ended is asked for."""

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    text: str
    attempt: int = 0
    """Counted from 1 among the pods that are known of; 0: of all attempts, out of the store."""
    pod: str = ""


def progress(text: str) -> dict[str, Any] | None:
    """What a line of progress tells (``docs/container.md``); None for a line of text."""
    if not text.startswith("{"):
        return None
    try:
        word = json.loads(text)
    except ValueError:
        return None
    return word if isinstance(word, dict) and word.keys() >= {"run", "attempt", "phase"} else None


def latest_progress(cluster: Cluster, run: Run) -> Mapping[str, Any]:
    """The latest word of progress of the run's newest pod that has begun; empty if there is none."""
    begun = [attempt for attempt in run.pods if has_begun(attempt)]
    lines = list(cluster.log(begun[-1].pod, tail=LATEST_LINES)) if begun else []
    return next((word for line in reversed(lines) if (word := progress(line)) is not None), {})


def has_begun(attempt: Attempt) -> bool:
    """Whether its container runs or ran, and so may have a log."""
    return "running" in attempt.state or "terminated" in attempt.state


def has_ended(attempt: Attempt) -> bool:
    """Whether its container writes no more."""
    return "terminated" in attempt.state or attempt.phase in ("Succeeded", "Failed")


def lines(
    cluster: Cluster,
    run: Run,
    follow: bool = False,
    tail: int | None = None,
    all_attempts: bool = False,
    store: "Callable[[], Store] | None" = None,
) -> Iterator[Line]:
    """The log of every attempt whose pod is left, oldest first; without any, what the store has of all of them.

    Args:
        follow: goes on until the run has ended.
        tail: only so many lines at the end of each attempt.
        all_attempts: those of earlier Jobs of the run too.
        store: opens the run's folder; asked only where no pod has a log.

    Raises:
        NotFound: there is no log, neither here nor there.
        LauncherError: the cluster does not answer, or the run was deleted while it was followed.
    """
    count = 0
    for line in _of_pods(cluster, run, follow, tail, all_attempts):
        count += 1
        yield line
    if not count and tail != 0:
        yield from _stored(run, tail, store)


def _of_pods(cluster: Cluster, run: Run, follow: bool, tail: int | None, all_attempts: bool) -> Iterator[Line]:
    attempts = list(run.pods)
    if all_attempts:
        others = [one for one in runs.jobs_of(cluster, run.id) if one.uid != run.uid]
        earlier = [runs.of(one.kube_job, runs.pods_of(cluster, one.job)) for one in others]
        attempts = [attempt for one in earlier for attempt in one.pods] + attempts
    before = len(attempts) - len(run.pods)
    if follow:
        from launcher.watch import attended

        attempts = attempts[:before]
    for number, attempt in enumerate(attempts, 1):
        if has_begun(attempt):
            yield from _whole(cluster, attempt.pod, number, tail)
    if follow:
        yield from attended(cluster, run, lambda _: None, tail=tail, attempts_before=before)


def _whole(cluster: Cluster, pod: str, number: int, tail: int | None) -> Iterator[Line]:
    """What there is now of a container's log."""
    for raw in cluster.log(pod, tail=tail, timestamps=True):
        stamped = _STAMPED.fullmatch(raw)
        if stamped:  # else the kubelet's own word, for instance that the log is gone
            yield Line(stamped[4], number, pod)


def stream(
    cluster: Cluster,
    pod: str,
    number: int,
    is_over: Callable[[bool], bool],
    tail: int | None = None,
    lost: Callable[[], None] = lambda: None,
    clock: Clock = time,
) -> Iterator[Line]:
    """Every line of a container's log once, until it has ended; a stream that breaks is taken up where it broke.

    Args:
        number: of the attempt.
        is_over: whether the container is known to write no more, or is gone; takes whether the stream before ended by
            itself, and may raise what ends the following.
        tail: begins with so many lines.
        lost: called where lines may be missing: the kubelet rotated the log away while the connection was broken.

    Raises:
        ClusterUnreachable: the container has ended, and its log cannot be read to the end.
    """
    seen, is_clean, failures = Seen(is_tail=tail is not None), True, 0
    while True:
        is_last = is_over(is_clean)
        since = seen.begin_again()
        try:
            for raw in cluster.log(pod, follow=True, since_time=since, tail=None if since else tail, timestamps=True):
                text = seen.new(raw)
                if seen.has_gap:
                    lost()
                if text is not None:
                    yield Line(text, number, pod)
            is_clean = True
        except ClusterUnreachable:
            is_clean = False
            failures += is_last
            if failures >= LAST_TRIES:  # its node may be gone for good
                raise
        if is_last and is_clean:
            return
        if not seen.has_news:  # else at once: what is rotated before it is read is lost
            clock.sleep(REOPEN_SECONDS)


class Seen:
    """Which lines of one container were seen, as far back as a broken stream is read again."""

    def __init__(self, is_tail: bool = False) -> None:
        """
        Args:
            is_tail: the first reading begins in the middle; what is older than its first line is not wanted later.
        """
        self.has_news = False
        """Whether this reading brought a line that is new."""
        self.has_gap = False
        """Whether the line just taken is the first of a reading, and none that was expected once more."""
        self._is_first = True
        self._recent: deque[tuple[float, str]] = deque()
        self._newest = 0.0
        self._oldest = (0.0, 0.0) if not is_tail else None
        self._again: Counter[str] = Counter()

    def begin_again(self) -> str:
        """From when on to read, empty for the beginning; the lines since then are expected once more."""
        self.has_news, self.has_gap, self._is_first = False, False, True
        self._again = Counter(raw for _, raw in self._recent)
        if not self._newest:
            return ""
        return datetime.fromtimestamp(self._newest - OVERLAP_SECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def new(self, raw: str) -> str | None:
        """The text of a stamped line that was not seen before, without the stamp.

        None for one that was, and for the kubelet's own words, which have no stamp.
        """
        self.has_gap = False
        stamped = _STAMPED.fullmatch(raw)
        if stamped is None:
            return None
        moment = datetime.fromisoformat(stamped[1] + stamped[3]).timestamp()
        exact = (moment, float(stamped[2] or 0))
        self._oldest = exact if self._oldest is None else self._oldest
        if exact < self._oldest:
            return None
        is_known = self._again[raw] > 0
        # The server gives all since a full second: what was seen of it comes first, unless it is gone.
        self.has_gap, self._is_first = self._is_first and bool(self._recent) and not is_known, False
        if is_known:
            self._again[raw] -= 1
            return None
        self._note(moment, raw)
        return stamped[4]

    def _note(self, moment: float, raw: str) -> None:
        self.has_news = True
        self._newest = max(self._newest, moment)
        self._recent.append((moment, raw))
        while self._recent[0][0] < self._newest - OVERLAP_SECONDS:
            self._recent.popleft()


def _stored(run: Run, tail: int | None, store: "Callable[[], Store] | None") -> Iterator[Line]:
    """The log of all attempts as the store has it: published, else the newest owner's."""
    if not run.has_ended and any(not has_ended(attempt) for attempt in run.pods):
        raise NotFound(
            f"{run.id}: no log yet, it is {run.state}; tunejob logs -f {run.id} waits, tunejob why says more"
        )
    opened = store() if store else None
    text = stored_text(opened) if opened else None
    if text is None:
        where = f" and none below {opened.uri} ({TRAINING_LOG})" if opened else ""
        raise NotFound(
            f"{run.id} ({run.state}): no pod of {run.job} has a log any more{where}; tunejob why {run.id} says what is "
            "known of it"
        )
    found = text.splitlines()
    for line in found if tail is None else found[len(found) - min(tail, len(found)) :]:
        yield Line(line)


def stored_text(store: "Store") -> str | None:
    """The log of all attempts out of a run's folder; None if there is none."""
    found = store.read(TRAINING_LOG)
    if found is None:
        key = newest_so_far((entry.key for entry in store.list(SO_FAR)), TRAINING_LOG)
        found = store.read(key) if key else None
    return found[0].decode("utf-8", errors="replace") if found else None
