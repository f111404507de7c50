"""The door to the API server: what each answer becomes, what is asked again, and what is not."""

from pathlib import Path

import pytest
import yaml

from launcher.answers import of_failure
from launcher.cluster import open_cluster
from launcher.codes import ClusterUnreachable, Code, LauncherError, NotAllowed, NotFound, Refused
from launcher.kinds import CONFIG_MAPS, JOBS, PODS
from launcher.permissions import PERMISSIONS, ROLES
from tests.launcher.api import Answer, kubeconfig, refusal, served

ROOT = Path(__file__).resolve().parents[2]
JOB = "/apis/batch/v1/namespaces/team/jobs"
MAP = "/api/v1/namespaces/team/configmaps/run-spec"
THING = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run-spec"}}


def test_an_object_that_is_not_there_is_none(tmp_path: Path) -> None:
    with served(tmp_path, {f"GET {JOB}/run": refusal(404, 'jobs.batch "run" not found', "NotFound")}) as (cluster, _):
        assert cluster.get(JOBS, "run") is None


def test_a_list_is_read_to_its_last_page_and_its_selectors_are_sent(tmp_path: Path) -> None:
    pages = [
        Answer(body={"items": [{"n": 1}], "metadata": {"continue": "more"}}),
        Answer(body={"items": [{"n": 2}], "metadata": {}}),
    ]
    with served(tmp_path, {f"GET {JOB}": pages}) as (cluster, script):
        assert cluster.list(JOBS, "a=b") == [{"n": 1}, {"n": 2}]
        assert cluster.requests == 2
    assert [path for _, path, _ in script.asked] == [
        f"{JOB}?limit=500&labelSelector=a%3Db",
        f"{JOB}?limit=500&labelSelector=a%3Db&continue=more",
    ]


RBAC = 'jobs.batch is forbidden: User "ada" cannot {} resource "jobs" in API group "batch" in the namespace "team"'
QUOTA = 'pods "x" is forbidden: exceeded quota: gpus, requested: cpu=4, used: cpu=8, limited: cpu=8'


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (refusal(401, "Unauthorized", "Unauthorized"), ClusterUnreachable, ["not accepted", "log in"]),
        (
            refusal(403, RBAC.format("patch"), "Forbidden"),
            NotAllowed,
            ["ada may not patch jobs", "team", "RoleBinding"],
        ),
        (refusal(403, QUOTA, "Forbidden"), Refused, ["exceeded quota: gpus", "team"]),
        (refusal(404, 'namespaces "team" not found', "NotFound", kind="namespaces"), NotFound, ["no namespace team"]),
        (
            refusal(409, 'Apply failed with 1 conflict: conflict with "kubectl": .data', "Conflict"),
            Refused,
            ["kubectl"],
        ),
        (refusal(422, 'ConfigMap "x" is invalid: data: field is immutable', "Invalid"), Refused, ["immutable"]),
        (
            refusal(400, 'admission webhook "no.gpu" denied the request: ask first', "BadRequest"),
            Refused,
            ["ask first"],
        ),
        (refusal(413, "Request entity too large: limit is 3145728"), Refused, ["too large"]),
    ],
)
def test_what_the_server_refuses_is_one_sentence_and_is_not_asked_again(
    tmp_path: Path, answer: Answer, error: type[LauncherError], words: list[str]
) -> None:
    with served(tmp_path, {f"PATCH {MAP}": answer}) as (cluster, script):
        with pytest.raises(error) as caught:
            cluster.apply(CONFIG_MAPS, THING)
        assert len(script.asked) == 1
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code in (Code.CLUSTER, Code.REFUSED)


@pytest.mark.parametrize(
    ("verb", "resource", "where", "words"),
    [
        ("list", "jobs", 'in the namespace "team"', "role tunejob-viewer"),
        ("get", "pods/log", 'in the namespace "team"', "role tunejob-viewer"),
        ("get", "namespaces", 'in the namespace "team"', "role tunejob-viewer"),
        ("patch", "configmaps", 'in the namespace "team"', "role tunejob-submitter"),
        ("patch", "cronjobs", 'in the namespace "team"', "role tunejob-scheduler"),
        ("get", "secrets", 'in the namespace "team"', "no role of k8s/ grants it"),
        ("list", "nodes", "at the cluster scope", "cluster-wide: no Role grants it, and no run needs it"),
    ],
)
def test_a_missing_permission_names_the_role_that_has_it(
    tmp_path: Path, verb: str, resource: str, where: str, words: str
) -> None:
    said = f'x is forbidden: User "ada" cannot {verb} resource "{resource}" in API group "" {where}'
    with served(tmp_path, {f"GET {JOB}": refusal(403, said, "Forbidden")}) as (cluster, _):
        with pytest.raises(NotAllowed, match=f"ada may not {verb} {resource}.*{words}") as caught:
            cluster.list(JOBS)
        assert ("in namespace team" in str(caught.value)) == (where != "at the cluster scope")


