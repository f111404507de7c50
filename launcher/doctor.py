"""Whether everything a run needs is there: the cluster, its version, permissions, what the profile names, the store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from job.errors import JobError
from launcher.cluster import Cluster
from launcher.codes import Code, LauncherError, NotAllowed, NotFound
from launcher.kinds import (
    CONFIG_MAPS,
    NAMESPACES,
    NODES,
    QUOTAS,
    SECRETS,
    SERVICE_ACCOUNTS,
    Kind,
)
from launcher.permissions import PERMISSIONS, QUEUEING, ROLES
from launcher.pod import CA_KEY, HUB_KEY, S3_KEY
from launcher.preflight import ENFORCE, queue_problem, version_finding
from launcher.quantity import amount

if TYPE_CHECKING:
    from launcher.profile import GpuType, Profile

Probe = Callable[[], str]
"""Asks the store from here and gives a sentence; raises JobError if it does not answer."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "warn", "fail"]
    sentence: str
    remedy: str = ""
    code_if_failed: Code = Code.REFUSED

    @property
    def code(self) -> Code:
        """How ``doctor`` leaves because of it."""
        return self.code_if_failed if self.state == "fail" else Code.OK

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {"check": self.name, "state": self.state, "found": self.sentence, "try": self.remedy}


def examine(cluster: Cluster | LauncherError, profile: "Profile", store_probe: Probe | None = None) -> list[Check]:
    """Everything that a run of a profile needs, a check for each; the store is asked even without a cluster.

    Args:
        cluster: or the reason why there is none.
        store_probe: asks the store as this machine sees it; gives a sentence, or raises JobError.
    """
    checks: list[Check] = []
    try:
        if isinstance(cluster, LauncherError):
            raise cluster
        checks += _of_cluster(cluster, profile)
    except LauncherError as error:
        remedy = "kubectl cluster-info asks the same; the profile's `context` chooses the cluster"
        checks.append(Check("cluster", "fail", str(error), remedy, error.exit_code))
    if store_probe is not None:
        checks.append(_store(store_probe))
    return checks


