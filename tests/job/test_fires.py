"""Under a CronJob each fire is a run of its own, called alike by its container and by the launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job.exits import ExitCode
from job.spec import read, run_id
from launcher.labels import PER_FIRE, RUN, run_of

SPEC = {"name": "weekly", "model": "/no/such/model", "data": {"train": "/no/such/rows.jsonl"}}


def run_of_container(folder: Path, scheduling: dict[str, str], kube_job: str) -> tuple[str, str]:
    """The id of the run that a container says it is, and that of its spec; its model is missing, so it ends at once."""
    spec, word = folder / "spec.yaml", folder / "word"
    spec.write_text(yaml.safe_dump(SPEC | {"scheduling": scheduling}), encoding="utf-8")
    word.touch()
    env = os.environ | {
        "TUNEJOB_OUTPUT": str(folder / "runs"),
        "TUNEJOB_SCRATCH": str(folder / "scratch"),
        "TUNEJOB_TERMINATION_LOG": str(word),
        "TUNEJOB_JOB": kube_job,
    }
    done = subprocess.run([sys.executable, "-m", "job", "run", "--spec", str(spec)], env=env, capture_output=True)
    assert done.returncode == ExitCode.NOINPUT, done.stderr.decode()
    return json.loads(word.read_text(encoding="utf-8"))["run"], run_id(read(spec))


@pytest.mark.parametrize("kube_job", ["weekly-29461234", "weekly-29471314"])
def test_a_fire_is_called_alike_by_its_container_and_by_the_launcher(  # T28
    tmp_path: Path, kube_job: str
) -> None:
    run, of_spec = run_of_container(tmp_path, {"cron": "0 3 * * 1"}, kube_job)
    fire = {"kind": "Job", "metadata": {"name": kube_job, "labels": {RUN: of_spec, PER_FIRE: "true"}}}
    assert run == run_of(fire) != of_spec
    assert run.startswith(f"{of_spec}-")


def test_without_a_schedule_the_jobs_name_is_no_part_of_the_runs_id(tmp_path: Path) -> None:  # T28
    run, of_spec = run_of_container(tmp_path, {}, "weekly-29461234")
    assert run == of_spec


def test_two_fires_of_a_schedule_are_two_runs() -> None:
    labels = {RUN: "weekly-12345678", PER_FIRE: "true"}
    fires = {run_of({"kind": "Job", "metadata": {"name": f"weekly-{at}", "labels": labels}}) for at in (1, 2)}
    assert len(fires) == 2
