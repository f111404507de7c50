"""Proves what a run published, file by file, and fetches it."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from job.errors import InputMissing, IntegrityFailure
from job.layout import CHECKPOINTS, COMMIT, MANIFEST, PREPARED
from job.storage.store import Store, checked, from_json, require_space, size_text, translated
from launcher.codes import NoResult, Refused

T = TypeVar("T")

THREADS = 4
NAMED = 5
"""Damaged files that a sentence names."""

# What Windows makes of a name that is harmless elsewhere: a drive, a device, a stream of another file.
_ODD = re.compile(r'[<>:"|?*\x00-\x1f]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[. ](/|$)', re.IGNORECASE)


@dataclass(frozen=True)
class File:
    """One file as the manifest or a commit marker records it."""

    name: str
    """Its key."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Verified:
    """A published result, every byte of which is right."""

    uri: str
    files: tuple[File, ...]
    itself: File
    """The manifest."""

    def __str__(self) -> str:
        size = size_text(sum(file.size for file in self.files))
        return f"{self.uri}: {len(self.files)} files ({size}) verified, manifest {self.itself.sha256[:12]}"


def verify(store: Store, digest: str = "") -> Verified:
    """What a run published, once size and SHA-256 of every file are proven; every byte is read.

    Args:
        digest: SHA-256 of the manifest, as the run's pod said it; empty where that is not known.

    Raises:
        NoResult: nothing is published, or not what was said, or a file is gone or altered.
    """
    published = manifest(store, digest)

    def complaint(file: File) -> str:
        try:
            found = store.digest(file.name)
        except InputMissing:
            return f"{file.name} is gone"
        return "" if (found.size, found.sha256) == (file.size, file.sha256) else f"{file.name} is altered"

    if wrong := [text for text in _in_parallel(complaint, published.files) if text]:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise NoResult(
            f"{store.uri}: what is there is not what was published ({', '.join(wrong[:NAMED])}{more}); restore it from "
            "a backup, or delete the folder and train again"
        )
    return published


def manifest(store: Store, digest: str = "") -> Verified:
    """What the manifest lists; the files are not looked at.

    Raises:
        NoResult: there is none, it is another than was said, or none of ours.
    """
    found = store.read(MANIFEST)
    if found is None:
        raise NoResult(f"{store.uri}: nothing is published ({MANIFEST} is missing)")
    sha256 = hashlib.sha256(found[0]).hexdigest()
    if digest and sha256 != digest:
        raise NoResult(
            f"{store.uri}/{MANIFEST}: its SHA-256 is {sha256[:12]}..., but the run's pod said {digest[:12]}...; it was "
            "changed afterwards"
        )
    files = _files(found[0], f"{store.uri}/{MANIFEST}")
    return Verified(store.uri, files, File(MANIFEST, len(found[0]), sha256))


def fetch(store: Store, folder: Path, everything: bool = False) -> list[Path]:
    """Brings a published result here, each file proven before it takes its place; gives the files, sorted.

    What is there already and is the same stays; what a fetch that was cut off left is no hindrance. Below ``run/`` are
    the manifest and, with ``everything``, records without a hash of their own, which are replaced.

    Args:
        everything: checkpoints and the run's records too.

    Raises:
        Refused: another file is in the way; nothing was fetched then.
        NoResult: nothing is published, or what is there is not what was published.
        DiskFailure, AccessDenied: the folder cannot be written to.
    """
    published = manifest(store)
    files = {file.name: file for file in (*published.files, published.itself)}
    if everything:
        files |= {file.name: file for file in _committed(store)}
    places = {name: _place(folder, name) for name in files}
    with translated(f"{folder}: cannot be looked at", folder):
        missing = [file for file in files.values() if not _is_there(places[file.name], file)]
    require_space(folder, sum(file.size for file in missing), f"{store.uri}")
    _in_parallel(lambda file: _bring(store, file, places[file.name]), missing)
    for key in _records(store, files) if everything else ():
        places[key] = _place(folder, key)
        with translated(f"{places[key]}: cannot be written", places[key].parent):
            store.get(key, places[key])
    return sorted(places.values())


def _files(data: bytes, name: str) -> tuple[File, ...]:
    """The files that a manifest or marker lists."""
    try:
        record = from_json(data, name)
        files = tuple(File(checked(one["name"]), int(one["size"]), str(one["sha256"])) for one in record["files"])
    except (IntegrityFailure, KeyError, TypeError, ValueError) as error:
        raise NoResult(f"{name}: no list of files ({error}); it was written by something else") from error
    return files


def _committed(store: Store) -> Iterator[File]:
    """The files of every committed checkpoint."""
    for entry in store.list(CHECKPOINTS):
        folder, _, name = entry.key.rpartition("/")
        found = store.read(entry.key) if name == COMMIT else None
        if found:
            for file in _files(found[0], f"{store.uri}/{entry.key}"):
                yield File(f"{folder}/{file.name}", file.size, file.sha256)


def _records(store: Store, files: dict[str, Any]) -> list[str]:
    """What is nowhere listed with its hash: markers, the ledger, the status. Not the training data as tokens."""
    return [
        entry.key
        for entry in store.list("")
        if entry.key not in files and (entry.key.startswith("run/") or entry.key.endswith(f"/{COMMIT}"))
        if not entry.key.startswith(PREPARED)
    ]


def _place(folder: Path, key: str) -> Path:
    """Where a key goes. A store is not to be trusted with where files of this machine are written."""
    path = folder.joinpath(*checked(key).split("/"))
    root = Path(os.path.realpath(folder))
    if _ODD.search(key) or root not in Path(os.path.realpath(path)).parents:
        raise Refused(f"{key!r} of the store would be written outside {folder}, or under no name; nothing was fetched")
    return path


def _is_there(path: Path, file: File) -> bool:
    """Whether the very file is there. Raises Refused if another is."""
    if not path.exists():
        return False
    if path.is_file() and path.stat().st_size == file.size:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                return True
    raise Refused(f"{path} is there and is another than that of the run; name a new folder. Nothing was fetched")


def _bring(store: Store, file: File, to: Path) -> None:
    part = to.with_name(f"{to.name}.part")
    with translated(f"{to}: cannot be written", to.parent, file.size):
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = store.get(file.name, part)
            if (found.size, found.sha256) != (file.size, file.sha256):
                raise NoResult(f"{store.uri}/{file.name}: not the bytes that were published; it was changed since")
            os.replace(part, to)
        except InputMissing:
            raise NoResult(f"{store.uri}/{file.name}: published, but gone") from None
        finally:
            part.unlink(missing_ok=True)


def _in_parallel(call: Callable[[File], T], files: Sequence[File]) -> list[T]:
    """The results in order; after a failure nothing more is begun."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(call, file) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
