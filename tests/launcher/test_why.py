"""The table of causes, on what a real API server (1.37) said of runs in trouble: troubles.json, trimmed."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.errors import TemporaryFailure
from job.exits import EXITS, ExitCode
from job.status import Status
from launcher import runs
from launcher.causes.cause import Cause
from launcher.causes.ending import REMEDIES, of_code
from launcher.causes.evidence import Evidence, gather, heard
from launcher.codes import Code
from launcher.why import diagnose, reference, startup_problem
from tests.launcher.api import Answer, refusal, served

ROOT = Path(__file__).resolve().parents[2]
TROUBLES = json.loads((Path(__file__).parent / "troubles.json").read_text(encoding="utf-8"))
RESOURCES = {"limits": {"memory": "2Gi"}, "requests": {"memory": "2Gi"}}


def seen(name: str, **more: Any) -> Evidence:
    """The evidence of one of the recorded troubles."""
    trouble = TROUBLES[name]
    return Evidence(runs.of(trouble["job"], trouble["pods"]), heard(trouble["events"]), **more)


def kube_job(*conditions: str, **spec: Any) -> dict[str, Any]:
    """A Job with conditions that hold, as ``type`` or ``type:reason``."""
    labels = {"tunejob.dev/run": "run-1"} | spec.pop("labels", {})
    split = [one.partition(":") for one in conditions]
    return {
        "kind": "Job",
        "apiVersion": "batch/v1",
        "metadata": {
            "name": "run-1-abc",
            "namespace": "team",
            "uid": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
        },
        "spec": {"activeDeadlineSeconds": 86400, "template": {"spec": {}}} | spec,
        "status": {"conditions": [{"type": kind, "status": "True", "reason": reason} for kind, _, reason in split]},
    }


def pod(phase: str, state: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A pod of it, whose container is in a state."""
    metadata = {"name": "run-1-abc-x", "uid": "2", "creationTimestamp": "2026-01-01T00:00:01Z"}
    status = {"phase": phase, "containerStatuses": [{"name": "tunejob", "state": state or {}}]}
    return {
        "metadata": metadata | more.pop("metadata", {}),
        "spec": {"nodeName": "node1", "containers": [{"name": "tunejob", "image": "i", "resources": RESOURCES}]},
        "status": status | more,
    }


def left(code: int, message: str = "", **word: Any) -> dict[str, Any]:
    """The state of a container that left with a code and a termination message."""
    said = json.dumps({"code": code, "message": message} | word) if message or word else ""
    return {"terminated": {"exitCode": code, "reason": "Error", "message": said}}


@pytest.mark.parametrize(
    ("trouble", "name", "words", "remedy", "code"),
    [
        ("noimage", "image", ["localhost/no-such:1", "node1", "connection refused"], "registry", 7),
        ("badname", "image-name", ["localhost/NO such:1"], "profile", 7),
        ("never", "image-not-here", ["localhost/no-such:1", "node1"], "load it", 7),
        ("pullsecret", "pull-secret", ["absentpull", "team"], "docker-registry", 7),
        ("nosecret", "secret", ["Secret absent", "team"], "create secret generic absent", 7),
        ("envsecret", "secret", ["Secret absent", "team"], "create secret generic absent", 7),
        ("nocm", "config-map", ["ConfigMap absent"], "create configmap absent", 7),
        ("envcm", "config-map", ["ConfigMap absent"], "create configmap absent", 7),
        ("nosecretkey", "key", ["Secret there", "no key absent"], "describe secret there", 7),
        ("envkey", "key", ["Secret there", "no key absent"], "describe secret there", 7),
        ("nosa", "service-account", ["ServiceAccount absent"], "create serviceaccount absent", 5),
        ("psa", "pod-security", ["restricted", "allowPrivilegeEscalation != false"], "tunejob renders", 5),
        ("quota", "quota", ["small", "requests.memory 64Mi asked, 0 of 32Mi in use"], "requests.memory 32Mi", 5),
        ("limits", "limit-range", ["maximum memory usage per Container is 32Mi"], "describe limitrange", 5),
        ("nopvc", "claim", ['persistentvolumeclaim "absent"'], "get pvc", 7),
        ("ephpvc", "claim", ["StorageClass absent"], "scratch.storage_class", 7),
    ],
)
def test_what_keeps_a_run_from_starting_is_named_with_a_remedy(
    trouble: str, name: str, words: list[str], remedy: str, code: int
) -> None:
    first = diagnose(seen(trouble))[0]
    assert (first.name, first.code) == (name, code)
    assert all(word in first.sentence for word in words), first.sentence
    assert remedy in first.remedy
    assert first.seen
    assert startup_problem(seen(trouble)) == first


