"""Puts a run on the cluster: ConfigMap, Job, and the owner reference between them. Nothing is left half done that the
next ``submit`` does not adopt.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import SpecInvalid
from job.spec import differences, parse
from launcher import runs
from launcher.cluster import Cluster
from launcher.codes import LauncherError, NotFound, Refused, RunFailed, TimedOut
from launcher.kinds import CONFIG_MAPS, CRON_JOBS, JOBS, Kind
from launcher.labels import NAME, SPEC_DIGEST, Manifest
from launcher.runs import Run

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.render import Rendered

Say = Callable[[str], None]

POLL_SECONDS = 1.0
FIRST_POD_SECONDS = 15.0
"""How long a Job may be without a pod before nobody looks at why."""
GONE_SECONDS = 120.0
"""How long deleting may take beyond a pod's own grace period."""


@dataclass(frozen=True)
class Submitted:
    """What a submission came to."""

    run: Run
    is_new: bool
    """Whether the Job was made by it; else it was there."""
    remarks: tuple[str, ...] = ()
    """What its user was told of: warnings of the server's, quota, runs of the same name."""


def submit(cluster: Cluster, spec: "JobSpec", rendered: "Rendered", say: Say, replace: bool = False) -> Submitted:
    """The run on the cluster: made, or found active or complete.

    Args:
        say: takes a line for the user: a warning of the server's, a remark.
        replace: deletes another active Job of the same run first, and waits for its pods.

    Raises:
        Refused: another Job of the run is active, another spec has the name, or quota or admission stand against it.
        RunFailed: the same Job is there, and failed.
    """
    remarks: list[str] = []

    def tell(line: str) -> None:
        remarks.append(line)
        say(line)

    existing = _existing(cluster, spec, rendered, tell)
    heard = len(cluster.warnings)
    if is_new := existing is None:
        _look(cluster, rendered, tell)
        heard = len(cluster.warnings)  # what a dry run is warned of is told already
        _make_room(cluster, rendered, tell, replace)
        _tell_of_namesakes(cluster, spec, rendered, tell)
        existing = _create(cluster, rendered)
        # At once: whoever is interrupted from here on has to know what goes on without him.
        say(f"{existing.id}: submitted as {existing.kube_job['kind']} {existing.job} ({cluster.place})")
    if not existing.has_ended:
        _own(cluster, rendered.config_map, existing)
        _await_first_pod(cluster, existing)
    for text in cluster.warnings[heard:]:
        tell(f"the cluster warns: {text}")
    return Submitted(runs.refreshed(cluster, existing) or existing, is_new, tuple(remarks))


def _existing(cluster: Cluster, spec: "JobSpec", rendered: "Rendered", say: Say) -> Run | None:
    """The very same Job, if it is there and can be followed. A schedule is always applied: it keeps its name."""
    if rendered.workload["kind"] == "CronJob":
        return None
    kube_job = cluster.get(JOBS, rendered.name)
    if kube_job is None:
        return None
    if (kube_job["metadata"].get("annotations") or {}).get(SPEC_DIGEST) != _digest(rendered):
        raise Refused(_other_spec(cluster, spec, Run(kube_job)))
    run = runs.of(kube_job, runs.pods_of(cluster, rendered.name))
    if run.state == "deleting":
        say(f"{run.job} is being deleted; waiting for its end")
        wait_until_gone(cluster, run)
        return None
    if run.state == "failed":
        said = run.word.get("message") or run.message or run.reason
        raise RunFailed(
            f"{run.job} failed ({said}); tunejob why {run.id} says more, tunejob retry {run.id} makes a new Job that "
            "goes on from the last checkpoint"
        )
    return run


def _digest(rendered: "Rendered") -> str | None:
    found: str | None = rendered.workload["metadata"]["annotations"].get(SPEC_DIGEST)
    return found


def _other_spec(cluster: Cluster, spec: "JobSpec", run: Run) -> str:
    lines = _compared(cluster, spec, run)
    return f"{run.job} is there with another spec:\n" + "\n".join(
        lines or ["  (its ConfigMap is gone, or of a newer release)"]
    )


def _compared(cluster: Cluster, spec: "JobSpec", run: Run) -> list[str]:
    """Where our spec differs from that of a run on the cluster, a line each; none where theirs cannot be read."""
    try:
        theirs = spec_of(cluster, run)
    except SpecInvalid:  # of a newer release
        return []
    return [f"  {line}" for line in differences(spec, theirs)] if theirs else []


def spec_of(cluster: Cluster, run: Run) -> "JobSpec | None":
    """The spec that a run on the cluster was made of; None if its ConfigMap is gone."""
    config_map = cluster.get(CONFIG_MAPS, run.config_map) if run.config_map else None
    return parse(config_map["data"]["spec.yaml"], f"ConfigMap {run.config_map}") if config_map else None


def _look(cluster: Cluster, rendered: "Rendered", say: Say) -> None:
    """What can be known before anything is made."""
    from launcher.preflight import look

    findings = look(cluster, rendered)
    for line in findings.warnings:
        say(line)
    if findings.refusals:
        raise Refused("\n".join(findings.refusals))


def _make_room(cluster: Cluster, rendered: "Rendered", say: Say, replace: bool) -> None:
    """Two Jobs of one run would train the same thing twice."""
    if rendered.workload["kind"] == "CronJob":
        return
    for other in runs.jobs_of(cluster, rendered.run):
        if other.has_ended or other.job == rendered.name:
            continue
        if not replace and other.state != "deleting":
            raise Refused(
                f"another Job of the run is active ({other.job}, {other.state}): follow it with tunejob logs -f "
                f"{other.job}, or put this one in its place with --replace (it goes on from the last checkpoint)"
            )
        say(f"{other.job} is taken away first")
        cluster.delete(JOBS, other.job, other.uid)
        wait_until_gone(cluster, other)


