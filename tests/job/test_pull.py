"""Inputs: used where they lie, or brought and proven; and seen to be what earlier attempts read."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputMissing, JobError, SpecInvalid
from job.inputs import Input, read_inputs, write_inputs
from job.spec import JobSpec
from job.storage.store import local_path, open_store
from job.supervision import pull
from job.supervision.pull import Survey, survey

REPOSITORY = Path(__file__).parents[2]


def spec_of(model: str, train: str, eval: str | None = None) -> JobSpec:
    return JobSpec.model_validate({"name": "a", "model": model, "data": {"train": train, "eval": eval}})


def rows(path: Path, text: str = '{"text": "a"}\n') -> Path:
    path.write_text(text)
    return path


def test_local_inputs_are_used_where_they_lie(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train, evaluation = rows(tmp_path / "train.jsonl"), rows(tmp_path / "eval.jsonl")
    spec = spec_of(str(tiny_llama), "train.jsonl", f"file://{evaluation}")
    inputs = survey(spec, tmp_path / "brought").bring().inputs
    assert inputs.model == Input(str(tiny_llama), tiny_llama)
    assert inputs.train == (Input("train.jsonl", train),)
    assert inputs.eval == Input(f"file://{evaluation}", evaluation)
    write_inputs(tmp_path / "inputs.json", inputs)
    assert read_inputs(tmp_path / "inputs.json") == inputs
    assert not (tmp_path / "brought").exists()


def test_a_folder_wins_over_a_hub_id_of_the_same_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(tiny_llama)
    rows(tmp_path / "train.jsonl")
    inputs = survey(spec_of("org/name", "train.jsonl"), tmp_path / "brought").bring().inputs
    assert inputs.model.path == tmp_path / "org" / "name"


def test_a_tilde_is_the_home_folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_llama)
    rows(tmp_path / "train.jsonl")
    inputs = survey(spec_of("~/model", "~/train.jsonl"), tmp_path / "brought").bring().inputs
    assert inputs.model.path == tmp_path / "model"


def test_a_hub_model_that_is_neither_here_nor_on_the_hub_is_said_to_be_looked_for_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "train.jsonl")
    code = """
import sys
from pathlib import Path
from job.errors import InputMissing
from job.spec import JobSpec
from job.supervision.pull import survey
spec = JobSpec.model_validate({"name": "a", "model": "org/name", "data": {"train": sys.argv[1]}})
try:
    survey(spec, Path(sys.argv[2])).bring()
except InputMissing as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "train.jsonl"), str(tmp_path / "work")],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "model org/name: HF_HUB_OFFLINE is set" in said.stdout


NAMED_TWICE: dict[str, tuple[dict[str, Any], int]] = {
    "to train on and to evaluate on": ({"train": "s3://b/t.jsonl", "eval": "s3://b/t.jsonl"}, 2),
    "with two weights": ({"train": ["s3://b/t.jsonl", {"from": "s3://b/t.jsonl", "weight": 2}]}, 2),
}