@pytest.mark.parametrize(
    ("trouble", "words", "remedy"),
    [
        ("gpu", ["1 node: too little nvidia.com/gpu, 1 asked"], "resources.gpus"),
        ("bigmem", ["too little memory, 4000Gi asked"], "resources.memory"),
        ("bigcpu", ["too little cpu, 900 asked"], "resources.cpu"),
        ("bigdisk", ["too little ephemeral-storage, 900Ti asked"], "resources.ephemeral_storage"),
        ("selector", ["1 node: without the labels"], "node_selector"),
        ("affinity", ["1 node: without the labels"], "node_selector"),
    ],
)
def test_what_no_node_can_take_is_said_in_words_and_may_pass(trouble: str, words: list[str], remedy: str) -> None:
    first = diagnose(seen(trouble))[0]
    assert first.name == "placement"
    assert all(word in first.sentence for word in words), first.sentence
    assert remedy in first.remedy
    assert startup_problem(seen(trouble)) is None


def test_of_the_nodes_the_largest_is_named() -> None:
    nodes = tuple({"status": {"allocatable": {"memory": f"{size}Gi"}}} for size in (8, 32, 16))
    assert "the largest has 32.0Gi in all" in diagnose(seen("bigmem", nodes=nodes))[0].sentence
    assert "none has any" in diagnose(seen("gpu", nodes=nodes))[0].sentence


def test_every_reason_of_the_scheduler_is_said() -> None:
    waiting = pod("Pending")
    waiting["spec"]["nodeName"] = ""
    waiting["status"]["conditions"] = [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/9 nodes are available: 2 Insufficient cpu, 2 node(s) had untolerated taint {gpu: a100}, "
            "3 node(s) were unschedulable, 1 Too many pods, 1 node(s) didn't match Pod's node affinity/selector. "
            "preemption: 0/9 nodes are available: 9 Preemption is not helpful for scheduling.",
        }
    ]
    first = diagnose(Evidence(runs.of(kube_job(), [waiting])))[0]
    for words in ("2 nodes: too little cpu", "2 nodes: a taint that", "{gpu: a100}", "3 nodes: cordoned", "1 node: as"):
        assert words in first.sentence, first.sentence
    assert "tolerations" in first.remedy


def test_a_registry_that_is_away_for_a_moment_is_borne() -> None:
    trouble = json.loads(json.dumps(TROUBLES["noimage"]))
    for event in trouble["events"]:
        event["count"] = 1
    evidence = Evidence(runs.of(trouble["job"], trouble["pods"]), heard(trouble["events"]))
    assert diagnose(evidence)[0].name == "image"
    assert startup_problem(evidence) is None
    for event in trouble["events"]:
        event["message"] = event["message"].replace("connect: connection refused", "pull access denied")
    denied = Evidence(runs.of(trouble["job"], trouble["pods"]), heard(trouble["events"]))
    problem = startup_problem(denied)
    assert problem is not None
    assert "pull_secrets" in problem.remedy


def test_without_events_a_registry_is_given_a_minute() -> None:
    trouble = TROUBLES["noimage"]
    born = datetime.fromisoformat(trouble["pods"][0]["metadata"]["creationTimestamp"])
    for seconds, is_over in ((30, False), (90, True)):
        evidence = Evidence(runs.of(trouble["job"], trouble["pods"]), now=born + timedelta(seconds=seconds))
        assert (startup_problem(evidence) is not None) == is_over


def test_a_quota_that_others_fill_may_pass() -> None:
    trouble = json.loads(json.dumps(TROUBLES["quota"]))
    message = (
        'Error creating: pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=4, '
        "used: requests.nvidia.com/gpu=6, limited: requests.nvidia.com/gpu=8"
    )
    trouble["events"] = [trouble["events"][-1] | {"message": message}]
    evidence = Evidence(runs.of(trouble["job"], []), heard(trouble["events"]))
    first = diagnose(evidence)[0]
    assert "4 asked, 6 of 8 in use" in first.sentence
    assert "when others end" in first.remedy
    assert startup_problem(evidence) is None


REFUSED = "Error creating: "


