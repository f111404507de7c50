"""Jobs as the manifests of this folder make them, what became of their pods, and what they left in the store."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from job.spec import parse, run_id
from tests.cluster.bucket import BUCKET, Bucket, Key
from tests.cluster.kubectl import Kubectl, Manifest, Said, manifest, wait_for

IMAGE = "localhost/tunejob:test"
SMALL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
CREDENTIALS = "s3-credentials"
"""The Secret that lets a run do what it needs."""
EMPTY_DIR = "emptyDir: {{sizeLimit: {}}}"
CLAIM = "persistentVolumeClaim: {{claimName: {}}}"


def lacking(what: str) -> NoReturn:
    """Skips with the reason; where a cluster is required, fails with it."""
    if os.environ.get("TUNEJOB_TEST_REQUIRE_CLUSTER"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def tiny_spec(name: str, **sections: Any) -> dict[str, Any]:
    """A run of the tiny Llama on the toy task: 6 steps, a checkpoint every 2."""
    return {
        "name": name,
        "model": f"s3://{BUCKET}/models/tiny-llama",
        "data": {"train": f"s3://{BUCKET}/data/toy.jsonl", "eval_split": 0.2} | sections.pop("data", {}),
        "lora": {"r": 4, "dropout": 0.1} | sections.pop("lora", {}),
        "training": {"max_steps": 6, "batch_size": 4, "max_length": 64, "logging_steps": 1, "learning_rate": 5e-3}
        | sections.pop("training", {}),
        "checkpoints": {"every_steps": 2} | sections.pop("checkpoints", {}),
        "resources": {"grace_seconds": 30},
    } | sections


@dataclass(frozen=True)
class Pod:
    """One pod of a Job, ended or not."""

    manifest: Manifest

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.manifest["metadata"]["name"])

    @property
    def _ended(self) -> Mapping[str, Any]:
        statuses = self.manifest["status"].get("containerStatuses", [])
        return next((one["state"]["terminated"] for one in statuses if "terminated" in one["state"]), {})

    @property
    def code(self) -> int | None:
        """How its container left; None while it runs."""
        return self._ended.get("exitCode")

    @property
    def seconds_to_start(self) -> float:
        """From the pod's creation to its container's start."""
        created, started = self.manifest["metadata"]["creationTimestamp"], self._ended["startedAt"]
        return (datetime.fromisoformat(started) - datetime.fromisoformat(created)).total_seconds()

    @property
    def reason(self) -> str:
        """Why, as the kubelet sees it: Completed, Error, OOMKilled."""
        return str(self._ended.get("reason"))

    @property
    def said(self) -> dict[str, Any]:
        """The termination message; empty if it left none."""
        text = self._ended.get("message", "")
        assert len(text.encode()) <= 4096
        word: dict[str, Any] = json.loads(text) if text else {}
        return word


@dataclass(frozen=True)
class Results:
    """What a run left in the store."""

    bucket: Bucket
    prefix: str
    """Ends in '/'."""

    def json(self, key: str) -> Any:
        """An object of JSON; None if there is none."""
        return self.bucket.json(self.prefix + key)

    def adapter(self) -> bytes:
        """The published adapter's bytes."""
        return self.bucket.get(f"{self.prefix}adapter_model.safetensors")

    def losses(self) -> dict[int, float]:
        """Loss of each step in metrics.jsonl; a step that stands there twice fails."""
        found: dict[int, float] = {}
        for line in self.bucket.get(f"{self.prefix}metrics.jsonl").decode().splitlines():
            record = json.loads(line)
            if "loss" in record:
                assert record["step"] not in found
                found[record["step"]] = record["loss"]
        return found

    def ledger(self) -> list[dict[str, Any]]:
        """What the ledger has on each attempt, oldest first."""
        return [self.bucket.json(key) for key in sorted(self.bucket.etags(f"{self.prefix}run/attempts/"))]

    def committed(self) -> int:
        """Step of the newest committed checkpoint; 0 if there is none."""
        markers = [key for key in self.bucket.etags(f"{self.prefix}checkpoints/") if key.endswith("/COMMIT.json")]
        return max((self.bucket.json(key)["step"] for key in markers), default=0)

    def phase(self) -> str:
        """The phase that the status has."""
        return str((self.json("run/status.json") or {}).get("phase"))