@pytest.mark.parametrize(("data", "count"), NAMED_TWICE.values(), ids=NAMED_TWICE)
def test_an_object_that_is_named_twice_is_brought_once_and_read_there(
    data: dict[str, Any], count: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    rows(tmp_path / "store" / "t.jsonl")
    monkeypatch.setattr(pull, "local_path", lambda uri: None if uri.startswith("s3://") else local_path(uri))
    monkeypatch.setattr(pull, "open_store", lambda uri: open_store(str(tmp_path / "store")))
    spec = JobSpec.model_validate({"name": "a", "model": str(tiny_llama), "data": data})
    brought = survey(spec, tmp_path / "brought").bring()
    inputs = [*brought.inputs.train, *([brought.inputs.eval] if brought.inputs.eval else [])]
    assert [one.path.read_text() for one in inputs] == ['{"text": "a"}\n'] * count
    assert len({record["name"] for record in brought.records}) == len(brought.records)


MISSING: list[tuple[str, dict[str, str], type[JobError], list[str]]] = [
    ("model path", {"model": "/no/model"}, InputMissing, ["model /no/model", "no such folder", "a hub id is org/name"]),
    ("model word", {"model": "llama"}, InputMissing, ["model llama", "looked for", "a hub id is org/name"]),
    ("model file", {"model": "train.jsonl"}, InputMissing, ["model train.jsonl: a file", "config.json"]),
    ("data", {"train": "nothing.jsonl"}, InputMissing, ["data.train nothing.jsonl: no such file", "looked for"]),
    ("data folder", {"train": "corpus"}, InputMissing, ["data.train corpus: a folder", "name a file", "part.jsonl"]),
    ("scheme", {"train": "gs://bucket/t.jsonl"}, SpecInvalid, ["gs://bucket", "s3://BUCKET", "or a folder"]),
    ("eval", {"eval": "nothing.jsonl"}, InputMissing, ["data.eval nothing.jsonl: no such file"]),
    ("file URI", {"train": "file:nothing.jsonl"}, InputMissing, ["data.train file:nothing.jsonl"]),
    ("elsewhere", {"train": "file://host/x"}, SpecInvalid, ["file://host/x", "file:///PATH"]),
]


@pytest.mark.parametrize(("change", "kind", "words"), [case[1:] for case in MISSING], ids=[case[0] for case in MISSING])
def test_a_missing_input_is_named_with_what_was_looked_for(
    change: dict[str, str],
    kind: type[JobError],
    words: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "train.jsonl")
    (tmp_path / "corpus").mkdir()
    rows(tmp_path / "corpus" / "part.jsonl")
    spec = spec_of(**({"model": str(tiny_llama), "train": "train.jsonl"} | change))
    with pytest.raises(kind) as refusal:
        survey(spec, tmp_path / "brought").bring()
    assert [word for word in words if word not in str(refusal.value)] == [], str(refusal.value)
    assert type(refusal.value) is kind


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_an_input_that_may_not_be_read_is_denied_not_missing(tiny_llama: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from job.errors import AccessDenied
from job.spec import JobSpec
from job.supervision.pull import survey
os.setuid(65534)
for key, model, train in (("data.train", "model", "closed.jsonl"), ("data.train", "model", "closed/a.jsonl"),
                          ("model", "closed/model", "open.jsonl")):
    folder = Path(sys.argv[1])
    spec = JobSpec.model_validate({"name": "a", "model": f"{folder}/{model}", "data": {"train": f"{folder}/{train}"}})
    try:
        survey(spec, folder / "brought").bring()
    except AccessDenied as error:
        print(key if str(error).startswith(key) else error)
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders belong to one user alone
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "model").mkdir()
        (folder / "closed").mkdir(mode=0o700)
        rows(folder / "open.jsonl")
        rows(folder / "closed.jsonl").chmod(0)
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["data.train", "data.train", "model"], done.stderr


def found(model: Path, train: Path, folder: Path) -> Survey:
    return survey(spec_of(str(model), str(train)), folder)


def test_the_records_name_every_file_once_with_its_hash(tiny_llama: Path, tmp_path: Path) -> None:
    train = rows(tmp_path / "t.jsonl")
    records = found(tiny_llama, train, tmp_path).bring().records
    by_name = {record["name"]: record for record in records}
    assert len(by_name) == len(records)
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert {str(train), *(f"{tiny_llama}/{name}" for name in names)} <= set(by_name)
    assert by_name[str(train)]["size"] == 14
    assert len(by_name[str(train)]["sha256"]) == 64
    json.dumps(records)


def test_a_file_that_kept_its_etag_is_not_hashed_again(tiny_llama: Path, tmp_path: Path) -> None:
    here = found(tiny_llama, rows(tmp_path / "t.jsonl"), tmp_path)
    recorded = [record | {"sha256": "kept"} for record in here.bring().records]
    assert {record["sha256"] for record in here.bring(recorded).records} == {"kept"}


def test_a_touched_file_is_unchanged_and_an_edited_one_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    train = rows(tmp_path / "t.jsonl")
    recorded = found(tiny_llama, train, tmp_path).bring().records
    os.utime(train, ns=(1, 1))
    assert found(tiny_llama, train, tmp_path).changed(recorded) == []
    rows(train, '{"text": "b"}\n')
    assert found(tiny_llama, train, tmp_path).changed(recorded) == [str(train)]


def test_a_file_that_is_new_or_gone_is_a_change(tiny_llama: Path, tmp_path: Path) -> None:
    train, other = rows(tmp_path / "t.jsonl"), rows(tmp_path / "u.jsonl")
    recorded = found(tiny_llama, train, tmp_path).bring().records
    assert found(tiny_llama, other, tmp_path).changed(recorded) == [str(train), str(other)]


def test_a_hub_model_is_the_same_while_its_commit_is(tmp_path: Path) -> None:
    train = rows(tmp_path / "t.jsonl")
    spec = spec_of("org/nowhere", str(train))
    recorded: list[dict[str, Any]] = [
        {"name": "org/nowhere/config.json", "size": 2, "etag": "x", "sha256": "y", "commit": "c" * 40},
        *({"name": piece.name, "size": piece.size, "etag": piece.etag} for piece in survey(spec, tmp_path).pieces),
    ]
    assert survey(spec, tmp_path, commit="c" * 40).changed(recorded) == []
