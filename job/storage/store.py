"""Where bytes live: one small interface, and what every store behind it shares. The only door to a store's bytes.

Keys are relative to the store's prefix, '/' between parts. Every object appears whole or not at all, whatever dies.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from job.files import FileEntry, fsync_path

T = TypeVar("T")

SCRATCH = ".part"
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

    def put(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> FileEntry:
        """Sends a file, replacing what was there; size and hash are of the bytes sent.

        Raises:
            PreconditionFailed: as ``write`` does, unless the very bytes are there already: then an earlier try landed.
        """

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
        """Every object whose key begins with ``prefix``, sorted by key.

        What no store of ours would hold is left out: markers of folders, names that begin with '.', ``..``.
        """

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
    if "://" not in uri and not uri.startswith(("file:", "s3:")):
        return Path(os.path.abspath(Path(uri).expanduser()))
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise SpecInvalid(f"{uri}: names the machine '{parts.netloc}'; a local file is file:///PATH (three slashes)")
    return Path(os.path.abspath(unquote(uri.removeprefix("file:").removeprefix("//" + parts.netloc))))


def open_store(uri: str, settings: Mapping[str, str] | None = None) -> Store:
    """The store a URI names; nothing is read or made yet.

    Args:
        settings: how a person's machine sees an S3 store, as environment variables that win over the environment's;
            answers are then waited for seconds, not minutes. Left out: a run's patience, the environment's settings.

    Raises:
        SpecInvalid: no store can be opened by this URI, or its client is not installed.
    """
    path = local_path(uri)
    if path is not None:
        from job.storage.directory import DirectoryStore

        return DirectoryStore(path, uri)
    if uri.startswith("s3:"):
        try:
            from job.storage.s3 import (
                HASTY,
                S3Store,
            )  # brings boto3, which a run without s3:// needs neither time nor memory for
        except ModuleNotFoundError as error:
            raise SpecInvalid(f"{uri}: needs {error.name}, which is not here: pip install 'tunejob[s3]'") from error
        return S3Store(uri) if settings is None else S3Store(uri, patience=HASTY, settings=settings)
    plain = uri.split("?")[0]  # a presigned address carries its key behind the question mark
    raise SpecInvalid(f"{plain}: no store is opened by {uri.split('://')[0]}://; name s3://BUCKET/PREFIX or a folder")


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


def is_key(text: str) -> bool:
    """Whether a key's parts are all names: none empty, none beginning with '.', so that nothing leaves the prefix."""
    return "\0" not in text and "\\" not in text and all(part and part[0] != "." for part in text.split("/"))


def checked(key: str) -> str:
    """The key itself. Raises IntegrityFailure if it could leave the store's prefix or meet a scratch file."""
    if not is_key(key):
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


def probe(store: Store) -> tuple[str, ...]:
    """The conditions on writes that the store does not keep, as HTTP names them; what it cannot do at all is raised.

    Raises:
        AccessDenied, DiskFailure: naming whether writing, reading, listing or deleting is refused.
        IntegrityFailure: it gave back other bytes than were written, or does not list them.
    """
    key, data = f"{_PROBE}{secrets.token_hex(8)}", secrets.token_bytes(32)
    with suppress(PreconditionFailed):  # a first try of this very write may have landed and its reply been lost
        store.write(key, data, if_absent=True)
    kept = {
        "If-None-Match": _refuses(store, key, data, if_absent=True),
        "If-Match": _refuses(store, key, data, if_match="0" * 32),
    }
    found, listed = store.read(key), any(entry.key == key for entry in store.list(key))
    store.delete(key)
    if found is None or found[0] != data:
        raise IntegrityFailure(f"{store.uri}: does not give back what was just written ({key}); is it a cache?")
    if not listed:
        raise IntegrityFailure(f"{store.uri}: does not list what was just written ({key}); is it a cache?")
    return tuple(name for name, is_kept in kept.items() if not is_kept)


def _refuses(store: Store, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> bool:
    """Whether a write is refused whose condition does not hold."""
    try:
        store.write(key, data, if_absent=if_absent, if_match=if_match)
    except PreconditionFailed:
        return True
    return False


def install(
    path: Path,
    fill: Callable[[BinaryIO], T],
    newer_than: int = 0,
    replace: Callable[[Path, Path], None] = os.replace,
) -> T:
    """Fills a scratch file, flushes it to disk and puts it in place of ``path`` at once.

    Args:
        replace: puts it there; what it raises leaves ``path`` as it was.
        newer_than: a time in nanoseconds that the file's own must exceed. Clocks of file systems tick slowly (4 ms is
            common), so that two writes of one size could share an etag.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SCRATCH}")
    make_folder(path.parent)
    try:
        with scratch.open("xb") as out:
            result = fill(out)
            out.flush()
            status = os.fstat(out.fileno())
            if status.st_mtime_ns <= newer_than:
                os.utime(out.fileno(), ns=(status.st_atime_ns, newer_than + 1000))
            os.fsync(out.fileno())
        replace(scratch, path)
        fsync_path(path.parent)
    except FileNotFoundError as error:
        raise TemporaryFailure(f"{path}: its folder was removed while it was written") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return result


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, names flushed to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_path(path.parent)
