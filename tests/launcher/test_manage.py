"""Retry, cancel and delete: each touches what is meant and nothing that somebody else needs."""

from pathlib import Path

import pytest

from job import layout
from job.layout import fire_id
from job.storage.directory import DirectoryStore
from launcher import remote
from launcher.codes import Code
from launcher.verbs import Door
from tests.launcher.kit import CRON, Kit, rbac


def maps(kit: Kit) -> set[str]:
    return set(kit.objects.names("configmaps"))


def test_deleting_a_run_leaves_the_schedule_of_the_same_spec_whole_and_the_reverse(kit: Kit) -> None:
    spec, schedule = kit.spec(), kit.spec(scheduling=CRON)
    job = kit.submitted(spec)
    of_run = maps(kit)
    kit.submitted(schedule)
    of_schedule = maps(kit) - of_run
    assert kit.cli("delete", job, "--yes").code == Code.OK
    assert (kit.objects.names("cronjobs"), maps(kit)) == (["run"], of_schedule)
    assert kit.submitted(spec) == job
    assert kit.cli("delete", "run", "--yes").code == Code.OK
    assert (kit.objects.names("cronjobs"), kit.objects.names("jobs"), maps(kit)) == ([], [job], of_run)


@pytest.mark.parametrize("verb", [("delete", "--yes"), ("cancel",)], ids=["delete", "cancel"])
def test_the_file_of_a_spec_means_what_that_spec_makes(kit: Kit, verb: tuple[str, ...]) -> None:
    spec, schedule = kit.spec(), kit.spec(scheduling=CRON)
    job = kit.submitted(spec)
    assert "no run run on a schedule" in kit.cli(verb[0], schedule, *verb[1:]).err
    kit.submitted(schedule)
    said = kit.cli(verb[0], schedule, *verb[1:])
    assert said.code == Code.OK
    assert ("run: the schedule is gone" if verb[0] == "cancel" else "deleted CronJob/run") in said.err
    assert (kit.objects.names("jobs"), kit.objects.names("cronjobs")) == ([job], [])
    assert kit.cli(verb[0], spec, *verb[1:]).code == Code.OK
    kit.submitted(schedule)
    assert kit.cli(verb[0], spec, *verb[1:]).code == Code.REFUSED
    assert kit.objects.names("cronjobs") == ["run"]


def test_a_beginning_that_a_run_and_its_schedule_share_is_refused_with_both_names(kit: Kit) -> None:
    job = kit.submitted(kit.spec())
    kit.submitted(kit.spec(scheduling=CRON))
    said = kit.cli("cancel", "ru")
    assert (said.code, f"fits several runs (run, {job[:-9]})" in said.err) == (Code.REFUSED, True), said.err


@pytest.mark.parametrize("verb", [("delete", "--yes"), ("cancel",), ("status",), ("retry",)], ids=lambda verb: verb[0])
def test_a_name_that_fits_several_runs_is_refused_by_every_verb(kit: Kit, verb: tuple[str, ...]) -> None:
    kit.submitted(kit.spec())
    kit.submitted(kit.spec(training={"epochs": 2}))
    said = kit.cli(verb[0], "run", *verb[1:])
    assert (said.code, "fits several runs" in said.err) == (Code.REFUSED, True), said.err
    assert len(kit.objects.names("jobs")) == 2


@pytest.mark.parametrize("name", ["first-", "a b", "./x", "日本", "-", "x" * 70, "a=b"])
@pytest.mark.parametrize("verb", [("status",), ("delete", "--yes")], ids=lambda verb: verb[0])
def test_a_name_that_is_no_label_is_simply_not_there(kit: Kit, verb: tuple[str, ...], name: str) -> None:
    kit.submitted(kit.spec())
    said = kit.cli(verb[0], "--", name) if len(verb) == 1 else kit.cli(*verb, "--", name)
    assert (said.code, f"no run {name}" in said.err) == (Code.REFUSED, True), said.err


def test_a_beginning_that_ends_in_a_hyphen_is_a_beginning(kit: Kit) -> None:
    job = kit.submitted(kit.spec())
    assert job in kit.cli("status", "run-").out


