"""A Job and its pods are read as a run: its state, its attempts, its last word."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import find, runs, show
from launcher.codes import NoRun, NotFound, Refused
from launcher.labels import fire_id
from launcher.runs import Run
from tests.launcher.api import Answer, refusal, served

JOBS = "GET /apis/batch/v1/namespaces/team/jobs"
CRON_JOBS = "GET /apis/batch/v1/namespaces/team/cronjobs"
PODS = "GET /api/v1/namespaces/team/pods"
NOTHING = Answer(body={"items": [], "metadata": {}})


def kube_job(name: str = "run-1a2b3c4d-00000000", minute: int = 0, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "creationTimestamp": f"2026-01-01T00:{minute:02}:00Z",
            "labels": {"tunejob.dev/run": name[:-9]},
            "annotations": {"tunejob.dev/output": "s3://bucket/runs/"},
        },
        "spec": {"template": {"spec": {"volumes": [{"name": "spec", "configMap": {"name": "the-spec"}}]}}},
        "status": status,
    }


def pod(name: str, minute: int, phase: str, **terminated: Any) -> dict[str, Any]:
    state = {"terminated": terminated} if terminated else {}
    status = {"phase": phase, "containerStatuses": [{"state": state}]}
    return {"metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:{minute:02}:00Z"}, "status": status}


def holds(kind: str, **more: str) -> dict[str, str]:
    return {"type": kind, "status": "True", **more}


@pytest.mark.parametrize(
    ("status", "pods", "state"),
    [
        ({}, [], "pending"),
        ({"active": 1, "ready": 0}, [pod("p", 1, "Pending")], "pending"),
        ({"active": 1, "ready": 1}, [], "running"),
        ({"active": 1}, [pod("p", 1, "Running")], "running"),
        ({"active": 0}, [pod("p", 1, "Succeeded", exitCode=0)], "running"),
        ({"conditions": [holds("Suspended"), holds("Complete")]}, [], "complete"),
        ({"conditions": [holds("Failed", reason="DeadlineExceeded"), holds("Suspended")]}, [], "failed"),
        ({"conditions": [{"type": "Failed", "status": "False"}], "ready": 1}, [], "running"),
        ({"conditions": [holds("FailureTarget")], "ready": 1}, [pod("p", 1, "Running")], "running"),
    ],
)
def test_the_state_is_told_by_the_conditions_that_hold_not_by_the_last(
    status: dict[str, Any], pods: list[dict[str, Any]], state: str
) -> None:
    assert runs.of(kube_job(**status), pods).state == state


def test_a_suspended_job_is_queued_and_one_that_is_being_deleted_says_so() -> None:
    suspended = kube_job()
    suspended["spec"]["suspend"] = True
    assert runs.of(suspended).state == "queued"
    suspended["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    assert runs.of(suspended).state == "deleting"


def test_attempts_are_in_the_order_of_their_pods_and_the_digest_is_of_the_one_that_succeeded() -> None:
    word = json.dumps({"run": "r", "code": 0, "manifest_sha256": "ab"})
    found = runs.of(
        kube_job(),
        [
            pod("c", 3, "Succeeded", exitCode=0, reason="Completed", message=word),
            pod("a", 1, "Failed", exitCode=137, reason="OOMKilled"),
            pod("b", 2, "Failed", exitCode=1, reason="Error", message="no JSON"),
        ],
    )
    assert [(one.pod, one.code, one.reason) for one in found.pods] == [
        ("a", 137, "OOMKilled"),
        ("b", 1, "Error"),
        ("c", 0, "Completed"),
    ]
    assert [dict(one.word) for one in found.pods[:2]] == [{}, {}]
    assert found.digest == "ab"
    assert found.output == f"s3://bucket/runs/{found.id}"
    assert found.config_map == "the-spec"


@pytest.mark.parametrize("phase", ["Succeeded", "Running"])
def test_a_container_that_was_put_beside_ours_tells_nothing_of_the_run(phase: str) -> None:
    word = json.dumps({"run": "r", "code": 0, "manifest_sha256": "ab"})
    beside = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 1, "reason": "OOMKilled"}}}
    ours = {"terminated": {"exitCode": 0, "message": word}} if phase == "Succeeded" else {"running": {}}
    manifest = pod("a", 1, phase)
    manifest["status"]["containerStatuses"] = [beside, {"name": "tunejob", "state": ours}]
    manifest["spec"] = {"containers": [{"name": "istio-proxy"}, {"name": "tunejob", "image": "i"}]}
    attempt = runs.of(kube_job(), [manifest]).pods[0]
    assert (attempt.code, attempt.has_begun) == (0 if phase == "Succeeded" else None, True)
    assert attempt.reason != "OOMKilled"
    assert attempt.container["image"] == "i"
    assert runs.of(kube_job(), [manifest]).digest == ("ab" if phase == "Succeeded" else "")


def test_a_server_whose_clock_is_ahead_makes_no_negative_duration() -> None:
    assert show.seconds(runs.of(kube_job(startTime="2099-01-01T00:00:00Z"))) == 0


def test_each_fire_of_a_schedule_is_a_run_of_its_own() -> None:
    fire = kube_job("nightly-29000000")
    fire["metadata"]["labels"] = {"tunejob.dev/run": "nightly-1a2b3c4d", "tunejob.dev/per-fire": "true"}
    assert Run(fire).id == fire_id("nightly-1a2b3c4d", "nightly-29000000")
    assert Run(fire).output.endswith(Run(fire).id)


def answers(*jobs: dict[str, Any]) -> dict[str, Answer | list[Answer]]:
    everything = Answer(body={"items": list(jobs), "metadata": {}})
    return {JOBS: [NOTHING, everything], CRON_JOBS: NOTHING, PODS: NOTHING}


@pytest.mark.parametrize("name", ["run-1a2b3c4d-00000000", "run-1a", "run-1a2b3c4d"])
def test_a_run_is_found_by_its_jobs_name_and_by_the_beginning_of_its_id(tmp_path: Path, name: str) -> None:
    jobs = answers(kube_job(minute=1), kube_job("run-1a2b3c4d-11111111", 2), kube_job("other-1a2b3c4d-22222222"))
    with served(tmp_path, jobs) as (cluster, _):
        found = find.by_name(cluster, name)
    assert found.id == "run-1a2b3c4d"
    assert found.job == ("run-1a2b3c4d-00000000" if name.endswith("-00000000") else "run-1a2b3c4d-11111111")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r", ["fits several runs", "run-1a2b3c4d, run-5e6f7a8b"]),
        ("rum-1a2b3c4d", ["no run rum-1a2b3c4d in namespace team", "near it: run-1a2b3c4d"]),
        ("zzz", ["no run zzz", "tunejob list"]),
    ],
)
def test_a_name_that_fits_none_or_several_is_refused_with_those_it_may_mean(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    with (
        served(tmp_path, answers(kube_job(), kube_job("run-5e6f7a8b-00000000"))) as (cluster, _),
        pytest.raises((NoRun, Refused)) as caught,
    ):
        find.by_name(cluster, name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_empty_list_in_a_namespace_that_is_not_there_says_so(tmp_path: Path) -> None:
    absent = {"GET /api/v1/namespaces/team": refusal(404, 'namespaces "team" not found', "NotFound", kind="namespaces")}
    with served(tmp_path, answers() | absent) as (cluster, _), pytest.raises(NotFound, match="no namespace team"):
        runs.listed(cluster)


def test_a_run_whose_job_was_made_anew_is_gone(tmp_path: Path) -> None:
    run = Run(kube_job())
    other = kube_job()
    other["metadata"]["uid"] = "another"
    with served(tmp_path, {f"{JOBS}/{run.job}": Answer(body=other), PODS: NOTHING}) as (cluster, _):
        assert runs.refreshed(cluster, run) is None


def test_a_status_shows_progress_while_it_runs_and_the_last_word_afterwards() -> None:
    running = runs.of(kube_job(ready=1, startTime="2026-01-01T00:01:00Z"), [pod("a", 1, "Running")])
    shown = show.status(running, {"phase": "train", "step": 3, "steps": 6, "loss": 1.5, "message": ""})
    assert (shown["state"], shown["phase"], shown["step"], shown["loss"]) == ("running", "train", 3, 1.5)
    word = json.dumps({"code": 66, "phase": "pull", "message": "data.train: absent"})
    failed = runs.of(
        kube_job(conditions=[holds("Failed", reason="PodFailurePolicy", lastTransitionTime="2026-01-01T00:09:00Z")]),
        [pod("a", 1, "Failed", exitCode=66, reason="Error", message=word)],
    )
    shown = show.status(failed, {})
    assert (shown["state"], shown["reason"], shown["message"]) == ("failed", "PodFailurePolicy", "data.train: absent")
    for form in show.FORMATS:
        assert "data.train: absent" in show.as_text(shown, form)
        assert show.as_text([show.listed(failed)], form)
    assert json.loads(show.as_text([shown], "json")) == [shown]
