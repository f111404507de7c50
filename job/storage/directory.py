"""A store that is a folder of this machine, or one mounted here."""

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from job.errors import TemporaryFailure
from job.files import FileEntry, entry_of, fsync_path
from job.storage.store import (
    SCRATCH,
    Entry,
    PreconditionFailed,
    checked,
    etag_of,
    foreseen,
    install,
    is_key,
    make_folder,
    translated,
)

with suppress(ModuleNotFoundError):  # POSIX alone has it, for writing; a folder is read elsewhere too
    import fcntl

CHUNK_BYTES = 4 << 20
LOCK_SECONDS = 30.0
_LOCK = "run/.lock"


class DirectoryStore:
    """A store that is a folder of this machine, or one mounted here."""

    def __init__(self, root: Path, uri: str | None = None) -> None:
        self.root = root
        self.uri = uri if uri is not None else str(root)

    def __repr__(self) -> str:
        return f"DirectoryStore({self.uri!r})"

    def get(self, key: str, to: Path) -> FileEntry:
        source = self._path(key)
        with translated(f"{self._name(key)}: cannot be read", source.parent), source.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            with translated(f"{self._name(key)}: cannot be brought here", to.parent, size):
                return install(to, lambda out: _copy(stream, out, key))

    def put(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> FileEntry:
        target = self._path(key)

        def replace(scratch: Path, to: Path) -> None:
            with self._lock():  # for the moment of the change only: the bytes are here, and others have heartbeats
                self._require(key, if_absent, if_match)
                os.replace(scratch, to)

        with translated(f"{path}: cannot be read", path.parent), path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            with translated(f"{self._name(key)}: cannot be written", target.parent, size):
                how = replace if if_absent or if_match is not None else os.replace
                return install(target, lambda out: _copy(stream, out, key), replace=how)

    def read(self, key: str) -> tuple[bytes, str] | None:
        path = self._path(key)
        with translated(f"{self._name(key)}: cannot be read", path.parent):
            try:
                with path.open("rb") as stream:
                    return stream.read(), etag_of(os.fstat(stream.fileno()))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with translated(f"{self._name(key)}: cannot be written", path.parent, len(data)), self._lock():
            present = self._require(key, if_absent, if_match)
            install(path, lambda out: out.write(data), newer_than=path.stat().st_mtime_ns if present else 0)
            return etag_of(path.stat())

    def _require(self, key: str, if_absent: bool, if_match: str | None) -> Entry | None:
        """What is there. Raises PreconditionFailed if it is not what was promised."""
        present = self.stat(key)
        if (if_absent and present) or (if_match is not None and (present is None or present.etag != if_match)):
            raise PreconditionFailed(f"{self._name(key)}: {'has changed' if present else 'is gone'} meanwhile")
        return present

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        keys = (path.relative_to(self.root).as_posix() for path in _files(folder, f"{self._name(prefix)}: cannot list"))
        wanted = (key for key in keys if key.startswith(prefix) and is_key(key))
        for key in sorted(wanted):
            entry = self.stat(key)
            if entry is not None:
                yield entry

    def stat(self, key: str) -> Entry | None:
        path = self._path(key)
        with translated(f"{self._name(key)}: cannot be looked at", path.parent):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return Entry(key, status.st_size, etag_of(status)) if path.is_file() else None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with translated(f"{self._name(key)}: cannot be deleted", path.parent):
            try:
                path.unlink()
                fsync_path(path.parent)
            except (FileNotFoundError, NotADirectoryError):
                return
            self._drop_empty_folders(path.parent)

    def sweep(self, prefix: str) -> int:
        folder = self._path(prefix.rstrip("/")) if prefix else self.root
        files = _files(folder, f"{self._name(prefix)}: cannot list")
        left = [path for path in files if path.name.startswith(".") and path.name.endswith(SCRATCH)]
        for path in left:
            with translated(f"{path}: cannot be deleted", path.parent):
                path.unlink(missing_ok=True)
                self._drop_empty_folders(path.parent)
        return len(left)

    def digest(self, key: str) -> FileEntry:
        path = self._path(key)
        with translated(f"{self._name(key)}: cannot be read", path.parent):
            return entry_of(path, key)

    def hurry(self, until: float) -> None:
        pass  # a folder is never asked twice

    def _path(self, key: str) -> Path:
        return self.root / checked(key)

    def _name(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def _drop_empty_folders(self, folder: Path) -> None:
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:  # not empty, or a neighbour was faster: both mean stop
                return
            folder = folder.parent

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Only one process of those that see this folder is inside. The kernel lets go of it when a process dies."""
        path = self.root / _LOCK
        make_folder(path.parent)
        deadline = time.monotonic() + LOCK_SECONDS
        with path.open("ab") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TemporaryFailure(f"{path}: locked by another process for {LOCK_SECONDS:g} s") from None
                    time.sleep(0.01)
            yield


def _files(folder: Path, what: str) -> Iterator[Path]:
    """Every file below a folder, scratch included; none if there is no folder."""

    def refuse(error: OSError) -> None:
        # Only "is not there" may be read as "holds nothing".
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise foreseen(error, what, folder) from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def _copy(stream: BinaryIO, out: BinaryIO, name: str) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
        out.write(chunk)
        size += len(chunk)
    return FileEntry(name, size, digest.hexdigest())
