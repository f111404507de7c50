"""The lines of one container's log, whatever happens to the connection; and what a line of progress tells.

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
from typing import Any

from launcher.cluster import Cluster
from launcher.codes import ClusterUnreachable, LauncherError, NotAllowed
from launcher.poll import Clock
from launcher.runs import Run

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


def latest_progress(cluster: Cluster, run: Run) -> tuple[Mapping[str, Any], LauncherError | None]:
    """The latest word of progress of the run's newest pod that has begun, empty if there is none; and why its log
    cannot be read, which is no failure of the run's: its node may be away, or this account may not read logs.
    """
    begun = [attempt for attempt in run.pods if attempt.has_begun]
    if not begun:
        return {}, None
    newest = begun[-1]
    try:
        lines = list(cluster.log(newest.pod, tail=LATEST_LINES))
    except NotAllowed as error:
        return {}, error
    except LauncherError as error:
        return {}, ClusterUnreachable(f"{newest.pod}: its log cannot be read, node {newest.node} may be away ({error})")
    return next((word for line in reversed(lines) if (word := progress(line)) is not None), {}), None


def whole(cluster: Cluster, pod: str, number: int, tail: int | None) -> Iterator[Line]:
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
