"""What the API server says to the manifests before anything runs."""

import json

import pytest
import yaml

from tests.cluster.kubectl import Kubectl, Said
from tests.cluster.running import KubeJob, Lab, tiny_spec

pytestmark = pytest.mark.cluster


def dry_run(kubectl: Kubectl, text: str) -> Said:
    """What the server would answer to an apply."""
    return kubectl.ask("apply", "--dry-run=server", "-f", "-", text=text)


def its_pod(kube_job: KubeJob, **changes: object) -> str:
    """The pod that a Job's controller would make, with changes to its container's security context."""
    template = next(one for one in yaml.safe_load_all(kube_job.text) if one["kind"] == "Job")["spec"]["template"]
    template["spec"]["containers"][0]["securityContext"] |= changes
    return json.dumps({"apiVersion": "v1", "kind": "Pod"} | template | {"metadata": {"name": kube_job.name}})


def test_pod_security_restricted_admits_the_pod_without_a_word(lab: Lab) -> None:
    kube_job = lab.job(tiny_spec("admitted"))
    for text in (kube_job.text, its_pod(kube_job)):
        said = dry_run(lab.kubectl, text)
        assert (said.code, said.err) == (0, "")
    refused = dry_run(lab.kubectl, its_pod(kube_job, allowPrivilegeEscalation=True))
    assert refused.code != 0
    assert 'violates PodSecurity "restricted' in refused.err


def test_a_second_manager_of_the_same_manifests_meets_no_conflict(lab: Lab) -> None:
    kube_job = lab.job(tiny_spec("managed"))
    suspended = kube_job.text.replace("  backoffLimit:", "  suspend: true\n  backoffLimit:")
    for manager in ("first", "second"):
        lab.kubectl("apply", "--server-side", f"--field-manager={manager}", "-f", "-", text=suspended)
    assert kube_job.record()["metadata"]["generation"] == 1
    lab.kubectl("delete", "job", kube_job.name)
