"""`import tunejob`: every verb as one call, on a real cluster, as the submitter."""

import pytest
import yaml

import tunejob
from tests.cluster.kit import Kit

pytestmark = pytest.mark.cluster


def test_a_run_from_its_spec_to_its_results_in_python(kit: Kit) -> None:
    spec = yaml.safe_load(kit.spec("python").read_text(encoding="utf-8"))
    with kit.python():
        rendered = tunejob.render(spec)
        assert [one["kind"] for one in rendered.objects] == ["ConfigMap", "Job"]
        submitted = tunejob.submit(spec)
        run = submitted.run.id
        assert (submitted.is_new, submitted.run.job) == (True, rendered.name)
        assert not tunejob.submit(spec).is_new
        assert run in [one.id for one in tunejob.runs()]
        ended = tunejob.wait(run, timeout=240)
        assert (ended.state, len(ended.digest)) == ("complete", 64)
        assert tunejob.status(run)["state"] == "complete"
        assert tunejob.why(run)[0].name == "complete"
        assert any("lora of" in line.text for line in tunejob.logs(run))
        assert tunejob.results(run)["evaluation.tuned.loss"] > 0
        with pytest.raises(tunejob.JobError, match="is complete"):
            tunejob.retry(run)
        with pytest.raises(tunejob.JobError, match="is complete already"):
            tunejob.cancel(run)
        assert all(check.state != "fail" for check in tunejob.doctor())
        gone = tunejob.delete(run, data=True)
        assert any(rendered.name in one for one in gone)
        with pytest.raises(tunejob.JobError, match="no run"):
            tunejob.status(run)
