"""Runs in trouble on a real node: what submit refuses, and what why, wait and doctor say of the rest."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.codes import Code
from tests.cluster.kit import Kit
from tests.cluster.kubectl import Manifest, wait_for

pytestmark = pytest.mark.cluster

Change = Callable[[Manifest], None]


def applied(kit: Kit, spec: Path, change: Change = lambda kube_job: None) -> str:
    """Applies what is rendered for a spec, the Job changed by hand, as if nobody had asked before; the Job's name."""
    rendered = list(yaml.safe_load_all(kit.cli("render", str(spec)).out))
    kube_job = next(one for one in rendered if one["kind"] == "Job")
    change(kube_job)
    kit.kubectl.apply(yaml.safe_dump_all(rendered))
    return str(kube_job["metadata"]["name"])


def pod_of(kube_job: Manifest) -> Manifest:
    """The pod's spec in a Job."""
    pod: Manifest = kube_job["spec"]["template"]["spec"]
    return pod


def causes(kit: Kit, run: str) -> list[dict[str, Any]]:
    """What why says, as data."""
    said = kit.cli("why", run, "-o", "json")
    assert said.code == 0, said
    found: list[dict[str, Any]] = json.loads(said.out)
    return found


def told(kit: Kit, run: str, name: str) -> dict[str, Any]:
    """The first cause once it is of a name."""
    return wait_for(
        lambda: next((one for one in causes(kit, run)[:1] if one["cause"] == name), None),
        f"cause {name} of {run}",
        lambda: str(causes(kit, run)),
    )


@contextmanager
def bounded(kit: Kit, kind: str, spec: str) -> Iterator[None]:
    """A ResourceQuota or LimitRange in the namespace while the block runs."""
    text = f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: tight}}\nspec: {spec}\n"
    kit.kubectl.apply(text)
    try:
        if kind == "ResourceQuota":
            wait_for(lambda: kit.kubectl.get("resourcequota", "tight").get("status", {}).get("hard"), "quota")
        yield
    finally:
        kit.kubectl("delete", kind, "tight")


@pytest.mark.full
def test_an_image_that_cannot_be_pulled_ends_the_waiting(kit: Kit) -> None:
    profile = kit.profile_with("no-image", image="localhost/no-such-image:0")
    run = kit.cli("submit", str(kit.spec("no-image")), "-d", profile=profile).out.strip()
    waited = kit.cli("wait", run)
    assert waited.code == Code.STUCK, waited
    assert "image localhost/no-such-image:0 cannot be pulled" in waited.err
    assert told(kit, run, "image")["code"] == Code.STUCK
    kit.cli("cancel", run)


@pytest.mark.full
def test_a_secret_that_is_missing_is_named_and_the_run_goes_on_once_it_is_made(kit: Kit) -> None:
    profile = kit.profile_with("no-secret", store={"secret": "made-later"})
    run = kit.cli("submit", str(kit.spec("no-secret")), "-d", profile=profile).out.strip()
    waited = kit.cli("wait", run)
    assert waited.code == Code.STUCK, waited
    assert f"there is no Secret made-later in namespace {kit.namespace}" in waited.err
    file = kit.folder / "credentials"
    file.write_text(kit.bucket.trainer.file, encoding="utf-8")
    kit.kubectl("create", "secret", "generic", "made-later", f"--from-file=credentials={file}")
    # The kubelet looks again after up to two minutes, and has nothing new to say before.
    wait_for(lambda: kit.cli("wait", run).code == Code.OK, f"end of {run}", lambda: str(causes(kit, run)))
    assert causes(kit, run)[0]["cause"] == "complete"


def test_a_key_that_is_missing_in_a_secret_is_named_with_the_secret(kit: Kit) -> None:
    def ask_for_more(kube_job: Manifest) -> None:
        volume = next(one for one in pod_of(kube_job)["volumes"] if "secret" in one)
        volume["secret"]["items"] = [{"key": "other", "path": "credentials"}]

    job = applied(kit, kit.spec("no-key"), ask_for_more)
    assert "Secret s3-credentials" in (found := told(kit, job, "key"))["sentence"]
    assert "no key other" in found["sentence"]
    kit.cli("cancel", job)