def test_the_fire_of_a_schedule_is_retried_as_the_same_run_by_a_job_that_names_its_folder(kit: Kit) -> None:
    kit.submitted(kit.spec(scheduling=CRON))
    kit.fire("run", "run-29000001")
    schedule = kit.got("cronjobs", "run")["metadata"]["labels"]["tunejob.dev/run"]
    fire = fire_id(schedule, "run-29000001")
    said = kit.cli("retry", fire, "-d")
    assert (said.code, said.out) == (Code.OK, f"{fire}\n"), said
    (made,) = set(kit.objects.names("jobs")) - {"run-29000001"}
    container = kit.got("jobs", made)["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["run", "--folder", f"s3://training/runs/{fire}"]
    assert kit.cli("status", fire).out.splitlines()[0].split() == ["run", fire]
    assert made in kit.cli("status", fire).out, "of two Jobs of a run the newer one is shown"
    assert kit.got("cronjobs", "run")["metadata"]["generation"] == 1
    kit.fail(made)
    assert kit.cli("retry", fire, "-d").code == Code.OK
    assert len(kit.objects.names("jobs")) == 3
    assert kit.cli("delete", fire, "--yes").code == Code.OK
    assert kit.objects.names("jobs") == []
    assert kit.objects.names("cronjobs") == ["run"]


def test_a_schedule_is_not_retried_and_what_is_done_instead_is_named(kit: Kit) -> None:
    kit.submitted(kit.spec(scheduling=CRON))
    said = kit.cli("retry", "run")
    assert said.code == Code.REFUSED
    assert "create job NAME --from=cronjob/run" in said.err


def store_at(folder: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> DirectoryStore:
    """What a run left, in a folder that stands for the store; other runs have nothing there."""
    store = DirectoryStore(folder / "store" / run)
    store.write(layout.MANIFEST, b"{}")
    store.write("adapter_config.json", b"{}")
    monkeypatch.setattr(remote, "open_store", lambda uri, settings: DirectoryStore(folder / "store" / Path(uri).name))
    return store


def test_the_data_of_a_run_goes_even_where_only_its_config_map_is_left(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = kit.spec()
    job = kit.submitted(spec)
    store = store_at(kit.folder, monkeypatch, job[:-9])
    (config_map,) = maps(kit)
    left = kit.got("configmaps", config_map)
    kit.cli("delete", job, "--yes")
    metadata = {key: value for key, value in left["metadata"].items() if key != "ownerReferences"}
    kit.objects.put("configmaps", left | {"metadata": metadata})
    monkeypatch.setattr("sys.stdin", Answering("n\n"))
    assert f"delete {job[:-9]} (no Job is left)" in kit.cli("delete", spec, "--data").err
    said = kit.cli("delete", spec, "--data", "--yes")
    assert (said.code, "2 objects below s3://training/runs/run-" in said.err) == (Code.OK, True), said
    assert list(store.list("")) == []
    assert maps(kit) == set()


@pytest.mark.parametrize("words", [["logs"], ["logs", "-f"], ["wait"], ["results"]], ids=" ".join)
def test_a_schedule_has_no_log_end_or_result_of_its_own(kit: Kit, words: list[str]) -> None:
    kit.submitted(kit.spec(scheduling=CRON))
    said = kit.cli(*words, "run")
    assert (said.code, "run is a schedule, and every fire a run of its own" in said.err) == (Code.REFUSED, True), said


def test_the_data_of_a_schedule_is_that_of_its_fires(kit: Kit) -> None:
    schedule = kit.spec(scheduling=CRON)
    kit.submitted(schedule)
    said = kit.cli("delete", "run", "--data", "--yes")
    assert (said.code, "delete --data FIRE" in said.err) == (Code.REFUSED, True), said
    assert kit.objects.names("cronjobs") == ["run"]
    left = kit.got("configmaps", kit.objects.names("configmaps")[0])
    kit.cli("delete", "run", "--yes")
    metadata = {key: value for key, value in left["metadata"].items() if key != "ownerReferences"}
    kit.objects.put("configmaps", left | {"metadata": metadata})
    said = kit.cli("delete", schedule, "--data", "--yes")
    assert (said.code, "no run run on a schedule" in said.err) == (Code.REFUSED, True), said


def test_what_is_deleted_is_shown_before_it_is_asked_for(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    job = kit.submitted(kit.spec())
    monkeypatch.setattr("sys.stdin", Answering("n\n"))
    said = kit.cli("delete", "ru", "--data")
    assert said.err.startswith(
        f"in namespace bench, delete {job[:-9]} (running): Jobs, pods and logs, and EVERYTHING BELOW "
        f"s3://training/runs/{job[:-9]}? [y/N] nothing was deleted"
    )
    assert kit.objects.names("jobs") == [job]


def test_where_nobody_can_be_asked_nothing_is_deleted_and_the_code_says_so(kit: Kit) -> None:
    job = kit.submitted(kit.spec())
    said = kit.cli("delete", job)
    assert (said.code, f"delete {job[:-9]} (running)" in said.err, "--yes" in said.err) == (Code.REFUSED, True, True)
    assert kit.objects.names("jobs") == [job]


class Answering:
    """A terminal at which somebody sits."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def isatty(self) -> bool:
        """It is one."""
        return True

    def readline(self) -> str:
        """What is typed."""
        return self._answer


def test_a_deletion_waits_as_long_as_the_fires_pods_may_take(kit: Kit) -> None:
    kit.submitted(kit.spec(scheduling=CRON, resources={"cpu": "1", "memory": "1Gi", "grace_seconds": 600}))
    assert Door().find("run").grace_seconds == 600


def test_a_permission_that_is_missing_for_a_schedule_names_the_schedulers_role(kit: Kit) -> None:
    kit.refuse("DRY cronjobs", 403, rbac("patch", "cronjobs"))
    said = kit.cli("submit", kit.spec(scheduling=CRON), "-d")
    assert (said.code, "role tunejob-scheduler" in said.err) == (Code.CLUSTER, True), said.err
