"""A desk with a spec and a profile, and a cluster out of memory that answers its commands."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from launcher.labels import JOB_NAME, Manifest
from tests.bench.stub import NAMESPACE, Objects, Refusal

SPEC: dict[str, Any] = {
    "name": "run",
    "model": "s3://models/base",
    "data": {"train": "s3://data/train.jsonl", "eval_split": 0.1},
    "resources": {"cpu": "1", "memory": "1Gi"},
}
PROFILE: dict[str, Any] = {
    "context": "stub",
    "namespace": NAMESPACE,
    "image": "localhost/tunejob:test",
    "store": {"output": "s3://training/runs", "endpoint": "http://127.0.0.1:9"},
}
CRON = {"cron": "0 3 * * *"}
NOW = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Said:
    """What a command said, and how it left."""

    code: int
    out: str
    err: str


@dataclass
class Kit:
    """The desk."""

    objects: Objects
    folder: Path
    _capture: pytest.CaptureFixture[str] = field(repr=False)

    def cli(self, *words: str) -> Said:
        """What ``tunejob WORDS`` says; a traceback fails."""
        self._capture.readouterr()
        code = main(words)
        out, err = self._capture.readouterr()
        assert "Traceback" not in err, err
        return Said(int(code), out, err)

    def spec(self, name: str = "run", **sections: Any) -> str:
        """The file of a spec."""
        content = SPEC | {"name": name} | sections
        path = self.folder / f"{name}{'-' if sections else ''}{'-'.join(sections)}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    def submitted(self, *words: str) -> str:
        """Submits, and gives the Job's or CronJob's name."""
        before = {*self.objects.names("jobs"), *self.objects.names("cronjobs")}
        said = self.cli("submit", *words, "-d")
        assert said.code == 0, said
        (made,) = {*self.objects.names("jobs"), *self.objects.names("cronjobs")} - before
        return made

    def got(self, plural: str, name: str) -> Manifest:
        """An object that is there."""
        found = self.objects.get(plural, name)
        assert found is not None
        return found

    def fail(self, job: str) -> None:
        """Ends a Job and its pod without success."""
        condition = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "lastTransitionTime": NOW}
        self.objects.put("jobs", self.got("jobs", job) | {"status": {"conditions": [condition]}})
        for name in self.objects.names("pods"):
            pod = self.got("pods", name)
            if pod["metadata"]["labels"][JOB_NAME] == job:
                ended = {"name": "tunejob", "state": {"terminated": {"exitCode": 75}}}
                self.objects.put("pods", pod | {"status": {"phase": "Failed", "containerStatuses": [ended]}})

    def fire(self, schedule: str, name: str) -> None:
        """What the CronJob's controller makes at a fire; it has failed."""
        cron_job = self.got("cronjobs", schedule)
        template = copy.deepcopy(cron_job["spec"]["jobTemplate"])
        owner = {"kind": "CronJob", "name": schedule, "uid": cron_job["metadata"]["uid"]}
        metadata = template["metadata"] | {"name": name, "ownerReferences": [owner]}
        self.objects.put("jobs", {"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": metadata})
        self.fail(name)

    def refuse(self, asked: str, code: int, message: str, reason: str = "Forbidden") -> None:
        """Has every request of a kind, as ``APPLY jobs``, refused."""
        refusal: Refusal = (code, {"kind": "Status", "code": code, "reason": reason, "message": message})
        self.objects.refuse = lambda word, name: refusal if word == asked else None


def rbac(verb: str, resource: str) -> str:
    """What the API server says where a permission is missing."""
    return f'{resource} is forbidden: User "ada" cannot {verb} resource "{resource}" in API group "" in the namespace'
