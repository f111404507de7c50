"""Where bytes live: one small interface, and the directory behind it. The only door to a store's bytes.

Keys are relative to the store's prefix, '/' between parts. Every object appears whole or not at all, whatever dies.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from job.errors import (
    AccessDenied,
    Conflict,
    DiskFailure,
    InputMissing,
    IntegrityFailure,
    JobError,
    SpecInvalid,
    TemporaryFailure,
)
from job.files import FileEntry, entry_of, fsync_path

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
LOCK_SECONDS = 30.0
_SCRATCH = ".part"
_LOCK = "run/.lock"
_PROBE = "run/probe-"


class PreconditionFailed(Conflict):
    """A conditional write found something else than it was promised; nothing was written."""


@dataclass(frozen=True)
class Entry:
    """One object as a listing shows it."""

    key: str
    size: int
    """Bytes."""
    etag: str
    """Differs after every change of the object; says nothing more."""


class Store(Protocol):
    """All the job asks of storage.

    Everything raises AccessDenied (never read as "not there"), DiskFailure and TemporaryFailure as they come; a key
    that leaves the prefix, or has a part beginning with '.', is an IntegrityFailure.
    """

    uri: str
    """As the user named it; messages use it."""

    def get(self, key: str, to: Path) -> FileEntry:
        """Brings an object here; size and hash are of the bytes received. Raises InputMissing."""

    def put(self, path: Path, key: str) -> FileEntry:
        """Sends a file, replacing what was there; size and hash are of the bytes sent."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small object's bytes and etag; None only if it is proven absent."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Writes a small object, on a condition if one is given.

        Returns:
            Its new etag.

        Raises:
            PreconditionFailed: the key exists (``if_absent``) or its etag is another (``if_match``).
        """

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key begins with ``prefix``, sorted by key."""

    def stat(self, key: str) -> Entry | None:
        """What the listing would show of one key; None only if it is proven absent."""

    def delete(self, key: str) -> None:
        """Removes an object; no error if there is none."""

    def sweep(self, prefix: str) -> int:
        """Removes what interrupted writes left below a prefix ("" for all); only for the owner. Returns how many."""

    def digest(self, key: str) -> FileEntry:
        """Size and SHA-256 of an object's bytes as they are stored; nothing is kept here. Raises InputMissing."""

    def hurry(self, until: float) -> None:
        """From this moment (``time.monotonic``) on nothing is tried again: a process that leaves has little time."""


def local_path(uri: str) -> Path | None:
    """The absolute path a plain path or ``file:`` URI means; None for another scheme.

    Raises:
        SpecInvalid: a ``file:`` URI names another machine.
    """
    if "://" not in uri and not uri.startswith("file:"):
        return Path(os.path.abspath(Path(uri).expanduser()))
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise SpecInvalid(f"{uri}: names the machine '{parts.netloc}'; a local file is file:///PATH (three slashes)")
    return Path(os.path.abspath(unquote(uri.removeprefix("file:").removeprefix("//" + parts.netloc))))


def open_store(uri: str) -> Store:
    """The store a URI names; nothing is read or made yet.

    Raises:
        SpecInvalid: the scheme is not one this version can open.
    """
    path = local_path(uri)
    if path is not None:
        return DirectoryStore(path, uri)
    scheme = uri.split("://")[0]
    raise SpecInvalid(
        f"{uri}: {scheme}:// needs a client this version does not have: it reads and writes directories only; "
        "name a folder, or file:///PATH"
    )


def to_json(value: Any) -> bytes:
    """How control objects are written."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def from_json(data: bytes, name: str) -> dict[str, Any]:
    """A control object's record. Raises IntegrityFailure, naming it, where it is no JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise IntegrityFailure(f"{name}: not a JSON object ({len(data)} bytes); it was written by something else")
    return value


def checked(key: str) -> str:
    """The key itself. Raises IntegrityFailure if it could leave the store's prefix or meet a scratch file."""
    if "\0" in key or "\\" in key or any(not part or part.startswith(".") for part in key.split("/")):
        raise IntegrityFailure(f"{key!r} is no key of a store: its parts are names, none of them begins with '.'")
    return key


