"""A schedule: a CronJob, whose every fire is a run of its own."""

import pytest

from job.layout import attempt_key
from launcher.codes import Code
from launcher.labels import fire_id
from tests.cluster.kit import Kit
from tests.cluster.kubectl import wait_for

pytestmark = pytest.mark.cluster


def test_two_fires_of_a_schedule_are_two_runs_with_folders_of_their_own(kit: Kit) -> None:
    spec = kit.spec("nightly", scheduling={"cron": "0 3 1 1 *", "time_zone": "Asia/Tokyo"})
    refused = kit.cli("submit", str(spec))
    assert (refused.code, "may not" in refused.err) == (Code.CLUSTER, True), refused
    said = kit.cli("submit", str(spec), role="scheduler")
    assert said.code == Code.OK, said
    schedule = said.out.strip()
    again = kit.cli("submit", str(spec), role="scheduler")
    assert (again.code, again.out) == (Code.OK, said.out)
    assert kit.kubectl.get("cronjob", "nightly")["metadata"]["generation"] == 1
    fires = ("nightly-by-hand-1", "nightly-by-hand-2")
    for fire in fires:
        kit.kubectl("create", "job", fire, "--from=cronjob/nightly")
    runs = [fire_id(schedule, fire) for fire in fires]
    for run in runs:
        waited = kit.cli("wait", run)
        assert waited.code == Code.OK, waited
        assert kit.bucket.has(f"runs/{run}/run/manifest.json")
    listed = kit.cli("list").out
    assert all(run in listed for run in (schedule, *runs)), listed
    assert "scheduled" in listed
    deleted = kit.cli("delete", schedule, "--yes", role="scheduler")
    assert deleted.code == Code.OK, deleted
    wait_for(lambda: "nightly" not in kit.kubectl("get", "cronjobs,jobs,configmaps", "-o", "name"), "end of everything")


def test_a_fire_that_failed_goes_on_as_the_same_run_and_a_run_of_the_same_spec_is_another_thing(kit: Kit) -> None:
    absent = {"train": "s3://training/data/absent.jsonl"}
    spec = kit.spec("hourly", data=absent, scheduling={"cron": "0 3 1 1 *"})
    schedule = kit.cli("submit", str(spec), role="scheduler").out.strip()
    kit.kubectl("create", "job", "hourly-by-hand", "--from=cronjob/hourly")
    fire = fire_id(schedule, "hourly-by-hand")
    assert kit.cli("wait", fire).code == Code.JOB_FAILED
    retried = kit.cli("retry", fire, "-d")
    assert (retried.code, retried.out.strip()) == (Code.OK, fire), retried
    assert kit.cli("wait", fire).code == Code.JOB_FAILED
    assert all(kit.bucket.has(f"runs/{fire}/{attempt_key(number)}") for number in (1, 2)), "two attempts of one run"
    paused = ("patch", "cronjob", "hourly", "-p", '{"spec":{"suspend":true}}')
    kit.kubectl(*paused)
    assert kit.cli("submit", str(spec), role="scheduler").code == Code.OK
    assert kit.kubectl.get("cronjob", "hourly")["spec"]["suspend"] is True, "a pause outlives another submit"
    plain = kit.spec("hourly", data=absent)
    run = kit.cli("submit", str(plain), "-d").out.strip()
    assert run == schedule, "they train the same"
    deleted = kit.cli("delete", str(plain), "--yes")
    assert deleted.code == Code.OK, deleted
    held = kit.kubectl("get", "cronjobs,configmaps", "-o", "name", "-l", f"tunejob.dev/run={schedule}").split()
    assert [one.partition("/")[0] for one in held] == ["cronjob.batch", "configmap"], held
    assert kit.cli("delete", fire, "--yes").code == Code.OK
    assert kit.cli("delete", "hourly", "--yes", role="scheduler").code == Code.OK
    wait_for(lambda: "hourly" not in kit.kubectl("get", "cronjobs,jobs,configmaps", "-o", "name"), "end of everything")


@pytest.mark.parametrize("name", ["first-", "a b", "./x", "日本"])
def test_a_name_that_is_no_label_is_simply_not_there(kit: Kit, name: str) -> None:
    said = kit.cli("status", name)
    assert (said.code, f"no run {name}" in said.err) == (Code.REFUSED, True), said
