"""What keeps a run from starting: refused pods, images, Secrets, volumes, nodes. A table of rules; pure."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.cause import Found, Rule
from launcher.codes import Code
from launcher.evidence import Event, Evidence, moment
from launcher.quantity import amount
from launcher.runs import Attempt

PULLS = 3
"""Pulls that fail before a registry that seems to be away counts as wrong."""

_PASSING = re.compile(
    r"connection refused|timeout|timed out|no such host|i/o|EOF|TLS handshake|too many requests|50\d|QPS", re.I
)
_DENIED = re.compile(r"denied|unauthorized|authentication|forbidden|401|403", re.I)
_ABSENT_ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
_QUOTA = re.compile(r"exceeded quota: (?P<name>[^,]+), requested: (?P<asked>.*), used: (?P<used>.*), limited: (?P<hard>.*)")
_QUOTA_ASKS = re.compile(r"failed quota: (?P<name>[^:]+): must specify (?P<what>.*)")
_LIMITED = re.compile(r"(min|max)imum \S+ usage per (Container|Pod)|max limit to request ratio")
_WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request:? ?(?P<said>.*)')
_POLICY = re.compile(r"ValidatingAdmissionPolicy '(?P<name>[^']+)'.* denied request: (?P<said>.*)")
_SECRET = re.compile(r'secret "(?P<name>[^"]+)" not found')
_CONFIG_MAP = re.compile(r'configmap "(?P<name>[^"]+)" not found')
_KEY = re.compile(r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) [^/]+/(?P<name>\S+)")
_MOUNT_KEY = re.compile(
    r'failed for volume "(?P<volume>[^"]+)" : references non-existent (?P<kind>secret|config) key: (?P<key>\S+)'
)
_LACKS = re.compile(r"(?P<nodes>\d+) Insufficient (?P<what>[^,. ]+(?:\.[^,. ]+)*)")


def _refused(evidence: Evidence) -> Event | None:
    """The newest refusal of a pod, if no pod came after it."""
    if evidence.live or evidence.run.has_ended or evidence.run.state == "deleting":
        return None
    found = evidence.about(evidence.run.job, "FailedCreate")
    newest = evidence.newest
    if not found or (newest and moment(found[0].last) < moment(newest.manifest["metadata"]["creationTimestamp"])):
        return None
    return found[0]


def _said(event: Event) -> str:
    """What admission said, without the pod's made-up name."""
    return re.sub(r'^Error creating: (pods "[^"]*" is forbidden: )?', "", event.message)


