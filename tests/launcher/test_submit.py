"""What a submission says, what it takes back, and how it is left. The rest of it is tested on a cluster."""

from pathlib import Path
from typing import Any

import pytest

import tunejob
from job.spec import digest, parse
from launcher import submit
from launcher.codes import Code
from launcher.labels import NAME, RUN, SPEC_DIGEST
from launcher.profile import Profile
from launcher.render import render
from launcher.submit import _tell_of_namesakes
from tests.bench.stub import Refusal
from tests.launcher.api import Answer, served
from tests.launcher.kit import CRON, Kit, rbac

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


def test_a_job_that_only_the_real_apply_refuses_takes_its_config_map_along(kit: Kit) -> None:
    kit.refuse("APPLY jobs", 403, rbac("create", "jobs"))
    said = kit.cli("submit", kit.spec(), "-d")
    assert (said.code, "may not create jobs" in said.err) == (Code.CLUSTER, True), said.err
    assert kit.objects.asked["APPLY configmaps"] == 2, "the dry run and the real one"
    assert kit.objects.names("configmaps") == []


def test_a_changed_schedule_that_is_refused_leaves_the_one_before_and_nothing_else(kit: Kit) -> None:
    kit.submitted(kit.spec(scheduling=CRON))
    before = kit.objects.names("configmaps")
    kit.refuse("APPLY cronjobs", 403, 'admission webhook "x" denied the request: no')
    assert kit.cli("submit", kit.spec(scheduling=CRON, training={"epochs": 2}), "-d").code == Code.REFUSED
    assert kit.objects.names("configmaps") == before


def test_what_another_submits_meanwhile_is_not_taken_from_him(kit: Kit) -> None:
    spec = kit.spec()
    forbidden = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": rbac("create", "jobs")}
    absent = {"kind": "Status", "code": 404, "reason": "NotFound", "message": "not found"}
    steps = ["APPLY jobs", "GET jobs"]  # of the one who is refused: his real apply, and his look afterwards

    def meanwhile(asked: str, name: str) -> Refusal | None:
        if kit.objects.asked["APPLY jobs"] < 2 or [asked] != steps[:1]:
            return None
        steps.pop(0)
        if asked == "APPLY jobs":
            return 403, forbidden
        assert kit.cli("submit", spec, "-d").code == Code.OK  # the other one
        return 404, absent

    kit.objects.refuse = meanwhile
    assert kit.cli("submit", spec, "-d").code == Code.CLUSTER
    assert (len(kit.objects.names("jobs")), len(kit.objects.names("configmaps"))) == (1, 1)


@pytest.mark.parametrize("profile", ["", "tunejob.profile.yaml"], ids=["usual profile", "named profile"])
def test_ctrl_c_while_the_first_pod_is_awaited_names_the_run_and_the_way_back(
    kit: Kit, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_await_first_pod", interrupted)
    said = kit.cli("submit", kit.spec(), *(["-p", profile] if profile else []))
    (job,) = kit.objects.names("jobs")
    first, last = said.err.splitlines()
    option = f" -p {profile}" if profile else ""
    assert said.code == Code.DETACHED
    assert first == f"{job[:-9]}: submitted as Job {job} (context stub, namespace bench)"
    assert last.startswith(f"interrupted; what was made goes on. tunejob status{option} {job[:-9]} shows it")
    assert f"tunejob cancel{option} {job[:-9]} ends it" in last


def test_on_a_terminal_the_way_back_stands_on_a_line_of_its_own(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(submit, "_await_first_pod", interrupted)
    assert "\n\ninterrupted; what was made goes on." in kit.cli("submit", kit.spec()).err


def test_commands_that_a_failure_names_ask_the_cluster_that_was_asked(kit: Kit) -> None:
    said = kit.cli("status", "absent", "-p", "tunejob.profile.yaml")
    assert "tunejob list -p tunejob.profile.yaml shows those" in said.err
    assert "tunejob list shows those" in kit.cli("status", "absent").err


def test_what_a_submission_was_told_is_on_the_record_from_python_too(kit: Kit) -> None:
    quota = {"metadata": {"name": "small"}, "status": {"hard": {"pods": "1"}, "used": {"pods": "1"}}}
    kit.objects.put("resourcequotas", {"kind": "ResourceQuota", **quota})
    submitted = tunejob.submit(kit.spec())
    assert submitted.is_new
    assert [line for line in submitted.remarks if "small" in line], submitted.remarks
    assert tunejob.submit(kit.spec()).remarks == ()
