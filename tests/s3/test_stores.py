"""What every store promises, held by a folder and by S3 alike."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import Fenced, InputMissing, IntegrityFailure
from job.process import Identity
from job.storage import transfer
from job.storage.s3_client import PART_BYTES
from job.storage.s3_move import SMALL_BYTES
from job.storage.store import PreconditionFailed, Store, probe
from job.supervision.own import claim, read_owner

SIZES = [0, 1, SMALL_BYTES, SMALL_BYTES + 1, PART_BYTES + 1]


def file_with(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_files_of_every_size_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    for size in SIZES:
        data = os.urandom(size)
        sent = store.put(file_with(tmp_path / "a", data), "checkpoints/a.bin")
        assert (sent.name, sent.size, sent.sha256) == ("checkpoints/a.bin", size, hashlib.sha256(data).hexdigest())
        assert store.get("checkpoints/a.bin", tmp_path / "deep" / "back") == sent
        assert (tmp_path / "deep" / "back").read_bytes() == data
        assert store.digest("checkpoints/a.bin") == sent
        found = store.stat("checkpoints/a.bin")
        assert found is not None
        assert found.size == size


def test_a_file_replaces_only_what_it_was_promised(store: Store, tmp_path: Path) -> None:
    for size in (10, SMALL_BYTES + 1, PART_BYTES + 1):
        first, second = (file_with(tmp_path / name, os.urandom(size)) for name in ("first", "second"))
        key = f"file-{size}"
        store.put(first, key, if_absent=True)
        there = store.stat(key)
        assert there is not None
        with pytest.raises(PreconditionFailed):
            store.put(second, key, if_absent=True)
        store.put(second, key, if_match=there.etag)
        with pytest.raises(PreconditionFailed):
            store.put(first, key, if_match=there.etag)
        with pytest.raises(PreconditionFailed):
            store.put(first, f"no-{key}", if_match=there.etag)
        assert store.get(key, tmp_path / "back").sha256 == hashlib.sha256(second.read_bytes()).hexdigest()
        assert store.stat(f"no-{key}") is None


def test_what_is_brought_leaves_no_scratch_file(store: Store, tmp_path: Path) -> None:
    store.put(file_with(tmp_path / "a", b"1"), "a")
    store.get("a", tmp_path / "to" / "a")
    with pytest.raises(InputMissing):
        store.get("b", tmp_path / "to" / "b")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a"]


def test_what_is_not_there_is_missing_to_some_and_none_to_others(store: Store, tmp_path: Path) -> None:
    for ask in (lambda: store.get("no/thing", tmp_path / "x"), lambda: store.digest("no/thing")):
        with pytest.raises(InputMissing, match=f"{store.uri}/no/thing: "):
            ask()
    assert store.read("no/thing") is None
    assert store.stat("no/thing") is None
    assert list(store.list("")) == []
    store.delete("no/thing")


def test_small_objects_are_written_read_and_replaced(store: Store) -> None:
    first = store.write("run/owner.json", b"first")
    assert store.read("run/owner.json") == (b"first", first)
    second = store.write("run/owner.json", b"other")
    assert second != first
    assert store.read("run/owner.json") == (b"other", second)


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    store.write("empty", b"")
    found = store.read("empty")
    assert found is not None
    assert found[0] == b""
    assert store.get("empty", tmp_path / "empty").size == 0
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_listing_is_sorted_by_key_and_agrees_with_stat(store: Store) -> None:
    for key in ("run/b.json", "a-1", "run/a/c", "a/2", "run2"):
        store.write(key, b"123")
    assert [entry.key for entry in store.list("")] == ["a-1", "a/2", "run/a/c", "run/b.json", "run2"]
    assert [entry.key for entry in store.list("run/")] == ["run/a/c", "run/b.json"]
    assert [entry.key for entry in store.list("run")] == ["run/a/c", "run/b.json", "run2"]
    assert [entry.key for entry in store.list("run/b")] == ["run/b.json"]
    assert [store.stat(entry.key) for entry in store.list("")] == list(store.list(""))


def test_deleting_twice_is_no_error_and_takes_nothing_else(store: Store) -> None:
    store.write("a/b/c", b"1")
    store.write("a/d", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert [entry.key for entry in store.list("")] == ["a/d"]


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/.", ".hidden", "a\\b", "a\0", "a/"]
)
def test_keys_that_could_leave_the_prefix_are_refused(key: str, store: Store, tmp_path: Path) -> None:
    calls = (
        lambda: store.put(file_with(tmp_path / "a", b"x"), key),
        lambda: store.get(key, tmp_path / "b"),
        lambda: store.write(key, b"x"),
        lambda: store.read(key),
        lambda: store.delete(key),
    )
    for call in calls:
        with pytest.raises(IntegrityFailure, match="is no key of a store"):
            call()


def test_if_absent_writes_once_and_if_match_needs_the_present_etag(store: Store) -> None:
    first = store.write("a", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.write("a", b"2", if_absent=True)
    second = store.write("a", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.write("a", b"3", if_match=first)
    assert store.read("a") == (b"2", second)
    store.delete("a")
    with pytest.raises(PreconditionFailed):
        store.write("a", b"4", if_match=second)
    assert store.read("a") is None


@pytest.mark.parametrize("is_new", [True, False])
def test_of_eight_writers_exactly_one_wins(is_new: bool, store: Store) -> None:
    etag = None if is_new else store.write("run/owner.json", b"before")
    together = threading.Barrier(8)

    def write(number: int) -> bool:
        together.wait()
        try:
            store.write("run/owner.json", b"%d" % number, if_absent=is_new, if_match=etag)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    found = store.read("run/owner.json")
    assert found is not None
    assert found[0] == b"%d" % won.index(True)


def test_a_probe_says_that_conditions_hold_and_leaves_nothing(store: Store) -> None:
    assert probe(store) == ()
    assert list(store.list("")) == []


def test_a_log_may_grow_while_it_is_sent(store: Store, tmp_path: Path) -> None:
    path = file_with(tmp_path / "log", b"line\n" * 2_000_000)
    leave = threading.Event()

    def write_on() -> None:
        with path.open("ab") as stream:
            while not leave.wait(0.001):
                stream.write(b"more\n" * 1000)
                stream.flush()

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        sent = store.put(path, "training_log.txt")
    finally:
        leave.set()
        writer.join()
    assert sent.size >= 10_000_000
    assert store.digest("training_log.txt") == sent


def folder_of(path: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        file_with(path / name, os.urandom(size))
    return path


def test_checkpoints_are_committed_brought_back_and_pruned(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = folder_of(tmp_path / str(step), {"adapter_model.safetensors": 100_000, "state/rng.bin": 3, "empty": 0})
        transfer.push_checkpoint(store, folder, step, 1, {"step": step})
    transfer.prune(store, 2)
    assert [commit.step for commit in transfer.committed(store)] == [30, 20]
    store.delete("checkpoints/checkpoint-30/state/rng.bin")
    commit = transfer.newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert commit.step == 20
    assert (tmp_path / "back" / "state" / "rng.bin").read_bytes() == (
        tmp_path / "20" / "state" / "rng.bin"
    ).read_bytes()


def test_a_result_is_published_once_and_verifies(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "result", {"adapter_model.safetensors": 300_000, "README.md": 10})
    files = {name: folder / name for name in ("adapter_model.safetensors", "README.md")}
    transfer.publish(store, files, {})
    manifest = transfer.read_manifest(store)
    assert manifest is not None
    transfer.verify_manifest(store, manifest)
    store.write("README.md", b"0123456789")
    with pytest.raises(IntegrityFailure, match=r"README\.md"):
        transfer.verify_manifest(store, manifest)


def test_one_attempt_owns_a_run_and_the_next_takes_over_when_it_left(store: Store) -> None:
    elsewhere = [Identity(1, f"pod-{number}") for number in range(2)]
    first = claim(store, "spec", elsewhere[0], interval_seconds=0.05)
    with pytest.raises(Fenced, match="whose heartbeat goes on"):
        claim(store, "spec", elsewhere[1], interval_seconds=0.05, heartbeat=False)
    first.release("OK")
    second = claim(store, "spec", elsewhere[1], interval_seconds=0.05, heartbeat=False)
    assert (first.generation, second.generation) == (1, 2)
    found = read_owner(store)
    assert found is not None
    assert found[0].nonce == second.nonce
