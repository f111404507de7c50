"""Ends and restarts runs: retry, cancel, delete."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import Refused
from launcher.kinds import CONFIG_MAPS, CRON_JOBS, JOBS
from launcher.labels import Manifest
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
        raise Refused(
            f"{run.job} is a schedule, every fire is a run of its own: tunejob list shows them, tunejob retry FIRE "
            f"goes on with one, and kubectl -n {run.namespace} create job NAME --from=cronjob/{run.job} starts another"
        )
    if run.state != "failed":
        raise Refused(f"{run.id} is {run.state}; only a failed run is retried (tunejob status {run.id})")
    spec = spec_of(cluster, run)
    if spec is None:
        raise Refused(f"{run.id}: its ConfigMap {run.config_map} is gone; raise `restart` in the spec, and submit that")
    again = spec.model_copy(update={"restart": spec.restart + 1})
    return submit(cluster, again, render(again, profile, run.id if spec.scheduling.cron else ""), say)


def cancel(cluster: Cluster, run: Run) -> None:
    """Takes the run's Job away, its pods first given time to commit; returns when none is left. The store is kept.

    Raises:
        Refused: it has ended already.
    """
    if run.has_ended:
        raise Refused(f"{run.id} is {run.state} already; tunejob delete {run.id} takes it out of the list")
    cluster.delete(CRON_JOBS if run.is_schedule else JOBS, run.job, run.uid)
    wait_until_gone(cluster, run)


@dataclass(frozen=True)
class Doomed:
    """What a deletion would take away."""

    run_id: str
    run: Run | None
    """Its newest Job, or the schedule; None if only ConfigMaps are left (an interrupted submit)."""
    data: str = ""
    """URI of its folder in the store, if that is to go too."""

    def __str__(self) -> str:
        """For the question whether to go on."""
        what = f"{self.run.known_as} ({self.run.state})" if self.run else f"{self.run_id} (no Job is left)"
        with_it = "its schedule and every fire's Job" if self.run and self.run.is_schedule else "Jobs, pods and logs"
        return f"{what}: {with_it}" + (f", and EVERYTHING BELOW {self.data}" if self.data else "")


def doomed(cluster: Cluster, run: Run, root: str = "") -> Doomed:
    """What deleting a run would take away.

    Args:
        root: URI of the folder of runs as the profile has it, if the run's data is to go too.

    Raises:
        Refused: a schedule has no data of its own.
    """
    if root and run.is_schedule:
        raise Refused(
            f"{run.job} is a schedule, and its data is that of its fires: tunejob delete --data FIRE each (tunejob "
            "list), then the schedule without --data"
        )
    return Doomed(run.id, run, _folder(run.id, run, root))


def remains(cluster: Cluster, run_id: str, root: str = "") -> Doomed | None:
    """What is left of a run that has no Job any more; None if nothing is."""
    return Doomed(run_id, None, _folder(run_id, None, root)) if _left(cluster, run_id, set()) else None


def delete(cluster: Cluster, what: Doomed) -> list[str]:
    """Takes everything of a run off the cluster: Jobs, pods, ConfigMaps. Gives what was there, as kind/name."""
    gone: list[str] = []
    going = _workloads(cluster, what.run) if what.run else []
    for one in going:
        cluster.delete(CRON_JOBS if one.is_schedule else JOBS, one.job, one.uid)
        wait_until_gone(cluster, one)
        gone.append(f"{one.kube_job['kind']}/{one.job}")
    for left in _left(cluster, what.run_id, {one.uid for one in going}):
        name, uid = left["metadata"]["name"], left["metadata"]["uid"]
        if cluster.delete(CONFIG_MAPS, name, uid):
            gone.append(f"ConfigMap/{name}")
    return gone


def delete_data(store: "Store") -> int:
    """Deletes everything of a run's folder in the store, the manifest first; gives the number of objects."""
    from job.layout import MANIFEST

    keys: Sequence[str] = [entry.key for entry in store.list("")]
    for key in sorted(keys, key=lambda key: key != MANIFEST):
        store.delete(key)
    return len(keys)


def _workloads(cluster: Cluster, run: Run) -> list[Run]:
    return [run] if run.is_schedule else runs.jobs_of(cluster, run.id) or [run]


def _left(cluster: Cluster, run_id: str, gone: set[str]) -> list[Manifest]:
    """ConfigMaps of a run without an owner but those that are gone: a schedule and a run of the same spec share the
    label, and each needs its own.
    """
    return [
        one
        for one in runs.labelled(cluster, CONFIG_MAPS, run_id)
        if {owner["uid"] for owner in one["metadata"].get("ownerReferences") or []} <= gone
    ]


def _folder(run_id: str, run: Run | None, root: str) -> str:
    if not root:
        return ""
    return (run.output if run else "") or f"{root.rstrip('/')}/{run_id}"
