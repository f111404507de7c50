"""The log of a run: every line of every attempt once, and the store's where no pod is left."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from job.layout import SO_FAR, TRAINING_LOG, newest_so_far
from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import NotFound
from launcher.runs import Run
from launcher.stream import Line, whole
from launcher.watch import attended

if TYPE_CHECKING:
    from job.storage.store import Store


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
        attempts = attempts[:before]
    for number, attempt in enumerate(attempts, 1):
        if attempt.has_begun:
            yield from whole(cluster, attempt.pod, number, tail)
    if follow:
        yield from attended(cluster, run, lambda _: None, tail=tail, attempts_before=before)


def _stored(run: Run, tail: int | None, store: "Callable[[], Store] | None") -> Iterator[Line]:
    """The log of all attempts as the store has it: published, else the newest owner's."""
    if not run.has_ended and any(not attempt.has_ended for attempt in run.pods):
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
