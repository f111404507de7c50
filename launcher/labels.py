"""What the objects of a run are called and marked with, and how they are found again."""

import re
from collections.abc import Mapping
from typing import Any

from job.layout import fire_id

Manifest = dict[str, Any]
"""A Kubernetes object as plain data."""

FIELD_MANAGER = "tunejob"

RUN = "tunejob.dev/run"
"""Label: the run's id. Whatever carries it belongs to a run."""
NAME = "tunejob.dev/name"
"""Label: the spec's name, which runs of several specs may share."""
PER_FIRE = "tunejob.dev/per-fire"
"""Label, ``true`` on what a CronJob makes: each Job is a run of its own, by ``fire_id``."""
OUTPUT = "tunejob.dev/output"
"""Annotation: the folder of runs; the run's folder is below it."""
SPEC_DIGEST = "tunejob.dev/spec-digest"
"""Annotation: SHA-256 of what is trained."""
QUEUE = "kueue.x-k8s.io/queue-name"
"""Label of Kueue's: the LocalQueue."""
JOB_NAME = "batch.kubernetes.io/job-name"
"""Label that the Job's controller puts on its pods."""
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def is_value(text: str) -> bool:
    """Whether a label may have this value; the API server refuses to look for another."""
    return _VALUE.fullmatch(text) is not None


def run_of(manifest: Mapping[str, Any]) -> str:
    """The run's id of a Job or another object; empty for one that is not ours."""
    metadata = manifest.get("metadata", {})
    labels = metadata.get("labels") or {}
    run = str(labels.get(RUN, ""))
    is_fire = labels.get(PER_FIRE) == "true" and manifest.get("kind", "Job") == "Job"
    return fire_id(run, metadata["name"]) if run and is_fire else run
