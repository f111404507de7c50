"""Jobs that cannot succeed: one pod, a code, and a sentence that names the cause."""

import pytest

from tests.cluster.bucket import BUCKET, Key
from tests.cluster.running import Lab, tiny_spec

pytestmark = pytest.mark.cluster


def test_a_missing_key_ends_the_job_after_one_pod(lab: Lab) -> None:
    kube_job = lab.job(tiny_spec("absent", data={"train": f"s3://{BUCKET}/data/absent.jsonl"}))
    pod = kube_job.run().failed("PodFailurePolicy")
    assert (pod.code, pod.said["code"], pod.said["name"]) == (66, 66, "NOINPUT")
    assert f"s3://{BUCKET}/data/absent.jsonl" in pod.said["message"]


def test_a_refused_secret_ends_the_job_after_one_pod(lab: Lab) -> None:
    unknown = Key()
    ended = lab.job(tiny_spec("refused"), credentials=lab.make_credentials("unknown", unknown)).run()
    pod = ended.failed("PodFailurePolicy")
    assert (pod.code, pod.said["name"]) == (77, "NOPERM")
    everything = str(pod.manifest) + ended.kube_job.logs(pod)
    assert unknown.secret not in everything
    assert unknown.id not in everything


def test_the_containers_memory_used_up_by_the_worker_is_137_and_counted(lab: Lab, small_model: str) -> None:
    # Enough to load the model. A step over all rows at once wants several times as much.
    training = {"batch_size": 48, "micro_batch_size": 48, "max_steps": 2}
    spec = tiny_spec("memory-worker", model=small_model, training=training)
    kube_job = lab.job(spec, memory="1500Mi", scratch_limit="2Gi", backoff_limit=0)
    # 83, the device's memory, would fail the Job by its policy; this one is counted against the back-off limit.
    pod = kube_job.run().failed("BackoffLimitExceeded")
    assert (pod.code, kube_job.record()["status"]["failed"]) == (137, 1), kube_job.story()
    # The kernel either ends the worker (with cgroup version 2 the supervisor may die with it), or lets it stand still,
    # taking back the pages of its code for ever: then the supervisor ends it.
    said = pod.said or {"name": "MEMORY", "message": ": the container's memory limit"}
    assert (said["name"], pod.reason in ("OOMKilled", "Error")) == ("MEMORY", True)
    assert ": the container's memory limit" in said["message"]
    assert pod.reason == "OOMKilled" or "rank-0 stands still" in said["message"]


def test_the_containers_memory_used_up_by_pid_1_is_137_and_counted(lab: Lab) -> None:
    # Less than the interpreter and its libraries take.
    kube_job = lab.job(tiny_spec("memory-pid-1"), memory="48Mi", backoff_limit=0)
    pod = kube_job.run().failed("BackoffLimitExceeded")
    assert (pod.code, pod.reason, kube_job.record()["status"]["failed"]) == (137, "OOMKilled", 1), kube_job.story()
    assert not pod.said
