"""The desk that tests of the commands sit at."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher import cluster, submit
from tests.bench.stub import Objects, serving
from tests.launcher.api import kubeconfig
from tests.launcher.kit import PROFILE, Kit


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Kit]:
    """A desk in a folder of its own; its cluster is empty, and runs there take an hour."""
    (tmp_path / "tunejob.profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TUNEJOB_PROFILE", "XDG_CONFIG_HOME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "TRIES", 1)
    monkeypatch.setattr(submit, "GONE_SECONDS", 1.0)
    objects = Objects(run_seconds=3600)
    with serving(objects) as address:
        (tmp_path / "kubeconfig").write_text(kubeconfig(address), encoding="utf-8")
        yield Kit(objects, tmp_path, capsys)