@pytest.mark.parametrize(
    ("message", "name", "words"),
    [
        (
            REFUSED + 'admission webhook "gpu.corp" denied the request: label team is missing',
            "admission",
            ["gpu.corp", "label team is missing"],
        ),
        (
            REFUSED + "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: no",
            "admission",
            ["gpus", "no"],
        ),
        (
            REFUSED + 'pods "x" is forbidden: no PriorityClass with name urgent was found',
            "priority",
            ["urgent"],
        ),
        (
            REFUSED + 'pods "x" is forbidden: failed quota: cpu: must specify limits.cpu for: tunejob',
            "quota",
            ["cpu", "limits.cpu for: tunejob"],
        ),
        (REFUSED + 'Internal error occurred: failed calling webhook "x": connection refused', "not-made", ["webhook"]),
    ],
)
def test_what_admission_says_is_passed_on(message: str, name: str, words: list[str]) -> None:
    event = TROUBLES["nosa"]["events"][-1] | {"message": message}
    evidence = Evidence(runs.of(TROUBLES["nosa"]["job"], []), heard([event]))
    first = diagnose(evidence)[0]
    assert (first.name, first.code) == (name, Code.REFUSED)
    assert all(word in first.sentence for word in words), first.sentence
    assert (startup_problem(evidence) is None) == (name == "not-made")


def test_a_refusal_that_a_later_pod_has_overcome_is_not_told() -> None:
    trouble = TROUBLES["nosa"]
    later = pod("Running", {"running": {}}, metadata={"creationTimestamp": "2036-01-01T00:00:00Z"})
    evidence = Evidence(runs.of(trouble["job"], [later]), heard(trouble["events"]))
    assert [cause.name for cause in diagnose(evidence)] == ["running"]


@pytest.mark.parametrize(
    ("trouble", "name", "words", "remedy"),
    [
        ("oom", "memory", ["memory", "64Mi"], "resources.memory"),
        ("exit66", "noinput", ["data.train: nothing", "66"], "retry exit66"),
        ("exit1", "crash", ["unclassified", "(1, CRASH)"], "tunejob logs exit1"),
        ("evict", "evicted", ['EmptyDir volume "v" exceeds', "node1"], "ephemeral_storage"),
        ("ephem", "evicted", ["ephemeral local storage", "2Mi"], "ephemeral_storage"),
        ("nocommand", "not-started", ["/nothing"], "profile"),
        ("deadline", "deadline", ["5 s"], "deadline_seconds"),
        ("psa-late", "deadline", ["600 s"], "why it did not start"),
    ],
)
def test_how_a_run_ended_is_named_with_a_remedy(trouble: str, name: str, words: list[str], remedy: str) -> None:
    causes = diagnose(seen(trouble))
    assert [cause.name for cause in causes] == [name]
    assert causes[0].code == Code.JOB_FAILED
    assert all(word in causes[0].sentence for word in words), causes[0].sentence
    assert remedy in causes[0].remedy
    assert any(line.startswith("Job ") for line in causes[0].seen)


