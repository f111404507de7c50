"""A schedule: a CronJob, whose every fire is a run of its own."""

import pytest

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
