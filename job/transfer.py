"""Moving bytes: inputs in, checkpoints and the result out, each proven by size and SHA-256.

A checkpoint is committed, and a result published, by one small object written last. Whatever dies before it leaves the
state before; whatever dies after it leaves the state after.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from job import basemodel, hub
from job.errors import Conflict, InputMissing, IntegrityFailure, SpecInvalid
from job.files import FileEntry, entries_of, entry_of, sealing, sha256_of
from job.inputs import Input, Inputs, write_inputs
from job.layout import CHECKPOINTS, COMMIT, MANIFEST, checkpoint_prefix, parse_checkpoint
from job.spec import JobSpec
from job.store import (
    PreconditionFailed,
    Store,
    checked,
    etag_of,
    from_json,
    local_path,
    require_space,
    to_json,
    translated,
)
from job.workdir import WorkDir

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

THREADS = 4
RECORD_VERSION = 1


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


# Inputs


def pull_inputs(spec: JobSpec, workdir: WorkDir, *, revision: str | None = None, token: str | None = None) -> Inputs:
    """Where everything the spec names lies on this machine, written to ``workdir.inputs`` too.

    What is here already is used where it lies; only a hub model is brought, below ``workdir.pulled``.

    Args:
        revision: commit that an earlier attempt of this run trained on; left out: the spec's.
        token: for the hub; left out: the environment's.

    Raises:
        InputMissing, AccessDenied, TemporaryFailure, IntegrityFailure, DiskFailure: naming the key of the spec.
    """
    data = spec.data
    train = tuple(_data_file(source.source, "data.train") for source in data.train)
    evaluation = _data_file(data.eval, "data.eval") if data.eval is not None else None
    model = _model_folder(spec.model.source, revision or spec.model.revision, workdir.pulled / "hub", token)
    inputs = Inputs(model, train, evaluation)
    with translated("the record of the inputs: cannot be written", workdir.root):
        write_inputs(workdir.inputs, inputs)
    return inputs


def _model_folder(source: str, revision: str | None, to: Path, token: str | None) -> Input:
    path = _path_of(source, "model")
    with translated(f"model {source}: cannot be looked at", path):
        if path.is_dir():
            return Input(source, path)
        if path.exists():
            raise InputMissing(f"model {source}: a file; a model is a folder with config.json, weights and tokenizer")
    if not hub.looks_like_hub_id(source):
        raise InputMissing(
            f"model {source}: no such folder (looked for {path}), and no hub id either: a hub id is org/name"
        )
    return Input(source, hub.pull(source, revision, to, token)[0])


def _data_file(uri: str, key: str) -> Input:
    path = _path_of(uri, key)
    with translated(f"{key} {uri}: cannot be read", path):
        if path.is_dir():
            some = ", ".join(sorted(item.name for item in path.iterdir() if item.is_file())[:5])
            raise InputMissing(f"{key} {uri}: a folder; name a file of it, or several ({some or 'it holds no file'})")
        if not path.is_file():
            raise InputMissing(f"{key} {uri}: no such file (looked for {path}); a relative path starts at {Path.cwd()}")
        with path.open("rb"):  # the right to read shows only when it is used
            return Input(uri, path)


def _path_of(uri: str, key: str) -> Path:
    path = local_path(uri)
    if path is None:
        scheme = uri.split("://")[0]
        raise SpecInvalid(
            f"{key} {uri}: {scheme}:// needs a client this version does not have: it reads files and folders only; "
            "name a path, or file:///PATH"
        )
    return path


def fingerprint(
    inputs: Inputs, recorded: Sequence[Mapping[str, Any]] = (), others: Sequence[Input] = ()
) -> list[dict[str, Any]]:
    """What ``run/inputs.json`` records of the inputs: name, size, etag and sha256 of each file, and a hub's commit.

    Args:
        recorded: an earlier fingerprint; a file that still has its etag is not hashed again.
        others: files besides, for instance a chat template.
    """
    known = {record.get("name"): record for record in recorded}
    with translated(f"model {inputs.model.uri}: cannot be read", inputs.model.path):
        model = basemodel.files_of(inputs.model.path)
    commit = hub.commit_of(inputs.model.path)
    files = [(f"{inputs.model.uri}/{path.name}", path, {"commit": commit} if commit else {}) for path in model]
    files += [(item.uri, item.path, {}) for item in (*inputs.train, *([inputs.eval] if inputs.eval else []), *others)]

    def describe(file: tuple[str, Path, dict[str, str]]) -> dict[str, Any]:
        name, path, extra = file
        with translated(f"{name}: cannot be read", path):
            status = path.stat()
            # The time of change besides: the time of writing can be set back, as cp -p and rsync -t do.
            etag, before = f"{etag_of(status)}-{status.st_ctime_ns}", known.get(name, {})
            sha256 = before.get("sha256") if before.get("etag") == etag else None
            return {"name": name, "size": status.st_size, "etag": etag, "sha256": sha256 or sha256_of(path), **extra}

    return _in_parallel(describe, list({file[0]: file for file in files}.values()))


def changed(recorded: Iterable[Mapping[str, Any]], present: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the inputs that are not what an earlier attempt read: altered, new or gone; sorted."""
    before = {record.get("name", "?"): record for record in recorded}
    now = {record.get("name", "?"): record for record in present}

    def same(name: str) -> bool:
        one, other = before.get(name), now.get(name)
        if one is None or other is None:
            return False
        return any(one.get(key) is not None and one.get(key) == other.get(key) for key in ("etag", "sha256"))

    return sorted(name for name in {*before, *now} if not same(name))


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


