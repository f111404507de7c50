"""What can be known of a submission before anything is made: the server, the namespace, a dry run, quota and limits.

A dry run proves neither quota nor Pod Security, so both are looked at themselves.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.capacity import outside_of_limits, short_of_quota, template_of
from launcher.cluster import Cluster
from launcher.codes import ClusterUnreachable, LauncherError, NotAllowed, NotFound, Refused
from launcher.kinds import (
    CONFIG_MAPS,
    CRON_JOBS,
    JOBS,
    LIMIT_RANGES,
    LOCAL_QUEUES,
    NAMESPACES,
    NODES,
    QUOTAS,
    SERVICE_ACCOUNTS,
    Kind,
)
from launcher.labels import QUEUE, Manifest
from launcher.quantity import amount

if TYPE_CHECKING:
    from launcher.render import Rendered

OLDEST = (1, 31)
NEWEST = (1, 37)
"""Servers that it was made for."""
ENFORCE = "pod-security.kubernetes.io/enforce"
"""Label of a namespace: the Pod Security level that pods are refused by."""
KEPT = ("podFailurePolicy", "podReplacementPolicy")
"""Fields of a Job without which a run would be repeated for ever, or twice at a time."""

_VIOLATES = re.compile(r'would violate PodSecurity "(?P<level>[a-z]+):[^"]*": (?P<what>.*)')
_NOT_OURS = ("cpu", "memory", "ephemeral-storage")


@dataclass
class Findings:
    """What stands against a submission, and what the user should know of."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def may(self, look: Callable[[], None]) -> None:
        """Looks at something; a permission that is missing for it is a warning."""
        try:
            look()
        except NotAllowed as error:
            if str(error) not in self.warnings:
                self.warnings.append(str(error))


def look(cluster: Cluster, rendered: "Rendered") -> Findings:
    """What can be known before anything is made.

    Raises:
        ClusterUnreachable: the cluster does not answer.
        NotAllowed: this account may not apply Jobs and ConfigMaps.
        NotFound: there is no such namespace.
    """
    found = Findings()
    _server(cluster, found)
    if found.refusals:  # what it would answer to the rest is not to be relied upon
        return found
    level: list[str] = []
    found.may(lambda: level.extend(_enforced(cluster)))
    _dry_run(cluster, rendered, found, level)
    workload = rendered.workload
    found.may(lambda: _quota(cluster, workload, found))
    found.may(lambda: found.refusals.extend(outside_of_limits(workload, cluster.list(LIMIT_RANGES))))
    found.may(lambda: _queue(cluster, workload, found))
    found.may(lambda: _account(cluster, workload, found))
    found.may(lambda: _config_maps(cluster, rendered, found))
    _gpus(cluster, workload, found)
    return found


def version_finding(version: tuple[int, int]) -> tuple[str, bool]:
    """What is to be said of a server's version (empty: nothing), and whether it is refused."""
    written = f"Kubernetes {version[0]}.{version[1]}"
    bounds = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if version < OLDEST:
        return f"{written} is too old: {bounds} are supported, an older one may drop podFailurePolicy in silence", True
    if version > NEWEST:
        return f"{written} is newer than this tunejob knows ({bounds}); it should do", False
    return "", False


def _server(cluster: Cluster, found: Findings) -> None:
    try:
        sentence, is_refused = version_finding(cluster.version())
    except ClusterUnreachable:
        raise
    except LauncherError as error:
        found.warnings.append(f"the server's version cannot be read: {error}")
        return
    if sentence:
        (found.refusals if is_refused else found.warnings).append(sentence)


def _enforced(cluster: Cluster) -> list[str]:
    """The Pod Security level of the namespace; raises NotFound if there is no such namespace."""
    metadata = (cluster.get(NAMESPACES, cluster.namespace) or {}).get("metadata", {})
    return [str((metadata.get("labels") or {}).get(ENFORCE, "privileged"))]


def _dry_run(cluster: Cluster, rendered: "Rendered", found: Findings, level: list[str]) -> None:
    heard = len(cluster.warnings)
    kinds: tuple[tuple[Kind, Manifest], ...] = (
        (CONFIG_MAPS, rendered.config_map),
        (CRON_JOBS if rendered.workload["kind"] == "CronJob" else JOBS, rendered.workload),
    )
    for kind, manifest in kinds:
        try:
            answer = cluster.apply(kind, manifest, dry_run=True)
        except Refused as error:
            found.refusals.append(f"{kind.name} {manifest['metadata']['name']}: {error}")
            continue
        if kind is not CONFIG_MAPS:
            _answered({"kind": kind.name, **answer}, rendered.workload, found)
    for text in cluster.warnings[heard:]:
        _warned(text, level, cluster.namespace, found)


