"""Prepared rows, kept for the next attempt of the run: on this machine beside the scratch, and in the store.

What is kept is known by its content: a key over everything that decides it. Only a folder of which every byte is right
is taken; whatever else is found is made again. No torch.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from job.errors import InputMissing, IntegrityFailure, TemporaryFailure
from job.files import FileEntry, entries_of, read_json, sealing, sha256_of, write_json
from job.layout import COMMIT, PREPARED, prepared_prefix
from job.spec import JobSpec
from job.storage.parallel import in_parallel, nothing
from job.storage.store import Store, checked, from_json, require_space, to_json, translated

log = logging.getLogger(__name__)

_CODE = Path(__file__).resolve().parent.parent / "data"
"""The package whose code decides what is prepared."""
_LIBRARIES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def key_of(spec: JobSpec, records: Iterable[Mapping[str, Any]]) -> str:
    """The key (16 hex digits) of what ``job.data.prepare`` makes: the same inputs, keys and code give the same one.

    Args:
        records: name and SHA-256 of every input; weights do not matter.
    """
    lora = spec.lora
    decides = {
        "data": spec.data.model_dump(mode="json", by_alias=True),
        "training": [spec.training.max_length, spec.training.long_rows],
        "lora": [lora.target_modules, lora.modules_to_save, lora.new_tokens],
        "inputs": sorted((one["name"], one["sha256"]) for one in records if not one["name"].endswith(_WEIGHTS)),
        "code": _code(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(_CODE.glob("*.py")))).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


class PreparedCache:
    """The prepared folder of one key, here and in the store."""

    def __init__(self, store: Store, here: Path, key: str) -> None:
        """
        Args:
            here: folder of this machine that outlives the attempt, on the file system of the work folder.
        """
        self._store, self._here, self._key = store, here, key
        self._prefix = prepared_prefix(key)
        self._is_damaged = False

    def take(self, to: Path, tick: Callable[[], None] = nothing) -> str | None:
        """Makes ``to`` the folder that was kept, every hash compared.

        Args:
            tick: called a few times a second while it is brought.

        Returns:
            Where it came from; None if nothing whole was kept.

        Raises:
            AccessDenied, DiskFailure: of the store, and of this machine.
        """
        if self._take_here(to):
            return "this machine"
        try:
            if self._take_from_store(to, tick):
                return self._store.uri
        except (IntegrityFailure, InputMissing, TemporaryFailure) as error:
            self._is_damaged = True
            log.warning("%s; the rows are prepared anew", error)
        return None

    def keep_here(self, folder: Path) -> None:
        """Keeps a sealed folder for the next attempt on this machine; its files are shared, not copied."""
        kept, note = self._place()
        if note.exists():  # it was taken from here
            return
        with translated("prepared rows: cannot be kept", self._here):
            shutil.rmtree(self._here, ignore_errors=True)
            with sealing(kept) as scratch:
                _link(folder, scratch)
            write_json(note, {"files": [entry.record() for entry in entries_of(kept)]})

    def send(self, check: Callable[[], None], tick: Callable[[], None] = nothing) -> None:
        """Sends what is kept here to the store; it counts once its marker, the last object, is there.

        Args:
            check: raises if the run is another attempt's by now; called before the marker is written.

        Raises:
            IntegrityFailure: a file here changed meanwhile.
        """
        kept, note = self._place()
        files = _entries(read_json(note), str(note))
        marker = to_json({"key": self._key, "files": [entry.record() for entry in files]})
        found = self._store.read(self._prefix + COMMIT)
        if found is not None and found[0] == marker and not self._is_damaged:
            return
        self._store.delete(self._prefix + COMMIT)
        in_parallel(lambda entry: self._put(kept / entry.name, entry), files, tick)
        check()
        self._store.write(self._prefix + COMMIT, marker)
        self._drop(lambda key: not key.startswith(self._prefix))

    def drop(self) -> None:
        """Removes everything that was kept of this run, marker first."""
        shutil.rmtree(self._here, ignore_errors=True)
        self._store.delete(self._prefix + COMMIT)
        self._drop(lambda key: True)

    def _drop(self, is_old: Callable[[str], bool]) -> None:
        for entry in [entry for entry in self._store.list(PREPARED) if is_old(entry.key)]:
            self._store.delete(entry.key)

    def _place(self) -> tuple[Path, Path]:
        return self._here / self._key, self._here / f"{self._key}.json"

    def _take_here(self, to: Path) -> bool:
        kept, note = self._place()
        if not note.exists():
            return False
        try:
            files = _entries(read_json(note), str(note))
            if all(_is_whole(kept / entry.name, entry) for entry in files):
                with sealing(to) as scratch:
                    _link(kept, scratch)
                return True
            log.warning("prepared rows kept on this machine are damaged; they are not used")
        except (ValueError, IntegrityFailure) as error:
            log.warning("prepared rows kept on this machine cannot be used: %s", error)
        shutil.rmtree(self._here, ignore_errors=True)
        return False

    def _take_from_store(self, to: Path, tick: Callable[[], None]) -> bool:
        name = f"{self._store.uri}/{self._prefix}"
        found = self._store.read(self._prefix + COMMIT)
        if found is None:
            return False
        files = _entries(from_json(found[0], name + COMMIT), name + COMMIT)
        require_space(to, sum(entry.size for entry in files), name)
        with translated(f"{name}: cannot be brought here", to.parent), sealing(to) as scratch:
            in_parallel(lambda entry: self._get(entry, scratch / entry.name), files, tick)
        return True

    def _put(self, path: Path, entry: FileEntry) -> None:
        sent = self._store.put(path, self._prefix + entry.name)
        if (sent.size, sent.sha256) != (entry.size, entry.sha256):
            raise IntegrityFailure(f"{path}: changed while it was sent to {self._store.uri}")

    def _get(self, entry: FileEntry, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        got = self._store.get(self._prefix + entry.name, to)
        if (got.size, got.sha256) != (entry.size, entry.sha256):
            raise IntegrityFailure(
                f"{self._store.uri}/{self._prefix}{entry.name}: not the bytes that were stored (size, SHA-256)"
            )


def _entries(record: Mapping[str, Any], name: str) -> Sequence[FileEntry]:
    try:
        entries = [FileEntry(item["name"], int(item["size"]), str(item["sha256"])) for item in record["files"]]
        for entry in entries:
            checked(entry.name)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityFailure(f"{name}: no list of files ({error}); it was written by something else") from error
    return entries


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def _link(folder: Path, to: Path) -> None:
    """Gives a folder's files a second name below ``to``: nobody writes into a sealed folder."""
    for path in folder.rglob("*"):
        other = to / path.relative_to(folder)
        if path.is_dir():
            other.mkdir(parents=True, exist_ok=True)
        else:
            other.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, other)
            except OSError:  # not every file system has such names
                shutil.copyfile(path, other)
