"""The pod of a run: hardened, and with every value that the server would fill into a list written out.

A list that the server treats as a whole belongs to one manager; a default missing in it is a conflict for the next.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from job.exits import CONTAINER
from job.spec import JobSpec
from launcher.labels import JOB_NAME, Manifest
from launcher.profile import GpuType, Profile
from launcher.quantity import amount, canonical

USER: Final = 10001
"""Uid and gid of the image."""
SPEC_FILE: Final = "spec.yaml"
SPEC_FOLDER: Final = "/etc/tunejob"

S3_KEY: Final = "credentials"
HUB_KEY: Final = "token"
CA_KEY: Final = "ca.crt"
"""What the Secrets and the ConfigMap that a profile names have to hold."""
_S3_FOLDER: Final = "/var/run/secrets/tunejob/s3"
_HUB_FOLDER: Final = "/var/run/secrets/tunejob/hub"
_CA_FOLDER: Final = "/var/run/tunejob/ca"

TMP_SIZE: Final = "256Mi"
SHM_SIZE: Final = "1Gi"
"""Shared memory for NCCL; what is not used costs nothing."""
BESIDE_SCRATCH: Final = "1Gi"
"""Of the node's disk beyond the scratch volume: log and /tmp."""
NODE_LOSS_SECONDS: Final = 60
"""How long a pod stays on a node that does not answer; Kubernetes' own default is 300."""


def template(spec: JobSpec, profile: Profile, gpu: GpuType, labels: Mapping[str, str], config_map: str) -> Manifest:
    """The Job's pod template.

    Args:
        gpu: the kind that the spec asks for; without effect where it asks for none.
        labels: of the pod.
        config_map: name of the ConfigMap with the spec.
    """
    volumes = _volumes(spec, profile, config_map)
    pod: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.resources.grace_seconds,
        **_placement(spec, profile, gpu),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, profile, gpu, [mount for mount, _ in volumes])],
        "volumes": [volume for _, volume in volumes],
    }
    if profile.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in profile.pull_secrets]
    return {"metadata": {"labels": dict(labels)}, "spec": pod}


def queue_of(spec: JobSpec, profile: Profile) -> str | None:
    """Kueue's LocalQueue, if there is one."""
    return spec.scheduling.queue or profile.queue


def scratch_size(spec: JobSpec, profile: Profile) -> str:
    """Quantity of the scratch volume."""
    usual = "100Gi" if spec.resources.gpus else "20Gi"
    return canonical(spec.resources.ephemeral_storage or profile.scratch.size or usual)


def _container(spec: JobSpec, profile: Profile, gpu: GpuType, mounts: Sequence[Manifest]) -> Manifest:
    return {
        "name": CONTAINER,
        "image": profile.image,
        "imagePullPolicy": "IfNotPresent",
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",  # never the log's end: it may hold training text
        "env": _variables(spec, profile),
        "resources": _resources(spec, profile, gpu),
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": list(mounts),
    }


def _cores(spec: JobSpec) -> tuple[str, int]:
    """CPU that is asked for, and whole cores that may be used: libraries start slowly on less than two."""
    asked = spec.resources.cpu or str(4 * spec.resources.gpus or 1)
    return canonical(asked), max(2, math.ceil(amount(asked)))


def _resources(spec: JobSpec, profile: Profile, gpu: GpuType) -> Manifest:
    gpus = spec.resources.gpus
    asked_cores, cores = _cores(spec)
    is_on_node = profile.scratch.storage_class is None
    disk = amount(BESIDE_SCRATCH) + (amount(scratch_size(spec, profile)) if is_on_node else 0)
    # Limits equal to requests, so that a LimitRange has nothing to fill in and the pod is not evicted for its use.
    both = {
        "memory": canonical(spec.resources.memory or f"{32 * gpus or 4}Gi"),
        "ephemeral-storage": canonical(f"{math.ceil(disk / 2**20)}Mi"),
    } | ({gpu.resource: canonical(str(gpus))} if gpus else {})
    return {"requests": {"cpu": asked_cores, **both}, "limits": {"cpu": canonical(str(cores)), **both}}


