"""The log of a run: every line of every attempt once, and the store's where no pod is left."""

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from job.layout import SO_FAR, TRAINING_LOG, newest_so_far
from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import NotFound
from launcher.poll import Say
from launcher.runs import Attempt, Run
from launcher.stream import Line, whole
from launcher.watch import attended, ended_before

if TYPE_CHECKING:
    from job.storage.store import Store


def lines(
    cluster: Cluster,
    run: Run,
    follow: bool = False,
    tail: int | None = None,
    store: "Callable[[], Store] | None" = None,
    say: Say = lambda line: None,
) -> Iterator[Line]:
    """The log of every attempt whose pod is left, oldest first, those of the run's earlier Jobs too; without any, what
    the store has of all of them.

    Args:
        follow: goes on until the run has ended.
        tail: only so many lines at the end of each attempt.
        store: opens the run's folder; asked only where no pod has a log.
        say: takes a line for the user: a log that cannot be read.

    Raises:
        NotFound: there is no log, neither here nor there.
        LauncherError: the cluster does not answer, or the run was deleted while it was followed.
    """
    count = 0
    for line in _of_pods(cluster, run, follow, tail, say):
        count += 1
        yield line
    if not count and tail != 0:
        yield from _stored(run, tail, store)


def earlier(cluster: Cluster, run: Run) -> tuple[Attempt, ...]:
    """The pods that are left of Jobs which were made for the run before this one, oldest first."""
    jobs = takewhile(lambda one: one.uid != run.uid, runs.jobs_of(cluster, run.id))
    return tuple(attempt for one in jobs for attempt in runs.of(one.kube_job, runs.pods_of(cluster, one.job)).pods)


def _of_pods(cluster: Cluster, run: Run, follow: bool, tail: int | None, say: Say) -> Iterator[Line]:
    before = earlier(cluster, runs.require_run(run))
    if follow:
        yield from attended(cluster, run, say, tail=tail, earlier=before)
        return
    yield from ended_before(cluster, before, say, tail)
    for number, attempt in enumerate(run.pods, len(before) + 1):
        if attempt.has_begun:
            yield from whole(cluster, attempt.pod, number, tail)


def _stored(run: Run, tail: int | None, store: "Callable[[], Store] | None") -> Iterator[Line]:
    """The log of all attempts as the store has it: published, else the newest owner's."""
    if not run.has_ended and (run.has_never_begun or any(not attempt.has_ended for attempt in run.pods)):
        raise NotFound(
            f"{run.id}: no log yet, it is {run.state}; tunejob logs -f {run.id} waits, tunejob why {run.id} says more"
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
