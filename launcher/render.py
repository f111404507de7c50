"""What a run is on a cluster: an immutable ConfigMap with its spec, and the Job (or CronJob) that trains it.

A pure function of spec and profile, the same to the byte wherever it is called.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from job.errors import SpecInvalid
from job.exits import pod_failure_policy
from job.spec import JobSpec, digest, dump, run_id
from job.strict_yaml import dump_document
from launcher.labels import NAME, OUTPUT, PER_FIRE, QUEUE, RUN, SPEC_DIGEST, Manifest
from launcher.pod import SPEC_FILE, queue_of, template
from launcher.profile import GpuType, Profile

PRIORITY: Final = "kueue.x-k8s.io/priority-class"
MAX_CONFIG_MAP: Final = 1 << 20
"""Bytes of data that the API server takes."""
BACKOFF_LIMIT: Final = 6
"""Counted failures before the Job fails; those that no new pod can cure fail it at once."""
STARTING_DEADLINE_SECONDS: Final = 3600
"""How late a fire may still start: after it the next one is due, not a backlog."""
ZONE: Final = "Etc/UTC"

KEPT: Final = {
    "argocd.argoproj.io/compare-options": "IgnoreExtraneous",
    "argocd.argoproj.io/sync-options": "Prune=false",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
}
"""Annotations: a run whose file is gone from the repository stays, with its log and its pods' last words."""


@dataclass(frozen=True)
class Rendered:
    """The objects of one run."""

    run: str
    """The run's id; under a CronJob each fire adds to it."""
    config_map: Manifest
    workload: Manifest
    """The Job, or the CronJob."""

    @property
    def name(self) -> str:
        """Name of the Job or CronJob."""
        return str(self.workload["metadata"]["name"])

    @property
    def objects(self) -> list[Manifest]:
        """Everything, in the order in which it is applied."""
        return [self.config_map, self.workload]


def render(spec: JobSpec, profile: Profile, fire: str = "") -> Rendered:
    """The objects of the run that a spec describes, on the cluster that a profile describes.

    Args:
        fire: id of one fire of a schedule's spec, which is to go on by a Job of its own; not the schedule again.

    Raises:
        SpecInvalid: spec and profile do not fit each other, or no pod could carry out the spec.
    """
    gpu = _gpu_type(spec, profile)
    if problems := list(_problems(spec)):
        raise SpecInvalid("\n".join(problems))
    run = fire or run_id(spec)
    is_schedule = bool(spec.scheduling.cron) and not fire
    config_map = _config_map(spec, profile, run)
    labels = _labels(run, spec, profile) | ({PER_FIRE: "true"} if is_schedule else {})
    pod = template(spec, profile, gpu, labels, config_map["metadata"]["name"])
    if fire:  # its pod would look for its folder by the Job's name, and this Job has another than the schedule's
        pod["spec"]["containers"][0]["args"] = ["run", "--folder", f"{profile.store.output.rstrip('/')}/{fire}"]
    kube_job = {
        "backoffLimit": BACKOFF_LIMIT,
        "activeDeadlineSeconds": spec.resources.deadline_seconds,
        "completions": 1,
        "parallelism": 1,
        "completionMode": "NonIndexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": pod_failure_policy(),
        "template": pod,
    }
    notes = {OUTPUT: profile.store.output, SPEC_DIGEST: digest(spec)}
    queueing = _queueing(spec, profile)
    if is_schedule:
        workload = _cron_job(spec, profile, labels, labels | queueing, notes, kube_job)
    else:
        name = f"{run}-{_job_digest(kube_job, queueing, config_map)}"
        metadata = _metadata(name, profile, labels | queueing, notes | KEPT)
        workload = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": kube_job}
    return Rendered(run, config_map, workload)


def to_yaml(objects: Sequence[Manifest]) -> str:
    """Manifests as YAML documents, one below the other."""
    return "---\n".join(dump_document(one) for one in objects)


def _config_map(spec: JobSpec, profile: Profile, run: str) -> Manifest:
    """Carries the resolved spec into the container; immutable, so every attempt reads the same."""
    data = {SPEC_FILE: dump(spec)}
    size = len(data[SPEC_FILE].encode())
    if size > MAX_CONFIG_MAP - len(SPEC_FILE):
        raise SpecInvalid(
            f"{spec.name}: the resolved spec has {size:,} bytes, and a ConfigMap holds 1 MiB; name fewer inputs, for "
            "instance a prefix instead of its objects"
        )
    name = f"{run}-spec-{_short(data)}"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, profile, _labels(run, spec, profile), KEPT),
        "immutable": True,
        "data": data,
    }


