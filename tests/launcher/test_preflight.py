"""What is known of a submission before anything is made: servers, dry runs, quota, limits, what is missing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.spec import parse
from launcher.capacity import needs, outside_of_limits, short_of_quota
from launcher.codes import NotAllowed, NotFound
from launcher.preflight import Findings, look, version_finding
from launcher.profile import Profile
from launcher.quantity import amount
from launcher.render import Rendered, render
from tests.launcher.api import Answer, Script, refusal, served

SPEC = {
    "name": "small",
    "model": "s3://training/models/tiny",
    "data": {"train": "s3://training/data/toy.jsonl"},
    "resources": {"cpu": "500m", "memory": "4Gi", "ephemeral_storage": "10Gi"},
}
PROFILE = {"namespace": "team", "image": "registry.example/tunejob:0", "store": {"output": "s3://training/runs"}}
CORE = "/api/v1/namespaces/team"
BATCH = "/apis/batch/v1/namespaces/team"
QUEUES = "/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues"


def rendered(profile: Mapping[str, Any] | None = None, **spec: Any) -> Rendered:
    """A run's objects; ``spec`` and ``profile`` change what stands above."""
    resources = SPEC["resources"] | spec.pop("resources", {})  # type: ignore[operator]
    text = yaml.safe_dump(SPEC | {"resources": resources} | spec)
    return render(parse(text, "spec"), Profile.model_validate(PROFILE | dict(profile or {})))


def found(folder: Path, run: Rendered, changes: Mapping[str, Answer] | None = None) -> tuple[Findings, Script]:
    """What a server of 1.37 says to a run; it takes everything, unless ``changes`` say otherwise."""
    kind = "cronjobs" if run.workload["kind"] == "CronJob" else "jobs"
    answers = {
        "GET /version": Answer(body={"major": "1", "minor": "37"}),
        "GET /api/v1/namespaces/team": Answer(body={"metadata": {"name": "team"}}),
        f"PATCH {CORE}/configmaps/{run.config_map['metadata']['name']}": Answer(body=run.config_map),
        f"PATCH {BATCH}/{kind}/{run.name}": Answer(body=run.workload),
        f"GET {CORE}/resourcequotas": Answer(body={"items": []}),
        f"GET {CORE}/limitranges": Answer(body={"items": []}),
        f"GET {CORE}/serviceaccounts/tunejob": Answer(body={"metadata": {"name": "tunejob"}}),
        "GET /api/v1/nodes": Answer(body={"items": []}),
    }
    with served(folder, answers | dict(changes or {})) as (cluster, script):
        return look(cluster, run), script


def without(run: Rendered, *names: str) -> Answer:
    """The answer of a server that drops fields of a Job in silence."""
    spec = {key: value for key, value in run.workload["spec"].items() if key not in names}
    return Answer(body=run.workload | {"spec": spec})


def test_a_run_that_nothing_stands_against_is_found_so_and_nothing_is_made(tmp_path: Path) -> None:
    findings, script = found(tmp_path, rendered())
    assert findings == Findings()
    writes = [path for method, path, _ in script.asked if method != "GET"]
    assert len(writes) == 2
    assert all("dryRun=All" in path for path in writes)


@pytest.mark.parametrize(
    ("version", "is_refused", "words"),
    [
        ((1, 30), True, ["1.30 is too old", "1.31 to 1.37", "podFailurePolicy"]),
        ((1, 31), False, []),
        ((1, 37), False, []),
        ((1, 38), False, ["1.38 is newer"]),
    ],
)
def test_servers_are_told_apart_by_their_version(version: tuple[int, int], is_refused: bool, words: list[str]) -> None:
    sentence, refused = version_finding(version)
    assert refused == is_refused
    assert bool(sentence) == bool(words)
    assert all(word in sentence for word in words)


def test_an_old_server_is_refused_and_a_vendors_minor_is_understood(tmp_path: Path) -> None:
    old, _ = found(tmp_path, rendered(), {"GET /version": Answer(body={"major": "1", "minor": "29+"})})
    assert ["1.29 is too old" in line for line in old.refusals] == [True]


@pytest.mark.parametrize("dropped", [("podFailurePolicy",), ("podReplacementPolicy",)])
def test_a_server_that_drops_what_a_run_relies_on_is_refused_by_name(tmp_path: Path, dropped: tuple[str, ...]) -> None:
    run = rendered()
    findings, _ = found(tmp_path, run, {f"PATCH {BATCH}/jobs/{run.name}": without(run, *dropped)})
    assert [line.startswith(f"this server drops {dropped[0]} from Jobs") for line in findings.refusals] == [True]


