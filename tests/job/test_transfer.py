"""A commit, and a result, is whole or not there, whatever dies and whenever."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import Conflict, Fenced, InputMissing, IntegrityFailure
from job.files import FileEntry
from job.layout import COMMIT, MANIFEST, checkpoint_prefix
from job.storage.directory import DirectoryStore
from job.storage.store import PreconditionFailed
from job.storage.transfer import (
    committed,
    newest_verified,
    prune,
    publish,
    pull_checkpoint,
    push_checkpoint,
    read_manifest,
    verify_manifest,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", "file:out")


def sealed(folder: Path, step: int, size: int = 50_000) -> Path:
    """A checkpoint's folder with files of its own for every step."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step % 256]) * size)
    (folder / "state" / "rng.json").write_text(json.dumps({"step": step}))
    return folder


def push(store: DirectoryStore, tmp_path: Path, *steps: int, generation: int = 1) -> None:
    for step in steps:
        push_checkpoint(store, sealed(tmp_path / f"local-{step}", step), step, generation, {"spec": "abc"})


def keys(store: DirectoryStore) -> list[str]:
    return [entry.key for entry in store.list("")]


# Checkpoints


def test_a_committed_checkpoint_comes_back_as_it_was(store: DirectoryStore, tmp_path: Path) -> None:
    push(store, tmp_path, 7)
    commit = newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert (commit.step, commit.generation, commit.record["spec"]) == (7, 1, "abc")
    assert (tmp_path / "back" / "state" / "rng.json").read_text() == '{"step": 7}'
    assert sorted(path.name for path in (tmp_path / "back").rglob("*") if path.is_file()) == [
        "adapter_model.safetensors",
        "rng.json",
    ]


def test_without_a_checkpoint_there_is_none(store: DirectoryStore, tmp_path: Path) -> None:
    assert newest_verified(store, tmp_path / "back") is None
    assert committed(store) == []
    assert not (tmp_path / "back").exists()


def test_files_without_a_marker_are_no_checkpoint(store: DirectoryStore, tmp_path: Path) -> None:  # T25
    push(store, tmp_path, 1, 2)
    store.delete(checkpoint_prefix(2) + COMMIT)
    assert [commit.step for commit in committed(store)] == [1]


def test_commits_are_listed_newest_first_by_step_and_then_generation(store: DirectoryStore, tmp_path: Path) -> None:
    push(store, tmp_path, 90, 100)
    push(store, tmp_path, 100, generation=2)
    assert [(c.step, c.generation) for c in committed(store)] == [(100, 2), (100, 1), (90, 1)]


def test_pushing_the_same_checkpoint_again_changes_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    push(store, tmp_path, 1)
    before = list(store.list(""))
    push(store, tmp_path, 1)
    assert list(store.list("")) == before


def test_another_checkpoint_of_the_same_name_is_refused_and_the_old_one_kept(
    store: DirectoryStore, tmp_path: Path
) -> None:
    push(store, tmp_path, 1)
    with pytest.raises(Conflict):
        push_checkpoint(store, sealed(tmp_path / "other", 99), 1, 1, {"spec": "abc"})
    commit = newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes()[0] == 1


def test_a_marker_whose_reply_was_lost_is_ours(tmp_path: Path) -> None:
    class LosesReplies(DirectoryStore):
        def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
            super().write(key, data, if_absent=if_absent, if_match=if_match)
            raise PreconditionFailed("a retried request met its own first try")

    store = LosesReplies(tmp_path / "store")
    push(store, tmp_path, 1)
    assert [commit.step for commit in committed(store)] == [1]


