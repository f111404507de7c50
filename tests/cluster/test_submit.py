"""Submitting on a real API server: what is left when it is cut off, what is adopted, refused, taken away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.spec import read
from launcher import cluster
from launcher.codes import ClusterUnreachable, Code
from launcher.verbs import Door
from tests.cluster.kit import Kit
from tests.cluster.kubectl import Manifest, wait_for

pytestmark = pytest.mark.cluster

NO_IMAGE = "localhost/no-such-image:0"


@pytest.fixture
def pending(kit: Kit) -> Path:
    """A profile whose pods never start: there is no such image."""
    return kit.profile_with("pending", image=NO_IMAGE)


def objects(kit: Kit, run: str) -> tuple[list[Manifest], list[Manifest]]:
    """Jobs and ConfigMaps of a run."""
    selector = f"tunejob.dev/run={run}"
    return kit.kubectl.listed("jobs", selector), kit.kubectl.listed("configmaps", selector)


def is_whole(kit: Kit, run: str) -> bool:
    """Whether there is one Job and one ConfigMap of a run, and the one owns the other."""
    jobs, maps = objects(kit, run)
    owners = [owner["uid"] for one in maps for owner in one["metadata"].get("ownerReferences", [])]
    return len(jobs) == len(maps) == 1 and owners == [jobs[0]["metadata"]["uid"]]


def cut(door: Door, nth: int, is_sent: bool) -> Callable[[], None]:
    """Cuts the network at the nth write, before or after the server got it, for good; gives what mends it."""
    client: Any = door.cluster.client
    whole = client.call_api
    seen = 0

    def call(method: str, url: str, *arguments: Any, **named: Any) -> Any:
        nonlocal seen
        seen += method == "PATCH" and "dryRun" not in url
        if seen < nth:
            return whole(method, url, *arguments, **named)
        if seen == nth and is_sent and method == "PATCH":
            seen += 1
            whole(method, url, *arguments, **named)
        raise ConnectionError("the network is cut")

    client.call_api = call

    def mend() -> None:
        client.call_api = whole

    return mend


@pytest.mark.parametrize("is_sent", [False, True], ids=["before the server heard it", "after the server heard it"])
def test_a_submission_cut_off_at_any_write_is_made_whole_by_the_next(
    kit: Kit, pending: Path, monkeypatch: pytest.MonkeyPatch, is_sent: bool
) -> None:
    monkeypatch.setattr(cluster, "TRIES", 1)
    spec = read(kit.spec(f"cut-{'after' if is_sent else 'before'}"))
    with kit.python(profile=pending) as door:
        for nth in range(1, 5):  # ConfigMap, Job, ConfigMap again, its owner
            mend = cut(door, nth, is_sent)
            with pytest.raises(ClusterUnreachable):
                door.submit(spec)
            mend()
            run = door.submit(spec).run
            assert is_whole(kit, run.id), (nth, objects(kit, run.id))
            assert door.delete(run.id)
            wait_for(lambda run=run: objects(kit, run.id) == ([], []), f"end of {run.id}")  # type: ignore[misc]


def test_a_job_that_is_refused_leaves_no_config_map(kit: Kit) -> None:
    kit.kubectl.apply(
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: no-jobs}\nspec: {hard: {count/jobs.batch: '0'}}\n"
    )
    try:
        wait_for(lambda: kit.kubectl.get("resourcequota", "no-jobs").get("status", {}).get("hard"), "quota")
        said = kit.cli("submit", str(kit.spec("refused-job")), "-d")
        assert said.code == Code.REFUSED, said
        assert "no-jobs" in said.err
        assert not any("refused-job" in one for one in kit.kubectl("get", "configmaps", "-o", "name").split())
    finally:
        kit.kubectl("delete", "resourcequota", "no-jobs")


def test_the_same_spec_again_attaches_and_another_job_of_the_run_is_refused_until_it_replaces(
    kit: Kit, pending: Path
) -> None:
    spec = kit.spec("again")
    first = kit.cli("submit", str(spec), "-d", profile=pending)
    assert (first.code, first.out.strip()[:6]) == (0, "again-"), first
    run = first.out.strip()
    second = kit.cli("submit", str(spec), "-d", profile=pending)
    assert second.code == 0
    assert is_whole(kit, run)
    bigger = kit.spec("again", resources={"memory": "3Gi"})
    refused = kit.cli("submit", str(bigger), "-d", profile=pending)
    assert refused.code == Code.REFUSED
    assert "--replace" in refused.err
    replaced = kit.cli("submit", str(bigger), "-d", "--replace", profile=pending)
    assert replaced.code == 0, replaced
    assert is_whole(kit, run)
    cancelled = kit.cli("cancel", run)
    assert cancelled.code == 0, cancelled
    assert objects(kit, run)[0] == []


def test_another_spec_under_the_same_name_of_a_job_is_refused_with_the_difference(kit: Kit, pending: Path) -> None:
    spec = kit.spec("other")
    rendered = list(yaml.safe_load_all(kit.cli("render", str(spec), profile=pending).out))
    kube_job = next(one for one in rendered if one["kind"] == "Job")
    config_map = next(one for one in rendered if one["kind"] == "ConfigMap")
    kube_job["metadata"]["annotations"]["tunejob.dev/spec-digest"] = "0" * 64
    config_map["data"]["spec.yaml"] = config_map["data"]["spec.yaml"].replace("max_steps: 6", "max_steps: 7")
    for one in (config_map, kube_job):
        kit.kubectl.apply(yaml.safe_dump(one))
    said = kit.cli("submit", str(spec), "-d", profile=pending)
    assert said.code == Code.REFUSED
    assert "training.max_steps: 6 here, 7 there" in said.err
    assert kit.cli("delete", kube_job["metadata"]["name"], "--yes").code == 0


def test_a_failed_run_says_so_is_retried_as_a_new_job_and_deleted_with_everything(kit: Kit) -> None:
    spec = kit.spec("failing", data={"train": "s3://training/data/absent.jsonl"})
    run = kit.cli("submit", str(spec), "-d").out.strip()
    waited = kit.cli("wait", run)
    assert waited.code == Code.JOB_FAILED, waited
    assert "s3://training/data/absent.jsonl" in waited.err
    again = kit.cli("submit", str(spec), "-d")
    assert again.code == Code.JOB_FAILED
    assert f"tunejob retry {run}" in again.err
    retried = kit.cli("retry", run, "-d")
    assert retried.code == 0, retried
    assert len(objects(kit, run)[0]) == 2
    assert kit.cli("wait", run).code == Code.JOB_FAILED
    asked = kit.cli("delete", run)
    assert len(objects(kit, run)[0]) == 2, asked
    assert kit.cli("delete", run, "--yes").code == 0
    wait_for(lambda: objects(kit, run) == ([], []), f"end of {run}")
    gone = kit.cli("status", run)
    assert (gone.code, gone.err.count("\n")) == (Code.REFUSED, 1)