def test_a_schedule_is_looked_at_like_a_job(tmp_path: Path) -> None:
    run = rendered(scheduling={"cron": "0 3 * * *"})
    assert found(tmp_path, run)[0] == Findings()
    inner = run.workload["spec"]["jobTemplate"]
    spec = {key: value for key, value in inner["spec"].items() if key != "podFailurePolicy"}
    answer = run.workload | {"spec": run.workload["spec"] | {"jobTemplate": inner | {"spec": spec}}}
    findings, _ = found(tmp_path, run, {f"PATCH {BATCH}/cronjobs/{run.name}": Answer(body=answer)})
    assert "podFailurePolicy" in findings.refusals[0]


VIOLATES = 'would violate PodSecurity \\"restricted:latest\\": runAsNonRoot != true'


@pytest.mark.parametrize(
    ("namespace", "is_refused", "words"),
    [
        (Answer(body={"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}), True, "enforces"),
        (Answer(body={"metadata": {"labels": {"pod-security.kubernetes.io/warn": "restricted"}}}), False, "violates"),
        (
            refusal(403, 'namespaces is forbidden: User "ada" cannot get resource "namespaces"', "Forbidden"),
            False,
            "cannot be read",
        ),
    ],
    ids=["enforced", "warned of", "not known"],
)
def test_a_warning_of_pod_security_is_a_refusal_where_it_is_enforced(
    tmp_path: Path, namespace: Answer, is_refused: bool, words: str
) -> None:
    run = rendered()
    warned = Answer(body=run.workload, headers={"Warning": f'299 - "{VIOLATES}"'})
    changes = {f"PATCH {BATCH}/jobs/{run.name}": warned, "GET /api/v1/namespaces/team": namespace}
    findings, _ = found(tmp_path, run, changes)
    assert bool(findings.refusals) == is_refused
    assert any(words in line and "runAsNonRoot" in line for line in findings.refusals + findings.warnings)


def test_other_warnings_are_passed_on(tmp_path: Path) -> None:
    run = rendered()
    warned = Answer(body=run.workload, headers={"Warning": '299 - "metadata.name: too long"'})
    findings, _ = found(tmp_path, run, {f"PATCH {BATCH}/jobs/{run.name}": warned})
    assert findings.warnings == ["the cluster warns: metadata.name: too long"]


def test_a_webhook_that_says_no_to_the_dry_run_is_a_refusal(tmp_path: Path) -> None:
    run = rendered()
    no = refusal(400, 'admission webhook "corp.gpu" denied the request: label team is missing', "BadRequest")
    findings, _ = found(tmp_path, run, {f"PATCH {BATCH}/jobs/{run.name}": no})
    assert len(findings.refusals) == 1
    assert "label team is missing" in findings.refusals[0]


def test_a_job_that_the_cluster_suspends_unasked_is_told(tmp_path: Path) -> None:
    run = rendered()
    taken_in = Answer(body=run.workload | {"spec": run.workload["spec"] | {"suspend": True}})
    findings, _ = found(tmp_path, run, {f"PATCH {BATCH}/jobs/{run.name}": taken_in})
    assert "suspends it although no queue is named" in findings.warnings[0]


def test_a_namespace_that_is_not_there_ends_the_look(tmp_path: Path) -> None:
    absent = refusal(404, 'namespaces "team" not found', "NotFound", kind="namespaces")
    with pytest.raises(NotFound, match="no namespace team"):
        found(tmp_path, rendered(), {"GET /api/v1/namespaces/team": absent})


def test_one_who_may_not_apply_is_told_at_once(tmp_path: Path) -> None:
    run = rendered()
    denied = refusal(403, 'User "ada" cannot patch resource "jobs" in API group "batch"', "Forbidden")
    with pytest.raises(NotAllowed, match="ada may not patch jobs"):
        found(tmp_path, run, {f"PATCH {BATCH}/jobs/{run.name}": denied})


def test_what_may_not_be_read_is_a_warning_that_names_the_permission(tmp_path: Path) -> None:
    plurals = ("resourcequotas", "limitranges")
    denied = {
        f"GET {CORE}/{plural}": refusal(403, f'User "ada" cannot list resource "{plural}"', "Forbidden")
        for plural in plurals
    }
    findings, _ = found(tmp_path, rendered(), denied)
    assert findings.refusals == []
    assert [f"ada may not list {plural}" in line for plural, line in zip(plurals, findings.warnings, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("queues", "words"),
    [
        (Answer(body={"items": [{"metadata": {"name": "gpus"}}]}), []),
        (Answer(body={"items": [{"metadata": {"name": "other"}}]}), ["no LocalQueue gpus", "there are other"]),
        (Answer(body={"items": []}), ["no LocalQueue gpus", "there is none"]),
        (Answer(404, b"404 page not found\n"), ["gpus is asked for", "no Kueue"]),
    ],
)
def test_a_queue_has_to_be_there(tmp_path: Path, queues: Answer, words: list[str]) -> None:
    findings, _ = found(tmp_path, rendered({"queue": "gpus"}), {f"GET {QUEUES}": queues})
    assert len(findings.refusals) == bool(words)
    assert all(word in findings.refusals[0] for word in words)


def test_a_service_account_and_a_ca_that_are_missing_are_refused_together(tmp_path: Path) -> None:
    run = rendered({"store": {"output": "s3://training/runs", "ca_config_map": "corp-ca"}})
    gone = refusal(404, 'serviceaccounts "tunejob" not found', "NotFound", kind="serviceaccounts")
    findings, _ = found(tmp_path, run, {f"GET {CORE}/serviceaccounts/tunejob": gone})
    assert ["ServiceAccount tunejob" in findings.refusals[0], "ConfigMap corp-ca" in findings.refusals[1]] == [
        True,
        True,
    ]


def test_gpus_that_no_node_has_are_a_warning(tmp_path: Path) -> None:
    nodes = {"GET /api/v1/nodes": Answer(body={"items": [{"status": {"allocatable": {"nvidia.com/gpu": "1"}}}]})}
    for gpus, is_warned in ((1, False), (2, True)):
        findings, _ = found(tmp_path, rendered(resources={"gpus": gpus}), nodes)
        assert findings.refusals == []
        assert [f"no node has {gpus} nvidia.com/gpu" in line for line in findings.warnings] == [True] * is_warned


def test_one_who_may_not_see_nodes_is_not_bothered_with_that(tmp_path: Path) -> None:
    denied = {"GET /api/v1/nodes": refusal(403, 'User "ada" cannot list resource "nodes"', "Forbidden")}
    assert found(tmp_path, rendered(resources={"gpus": 1}), denied)[0] == Findings()


def quota(hard: Mapping[str, str], used: Mapping[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """A ResourceQuota as the server has it."""
    return {"metadata": {"name": "q"}, "spec": {"hard": hard, **spec}, "status": {"hard": hard, "used": used or {}}}


@pytest.mark.parametrize(
    ("one", "lasting", "words"),
    [
        (quota({"requests.memory": "4Gi"}), [], ""),
        (quota({"requests.memory": "3Gi"}), [True], "requests.memory 4Gi asked, 3Gi is all there is"),
        (quota({"memory": "6Gi"}, {"memory": "3Gi"}), [False], "memory 4Gi asked, 3Gi of 6Gi in use"),
        (quota({"requests.cpu": "400m"}), [True], "requests.cpu 0.5 asked"),
        (quota({"limits.cpu": "1"}), [True], "limits.cpu 2 asked"),
        (quota({"requests.ephemeral-storage": "1Gi"}), [True], "requests.ephemeral-storage 11Gi asked"),
        (quota({"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "7"}), [False], "2 asked, 7 of 8 in use"),
        (quota({"count/jobs.batch": "5"}, {"count/jobs.batch": "5"}), [True], "delete finished runs"),
        (quota({"pods": "3"}, {"pods": "3"}), [False], "pods 1 asked, 3 of 3 in use"),
        (quota({"count/secrets": "0"}), [], ""),
        (quota({"pods": "0"}, scopes=["Terminating"]), [], ""),
        (quota({"pods": "0"}, scopes=["NotBestEffort"]), [True], "pods 1 asked"),
    ],
)
def test_quota_is_counted_as_the_server_counts(one: dict[str, Any], lasting: list[bool], words: str) -> None:
    short = list(short_of_quota(rendered(resources={"gpus": 2}).workload, [one]))
    assert [entry.is_lasting for entry in short] == lasting
    assert all(words in entry.sentence for entry in short)


def test_a_claim_is_counted_as_storage() -> None:
    run = rendered({"scratch": {"storage_class": "fast"}})
    asked = needs(run.workload)
    assert (asked["requests.storage"], asked["persistentvolumeclaims"]) == (amount("10Gi"), 1)


def limits(kind: str, **bounds: Mapping[str, str]) -> dict[str, Any]:
    """A LimitRange."""
    return {"metadata": {"name": "l"}, "spec": {"limits": [{"type": kind, **bounds}]}}


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (limits("Container", max={"memory": "4Gi"}), ""),
        (limits("Container", max={"memory": "3Gi"}), "at most 3Gi of memory, and this one's limit is 4Gi"),
        (limits("Pod", max={"memory": "3Gi"}), "a pod may have at most 3Gi"),
        (limits("Container", min={"cpu": "500m"}), ""),
        (limits("Container", min={"cpu": "1"}), "at least 1 of cpu, and this one asks for 0.5"),
        (limits("Container", maxLimitRequestRatio={"cpu": "4"}), ""),
        (limits("Container", maxLimitRequestRatio={"cpu": "3"}), "factor of 3, and these by 4"),
        (limits("PersistentVolumeClaim", max={"storage": "1Gi"}), ""),
    ],
)
def test_limits_are_compared_as_the_server_compares(one: dict[str, Any], words: str) -> None:
    sentences = list(outside_of_limits(rendered().workload, [one]))
    assert len(sentences) == bool(words)
    assert all(words in sentence and "LimitRange l" in sentence for sentence in sentences)
