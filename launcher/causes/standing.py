"""Where a run stands that has not failed: a lost node, its queue, at work. Rules of ``launcher.why``."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from launcher.causes.cause import Found, Rule
from launcher.causes.ending import last_ended, line_of
from launcher.causes.evidence import Evidence, moment
from launcher.codes import Code

LOST_SECONDS = 30
"""How long a pod may outlive its grace period before something is wrong."""


def _lost(evidence: Evidence) -> Found | None:
    for attempt in reversed(evidence.run.pods):
        until = attempt.manifest["metadata"].get("deletionTimestamp")
        if not until or evidence.now - moment(until) < timedelta(seconds=LOST_SECONDS):
            continue
        node = next((one for one in evidence.nodes if one["metadata"]["name"] == attempt.node), None)
        conditions = node.get("status", {}).get("conditions") or [] if node else []
        ready: Mapping[str, Any] = next((one for one in conditions if one["type"] == "Ready"), {})
        away = f", which is not ready ({ready.get('reason')})" if ready.get("status") not in (None, "True") else ""
        gone = ", which is gone" if evidence.nodes and node is None else away
        return Found(
            f"pod {attempt.pod} does not end: node {attempt.node or '?'}{gone}; no other pod is made until it has",
            f"if the node is off for good: kubectl delete node {attempt.node}, or kubectl -n {evidence.run.namespace} "
            f"delete pod {attempt.pod} --force (never while it may still run)",
            (f"pod {attempt.pod}: was to be gone by {until}", *_ready(ready)),
        )
    return None


def _ready(condition: Mapping[str, Any]) -> tuple[str, ...]:
    return (f"node: Ready={condition['status']}: {condition.get('message', '')}",) if condition else ()


def _no_queue(evidence: Evidence) -> Found | None:
    run = evidence.run
    if not run.queue or run.state not in ("queued", "pending"):
        return None
    if not evidence.has_kueue:
        return Found(
            f"it asks for queue {run.queue}, and this cluster has no Kueue",
            "leave `queue` out of profile and spec, or have Kueue installed",
        )
    if not evidence.has_queue:
        return Found(
            f"there is no LocalQueue {run.queue} in namespace {run.namespace}",
            f"kubectl -n {run.namespace} get localqueues, and mend `queue` in the profile or scheduling.queue",
        )
    return None


def _workload(evidence: Evidence, kind: str) -> Mapping[str, Any] | None:
    """A condition of Kueue's record, by its type: the order means nothing."""
    conditions = (evidence.workload or {}).get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind), None)


def _deactivated(evidence: Evidence) -> Found | None:
    if not evidence.workload or evidence.workload.get("spec", {}).get("active", True):
        return None
    said = _workload(evidence, "Evicted") or {}
    return Found(
        f"Kueue deactivated it: {said.get('message') or said.get('reason') or 'no reason given'}",
        f"mend the cause, then tunejob cancel {evidence.run.id} and submit again: it goes on from the last checkpoint",
        (f"Workload {evidence.workload['metadata']['name']}: spec.active is false",),
    )


def _queued(evidence: Evidence) -> Found | None:
    run = evidence.run
    if run.state != "queued":
        return None
    if not run.queue:
        return Found(
            "its Job is suspended, and not by a queue",
            f'kubectl -n {run.namespace} patch job {run.job} -p \'{{"spec":{{"suspend":false}}}}\'',
        )
    said = _workload(evidence, "Evicted") or {}
    said = said if said.get("status") == "True" else _workload(evidence, "QuotaReserved") or {}
    message = f": {said['message']}" if said.get("message") else ""
    return Found(
        f"it waits in queue {run.queue}{message}",
        f"wait, or look at the queue: kubectl -n {run.namespace} describe localqueue {run.queue}",
        (f"Workload: {said.get('type')}={said.get('status')}: {said.get('reason')}",) if said else (),
        is_lasting=False,
    )


def _running(evidence: Evidence) -> Found | None:
    run, word = evidence.run, evidence.progress
    if run.state != "running":
        return None
    at = f" {word.get('step', '?')}/{word['steps']}" if word.get("steps") else ""
    loss = f", loss {word['loss']:.4f}" if isinstance(word.get("loss"), int | float) else ""
    committed = f", last checkpoint at step {word['committed']}" if word.get("committed") else ", no checkpoint yet"
    memory = word.get("memory")
    used = f", memory at {memory:.0%} of its limit" if isinstance(memory, int | float) else ""
    where = f"{word.get('phase', 'at work')}{at}{loss}{committed}{used}" if word else "at work"
    return Found(f"it runs: {where}", f"tunejob logs -f {run.id}", tuple(map(line_of, filter(None, [evidence.live]))))


def _complete(evidence: Evidence) -> Found | None:
    run = evidence.run
    if run.state != "complete":
        return None
    return Found("it is complete", f"tunejob results {run.id}", tuple(line_of(one) for one in run.pods[-1:]))


def _deleting(evidence: Evidence) -> Found | None:
    if evidence.run.state != "deleting":
        return None
    return Found("it is being deleted; its pods are given time to commit a checkpoint", "wait until it is gone")


def _scheduled(evidence: Evidence) -> Found | None:
    if not evidence.run.is_schedule:
        return None
    spec = evidence.run.kube_job["spec"]
    when = f"it fires at {spec.get('schedule')} ({spec.get('timeZone') or 'time of the control plane'})"
    if spec.get("suspend"):
        return Found(
            "the schedule is suspended", f"kubectl patch cronjob {evidence.run.job} sets spec.suspend to false"
        )
    return Found(f"{when}; every fire is a run of its own", "tunejob list shows them")


def _between(evidence: Evidence) -> Found | None:
    if evidence.live or not last_ended(evidence):
        return None
    return Found(
        "the next pod is about to be made: the wait grows with every one that failed (10 s, 20 s, ... 10 min)",
        f"wait, or see what the last one said: tunejob logs {evidence.run.id}",
        is_lasting=False,
    )


def _pending(evidence: Evidence) -> Found | None:
    live = evidence.live
    if live is None:
        return Found("its first pod is about to be made", "wait a moment, then ask again", is_lasting=False)
    events = evidence.about(live.pod)
    what = f"is on node {live.node}, and its container is being set up" if live.node else "waits for a node"
    return Found(
        f"pod {live.pod} {what}",
        "wait a moment, then ask again",
        tuple(one.line for one in events[:1]) or (line_of(live),),
        is_lasting=False,
    )


LOST = (Rule("node-lost", "a pod does not end: its node does not answer", _lost, Code.OK),)
QUEUE = (
    Rule("no-queue", "Kueue or the LocalQueue is missing", _no_queue, Code.REFUSED),
    Rule("deactivated", "Kueue gave the Job up", _deactivated, Code.JOB_FAILED),
)
STATES = (
    Rule("deleting", "the run is being deleted", _deleting, Code.OK),
    Rule("scheduled", "a schedule; its fires are the runs", _scheduled, Code.OK),
    Rule("complete", "the run is complete", _complete, Code.OK),
    Rule("queued", "the run waits in its queue", _queued, Code.OK),
    Rule("running", "the run is at work", _running, Code.OK),
    Rule("between", "one pod ended, the next is not made yet", _between, Code.OK),
    Rule("pending", "the pod is being made or set up", _pending, Code.OK),
)
"""Where a run is that nothing stands in the way of; the last fits always."""