def test_every_permission_that_is_granted_to_a_purpose_stands_in_its_role() -> None:
    for purpose, needs in PERMISSIONS.items():
        role = next(yaml.safe_load_all((ROOT / "k8s" / f"{ROLES[purpose].partition('-')[2]}.yaml").read_text("utf-8")))
        granted = {
            (verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
        }
        assert {(verb, need.resource) for need in needs for verb in need.verbs} <= granted


@pytest.mark.parametrize("first", [Answer(breaks=True), refusal(503, "etcd leader changed"), refusal(429, "slow down")])
def test_an_answer_that_got_lost_is_asked_for_again(tmp_path: Path, first: Answer) -> None:
    with served(tmp_path, {f"PATCH {MAP}": [first, Answer(body=THING)]}) as (cluster, script):
        assert cluster.apply(CONFIG_MAPS, THING) == THING
        assert len(script.asked) == 2


def test_a_server_that_stays_away_is_named_in_one_sentence(tmp_path: Path) -> None:
    with served(tmp_path, {f"GET {JOB}": Answer(breaks=True)}) as (cluster, script):
        with pytest.raises(ClusterUnreachable, match="does not answer"):
            cluster.list(JOBS)
        assert len(script.asked) == 3


def test_a_server_that_answers_and_cannot_do_it_is_not_called_away(tmp_path: Path) -> None:
    busy = refusal(503, "etcd leader changed", "ServiceUnavailable")
    with served(tmp_path, {f"GET {JOB}": busy}) as (cluster, _):
        with pytest.raises(ClusterUnreachable, match="cannot do it now \\(503: etcd leader changed\\)") as caught:
            cluster.list(JOBS)
        assert "does not answer" not in str(caught.value)


def test_an_apply_is_never_forced_and_a_dry_run_says_so(tmp_path: Path) -> None:
    with served(tmp_path, {f"PATCH {MAP}": Answer(body=THING)}) as (cluster, script):
        cluster.apply(CONFIG_MAPS, THING)
        cluster.apply(CONFIG_MAPS, THING, dry_run=True)
    assert [path for _, path, _ in script.asked] == [
        f"{MAP}?fieldManager=tunejob",
        f"{MAP}?fieldManager=tunejob&dryRun=All",
    ]
    assert script.asked[0][2] == THING


def test_warnings_are_kept_each_once(tmp_path: Path) -> None:
    told = {"Warning": '299 - "would violate PodSecurity \\"restricted:latest\\"", 299 - "old API"'}
    with served(tmp_path, {f"PATCH {MAP}": Answer(body=THING, headers=told)}) as (cluster, _):
        cluster.apply(CONFIG_MAPS, THING)
        cluster.apply(CONFIG_MAPS, THING)
        assert cluster.warnings == ['would violate PodSecurity "restricted:latest"', "old API"]


def test_a_deletion_names_the_object_that_is_meant_and_takes_its_pods_along(tmp_path: Path) -> None:
    gone = refusal(404, "not found", "NotFound")
    with served(tmp_path, {f"DELETE {JOB}/run": [Answer(), gone]}) as (cluster, script):
        assert cluster.delete(JOBS, "run", uid="1")
        assert not cluster.delete(JOBS, "run")
    assert script.asked[0][2]["preconditions"] == {"uid": "1"}
    assert script.asked[0][2]["propagationPolicy"] == "Foreground"


def test_a_log_comes_line_by_line_whole_characters_together(tmp_path: Path) -> None:
    text = "erste Zeile\nzweite Ümläut".encode()
    with served(tmp_path, {"GET /api/v1/namespaces/team/pods/p/log": Answer(body=text)}) as (cluster, script):
        assert list(cluster.log("p", follow=True, tail=3)) == ["erste Zeile", "zweite Ümläut"]
    assert script.asked[0][1].endswith("?container=tunejob&follow=true&tailLines=3")


def test_the_log_of_a_container_that_has_not_started_is_empty(tmp_path: Path) -> None:
    waiting = refusal(400, 'container "tunejob" in pod "p" is waiting to start: ContainerCreating', "BadRequest")
    with served(tmp_path, {"GET /api/v1/namespaces/team/pods/p/log": waiting}) as (cluster, _):
        assert list(cluster.log("p")) == []


def test_a_bad_request_in_a_namespace_called_log_is_no_container_that_waits(tmp_path: Path) -> None:
    bad = refusal(400, "unable to parse requirement", "BadRequest")
    with served(tmp_path, {"GET /apis/batch/v1/namespaces/logs/jobs": bad}) as (cluster, _):
        cluster.namespace = "logs"
        with pytest.raises(Refused, match="unable to parse"):
            cluster.list(JOBS)


def test_the_password_in_an_address_is_used_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(kubeconfig("http://ada:secret@127.0.0.1:9"), encoding="utf-8")
    cluster = open_cluster("stub", "team", tmp_path / "config")
    assert cluster.server == "http://***@127.0.0.1:9"
    assert "secret" not in str(of_failure(ValueError("cannot parse http://ada:secret@host:1/path")))


@pytest.mark.parametrize(
    ("context", "words"), [("absent", ["no context absent", "get-contexts"]), (None, ["no usable current context"])]
)
def test_a_kubeconfig_without_the_context_is_named(tmp_path: Path, context: str | None, words: list[str]) -> None:
    (tmp_path / "config").write_text("apiVersion: v1\nkind: Config\ncontexts: []\nclusters: []\nusers: []\n")
    with pytest.raises(ClusterUnreachable) as caught:
        open_cluster(context, None, tmp_path / "config")
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "config")])


def test_a_rights_question_is_about_this_namespace(tmp_path: Path) -> None:
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    with served(tmp_path, {f"POST {path}": Answer(201, {"status": {"allowed": True}})}) as (cluster, script):
        assert cluster.allowed("get", PODS, "log")
    assert script.asked[0][2]["spec"]["resourceAttributes"] == {
        "verb": "get",
        "group": "",
        "resource": "pods",
        "subresource": "log",
        "namespace": "team",
    }
