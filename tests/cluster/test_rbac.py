"""What the shipped Roles let people do, and what every verb says where one permission is missing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.codes import Code
from tests.cluster.bucket import BUCKET
from tests.cluster.kit import CREDENTIALS, ROLES, Kit, install, kubeconfig_of
from tests.cluster.kubectl import Manifest, Said, wait_for

pytestmark = pytest.mark.cluster

SPEC = "roles"
READING = ("list", "status", "logs", "wait", "why", "results")
NO_IMAGE = "localhost/no-such-image:0"
ABSENT = {"train": f"s3://{BUCKET}/data/absent.jsonl"}


@pytest.fixture(scope="module")
def finished(kit: Kit) -> Path:
    """The spec of a run that the submitter brought to its end."""
    spec = kit.spec(SPEC)
    submitted = kit.cli("submit", str(spec), "-d")
    assert submitted.code == Code.OK, submitted.err
    waited = kit.cli("wait", str(spec))
    assert waited.code == Code.OK, waited.err
    return spec


@pytest.fixture(scope="module")
def files(kit: Kit, finished: Path) -> dict[str, str]:
    """Specs by what became of their runs: DONE, FAILED, PENDING, and NEW, which nobody submitted."""
    failed, pending, new = kit.spec("failed", data=ABSENT), kit.spec("pending"), kit.spec("never")
    stuck = {"TUNEJOB_PROFILE": str(kit.profile_with("pending", image=NO_IMAGE))}
    assert kit.cli("submit", str(failed), "-d").code == Code.OK
    assert kit.cli("submit", str(pending), "-d", env=stuck).code == Code.OK
    assert kit.cli("wait", str(failed)).code == Code.JOB_FAILED
    return {"DONE": str(finished), "FAILED": str(failed), "PENDING": str(pending), "NEW": str(new)}


def words_of(verb: str, spec: Path) -> list[str]:
    """A verb as it is called on a run."""
    return {"list": ["list"], "doctor": ["doctor"]}.get(verb, [verb, str(spec)])


@pytest.mark.full
@pytest.mark.parametrize("role", ["viewer", "submitter", "scheduler"])
@pytest.mark.parametrize("verb", READING)
def test_every_role_reads_runs(kit: Kit, finished: Path, verb: str, role: str) -> None:
    said = kit.cli(*words_of(verb, finished), role=role)
    assert said.code == Code.OK, said
    assert "may not" not in said.err, "a role that the project ships lacks nothing that its verbs ask for"
    assert said.out.strip() or verb == "wait"


@pytest.mark.full
@pytest.mark.parametrize("words", [["doctor"], ["check", "DONE", "--cluster"], ["render", "DONE"]], ids=lambda w: w[0])
def test_the_submitter_looks_at_the_cluster_before_it_submits(kit: Kit, finished: Path, words: list[str]) -> None:
    said = kit.cli(*(str(finished) if word == "DONE" else word for word in words))
    assert said.code == Code.OK, said


def test_the_submitter_takes_a_run_through_its_life(kit: Kit) -> None:
    spec = str(kit.spec("life", data=ABSENT))
    assert kit.cli("submit", spec, "-d").code == Code.OK
    failed = kit.cli("wait", spec)
    assert failed.code == Code.JOB_FAILED, failed
    assert "absent.jsonl" in failed.err
    retried = kit.cli("retry", spec, "-d", env={"TUNEJOB_PROFILE": str(kit.profile_with("stuck", image=NO_IMAGE))})
    assert retried.code == Code.OK, retried.err
    cancelled = kit.cli("cancel", spec)
    assert cancelled.code == Code.OK, cancelled.err
    deleted = kit.cli("delete", spec, "--yes")
    assert deleted.code == Code.OK, deleted.err
    run = deleted.err.split("Job/")[1].rsplit("-", 1)[0]
    assert kit.kubectl("get", "jobs,pods,configmaps", "-l", f"tunejob.dev/run={run}", "-o", "name") == ""


def test_a_viewer_may_not_submit(kit: Kit) -> None:
    said = kit.cli("submit", str(kit.spec("viewed")), role="viewer")
    assert said.code == Code.CLUSTER, said
    assert "may not patch configmaps" in said.err
    assert kit.kubectl("get", "jobs,configmaps", "-o", "name").count("viewed") == 0


def test_only_the_scheduler_may_make_schedules(kit: Kit) -> None:
    spec = str(kit.spec("nightly", scheduling={"cron": "0 3 1 1 *"}))
    said = kit.cli("submit", spec)
    assert said.code == Code.CLUSTER, said
    assert "may not patch cronjobs" in said.err
    said = kit.cli("submit", spec, role="scheduler")
    assert said.code == Code.OK, said
    assert kit.cli("delete", spec, "--yes", role="scheduler").code == Code.OK


@dataclass(frozen=True)
class Lacking:
    """A permission that is taken from a copy of the submitter's Role."""

    verb: str
    resource: str
    words: tuple[str, ...]
    """The command that needs it, and one of ``files``."""

    def __str__(self) -> str:
        return f"{self.words[0]} without {self.verb} {self.resource}"


