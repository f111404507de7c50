"""Runs as the cluster has them: a Job, its pods, and what both say. Reading only."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job.exits import CONTAINER
from launcher.answers import no_namespace
from launcher.cluster import Cluster
from launcher.codes import NotAllowed, Refused
from launcher.kinds import CRON_JOBS, JOBS, NAMESPACES, PODS, Kind
from launcher.labels import JOB_NAME, OUTPUT, QUEUE, RUN, SPEC_DIGEST, Manifest, is_value, run_of

State = Literal["scheduled", "queued", "pending", "running", "complete", "failed", "deleting"]
_FIRE = re.compile(r"(?P<schedule>.+-[0-9a-f]{8})-[0-9a-f]{8}")
ENDED: tuple[State, ...] = ("complete", "failed")


@dataclass(frozen=True)
class Attempt:
    """One pod of a run."""

    manifest: Manifest

    @property
    def pod(self) -> str:
        """The pod's name."""
        return str(self.manifest["metadata"]["name"])

    @property
    def phase(self) -> str:
        """Pending, Running, Succeeded, Failed or Unknown."""
        return str(self.manifest.get("status", {}).get("phase", "Unknown"))

    @property
    def node(self) -> str:
        """Where it runs; empty before it is placed."""
        return str(self.manifest.get("spec", {}).get("nodeName") or "")

    @property
    def state(self) -> Mapping[str, Any]:
        """The state of its container: ``waiting``, ``running`` or ``terminated`` with details; empty at first."""
        found: Mapping[str, Any] = _ours(self.manifest.get("status", {}).get("containerStatuses")).get("state") or {}
        return found

    @property
    def container(self) -> Mapping[str, Any]:
        """Its container as the pod asks for it; empty where the pod says nothing of it."""
        return _ours(self.manifest.get("spec", {}).get("containers"))

    @property
    def _ended(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.state.get("terminated") or {}
        return found

    @property
    def has_begun(self) -> bool:
        """Whether its container runs or ran, and so may have a log."""
        return "running" in self.state or "terminated" in self.state

    @property
    def has_ended(self) -> bool:
        """Whether its container writes no more."""
        return "terminated" in self.state or self.phase in ("Succeeded", "Failed")

    @property
    def code(self) -> int | None:
        """How its container left; None while it has not."""
        return self._ended.get("exitCode")

    @property
    def reason(self) -> str:
        """Why, as the kubelet sees it: Completed, Error, OOMKilled, Evicted; empty while it runs."""
        return str(self.manifest.get("status", {}).get("reason") or self._ended.get("reason") or "")

    @property
    def word(self) -> Mapping[str, Any]:
        """Its termination message (``docs/container.md``); empty if it left none."""
        try:
            said = json.loads(self._ended.get("message") or "{}")
        except ValueError:  # another program's
            return {}
        return said if isinstance(said, dict) else {}


def _ours(containers: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Of a pod's containers, or of their statuses, ours: others may have been put beside it, and come first."""
    there = containers or [{}]
    return next((one for one in there if one.get("name") == CONTAINER), there[0])


@dataclass(frozen=True)
class Run:
    """One run, by its newest Job."""

    kube_job: Manifest
    """The Job, or the CronJob whose every fire is a run."""
    pods: tuple[Attempt, ...] = ()
    """Those that still exist, oldest first."""

    @property
    def id(self) -> str:
        """The run's id."""
        return run_of(self.kube_job)

    @property
    def job(self) -> str:
        """The Job's name."""
        return str(self.kube_job["metadata"]["name"])

    @property
    def known_as(self) -> str:
        """The name that means it alone: a schedule has the id of the run that its spec would be without one."""
        return self.job if self.is_schedule else self.id

    @property
    def uid(self) -> str:
        """The Job's, not that of a later one of its name."""
        return str(self.kube_job["metadata"]["uid"])

    @property
    def namespace(self) -> str:
        """Where it is."""
        return str(self.kube_job["metadata"]["namespace"])

    @property
    def is_schedule(self) -> bool:
        """Whether this is a CronJob."""
        return self.kube_job.get("kind") == "CronJob"

    @property
    def state(self) -> State:
        """What it is doing."""
        if self.kube_job["metadata"].get("deletionTimestamp"):
            return "deleting"
        if self.is_schedule:
            return "scheduled"
        for state, kind in (("complete", "Complete"), ("failed", "Failed")):
            if self.condition(kind):
                return state  # type: ignore[return-value]
        if self.kube_job["spec"].get("suspend"):
            return "queued"
        # Between a pod's success and the Job's completion there is a moment.
        is_running = any(attempt.phase in ("Running", "Succeeded") for attempt in self.pods) or self._status.get(
            "ready"
        )
        return "running" if is_running else "pending"

    @property
    def has_ended(self) -> bool:
        """Whether its Job is complete or failed."""
        return self.state in ENDED

    @property
    def has_never_begun(self) -> bool:
        """Whether no pod of it is known to have begun, as far as the Job tells."""
        return not self.pods and not self._status.get("failed")

    @property
    def created(self) -> str:
        """When, in ISO 8601."""
        return str(self.kube_job["metadata"]["creationTimestamp"])

    @property
    def started(self) -> str:
        """When its Job was last admitted; empty before."""
        return str(self._status.get("startTime") or "")

    @property
    def ended(self) -> str:
        """When; empty before."""
        found = self.condition("Complete") or self.condition("Failed") or {}
        return str(found.get("lastTransitionTime") or "")

    @property
    def output(self) -> str:
        """URI of the run's folder; empty where the Job does not say."""
        root = str(self.annotations.get(OUTPUT, ""))
        return f"{root.rstrip('/')}/{self.id}" if root else ""

    @property
    def spec_digest(self) -> str:
        """SHA-256 of what is trained."""
        return str(self.annotations.get(SPEC_DIGEST, ""))

    @property
    def queue(self) -> str:
        """Kueue's LocalQueue, if there is one."""
        return str((self.kube_job["metadata"].get("labels") or {}).get(QUEUE, ""))

    @property
    def annotations(self) -> Mapping[str, str]:
        """The Job's."""
        found: Mapping[str, str] = self.kube_job["metadata"].get("annotations") or {}
        return found

    @property
    def reason(self) -> str:
        """Why it failed, as the Job's controller says it: BackoffLimitExceeded, PodFailurePolicy, DeadlineExceeded."""
        return str((self.condition("Failed") or {}).get("reason") or "")

    @property
    def message(self) -> str:
        """The controller's sentence on it."""
        return str((self.condition("Failed") or {}).get("message") or "")

    @property
    def word(self) -> Mapping[str, Any]:
        """The newest termination message of any pod."""
        return next((attempt.word for attempt in reversed(self.pods) if attempt.word), {})

    @property
    def digest(self) -> str:
        """SHA-256 of the published manifest, as a pod that left with 0 said it; empty where none did."""
        words = (attempt.word for attempt in reversed(self.pods) if attempt.code == 0)
        return next((str(word["manifest_sha256"]) for word in words if word.get("manifest_sha256")), "")

    def condition(self, kind: str) -> Mapping[str, Any] | None:
        """The Job's condition of a kind, if it holds."""
        conditions: Sequence[Mapping[str, Any]] = self._status.get("conditions") or []
        return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap with its spec; empty where it is not ours."""
        volumes = self._pod.get("volumes") or []
        return next((str(one["configMap"]["name"]) for one in volumes if one["name"] == "spec"), "")

    @property
    def grace_seconds(self) -> int:
        """How long a pod of it that is asked to leave may take."""
        return int(self._pod.get("terminationGracePeriodSeconds") or 30)

    @property
    def _pod(self) -> Mapping[str, Any]:
        """What it asks for in its pods."""
        spec = self.kube_job["spec"]["jobTemplate"]["spec"] if self.is_schedule else self.kube_job["spec"]
        found: Mapping[str, Any] = spec.get("template", {}).get("spec") or {}
        return found

    @property
    def _status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.kube_job.get("status") or {}
        return found


def of(kube_job: Manifest, pods: Sequence[Manifest] = ()) -> Run:
    """The run of a Job and its pods."""
    return Run(kube_job, tuple(Attempt(pod) for pod in sorted(pods, key=age)))


def require_run(run: Run) -> Run:
    """The run itself. Raises Refused for a schedule: it trains nothing by itself."""
    if run.is_schedule:
        raise Refused(f"{run.job} is a schedule, and every fire a run of its own; tunejob list shows those")
    return run


def pods_of(cluster: Cluster, job: str) -> list[Manifest]:
    """The pods of a Job that still exist."""
    return cluster.list(PODS, f"{JOB_NAME}={job}")


def labelled(cluster: Cluster, kind: Kind, run_id: str) -> list[Manifest]:
    """The objects that carry a run's label; none for what is no label's value, as people may type it."""
    return cluster.list(kind, f"{RUN}={run_id}") if run_id and is_value(run_id) else []


def jobs_of(cluster: Cluster, run_id: str) -> list[Run]:
    """Every Job of a run, without pods, oldest first."""
    found = labelled(cluster, JOBS, run_id)
    if fire := _FIRE.fullmatch(run_id):  # what the schedule made has the schedule's label
        found += labelled(cluster, JOBS, fire["schedule"])
    return [Run({"kind": "Job", **one}) for one in sorted(found, key=age) if run_of(one) == run_id]


def listed(cluster: Cluster) -> list[Run]:
    """Every run and schedule of the namespace, newest first, without pods."""
    found = [Run({"kind": "Job", **one}) for one in cluster.list(JOBS, RUN)]
    found += [Run({"kind": "CronJob", **one}) for one in cluster.list(CRON_JOBS, RUN)]
    if not found:
        require_namespace(cluster)
    return sorted(found, key=lambda run: age(run.kube_job), reverse=True)


def refreshed(cluster: Cluster, run: Run) -> Run | None:
    """The run as it is now; None if its Job was deleted, even if another has its name."""
    kube_job = cluster.get(CRON_JOBS if run.is_schedule else JOBS, run.job)
    if kube_job is None or kube_job["metadata"]["uid"] != run.uid:
        return None
    return of(kube_job, [] if run.is_schedule else pods_of(cluster, run.job))


def require_namespace(cluster: Cluster) -> None:
    """Raises NotFound where it can be proven that there is no such namespace: a list of nothing does not tell."""
    try:
        if cluster.get(NAMESPACES, cluster.namespace) is not None:
            return
    except NotAllowed:
        return
    raise no_namespace(cluster.server, cluster.namespace)


def age(manifest: Manifest) -> tuple[str, str]:
    """Sorts the oldest first."""
    return manifest["metadata"]["creationTimestamp"], manifest["metadata"]["name"]