def test_pod_security_that_refuses_the_pods_is_found_before_the_start_and_after(kit: Kit) -> None:
    def loosen(kube_job: Manifest) -> None:
        pod_of(kube_job)["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True

    job = applied(kit, kit.spec("loosened"), loosen)
    found = told(kit, job, "pod-security")
    assert "allowPrivilegeEscalation != false" in found["sentence"]
    assert kit.cli("wait", job).code == Code.REFUSED
    kit.cli("cancel", job)


@pytest.mark.parametrize(
    ("kind", "bound", "name", "words"),
    [
        ("ResourceQuota", "{hard: {requests.memory: 1Gi}}", "quota", ["tight", "requests.memory", "1Gi"]),
        ("LimitRange", "{limits: [{type: Container, max: {memory: 1Gi}}]}", "limit-range", ["memory", "1Gi"]),
    ],
)
def test_what_the_namespace_does_not_allow_is_refused_by_submit_and_told_by_why(
    kit: Kit, kind: str, bound: str, name: str, words: list[str]
) -> None:
    spec = kit.spec(f"tight-{name}")
    with bounded(kit, kind, bound):
        said = kit.cli("submit", str(spec), "-d")
        assert said.code == Code.REFUSED, said
        assert all(word in said.err for word in words), said.err
        assert f"tight-{name}" not in kit.kubectl("get", "jobs,configmaps", "-o", "name")
        job = applied(kit, spec)
        assert all(word in told(kit, job, name)["sentence"] for word in words)
        kit.cli("cancel", job)


def test_gpus_that_no_node_has_are_told_and_waited_for(kit: Kit) -> None:
    run = kit.cli("submit", str(kit.spec("no-gpu", resources={"gpus": 16})), "-d").out.strip()
    found = told(kit, run, "placement")
    assert "too little nvidia.com/gpu, 16 asked" in found["sentence"]
    waited = kit.cli("wait", run, "--start-timeout", "1s")
    assert waited.code in (Code.STUCK, Code.TIMED_OUT), waited
    kit.cli("cancel", run)


@pytest.mark.full
def test_memory_that_is_used_up_is_told_with_its_limit_while_the_run_goes_on(kit: Kit) -> None:
    # Less than the interpreter and its libraries take.
    run = kit.cli("submit", str(kit.spec("no-memory", resources={"memory": "48Mi"})), "-d").out.strip()
    found = wait_for(
        lambda: next((one for one in causes(kit, run) if one["cause"] == "memory"), None), "memory", lambda: run
    )
    assert "48Mi" in found["sentence"]
    assert "resources.memory" in found["try"]
    kit.cli("cancel", run)


def test_a_deadline_is_told_after_the_pods_are_gone(kit: Kit) -> None:
    def hurry(kube_job: Manifest) -> None:
        kube_job["spec"]["activeDeadlineSeconds"] = 1

    job = applied(kit, kit.spec("late"), hurry)
    found = told(kit, job, "deadline")
    assert "deadline of 1 s" in found["sentence"]
    assert kit.cli("wait", job).code == Code.JOB_FAILED


def test_bad_input_is_told_by_the_pod_and_once_it_is_gone_by_the_store(kit: Kit) -> None:
    missing = "s3://training/data/not-there.jsonl"
    run = kit.cli("submit", str(kit.spec("no-input", data={"train": missing})), "-d").out.strip()
    waited = kit.cli("wait", run)
    assert waited.code == Code.JOB_FAILED, waited
    assert missing in waited.err
    of_pod = causes(kit, run)[0]
    assert (of_pod["cause"], missing in of_pod["sentence"]) == ("noinput", True)
    kit.kubectl("delete", "pods", "-l", f"tunejob.dev/run={run}")
    of_store = causes(kit, run)[0]
    assert (of_store["cause"], missing in of_store["sentence"]) == ("noinput", True)
    assert any("ledger" in line for line in of_store["seen"])
    profile = kit.profile_with("store-away", store={"client_endpoint": "http://127.0.0.1:9"})
    away = json.loads(kit.cli("why", run, "-o", "json", profile=profile).out)[0]
    assert away["cause"] == "pods-gone"
    assert any("127.0.0.1:9" in line for line in away["seen"])


def test_doctor_finds_the_shipped_base_in_order_and_says_what_it_may_not_see(kit: Kit) -> None:
    said = kit.cli("doctor", "-o", "json")
    found = {check["check"]: check for check in json.loads(said.out)}
    assert said.code == Code.OK, said
    assert [name for name, check in found.items() if check["state"] == "warn"] == ["may schedule", "store secret"]
    assert "restricted is enforced" in found["namespace"]["found"]
    assert found["store from here"]["state"] == "ok"
    viewer = kit.cli("doctor", "-o", "json", role="viewer")
    assert viewer.code == Code.CLUSTER
    assert "patch jobs" in next(one["found"] for one in json.loads(viewer.out) if one["check"] == "may submit")


def test_check_looks_at_the_cluster_without_making_anything(kit: Kit) -> None:
    spec = kit.spec("looked-at")
    profile = kit.profile_with("no-account", service_account="never-made")
    refused = kit.cli("check", str(spec), "--cluster", profile=profile)
    assert refused.code == Code.REFUSED, refused
    assert "no ServiceAccount never-made" in refused.err
    fine = kit.cli("check", str(spec), "--cluster")
    assert fine.code == Code.OK, fine
    assert "looked-at" not in kit.kubectl("get", "jobs,configmaps", "-o", "name")
