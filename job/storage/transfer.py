"""Checkpoints and the result: moved to the store and back, each file proven by size and SHA-256.

A checkpoint is committed, and a result published, by one small object written last. Whatever dies before it leaves the
state before; whatever dies after it leaves the state after.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.errors import Conflict, InputMissing, IntegrityFailure
from job.files import FileEntry, entries_of, entry_of, sealing
from job.layout import CHECKPOINTS, COMMIT, MANIFEST, checkpoint_prefix, parse_checkpoint
from job.storage.parallel import in_parallel, nothing
from job.storage.store import Entry, PreconditionFailed, Store, checked, from_json, require_space, to_json, translated

log = logging.getLogger(__name__)

RECORD_VERSION = 1
RACES = 8
"""Times that somebody else may change an object between our look at it and our writing it."""


@dataclass(frozen=True)
class Commit:
    """A checkpoint whose marker is in the store."""

    step: int
    generation: int
    files: tuple[FileEntry, ...]
    record: Mapping[str, Any]
    """The whole marker, with what the caller added to it."""

    @property
    def prefix(self) -> str:
        """Where its objects are; ends in '/'."""
        return checkpoint_prefix(self.step, self.generation)


@dataclass(frozen=True)
class Manifest:
    """A published result."""

    files: tuple[FileEntry, ...]
    record: Mapping[str, Any]
    """The whole manifest, with what the caller added to it."""
    sha256: str
    """Of the manifest itself, as it lies in the store."""


# Checkpoints


def push_checkpoint(store: Store, folder: Path, step: int, generation: int, extra: Mapping[str, Any]) -> Commit:
    """The commit of a sealed checkpoint, once every file and then the marker are in the store and read back.

    Pushing what is committed already is no error if it is the same.

    Args:
        extra: what else the marker records, for instance the digest of the spec.

    Raises:
        Conflict: another checkpoint is committed under this step and generation.
        IntegrityFailure: the store does not hold what was sent.
    """
    prefix = checkpoint_prefix(step, generation)
    with translated(f"checkpoint {folder}: cannot be read", folder):
        files = tuple(entry for entry in entries_of(folder) if entry.name != COMMIT)
    record = {**extra, "version": RECORD_VERSION, "step": step, "generation": generation, "files": _records(files)}
    present = store.read(prefix + COMMIT)
    if present is None:
        _send(store, {prefix + entry.name: (folder / entry.name, entry) for entry in files})
    _seal(store, prefix + COMMIT, record)
    return Commit(step, generation, files, record)


def committed(store: Store) -> list[Commit]:
    """The checkpoints with a marker, newest first; a marker that cannot be understood is left out with a warning."""
    commits = []
    for step, generation in _marked(store):
        try:
            commit = _read_commit(store, step, generation)
        except IntegrityFailure as error:
            log.warning("%s; not used", error)
            continue
        commits += [commit] if commit else []
    return commits


def pull_checkpoint(store: Store, commit: Commit, to: Path, tick: Callable[[], None] = nothing) -> None:
    """Makes ``to`` the folder that was pushed; it appears whole, every hash compared, or not at all.

    Raises:
        IntegrityFailure: a file is gone from the store, or not what was pushed.
    """
    require_space(to, sum(entry.size for entry in commit.files), f"{store.uri}/{commit.prefix}")
    with translated(f"{store.uri}/{commit.prefix}: cannot be brought here", to.parent), sealing(to) as scratch:
        for entry in commit.files:
            (scratch / entry.name).parent.mkdir(parents=True, exist_ok=True)
        in_parallel(lambda entry: _fetch(store, commit.prefix, entry, scratch / entry.name), commit.files, tick)


def newest_verified(store: Store, to: Path, tick: Callable[[], None] = nothing) -> Commit | None:
    """The newest checkpoint whose every byte is right, brought to ``to``; None if none was ever committed.

    Raises:
        IntegrityFailure: there are checkpoints, but none is whole; the run does not start anew by itself.
    """
    marked = _marked(store)
    for step, generation in marked:
        try:
            commit = _read_commit(store, step, generation)
            if commit is not None:
                pull_checkpoint(store, commit, to, tick)
                return commit
        except IntegrityFailure as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    if not marked:
        return None
    raise IntegrityFailure(
        f"{store.uri}/{CHECKPOINTS}: none of the {len(marked)} committed checkpoints is whole; "
        "restore one, or delete them to start anew"
    )


def prune(store: Store, keep: int | Literal["all"], best: int | None = None) -> list[Commit]:
    """Removes the commits that are neither among the newest ``keep`` nor of step ``best``, and leftovers of old pushes.

    Newest is what the latest owner committed: an older owner's of a higher step is one that it could not read, or it
    would have gone on from there. Nothing is removed unless the newest commit's objects are all there. Markers go
    first: what is cut off in between is no commit.

    Returns:
        What was removed.
    """
    commits = sorted(committed(store), key=lambda commit: (commit.generation, commit.step), reverse=True)
    if keep == "all" or not commits:
        return []
    newest = commits[0]
    if any(not _is_there(store, newest.prefix + entry.name, entry) for entry in newest.files):
        log.warning("%s/%s is not whole; keeping every older checkpoint", store.uri, newest.prefix)
        return []
    old = [commit for commit in commits[max(keep, 1) :] if commit.step != best]
    for commit in old:
        store.delete(commit.prefix + COMMIT)
    removed = {commit.prefix for commit in old}
    marked = {checkpoint_prefix(*found) for found in _marked(store)}
    for entry in list(store.list(CHECKPOINTS)):
        found = parse_checkpoint(entry.key.split("/")[1])
        prefix = checkpoint_prefix(*found) if found else ""
        if found and prefix not in marked and (prefix in removed or found < (newest.step, newest.generation)):
            store.delete(entry.key)
    return old


def newest_step(store: Store) -> int:
    """Step of the newest committed checkpoint, readable or not; 0 if there is none."""
    return max((step for step, _ in _marked(store)), default=0)


def any_committed(store: Store) -> bool:
    """Whether anything was ever committed here, readable or not: if so, the prefix belongs to its spec and inputs."""
    return bool(_marked(store))


def _marked(store: Store) -> list[tuple[int, int]]:
    """Step and generation of every checkpoint that has a marker, newest first."""
    names = (entry.key.split("/") for entry in store.list(CHECKPOINTS))
    found = (parse_checkpoint(parts[1]) for parts in names if len(parts) == 3 and parts[2] == COMMIT)
    return sorted((pair for pair in found if pair), reverse=True)


def _read_commit(store: Store, step: int, generation: int) -> Commit | None:
    """The commit; None if it was deleted meanwhile. Raises IntegrityFailure if its marker cannot be understood."""
    key = checkpoint_prefix(step, generation) + COMMIT
    found = store.read(key)
    if found is None:
        return None
    record = from_json(found[0], f"{store.uri}/{key}")
    if (record.get("step"), record.get("generation")) != (step, generation):
        raise IntegrityFailure(f"{store.uri}/{key}: speaks of another checkpoint (step {record.get('step')!r})")
    return Commit(step, generation, _entries(record, f"{store.uri}/{key}"), record)


# The result


def publish(
    store: Store,
    files: Mapping[str, Path],
    extra: Mapping[str, Any],
    prove: Callable[[], None] = nothing,
    tick: Callable[[], None] = nothing,
    before_seal: Callable[[], None] = nothing,
) -> Manifest:
    """The published manifest, once every file and then the manifest are in the store and read back, byte by byte.

    Args:
        files: by key, relative to the run's prefix.
        extra: what else the manifest records.
        prove: raises unless the run is ours at this moment. Whoever loses it unaware writes nothing over what its
            successor publishes: every file replaces only what was there while the run was proven ours.
        tick: called a few times a second until the manifest is about to be written; what it raises ends the attempt.
        before_seal: called just before that. From then on the result may be published, whatever is heard of it: nothing
            that the manifest lists may be written any more.

    Raises:
        Conflict: a result is published already.
        IntegrityFailure: the store does not hold what was sent.
    """
    if store.read(MANIFEST) is not None:
        raise Conflict(f"{store.uri}: a result is published already; name another output")
    entries = tuple(in_parallel(lambda item: _described(checked(item[0]), item[1]), sorted(files.items())))
    there = dict(in_parallel(lambda entry: (entry.name, store.stat(entry.name)), entries, tick))
    prove()

    def put(path: Path, key: str) -> FileEntry:
        return _replace(store, path, key, there[key], prove)

    _send(store, {entry.name: (files[entry.name], entry) for entry in entries}, tick, put)
    record = {**extra, "version": RECORD_VERSION, "files": _records(entries)}
    manifest = Manifest(entries, record, hashlib.sha256(to_json(record)).hexdigest())
    verify_manifest(store, manifest, tick)  # before the manifest: what it lists is right from its first moment on
    tick()
    prove()
    before_seal()
    _seal_result(store, to_json(record), prove)
    return manifest


def put_proven(store: Store, path: Path, key: str, prove: Callable[[], None]) -> FileEntry:
    """Sends a file that a manifest may list one day; see ``publish`` for ``prove``."""
    there = store.stat(key)
    prove()
    return _replace(store, path, key, there, prove)


def _replace(store: Store, path: Path, key: str, there: Entry | None, prove: Callable[[], None]) -> FileEntry:
    """Sends a file in place of what was seen ``there`` before the run was last proven ours."""
    for _ in range(RACES):
        try:
            return store.put(path, key, if_absent=there is None, if_match=there.etag if there else None)
        except PreconditionFailed as error:
            log.warning("%s", error)
            there = store.stat(key)
            prove()
    raise Conflict(f"{store.uri}/{key}: somebody else writes it again and again; give the run a prefix of its own")


def _seal_result(store: Store, data: bytes, prove: Callable[[], None]) -> None:
    """Writes the manifest and reads it back. Raises IntegrityFailure, Conflict, and what ``prove`` raises."""
    try:
        write_once(store, MANIFEST, data)
    except Conflict as error:
        prove()
        # An owner before us did not know that it lost the run. Every file it lists is ours by now.
        log.warning("%s; it is replaced: this attempt owns the run", error)
        found = store.read(MANIFEST)
        store.write(MANIFEST, data, if_absent=found is None, if_match=found[1] if found else None)
        found = store.read(MANIFEST)
        if found is None or found[0] != data:
            raise


def read_manifest(store: Store) -> Manifest | None:
    """The manifest; None if no result is published. Raises IntegrityFailure if it cannot be understood."""
    found = store.read(MANIFEST)
    if found is None:
        return None
    record = from_json(found[0], f"{store.uri}/{MANIFEST}")
    return Manifest(_entries(record, f"{store.uri}/{MANIFEST}"), record, hashlib.sha256(found[0]).hexdigest())


def verify_manifest(store: Store, manifest: Manifest, tick: Callable[[], None] = nothing) -> None:
    """Hashes every published object anew. Raises IntegrityFailure naming those that are gone or altered."""

    def complaint(entry: FileEntry) -> str | None:
        try:
            present = store.digest(entry.name)
        except InputMissing:
            return f"{store.uri}/{entry.name}: listed, but gone"
        if (present.size, present.sha256) != (entry.size, entry.sha256):
            return f"{store.uri}/{entry.name}: not the bytes that were stored (size or SHA-256 differs)"
        return None

    complaints = [text for text in in_parallel(complaint, manifest.files, tick) if text]
    if complaints:
        raise IntegrityFailure("; ".join(complaints))


# Both


def _send(
    store: Store,
    files: Mapping[str, tuple[Path, FileEntry]],
    tick: Callable[[], None] = nothing,
    put: Callable[[Path, str], FileEntry] | None = None,
) -> None:
    """Puts files under their keys. Raises IntegrityFailure if what was sent, or is there, is not what was described."""

    def send(item: tuple[str, tuple[Path, FileEntry]]) -> None:
        key, (path, entry) = item
        sent = (put or store.put)(path, key)
        if (sent.size, sent.sha256) != (entry.size, entry.sha256):
            raise IntegrityFailure(f"{path}: changed while it was sent to {store.uri}")
        if not _is_there(store, key, entry):
            raise IntegrityFailure(f"{store.uri}/{key}: not there, or of another size, after it was sent")

    in_parallel(send, list(files.items()), tick)


def _seal(store: Store, key: str, record: Mapping[str, Any]) -> None:
    """Writes the object that makes others count; see ``write_once``."""
    write_once(store, key, to_json(record))


def write_once(store: Store, key: str, data: bytes) -> None:
    """Writes an object that is not there yet, and reads it back.

    Raises:
        Conflict: another one is there. The same one is not another: a lost reply makes us write twice.
    """
    try:
        store.write(key, data, if_absent=True)
    except PreconditionFailed:
        log.info("%s/%s: there already", store.uri, key)
    found = store.read(key)
    if found is None:
        raise IntegrityFailure(f"{store.uri}/{key}: not there after it was written")
    if found[0] != data:
        raise Conflict(f"{store.uri}/{key}: another one was written first; this attempt publishes nothing here")


def _fetch(store: Store, prefix: str, entry: FileEntry, to: Path) -> None:
    """Brings one object, compared with its record; damaged bytes are asked for once more."""
    key = prefix + entry.name
    for _ in range(2):
        try:
            got = store.get(key, to)
        except InputMissing as error:
            raise IntegrityFailure(f"{store.uri}/{key}: listed, but gone") from error
        if (got.size, got.sha256) == (entry.size, entry.sha256):
            return
    raise IntegrityFailure(f"{store.uri}/{key}: not the bytes that were stored (size or SHA-256 differs)")


def _described(name: str, path: Path) -> FileEntry:
    with translated(f"{path}: cannot be read", path.parent):
        return entry_of(path, name)


def _is_there(store: Store, key: str, entry: FileEntry) -> bool:
    found = store.stat(key)
    return found is not None and found.size == entry.size


def _records(entries: Iterable[FileEntry]) -> list[dict[str, Any]]:
    return [entry.record() for entry in entries]


def _entries(record: Mapping[str, Any], name: str) -> tuple[FileEntry, ...]:
    """The files a marker or manifest lists. Raises IntegrityFailure if it is not one, or names what it must not."""
    try:
        entries = tuple(FileEntry(item["name"], item["size"], item["sha256"]) for item in record["files"])
        if not all(isinstance(e.size, int) and isinstance(e.sha256, str) and checked(e.name) for e in entries):
            raise TypeError("a file without size or sha256")
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityFailure(f"{name}: no list of files ({error}); it was written by something else") from error
    return entries