def _tell_of_namesakes(cluster: Cluster, spec: "JobSpec", rendered: "Rendered", say: Say) -> None:
    """A run of the same name that trains something else is no obstacle; the user should know of it."""
    for kube_job in cluster.list(JOBS, f"{NAME}={spec.name.rstrip('-')}"):
        other = Run(kube_job)
        # By the digest, not by the id: a schedule's fires train the same under ids of their own.
        if other.spec_digest != _digest(rendered) and not other.has_ended:
            say(f"{other.id} of the same name is active and trains something else:")
            for line in _compared(cluster, spec, other):
                say(line)


def _create(cluster: Cluster, rendered: "Rendered") -> Run:
    """The Job, its ConfigMap first. If the Job is refused, a ConfigMap that nobody uses is taken away again."""
    kind = CRON_JOBS if rendered.workload["kind"] == "CronJob" else JOBS
    was_there = cluster.get(CONFIG_MAPS, rendered.config_map["metadata"]["name"]) is not None
    config_map = cluster.apply(CONFIG_MAPS, rendered.config_map)
    try:
        return Run({"kind": kind.name, **cluster.apply(kind, rendered.workload)})
    except LauncherError:
        # A server that does not answer may have made the Job all the same: then the next submit finds both.
        if not was_there:
            _take_back(cluster, kind, rendered.name, config_map)
        raise


def _take_back(cluster: Cluster, kind: Kind, name: str, config_map: Manifest) -> None:
    """Deletes a ConfigMap as this submission made it, unless what is there by the workload's name reads it."""
    metadata = config_map["metadata"]
    try:
        there = cluster.get(kind, name)
        if there is None or Run({"kind": kind.name, **there}).config_map != metadata["name"]:
            # Somebody who submits the same meanwhile owns it, and so has changed it.
            version = metadata["resourceVersion"]
            cluster.delete(CONFIG_MAPS, metadata["name"], metadata["uid"], version, propagation="Background")
    except LauncherError:
        return  # it is small, and the next submit adopts it


def _own(cluster: Cluster, config_map: Manifest, run: Run) -> None:
    """Makes the Job an owner of its ConfigMap, so that the one goes with the other.

    Two Jobs of one run may share it, so an owner is added, not set. And a ConfigMap that is just going, because its
    former owner was deleted, is made again: the new Job needs it.
    """
    name = config_map["metadata"]["name"]
    owner = {
        "apiVersion": run.kube_job["apiVersion"],
        "kind": run.kube_job["kind"],
        "name": run.job,
        "uid": run.uid,
    }
    end = time.monotonic() + GONE_SECONDS
    while True:
        there = cluster.apply(CONFIG_MAPS, config_map)
        metadata = there["metadata"]
        if not metadata.get("deletionTimestamp"):
            if any(one["uid"] == run.uid for one in metadata.get("ownerReferences") or []):
                return
            if _has_added(cluster, name, metadata, owner):
                return
        if time.monotonic() > end:
            raise TimedOut(f"ConfigMap {name} is being deleted and does not go; kubectl get configmap {name} -o yaml")
        time.sleep(POLL_SECONDS)


def _has_added(cluster: Cluster, name: str, metadata: Mapping[str, Any], owner: Mapping[str, str]) -> bool:
    """Whether the owner could be added; not if the ConfigMap was changed or deleted meanwhile."""
    owners = [*(metadata.get("ownerReferences") or []), owner]
    fixed = {key: metadata[key] for key in ("uid", "resourceVersion")}
    try:
        cluster.merge(CONFIG_MAPS, name, {"metadata": {**fixed, "ownerReferences": owners}})
    except (Refused, NotFound):
        return False
    return True


def _await_first_pod(cluster: Cluster, run: Run) -> None:
    """Returns when a pod stands, or none is to be expected yet; a dry run proves neither quota nor Pod Security.

    Raises:
        Refused: the server refuses to make the pods.
    """
    from launcher.causes.evidence import gather
    from launcher.why import startup_problem

    end = time.monotonic() + FIRST_POD_SECONDS
    while not run.is_schedule and not run.pods and run.state == "pending" and time.monotonic() < end:
        problem = startup_problem(gather(cluster, run))
        if problem is not None:
            raise Refused(
                f"{run.job} was made, but its pods are refused: {problem.sentence}. {problem.remedy}. "
                f"The cluster tries it again until then; tunejob cancel {run.id} takes it away"
            )
        time.sleep(POLL_SECONDS)
        now = runs.refreshed(cluster, run)
        if now is None:
            return
        run = now


def wait_until_gone(cluster: Cluster, run: Run) -> None:
    """Returns when neither the Job nor a pod of it is left.

    Raises:
        TimedOut: they are still there after the grace period and some more.
    """
    end = time.monotonic() + run.grace_seconds + GONE_SECONDS
    kind = CRON_JOBS if run.is_schedule else JOBS
    while True:
        there = cluster.get(kind, run.job)
        pods = [] if run.is_schedule else runs.pods_of(cluster, run.job)
        if (there is None or there["metadata"]["uid"] != run.uid) and not pods:
            return
        if time.monotonic() > end:
            names = ", ".join(runs.Attempt(pod).pod for pod in pods) or run.job
            raise TimedOut(f"{names}: still there; its node may be unreachable (kubectl describe pod says more)")
        time.sleep(POLL_SECONDS)
