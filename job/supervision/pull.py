"""Inputs: what the spec names, looked at where it lies, then brought here and proven.

A file of this machine is used in place; an object of a store and a model of the hub come below one folder, which the
next attempt of the run may find again.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from job.errors import InputMissing, IntegrityFailure
from job.files import FileEntry, read_json, sha256_of, write_json
from job.inputs import Input, Inputs
from job.spec import JobSpec
from job.storage import basemodel, hub
from job.storage.parallel import in_parallel, nothing
from job.storage.store import Store, checked, etag_of, local_path, open_store, require_space, translated
from job.supervision.container import Scratch

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""What run/inputs.json says of one file: name, size, etag, sha256, and of a hub's file the commit."""


@dataclass(frozen=True)
class Piece:
    """One file of the inputs, where it lies."""

    name: str
    """The user's name for it; inputs.json and messages use it."""
    size: int
    """Bytes."""
    etag: str
    """Differs after every change."""
    path: Path
    """On this machine; for an object of a store, where it comes to lie."""
    store: Store | None = None
    """Where it has to be brought from."""
    key: str = ""

    def digest(self) -> str:
        """SHA-256 of its bytes where they are now."""
        if self.store is not None:
            return self.store.digest(self.key).sha256
        with translated(f"{self.name}: cannot be read", self.path):
            return sha256_of(self.path)


@dataclass(frozen=True)
class Survey:
    """What the spec names, found; nothing but listings was read. A hub's model is not looked at yet."""

    inputs: Inputs
    """Where everything will be once it is brought."""
    pieces: tuple[Piece, ...]
    commit: str | None
    """Of a hub model: that of the attempts before, else what the spec says."""
    hub_name: str | None
    folder: Path
    """Where things are brought to."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """For run/inputs.json; complete once everything was brought."""

    def changed(self, recorded: Sequence[Record]) -> list[str]:
        """Names of the inputs that are not what an earlier attempt read: altered, new or gone; sorted.

        Bytes are read only of files whose etag is another. A hub's commit cannot change.
        """
        before = {record.get("name", "?"): record for record in recorded if "commit" not in record or not self.hub_name}
        now = {piece.name: piece for piece in self.pieces}
        suspects = [(before.get(name), now.get(name), name) for name in {*before, *now}]
        answers = in_parallel(lambda suspect: _is_same(suspect[0], suspect[1]), suspects)
        return sorted(name for (_, _, name), same in zip(suspects, answers, strict=True) if not same)

    def bring(self, recorded: Sequence[Record] = (), tick: Callable[[], None] = nothing) -> "Survey":
        """The same with everything on this machine and every file's hash in ``records``.

        Args:
            recorded: what an earlier attempt wrote down; a local file that still has its etag is not hashed again, an
                object that has it must have its hash.
            tick: called a few times a second; see ``job.storage.parallel``.

        Raises:
            DiskFailure: it does not fit.
            IntegrityFailure: bytes that arrived are not what an earlier attempt read.
            JobError: as store and hub raise.
        """
        self._require_space()
        known = {record.get("name"): record for record in recorded}
        calls = [partial(self._brought, piece, known.get(piece.name, {})) for piece in self.pieces]
        place: list[Path] = []
        if self.hub_name is not None:
            calls.append(partial(_from_hub, self.hub_name, self.commit, self.folder / "hub", place))
        records = [line for lines in in_parallel(lambda call: call(), calls, tick) for line in lines]
        if self.hub_name is None:
            return replace(self, records=records)
        inputs = replace(self.inputs, model=Input(self.hub_name, place[0]))
        return replace(self, inputs=inputs, records=records, commit=place[0].name)

    @property
    def bytes_to_bring(self) -> int:
        """Of the objects in stores; a hub's model is not counted."""
        return sum(piece.size for piece in self.pieces if piece.store is not None)

    def bytes_verified(self) -> int:
        """Of the objects that are here and proven, for this attempt and the next on the same volume."""
        return sum(piece.size for piece in self.pieces if piece.store is not None and self._note(piece).exists())

    def bytes_here(self) -> int:
        """Of what was brought so far, files under way included."""
        files = (path for path in self.folder.rglob("*") if not path.is_dir())
        total = 0
        for path in files:
            try:
                total += path.lstat().st_size
            except OSError:  # renamed meanwhile
                continue
        return total

    def _require_space(self) -> None:
        if self.bytes_to_bring:
            missing = max(0, self.bytes_to_bring - self.bytes_here())
            require_space(self.folder, missing, "what the run reads")
            Scratch(self.folder.parent).require(missing, "what the run reads")

    def _brought(self, piece: Piece, known: Record) -> list[dict[str, Any]]:
        record = {"name": piece.name, "size": piece.size, "etag": piece.etag}
        same = known.get("sha256") if known.get("etag") == piece.etag else None
        if piece.store is None:
            return [record | {"sha256": same or piece.digest()}]
        for _ in range(2):
            sha256 = self._fetched(piece, piece.store).sha256
            if same in (None, sha256):
                return [record | {"sha256": sha256}]
            piece.path.unlink(missing_ok=True)
        raise IntegrityFailure(
            f"{piece.name}: arrives with other bytes (SHA-256) than an earlier attempt read, although its etag is the "
            "same; is there a cache in between?"
        )

    def _note(self, piece: Piece) -> Path:
        """What is known of an object's bytes here; written once they were proven."""
        return self.folder / "notes" / f"{piece.path.relative_to(self.folder).as_posix().replace('/', '+')}.json"

    def _fetched(self, piece: Piece, store: Store) -> FileEntry:
        """The object's bytes here: those of an earlier attempt if they are the object's still, else brought anew."""
        note = self._note(piece)
        with translated(f"{piece.name}: cannot be brought here", self.folder, piece.size):
            if piece.path.exists() and note.exists():
                left = read_json(note)
                if left["etag"] == piece.etag and sha256_of(piece.path) == left["sha256"]:
                    log.info("%s is here already, whole", piece.name)
                    return FileEntry(piece.name, piece.size, left["sha256"])
            entry = store.get(piece.key, piece.path)
            write_json(note, {"etag": piece.etag, "sha256": entry.sha256})
            return entry


