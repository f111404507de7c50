"""Where the old commands write, and what they make of what is there."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from job import layout
from job.errors import Conflict, InputMissing, JobError, SpecInvalid
from launcher.folders import as_folder, default_folder, settle

NOW = datetime(2025, 1, 15, 14, 30, 22, tzinfo=UTC)

STATES = {
    "absent": None,
    "empty": [],
    "finished": [layout.OWNER, layout.MANIFEST],
    "begun": [layout.OWNER, layout.checkpoint_prefix(100) + layout.COMMIT],
    "entered": [layout.OWNER],
    "foreign": ["notes.txt"],
}


def stand(folder: Path, state: str) -> Path:
    """Makes ``folder`` what ``state`` says."""
    files = STATES[state]
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_the_default_folder_carries_method_and_time() -> None:  # T28
    assert default_folder("lora", NOW) == Path("models/fine_tuned_models/lora_model_20250115_143022")
    assert settle("qlora", None, NOW, False, False) == (
        Path("models/fine_tuned_models/qlora_model_20250115_143022"),
        None,
    )


@pytest.mark.parametrize(
    ("state", "resume", "outcome"),
    [
        ("absent", False, None),
        ("empty", False, None),
        ("absent", True, InputMissing),
        ("empty", True, InputMissing),
        ("finished", False, Conflict),
        ("finished", True, None),
        ("begun", False, Conflict),
        ("begun", True, None),
        ("entered", False, None),
        ("entered", True, None),
        ("foreign", False, Conflict),
        ("foreign", True, Conflict),
    ],
)
def test_what_stands_in_the_folder_decides(
    tmp_path: Path, state: str, resume: bool, outcome: type[JobError] | None
) -> None:
    folder = stand(tmp_path / "out", state)
    if outcome is None:
        assert settle("lora", str(folder), NOW, resume, False) == (folder, None)
    else:
        with pytest.raises(outcome, match="out"):
            settle("lora", str(folder), NOW, resume, False)


def test_a_finished_run_is_set_aside_whole(tmp_path: Path) -> None:
    folder = stand(tmp_path / "out", "finished")
    assert settle("lora", str(folder), NOW, False, True) == (folder, tmp_path / "out.20250115_143022")
    assert not folder.exists()
    assert (tmp_path / "out.20250115_143022" / layout.MANIFEST).is_file()


@pytest.mark.parametrize("state", ["begun", "foreign"])
def test_overwrite_touches_nothing_but_a_finished_run(tmp_path: Path, state: str) -> None:
    folder = stand(tmp_path / "out", state)
    before = sorted(folder.rglob("*"))
    with pytest.raises(Conflict):
        settle("lora", str(folder), NOW, False, True)
    assert sorted(folder.rglob("*")) == before


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(Conflict, match="is no run of ours"):
        settle("lora", str(tmp_path / "out"), NOW, False, False)


def test_resume_has_to_name_a_folder() -> None:
    with pytest.raises(SpecInvalid, match="--output-dir"):
        settle("lora", None, NOW, True, False)


def test_only_folders_of_this_machine_are_taken(tmp_path: Path) -> None:
    assert as_folder(f"file://{tmp_path}") == tmp_path
    assert as_folder("models/x") == Path("models/x")
    with pytest.raises(SpecInvalid, match="a folder of this machine"):
        as_folder("s3://bucket/x")