def _account(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = _ABSENT_ACCOUNT.search(event.message) if event else None
    if not event or not match:
        return None
    return Found(
        f"its pods cannot be made: there is no ServiceAccount {match['name']} in namespace {evidence.run.namespace}",
        f"kubectl -n {evidence.run.namespace} create serviceaccount {match['name']} (or kubectl apply -k k8s/), or name "
        "another in the profile: service_account",
        (event.line,),
    )


def _security(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = re.search(r'violates PodSecurity "([^"]+)": (.*)', event.message) if event else None
    if not event or not match:
        return None
    return Found(
        f"its pods are refused: they violate Pod Security {match[1]} of namespace {evidence.run.namespace}: {match[2]}",
        "submit what tunejob renders, which passes `restricted`; what changed the pod (a hand-edited manifest, an "
        "admission webhook) has to be undone",
        (event.line,),
    )


def _quota(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event:
        return None
    if match := _QUOTA_ASKS.search(event.message):
        return Found(
            f"its pods are refused: ResourceQuota {match['name']} wants every pod to say {match['what']}",
            "name it in the spec's resources, or have a LimitRange fill it in",
            (event.line,),
        )
    match = _QUOTA.search(event.message)
    if not match:
        return None
    asked, used, hard = (_amounts(match[part]) for part in ("asked", "used", "hard"))
    tight = [what for what in hard if amount(asked[what]) + amount(used.get(what, "0")) > amount(hard[what])]
    never = [what for what in tight if amount(asked[what]) > amount(hard[what])]
    figures = ", ".join(f"{what} {asked[what]} asked, {used.get(what, '0')} of {hard[what]} in use" for what in tight)
    remedy = (
        f"lower the spec's resources below the quota ({', '.join(f'{what} {hard[what]}' for what in never)}), or have "
        "the quota raised"
        if never
        else f"it goes on when others end (tunejob list; kubectl -n {evidence.run.namespace} describe quota), or have "
        "the quota raised"
    )
    return Found(
        f"its pods are refused: they exceed ResourceQuota {match['name']} of namespace {evidence.run.namespace} "
        f"({figures})",
        remedy,
        (event.line,),
        is_lasting=bool(never),
    )


def _amounts(text: str) -> Mapping[str, str]:
    """``pods=1,requests.memory=64Mi``."""
    return dict(pair.split("=", 1) for pair in text.strip().split(",") if "=" in pair)


def _limits(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event or not _LIMITED.search(event.message):
        return None
    names = ", ".join(one["metadata"]["name"] for one in evidence.limit_ranges)
    return Found(
        f"its pods are refused: they are outside the LimitRange {names + ' ' if names else ''}of namespace "
        f"{evidence.run.namespace}: {_said(event).strip('[]')}",
        f"change the spec's resources (kubectl -n {evidence.run.namespace} describe limitrange shows what is allowed)",
        (event.line,),
    )


def _webhook(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = event and (_WEBHOOK.search(event.message) or _POLICY.search(event.message))
    if not event or not match:
        return None
    return Found(
        f"its pods are refused by the admission policy {match['name']}: {match['said']}",
        "do as it says, or ask who runs the cluster",
        (event.line,),
    )


def _other_refusal(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event:
        return None
    return Found(
        f"its pods cannot be made: {_said(event)}",
        f"kubectl -n {evidence.run.namespace} describe job {evidence.run.job}; the cluster goes on trying",
        (event.line,),
        is_lasting=False,
    )


Waiting = tuple[Attempt, str, str]
"""A pod, and why its container waits: reason and message."""


def _waiting(evidence: Evidence) -> Waiting | None:
    live = evidence.live
    if live is None or live.phase != "Pending":
        return None
    state: Mapping[str, Any] = live.state.get("waiting") or {}
    return live, str(state.get("reason") or ""), " ".join(str(state.get("message") or "").split())


def _image_of(attempt: Attempt) -> str:
    return str(attempt.manifest["spec"]["containers"][0]["image"])


def _waits_for(*reasons: str) -> Callable[[Evidence], Waiting | None]:
    def find(evidence: Evidence) -> Waiting | None:
        waiting = _waiting(evidence)
        return waiting if waiting and waiting[1] in reasons else None

    return find


_of_pulling = _waits_for("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError")
_of_config = _waits_for("CreateContainerConfigError", "CreateContainerError")


def _image_name(evidence: Evidence) -> Found | None:
    waiting = _waits_for("InvalidImageName")(evidence)
    if not waiting:
        return None
    return Found(f"{_image_of(waiting[0])} is no name of an image", "mend `image` in the profile", (waiting[2],))


def _image_absent(evidence: Evidence) -> Found | None:
    waiting = _waits_for("ErrImageNeverPull")(evidence)
    if not waiting:
        return None
    return Found(
        f"image {_image_of(waiting[0])} is not on node {waiting[0].node}, and may not be pulled",
        "load it on the node, or submit what tunejob renders (IfNotPresent)",
        (waiting[2],),
    )


def _pull_secret(evidence: Evidence) -> Found | None:
    waiting = _of_pulling(evidence)
    told = evidence.about(waiting[0].pod, "FailedToRetrieveImagePullSecret") if waiting else []
    if not waiting or not told:
        return None
    names = re.search(r"pull secrets \(([^)]*)\)", told[0].message)
    name = names[1] if names else "named in the profile"
    return Found(
        f"image {_image_of(waiting[0])} cannot be pulled: there is no pull Secret {name} in namespace "
        f"{evidence.run.namespace}",
        f"kubectl -n {evidence.run.namespace} create secret docker-registry NAME ..., or mend pull_secrets in the profile",
        (told[0].line, waiting[2]),
    )


def _image(evidence: Evidence) -> Found | None:
    waiting = _of_pulling(evidence)
    if not waiting:
        return None
    attempt, _, message = waiting
    failed = [one for one in evidence.about(attempt.pod, "Failed") if one.message.startswith("Failed to pull")]
    said = failed[0].message if failed else message
    tries = max((one.count for one in failed), default=1)
    is_passing = bool(_PASSING.search(said)) and not _DENIED.search(said) and tries < PULLS
    remedy = (
        "name a pull Secret in the profile (pull_secrets), or check that it has a right to this image"
        if _DENIED.search(said)
        else "check `image` in the profile and that node and registry reach each other (crictl pull on the node)"
    )
    return Found(
        f"image {_image_of(attempt)} cannot be pulled on node {attempt.node}: {_core(said)}",
        remedy,
        tuple(one.line for one in failed[:1]) or (message,),
        is_lasting=not is_passing,
    )


def _core(said: str) -> str:
    """The last part of a runtime's chain of wrapped errors, which names the cause."""
    parts = re.sub(r'^(Failed to pull image|Back-off pulling image) "[^"]*":? ?', "", said).split(": ")
    return ": ".join(parts[-3:])


def _troubles(evidence: Evidence) -> list[tuple[str, str]]:
    """What the kubelet misses for a container: its message, and the line of evidence."""
    found: list[tuple[str, str]] = []
    if waiting := _of_config(evidence):
        found.append((waiting[2], f"pod {waiting[0].pod}: {waiting[1]}: {waiting[2]}"))
    pending = _waiting(evidence)
    if pending and pending[1] in ("ContainerCreating", ""):
        events = evidence.about(pending[0].pod, "FailedMount", "FailedAttachVolume")
        found += [(one.message, one.line) for one in events[:1]]
    return found


def _secret(evidence: Evidence) -> Found | None:
    for message, line in _troubles(evidence):
        if match := _SECRET.search(message):
            namespace = evidence.run.namespace
            return Found(
                f"there is no Secret {match['name']} in namespace {namespace}",
                f"kubectl -n {namespace} create secret generic {match['name']} --from-file=credentials=FILE (of the "
                "hub: --from-file=token=FILE), or mend store.secret, hub.secret in the profile; the pod then starts",
                (line,),
            )
    return None


def _config_map(evidence: Evidence) -> Found | None:
    for message, line in _troubles(evidence):
        if match := _CONFIG_MAP.search(message):
            name, namespace = match["name"], evidence.run.namespace
            is_spec = name == evidence.run.config_map
            remedy = (
                f"tunejob cancel {evidence.run.id}, and submit the spec again"
                if is_spec
                else f"kubectl -n {namespace} create configmap {name} --from-file=ca.crt=FILE, or mend "
                "store.ca_config_map in the profile; the pod then starts"
            )
            what = "with its spec " if is_spec else ""
            return Found(f"there is no ConfigMap {name} {what}in namespace {namespace}", remedy, (line,))
    return None


def _key(evidence: Evidence) -> Found | None:
    for message, line in _troubles(evidence):
        if named := _KEY.search(message):
            return _lacks_key(evidence, named["kind"], named["name"], named["key"], line)
        live = evidence.live
        if live and (mounted := _MOUNT_KEY.search(message)):
            kind = "Secret" if mounted["kind"] == "secret" else "ConfigMap"
            name = _source_of(live, mounted["volume"])
            return _lacks_key(evidence, kind, name, mounted["key"], line)
    return None


def _source_of(attempt: Attempt, volume: str) -> str:
    """The Secret or ConfigMap behind a volume; the event does not name it."""
    volumes = attempt.manifest["spec"].get("volumes") or []
    found = next((one for one in volumes if one["name"] == volume), {})
    return str(found.get("secret", {}).get("secretName") or found.get("configMap", {}).get("name") or volume)


def _lacks_key(evidence: Evidence, kind: str, name: str, key: str, line: str) -> Found:
    return Found(
        f"{kind} {name} in namespace {evidence.run.namespace} has no key {key}",
        f"make {kind} {name} anew with a key {key}; kubectl -n {evidence.run.namespace} describe {kind.lower()} {name} "
        "shows those it has",
        (line,),
    )


def _mount(evidence: Evidence) -> Found | None:
    for message, line in _troubles(evidence):
        return Found(
            f"its container cannot be set up: {message}",
            f"kubectl -n {evidence.run.namespace} describe pod {evidence.live.pod if evidence.live else ''}",
            (line,),
            is_lasting=False,
        )
    return None


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
            "mend scratch.storage_class in the profile (kubectl get storageclass), or leave it out: the node's own disk",
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
        "{nodes} have a taint that it does not tolerate",
        "name the taint in the profile: gpu_types.NAME.tolerations",
    ),
    (
        "didn't match Pod's node affinity/selector",
        "{nodes} lack the labels that its GPU type asks for",
        "mend gpu_types.NAME.node_selector in the profile (kubectl get nodes --show-labels)",
    ),
    ("were unschedulable", "{nodes} are cordoned", "kubectl uncordon NODE, or wait"),
    ("Too many pods", "{nodes} run as many pods as they may", "wait until others end"),
    ("volume node affinity conflict", "{nodes} are not where its volume is", "kubectl get pv shows where"),
)
"""What the scheduler says, in our words, and what to try."""


def _placement(evidence: Evidence) -> Found | None:
    unplaced = _unplaced(evidence)
    if not unplaced:
        return None
    attempt, said = unplaced
    before, _, _ = said.partition(" preemption:")
    asked = attempt.manifest["spec"]["containers"][0].get("resources", {}).get("requests") or {}
    words, remedies = [], []
    for nodes, what in ((match["nodes"], match["what"]) for match in _LACKS.finditer(before)):
        words.append(f"{_nodes(nodes)} lack {asked.get(what, '')} {what}".replace("  ", " ") + _most(evidence, what))
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
    return f" (the largest has {max(known, key=amount)} in all)" if known else " (none has any)"


def _less(what: str) -> str:
    if what in ("cpu", "memory", "ephemeral-storage"):
        return f"lower resources.{what.replace('-', '_')} in the spec, or wait until others end"
    return "ask for fewer GPUs (resources.gpus), for another gpu_type, or wait until others end (kubectl describe nodes)"


START = (
    Rule("service-account", "the ServiceAccount of the pods is missing", _account, Code.REFUSED),
    Rule("pod-security", "the namespace's Pod Security level refuses the pods", _security, Code.REFUSED),
    Rule("quota", "a ResourceQuota refuses the pods, for now or for ever", _quota, Code.REFUSED),
    Rule("limit-range", "a LimitRange refuses the pods", _limits, Code.REFUSED),
    Rule("admission", "an admission webhook or policy refuses the pods", _webhook, Code.REFUSED),
    Rule("not-made", "the pods cannot be made, for another reason", _other_refusal, Code.REFUSED),
    Rule("image-name", "`image` is no name of an image", _image_name),
    Rule("image-not-here", "the image is not on the node and may not be pulled", _image_absent),
    Rule("pull-secret", "a Secret for pulling the image is missing", _pull_secret),
    Rule("image", "the image cannot be pulled", _image),
    Rule("secret", "a Secret is missing", _secret),
    Rule("config-map", "a ConfigMap is missing", _config_map),
    Rule("key", "a Secret or ConfigMap lacks a key", _key),
    Rule("set-up", "the container or one of its volumes cannot be set up", _mount),
    Rule("claim", "a volume claim or its StorageClass is missing", _claim),
    Rule("placement", "no node has room, the GPU, the labels, or a taint that is tolerated", _placement),
)
"""In the order in which they are asked."""