def _variables(spec: JobSpec, profile: Profile) -> list[Manifest]:
    store = profile.store
    _, cores = _cores(spec)
    values = {
        "TUNEJOB_OUTPUT": store.output,
        "AWS_ENDPOINT_URL_S3": store.endpoint,
        "AWS_REGION": store.region or ("us-east-1" if store.endpoint else None),
        "AWS_SHARED_CREDENTIALS_FILE": f"{_S3_FOLDER}/{S3_KEY}" if store.secret else None,
        "AWS_CA_BUNDLE": f"{_CA_FOLDER}/{CA_KEY}" if store.ca_config_map else None,
        "TUNEJOB_S3_ADDRESSING": store.addressing,
        "AWS_REQUEST_CHECKSUM_CALCULATION": store.checksums,
        "AWS_RESPONSE_CHECKSUM_VALIDATION": store.checksums,
        "HF_TOKEN_PATH": f"{_HUB_FOLDER}/{HUB_KEY}" if profile.hub else None,
        "TUNEJOB_SCRATCH_LIMIT": scratch_size(spec, profile),
        # A process sees all cores of the node; more threads than it may use make it slower, not faster.
        "OMP_NUM_THREADS": str(max(1, cores // max(1, spec.resources.gpus))),
        **profile.env,
    }
    fields = {"TUNEJOB_JOB": f"metadata.labels['{JOB_NAME}']", "TUNEJOB_POD": "metadata.name"}
    return [
        *({"name": name, "value": value} for name, value in values.items() if value is not None),
        *(
            {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
            for name, path in fields.items()
        ),
    ]


def _volumes(spec: JobSpec, profile: Profile, config_map: str) -> list[tuple[Manifest, Manifest]]:
    """Each mount with its volume."""
    store = profile.store
    found = [_files("spec", SPEC_FOLDER, "configMap", {"name": config_map, "defaultMode": 0o444})]
    # Readable through fsGroup; with 0400 only root could.
    if store.secret:
        found.append(_files("s3", _S3_FOLDER, "secret", {"secretName": store.secret, "defaultMode": 0o440}))
    if profile.hub:
        found.append(_files("hub", _HUB_FOLDER, "secret", {"secretName": profile.hub.secret, "defaultMode": 0o440}))
    if store.ca_config_map:
        found.append(_files("ca", _CA_FOLDER, "configMap", {"name": store.ca_config_map, "defaultMode": 0o444}))
    return [
        *found,
        ({"name": "scratch", "mountPath": "/scratch"}, _scratch(spec, profile)),
        ({"name": "tmp", "mountPath": "/tmp"}, {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}}),
        (
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHM_SIZE}},
        ),
    ]


def _files(name: str, folder: str, kind: str, source: Manifest) -> tuple[Manifest, Manifest]:
    return {"name": name, "mountPath": folder, "readOnly": True}, {"name": name, kind: source}


def _scratch(spec: JobSpec, profile: Profile) -> Manifest:
    size = scratch_size(spec, profile)
    if profile.scratch.storage_class is None:
        return {"name": "scratch", "emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
        "storageClassName": profile.scratch.storage_class,
        "volumeMode": "Filesystem",
    }
    return {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _placement(spec: JobSpec, profile: Profile, gpu: GpuType) -> Manifest:
    """Which nodes. With a queue neither nodeSelector nor tolerations: Kueue's flavor adds its own to them, and applying
    the manifest again would then change fields that may not change.
    """
    selector = gpu.node_selector if spec.resources.gpus else {}
    if queue_of(spec, profile):
        return {"affinity": _affinity(selector)} if selector else {}
    found: Manifest = {}
    if spec.scheduling.priority:
        found["priorityClassName"] = spec.scheduling.priority
    if selector:
        found["nodeSelector"] = dict(sorted(selector.items()))
    tolerations = gpu.tolerations if spec.resources.gpus else ()
    found["tolerations"] = [
        *(one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in tolerations),
        *(_node_loss(what) for what in ("not-ready", "unreachable")),
    ]
    return found


def _affinity(selector: Mapping[str, str]) -> Manifest:
    rules: list[Any] = [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(selector.items())]
    terms = {"nodeSelectorTerms": [{"matchExpressions": rules}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _node_loss(what: str) -> Manifest:
    return {
        "key": f"node.kubernetes.io/{what}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": NODE_LOSS_SECONDS,
    }