def test_an_eviction_that_looks_like_sigkill_is_not_put_down_to_memory() -> None:
    evicted = TROUBLES["ephem"]["pods"][0]["status"]
    assert evicted["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137
    assert diagnose(seen("ephem"))[0].name == "evicted"


def test_a_deadline_that_passed_before_the_start_shows_what_stood_in_the_way() -> None:
    assert any("violates PodSecurity" in line for line in diagnose(seen("psa-late"))[0].seen)


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_code_of_the_contract_has_a_meaning_and_a_remedy(code: ExitCode) -> None:
    cause = of_code(code, "", "run-1", ())
    assert EXITS[code].meaning in cause.sentence
    assert cause.remedy == REMEDIES[code].replace("RUN", "run-1")


@pytest.mark.parametrize(
    ("failed", "name", "word"),
    [
        (pod("Failed", left(77, "credentials refused", step=3)), "noperm", "credentials refused (77, NOPERM)"),
        (pod("Failed", left(137, "rank-0 was ended by the kernel", name="MEMORY")), "memory", "2Gi): rank-0"),
        (pod("Failed", left(137)), "killed", "SIGKILL"),
        (pod("Failed", left(3)), "ended", "with 3"),
        (
            pod("Failed", reason="UnexpectedAdmissionError", message="Allocate failed: no GPU left"),
            "ended",
            "no GPU left",
        ),
        (
            pod(
                "Failed",
                left(143),
                conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            ),
            "disrupted",
            "higher priority",
        ),
        (
            pod("Failed", left(137), reason="Evicted", message="The node was low on resource: memory. Threshold ..."),
            "evicted",
            "low on resource: memory",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_last_pods_own_words_come_before_the_controllers(failed: dict[str, Any], name: str, word: str) -> None:
    job = kube_job("Failed:BackoffLimitExceeded")
    first = diagnose(Evidence(runs.of(job, [failed])))[0]
    assert first.name == name
    assert word in first.sentence, first.sentence


def told(*ledger: dict[str, Any], **status: Any) -> Any:
    """What a store tells of a run."""
    return lambda: (Status("run-1", 1, status.pop("phase", "train"), **status), list(ledger))


GONE = Evidence(runs.of(kube_job("Failed:BackoffLimitExceeded")))


@pytest.mark.parametrize(
    ("ask", "name", "words"),
    [
        (told({"attempt": 2, "exit_code": 66, "message": "no model there"}), "noinput", ["no model there", "66"]),
        (told({"attempt": 2, "exit_code": 75, "job": "run-1-abc"}), "tempfail", ["75"]),
        (told({"attempt": 2}, step=40, steps=90), "vanished", ["train", "step 40"]),
        (told({"attempt": 1, "exit_code": 66, "job": "another-job"}), "pods-gone", ["pods are gone"]),
        (lambda: None, "pods-gone", ["pods are gone"]),
        (None, "pods-gone", ["pods are gone"]),
    ],
)
def test_when_the_pods_are_gone_the_store_is_asked(ask: Any, name: str, words: list[str]) -> None:
    first = diagnose(GONE, ask)[0]
    assert first.name == name
    assert all(word in first.sentence for word in words), first.sentence


def test_a_store_that_cannot_be_asked_is_a_line_of_evidence() -> None:
    def away() -> None:
        raise TemporaryFailure("http://store: no answer")

    first = diagnose(GONE, away)[0]
    assert first.name == "pods-gone"
    assert any("http://store: no answer" in line for line in first.seen)


def test_the_store_is_asked_only_where_the_cluster_is_silent() -> None:
    def never() -> None:
        raise AssertionError("asked")

    for trouble in ("oom", "noimage", "exit66"):
        diagnose(seen(trouble), never)


QUEUED = {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}, "suspend": True}


def workload(*conditions: dict[str, str], active: bool = True) -> dict[str, Any]:
    """Kueue's record of the Job."""
    return {"metadata": {"name": "job-x"}, "spec": {"active": active}, "status": {"conditions": list(conditions)}}


RESERVED = {
    "type": "QuotaReserved",
    "status": "False",
    "reason": "Pending",
    "message": "couldn't assign flavors: 8 more",
}
EVICTED = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted to accommodate another"}


@pytest.mark.parametrize(
    ("known", "name", "words", "is_lasting"),
    [
        ({"workload": workload(RESERVED)}, "queued", ["queue gpus", "couldn't assign flavors"], False),
        # The newest condition does not stand last.
        ({"workload": workload(EVICTED, RESERVED)}, "queued", ["Preempted to accommodate"], False),
        ({"has_queue": False}, "no-queue", ["no LocalQueue gpus", "team"], True),
        ({"has_queue": False, "has_kueue": False}, "no-queue", ["no Kueue"], True),
        ({"workload": workload(EVICTED | {"message": "exceeds the maximum execution time"}, active=False)},
         "deactivated", ["maximum execution time"], True),
    ],
)  # fmt: skip
def test_a_run_in_a_queue_says_what_it_waits_for(
    known: dict[str, Any], name: str, words: list[str], is_lasting: bool
) -> None:
    evidence = Evidence(runs.of(kube_job(**json.loads(json.dumps(QUEUED)))), **known)
    first = diagnose(evidence)[0]
    assert first.name == name
    assert all(word in first.sentence for word in words), first.sentence
    assert (startup_problem(evidence) is not None) == is_lasting


def test_a_pod_that_outlives_its_grace_on_a_node_that_does_not_answer_is_named_first() -> None:
    stuck = pod("Running", {"running": {}}, metadata={"deletionTimestamp": "2026-01-01T00:10:00Z"})
    ready = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting"}
    nodes = ({"metadata": {"name": "node1"}, "status": {"conditions": [ready]}},)
    run = runs.of(kube_job(), [stuck])
    late = datetime(2026, 1, 1, 0, 11, tzinfo=UTC)
    first = diagnose(Evidence(run, nodes=nodes, now=late))[0]
    assert first.name == "node-lost"
    assert "node1, which is not ready (NodeStatusUnknown)" in first.sentence
    assert "--force" in first.remedy
    in_time = Evidence(run, nodes=nodes, now=datetime(2026, 1, 1, 0, 10, 5, tzinfo=UTC))
    assert diagnose(in_time)[0].name == "running"


@pytest.mark.parametrize(
    ("evidence", "names", "words"),
    [
        (
            Evidence(
                runs.of(kube_job(), [pod("Running", {"running": {}})]),
                progress={"phase": "train", "step": 3, "steps": 9, "loss": 1.25, "committed": 2, "memory": 0.5},
            ),
            ["running"],
            ["train 3/9", "loss 1.2500", "checkpoint at step 2", "50%"],
        ),
        (Evidence(runs.of(kube_job("Complete:CompletionsReached"))), ["complete"], ["complete"]),
        (Evidence(runs.of(kube_job())), ["pending"], ["first pod"]),
        (
            Evidence(runs.of(kube_job(), [pod("Failed", left(75, "the store is away"))])),
            ["between", "tempfail"],
            ["10 s"],
        ),
        (Evidence(runs.of(kube_job(suspend=True))), ["queued"], ["not by a queue"]),
    ],
)
def test_where_nothing_is_wrong_that_is_said(evidence: Evidence, names: list[str], words: list[str]) -> None:
    causes = diagnose(evidence)
    assert [cause.name for cause in causes] == names
    assert all(cause.code == Code.OK for cause in causes)
    assert all(word in causes[0].sentence for word in words), causes[0].sentence


def test_a_job_whose_conditions_stand_in_another_order_is_told_alike() -> None:
    trouble = json.loads(json.dumps(TROUBLES["exit66"]))
    trouble["job"]["status"]["conditions"].reverse()
    turned = Evidence(runs.of(trouble["job"], trouble["pods"]), heard(trouble["events"]))
    assert diagnose(turned) == diagnose(seen("exit66"))


def test_a_source_that_may_not_be_read_is_told_last_with_its_permission(tmp_path: Path) -> None:
    trouble = TROUBLES["oom"]
    message = 'events is forbidden: User "ada" cannot list resource "events" in API group "" in the namespace "team"'
    events = {"GET /api/v1/namespaces/team/events": refusal(403, message, "Forbidden")}
    with served(tmp_path, events) as (cluster, _):
        causes = diagnose(gather(cluster, runs.of(trouble["job"], trouble["pods"])))
    assert [cause.name for cause in causes] == ["memory", "not-allowed"]
    assert "ada may not list events" in causes[-1].seen[0]


def test_nodes_that_may_not_be_looked_at_are_left_out_without_advice(tmp_path: Path) -> None:
    trouble = TROUBLES["gpu"]
    message = 'nodes is forbidden: User "ada" cannot list resource "nodes" in API group "" at the cluster scope'
    answers = {
        "GET /api/v1/namespaces/team/events": Answer(body={"items": trouble["events"]}),
        "GET /api/v1/nodes": refusal(403, message, "Forbidden"),
    }
    with served(tmp_path, answers) as (cluster, script):
        causes = diagnose(gather(cluster, runs.of(trouble["job"], trouble["pods"])))
    assert any(path.startswith("/api/v1/nodes") for _, path, _ in script.asked)
    assert [cause.name for cause in causes] == ["placement"]


def test_events_are_asked_for_by_object_and_quotas_only_after_a_refusal(tmp_path: Path) -> None:
    core = "GET /api/v1/namespaces/team"
    answers = {f"{core}/{kind}": Answer(body={"items": []}) for kind in ("resourcequotas", "limitranges")}
    for trouble, refused in (("nosa", True), ("oom", False)):
        one = TROUBLES[trouble]
        events = {f"{core}/events": Answer(body={"items": one["events"]})}
        with served(tmp_path, answers | events) as (cluster, script):
            gather(cluster, runs.of(one["job"], one["pods"]))
        asked = [path for _, path, _ in script.asked]
        assert all("involvedObject.uid%3D" in path for path in asked if "/events" in path)
        assert any("/limitranges" in path for path in asked) == refused


def test_a_cause_is_plain_data_and_text() -> None:
    cause = Cause("image", "it cannot be pulled", "look at the registry", Code.STUCK, ("event of Pod p: Failed",))
    assert cause.record() == {
        "cause": "image",
        "sentence": "it cannot be pulled",
        "seen": ["event of Pod p: Failed"],
        "try": "look at the registry",
        "code": 7,
    }
    assert cause.text().splitlines() == [
        "image: it cannot be pulled",
        "  seen: event of Pod p: Failed",
        "  try:  look at the registry",
    ]


def test_the_manual_page_is_as_the_table_has_it() -> None:
    assert (ROOT / "docs" / "why.md").read_text(encoding="utf-8") == reference()