def _of_cluster(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    yield _version(cluster)
    yield _namespace(cluster)
    yield from _permissions(cluster, profile)
    looks: Sequence[Callable[[Cluster, Profile], Iterator[Check]]] = (
        _account,
        _secrets,
        _authority,
        _queue,
        _gpus,
        _quotas,
    )
    for look in looks:
        yield from look(cluster, profile)


def _version(cluster: Cluster) -> Check:
    try:
        version = cluster.version()
    except NotAllowed as error:
        return Check("cluster", "warn", f"{cluster.server}: its version may not be read: {error}")
    sentence, is_refused = version_finding(version)
    state: Literal["ok", "warn", "fail"] = "fail" if is_refused else "warn" if sentence else "ok"
    told = sentence or f"Kubernetes {version[0]}.{version[1]}"
    return Check("cluster", state, f"{cluster.server}: {told}", "ask who runs the cluster" if sentence else "")


def _namespace(cluster: Cluster) -> Check:
    try:
        found = cluster.get(NAMESPACES, cluster.namespace)
    except NotAllowed as error:
        return Check("namespace", "warn", f"{cluster.namespace}: {error}")
    except NotFound as error:
        return Check("namespace", "fail", str(error), "kubectl get namespaces")
    level = ((found or {}).get("metadata", {}).get("labels") or {}).get(ENFORCE)
    said = (
        f"Pod Security {level} is enforced" if level else "no Pod Security level is enforced (a run passes restricted)"
    )
    return Check("namespace", "ok", f"{cluster.namespace}: {said}")


def _permissions(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    for purpose, needs in PERMISSIONS.items():
        queueing = QUEUEING if purpose == "look" and profile.queue else ()
        lacking = [
            f"{verb} {need.resource}"
            for need in (*needs, *queueing)
            for verb in need.verbs
            if not cluster.allowed(verb, need.kind, need.subresource)
        ]
        name = f"may {purpose}"
        if not lacking:
            yield Check(name, "ok", f"every permission it takes to {purpose} is there")
            continue
        yield Check(
            name,
            "warn" if purpose == "schedule" else "fail",
            f"this account may not {', '.join(lacking)} in namespace {cluster.namespace}",
            f"ask for a RoleBinding to the role {ROLES[purpose]} (k8s/ of the project)",
            Code.CLUSTER,
        )


def _account(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    remedy = "kubectl apply -k k8s/ makes it, or name another in the profile (service_account)"
    yield _named(cluster, SERVICE_ACCOUNTS, "service account", profile.service_account, "", remedy)


def _secrets(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    wanted = [("store secret", profile.store.secret, S3_KEY)]
    wanted += [("hub secret", profile.hub.secret, HUB_KEY)] if profile.hub else []
    wanted += [("pull secret", name, "") for name in profile.pull_secrets]
    for what, name, key in wanted:
        if name:
            remedy = (
                f"kubectl -n {cluster.namespace} create secret generic {name} --from-file={key}=FILE"
                if key
                else f"kubectl -n {cluster.namespace} create secret docker-registry {name} ..."
            )
            yield _named(cluster, SECRETS, what, name, key, remedy)


def _authority(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    if name := profile.store.ca_config_map:
        remedy = f"kubectl -n {cluster.namespace} create configmap {name} --from-file={CA_KEY}=FILE"
        yield _named(cluster, CONFIG_MAPS, "CA", name, CA_KEY, remedy)


def _named(cluster: Cluster, kind: Kind, what: str, name: str, key: str, remedy: str) -> Check:
    """An object that the profile names, and the key it has to have."""
    try:
        found = cluster.get(kind, name)
    except NotAllowed:
        return Check(
            what,
            "warn",
            f"{name}: this account may not look (get {kind.plural}), so whether it is there is not known",
            "tunejob why RUN says so if a pod misses it",
        )
    if found is None:
        return Check(what, "fail", f"no {kind.name} {name} in namespace {cluster.namespace}", remedy)
    if key and key not in {**(found.get("data") or {}), **(found.get("binaryData") or {})}:
        return Check(what, "fail", f"{kind.name} {name} has no key {key}", remedy)
    return Check(what, "ok", f"{name} is there" + (f" and has the key {key}" if key else ""))


def _queue(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    if not profile.queue:
        return
    try:
        problems = queue_problem(cluster, profile.queue)
    except NotAllowed as error:
        yield Check("queue", "warn", f"{profile.queue}: {error}")
        return
    if problems:
        yield Check("queue", "fail", problems[0], f"kubectl -n {cluster.namespace} get localqueues")
    else:
        yield Check("queue", "ok", f"LocalQueue {profile.queue} is there")


def _gpus(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    try:
        nodes = cluster.list(NODES)
    except NotAllowed:
        if profile.gpu_types:
            yield Check("GPUs", "warn", "this account may not look at nodes (list nodes), so they are not counted")
        return
    for name, gpu in profile.gpu_types.items():
        yield gpus_of(name, gpu, nodes)


def gpus_of(name: str, gpu: "GpuType", nodes: Sequence[Mapping[str, Any]]) -> Check:
    """How many GPUs of a type the nodes offer."""
    fitting = [one for one in nodes if gpu.node_selector.items() <= (one["metadata"].get("labels") or {}).items()]
    counts = [amount(str((one["status"].get("allocatable") or {}).get(gpu.resource, "0"))) for one in fitting]
    total, largest = sum(counts, amount("0")), max(counts, default=amount("0"))
    title = f"GPU {name}"
    if total:
        return Check(title, "ok", f"{total} {gpu.resource} on {sum(map(bool, counts))} nodes, at most {largest} on one")
    selected = ", ".join(f"{key}={value}" for key, value in gpu.node_selector.items())
    where = f"{len(fitting)} nodes have the labels {selected}" if selected else f"{len(fitting)} nodes"
    return Check(
        title,
        "warn",
        f"no node offers {gpu.resource} ({where}, none with a GPU)",
        "kubectl get nodes --show-labels; mend gpu_types in the profile, or have the device plugin installed",
    )


def _quotas(cluster: Cluster, profile: "Profile") -> Iterator[Check]:
    try:
        quotas = cluster.list(QUOTAS)
    except NotAllowed as error:
        yield Check("quota", "warn", str(error))
        return
    for quota in quotas:
        yield quota_left(quota)


def quota_left(quota: Mapping[str, Any]) -> Check:
    """What a ResourceQuota leaves."""
    status = quota.get("status") or {}
    hard, used = status.get("hard") or {}, status.get("used") or {}
    full = [name for name, most in hard.items() if _is_full(name, most, str(used.get(name, "0")))]
    said = ", ".join(f"{name} {used.get(name, '0')} of {most}" for name, most in hard.items())
    title = f"quota {quota['metadata']['name']}"
    if full:
        return Check(title, "warn", f"used up: {', '.join(full)} ({said})", "delete finished runs, or wait for others")
    return Check(title, "ok", said)


def _is_full(name: str, hard: str, used: str) -> bool:
    """No run asks for a Service, so a quota that forbids them is none of ours."""
    return not name.startswith("services") and amount(used) >= amount(hard)


def _store(probe: Probe) -> Check:
    try:
        said = probe()
    except JobError as error:
        remedy = "mend store.client_endpoint in the profile, or this machine's credentials; a run on the cluster may do"
        return Check("store from here", "warn", str(error), remedy)
    return Check("store from here", "ok", said)