def marker_of(store: DirectoryStore, step: int) -> Path:
    return store.root / checkpoint_prefix(step) / COMMIT


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one byte altered": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" + b"\2" * 49_999),
    "cut off": lambda folder: os.truncate(folder / "adapter_model.safetensors", 10),
    "file gone": lambda folder: (folder / "state" / "rng.json").unlink(),
    "marker cut off": lambda folder: os.truncate(folder / COMMIT, 20),
    "marker empty": lambda folder: os.truncate(folder / COMMIT, 0),
    "marker of another": lambda folder: (folder / COMMIT).write_text('{"step": 1, "generation": 1, "files": []}'),
    "marker without files": lambda folder: (folder / COMMIT).write_text('{"step": 2, "generation": 1}'),
    "marker that leaves": lambda folder: (folder / COMMIT).write_text(
        json.dumps({"step": 2, "generation": 1, "files": [{"name": "../../x", "size": 1, "sha256": "0"}]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(  # T25
    damage: str, store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(store, tmp_path, 1, 2)
    DAMAGE[damage](store.root / checkpoint_prefix(2))
    commit = newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert commit.step == 1
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes()[0] == 1
    assert "falling back" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_whole_checkpoint_is_no_silent_fresh_start(  # T25
    damage: str, store: DirectoryStore, tmp_path: Path
) -> None:
    push(store, tmp_path, 2)
    DAMAGE[damage](store.root / checkpoint_prefix(2))
    with pytest.raises(IntegrityFailure, match="none of the 1 committed checkpoints is whole"):
        newest_verified(store, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_failed_pull_leaves_no_folder(store: DirectoryStore, tmp_path: Path) -> None:  # T24
    push(store, tmp_path, 2)
    (commit,) = committed(store)
    DAMAGE["file gone"](store.root / checkpoint_prefix(2))
    with pytest.raises(IntegrityFailure, match=r"rng\.json: listed, but gone"):
        pull_checkpoint(store, commit, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir() if "back" in path.name] == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [5]),
        (2, None, [5, 4]),
        (2, 1, [5, 4, 1]),
        (2, 5, [5, 4]),
        (9, None, [5, 4, 3, 2, 1]),
        ("all", None, [5, 4, 3, 2, 1]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(  # T25
    keep: Any, best: int | None, left: list[int], store: DirectoryStore, tmp_path: Path
) -> None:
    push(store, tmp_path, 1, 2, 3, 4, 5)
    removed = prune(store, keep, best)
    assert [commit.step for commit in committed(store)] == left
    assert {commit.step for commit in removed} == {1, 2, 3, 4, 5} - set(left)
    assert {key.split("/")[1] for key in keys(store)} == {f"checkpoint-{step}" for step in left}


def test_nothing_is_pruned_unless_the_newest_is_whole(store: DirectoryStore, tmp_path: Path) -> None:  # T25
    push(store, tmp_path, 1, 2, 3)
    DAMAGE["file gone"](store.root / checkpoint_prefix(3))
    assert prune(store, 1) == []
    assert [commit.step for commit in committed(store)] == [3, 2, 1]


def test_a_checkpoint_that_could_not_be_read_costs_no_later_one_of_a_lower_step(
    store: DirectoryStore, tmp_path: Path
) -> None:
    push(store, tmp_path, 4, 6)
    damaged = store.root / checkpoint_prefix(6) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # of the size it should have
    push(store, tmp_path, 5, generation=2)
    assert [commit.step for commit in prune(store, 1)] == [6, 4]
    assert [(commit.step, commit.generation) for commit in committed(store)] == [(5, 2)]


def test_pruning_clears_what_old_pushes_left_and_spares_the_one_under_way(
    store: DirectoryStore, tmp_path: Path
) -> None:
    push(store, tmp_path, 2)
    store.write("checkpoints/checkpoint-1/adapter_model.safetensors", b"left")
    store.write("checkpoints/checkpoint-3/adapter_model.safetensors", b"under way")
    prune(store, 2)
    assert {key.split("/")[1] for key in keys(store)} == {"checkpoint-2", "checkpoint-3"}


# The result


def result(tmp_path: Path) -> dict[str, Path]:
    folder = sealed(tmp_path / "result", 3)
    return {
        "adapter_model.safetensors": folder / "adapter_model.safetensors",
        "run/rng.json": folder / "state/rng.json",
    }


def test_a_published_result_verifies(store: DirectoryStore, tmp_path: Path) -> None:
    manifest = publish(store, result(tmp_path), {"run": "a-1"})
    assert read_manifest(store) == manifest
    assert [entry.name for entry in manifest.files] == ["adapter_model.safetensors", "run/rng.json"]
    assert manifest.record["run"] == "a-1"
    verify_manifest(store, manifest)


def test_without_a_manifest_there_is_no_result(store: DirectoryStore, tmp_path: Path) -> None:
    assert read_manifest(store) is None
    (tmp_path / "x").write_text("a")
    store.put(tmp_path / "x", "adapter_model.safetensors")
    assert read_manifest(store) is None


def test_what_an_earlier_attempt_left_is_replaced(store: DirectoryStore, tmp_path: Path) -> None:
    store.write("adapter_model.safetensors", b"of an earlier attempt")
    store.write("stray", b"of an earlier attempt")
    verify_manifest(store, publish(store, result(tmp_path), {}))


def test_a_result_is_published_once(store: DirectoryStore, tmp_path: Path) -> None:
    publish(store, result(tmp_path), {})
    before = list(store.list(""))
    (tmp_path / "result" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(Conflict):
        publish(store, result(tmp_path), {})
    assert list(store.list("")) == before


def test_a_late_manifest_of_an_owner_that_lost_the_run_gives_way_to_the_owner_s(
    store: DirectoryStore, tmp_path: Path
) -> None:
    """It was under way while the run was taken over, and lands when the successor's files are there already."""
    proofs: list[str] = []
    manifest = publish(
        store,
        result(tmp_path),
        {"run": "mine"},
        lambda: proofs.append("still mine"),
        before_seal=lambda: store.write(MANIFEST, b'{"files": [], "run": "theirs"}') and None,
    )
    assert read_manifest(store) == manifest
    assert manifest.record["run"] == "mine"
    verify_manifest(store, manifest)
    assert len(proofs) == 3  # before the files, before the manifest, and before the other one is replaced


def test_who_lost_the_run_while_publishing_writes_over_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    """Its successor publishes between its last proof and its writing."""

    def taken_over() -> None:
        if read_manifest(store) is not None:
            raise Fenced("it belongs to another")
        (tmp_path / "theirs").write_text("of the successor")
        theirs = dict.fromkeys(result(tmp_path / "again"), tmp_path / "theirs")
        publish(store, theirs, {"run": "theirs"})

    (tmp_path / "again").mkdir()
    with pytest.raises(Fenced):
        publish(store, result(tmp_path), {"run": "mine"}, taken_over)
    manifest = read_manifest(store)
    assert manifest is not None
    assert manifest.record["run"] == "theirs"
    verify_manifest(store, manifest)


def test_a_file_to_publish_that_is_missing_publishes_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="nothing"):
        publish(store, {**result(tmp_path), "x": tmp_path / "nothing"}, {})
    assert keys(store) == []


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_damaged_result_is_named(damage: str, store: DirectoryStore, tmp_path: Path) -> None:
    manifest = publish(store, result(tmp_path), {})
    path = store.root / "run" / "rng.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text('{"step": 4}')
    with pytest.raises(IntegrityFailure, match=r"run/rng\.json"):
        verify_manifest(store, manifest)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": [{"name": "/etc/passwd"}]}'])
def test_a_manifest_that_cannot_be_understood_is_no_result(text: str, store: DirectoryStore) -> None:
    store.write(MANIFEST, text.encode())
    with pytest.raises(IntegrityFailure, match=r"run/manifest\.json"):
        read_manifest(store)


class Flaky(DirectoryStore):
    """Brings damaged bytes at first."""

    damaged = 0

    def get(self, key: str, to: Path) -> FileEntry:
        entry = super().get(key, to)
        if not self.damaged:
            return entry
        self.damaged -= 1
        to.write_bytes(b"x" * entry.size)
        return FileEntry(key, entry.size, "0" * 64)


@pytest.mark.parametrize(("damaged", "step"), [(1, 2), (2, 1)])
def test_damage_on_the_way_is_asked_for_once_more(damaged: int, step: int, tmp_path: Path) -> None:
    store = Flaky(tmp_path / "store")
    for number in (1, 2):
        folder = tmp_path / f"local-{number}"
        folder.mkdir()
        (folder / "only").write_text(str(number))
        push_checkpoint(store, folder, number, 1, {})
    store.damaged = damaged
    commit = newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert commit.step == step
    assert (tmp_path / "back" / "only").read_text() == str(step)


# Killed at every moment

KILLED = """
import itertools, json, os, resource, shutil, signal, sys, threading
from pathlib import Path
from job.storage.directory import DirectoryStore
from job.storage.transfer import committed, newest_verified, prune, publish, push_checkpoint
from job.storage.transfer import read_manifest, verify_manifest

what, root, files = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
store = DirectoryStore(root / "store")


def act():
    if what == "push":
        push_checkpoint(store, files / "2", 2, 1, {})
    elif what == "prune":
        prune(store, 1)
    elif read_manifest(store) is None:
        publish(store, {path.name: path for path in (files / "2").iterdir()}, {})


def kill_at(moment):
    left = itertools.count(moment, -1)

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime") and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_byte(count):
    # Beyond the limit the kernel's own signal ends the process in the middle of a write.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def state():
    if what == "publish":
        manifest = read_manifest(store)
        if manifest is not None:
            verify_manifest(store, manifest)
        return 1 if manifest is None else 2
    shutil.rmtree(root / "back", ignore_errors=True)
    newest = newest_verified(store, root / "back")
    assert (root / "back" / "a").read_bytes() == (files / str(newest.step) / "a").read_bytes()
    # Whatever is listed as committed must also be whole.
    for commit in committed(store):
        for entry in commit.files:
            assert store.stat(commit.prefix + entry.name).size == entry.size, (commit, entry)
    return newest.step


def after(prepare, value):
    shutil.rmtree(root, ignore_errors=True)
    push_checkpoint(store, files / "1", 1, 1, {})
    if what == "prune":
        push_checkpoint(store, files / "2", 2, 1, {})
    child = os.fork()
    if child == 0:
        prepare(value)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = state()
    act()  # the next attempt brings it to its end
    assert state() == 2
    return os.WIFEXITED(status), found


seen = []
for moment in range(1000):
    finished, found = after(kill_at, moment)
    seen.append(found)
    if finished:
        break
if what != "prune":
    for count in (0, 1, 100, 65536, 150_000, 199_999):
        finished, found = after(kill_at_byte, count)
        assert not finished and found == 1, (count, finished, found)
print(json.dumps({"moments": len(seen), "finished": finished or what != "prune", "seen": sorted(set(seen))}))
"""


@pytest.mark.parametrize(
    ("what", "states"),
    [("push", [1, 2]), ("publish", [1, 2]), ("prune", [2])],
)
def test_killed_at_any_moment_the_old_or_the_new_state_is_there(  # T24, T25
    what: str, states: list[int], tmp_path: Path
) -> None:
    for step in (1, 2):
        folder = tmp_path / "files" / str(step)
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(bytes([step]) * 200_000)
        (folder / "b").write_bytes(bytes([step]) * 10)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, what, str(tmp_path / "root"), str(tmp_path / "files")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["finished"], said
    assert said["moments"] > 4
    assert said["seen"] == states
