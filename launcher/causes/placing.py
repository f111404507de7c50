"""Why no node takes a pod. Rules of ``launcher.why``; pure."""

import re

from launcher.causes.cause import Found, Rule
from launcher.causes.evidence import Evidence
from launcher.quantity import amount
from launcher.runs import Attempt

_LACKS = re.compile(r"(?P<nodes>\d+) Insufficient (?P<what>[^,. ]+(?:\.[^,. ]+)*)")


def _unplaced(evidence: Evidence) -> tuple[Attempt, str] | None:
    """The pod that no node takes, and what the scheduler says."""
    live = evidence.live
    conditions = live.manifest["status"].get("conditions") or [] if live and not live.node else []
    for one in conditions:
        if one["type"] == "PodScheduled" and one["status"] == "False" and live:
            return live, " ".join(str(one.get("message") or "").split())
    return None


def _claim(evidence: Evidence) -> Found | None:
    unplaced = _unplaced(evidence)
    if not unplaced or "persistentvolumeclaim" not in unplaced[1].lower():
        return None
    attempt, said = unplaced
    about = [one for one in evidence.events if one.kind == "PersistentVolumeClaim" and one.is_warning]
    absent = next((m for one in about if (m := re.search(r'storageclass\S* "([^"]+)" not found', one.message))), None)
    lines = (*(one.line for one in about[-1:]), f"pod {attempt.pod}: {said}")
    if absent:
        return Found(
            f"there is no StorageClass {absent[1]}",
            "mend scratch.storage_class in the profile (kubectl get storageclass), or leave it out",
            lines,
        )
    return Found(
        f"its volume is not there: {said.split(': ', 1)[-1]}",
        f"kubectl -n {evidence.run.namespace} get pvc, and kubectl get storageclass",
        lines,
        is_lasting='persistentvolumeclaim "' in said and "not found" in said,
    )


_SCHEDULING = (
    (
        "untolerated taint",
        "{nodes}: a taint that it does not tolerate",
        "name the taint in the profile: gpu_types.NAME.tolerations",
    ),
    (
        "didn't match Pod's node affinity/selector",
        "{nodes}: without the labels that its GPU type asks for",
        "mend gpu_types.NAME.node_selector in the profile (kubectl get nodes --show-labels)",
    ),
    ("were unschedulable", "{nodes}: cordoned", "kubectl uncordon NODE, or wait"),
    ("Too many pods", "{nodes}: as many pods as it may run", "wait until others end"),
    ("volume node affinity conflict", "{nodes}: not where its volume is", "kubectl get pv shows where"),
)
"""What the scheduler says, in our words, and what to try."""


def _placement(evidence: Evidence) -> Found | None:
    unplaced = _unplaced(evidence)
    if not unplaced:
        return None
    attempt, said = unplaced
    before, _, _ = said.partition(" preemption:")
    asked = attempt.container.get("resources", {}).get("requests") or {}
    words, remedies = [], []
    for nodes, what in ((match["nodes"], match["what"]) for match in _LACKS.finditer(before)):
        words.append(f"{_nodes(nodes)}: too little {what}, {asked.get(what, '?')} asked{_most(evidence, what)}")
        remedies.append(_less(what))
    for mark, word, remedy in _SCHEDULING:
        if match := re.search(rf"(\d+) (?:node\(s\) )?(?:had )?{re.escape(mark)}( \{{[^}}]*\}})?", before):
            words.append(word.format(nodes=_nodes(match[1])) + (match[2] or "").replace(": }", "}"))
            remedies.append(remedy)
    return Found(
        f"no node can take its pod: {'; '.join(words) or before}",
        "; ".join(dict.fromkeys(remedies)) or f"kubectl -n {evidence.run.namespace} describe pod {attempt.pod}",
        (f"pod {attempt.pod}: {said}",),
        is_lasting=False,
    )


def _nodes(count: str) -> str:
    return "1 node" if count == "1" else f"{count} nodes"


def _most(evidence: Evidence, what: str) -> str:
    """The largest amount that a node has of something at all."""
    there = [one.get("status", {}).get("allocatable", {}).get(what) for one in evidence.nodes]
    known = [str(value) for value in there if value]
    if not evidence.nodes:
        return ""
    return f" (the largest has {_short(what, max(known, key=amount))} in all)" if known else " (none has any)"


def _short(what: str, quantity: str) -> str:
    """Bytes in GiB; everything else as it is."""
    return f"{float(amount(quantity)) / 2**30:.1f}Gi" if what in ("memory", "ephemeral-storage") else quantity


def _less(what: str) -> str:
    if what in ("cpu", "memory", "ephemeral-storage"):
        return f"lower resources.{what.replace('-', '_')} in the spec, or wait until others end"
    return (
        "ask for fewer GPUs (resources.gpus), for another gpu_type, or wait until others end (kubectl describe nodes)"
    )


PLACEMENT = (
    Rule("claim", "a volume claim or its StorageClass is missing", _claim),
    Rule("placement", "no node has room, the GPU, the labels, or a taint that is tolerated", _placement),
)
"""In the order in which they are asked."""