NEEDED = (
    Lacking("list", "jobs", ("list",)),
    Lacking("list", "cronjobs", ("list",)),
    Lacking("list", "jobs", ("status", "DONE")),
    Lacking("list", "pods", ("status", "DONE")),
    Lacking("get", "pods/log", ("logs", "DONE")),
    Lacking("list", "pods", ("wait", "DONE")),
    Lacking("list", "jobs", ("why", "DONE")),
    Lacking("list", "jobs", ("results", "DONE")),
    Lacking("patch", "jobs", ("check", "NEW", "--cluster")),
    Lacking("get", "jobs", ("submit", "NEW")),
    Lacking("patch", "configmaps", ("submit", "NEW")),
    Lacking("create", "configmaps", ("submit", "NEW")),
    Lacking("patch", "jobs", ("submit", "NEW")),
    Lacking("create", "jobs", ("submit", "NEW")),
    Lacking("list", "jobs", ("retry", "FAILED")),
    Lacking("create", "jobs", ("retry", "FAILED")),
    Lacking("get", "configmaps", ("retry", "FAILED")),
    Lacking("list", "jobs", ("cancel", "PENDING")),
    Lacking("delete", "jobs", ("cancel", "PENDING")),
    Lacking("delete", "jobs", ("delete", "DONE", "--yes")),
    Lacking("list", "configmaps", ("delete", "NEW", "--yes")),
)


class Account:
    """A ServiceAccount that lacks one permission of the submitter's at a time."""

    NAME = "lacking"

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        kubectl = kit.kubectl
        kubectl("create", "serviceaccount", self.NAME)
        self.replace(self._rules())
        kubectl("create", "rolebinding", self.NAME, f"--role={self.NAME}", f"--serviceaccount={self.user}")
        self.kubeconfig = kubeconfig_of(kubectl, self.NAME, kit.folder / "lacking.kubeconfig")

    @property
    def user(self) -> str:
        """As ``--serviceaccount`` has it."""
        return f"{self._kit.namespace}:{self.NAME}"

    def _rules(self) -> list[Manifest]:
        rules: list[Manifest] = self._kit.kubectl.get("role", "tunejob-submitter")["rules"]
        return rules

    def replace(self, rules: list[Manifest]) -> None:
        """Gives the account these rules."""
        role = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": self.NAME},
            "rules": rules,
        }
        self._kit.kubectl.apply(json.dumps(role))

    def lose(self, verb: str, resource: str) -> None:
        """Gives it all that the submitter has but for one verb on one resource; returns when the server knows."""
        rules = []
        for rule in self._rules():
            rules.append(rule | {"resources": [one for one in rule["resources"] if one != resource]})
            if resource in rule["resources"]:
                rules.append(rule | {"resources": [resource], "verbs": [one for one in rule["verbs"] if one != verb]})
        self.replace([rule for rule in rules if rule["resources"] and rule["verbs"]])
        wait_for(lambda: not self.may(verb, resource) and self.may("get", "limitranges"), f"loss of {verb} {resource}")

    def may(self, verb: str, resource: str) -> bool:
        """Whether the server lets it."""
        name, _, sub = resource.partition("/")
        asked = ["auth", "can-i", verb, name, *([f"--subresource={sub}"] if sub else [])]
        return self._kit.kubectl.ask(*asked, f"--as=system:serviceaccount:{self.user}").out.strip() == "yes"


@pytest.fixture(scope="module")
def account(kit: Kit) -> Iterator[Account]:
    """The account that lacks something."""
    account = Account(kit)
    yield account
    kit.kubectl("delete", "serviceaccount,role,rolebinding", account.NAME)


@pytest.mark.parametrize("lacking", NEEDED, ids=str)
def test_a_missing_permission_is_named_by_verb_and_resource(
    kit: Kit, files: dict[str, str], account: Account, lacking: Lacking
) -> None:
    account.lose(lacking.verb, lacking.resource)
    said = kit.cli(*(files.get(word, word) for word in lacking.words), env={"KUBECONFIG": str(account.kubeconfig)})
    assert said.code == Code.CLUSTER, said
    assert f"may not {lacking.verb} {lacking.resource}" in said.err, said.err
    assert not left_by(kit, "never"), "what was begun is taken back"


def left_by(kit: Kit, name: str) -> list[str]:
    """Jobs and ConfigMaps of runs of a name."""
    names = kit.kubectl("get", "jobs,configmaps", "-o", "name").split()
    return [one for one in names if one.partition("/")[2].startswith(f"{name}-")]


@pytest.mark.parametrize("name", ["tunejob", *(f"tunejob-{role}" for role in ROLES)])
def test_no_account_that_is_shipped_reads_secrets(kit: Kit, name: str) -> None:
    identity = f"--as=system:serviceaccount:{kit.namespace}:{name}"
    assert kit.kubectl.ask("get", "configmaps", identity).code == (name == "tunejob"), "the question proves something"
    for verb in (["get", "secrets"], ["get", "secret", CREDENTIALS], ["get", "secrets", "--all-namespaces"]):
        said: Said = kit.kubectl.ask(*verb, identity)
        assert said.code != 0
        assert "cannot" in said.err, said.err


def test_pods_run_as_an_account_without_rights(kit: Kit) -> None:
    def rights(account: str) -> set[str]:
        identity = [f"--as=system:serviceaccount:{kit.namespace}:{account}", "--as-group=system:serviceaccounts"]
        listed = kit.kubectl("auth", "can-i", "--list", "--no-headers", *identity, "--as-group=system:authenticated")
        return {line.strip() for line in listed.splitlines()}

    kit.kubectl("create", "serviceaccount", "without-a-role")
    try:
        assert rights("tunejob") == rights("without-a-role"), "what every account of the cluster may, and no more"
    finally:
        kit.kubectl("delete", "serviceaccount", "without-a-role")
    assert rights("tunejob") < rights("tunejob-viewer")
    assert kit.kubectl.get("serviceaccount", "tunejob")["automountServiceAccountToken"] is False


def test_the_base_is_applied_again_without_a_word(kit: Kit, tmp_path: Path) -> None:
    said = install(kit.kubectl, tmp_path / "again")
    assert "Warning" not in said.err
    assert {line.rsplit(" ", 1)[1] for line in said.out.splitlines()} == {"unchanged"}
