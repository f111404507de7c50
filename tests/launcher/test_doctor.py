"""What doctor looks at, and that it goes on where something may not be read or does not answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from job.errors import TemporaryFailure
from launcher.codes import ClusterUnreachable, Code
from launcher.doctor import Check, examine, gpus_of, quota_left
from launcher.profile import GpuType, Profile
from tests.launcher.api import Answer, refusal, served

ACCESS = "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
CORE = "GET /api/v1/namespaces/team"
PROFILE = {
    "namespace": "team",
    "image": "registry.example/tunejob:0",
    "store": {"output": "s3://training/runs", "secret": "s3-credentials", "endpoint": "http://store:8333"},
}
FORBIDDEN = 'User "ada" cannot {} resource "{}"'


def profile(**changes: Any) -> Profile:
    """The profile above, changed."""
    return Profile.model_validate(PROFILE | changes)


HEALTHY = {
    "GET /version": Answer(body={"major": "1", "minor": "37"}),
    "GET /api/v1/namespaces/team": Answer(
        body={"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    ),
    ACCESS: Answer(201, {"status": {"allowed": True}}),
    f"{CORE}/serviceaccounts/tunejob": Answer(body={"metadata": {"name": "tunejob"}}),
    f"{CORE}/secrets/s3-credentials": Answer(body={"metadata": {}, "data": {"credentials": "eA=="}}),
    f"{CORE}/resourcequotas": Answer(body={"items": []}),
    "GET /api/v1/nodes": Answer(body={"items": []}),
}


def checks(folder: Path, changes: Mapping[str, Answer] | None = None, **values: Any) -> dict[str, Check]:
    """What doctor finds on a healthy server with some answers changed, by name."""
    with served(folder, HEALTHY | dict(changes or {})) as (cluster, _):
        found = examine(cluster, profile(**values), lambda: "3 runs")
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_where_nothing_is_missing_every_check_is_ok(tmp_path: Path) -> None:
    found = checks(tmp_path)
    assert {check.state for check in found.values()} == {"ok"}
    assert list(found) == [
        "cluster",
        "namespace",
        "may look",
        "may submit",
        "may schedule",
        "service account",
        "store secret",
        "store from here",
    ]
    assert "restricted is enforced" in found["namespace"].sentence
    assert "1.37" in found["cluster"].sentence


@pytest.mark.parametrize(
    ("changes", "values", "name", "state", "words"),
    [
        ({"GET /version": Answer(body={"major": "1", "minor": "30"})}, {}, "cluster", "fail", "too old"),
        (
            {"GET /api/v1/namespaces/team": refusal(404, "no", "NotFound", kind="namespaces")},
            {},
            "namespace",
            "fail",
            "no namespace team",
        ),
        (
            {f"{CORE}/serviceaccounts/tunejob": refusal(404, "no", "NotFound")},
            {},
            "service account",
            "fail",
            "no ServiceAccount tunejob",
        ),
        ({f"{CORE}/secrets/s3-credentials": refusal(404, "no", "NotFound")}, {}, "store secret", "fail", "no Secret"),
        (
            {f"{CORE}/secrets/s3-credentials": Answer(body={"data": {}})},
            {},
            "store secret",
            "fail",
            "no key credentials",
        ),
        (
            {f"{CORE}/secrets/s3-credentials": refusal(403, FORBIDDEN.format("get", "secrets"), "Forbidden")},
            {},
            "store secret",
            "warn",
            "may not look (get secrets)",
        ),
        ({}, {"hub": {"secret": "hf"}}, "hub secret", "fail", "no Secret hf"),
        ({}, {"pull_secrets": ["regcred"]}, "pull secret", "fail", "no Secret regcred"),
        ({}, {"store": PROFILE["store"] | {"ca_config_map": "ca"}}, "CA", "fail", "no ConfigMap ca"),  # type: ignore[operator]
        ({}, {"queue": "gpus"}, "queue", "fail", "no Kueue"),
        (
            {"GET /api/v1/nodes": refusal(403, FORBIDDEN.format("list", "nodes"), "Forbidden")},
            {"gpu_types": {"h100": {}}},
            "GPUs",
            "warn",
            "list nodes",
        ),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, changes: Mapping[str, Answer], values: dict[str, Any], name: str, state: str, words: str
) -> None:
    check = checks(tmp_path, changes, **values)[name]
    assert (check.state, words in check.sentence) == (state, True), check
    assert check.remedy or state == "warn"
    assert check.code == (Code.OK if state == "warn" else Code.REFUSED)


def test_each_permission_that_is_missing_is_named_with_the_role_that_has_it(tmp_path: Path) -> None:
    found = checks(tmp_path, {ACCESS: Answer(201, {"status": {"allowed": False}})})
    assert (found["may look"].state, found["may submit"].state, found["may schedule"].state) == ("fail", "fail", "warn")
    assert "create jobs, patch jobs, delete jobs, create configmaps" in found["may submit"].sentence
    assert "get pods/log" in found["may look"].sentence
    assert "tunejob-submitter" in found["may submit"].remedy
    assert found["may submit"].code == Code.CLUSTER


def test_without_a_cluster_the_store_is_asked_all_the_same() -> None:
    found = examine(ClusterUnreachable("https://x: the cluster does not answer"), profile(), lambda: "answers")
    assert [(check.name, check.state, check.code) for check in found] == [
        ("cluster", "fail", Code.CLUSTER),
        ("store from here", "ok", Code.OK),
    ]


def test_a_store_that_cannot_be_reached_from_here_is_no_failure() -> None:
    def away() -> str:
        raise TemporaryFailure("no answer in 10 s")

    check = examine(ClusterUnreachable("away"), profile(), away)[-1]
    assert (check.state, check.code) == ("warn", Code.OK)
    assert check.sentence == "no answer in 10 s"
    assert "client_endpoint" in check.remedy


def node(gpus: str, **labels: str) -> dict[str, Any]:
    """A node with GPUs."""
    return {"metadata": {"labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": gpus}}}


def test_gpus_are_counted_on_the_nodes_of_their_type() -> None:
    nodes = [node("8", gpu="h100"), node("4", gpu="h100"), node("2", gpu="a10")]
    found = gpus_of("h100", GpuType(node_selector={"gpu": "h100"}), nodes)
    assert (found.state, found.sentence) == ("ok", "12 nvidia.com/gpu on 2 nodes, at most 8 on one")
    none = gpus_of("b200", GpuType(node_selector={"gpu": "b200"}), nodes)
    assert (none.state, "0 nodes have the labels gpu=b200" in none.sentence) == ("warn", True)


@pytest.mark.parametrize(("used", "state"), [("3", "ok"), ("4", "warn")])
def test_a_quota_that_is_used_up_is_a_warning(used: str, state: str) -> None:
    check = quota_left({"metadata": {"name": "q"}, "status": {"hard": {"pods": "4"}, "used": {"pods": used}}})
    assert (check.state, f"pods {used} of 4" in check.sentence) == (state, True)


def test_a_quota_that_forbids_services_is_none_of_ours() -> None:
    assert quota_left({"metadata": {"name": "q"}, "status": {"hard": {"services.nodeports": "0"}}}).state == "ok"
    assert quota_left({"metadata": {"name": "q"}, "status": {"hard": {"pods": "0"}}}).state == "warn"


def test_a_check_is_plain_data() -> None:
    check = Check("cluster", "fail", "does not answer", "ask", Code.CLUSTER)
    assert check.record() == {"check": "cluster", "state": "fail", "found": "does not answer", "try": "ask"}
