"""Finds the run that is meant by a name that people type, or by a spec."""

import difflib
from typing import TYPE_CHECKING

from launcher.cluster import Cluster
from launcher.codes import NoRun, Refused
from launcher.kinds import CRON_JOBS, JOBS
from launcher.labels import Manifest, run_of
from launcher.runs import Run, age, jobs_of, labelled, listed, of, pods_of

if TYPE_CHECKING:
    from job.spec import JobSpec


def by_name(cluster: Cluster, name: str) -> Run:
    """The run with an id, a Job's name, or the beginning of either; of several Jobs the newest, with its pods.

    Raises:
        NoRun: there is none.
        Refused: the beginning fits several.
    """
    return _with_pods(cluster, _found(cluster, name))


def by_spec(cluster: Cluster, spec: "JobSpec") -> Run:
    """The newest Job of a spec's run, with its pods; of a spec with `scheduling.cron` the schedule.

    Raises:
        NoRun: there is none.
    """
    from job.spec import run_id

    if not spec.scheduling.cron:
        if jobs := jobs_of(cluster, run_id(spec)):
            return _with_pods(cluster, jobs[-1].kube_job)
        raise no_run(cluster, run_id(spec))
    name = spec.name.rstrip("-")
    found = cluster.get(CRON_JOBS, name)
    if found is None or not run_of(found):
        raise no_run(cluster, f"{name} on a schedule")
    return of({"kind": "CronJob", **found})


def no_run(cluster: Cluster, name: str, hint: str = "tunejob list shows those that are there") -> NoRun:
    """There is no run of a name."""
    return NoRun(f"no run {name} in namespace {cluster.namespace}; {hint}")


def _with_pods(cluster: Cluster, kube_job: Manifest) -> Run:
    return of(kube_job, [] if kube_job.get("kind") == "CronJob" else pods_of(cluster, kube_job["metadata"]["name"]))


def _found(cluster: Cluster, name: str) -> Manifest:
    # A fire has the label of its schedule, and an id of its own.
    if exact := [one for one in labelled(cluster, JOBS, name) if run_of(one) == name]:
        return max(exact, key=age)
    known = listed(cluster)
    fitting = {run.known_as: run for run in reversed(known) if name in (run.id, run.job)} or {
        run.known_as: run for run in reversed(known) if run.id.startswith(name) or run.job.startswith(name)
    }
    if len(fitting) == 1:
        return next(iter(fitting.values())).kube_job
    if fitting:
        raise Refused(f"{name}: fits several runs ({', '.join(sorted(fitting))}); write more of the name")
    near = difflib.get_close_matches(name, [run.id for run in known], n=3)
    raise no_run(cluster, name, f"near it: {', '.join(near)}") if near else no_run(cluster, name)
