"""The profile: what a cluster is like. One file for a team; the spec says what is trained, and never where."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from job.errors import SpecInvalid
from job.spec_section import Bytes, LabelName, ObjectName, Section, Words, read_section, reference_of
from launcher.profile_values import (
    SECRET,
    require_endpoint,
    require_env,
    require_image,
    require_labels,
    require_node_labels,
    require_output,
    require_resource,
)

VARIABLE: Final = "TUNEJOB_PROFILE"
HERE: Final = Path("tunejob.profile.yaml")
DEFAULT: Final = "default"

_SPEC = "this says what is trained; it belongs in the spec"

WORDS = Words(
    refused={
        **dict.fromkeys(("model", "data", "method", "lora", "training", "checkpoints", "evaluation", "name"), _SPEC),
        **dict.fromkeys(("resources", "gpus", "cpu", "memory"), "this is asked for by each spec, below resources"),
        **dict.fromkeys(("priority", "cron", "time_zone", "scheduling"), "each spec has it, below scheduling"),
        "apiVersion": "this looks like a Kubernetes object; a profile begins with namespace, image and store",
        **dict.fromkeys(
            ("token", "hf_token", "password", "secret_key", "*access_key*", "*api_key", "credentials"), SECRET
        ),
    },
    renamed={
        "bucket": "store.output",
        "output": "store.output",
        "endpoint_url": "store.endpoint",
        "s3_secret": "store.secret",
        "secret_name": "store.secret",
        "ca": "store.ca_config_map",
        "ca_bundle": "store.ca_config_map",
        "image_pull_secrets": "pull_secrets",
        "imagePullSecrets": "pull_secrets",
        "serviceAccountName": "service_account",
        "local_queue": "queue",
        "nodeSelector": "gpu_types.NAME.node_selector",
        "storageClassName": "scratch.storage_class",
    },
    secret=SECRET,
    missing={
        "image": "image: registry.example/tunejob:0.1 (there is no default: make image builds one, docs/container.md)",
        "store": "store: {output: s3://bucket/runs, secret: s3-credentials}",
    },
)

Endpoint = Annotated[str, AfterValidator(require_endpoint)]


class Store(Section):
    """Where runs go, and how it is reached."""

    output: Annotated[str, AfterValidator(require_output)] = Field(examples=["s3://team-runs"])
    """Folder of runs, `s3://bucket` or `s3://bucket/prefix`; each run has a folder of its own in it."""
    endpoint: Endpoint | None = None
    """The store's address as the pod sees it. Left out: AWS."""
    client_endpoint: Endpoint | None = None
    """The store's address as this machine sees it. Left out: `endpoint`."""
    secret: ObjectName | None = None
    """Secret whose key `credentials` is a file as AWS_SHARED_CREDENTIALS_FILE reads it. Left out: what the cloud gives
    the service account (IRSA, Pod Identity, Workload Identity)."""
    ca_config_map: ObjectName | None = None
    """ConfigMap whose key `ca.crt` has the certificates of a private authority."""
    region: str | None = Field(None, min_length=1)
    """Region of the bucket. Left out: `us-east-1` with an endpoint, else what the cloud says."""
    addressing: Literal["path", "virtual", "auto"] | None = None
    """Whether the bucket stands in the path or in the host's name. Left out: `path` with an endpoint."""
    checksums: Literal["when_supported", "when_required"] | None = None
    """Amazon's newer checksums. Left out: `when_required` with an endpoint; other stores may not know them."""


class Hub(Section):
    """The model hub."""

    secret: ObjectName = Field(examples=["hf-token"])
    """Secret whose key `token` is a token for gated models."""


class Toleration(Section):
    """A taint that does not keep a run's pods away; keys as Kubernetes has them."""

    key: str | None = None
    """Key of the taint. Left out: every key; then `operator` is Exists."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the taint's value matters."""
    value: str | None = None
    """Value of the taint, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Left out: every effect."""
    toleration_seconds: int | None = Field(None, ge=0, alias="tolerationSeconds")
    """Seconds until a NoExecute taint evicts all the same. Left out: never."""


Tolerations = Annotated[tuple[Toleration, ...], Field(strict=False)]


class GpuType(Section):
    """One kind of GPU that the cluster has."""

    resource: Annotated[str, AfterValidator(require_resource)] = "nvidia.com/gpu"
    """Extended resource that the device plugin offers; for slices of a GPU for instance `nvidia.com/mig-3g.40gb`."""
    memory: Bytes | None = None
    """Memory of one, for instance `80Gi`: `tunejob check` says whether a spec fits it, and what to lower if not."""
    node_selector: Annotated[dict[str, str], AfterValidator(require_node_labels)] = Field(default_factory=dict)
    """Labels of the nodes that have it."""
    tolerations: Tolerations = ()
    """Taints of those nodes. Not rendered with a queue: Kueue's flavor brings them."""


