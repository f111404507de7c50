"""Files that others read appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileEntry:
    """One file as a commit marker and the manifest record it."""

    name: str
    """Relative to the folder described; '/' between parts."""
    size: int
    """Bytes."""
    sha256: str
    """Lower-case hex."""

    def record(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return asdict(self)


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory (its names) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a scratch path that becomes ``path``, flushed to disk, only if the block succeeds."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        fsync_path(scratch)
        os.replace(scratch, path)
        fsync_path(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def sealing(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder that becomes ``folder``, flushed to disk, only if the block succeeds.

    What stood there before is removed first: a folder of that name is complete or absent.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in sorted(scratch.rglob("*")):
            fsync_path(path)
        fsync_path(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that appears whole; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Lower-case hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def entry_of(path: Path, name: str) -> FileEntry:
    """Size and hash of one file, under ``name``."""
    return FileEntry(name, path.stat().st_size, sha256_of(path))


def entries_of(folder: Path) -> list[FileEntry]:
    """Every file below a folder, sorted by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted((entry_of(path, path.relative_to(folder).as_posix()) for path in files), key=lambda entry: entry.name)