def etag_of(status: os.stat_result) -> str:
    """A file's etag: unchanged as long as nobody writes it."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def size_text(count: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises DiskFailure if ``needed`` bytes do not fit where ``folder`` is, or will be."""
    free = _free(folder)
    if needed > free:
        raise DiskFailure(
            f"{what} needs {size_text(needed)} below {folder}, where {size_text(free)} are free; "
            "free some space or name another folder"
        )


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_DENIED = {errno.EACCES, errno.EPERM}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


def foreseen(error: OSError, what: str, folder: Path, needed: int | None = None) -> JobError:
    """What an operating system's refusal means for the run.

    Args:
        what: what was tried, the beginning of the sentence.
        folder: where it was tried.
        needed: bytes that were to be written, if known.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _DENIED:
        return AccessDenied(
            f"{what}: {reason} ({error.filename or folder}); check its owner, its mode and who runs this"
        )
    if error.errno in _DISK:
        need = f"{size_text(needed)} were to be written, " if needed is not None else ""
        with suppress(OSError):
            need += f"{size_text(_free(folder))} are free, "
        return DiskFailure(f"{what}: {reason} in {folder} ({need}free some space or name another folder)")
    if error.errno in _MISSING:
        return InputMissing(f"{what}: {reason} (looked for {error.filename or folder})")
    return TemporaryFailure(f"{what}: {reason} ({error.filename or folder})")


@contextmanager
def translated(what: str, folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turns the block's OSErrors into ours; see ``foreseen``."""
    try:
        yield
    except OSError as error:
        raise foreseen(error, what, folder, needed) from error


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
                return _install(to, lambda out: _copy(stream, out, key))

    def put(self, path: Path, key: str) -> FileEntry:
        target = self._path(key)
        with translated(f"{path}: cannot be read", path.parent), path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            with translated(f"{self._name(key)}: cannot be written", target.parent, size):
                return _install(target, lambda out: _copy(stream, out, key))

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
            present = self.stat(key)
            if (if_absent and present) or (if_match is not None and (present is None or present.etag != if_match)):
                raise PreconditionFailed(f"{self._name(key)}: {'has changed' if present else 'is gone'} meanwhile")
            _install(path, lambda out: out.write(data), newer_than=path.stat().st_mtime_ns if present else 0)
            return etag_of(path.stat())

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        keys = (path.relative_to(self.root).as_posix() for path in _files(folder, f"{self._name(prefix)}: cannot list"))
        wanted = (key for key in keys if key.startswith(prefix) and not Path(key).name.startswith("."))
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
        left = [path for path in files if path.name.startswith(".") and path.name.endswith(_SCRATCH)]
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
        _make_folder(path.parent)
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


def probe(store: Store) -> bool:
    """Whether the store keeps conditions on writes; what it cannot do at all is raised.

    Raises:
        AccessDenied, DiskFailure: naming whether writing, reading or deleting is refused.
        IntegrityFailure: it gave back other bytes than were written.
    """
    key, data = f"{_PROBE}{secrets.token_hex(8)}", secrets.token_bytes(32)
    store.write(key, data, if_absent=True)
    try:
        store.write(key, data, if_absent=True)
        keeps_conditions = False
    except PreconditionFailed:
        keeps_conditions = True
    found = store.read(key)
    store.delete(key)
    if found is None or found[0] != data:
        raise IntegrityFailure(f"{store.uri}: does not give back what was just written ({key}); is it a cache?")
    return keeps_conditions


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


def _install(path: Path, fill: Callable[[BinaryIO], T], newer_than: int = 0) -> T:
    """Fills a scratch file, flushes it to disk and puts it in place of ``path`` at once.

    Args:
        newer_than: a time in nanoseconds that the file's own must exceed. Clocks of file systems tick slowly (4 ms is
            common), so that two writes of one size could share an etag.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SCRATCH}")
    _make_folder(path.parent)
    try:
        with scratch.open("xb") as out:
            result = fill(out)
            out.flush()
            status = os.fstat(out.fileno())
            if status.st_mtime_ns <= newer_than:
                os.utime(out.fileno(), ns=(status.st_atime_ns, newer_than + 1000))
            os.fsync(out.fileno())
        os.replace(scratch, path)
        fsync_path(path.parent)
    except FileNotFoundError as error:
        raise TemporaryFailure(f"{path}: its folder was removed while it was written") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return result


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents, names flushed to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_path(path.parent)
