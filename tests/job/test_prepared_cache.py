"""Prepared rows that the next attempt takes over: from this machine or the store, whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from job.layout import COMMIT, PREPARED
from job.spec import JobSpec
from job.storage.directory import DirectoryStore
from job.storage.parallel import nothing
from job.supervision.prepared_cache import PreparedCache, key_of
from tests.test_imports import KNOWN, reach

RECORDS = [
    {"name": "train.jsonl", "sha256": "1"},
    {"name": "m/tokenizer.json", "sha256": "2"},
    {"name": "m/model.safetensors", "sha256": "3"},
]


def spec(**sections: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "test", "model": "m", "data": {"train": "train.jsonl"}} | sections)


def changed(number: int) -> list[dict[str, str]]:
    """The records with another hash of one input."""
    return [record | ({"sha256": "9"} if i == number else {}) for i, record in enumerate(RECORDS)]


OTHERS: dict[str, tuple[JobSpec, list[dict[str, str]]]] = {
    "data": (spec(), changed(0)),
    "tokenizer": (spec(), changed(1)),
    "length": (spec(training={"max_length": 64}), RECORDS),
    "long rows": (spec(training={"long_rows": "truncate"}), RECORDS),
    "mask": (spec(data={"train": "train.jsonl", "train_on": "last"}), RECORDS),
    "template": (spec(data={"train": "train.jsonl", "chat_template": "qwen"}), RECORDS),
    "tokens": (spec(lora={"new_tokens": ["<a>"]}), RECORDS),
}


@pytest.mark.parametrize(("other", "records"), OTHERS.values(), ids=OTHERS)
def test_whatever_decides_the_rows_changes_the_key(other: JobSpec, records: list[dict[str, str]]) -> None:
    assert key_of(other, records) != key_of(spec(), RECORDS)


def test_what_does_not_decide_the_rows_leaves_the_key() -> None:
    other = spec(training={"learning_rate": 1e-3, "seed": 1}, lora={"r": 4})
    assert key_of(other, list(reversed(changed(2)))) == key_of(spec(), RECORDS)


def test_every_module_that_prepares_lies_in_the_package_whose_code_is_in_the_key() -> None:
    surroundings = {
        "child", "errors", "exits", "files", "inputs", "libraries", "modelconfig", "outcome", "process", "spec",
        "spec_draft", "spec_problems", "spec_reference", "spec_section", "spec_values", "strict_yaml", "workdir",
    }  # fmt: skip
    checks_only = reach("job.training.adapter", KNOWN)  # what is asked of the model is looked over, no row is touched
    reached = {name.removeprefix("job.") for name in reach("job.data.prepare", KNOWN) - checks_only if name in KNOWN}
    assert {name for name in reached - surroundings - {"job"} if not name.startswith("data.")} == set()
    assert "data.row_writer" in reached


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", "file:out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder, as far as a cache looks into it."""
    folder = tmp_path / "attempt-1" / "prepared"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "data.arrow").write_bytes(bytes(1000))
    (folder / "prepared.json").write_text("{}", encoding="utf-8")
    return folder


def cache(store: DirectoryStore, folder: Path, key: str = "k1") -> PreparedCache:
    return PreparedCache(store, folder.parents[1] / "here", key)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def kept(store: DirectoryStore, folder: Path, key: str = "k1") -> PreparedCache:
    made = cache(store, folder, key)
    made.keep_here(folder)
    made.send(nothing)
    return made


def test_the_next_attempt_on_this_machine_takes_the_same_files(store: DirectoryStore, folder: Path) -> None:
    cache(store, folder).keep_here(folder)
    wanted = content(folder)
    shutil.rmtree(folder.parent)
    assert cache(store, folder).take(folder) == "this machine"
    assert content(folder) == wanted


def test_a_pod_elsewhere_takes_them_from_the_store(store: DirectoryStore, folder: Path, tmp_path: Path) -> None:
    kept(store, folder)
    elsewhere = tmp_path / "pod-2" / "attempt" / "prepared"
    elsewhere.parent.mkdir(parents=True)
    assert cache(store, elsewhere).take(elsewhere) == store.uri
    assert content(elsewhere) == content(folder)


def test_another_key_takes_nothing_and_replaces_what_was_kept(store: DirectoryStore, folder: Path) -> None:
    kept(store, folder)
    to = folder.with_name("other")
    assert cache(store, folder, "k2").take(to) is None
    assert not to.exists()
    kept(store, folder, "k2")
    assert {entry.key.split("/")[2] for entry in store.list(PREPARED)} == {"k2"}
    assert [path.name for path in (folder.parents[1] / "here").iterdir() if path.is_dir()] == ["k2"]


def test_what_is_damaged_here_is_brought_from_the_store(store: DirectoryStore, folder: Path) -> None:
    kept(store, folder)
    damaged = folder.parents[1] / "here" / "k1" / "train" / "data.arrow"
    damaged.unlink()
    damaged.write_bytes(bytes(999) + b"x")
    to = folder.with_name("again")
    assert cache(store, folder).take(to) == store.uri
    assert content(to) == content(folder)


@pytest.mark.parametrize("damage", ["changed", "gone", "marker"])
def test_what_is_damaged_in_the_store_is_not_taken(
    store: DirectoryStore, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept(store, folder)
    shutil.rmtree(folder.parents[1] / "here")
    if damage == "changed":
        store.write(f"{PREPARED}k1/train/data.arrow", bytes(999) + b"x")
    elif damage == "gone":
        store.delete(f"{PREPARED}k1/prepared.json")
    else:
        store.write(f"{PREPARED}k1/{COMMIT}", b'{"files": [{"name": "../../escape", "size": 1, "sha256": ""}]}')
    to = folder.with_name("again")
    made = cache(store, folder)
    assert made.take(to) is None
    assert not to.exists()
    assert "prepared anew" in caplog.text
    made.keep_here(folder)  # as it was prepared again
    made.send(nothing)
    shutil.rmtree(folder.parents[1] / "here")
    assert cache(store, folder).take(to) == store.uri


def test_without_its_marker_what_was_sent_does_not_count(store: DirectoryStore, folder: Path) -> None:
    class Left(Exception):
        pass

    def leave() -> None:
        raise Left

    made = cache(store, folder)
    made.keep_here(folder)
    with pytest.raises(Left):
        made.send(leave)
    shutil.rmtree(folder.parents[1] / "here")
    assert any(True for _ in store.list(PREPARED))
    assert cache(store, folder).take(folder.with_name("again")) is None


def test_nothing_is_left_once_the_run_is_published(store: DirectoryStore, folder: Path) -> None:
    kept(store, folder).drop()
    assert list(store.list(PREPARED)) == []
    assert not (folder.parents[1] / "here").exists()
