"""Ends and restarts runs: retry, cancel, delete."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import NotFound, Refused
from launcher.kinds import CONFIG_MAPS, CRON_JOBS, JOBS
from launcher.labels import RUN
from launcher.runs import Run
from launcher.submit import Say, Submitted, spec_of, submit, wait_until_gone

if TYPE_CHECKING:
    from job.storage.store import Store
    from launcher.profile import Profile


def retry(cluster: Cluster, run: Run, profile: "Profile", say: Say) -> Submitted:
    """A new Job where a failed one stands; it goes on from the last committed checkpoint.

    Raises:
        Refused: the run is active or complete, or its spec is gone from the cluster.
    """
    from launcher.render import render

    if run.is_schedule:
        raise Refused(f"{run.id} is a schedule, every fire is a run of its own: retry one of those (tunejob list)")
    if run.state != "failed":
        raise Refused(f"{run.id} is {run.state}; only a failed run is retried (tunejob status {run.id})")
    spec = spec_of(cluster, run)
    if spec is None:
        raise Refused(f"{run.id}: its ConfigMap {run.config_map} is gone; raise `restart` in the spec, and submit that")
    again = spec.model_copy(update={"restart": spec.restart + 1})
    return submit(cluster, again, render(again, profile), say)


def cancel(cluster: Cluster, run: Run) -> None:
    """Takes the run's Job away, its pods first given time to commit; returns when none is left. The store is kept.

    Raises:
        Refused: it has ended already.
    """
    if run.has_ended:
        raise Refused(f"{run.id} is {run.state} already; tunejob delete {run.id} takes it out of the list")
    cluster.delete(CRON_JOBS if run.is_schedule else JOBS, run.job, run.uid)
    wait_until_gone(cluster, run)


def delete(cluster: Cluster, run: Run) -> list[str]:
    """Takes everything of the run off the cluster: Jobs, pods, ConfigMaps. Gives what was there, as kind/name."""
    gone: list[str] = []
    if run.is_schedule:
        cancel(cluster, run)
        gone.append(f"CronJob/{run.job}")
    else:
        for one in runs.jobs_of(cluster, run.id) or [run]:
            cluster.delete(JOBS, one.job, one.uid)
            wait_until_gone(cluster, one)
            gone.append(f"Job/{one.job}")
    return gone + _leftovers(cluster, run.id)


def delete_data(store: "Store") -> int:
    """Deletes everything of a run's folder in the store, the manifest first; gives the number of objects."""
    from job.layout import MANIFEST

    keys: Sequence[str] = [entry.key for entry in store.list("")]
    for key in sorted(keys, key=lambda key: key != MANIFEST):
        store.delete(key)
    return len(keys)


def leftover(cluster: Cluster, name: str) -> list[str]:
    """Deletes ConfigMaps of a run that has no Job (an interrupted submit); gives what was there.

    Raises:
        NotFound: there is nothing of such a run.
    """
    gone = _leftovers(cluster, name)
    if not gone:
        raise NotFound(f"no run {name} in namespace {cluster.namespace}; tunejob list shows those that are there")
    return gone


def _leftovers(cluster: Cluster, run_id: str) -> list[str]:
    gone = []
    for one in cluster.list(CONFIG_MAPS, f"{RUN}={run_id}"):
        name = one["metadata"]["name"]
        if cluster.delete(CONFIG_MAPS, name, one["metadata"]["uid"]):
            gone.append(f"ConfigMap/{name}")
    return gone