@dataclass(frozen=True)
class KubeJob:
    """One Job and its ConfigMap; the fields are what differs from test to test."""

    kubectl: Kubectl
    bucket: Bucket
    name: str
    spec: Mapping[str, Any]
    output: str = f"s3://{BUCKET}/runs"
    credentials: str = CREDENTIALS
    memory: str = "2Gi"
    scratch_limit: str = "512Mi"
    scratch: str = ""
    """The volume; left out: an emptyDir of that limit."""
    pod_security: Mapping[str, Any] = field(
        default_factory=lambda: {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001}
    )
    backoff_limit: int = 1

    @property
    def text(self) -> str:
        """The manifests."""
        security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}} | dict(self.pod_security)
        return manifest(
            "job",
            name=self.name,
            image=IMAGE,
            spec=json.dumps(yaml.safe_dump(dict(self.spec), sort_keys=False)),
            output=self.output,
            credentials=self.credentials,
            memory=self.memory,
            scratch_limit=self.scratch_limit,
            scratch=self.scratch or EMPTY_DIR.format(self.scratch_limit),
            pod_security=json.dumps(security),
            backoff_limit=str(self.backoff_limit),
            grace_seconds=str(self.spec["resources"]["grace_seconds"]),
        )

    def named(self, name: str) -> "KubeJob":
        """Another Job of the same run."""
        return replace(self, name=name)

    def apply(self) -> Said:
        """Applies it; the server must have nothing to warn of."""
        said = self.kubectl.apply(self.text)
        assert "Warning" not in said.err, said.err
        return said

    def record(self) -> Manifest:
        """The Job as the server has it."""
        return self.kubectl.get("job", self.name)

    def ended(self) -> "Ended":
        """Waits for its end."""
        return wait_for(self._end, f"end of Job {self.name}", self.story)

    def run(self) -> "Ended":
        """Applies it and waits for its end."""
        self.apply()
        return self.ended()

    def pods(self) -> list[Pod]:
        """Its pods that still exist, oldest first."""
        selector = f"batch.kubernetes.io/job-name={self.name}"
        return [Pod(one) for one in self.kubectl.listed("pods", selector)]

    def running(self) -> Pod | None:
        """Its pod at work; None while there is none."""
        return next((pod for pod in self.pods() if pod.manifest["status"]["phase"] == "Running"), None)

    def logs(self, pod: Pod) -> str:
        """Everything its container said so far."""
        return self.kubectl("logs", pod.name, "--tail=-1")

    def progress(self, pod: Pod) -> list[dict[str, Any]]:
        """The lines of JSON among it."""
        return list(_progress(self.logs(pod)))

    @property
    def results(self) -> Results:
        """What its run left in the store."""
        run = run_id(parse(yaml.safe_dump(dict(self.spec)), "spec"))
        return Results(self.bucket, f"{self.output.removeprefix(f's3://{BUCKET}/')}/{run}/")

    def story(self) -> str:
        """What became of it so far; for messages."""
        lines = [f"Job {self.name}: {json.dumps(self.record()['status'])}"]
        for pod in self.pods():
            lines += [f"--- {pod.name}: exit {pod.code} ({pod.reason}): {pod.said}"]
            lines += [self.kubectl.ask("logs", pod.name, "--tail=60").out]
        return "\n".join(lines)

    def _end(self) -> "Ended | None":
        conditions = self.record()["status"].get("conditions", [])
        for one in conditions:
            if one["type"] in ("Complete", "Failed") and one["status"] == "True":
                return Ended(one["type"] == "Complete", one["reason"], tuple(self.pods()), self)
        return None


@dataclass(frozen=True)
class Ended:
    """How a Job ended."""

    is_complete: bool
    reason: str
    pods: tuple[Pod, ...]
    kube_job: KubeJob

    def completed(self) -> "Ended":
        """Fails with the Job's story unless it is complete."""
        assert self.is_complete, self.kube_job.story()
        return self

    def failed(self, reason: str) -> Pod:
        """The only pod of a Job that failed for a reason; fails with its story if it is not so."""
        is_so = not self.is_complete and self.reason == reason
        assert is_so, self.kube_job.story()
        return self.only_pod()

    def only_pod(self) -> Pod:
        """The Job's one pod; fails if there are more."""
        assert len(self.pods) == 1, self.kube_job.story()
        return self.pods[0]


def _progress(logs: str) -> Iterator[dict[str, Any]]:
    for line in logs.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


@dataclass(frozen=True)
class Lab:
    """A namespace with a store, and everything a run needs in it."""

    kubectl: Kubectl
    bucket: Bucket

    def job(self, spec: Mapping[str, Any], **changes: Any) -> KubeJob:
        """A Job of its own name for a spec; nothing is applied yet."""
        return KubeJob(self.kubectl, self.bucket, f"{spec['name']}-{secrets.token_hex(4)}", spec, **changes)

    def make_credentials(self, name: str, key: Key) -> str:
        """Makes a Secret of credentials and gives its name."""
        self.kubectl.apply(manifest("credentials", name=name, credentials=json.dumps(key.file)))
        return name
