"""What happens to nodes, stores and volumes while a run is at it. By hand: make test-cluster-full."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.bucket import BUCKET
from tests.cluster.kubectl import manifest, wait_for
from tests.cluster.running import CLAIM, Ended, KubeJob, Lab, Pod, lacking, tiny_spec
from tests.job import tiny

DRAIN = ("--delete-emptydir-data", "--force", "--timeout=60s")
"""Scratch is an emptyDir and may go; the store lives on the same node, but is not selected."""

pytestmark = [pytest.mark.cluster, pytest.mark.full]


def undisturbed_but(straight: Ended, lab: Lab, output: str, **changes: Any) -> KubeJob:
    """The run of ``straight``, to another place."""
    return lab.job(straight.kube_job.spec, output=f"s3://{BUCKET}/{output}", **changes)


def assert_ends_like(straight: Ended, ended: Ended) -> None:
    """Complete, with the same losses and, byte for byte, the same adapter."""
    ended.completed()
    results, theirs = ended.kube_job.results, straight.kube_job.results
    assert results.losses() == theirs.losses()
    assert results.adapter() == theirs.adapter()


def reached(kube_job: KubeJob, condition: Callable[[dict[str, Any]], bool], what: str) -> Pod:
    """The running pod, once one of its lines of progress meets the condition. Asks the pod, not the store."""

    def look() -> Pod | None:
        pod = kube_job.running()
        return pod if pod and any(condition(line) for line in kube_job.progress(pod)) else None

    return wait_for(look, what, kube_job.story)


@pytest.mark.parametrize(
    ("rows", "limit", "words"),
    [
        pytest.param(60_000, "4Mi", "needs", id="before anything is pulled"),
        pytest.param(300_000, "40Mi", "are used, and at the limit", id="while it fills up"),
    ],
)
def test_scratch_nearly_full_is_74_before_the_kubelet_evicts(
    lab: Lab, tmp_path: Path, rows: int, limit: str, words: str
) -> None:
    key = f"data/rows-{rows}.jsonl"
    lab.bucket.put(tiny.write_rows(tmp_path / "rows.jsonl", tiny.numbered_rows(rows)), key)
    spec = tiny_spec(f"full-{rows}", data={"train": f"s3://{BUCKET}/{key}", "eval_split": 0.0})
    kube_job = lab.job(spec, scratch_limit=limit, backoff_limit=0)
    pod = kube_job.run().failed("BackoffLimitExceeded")
    assert (pod.code, pod.said["name"]) == (74, "DISK"), kube_job.story()
    assert words in pod.said["message"]
    assert pod.manifest["status"].get("reason") != "Evicted"


LONGER = tiny_spec(
    "longer",
    training={"max_steps": 4000, "batch_size": 4, "max_length": 64, "logging_steps": 10, "learning_rate": 5e-3},
    checkpoints={"every_steps": 400},
)
"""Lasts for half a minute, the time it takes to stop a store and see that training goes on."""


def trained_without_store(kube_job: KubeJob, pod: Pod) -> None:
    """Returns once training went on for a while although the store is stopped."""
    before = kube_job.progress(pod)[-1]["step"]
    assert before < 3000, "the store stopped too late to show anything"
    reached(kube_job, lambda line: line["step"] > before + 400, "step without a store")


@pytest.fixture(scope="module")
def outlasted(lab: Lab) -> Ended:
    """A run in whose training the store was stopped for a while."""
    kube_job = lab.job(LONGER)
    kube_job.apply()
    pod = wait_for(kube_job.running, "pod at work", kube_job.story)
    wait_for(kube_job.results.committed, "first checkpoint", kube_job.story)
    with lab.bucket.stopped():
        trained_without_store(kube_job, pod)
    return kube_job.ended().completed()


def test_a_store_stopped_in_training_costs_nothing(outlasted: Ended) -> None:
    assert outlasted.only_pod().said["committed"] == 4000
    results = outlasted.kube_job.results
    assert list(results.losses()) == [1, *range(10, 4001, 10)]
    assert [one["exit_code"] for one in results.ledger()] == [0]


def test_a_pod_killed_while_its_checkpoints_wait_for_the_store_loses_only_those(lab: Lab, outlasted: Ended) -> None:
    kube_job = lab.job(LONGER, output=f"s3://{BUCKET}/killed")
    kube_job.apply()
    first = wait_for(kube_job.running, "pod at work", kube_job.story)
    wait_for(kube_job.results.committed, "first checkpoint", kube_job.story)
    with lab.bucket.stopped():
        trained_without_store(kube_job, first)
        lost = kube_job.progress(first)[-1]
        lab.kubectl("delete", "pod", first.name, "--grace-period=1")
    ended = kube_job.ended()
    assert_ends_like(outlasted, ended)
    left, done = kube_job.results.ledger()
    assert (left["exit_code"], left["message"], done["exit_code"]) == (None, "vanished", 0)
    last = next(pod for pod in ended.pods if pod.code == 0)
    resumed = re.search(r"^resuming after step (\d+) of 4000$", kube_job.logs(last), re.MULTILINE)
    assert resumed, kube_job.logs(last)
    assert int(resumed[1]) in range(400, lost["step"], 400)


def test_a_store_stopped_at_publish_is_waited_for(lab: Lab, straight: Ended) -> None:
    kube_job = undisturbed_but(straight, lab, "publish-stopped")
    kube_job.apply()
    reached(kube_job, lambda line: line["phase"] == "verify", "verification")
    with lab.bucket.stopped():
        reached(kube_job, lambda line: line["phase"] == "publish", "publication")
        assert kube_job.running()
    ended = kube_job.ended()
    ended.only_pod()
    assert_ends_like(straight, ended)


def test_a_node_drained_while_publishing_costs_no_training(lab: Lab, straight: Ended) -> None:
    kube_job = undisturbed_but(straight, lab, "drained")
    kube_job.apply()
    first = reached(kube_job, lambda line: line["phase"] == "verify", "verification")
    node = first.manifest["spec"]["nodeName"]
    with lab.bucket.stopped():  # so that the publication lasts until the node is drained
        reached(kube_job, lambda line: line["phase"] == "publish", "publication")
        try:
            selector = f"batch.kubernetes.io/job-name={kube_job.name}"
            lab.kubectl("drain", node, f"--pod-selector={selector}", *DRAIN)
        finally:
            lab.kubectl("uncordon", node)
    ended = kube_job.ended()
    assert_ends_like(straight, ended)
    (last,) = [pod for pod in ended.pods if pod.code == 0]
    assert "going on from the checkpoint of step 600\n" in kube_job.logs(last)
    assert [one["exit_code"] for one in kube_job.results.ledger()][-1] == 0


def test_of_two_jobs_of_one_run_one_publishes_and_the_other_leaves_with_80(lab: Lab, straight: Ended) -> None:
    first = undisturbed_but(straight, lab, "twice")
    first.apply()
    wait_for(lambda: first.results.json("run/owner.json"), "owner", first.story)
    other = replace(first, name=f"{first.name}-too", backoff_limit=0).run()
    pod = other.failed("BackoffLimitExceeded")
    assert (pod.code, pod.said["name"]) == (80, "FENCED")
    assert "heartbeat goes on" in pod.said["message"]
    assert_ends_like(straight, first.ended())
    assert len(first.results.ledger()) == 1


def test_a_random_uid_without_fsgroup_is_enough(lab: Lab) -> None:
    kube_job = lab.job(tiny_spec("uid"), pod_security={"runAsUser": 1000720000, "runAsGroup": 0})
    kube_job.run().completed()


def test_a_pod_on_the_claim_of_the_one_before_finds_what_was_pulled(lab: Lab, straight: Ended) -> None:
    storage_class = os.environ.get("TUNEJOB_TEST_STORAGE_CLASS", "local")
    if lab.kubectl.ask("get", "storageclass", storage_class).code:
        lacking(f"no StorageClass {storage_class}; name one that works in TUNEJOB_TEST_STORAGE_CLASS")
    lab.kubectl.apply(manifest("claim", name="scratch", storage_class=storage_class))
    kube_job = undisturbed_but(straight, lab, "claim", scratch=CLAIM.format("scratch"))
    kube_job.apply()
    first = wait_for(kube_job.running, "pod at work", kube_job.story)
    wait_for(kube_job.results.committed, "first checkpoint", kube_job.story)
    lab.kubectl("delete", "pod", first.name, "--wait=false")
    ended = kube_job.ended()
    assert_ends_like(straight, ended)
    assert "model.safetensors is here already, whole" in kube_job.logs(ended.only_pod())
