"""``tunejob merge`` as a user calls it."""

from pathlib import Path

import pytest

import tunejob
from job.errors import InputMissing
from job.exits import ExitCode
from launcher.cli import main
from launcher.local import NotInstalled
from launcher.merging import merge


def test_an_adapter_in_a_store_is_to_be_fetched_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "s3://bucket/run", "--output", "merged"]) == ExitCode.CONFIG
    assert "fetch it first" in capsys.readouterr().err


def test_without_the_libraries_it_says_which_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.local.importlib.util.find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(NotInstalled, match=r"merging needs peft: pip install"):
        merge("run", "merged")


@pytest.mark.slow
def test_a_published_run_becomes_a_model_and_the_difference_is_data(tiny_llama: Path, tmp_path: Path) -> None:
    from tests.job.test_merge import trained_adapter

    adapter = trained_adapter(tmp_path, tiny_llama)
    found = tunejob.merge(f"file:{adapter}", tmp_path / "merged")
    assert found["max_abs_logit"] < 1e-5
    assert found["tokens"] > 20
    with pytest.raises(InputMissing, match="not merged"):
        tunejob.merge(tmp_path, tmp_path / "other")
