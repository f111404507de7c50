"""A cluster that plays a story: what it holds changes with a clock that only waiting moves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.codes import ClusterUnreachable, NotFound
from launcher.kinds import JOBS, PODS, WORKLOADS, Kind
from launcher.labels import OUTPUT, RUN, Manifest
from launcher.runs import Run, of

ID = "toy-1a2b3c4d"
JOB = f"{ID}-00000000"
BREAKS = "the connection breaks"
"""In a log: the stream breaks here, instead of a line."""
ENDS = "the stream ends"
"""In a log: the stream ends here as if the log did."""

Scene = tuple[Manifest | None, Sequence[Manifest]]
"""A Job, or none any more, and its pods."""


def kube_job(*conditions: str, spec: Mapping[str, Any] | None = None, **labels: str) -> Manifest:
    """A Job of a run, with conditions that hold."""
    return {
        "kind": "Job",
        "metadata": {
            "name": JOB,
            "uid": "u-1",
            "namespace": "team",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {RUN: ID} | {name.replace("_", "-"): value for name, value in labels.items()},
            "annotations": {OUTPUT: "s3://bucket/runs"},
        },
        "spec": dict(spec or {}),
        "status": {"conditions": [{"type": kind, "status": "True"} for kind in conditions]},
    }


def pod(name: str, phase: str = "Running", code: int | None = None, message: str = "") -> Manifest:
    """A pod of the Job; with a code its container has ended."""
    state: dict[str, Any] = {"running": {}} if phase == "Running" else {}
    if code is not None:
        state = {"terminated": {"exitCode": code, "message": message}}
    return {
        "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{name[-1]}Z"},
        "spec": {"nodeName": "node1" if state else ""},
        "status": {"phase": phase, "containerStatuses": [{"state": state}]},
    }


@dataclass
class Story:
    """What the cluster holds from which second on."""

    scenes: Mapping[float, Scene]
    away: Sequence[tuple[float, float]] = ()
    """From when to when it does not answer."""
    logs: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    """Of each pod: second and text of each line; ``BREAKS`` and ``ENDS`` cut one stream."""
    workloads: Sequence[Manifest] | None = None
    now: float = 0.0
    looks: list[float] = field(default_factory=list)
    """When it was asked for the Job."""
    cut: set[tuple[str, int]] = field(default_factory=set)

    # A clock

    def monotonic(self) -> float:
        """Seconds of the story."""
        return self.now

    def sleep(self, seconds: float, /) -> None:
        """Turns the clock."""
        self.now += seconds

    # A cluster

    namespace, server = "team", "https://cluster.example"

    @property
    def run(self) -> Run:
        """As it is now."""
        found, pods = self._scene()
        assert found is not None
        return of(found, pods)

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """One object."""
        self._answer()
        found, pods = self._scene()
        if kind is PODS:
            return next((one for one in pods if one["metadata"]["name"] == name), None)
        assert (kind, name) == (JOBS, JOB)
        self.looks.append(self.now)
        return found

    def list(self, kind: Kind, selector: str = "", fields: str = "") -> Sequence[Manifest]:
        """Its pods, or Kueue's workloads."""
        self._answer()
        if kind is WORKLOADS:
            if self.workloads is None:
                raise NotFound("the server knows no workloads")
            return self.workloads
        return list(self._scene()[1])

    def log(
        self,
        name: str,
        container: str = "tunejob",
        follow: bool = False,
        since_time: str = "",
        tail: int | None = None,
        timestamps: bool = False,
    ) -> Iterator[str]:
        """Lines as the kubelet gives them; a stream goes on, and time with it, while the container runs."""
        self._answer()
        if all(one["metadata"]["name"] != name for one in self._scene()[1]):
            return
        lines = [(at, text) for at, text in self.logs.get(name, ()) if stamp(at)[:19] >= since_time[:19]]
        there = [index for index, (at, text) in enumerate(lines) if at <= self.now and text not in (BREAKS, ENDS)]
        first = there[-tail] if tail and len(there) > tail else 0
        for index, (at, text) in enumerate(lines[first:], first):
            if at > self.now:
                if not follow:
                    return
                self.now = at
            if text in (BREAKS, ENDS):
                if (name, int(at * 10)) in self.cut:
                    continue
                self.cut.add((name, int(at * 10)))
                if text == ENDS:
                    return
                raise ClusterUnreachable("the log's connection broke")
            if index >= first:
                yield f"{stamp(at)} {text}" if timestamps else text

    def _scene(self) -> Scene:
        return self.scenes[max(at for at in self.scenes if at <= self.now)]

    def _answer(self) -> None:
        if any(begin <= self.now < end for begin, end in self.away):
            raise ClusterUnreachable(f"{self.server}: the cluster does not answer")


def stamp(second: float) -> str:
    """A second of the story as the kubelet writes it."""
    whole = int(second)
    return f"2026-01-01T00:{whole // 60:02d}:{whole % 60:02d}.{round((second - whole) * 1e9):09d}Z"