def survey(spec: JobSpec, folder: Path, *, commit: str | None = None, others: Iterable[Input] = ()) -> Survey:
    """Where everything the spec names lies.

    Args:
        folder: what has to be brought will lie below it.
        commit: of a hub model: the one that an earlier attempt of this run trained on; left out: the spec's revision.
        others: files of this machine besides, for instance a chat template.

    Raises:
        InputMissing, AccessDenied, SpecInvalid, TemporaryFailure: naming the key of the spec.
    """
    data = spec.data
    pieces = [
        _data(source.source, "data.train", folder / f"train-{number}") for number, source in enumerate(data.train)
    ]
    evaluation = [_data(data.eval, "data.eval", folder / "eval")] if data.eval is not None else []
    model, weights = _model(spec.model.source, folder / "model")
    everything = [*weights, *pieces, *evaluation, *(_local(item.uri, item.path) for item in others)]
    # What is named more than once is brought once, and read there by all that name it.
    unique = {piece.name: piece for piece in reversed(everything)}
    inputs = Inputs(
        model=model,
        train=tuple(Input(piece.name, unique[piece.name].path) for piece in pieces),
        eval=Input(evaluation[0].name, unique[evaluation[0].name].path) if evaluation else None,
    )
    brought = tuple(reversed(unique.values()))
    hub_name = spec.model.source if not weights else None
    return Survey(inputs, brought, commit or spec.model.revision, hub_name, folder)


def _is_same(record: Record | None, piece: Piece | None) -> bool:
    if record is None or piece is None:
        return False
    return record.get("etag") == piece.etag or record.get("sha256") == piece.digest()


