"""What a person meets when something is wrong: one sentence, the next thing to try, the right code, no traceback."""

from pathlib import Path

import pytest
import yaml

from launcher import cluster
from launcher.cli import main
from launcher.codes import Code
from tests.launcher.api import Answer, kubeconfig, refusal, served

SPEC = {
    "name": "run",
    "model": "s3://models/base",
    "data": {"train": "s3://data/train.jsonl", "eval_split": 0.1},
    "resources": {"cpu": "1", "memory": "1Gi"},
}
PROFILE = {
    "context": "stub",
    "namespace": "team",
    "image": "localhost/tunejob:test",
    "store": {"output": "s3://training/runs", "endpoint": "http://store:8333"},
}
RUNS = ("status", "logs", "wait", "why", "results", "retry", "cancel")
VERBS = [["submit", "run.yaml", "-d"], ["list"], *[[verb, "run"] for verb in RUNS], ["delete", "run", "--yes"]]


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec, a profile, and a kubeconfig whose server is away."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    (tmp_path / "tunejob.profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    (tmp_path / "kubeconfig").write_text(kubeconfig("http://127.0.0.1:9"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TUNEJOB_PROFILE", "XDG_CONFIG_HOME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "TRIES", 1)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last sentence on stderr; a traceback fails."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_a_cluster_that_is_away_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == Code.CLUSTER
    assert "http://127.0.0.1:9: the cluster does not answer" in said(capsys)


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_credentials_that_are_not_accepted_are_named(
    words: list[str], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = "/apis/batch/v1/namespaces/team/jobs"
    name = f"{jobs}/{rendered_name(desk, capsys)}"
    unknown = refusal(401, "Unauthorized", "Unauthorized")
    with served(desk, {f"GET {jobs}": unknown, f"GET {name}": unknown, "GET /version": unknown}):
        assert main(words) == Code.CLUSTER
    assert "not accepted (401); log in to the cluster again" in said(capsys)


def rendered_name(desk: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The Job's name that the spec of the desk gets."""
    assert main(["render", "run.yaml"]) == 0
    documents = yaml.safe_load_all(capsys.readouterr().out)
    return str(next(one["metadata"]["name"] for one in documents if one["kind"] == "Job"))


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_without_a_profile_every_place_is_named_where_one_was_looked_for(
    words: list[str], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "tunejob.profile.yaml").unlink()
    assert main(words) == Code.INVALID
    text = said(capsys)
    assert "tunejob.profile.yaml" in text
    assert "default.yaml" in text


def test_a_name_that_is_too_long_is_refused_before_anything_is_asked(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "run.yaml").write_text(yaml.safe_dump(SPEC | {"name": "a" * 31}), encoding="utf-8")
    assert main(["submit", "run.yaml", "-d"]) == Code.INVALID
    assert "run.yaml:" in said(capsys)


def test_a_server_that_is_too_old_is_refused_before_anything_is_made(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Answer(body={"items": [], "metadata": {}})
    answers = {
        "GET /version": Answer(body={"major": "1", "minor": "30"}),
        "GET /apis/batch/v1/namespaces/team/jobs": nothing,
        "GET /api/v1/namespaces/team": Answer(body={"metadata": {"name": "team"}}),
    }
    with served(desk, answers) as (_, script):
        assert main(["submit", "run.yaml", "-d"]) == Code.REFUSED
    assert "1.30" in said(capsys)
    assert not [path for method, path, _ in script.asked if method == "PATCH" and "dryRun" not in path]
