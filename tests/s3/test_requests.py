"""What each call costs in requests: the bill, and the time on a far store, are made of them."""

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from job.process import Identity
from job.storage import transfer
from job.storage.s3 import S3Store
from job.storage.s3_client import PART_BYTES
from job.storage.store import probe
from job.supervision.own import claim
from tests.s3.conftest import Enter
from tests.s3.proxy import Proxy

REPOSITORY = Path(__file__).parents[2]

CALLS: dict[str, tuple[Callable[[S3Store, Path], object], dict[str, int]]] = {
    "read": (lambda store, _: store.read("there"), {"GET": 1}),
    "write": (lambda store, _: store.write("new", b"1"), {"PUT": 1}),
    "stat": (lambda store, _: store.stat("there"), {"HEAD": 1}),
    "list": (lambda store, _: list(store.list("")), {"GET": 1}),
    "delete": (lambda store, _: store.delete("there"), {"DELETE": 1}),
    "digest": (lambda store, _: store.digest("there"), {"GET": 1}),
    "get": (lambda store, to: store.get("there", to / "x"), {"HEAD": 1, "GET": 1}),
    "get of two parts": (lambda store, to: store.get("large", to / "x"), {"HEAD": 1, "GET": 2}),
    "put": (lambda store, to: store.put(to / "small", "new"), {"PUT": 1, "HEAD": 1}),
    "put of two parts": (lambda store, to: store.put(to / "large", "new"), {"POST": 2, "PUT": 2, "HEAD": 1}),
    "probe": (lambda store, _: probe(store), {"PUT": 3, "GET": 2, "DELETE": 1}),
    "sweep": (lambda store, _: store.sweep(""), {"GET": 1}),
    "claim": (lambda store, _: claim(store, "spec", Identity(1, "pod"), heartbeat=False), {"GET": 1, "PUT": 1}),
    "commit of two files": (
        lambda store, to: transfer.push_checkpoint(store, to / "folder", 1, 1, {}),
        {"GET": 2, "PUT": 3, "HEAD": 4},
    ),
}


@pytest.fixture
def filled(s3: S3Store, tmp_path: Path) -> S3Store:
    """A store with a few objects, and files beside it."""
    (tmp_path / "folder").mkdir()
    for name, size in {"small": 10, "large": PART_BYTES + 1, "folder/a": 10, "folder/b": 10}.items():
        (tmp_path / name).write_bytes(bytes(size))
    s3.put(tmp_path / "small", "there")
    s3.put(tmp_path / "large", "large")
    return s3


def test_no_call_asks_more_than_it_must(filled: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    asked = {}
    for name, (call, _) in CALLS.items():
        filled.write("there", b"0123456789")
        proxy.begin_anew()
        call(filled, tmp_path)
        asked[name] = dict(Counter(line.split()[0] for line in proxy.asked))
    assert asked == {name: requests for name, (_, requests) in CALLS.items()}


MOVES = """
    import resource, sys
    from pathlib import Path
    from job.storage.s3 import S3Store
    store, folder = S3Store(sys.argv[1]), Path(sys.argv[2])
    store.put(folder / "small", "small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.put(folder / "huge", "huge")
    store.get("huge", folder / "back")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_size_of_what_is_moved(enter: Enter, uri: str, tmp_path: Path) -> None:
    mib = 400
    (tmp_path / "small").write_bytes(b"1")
    with (tmp_path / "huge").open("wb") as stream:
        for _ in range(mib):
            stream.write(os.urandom(1 << 20))
    enter()
    command = [sys.executable, "-c", textwrap.dedent(MOVES), uri, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, f"{done.stdout.strip()} MiB more for {mib} MiB"
