"""What keeps a pod from starting: image, Secret, ConfigMap, key, volume. Rules of ``launcher.why``; pure."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.causes.cause import Found, Rule
from launcher.causes.evidence import Evidence, moment
from launcher.causes.placing import PLACEMENT
from launcher.causes.refusing import REFUSALS
from launcher.runs import Attempt

PULLS = 3
"""Pulls that fail before a registry that seems to be away counts as wrong."""
PULL_SECONDS = 60
"""How long that takes; counted where there are no events (they are kept for an hour)."""

_PASSING = re.compile(
    r"connection refused|timeout|timed out|no such host|i/o|EOF|TLS handshake|too many requests|50\d|QPS", re.IGNORECASE
)
_DENIED = re.compile(r"denied|unauthorized|authentication|forbidden|401|403", re.IGNORECASE)
_SECRET = re.compile(r'secret "(?P<name>[^"]+)" not found')
_CONFIG_MAP = re.compile(r'configmap "(?P<name>[^"]+)" not found')
_KEY = re.compile(r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) [^/]+/(?P<name>\S+)")
_MOUNT_KEY = re.compile(
    r'failed for volume "(?P<volume>[^"]+)" : references non-existent (?P<kind>secret|config) key: (?P<key>\S+)'
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
    return str(attempt.container.get("image", "?"))


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
        f"kubectl -n {evidence.run.namespace} create secret docker-registry NAME ..., or mend pull_secrets in the "
        "profile",
        (told[0].line, waiting[2]),
    )


def _image(evidence: Evidence) -> Found | None:
    waiting = _of_pulling(evidence)
    if not waiting:
        return None
    attempt, _, message = waiting
    failed = [one for one in evidence.about(attempt.pod, "Failed") if one.message.startswith("Failed to pull")]
    said = failed[0].message if failed else message
    age = evidence.now - moment(attempt.manifest["metadata"]["creationTimestamp"])
    tries = max((one.count for one in failed), default=PULLS if age.total_seconds() > PULL_SECONDS else 1)
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
                "hub: --from-file=token=FILE), or mend store.secret, hub.secret in the profile; its pod starts "
                "within two minutes of that",
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
                "store.ca_config_map in the profile; its pod starts within two minutes of that"
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
    found: Mapping[str, Any] = next((one for one in volumes if one["name"] == volume), {})
    return str(found.get("secret", {}).get("secretName") or found.get("configMap", {}).get("name") or volume)


def _lacks_key(evidence: Evidence, kind: str, name: str, key: str, line: str) -> Found:
    return Found(
        f"{kind} {name} in namespace {evidence.run.namespace} has no key {key}",
        f"make {kind} {name} anew with a key {key}; kubectl -n {evidence.run.namespace} describe {kind.lower()} {name} "
        "shows those it has",
        (line,),
    )


def _mount(evidence: Evidence) -> Found | None:
    troubles = _troubles(evidence)
    if troubles:
        message, line = troubles[0]
        return Found(
            f"its container cannot be set up: {message}",
            f"kubectl -n {evidence.run.namespace} describe pod {evidence.live.pod if evidence.live else ''}",
            (line,),
            is_lasting=False,
        )
    return None


START = (
    *REFUSALS,
    Rule("image-name", "`image` is no name of an image", _image_name),
    Rule("image-not-here", "the image is not on the node and may not be pulled", _image_absent),
    Rule("pull-secret", "a Secret for pulling the image is missing", _pull_secret),
    Rule("image", "the image cannot be pulled", _image),
    Rule("secret", "a Secret is missing", _secret),
    Rule("config-map", "a ConfigMap is missing", _config_map),
    Rule("key", "a Secret or ConfigMap lacks a key", _key),
    Rule("set-up", "the container or one of its volumes cannot be set up", _mount),
    *PLACEMENT,
)
"""In the order in which they are asked."""
