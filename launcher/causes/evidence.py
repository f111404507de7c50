"""Everything that is known of a run at one moment, as plain data: ``launcher.why`` judges it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from launcher.cluster import Cluster
from launcher.codes import NotAllowed, NotFound
from launcher.kinds import EVENTS, LIMIT_RANGES, LOCAL_QUEUES, NODES, QUOTAS, WORKLOADS, Kind
from launcher.labels import Manifest
from launcher.runs import Attempt, Run
from launcher.stream import latest_progress

LOOKED_AT = 3
"""Pods, the newest ones, whose events are read."""


@dataclass(frozen=True)
class Event:
    """What a part of the cluster had to say of an object; kept by most servers for an hour."""

    about: str
    """Name of the object."""
    kind: str
    reason: str
    message: str
    count: int
    last: str
    """When it was last said, in ISO 8601."""
    is_warning: bool

    @property
    def line(self) -> str:
        """As evidence."""
        often = f" ({self.count} times)" if self.count > 1 else ""
        return f"event of {self.kind} {self.about}{often}: {self.reason}: {self.message}"


@dataclass(frozen=True)
class Evidence:
    """What can be read of a run."""

    run: Run
    events: tuple[Event, ...] = ()
    """Of its Job, its newest pods and their claims, oldest first."""
    nodes: tuple[Manifest, ...] = ()
    quotas: tuple[Manifest, ...] = ()
    limit_ranges: tuple[Manifest, ...] = ()
    has_kueue: bool = True
    """False: the server knows no LocalQueues."""
    has_queue: bool = True
    """False: the run's LocalQueue is proven missing."""
    workload: Manifest | None = None
    """Kueue's record of the Job."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """The latest line of progress of the pod at work."""
    missing: tuple[str, ...] = ()
    """What may not be read: a sentence for each, which names the permission."""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def newest(self) -> Attempt | None:
        """The newest pod."""
        return self.run.pods[-1] if self.run.pods else None

    @property
    def live(self) -> Attempt | None:
        """The pod that waits or works; None between two and after the last."""
        return next((one for one in reversed(self.run.pods) if one.phase in ("Pending", "Running", "Unknown")), None)

    def about(self, name: str, *reasons: str) -> list[Event]:
        """Events of an object, of some reasons, newest first."""
        found = [one for one in self.events if one.about == name and (not reasons or one.reason in reasons)]
        return found[::-1]


class _Reader:
    """Reads from a cluster what may be read, and notes what may not."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.missing: list[str] = []

    def list(self, kind: Kind, fields: str = "") -> list[Manifest]:
        """The objects that a field selector takes; none where this account may not ask."""
        try:
            return self.cluster.list(kind, fields=fields)
        except NotAllowed as error:
            # Most people may not look at nodes, and no Role of ours lets them: nothing to ask for.
            if kind.is_namespaced and str(error) not in self.missing:
                self.missing.append(str(error))
            return []


def gather(cluster: Cluster, run: Run) -> Evidence:
    """What can be read of a run now. A source that may not be read is noted, and never a failure.

    Raises:
        ClusterUnreachable: the cluster does not answer.
    """
    reader = _Reader(cluster)
    events = _events(reader, run)
    is_refused = any(one.reason == "FailedCreate" for one in events)
    is_open = not run.has_ended
    has_kueue, has_queue, workload = _queue(reader, run)
    return Evidence(
        run,
        events,
        nodes=tuple(reader.list(NODES)) if is_open and _needs_nodes(run) else (),
        quotas=tuple(reader.list(QUOTAS)) if is_open and is_refused else (),
        limit_ranges=tuple(reader.list(LIMIT_RANGES)) if is_open and is_refused else (),
        has_kueue=has_kueue,
        has_queue=has_queue,
        workload=workload,
        progress=_progress(reader, run),
        missing=tuple(reader.missing),
    )


def _events(reader: _Reader, run: Run) -> tuple[Event, ...]:
    """Events of the Job and its newest pods, one question for each: a namespace may hold thousands of others."""
    asked = [f"involvedObject.uid={run.uid}"]
    for attempt in run.pods[-LOOKED_AT:]:
        asked.append(f"involvedObject.uid={attempt.manifest['metadata']['uid']}")
        asked += [f"involvedObject.name={name}" for name in _claims(attempt)]
    return heard([one for fields in asked for one in reader.list(EVENTS, fields)])


def _claims(attempt: Attempt) -> list[str]:
    """Names of the volumes that are claimed for a pod alone and are not there yet."""
    volumes = attempt.manifest["spec"].get("volumes") or []
    return [f"{attempt.pod}-{one['name']}" for one in volumes if one.get("ephemeral") and attempt.phase == "Pending"]


def heard(events: Sequence[Manifest]) -> tuple[Event, ...]:
    """Events as the server has them (of either API), oldest first."""
    found = []
    for one in events:
        series = one.get("series") or {}
        last = series.get("lastObservedTime") or one.get("lastTimestamp") or one.get("eventTime")
        about = one.get("involvedObject") or {}
        found.append(
            Event(
                str(about.get("name", "")),
                str(about.get("kind", "")),
                str(one.get("reason", "")),
                " ".join(str(one.get("message", "")).split()).removeprefix("(combined from similar events): "),
                int(series.get("count") or one.get("count") or 1),
                str(last or one.get("metadata", {}).get("creationTimestamp") or ""),
                one.get("type") == "Warning",
            )
        )
    return tuple(sorted(found, key=lambda event: moment(event.last)))


def moment(text: str) -> datetime:
    """A time of the server's; the beginning of time for an empty one."""
    return datetime.fromisoformat(text) if text else datetime.min.replace(tzinfo=UTC)


def _needs_nodes(run: Run) -> bool:
    """Whether nodes can tell something: a pod waits for one, or does not leave its own."""
    return any(
        (one.phase == "Pending" and not one.node) or one.manifest["metadata"].get("deletionTimestamp")
        for one in run.pods
    )


def _queue(reader: _Reader, run: Run) -> tuple[bool, bool, Manifest | None]:
    """Whether there is Kueue, the run's LocalQueue, and Kueue's record of the Job."""
    if not run.queue or run.is_schedule or run.state in ("running", "complete"):
        return True, True, None
    try:
        known = {one["metadata"]["name"] for one in reader.list(LOCAL_QUEUES)}
        workloads = reader.list(WORKLOADS)
    except NotFound:  # the server does not know the kind
        return False, False, None
    may_not_look = any("localqueues" in line for line in reader.missing)
    owned = [
        one
        for one in workloads
        if any(owner["uid"] == run.uid for owner in one["metadata"].get("ownerReferences") or [])
    ]
    return True, may_not_look or run.queue in known, owned[-1] if owned else None


def _progress(reader: _Reader, run: Run) -> Mapping[str, Any]:
    if run.state != "running":
        return {}
    word, trouble = latest_progress(reader.cluster, run)
    if isinstance(trouble, NotAllowed):
        reader.missing.append(str(trouble))
    return word
