"""What a submission says of other runs of the same name. The rest of it is tested on a cluster."""

from pathlib import Path

import pytest

from job.spec import digest, parse
from launcher.labels import NAME, RUN, SPEC_DIGEST
from launcher.profile import Profile
from launcher.render import render
from launcher.submit import _tell_of_namesakes
from tests.launcher.api import Answer, served

SPEC = parse("name: run\nmodel: s3://models/base\ndata: {train: s3://data/train.jsonl, eval_split: 0.1}\n", "spec")
PROFILE = Profile.model_validate(
    {"namespace": "team", "image": "localhost/tunejob:test", "store": {"output": "s3://training/runs"}}
)
MAP = "GET /api/v1/namespaces/team/configmaps/theirs"
OTHER = "version: 99\nname: run\n"


@pytest.mark.parametrize(
    ("theirs", "lines"),
    [(digest(SPEC), []), ("0" * 64, ["run-fedcba98 of the same name is active and trains something else:"])],
)
def test_only_a_run_that_trains_something_else_is_told_of_even_if_its_spec_cannot_be_read(
    tmp_path: Path, theirs: str, lines: list[str]
) -> None:
    kube_job = {
        "metadata": {
            "name": "run-fedcba98-00000000",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {RUN: "run-fedcba98", NAME: "run"},
            "annotations": {SPEC_DIGEST: theirs},
        },
        "spec": {"template": {"spec": {"volumes": [{"name": "spec", "configMap": {"name": "theirs"}}]}}},
    }
    answers = {
        "GET /apis/batch/v1/namespaces/team/jobs": Answer(body={"items": [kube_job], "metadata": {}}),
        MAP: Answer(body={"data": {"spec.yaml": OTHER}}),
    }
    said: list[str] = []
    with served(tmp_path, answers) as (cluster, _):
        _tell_of_namesakes(cluster, SPEC, render(SPEC, PROFILE), said.append)
    assert said == lines
