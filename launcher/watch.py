"""Looks at a run until it has ended: waits, follows, and tells when it will never begin."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from launcher.causes.cause import Cause
from launcher.cluster import Cluster
from launcher.codes import ClusterUnreachable, Code, Refused, Stuck
from launcher.kinds import PODS
from launcher.poll import Clock, Poll, Say
from launcher.runs import Attempt, Run
from launcher.stream import Line, stream, whole

ASK_SECONDS = 10.0
"""Between two questions why a run does not begin; what stands in its way twice is believed."""


Problem = Callable[[Run], Cause | None]
"""What keeps a run from beginning and does not pass by itself; None while there is hope."""
Causes = Callable[[Run], Sequence[Cause]]
"""Why a run is where it is, the likeliest cause first."""


def wait(
    cluster: Cluster,
    run: Run,
    timeout: float | None = None,
    start_timeout: float | None = None,
    say: Say = lambda line: None,
    problem: Problem | None = None,
    clock: Clock = time,
) -> Run:
    """The run when it has ended; ``outcome`` says how.

    Args:
        timeout: seconds until it has ended.
        start_timeout: seconds until a container of it runs; scheduling and queueing are borne without it.
        say: takes a line for the user: a cluster that is away.
        problem: as ``launcher.why`` sees it, unless another is given.

    Raises:
        TimedOut: the time is over; the run goes on.
        Stuck, Refused: it cannot begin, and waiting does not help.
        Deleted: it was deleted meanwhile.
        ClusterUnreachable: the cluster is away for longer than five minutes.
    """
    poll = Poll(cluster, run, say, timeout, clock)
    start = _Start(problem or _startup_problem(cluster), start_timeout, clock)
    while True:
        run = poll.look()
        if poll.is_over():
            return run
        start.check(run)
        poll.pause()


def follow(
    cluster: Cluster,
    run: Run,
    say: Say,
    show: Callable[[Line], None],
    causes: Causes | None = None,
    problem: Problem | None = None,
    tail: int | None = None,
    earlier: Sequence[Attempt] = (),
    clock: Clock = time,
) -> Run:
    """The run when it has ended; until then its stages are said and the lines of its log shown, each once.

    Args:
        say: takes a line for the user about the run.
        show: takes a line of its log.
        causes: why it waits; without it only that it waits is said.
        tail: begins with so many lines of each attempt.
        earlier: pods of earlier Jobs of the run, whose logs come first.

    Raises:
        LauncherError: as ``wait`` does.
    """
    lines = attended(cluster, run, say, tail, causes, problem, earlier, clock)
    is_silent = True
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            ended: Run = end.value
            if is_silent:
                say(f"no pod of {run.job} has a log any more; tunejob logs {run.id} reads that of the store")
            return ended
        is_silent = False
        show(line)


def attended(
    cluster: Cluster,
    run: Run,
    say: Say,
    tail: int | None = None,
    causes: Causes | None = None,
    problem: Problem | None = None,
    earlier: Sequence[Attempt] = (),
    clock: Clock = time,
) -> Generator[Line, None, Run]:
    """Yields every line of every attempt's log until the run has ended, and gives the ended run.

    Args:
        earlier: pods of earlier Jobs of the run, whose logs come first; numbers go on from there.
    """
    yield from ended_before(cluster, earlier, say, tail)
    poll = Poll(cluster, run, say, None, clock)
    start = _Start(problem or _startup_problem(cluster), None, clock)
    stage = _Stage(say, causes, clock)
    numbers: dict[str, int] = {}
    shown: set[str] = set()
    while True:
        run = poll.look()
        for attempt in run.pods:
            numbers.setdefault(attempt.pod, len(earlier) + len(numbers) + 1)
        begun = next((one for one in run.pods if one.has_begun and one.pod not in shown), None)
        stage.tell(run, begun, numbers)
        if begun:
            shown.add(begun.pod)
            container = _Container(poll, begun, say)
            try:
                yield from stream(
                    cluster, begun.pod, numbers[begun.pod], container.has_ended, tail, container.lost, clock
                )
            except ClusterUnreachable as error:
                say(f"{begun.pod}: its log may end here too early ({error}); the store has it")
            poll.hasten()
        elif poll.is_over():
            return run
        else:
            start.check(run)
            poll.pause()


def ended_before(cluster: Cluster, earlier: Sequence[Attempt], say: Say, tail: int | None) -> Iterator[Line]:
    """The logs of pods of earlier Jobs; that one cannot be read any more keeps nobody from the others."""
    for number, attempt in enumerate(earlier, 1):
        try:
            if attempt.has_begun:
                yield from whole(cluster, attempt.pod, number, tail)
        except ClusterUnreachable as error:
            say(f"{attempt.pod}: its log cannot be read, node {attempt.node} may be away ({error}); the store has it")


def outcome(run: Run, has_manifest: Callable[[], bool] | None = None) -> Code:
    """How a run ended: OK, NO_RESULT if nothing proves that it published, JOB_FAILED.

    Args:
        has_manifest: looks into the store, where no pod is left that said what it published.
    """
    if run.state != "complete":  # failed, or a suspended Job whose Workload was deactivated
        return Code.JOB_FAILED
    return Code.OK if run.digest or (has_manifest and has_manifest()) else Code.NO_RESULT


class _Container:
    """Whether one container of a followed run still writes."""

    def __init__(self, poll: Poll, attempt: Attempt, say: Say) -> None:
        self._poll, self._attempt, self._say = poll, attempt, say
        self._is_known = True

    def has_ended(self, is_clean: bool) -> bool:
        """Whether it writes no more. Raises what ends the following: the run is deleted.

        Args:
            is_clean: its log came to an end by itself; else the connection broke.
        """
        if self._is_known:  # just looked at
            self._is_known = False
            return self._attempt.has_ended
        found = self._poll.bear(lambda: self._poll.cluster.get(PODS, self._attempt.pod))
        if found is None:
            if not is_clean:
                self._say(f"{self._attempt.pod} is gone: its last lines may be missing here; the store has them")
            return True
        if Attempt(found).has_ended:
            return True
        self._poll.look()
        return False

    def lost(self) -> None:
        """Says that lines may be missing."""
        self._say(
            f"{self._attempt.pod}: its log was rotated while the connection was broken; lines may be missing here"
        )


class _Start:
    """Whether a run that does not run will ever do so."""

    def __init__(self, problem: Problem, timeout: float | None, clock: Clock) -> None:
        self._problem, self._timeout, self._clock = problem, timeout, clock
        self._began = self._asked = clock.monotonic()
        self._has_begun = False
        self._name = ""

    def check(self, run: Run) -> None:
        """Raises Stuck, or Refused, if it will not."""
        self._has_begun = self._has_begun or any(attempt.has_begun for attempt in run.pods)
        now = self._clock.monotonic()
        if self._timeout is not None and not self._has_begun and now - self._began >= self._timeout:
            raise _error(run, self._asked_why(run), f"{run.id} has not begun after {self._timeout:g} s")
        is_waiting = run.state in ("queued", "pending") and not (run.pods and run.pods[-1].has_begun)
        if not is_waiting or now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        cause = self._asked_why(run)
        if cause and cause.name == self._name:
            raise _error(run, cause, f"{run.id} cannot begin")
        self._name = cause.name if cause else ""

    def _asked_why(self, run: Run) -> Cause | None:
        try:
            return self._problem(run)
        except ClusterUnreachable:  # the next look waits for it
            return None


class _Stage:
    """Says what a followed run is doing, each thing once."""

    def __init__(self, say: Say, causes: Causes | None, clock: Clock) -> None:
        self._say, self._causes, self._clock = say, causes, clock
        self._said = ""
        self._asked = 0.0

    def tell(self, run: Run, begun: Attempt | None, numbers: dict[str, int]) -> None:
        """Takes the run as it is, and the attempt whose log comes next."""
        if begun:
            self._once(f"attempt {numbers[begun.pod]} runs on {begun.node or 'a node'} as {begun.pod}")
        elif run.state in ("queued", "pending"):
            self._waiting(run)
        elif run.state == "deleting":
            self._once(f"{run.id} is being deleted")

    def _waiting(self, run: Run) -> None:
        where = f" in {run.queue}" if run.queue and run.state == "queued" else ""
        now = self._clock.monotonic()
        if not self._said.startswith(run.state):
            self._once(f"{run.state}{where}")
            self._asked = now
        if self._causes is None or now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        try:
            cause = next(iter(self._causes(run)), None)
        except ClusterUnreachable:  # the next look waits for it
            return
        if cause:
            self._once(f"{run.state}{where}: {cause.sentence}")

    def _once(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._say(line)


def _error(run: Run, cause: Cause | None, what: str) -> Stuck | Refused:
    """The sentence of a run that does not begin."""
    if cause is None:
        return Stuck(f"{what}: it is {run.state}; tunejob why {run.id} says more, tunejob cancel {run.id} gives it up")
    kind = Refused if cause.code == Code.REFUSED else Stuck
    return kind(f"{what}: {cause.sentence}; {cause.remedy}. tunejob cancel {run.id} gives it up")


def _startup_problem(cluster: Cluster) -> Problem:
    def problem(run: Run) -> Cause | None:
        from launcher.causes.evidence import gather
        from launcher.why import startup_problem

        return startup_problem(gather(cluster, run))

    return problem
