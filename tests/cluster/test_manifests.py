"""The manifests written by hand agree with the code. No cluster is needed."""

import json
import re
from typing import Any

import yaml

from job.__main__ import OUTPUT
from job.exits import CONTAINER, pod_failure_policy
from job.supervision import account, container, own
from tests.cluster.kubectl import MANIFESTS

KNOWN = {OUTPUT, account.JOB, account.POD, container.SCRATCH_LIMIT, own.HEARTBEAT_VARIABLE}


def job() -> Any:
    """The Job of job.yaml, every ``$word`` a string."""
    text = re.sub(r"^(\s*)\$(\w+)$", r"\1emptyDir: {}", (MANIFESTS / "job.yaml").read_text(), flags=re.MULTILINE)
    return next(one for one in yaml.safe_load_all(text) if one["kind"] == "Job")


def test_the_failure_policy_is_the_one_of_the_exit_contract() -> None:
    assert job()["spec"]["podFailurePolicy"] == pod_failure_policy()


def test_the_container_has_the_name_that_the_rules_name_and_variables_that_the_code_reads() -> None:
    (ours,) = job()["spec"]["template"]["spec"]["containers"]
    assert ours["name"] == CONTAINER
    named = {one["name"] for one in ours["env"]}
    assert {name for name in named if name.startswith("TUNEJOB_")} == KNOWN
    assert json.dumps(job()).count("ttlSecondsAfterFinished") == 0
