"""What a container may use is read from its cgroup, in both versions, and from what the manifest says."""

from pathlib import Path

import pytest

from job.errors import DeviceFailure, DiskFailure
from job.supervision.container import Memory, Scratch, memory, oom_kills, parse_quantity, require_gpu_files


def cgroup(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


VERSION_2 = {
    "memory.max": "1000\n",
    "memory.current": "990\n",
    "memory.stat": "anon 650\nshmem 50\ninactive_file 240\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
}
VERSION_1 = {
    "memory/memory.limit_in_bytes": "1000\n",
    "memory/memory.usage_in_bytes": "990\n",
    "memory/memory.stat": "inactive_file 5\ntotal_rss 650\ntotal_shmem 50\ntotal_inactive_file 240\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["version 2", "version 1"])
def test_memory_is_counted_without_pages_that_can_be_taken_back(files: dict[str, str], tmp_path: Path) -> None:
    folder = cgroup(tmp_path, files)
    found = memory(folder)
    assert found == Memory(used=750, limit=1000, pinned=700)
    assert (found.share, found.is_squeezed) == (0.75, False)
    assert Memory(used=990, limit=1000, pinned=970).is_squeezed
    assert oom_kills(folder) == 2


@pytest.mark.parametrize(
    "change",
    [
        VERSION_2 | {"memory.max": "max\n"},
        VERSION_1 | {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
        {},
    ],
    ids=["no limit in version 2", "no limit in version 1", "no cgroup"],
)
def test_without_a_limit_nothing_is_known(change: dict[str, str], tmp_path: Path) -> None:
    assert memory(cgroup(tmp_path, change)) is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20Gi", 20 << 30),
        ("1.5Gi", 3 << 29),
        ("500M", 500_000_000),
        ("1k", 1000),
        ("123", 123),
        ("", None),
        ("lots", None),
        ("-1Gi", None),
    ],
)
def test_quantities_are_read_as_kubernetes_does(text: str, count: int | None) -> None:
    assert parse_quantity(text) == count


def test_scratch_is_left_before_the_limit_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEJOB_SCRATCH_LIMIT", "1Mi")
    scratch = Scratch(tmp_path, every_seconds=0.0)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * 900_000)
    scratch.check()
    scratch.require(50_000, "the model")
    with pytest.raises(DiskFailure, match=r"the model needs .* of scratch"):
        scratch.require(120_000, "the model")
    (tmp_path / "more").write_bytes(b"x" * 120_000)
    with pytest.raises(DiskFailure, match=r"scratch: .* of 1\.0 MiB are used"):
        scratch.check()


def test_scratch_without_a_limit_is_never_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNEJOB_SCRATCH_LIMIT", raising=False)
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    Scratch(tmp_path, every_seconds=0.0).check()


def test_a_gpu_that_is_asked_for_has_a_device_file(tmp_path: Path) -> None:
    require_gpu_files(0, tmp_path)
    with pytest.raises(DeviceFailure, match=r"resources\.gpus: 2 asked for"):
        require_gpu_files(2, tmp_path)
    (tmp_path / "nvidia0").touch()
    require_gpu_files(2, tmp_path)