def _cron_job(
    spec: JobSpec,
    profile: Profile,
    labels: Mapping[str, str],
    job_labels: Mapping[str, str],
    notes: Mapping[str, str],
    kube_job: Manifest,
) -> Manifest:
    """The schedule. It keeps its name when the spec changes, and may be pruned: else both the old and the new would
    fire. What runs under it goes on as it began.
    """
    one_fire = {"metadata": {"labels": dict(job_labels), "annotations": {**notes, **KEPT}}, "spec": kube_job}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(spec.name.rstrip("-"), profile, labels, notes),
        "spec": {
            "schedule": spec.scheduling.cron,
            "timeZone": spec.scheduling.time_zone or ZONE,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": STARTING_DEADLINE_SECONDS,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": one_fire,
        },
    }


def _metadata(name: str, profile: Profile, labels: Mapping[str, str], annotations: Mapping[str, str]) -> Manifest:
    where = {"namespace": profile.namespace} if profile.namespace else {}
    return {"name": name, **where, "labels": dict(labels), "annotations": dict(annotations)}


def _labels(run: str, spec: JobSpec, profile: Profile) -> dict[str, str]:
    return {
        **profile.labels,
        "app.kubernetes.io/name": "tunejob",
        "app.kubernetes.io/instance": run,
        "app.kubernetes.io/component": "training",
        "app.kubernetes.io/part-of": "tunejob",
        "app.kubernetes.io/managed-by": "tunejob",
        RUN: run,
        NAME: spec.name.rstrip("-"),
    }


def _queueing(spec: JobSpec, profile: Profile) -> dict[str, str]:
    """Kueue's labels of a Job."""
    queue = queue_of(spec, profile)
    priority = {PRIORITY: spec.scheduling.priority} if queue and spec.scheduling.priority else {}
    return {QUEUE: queue, **priority} if queue else {}


def _job_digest(kube_job: Manifest, queueing: Mapping[str, str], config_map: Manifest) -> str:
    """Of all that cannot change on a Job once it is there. ``restart`` is in the ConfigMap's content."""
    fixed = ("completions", "completionMode", "podFailurePolicy", "podReplacementPolicy", "template")
    return _short([{key: kube_job[key] for key in fixed}, dict(queueing), config_map["data"]])


def _short(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _gpu_type(spec: JobSpec, profile: Profile) -> GpuType:
    """The profile's kind of GPU that a spec asks for; where it names none, the only one, else any."""
    asked, known = spec.resources.gpu_type, profile.gpu_types
    if asked is None:
        return next(iter(known.values())) if len(known) == 1 else GpuType()
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, list(known), n=1)
    there = f"gpu_types of the profile has {', '.join(sorted(known))}" if known else "the profile has no gpu_types"
    hint = f"; did you mean {near[0]}?" if near else "; ask for one of those, or add it to the profile"
    raise SpecInvalid(f"resources.gpu_type: {asked}: {there}{hint}")


def _problems(spec: JobSpec) -> Iterator[str]:
    """What a spec may say, and no pod can do."""
    resources = spec.resources
    if resources.nodes > 1:
        yield (
            f"resources.nodes: {resources.nodes}: training over several pods is not offered yet; set nodes to 1 and "
            "gpus to the number of one node's GPUs"
        )
    if resources.gpu_type is not None and not resources.gpus:
        yield f"resources.gpu_type: {resources.gpu_type}, but resources.gpus is 0; set gpus to 1, or remove gpu_type"
    if zone := spec.scheduling.time_zone:
        yield from _zone_problems(zone)
    data = spec.data
    files = {f"data.train.{number}.from": source.source for number, source in enumerate(data.train)}
    files |= {"data.eval": data.eval} if data.eval else {}
    for key, name in files.items():
        if not name.startswith(("s3://", "/")):
            yield f"{key}: {name} is a file of this machine, which no pod sees; upload it and write s3://bucket/key"
    if spec.model.source.startswith(("./", "../", "~", "file:")):
        yield (
            f"model.from: {spec.model.source} is a folder of this machine, which no pod sees; upload it and write "
            "s3://bucket/prefix, or name a model of the hub"
        )
    if data.chat_template and data.chat_template.endswith(".jinja") and not data.chat_template.startswith("/"):
        yield (
            f"data.chat_template: {data.chat_template} is a file of this machine, which no pod sees; put it into the "
            "model's folder as chat_template.jinja, or name one that is built in"
        )


def _zone_problems(zone: str) -> Iterator[str]:
    import zoneinfo

    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        known = zoneinfo.available_timezones()
        if known:  # a machine without a data base of zones leaves it to the server
            near = difflib.get_close_matches(zone, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; write it like Asia/Tokyo"
            yield f"scheduling.time_zone: {zone}: there is no such time zone{hint}"