def _from_hub(name: str, commit: str | None, to: Path, place: list[Path]) -> list[dict[str, Any]]:
    """Records of a hub model's files, once it is here; its folder is added to ``place``."""
    folder, found = hub.pull(name, commit, to)
    place.append(folder)
    pieces = [_local(f"{name}/{path.name}", path) for path in basemodel.files_of(folder)]
    return [
        {"name": piece.name, "size": piece.size, "etag": piece.etag, "sha256": piece.digest(), "commit": found}
        for piece in pieces
    ]


def _local(name: str, path: Path) -> Piece:
    with translated(f"{name}: cannot be read", path):
        status = path.stat()
    # The time of change besides: the time of writing can be set back, as cp -p and rsync -t do.
    return Piece(name, status.st_size, f"{etag_of(status)}-{status.st_ctime_ns}", path)


def _model(source: str, folder: Path) -> tuple[Input, list[Piece]]:
    """The base model and its files; no files for one of the hub."""
    path = local_path(source)
    if path is None:
        return Input(source, folder), _model_in_store(source, folder)
    with translated(f"model {source}: cannot be looked at", path):
        if path.is_dir():
            files = basemodel.files_of(path)
            if not files:
                raise InputMissing(f"model {source}: an empty folder ({path}); it takes config, weights and tokenizer")
            return Input(source, path), [_local(f"{source}/{file.name}", file) for file in files]
        if path.exists():
            raise InputMissing(f"model {source}: a file; a model is a folder with config.json, weights and tokenizer")
    if not hub.looks_like_hub_id(source):
        raise InputMissing(
            f"model {source}: no such folder (looked for {path}), and no hub id either: a hub id is org/name"
        )
    return Input(source, folder), []


def _model_in_store(uri: str, folder: Path) -> list[Piece]:
    store = open_store(uri)
    entries = {entry.key: entry for entry in store.list("") if not entry.key.endswith("/")}
    names = sorted(basemodel.wanted(set(entries)))
    if not names:
        some = ", ".join(sorted(entries)[:5]) or "nothing at all"
        raise InputMissing(
            f"model {uri}: no config, weights or tokenizer directly below this prefix (found {some}); "
            "check bucket and prefix"
        )
    base = uri.rstrip("/")
    return [
        Piece(f"{base}/{name}", entries[name].size, entries[name].etag, folder / checked(name), store, name)
        for name in names
    ]


def _data(uri: str, key: str, folder: Path) -> Piece:
    path = local_path(uri)
    if path is None:
        return _data_in_store(uri, key, folder)
    with translated(f"{key} {uri}: cannot be read", path):
        if path.is_dir():
            some = ", ".join(sorted(item.name for item in path.iterdir() if item.is_file())[:5])
            raise InputMissing(f"{key} {uri}: a folder; name a file of it, or several ({some or 'it holds no file'})")
        if not path.is_file():
            raise InputMissing(f"{key} {uri}: no such file (looked for {path}); a relative path starts at {Path.cwd()}")
        with path.open("rb"):  # the right to read shows only when it is used
            return _local(uri, path)


def _data_in_store(uri: str, key: str, folder: Path) -> Piece:
    parent, _, name = uri.rpartition("/")
    store = open_store(parent)
    entry = store.stat(name) if name else None
    if entry is not None:
        return Piece(uri, entry.size, entry.etag, folder / PurePosixPath(checked(name)).name, store, name)
    below = [found.key for found in store.list(f"{name}/" if name else "")][:5]
    if below:
        raise InputMissing(f"{key} {uri}: a prefix; name an object below it, or several ({', '.join(below)})")
    near = [found.key for found in store.list("") if "/" not in found.key][:5]
    raise InputMissing(f"{key} {uri}: no such object; there are {', '.join(near) or 'none'} below {parent}")