def _answered(answer: Manifest, workload: Manifest, found: Findings) -> None:
    """What the server would make of a Job."""
    spec = answer["spec"]["jobTemplate"]["spec"] if answer["kind"] == "CronJob" else answer["spec"]
    if dropped := [name for name in KEPT if not spec.get(name)]:
        found.refusals.append(
            f"this server drops {' and '.join(dropped)} from Jobs: a run that cannot succeed would be repeated, or two "
            f"pods would write one run; Kubernetes {OLDEST[0]}.{OLDEST[1]} or later keeps them"
        )
    if spec.get("suspend") and not _queue_of(workload):
        found.warnings.append(
            "the cluster suspends it although no queue is named: a webhook (Kueue's default queue?) takes it in"
        )


def _warned(text: str, level: list[str], namespace: str, found: Findings) -> None:
    """A Warning of the server's; one of Pod Security may mean that every pod is refused."""
    match = _VIOLATES.search(text)
    if match is None:
        found.warnings.append(f"the cluster warns: {text}")
    elif match["level"] in level:
        found.refusals.append(
            f"namespace {namespace} enforces Pod Security {match['level']} and refuses every pod of it: {match['what']}"
        )
    else:
        sure = "" if level else "; whether it is enforced cannot be read: if it is, every pod is refused"
        found.warnings.append(f"the pod violates Pod Security {match['level']}: {match['what']}{sure}")


def _quota(cluster: Cluster, workload: Manifest, found: Findings) -> None:
    for one in short_of_quota(workload, cluster.list(QUOTAS)):
        (found.refusals if one.is_lasting else found.warnings).append(one.sentence)


def _queue_of(workload: Manifest) -> str:
    owner = workload["spec"]["jobTemplate"] if workload["kind"] == "CronJob" else workload
    return str((owner["metadata"].get("labels") or {}).get(QUEUE, ""))


def _queue(cluster: Cluster, workload: Manifest, found: Findings) -> None:
    if name := _queue_of(workload):
        found.refusals += queue_problem(cluster, name)


def queue_problem(cluster: Cluster, name: str) -> list[str]:
    """A sentence if there is no LocalQueue of a name, or no Kueue at all."""
    try:
        there = sorted(one["metadata"]["name"] for one in cluster.list(LOCAL_QUEUES))
    except NotFound:  # the server does not know the kind
        return [f"queue {name} is asked for, and this cluster has no Kueue; leave `queue` out of profile and spec"]
    if name in there:
        return []
    known = f"there are {', '.join(there)}" if there else "there is none"
    return [f"no LocalQueue {name} in namespace {cluster.namespace} ({known}); mend `queue` in profile or spec"]


def _account(cluster: Cluster, workload: Manifest, found: Findings) -> None:
    name = template_of(workload)["spec"].get("serviceAccountName")
    if name and cluster.get(SERVICE_ACCOUNTS, name) is None:
        found.refusals.append(
            f"no ServiceAccount {name} in namespace {cluster.namespace}: kubectl apply -k k8s/ makes it, or name "
            "another in the profile (service_account)"
        )


def _config_maps(cluster: Cluster, rendered: "Rendered", found: Findings) -> None:
    """Those that the pod mounts and a submission does not make."""
    volumes: list[Any] = template_of(rendered.workload)["spec"].get("volumes") or []
    names = [one["configMap"]["name"] for one in volumes if "configMap" in one]
    for name in names:
        if name != rendered.config_map["metadata"]["name"] and cluster.get(CONFIG_MAPS, name) is None:
            found.refusals.append(
                f"no ConfigMap {name} in namespace {cluster.namespace}: kubectl -n {cluster.namespace} create "
                f"configmap {name} --from-file=ca.crt=FILE, or mend store.ca_config_map in the profile"
            )


def _gpus(cluster: Cluster, workload: Manifest, found: Findings) -> None:
    """Warns if no node has the GPUs. Most users may not look at nodes: then nothing is said."""
    limits = template_of(workload)["spec"]["containers"][0].get("resources", {}).get("limits") or {}
    wanted = {name: quantity for name, quantity in limits.items() if name not in _NOT_OURS}
    if not wanted or _queue_of(workload):
        return
    try:
        nodes = cluster.list(NODES)
    except NotAllowed:
        return
    for name, quantity in wanted.items():
        most = max((amount(str(_allocatable(one).get(name, "0"))) for one in nodes), default=amount("0"))
        if most < amount(quantity):
            found.warnings.append(f"no node has {quantity} {name} (the largest has {most}); its pod waits for one")


def _allocatable(node: Manifest) -> Manifest:
    found: Manifest = node.get("status", {}).get("allocatable") or {}
    return found