def pull_checkpoint(store: Store, commit: Commit, to: Path) -> None:
    """Makes ``to`` the folder that was pushed; it appears whole, every hash compared, or not at all.

    Raises:
        IntegrityFailure: a file is gone from the store, or not what was pushed.
    """
    require_space(to, sum(entry.size for entry in commit.files), f"{store.uri}/{commit.prefix}")
    with translated(f"{store.uri}/{commit.prefix}: cannot be brought here", to.parent), sealing(to) as scratch:
        _in_parallel(lambda entry: _fetch(store, commit.prefix, entry, scratch / entry.name), commit.files)


def newest_verified(store: Store, to: Path) -> Commit | None:
    """The newest checkpoint whose every byte is right, brought to ``to``; None if none was ever committed.

    Raises:
        IntegrityFailure: there are checkpoints, but none is whole; the run does not start anew by itself.
    """
    marked = _marked(store)
    for step, generation in marked:
        try:
            commit = _read_commit(store, step, generation)
            if commit is not None:
                pull_checkpoint(store, commit, to)
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

    Nothing is removed unless the newest commit's objects are all there. Markers go first: what is cut off in between is
    no commit.

    Returns:
        What was removed.
    """
    commits = committed(store)
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


def publish(store: Store, files: Mapping[str, Path], extra: Mapping[str, Any]) -> Manifest:
    """The published manifest, once every file and then the manifest are in the store and read back.

    Args:
        files: by key, relative to the run's prefix.
        extra: what else the manifest records.

    Raises:
        Conflict: a result is published already.
        IntegrityFailure: the store does not hold what was sent.
    """
    if store.read(MANIFEST) is not None:
        raise Conflict(f"{store.uri}: a result is published already; name another output")
    entries = tuple(_in_parallel(lambda item: _described(checked(item[0]), item[1]), sorted(files.items())))
    _send(store, {entry.name: (files[entry.name], entry) for entry in entries})
    record = {**extra, "version": RECORD_VERSION, "files": _records(entries)}
    _seal(store, MANIFEST, record)
    _require_all(store, entries)
    return Manifest(entries, record)


def read_manifest(store: Store) -> Manifest | None:
    """The manifest; None if no result is published. Raises IntegrityFailure if it cannot be understood."""
    found = store.read(MANIFEST)
    if found is None:
        return None
    record = from_json(found[0], f"{store.uri}/{MANIFEST}")
    return Manifest(_entries(record, f"{store.uri}/{MANIFEST}"), record)


def verify_manifest(store: Store, manifest: Manifest) -> None:
    """Hashes every published object anew. Raises IntegrityFailure naming those that are gone or altered."""
    with tempfile.TemporaryDirectory(prefix="tunejob-verify-") as scratch:

        def complaint(numbered: tuple[int, FileEntry]) -> str | None:
            number, entry = numbered
            try:
                _fetch(store, "", entry, Path(scratch) / str(number), local=True)
            except IntegrityFailure as error:
                return str(error)
            return None

        complaints = [text for text in _in_parallel(complaint, list(enumerate(manifest.files))) if text]
    if complaints:
        raise IntegrityFailure("; ".join(complaints))


# Both


def _send(store: Store, files: Mapping[str, tuple[Path, FileEntry]]) -> None:
    """Puts files under their keys. Raises IntegrityFailure if what was sent, or is there, is not what was described."""

    def send(item: tuple[str, tuple[Path, FileEntry]]) -> None:
        key, (path, entry) = item
        sent = store.put(path, key)
        if (sent.size, sent.sha256) != (entry.size, entry.sha256):
            raise IntegrityFailure(f"{path}: changed while it was sent to {store.uri}")
        if not _is_there(store, key, entry):
            raise IntegrityFailure(f"{store.uri}/{key}: not there, or of another size, after it was sent")

    _in_parallel(send, list(files.items()))


def _seal(store: Store, key: str, record: Mapping[str, Any]) -> None:
    """Writes the object that makes others count, once, and reads it back.

    Raises:
        Conflict: another one is there. The same one is not another: a lost reply makes us write twice.
    """
    data = to_json(record)
    try:
        store.write(key, data, if_absent=True)
    except PreconditionFailed:
        log.info("%s/%s: there already", store.uri, key)
    found = store.read(key)
    if found is None:
        raise IntegrityFailure(f"{store.uri}/{key}: not there after it was written")
    if found[0] != data:
        raise Conflict(f"{store.uri}/{key}: another one was written first; this attempt publishes nothing here")


def _fetch(store: Store, prefix: str, entry: FileEntry, to: Path, local: bool = False) -> None:
    """Brings one object, compared with its record; damaged bytes are asked for once more.

    Args:
        local: hash bytes that lie on this machine where they are, and bring nothing.
    """
    key = prefix + entry.name
    here = store.local(key) if local else None
    for _ in range(2):
        try:
            got = _described(key, here) if here else store.get(key, to)
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


def _require_all(store: Store, entries: Iterable[FileEntry]) -> None:
    for entry in entries:
        if not _is_there(store, entry.name, entry):
            raise IntegrityFailure(f"{store.uri}/{entry.name}: listed in the manifest, but not there in its size")


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


def _in_parallel(call: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """The results in order. The first failure is raised once the calls under way are done; no new one begins."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
