"""The directory store: whole objects, honest refusals, conditions that hold between processes."""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import AccessDenied, DiskFailure, InputMissing, IntegrityFailure, SpecInvalid, TemporaryFailure
from job.storage.directory import DirectoryStore
from job.storage.store import (
    PreconditionFailed,
    checked,
    foreseen,
    local_path,
    open_store,
    probe,
    require_space,
    size_text,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", "file:out")


def file_with(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=60, check=False)


def test_what_was_put_comes_back_with_its_size_and_hash(store: DirectoryStore, tmp_path: Path) -> None:
    data = os.urandom(9_000_000)
    sent = store.put(file_with(tmp_path / "a", data), "checkpoints/checkpoint-1/a.bin")
    received = store.get("checkpoints/checkpoint-1/a.bin", tmp_path / "back" / "a")
    assert (tmp_path / "back" / "a").read_bytes() == data
    assert sent == received
    assert (sent.size, sent.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_put_replaces_what_was_there(store: DirectoryStore, tmp_path: Path) -> None:
    for data in (b"long old content", b"new"):
        store.put(file_with(tmp_path / "a", data), "a")
    found = store.read("a")
    assert found is not None
    assert found[0] == b"new"


@pytest.mark.parametrize(
    "uri", ["file:///some/where", "/some/where", "file:/some/where", "file://localhost/some/where"]
)
def test_a_uri_and_a_path_mean_the_same_folder(uri: str) -> None:
    store = open_store(uri)
    assert isinstance(store, DirectoryStore)
    assert store.root == Path("/some/where")
    assert store.uri == uri


def test_a_relative_uri_starts_where_the_command_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("file:runs/a") == local_path("runs/a") == tmp_path / "runs" / "a"


def test_a_file_uri_is_unquoted_and_a_path_is_not() -> None:
    assert local_path("file:///a%20b") == Path("/a b")
    assert local_path("/a%20b") == Path("/a%20b")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mika")
    assert local_path("~/runs") == Path("/home/mika/runs")


@pytest.mark.parametrize("uri", ["gs://bucket", "ftp://host/x", "file://elsewhere/path"])
def test_what_cannot_be_opened_is_refused_by_name(uri: str) -> None:
    with pytest.raises(SpecInvalid) as refusal:
        open_store(uri)
    assert str(refusal.value).startswith(uri)


def test_a_presigned_address_is_refused_without_its_signature() -> None:
    with pytest.raises(SpecInvalid, match=r"https://bucket/a\.jsonl: ") as refusal:
        open_store("https://bucket/a.jsonl?X-Amz-Credential=AKIAEXAMPLE&X-Amz-Signature=0123456789abcdef")
    assert "0123456789abcdef" not in str(refusal.value)
    assert "AKIAEXAMPLE" not in str(refusal.value)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/.", ".hidden", "a/.lock", "a\\b", "a\0"]
)
def test_keys_that_could_leave_the_prefix_are_refused(key: str, store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(IntegrityFailure):
        checked(key)
    with pytest.raises(IntegrityFailure):
        store.put(file_with(tmp_path / "a", b"x"), key)


def test_a_missing_object_is_missing_to_get_and_none_to_read_and_stat(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="file:out/nothing/here"):
        store.get("nothing/here", tmp_path / "x")
    assert store.read("nothing/here") is None
    assert store.stat("nothing/here") is None
    assert list(store.list("")) == []
    store.delete("nothing/here")
    assert not (tmp_path / "x").exists()


def test_a_key_below_an_object_is_absent_and_no_crash(store: DirectoryStore) -> None:
    store.write("x", b"1")
    assert store.read("x/y") is None
    assert store.stat("x/y") is None


def test_listing_is_sorted_by_key_and_shows_no_scratch(store: DirectoryStore) -> None:
    for key in ("run/b.json", "a-1", "run/a/c", "a/2", "run2"):
        store.write(key, b"1")
    (store.root / "run" / ".b.json.00000000.part").write_bytes(b"half")
    assert [entry.key for entry in store.list("")] == ["a-1", "a/2", "run/a/c", "run/b.json", "run2"]
    assert [entry.key for entry in store.list("run/")] == ["run/a/c", "run/b.json"]
    assert [entry.key for entry in store.list("run")] == ["run/a/c", "run/b.json", "run2"]
    assert [entry.key for entry in store.list("run/b")] == ["run/b.json"]


def test_a_listing_shows_thousands_of_objects(store: DirectoryStore) -> None:
    folder = store.root / "many"
    folder.mkdir(parents=True)
    for number in range(2500):
        (folder / f"{number:05d}").touch()
    assert len(list(store.list("many/"))) == 2500


def test_listing_and_stat_agree(store: DirectoryStore) -> None:
    etag = store.write("a", b"123")
    (entry,) = store.list("")
    assert entry == store.stat("a")
    assert (entry.size, entry.etag) == (3, etag)


def test_deleting_is_idempotent_and_leaves_no_empty_folder(store: DirectoryStore) -> None:
    store.write("a/b/c", b"1")
    store.write("a/d", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert not (store.root / "a" / "b").exists()
    assert store.stat("a/d") is not None


def test_a_digest_is_that_of_the_bytes_as_they_lie_there(store: DirectoryStore) -> None:
    store.write("a/b", b"bytes")
    (store.root / "a" / "b").write_bytes(b"other")
    found = store.digest("a/b")
    assert (found.name, found.size, found.sha256) == ("a/b", 5, hashlib.sha256(b"other").hexdigest())
    with pytest.raises(InputMissing, match="file:out/nothing"):
        store.digest("nothing")


def test_sweep_removes_what_a_killed_put_left_and_nothing_else(store: DirectoryStore) -> None:
    store.write("checkpoints/checkpoint-1/a", b"1")
    (store.root / "checkpoints" / "checkpoint-1" / ".a.0123abcd.part").write_bytes(b"half")
    assert store.sweep("checkpoints/") == 1
    assert [path.name for path in (store.root / "checkpoints" / "checkpoint-1").iterdir()] == ["a"]


def test_if_absent_writes_once(store: DirectoryStore) -> None:
    store.write("run/owner.json", b"first", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.write("run/owner.json", b"second", if_absent=True)
    found = store.read("run/owner.json")
    assert found is not None
    assert found[0] == b"first"


def test_if_match_needs_the_present_etag(store: DirectoryStore) -> None:
    with pytest.raises(PreconditionFailed):
        store.write("a", b"x", if_match="0-0")
    first = store.write("a", b"1")
    second = store.write("a", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.write("a", b"3", if_match=first)
    assert store.read("a") == (b"2", second)


def test_every_write_has_an_etag_of_its_own(store: DirectoryStore) -> None:
    etags = [store.write("a", b"same size") for _ in range(200)]
    assert len(set(etags)) == 200


def test_a_write_is_newer_than_what_it_replaces_whatever_the_clock_says(store: DirectoryStore) -> None:
    store.write("a", b"one")
    ahead = (store.root / "a").stat().st_mtime_ns + 10**15
    os.utime(store.root / "a", ns=(ahead, ahead))
    store.write("a", b"two")
    assert (store.root / "a").stat().st_mtime_ns > ahead


ALTERNATE = """
import sys
from pathlib import Path
from job.storage.directory import DirectoryStore
store = DirectoryStore(Path(sys.argv[1]))
for turn in range(60):
    store.put(Path(sys.argv[2 + turn % 2]), "a")
"""


def test_a_reader_sees_the_old_object_or_the_new_one_and_never_half(store: DirectoryStore, tmp_path: Path) -> None:
    both = [b"1" * 3_000_000, b"2" * 2_000_000]
    paths = [file_with(tmp_path / str(number), data) for number, data in enumerate(both)]
    store.put(paths[0], "a")
    command = [sys.executable, "-c", ALTERNATE, str(store.root), *map(str, paths)]
    seen = set()
    with subprocess.Popen(command, cwd=REPOSITORY) as writer:
        while writer.poll() is None:
            found = store.read("a")
            assert found is not None
            seen.add(found[0])
    assert writer.returncode == 0
    assert seen <= set(both)


RACE = """
import sys
from pathlib import Path
from job.storage.directory import DirectoryStore
from job.storage.store import PreconditionFailed
root, name, condition = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = DirectoryStore(root)
sys.stdin.readline()
try:
    if condition == "absent":
        store.write("run/owner.json", name.encode(), if_absent=True)
    else:
        store.write("run/owner.json", name.encode(), if_match=condition)
    print("won")
except PreconditionFailed:
    print("lost")
"""


@pytest.mark.parametrize("condition", ["absent", "match"])
def test_of_eight_processes_exactly_one_wins(store: DirectoryStore, condition: str) -> None:
    if condition == "match":
        condition = store.write("run/owner.json", b"before")
    command = [sys.executable, "-c", RACE, str(store.root)]
    racers = [
        subprocess.Popen(
            [*command, f"racer-{n}", condition],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert sorted(said) == ["lost"] * 7 + ["won"]
    found = store.read("run/owner.json")
    assert found is not None
    assert found[0].decode() == f"racer-{said.index('won')}"


def test_a_probe_leaves_nothing_and_says_that_conditions_hold(store: DirectoryStore) -> None:
    assert probe(store) == ()
    assert list(store.list("")) == []


def test_a_probe_tells_a_store_that_ignores_conditions(store: DirectoryStore) -> None:
    class Careless(DirectoryStore):
        def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
            return super().write(key, data)

    assert probe(Careless(store.root)) == ("If-None-Match", "If-Match")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFailure),
        (errno.EDQUOT, DiskFailure),
        (errno.EIO, DiskFailure),
        (errno.EROFS, DiskFailure),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.ENOENT, InputMissing),
        (errno.EISDIR, InputMissing),
        (errno.ESTALE, TemporaryFailure),
    ],
)
def test_a_refusal_of_the_system_has_a_class_of_ours(number: int, kind: type[Exception], tmp_path: Path) -> None:
    error = foreseen(OSError(number, os.strerror(number)), "adapter", tmp_path, 3 << 30)
    assert type(error) is kind
    assert str(error).startswith("adapter: ")
    assert str(tmp_path) in str(error)
    assert ("3.0 GiB" in str(error)) == (kind is DiskFailure)


NO_ROOM = """
import resource, sys
from pathlib import Path
from job.errors import DiskFailure
from job.storage.directory import DirectoryStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = DirectoryStore(Path(sys.argv[1]), "file:out")
try:
    store.put(Path(sys.argv[2]), "a")
except DiskFailure as error:
    print(error)
"""


def test_a_put_that_does_not_fit_leaves_the_old_object_and_no_scratch(store: DirectoryStore, tmp_path: Path) -> None:
    store.write("a", b"old")
    big = file_with(tmp_path / "big", bytes(2 << 20))
    said = run_python(NO_ROOM, str(store.root), str(big))
    assert "2.0 MiB were to be written" in said.stdout, said.stderr
    assert [path.name for path in store.root.iterdir() if path.is_file()] == ["a"]
    assert (store.root / "a").read_bytes() == b"old"


NOBODY = """
import os, sys
from pathlib import Path
from job.errors import AccessDenied
from job.storage.directory import DirectoryStore
from job.storage.store import probe
store = DirectoryStore(Path(sys.argv[1]), "file:out")
os.setuid(65534)  # only now: the user nobody may not read the interpreter everywhere
calls = {
    "read": lambda: store.read("closed/a"),
    "stat": lambda: store.stat("closed/a"),
    "list": lambda: list(store.list("")),
    "get": lambda: store.get("closed/a", Path(sys.argv[1]) / "x"),
    "probe": lambda: probe(store),
}
for name, call in calls.items():
    try:
        call()
    except AccessDenied as error:
        print(name, "denied")
"""


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that the user nobody may enter but for its part ``closed``; pytest's own belongs to one user alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "closed").mkdir(mode=0o700)
        (folder / "closed" / "a").write_bytes(b"secret")
        folder.chmod(0o755)
        yield folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_denied_is_never_read_as_absent(closed_folder: Path) -> None:
    said = run_python(NOBODY, str(closed_folder))
    expected = [f"{name} denied" for name in ("read", "stat", "list", "get", "probe")]
    assert said.stdout.splitlines() == expected, said.stderr


def test_too_little_space_is_said_before_anything_is_brought(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "the model")
    with pytest.raises(DiskFailure, match=r"the model needs 1024\.0 TiB below .*; free some space"):
        require_space(tmp_path / "not" / "yet", 1 << 50, "the model")


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size_text(count) == text