class Scratch(Section):
    """Where a pod keeps base model, data and checkpoints while it trains."""

    size: Bytes | None = None
    """Kubernetes quantity. A spec's `resources.ephemeral_storage` wins. Left out: 100Gi with a GPU, 20Gi without."""
    storage_class: ObjectName | None = None
    """StorageClass of a volume that lives as long as the pod. Left out: the node's own disk (an emptyDir)."""


class Profile(Section):
    """What a cluster is like."""

    context: str | None = Field(None, min_length=1)
    """Context of the kubeconfig. Left out: the current one."""
    namespace: LabelName | None = None
    """Namespace of the team. Left out: the context's own."""
    image: Annotated[str, AfterValidator(require_image)]
    """Image of the container, best with its digest. There is no default: `make image` builds one."""
    service_account: ObjectName = "tunejob"
    """ServiceAccount of the pods; it needs no rights on the cluster."""
    pull_secrets: Annotated[tuple[ObjectName, ...], Field(strict=False)] = ()
    """Secrets with which the image is pulled."""
    store: Store
    """Where runs go."""
    hub: Hub | None = None
    """The model hub. Left out: no token, only open models."""
    gpu_types: dict[str, GpuType] = Field(default_factory=dict)
    """The kinds of GPU that a spec's `resources.gpu_type` can name. Left out: `nvidia.com/gpu` on any node."""
    scratch: Scratch = Scratch()
    """Where a pod keeps its files."""
    queue: LabelName | None = None
    """Kueue LocalQueue. A spec's `scheduling.queue` wins."""
    labels: Annotated[dict[str, str], AfterValidator(require_labels)] = Field(default_factory=dict)
    """Labels of everything that is made, for instance for a bill."""
    env: Annotated[dict[str, str], AfterValidator(require_env)] = Field(default_factory=dict)
    """Environment variables of the container, for instance `{NCCL_DEBUG: WARN}`. No secrets."""


def load(name: str | None = None, overrides: Sequence[str] = ()) -> Profile:
    """The profile of a name or file; without one, that which ``find`` finds.

    Args:
        overrides: changes such as ``"queue=urgent"``.

    Raises:
        SpecInvalid: there is none, or every problem in it.
    """
    return read(find(name), overrides)


def read(path: Path, overrides: Sequence[str] = ()) -> Profile:
    """The profile in a file. Raises SpecInvalid: it cannot be read, or every problem in it."""
    return read_section(Profile, path, WORDS, "name one that is there (configs/profiles/ has some to copy)", overrides)


def find(name: str | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """The file of a profile: ``name``'s, else TUNEJOB_PROFILE's, else ./tunejob.profile.yaml, else the user's default.

    Args:
        name: a file (it has a path separator, or ends in .yaml or .yml), else a name in the user's folder of profiles.

    Raises:
        SpecInvalid: there is none; it names every place that was looked at.
    """
    folder = _folder(environment)
    asked = name or environment.get(VARIABLE)
    if asked and (asked.endswith((".yaml", ".yml")) or os.sep in asked or "/" in asked):
        return Path(asked).expanduser()
    places = [folder / f"{asked}.yaml"] if asked else [HERE, folder / f"{DEFAULT}.yaml"]
    for place in places:
        if place.is_file():
            return place
    raise SpecInvalid(_absent(asked, places, folder))


def _folder(environment: Mapping[str, str]) -> Path:
    configured = environment.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "tunejob"


def _absent(asked: str | None, places: Sequence[Path], folder: Path) -> str:
    looked = " and ".join(str(place) for place in places)
    there = sorted(path.stem for path in folder.glob("*.yaml")) if asked else []
    known = f"; there are {', '.join(there)}" if there else ""
    first = f"no profile {asked}" if asked else f"no profile: neither -p nor {VARIABLE} names one"
    return (
        f"{first}, and there is no {looked}{known}; copy configs/profiles/local.yaml of the project there and edit it"
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a profile, for editors."""
    schema = Profile.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_HEAD = """# The profile

Made from `launcher/profile.py` by `make docs`; change it there. A profile says what a cluster is like. It is looked for
as `-p NAME|FILE` says, else as `TUNEJOB_PROFILE` says, else in `./tunejob.profile.yaml`, else in
`~/.config/tunejob/default.yaml` (`XDG_CONFIG_HOME` is honoured); a NAME is a file of that folder. A key that is not on
this page is refused, and so is a secret: those are in Secrets of the namespace, and the profile names them.
"""


def reference() -> str:
    """The manual page of the profile, in Markdown."""
    return reference_of(Profile, _HEAD)
